"""Which blob is written to the backend next, and when: the decisions of the write-back queue.  Pure.

Each blob that could not be written waits longer after each attempt.  The backend has a wait of its own: while
it refuses everything, one blob at a time tries it, and when it takes one again all others may go on.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from typing import Final

import attrs

from swarmpull.digest import Digest

# Seconds between two attempts to write one blob: doubled from the first to the last of these.
BACKOFF_MIN: Final = 1.0
BACKOFF_MAX: Final = 60.0
# The most seconds between two attempts while the backend fails: how late its return may be noticed.
PROBE_MAX: Final = 15.0
# How far a replica is behind the one before it, in seconds, and the rate in bytes per second at which that
# one is expected to write at least: enough that usually one of them writes.
RANK_DELAY: Final = 30.0
RANK_RATE: Final = 20e6
# Seconds between two returns of the backend that make waiting blobs due: one blob that always fails would
# otherwise be tried after each one that does not.
RETURN_INTERVAL: Final = 60.0


# A blob, and the repository through which it was pushed, which says where it belongs.
Key = tuple[Digest, str]


@attrs.frozen
class QueuedBlob:
    """A blob that the backend does not have yet; times are in seconds since the epoch.

    Attributes:
        length: in bytes.
        namespace: the repository through which it was pushed; empty for a generic blob.
        enqueued_at: when it was accepted.
        rank: 0 where it was accepted, 1 and more on replicas, which write only if those before them do not.
        attempts: how often writing has failed.
        next_at: when it is tried next.
        last_error: why the last attempt failed.
        is_found: nobody pushed it just now: it was on the disk when the queue was made anew.
    """

    digest: Digest
    length: int
    namespace: str
    enqueued_at: float
    rank: int = 0
    attempts: int = 0
    next_at: float = 0.0
    last_error: str = ""
    is_found: bool = attrs.field(default=False, converter=bool)

    @property
    def key(self) -> Key:
        return self.digest, self.namespace


def rank_delay(rank: int, length: int) -> float:
    """Seconds that a replica leaves to those before it to write a blob."""
    return rank * (RANK_DELAY + length / RANK_RATE)


def backoff(failures: int, longest: float, rng: random.Random) -> float:
    """Seconds to wait after so many failures in a row: exponential, with half of it left to chance."""
    # Beyond 2^30 the power only costs.
    limit = min(longest, BACKOFF_MIN * 2.0 ** min(max(failures, 1) - 1, 30))
    return limit * rng.uniform(0.5, 1.0)


@attrs.define
class _Wait:
    due: float
    number: int
    rank: int
    length: int


class Schedule:
    """Which blob is next; ``now`` is any clock that does not go backwards, in seconds.

    Attributes:
        at_once: how many blobs are written at the same time.
    """

    def __init__(self, rng: random.Random, at_once: int) -> None:
        self.at_once = at_once
        self._rng = rng
        self._numbers = itertools.count()
        self._waiting: dict[Key, _Wait] = {}
        # (due, number, key); those that do not match their `_Wait` are stale.
        self._heap: list[tuple[float, int, Key]] = []
        self._active: set[Key] = set()
        self._failures = 0
        self._probe_at = -math.inf
        self._returned_at = -math.inf

    @property
    def backend_fails(self) -> bool:
        """The last attempt found the backend failing."""
        return self._failures > 0

    def add(self, key: Key, rank: int, length: int, due: float) -> None:
        """Let a blob be written from ``due`` on; one that is known already becomes due then."""
        former = self._waiting.get(key)
        number = former.number if former else next(self._numbers)
        self._push(key, _Wait(due, number, rank, length))

    def take(self, now: float) -> Key | None:
        """The blob to write next, if one may be written now; ends with one of the methods below."""
        if self._is_held_back() or self._next_due() > now:
            return None
        key = heapq.heappop(self._heap)[2]
        self._active.add(key)
        return key

    def next_time(self) -> float:
        """When `take` will give a blob if nothing else happens; infinite when only an event helps."""
        return math.inf if self._is_held_back() else self._next_due()

    def written(self, key: Key, now: float) -> bool:
        """The backend has it.  True if that showed that the backend is back."""
        self._active.discard(key)
        self._waiting.pop(key, None)
        if not self._failures:
            return False
        self._failures = 0
        if now - self._returned_at >= RETURN_INTERVAL:
            self._returned_at = now
            self._let_all_go_on(now)
        return True

    def failed(self, key: Key, attempts: int, now: float, *, backend: bool) -> float:
        """Its ``attempts``-th attempt failed; seconds until the next.

        Args:
            backend: the backend failed, which the others would find too.
        """
        if backend:
            self._failures += 1
            self._probe_at = now + backoff(self._failures, PROBE_MAX, self._rng)
        return self.postpone(key, backoff(attempts, BACKOFF_MAX, self._rng), now)

    def postpone(self, key: Key, delay: float, now: float) -> float:
        """It was not tried after all; seconds until it is."""
        self._active.discard(key)
        wait = self._waiting[key]
        self._push(key, attrs.evolve(wait, due=now + delay))
        return delay

    # --- inside -------------------------------------------------------------------------------

    def _is_held_back(self) -> bool:
        return len(self._active) >= (1 if self._failures else self.at_once)

    def _next_due(self) -> float:
        """When the first blob is due and the backend may be asked; infinite when there is none."""
        while self._heap and self._is_stale(self._heap[0]):
            heapq.heappop(self._heap)
        if not self._heap:
            return math.inf
        return max(self._heap[0][0], self._probe_at) if self._failures else self._heap[0][0]

    def _is_stale(self, item: tuple[float, int, Key]) -> bool:
        due, _, key = item
        wait = self._waiting.get(key)
        return wait is None or wait.due != due or key in self._active

    def _push(self, key: Key, wait: _Wait) -> None:
        self._waiting[key] = wait
        heapq.heappush(self._heap, (wait.due, wait.number, key))

    def _let_all_go_on(self, now: float) -> None:
        for key, wait in self._waiting.items():
            if key not in self._active:
                wait.due = min(wait.due, now + rank_delay(wait.rank, wait.length))
        self._heap = [
            (wait.due, wait.number, key)
            for key, wait in self._waiting.items()
            if key not in self._active
        ]
        heapq.heapify(self._heap)
