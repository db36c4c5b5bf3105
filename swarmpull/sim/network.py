"""A network in simulated time: a queue of things that happen, and links with a rate and a delay.

A host's uplink sends one piece after the other at its rate; its downlink takes them in one after the
other.  Control messages are small and only take the delay.  Everything is ordered by time and then by
the order in which it was scheduled, so a run is reproducible to the digit.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

import attrs


class Clock:
    """The queue of future happenings."""

    def __init__(self) -> None:
        self.now = 0.0
        self.processed = 0
        self._queue: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []
        self._serial = 0

    def at(self, when: float, happen: Callable[..., None], *args: object) -> None:
        """Call ``happen(*args)`` at that time, in seconds; never earlier than now."""
        self._serial += 1
        heapq.heappush(self._queue, (max(when, self.now), self._serial, happen, args))

    def run(self, until: float, stop: Callable[[], bool]) -> None:
        """Let things happen until the queue is empty, ``until`` is reached or ``stop()`` holds."""
        while self._queue and self._queue[0][0] <= until and not stop():
            self.now, _, happen, args = heapq.heappop(self._queue)
            self.processed += 1
            happen(*args)


@attrs.define
class Link:
    """The two directions of a host's connection to the network; rates in bytes per second."""

    up_rate: float
    down_rate: float
    up_free_at: float = 0.0
    down_free_at: float = 0.0
    bytes_sent: int = 0

    def send(self, size: int, now: float) -> tuple[float, float]:
        """Send ``size`` bytes as soon as the uplink is free.

        Returns when the first byte leaves and when the last one has left.
        """
        begins_at = max(now, self.up_free_at)
        self.up_free_at = begins_at + size / self.up_rate
        self.bytes_sent += size
        return begins_at, self.up_free_at

    def receive(self, size: int, first_at: float, last_at: float) -> float:
        """Take in bytes of which the first comes at ``first_at`` and the last at ``last_at``.

        Returns when all are in.  They flow through: a receiver that is slower than the sender takes its own
        time from the first byte on.  To be called in the order in which the transfers begin, for one that
        still waits for its sender's uplink must not hold up the others.
        """
        taken_in_at = max(first_at, self.down_free_at) + size / self.down_rate
        self.down_free_at = max(last_at, taken_in_at)
        return self.down_free_at
