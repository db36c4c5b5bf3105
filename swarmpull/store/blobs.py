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

import fcntl
import os
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import trio

from swarmpull.digest import Digest
from swarmpull.errors import BlobNotFound, InvalidMetainfo, StartupError
from swarmpull.store.content import BlobStat, ContentTree
from swarmpull.store.disk import Disk, OpenFile
from swarmpull.store.durable import Data, make_directory, read_exactly
from swarmpull.store.partials import PartialBlob, open_partial, remove_halves
from swarmpull.store.scanning import compute_metainfo
from swarmpull.store.spool import Spool
from swarmpull.store.uploads import UploadLimits, UploadStore
from swarmpull.swarm.metainfo import Metainfo

__all__ = ["BlobHandle", "BlobStat", "BlobStore", "BlobWriter", "open_store"]

ALGORITHMS: Final = ("sha256", "sha512")


class BlobHandle:
    """An open blob; it stays readable when the blob is deleted.  A context manager.

    Attributes:
        digest: of the blob.
        length: in bytes.
    """

    def __init__(self, digest: Digest, length: int, file: OpenFile, disk: Disk) -> None:
        self.digest = digest
        self.length = length
        self._file = file
        self._disk = disk

    def fileno(self) -> int:
        """The descriptor, valid until `close`.  Raises ValueError when closed."""
        return self._file.fileno()

    async def read_at(self, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset``, fewer only where the blob ends.

        Raises:
            ValueError: ``offset`` is not inside the blob, or the handle is closed.
            StoreUnavailable: the disk failed, or the file was truncated.
        """
        if size <= 0 or not 0 <= offset < self.length:
            raise ValueError(f"{size} bytes at {offset} of {self.digest}, {self.length} bytes long")
        size = min(size, self.length - offset)
        with self._file.use() as descriptor:
            return await self._disk.run(read_exactly, descriptor, offset, size)

    def close(self) -> None:
        """Close it; a read that is under way still ends.  Closing twice is allowed."""
        self._file.close()

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
            self._tree.install, self._spool.path, metainfo, needed=metainfo.length
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
    """

    def __init__(
        self, root: Path, disk: Disk, nursery: trio.Nursery, upload_limits: UploadLimits
    ) -> None:
        self.name = disk.name
        self.root = root
        self._disk = disk
        self._nursery = nursery
        self._tree = ContentTree(root / "blobs", root / "temporary")
        self._open_partials: dict[Digest, PartialBlob | None] = {}
        self._computing = trio.Lock()
        self.uploads = UploadStore(root / "uploads", self._tree, disk, upload_limits)

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
        """Open a blob for reading.  Raises BlobNotFound, StoreUnavailable."""
        with self._disk.translating():
            try:
                descriptor = os.open(self._tree.blob_path(digest), os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                raise BlobNotFound(str(digest), self.name) from None
            length = os.fstat(descriptor).st_size
        return BlobHandle(digest, length, OpenFile(descriptor), self._disk)

    def create(self) -> AbstractAsyncContextManager[BlobWriter]:
        """Write a blob whose content is at hand; left without `BlobWriter.commit`, nothing remains."""
        return self._create()

    @asynccontextmanager
    async def _create(self) -> AsyncIterator[BlobWriter]:
        spool = Spool(self._disk, self._tree.temporary_path())
        try:
            await self._disk.run(spool.path.touch)
            yield BlobWriter(spool, self._tree, self._disk)
        finally:
            await spool.remove()

    async def open_partial(self, metainfo: Metainfo) -> PartialBlob:
        """Begin to fetch a blob by piece, or resume: its ``have`` are the pieces that are there already.

        Raises:
            RuntimeError: the partial of this blob is open already; share that one.
            StoreFull: no room for the whole blob.
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

        try:
            partial = await open_partial(
                self.root / "partials", metainfo, self._tree, self._disk, release
            )
        except BaseException:
            release()
            raise
        self._open_partials[digest] = partial
        self._nursery.start_soon(partial.hash_ahead)
        return partial

    async def metainfo(self, digest: Digest) -> Metainfo:
        """The metainfo of a blob; computed when it was never saved or its file is damaged.

        Raises:
            BlobNotFound: not here.
            StoreUnavailable: the disk failed.
        """
        with self.open(digest) as handle:
            known = await self._disk.run(self._tree.load_metainfo, digest, handle.length)
            return known or await self._compute_metainfo(digest, handle)

    async def _compute_metainfo(self, digest: Digest, handle: BlobHandle) -> Metainfo:
        # One at a time: those who ask for the same blob find it done, and a disk gains nothing from two.
        async with self._computing:
            known = await self._disk.run(self._tree.load_metainfo, digest, handle.length)
            if known is not None:
                return known
            metainfo = await compute_metainfo(self._disk, handle.fileno(), digest, handle.length)
            await self._disk.run(self._tree.save_metainfo, metainfo)
            return metainfo

    async def save_metainfo(self, metainfo: Metainfo) -> None:
        """Keep the metainfo of a blob that is here.

        Raises:
            BlobNotFound: the blob is not here.
            InvalidMetainfo: it is of another length than the blob.
            StoreFull, StoreUnavailable: not kept; `metainfo` will compute it.
        """
        length = self.stat(metainfo.digest).length
        if metainfo.length != length:
            raise InvalidMetainfo(
                str(metainfo.digest), f"it says {metainfo.length} bytes, the blob has {length}"
            )
        await self._disk.run(self._tree.save_metainfo, metainfo)

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

    async def close_partials(self) -> None:
        """Close what is still open; by `open_store`."""
        for partial in list(self._open_partials.values()):
            if partial is not None:
                await partial.aclose()


@asynccontextmanager
async def open_store(
    root: Path, *, name: str, threads: int = 4, upload_limits: UploadLimits | None = None
) -> AsyncIterator[BlobStore]:
    """Open the store under ``root``, which is made if need be; only one process can have it open.

    Leftovers of writes that a crash has interrupted are removed; partials and uploads are kept.

    Args:
        name: for errors and logs.
        threads: the number of reads and writes at once; half as many hash ahead beside them.

    Raises:
        StartupError: another process has it open, or the directory cannot be used.
    """
    disk = Disk(name, trio.CapacityLimiter(threads), trio.CapacityLimiter(max(1, threads // 2)))
    lock = await trio.to_thread.run_sync(_prepare, root, limiter=disk.foreground)
    failure: Exception | None = None
    try:
        async with trio.open_nursery() as nursery:
            store = BlobStore(root, disk, nursery, upload_limits or UploadLimits())
            try:
                await store.uploads.load()
                yield store
            except Exception as error:
                # Raised again outside: the nursery would hand it to the caller inside a group.
                failure = error
            finally:
                nursery.cancel_scope.cancel()
                with trio.CancelScope(shield=True):
                    await store.close_partials()
    finally:
        os.close(lock)
    if failure is not None:
        raise failure


def _prepare(root: Path) -> int:
    """Make the directories, take the lock, remove leftovers; returns the descriptor of the lock."""
    try:
        make_directory(root)
        lock = os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise _unusable(root, error) from error
    try:
        _take_lock(lock, root)
        _make_layout(root)
    except OSError as error:
        os.close(lock)
        raise _unusable(root, error) from error
    except StartupError:
        os.close(lock)
        raise
    return lock


def _take_lock(lock: int, root: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(lock, 32, 0).decode("ascii", "replace").strip() or "unknown"
        raise StartupError(
            f"data directory {root} is in use by another process (pid {owner})",
            "stop that process, or give this one a data directory of its own",
        ) from None
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()}\n".encode("ascii"), 0)


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


def _unusable(root: Path, error: OSError) -> StartupError:
    return StartupError(
        f"data directory {root} cannot be used ({error.strerror or error})",
        "make it a directory that this user can write to, or configure another",
    )
