"""A network in simulated time: a queue of things that happen, and links with a rate and a delay.

A host's uplink sends one piece after the other at its rate; its downlink takes them in one after the
other.  Control messages are small and only take the delay.  Everything is ordered by time and then by
the order in which it was scheduled, so a run is reproducible to the digit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from heapq import heappop, heappush


class Clock:
    """The queue of future happenings.

    Attributes:
        now: in seconds.
        processed: happenings so far.
        stopped: set it to end `run` after the happening that is under way.
    """

    __slots__ = ("_queue", "_serial", "now", "processed", "stopped")

    def __init__(self) -> None:
        self.now = 0.0
        self.processed = 0
        self.stopped = False
        self._queue: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []
        self._serial = 0

    def at(self, when: float, happen: Callable[..., None], *args: object) -> None:
        """Call ``happen(*args)`` at that time, in seconds, which is not in the past."""
        self._serial += 1
        heappush(self._queue, (when, self._serial, happen, args))

    def run(self, until: float) -> None:
        """Let things happen until the queue is empty, ``until`` is reached or ``stopped`` is set."""
        queue = self._queue
        while queue and not self.stopped:
            when, _, happen, args = heappop(queue)
            if when > until:
                break
            self.now = when
            self.processed += 1
            happen(*args)


class Link:
    """The two directions of a host's connection to the network; rates in bytes per second.

    Attributes:
        up_free_at: when the last byte of all that was given to the uplink will have left.
        bytes_sent: of pieces.
    """

    __slots__ = ("_down_free_at", "bytes_sent", "down_rate", "up_free_at", "up_rate")

    def __init__(self, up_rate: float, down_rate: float) -> None:
        self.up_rate = up_rate
        self.down_rate = down_rate
        self.up_free_at = 0.0
        self.bytes_sent = 0
        self._down_free_at = 0.0

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
        time from the first byte on; one that is faster has the rest of its rate for others meanwhile.  To
        be called in the order in which the transfers begin, for one that still waits for its sender's
        uplink must not hold up the others.
        """
        self._down_free_at = max(first_at, self._down_free_at) + size / self.down_rate
        return max(last_at, self._down_free_at)

    def pressed_back(self, taken_in_at: float, buffer: float) -> float:
        """When the sender is rid of a piece that this receiver has taken in at ``taken_in_at``.

        All but the last ``buffer`` bytes must have got through the receiver's link by then.
        """
        return taken_in_at - buffer / self.down_rate if buffer < math.inf else 0.0
