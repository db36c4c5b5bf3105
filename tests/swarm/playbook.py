"""Scripts for one scheduler: ``assert play >> event == [action, ...]``.

Peers are called by one hexadecimal digit, which is their whole id; the host under test is ``5``, so that
``1`` has a smaller id and ``a`` a larger one.  Bitfields are strings: ``"#..#"`` has the first and the last
piece.
After every event the invariants hold, and the actions are ones that a shell can carry out.
"""

from __future__ import annotations

import math
import random
from typing import Final

from swarmpull.digest import Digest
from swarmpull.swarm import actions as act
from swarmpull.swarm import bitfield
from swarmpull.swarm import events as ev
from swarmpull.swarm.messages import (
    ByeReason,
    Cancel,
    Claim,
    Have,
    HaveAll,
    Hello,
    Message,
    Offer,
    Pass,
    Want,
)
from swarmpull.swarm.metainfo import PIECE_HASH_BYTES, PIECE_LENGTH_MIN, Metainfo
from swarmpull.swarm.peers import AnnounceState, PeerContact, PeerKind
from swarmpull.swarm.scheduler import LEECHING_TICK, Scheduler, SwarmLimits

OWN: Final = "5"


def bits(table: str) -> int:
    """``"#.#"`` as a bitfield; blanks are for the eye."""
    return sum(1 << i for i, mark in enumerate(table.replace(" ", "")) if mark == "#")


def table(have: int, pieces: int) -> str:
    """A bitfield as ``"#.#"``."""
    return "".join("#" if (have >> index) & 1 else "." for index in range(pieces))


def metainfo_of(pieces: int, name: str = "blob") -> Metainfo:
    """A made-up blob of full pieces."""
    hashes = bytes(PIECE_HASH_BYTES * pieces)
    return Metainfo(Digest.of(name.encode()), pieces * PIECE_LENGTH_MIN, PIECE_LENGTH_MIN, hashes)


def contact(name: str, kind: PeerKind = PeerKind.AGENT) -> PeerContact:
    return PeerContact(name * 32, f"host-{name}", 7100, kind)


def hello(metainfo: Metainfo, name: str, have: str) -> Hello:
    return Hello(
        digest=metainfo.digest,
        namespace="",
        peer_id=name * 32,
        kind=PeerKind.AGENT,
        port=7100,
        piece_count=metainfo.piece_count,
        have=bitfield.to_bytes(bits(have), metainfo.piece_count),
    )


def claim(connection: int, index: int) -> act.Send:
    return act.Send(connection, Claim(index))


def cancel(connection: int, index: int) -> act.Send:
    return act.Send(connection, Cancel(index))


def have(connection: int, index: int) -> act.Send:
    return act.Send(connection, Have(index))


def passes(connection: int, index: int = -1) -> act.Send:
    return act.Send(connection, Pass(index))


def want(connection: int) -> act.Send:
    return act.Send(connection, Want())


def offer(connection: int, index: int = -1) -> act.Send:
    return act.Send(connection, Offer(index))


def tells(connections: list[int], index: int) -> act.SendAll:
    return act.SendAll(tuple(connections), Have(index))


def tells_all(connections: list[int]) -> act.SendAll:
    return act.SendAll(tuple(connections), HaveAll())


def is_due(now: float, at: float, tick: float = LEECHING_TICK) -> bool:
    """Whether something that is due at ``at`` happened in time: not before, and within a tick."""
    return at <= now <= at + tick + 1e-6


def close(connection: int, reason: ByeReason, text: str = "") -> act.Close:
    return act.Close(connection, reason, text)


class Contract:
    """What a shell relies on; fed with every event and the actions that answered it."""

    def __init__(self) -> None:
        self._open: set[int] = set()
        self._sending: dict[int, int] = {}
        self._announcing: dict[Digest, bool] = {}
        self._watching: set[Digest] = set()

    def check(self, event: ev.Event, actions: list[act.Action]) -> None:
        self._take_in(event)
        for action in actions:
            self._check(action)

    def _take_in(self, event: ev.Event) -> None:
        match event:
            case ev.PeerConnected(connection=connection):
                self._open.add(connection)
            case ev.PeerDisconnected(connection):
                self._end(connection)
            case ev.PieceSent(connection, index):
                if self._sending.get(connection) == index:
                    del self._sending[connection]
            case ev.AnnounceReplied(digest=digest) | ev.AnnounceFailed(digest=digest):
                self._announcing[digest] = False
            case ev.WatchEnded(digest=digest) | ev.TorrentRemoved(digest):
                self._watching.discard(digest)

    def _check(self, action: act.Action) -> None:
        match action:
            case act.Send(connection):
                assert connection in self._open, f"nothing is connected: {action}"
            case act.SendAll(connections):
                assert connections, "somebody is told"
                assert len(set(connections)) == len(connections), "nobody is told twice"
                assert self._open.issuperset(connections), f"nothing is connected: {action}"
            case act.SendPiece(connection, _, index):
                assert connection in self._open, f"nothing is connected: {action}"
                assert connection not in self._sending, "one piece at a time on a connection"
                self._sending[connection] = index
            case act.Close(connection):
                assert connection in self._open, f"closed already: {action}"
                self._end(connection)
            case act.Announce(digest, _, AnnounceState.STOPPED):
                self._announcing[digest] = False
            case act.Announce(digest):
                assert not self._announcing.get(digest), "one announce of a torrent at a time"
                self._announcing[digest] = True
            case act.AnnounceHeld(digests):
                assert len(set(digests)) == len(digests) > 1
                for digest in digests:
                    assert not self._announcing.get(digest), "one announce of a torrent at a time"
                    self._announcing[digest] = True
            case act.Watch(digest):
                assert digest not in self._watching, "one watch of a torrent at a time"
                self._watching.add(digest)

    def _end(self, connection: int) -> None:
        self._open.discard(connection)
        self._sending.pop(connection, None)


class Play:
    """One scheduler, its clock and a torrent to talk about."""

    def __init__(
        self,
        have: str = "....",
        *,
        limits: SwarmLimits | None = None,
        seed: int = 0,
    ) -> None:
        self.now = 100.0
        self.have = bits(have)
        self.metainfo = metainfo_of(len(have))
        self.digest = self.metainfo.digest
        self.scheduler = Scheduler(
            OWN * 32,
            PeerKind.AGENT,
            7100,
            rng=random.Random(seed),
            limits=limits,
        )
        self._contract = Contract()

    def __rshift__(self, event: ev.Event) -> list[act.Action]:
        actions = list(self.scheduler.handle(event, self.now))
        self.scheduler.check_invariants()
        self._contract.check(event, actions)
        return actions

    # --- time ---------------------------------------------------------------------------------

    def after(self, seconds: float) -> Play:
        """The same play, later; no deadline is reported."""
        self.now += seconds
        return self

    def wait(self) -> list[act.Action]:
        """Let the next deadline come, and the ones after it until something is done."""
        while not (actions := self._wake()):
            assert self.scheduler.next_deadline() < math.inf, "nothing will ever be done"
        return actions

    def wait_until(self, when: float) -> list[act.Action]:
        """Let every deadline up to that moment come."""
        actions: list[act.Action] = []
        while self.scheduler.next_deadline() <= when:
            actions += self._wake()
        self.now = when
        return actions

    def _wake(self) -> list[act.Action]:
        self.now = max(self.now, self.scheduler.next_deadline())
        actions = self >> ev.DeadlinePassed()
        assert self.scheduler.next_deadline() > self.now, (
            "it would be woken again at once, for ever"
        )
        return actions

    # --- events -------------------------------------------------------------------------------

    def added(self, *, verified: bool | None = None, announce: bool = False) -> ev.TorrentAdded:
        complete = self.have == bitfield.full(self.metainfo.piece_count)
        verified = complete if verified is None else verified
        return ev.TorrentAdded(self.metainfo, "", self.have, verified=verified, announce=announce)

    def connected(
        self, connection: int, name: str, have: str, *, announced: str | None = None
    ) -> ev.PeerConnected:
        """A peer has said Hello: one that dialled us, or one that we dialled and ``announced`` to."""
        own = None if announced is None else bits(announced)
        return ev.PeerConnected(connection, hello(self.metainfo, name, have), contact(name), own)

    def found(self, names: str) -> ev.PeersFound:
        return ev.PeersFound(self.digest, tuple(contact(name) for name in names))

    def replied(
        self, names: str = "", interval: float = 10.0, position: int | None = None
    ) -> ev.AnnounceReplied:
        peers = tuple(contact(name) for name in names)
        return ev.AnnounceReplied(self.digest, interval, peers, position)

    def watched(self, names: str = "", position: int | None = None) -> ev.WatchEnded:
        return ev.WatchEnded(self.digest, tuple(contact(name) for name in names), position)

    def says(self, connection: int, message: Message) -> ev.MessageReceived:
        return ev.MessageReceived(connection, message)

    def stored(self, connection: int, index: int) -> ev.PieceStored:
        return ev.PieceStored(connection, self.digest, index)

    def rejected(self, connection: int, index: int) -> ev.PieceRejected:
        return ev.PieceRejected(connection, self.digest, index)

    # --- what is needed often -----------------------------------------------------------------

    def piece(self, connection: int, index: int) -> list[act.Action]:
        """A piece arrives and is stored."""
        first = self >> ev.PieceReceived(connection, index)
        return first + (self >> self.stored(connection, index))

    def dial(self, name: str) -> act.Dial:
        return act.Dial(self.digest, contact(name))

    def announce(self, state: AnnounceState) -> act.Announce:
        return act.Announce(self.digest, "", state)

    def watch(self, position: int) -> act.Watch:
        return act.Watch(self.digest, position)

    @property
    def progress(self) -> str:
        torrent = self.scheduler.torrent(self.digest)
        assert torrent is not None
        return table(torrent.have, torrent.piece_count)


def claims(actions: list[act.Action]) -> dict[int, list[int]]:
    """What was claimed: piece indices by connection, sorted."""
    made: dict[int, list[int]] = {}
    for action in actions:
        match action:
            case act.Send(connection, Claim(index)):
                made.setdefault(connection, []).append(index)
    return {connection: sorted(indices) for connection, indices in made.items()}


def claims_in_order(actions: list[act.Action]) -> list[int]:
    """The pieces that were claimed, at whomever."""
    return [
        a.message.index for a in actions if isinstance(a, act.Send) and isinstance(a.message, Claim)
    ]


def wants(actions: list[act.Action]) -> list[int]:
    """The connections that a want went to, in order."""
    return [a.connection for a in actions if isinstance(a, act.Send) and a.message == Want()]


def offers(actions: list[act.Action]) -> dict[int, int]:
    """What was offered: the suggested piece by connection, in order."""
    return {
        a.connection: a.message.index
        for a in actions
        if isinstance(a, act.Send) and isinstance(a.message, Offer)
    }


def uploads(actions: list[act.Action]) -> list[tuple[int, int]]:
    """What began to be sent: connection and piece, in order."""
    return [(a.connection, a.index) for a in actions if isinstance(a, act.SendPiece)]
