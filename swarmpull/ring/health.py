"""Which members of a ring are healthy, from the calls and probes that were made to them.

A member becomes unhealthy after ``fall`` failures without a success between them, and healthy again
after ``rise`` successes, or when its last failure is ``expiry`` seconds old, which happens to those
that are not probed any more.  In the last case it is on probation: its next failure makes it
unhealthy at once.

Health only changes the order in which members are tried.  Nobody is ever dropped, so a ring whose
members all look unhealthy still answers.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import attrs


@attrs.frozen(kw_only=True)
class HealthLimits:
    """Thresholds in calls, ``expiry`` in seconds.

    Attributes:
        fall: failures that make a member unhealthy; three let a lost packet or a restart pass.
        rise: successes that make it healthy again; one may be luck.
        expiry: how long a failure counts.  As unhealthy members are tried last, nobody would notice
            that one is back if its failures did not expire.
    """

    fall: int = attrs.field(default=3, validator=attrs.validators.gt(0))
    rise: int = attrs.field(default=2, validator=attrs.validators.gt(0))
    expiry: float = attrs.field(default=10.0, validator=attrs.validators.gt(0))


@attrs.define
class _Record:
    failures: int = 0
    successes: int = 0
    failed_at: float = 0.0
    fell_at: float = 0.0
    unhealthy: bool = False


class HealthTable:
    """The health of the members of one ring; a member that nothing is known of is healthy.

    ``now`` is any clock that does not go backwards, in seconds.
    """

    def __init__(self, limits: HealthLimits) -> None:
        self._limits = limits
        # Only of members that have failed: a healthy ring costs nothing.
        self._records: dict[str, _Record] = {}

    def record_failure(self, member: str, now: float) -> bool:
        """A call to this member got no answer.  True if that made it unhealthy."""
        record = self._records.setdefault(member, _Record())
        self._settle(record, now)
        record.failures = min(record.failures + 1, self._limits.fall)
        record.successes = 0
        record.failed_at = now
        fell = not record.unhealthy and record.failures == self._limits.fall
        if fell:
            record.fell_at = now
        record.unhealthy = record.failures == self._limits.fall
        return fell

    def record_success(self, member: str, now: float) -> bool:
        """This member answered a call.  True if that made it healthy again."""
        record = self._records.get(member)
        if record is None:
            return False
        self._settle(record, now)
        record.successes += 1
        rose = record.unhealthy and record.successes >= self._limits.rise
        if rose or not record.unhealthy:
            del self._records[member]
        return rose

    def is_healthy(self, member: str, now: float) -> bool:
        record = self._records.get(member)
        if record is None:
            return True
        self._settle(record, now)
        return not record.unhealthy

    def unhealthy_for(self, member: str, now: float) -> float:
        """Seconds since this member became unhealthy; 0 for a healthy one."""
        return 0.0 if self.is_healthy(member, now) else now - self._records[member].fell_at

    def arrange(self, members: Sequence[str], now: float) -> list[str]:
        """The same members: those that are healthy first, each part in the order it came in."""
        return sorted(members, key=lambda member: not self.is_healthy(member, now))

    def retain(self, members: Collection[str]) -> None:
        """Forget everybody else, who left the ring."""
        self._records = {
            member: record for member, record in self._records.items() if member in members
        }

    def _settle(self, record: _Record, now: float) -> None:
        if record.unhealthy and now - record.failed_at >= self._limits.expiry:
            record.unhealthy = False
            record.failures = self._limits.fall - 1
            record.successes = 0
