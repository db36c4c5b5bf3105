"""Peers that break the rules of the exchange while they download like everybody else.

Each is a real `Scheduler` whose actions are added to: what it downloads for itself goes on honestly.  Liars
that only get bytes wrong (corrupt, stalling) need none of this, the simulation spoils what they send.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final

from swarmpull.digest import Digest
from swarmpull.sim.faults import FaultKind
from swarmpull.swarm import actions as act
from swarmpull.swarm import events as ev
from swarmpull.swarm.messages import Claim, Have, Message
from swarmpull.swarm.peers import PeerKind
from swarmpull.swarm.scheduler import Scheduler, SwarmLimits

# On each connection at every tick of the scheduler, which is four times a second while it downloads.
CLAIMS_EACH: Final = 8
HAVES_EACH: Final = 100


class Liar(Scheduler):
    """Adds messages of its own on every connection whenever time passes."""

    def __init__(
        self, peer_id: str, kind: PeerKind, port: int, *, rng: random.Random, limits: SwarmLimits
    ) -> None:
        super().__init__(peer_id, kind, port, rng=rng, limits=limits)
        self._lies = random.Random(rng.getrandbits(64))
        self._told: dict[int, Digest] = {}
        self._counts: dict[Digest, int] = {}

    def handle(self, event: ev.Event, now: float) -> list[act.Action]:
        actions = super().handle(event, now)
        match event:
            case ev.TorrentAdded(metainfo):
                self._counts[metainfo.digest] = metainfo.piece_count
            case ev.PeerConnected(connection, hello):
                self._told[connection] = hello.digest
            case ev.PeerDisconnected(connection):
                self._told.pop(connection, None)
            case ev.DeadlinePassed():
                self._lie(actions)
        for action in actions:
            if type(action) is act.Close:
                self._told.pop(action.connection, None)
        return actions

    def _lie(self, actions: list[act.Action]) -> None:
        for connection, digest in self._told.items():
            count = self._counts.get(digest, 0)
            if count:
                actions += [act.Send(connection, message) for message in self._messages(count)]

    def _messages(self, piece_count: int) -> list[Message]:
        raise NotImplementedError


class GreedyLiar(Liar):
    """Claims random pieces that nobody offered to it."""

    def _messages(self, piece_count: int) -> list[Message]:
        return [Claim(self._lies.randrange(piece_count)) for _ in range(CLAIMS_EACH)]


class ChattyLiar(Liar):
    """Tells of random pieces without end."""

    def _messages(self, piece_count: int) -> list[Message]:
        return [Have(self._lies.randrange(piece_count)) for _ in range(HAVES_EACH)]


SCHEDULERS: Final[dict[FaultKind | None, Callable[..., Scheduler]]] = {
    FaultKind.GREEDY: GreedyLiar,
    FaultKind.CHATTY: ChattyLiar,
}
