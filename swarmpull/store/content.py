"""The tree of complete blobs, ``blobs/<algorithm>/ab/<hex>``; blocking, call it in a thread.

Nothing gets in here but through `ContentTree.install`, whose callers have hashed the file before.
"""

from __future__ import annotations

import os
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import attrs

from swarmpull.digest import Digest
from swarmpull.errors import InvalidDigest
from swarmpull.store import sidecars
from swarmpull.store.durable import make_directory, publish, remove
from swarmpull.swarm.metainfo import Metainfo

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
    """

    blobs: Path
    temporary: Path

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
        try:
            return os.stat(self.blob_path(digest)).st_size
        except FileNotFoundError:
            return None

    def install(self, source: Path, metainfo: Metainfo) -> BlobStat:
        """Make a verified file visible as a blob; durable on return, and ``source`` is gone.

        A blob that is here already is replaced: this one was verified just now, and that one may have
        been damaged since.  Open handles to it go on.
        """
        digest = metainfo.digest
        # Before the blob, so that whoever sees the blob finds its metainfo.
        self.save_metainfo(metainfo)
        publish(source, self.blob_path(digest))
        return BlobStat(digest, metainfo.length)

    def save_metainfo(self, metainfo: Metainfo) -> None:
        """Write the sidecar; not flushed, see `swarmpull.store.sidecars`."""
        target = self.sidecar_path(metainfo.digest)
        make_directory(target.parent)
        self.replace_small_file(target, sidecars.encode(metainfo))

    def replace_small_file(self, target: Path, content: bytes) -> None:
        """Write a whole file so that a reader sees either the old or the new content."""
        source = self.temporary_path()
        try:
            source.write_bytes(content)
            source.rename(target)
        finally:
            remove(source)

    def load_metainfo(self, digest: Digest, length: int) -> Metainfo | None:
        """Read the sidecar; None when it is missing, damaged, or of another blob."""
        try:
            metainfo, _ = sidecars.decode(self.sidecar_path(digest).read_bytes())
        except (FileNotFoundError, sidecars.DamagedSidecar):
            return None
        if metainfo.digest != digest or metainfo.length != length:
            return None
        return metainfo

    def delete(self, digest: Digest) -> bool:
        """Remove a blob and its sidecar; False when there was no blob.

        Not flushed: a blob that is back after a crash is still a right one.
        """
        try:
            self.blob_path(digest).unlink()
        except FileNotFoundError:
            return False
        remove(self.sidecar_path(digest))
        return True

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


def _names(directory: Path) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except (FileNotFoundError, NotADirectoryError):
        return []
