"""When a lookup is asked of one more member, and whose answer counts.  Pure.

A member that takes longer than such calls usually do may hang, and another one can answer as well: it is
asked too, and whoever answers first is believed.  Not for what changes something, which would be done
twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final

import attrs

# Weights of a new sample and the four deviations are those of TCP's retransmission timer (RFC 6298, section
# 2): an answer that is not there then is later than answers usually are.
MEAN_GAIN: Final = 1 / 8
DEVIATION_GAIN: Final = 1 / 4
DEVIATIONS: Final = 4.0


@attrs.frozen(kw_only=True)
class HedgeLimits:
    """Times in seconds.

    Attributes:
        initial: for which the first member is waited for before anything was measured.
        least: below this a hiccup of the event loop would ask two members.
        most: a member that hangs costs a lookup no more than this.
        share: of all lookups, how many may be asked of one more member in the long run: where everything is
            slow, asking twice would make it slower.
        burst: how many may be so in a row.
    """

    initial: float = attrs.field(default=0.5, validator=attrs.validators.gt(0))
    least: float = attrs.field(default=0.05, validator=attrs.validators.gt(0))
    most: float = attrs.field(default=1.0, validator=attrs.validators.gt(0))
    share: float = attrs.field(default=0.1, validator=attrs.validators.ge(0))
    burst: float = attrs.field(default=20.0, validator=attrs.validators.ge(1))


@attrs.define
class _Times:
    """Mean and deviation of the seconds from call to answer."""

    mean: float
    deviation: float

    def add(self, seconds: float) -> None:
        error = seconds - self.mean
        self.mean += MEAN_GAIN * error
        self.deviation += DEVIATION_GAIN * (abs(error) - self.deviation)


class Hedging:
    """How long the members of one ring take to answer, by method, and how much is asked twice."""

    def __init__(self, limits: HedgeLimits) -> None:
        self._limits = limits
        self._times: dict[str, _Times] = {}
        self._budget = limits.burst

    def answered(self, method: str, seconds: float) -> None:
        """A member answered a call, so many seconds after it was made."""
        times = self._times.get(method)
        if times is None:
            self._times[method] = _Times(seconds, seconds / 2)
        else:
            times.add(seconds)

    def delay(self, method: str) -> float:
        """Seconds after which one more member is asked."""
        limits, times = self._limits, self._times.get(method)
        usual = limits.initial if times is None else times.mean + DEVIATIONS * times.deviation
        return min(max(usual, limits.least), limits.most)

    def begun(self) -> None:
        """A lookup begins."""
        self._budget = min(self._budget + self._limits.share, self._limits.burst)

    def may_hedge(self) -> bool:
        """Whether one more member may be asked now; if so, it is counted."""
        if self._budget < 1.0:
            return False
        self._budget -= 1.0
        return True


class Race:
    """One lookup: whom it is asked of, and which answer counts.

    An answer that brings something counts at once.  One that says that there is nothing counts only when no
    member that comes before in the order of the ring is still being asked: that one may know better.
    """

    def __init__(self, members: Sequence[str], delay: float) -> None:
        self._left = list(members)
        self._delay = delay
        self._hedge_at = -math.inf
        # Those that are being asked, in the order of the ring; and who answered that there is nothing.
        self._asked: list[str] = []
        self._refused: list[str] = []
        self.winner: str | None = None

    @property
    def is_over(self) -> bool:
        """Somebody has won, or nobody is left."""
        return self.winner is not None or not (self._left or self._asked)

    def next(self, now: float, may_hedge: Callable[[], bool]) -> str | None:
        """Whom to ask now, if anybody.

        ``may_hedge`` is asked when one more would be asked although the others have not failed.
        """
        if self.is_over or not self._left or self._refused:
            return None
        if self._asked:
            if now < self._hedge_at:
                return None
            if not may_hedge():
                self._hedge_at = now + self._delay
                return None
        member = self._left.pop(0)
        self._asked.append(member)
        self._hedge_at = now + self._delay
        return member

    def waited_for(self, member: str) -> list[str]:
        """Those that had been asked before this one and have not answered."""
        before = self._asked[: self._asked.index(member)]
        return [each for each in before if each not in self._refused]

    def next_time(self) -> float:
        """When one more may be asked; infinite when there is no such time."""
        return self._hedge_at if self._left and self._asked and not self._refused else math.inf

    def answered(self, member: str) -> None:
        """It brought something."""
        if self.winner is None:
            self.winner = member

    def refused(self, member: str) -> None:
        """It says that there is nothing, or that it cannot be had."""
        self._refused.append(member)
        self._settle()

    def failed(self, member: str) -> None:
        """It did not answer, and will not."""
        self._asked.remove(member)
        self._settle()

    def _settle(self) -> None:
        """The first of those asked has the word when it has answered; they are in the order of the ring."""
        if self.winner is None and self._asked and self._asked[0] in self._refused:
            self.winner = self._asked[0]
