"""What a simulated experiment is made of, and the least time that it can take."""

from __future__ import annotations

import enum
import math
from typing import Any

import attrs

from swarmpull.sim.faults import OF_ORIGINS, Fault, FaultKind, parse_faults
from swarmpull.swarm.metainfo import (
    PIECE_LENGTH_MAX,
    PIECE_LENGTH_MIN,
    piece_count_for,
    piece_length_for,
)


class Policy(enum.Enum):
    """How pieces are exchanged."""

    OFFERS = "offers"
    PIPELINE = "pipeline"


def _faults(value: str | tuple[Fault, ...]) -> tuple[Fault, ...]:
    return parse_faults(value) if isinstance(value, str) else value


def _positive(default: float) -> Any:  # noqa: ANN401 - what attrs.field returns
    return attrs.field(default=default, validator=attrs.validators.gt(0))


def _not_negative(default: float) -> Any:  # noqa: ANN401 - what attrs.field returns
    return attrs.field(default=default, validator=attrs.validators.ge(0))


@attrs.frozen(kw_only=True)
class SimulationOptions:
    """One experiment.  Sizes are in bytes, rates in bytes per second, times in seconds.

    Attributes:
        hosts: agents.
        origins: seeders that have everything from the start.
        trackers: share the torrents.
        size: of one image, all its layers together.
        layers: blobs of equal size in an image.
        images: 0: every agent wants the one image.  Else so many different images are wanted, each by
            ``pullers`` random agents.
        pullers: of each of the ``images``; they start together.
        rate: of an agent, up and down alike.
        origin_rate: of an origin.
        rtt: the round trip.
        jitter: each control message takes up to so much longer, at random, in order on a connection.
        arrival: agents (or images) begin at a random moment within so many seconds.
        piece: the length of a piece; 0 for what the length of a blob says.
        buffer: bytes that the network and the two systems take off the sender's hands while the
            receiver's link is busy; a slot is free when all but so much of its piece is through.  inf
            makes every sender finish at its own rate, however busy the receiver is.
        readers: every agent reads its layers in order while they are downloaded.
        reader_rate: of a reader; inf for as fast as it comes.
        faults: see `swarmpull.sim.faults`; a text is parsed.
        policy: ``offers``, or ``pipeline`` for the classic request queues.
        seed: of all random choices.
        until: simulated seconds after which the run is given up.
        check_every: events between two checks of every invariant; 0 for never.
    """

    hosts: int = attrs.field(default=50, validator=attrs.validators.ge(1))
    origins: int = attrs.field(default=2, validator=attrs.validators.ge(1))
    trackers: int = attrs.field(default=5, validator=attrs.validators.ge(1))
    size: int = attrs.field(default=256 << 20, validator=attrs.validators.ge(1))
    layers: int = attrs.field(default=1, validator=attrs.validators.ge(1))
    images: int = attrs.field(default=0, validator=attrs.validators.ge(0))
    pullers: int = attrs.field(default=3, validator=attrs.validators.ge(1))
    rate: float = _positive(300e6)
    origin_rate: float = _positive(1.25e9)
    rtt: float = _not_negative(0.0005)
    jitter: float = _not_negative(0.0)
    arrival: float = _not_negative(0.5)
    piece: int = attrs.field(default=0, validator=attrs.validators.ge(0))
    buffer: float = _not_negative(1 << 20)
    readers: bool = False
    reader_rate: float = _positive(math.inf)
    faults: tuple[Fault, ...] = attrs.field(default=(), converter=_faults)
    policy: Policy = Policy.OFFERS
    seed: int = 1
    until: float = _positive(600.0)
    check_every: int = attrs.field(default=0, validator=attrs.validators.ge(0))

    def __attrs_post_init__(self) -> None:
        if self.size < self.layers:
            raise ValueError(f"{self.size} bytes do not make {self.layers} layers")
        if self.images and self.pullers > self.hosts:
            raise ValueError(f"each image is to be pulled by {self.pullers} of {self.hosts} hosts")
        if self.piece and (
            self.piece & (self.piece - 1) or not PIECE_LENGTH_MIN <= self.piece <= PIECE_LENGTH_MAX
        ):
            raise ValueError(
                f"the piece length is {self.piece}, allowed are powers of two "
                f"from {PIECE_LENGTH_MIN} to {PIECE_LENGTH_MAX}"
            )
        self._check_faults()

    def _check_faults(self) -> None:
        faulty = sum(fault.count(self.hosts) for fault in self.faults if fault.of_agents)
        if faulty > self.hosts:
            raise ValueError(f"{faulty} agents are to be faulty, but there are only {self.hosts}")
        for kind in (*OF_ORIGINS, FaultKind.TRACKER_KILLED):
            there = self.trackers if kind is FaultKind.TRACKER_KILLED else self.origins
            hit = sum(fault.count(there) for fault in self.faults if fault.kind is kind)
            if hit > there:
                raise ValueError(f"{kind.value}={hit}, but there are only {there}")

    @property
    def lost(self) -> float:
        """The share of all packets that are lost."""
        return max(
            (fault.amount for fault in self.faults if fault.kind is FaultKind.LOST), default=0.0
        )

    @property
    def layer_size(self) -> int:
        return self.size // self.layers

    @property
    def piece_length(self) -> int:
        return self.piece or piece_length_for(self.layer_size)

    @property
    def pieces(self) -> int:
        """Of an image."""
        return self.layers * piece_count_for(self.layer_size, self.piece_length)


def lower_bound(options: SimulationOptions) -> float:
    """The least time in which every agent can have the one image, in seconds.

    In each piece time a host can pass on one piece at most, so some host has its first piece no earlier
    than after ceil(log2(hosts / origins + 1)) of them (Mundinger, Weber, Weiss: "Optimal Scheduling of
    Peer-to-Peer File Dissemination", Journal of Scheduling 11, 2008); and all uplinks together cannot
    carry more than their rates (Kumar, Ross: "Peer-Assisted File Distribution", 2006).
    """
    piece = min(options.piece_length, options.layer_size)
    rounds = options.pieces - 1 + math.ceil(math.log2(options.hosts / options.origins + 1))
    uplinks = options.origins * options.origin_rate + options.hosts * options.rate
    fluid = max(options.size / options.rate, options.hosts * options.size / uplinks)
    return max(rounds * piece / options.rate, fluid)


def busiest_link(options: SimulationOptions, pulls: list[tuple[float, int, int]]) -> float:
    """When the busiest link can be done with many images, in seconds from the start.

    Args:
        pulls: of every pull its start, the number of its host and of its image.

    An agent's downlink must carry all that its agent pulls, the uplinks of the origins each image once,
    none of it before it is asked for.
    """
    demands: dict[int, list[tuple[float, float]]] = {}
    first: dict[int, float] = {}
    for start, host, image in pulls:
        demands.setdefault(host, []).append((start, options.size / options.rate))
        first[image] = min(start, first.get(image, math.inf))
    together = options.size / (options.origins * options.origin_rate)
    seeding = _busy_until([(start, together) for start in first.values()])
    return max([seeding, *map(_busy_until, demands.values())])


def _busy_until(jobs: list[tuple[float, float]]) -> float:
    """When a link is done that carries each job, (start, seconds), one after the other."""
    done = 0.0
    for start, seconds in sorted(jobs):
        done = max(done, start) + seconds
    return done
