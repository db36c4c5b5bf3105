"""Who wants what, and when: the blobs, hosts and pulls of a simulated experiment."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable

from swarmpull.digest import Digest
from swarmpull.sim.faults import DYING, LIARS, OF_ORIGINS, Fault, FaultKind
from swarmpull.sim.network import Link
from swarmpull.sim.options import SimulationOptions
from swarmpull.swarm import actions as act
from swarmpull.swarm import events as ev
from swarmpull.swarm.metainfo import PIECE_HASH_BYTES, Metainfo, piece_count_for
from swarmpull.swarm.peers import PeerContact
from swarmpull.swarm.scheduler import Scheduler


class Blob:
    """One layer: its metainfo, and what the simulation asks of it for every piece.

    Attributes:
        index: among all blobs.
        image: the number of the image that it is a layer of.
        copied: of each piece, whether it has left the origins.
    """

    __slots__ = ("_last_size", "copied", "digest", "image", "index", "metainfo", "piece_count")

    def __init__(self, index: int, options: SimulationOptions) -> None:
        length, piece_length = options.layer_size, options.piece_length
        self.index = index
        self.image = index // options.layers
        self.piece_count = piece_count_for(length, piece_length)
        # Nobody hashes anything here, so the hashes are zeros.
        hashes = bytes(PIECE_HASH_BYTES * self.piece_count)
        self.digest = Digest.of(f"layer {index}".encode())
        self.metainfo = Metainfo(self.digest, length, piece_length, hashes)
        self.copied = bytearray(self.piece_count)
        self._last_size = length - (self.piece_count - 1) * piece_length

    def piece_size(self, index: int) -> int:
        return self._last_size if index == self.piece_count - 1 else self.metainfo.piece_length


class Pull:
    """One host's download of one image; times in seconds from the start of the simulation.

    Attributes:
        positions: the piece that the reader of each layer needs next, by the index of the blob.
    """

    __slots__ = (
        "blobs",
        "finished_at",
        "first_byte_at",
        "gave_up",
        "host",
        "image",
        "layers_left",
        "positions",
        "started_at",
    )

    def __init__(self, host: Host, image: int, blobs: list[Blob], started_at: float) -> None:
        self.host = host
        self.image = image
        self.blobs = blobs
        self.started_at = started_at
        self.layers_left = len(blobs)
        self.positions = {blob.index: 0 for blob in blobs}
        self.first_byte_at: float | None = None
        self.finished_at: float | None = None
        self.gave_up = False


class Host:
    """An agent or origin: its scheduler, its link and what is wrong with it.

    Attributes:
        handle, next_deadline: of its scheduler, bound once.
        delay: seconds that its control messages take.
        wakes_at: when it is to be told that a deadline has passed.
        gone: it neither hears nor does anything any more.
        side: the partition that it is in, alone while it is frozen; ``cut_until``: when that ends.
        frozen_until: until then it does nothing.
        stored: pieces; ``stored_at``: when the last one was, or when it began.
        longest_wait: between two pieces, in seconds.
        wanted: pieces of all its pulls.
        pulls: by the index of the blob.
    """

    __slots__ = (
        "contact",
        "cut_until",
        "dead",
        "delay",
        "fault",
        "frozen_until",
        "gone",
        "handle",
        "link",
        "longest_wait",
        "next_deadline",
        "pulls",
        "scheduler",
        "side",
        "stored",
        "stored_at",
        "wakes_at",
        "wanted",
    )

    def __init__(
        self, contact: PeerContact, scheduler: Scheduler, link: Link, delay: float
    ) -> None:
        self.contact = contact
        self.scheduler = scheduler
        self.handle: Callable[[ev.Event, float], list[act.Action]] = scheduler.handle
        self.next_deadline: Callable[[], float] = scheduler.next_deadline
        self.link = link
        self.delay = delay
        self.fault: FaultKind | None = None
        self.wakes_at = math.inf
        self.gone = False
        self.dead = False
        self.side = 0
        self.cut_until = 0.0
        self.frozen_until = 0.0
        self.stored = 0
        self.stored_at = 0.0
        self.longest_wait = 0.0
        self.wanted = 0
        self.pulls: dict[int, Pull] = {}

    @property
    def survives(self) -> bool:
        """Whether its pulls are to finish: it neither dies nor lies."""
        return self.fault not in DYING and self.fault not in LIARS

    @property
    def healthy(self) -> bool:
        return self.fault in {None, FaultKind.LATE}


def afflict(options: SimulationOptions, rng: random.Random) -> dict[int, Fault]:
    """Which agents have which fault, by number; no agent has two."""
    faults = [
        fault
        for fault in options.faults
        if fault.of_agents
        for _ in range(fault.count(options.hosts))
    ]
    return dict(zip(rng.sample(range(options.hosts), len(faults)), faults, strict=True))


def afflict_others(options: SimulationOptions) -> list[tuple[int, Fault]]:
    """Which origins and trackers have which faults; those of one kind hit one after the other."""
    hit: Counter[FaultKind] = Counter()
    found = []
    for fault in options.faults:
        if fault.kind in OF_ORIGINS or fault.kind is FaultKind.TRACKER_KILLED:
            for _ in range(fault.count(0)):
                found.append((hit[fault.kind], fault))
                hit[fault.kind] += 1
    return found


def plan_pulls(
    options: SimulationOptions, blobs: list[Blob], agents: list[Host], rng: random.Random
) -> list[Pull]:
    """Everything that is pulled, in the order of hosts or images."""
    if not options.images:
        return [Pull(agent, 0, blobs, rng.uniform(0.0, options.arrival)) for agent in agents]
    pulls = []
    for image in range(options.images):
        start = rng.uniform(0.0, options.arrival)
        layers = [blob for blob in blobs if blob.image == image]
        pulls += [
            Pull(agent, image, layers, start) for agent in rng.sample(agents, options.pullers)
        ]
    return pulls
