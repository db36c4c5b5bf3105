"""Partial blobs: fetched piece by piece, in any order, kept over restarts.

A partial is two files: ``partials/<algorithm>-<hex>.data``, as long as the blob from the start, and
``.pieces``, which says what is there (see `swarmpull.store.piece_records`).

The mark of a piece is written after its content.  Neither is flushed piece by piece: a killed process loses
nothing, and after a power failure the claimed pieces are verified again, as at every opening.

A piece comes from a peer, whole and to be checked against a hash that is known (`store_piece`), or from the
backend, as a stream whose hash makes the metainfo grow (`piece_writer`).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import attrs
import trio

from swarmpull.digest import Digest
from swarmpull.errors import DigestMismatch, InvalidDigest, StoreFull, StoreUnavailable
from swarmpull.store import piece_records, sidecars
from swarmpull.store.content import BlobStat, ContentTree
from swarmpull.store.disk import Disk, OpenFile
from swarmpull.store.durable import Data, read_exactly, remove, write_all
from swarmpull.store.eviction import Kind
from swarmpull.store.hashing import (
    FileHasher,
    Hasher,
    hash_piece,
    hash_stored_piece,
    new_piece_hasher,
)
from swarmpull.store.ledger import Record
from swarmpull.store.piece_records import MISSING, STORED, PieceRecords
from swarmpull.store.scanning import STEP_BYTES
from swarmpull.swarm import bitfield
from swarmpull.swarm.metainfo import PIECE_HASH_BYTES, BlobShape, GrowingMetainfo

DATA_SUFFIX: Final = ".data"
PIECES_SUFFIX: Final = ".pieces"
# What st_blocks counts, whatever the file system's own blocks are.
BLOCK_BYTES: Final = 512
# What a file system answers that cannot reserve space, or has nothing to reserve.
_CANNOT_RESERVE: Final = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS})


@attrs.frozen
class PartialFiles:
    """The two files of one partial; its methods block."""

    directory: Path
    digest: Digest

    @property
    def data(self) -> Path:
        return self._path(DATA_SUFFIX)

    @property
    def pieces(self) -> Path:
        return self._path(PIECES_SUFFIX)

    def _path(self, suffix: str) -> Path:
        return self.directory / f"{self.digest.algorithm}-{self.digest.hex}{suffix}"

    def remove(self) -> None:
        remove(self.pieces)
        remove(self.data)

    def take_out(self, tree: ContentTree) -> list[Path]:
        """Make them no partial any more; returns the temporary files, for the caller to remove."""
        taken = []
        for path in (self.pieces, self.data):
            target = tree.temporary_path()
            with suppress(FileNotFoundError):
                path.rename(target)
                taken.append(target)
        tree.ledger.put(Kind.PARTIAL, self.digest, None)
        return taken

    def count(self, tree: ContentTree) -> None:
        """Bring the ledger to what is on the disk."""
        now = tree.ledger.clock()
        try:
            data, pieces = os.stat(self.data), os.stat(self.pieces)
        except FileNotFoundError:
            record = None
        else:
            # Nothing but this store writes to them: the first write made them, the last was a piece.
            used_at = min(now, max(data.st_mtime, pieces.st_mtime))
            record = Record(data.st_blocks * BLOCK_BYTES, used_at, used_at)
        tree.ledger.put(Kind.PARTIAL, self.digest, record)

    def claimed(self, metainfo: GrowingMetainfo) -> dict[int, bytes]:
        """The pieces that the files claim to hold, each with what it has to hash to.

        That is what ``metainfo`` says, or else what was written down with the piece; none when the files are
        of another shape.
        """
        records = self.load()
        if records is None:
            return {}
        shape = (records.shape.length, records.shape.piece_length)
        if shape != (metainfo.length, metainfo.piece_length):
            return {}
        return {
            index: metainfo.piece_hash(index) or records.piece_hash(index)
            for index in bitfield.indices(records.have)
        }

    def load(self) -> PieceRecords | None:
        """What is written down about the pieces; None when there is no such file, or it is damaged."""
        try:
            return piece_records.decode(self.pieces.read_bytes())
        except (FileNotFoundError, sidecars.DamagedSidecar):
            return None

    def unclaim(self, indices: Iterable[int]) -> None:
        """Have pieces count as missing."""
        records = self.load()
        if records is None:
            return
        descriptor = os.open(self.pieces, os.O_WRONLY | os.O_CLOEXEC)
        try:
            for index in indices:
                write_all(descriptor, MISSING, records.marks_offset + index)
        finally:
            os.close(descriptor)

    def open(self, tree: ContentTree, metainfo: GrowingMetainfo) -> OpenPartial:
        """Open or create the files, with room for the whole blob."""
        claimed = self.claimed(metainfo)
        content = piece_records.encode(metainfo, claimed)
        records = piece_records.decode(content)
        if not claimed:
            self.remove()
        descriptors: list[int] = []
        try:
            tree.replace_small_file(self.pieces, content)
            descriptors.append(os.open(self.pieces, os.O_RDWR | os.O_CLOEXEC))
            descriptors.append(os.open(self.data, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644))
            reserve(descriptors[1], metainfo.length)
        except OSError:
            for descriptor in descriptors:
                os.close(descriptor)
            if not claimed:
                self.remove()
            raise
        return OpenPartial(
            descriptors[1],
            descriptors[0],
            records.hashes_offset,
            records.marks_offset,
            claimed,
        )


@attrs.frozen
class OpenPartial:
    """What `PartialFiles.open` has opened.

    Attributes:
        data: descriptor of the content.
        pieces: descriptor of the record of stored pieces.
        hashes_offset, marks_offset: where in that file those of piece 0 are.
        claimed: the pieces to verify, with their hashes.
    """

    data: int
    pieces: int
    hashes_offset: int
    marks_offset: int
    claimed: dict[int, bytes]


def reserve(descriptor: int, length: int) -> None:
    """Give a file its length and, where the file system can, the room for it."""
    os.ftruncate(descriptor, length)
    try:
        if length:
            os.posix_fallocate(descriptor, 0, length)
    except OSError as error:
        if error.errno not in _CANNOT_RESERVE:
            raise


class PartialBlob:
    """A blob that is being fetched.

    Use as an async context manager, or call `aclose`: the descriptor is open until then, also after
    `commit`, so that uploads from it can end.

    Attributes:
        metainfo: what is known of the blob; hashes may become known as long as it is open.
        have: bitfield of the pieces that are verified and stored.
    """

    def __init__(
        self,
        metainfo: GrowingMetainfo,
        files: PartialFiles,
        opened: OpenPartial,
        tree: ContentTree,
        disk: Disk,
        on_release: Callable[[], object],
    ) -> None:
        self.metainfo = metainfo
        self.have = 0
        self._files = files
        self._data = OpenFile(opened.data)
        self._pieces = OpenFile(opened.pieces)
        self._hashes_offset = opened.hashes_offset
        self._marks_offset = opened.marks_offset
        self._tree = tree
        self._disk = disk
        self._hasher = FileHasher(metainfo.digest.algorithm)
        self._hashing = trio.Lock()
        self._ending = trio.Lock()
        self._grown = trio.Event()
        self._ahead = trio.CancelScope()
        self._committed: BlobStat | None = None
        self._removed = False
        self._condemned = False
        self._released = False
        self._on_release = on_release

    @property
    def complete(self) -> bool:
        """Whether every piece is stored."""
        return self.have == bitfield.full(self.metainfo.piece_count)

    def fileno(self) -> int:
        """The descriptor of the content, for sending stored pieces; valid until `aclose`.

        Raises:
            ValueError: closed.
        """
        return self._data.fileno()

    async def read_at(self, offset: int, size: int) -> bytes:
        """Exactly ``size`` bytes from ``offset``.

        Raises:
            ValueError: the range touches a piece that is not stored, or lies outside the blob; or closed.
            StoreUnavailable: the disk failed.
        """
        self._check_stored(offset, size)
        with self._data.use() as descriptor:
            return await self._disk.run(read_exactly, descriptor, offset, size)

    async def store_piece(self, index: int, data: Data) -> bool:
        """Verify one piece and store it; False, and nothing written, when it does not match its hash.

        One whose hash is not known does not match either.  ``data`` must not change until this returns.  A
        piece that is stored already is not written again.

        Raises:
            IndexError: the blob has no such piece.
            StoreFull: the disk has no room for it.
            StoreUnavailable: the disk failed.
            ValueError: closed.
        """
        if len(data) != self.metainfo.piece_size(index):
            return False
        with self._data.use() as content, self._pieces.use() as record:
            stored = await self._disk.run(
                self._verify_and_write, content, record, index, data, needed=len(data)
            )
        if stored:
            self._piece_stored(index)
        return stored

    async def hash_stored(self, index: int, data: Data) -> None:
        """Hash a stored piece for the digest of the blob while it is in memory, if it is the next one.

        Spares a second reading.  Pieces that came before their turn are read from the disk.  ``data`` must
        not change until this returns.
        """
        if self._hashing.locked():
            return
        async with self._hashing:
            if self._hasher.offset == self.metainfo.piece_offset(index):
                await self._disk.run(self._hasher.update, data, ahead=True)

    def piece_writer(self, index: int) -> PieceWriter:
        """Take a piece from a source of our own, as a stream.

        Raises:
            IndexError: the blob has no such piece.
        """
        return PieceWriter(self, index)

    async def take_some(self, index: int, data: Data, offset: int, hasher: Hasher) -> None:
        """Hash some content, and write it unless the piece is stored already; for `PieceWriter`."""
        with self._data.use() as content:
            if self.have >> index & 1:
                await self._disk.run(hasher.update, memoryview(data))
            else:
                await self._disk.run(
                    _write_and_hash, content, data, offset, hasher, needed=len(data)
                )

    async def take_piece(self, index: int, actual: bytes) -> bool:
        """A piece is written whole: keep it unless it should hash to something else; for `PieceWriter`."""
        known = self.metainfo.piece_hash(index)
        if known is not None and known != actual:
            return False
        # At once, so that nobody adds another one while it is written down.
        self.metainfo.add(index, actual)
        with self._pieces.use() as record:
            await self._disk.run(self._mark_stored, record, index, actual, needed=len(actual))
        self._piece_stored(index)
        return True

    def _piece_stored(self, index: int) -> None:
        self.have |= 1 << index
        self._grown.set()

    async def verify(self) -> None:
        """Check the complete partial against its digest; `commit` then only makes it durable.

        Raises what `commit` does for a blob that is not what its digest says.
        """
        async with self._ending:
            if self._committed is None:
                self._check_committable()
                await self._verify_whole()

    async def commit(self) -> BlobStat:
        """Make the complete partial a blob of the store; durable on return.  Committing twice is allowed.

        Raises:
            ValueError: pieces are missing, or it was discarded.
            DigestMismatch: all pieces are right but the blob is not, so the metainfo was wrong; the partial
                is removed.
            StoreFull, StoreUnavailable: it stays as it is.
        """
        async with self._ending:
            if self._committed is not None:
                return self._committed
            self._check_committable()
            await self._verify_whole()
            self._committed = await self._disk.run(self._install, needed=self.metainfo.length)
            self._release()
            return self._committed

    async def discard(self) -> None:
        """Close it and remove what was fetched; nothing happens to a committed blob."""
        async with self._ending:
            await self._remove_files()
        await self.aclose()

    def condemn(self) -> None:
        """Have `aclose` remove what was fetched; nothing happens to a committed blob."""
        self._condemned = True

    async def aclose(self) -> None:
        """Close it and keep what was fetched, unless it is condemned; closing twice is allowed.

        Reads and writes under way still end; a commit under way ends with the blob or with ValueError.
        """
        self.close_files()
        with trio.CancelScope(shield=True):
            async with self._ending:
                if self._condemned:
                    await self._remove_files()
                self._release()

    def close_files(self) -> None:
        """Close the descriptors, each when its last user is done."""
        self._ahead.cancel()
        self._data.close()
        self._pieces.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def verify_claimed(self, claimed: dict[int, bytes]) -> None:
        """Take over the pieces of an earlier run that still match their hashes."""
        for index, piece_hash in claimed.items():
            with self._data.use() as content, self._pieces.use() as record:
                if await self._disk.run(self._verify_stored, content, record, index, piece_hash):
                    self.have |= 1 << index
                    self.metainfo.add(index, piece_hash)

    async def hash_ahead(self) -> None:
        """Hash the growing prefix until it is complete or released; a task of the store."""
        with self._ahead:
            while self._hasher.offset < self.metainfo.length and not self._data.closed:
                self._grown = trio.Event()
                if self._hasher.offset == self._prefix():
                    await self._grown.wait()
                    continue
                try:
                    await self._hash_step(self._prefix(), ahead=True)
                except (StoreFull, StoreUnavailable):
                    # Whoever commits reads the same bytes and gets the error.
                    return

    def _prefix(self) -> int:
        """How many bytes from the beginning are stored without a gap."""
        missing = ~self.have & (self.have + 1)
        return min(self.metainfo.length, (missing.bit_length() - 1) * self.metainfo.piece_length)

    async def _hash_step(self, stop: int, *, ahead: bool) -> None:
        with self._data.use() as descriptor:
            async with self._hashing:
                stop = min(stop, self._hasher.offset + STEP_BYTES)
                if self._hasher.offset < stop:  # it may have been hashed from memory meanwhile
                    await self._disk.run(self._hasher.advance, descriptor, stop, ahead=ahead)

    async def _verify_whole(self) -> None:
        while self._hasher.offset < self.metainfo.length:
            await self._hash_step(self.metainfo.length, ahead=False)
        actual = self._hasher.digest()
        if actual != self.metainfo.digest:
            await self._remove_files()
            raise DigestMismatch(str(self.metainfo.digest), str(actual))

    async def _remove_files(self) -> None:
        if self._committed is None and not self._removed:
            with trio.CancelScope(shield=True):
                await self._disk.run(self._files.remove)
            self._removed = True
            self._release()

    def _install(self) -> BlobStat:
        metainfo = self.metainfo.complete()
        assert metainfo is not None, "a piece is stored only when its hash is known"
        stat = self._tree.install(self._files.data, metainfo, self._leave)
        self._files.remove()
        return stat

    def _leave(self) -> None:
        self._tree.ledger.put(Kind.PARTIAL, self.metainfo.digest, None)

    def _verify_and_write(self, content: int, record: int, index: int, data: Data) -> bool:
        if hash_piece(data) != self.metainfo.piece_hash(index):
            return False
        if not self.have >> index & 1:
            write_all(content, data, self.metainfo.piece_offset(index))
            self._mark_stored(record, index, self.metainfo.piece_hash(index) or b"")
        return True

    def _mark_stored(self, record: int, index: int, piece_hash: bytes) -> None:
        write_all(record, piece_hash, self._hashes_offset + index * PIECE_HASH_BYTES)
        write_all(record, STORED, self._marks_offset + index)

    def _verify_stored(self, content: int, record: int, index: int, piece_hash: bytes) -> bool:
        start = self.metainfo.piece_offset(index)
        actual = hash_stored_piece(content, start, start + self.metainfo.piece_size(index))
        if actual == piece_hash:
            return True
        write_all(record, MISSING, self._marks_offset + index)
        return False

    def _check_stored(self, offset: int, size: int) -> None:
        if offset < 0 or size < 0 or offset + size > self.metainfo.length:
            raise ValueError(f"{offset}:{offset + size} lies outside {self.metainfo.digest}")
        for index in self.metainfo.pieces_of(offset, offset + size):
            if not self.have >> index & 1:
                raise ValueError(f"piece {index} of {self.metainfo.digest} is not stored")

    def _check_committable(self) -> None:
        if self._removed or self._data.closed:
            raise ValueError(f"the partial of {self.metainfo.digest} was discarded or closed")
        if not self.complete:
            missing = self.metainfo.piece_count - self.have.bit_count()
            raise ValueError(f"{missing} pieces of {self.metainfo.digest} are missing")

    def _release(self) -> None:
        self._ahead.cancel()
        if not self._released:
            self._released = True
            self._on_release()


class PieceWriter:
    """One piece on its way from the backend, in chunks of any length.

    Its bytes are in the file before they are verified, but the piece is not marked as stored until all are
    there and match the hash, if that is known already.  Of a piece that is given up nothing counts.

    Attributes:
        index: of the piece.
        left: bytes that are still to come.
    """

    def __init__(self, partial: PartialBlob, index: int) -> None:
        self.index = index
        self.left = partial.metainfo.piece_size(index)
        self._partial = partial
        self._offset = partial.metainfo.piece_offset(index)
        self._hasher = new_piece_hasher()

    async def write(self, data: Data) -> None:
        """Take the next bytes, at most `left`.

        Raises:
            StoreFull, StoreUnavailable: the disk has no room for them, or failed.
            ValueError: the partial is closed, or these are too many bytes.
        """
        if len(data) > self.left:
            raise ValueError(f"{len(data)} bytes for the last {self.left} of a piece")
        await self._partial.take_some(self.index, data, self._offset, self._hasher)
        self._offset += len(data)
        self.left -= len(data)

    async def finish(self) -> bool:
        """All bytes are there: store the piece; False when it does not match the hash that is known.

        Raises:
            StoreFull, StoreUnavailable: the disk failed.
            ValueError: the partial is closed, or bytes are missing.
        """
        if self.left:
            raise ValueError(f"{self.left} bytes of piece {self.index} are missing")
        return await self._partial.take_piece(self.index, self._hasher.digest())


def _write_and_hash(descriptor: int, data: Data, offset: int, hasher: Hasher) -> None:
    write_all(descriptor, data, offset)
    hasher.update(memoryview(data))


async def open_partial(
    directory: Path,
    metainfo: BlobShape,
    tree: ContentTree,
    disk: Disk,
    on_release: Callable[[], object],
) -> PartialBlob:
    """Open or resume the partial of a blob; its claimed pieces are verified.

    Args:
        metainfo: what is known of it: `Metainfo`, a shape without any hash, or `GrowingMetainfo`, which
            then becomes the partial's own.
        on_release: called once, when the files are no longer this partial's; not when this raises.

    Raises:
        StoreFull: no room for the whole blob; nothing is left behind.
        StoreUnavailable: the disk failed.
    """
    files = PartialFiles(directory, metainfo.digest)
    if not isinstance(metainfo, GrowingMetainfo):
        metainfo = GrowingMetainfo.from_shape(metainfo)
    opened = await disk.run(files.open, tree, metainfo, needed=metainfo.length)
    partial = PartialBlob(metainfo, files, opened, tree, disk, on_release)
    try:
        await partial.verify_claimed(opened.claimed)
    except BaseException:
        partial.close_files()
        raise
    return partial


def list_partials(directory: Path) -> Iterator[PartialFiles]:
    """The partials on the disk, in the order of their digests."""
    for path in sorted(directory.glob(f"*{PIECES_SUFFIX}")):
        with suppress(InvalidDigest):
            digest = Digest.parse(path.stem.replace("-", ":", 1))
            yield PartialFiles(directory, digest)


def remove_halves(directory: Path) -> None:
    """Remove partials of which a crash has left one file only."""
    for path in sorted(directory.iterdir()):
        other = {DATA_SUFFIX: PIECES_SUFFIX, PIECES_SUFFIX: DATA_SUFFIX}.get(path.suffix)
        if other is not None and not path.with_suffix(other).exists():
            remove(path)
