"""Whom to be connected to: known, pending, active and backed-off peers of one torrent.

A pending dial takes a place like an active connection, so that the limit holds at every moment.  A peer
that failed is backed off with an expiry, for longer each time until it gives a piece.
"""

from __future__ import annotations

import enum
from typing import Final

import attrs

from swarmpull.swarm.peers import PeerContact, PeerKind

# A handout has 50 peers; a few handouts are remembered, the oldest contacts go first.
KNOWN_PEERS_MAX: Final = 200
# A dial that the shell never reports on must not hold its place for ever; the shell's own limit for dial
# and handshake is below this.
DIAL_TIMEOUT: Final = 30.0
# An origin sees thousands of peers of one blob come and go; the oldest back-offs go first.
BACKOFFS_MAX: Final = 1000


@attrs.frozen(kw_only=True)
class ConnectionLimits:
    """Bounds on the connections of one torrent and of the host.

    Attributes:
        dialled: a leecher dials until it has so many connections of one torrent.
        per_torrent: pending and active connections of one torrent; above ``dialled``, so that there
            is room for those who come later.
        per_host: of all torrents together.
        backoff_initial: seconds for which a peer is left alone after its first failure; doubles.
        backoff_max: the longest back-off, in seconds.
        corrupt_backoff: seconds for which a peer is left alone after it sent a wrong piece.
        idle_timeout: seconds without a piece in either direction until a connection is useless.
    """

    dialled: int = attrs.field(default=12, validator=attrs.validators.ge(1))
    per_torrent: int = attrs.field(default=30, validator=attrs.validators.ge(1))
    per_host: int = attrs.field(default=400, validator=attrs.validators.ge(1))
    backoff_initial: float = attrs.field(default=1.0, validator=attrs.validators.gt(0))
    backoff_max: float = attrs.field(default=60.0, validator=attrs.validators.gt(0))
    corrupt_backoff: float = attrs.field(default=300.0, validator=attrs.validators.gt(0))
    idle_timeout: float = attrs.field(default=30.0, validator=attrs.validators.gt(0))


class Admission(enum.Enum):
    """What to do with a peer that connects to us."""

    ACCEPT = "accept"
    BUSY = "busy"
    DUPLICATE = "duplicate"


@attrs.define
class HostPlaces:
    """How many connections, pending and active, all torrents of this host have together."""

    limit: int
    taken: int = 0

    @property
    def free(self) -> int:
        return self.limit - self.taken


@attrs.define
class _Backoff:
    """``unreachable``: after a dial that came to nothing, which is no reason to refuse the peer's own.

    ``banned``: after wrong bytes.
    """

    failures: int
    until: float
    unreachable: bool = False
    banned: bool = False


class ConnectionTable:
    """The connection states of one torrent's peers, by peer id."""

    def __init__(self, own_peer_id: str, limits: ConnectionLimits, host: HostPlaces) -> None:
        self._own_peer_id = own_peer_id
        self._limits = limits
        self._host = host
        self._known: dict[str, PeerContact] = {}
        self._tried_at: dict[str, float] = {}
        self._pending: dict[str, float] = {}
        self._active: dict[str, int] = {}
        self._backoffs: dict[str, _Backoff] = {}

    @property
    def pending_count(self) -> int:
        return len(self._pending)

    @property
    def active_count(self) -> int:
        return len(self._active)

    @property
    def is_alone(self) -> bool:
        """Whether no connection is up, nor on its way."""
        return not self._pending and not self._active

    def learn(self, contacts: tuple[PeerContact, ...]) -> None:
        """Remember peers, the earlier in the handout the sooner they are dialled."""
        for contact in contacts:
            if contact.peer_id != self._own_peer_id:
                self._known.pop(contact.peer_id, None)
                self._known[contact.peer_id] = contact
        while len(self._known) > KNOWN_PEERS_MAX:
            forgotten = next(iter(self._known))
            del self._known[forgotten]
            self._tried_at.pop(forgotten, None)

    def dials(self, wanted: int, now: float) -> list[PeerContact]:
        """Reserve places for new dials, up to ``wanted`` connections in all.

        Returns the peers to dial; each is pending until `connected` or `dial_failed`.  Those that were never
        tried come first, then those whose turn is longest ago: a few peers that accept and then give
        nothing must not keep us from the others for ever.
        """
        places = self._free_places(wanted)
        if places <= 0:
            return []
        candidates = [c for peer_id, c in self._known.items() if self._may_dial(peer_id, now)]
        candidates.sort(key=lambda c: self._tried_at.get(c.peer_id, float("-inf")))
        return self._reserve(candidates[:places], now)

    def dials_to_origins(self, now: float) -> list[PeerContact]:
        """Reserve places for dials of origins, however many connections there are, up to ``per_torrent``."""
        free = self._limits.per_torrent - self.active_count - self.pending_count
        origins = [
            contact
            for peer_id, contact in self._known.items()
            if contact.kind is PeerKind.ORIGIN and self._may_dial(peer_id, now)
        ]
        return self._reserve(origins[: max(min(free, self._host.free), 0)], now)

    def _reserve(self, chosen: list[PeerContact], now: float) -> list[PeerContact]:
        for contact in chosen:
            self._pending[contact.peer_id] = now + DIAL_TIMEOUT
        self._host.taken += len(chosen)
        return chosen

    def is_short(self, wanted: int) -> bool:
        """Whether `dials` would choose more peers, up to ``wanted`` connections in all, if it knew any."""
        return self._free_places(wanted) > 0

    def admit(self, peer_id: str) -> Admission:
        """Decide about a peer that dialled us.

        When two peers dial each other at once, the dial of the one with the smaller id stands: both
        sides decide alike without asking.
        """
        if peer_id == self._own_peer_id or peer_id in self._active:
            return Admission.DUPLICATE
        if peer_id in self._pending:
            return Admission.DUPLICATE if self._own_peer_id < peer_id else Admission.ACCEPT
        if self.active_count + self.pending_count >= self._limits.per_torrent:
            return Admission.BUSY
        return Admission.ACCEPT if self._host.free > 0 else Admission.BUSY

    def connected(self, peer_id: str, connection: int) -> None:
        """A connection is up; its peer must not be active already."""
        if self._pending.pop(peer_id, None) is None:
            self._host.taken += 1
        self._active[peer_id] = connection

    def proved(self, peer_id: str) -> None:
        """A peer gave us something: its failures are forgotten.

        A connection alone proves nothing.  One who accepts and never gives anything would be tried again and
        again.
        """
        self._backoffs.pop(peer_id, None)

    def dial_failed(self, peer_id: str, now: float) -> None:
        """A dial came to nothing: leave the peer alone, unless it has reached us in the meantime."""
        if self._pending.pop(peer_id, None) is not None:
            self._host.taken -= 1
            self._back_off(peer_id, now, unreachable=True)

    def forget(self, peer_id: str) -> None:
        """A peer is no more: do not try it again."""
        self._known.pop(peer_id, None)
        self._tried_at.pop(peer_id, None)

    def lost(self, peer_id: str, now: float) -> None:
        """An active connection ended: leave the peer alone for a moment."""
        del self._active[peer_id]
        self._host.taken -= 1
        self._back_off(peer_id, now, unreachable=False)

    def ban(self, peer_id: str, now: float) -> None:
        """A peer that is not active gave us wrong bytes: leave it alone for long."""
        until = now + self._limits.corrupt_backoff
        self._set_backoff(peer_id, _Backoff(1, until, banned=True))

    def close(self) -> None:
        """The torrent is gone: give back the places of pending dials."""
        self._host.taken -= len(self._pending) + len(self._active)
        self._pending.clear()
        self._active.clear()

    def is_active(self, peer_id: str) -> bool:
        return peer_id in self._active

    def is_pending(self, peer_id: str) -> bool:
        return peer_id in self._pending

    def is_backed_off(self, peer_id: str, now: float) -> bool:
        """Whether this peer is not to be dialled."""
        backoff = self._backoffs.get(peer_id)
        return backoff is not None and now < backoff.until

    def is_refused(self, peer_id: str, now: float) -> bool:
        """Whether this peer may not connect to us now: the last connection with it ended just now.

        A peer that we failed to reach may: when two dial each other at the same moment the one whose
        dial is refused must take the other's, however late that arrives.
        """
        backoff = self._backoffs.get(peer_id)
        return backoff is not None and now < backoff.until and not backoff.unreachable

    def is_banned(self, peer_id: str, now: float) -> bool:
        backoff = self._backoffs.get(peer_id)
        return backoff is not None and now < backoff.until and backoff.banned

    def expire(self, now: float) -> None:
        """Give up dials that were never reported on, and forget back-offs that are long over."""
        for peer_id in [p for p, until in self._pending.items() if until <= now]:
            self.dial_failed(peer_id, now)
        forgotten = now - self._limits.backoff_max
        for peer_id in [
            p for p, b in self._backoffs.items() if b.until < forgotten and p not in self._active
        ]:
            del self._backoffs[peer_id]

    def next_deadline(self, now: float) -> float:
        """When a pending dial is given up or a known peer may be dialled again; inf when never."""
        deadline = min(self._pending.values(), default=float("inf"))
        for peer_id, backoff in self._backoffs.items():
            if backoff.until > now and peer_id in self._known and peer_id not in self._active:
                deadline = min(deadline, backoff.until)
        return deadline

    def check_invariants(self) -> None:
        assert not self._pending.keys() & self._active.keys()
        assert self._own_peer_id not in self._active
        assert len(self._known) <= KNOWN_PEERS_MAX
        assert len(self._backoffs) <= BACKOFFS_MAX
        assert self.active_count + self.pending_count <= self._limits.per_torrent

    def _free_places(self, wanted: int) -> int:
        places = min(wanted, self._limits.dialled, self._limits.per_torrent)
        return min(places - self.active_count - self.pending_count, self._host.free)

    def _back_off(self, peer_id: str, now: float, *, unreachable: bool) -> None:
        if self.is_banned(peer_id, now):
            return
        before = self._backoffs.get(peer_id)
        failures = 1 if before is None else before.failures + 1
        pause = self._limits.backoff_initial * 2 ** min(failures - 1, 16)
        until = now + min(pause, self._limits.backoff_max)
        self._set_backoff(peer_id, _Backoff(failures, until, unreachable=unreachable))

    def _set_backoff(self, peer_id: str, backoff: _Backoff) -> None:
        # Every end of an attempt leads here.
        if peer_id in self._known:
            self._tried_at[peer_id] = backoff.until
        self._backoffs.pop(peer_id, None)
        self._backoffs[peer_id] = backoff
        if len(self._backoffs) > BACKOFFS_MAX:
            del self._backoffs[next(iter(self._backoffs))]

    def _may_dial(self, peer_id: str, now: float) -> bool:
        return (
            peer_id not in self._active
            and peer_id not in self._pending
            and not self.is_backed_off(peer_id, now)
        )
