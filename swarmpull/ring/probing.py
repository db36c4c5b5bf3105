"""Which members of a ring are probed, and when.  Pure.

A healthy member is never probed: the calls that are made to it anyway say enough, and a ring that is well
costs nothing however many hosts use it.  A member is probed from the moment on at which a call to it
failed or takes longer than usual, until it is known to be well, or to be ill; then ever more seldom,
until it is back, as long as anybody here would use it.  So one that hangs is found by three small calls
in two seconds, and one that comes back is found by its first answers and not by a request that waits for
it.
"""

from __future__ import annotations

import math
import random
from typing import Final

import attrs

# A probe of a suspect begins at once; hosts that suspect together need not probe together.
SUSPECT_JITTER: Final = 0.1


@attrs.frozen(kw_only=True)
class ProbeLimits:
    """Times in seconds.

    Attributes:
        timeout: for a probe to be answered.  Three of them in a row make a member unhealthy: shorter would
            take a busy event loop for a dead one, longer would keep callers waiting.
        pause: between two probes of a member of which it is not yet clear how it is.
        interval_min, interval_max: between probes of an unhealthy member; doubled from the first to the last.
            10,000 hosts that all miss one tracker send it 2,500 probes a second for 8 s once it is
            back, each of which takes it 0.08 ms.
        jitter: by which share of it an interval is made shorter or longer, at random.
        calm_min, calm_max: for so long a member that was suspected and answered is not suspected again;
            doubled each time in a row.  It is slow, and probes would not make it faster.
        used_within: an unhealthy member that nobody has wanted to call for so long is not probed.
        suspect_after: a call without an answer for so long makes its member a suspect.
        at_once: probes of one ring at the same time; others wait for the next turn.
    """

    timeout: float = attrs.field(default=0.5, validator=attrs.validators.gt(0))
    pause: float = attrs.field(default=0.1, validator=attrs.validators.gt(0))
    interval_min: float = attrs.field(default=1.0, validator=attrs.validators.gt(0))
    interval_max: float = attrs.field(default=8.0, validator=attrs.validators.gt(0))
    jitter: float = attrs.field(
        default=0.25, validator=[attrs.validators.ge(0), attrs.validators.lt(1)]
    )
    calm_min: float = attrs.field(default=2.0, validator=attrs.validators.gt(0))
    calm_max: float = attrs.field(default=30.0, validator=attrs.validators.gt(0))
    used_within: float = attrs.field(default=60.0, validator=attrs.validators.gt(0))
    suspect_after: float = attrs.field(default=0.5, validator=attrs.validators.gt(0))
    at_once: int = attrs.field(default=8, validator=attrs.validators.gt(0))


@attrs.define
class _Patient:
    """A member that is being looked after."""

    due: float
    probed: int = 0
    under_way: bool = False


@attrs.define
class _Calm:
    """A member that was suspected wrongly."""

    until: float
    length: float


class Probing:
    """Which members of one ring are probed; ``now`` is a clock that does not go backwards, in seconds."""

    def __init__(self, limits: ProbeLimits, rng: random.Random) -> None:
        self.limits = limits
        self._rng = rng
        self._patients: dict[str, _Patient] = {}
        self._calm: dict[str, _Calm] = {}
        self._used_at: dict[str, float] = {}
        self._under_way = 0

    def suspect(self, member: str, now: float, *, failed: bool = False) -> bool:
        """A call to it takes long, or ``failed``.  True if it will be probed for that."""
        self._used_at[member] = now
        calm = self._calm.get(member)
        is_calm = calm is not None and now < calm.until and not failed
        if member in self._patients or is_calm:
            return False
        self._patients[member] = _Patient(now + self._rng.uniform(0.0, SUSPECT_JITTER))
        return True

    def is_patient(self, member: str) -> bool:
        """Whether it is being probed, because it may be ill."""
        return member in self._patients

    def wanted(self, member: str, now: float) -> bool:
        """It is unhealthy, and would have been called.  True if it will be probed for that."""
        self._used_at[member] = now
        if member in self._patients:
            return False
        self._patients[member] = _Patient(now + self._spread(self.limits.interval_min))
        return True

    def take(self, now: float) -> list[str]:
        """Who is to be probed now; each ends with `well` or `ill`."""
        free = self.limits.at_once - self._under_way
        due = sorted(
            (patient.due, member)
            for member, patient in self._patients.items()
            if not patient.under_way and patient.due <= now
        )
        taken = [member for _, member in due[: max(free, 0)]]
        for member in taken:
            self._patients[member].under_way = True
        self._under_way += len(taken)
        return taken

    def next_time(self) -> float:
        """When `take` has somebody if nothing else happens; infinite for nobody."""
        if self._under_way >= self.limits.at_once:
            return math.inf
        waiting = (each.due for each in self._patients.values() if not each.under_way)
        return min(waiting, default=math.inf)

    def well(self, member: str, now: float, *, healthy: bool) -> None:
        """It answered its probe; ``healthy`` if that is enough."""
        patient = self._ended(member)
        if patient is None:
            return
        if healthy:
            del self._patients[member]
            self._stay_calm(member, now)
        else:
            patient.probed = 0
            patient.due = now + self.limits.pause

    def ill(self, member: str, now: float, *, healthy: bool) -> None:
        """It did not answer its probe; ``healthy`` if it may be well nevertheless."""
        self._calm.pop(member, None)
        patient = self._ended(member)
        if patient is None:
            return
        if healthy:
            patient.due = now + self.limits.pause
            return
        if now - self._used_at.get(member, -math.inf) > self.limits.used_within:
            del self._patients[member]
            return
        patient.probed += 1
        limits = self.limits
        # Beyond 2^30 the power only costs.
        interval = limits.interval_min * 2.0 ** min(patient.probed - 1, 30)
        patient.due = now + self._spread(min(interval, limits.interval_max))

    def retain(self, members: frozenset[str]) -> None:
        """Forget everybody else, who left the ring."""
        for known in (self._patients, self._calm, self._used_at):
            for member in [each for each in known if each not in members]:
                del known[member]

    def _ended(self, member: str) -> _Patient | None:
        """None for one that left the ring while it was probed."""
        self._under_way -= 1
        patient = self._patients.get(member)
        if patient is not None:
            patient.under_way = False
        return patient

    def _stay_calm(self, member: str, now: float) -> None:
        limits, former = self.limits, self._calm.get(member)
        length = limits.calm_min
        if former is not None and now < former.until + former.length:
            length = min(2 * former.length, limits.calm_max)
        self._calm[member] = _Calm(now + length, length)

    def _spread(self, interval: float) -> float:
        return interval * self._rng.uniform(1.0 - self.limits.jitter, 1.0 + self.limits.jitter)
