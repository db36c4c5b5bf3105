"""Small blobs, which come whole with their metainfo: served from memory until the store has them.

An announce and its answer take the place of a connection, the greetings, an offer, a claim and a piece.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Final, Self

import structlog
import trio

from swarmpull.digest import Digest
from swarmpull.errors import DownloadFailed, StoreFull, StoreUnavailable, SwarmpullError
from swarmpull.store.blobs import BlobStore
from swarmpull.store.hashing import hash_piece
from swarmpull.store.holds import Pin
from swarmpull.swarm.metainfo import Metainfo
from swarmpull.wire.api import INLINE_BYTES_MAX

log = structlog.get_logger()

# Blobs that are in memory until the store has them, of 64 KiB each; the next ones wait.
BLOBS_MAX: Final = 64
# For which those that come next are waited for, in seconds, unless half of the places are taken or somebody
# waits for the store.  A step of its own for each costs 0.4 ms of processor, in one with others half of it.
PAUSE: Final = 0.02


class SmallBlob:
    """A verified blob in memory on its way into the store; read by any number at once.

    Attributes:
        metainfo: of the blob.
        content: all of it.
        hurry: has it stored soon.
    """

    def __init__(self, metainfo: Metainfo, content: bytes) -> None:
        self.metainfo = metainfo
        self.content = content
        self._ended = trio.Event()
        self._error: SwarmpullError | None = None
        self.hurry: Callable[[], None] = lambda: None

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
        self.hurry()
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


class SmallBlobs:
    """The small blobs of one host on their way into its store, which takes several in one step.

    ``on_stored`` is told of each, with the repository through which it was asked for.  What is not stored
    when ``nursery`` is cancelled is lost: it is a cache.
    """

    def __init__(
        self,
        store: BlobStore,
        nursery: trio.Nursery,
        on_stored: Callable[[Metainfo, str], None],
    ) -> None:
        self._store = store
        self._nursery = nursery
        self._on_stored = on_stored
        self._places = trio.Semaphore(BLOBS_MAX)
        self._blobs: dict[Digest, SmallBlob] = {}
        self._waiting: list[tuple[SmallBlob, str]] = []
        self._storing = False
        self._hurry = trio.Event()

    def get(self, digest: Digest) -> SmallBlob | None:
        """The blob while it is in memory."""
        return self._blobs.get(digest)

    async def take(self, blob: SmallBlob, namespace: str) -> SmallBlob:
        """Have a blob stored; waits while too many are in memory."""
        await self._places.acquire()
        self._blobs[blob.metainfo.digest] = blob
        self._waiting.append((blob, namespace))
        blob.hurry = self._hurry_up
        if len(self._waiting) >= BLOBS_MAX // 2:
            self._hurry_up()
        if not self._storing:
            self._storing = True
            self._nursery.start_soon(self._store_all)
        return blob

    async def settle(self) -> None:
        """Return when the store has taken all of them, or has refused."""
        for blob in tuple(self._blobs.values()):
            with suppress(SwarmpullError):
                await blob.wait()

    def _hurry_up(self) -> None:
        self._hurry.set()

    async def _store_all(self) -> None:
        try:
            while self._waiting:
                with trio.move_on_after(PAUSE):
                    await self._hurry.wait()
                self._hurry = trio.Event()
                batch, self._waiting = self._waiting, []
                await self._store_batch(batch)
        finally:
            self._storing = False
            for blob, _ in self._waiting:
                self._end(blob, _shutting_down(blob))

    async def _store_batch(self, batch: list[tuple[SmallBlob, str]]) -> None:
        blobs = [blob for blob, _ in batch]
        failures: list[SwarmpullError | None] = [_shutting_down(blob) for blob in blobs]
        try:
            with ExitStack() as holds:
                for blob in blobs:
                    holds.enter_context(self._store.hold(blob.metainfo.digest, Pin.SENDING))
                failures[:] = await self._store.put([(b.metainfo, b.content) for b in blobs])
                for (blob, namespace), failure in zip(batch, failures, strict=True):
                    if failure is None:
                        self._on_stored(blob.metainfo, namespace)
        finally:
            for blob, failure in zip(blobs, failures, strict=True):
                self._end(blob, failure)

    def _end(self, blob: SmallBlob, failure: SwarmpullError | None) -> None:
        digest = blob.metainfo.digest
        if isinstance(failure, StoreFull | StoreUnavailable):
            # Whoever asked for it has it from memory; the next one asks the tracker again.
            log.warning("blob_not_kept", digest=str(digest), reason=str(failure))
        del self._blobs[digest]
        self._places.release()
        blob.end(failure)


def _shutting_down(blob: SmallBlob) -> DownloadFailed:
    return DownloadFailed(str(blob.metainfo.digest), "this host shuts down")
