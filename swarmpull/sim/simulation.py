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
from swarmpull.sim.faults import DYING, RETURNING, Fault, FaultKind
from swarmpull.sim.liars import SCHEDULERS
from swarmpull.sim.losses import DIALLED_AGAIN_AFTER, Losses
from swarmpull.sim.network import Clock, Link
from swarmpull.sim.options import Policy, SimulationOptions, busiest_link, lower_bound
from swarmpull.sim.result import SimulationResult
from swarmpull.sim.sampling import Sampler
from swarmpull.sim.trackers import Trackers
from swarmpull.sim.workload import Blob, Host, Pull, afflict, afflict_others, plan_pulls
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
# When no tracker answers a download begins with what an origin says, and asks again so soon.
TRACKERLESS_INTERVAL: Final = 3.0
# Probes find a tracker that is back within so many seconds, and sooner after a short absence.
FOUND_WITHIN: Final = 8.0
# As the roles report on a piece that takes longer than that, in seconds.
PROGRESS_EVERY: Final = 1.0
# Looks at the swarm in the time of the bound.
SAMPLES: Final = 400

_OUT_OF_STEP: Final = frozenset(
    {FaultKind.PARTITION, FaultKind.FROZEN, FaultKind.ORIGIN_FROZEN, FaultKind.LOST}
)

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
        dialled: the peer id of whom was expected at the address; another process may answer there.
        to_acceptor, to_dialler: when the last message arrives there; no later one overtakes it.
    """

    __slots__ = (
        "acceptor",
        "announced",
        "blob",
        "closed",
        "dialled",
        "dialler",
        "established",
        "number",
        "to_acceptor",
        "to_dialler",
    )

    def __init__(
        self, number: int, blob: Blob, dialler: Host, acceptor: Host, dialled: str
    ) -> None:
        self.number = number
        self.blob = blob
        self.dialler = dialler
        self.dialled = dialled
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
        # Whether all messages take the same time, whatever happens.
        self._in_step = not options.jitter and not any(
            fault.kind in _OUT_OF_STEP for fault in options.faults
        )
        self._losses = Losses(options.lost, options.rtt, random.Random(f"losses {options.seed}"))
        self._returns_rng = random.Random(f"returns {options.seed}")
        self._trackers = Trackers(options.trackers, self._new_tracker)
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
        self._frozen_count = 0
        self._unfinished = 0
        self._healthy_unfinished = 0
        self._sampler = Sampler()
        self._hosts: dict[str, Host] = {}
        self._at_address: dict[str, Host] = {}
        faults = afflict(options, self._rng)
        others = afflict_others(options)
        slow = {number: fault for number, fault in others if fault.kind is FaultKind.ORIGIN_SLOW}
        self._origins = [
            self._add_host(PeerKind.ORIGIN, number, slow.get(number))
            for number in range(options.origins)
        ]
        self._agents = [
            self._add_host(PeerKind.AGENT, number, faults.get(number))
            for number in range(options.hosts)
        ]
        self._pulls = plan_pulls(options, self._blobs, self._agents, self._rng)
        self._plan_faults(faults)
        self._plan_other_faults(others)
        self._bound = self._least_time()
        self._performers: dict[type, Callable[[Host, Any], None]] = {
            act.Send: self._send,
            act.SendAll: self._send_all,
            act.SendPiece: self._send_piece,
            act.Dial: self._dial,
            act.Close: self._close,
            act.Announce: self._announce,
            act.AnnounceHeld: self._announce_held,
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
        for origin in self._origins:
            self._start_origin(origin)
        for pull in self._pulls:
            self._clock.at(pull.started_at, self._start_pull, pull)
        self._sample(progress)
        with _without_cycle_search():
            self._clock.run(self._options.until)
        return self._result()

    # --- setting up ---------------------------------------------------------------------------

    def _new_tracker(self) -> PeerTable:
        return PeerTable(HandoutLimits(), random.Random(self._rng.getrandbits(64)))

    def _add_host(self, kind: PeerKind, number: int, fault: Fault | None = None) -> Host:
        options = self._options
        trouble = fault.kind if fault else None
        factor = fault.factor if fault else 1.0
        rate = options.origin_rate if kind is PeerKind.ORIGIN else options.rate
        if trouble in {FaultKind.SLOW, FaultKind.ORIGIN_SLOW}:
            rate /= factor
        delay = options.rtt / 2 * (factor if trouble is FaultKind.DELAYED else 1.0)
        name = f"{kind.value}-{number}"
        return self._new_host(kind, name, Link(rate, rate), delay, trouble, self._rng)

    def _new_host(
        self,
        kind: PeerKind,
        name: str,
        link: Link,
        delay: float,
        fault: FaultKind | None,
        rng: random.Random,
    ) -> Host:
        """A process that begins: nobody knows it yet, and it knows nobody."""
        peer_id = f"{rng.getrandbits(128):032x}"
        contact = PeerContact(peer_id, name, 7100, kind)
        seeded = random.Random(rng.getrandbits(64))
        limits = self._limits_of(kind, self._options.policy)
        make = SCHEDULERS.get(fault, Scheduler)
        scheduler = make(peer_id, kind, 7100, rng=seeded, limits=limits)
        host = self._hosts[peer_id] = self._at_address[name] = Host(contact, scheduler, link, delay)
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

    def _plan_faults(self, faults: dict[int, Fault]) -> None:
        midway = lower_bound(self._options)
        for number, fault in faults.items():
            agent = self._agents[number]
            when, until = fault.since, fault.until
            if fault.kind in DYING:
                if when is None:
                    when = self._rng.uniform(0.0, midway)
                self._clock.at(when, self._kill, agent, fault.kind is FaultKind.VANISHED)
            elif fault.kind is FaultKind.LATE:
                for pull in self._pulls:
                    if pull.host is agent:
                        pull.started_at += _given(when)
            elif fault.kind is FaultKind.PARTITION:
                side = 1 + self._options.faults.index(fault)
                self._clock.at(_given(when), self._cut_off, agent, side, until)
            elif fault.kind is FaultKind.FROZEN:
                self._clock.at(_given(when), self._freeze, agent, until)
            elif fault.kind in RETURNING:
                self._clock.at(_given(when), self._kill, agent, False)
                self._clock.at(_given(until), self._bring_back_agent, number, fault.kind)

    def _plan_other_faults(self, others: list[tuple[int, Fault]]) -> None:
        midway = lower_bound(self._options)
        for number, fault in others:
            when, until = fault.since, fault.until
            if fault.kind is FaultKind.ORIGIN_SLOW:
                continue
            if when is None:
                when = self._rng.uniform(0.0, midway)
            if fault.kind is FaultKind.TRACKER_KILLED:
                self._clock.at(when, self._replace_tracker, number, until)
            elif fault.kind is FaultKind.ORIGIN_FROZEN:
                self._clock.at(when, self._freeze, self._origins[number], until)
            else:
                self._clock.at(when, self._kill, self._origins[number], False)
                if until is not None:
                    self._clock.at(until, self._bring_back_origin, number)

    def _start_origin(self, origin: Host) -> None:
        for blob in self._blobs:
            have = bitfield.full(blob.piece_count)
            event = ev.TorrentAdded(blob.metainfo, "", have, verified=True, announce=False)
            self._dispatch(origin, event)

    def _start_pull(self, pull: Pull) -> None:
        host = pull.host
        if host.gone:
            return
        host.stored_at = self._clock.now
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

    def _freeze(self, host: Host, until: float) -> None:
        """Let a host do nothing: what comes in waits, and what it was sending stays where it is."""
        host.frozen_until = until
        self._frozen_count += 1
        self._cut_off(host, -self._frozen_count, until)

    def _reborn(self, former: Host) -> Host:
        """The process that takes the place of one that died, on the same host."""
        former.link.up_free_at = self._clock.now
        name, kind = former.contact.host, former.contact.kind
        return self._new_host(
            kind, name, former.link, former.delay, former.fault, self._returns_rng
        )

    def _bring_back_origin(self, number: int) -> None:
        """An origin is back, and everything is on its disk."""
        origin = self._origins[number] = self._reborn(self._origins[number])
        self._start_origin(origin)

    def _bring_back_agent(self, number: int, kind: FaultKind) -> None:
        """An agent is back, and who wanted something of it asks again; what it had is on its disk, or not."""
        former = self._agents[number]
        agent = self._agents[number] = self._reborn(former)
        agent.wanted, agent.longest_wait = former.wanted, former.longest_wait
        agent.stored_at = self._clock.now
        for pull in self._pulls:
            if pull.host is not former:
                continue
            pull.host = agent
            has_disk = kind is FaultKind.RESTARTED
            is_over = pull.gave_up or (pull.finished_at is not None and not has_disk)
            if is_over or pull.started_at > self._clock.now:
                continue
            if not has_disk:
                pull.layers_left = len(pull.blobs)
                pull.positions = dict.fromkeys(pull.positions, 0)
            for blob in pull.blobs:
                self._resume(former, pull, blob, has_disk=has_disk)

    def _resume(self, former: Host, pull: Pull, blob: Blob, *, has_disk: bool) -> None:
        """Ask a host that is back for a blob, or let it seed it."""
        agent = pull.host
        torrent = former.scheduler.torrent(blob.digest) if has_disk else None
        have = 0 if torrent is None else torrent.have
        verified = torrent is not None and torrent.verified
        agent.pulls[blob.index] = pull
        agent.stored += have.bit_count()
        event = ev.TorrentAdded(blob.metainfo, "", have, verified=verified, announce=True)
        self._dispatch(agent, event)
        position = pull.positions[blob.index]
        if self._options.readers and position < blob.piece_count:
            self._dispatch(agent, ev.ReaderMoved(blob.digest, 0, position))
            if (have >> position) & 1:
                self._read(pull, blob)

    def _replace_tracker(self, number: int, until: float | None) -> None:
        if until is not None:
            self._trackers.leave(number)
            self._clock.at(until, self._bring_back_tracker, number, until - self._clock.now)
        self._empty_tracker(number)

    def _bring_back_tracker(self, number: int, seconds: float) -> None:
        """A tracker is back after so many seconds, and its torrents return to it when it is found."""
        self._trackers.come_back(number)
        self._empty_tracker(number, within=min(seconds, FOUND_WITHIN))

    def _empty_tracker(self, number: int, within: float = 0.0) -> None:
        """Let torrents begin anew elsewhere; whoever announced them hears of it within so many seconds."""
        former = self._trackers.replace(number)
        for watch, (host, tracker) in list(self._watching.items()):
            if tracker is former:
                del self._watching[watch]
                failed = ev.WatchEnded(watch.digest)
                self._clock.at(self._clock.now + host.delay, self._dispatch, host, failed)
        for agent in self._agents:
            lost = [
                self._blobs[index].digest
                for index in agent.pulls
                if self._trackers.is_of(number, index)
            ]
            if lost:
                when = self._tracker_reached_at(agent) + agent.delay
                if within:
                    when += self._returns_rng.uniform(0.0, within)
                self._clock.at(when, self._dispatch, agent, ev.TrackerLost(tuple(lost)))

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
        if host.frozen_until > clock.now:
            clock.at(host.frozen_until, self._dispatch, host, event)
            return
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
            assert (
                host.scheduler.next_deadline() > self._clock.now
                or host.gone
                or host.frozen_until > self._clock.now
            ), f"{host.contact.host} asks to be woken without end"

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
        when += self._jitter_rng.random() * self._options.jitter + self._losses.delay()
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
        reaches_at = self._tracker_reached_at(host)
        failed = ev.AnnounceFailed(action.digest)
        if self._trackers.are_gone and reaches_at <= now:
            # Their addresses answer that nobody listens.
            found = None
            if action.state is AnnounceState.LEECHING:
                found = self._ask_origins(action.digest)
            self._clock.at(now + 2 * host.delay, self._dispatch, host, found or failed)
            return
        if reaches_at - now > ANNOUNCE_TIMEOUT:
            self._clock.at(now + ANNOUNCE_TIMEOUT, self._dispatch, host, failed)
            return
        when = reaches_at + host.delay + self._losses.exchange()
        self._clock.at(when, self._announced, host, action.digest, action.state)

    def _announced(self, host: Host, digest: Digest, state: AnnounceState) -> None:
        now = self._clock.now
        if self._trackers.are_gone:
            self._clock.at(now + host.delay, self._dispatch, host, ev.AnnounceFailed(digest))
            return
        self._announces += 1
        tracker = self._trackers.of(self._blob_of[digest].index)
        if state is AnnounceState.LEECHING and not tracker.has_origin(digest):
            for origin in self._origins:
                if not origin.gone and origin.frozen_until <= now:
                    tracker.add_seeder(digest, origin.contact, now, lifetime=ORIGIN_LIFETIME)
        handout = tracker.announce(digest, host.contact, state, now)
        if state is not AnnounceState.STOPPED:
            reply = ev.AnnounceReplied(digest, handout.interval, handout.peers, handout.position)
            self._clock.at(now + host.delay, self._dispatch, host, reply)

    def _ask_origins(self, digest: Digest) -> ev.AnnounceReplied | None:
        """What a download goes by when no tracker answers: an origin, and who is connected to it."""
        blob = self._blob_of[digest].index
        here = [
            origin
            for origin in self._origins
            if not origin.gone and origin.frozen_until <= self._clock.now
        ]
        if not here:
            return None
        origin = here[blob % len(here)]
        peers = (origin.contact, *origin.scheduler.neighbours(digest))
        return ev.AnnounceReplied(digest, TRACKERLESS_INTERVAL, peers)

    def _announce_held(self, host: Host, action: act.AnnounceHeld) -> None:
        now = self._clock.now
        reaches_at = self._tracker_reached_at(host)
        if reaches_at - now > ANNOUNCE_TIMEOUT:
            when = now + ANNOUNCE_TIMEOUT
            self._clock.at(when, self._held_failed, host, action.digests)
            return
        when = reaches_at + host.delay + self._losses.exchange()
        self._clock.at(when, self._held_announced, host, action.digests)

    def _held_announced(self, host: Host, digests: tuple[Digest, ...]) -> None:
        """One message to each tracker; each of them counts as an announce."""
        now = self._clock.now
        if self._trackers.are_gone:
            self._clock.at(now + host.delay, self._held_failed, host, digests)
            return
        by_tracker: dict[PeerTable, list[Digest]] = {}
        for digest in digests:
            blob = self._blob_of[digest].index
            by_tracker.setdefault(self._trackers.of(blob), []).append(digest)
        for tracker, theirs in by_tracker.items():
            self._announces += 1
            handout = tracker.announce_held(theirs, host.contact, now)
            for digest in theirs:
                peers = handout.leechers.get(digest, ())
                reply = ev.AnnounceReplied(digest, handout.interval, peers)
                self._clock.at(now + host.delay, self._dispatch, host, reply)

    def _held_failed(self, host: Host, digests: tuple[Digest, ...]) -> None:
        for digest in digests:
            self._dispatch(host, ev.AnnounceFailed(digest))

    def _watch(self, host: Host, action: act.Watch) -> None:
        when = self._tracker_reached_at(host) + host.delay + self._losses.exchange()
        self._clock.at(when, self._watched, host, action.digest, action.position)

    def _watched(self, host: Host, digest: Digest, position: int) -> None:
        if host.dead:
            return
        now = self._clock.now
        if self._trackers.are_gone:
            self._clock.at(now + host.delay, self._dispatch, host, ev.WatchEnded(digest))
            return
        self._watches += 1
        tracker = self._trackers.of(self._blob_of[digest].index)
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
        target = self._at_address[action.contact.host]
        reaches_at = self._reaches_at(host, target)
        if target.gone or reaches_at - now > HANDSHAKE_TIMEOUT:
            failed = ev.DialFailed(action.digest, action.contact.peer_id)
            # A dead host's address answers that nobody listens; a silent one does not answer.
            pause = 2 * host.delay if target.dead else HANDSHAKE_TIMEOUT
            self._clock.at(now + pause, self._dispatch, host, failed)
            return
        self._connection_count += 1
        blob = self._blob_of[action.digest]
        dialled = action.contact.peer_id
        connection = _Connection(self._connection_count, blob, host, target, dialled)
        self._connections[connection.number] = connection
        established_at = reaches_at + host.delay + target.delay
        established_at += self._losses.delay(DIALLED_AGAIN_AFTER)
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
            if hello.peer_id != connection.dialled:
                # The process was restarted; whoever answers there now will do as well.
                gone = ev.DialFailed(connection.blob.digest, connection.dialled, is_gone=True)
                self._dispatch(host, gone)
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
            self._dispatch(other, ev.DialFailed(connection.blob.digest, connection.dialled))

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
        if self._losses.share:
            arrives_at = max(arrives_at, clock.now + delay + size / self._losses.rate)
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
        host.longest_wait = max(host.longest_wait, self._clock.now - host.stored_at)
        host.stored_at = self._clock.now
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
        last = [pull.finished_at for pull in honest if pull.finished_at is not None]
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
            last_finish=max(last, default=math.nan),
            longest_wait=max((pull.host.longest_wait for pull in healthy), default=math.nan),
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


def _given(time: float | None) -> float:
    """The time of a fault that is not read without one."""
    assert time is not None
    return time


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
