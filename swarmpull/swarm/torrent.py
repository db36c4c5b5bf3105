"""One torrent: which pieces are where, which are claimed, and what each peer owes us.

A piece is in exactly one state: missing, claimed (at one peer, or at two in the endgame), verifying
(received, its hash being checked), or had.  This module is the bookkeeping, with its invariants; what to
claim is the policy's decision, whom to be connected to is `ConnectionTable`'s, and the `Scheduler` puts
them together.  Everything here is O(1) or O(peers), except where a docstring says otherwise.
"""

from __future__ import annotations

import random
from typing import Final

import attrs

from swarmpull.digest import Digest
from swarmpull.swarm import bitfield
from swarmpull.swarm.connections import ConnectionLimits, ConnectionTable, HostPlaces
from swarmpull.swarm.metainfo import PIECE_LENGTH_MIN, BlobShape
from swarmpull.swarm.peers import AnnounceState, PeerContact, PeerKind
from swarmpull.swarm.picker import Availability, Picker, PickerLimits
from swarmpull.swarm.timing import PieceTiming

# A link that lost a packet, or shares its path with others, may be silent for about so many seconds.
SILENCE_MIN: Final = 1.0
# Hosts that know only each other do not get on by themselves: so many seconds without a piece, or bytes of
# one, and without anybody who has one, tell that.
STARVED_AFTER: Final = 3.0
# How often readers' needs are told to those who fetch, in seconds, each piece and all of a torrent; and how
# many pieces at a time.
URGE_AGAIN_AFTER: Final = 2.0
URGE_SPACING: Final = 0.1
URGES_MAX: Final = 16


@attrs.define
class ClaimRecord:
    """A claim of ours that is outstanding: when it was made, and when it is late.

    Attributes:
        heard_at: when bytes last arrived of it, or of what the same peer sends before it; None until then.
        overdue: it takes longer than pieces do on this host, and may be claimed elsewhere as well.
        slow: it is overdue and not late only because its bytes keep arriving.
    """

    claimed_at: float
    late_at: float
    heard_at: float | None = None
    overdue: bool = False
    slow: bool = False

    def heard(self, now: float, timeout: float) -> None:
        """Bytes arrive: it is late only ``timeout`` seconds from now."""
        self.heard_at = now
        self.late_at = now + timeout


@attrs.define(eq=False)
class Inbound:
    """What all torrents of this host share as they download.

    Attributes:
        claims: that are outstanding and not overdue: a slow uploader must not use up the room for those
            that deliver.
        slow: claims that are overdue while their bytes keep arriving.
        slow_max: how many of those are waited for.  Each has a buffer, of which there are more, so that peers
            which only trickle leave room for those that deliver.
        timing: of the pieces of all peers.
    """

    claims: int = 0
    slow: int = 0
    slow_max: int = 4
    timing: PieceTiming = attrs.field(factory=PieceTiming)
    _expected: dict[tuple[int, int], tuple[Torrent, ClaimRecord]] = attrs.field(factory=dict)
    _coming: dict[tuple[int, int], tuple[Torrent, ClaimRecord]] = attrs.field(factory=dict)

    def add(self, torrent: Torrent, peer: Peer, index: int, record: ClaimRecord) -> None:
        self.claims += 1
        self._expected[peer.connection, index] = (torrent, record)

    def remove(self, peer: Peer, index: int, record: ClaimRecord) -> None:
        if record.overdue:
            self._coming.pop((peer.connection, index), None)
        else:
            self.claims -= 1
            del self._expected[peer.connection, index]
        self.slow -= record.slow

    def waits_for(self, record: ClaimRecord) -> bool:
        """Whether a claim whose bytes keep arriving may take as long as they do."""
        if record.overdue and not record.slow and self.slow < self.slow_max:
            record.slow = True
            self.slow += 1
        return record.slow or not record.overdue

    def find_overdue(self, now: float) -> bool:
        """Mark the claims that take too long; whether there were any that did not before.

        Claims are looked at in the order in which they were made, so this costs as much as it finds; one of
        longer pieces may keep those behind it from being found until it is settled itself.
        """
        found = False
        while self._expected:
            key, (torrent, record) = next(iter(self._expected.items()))
            if not self._takes_too_long(torrent, record, now):
                break
            del self._expected[key]
            self.claims -= 1
            record.overdue = True
            found = True
            # Before any piece has come, one whose bytes keep arriving may be as fast as they get here.
            if record.heard_at is not None and not self.timing.is_measured:
                self._coming[key] = (torrent, record)
            else:
                torrent.now_overdue(key[1])
        return self._find_too_slow(now) or found

    def _find_too_slow(self, now: float) -> bool:
        """Of those that were coming before anything was known, the ones that turn out to be slow."""
        if not self._coming or not self.timing.is_measured:
            return False
        slow = [key for key, entry in self._coming.items() if self._takes_too_long(*entry, now)]
        for key in slow:
            torrent, _ = self._coming.pop(key)
            torrent.now_overdue(key[1])
        return bool(slow)

    def _takes_too_long(self, torrent: Torrent, record: ClaimRecord, now: float) -> bool:
        return now - record.claimed_at >= self.timing.usual() * torrent.piece_scale


@attrs.define(eq=False)
class Peer:
    """One active connection.

    Attributes:
        connection: its number.
        contact: who it is.
        have: the pieces it has, as a bitfield.
        claims: what we claimed there, oldest first.
        cancelled: claims that we took back or that it passed; the piece may be under way all the same and
            is not an offence.
        passed: pieces it would not give us, until it gives us one or tells of another.
        late_in_a_row: claims that came late, or not at all, since its last piece.
        late_at: when that was last noticed; what was claimed before that says nothing new.
        useful_at: when a piece last went either way.
        gave: whether a piece ever came from it.
    """

    connection: int
    contact: PeerContact
    have: int
    useful_at: float
    claims: dict[int, ClaimRecord] = attrs.field(factory=dict)
    cancelled: set[int] = attrs.field(factory=set)
    passed: int = 0
    late_in_a_row: int = 0
    late_at: float = float("-inf")
    timing: PieceTiming = attrs.field(factory=PieceTiming)
    gave: bool = False

    @property
    def is_proven(self) -> bool:
        """Whether it gives what is claimed there, as far as we know."""
        return self.gave and not self.late_in_a_row


@attrs.define
class AnnounceClock:
    """When the tracker hears from us next, and what it has not answered yet.

    Attributes:
        due_at: of the next announce.
        outstanding: what the announce says that is not answered yet.
        failures: in a row.
        is_news: no tracker has heard yet that this host has got all of the blob.
        is_known: the last announce was answered, and nothing has been lost since.
        position: from where a watch may go on; None when there is to be none before the next announce.
        is_watching: whether one is open.
    """

    due_at: float = float("inf")
    outstanding: AnnounceState | None = None
    failures: int = 0
    is_news: bool = False
    is_known: bool = False
    position: int | None = None
    is_watching: bool = False


class Torrent:
    """The state of one blob on this host.

    Attributes:
        have: pieces that are verified and on disk.
        verifying: pieces whose hash is being checked, of which `PieceStored`, `PieceRejected` or
            `PieceLost` will tell.
        claimed: pieces that somebody owes us.
        overdue: of those, the ones that a single peer owes us and takes too long over.
        verified: whether the whole blob has matched its digest and is in the store.
        fed: its missing pieces come from outside of the swarm; nothing is claimed from peers.
        urged: when a piece that a reader waits for was last said to be urgent.
        progress_at: when the torrent was added, a piece last stored, or bytes of a missing one last arrived.
        evicted_at: when a peer that was of use last had to go for a newcomer.
        ticked_at: when the scheduler last looked after what has a deadline; ``deadline``: when it is to do
            so next, inf for never.
    """

    def __init__(
        self,
        shape: BlobShape,
        namespace: str,
        have: int,
        *,
        verified: bool,
        fed: bool = False,
        own_peer_id: str,
        host_places: HostPlaces,
        inbound: Inbound,
        connection_limits: ConnectionLimits,
        picker_limits: PickerLimits,
        rng: random.Random,
    ) -> None:
        self.shape = shape
        self.namespace = namespace
        self.piece_count = shape.piece_count
        self.full = bitfield.full(self.piece_count)
        self.have = have
        self.verifying = 0
        self.peers: dict[int, Peer] = {}
        self.connections = ConnectionTable(own_peer_id, connection_limits, host_places)
        self.availability = Availability(self.piece_count)
        self.picker = Picker(self.availability, picker_limits, rng)
        self.announce = AnnounceClock()
        self.verified = verified
        self.fed = fed
        self.urged: dict[int, float] = {}
        self.urged_at = float("-inf")
        self.progress_at = 0.0
        self.evicted_at = float("-inf")
        self.claimed = 0
        self.overdue = 0
        self.ticked_at = 0.0
        self.deadline = float("inf")
        self._claimants: dict[int, int] = {}
        self._inbound = inbound
        self._senders: dict[int, str] = {}  # of the pieces that are being verified, by peer id

    @property
    def digest(self) -> Digest:
        return self.shape.digest

    @property
    def is_complete(self) -> bool:
        """Whether every piece is stored."""
        return self.have == self.full

    @property
    def is_only_leecher(self) -> bool:
        """Whether every peer that we know has everything.  O(peers)."""
        return all(peer.have == self.full for peer in self.peers.values())

    def is_starved(self, now: float) -> bool:
        """Whether for some time no peer has had anything for us.  O(peers)."""
        if self.is_complete or self.claimed or now - self.progress_at < STARVED_AFTER:
            return False
        return not any(self.free_pieces(peer) for peer in self.peers.values())

    @property
    def piece_scale(self) -> float:
        """How many pieces of the smallest length one of these makes."""
        return self.shape.piece_length / PIECE_LENGTH_MIN

    @property
    def missing_count(self) -> int:
        return self.piece_count - self.have.bit_count()

    # --- peers --------------------------------------------------------------------------------

    def add_peer(self, peer: Peer) -> None:
        self.peers[peer.connection] = peer
        self.availability.add(peer.have)

    def remove_peer(self, connection: int) -> Peer:
        """Forget a peer; what was claimed there is free again.  O(pieces it has)."""
        peer = self.peers.pop(connection)
        for index in list(peer.claims):
            self._release(peer, index)
        self.availability.remove(peer.have)
        return peer

    def peer_gained(self, peer: Peer, index: int) -> None:
        """A peer told of one more piece."""
        peer.have = self.availability.gain(peer.have, index)
        peer.passed = 0

    def peer_completed(self, peer: Peer) -> None:
        """A peer told that it has everything."""
        self.availability.remove(peer.have)
        self.availability.add(self.full)
        peer.have = self.full
        peer.passed = 0

    # --- claims -------------------------------------------------------------------------------

    def free_pieces(self, peer: Peer) -> int:
        """The pieces that this peer has and we neither have nor expect from anyone."""
        if self.fed:
            return 0
        return peer.have & ~(self.have | self.verifying | self.claimed | peer.passed)

    def overdue_pieces(self, peer: Peer) -> int:
        """The pieces that this peer has and another one takes too long over.  O(claims at this peer)."""
        pieces = peer.have & self.overdue & ~peer.passed
        for index in peer.claims:
            pieces &= ~(1 << index)
        return pieces

    def owed_pieces(self, peer: Peer, claimants_max: int) -> int:
        """In the endgame: pieces that this peer has and fewer than ``claimants_max`` others owe us.

        Empty as long as any missing piece is unclaimed.  O(claimed pieces).
        """
        if self.full & ~(self.have | self.verifying | self.claimed):
            return 0
        owed = peer.have & self.claimed & ~peer.passed
        for index in bitfield.indices(owed):
            if index in peer.claims or self._claimants[index] >= claimants_max:
                owed &= ~(1 << index)
        return owed

    def claim(self, peer: Peer, index: int, now: float) -> None:
        """Record a claim at a peer."""
        record = peer.claims[index] = ClaimRecord(now, now + peer.timing.timeout())
        self._claimants[index] = self._claimants.get(index, 0) + 1
        self._inbound.add(self, peer, index, record)
        self.claimed |= 1 << index
        self.overdue &= ~(1 << index)

    def now_overdue(self, index: int) -> None:
        """A claim of this piece takes too long: another peer may be asked for it, but no third one."""
        if self._claimants[index] == 1:
            self.overdue |= 1 << index

    def passed(self, peer: Peer, index: int) -> None:
        """The peer will not give this piece: it is free for others."""
        peer.passed |= 1 << index
        if index in peer.claims:
            self.withdraw(peer, index)

    def withdraw(self, peer: Peer, index: int) -> None:
        """Take a claim back; the piece may be under way already."""
        self._release(peer, index)
        peer.cancelled.add(index)

    def late_claims(self, now: float) -> list[tuple[Peer, int]]:
        """Claims that should have been answered by now.  O(claims).

        A claim that was made when nothing was known yet is judged by what has been learnt since.
        """
        late = []
        for peer in self.peers.values():
            if peer.claims:
                learnt = now - peer.timing.timeout()
                for index, record in peer.claims.items():
                    unheard = record.heard_at is None and record.claimed_at <= learnt
                    if record.late_at <= now or unheard:
                        late.append((peer, index))
        return late

    def heard(self, peer: Peer, index: int, now: float) -> None:
        """More bytes of a piece have arrived.  O(claims at this peer).

        Its claim is late so much later, and so are those behind it, for a peer sends one piece after the
        other.  What was cancelled earns nothing but that the peer is not idle.
        """
        peer.useful_at = now
        if self.expects(peer.connection, index):
            self.progress_at = now
        record = peer.claims.get(index)
        if record is not None and self._inbound.waits_for(record):
            timeout = peer.timing.progress_timeout()
            for behind in peer.claims.values():
                behind.heard(now, timeout)

    def other_claimants(self, index: int, connection: int) -> list[Peer]:
        """The peers besides ``connection`` that owe us this piece."""
        if index not in self._claimants:
            return []
        return [p for p in self.peers.values() if p.connection != connection and index in p.claims]

    # --- pieces -------------------------------------------------------------------------------

    def expects(self, connection: int, index: int) -> bool:
        """Whether a piece that begins to arrive on this connection is still needed."""
        peer = self.peers.get(connection)
        if peer is None or (index not in peer.claims and index not in peer.cancelled):
            return False
        return not ((self.have | self.verifying) >> index) & 1

    def was_asked(self, connection: int, index: int) -> bool:
        """Whether we ever asked this peer for this piece and have not received it since."""
        peer = self.peers.get(connection)
        return peer is not None and (index in peer.claims or index in peer.cancelled)

    def patience(self, connection: int, index: int) -> float:
        """Seconds of silence that a piece on its way is allowed while others wait for its room.

        What has been taken back, or is overdue, gets the time of a whole piece: that of its peer if that one
        has given any, however slow, else that of this host.
        """
        peer = self.peers[connection]
        record = peer.claims.get(index)
        if record is not None and not record.overdue:
            return float("inf")
        if peer.gave:
            return peer.timing.timeout()
        return max(self._inbound.timing.usual(), SILENCE_MIN) * self.piece_scale

    def received(self, peer: Peer, index: int, now: float) -> bool:
        """All bytes of a piece are here; whether it is to be verified.

        True exactly when `expects` was true just before.
        """
        if not self.was_asked(peer.connection, index):
            return False
        wanted = self.expects(peer.connection, index)
        record = peer.claims.get(index)
        if record is not None:
            is_short = self.shape.piece_size(index) < PIECE_LENGTH_MIN
            peer.timing.add(now - record.claimed_at, is_short=is_short)
            self._release(peer, index)
        else:
            # Not after a claim that stands: what was cancelled before it may have left as well.
            peer.cancelled.discard(index)
        peer.late_in_a_row = 0
        peer.passed = 0
        peer.useful_at = now
        if not peer.gave:
            peer.gave = True
            self.connections.proved(peer.contact.peer_id)
        if wanted:
            self.verifying |= 1 << index
            self._senders[index] = peer.contact.peer_id
        return wanted

    def stored(self, index: int, now: float) -> bool:
        """A piece is verified and on disk; False when it was not being verified.

        The report of a piece may come from an earlier life of the torrent, which was removed and added
        again meanwhile: what that one stored is not ours.
        """
        if self._senders.pop(index, None) is None:
            return False
        self.verifying &= ~(1 << index)
        self.have |= 1 << index
        self.progress_at = now
        return True

    def fetched(self, index: int, now: float) -> bool:
        """A piece has come from outside of the swarm; False when it was had, or this torrent is not fed."""
        if not self.fed or (self.have >> index) & 1:
            return False
        self.have |= 1 << index
        self.progress_at = now
        return True

    def urgent_pieces(self, now: float) -> tuple[int, ...]:
        """The pieces that readers wait for and nobody has, as far as that was not said just now.

        O(readers).
        """
        if now - self.urged_at < URGE_SPACING:
            return ()
        lacking = [index for index in self.picker.waited_for if self._is_lacking(index)]
        self.urged = {i: at for i, at in self.urged.items() if at + URGE_AGAIN_AFTER > now}
        urgent = tuple(index for index in lacking if index not in self.urged)[:URGES_MAX]
        if urgent:
            self.urged_at = now
            self.urged.update(dict.fromkeys(urgent, now))
        return urgent

    def _is_lacking(self, index: int) -> bool:
        return not ((self.have | self.verifying) >> index) & 1 and not self.availability[index]

    def rejected(self, index: int) -> str | None:
        """A piece was not stored and is missing again; returns the id of the peer that sent it.

        None when it was not being verified.
        """
        sender = self._senders.pop(index, None)
        if sender is not None:
            self.verifying &= ~(1 << index)
        return sender

    # --- introspection ------------------------------------------------------------------------

    def check_invariants(self) -> None:
        """For tests and the simulator.  O(peers x pieces)."""
        assert not self.have & self.verifying, "a piece is had or verifying, not both"
        assert not self.claimed & (self.have | self.verifying), "what is had is not claimed"
        assert self.have & ~self.full == 0
        claimants: dict[int, int] = {}
        for peer in self.peers.values():
            for index, record in peer.claims.items():
                assert (peer.have >> index) & 1, "claimed where it is not"
                assert record.late_at >= (record.heard_at or record.claimed_at) >= record.claimed_at
                assert record.slow <= record.overdue
                claimants[index] = claimants.get(index, 0) + 1
        assert claimants == self._claimants
        assert not self.overdue & ~self.claimed
        assert self.verifying == sum(1 << index for index in self._senders)
        assert self.claimed == sum(1 << index for index in claimants)
        for index in range(self.piece_count):
            having = sum((peer.have >> index) & 1 for peer in self.peers.values())
            assert self.availability[index] == having, f"availability of piece {index} drifted"
        self.connections.check_invariants()
        assert self.connections.active_count == len(self.peers)

    def statistics(self) -> TorrentStatistics:
        return TorrentStatistics(
            digest=self.digest,
            length=self.shape.length,
            pieces=self.piece_count,
            have=self.have.bit_count(),
            claimed=len(self._claimants),
            verifying=self.verifying.bit_count(),
            agents=self._count(PeerKind.AGENT),
            origins=self._count(PeerKind.ORIGIN),
            pending=self.connections.pending_count,
        )

    def _count(self, kind: PeerKind) -> int:
        return sum(peer.contact.kind is kind for peer in self.peers.values())

    def _release(self, peer: Peer, index: int) -> None:
        self._inbound.remove(peer, index, peer.claims.pop(index))
        self.overdue &= ~(1 << index)
        left = self._claimants[index] - 1
        if left:
            self._claimants[index] = left
        else:
            del self._claimants[index]
            self.claimed &= ~(1 << index)


@attrs.frozen(kw_only=True)
class TorrentStatistics:
    """A snapshot: pieces in all, had, claimed and verifying; active peers by kind; pending dials."""

    digest: Digest
    length: int
    pieces: int
    have: int
    claimed: int
    verifying: int
    agents: int
    origins: int
    pending: int
