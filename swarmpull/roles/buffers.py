"""Memory for pieces on their way from a socket to the disk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import trio

# How often those who hold buffers are looked at while somebody waits for one, in seconds.
RECLAIM_EVERY: Final = 0.25


class PieceBuffers:
    """A budget of bytes for pieces that are being received or verified, over all torrents.

    At the limit a connection waits before it reads on, and TCP makes its peer wait; those who wait are
    served in order.  One piece always gets through, however large.  Buffers are used again: a fresh one
    costs a page fault for every 4 KiB.

    Attributes:
        reclaim: is called now and then while somebody waits: whoever holds a buffer without need may be made
            to give it back.
    """

    def __init__(self, budget: int) -> None:
        self.reclaim: Callable[[], None] | None = None
        self._budget = budget
        self._taken = 0
        self._free: list[bytearray] = []
        # First come, first served: small pieces must not overtake a large one for ever.
        self._turn = trio.Lock()
        self._released = trio.Event()

    @property
    def taken(self) -> int:
        """Bytes in use."""
        return self._taken

    async def acquire(self, size: int) -> bytearray:
        """A buffer of ``size`` bytes; give it back with `release`."""
        async with self._turn:
            while self._taken and self._taken + size > self._budget:
                self._released = trio.Event()
                if self.reclaim is not None:
                    self.reclaim()
                with trio.move_on_after(RECLAIM_EVERY):
                    await self._released.wait()
            self._taken += size
            buffer = self._reuse(size) or bytearray(size)
            self._trim()
            return buffer

    def release(self, buffer: bytearray) -> None:
        """Give a buffer back."""
        self._taken -= len(buffer)
        self._free.append(buffer)
        self._trim()
        self._released.set()

    def _reuse(self, size: int) -> bytearray | None:
        for position, buffer in enumerate(self._free):
            if len(buffer) == size:
                return self._free.pop(position)
        return None

    def _trim(self) -> None:
        # The oldest first: it is of a size that is no longer asked for, or one of many.
        while self._free and self._taken + sum(map(len, self._free)) > self._budget:
            del self._free[0]
