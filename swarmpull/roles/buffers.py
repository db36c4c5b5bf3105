"""Memory for pieces on their way from a socket to the disk."""

from __future__ import annotations

import trio


class PieceBuffers:
    """A budget of bytes for pieces that are being received or verified, over all torrents.

    At the limit a connection waits before it reads on, and TCP makes its peer wait.  One piece always
    gets through, however large.  Buffers are used again: a fresh one costs a page fault for every 4 KiB.
    """

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._taken = 0
        self._free: list[bytearray] = []
        self._waiting = trio.lowlevel.ParkingLot()

    @property
    def taken(self) -> int:
        """Bytes in use."""
        return self._taken

    async def acquire(self, size: int) -> bytearray:
        """A buffer of at least ``size`` bytes; give it back with `release`."""
        while self._taken and self._taken + size > self._budget:
            await self._waiting.park()
        buffer = self._reuse(size) or bytearray(size)
        self._taken += len(buffer)
        await trio.lowlevel.cancel_shielded_checkpoint()
        return buffer

    def release(self, buffer: bytearray) -> None:
        """Give a buffer back."""
        self._taken -= len(buffer)
        self._free.append(buffer)
        self._trim()
        self._waiting.unpark_all()

    def _reuse(self, size: int) -> bytearray | None:
        for position, buffer in enumerate(self._free):
            if len(buffer) == size:
                return self._free.pop(position)
        self._free.clear()  # they are of another size: another kind of blob is being fetched
        return None

    def _trim(self) -> None:
        while self._free and self._taken + sum(map(len, self._free)) > self._budget:
            self._free.pop()
