"""Small blobs, which come whole with their metainfo: served from memory until the store has them.

An announce and its answer take the place of a connection, the greetings, an offer, a claim and a piece.
"""

from __future__ import annotations

import copy
from typing import Self

import trio

from swarmpull.digest import Digest
from swarmpull.errors import SwarmpullError
from swarmpull.store.hashing import hash_piece
from swarmpull.swarm.metainfo import Metainfo
from swarmpull.wire.api import INLINE_BYTES_MAX


class SmallBlob:
    """A verified blob in memory on its way into the store; read by any number at once.

    Attributes:
        metainfo: of the blob.
        content: all of it.
    """

    def __init__(self, metainfo: Metainfo, content: bytes) -> None:
        self.metainfo = metainfo
        self.content = content
        self._ended = trio.Event()
        self._error: SwarmpullError | None = None

    @classmethod
    def verified(cls, metainfo: Metainfo, content: bytes | None) -> Self | None:
        """The blob if ``content`` is what its digest and its metainfo say; None for anything else.

        Both are checked, since the metainfo goes on to other hosts.
        """
        if content is None or not len(content) == metainfo.length <= INLINE_BYTES_MAX:
            return None
        if Digest.of(content, metainfo.digest.algorithm) != metainfo.digest:
            return None
        if content and metainfo.piece_hashes != hash_piece(content):
            return None
        return cls(metainfo, content)

    def end(self, error: SwarmpullError | None = None) -> None:
        """The blob is in the store, or cannot be kept."""
        self._error = error
        self._ended.set()

    async def wait(self) -> None:
        """Return when the blob is in the store.  Raises why it will not be: StoreFull, StoreUnavailable."""
        await self._ended.wait()
        if self._error is not None:
            raise copy.copy(self._error)

    def reader(self) -> SmallBlobReader:
        """A new reader; what it reads does not depend on the store."""
        return SmallBlobReader(self.content)


class SmallBlobReader:
    """Reads a small blob; nothing to wait for."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    @property
    def length(self) -> int:
        return len(self._content)

    async def read_at(
        self,
        offset: int,
        size: int,
        *,
        early: bool = False,  # noqa: ARG002 - all of it is verified
    ) -> bytes:
        """At most ``size`` bytes from ``offset``, fewer only where the blob ends."""
        await trio.lowlevel.checkpoint()
        return self._content[offset : offset + size]

    def close(self) -> None:
        """Nothing is held."""
