"""Whole swarms in simulated time, decided by the very code that the roles run.

Every host has a `Scheduler`, every tracker is a `PeerTable`; this module only carries their messages and
pieces over a `swarmpull.sim.network`.  There is no second implementation of any decision here.
"""

from __future__ import annotations

import gc
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from swarmpull.digest import Digest
from swarmpull.sim.faults import DYING, FaultKind
from swarmpull.sim.liars import SCHEDULERS
from swarmpull.sim.network import Clock, Link
from swarmpull.sim.options import Policy, SimulationOptions, busiest_link, lower_bound
from swarmpull.sim.result import SimulationResult
from swarmpull.sim.sampling import Sampler
from swarmpull.sim.workload import Blob, Host, Pull, afflict, plan_pulls
from swarmpull.swarm import actions as act
from swarmpull.swarm import bitfield
from swarmpull.swarm import events as ev
from swarmpull.swarm.connections import ConnectionLimits
from swarmpull.swarm.handout import HandoutLimits, PeerTable
from swarmpull.swarm.limits import HostLimits
from swarmpull.swarm.messages import Hello, Message
from swarmpull.swarm.peers import AnnounceState, PeerContact, PeerKind
from swarmpull.swarm.pipeline import PipelineLimits
from swarmpull.swarm.scheduler import Scheduler, SwarmLimits, contact_of
from swarmpull.swarm.watches import Watch

__all__ = ["Policy", "Simulation", "SimulationOptions", "SimulationResult", "lower_bound"]

# BLAKE3 on one core of a small server, in bytes per second (DESIGN, section 6).
HASH_RATE: Final = 5e9
# What the roles allow for a handshake and for an announce, and for how long a tracker keeps an origin.
HANDSHAKE_TIMEOUT: Final = 10.0
ANNOUNCE_TIMEOUT: Final = 10.0
WATCH_SECONDS: Final = 30.0
ORIGIN_LIFETIME: Final = 15.0
# As the roles report on a piece that takes longer than that, in seconds.
PROGRESS_EVERY: Final = 1.0
# Looks at the swarm in the time of the bound.
SAMPLES: Final = 400

LimitsOf = Callable[[PeerKind, Policy], SwarmLimits]


def default_limits(kind: PeerKind, policy: Policy) -> SwarmLimits:
    """What the roles are configured with by default; for the classic policy what suits that best."""
    if policy is Policy.PIPELINE:
        return SwarmLimits(
            connections=ConnectionLimits(dialled=20, per_torrent=20), exchange=PipelineLimits()
        )
    return HostLimits().of(kind)


class _Connection:
    """A connection between two simulated hosts.

    Attributes:
        announced: the dialler's bitfield in its Hello.
        to_acceptor, to_dialler: when the last message arrives there; no later one overtakes it.
    """

    __slots__ = (
        "acceptor",
        "announced",
        "blob",
        "closed",
        "dialler",
        "established",
        "number",
        "to_acceptor",
        "to_dialler",
    )

    def __init__(self, number: int, blob: Blob, dialler: Host, acceptor: Host) -> None:
        self.number = number
        self.blob = blob
        self.dialler = dialler
        self.acceptor = acceptor
        self.announced = 0
        self.established = False
        self.closed = False
        self.to_acceptor = 0.0
        self.to_dialler = 0.0

    def other(self, host: Host) -> Host:
        return self.acceptor if host is self.dialler else self.dialler


class Simulation:
    """One run of one experiment."""

    def __init__(self, options: SimulationOptions, *, limits_of: LimitsOf = default_limits) -> None:
        self._options = options
        self._limits_of = limits_of
        self._check_every = options.check_every
        self._rng = random.Random(options.seed)
        self._jitter_rng = random.Random(f"jitter {options.seed}")
        self._clock = Clock()
        self._in_step = not options.jitter and not any(
            fault.kind is FaultKind.PARTITION for fault in options.faults
        )
        self._trackers = [self._new_tracker() for _ in range(options.trackers)]
        images = max(options.images, 1)
        self._blobs = [Blob(index, options) for index in range(images * options.layers)]
        self._blob_of = {blob.digest: blob for blob in self._blobs}
        self._connections: dict[int, _Connection] = {}
        self._connection_count = 0
        self._established = 0
        self._dropped = 0
        self._messages = 0
        self._announces = 0
        self._watches = 0
        self._watching: dict[Watch, tuple[Host, PeerTable]] = {}
        self._stored = 0
        self._copied = 0
        self._unfinished = 0
        self._healthy_unfinished = 0
        self._sampler = Sampler()
        self._hosts: dict[str, Host] = {}
        faults = afflict(options, self._rng)
        self._origins = [self._add_host(PeerKind.ORIGIN, n) for n in range(options.origins)]
        self._agents = []
        for number in range(options.hosts):
            fault = faults.get(number)
            kind = fault.kind if fault else None
            agent = self._add_host(PeerKind.AGENT, number, kind, fault.factor if fault else 1.0)
            self._agents.append(agent)
        self._pulls = plan_pulls(options, self._blobs, self._agents, self._rng)
        self._plan_faults(faults)
        self._bound = self._least_time()
        self._performers: dict[type, Callable[[Host, Any], None]] = {
            act.Send: self._send,
            act.SendAll: self._send_all,
            act.SendPiece: self._send_piece,
            act.Dial: self._dial,
            act.Close: self._close,
            act.Announce: self._announce,
            act.Watch: self._watch,
            act.Finish: self._finish_soon,
            act.Fail: self._fail,
            act.Urge: _nobody_fetches,
        }

    def run(self, progress: Callable[[float], None] | None = None) -> SimulationResult:
        """Run to the end: every surviving agent has everything, or ``until`` is reached.

        ``progress`` is told now and then what share of all pieces is stored.
        """
        for pull in self._pulls:
            self._unfinished += pull.host.survives
            self._healthy_unfinished += pull.host.healthy
            pull.host.wanted += sum(blob.piece_count for blob in pull.blobs)
        self._start_origins()
        for pull in self._pulls:
            self._clock.at(pull.started_at, self._start_pull, pull)
        self._sample(progress)
        with _without_cycle_search():
            self._clock.run(self._options.until)
        return self._result()

    # --- setting up ---------------------------------------------------------------------------

    def _new_tracker(self) -> PeerTable:
        return PeerTable(HandoutLimits(), random.Random(self._rng.getrandbits(64)))

    def _add_host(
        self, kind: PeerKind, number: int, fault: FaultKind | None = None, factor: float = 1.0
    ) -> Host:
        options = self._options
        peer_id = f"{self._rng.getrandbits(128):032x}"
        contact = PeerContact(peer_id, f"{kind.value}-{number}", 7100, kind)
        rng = random.Random(self._rng.getrandbits(64))
        limits = self._limits_of(kind, options.policy)
        scheduler = SCHEDULERS.get(fault, Scheduler)(peer_id, kind, 7100, rng=rng, limits=limits)
        rate = options.origin_rate if kind is PeerKind.ORIGIN else options.rate
        if fault is FaultKind.SLOW:
            rate /= factor
        delay = options.rtt / 2 * (factor if fault is FaultKind.DELAYED else 1.0)
        host = self._hosts[peer_id] = Host(contact, scheduler, Link(rate, rate), delay)
        host.fault = fault
        return host

    def _least_time(self) -> float:
        if not self._options.images:
            return lower_bound(self._options)
        number = {id(agent): position for position, agent in enumerate(self._agents)}
        return busiest_link(
            self._options,
            [(pull.started_at, number[id(pull.host)], pull.image) for pull in self._pulls],
        )

    def _plan_faults(self, faults: dict[int, Any]) -> None:
        midway = lower_bound(self._options)
        side = 0
        for number, fault in faults.items():
            agent = self._agents[number]
            when = fault.since
            if fault.kind in DYING:
                if when is None:
                    when = self._rng.uniform(0.0, midway)
                self._clock.at(when, self._kill, agent, fault.kind is FaultKind.VANISHED)
            elif fault.kind is FaultKind.PARTITION:
                side = 1 + self._options.faults.index(fault)
                self._clock.at(when, self._cut_off, agent, side, fault.until)
            elif fault.kind is FaultKind.LATE:
                for pull in self._pulls:
                    if pull.host is agent:
                        pull.started_at += when
        for fault in self._options.faults:
            if not fault.of_agents:
                for number in range(fault.count(0)):
                    when = fault.since
                    if when is None:
                        when = self._rng.uniform(0.0, midway)
                    self._plan_other_fault(fault.kind, number, when)

    def _plan_other_fault(self, kind: FaultKind, number: int, when: float) -> None:
        if kind is FaultKind.ORIGIN_KILLED:
            self._clock.at(when, self._kill, self._origins[number], False)
        else:
            self._clock.at(when, self._replace_tracker, number)

    def _start_origins(self) -> None:
        for origin in self._origins:
            for blob in self._blobs:
                have = bitfield.full(blob.piece_count)
                event = ev.TorrentAdded(blob.metainfo, "", have, verified=True, announce=False)
                self._dispatch(origin, event)

    def _start_pull(self, pull: Pull) -> None:
        host = pull.host
        if host.gone:
            return
        for blob in pull.blobs:
            host.pulls[blob.index] = pull
            event = ev.TorrentAdded(blob.metainfo, "", 0, verified=False, announce=True)
            self._dispatch(host, event)
            if self._options.readers:
                self._dispatch(host, ev.ReaderMoved(blob.digest, 0, 0))

    # --- faults -------------------------------------------------------------------------------

    def _kill(self, host: Host, silently: bool) -> None:
        host.gone = True
        if silently:
            return
        host.dead = True
        for watch, (watcher, tracker) in list(self._watching.items()):
            if watcher is host:
                tracker.close_watch(watch)
                del self._watching[watch]
        for connection in list(self._connections.values()):
            if host in (connection.dialler, connection.acceptor):
                self._clock.at(self._clock.now, self._disconnect, connection, host)

    def _cut_off(self, host: Host, side: int, until: float) -> None:
        host.side, host.cut_until = side, until
        self._clock.at(until, self._rejoin, host)

    def _rejoin(self, host: Host) -> None:
        host.side = 0

    def _replace_tracker(self, number: int) -> None:
        former, self._trackers[number] = self._trackers[number], self._new_tracker()
        for watch, (host, tracker) in list(self._watching.items()):
            if tracker is former:
                del self._watching[watch]
                failed = ev.WatchEnded(watch.digest)
                self._clock.at(self._clock.now + host.delay, self._dispatch, host, failed)
        for agent in self._agents:
            lost = [
                self._blobs[index].digest for index in agent.pulls if self._is_of(number, index)
            ]
            if lost:
                when = self._tracker_reached_at(agent) + agent.delay
                self._clock.at(when, self._dispatch, agent, ev.TrackerLost(tuple(lost)))

    def _is_of(self, tracker: int, blob: int) -> bool:
        return blob % len(self._trackers) == tracker

    def _tracker_reached_at(self, host: Host) -> float:
        return host.cut_until if host.side else self._clock.now

    def _reaches_at(self, one: Host, other: Host) -> float:
        """From when on the two can reach each other."""
        return self._clock.now if one.side == other.side else max(one.cut_until, other.cut_until)

    # --- the loop -----------------------------------------------------------------------------

    def _dispatch(self, host: Host, event: ev.Event) -> None:
        if host.gone:
            return
        clock = self._clock
        actions = host.handle(event, clock.now)
        if actions:
            performers = self._performers
            for action in actions:
                performers[type(action)](host, action)
        if self._check_every and clock.processed % self._check_every == 0:
            host.scheduler.check_invariants()
        deadline = host.next_deadline()
        if deadline < host.wakes_at:
            host.wakes_at = deadline
            clock.at(deadline, self._wake, host, deadline)

    def _wake(self, host: Host, planned: float) -> None:
        if host.wakes_at == planned:
            host.wakes_at = math.inf
            self._dispatch(host, ev.DeadlinePassed())
            assert host.scheduler.next_deadline() > self._clock.now or host.gone, (
                f"{host.contact.host} asks to be woken without end"
            )

    def _sample(self, progress: Callable[[float], None] | None) -> None:
        pieces = sum(blob.piece_count for blob in self._blobs)
        if self._healthy_unfinished:
            hosts = [*self._origins, *self._agents]
            self._sampler.take(hosts, self._clock.now, copied=self._copied / pieces)
        if progress is not None:
            progress(self._stored / sum(agent.wanted for agent in self._agents))
        self._clock.at(self._clock.now + self._bound / SAMPLES, self._sample, progress)

    # --- messages -----------------------------------------------------------------------------

    def _send(self, host: Host, action: act.Send) -> None:
        self._messages += 1
        connection = self._connections.get(action.connection)
        if connection is None:
            return
        acceptor = connection.acceptor
        receiver = connection.dialler if host is acceptor else acceptor
        when = (
            self._clock.now + host.delay
            if self._in_step
            else self._arrival(connection, host, receiver)
        )
        self._clock.at(when, self._deliver, connection, receiver, action.message)

    def _send_all(self, host: Host, action: act.SendAll) -> None:
        self._messages += len(action.connections)
        connections = [
            self._connections[number]
            for number in action.connections
            if number in self._connections
        ]
        if self._in_step:
            when = self._clock.now + host.delay
            self._clock.at(when, self._deliver_all, connections, host, action.message)
            return
        for connection in connections:
            receiver = connection.other(host)
            when = self._arrival(connection, host, receiver)
            self._clock.at(when, self._deliver, connection, receiver, action.message)

    def _arrival(self, connection: _Connection, sender: Host, receiver: Host) -> float:
        """When a message that is sent now arrives: in order, and not before a partition ends."""
        if self._in_step:
            return self._clock.now + sender.delay
        when = self._reaches_at(sender, receiver) + sender.delay
        when += self._jitter_rng.random() * self._options.jitter
        if receiver is connection.acceptor:
            when = connection.to_acceptor = max(when, connection.to_acceptor)
        else:
            when = connection.to_dialler = max(when, connection.to_dialler)
        return when

    def _deliver_all(self, connections: list[_Connection], sender: Host, message: Message) -> None:
        for connection in connections:
            self._deliver(connection, connection.other(sender), message)

    def _deliver(self, connection: _Connection, receiver: Host, message: Message) -> None:
        if connection.closed:
            return
        if type(message) is Hello:
            self._greet(connection, receiver, message, connection.announced)
        else:
            self._dispatch(receiver, ev.MessageReceived(connection.number, message))

    # --- trackers -----------------------------------------------------------------------------

    def _announce(self, host: Host, action: act.Announce) -> None:
        now = self._clock.now
        reaches_at = host.cut_until if host.side else now
        if reaches_at - now > ANNOUNCE_TIMEOUT:
            failed = ev.AnnounceFailed(action.digest)
            self._clock.at(now + ANNOUNCE_TIMEOUT, self._dispatch, host, failed)
            return
        self._clock.at(reaches_at + host.delay, self._announced, host, action.digest, action.state)

    def _announced(self, host: Host, digest: Digest, state: AnnounceState) -> None:
        now = self._clock.now
        self._announces += 1
        tracker = self._tracker_of(digest)
        if state is AnnounceState.LEECHING and not tracker.has_origin(digest):
            for origin in self._origins:
                if not origin.gone:
                    tracker.add_seeder(digest, origin.contact, now, lifetime=ORIGIN_LIFETIME)
        handout = tracker.announce(digest, host.contact, state, now)
        if state is not AnnounceState.STOPPED:
            reply = ev.AnnounceReplied(digest, handout.interval, handout.peers, handout.position)
            self._clock.at(now + host.delay, self._dispatch, host, reply)

    def _tracker_of(self, digest: Digest) -> PeerTable:
        return self._trackers[self._blob_of[digest].index % len(self._trackers)]

    def _watch(self, host: Host, action: act.Watch) -> None:
        reaches_at = host.cut_until if host.side else self._clock.now
        when = reaches_at + host.delay
        self._clock.at(when, self._watched, host, action.digest, action.position)

    def _watched(self, host: Host, digest: Digest, position: int) -> None:
        if host.dead:
            return
        self._watches += 1
        now = self._clock.now
        tracker = self._tracker_of(digest)
        watch = tracker.watch(
            digest,
            host.contact.peer_id,
            position,
            WATCH_SECONDS,
            now,
            lambda: self._watch_ended(watch),
        )
        self._watching[watch] = (host, tracker)
        if watch.is_open:
            self._clock.at(watch.until, self._close_watch, watch)
        else:
            self._watch_ended(watch)

    def _close_watch(self, watch: Watch) -> None:
        if watch.is_open:
            _, tracker = self._watching[watch]
            tracker.close_watch(watch)
            self._watch_ended(watch)

    def _watch_ended(self, watch: Watch) -> None:
        host, _ = self._watching.pop(watch)
        reaches_at = host.cut_until if host.side else self._clock.now
        ended = ev.WatchEnded(watch.digest, watch.peers, watch.position)
        self._clock.at(reaches_at + host.delay, self._dispatch, host, ended)

    # --- connections --------------------------------------------------------------------------

    def _dial(self, host: Host, action: act.Dial) -> None:
        now = self._clock.now
        target = self._hosts[action.contact.peer_id]
        reaches_at = self._reaches_at(host, target)
        if target.gone or reaches_at - now > HANDSHAKE_TIMEOUT:
            failed = ev.DialFailed(action.digest, action.contact.peer_id)
            # A dead host's address answers that nobody listens; a silent one does not answer.
            pause = 2 * host.delay if target.dead else HANDSHAKE_TIMEOUT
            self._clock.at(now + pause, self._dispatch, host, failed)
            return
        self._connection_count += 1
        blob = self._blob_of[action.digest]
        connection = _Connection(self._connection_count, blob, host, target)
        self._connections[connection.number] = connection
        established_at = reaches_at + host.delay + target.delay
        self._clock.at(established_at, self._say_hello, connection)

    def _say_hello(self, connection: _Connection) -> None:
        if connection.closed:
            return
        dialler = connection.dialler
        hello = dialler.scheduler.hello(connection.blob.digest)
        if hello is None:
            self._disconnect(connection, dialler)
            return
        connection.announced = bitfield.from_bytes(hello.have, hello.piece_count)
        when = self._arrival(connection, dialler, connection.acceptor)
        self._clock.at(when, self._greet, connection, connection.acceptor, hello, None)

    def _greet(
        self, connection: _Connection, host: Host, hello: Hello, announced: int | None
    ) -> None:
        if connection.closed:
            return
        if announced is not None:
            connection.established = True
            self._established += 1
        contact = contact_of(hello, self._hosts[hello.peer_id].contact.host)
        self._dispatch(host, ev.PeerConnected(connection.number, hello, contact, announced))

    def _close(self, host: Host, action: act.Close) -> None:
        connection = self._connections.get(action.connection)
        if connection is not None:
            when = self._arrival(connection, host, connection.other(host))
            self._clock.at(when, self._disconnect, connection, host)

    def _disconnect(self, connection: _Connection, closer: Host) -> None:
        if connection.closed:
            return
        connection.closed = True
        del self._connections[connection.number]
        self._dropped += connection.established
        other = connection.other(closer)
        if connection.established or other is connection.acceptor:
            self._dispatch(other, ev.PeerDisconnected(connection.number))
        else:
            peer_id = connection.acceptor.contact.peer_id
            self._dispatch(other, ev.DialFailed(connection.blob.digest, peer_id))

    # --- pieces -------------------------------------------------------------------------------

    def _send_piece(self, host: Host, action: act.SendPiece) -> None:
        connection = self._connections[action.connection]
        size = connection.blob.piece_size(action.index)
        begins_at, left_at = host.link.send(size, self._clock.now)
        if begins_at <= self._clock.now:
            self._begin_piece(connection, host, action.index, size, left_at)
        else:
            self._tell_progress(connection, host, action.index, begins_at)
            self._clock.at(
                begins_at, self._begin_piece, connection, host, action.index, size, left_at
            )

    def _tell_progress(
        self, connection: _Connection, sender: Host, index: int, until: float
    ) -> None:
        """Have both sides told now and then of a piece that takes long.

        Links take pieces one after the other, where TCP sends all at once and each of them slowly: bytes of
        one that waits for its link count as arriving.
        """
        next_at = self._clock.now + PROGRESS_EVERY
        if next_at < until and sender.fault is not FaultKind.STALLING:
            self._clock.at(next_at, self._progress, connection, sender, index, until)

    def _progress(self, connection: _Connection, sender: Host, index: int, until: float) -> None:
        if connection.closed or sender.gone:
            return
        receiver = connection.other(sender)
        if self._reaches_at(sender, receiver) <= self._clock.now and not receiver.gone:
            self._dispatch(sender, ev.SendProgress(connection.number, index))
            self._dispatch(receiver, ev.PieceProgress(connection.number, index))
        self._tell_progress(connection, sender, index, until)

    def _begin_piece(
        self, connection: _Connection, sender: Host, index: int, size: int, left_at: float
    ) -> None:
        """The sender's uplink has come to this piece."""
        clock = self._clock
        sent = ev.PieceSent(connection.number, index)
        if connection.closed:
            clock.at(left_at, self._dispatch, sender, sent)
            return
        receiver = connection.other(sender)
        reaches_at = self._reaches_at(sender, receiver)
        if reaches_at > clock.now:
            again_at = reaches_at + left_at - clock.now
            clock.at(reaches_at, self._begin_piece, connection, sender, index, size, again_at)
            return
        delay = self._options.rtt / 2
        if sender.fault is FaultKind.STALLING:
            receiver.link.receive(size // 2, clock.now + delay, left_at + delay)
            clock.at(left_at, self._dispatch, sender, sent)
            return
        arrives_at = receiver.link.receive(size, clock.now + delay, left_at + delay)
        rid_at = receiver.link.pressed_back(arrives_at - delay, self._options.buffer)
        clock.at(max(left_at, rid_at), self._dispatch, sender, sent)
        self._tell_progress(connection, sender, index, arrives_at)
        clock.at(arrives_at, self._piece_arrived, connection, sender, receiver, index)

    def _piece_arrived(
        self, connection: _Connection, sender: Host, receiver: Host, index: int
    ) -> None:
        if connection.closed or sender.gone:
            return
        clock = self._clock
        reaches_at = self._reaches_at(sender, receiver)
        if reaches_at > clock.now:
            clock.at(reaches_at, self._piece_arrived, connection, sender, receiver, index)
            return
        if sender.fault is FaultKind.OVERLONG:
            # The roles notice at the first chunk that goes beyond the piece, and say why they leave.
            self._dispatch(receiver, ev.PeerDisconnected(connection.number))
            when = self._arrival(connection, receiver, sender)
            clock.at(when, self._disconnect, connection, receiver)
            return
        kept = receiver.scheduler.expects(connection.number, index)
        self._dispatch(receiver, ev.PieceReceived(connection.number, index))
        if not kept:
            return
        checked_at = clock.now + connection.blob.piece_size(index) / HASH_RATE
        if sender.fault is FaultKind.CORRUPT:
            rejected = ev.PieceRejected(connection.number, connection.blob.digest, index)
            clock.at(checked_at, self._dispatch, receiver, rejected)
        else:
            clock.at(checked_at, self._piece_stored, receiver, connection, index)

    def _piece_stored(self, host: Host, connection: _Connection, index: int) -> None:
        blob = connection.blob
        pull = host.pulls[blob.index]
        if host.gone or pull.gave_up:
            return
        self._stored += 1
        host.stored += 1
        if not blob.copied[index]:
            blob.copied[index] = 1
            self._copied += 1
        if index == 0 and blob is pull.blobs[0]:
            pull.first_byte_at = self._clock.now
        self._dispatch(host, ev.PieceStored(connection.number, blob.digest, index))
        if self._options.readers and pull.positions[blob.index] == index:
            self._read(pull, blob)

    # --- readers ------------------------------------------------------------------------------

    def _read(self, pull: Pull, blob: Blob) -> None:
        """The piece that the reader of a layer waits for is there."""
        torrent = pull.host.scheduler.torrent(blob.digest)
        if torrent is None:
            return
        position = pull.positions[blob.index]
        if self._options.reader_rate < math.inf:
            seconds = blob.piece_size(position) / self._options.reader_rate
            self._clock.at(self._clock.now + seconds, self._consumed, pull, blob)
            return
        ahead = ~torrent.have >> position
        self._move_reader(pull, blob, position + bitfield.lowest(ahead))

    def _consumed(self, pull: Pull, blob: Blob) -> None:
        position = pull.positions[blob.index] + 1
        self._move_reader(pull, blob, position)
        torrent = pull.host.scheduler.torrent(blob.digest)
        if torrent is not None and position < blob.piece_count and (torrent.have >> position) & 1:
            self._read(pull, blob)

    def _move_reader(self, pull: Pull, blob: Blob, position: int) -> None:
        pull.positions[blob.index] = position
        if position < blob.piece_count:
            self._dispatch(pull.host, ev.ReaderMoved(blob.digest, 0, position))
        else:
            self._dispatch(pull.host, ev.ReaderClosed(blob.digest, 0))

    # --- ends ---------------------------------------------------------------------------------

    def _finish_soon(self, host: Host, action: act.Finish) -> None:
        self._clock.at(self._clock.now, self._finish, host, action.digest)

    def _finish(self, host: Host, digest: Digest) -> None:
        if host.gone:
            return
        self._dispatch(host, ev.BlobVerified(digest))
        pull = host.pulls[self._blob_of[digest].index]
        pull.layers_left -= 1
        if pull.layers_left == 0:
            pull.finished_at = self._clock.now
            self._end_pull(pull)

    def _fail(self, host: Host, action: act.Fail) -> None:
        pull = host.pulls[self._blob_of[action.digest].index]
        if not pull.gave_up:
            pull.gave_up = True
            self._end_pull(pull)

    def _end_pull(self, pull: Pull) -> None:
        self._unfinished -= pull.host.survives
        self._healthy_unfinished -= pull.host.healthy
        self._clock.stopped = self._unfinished == 0

    def _result(self) -> SimulationResult:
        honest = [pull for pull in self._pulls if pull.host.survives]
        healthy = [pull for pull in honest if pull.host.healthy]
        finishes = [pull.finished_at for pull in healthy if pull.finished_at is not None]
        return SimulationResult(
            policy=self._options.policy,
            completed=sum(pull.finished_at is not None for pull in honest),
            expected=len(honest),
            gave_up=sum(pull.gave_up for pull in honest),
            times=_times(healthy),
            faulty_times=_times([pull for pull in honest if not pull.host.healthy]),
            first_bytes=tuple(
                sorted(
                    pull.first_byte_at - pull.started_at
                    for pull in healthy
                    if pull.first_byte_at is not None
                )
            ),
            makespan=max(finishes, default=math.nan),
            bound=self._bound,
            bytes_total=max(self._options.images, 1) * self._options.size,
            bytes_from_origins=sum(origin.link.bytes_sent for origin in self._origins),
            bytes_from_agents=sum(agent.link.bytes_sent for agent in self._agents),
            pieces=self._stored,
            messages=self._messages,
            announces=self._announces,
            watches=self._watches,
            connections=self._established,
            dropped=self._dropped,
            refused=self._connection_count - self._established,
            agent_uplinks=self._sampler.shares(PeerKind.AGENT),
            origin_uplinks=self._sampler.shares(PeerKind.ORIGIN),
            samples=tuple(self._sampler.samples),
            events=self._clock.processed,
        )


def _nobody_fetches(_host: Host, _urge: act.Urge) -> None:
    """Every simulated origin has every blob from the beginning."""


def _times(pulls: list[Pull]) -> tuple[float, ...]:
    return tuple(
        sorted(pull.finished_at - pull.started_at for pull in pulls if pull.finished_at is not None)
    )


@contextmanager
def _without_cycle_search() -> Iterator[None]:
    """Millions of live objects and hardly any cycles: searching for those takes a tenth of a run."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
