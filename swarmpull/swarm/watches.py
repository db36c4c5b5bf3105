"""Who is told at once of a peer that appears: leechers that are short of connections, and wait for it.

A handout names those who are there.  A leecher that cannot make enough connections out of it opens a watch
with its tracker, which ends as soon as somebody appears of whom it should hear, or when its time is up.  A
newcomer is told to few, those that wait for longest; a watch that has ended stands at the end of the line
when it is opened again.  So a burst of newcomers costs each of them a bounded number of words, and a
leecher that is told dials a few peers and not all of them.

Nobody appears unseen between a handout and a watch, or between two: each says up to which arrival it has
told, and the next watch goes on from there with the last few that came since.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import attrs

from swarmpull.digest import Digest
from swarmpull.swarm.connections import ConnectionLimits
from swarmpull.swarm.peers import PeerContact

_DIALLED: Final = ConnectionLimits().dialled


@attrs.frozen(kw_only=True)
class WatchLimits:
    """What a tracker keeps of watches.

    Attributes:
        told: of one newcomer so many are told at most, as many as it would dial itself: enough to keep
            its uplink busy.
        dialled: so many of its own handout a leecher that appears dials at once; those need not be
            told of it.
        batch: newcomers that one watch tells of at most, and that are remembered for those who open one.
        seconds: the longest that a watch stays open.
        per_torrent: watches of one torrent.
        watches: of all torrents together, about 5 kB each with the call that waits.  Above either limit
            a watch ends at once without anybody, and its leecher hears of newcomers with its next announce.
    """

    told: int = attrs.field(default=_DIALLED, validator=attrs.validators.gt(0))
    dialled: int = attrs.field(default=_DIALLED, validator=attrs.validators.ge(0))
    batch: int = attrs.field(default=8, validator=attrs.validators.gt(0))
    seconds: float = attrs.field(default=30.0, validator=attrs.validators.gt(0))
    per_torrent: int = attrs.field(default=100, validator=attrs.validators.ge(0))
    watches: int = attrs.field(default=10_000, validator=attrs.validators.ge(0))


@attrs.define(eq=False)
class Watch:
    """One leecher that waits for others to appear.

    Attributes:
        digest: what it wants.
        peer_id: who it is.
        until: when it is to be closed at the latest.
        on_end: is called once when it ends otherwise than by `close`; must not call the table.
        is_open: whether it waits; else the other two are its answer.
        peers: who appeared, the last one first.
        position: where its next watch goes on; None when there is to be none before the next announce.
    """

    digest: Digest
    peer_id: str
    until: float
    on_end: Callable[[], None]
    is_open: bool = False
    peers: tuple[PeerContact, ...] = ()
    position: int | None = None


@attrs.frozen(kw_only=True)
class WatchStatistics:
    """Watches that are open now; and since the start those that were refused, and peers told of."""

    watching: int
    refused: int
    told: int


@attrs.define(eq=False)
class _Arrival:
    """A peer that appeared: its number; the peers that it dials itself; how many may yet be told of it."""

    number: int
    contact: PeerContact
    dials: tuple[str, ...]
    left: int

    def concerns(self, peer_id: str) -> bool:
        return self.left > 0 and peer_id != self.contact.peer_id and peer_id not in self.dials


@attrs.define(eq=False)
class _Swarm:
    """Of one torrent: who waits, by peer id and for longest first; and the last who appeared."""

    waiting: dict[str, Watch] = attrs.Factory(dict)
    recent: list[_Arrival] = attrs.Factory(list)


class Watches:
    """The watches of one tracker.  Part of its `PeerTable`, which says who is there and who goes."""

    def __init__(self, limits: WatchLimits) -> None:
        self._limits = limits
        self._swarms: dict[Digest, _Swarm] = {}
        self._arrivals = 0
        self._watching = 0
        self._refused = 0
        self._told = 0
        self._ended = False

    @property
    def position(self) -> int:
        """How many have appeared so far, in all torrents: where a watch goes on after a handout."""
        return self._arrivals

    def open(
        self,
        digest: Digest,
        peer_id: str,
        position: int,
        seconds: float,
        now: float,
        on_end: Callable[[], None],
    ) -> Watch:
        """Wait for others to appear after ``position``, for ``seconds`` at most.

        A former watch of the same leecher for the same torrent ends.  The new one may be answered at
        once: with those who appeared since, or without anybody when a limit is reached.
        """
        self.end(digest, peer_id)
        limits = self._limits
        # Written so that NaN, too, becomes the most.
        seconds = seconds if 0.0 <= seconds < limits.seconds else limits.seconds
        watch = Watch(digest, peer_id, now + seconds, on_end)
        swarm = self._swarm(digest)
        if found := self._since(swarm, peer_id, position):
            self._answer(watch, found)
        elif self._ended or self._is_full(swarm):
            self._refused += 1
        else:
            watch.is_open = True
            swarm.waiting[peer_id] = watch
            self._watching += 1
        return watch

    def refuse(self, digest: Digest, peer_id: str, now: float) -> Watch:
        """A watch of somebody who is no leecher of that torrent: one that is over."""
        self._refused += 1
        return Watch(digest, peer_id, now, _nobody_waits)

    def appeared(self, digest: Digest, contact: PeerContact, dials: tuple[str, ...]) -> None:
        """Tell of a peer that has appeared; ``dials`` are the ids of its handout, in order."""
        self._arrivals += 1
        swarm = self._swarm(digest)
        limits = self._limits
        arrival = _Arrival(self._arrivals, contact, dials[: limits.dialled], limits.told)
        swarm.recent.append(arrival)
        del swarm.recent[: -limits.batch]
        # No more are looked at than may be told or dialled.
        told: list[Watch] = []
        for watch in swarm.waiting.values():
            if len(told) == limits.told:
                break
            if arrival.concerns(watch.peer_id):
                told.append(watch)
        for watch in told:
            self._remove(watch)
            self._answer(watch, [arrival])
            watch.on_end()

    def departed(self, digest: Digest, peer_id: str) -> None:
        """A peer is not in the torrent any more: nobody is told of it, and its watch ends."""
        self.end(digest, peer_id)
        swarm = self._swarms.get(digest)
        if swarm is not None:
            swarm.recent = [each for each in swarm.recent if each.contact.peer_id != peer_id]

    def end(self, digest: Digest, peer_id: str) -> None:
        """End the watch of a peer, if it has one, without telling it of anybody."""
        swarm = self._swarms.get(digest)
        watch = None if swarm is None else swarm.waiting.get(peer_id)
        if watch is not None:
            self._remove(watch)
            watch.on_end()

    def close(self, watch: Watch) -> None:
        """The time of a watch is up, or nobody waits for it any more; no matter if it has ended."""
        if watch.is_open:
            self._remove(watch)
            watch.position = self._arrivals

    def end_all(self) -> None:
        """End every watch, and refuse others from now on: the tracker shuts down."""
        self._ended = True
        for swarm in self._swarms.values():
            for watch in list(swarm.waiting.values()):
                self._remove(watch)
                watch.on_end()

    def forget(self, digest: Digest) -> None:
        """Nobody is in that torrent any more."""
        self._swarms.pop(digest, None)

    def statistics(self) -> WatchStatistics:
        return WatchStatistics(watching=self._watching, refused=self._refused, told=self._told)

    # --- the books ----------------------------------------------------------------------------

    def _swarm(self, digest: Digest) -> _Swarm:
        swarm = self._swarms.get(digest)
        if swarm is None:
            swarm = self._swarms[digest] = _Swarm()
        return swarm

    def _since(self, swarm: _Swarm, peer_id: str, position: int) -> list[_Arrival]:
        if position > self._arrivals:
            position = 0  # that of a tracker which was here before this one
        return [
            each
            for each in reversed(swarm.recent)
            if each.number > position and each.concerns(peer_id)
        ]

    def _is_full(self, swarm: _Swarm) -> bool:
        limits = self._limits
        return len(swarm.waiting) >= limits.per_torrent or self._watching >= limits.watches

    def _answer(self, watch: Watch, found: list[_Arrival]) -> None:
        for arrival in found:
            arrival.left -= 1
        self._told += len(found)
        watch.peers = tuple(arrival.contact for arrival in found)
        watch.position = self._arrivals

    def _remove(self, watch: Watch) -> None:
        del self._swarms[watch.digest].waiting[watch.peer_id]
        watch.is_open = False
        self._watching -= 1

    # --- for tests and the simulator ----------------------------------------------------------

    def check_invariants(self, complete: dict[Digest, dict[str, bool]]) -> None:
        """Raise AssertionError when the books are wrong.  O(everything).

        ``complete``: of each torrent that has anybody, who is there, and whether with everything.
        """
        limits = self._limits
        assert self._swarms.keys() == complete.keys(), "each torrent, and no other, has its watches"
        watching = 0
        for digest, swarm in self._swarms.items():
            watching += len(swarm.waiting)
            assert len(swarm.waiting) <= limits.per_torrent
            assert len(swarm.recent) <= limits.batch
            there = complete[digest]
            assert all(each.contact.peer_id in there for each in swarm.recent)
            assert all(0 <= each.left <= limits.told for each in swarm.recent)
            numbers = [each.number for each in swarm.recent]
            assert numbers == sorted(set(numbers))
            for peer_id, watch in swarm.waiting.items():
                assert watch.is_open
                assert there[peer_id] is False, "somebody waits who is no leecher"
                assert (watch.digest, watch.peer_id) == (digest, peer_id)
        assert watching == self._watching <= limits.watches


def _nobody_waits() -> None:
    """What is called at the end of a watch that was never open."""
