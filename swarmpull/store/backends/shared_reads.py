"""Small reads that are wanted at the same moment, in one hop to a thread.

The hop takes ten times as long as to read a small file that is in memory; with one hop for each the event
loop has little time for anything else as soon as there are a thousand reads a second.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Final

import attrs
import trio

# Reads of one hop.
BATCH_MAX: Final = 64


@attrs.define(eq=False)
class _Wanted:
    read: Callable[[], bytes]
    data: bytes = b""
    error: Exception | None = None
    done: bool = False
    # Set when it is done, or its turn to read for those who wait.
    called: trio.Event = attrs.Factory(trio.Event)


@attrs.define(eq=False)
class _Lane:
    """One hop at a time; ``waiting`` in the order of their coming."""

    waiting: dict[_Wanted, None] = attrs.Factory(dict)
    is_busy: bool = False

    def call_next(self) -> None:
        """The hop is over: somebody who waits makes the next one."""
        self.is_busy = bool(self.waiting)
        if self.waiting:
            next(iter(self.waiting)).called.set()


class SharedReads:
    """Reads by key; ``lanes`` hops at the same time, and each key in one lane."""

    def __init__(self, limiter: trio.CapacityLimiter, lanes: int) -> None:
        self._limiter = limiter
        self._lanes = [_Lane() for _ in range(lanes)]

    async def get(self, key: str, read: Callable[[], bytes]) -> bytes:
        """Call ``read`` in a thread; what it returns or raises.  A hop that has begun is waited for."""
        lane = self._lanes[hash(key) % len(self._lanes)]
        mine = _Wanted(read)
        lane.waiting[mine] = None
        if lane.is_busy:
            await self._wait(lane, mine)
        if not mine.done:
            lane.is_busy = True
            await self._read_for_all(lane, mine)
        if mine.error is not None:
            raise mine.error
        return mine.data

    async def _wait(self, lane: _Lane, mine: _Wanted) -> None:
        try:
            await mine.called.wait()
        except trio.Cancelled:
            lane.waiting.pop(mine, None)
            if mine.called.is_set() and not mine.done:
                lane.call_next()
            raise

    async def _read_for_all(self, lane: _Lane, mine: _Wanted) -> None:
        batch = list(islice(lane.waiting, BATCH_MAX))
        try:
            await trio.to_thread.run_sync(_read_all, batch, limiter=self._limiter)
        except trio.Cancelled:
            # Before the hop.
            del lane.waiting[mine]
            raise
        else:
            for wanted in batch:
                # Unless it has left.
                lane.waiting.pop(wanted, None)
                wanted.done = True
                wanted.called.set()
        finally:
            lane.call_next()


def _read_all(batch: Sequence[_Wanted]) -> None:
    for wanted in batch:
        try:
            # Whatever it raises is for the one who wanted it.
            wanted.data = wanted.read()
        except Exception as error:
            wanted.error = error
