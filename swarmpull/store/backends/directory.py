"""The directory backend: objects as files, for one machine or a shared file system.

Segment ``s`` of a key is the directory ``s.d``, the last one the file ``s.o``:
``blobs/sha256/ab/abc1`` is ``blobs.d/sha256.d/ab.d/abc1.o``.  So one key may be the beginning of
another (``a`` and ``a/b`` are ``a.o`` and ``a.d/b.o``), and no key can name the directory
``temporary``, where objects are written before they get their name, and where the files lie that are locked
while an object is replaced on a condition.  The file ``.swarmpull-backend``
says that this is the backend, and not the place where it is mounted at other times.  Everything else
in the tree is not ours and is left alone.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Final, TypeVar, TypeVarTuple

import structlog
import trio

from swarmpull.errors import BackendUnavailable, ObjectNotFound, ObjectReplaced, StartupError
from swarmpull.store.backends.base import (
    CHUNK_BYTES_MAX,
    SMALL_OBJECT_BYTES,
    ObjectPage,
    ObjectStat,
    check_key,
    check_range,
)
from swarmpull.store.backends.shared_reads import SharedReads
from swarmpull.store.disk import OpenFile
from swarmpull.store.durable import (
    make_directory,
    read_exactly,
    remove,
    sync_directory,
    sync_file,
    write_all,
)

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

log = structlog.get_logger()

TEMPORARY: Final = "temporary"
MARKER: Final = ".swarmpull-backend"
# Objects share these; a lock is held for one write to the disk.
LOCK_PREFIX: Final = "lock-"
LOCKS: Final = 64
# Threads that read small objects at the same time, each one after the other.
READ_LANES: Final = 2
DIRECTORY_SUFFIX: Final = ".d"
OBJECT_SUFFIX: Final = ".o"
# A copy in progress is younger; other processes may share the directory, so nothing else tells.
LEFTOVER_AGE: Final = 24 * 3600.0
# How much one thread hop copies: tens of milliseconds, the longest that a cancelled put waits.
COPY_BYTES: Final = 32 << 20
# A delete may remove an empty directory just before we rename into it; it cannot win for ever.
PUBLISH_ATTEMPTS: Final = 10


class DirectoryBackend:
    """A `Backend` over a directory.  Build one with `open_directory`.

    Attributes:
        name: ``file:///path``.
        root: the directory.
        conditional: there are conditional puts.
    """

    conditional: Final = True

    def __init__(self, root: Path, *, threads: int = 4) -> None:
        self.name = root.absolute().as_uri()
        self.root = root
        self._limiter = trio.CapacityLimiter(threads)
        self._reads = SharedReads(self._limiter, READ_LANES)

    async def stat(self, key: str) -> ObjectStat:
        """See `Backend.stat`."""
        path = self._path(key)
        status = await self._run(key, os.stat, path)
        return ObjectStat(key, status.st_size, _version(status))

    @asynccontextmanager
    async def open(
        self, key: str, *, start: int = 0, stop: int | None = None, version: str = ""
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        """See `Backend.open`."""
        path = self._path(key)
        descriptor, status = await self._run(key, _open, path)
        file = OpenFile(descriptor)
        try:
            if version not in ("", _version(status)):
                raise ObjectReplaced(self.name, key, "the object was replaced while it was read")
            offsets = check_range(key, status.st_size, start, stop)
            yield _Chunks(self, key, file, offsets)
        finally:
            file.close()

    async def put_file(self, key: str, path: Path) -> None:
        """See `Backend.put_file`."""
        check_key(key)
        descriptor = await trio.to_thread.run_sync(
            os.open, path, os.O_RDONLY | os.O_CLOEXEC, limiter=self._limiter
        )
        try:
            async with self._replacing(key) as target:
                offset, copied = 0, 1
                while copied:
                    copied = await self._run(key, _copy_step, descriptor, target, offset)
                    offset += copied
        finally:
            os.close(descriptor)

    async def put_bytes(self, key: str, data: bytes, *, if_version: str | None = None) -> None:
        """See `Backend.put_bytes`."""
        check_key(key)
        async with self._replacing(key, if_version) as target:
            await self._run(key, write_all, target, data, 0)

    async def get_versioned(
        self, key: str, *, limit: int = SMALL_OBJECT_BYTES
    ) -> tuple[bytes, str]:
        """See `Backend.get_versioned`."""
        data = await self.get_bytes(key, limit=limit)
        return data, _content_version(data)

    async def get_bytes(self, key: str, *, limit: int = SMALL_OBJECT_BYTES) -> bytes:
        """See `Backend.get_bytes`."""
        path = self._path(key)
        read = partial(self._run_mounted, self._read_small, key, path, limit)
        with self._translated(key):
            return await self._reads.get(key, read)

    async def delete(self, key: str) -> None:
        """See `Backend.delete`."""
        await self._run(key, self._delete, self._path(key))

    async def list(self, prefix: str = "", *, after: str = "", limit: int = 1000) -> ObjectPage:
        """See `Backend.list`."""
        if limit < 1:
            raise ValueError(f"a page of {limit} keys")
        keys = await self._run(prefix, self._list, prefix, after, limit + 1)
        return ObjectPage(keys[:limit], len(keys) > limit)

    async def read(self, key: str, file: OpenFile, offset: int, size: int) -> bytes:
        """Exactly ``size`` bytes of an open object."""
        with file.use() as descriptor:
            return await self._run(key, read_exactly, descriptor, offset, size)

    async def _run(self, key: str, function: Callable[[*Ts], T], *args: *Ts) -> T:
        with self._translated(key):
            return await trio.to_thread.run_sync(
                self._run_mounted, function, *args, limiter=self._limiter
            )

    @contextmanager
    def _translated(self, key: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise ObjectNotFound(self.name, key) from error
        except OSError as error:
            raise BackendUnavailable(self.name, key, str(error)) from error

    def _run_mounted(self, function: Callable[[*Ts], T], *args: *Ts) -> T:
        """In the thread, as everything that a file system that hangs would hold up."""
        try:
            return function(*args)
        except FileNotFoundError:
            self._check_mounted()
            raise

    def _check_mounted(self) -> None:
        """A file system that is not mounted must not look like one that lost its objects."""
        try:
            os.stat(self.root / MARKER)
        except FileNotFoundError as error:
            reason = f"{self.root} has no file {MARKER}: it is gone, or not mounted"
            raise OSError(reason) from error

    @asynccontextmanager
    async def _replacing(self, key: str, if_version: str | None = None) -> AsyncIterator[int]:
        """A descriptor to write to; its content gets the key when the block ends well.

        Raises ObjectReplaced when the key has another content than that of ``if_version``.
        """
        source = self.root / TEMPORARY / uuid.uuid4().hex
        target = self._path(key)
        descriptor = await self._run(key, self._create, source)
        try:
            try:
                yield descriptor
            finally:
                with trio.CancelScope(shield=True):
                    # On a network file system this may write, and fail.
                    await self._run(key, os.close, descriptor)
            if if_version is None:
                await self._run(key, _publish, source, target)
            else:
                await self._run(key, self._publish_if, key, source, target, if_version)
        finally:
            with trio.CancelScope(shield=True):
                await self._run(key, remove, source)

    def _path(self, key: str) -> Path:
        *directories, last = check_key(key).split("/")
        parts = [segment + DIRECTORY_SUFFIX for segment in directories]
        return self.root.joinpath(*parts, last + OBJECT_SUFFIX)

    def _read_small(self, key: str, path: Path, limit: int) -> bytes:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            length = os.fstat(descriptor).st_size
            if length > limit:
                reason = f"the object has {length} bytes, {limit} were expected at most"
                raise BackendUnavailable(self.name, key, reason)
            return read_exactly(descriptor, 0, length)
        finally:
            os.close(descriptor)

    def _publish_if(self, key: str, source: Path, target: Path, version: str) -> None:
        with self._locked(key):
            try:
                found = _content_version(target.read_bytes())
            except FileNotFoundError:
                found = ""
            if found != version:
                raise ObjectReplaced(self.name, key, "the object was changed by another process")
            _publish(source, target)

    @contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        """Nobody else, in whatever process, replaces this object on a condition while the block runs."""
        number = hashlib.blake2s(key.encode()).digest()[0] % LOCKS
        path = self.root / TEMPORARY / f"{LOCK_PREFIX}{number:02}"
        while True:
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            except FileNotFoundError:
                self._check_mounted()
                path.parent.mkdir(exist_ok=True)
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                if _is_named(path, descriptor):
                    yield
                    return
                # Somebody tidied up: others lock another file by now.
            finally:
                os.close(descriptor)

    def _delete(self, path: Path) -> None:
        path.unlink()
        directory = path.parent
        while directory != self.root:
            try:
                directory.rmdir()
            except OSError:
                break  # not empty, or removed by another delete
            directory = directory.parent
        with suppress(FileNotFoundError):
            sync_directory(directory)

    def _create(self, path: Path) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            return os.open(path, flags, 0o644)
        except FileNotFoundError:
            # Somebody tidied up; but a root that is gone stays gone, and nothing is put into its place.
            self._check_mounted()
            path.parent.mkdir(exist_ok=True)
            return os.open(path, flags, 0o644)

    def _list(self, prefix: str, after: str, limit: int) -> tuple[str, ...]:
        keys = tuple(islice(_walk(self.root, "", prefix, after), limit))
        # Afterwards: what goes while it is walked through looks like the end of a listing.
        self._check_mounted()
        return keys


class _Chunks:
    """The content of an open object, chunk by chunk."""

    def __init__(self, backend: DirectoryBackend, key: str, file: OpenFile, offsets: range) -> None:
        self._backend = backend
        self._key = key
        self._file = file
        self._offsets = offsets

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        if not self._offsets:
            raise StopAsyncIteration
        size = min(CHUNK_BYTES_MAX, len(self._offsets))
        data = await self._backend.read(self._key, self._file, self._offsets.start, size)
        self._offsets = self._offsets[size:]
        return data


async def open_directory(root: Path, *, create: bool = True) -> DirectoryBackend:
    """Open the backend in ``root``; old leftovers of crashed puts are removed.

    Args:
        create: begin a new backend where there is none.

    Raises:
        StartupError: the directory cannot be used, or holds no backend.
    """
    try:
        is_new = await trio.to_thread.run_sync(
            _prepare, root, create, limiter=trio.CapacityLimiter(1)
        )
    except OSError as error:
        raise StartupError(
            f"backend directory {root} cannot be used ({error.strerror or error})",
            "make it a directory that this user can write to, or configure another backend url",
        ) from error
    if is_new:
        log.info("backend_begun", directory=str(root))
    return DirectoryBackend(root)


def _prepare(root: Path, create: bool) -> bool:
    """Returns whether it is a new backend."""
    is_new = not (root / MARKER).exists()
    if is_new and not create:
        raise StartupError(
            f"backend directory {root} has no file {MARKER}: it is not mounted, or was never used",
            "mount it; if it is to become a backend, create the directory and that file in it",
        )
    temporary = root / TEMPORARY
    make_directory(temporary)
    probe = temporary / uuid.uuid4().hex
    probe.touch()
    probe.unlink()
    oldest = time.time() - LEFTOVER_AGE
    for leftover in list(temporary.iterdir()):
        is_lock = leftover.name.startswith(LOCK_PREFIX)
        if leftover.stat().st_mtime < oldest and not is_lock:
            remove(leftover)
    if is_new:
        (root / MARKER).touch()
        sync_directory(root)
    return is_new


def _open(path: Path) -> tuple[int, os.stat_result]:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return descriptor, os.fstat(descriptor)
    except BaseException:
        os.close(descriptor)
        raise


def _is_named(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _content_version(data: bytes) -> str:
    """Of small objects: files may get the number and the time of one that was there before."""
    return hashlib.sha256(data).hexdigest()


def _version(status: os.stat_result) -> str:
    """Objects are replaced whole, by another file."""
    return f"{status.st_ino:x}-{status.st_mtime_ns:x}"


def _copy_step(source: int, target: int, offset: int) -> int:
    return os.sendfile(target, source, offset, COPY_BYTES)


def _publish(source: Path, target: Path) -> None:
    """As `swarmpull.store.durable.publish`, while others delete from the same directory."""
    sync_file(source)
    for _ in range(PUBLISH_ATTEMPTS):
        try:
            make_directory(target.parent)
            source.rename(target)
        except FileNotFoundError:
            continue
        # Not there any more: it was deleted meanwhile, and its directory with it.
        with suppress(FileNotFoundError):
            sync_directory(target.parent)
        return
    raise OSError(errno.EBUSY, f"{target.parent} is removed again and again by others")


def _walk(directory: Path, base: str, prefix: str, after: str) -> Iterator[str]:
    """The keys below a directory, in order; ``base`` is what all of them begin with.

    Code points sort as their UTF-8 bytes do, and ``s`` before ``s/...``, so it suffices to sort each
    directory.
    """
    for name in sorted(_entries(directory, base, prefix, after)):
        if not name.endswith("/"):
            yield base + name
        else:
            below = directory / (name[:-1] + DIRECTORY_SUFFIX)
            yield from _walk(below, base + name, prefix, after)


def _may_hold(base: str, prefix: str, after: str) -> bool:
    """Whether keys that begin with ``base`` may be wanted."""
    matches = base.startswith(prefix) or prefix.startswith(base)
    return matches and (base > after or after.startswith(base))


def _entries(directory: Path, base: str, prefix: str, after: str) -> Iterator[str]:
    """What may be wanted of a directory, without ``base``: objects, and beginnings of keys, with a ``/``.

    A page of a large directory needs a small part of it: what is not wanted is not looked at any further.
    """
    try:
        found = os.scandir(directory)
    except FileNotFoundError:
        return  # a delete has emptied and removed it
    with found:
        for entry in found:
            name = entry.name
            if name.endswith(OBJECT_SUFFIX):
                name = name.removesuffix(OBJECT_SUFFIX)
                key = base + name
                if key <= after or not key.startswith(prefix) or not entry.is_file():
                    continue
            elif name.endswith(DIRECTORY_SUFFIX):
                name = name.removesuffix(DIRECTORY_SUFFIX) + "/"
                key = base + name
                if not _may_hold(key, prefix, after) or not entry.is_dir():
                    continue
            else:
                continue
            if _well_formed(key.removesuffix("/")):
                yield name


def _well_formed(key: str) -> bool:
    try:
        check_key(key)
    except ValueError:
        return False
    return True
