"""What a backend is: named objects that outlive every disk of the cluster.

Keys are ``/``-separated segments.  Objects are replaced whole; there is no append.  A backend keeps no
state in this process that matters: any number of processes may use one.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Final, Protocol

import attrs

from swarmpull.digest import Digest
from swarmpull.errors import InvalidRange

# S3 allows 1024 bytes of key (Amazon S3 user guide, "Naming Amazon S3 objects").
KEY_BYTES_MAX: Final = 1024
# Common file systems allow 255 bytes of name; the rest is for what a backend adds to it.
SEGMENT_BYTES_MAX: Final = 250
CHUNK_BYTES_MAX: Final = 1 << 20
SMALL_OBJECT_BYTES: Final = 8 << 20


@attrs.frozen
class ObjectStat:
    """An object and its length in bytes.

    Attributes:
        version: names this content of the object, for `Backend.open`; empty when a backend has no such name.
    """

    key: str
    length: int
    version: str = attrs.field(default="", eq=False)


@attrs.frozen
class ObjectPage:
    """One page of a listing.

    Attributes:
        keys: in the order of their UTF-8 bytes.
        more: whether further keys follow; ask again with ``after`` set to the last one.
    """

    keys: tuple[str, ...]
    more: bool


class Backend(Protocol):
    """The operations of every backend; ``tests/store/test_backend_conformance.py`` is their meaning.

    Every operation raises BackendUnavailable when the backend fails or refuses, with its name and
    the key, and ValueError for a key that `check_key` refuses.  Every operation can be cancelled; a
    cancelled `put_file` or `put_bytes` has either happened whole or not at all.

    Attributes:
        name: the URL without secrets; stamped on every error.
    """

    @property
    def name(self) -> str: ...

    async def stat(self, key: str) -> ObjectStat:
        """Look up an object.  Raises ObjectNotFound."""
        ...

    def open(
        self, key: str, *, start: int = 0, stop: int | None = None, version: str = ""
    ) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """Read the bytes from ``start`` to ``stop`` (excluded), in chunks of at most 1 MiB.

        ``version`` is that of a former `stat`: several reads then never mix two contents.  A backend whose
        `stat` gives none need not take it.

        ``stop`` beyond the end means the end.  An object that is deleted or replaced while it is
        open gives its old content or BackendUnavailable, never short or mixed data.

        Raises on entry:
            ObjectNotFound: there is none.
            InvalidRange: ``start`` is negative or beyond the end, or ``stop`` before ``start``.
            ObjectReplaced: it is no longer that version; also while it is read.
        """
        ...

    async def put_file(self, key: str, path: Path) -> None:
        """Store the content of a local file, replacing what is there; durable on return.

        Readers see the old or the new object, never a part.  Raises FileNotFoundError when there is
        no such file here.
        """
        ...

    async def put_bytes(self, key: str, data: bytes, *, if_version: str | None = None) -> None:
        """Store a small object, as `put_file` does.

        With ``if_version`` only if that is the content of the object, as `get_versioned` has told, or with an
        empty one if there is none.  Of several such puts with the same version one succeeds, whichever
        processes make them; other puts and deletes do not take part in that.

        Raises:
            ObjectReplaced: the object has another content, or is not there, or is.
        """
        ...

    async def get_versioned(
        self, key: str, *, limit: int = SMALL_OBJECT_BYTES
    ) -> tuple[bytes, str]:
        """Read a small object whole, with what names this content for `put_bytes`.

        Raises what `get_bytes` does.
        """
        ...

    async def get_bytes(self, key: str, *, limit: int = SMALL_OBJECT_BYTES) -> bytes:
        """Read a small object whole.

        Raises:
            ObjectNotFound: there is none.
            BackendUnavailable: also when it is longer than ``limit`` bytes.
        """
        ...

    async def delete(self, key: str) -> None:
        """Remove an object.  Raises ObjectNotFound."""
        ...

    async def list(self, prefix: str = "", *, after: str = "", limit: int = 1000) -> ObjectPage:
        """Keys that begin with ``prefix``, which need not end at a ``/``, strictly after ``after``.

        Objects that are put or deleted meanwhile may be in it or not.  An object ``a/b`` need not be in it
        while there is an object ``a``: MinIO lists none below another, and no key of ours is.  Raises
        ValueError for a limit below 1.
        """
        ...


def check_key(key: str) -> str:
    """Return the key when it is well formed.

    Raises:
        ValueError: empty, too long, not UTF-8, or with a segment that is empty, ``.``, ``..`` or
            holds NUL.
    """
    encoded = key.encode("utf-8")  # UnicodeEncodeError is a ValueError
    if not 0 < len(encoded) <= KEY_BYTES_MAX:
        raise ValueError(f"key of {len(encoded)} bytes: allowed are 1 to {KEY_BYTES_MAX}")
    for segment in encoded.split(b"/"):
        if segment in {b"", b".", b".."} or b"\0" in segment:
            raise ValueError(f"key {key!r}: a segment is empty, '.', '..' or holds NUL")
        if len(segment) > SEGMENT_BYTES_MAX:
            raise ValueError(f"key {key!r}: a segment is longer than {SEGMENT_BYTES_MAX} bytes")
    return key


def check_range(key: str, length: int, start: int, stop: int | None) -> range:
    """The offsets that a range means in an object of ``length`` bytes.

    Raises:
        InvalidRange: ``start`` is negative or beyond the end, or ``stop`` before ``start``.
    """
    if not 0 <= start <= length or (stop is not None and stop < start):
        raise InvalidRange(key, length, start, stop)
    return range(start, length if stop is None else min(stop, length))


def blob_key(digest: Digest) -> str:
    """The key of a blob: ``blobs/<algorithm>/ab/<hex>``."""
    return f"blobs/{digest.algorithm}/{digest.hex[:2]}/{digest.hex}"
