"""What goes wrong in a simulated swarm, as a small readable text.

``slow=5%x10,killed=2%,origin-killed=1@3s,partition=10%@2s-4s,lost=5%``: a kind, how many (a share of the
agents or a number; for what is lost, a share of all messages), by which factor, and when.  No agent has two
faults.  Origins and trackers that several faults of one kind hit are different ones.
"""

from __future__ import annotations

import enum
import re
from typing import Final

import attrs

from swarmpull.units import format_duration, parse_duration


class FaultKind(enum.Enum):
    """Everything that can be wrong with a host."""

    SLOW = "slow"
    """Its link has a fraction of the rate, both ways."""
    DELAYED = "delayed"
    """Its control messages take a multiple of the time."""
    LATE = "late"
    """It arrives later than the others."""
    KILLED = "killed"
    """It dies; its connections break."""
    VANISHED = "vanished"
    """It falls silent; its connections stay."""
    RESTARTED = "restarted"
    """It dies, and comes back with the pieces that it had stored."""
    WIPED = "wiped"
    """It dies, and comes back with nothing."""
    FROZEN = "frozen"
    """It does nothing for a while, and nobody is told."""
    PARTITION = "partition"
    """It cannot reach the hosts outside of the partition, nor the tracker, for a while."""
    CORRUPT = "corrupt"
    """Every piece that it sends has wrong bytes."""
    STALLING = "stalling"
    """It sends half of every piece and nothing more."""
    OVERLONG = "overlong"
    """It sends more bytes than its pieces have; who receives them ends the connection."""
    GREEDY = "greedy"
    """It claims pieces that it was not offered."""
    CHATTY = "chatty"
    """It tells of pieces without end, most of which it does not have."""
    ORIGIN_KILLED = "origin-killed"
    """An origin dies, and may come back."""
    ORIGIN_FROZEN = "origin-frozen"
    """An origin does nothing for a while."""
    ORIGIN_SLOW = "origin-slow"
    """The link of an origin has a fraction of the rate, both ways."""
    TRACKER_KILLED = "tracker-killed"
    """A tracker dies; the next one takes its torrents over and knows nobody.  It may come back, empty."""
    LOST = "lost"
    """That share of all packets is lost, and sent again."""


LIARS: Final = frozenset(
    {
        FaultKind.CORRUPT,
        FaultKind.STALLING,
        FaultKind.OVERLONG,
        FaultKind.GREEDY,
        FaultKind.CHATTY,
    }
)
DYING: Final = frozenset({FaultKind.KILLED, FaultKind.VANISHED})
RETURNING: Final = frozenset({FaultKind.RESTARTED, FaultKind.WIPED})
_WITH_FACTOR: Final = frozenset({FaultKind.SLOW, FaultKind.DELAYED, FaultKind.ORIGIN_SLOW})
_MAY_RETURN: Final = frozenset({FaultKind.ORIGIN_KILLED, FaultKind.TRACKER_KILLED})
_WITH_TIME: Final = DYING | _MAY_RETURN | {FaultKind.LATE}
_TIME_REQUIRED: Final = frozenset({FaultKind.LATE})
_WITH_END: Final = RETURNING | {FaultKind.FROZEN, FaultKind.ORIGIN_FROZEN, FaultKind.PARTITION}
OF_ORIGINS: Final = frozenset(
    {FaultKind.ORIGIN_KILLED, FaultKind.ORIGIN_FROZEN, FaultKind.ORIGIN_SLOW}
)
_NOT_AGENTS: Final = OF_ORIGINS | {FaultKind.TRACKER_KILLED, FaultKind.LOST}
# With more than that TCP gives up connections, which is not modelled.
_LOST_MAX: Final = 50

_FORM: Final = re.compile(
    r"(?P<kind>[a-z-]+)=(?P<amount>[0-9]+(?:\.[0-9]+)?)(?P<percent>%)?"
    r"(?:x(?P<factor>[0-9]+(?:\.[0-9]+)?))?(?:@(?P<since>[0-9a-z.]+)(?:-(?P<until>[0-9a-z.]+))?)?",
    re.ASCII,
)


@attrs.frozen
class Fault:
    """One kind of fault of so many hosts.

    Attributes:
        kind: what is wrong.
        amount: how many hosts, or which share of them or of all packets.
        is_share: whether ``amount`` is a share, 0 to 1.
        factor: how many times slower or later.
        since: when it begins, in seconds from the start; None for a random moment of the run.
        until: when it ends; None for never.
    """

    kind: FaultKind
    amount: float
    is_share: bool = False
    factor: float = 1.0
    since: float | None = None
    until: float | None = None

    def count(self, hosts: int) -> int:
        """How many of that many hosts it hits: a share is rounded, and is one host at the least."""
        if not self.is_share:
            return int(self.amount)
        return max(int(self.amount * hosts + 0.5), 1) if self.amount else 0

    @property
    def of_agents(self) -> bool:
        return self.kind not in _NOT_AGENTS

    def __str__(self) -> str:
        amount = f"{self.amount * 100:g}%" if self.is_share else f"{self.amount:g}"
        factor = f"x{self.factor:g}" if self.kind in _WITH_FACTOR else ""
        since = "" if self.since is None else f"@{format_duration(self.since)}"
        until = "" if self.until is None else f"-{format_duration(self.until)}"
        return f"{self.kind.value}={amount}{factor}{since}{until}"


def parse_faults(text: str) -> tuple[Fault, ...]:
    """The faults in a comma-separated text; none for an empty one.

    Raises:
        ValueError: says which part is wrong, and how it should look.
    """
    return tuple(_parse(part.strip()) for part in text.split(",") if part.strip())


def _parse(text: str) -> Fault:
    match = _FORM.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not KIND=NUMBER[%][xFACTOR][@TIME[-TIME]], as in slow=5%x10")
    try:
        kind = FaultKind(match["kind"])
    except ValueError:
        kinds = ", ".join(kind.value for kind in FaultKind)
        raise ValueError(f"{text!r}: no such fault; there are {kinds}") from None
    amount = float(match["amount"])
    is_share = match["percent"] is not None
    _check_amount(text, kind, amount, is_share=is_share)
    since, until = _times(text, kind, match["since"], match["until"])
    return Fault(
        kind,
        amount / 100 if is_share else amount,
        is_share,
        _factor(text, kind, match["factor"]),
        since,
        until,
    )


def _check_amount(text: str, kind: FaultKind, amount: float, *, is_share: bool) -> None:
    if is_share and amount > 100:
        raise ValueError(f"{text!r}: there are no more than 100 %")
    if not is_share and amount != int(amount):
        raise ValueError(f"{text!r}: a number of hosts is whole; a share ends with %")
    if kind is FaultKind.LOST:
        if not is_share or amount > _LOST_MAX:
            raise ValueError(f"{text!r}: say which share, up to {_LOST_MAX} %, as in lost=5%")
    elif is_share and kind in _NOT_AGENTS:
        raise ValueError(f"{text!r}: say how many, as in {kind.value}=1")


def _factor(text: str, kind: FaultKind, factor: str | None) -> float:
    if kind not in _WITH_FACTOR:
        if factor is not None:
            raise ValueError(f"{text!r}: {kind.value} takes no factor")
        return 1.0
    if factor is None or float(factor) < 1:
        raise ValueError(f"{text!r}: {kind.value} needs a factor of at least 1, as in x10")
    return float(factor)


def _times(
    text: str, kind: FaultKind, since: str | None, until: str | None
) -> tuple[float | None, float | None]:
    try:
        begins = None if since is None else parse_duration(since)
        ends = None if until is None else parse_duration(until)
    except ValueError as error:
        raise ValueError(f"{text!r}: {error}") from None
    if kind in _WITH_END or (ends is not None and kind in _MAY_RETURN):
        if begins is None or ends is None or ends <= begins:
            raise ValueError(f"{text!r}: {kind.value} needs its begin and end, as in @2s-4s")
    elif ends is not None:
        raise ValueError(f"{text!r}: {kind.value} takes no end")
    elif begins is not None and kind not in _WITH_TIME:
        raise ValueError(f"{text!r}: {kind.value} takes no time")
    elif begins is None and kind in _TIME_REQUIRED:
        raise ValueError(f"{text!r}: {kind.value} needs a time, as in @5s")
    return begins, ends
