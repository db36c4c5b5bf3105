"""Whole swarms in simulated time, decided by the very code that the roles run.

Every host has a `Scheduler`, the tracker is a `PeerTable`; this module only carries their messages and
pieces over a `swarmpull.sim.network`.  There is no second implementation of any decision here.
"""

from __future__ import annotations

import enum
import math
import random
from typing import Final

import attrs

from swarmpull.digest import Digest
from swarmpull.sim.network import Clock, Link
from swarmpull.swarm import actions as act
from swarmpull.swarm import bitfield
from swarmpull.swarm import events as ev
from swarmpull.swarm.connections import ConnectionLimits
from swarmpull.swarm.handout import HandoutLimits, PeerTable
from swarmpull.swarm.messages import Hello, Message
from swarmpull.swarm.metainfo import (
    PIECE_HASH_BYTES,
    Metainfo,
    piece_count_for,
    piece_length_for,
)
from swarmpull.swarm.peers import AnnounceState, PeerContact, PeerKind
from swarmpull.swarm.pipeline import PipelineLimits
from swarmpull.swarm.scheduler import Scheduler, SwarmLimits, contact_of

# BLAKE3 on one core of a small server, in bytes per second (DESIGN, section 6).
HASH_RATE: Final = 5e9


class Policy(enum.Enum):
    """How pieces are exchanged."""

    OFFERS = "offers"
    PIPELINE = "pipeline"


@attrs.frozen(kw_only=True)
class SimulationOptions:
    """One experiment.

    Attributes:
        hosts: agents that want every layer.
        origins: seeders that have every layer from the start.
        size: bytes of all layers together.
        layers: blobs of equal size.
        rate: of an agent, up and down alike, in bytes per second.
        origin_rate: of an origin.
        rtt: round-trip time in seconds.
        arrival: agents begin at a uniformly random moment within so many seconds.
        killed: agents that are killed midway; their connections break.
        vanished: agents that fall silent midway; their connections stay, nothing comes out of them.
        corrupt: agents that send wrong bytes in every piece.
        policy: ``offers``, or ``pipeline`` for the classic request queues.
        seed: of all random choices.
        until: simulated seconds after which the run is given up.
        check_every: events between two checks of every invariant; 0 for never.
    """

    hosts: int = attrs.field(default=50, validator=attrs.validators.ge(1))
    origins: int = attrs.field(default=2, validator=attrs.validators.ge(1))
    size: int = attrs.field(default=256 << 20, validator=attrs.validators.ge(0))
    layers: int = attrs.field(default=1, validator=attrs.validators.ge(1))
    rate: float = attrs.field(default=300e6, validator=attrs.validators.gt(0))
    origin_rate: float = attrs.field(default=1.25e9, validator=attrs.validators.gt(0))
    rtt: float = attrs.field(default=0.0005, validator=attrs.validators.ge(0))
    arrival: float = attrs.field(default=0.5, validator=attrs.validators.ge(0))
    killed: int = attrs.field(default=0, validator=attrs.validators.ge(0))
    vanished: int = attrs.field(default=0, validator=attrs.validators.ge(0))
    corrupt: int = attrs.field(default=0, validator=attrs.validators.ge(0))
    policy: Policy = Policy.OFFERS
    seed: int = 1
    until: float = attrs.field(default=600.0, validator=attrs.validators.gt(0))
    check_every: int = attrs.field(default=0, validator=attrs.validators.ge(0))

    def __attrs_post_init__(self) -> None:
        faulty = self.killed + self.vanished + self.corrupt
        if faulty > self.hosts:
            raise ValueError(f"{faulty} agents are to fail, but there are only {self.hosts}")


@attrs.frozen(kw_only=True)
class SimulationResult:
    """What came out; times in seconds from each agent's own arrival.

    Attributes:
        completed: of the agents that were to survive, how many finished every layer.
        expected: how many were to.
        times: sorted completion times.
        bound: the least time in which the last agent can have everything.
        bytes_from_origins: payload that left the origins.
        bytes_from_agents: payload that left the agents.
        messages: control messages of the peer protocol.
        connections: connections that came up.
        events: happenings processed.
    """

    completed: int
    expected: int
    times: tuple[float, ...]
    bound: float
    bytes_from_origins: int
    bytes_from_agents: int
    messages: int
    connections: int
    events: int

    def quantile(self, share: float) -> float:
        """The completion time within which that share of the agents finished; nan when none did."""
        if not self.times:
            return math.nan
        return self.times[min(int(len(self.times) * share), len(self.times) - 1)]


def lower_bound(options: SimulationOptions) -> float:
    """The least time in which everybody can have everything, in seconds.

    In each piece time a host can pass on one piece at most, so some host has its first piece no earlier
    than after ceil(log2(hosts / origins + 1)) of them (Mundinger, Weber, Weiss: "Optimal Scheduling of
    Peer-to-Peer File Dissemination", Journal of Scheduling 11, 2008); and all uplinks together cannot
    carry more than their rates (Kumar, Ross: "Peer-Assisted File Distribution", 2006).
    """
    layer = options.size // options.layers
    piece = min(piece_length_for(layer), layer)
    pieces = piece_count_for(layer, piece_length_for(layer)) * options.layers
    rounds = pieces - 1 + math.ceil(math.log2(options.hosts / options.origins + 1))
    uplinks = options.origins * options.origin_rate + options.hosts * options.rate
    fluid = max(options.size / options.rate, options.hosts * options.size / uplinks)
    return max(rounds * piece / options.rate, fluid)


@attrs.define(eq=False)
class _Connection:
    """A connection between two simulated hosts; ``announced`` is the dialler's bitfield in its Hello."""

    number: int
    digest: Digest
    dialler: _Host
    acceptor: _Host
    announced: int = 0
    established: bool = False
    closed: bool = False

    def other(self, host: _Host) -> _Host:
        return self.acceptor if host is self.dialler else self.dialler


@attrs.define(eq=False)
class _Host:
    contact: PeerContact
    scheduler: Scheduler
    link: Link
    arrives_at: float = 0.0
    finished_at: float | None = None
    complete_layers: int = 0
    dead: bool = False
    silent: bool = False
    corrupt: bool = False
    doomed: bool = False
    wakes_at: float = math.inf


class Simulation:
    """One run of one experiment."""

    def __init__(self, options: SimulationOptions) -> None:
        self._options = options
        self._rng = random.Random(options.seed)
        self._clock = Clock()
        self._tracker = PeerTable(HandoutLimits(), random.Random(self._rng.getrandbits(64)))
        self._layers = [_layer(index, options) for index in range(options.layers)]
        self._connections: dict[int, _Connection] = {}
        self._connection_count = 0
        self._established = 0
        self._messages = 0
        self._unfinished = 0
        self._hosts: dict[str, _Host] = {}
        for number in range(options.origins):
            self._add_host(PeerKind.ORIGIN, number, options.origin_rate)
        for number in range(options.hosts):
            self._add_host(PeerKind.AGENT, number, options.rate)

    def run(self) -> SimulationResult:
        """Run to the end: every surviving agent has everything, or ``until`` is reached."""
        agents = self._of_kind(PeerKind.AGENT)
        self._doom(agents)
        self._unfinished = sum(not agent.doomed for agent in agents)
        for origin in self._of_kind(PeerKind.ORIGIN):
            self._start_origin(origin)
        for agent in agents:
            agent.arrives_at = self._rng.uniform(0.0, self._options.arrival)
            self._clock.at(agent.arrives_at, self._arrive, agent)
        self._clock.run(self._options.until, lambda: self._unfinished == 0)
        return self._result(agents)

    # --- setting up ---------------------------------------------------------------------------

    def _add_host(self, kind: PeerKind, number: int, rate: float) -> None:
        peer_id = f"{self._rng.getrandbits(128):032x}"
        contact = PeerContact(peer_id, f"{kind.value}-{number}", 7100, kind)
        rng = random.Random(self._rng.getrandbits(64))
        limits = _limits(kind, self._options.policy)
        scheduler = Scheduler(peer_id, kind, 7100, rng=rng, limits=limits)
        self._hosts[peer_id] = _Host(contact, scheduler, Link(rate, rate))

    def _of_kind(self, kind: PeerKind) -> list[_Host]:
        return [host for host in self._hosts.values() if host.contact.kind is kind]

    def _doom(self, agents: list[_Host]) -> None:
        options = self._options
        chosen = self._rng.sample(agents, options.killed + options.vanished + options.corrupt)
        for position, agent in enumerate(chosen):
            if position >= options.killed + options.vanished:
                agent.corrupt = True
                continue
            agent.doomed = True
            when = self._rng.uniform(0.0, lower_bound(options))
            end = self._kill if position < options.killed else self._vanish
            self._clock.at(when, end, agent)

    def _start_origin(self, origin: _Host) -> None:
        for metainfo in self._layers:
            have = bitfield.full(metainfo.piece_count)
            event = ev.TorrentAdded(metainfo, "", have, verified=True, announce=False)
            self._dispatch(origin, event)
            self._tracker.announce(
                metainfo.digest, origin.contact, AnnounceState.COMPLETE, self._clock.now
            )

    def _arrive(self, agent: _Host) -> None:
        for metainfo in self._layers:
            event = ev.TorrentAdded(metainfo, "", 0, verified=False, announce=True)
            self._dispatch(agent, event)

    def _kill(self, host: _Host) -> None:
        host.dead = True
        for connection in list(self._connections.values()):
            if host in (connection.dialler, connection.acceptor):
                self._clock.at(self._clock.now, self._disconnect, connection, host)

    def _vanish(self, host: _Host) -> None:
        host.silent = True

    # --- carrying out actions -----------------------------------------------------------------

    def _dispatch(self, host: _Host, event: ev.Event) -> None:
        if host.dead or host.silent:
            return
        for action in host.scheduler.handle(event, self._clock.now):
            self._perform(host, action)
        if self._options.check_every and self._clock.processed % self._options.check_every == 0:
            host.scheduler.check_invariants()
        deadline = host.scheduler.next_deadline()
        if deadline < host.wakes_at:
            host.wakes_at = deadline
            self._clock.at(deadline, self._wake, host, deadline)

    def _wake(self, host: _Host, planned: float) -> None:
        if host.wakes_at == planned:
            host.wakes_at = math.inf
            self._dispatch(host, ev.DeadlinePassed())
            assert host.scheduler.next_deadline() > self._clock.now or host.dead or host.silent, (
                f"{host.contact.host} asks to be woken without end"
            )

    def _perform(self, host: _Host, action: act.Action) -> None:
        match action:
            case act.Send(connection, message):
                self._messages += 1
                self._later(self._deliver, self._connections.get(connection), host, message)
            case act.SendAll(connections, message):
                self._messages += len(connections)
                self._later(self._deliver_all, connections, host, message)
            case act.SendPiece(connection, digest, index):
                self._send_piece(host, connection, digest, index)
            case act.Dial(digest, contact):
                self._dial(host, digest, contact)
            case act.Close(connection):
                self._later(self._disconnect, self._connections.get(connection), host)
            case act.Announce(digest, _, state):
                self._later(self._announce, host, digest, state)
            case act.Finish(digest):
                self._clock.at(self._clock.now, self._finish, host, digest)
            case act.Fail(digest, reason):
                raise AssertionError(f"{host.contact.host} gave up {digest}: {reason}")

    def _later(self, happen: object, *args: object) -> None:
        assert callable(happen)
        self._clock.at(self._clock.now + self._options.rtt / 2, happen, *args)

    def _announce(self, host: _Host, digest: Digest, state: AnnounceState) -> None:
        handout = self._tracker.announce(digest, host.contact, state, self._clock.now)
        if state is not AnnounceState.STOPPED:
            reply = ev.AnnounceReplied(digest, handout.interval, handout.peers)
            self._later(self._dispatch, host, reply)

    def _dial(self, host: _Host, digest: Digest, contact: PeerContact) -> None:
        target = self._hosts[contact.peer_id]
        if target.dead or target.silent:
            failed = ev.DialFailed(digest, contact.peer_id)
            self._clock.at(self._clock.now + self._options.rtt, self._dispatch, host, failed)
            return
        self._connection_count += 1
        connection = _Connection(self._connection_count, digest, host, target)
        self._connections[connection.number] = connection
        self._clock.at(self._clock.now + self._options.rtt, self._say_hello, connection)

    def _say_hello(self, connection: _Connection) -> None:
        hello = connection.dialler.scheduler.hello(connection.digest)
        if hello is None:
            self._disconnect(connection, connection.dialler)
            return
        connection.announced = bitfield.from_bytes(hello.have, hello.piece_count)
        self._later(self._greet, connection, connection.acceptor, hello, None)

    def _greet(
        self, connection: _Connection, host: _Host, hello: Hello, announced: int | None
    ) -> None:
        if connection.closed:
            return
        if announced is not None:
            connection.established = True
            self._established += 1
        contact = contact_of(hello, self._hosts[hello.peer_id].contact.host)
        self._dispatch(host, ev.PeerConnected(connection.number, hello, contact, announced))

    def _deliver(self, connection: _Connection | None, sender: _Host, message: Message) -> None:
        if connection is None or connection.closed or sender.dead:
            return
        receiver = connection.other(sender)
        if isinstance(message, Hello):
            self._greet(connection, receiver, message, connection.announced)
        else:
            self._dispatch(receiver, ev.MessageReceived(connection.number, message))

    def _deliver_all(self, numbers: tuple[int, ...], sender: _Host, message: Message) -> None:
        for number in numbers:
            self._deliver(self._connections.get(number), sender, message)

    def _disconnect(self, connection: _Connection | None, closer: _Host) -> None:
        if connection is None or connection.closed:
            return
        connection.closed = True
        del self._connections[connection.number]
        other = connection.other(closer)
        if connection.established or other is connection.acceptor:
            self._dispatch(other, ev.PeerDisconnected(connection.number))
        else:
            failed = ev.DialFailed(connection.digest, connection.acceptor.contact.peer_id)
            self._dispatch(other, failed)

    def _send_piece(self, host: _Host, number: int, digest: Digest, index: int) -> None:
        connection = self._connections[number]
        size = self._metainfo(digest).piece_size(index)
        begins_at, left_at = host.link.send(size, self._clock.now)
        self._clock.at(left_at, self._dispatch, host, ev.PieceSent(number, index))
        self._clock.at(begins_at, self._begin_piece, connection, host, index, size, left_at)

    def _begin_piece(
        self, connection: _Connection, sender: _Host, index: int, size: int, left_at: float
    ) -> None:
        """The sender's uplink has come to this piece."""
        if connection.closed:
            return
        receiver = connection.other(sender)
        delay = self._options.rtt / 2
        arrived_at = receiver.link.receive(size, self._clock.now + delay, left_at + delay)
        self._clock.at(arrived_at, self._piece_arrived, connection, sender, receiver, index)

    def _piece_arrived(
        self, connection: _Connection, sender: _Host, receiver: _Host, index: int
    ) -> None:
        if connection.closed or sender.dead or sender.silent:
            return
        kept = receiver.scheduler.expects(connection.number, index)
        self._dispatch(receiver, ev.PieceReceived(connection.number, index))
        if not kept:
            return
        outcome = ev.PieceRejected if sender.corrupt else ev.PieceStored
        event = outcome(connection.number, connection.digest, index)
        hashed_at = (
            self._clock.now + self._metainfo(connection.digest).piece_size(index) / HASH_RATE
        )
        self._clock.at(hashed_at, self._dispatch, receiver, event)

    def _finish(self, host: _Host, digest: Digest) -> None:
        self._dispatch(host, ev.BlobVerified(digest))
        host.complete_layers += 1
        if host.complete_layers == len(self._layers) and not (host.dead or host.silent):
            host.finished_at = self._clock.now
            self._unfinished -= not host.doomed

    # --- coming out ---------------------------------------------------------------------------

    def _metainfo(self, digest: Digest) -> Metainfo:
        return next(layer for layer in self._layers if layer.digest == digest)

    def _result(self, agents: list[_Host]) -> SimulationResult:
        survivors = [agent for agent in agents if not agent.doomed]
        times = sorted(
            agent.finished_at - agent.arrives_at
            for agent in survivors
            if agent.finished_at is not None
        )
        return SimulationResult(
            completed=len(times),
            expected=len(survivors),
            times=tuple(times),
            bound=lower_bound(self._options),
            bytes_from_origins=sum(h.link.bytes_sent for h in self._of_kind(PeerKind.ORIGIN)),
            bytes_from_agents=sum(agent.link.bytes_sent for agent in agents),
            messages=self._messages,
            connections=self._established,
            events=self._clock.processed,
        )


def _layer(index: int, options: SimulationOptions) -> Metainfo:
    """Metainfo of a made-up layer: nobody hashes anything here, so the hashes are zeros."""
    length = options.size // options.layers
    piece_length = piece_length_for(length)
    hashes = bytes(PIECE_HASH_BYTES * piece_count_for(length, piece_length))
    return Metainfo(Digest.of(f"layer {index}".encode()), length, piece_length, hashes)


def _limits(kind: PeerKind, policy: Policy) -> SwarmLimits:
    """What the roles are configured with by default: origins take more connections than agents."""
    if policy is Policy.PIPELINE:
        return SwarmLimits(
            connections=ConnectionLimits(dialled=20, per_torrent=20), exchange=PipelineLimits()
        )
    if kind is PeerKind.ORIGIN:
        return SwarmLimits(connections=ConnectionLimits(per_torrent=100, per_host=1000))
    return SwarmLimits()
