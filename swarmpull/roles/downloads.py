"""One blob on its way to this host, shared by everybody who reads it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Final

import trio

from swarmpull.digest import Digest
from swarmpull.errors import SwarmpullError
from swarmpull.store.partials import PartialBlob
from swarmpull.swarm.metainfo import Metainfo

_reader_numbers: Final = count()


class Download:
    """A download in progress: its partial blob, its end, and those who wait for either.

    Readers come and go without any effect on the download.  The partial stays open until the download
    has ended and the last reader has left.

    Attributes:
        metainfo: of the blob.
        partial: where its pieces are.
    """

    def __init__(
        self,
        metainfo: Metainfo,
        partial: PartialBlob,
        on_reader_moved: Callable[[Digest, int, int], None],
        on_reader_closed: Callable[[Digest, int], None],
    ) -> None:
        self.metainfo = metainfo
        self.partial = partial
        self._on_reader_moved = on_reader_moved
        self._on_reader_closed = on_reader_closed
        self._waiting = trio.lowlevel.ParkingLot()
        self._ended = trio.Event()
        self._unused = trio.Event()
        self._error: SwarmpullError | None = None
        self._readers = 0

    def progress(self) -> None:
        """A piece has been stored: wake those who wait for one."""
        self._waiting.unpark_all()

    def end(self, error: SwarmpullError | None = None) -> None:
        """The blob is in the store, or the download has failed; the first end counts."""
        if not self._ended.is_set():
            self._error = error
            self._ended.set()
            self._waiting.unpark_all()
            self._check_unused()

    async def wait(self) -> None:
        """Return when the blob is in the store.

        Raises:
            SwarmpullError: why it will not be: DownloadFailed, DigestMismatch, StoreFull, ...
        """
        await self._ended.wait()
        self._raise_if_failed()

    async def wait_unused(self) -> None:
        """Return when the download has ended and nobody reads from it any more."""
        await self._unused.wait()

    def reader(self) -> DownloadReader | None:
        """A new reader, to be closed; None once the download has ended: look into the store then."""
        if self._ended.is_set():
            return None
        self._readers += 1
        return DownloadReader(self, next(_reader_numbers))

    async def wait_piece(self, index: int, reader: int) -> None:
        """Return when a piece is stored; until then it is urgent."""
        if (self.partial.have >> index) & 1:
            return
        self._on_reader_moved(self.metainfo.digest, reader, index)
        while not (self.partial.have >> index) & 1:
            self._raise_if_failed()
            await self._waiting.park()

    def close_reader(self, reader: int) -> None:
        self._readers -= 1
        self._on_reader_closed(self.metainfo.digest, reader)
        self._check_unused()

    def _raise_if_failed(self) -> None:
        if self._error is not None:
            # A fresh copy for each reader: a raised exception collects one traceback only.
            raise self._error.with_traceback(None)

    def _check_unused(self) -> None:
        if self._ended.is_set() and self._readers == 0:
            self._unused.set()


class DownloadReader:
    """Reads a blob in order or at random while it downloads; waits for what is not there yet."""

    def __init__(self, download: Download, number: int) -> None:
        self._download = download
        self._number = number
        self._closed = False

    @property
    def length(self) -> int:
        return self._download.metainfo.length

    async def read_at(self, offset: int, size: int) -> bytes:
        """At least one and at most ``size`` bytes from ``offset``, which is below ``length``.

        Raises:
            DownloadFailed: the piece will not come.
            StoreUnavailable: the disk failed.
        """
        metainfo = self._download.metainfo
        first = offset // metainfo.piece_length
        await self._download.wait_piece(first, self._number)
        have = self._download.partial.have >> first
        stored_in_a_row = (~have & (have + 1)).bit_length() - 1
        stop = min(
            offset + size, metainfo.length, (first + stored_in_a_row) * metainfo.piece_length
        )
        return await self._download.partial.read_at(offset, stop - offset)

    def close(self) -> None:
        """Stop reading; closing twice is allowed."""
        if not self._closed:
            self._closed = True
            self._download.close_reader(self._number)
