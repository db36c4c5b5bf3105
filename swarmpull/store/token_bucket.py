"""A token bucket: bytes per second, for whatever sends or receives them; changeable while running."""

from __future__ import annotations

import math
from typing import Final

import trio

# How much may pass at once after a pause, in seconds of the rate: long enough that the event loop's own
# hiccups cost no throughput, short enough that a switch's buffer takes it.
BURST_SECONDS: Final = 0.05
BURST_BYTES_MIN: Final = 512 * 1024
# What is asked for at once under a low rate, in seconds of it: so much waits in front of everybody else.
# No less than a few frames, for each costs a header and a turn of the event loop.
PORTION_SECONDS: Final = 0.25
PORTION_BYTES_MIN: Final = 4096


class TokenBucket:
    """Lets bytes pass at a rate, in the order in which they were asked for.

    The budget may go into debt by one request, which passes as a whole: the next one waits for what the
    last one was too large.  With no rate nothing waits.
    """

    def __init__(self, rate: float = math.inf) -> None:
        self._rate = rate
        self._tokens = self._burst()
        self._filled_at: float | None = None
        self._turn = trio.Lock()
        self._changed = trio.Event()

    @property
    def rate(self) -> float:
        """Bytes per second; inf for no limit."""
        return self._rate

    @property
    def is_unlimited(self) -> bool:
        """Whether nothing waits here."""
        return self._rate == math.inf

    def set_rate(self, rate: float) -> None:
        """Change the rate; those who wait go by the new one at once.

        Raises:
            ValueError: not positive.
        """
        if not rate > 0:
            raise ValueError(f"a rate must be positive: {rate}")
        self._fill()
        self._rate = rate
        self._tokens = min(self._tokens, self._burst())
        self._changed.set()
        self._changed = trio.Event()

    async def take(self, size: int) -> None:
        """Return when ``size`` bytes may pass."""
        if self.is_unlimited:
            await trio.lowlevel.checkpoint()
            return
        async with self._turn:
            await self._wait_for_tokens()
            self._tokens -= size

    async def take_some(self, size: int) -> int:
        """Return when some of ``size`` bytes may pass, and how many: all, unless the rate is low.

        Those who take some at a time share a low rate evenly, and none waits long between two portions.
        """
        if self.is_unlimited:
            await trio.lowlevel.checkpoint()
            return size
        async with self._turn:
            await self._wait_for_tokens()
            portion = size
            if self._rate < math.inf:  # not lifted meanwhile
                portion = min(size, max(int(self._rate * PORTION_SECONDS), PORTION_BYTES_MIN))
            self._tokens -= portion
            return portion

    async def _wait_for_tokens(self) -> None:
        self._fill()
        # A debt below a byte is rounding: at a high rate no clock could wait for it.
        while self._tokens <= -1 and self._rate < math.inf:
            with trio.move_on_after(-self._tokens / self._rate):
                await self._changed.wait()
            self._fill()

    def _burst(self) -> float:
        return max(self._rate * BURST_SECONDS, BURST_BYTES_MIN)

    def _fill(self) -> None:
        now = trio.current_time()
        if self._filled_at is not None and self._rate < math.inf:
            earned = (now - self._filled_at) * self._rate
            self._tokens = min(self._tokens + earned, self._burst())
        elif self._rate == math.inf:
            self._tokens = 0.0
        self._filled_at = now
