"""The scheduler of one host: all its torrents, connections and its uplink.

Theory of operation.  The shell reports what happened with `handle` and performs the actions that come
back, in order.  It keeps one timer, set to `next_deadline`, and reports `DeadlinePassed` when that comes.
Nothing else makes time pass here, and nothing else makes anything happen.

A torrent is added either complete (to be seeded) or with pieces missing (to be downloaded).  A leecher
announces itself, dials the peers of the handout, claims pieces from each connection as the policy says,
and tells all its peers of each piece that it stored.  A claim that is late is taken back and the piece is
free for others; a peer that is late twice in a row without a piece in between is dropped and backed off.
A piece is not late as long as its bytes keep arriving, however slowly: a link of 30 kB/s takes minutes.
A leecher that cannot make all the connections that it could use watches: the tracker tells it of peers that
appear before the next announce.

When the last piece is stored the shell checks the whole blob (`Finish`) and reports `BlobVerified`; only
then does the host announce completion, again and again until a tracker acknowledges it.  A connection
between two complete peers is closed by whoever notices first.

While a piece is missing there is always a finite next deadline: the stall deadline at the least, after
which the download fails and says why.

A torrent may be fed: an origin fetches the blob from its backend and gives out pieces as they land
(`PieceFetched`).  It claims nothing from peers and never stalls here; whoever fetches says when that has
failed.  Which pieces readers wait for that no peer has, here or on a leecher, is said with `Urge`.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from typing import Any, Final

import attrs

from swarmpull.digest import Digest
from swarmpull.errors import ProtocolError
from swarmpull.swarm import actions as act
from swarmpull.swarm import bitfield
from swarmpull.swarm import events as ev
from swarmpull.swarm.connections import Admission, ConnectionLimits, HostPlaces
from swarmpull.swarm.exchange import Outbox, Uplink
from swarmpull.swarm.messages import (
    Bye,
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
from swarmpull.swarm.offers import OfferLimits
from swarmpull.swarm.peers import AnnounceState, PeerContact, PeerKind
from swarmpull.swarm.picker import PickerLimits
from swarmpull.swarm.pipeline import PipelineLimits
from swarmpull.swarm.samples import sample
from swarmpull.swarm.timing import PieceTiming
from swarmpull.swarm.torrent import Inbound, Peer, Torrent, TorrentStatistics

INFINITY: Final = float("inf")
# One late claim may be bad luck at a busy peer; the second without any piece in between is not.
LATE_IN_A_ROW_MAX: Final = 2
# A full house admits a newcomer in place of a peer that gave and took nothing for this long, in seconds.
EVICTABLE_AFTER: Final = 5.0
# Failing that, it admits one that has far fewer pieces in place of the peer that has most: that one can do
# without us.  Far fewer is a quarter of the blob; and so rarely, in seconds, that a burst of newcomers does
# not tear up the graph.
EVICTION_LEAD: Final = 0.25
EVICTION_SPACING: Final = 0.1
ANNOUNCE_RETRY_MAX: Final = 30.0
# How often a torrent is looked after, in seconds: while it is fetched, and while it is only seeded.
LEECHING_TICK: Final = 0.25
SEEDING_TICK: Final = 1.0
# After a restart the cached blobs are announced over this many seconds for each of them, up to a limit,
# so that a host with thousands does not arrive at the tracker as a burst.
REANNOUNCE_SPACING: Final = 0.02
REANNOUNCE_SPREAD_MAX: Final = 60.0
# A host that says of one blob that it still has it says so of all for which that is due within so many
# seconds: one message costs a tracker hardly more than one announce.  Half of the usual interval, so that
# all blobs of a host soon go together.
HELD_AHEAD: Final = 30.0
# The same for blobs that the tracker does not know, because it or this host began anew: their announces are
# spread so that not all hosts come at once, and are to stay so.
HELD_AHEAD_UNKNOWN: Final = 1.0
# When a tracker is gone all its hosts announce to the successor.  Within so many seconds those who download,
# and sooner those who have too few connections: the first 50 make a full handout for whoever arrives.
LOST_LEECHING_SPREAD: Final = 1.0
LOST_SHORT_SPREAD: Final = 0.25
# Completed blobs over so many seconds for each of them, which comes to the usual interval for some hundreds:
# a tracker that is restarted must not get much more than it is used to.
LOST_SEEDING_SPACING: Final = 0.1
LOST_SEEDING_SPREAD_MIN: Final = 5.0
# As many as a tracker hands out.
NEIGHBOURS_TOLD: Final = 50


@attrs.frozen(kw_only=True)
class SwarmLimits:
    """Every bound of the engine, each defined where it acts.

    ``stall_timeout``: seconds without a new piece, or bytes of one, after which a download fails; what it has
    is kept.
    """

    connections: ConnectionLimits = attrs.field(factory=ConnectionLimits)
    exchange: OfferLimits | PipelineLimits = attrs.field(factory=OfferLimits)
    picker: PickerLimits = attrs.field(factory=PickerLimits)
    stall_timeout: float = attrs.field(default=120.0, validator=attrs.validators.gt(0))


class Scheduler:
    """The decisions of one host.  Deterministic: same events, same times, same seed, same actions."""

    def __init__(
        self,
        peer_id: str,
        kind: PeerKind,
        port: int,
        *,
        rng: random.Random,
        limits: SwarmLimits | None = None,
    ) -> None:
        self.peer_id = peer_id
        self._kind = kind
        self._port = port
        self._rng = rng
        self._limits = limits or SwarmLimits()
        self._torrents: dict[Digest, Torrent] = {}
        self._by_connection: dict[int, Torrent] = {}
        self._outbox = Outbox()
        self._inbound = Inbound()
        self._exchange = self._limits.exchange.build(self._inbound, self._outbox, rng)
        self._announcing: set[Digest] = set()
        self._deadlines: list[tuple[float, int, Torrent]] = []
        self._serial = 0
        self._draining = False
        self._places = HostPlaces(self._limits.connections.per_host)
        self._handlers: dict[type[Any], Callable[[Any, float], None]] = {
            ev.TorrentAdded: self._torrent_added,
            ev.TorrentRemoved: self._torrent_removed,
            ev.BlobVerified: self._blob_verified,
            ev.PeersFound: self._peers_found,
            ev.AnnounceReplied: self._announce_replied,
            ev.AnnounceFailed: self._announce_failed,
            ev.TrackerLost: self._tracker_lost,
            ev.WatchEnded: self._watch_ended,
            ev.PeerConnected: self._peer_connected,
            ev.DialFailed: self._dial_failed,
            ev.PeerDisconnected: self._peer_disconnected,
            ev.MessageReceived: self._message_received,
            ev.PieceProgress: self._piece_progress,
            ev.PieceReceived: self._piece_received,
            ev.PieceStored: self._piece_stored,
            ev.PieceFetched: self._piece_fetched,
            ev.PieceRejected: self._piece_rejected,
            ev.PieceLost: self._piece_lost,
            ev.SendProgress: self._send_progress,
            ev.PieceSent: self._piece_sent,
            ev.ReaderMoved: self._reader_moved,
            ev.ReaderClosed: self._reader_closed,
            ev.DeadlinePassed: self._deadline_passed,
            ev.DrainStarted: self._drain_started,
        }

    # --- the interface to the shell -----------------------------------------------------------

    def handle(self, event: ev.Event, now: float) -> list[act.Action]:
        """Take in one event; returns what to do, in order.

        ``now`` is in seconds on any clock that never goes back.
        """
        actions = self._outbox.actions = []
        self._handlers[type(event)](event, now)
        return actions

    def next_deadline(self) -> float:
        """When `DeadlinePassed` is due; inf when nothing is outstanding."""
        while self._deadlines:
            at, _, torrent = self._deadlines[0]
            if torrent.deadline == at:
                return at
            heapq.heappop(self._deadlines)
        return INFINITY

    def hello(self, digest: Digest) -> Hello | None:
        """The Hello to send on a connection that we dialled; None if the torrent is gone."""
        torrent = self._torrents.get(digest)
        return None if torrent is None else self._hello_of(torrent)

    def torrent(self, digest: Digest) -> Torrent | None:
        """The state of a torrent, to look at."""
        return self._torrents.get(digest)

    def expects(self, connection: int, index: int) -> bool:
        """Whether the bytes of a piece that begins to arrive are worth keeping."""
        torrent = self._by_connection.get(connection)
        return torrent is not None and torrent.expects(connection, index)

    def was_asked(self, connection: int, index: int) -> bool:
        """Whether we ever asked that peer for that piece: one that we did not ask for is an offence."""
        torrent = self._by_connection.get(connection)
        return torrent is not None and torrent.was_asked(connection, index)

    def patience(self, connection: int, index: int) -> float:
        """For how many seconds without a byte a piece may keep from others what it holds while it comes.

        inf as long as its claim is not overdue.
        """
        torrent = self._by_connection.get(connection)
        return 0.0 if torrent is None else torrent.patience(connection, index)

    def statistics(self) -> list[TorrentStatistics]:
        return [torrent.statistics() for torrent in self._torrents.values()]

    def uplink(self) -> Uplink:
        """What the uplink has to do now, to look at."""
        return self._exchange.uplink()

    def neighbours(self, digest: Digest) -> tuple[PeerContact, ...]:
        """Up to `NEIGHBOURS_TOLD` of the agents that are connected for a blob, drawn at random.

        What an origin tells those to whom no tracker answers.
        """
        torrent = self._torrents.get(digest)
        if torrent is None:
            return ()
        agents = [p.contact for p in torrent.peers.values() if p.contact.kind is PeerKind.AGENT]
        return tuple(sample(self._rng, agents, min(NEIGHBOURS_TOLD, len(agents))))

    @property
    def connection_count(self) -> int:
        return len(self._by_connection)

    def check_invariants(self) -> None:
        """For tests and the simulator.  O(everything)."""
        self._exchange.check_invariants()
        connections = 0
        for torrent in self._torrents.values():
            torrent.check_invariants()
            connections += len(torrent.peers)
            for connection in torrent.peers:
                assert self._by_connection[connection] is torrent
            if not torrent.is_complete and not self._draining:
                assert self.next_deadline() < INFINITY, (
                    "work is outstanding and nothing will happen"
                )
        assert connections == len(self._by_connection)
        claims = [
            c for t in self._torrents.values() for p in t.peers.values() for c in p.claims.values()
        ]
        assert self._inbound.slow == sum(claim.slow for claim in claims) <= self._inbound.slow_max
        pending = sum(t.connections.pending_count for t in self._torrents.values())
        assert self._places.taken == connections + pending <= self._places.limit

    # --- torrents -----------------------------------------------------------------------------

    def _torrent_added(self, event: ev.TorrentAdded, now: float) -> None:
        digest = event.shape.digest
        if digest in self._torrents:
            return
        torrent = Torrent(
            event.shape,
            event.namespace,
            event.have,
            verified=event.verified,
            fed=event.fed,
            own_peer_id=self.peer_id,
            host_places=self._places,
            inbound=self._inbound,
            connection_limits=self._limits.connections,
            picker_limits=self._limits.picker,
            rng=self._rng,
        )
        torrent.progress_at = torrent.ticked_at = now
        self._torrents[digest] = torrent
        if event.announce:
            self._announcing.add(digest)
            torrent.announce.due_at = now + self._announce_delay(torrent)
        if torrent.is_complete and not torrent.verified:
            self._outbox.actions.append(act.Finish(digest))
        self._reschedule(torrent)

    def _announce_delay(self, torrent: Torrent) -> float:
        if not torrent.is_complete:
            return 0.0
        spread = min(len(self._torrents) * REANNOUNCE_SPACING, REANNOUNCE_SPREAD_MAX)
        return self._rng.uniform(0.0, spread)

    def _torrent_removed(self, event: ev.TorrentRemoved, now: float) -> None:
        torrent = self._torrents.get(event.digest)
        if torrent is None:
            return
        for connection in list(torrent.peers):
            self._drop(torrent, connection, now, ByeReason.UNKNOWN_TORRENT)
        self._forget(torrent)

    def _forget(self, torrent: Torrent) -> None:
        torrent.connections.close()
        self._say_stopped(torrent)
        del self._torrents[torrent.digest]
        torrent.deadline = INFINITY

    def _say_stopped(self, torrent: Torrent) -> None:
        """Leave the swarm at the trackers, once."""
        if torrent.digest in self._announcing:
            self._announcing.remove(torrent.digest)
            torrent.announce.due_at = INFINITY
            self._outbox.actions.append(
                act.Announce(torrent.digest, torrent.namespace, AnnounceState.STOPPED)
            )

    def _blob_verified(self, event: ev.BlobVerified, now: float) -> None:
        torrent = self._torrents.get(event.digest)
        if torrent is None:
            return
        torrent.verified = torrent.announce.is_news = True
        if event.digest in self._announcing and torrent.announce.outstanding is None:
            torrent.announce.due_at = now
        self._close_useless(torrent, now)
        self._announce_if_due(torrent, now)
        self._reschedule(torrent)

    def _reader_moved(self, event: ev.ReaderMoved, now: float) -> None:
        torrent = self._torrents.get(event.digest)
        if torrent is not None:
            torrent.picker.move_reader(event.reader, event.index)
            self._urge(torrent, now)

    def _reader_closed(self, event: ev.ReaderClosed, _now: float) -> None:
        torrent = self._torrents.get(event.digest)
        if torrent is not None:
            torrent.picker.close_reader(event.reader)

    def _urge(self, torrent: Torrent, now: float) -> None:
        """Say which pieces readers wait for that nobody has yet: an origin is still fetching the blob.

        Who has no peer at all waits for one, and not for pieces.
        """
        if torrent.is_complete or not (torrent.fed or torrent.peers):
            return
        urgent = torrent.urgent_pieces(now)
        if urgent:
            self._outbox.actions.append(act.Urge(torrent.digest, urgent))

    # --- trackers -----------------------------------------------------------------------------

    def _peers_found(self, event: ev.PeersFound, now: float) -> None:
        torrent = self._torrents.get(event.digest)
        if torrent is not None:
            torrent.connections.learn(event.peers)
            self._dial(torrent, now)
            self._reschedule(torrent)

    def _announce_replied(self, event: ev.AnnounceReplied, now: float) -> None:
        torrent = self._torrents.get(event.digest)
        if torrent is None:
            return
        announced, torrent.announce.outstanding = torrent.announce.outstanding, None
        torrent.announce.failures = 0
        torrent.announce.is_known = True
        if announced is AnnounceState.COMPLETE:
            torrent.announce.is_news = False
        if event.digest in self._announcing:
            unheard = torrent.verified and announced is not AnnounceState.COMPLETE
            torrent.announce.due_at = now if unheard else now + event.interval
        torrent.announce.position = event.position
        torrent.connections.learn(event.peers)
        self._dial(torrent, now)
        if torrent.connections.is_alone:
            self._watch_if_short(torrent)
        self._reschedule(torrent)

    def _announce_failed(self, event: ev.AnnounceFailed, now: float) -> None:
        torrent = self._torrents.get(event.digest)
        if torrent is None or event.digest not in self._announcing:
            return
        clock = torrent.announce
        clock.outstanding = None
        clock.is_known = False
        clock.failures += 1
        pause = min(0.5 * 2 ** min(clock.failures, 10), ANNOUNCE_RETRY_MAX)
        clock.due_at = now + pause * self._rng.uniform(0.5, 1.0)
        self._reschedule(torrent)

    def _tracker_lost(self, event: ev.TrackerLost, now: float) -> None:
        """Announce to the successor, which knows nobody, sooner than was due.

        Those who download come first: whoever arrives meanwhile depends on them.
        """
        for digest in event.digests:
            torrent = self._torrents.get(digest)
            if torrent is None or digest not in self._announcing:
                continue
            clock = torrent.announce
            clock.position = None
            clock.is_known = False
            if clock.outstanding is None:
                within = self._rng.uniform(0.0, self._lost_spread(torrent))
                clock.due_at = min(clock.due_at, now + within)
                self._reschedule(torrent)

    def _lost_spread(self, torrent: Torrent) -> float:
        if torrent.is_complete:
            spread = len(self._torrents) * LOST_SEEDING_SPACING
            return min(max(spread, LOST_SEEDING_SPREAD_MIN), REANNOUNCE_SPREAD_MAX)
        is_short = torrent.connections.is_short(torrent.missing_count)
        return LOST_SHORT_SPREAD if is_short else LOST_LEECHING_SPREAD

    def _watch_if_short(self, torrent: Torrent) -> None:
        """Wait for peers to appear while there are fewer connections than the missing pieces can use.

        No spare is waited for: a small blob that has a source is no reason to ask more of the tracker.
        """
        clock = torrent.announce
        if clock.position is None or clock.is_watching or torrent.digest not in self._announcing:
            return
        if not torrent.is_complete and torrent.connections.is_short(torrent.missing_count):
            clock.is_watching = True
            self._outbox.actions.append(act.Watch(torrent.digest, clock.position))

    def _watch_ended(self, event: ev.WatchEnded, now: float) -> None:
        """Dial those who appeared; the next tick, and not this moment, decides whether to go on.

        So the rate of watches is bounded, and in a burst each of them tells of several.
        """
        torrent = self._torrents.get(event.digest)
        if torrent is None:
            return
        torrent.announce.is_watching = False
        torrent.announce.position = event.position
        torrent.connections.learn(event.peers)
        self._dial(torrent, now)
        self._reschedule(torrent)

    def _announce_if_due(self, torrent: Torrent, now: float) -> None:
        clock = torrent.announce
        if clock.due_at > now or clock.outstanding is not None or self._draining:
            return
        if torrent.verified and not clock.is_news:
            self._announce_held(torrent, now)
            return
        state = AnnounceState.COMPLETE if torrent.verified else AnnounceState.LEECHING
        self._announce(torrent, state)

    def _announce(self, torrent: Torrent, state: AnnounceState) -> None:
        torrent.announce.outstanding = state
        torrent.announce.due_at = INFINITY
        self._outbox.actions.append(act.Announce(torrent.digest, torrent.namespace, state))

    def _announce_held(self, torrent: Torrent, now: float) -> None:
        """Say that we still have a blob, and the same of those for which it is due before long."""
        held = [each for each in self._torrents.values() if _may_go_along(each, now)]
        if len(held) == 1:
            self._announce(torrent, AnnounceState.COMPLETE)
            return
        for each in held:
            each.announce.outstanding = AnnounceState.COMPLETE
            each.announce.due_at = INFINITY
            self._reschedule(each)
        self._outbox.actions.append(act.AnnounceHeld(tuple(each.digest for each in held)))

    # --- connections --------------------------------------------------------------------------

    def _dial(self, torrent: Torrent, now: float) -> None:
        """Dial as many known peers as the missing pieces can use: one for a small blob, and a spare."""
        if torrent.is_complete or torrent.fed or self._draining:
            return
        for contact in torrent.connections.dials(torrent.missing_count + 1, now):
            self._outbox.actions.append(act.Dial(torrent.digest, contact))

    def _ask_origins_if_starved(self, torrent: Torrent, now: float) -> None:
        """Whoever is full of peers that have nothing, as it is itself, must not stay so."""
        if torrent.is_starved(now) and not self._draining:
            for contact in torrent.connections.dials_to_origins(now):
                self._outbox.actions.append(act.Dial(torrent.digest, contact))

    def _dial_failed(self, event: ev.DialFailed, now: float) -> None:
        torrent = self._torrents.get(event.digest)
        if torrent is None:
            return
        torrent.connections.dial_failed(event.peer_id, now)
        if event.is_gone:
            torrent.connections.forget(event.peer_id)
        self._dial(torrent, now)
        self._reschedule(torrent)

    def _peer_connected(self, event: ev.PeerConnected, now: float) -> None:
        torrent = self._torrents.get(event.hello.digest)
        try:
            refusal = self._refusal(torrent, event, now)
            have = bitfield.from_bytes(event.hello.have, event.hello.piece_count)
        except ProtocolError as error:
            refusal, have = (ByeReason.PROTOCOL_ERROR, error.reason), 0
        if torrent is None or refusal is not None:
            reason, text = refusal or (ByeReason.UNKNOWN_TORRENT, "")
            self._outbox.actions.append(act.Close(event.connection, reason, text))
            if torrent is not None and event.announced is not None:
                self._dial_failed(ev.DialFailed(torrent.digest, event.hello.peer_id), now)
            return
        torrent.connections.connected(event.hello.peer_id, event.connection)
        timing = PieceTiming(self._inbound.timing, torrent.piece_scale)
        peer = Peer(event.connection, event.contact, have, now, timing=timing)
        torrent.add_peer(peer)
        self._by_connection[event.connection] = torrent
        self._greet(torrent, peer, event.announced)
        self._exchange.joined(torrent, peer, now)
        self._urge(torrent, now)
        self._reschedule(torrent)

    def _refusal(
        self, torrent: Torrent | None, event: ev.PeerConnected, now: float
    ) -> tuple[ByeReason, str] | None:
        """Why a connection cannot stand, if it cannot."""
        if self._draining:
            return ByeReason.DRAINING, ""
        if torrent is None:
            return ByeReason.UNKNOWN_TORRENT, ""
        hello = event.hello
        if hello.piece_count != torrent.piece_count:
            raise ProtocolError(f"{hello.piece_count} pieces, not {torrent.piece_count}")
        have = bitfield.from_bytes(hello.have, hello.piece_count)
        if torrent.is_complete and have == torrent.full:
            return ByeReason.USELESS, "both complete"
        if torrent.connections.is_banned(hello.peer_id, now):
            return ByeReason.CORRUPT, "it sent a wrong piece before"
        if event.announced is not None and torrent.connections.is_pending(hello.peer_id):
            return None  # its place is reserved
        if torrent.connections.is_refused(hello.peer_id, now) and have != torrent.full:
            return ByeReason.BUSY, "backed off"
        return self._admission(torrent, hello.peer_id, have, now)

    def _admission(
        self, torrent: Torrent, peer_id: str, have: int, now: float
    ) -> tuple[ByeReason, str] | None:
        admission = torrent.connections.admit(peer_id)
        if admission is Admission.BUSY and self._make_room(torrent, have, now):
            admission = torrent.connections.admit(peer_id)
        if admission is Admission.ACCEPT:
            return None
        if admission is Admission.DUPLICATE:
            return ByeReason.DUPLICATE, ""
        return ByeReason.BUSY, "no room"

    def _make_room(self, torrent: Torrent, have: int, now: float) -> bool:
        """Let go of a peer for a newcomer that has the pieces ``have``, if there is one to let go of."""
        idle = [p for p in torrent.peers.values() if not self._exchange.is_busy(p.connection)]
        evicted = min(idle, key=lambda peer: peer.useful_at, default=None)
        if evicted is None or now - evicted.useful_at < EVICTABLE_AFTER:
            if now - torrent.evicted_at < EVICTION_SPACING:
                return False
            evicted = self._most_advanced(torrent, idle, have)
            if evicted is None:
                return False
            torrent.evicted_at = now
        self._drop(torrent, evicted.connection, now, ByeReason.USELESS)
        self._exchange.freed(torrent, now)
        return True

    def _most_advanced(self, torrent: Torrent, peers: list[Peer], have: int) -> Peer | None:
        """Of the peers that owe us nothing the one with most pieces, if a newcomer lags far behind it."""
        owing_nothing = [peer for peer in peers if not peer.claims]
        if not owing_nothing:
            return None
        most = max(owing_nothing, key=lambda peer: peer.have.bit_count())
        lead = most.have.bit_count() - have.bit_count()
        return most if lead > EVICTION_LEAD * torrent.piece_count else None

    def _greet(self, torrent: Torrent, peer: Peer, announced: int | None) -> None:
        """Bring the other side up to date about our pieces."""
        if announced is None:
            self._send(peer.connection, self._hello_of(torrent))
            return
        if torrent.is_complete:
            self._send(peer.connection, HaveAll())
            return
        for index in bitfield.indices(torrent.have & ~announced):
            self._send(peer.connection, Have(index))

    def _peer_disconnected(self, event: ev.PeerDisconnected, now: float) -> None:
        torrent = self._by_connection.get(event.connection)
        if torrent is None:
            return
        self._remove_peer(torrent, event.connection, now)
        self._recover(torrent, now)

    def _drop(
        self, torrent: Torrent, connection: int, now: float, reason: ByeReason, text: str = ""
    ) -> None:
        """Close a connection by our own decision."""
        self._remove_peer(torrent, connection, now)
        self._outbox.actions.append(act.Close(connection, reason, text))

    def _remove_peer(self, torrent: Torrent, connection: int, now: float) -> None:
        peer = torrent.remove_peer(connection)
        del self._by_connection[connection]
        torrent.connections.lost(peer.contact.peer_id, now)
        self._exchange.left(torrent, peer, now)

    def _recover(self, torrent: Torrent, now: float) -> None:
        """After a loss: dial others, and claim what became free elsewhere."""
        self._dial(torrent, now)
        self._exchange.freed(torrent, now)
        self._reschedule(torrent)

    def _close_useless(self, torrent: Torrent, now: float) -> None:
        """No two complete peers stay connected."""
        for peer in list(torrent.peers.values()):
            self._close_if_done(torrent, peer, now)

    def _close_if_done(self, torrent: Torrent, peer: Peer, now: float) -> None:
        """Let go of a peer that is being sent nothing and will not be again."""
        if self._exchange.is_busy(peer.connection):
            return
        if self._draining:
            self._drop(torrent, peer.connection, now, ByeReason.DRAINING)
        elif torrent.verified and peer.have == torrent.full:
            self._drop(torrent, peer.connection, now, ByeReason.USELESS)

    # --- messages -----------------------------------------------------------------------------

    def _message_received(self, event: ev.MessageReceived, now: float) -> None:
        torrent = self._by_connection.get(event.connection)
        if torrent is None:
            return
        peer = torrent.peers[event.connection]
        message = event.message
        kind = type(message)
        if kind is Have:
            self._have_received(torrent, peer, message.index, now)  # type: ignore[union-attr]
        elif kind is HaveAll:
            torrent.peer_completed(peer)
            self._exchange.gained(torrent, peer, -1, now)
            self._close_if_done(torrent, peer, now)
        elif _is_sound(message, torrent.piece_count):
            self._exchange.received(torrent, peer, message, now)
            if (kind is Cancel or kind is Pass) and (torrent.verified or self._draining):
                self._close_if_done(torrent, peer, now)
        elif kind is not Bye:
            self._drop(torrent, peer.connection, now, ByeReason.PROTOCOL_ERROR, repr(message))
            self._recover(torrent, now)

    def _have_received(self, torrent: Torrent, peer: Peer, index: int, now: float) -> None:
        # By far the most frequent message.
        if not 0 <= index < torrent.piece_count:
            self._drop(torrent, peer.connection, now, ByeReason.PROTOCOL_ERROR, f"have {index}")
            self._recover(torrent, now)
            return
        torrent.peer_gained(peer, index)
        self._exchange.gained(torrent, peer, index, now)
        if torrent.verified:
            self._close_if_done(torrent, peer, now)

    def _send_progress(self, event: ev.SendProgress, now: float) -> None:
        torrent = self._by_connection.get(event.connection)
        if torrent is not None:
            torrent.peers[event.connection].useful_at = now
            self._exchange.progressed(event.connection, event.index, now)

    def _piece_sent(self, event: ev.PieceSent, now: float) -> None:
        self._exchange.sent(event.connection, event.index, now)
        torrent = self._by_connection.get(event.connection)
        if torrent is not None:
            peer = torrent.peers[event.connection]
            peer.useful_at = now
            self._close_if_done(torrent, peer, now)

    # --- pieces -------------------------------------------------------------------------------

    def _piece_progress(self, event: ev.PieceProgress, now: float) -> None:
        torrent = self._by_connection.get(event.connection)
        if torrent is not None:
            torrent.heard(torrent.peers[event.connection], event.index, now)

    def _piece_received(self, event: ev.PieceReceived, now: float) -> None:
        torrent = self._by_connection.get(event.connection)
        if torrent is None:
            return
        peer = torrent.peers[event.connection]
        if torrent.received(peer, event.index, now):
            self._withdraw_elsewhere(torrent, event.index, event.connection)
        self._exchange.arrived(torrent, peer, now)

    def _withdraw_elsewhere(self, torrent: Torrent, index: int, connection: int) -> None:
        for other in torrent.other_claimants(index, connection):
            torrent.withdraw(other, index)
            self._send(other.connection, Cancel(index))

    def _piece_stored(self, event: ev.PieceStored, now: float) -> None:
        torrent = self._torrents.get(event.digest)
        if torrent is not None and torrent.stored(event.index, now):
            self._piece_gained(torrent, event.index)

    def _piece_fetched(self, event: ev.PieceFetched, now: float) -> None:
        torrent = self._torrents.get(event.digest)
        if torrent is not None and torrent.fetched(event.index, now):
            self._piece_gained(torrent, event.index)

    def _piece_gained(self, torrent: Torrent, index: int) -> None:
        self._tell_peers(torrent, index)
        if torrent.is_complete:
            self._outbox.actions.append(act.Finish(torrent.digest))
            self._reschedule(torrent)

    def _tell_peers(self, torrent: Torrent, index: int) -> None:
        """Tell of a new piece those who lack it; of the last one, everybody, in one word.

        Who has a piece never asks for it again, so it need not know who else has.
        """
        lacking = [p.connection for p in torrent.peers.values() if not (p.have >> index) & 1]
        message: Message = Have(index)
        if torrent.is_complete:
            lacking = list(torrent.peers)
            message = HaveAll()
        if lacking:
            self._outbox.actions.append(act.SendAll(tuple(lacking), message))

    def _piece_rejected(self, event: ev.PieceRejected, now: float) -> None:
        torrent = self._torrents.get(event.digest)
        if torrent is None:
            return
        sender = torrent.rejected(event.index)
        if sender is None:
            return
        for peer in list(torrent.peers.values()):
            if peer.contact.peer_id == sender:
                self._drop(torrent, peer.connection, now, ByeReason.CORRUPT, f"piece {event.index}")
        torrent.connections.ban(sender, now)
        self._recover(torrent, now)

    def _piece_lost(self, event: ev.PieceLost, now: float) -> None:
        torrent = self._torrents.get(event.digest)
        if torrent is not None:
            torrent.rejected(event.index)
            self._exchange.freed(torrent, now)

    # --- time ---------------------------------------------------------------------------------

    def _deadline_passed(self, _event: ev.DeadlinePassed, now: float) -> None:
        for connection in self._exchange.tick(now):
            torrent = self._by_connection[connection]
            self._drop(torrent, connection, now, ByeReason.STALLED)
            self._recover(torrent, now)
        for due in self._due(now):
            self._tick(due, now)

    def _due(self, now: float) -> list[Torrent]:
        due = []
        while self._deadlines and self._deadlines[0][0] <= now:
            at, _, torrent = heapq.heappop(self._deadlines)
            if torrent.deadline == at:
                torrent.deadline = INFINITY
                due.append(torrent)
        return due

    def _tick(self, torrent: Torrent, now: float) -> None:
        torrent.ticked_at = now
        if self._fail_if_stalled(torrent, now):
            return
        torrent.connections.expire(now)
        self._take_back_late_claims(torrent, now)
        self._close_idle(torrent, now)
        self._close_useless(torrent, now)
        self._announce_if_due(torrent, now)
        self._recover(torrent, now)
        self._ask_origins_if_starved(torrent, now)
        self._watch_if_short(torrent)
        self._urge(torrent, now)

    def _fail_if_stalled(self, torrent: Torrent, now: float) -> bool:
        if torrent.is_complete or torrent.fed or self._draining:
            return False
        if now < torrent.progress_at + self._limits.stall_timeout:
            return False
        for connection in list(torrent.peers):
            self._drop(torrent, connection, now, ByeReason.USELESS)
        reason = (
            f"no piece for {self._limits.stall_timeout:.0f} s, "
            f"{torrent.missing_count} of {torrent.piece_count} pieces missing"
        )
        self._outbox.actions.append(act.Fail(torrent.digest, reason))
        self._forget(torrent)
        return True

    def _take_back_late_claims(self, torrent: Torrent, now: float) -> None:
        late_peers: dict[int, Peer] = {}
        for peer, index in torrent.late_claims(now):
            if peer.claims[index].claimed_at >= peer.late_at:
                late_peers[peer.connection] = peer
            torrent.withdraw(peer, index)
            self._send(peer.connection, Cancel(index))
        for peer in late_peers.values():
            peer.late_at = now
            peer.timing.back_off()
            peer.late_in_a_row += 1
            if peer.late_in_a_row >= LATE_IN_A_ROW_MAX:
                self._drop(torrent, peer.connection, now, ByeReason.STALLED)

    def _close_idle(self, torrent: Torrent, now: float) -> None:
        timeout = self._limits.connections.idle_timeout
        for peer in list(torrent.peers.values()):
            if peer.useful_at + timeout <= now and not self._in_use(peer):
                self._drop(torrent, peer.connection, now, ByeReason.USELESS)

    def _in_use(self, peer: Peer) -> bool:
        return bool(peer.claims) or self._exchange.is_busy(peer.connection)

    def _drain_started(self, _event: ev.DrainStarted, now: float) -> None:
        self._draining = True
        self._exchange.drain()
        for torrent in self._torrents.values():
            for connection in list(torrent.peers):
                if not self._exchange.is_busy(connection):
                    self._drop(torrent, connection, now, ByeReason.DRAINING)
            self._say_stopped(torrent)
            self._reschedule(torrent)

    def _reschedule(self, torrent: Torrent) -> None:
        """Work out when this torrent needs attention next."""
        deadline = self._torrent_deadline(torrent)
        if torrent.deadline == deadline:
            return
        torrent.deadline = deadline
        if deadline < INFINITY:
            self._serial += 1
            heapq.heappush(self._deadlines, (deadline, self._serial, torrent))

    def _torrent_deadline(self, torrent: Torrent) -> float:
        """The next announce, or the next look at claims, dials and idle peers.

        Those have deadlines by the dozen that move with every message; looking four times a second costs
        less than keeping their minimum, and none of them needs to be met more exactly.
        """
        if self._draining:
            return torrent.ticked_at + SEEDING_TICK if torrent.peers else INFINITY
        deadline = torrent.announce.due_at
        if not torrent.is_complete:
            return min(deadline, torrent.ticked_at + LEECHING_TICK)
        if torrent.peers:
            return min(deadline, torrent.ticked_at + SEEDING_TICK)
        return deadline

    # --- small things -------------------------------------------------------------------------

    def _send(self, connection: int, message: Message) -> None:
        self._outbox.actions.append(act.Send(connection, message))

    def _hello_of(self, torrent: Torrent) -> Hello:
        return Hello(
            digest=torrent.digest,
            namespace=torrent.namespace,
            peer_id=self.peer_id,
            kind=self._kind,
            port=self._port,
            piece_count=torrent.piece_count,
            have=bitfield.to_bytes(torrent.have, torrent.piece_count),
        )


def _may_go_along(torrent: Torrent, now: float) -> bool:
    """Whether a blob that we have may be announced again now, because another one is."""
    clock = torrent.announce
    ahead = HELD_AHEAD if clock.is_known else HELD_AHEAD_UNKNOWN
    return (
        torrent.verified
        and clock.outstanding is None
        and not clock.is_news
        and clock.due_at <= now + ahead
    )


def _is_sound(message: Any, piece_count: int) -> bool:  # noqa: ANN401 - decided by type just below
    """Whether a message of the exchange speaks of pieces that exist."""
    kind = type(message)
    if kind is Want:
        return True
    if kind in (Offer, Pass):
        return bool(-1 <= message.index < piece_count)
    return kind in (Claim, Cancel) and bool(0 <= message.index < piece_count)


def contact_of(hello: Hello, host: str) -> PeerContact:
    """Where a peer that dialled us can be found again: at the port that it says it listens on."""
    return PeerContact(hello.peer_id, host, hello.port, hello.kind)
