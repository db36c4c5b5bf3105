"""Hosts in one process, joined by links on which a test decides what arrives next.

Each `Host` does for its scheduler what the trio shell does, but every step that takes time (a dial, an
announce, a piece on its way out, a hash being checked) is pending until a test takes it, and so is everything
on its way on a wire.
What one side sent on one wire arrives in order; everything else may happen in any order.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Final

import attrs

from swarmpull.swarm import actions as act
from swarmpull.swarm import bitfield
from swarmpull.swarm import events as ev
from swarmpull.swarm.messages import Bye, ByeReason, Hello, Message
from swarmpull.swarm.metainfo import Metainfo
from swarmpull.swarm.peers import AnnounceState, PeerContact, PeerKind
from swarmpull.swarm.scheduler import Scheduler, SwarmLimits, contact_of

from .playbook import Contract


@attrs.frozen
class PieceBegins:
    index: int


@attrs.frozen
class PieceEnds:
    index: int
    good: bool


class Eof:
    """The other side closed, or the connection broke."""


Item = Message | PieceBegins | PieceEnds | type[Eof]
Step = Callable[[], None]


class End:
    """One side of a wire; ``inbox`` is what is on its way to it."""

    def __init__(self, owner: Host | Liar) -> None:
        self.owner = owner
        self.inbox: deque[Item] = deque()
        self.other: End = self
        self.closed = False
        self.number: int | None = None  # once the handshake is through
        self.dialled: PeerContact | None = None
        self.announced: int | None = None
        self.incoming: tuple[int, bool] | None = None

    def send(self, *items: Item) -> None:
        if not self.closed and not self.other.closed:
            self.other.inbox.extend(items)

    def close(self) -> None:
        """Stop to listen; the other side hears of it after everything that was sent before."""
        if not self.closed:
            self.send(Eof)
            self.closed = True
            self.inbox.clear()


@attrs.define(eq=False)
class Network:
    """Everything that may happen next, and the clock."""

    metainfo: Metainfo
    now: float = 1000.0
    hosts: list[Host] = attrs.field(factory=list)
    liars: list[Liar] = attrs.field(factory=list)
    wires: list[tuple[End, End]] = attrs.field(factory=list)
    tracker_is_up: bool = True

    @property
    def contacts(self) -> tuple[PeerContact, ...]:
        return tuple(member.contact for member in (*self.liars, *self.hosts))

    def connect(self, dialler: Host | Liar, target: PeerContact) -> End:
        [owner] = [m for m in (*self.hosts, *self.liars) if m.contact == target]
        ends = End(dialler), End(owner)
        ends[0].other, ends[1].other = ends[1], ends[0]
        self.wires.append(ends)
        return ends[0]

    def steps(self) -> list[Step]:
        """What may happen next, the oldest first; wires on which all is said are forgotten."""
        self.wires = [wire for wire in self.wires if not all(end.closed for end in wire)]
        steps = [partial(host.take, task) for host in self.hosts for task in host.tasks]
        steps += [
            partial(end.owner.arrive, end) for wire in self.wires for end in wire if end.inbox
        ]
        return steps

    def break_wire(self, wire: tuple[End, End]) -> None:
        for end in wire:
            if not end.closed:
                end.inbox.clear()
                end.inbox.append(Eof)

    def advance(self, seconds: float) -> None:
        self.now += seconds
        for host in self.hosts:
            host.wake()

    def next_deadline(self) -> float:
        return min(host.scheduler.next_deadline() for host in self.hosts)


class Host:
    """A scheduler and the least shell around it."""

    def __init__(
        self,
        network: Network,
        name: str,
        *,
        complete: bool,
        limits: SwarmLimits,
    ) -> None:
        self.contact = PeerContact(name * 32, f"host-{name}", 7100, PeerKind.AGENT)
        self.tasks: list[Step] = []
        self.verified = complete
        self.links: dict[int, End] = {}
        self._network = network
        self._digest = network.metainfo.digest
        self._stored = bitfield.full(network.metainfo.piece_count) if complete else 0
        self._contract = Contract()
        self._numbers = 0
        self.scheduler = Scheduler(
            self.contact.peer_id,
            PeerKind.AGENT,
            7100,
            rng=random.Random(name),
            limits=limits,
        )
        network.hosts.append(self)
        self.add()

    # --- what a test does to it ---------------------------------------------------------------

    def add(self) -> None:
        self.dispatch(
            ev.TorrentAdded(
                self._network.metainfo, "", self._stored, verified=self.verified, announce=True
            )
        )
        self.wake()

    def restart_torrent(self) -> None:
        """The torrent is removed and added again; what was under way then reports to the new one."""
        self.dispatch(ev.TorrentRemoved(self._digest))
        self.add()

    def wake(self) -> None:
        if self.scheduler.next_deadline() <= self._network.now:
            self.dispatch(ev.DeadlinePassed())
            assert self.scheduler.next_deadline() > self._network.now, "woken for ever"

    def take(self, task: Step) -> None:
        self.tasks.remove(task)
        task()

    def dispatch(self, event: ev.Event) -> None:
        actions = self.scheduler.handle(event, self._network.now)
        self.scheduler.check_invariants()
        self._contract.check(event, actions)
        for action in actions:
            self._perform(action)

    # --- actions ------------------------------------------------------------------------------

    def _perform(self, action: act.Action) -> None:
        match action:
            case act.Send(connection, message):
                self.links[connection].send(message)
            case act.SendAll(connections, message):
                for connection in connections:
                    self.links[connection].send(message)
            case act.SendPiece(connection, _, index):
                self._later(self._send_piece, connection, index)
            case act.Close(connection, reason, text):
                self._later(self._close, connection, reason, text)
            case act.Dial(_, contact):
                self._later(self._dial, contact)
            case act.Announce(_, _, state):
                if state is not AnnounceState.STOPPED:
                    self._later(self._announce)
            case act.Watch():
                self._later(self._watch)
            case act.Finish():
                self._later(self._finish)
            case act.Fail(_, reason):
                raise AssertionError(f"{self.contact.host} gave up: {reason}")

    def _later(self, step: Callable[..., None], *args: object) -> None:
        self.tasks.append(partial(step, *args))

    def _close(self, connection: int, reason: ByeReason, text: str) -> None:
        end = self.links.get(connection)
        if end is not None:
            end.send(Bye(reason, text))
            self._end(end)

    def _end(self, end: End) -> None:
        end.close()
        if end.number is not None and self.links.pop(end.number, None) is not None:
            self.dispatch(ev.PeerDisconnected(end.number))

    def _send_piece(self, connection: int, index: int) -> None:
        end = self.links.get(connection)
        if end is not None:
            end.send(PieceBegins(index), PieceEnds(index, good=True))
            self.dispatch(ev.PieceSent(connection, index))

    def _dial(self, contact: PeerContact) -> None:
        hello = self.scheduler.hello(self._digest)
        if hello is None:
            self.dispatch(ev.DialFailed(self._digest, contact.peer_id))
            return
        end = self._network.connect(self, contact)
        end.dialled = contact
        end.announced = bitfield.from_bytes(hello.have, hello.piece_count)
        end.send(hello)

    def _announce(self) -> None:
        if self._network.tracker_is_up:
            others = tuple(c for c in self._network.contacts if c != self.contact)
            self.dispatch(ev.AnnounceReplied(self._digest, 10.0, others, position=1))
        else:
            self.dispatch(ev.AnnounceFailed(self._digest))

    def _watch(self) -> None:
        """The tracker, if it is up, tells of the last who came."""
        last = self._network.contacts[-1:]
        ended = ev.WatchEnded(self._digest)
        if self._network.tracker_is_up:
            ended = ev.WatchEnded(self._digest, tuple(c for c in last if c != self.contact), 2)
        self.dispatch(ended)

    def _finish(self) -> None:
        full = bitfield.full(self._network.metainfo.piece_count)
        assert self._stored == full, "a blob is finished when its pieces are there"
        self.verified = True
        self.dispatch(ev.BlobVerified(self._digest))

    def _verify(self, connection: int, index: int, good: bool) -> None:
        if good:
            self._stored |= 1 << index
            self.dispatch(ev.PieceStored(connection, self._digest, index))
        else:
            self.dispatch(ev.PieceRejected(connection, self._digest, index))

    # --- what arrives -------------------------------------------------------------------------

    def arrive(self, end: End) -> None:
        item = end.inbox.popleft()
        if end.number is None:
            self._shake_hands(end, item)
        elif item is Eof:
            self._end(end)
        elif isinstance(item, PieceBegins):
            self._piece_begins(end, item.index)
        elif isinstance(item, PieceEnds):
            self._piece_ends(end, end.number, item)
        else:
            self.dispatch(ev.MessageReceived(end.number, item))  # type: ignore[arg-type]
            if isinstance(item, Bye):
                self._end(end)

    def _shake_hands(self, end: End, item: Item) -> None:
        if isinstance(item, Hello) and end.dialled in (None, _claimed_by(end.other)):
            self._numbers += 1
            end.number = self._numbers
            self.links[end.number] = end
            contact = end.dialled or contact_of(item, end.other.owner.contact.host)
            self.dispatch(ev.PeerConnected(end.number, item, contact, end.announced))
            return
        end.close()
        if end.dialled is not None:
            self.dispatch(ev.DialFailed(self._digest, end.dialled.peer_id))

    def _piece_begins(self, end: End, index: int) -> None:
        assert end.number is not None
        if self.scheduler.was_asked(end.number, index):
            end.incoming = (index, self.scheduler.expects(end.number, index))
            return
        # Bytes that nobody asked for break the protocol; honest peers never come to this.
        closing = end.number not in self._open_connections()
        assert closing or isinstance(end.other.owner, Liar), f"piece {index} was not claimed"
        end.send(Bye(ByeReason.PROTOCOL_ERROR))
        self._end(end)

    def _piece_ends(self, end: End, number: int, item: PieceEnds) -> None:
        assert end.incoming is not None
        _, buffered = end.incoming
        end.incoming = None
        expected = self.scheduler.expects(number, item.index)
        self.dispatch(ev.PieceReceived(number, item.index))
        if expected and buffered:
            self._later(self._verify, number, item.index, item.good)
        elif expected:
            self.dispatch(ev.PieceLost(self._digest, item.index))

    def _open_connections(self) -> set[int]:
        torrent = self.scheduler.torrent(self._digest)
        return set() if torrent is None else set(torrent.peers)


class Liar:
    """A peer without a scheduler: what it says is up to the test."""

    def __init__(self, network: Network, name: str) -> None:
        self.contact = PeerContact(name * 32, f"liar-{name}", 7100, PeerKind.AGENT)
        self.ends: list[End] = []
        self._network = network
        network.liars.append(self)

    def arrive(self, end: End) -> None:
        """Take note of a dial with a Hello that promises everything; listen to nothing else."""
        item = end.inbox.popleft()
        if item is Eof:
            end.closed = True
            self.ends = [known for known in self.ends if known is not end]
        elif isinstance(item, Hello) and end.dialled is None and end not in self.ends:
            self.ends.append(end)
            end.send(self.hello(self._full))

    def dial(self, host: Host, hello: Hello) -> None:
        end = self._network.connect(self, host.contact)
        end.dialled = host.contact
        self.ends.append(end)
        end.send(hello)

    def hello(self, have: int, piece_count: int | None = None) -> Hello:
        count = self._network.metainfo.piece_count if piece_count is None else piece_count
        return Hello(
            digest=self._network.metainfo.digest,
            namespace="",
            peer_id=self.contact.peer_id,
            kind=PeerKind.AGENT,
            port=7100,
            piece_count=count,
            have=bitfield.to_bytes(have & bitfield.full(count), count),
        )

    @property
    def _full(self) -> int:
        return bitfield.full(self._network.metainfo.piece_count)


def _claimed_by(end: End) -> PeerContact:
    return end.owner.contact


# So long may a swarm take, in simulated seconds and steps, when nothing goes wrong any more.
SETTLING_TIME: Final = 1500.0
SETTLING_STEPS: Final = 50_000


def settle(network: Network) -> None:
    """Let everything happen in a fair order until every host is complete and all is quiet."""
    until = network.now + SETTLING_TIME
    for _ in range(SETTLING_STEPS):
        steps = network.steps()
        if steps:
            steps[0]()
        elif all(host.verified for host in network.hosts):
            return
        else:
            deadline = network.next_deadline()
            assert deadline < until, "the download does not finish"
            network.advance(max(deadline - network.now, 0.0))
    raise AssertionError("the swarm does not come to rest")
