"""What lost packets do to a simulated network that sends them again, as TCP does."""

from __future__ import annotations

import math
import random
from typing import Final

# RFC 6298 lets a sender wait for a second; Linux waits for at least 0.2 s (tcp(7), TCP_RTO_MIN), and for
# 1 s before it has measured anything.  Each time twice as long.
REPEATED_AFTER: Final = 0.2
DIALLED_AGAIN_AFTER: Final = 1.0
SEGMENT_BYTES: Final = 1460


class Losses:
    """How much later messages arrive, and how fast a connection can be, when packets are lost.

    Attributes:
        share: of all packets, that are lost.
        rate: the most that one connection carries, in bytes per second (Mathis, Semke, Mahdavi, Ott: "The
            Macroscopic Behavior of the TCP Congestion Avoidance Algorithm", 1997).
    """

    def __init__(self, share: float, rtt: float, rng: random.Random) -> None:
        self.share = share
        self.rate = math.inf
        if share and rtt:
            self.rate = SEGMENT_BYTES / rtt * math.sqrt(1.5 / share)
        self._rng = rng

    def delay(self, first: float = REPEATED_AFTER) -> float:
        """Seconds until a small message has got through, beyond its usual time."""
        late, pause = 0.0, first
        while self._rng.random() < self.share:
            late += pause
            pause *= 2
        return late

    def exchange(self) -> float:
        """The same for a message and its answer."""
        return self.delay() + self.delay()
