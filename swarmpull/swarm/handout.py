"""The tracker's knowledge of who takes part in which swarm, and whom it hands out to whom.

A handout is up to 50 peers.  Agents that have completed and those in progress are drawn in proportion and
mixed, because each has one uplink: were the completed ones first, then the few that there are when the first
of a roll-out have finished would be dialled by all newcomers, and those in progress by none.  Origins come
before all agents while none has completed, after some while few have, and else after as many agents as a
leecher dials: that spares them.  Every draw is uniform, so that the swarm becomes a random graph.

Every announce costs the same however large the swarm is: the peers of one class stand in an array
without order, of which a sample costs no more than its own size, and the order of staleness is that
of dictionaries, which an announce leaves and enters again at the end.

Those who are short of connections are told of newcomers without asking again: `swarmpull.swarm.watches`.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Iterable
from typing import Final

import attrs

from swarmpull.digest import Digest
from swarmpull.swarm.peers import AnnounceState, PeerContact, PeerKind
from swarmpull.swarm.samples import sample
from swarmpull.swarm.watches import Watch, Watches, WatchLimits


@attrs.frozen(kw_only=True)
class HandoutLimits:
    """What a tracker keeps and hands out.  Counts are of peers, times are in seconds.

    Attributes:
        peers_per_handout: the most that one announce is answered with.
        peers_wanted: a leecher that got fewer than this is short of peers and asks again soon; 20
            is the number of connections with which the uplinks of a swarm stay busy.  Origins come
            after so many agents when so many have completed.
        before_origins: agents that come before the origins when some have completed, but fewer.
        leechers_for_seeder: a completed peer is told of the leechers when there are no more than
            these: in a swarm of few it helps that either side dials, in a large one it waits to be
            dialled.
        short_interval: between announces of a leecher that is short of peers.
        leech_interval: between announces of a leecher that has enough.
        seed_interval: between announces of a completed peer.
        seed_jitter: at most this is added to ``seed_interval``, at random, so that hosts that
            finished together do not announce together for ever.
        intervals_missed: a peer that is silent for so many of its own intervals is forgotten.
        peers_per_torrent: above it the peer that announced least recently is dropped.
        torrents: above it the torrent that was announced least recently is dropped.
        peers: in all torrents together, about 600 bytes each; above it the stalest peer of the
            stalest torrent is dropped.  A dropped peer comes back with its next announce.
        watch: of those who wait for newcomers.
    """

    peers_per_handout: int = attrs.field(default=50, validator=attrs.validators.gt(0))
    peers_wanted: int = attrs.field(default=20, validator=attrs.validators.gt(0))
    before_origins: int = attrs.field(default=10, validator=attrs.validators.ge(0))
    leechers_for_seeder: int = attrs.field(default=4, validator=attrs.validators.ge(0))
    short_interval: float = attrs.field(default=3.0, validator=attrs.validators.gt(0))
    leech_interval: float = attrs.field(default=10.0, validator=attrs.validators.gt(0))
    seed_interval: float = attrs.field(default=60.0, validator=attrs.validators.gt(0))
    seed_jitter: float = attrs.field(default=6.0, validator=attrs.validators.ge(0))
    intervals_missed: float = attrs.field(default=3.0, validator=attrs.validators.gt(0))
    peers_per_torrent: int = attrs.field(default=20_000, validator=attrs.validators.gt(0))
    torrents: int = attrs.field(default=100_000, validator=attrs.validators.gt(0))
    peers: int = attrs.field(default=1_000_000, validator=attrs.validators.gt(0))
    watch: WatchLimits = attrs.field(factory=WatchLimits)


@attrs.frozen
class Handout:
    """The answer to an announce.

    ``interval`` is in seconds until the next one is due; ``position`` is where a watch goes on from here.
    """

    peers: tuple[PeerContact, ...]
    interval: float
    position: int = 0


@attrs.frozen
class HeldHandout:
    """The answer to a host that announces many blobs at once, all of which it has.

    ``interval`` is in seconds until the next announce of all of them is due; ``leechers`` are who is fetching
    one, where they are few.
    """

    interval: float
    leechers: dict[Digest, tuple[PeerContact, ...]]


@attrs.frozen(kw_only=True)
class HandoutStatistics:
    """What is in the table now, and what has happened since the start."""

    torrents: int
    seeders: int
    origins: int
    leechers: int
    announces: int
    handed_out: int
    left: int
    expired: int
    replaced: int
    dropped: int
    watching: int
    told: int
    watches_refused: int

    @property
    def peers(self) -> int:
        return self.seeders + self.origins + self.leechers


# The expiry queue may hold this many items that are void, and one more for each peer.
QUEUE_SLACK: Final = 64

# The classes of a handout, in the order in which they fill it.
_SEEDERS: Final = 0
_ORIGINS: Final = 1
_LEECHERS: Final = 2


@attrs.define(eq=False)
class _Peer:
    """One peer of one torrent.

    ``position`` is its place in the array of its class.  ``queued_at`` is the time of its item
    in the expiry queue, never later than ``expires_at``; items of any other time are void.
    """

    contact: PeerContact
    group: int
    complete: bool
    expires_at: float
    queued_at: float = math.inf
    position: int = -1


@attrs.define(eq=False)
class _Torrent:
    """The peers of one blob: by id, the stalest first; by address; and by class, without order."""

    digest: Digest
    peers: dict[str, _Peer] = attrs.Factory(dict)
    ids: dict[tuple[str, int], str] = attrs.Factory(dict)
    groups: tuple[list[_Peer], list[_Peer], list[_Peer]] = attrs.Factory(lambda: ([], [], []))

    def insert(self, peer: _Peer) -> None:
        group = self.groups[peer.group]
        peer.position = len(group)
        group.append(peer)
        self.peers[peer.contact.peer_id] = peer
        self.ids[peer.contact.host, peer.contact.port] = peer.contact.peer_id

    def remove(self, peer: _Peer) -> None:
        group = self.groups[peer.group]
        last = group.pop()
        if last is not peer:
            group[peer.position] = last
            last.position = peer.position
        del self.peers[peer.contact.peer_id]
        del self.ids[peer.contact.host, peer.contact.port]

    def same_as(self, contact: PeerContact) -> tuple[_Peer | None, _Peer | None]:
        """Who has the id of a contact, and who has its address; None where nobody does."""
        other = self.ids.get((contact.host, contact.port))
        return (
            self.peers.get(contact.peer_id),
            None if other is None else self.peers[other],
        )

    def count(self, group: int, same: tuple[_Peer | None, _Peer | None]) -> int:
        """How many there are of a class, without the announcer, who is ``same``."""
        by_id, by_address = same
        count = len(self.groups[group])
        if by_id is not None and by_id.group == group:
            count -= 1
        if by_address is not None and by_address is not by_id and by_address.group == group:
            count -= 1
        return count

    def stalest(self) -> _Peer:
        return next(iter(self.peers.values()))

    def check_invariants(self, peers_max: int) -> None:
        assert 0 < len(self.peers) <= peers_max
        assert len(self.ids) == len(self.peers) == sum(map(len, self.groups))
        for peer_id, peer in self.peers.items():
            contact = peer.contact
            assert contact.peer_id == peer_id
            assert self.ids[contact.host, contact.port] == peer_id
            assert peer.group == _group_of(contact, complete=peer.complete)
            assert self.groups[peer.group][peer.position] is peer


# An item of the expiry queue: time, tie-break, torrent, peer.
_Item = tuple[float, int, _Torrent, _Peer]


class PeerTable:
    """Who takes part in which swarm.  Owned by one tracker; not shared between threads.

    ``now`` is any clock that does not go backwards, in seconds.
    """

    def __init__(self, limits: HandoutLimits, rng: random.Random) -> None:
        self._limits = limits
        self._rng = rng
        self._torrents: dict[Digest, _Torrent] = {}
        self._queue: list[_Item] = []
        self._queued = 0
        self._watches = Watches(limits.watch)
        self._sizes = [0, 0, 0]
        self._announces = 0
        self._handed_out = 0
        self._left = 0
        self._expired = 0
        self._replaced = 0
        self._dropped = 0

    def announce(
        self, digest: Digest, contact: PeerContact, state: AnnounceState, now: float
    ) -> Handout:
        """Enter or refresh one peer of one torrent and choose the peers that it is told of.

        A completed peer is told of leechers only while they are few; one that stops, of nobody.
        """
        self.expire(now)
        self._announces += 1
        if state is AnnounceState.STOPPED:
            self._leave(digest, contact)
            return Handout((), self._limits.seed_interval, self._watches.position)
        complete = state is AnnounceState.COMPLETE
        chosen = self._choose(digest, contact, complete=complete)
        interval = self._interval(len(chosen), complete=complete)
        self._handed_out += len(chosen)
        expires_at = now + self._limits.intervals_missed * interval
        self._enter(digest, contact, chosen, complete=complete, expires_at=expires_at)
        return Handout(chosen, interval, self._watches.position)

    def announce_held(
        self, digests: Iterable[Digest], contact: PeerContact, now: float
    ) -> HeldHandout:
        """Enter or refresh one peer that has all of these blobs; the same as an announce of each."""
        self.expire(now)
        interval = self._interval(0, complete=True)
        expires_at = now + self._limits.intervals_missed * interval
        leechers = {}
        for digest in digests:
            self._announces += 1
            if not self._refresh(digest, contact, expires_at):
                self._enter(digest, contact, (), complete=True, expires_at=expires_at)
            if chosen := self._few_leechers(digest, contact):
                self._handed_out += len(chosen)
                leechers[digest] = chosen
        return HeldHandout(interval, leechers)

    def watch(
        self,
        digest: Digest,
        peer_id: str,
        position: int,
        seconds: float,
        now: float,
        on_end: Callable[[], None],
    ) -> Watch:
        """A leecher waits for others to appear; see `Watches.open`.

        One that is not in the table is not waited with: it has to announce itself first.
        """
        self.expire(now)
        peer = self._find(digest, peer_id)
        if peer is None or peer.complete:
            return self._watches.refuse(digest, peer_id, now)
        return self._watches.open(digest, peer_id, position, seconds, now, on_end)

    def close_watch(self, watch: Watch) -> None:
        """The time of a watch is up, or nobody waits for it any more; no matter if it has ended."""
        self._watches.close(watch)

    def end_watches(self) -> None:
        """End every watch, and refuse others from now on: the tracker shuts down."""
        self._watches.end_all()

    def add_seeder(
        self, digest: Digest, contact: PeerContact, now: float, *, lifetime: float
    ) -> None:
        """Enter a completed peer that did not announce itself, for ``lifetime`` seconds at least.

        One that also announces keeps the later of the two times.
        """
        self.expire(now)
        known = self._find(digest, contact.peer_id)
        expires_at = now + lifetime
        if known is not None and known.complete:
            expires_at = max(expires_at, known.expires_at)
        self._enter(digest, contact, (), complete=True, expires_at=expires_at)

    def seeders(self, digest: Digest) -> int:
        """How many peers of this torrent have the whole blob, as far as they said."""
        torrent = self._torrents.get(digest)
        if torrent is None:
            return 0
        origins = sum(peer.complete for peer in torrent.groups[_ORIGINS])
        return len(torrent.groups[_SEEDERS]) + origins

    def has_origin(self, digest: Digest) -> bool:
        """Whether any origin takes part in this torrent."""
        torrent = self._torrents.get(digest)
        return torrent is not None and bool(torrent.groups[_ORIGINS])

    def expire(self, now: float) -> None:
        """Forget every peer whose time is up."""
        while self._queue and self._queue[0][0] <= now:
            at, _, torrent, peer = heapq.heappop(self._queue)
            if peer.queued_at != at:
                continue
            if peer.expires_at > now:
                self._schedule(torrent, peer)
            else:
                self._expired += 1
                self._remove(torrent, peer)

    def next_deadline(self) -> float:
        """When `expire` has something to do, at the earliest; infinity for an empty table."""
        while self._queue and self._queue[0][3].queued_at != self._queue[0][0]:
            heapq.heappop(self._queue)
        return self._queue[0][0] if self._queue else math.inf

    def statistics(self) -> HandoutStatistics:
        watches = self._watches.statistics()
        return HandoutStatistics(
            torrents=len(self._torrents),
            seeders=self._sizes[_SEEDERS],
            origins=self._sizes[_ORIGINS],
            leechers=self._sizes[_LEECHERS],
            announces=self._announces,
            handed_out=self._handed_out,
            left=self._left,
            expired=self._expired,
            replaced=self._replaced,
            dropped=self._dropped,
            watching=watches.watching,
            told=watches.told,
            watches_refused=watches.refused,
        )

    # --- the handout --------------------------------------------------------------------------

    def _choose(
        self, digest: Digest, announcer: PeerContact, *, complete: bool
    ) -> tuple[PeerContact, ...]:
        torrent = self._torrents.get(digest)
        if torrent is None:
            return ()
        if complete:
            return self._choose_for_seeder(torrent, announcer)
        same = torrent.same_as(announcer)
        count = self._limits.peers_per_handout
        origins = self._sample(torrent.groups[_ORIGINS], same, count)
        # Half of the places at least are for agents, if there are so many.
        agents = self._draw_agents(torrent, same, count - min(len(origins), count // 2))
        before = self._before_origins(torrent.count(_SEEDERS, same))
        return tuple(agents[:before] + origins[: count - len(agents)] + agents[before:])

    def _draw_agents(
        self, torrent: _Torrent, same: tuple[_Peer | None, _Peer | None], count: int
    ) -> list[PeerContact]:
        """Up to ``count`` agents, of the completed ones their share."""
        leechers = torrent.groups[_LEECHERS]
        completed = torrent.count(_SEEDERS, same)
        if not completed:
            return self._sample(leechers, same, count)
        share = math.ceil(count * completed / (completed + torrent.count(_LEECHERS, same)))
        in_progress = self._sample(leechers, same, count - share)
        seeders = self._sample(torrent.groups[_SEEDERS], same, count - len(in_progress))
        return self._mixed(seeders, in_progress)

    def _mixed(self, seeders: list[PeerContact], leechers: list[PeerContact]) -> list[PeerContact]:
        """Two samples as one, the first spread over it evenly: as good as a shuffle, and cheaper."""
        size = len(seeders) + len(leechers)
        step, offset = size / len(seeders), self._rng.random()
        mixed: list[PeerContact | None] = [None] * size
        for index, seeder in enumerate(seeders):
            mixed[int((index + offset) * step)] = seeder
        rest = iter(leechers)
        return [peer or next(rest) for peer in mixed]

    def _before_origins(self, seeders: int) -> int:
        """How many agents come before the origins."""
        limits = self._limits
        if not seeders:
            return 0
        if seeders >= limits.peers_wanted:
            return limits.peers_wanted
        return min(limits.before_origins, limits.peers_wanted)

    def _choose_for_seeder(
        self, torrent: _Torrent, announcer: PeerContact
    ) -> tuple[PeerContact, ...]:
        few = self._limits.leechers_for_seeder
        same = torrent.same_as(announcer)
        leechers = self._sample(torrent.groups[_LEECHERS], same, few + 1)
        return tuple(leechers) if len(leechers) <= few else ()

    def _few_leechers(self, digest: Digest, announcer: PeerContact) -> tuple[PeerContact, ...]:
        """What a completed peer is told, without drawing where that is nobody."""
        torrent = self._torrents.get(digest)
        if torrent is None or not torrent.groups[_LEECHERS]:
            return ()
        return self._choose_for_seeder(torrent, announcer)

    def _sample(
        self, group: list[_Peer], same: tuple[_Peer | None, _Peer | None], count: int
    ) -> list[PeerContact]:
        """Up to ``count`` peers of a group, uniformly at random, without the announcer."""
        # One peer may have the announcer's id and another, from before a restart, its address: two
        # more than wanted are enough.
        if count <= 0:
            return []
        drawn = sample(self._rng, group, min(count + 2, len(group)))
        by_id, by_address = same
        others = [p.contact for p in drawn if p is not by_id and p is not by_address]
        del others[count:]
        return others

    def _interval(self, handed_out: int, *, complete: bool) -> float:
        limits = self._limits
        if complete:
            return limits.seed_interval + self._rng.uniform(0.0, limits.seed_jitter)
        wanted = min(limits.peers_wanted, limits.peers_per_handout)
        return limits.short_interval if handed_out < wanted else limits.leech_interval

    # --- the table ----------------------------------------------------------------------------

    def _find(self, digest: Digest, peer_id: str) -> _Peer | None:
        torrent = self._torrents.get(digest)
        return None if torrent is None else torrent.peers.get(peer_id)

    def _enter(
        self,
        digest: Digest,
        contact: PeerContact,
        handed_out: tuple[PeerContact, ...],
        *,
        complete: bool,
        expires_at: float,
    ) -> None:
        torrent = self._torrents.pop(digest, None) or _Torrent(digest)
        self._forget_former(torrent, contact)
        peer = torrent.peers.get(contact.peer_id)
        is_new = peer is None
        if peer is None:
            peer = _Peer(contact, _group_of(contact, complete=complete), complete, expires_at)
        else:
            self._detach(torrent, peer)
            # The same contact stays, rather than a new one each time: less for the garbage collector.
            if contact != peer.contact:
                peer.contact = contact
            peer.group = _group_of(contact, complete=complete)
            peer.complete, peer.expires_at = complete, expires_at
        torrent.insert(peer)
        self._sizes[peer.group] += 1
        self._torrents[digest] = torrent  # the end of the order of staleness
        if expires_at < peer.queued_at:
            self._schedule(torrent, peer)
        if complete:
            self._watches.end(digest, contact.peer_id)
        if is_new:
            # Who is complete waits to be dialled.
            dials = () if complete else tuple(other.peer_id for other in handed_out)
            self._watches.appeared(digest, contact, dials)
        self._keep_limits(torrent)

    def _refresh(self, digest: Digest, contact: PeerContact, expires_at: float) -> bool:
        """Keep a completed peer for longer; False when there is more to it than that."""
        torrent = self._torrents.get(digest)
        if torrent is None:
            return False
        peer = torrent.peers.get(contact.peer_id)
        if peer is None or not peer.complete or peer.contact != contact:
            return False
        if expires_at < peer.queued_at:
            return False
        peer.expires_at = expires_at
        # To the end of both orders of staleness.
        del torrent.peers[contact.peer_id]
        torrent.peers[contact.peer_id] = peer
        del self._torrents[digest]
        self._torrents[digest] = torrent
        return True

    def _forget_former(self, torrent: _Torrent, contact: PeerContact) -> None:
        """The process that listened at this address before is gone: a port has one listener."""
        former = torrent.ids.get((contact.host, contact.port))
        if former is not None and former != contact.peer_id:
            self._replaced += 1
            self._retire(torrent, torrent.peers[former])

    def _leave(self, digest: Digest, contact: PeerContact) -> None:
        peer = self._find(digest, contact.peer_id)
        if peer is not None:
            self._left += 1
            self._remove(self._torrents[digest], peer)

    def _remove(self, torrent: _Torrent, peer: _Peer) -> None:
        self._retire(torrent, peer)
        if not torrent.peers:
            del self._torrents[torrent.digest]
            self._watches.forget(torrent.digest)

    def _retire(self, torrent: _Torrent, peer: _Peer) -> None:
        self._detach(torrent, peer)
        self._watches.departed(torrent.digest, peer.contact.peer_id)
        peer.queued_at = math.inf
        self._compact()

    def _detach(self, torrent: _Torrent, peer: _Peer) -> None:
        torrent.remove(peer)
        self._sizes[peer.group] -= 1

    def _keep_limits(self, torrent: _Torrent) -> None:
        if len(torrent.peers) > self._limits.peers_per_torrent:
            self._drop(torrent, torrent.stalest())
        if len(self._torrents) > self._limits.torrents:
            stalest = next(iter(self._torrents.values()))
            for peer in list(stalest.peers.values()):
                self._drop(stalest, peer)
        if sum(self._sizes) > self._limits.peers:
            stalest = next(iter(self._torrents.values()))
            self._drop(stalest, stalest.stalest())

    def _drop(self, torrent: _Torrent, peer: _Peer) -> None:
        self._dropped += 1
        self._remove(torrent, peer)

    # --- the expiry queue ---------------------------------------------------------------------

    def _schedule(self, torrent: _Torrent, peer: _Peer) -> None:
        self._queued += 1
        peer.queued_at = peer.expires_at
        heapq.heappush(self._queue, (peer.queued_at, self._queued, torrent, peer))
        self._compact()

    def _compact(self) -> None:
        """Throw out void items when they outnumber the others: amortised over what made them."""
        if len(self._queue) <= 2 * sum(self._sizes) + QUEUE_SLACK:
            return
        self._queue = [item for item in self._queue if item[3].queued_at == item[0]]
        heapq.heapify(self._queue)

    # --- for tests and the simulator ----------------------------------------------------------

    def check_invariants(self) -> None:
        """Raise AssertionError when the table contradicts itself; costs as much as it has peers."""
        limits = self._limits
        assert len(self._torrents) <= limits.torrents
        assert sum(self._sizes) <= limits.peers
        sizes = [0, 0, 0]
        queued = {(id(item[3]), item[0]) for item in self._queue}
        for digest, torrent in self._torrents.items():
            assert torrent.digest == digest
            torrent.check_invariants(limits.peers_per_torrent)
            for peer in torrent.peers.values():
                sizes[peer.group] += 1
                assert peer.queued_at <= peer.expires_at, "a peer would be forgotten too late"
                assert (id(peer), peer.queued_at) in queued, "a peer would never be forgotten"
        assert sizes == self._sizes
        self._watches.check_invariants(
            {
                digest: {peer_id: peer.complete for peer_id, peer in torrent.peers.items()}
                for digest, torrent in self._torrents.items()
            }
        )
        assert len(self._queue) <= 2 * sum(sizes) + QUEUE_SLACK + 2


def _group_of(contact: PeerContact, *, complete: bool) -> int:
    if contact.kind is PeerKind.ORIGIN:
        return _ORIGINS
    return _SEEDERS if complete else _LEECHERS
