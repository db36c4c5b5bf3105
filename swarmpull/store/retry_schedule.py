"""What is tried next, and when, of things that all have to succeed at one target in the end.  Pure.

Each thing that failed waits longer after each attempt.  The target has a wait of its own: while it refuses
everything, one thing at a time tries it, and when it takes one again all others may go on.

Things may belong together (`Schedule`'s ``group``): of those one at a time is under way.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Final, Generic, TypeVar

import attrs

K = TypeVar("K", bound=Hashable)

# Seconds between two attempts with one thing: doubled from the first to the last of these.
BACKOFF_MIN: Final = 1.0
BACKOFF_MAX: Final = 60.0
# The most seconds between two attempts while the target fails: how late its return may be noticed.
PROBE_MAX: Final = 15.0
# Seconds between two returns of the target that make what waits due: one thing that always fails would
# otherwise be tried after each one that does not.
RETURN_INTERVAL: Final = 60.0


def backoff(failures: int, longest: float, rng: random.Random) -> float:
    """Seconds to wait after so many failures in a row: exponential, with half of it left to chance."""
    # Beyond 2^30 the power only costs.
    limit = min(longest, BACKOFF_MIN * 2.0 ** min(max(failures, 1) - 1, 30))
    return limit * rng.uniform(0.5, 1.0)


@attrs.define
class _Wait:
    """``delay``: how long after the return of the target it is to be left to others."""

    due: float
    number: int
    delay: float


class Schedule(Generic[K]):
    """What is next; ``now`` is any clock that does not go backwards, in seconds."""

    def __init__(
        self,
        rng: random.Random,
        at_once: int,
        *,
        longest: float | None = None,
        group: Callable[[K], Hashable] | None = None,
    ) -> None:
        """A schedule without anything in it.

        Args:
            rng: for the part of a wait that is left to chance.
            at_once: how many things are under way at the same time.
            longest: the most seconds between two attempts with one thing, if not `BACKOFF_MAX`.
            group: what a thing belongs to; None: to nothing.
        """
        self.at_once = at_once
        self._rng = rng
        self._longest = BACKOFF_MAX if longest is None else longest
        self._group = group
        self._numbers = itertools.count()
        self._waiting: dict[K, _Wait] = {}
        # (due, number, key); those that do not match their `_Wait` are stale.
        self._heap: list[tuple[float, int, K]] = []
        self._active: set[K] = set()
        self._busy: Counter[Hashable] = Counter()
        # What was due while its group was busy; it is in the heap again when that is over.
        self._held: dict[Hashable, list[tuple[float, int, K]]] = {}
        self._failures = 0
        self._probe_at = -math.inf
        self._returned_at = -math.inf

    @property
    def target_fails(self) -> bool:
        """The last attempt found the target failing."""
        return self._failures > 0

    def add(self, key: K, due: float, delay: float = 0.0) -> None:
        """Let a thing be tried from ``due`` on; one that is known already becomes due then.

        ``delay``: seconds after a return of the target for which others, elsewhere, go first.
        """
        former = self._waiting.get(key)
        number = former.number if former else next(self._numbers)
        self._push(key, _Wait(due, number, delay))

    def take(self, now: float) -> K | None:
        """The thing to try next, if one may be tried now; ends with one of the methods below."""
        if self._is_held_back() or self._next_due() > now:
            return None
        key = heapq.heappop(self._heap)[2]
        self._active.add(key)
        if self._group is not None:
            self._busy[self._group(key)] += 1
        return key

    def next_time(self) -> float:
        """When `take` will give something if nothing else happens; infinite when only an event helps."""
        return math.inf if self._is_held_back() else self._next_due()

    def done(self, key: K, now: float) -> bool:
        """It has succeeded.  True if that showed that the target is back."""
        self.forget(key)
        if not self._failures:
            return False
        self._failures = 0
        if now - self._returned_at >= RETURN_INTERVAL:
            self._returned_at = now
            self._let_all_go_on(now)
        return True

    def failed(self, key: K, attempts: int, now: float, *, target: bool) -> float:
        """Its ``attempts``-th attempt failed; seconds until the next.

        Args:
            target: the target failed, which the others would find too.
        """
        if target:
            self._failures += 1
            self._probe_at = now + backoff(self._failures, PROBE_MAX, self._rng)
        return self.postpone(key, backoff(attempts, self._longest, self._rng), now)

    def postpone(self, key: K, delay: float, now: float) -> float:
        """It was not tried after all; seconds until it is."""
        wait = self._waiting[key]
        self._release(key)
        self._push(key, attrs.evolve(wait, due=now + delay))
        return delay

    def forget(self, key: K) -> None:
        """It is not to be tried any more."""
        self._release(key)
        self._waiting.pop(key, None)

    # --- inside -------------------------------------------------------------------------------

    def _is_held_back(self) -> bool:
        return len(self._active) >= (1 if self._failures else self.at_once)

    def _next_due(self) -> float:
        """When the first thing is due and the target may be asked; infinite when there is none."""
        while self._heap and (self._is_stale(self._heap[0]) or self._is_in_line(self._heap[0])):
            heapq.heappop(self._heap)
        if not self._heap:
            return math.inf
        return max(self._heap[0][0], self._probe_at) if self._failures else self._heap[0][0]

    def _is_stale(self, item: tuple[float, int, K]) -> bool:
        due, _, key = item
        wait = self._waiting.get(key)
        return wait is None or wait.due != due or key in self._active

    def _is_in_line(self, item: tuple[float, int, K]) -> bool:
        """Whether it waits for another one of its group; it is kept aside then."""
        if self._group is None or not self._busy[group := self._group(item[2])]:
            return False
        self._held.setdefault(group, []).append(item)
        return True

    def _release(self, key: K) -> None:
        if key not in self._active:
            return
        self._active.remove(key)
        if self._group is not None:
            group = self._group(key)
            self._busy -= Counter((group,))
            for item in self._held.pop(group, ()):
                heapq.heappush(self._heap, item)

    def _push(self, key: K, wait: _Wait) -> None:
        self._waiting[key] = wait
        heapq.heappush(self._heap, (wait.due, wait.number, key))

    def _let_all_go_on(self, now: float) -> None:
        for key, wait in self._waiting.items():
            if key not in self._active:
                wait.due = min(wait.due, now + wait.delay)
        self._held.clear()
        self._heap = [
            (wait.due, wait.number, key)
            for key, wait in self._waiting.items()
            if key not in self._active
        ]
        heapq.heapify(self._heap)
