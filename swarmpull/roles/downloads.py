"""One blob on its way to this host, shared by everybody who reads it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from itertools import count
from typing import Final

import trio

from swarmpull.digest import Digest
from swarmpull.errors import DigestMismatch, DownloadFailed, SwarmpullError
from swarmpull.roles.hash_log import HashLog
from swarmpull.store.partials import PartialBlob
from swarmpull.swarm.metainfo import GrowingMetainfo

_reader_numbers: Final = count()


class Download:
    """A download in progress: its partial blob, its end, and those who wait for either.

    Readers come and go without any effect on the download.  Of a blob that is complete the partial stays
    open until the last reader has left; one that failed is closed at once, and readers hear of it.

    Attributes:
        partial: where its pieces are.
        hashes: of the pieces, as far as they are known.
        following: the task, if any, that learns of more hashes; ends with the download.
        explain: makes the error that readers get when the whole blob is not what its digest says.
    """

    def __init__(
        self,
        partial: PartialBlob,
        on_reader_moved: Callable[[Digest, int, int], None],
        on_reader_closed: Callable[[Digest, int], None],
    ) -> None:
        self.partial = partial
        self.hashes = HashLog(partial.metainfo)
        self.following = trio.CancelScope()
        self.explain: Callable[[DigestMismatch], SwarmpullError] = _unexpected_content
        self._on_reader_moved = on_reader_moved
        self._on_reader_closed = on_reader_closed
        self._waiting = trio.lowlevel.ParkingLot()
        self._verified = trio.Event()
        self._ended = trio.Event()
        self._closable = trio.Event()
        self._error: SwarmpullError | None = None
        self._readers = 0
        self._readers_changed = trio.Event()

    @property
    def metainfo(self) -> GrowingMetainfo:
        """What is known of the blob."""
        return self.partial.metainfo

    @property
    def ended(self) -> bool:
        """Whether the blob is in the store, or will not be."""
        return self._ended.is_set()

    @property
    def failed(self) -> bool:
        """Whether it has ended without the blob."""
        return self._error is not None

    def progress(self) -> None:
        """A piece has been stored: wake those who wait for one."""
        self._waiting.unpark_all()

    def confirm(self) -> None:
        """The whole blob has matched its digest; what is left is to make it durable."""
        self._verified.set()
        self.hashes.settle()

    def end(self, error: SwarmpullError | None = None) -> None:
        """The blob is in the store, or the download has failed; the first end counts."""
        if not self._ended.is_set():
            self._error = error
            self._verified.set()
            self._ended.set()
            self.following.cancel()
            if error is not None:
                self.hashes.fail(error)
            self._waiting.unpark_all()
            self._readers_changed.set()
            self._check_closable()

    async def wait(self) -> None:
        """Return when the blob is in the store.

        Raises:
            SwarmpullError: why it will not be: DownloadFailed, DigestMismatch, StoreFull, ...
        """
        await self._ended.wait()
        self._raise_if_failed()

    async def wait_ended(self) -> None:
        """Return when the blob is in the store, or will not be."""
        await self._ended.wait()

    async def wait_verified(self) -> None:
        """Return when the whole blob has matched its digest.  Raises what `wait` does."""
        await self._verified.wait()
        self._raise_if_failed()

    async def wait_closable(self) -> None:
        """Return when the partial may be closed: the download has failed, or has ended unread."""
        await self._closable.wait()

    async def wait_unread(self, seconds: float) -> bool:
        """Return True when nobody has read it for ``seconds``; False when it has ended before."""
        while not self._ended.is_set():
            self._readers_changed = trio.Event()
            with trio.move_on_after(math.inf if self._readers else seconds) as scope:
                await self._readers_changed.wait()
            # A reader may have come in the same turn of the event loop.
            if scope.cancelled_caught and not self._readers:
                return True
        return False

    def reader(self) -> DownloadReader | None:
        """A new reader, to be closed; None once the download has ended: look into the store then."""
        if self._ended.is_set():
            return None
        self._readers += 1
        self._readers_changed.set()
        return DownloadReader(self, next(_reader_numbers))

    def move_reader(self, reader: int, index: int) -> None:
        """A reader has come to a piece: that one and those just ahead are urgent."""
        if not self._ended.is_set():
            self._on_reader_moved(self.metainfo.digest, reader, index)

    async def wait_piece(self, index: int) -> None:
        """Return when a piece is stored.  Raises what `wait` does."""
        self._raise_if_failed()
        while not self._has(index):
            await self._waiting.park()
            self._raise_if_failed()

    def close_reader(self, reader: int) -> None:
        self._readers -= 1
        self._readers_changed.set()
        self._on_reader_closed(self.metainfo.digest, reader)
        self._check_closable()

    def _has(self, index: int) -> bool:
        return bool((self.partial.have >> index) & 1)

    def _raise_if_failed(self) -> None:
        if self._error is not None:
            # An exception collects the traceback of whoever raises it: each reader raises its own.
            raise copy.copy(self._error)

    def _check_closable(self) -> None:
        if self._ended.is_set() and (self._error is not None or self._readers == 0):
            self._closable.set()


def _unexpected_content(error: DigestMismatch) -> SwarmpullError:
    reason = f"every piece matched the metainfo, but the {error}"
    return DownloadFailed(error.expected, reason)


class DownloadReader:
    """Reads a blob in order or at random while it downloads; waits for what is not there yet."""

    def __init__(self, download: Download, number: int) -> None:
        self._download = download
        self._number = number
        self._position = -1
        self._closed = False

    @property
    def length(self) -> int:
        return self._download.metainfo.length

    async def read_at(self, offset: int, size: int, *, early: bool = False) -> bytes:
        """At least one and at most ``size`` bytes from ``offset``, which is below ``length``.

        The last bytes of the blob are held back until the whole of it has matched its digest: who has
        read all of it has read the right blob.  ``early`` gives them as soon as their piece is verified.

        Raises:
            DownloadFailed: the piece will not come, or the blob is not what its digest says.
            StoreFull, StoreUnavailable: the disk failed.
        """
        metainfo = self._download.metainfo
        first = offset // metainfo.piece_length
        if first != self._position:
            self._position = first
            self._download.move_reader(self._number, first)
        await self._download.wait_piece(first)
        have = self._download.partial.have >> first
        stored_in_a_row = (~have & (have + 1)).bit_length() - 1
        stop = min(
            offset + size, metainfo.length, (first + stored_in_a_row) * metainfo.piece_length
        )
        if stop == metainfo.length and not early:
            await self._download.wait_verified()
        return await self._download.partial.read_at(offset, stop - offset)

    def close(self) -> None:
        """Stop reading; closing twice is allowed."""
        if not self._closed:
            self._closed = True
            self._download.close_reader(self._number)
