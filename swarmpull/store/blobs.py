"""The content-addressed store of one role: complete blobs, partial blobs and uploads under one root.

::

    lock                          held while a process uses the store
    blobs/<algorithm>/ab/<hex>    complete, verified blobs, with their metainfo beside them
    partials/  uploads/           what is on its way in; survives restarts
    temporary/                    files without a name yet; emptied at every start

Nothing is visible under a digest that does not hash to it: content is written elsewhere, verified, flushed,
renamed into place, and the directory flushed.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import structlog
import trio

from swarmpull.digest import Digest
from swarmpull.errors import (
    BlobNotFound,
    DigestMismatch,
    StoreFull,
    StoreUnavailable,
)
from swarmpull.store.content import BlobStat, ContentTree
from swarmpull.store.data_directory import lock_directory, unusable
from swarmpull.store.disk import Disk, OpenFile
from swarmpull.store.durable import Data, drop_cached, make_directory, read_exactly
from swarmpull.store.eviction import Kind, Limits
from swarmpull.store.holds import Hold, Holds, Pin
from swarmpull.store.janitor import Janitor
from swarmpull.store.ledger import TEMPORARY, Ledger, Record
from swarmpull.store.partials import (
    PartialBlob,
    PartialFiles,
    list_partials,
    open_partial,
    remove_halves,
)
from swarmpull.store.piece_check import PieceCheck
from swarmpull.store.room import Room
from swarmpull.store.scanning import compute_digest, compute_metainfo, matches_pieces
from swarmpull.store.spool import Spool
from swarmpull.store.uploads import UploadLimits, UploadStore
from swarmpull.swarm.metainfo import BlobShape, Metainfo
from swarmpull.telemetry import Metrics

__all__ = ["BlobHandle", "BlobStat", "BlobStore", "BlobWriter", "open_store"]

log = structlog.get_logger()

ALGORITHMS: Final = ("sha256", "sha512")


@contextmanager
def _naming(digest: Digest) -> Iterator[None]:
    """Say which blob it is that there is no room for."""
    try:
        yield
    except StoreFull as full:
        raise full.of(str(digest)) from full


class BlobHandle:
    """An open blob; it is not evicted until it is closed, and stays readable even when it is deleted.

    A context manager.

    Attributes:
        digest: of the blob.
        length: in bytes.
    """

    def __init__(
        self,
        digest: Digest,
        length: int,
        file: OpenFile,
        disk: Disk,
        hold: Hold,
        check: PieceCheck,
        janitor: Janitor,
    ) -> None:
        self.digest = digest
        self.length = length
        self._file = file
        self._disk = disk
        self._hold = hold
        self._check = check
        self._janitor = janitor

    def fileno(self) -> int:
        """The descriptor, valid until `close`.  Raises ValueError when closed."""
        return self._file.fileno()

    async def read_at(
        self,
        offset: int,
        size: int,
        *,
        early: bool = False,  # noqa: ARG002
    ) -> bytes:
        """``size`` bytes from ``offset``, fewer only where the blob ends; ``early``: all is verified here.

        Pieces that are read from beginning to end, by one call after the other, are compared with their
        hashes (`PieceCheck`).  The blob is removed when one is damaged on the disk, too, or cannot be read
        from it, so that it is fetched again.

        Raises:
            ValueError: ``offset`` is not inside the blob, or the handle is closed.
            StoreUnavailable: the disk failed, or the file was truncated, is damaged or cannot be read.
        """
        if size <= 0 or not 0 <= offset < self.length:
            raise ValueError(f"{size} bytes at {offset} of {self.digest}, {self.length} bytes long")
        size = min(size, self.length - offset)
        with self._file.use() as descriptor:
            async with self._janitor.watching(self.digest, descriptor):
                data, is_right = await self._disk.run(self._read, descriptor, offset, size)
                if is_right:
                    return data
                # It may be all that there is of the blob: memory that failed is not to cost it.
                is_damaged = await self._disk.run(self._check.is_damaged, descriptor, offset, size)
            if is_damaged:
                await self._janitor.condemn(self.digest, descriptor)
                what = "was damaged on the disk, and removed"
            else:
                log.warning("blob_misread", store=self._disk.name, digest=str(self.digest))
                what = "was misread, though its file is right"
        raise StoreUnavailable(self._disk.name, f"{self.digest} {what}: ask for it again")

    def _read(self, descriptor: int, offset: int, size: int) -> tuple[bytes, bool]:
        data = read_exactly(descriptor, offset, size)
        return data, self._check.agrees(offset, data)

    def close(self) -> None:
        """Close it; a read that is under way still ends.  Closing twice is allowed."""
        self._file.close()
        self._hold.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class BlobWriter:
    """Content on its way into the store; see `BlobStore.create`."""

    def __init__(self, spool: Spool, tree: ContentTree, disk: Disk) -> None:
        self._spool = spool
        self._tree = tree
        self._disk = disk
        self._committed = False

    async def write(self, data: Data) -> None:
        """Take the next bytes.  Raises StoreFull, StoreUnavailable."""
        self._check_open()
        await self._spool.write(data)

    async def commit(self, digest: Digest, *, length: int | None = None) -> BlobStat:
        """Verify the content and make it visible as a blob; durable on return.

        Raises:
            DigestMismatch: the content is another; nothing is visible.
            LengthMismatch: it is not ``length`` bytes long; nothing is visible.
            StoreFull, StoreUnavailable: nothing is visible.
        """
        self._check_open()
        metainfo = await self._spool.verify(digest, length=length)
        stat = await self._disk.run(
            self._tree.install,
            self._spool.path,
            metainfo,
            self._spool.room.leave,
            needed=metainfo.length,
        )
        self._committed = True
        return stat

    def _check_open(self) -> None:
        if self._committed:
            raise ValueError("this content is committed already")


class BlobStore:
    """The blobs of one role on its disk; see `open_store`.

    Attributes:
        name: stamped on every error.
        root: the directory.
        uploads: the upload sessions.
        janitor: keeps the store within its limits; the role runs it.
    """

    def __init__(
        self,
        root: Path,
        disk: Disk,
        nursery: trio.Nursery,
        ledger: Ledger,
        limits: Limits,
        upload_limits: UploadLimits,
        metrics: Metrics,
    ) -> None:
        self.name = disk.name
        self.root = root
        self._disk = disk
        self._nursery = nursery
        self._ledger = ledger
        self._tree = ContentTree(root / "blobs", root / "temporary", ledger)
        self._open_partials: dict[Digest, PartialBlob | None] = {}
        self._computing = trio.Lock()
        self._holds = Holds()
        self.janitor = Janitor(
            root, self._tree, disk, self._holds, self._open_partials.keys(), limits, metrics
        )
        self.uploads = UploadStore(
            root / "uploads",
            self._tree,
            disk,
            upload_limits,
            self.janitor.admit,
            self._holds,
        )
        self.janitor.add_chore(self.uploads.remove_idle)

    async def load(self) -> None:
        """Take up what an earlier process has left; once, by `open_store`."""
        await self._disk.run(count_files, self.root, self._tree, True)
        await self.uploads.load()

    def stat(self, digest: Digest) -> BlobStat:
        """Look up a blob.  Raises BlobNotFound, StoreUnavailable."""
        with self._disk.translating():
            length = self._tree.length(digest)
        if length is None:
            raise BlobNotFound(str(digest), self.name)
        return BlobStat(digest, length)

    def has(self, digest: Digest) -> bool:
        """Whether a blob is here.  Raises StoreUnavailable."""
        with self._disk.translating():
            return self._tree.length(digest) is not None

    def path(self, digest: Digest) -> Path:
        """The file of a blob, to copy it from; never to be written.  Raises BlobNotFound."""
        self.stat(digest)
        return self._tree.blob_path(digest)

    def open(self, digest: Digest) -> BlobHandle:
        """Open a blob for reading, which counts as use.  Raises BlobNotFound, StoreUnavailable."""
        handle = self._open(digest)
        self._ledger.touch(digest)
        return handle

    def _open(self, digest: Digest) -> BlobHandle:
        with self._disk.translating():
            try:
                descriptor = os.open(self._tree.blob_path(digest), os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                raise BlobNotFound(str(digest), self.name) from None
            length = os.fstat(descriptor).st_size
        hold = self.hold(digest, Pin.READING)
        check = PieceCheck(partial(self._tree.read_sidecar, digest), length)
        file = OpenFile(descriptor)
        return BlobHandle(digest, length, file, self._disk, hold, check, self.janitor)

    def hold(self, digest: Digest, pin: Pin) -> Hold:
        """Keep a blob from being evicted, also one that is still to come; for a ``with``."""
        return self._holds.take(digest, pin)

    def create(self) -> AbstractAsyncContextManager[BlobWriter]:
        """Write a blob whose content is at hand; left without `BlobWriter.commit`, nothing remains."""
        return self._create()

    @asynccontextmanager
    async def _create(self) -> AsyncIterator[BlobWriter]:
        room = Room(self.janitor.admit, self._ledger, TEMPORARY)
        spool = Spool(self._disk, self._tree.temporary_path(), room)
        try:
            await self._disk.run(spool.path.touch)
            yield BlobWriter(spool, self._tree, self._disk)
        finally:
            await spool.remove()

    async def put(
        self, blobs: Sequence[tuple[Metainfo, bytes]]
    ) -> list[StoreFull | StoreUnavailable | None]:
        """Keep small blobs that are in memory, in one step.

        For a cache: after a power failure they may be gone, though never wrong.

        Args:
            blobs: metainfo and all of the content, which the caller has verified against digest and metainfo.

        Returns:
            Why each of them is not here; None for one that is.
        """
        room = Room(self.janitor.admit, self._ledger, TEMPORARY)
        length = sum(len(content) for _, content in blobs)
        try:
            await room.grow(length)
            failures = await self._disk.run(self._tree.put, blobs, room.give_back)
        except StoreFull as full:
            if len(blobs) == 1:
                return [full.of(str(blobs[0][0].digest))]
            # There may be room for some.
            return [failure for blob in blobs for failure in await self.put([blob])]
        except StoreUnavailable as error:
            return [error for _ in blobs]
        finally:
            room.leave()
        return [
            self._put_failure(metainfo, failure)
            for (metainfo, _), failure in zip(blobs, failures, strict=True)
        ]

    def _put_failure(
        self, metainfo: Metainfo, failure: OSError | None
    ) -> StoreFull | StoreUnavailable | None:
        if failure is None:
            return None
        try:
            with self._disk.translating(metainfo.length):
                raise failure
        except StoreFull as full:
            return full.of(str(metainfo.digest))
        except StoreUnavailable as error:
            return error

    async def open_partial(self, metainfo: BlobShape) -> PartialBlob:
        """Begin to fetch a blob by piece, or resume: its ``have`` are the pieces that are there already.

        Raises:
            RuntimeError: the partial of this blob is open already; share that one.
            StoreFull: no room for the whole blob, even with what can be evicted gone.
            StoreUnavailable: the disk failed.
        """
        digest = metainfo.digest
        if digest in self._open_partials:
            raise RuntimeError(
                f"the partial of {digest} is open already: one download, one partial"
            )
        self._open_partials[digest] = None

        def release() -> None:
            self._open_partials.pop(digest, None)
            # A disk that fails now is counted right at the next start.
            with suppress(OSError):
                PartialFiles(self.root / "partials", digest).count(self._tree)

        try:
            with _naming(digest):
                await self._reserve(digest, metainfo.length)
                partial_blob = await open_partial(
                    self.root / "partials", metainfo, self._tree, self._disk, release
                )
        except BaseException:
            release()
            raise
        self._open_partials[digest] = partial_blob
        self._nursery.start_soon(partial_blob.hash_ahead)
        return partial_blob

    async def _reserve(self, digest: Digest, length: int) -> None:
        """Enter a partial with all that it will take up, of which it may have some already."""
        former = self._ledger.get(Kind.PARTIAL, digest)
        now = self._ledger.clock()
        await self.janitor.admit(
            max(0, length - (former.size if former else 0)),
            lambda: self._ledger.put(Kind.PARTIAL, digest, Record(length, now, now)),
        )

    async def metainfo(self, digest: Digest) -> Metainfo:
        """The metainfo of a blob; computed when it was never saved or its file is damaged.

        This is no use of the blob: whoever offers the whole store to peers asks for all.

        Raises:
            BlobNotFound: not here; or found to be damaged, and removed.
            StoreUnavailable: the disk failed; a blob that it cannot read is removed.
        """
        with self._open(digest) as handle:
            known = await self._disk.run(self._tree.load_metainfo, digest, handle.length)
            if known is not None:
                return known
            async with self.janitor.watching(digest, handle.fileno()):
                return await self._compute_metainfo(digest, handle)

    async def read_small(self, digest: Digest, length_max: int) -> tuple[Metainfo, bytes | None]:
        """The metainfo of a blob and, if it has at most ``length_max`` bytes, all of it: in one step.

        What is read is compared with its piece hash.  Reading the content counts as use.

        Raises:
            BlobNotFound: not here; or, without metainfo, found to be damaged, and removed.
            StoreUnavailable: the disk failed, or the blob was damaged or unreadable there, and removed.
        """
        with self._open(digest) as handle:
            if handle.length > length_max:
                return await self.metainfo(digest), None
            async with self.janitor.watching(digest, handle.fileno()):
                found = await self._disk.run(
                    self._tree.load_small, digest, handle.fileno(), handle.length
                )
            if found is None:
                # Without metainfo, or damaged: these two know what to do.
                metainfo = await self.metainfo(digest)
                content = await handle.read_at(0, handle.length) if handle.length else b""
                found = metainfo, content
            self._ledger.touch(digest)
            return found

    async def _compute_metainfo(self, digest: Digest, handle: BlobHandle) -> Metainfo:
        # One at a time: those who ask for the same blob find it done, and a disk gains nothing from two.
        async with self._computing:
            known = await self._disk.run(self._tree.load_metainfo, digest, handle.length)
            if known is not None:
                return known
            await self._check_digest(digest, handle)
            metainfo = await compute_metainfo(self._disk, handle.fileno(), digest, handle.length)
            await self._disk.run(self._tree.save_metainfo, metainfo)
            return metainfo

    async def _check_digest(self, digest: Digest, handle: BlobHandle) -> None:
        """Piece hashes of a file that was damaged would make it look right to everybody from then on."""
        if await self._read_digest(handle) != digest:
            await self.janitor.condemn(digest, handle.fileno())
            raise BlobNotFound(str(digest), self.name)

    async def _matches_pieces(self, handle: BlobHandle) -> bool:
        metainfo = await self._disk.run(self._tree.load_metainfo, handle.digest, handle.length)
        if metainfo is None:
            return False
        return await matches_pieces(self._disk, handle.fileno(), metainfo)

    async def _read_digest(self, handle: BlobHandle) -> Digest:
        """What a file hashes to; a wrong one is read again, from the disk, before it is believed."""
        descriptor, algorithm = handle.fileno(), handle.digest.algorithm
        actual = await compute_digest(self._disk, descriptor, algorithm, handle.length)
        if actual == handle.digest:
            return actual
        await self._disk.run(drop_cached, descriptor)
        return await compute_digest(self._disk, descriptor, algorithm, handle.length)

    async def verify(self, digest: Digest) -> None:
        """Read a blob again, and remove it when it is not what its name says.

        It is compared with its piece hashes, which were taken when it matched its digest; and with the digest
        itself where it has none, or seems to be damaged.

        Raises:
            BlobNotFound: it is not here.
            DigestMismatch: it is damaged, and was removed.
            StoreUnavailable: the disk failed: nothing is known, and nothing removed; unless it is this file
                that cannot be read, which is removed.
        """
        with self._open(digest) as handle:
            async with self.janitor.watching(digest, handle.fileno()):
                if await self._matches_pieces(handle):
                    return
                actual = await self._read_digest(handle)
            if actual != digest:
                await self.janitor.condemn(digest, handle.fileno())
        if actual != digest:
            raise DigestMismatch(str(digest), str(actual))

    async def delete(self, digest: Digest) -> None:
        """Remove a blob; open handles go on.  Raises BlobNotFound, StoreUnavailable."""
        if not await self._disk.run(self._tree.delete, digest):
            raise BlobNotFound(str(digest), self.name)

    def list(self) -> Iterator[BlobStat]:
        """All complete blobs, in the order of their digests; reads directories as it goes, so it blocks.

        Raises StoreUnavailable.
        """
        with self._disk.translating():
            yield from self._tree.list()

    async def close(self) -> None:
        """Close what is still open, and write down the last uses; by `open_store`."""
        for each in list(self._open_partials.values()):
            if each is not None:
                await each.aclose()
        # Only the order of a later eviction depends on it: no reason to fail at the end.
        with suppress(StoreUnavailable):
            await self.janitor.save_uses()


@asynccontextmanager
async def open_store(
    root: Path,
    *,
    name: str,
    threads: int = 4,
    limits: Limits | None = None,
    upload_limits: UploadLimits | None = None,
    metrics: Metrics | None = None,
    clock: Callable[[], float] = time.time,
) -> AsyncIterator[BlobStore]:
    """Open the store under ``root``, which is made if need be; only one process can have it open.

    Leftovers of writes that a crash has interrupted are removed; partials and uploads are kept.

    Args:
        name: for errors and logs.
        threads: the number of reads and writes at once; half as many hash ahead beside them.
        limits: what the janitor keeps to; none by default.
        metrics: where the store counts.
        clock: gives seconds since the epoch.

    Raises:
        StartupError: another process has it open, or the directory cannot be used.
    """
    disk = Disk(name, trio.CapacityLimiter(threads), trio.CapacityLimiter(max(1, threads // 2)))
    lock = await trio.to_thread.run_sync(prepare, root, limiter=disk.foreground)
    failure: Exception | None = None
    try:
        async with trio.open_nursery() as nursery:
            store = BlobStore(
                root,
                disk,
                nursery,
                Ledger(clock),
                limits or Limits(),
                upload_limits or UploadLimits(),
                metrics or Metrics(),
            )
            try:
                await store.load()
                yield store
            except Exception as error:
                # Raised again outside: the nursery would hand it to the caller inside a group.
                failure = error
            finally:
                nursery.cancel_scope.cancel()
                with trio.CancelScope(shield=True):
                    await store.close()
    finally:
        os.close(lock)
    if failure is not None:
        raise failure


def count_files(root: Path, tree: ContentTree, tidy: bool) -> None:
    """Enter all blobs and partials under ``root`` into the ledger; for ``tidy`` see `ContentTree.scan`."""
    tree.scan(tidy=tidy)
    for files in list_partials(root / "partials"):
        files.count(tree)


def prepare(root: Path) -> int:
    """Make the directories, take the lock, remove leftovers; returns the descriptor of the lock.

    The lock is held until that is closed.  Raises StartupError.
    """
    lock = lock_directory(root)
    try:
        _make_layout(root)
    except OSError as error:
        os.close(lock)
        raise unusable(root, error) from error
    return lock


def _make_layout(root: Path) -> None:
    for algorithm in ALGORITHMS:
        make_directory(root / "blobs" / algorithm)
    for directory in ("partials", "uploads", "temporary"):
        make_directory(root / directory)
    for leftover in (root / "temporary").iterdir():
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()
    remove_halves(root / "partials")
