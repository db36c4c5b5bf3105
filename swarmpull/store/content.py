"""The tree of complete blobs, ``blobs/<algorithm>/ab/<hex>``; blocking, call it in a thread.

Nothing gets in here but through `ContentTree.install`, whose callers have hashed the file before.  The ledger
is changed together with the names of the files, so that it knows exactly what is here.
"""

from __future__ import annotations

import os
import stat
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final, TypeVarTuple

import attrs

from swarmpull.digest import Digest
from swarmpull.errors import InvalidDigest
from swarmpull.store import sidecars
from swarmpull.store.disk import UNREADABLE
from swarmpull.store.durable import (
    make_directory,
    read_exactly,
    remove,
    sync_directory,
    sync_file,
    write_file,
)
from swarmpull.store.eviction import Kind
from swarmpull.store.hashing import hash_piece
from swarmpull.store.ledger import Ledger, Record
from swarmpull.swarm.metainfo import Metainfo

Ts = TypeVarTuple("Ts")

SIDECAR_SUFFIX: Final = ".metainfo"


@attrs.frozen
class BlobStat:
    """A complete blob and its length in bytes."""

    digest: Digest
    length: int


@attrs.frozen
class ContentTree:
    """Complete blobs and their metainfo under the root of a store.

    Attributes:
        blobs: the directory of the tree.
        temporary: for files that have no name yet, on the same file system; emptied at every start.
        ledger: the books.
    """

    blobs: Path
    temporary: Path
    ledger: Ledger = attrs.field(factory=Ledger)

    def blob_path(self, digest: Digest) -> Path:
        """Where a blob is, or would be."""
        return self.blobs / digest.algorithm / digest.hex[:2] / digest.hex

    def sidecar_path(self, digest: Digest) -> Path:
        """Where the metainfo of a blob is, or would be."""
        path = self.blob_path(digest)
        return path.with_name(path.name + SIDECAR_SUFFIX)

    def temporary_path(self) -> Path:
        """A fresh name for a file that is being written."""
        return self.temporary / uuid.uuid4().hex

    def length(self, digest: Digest) -> int | None:
        """Length in bytes of a blob, None when it is not here."""
        # Asked twice for each request: to put a `Path` together takes longer than the look at the disk.
        path = f"{self.blobs}/{digest.algorithm}/{digest.hex[:2]}/{digest.hex}"
        try:
            return os.stat(path).st_size
        except FileNotFoundError:
            return None

    def install(
        self,
        source: Path,
        metainfo: Metainfo,
        left: Callable[[], object] = lambda: None,
        *,
        flush_name: bool = True,
    ) -> BlobStat:
        """Make a verified file visible as a blob; durable on return, and ``source`` is gone.

        A blob that is here already is replaced: this one was verified just now, and that one may have
        been damaged since.  Open handles to it go on.

        Args:
            left: takes ``source`` out of the books at the moment at which it becomes a blob.
            flush_name: whether the blob must be there after a power failure, too.
        """
        digest = metainfo.digest
        target = self.blob_path(digest)
        # Before the blob, so that whoever sees the blob finds its metainfo.
        self.save_metainfo(metainfo)
        now = self.ledger.clock()
        os.utime(source, (now, now))
        sync_file(source)
        with self.ledger.lock:
            source.rename(target)
            self.ledger.put(Kind.BLOB, digest, Record(metainfo.length, now, now))
            left()
        if flush_name:
            sync_directory(target.parent)
        return BlobStat(digest, metainfo.length)

    def put(
        self, blobs: Sequence[tuple[Metainfo, bytes]], left: Callable[[int], object]
    ) -> list[OSError | None]:
        """Make verified contents in memory visible as blobs, as `install` does, but for a cache.

        After a power failure a blob may be gone, though never wrong.  All are written before the first is
        flushed: the disk gets them together.

        Args:
            left: takes so many bytes out of the books of temporary files when they become a blob.

        Returns:
            Why each of them is not here; None for one that is.
        """
        sources = [self.temporary_path() for _ in blobs]
        failures = [
            _attempt(write_file, source, content)
            for source, (_, content) in zip(sources, blobs, strict=True)
        ]
        for index, (source, (metainfo, content)) in enumerate(zip(sources, blobs, strict=True)):
            if failures[index] is None:
                install = partial(self.install, flush_name=False)
                failures[index] = _attempt(install, source, metainfo, partial(left, len(content)))
            if failures[index] is not None:
                remove(source)
        return failures

    def save_metainfo(self, metainfo: Metainfo) -> None:
        """Write the sidecar; not flushed, see `swarmpull.store.sidecars`."""
        target = self.sidecar_path(metainfo.digest)
        make_directory(target.parent)
        self.replace_small_file(target, sidecars.encode(metainfo))
        record = self.ledger.get(Kind.BLOB, metainfo.digest)
        if record is not None:
            self.save_use(metainfo.digest, record)

    def save_use(self, digest: Digest, record: Record) -> None:
        """Write down when a blob was used last; lost when it has no sidecar."""
        used_at = record.used_at
        with suppress(FileNotFoundError):
            os.utime(self.sidecar_path(digest), (used_at, used_at))
        record.saved_at = used_at

    def replace_small_file(self, target: Path, content: bytes) -> None:
        """Write a whole file so that a reader sees either the old or the new content."""
        source = self.temporary_path()
        try:
            write_file(source, content)
            source.rename(target)
        except OSError:
            remove(source)
            raise

    def load_metainfo(self, digest: Digest, length: int) -> Metainfo | None:
        """Read the sidecar; None when it is missing, damaged, or not of a blob of this length."""
        metainfo = self.read_sidecar(digest)
        return metainfo if metainfo is not None and metainfo.length == length else None

    def load_small(
        self, digest: Digest, descriptor: int, length: int
    ) -> tuple[Metainfo, bytes] | None:
        """Metainfo and content of a blob of one piece; None when they disagree or there is no metainfo."""
        metainfo = self.load_metainfo(digest, length)
        if metainfo is None or metainfo.piece_count > 1:
            return None
        content = read_exactly(descriptor, 0, length)
        if content and hash_piece(content) != metainfo.piece_hashes:
            return None
        return metainfo, content

    def read_sidecar(self, digest: Digest) -> Metainfo | None:
        """What the sidecar says, whatever the file has become; None when it is missing or damaged."""
        try:
            metainfo, _ = sidecars.decode(self.sidecar_path(digest).read_bytes())
        except (FileNotFoundError, sidecars.DamagedSidecar):
            return None
        except OSError as error:
            # As good as damaged: it can be made anew, and the blob beside it may be the only copy.
            if error.errno in UNREADABLE:
                return None
            raise
        return metainfo if metainfo.digest == digest else None

    def delete(self, digest: Digest) -> bool:
        """Remove a blob and its sidecar; False when there was no blob.

        Not flushed: a blob that is back after a crash is still a right one.
        """
        taken = self.take_out(digest)
        for path in taken:
            remove(path)
        return bool(taken)

    def take_out(self, digest: Digest) -> list[Path]:
        """Make a blob invisible, without the time that freeing its blocks takes.

        Returns the files, which are now temporary, for the caller to remove; none when there was no blob.
        """
        target = self.temporary_path()
        with self.ledger.lock:
            try:
                self.blob_path(digest).rename(target)
                found = [target]
            except FileNotFoundError:
                found = []
            # Also when somebody had removed it by hand.
            self.ledger.put(Kind.BLOB, digest, None)
        # A crash in between leaves a sidecar alone, which `scan` removes.
        remove(self.sidecar_path(digest))
        return found

    def scan(self, *, tidy: bool) -> None:
        """Enter all blobs into the ledger.

        Args:
            tidy: also remove sidecars whose blob is gone; only for the process that has the lock.
        """
        now = self.ledger.clock()
        for algorithm in _names(self.blobs):
            for shard in _names(self.blobs / algorithm):
                directory = self.blobs / algorithm / shard
                names = _names(directory)
                blobs = frozenset(names)
                for name in names:
                    self._scan(algorithm, shard, name, now)
                    blob, dot, _ = name.rpartition(SIDECAR_SUFFIX)
                    if tidy and dot and blob not in blobs:
                        remove(directory / name)

    def _scan(self, algorithm: str, shard: str, name: str, now: float) -> None:
        found = self._listed(algorithm, shard, name)
        if found is None:
            return
        try:
            set_at = used_at = os.stat(self.blob_path(found.digest)).st_mtime
        except FileNotFoundError:
            return
        with suppress(FileNotFoundError):
            used_at = os.stat(self.sidecar_path(found.digest)).st_mtime
        set_at, used_at = min(set_at, now), min(max(set_at, used_at), now)
        self.ledger.put(Kind.BLOB, found.digest, Record(found.length, set_at, used_at))

    def list(self) -> Iterator[BlobStat]:
        """All blobs in the order of their digests; one deleted meanwhile may be missing."""
        for algorithm in _names(self.blobs):
            for shard in _names(self.blobs / algorithm):
                for name in _names(self.blobs / algorithm / shard):
                    found = self._listed(algorithm, shard, name)
                    if found is not None:
                        yield found

    def _listed(self, algorithm: str, shard: str, name: str) -> BlobStat | None:
        try:
            digest = Digest.parse(f"{algorithm}:{name}")
            status = os.stat(self.blobs / algorithm / shard / name)
        except (InvalidDigest, FileNotFoundError):
            return None
        if name[:2] != shard or not stat.S_ISREG(status.st_mode):
            return None
        return BlobStat(digest, status.st_size)


def _attempt(step: Callable[[*Ts], object], *args: *Ts) -> OSError | None:
    """What came of a step, for others to go on."""
    try:
        step(*args)
    except OSError as error:
        return error
    return None


def _names(directory: Path) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except (FileNotFoundError, NotADirectoryError):
        return []
