"""Looking at a simulated swarm many times: how far it is, and why uplinks have nothing to send.

Samples at even distances cost little and are not biased: what takes a share of the time has that share
of the samples.  Looking changes nothing.
"""

from __future__ import annotations

import enum

import attrs

from swarmpull.sim.workload import Host
from swarmpull.swarm.peers import PeerKind


class Idleness(enum.Enum):
    """What an uplink does at one moment, and if it sends nothing, why."""

    SENDING = "sending"
    NO_PIECE = "no piece to give yet"
    NOBODY_CONNECTED = "nobody is connected"
    NOBODY_WANTED = "nobody wanted anything"
    WAITING_FOR_ANSWER = "waiting for an answer to offers"
    RECEIVER_LIMITED = "the receiver is slower"
    OTHER = "other"


@attrs.frozen
class Sample:
    """The swarm at one moment.

    Attributes:
        time: in seconds from the start.
        sending: the share of the agents' uplinks that send.
        copied: the share of all pieces that have left the origins.
        low, middle, high: the share of their pieces that agents have: the 1st, 50th and 99th percentile.
    """

    time: float
    sending: float
    copied: float
    low: float
    middle: float
    high: float


class Sampler:
    """Counts moments by what the uplinks were doing, for agents and origins apart."""

    def __init__(self) -> None:
        self.samples: list[Sample] = []
        self._counts = {kind: dict.fromkeys(Idleness, 0) for kind in PeerKind}

    def take(self, hosts: list[Host], now: float, *, copied: float) -> None:
        """Look at every host that is there."""
        sending = agents = 0
        shares = []
        for host in hosts:
            if host.gone:
                continue
            idleness = _idleness(host, now)
            self._counts[host.contact.kind][idleness] += 1
            if host.wanted:
                agents += 1
                sending += idleness is Idleness.SENDING
                shares.append(host.stored / host.wanted)
        shares.sort()
        low, middle, high = (quantile(shares, share) for share in (0.01, 0.5, 0.99))
        self.samples.append(Sample(now, sending / max(agents, 1), copied, low, middle, high))

    def shares(self, kind: PeerKind) -> dict[str, float]:
        """Of the time of all uplinks of one kind, how much went where."""
        counts = self._counts[kind]
        total = sum(counts.values()) or 1
        return {idleness.value: count / total for idleness, count in counts.items()}


def quantile(ordered: list[float] | tuple[float, ...], share: float) -> float:
    """The least of the values, in order, that so large a share of them does not exceed; nan of none."""
    if not ordered:
        return float("nan")
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)]


def _idleness(host: Host, now: float) -> Idleness:
    if now < host.link.up_free_at:
        return Idleness.SENDING
    if host.contact.kind is PeerKind.AGENT and not host.stored:
        return Idleness.NO_PIECE
    uplink = host.scheduler.uplink()
    if uplink.sending:
        return Idleness.RECEIVER_LIMITED
    if uplink.offered:
        return Idleness.WAITING_FOR_ANSWER
    if uplink.claimed or uplink.wanting:
        return Idleness.OTHER
    if not host.scheduler.connection_count:
        return Idleness.NOBODY_CONNECTED
    return Idleness.NOBODY_WANTED
