"""Offer and claim: an uploader offers its next slot, the leecher chooses a piece at that moment.

A queue of requests at each uploader binds a piece to an uploader long before it is free: by chance some
queues are long while other uplinks have nothing to do. Here nothing is bound early. A leecher tells a
few neighbours once that it *wants* something they have. An uploader sends one piece at a time at full
rate and, shortly before its uplink is free, *offers* the slot to the next peer that wants; the answer is
a *claim* of the piece that is needed most just then, or a *pass*. So no queue grows, a busy uploader is
never waited for, and the choice of the piece is always fresh.

Uploader. Peers that want wait in line, by torrent; torrents take turns, so a huge layer does not starve
a small blob. Offers run ahead of the uplink by ``_ahead``: promises (offers out, and claims that wait)
are kept at that number. It follows what is needed: an uplink that ran dry while somebody wanted raises
it, claims that pile up lower it, so it comes to the bandwidth-delay product without being told.

A seeder suggests a piece with each offer while there are pieces that none of its neighbours has and that
it has not given: each distinct piece must leave the seeders once before any leaves twice, or the swarm
waits for the last of them.

Leecher. At most ``inbound`` claims are outstanding over all torrents (each torrent may always have one),
and a few wants for each claim that there is still room for. A want ends with the offer that answers it.
On long paths claims and pieces are on their way for longer than a piece takes to come in: as many more
claims as pieces come in a round trip are outstanding there, up to twice ``inbound``. The round trip is what
peers take to answer our offers, which they do at once.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import attrs

from swarmpull.swarm import bitfield
from swarmpull.swarm.exchange import Outbox, Uplink
from swarmpull.swarm.messages import Cancel, Claim, Message, Offer, Pass, Want
from swarmpull.swarm.timing import PathTiming, PieceTiming
from swarmpull.swarm.torrent import Inbound, Peer, Torrent

# Wants for each claim that there is room for: as many uplinks may answer first as make it likely that one
# does at once; more would mostly be answered by a pass.
WANTS_FOR_ROOM: Final = 8
# An offer is answered after a round trip.  After this many seconds somebody else is offered the place; the
# answer still counts, until the offer lapses.
OFFER_PATIENCE: Final = 0.25
OFFER_TIMEOUT: Final = 2.0
# A peer that let so many offers lapse, one after the other, is not alive or means us no good.
LAPSES_MAX: Final = 3
_UNPROMISED: Final = OFFER_TIMEOUT - OFFER_PATIENCE
# Said so often that making them anew would show.
_WANT: Final = Want()
_OFFER: Final = Offer()
_PASS: Final = Pass()
# Readers begin at the beginning: this share of a seeder's suggestions is the lowest piece that nobody has.
# The others are random, so that several seeders seldom give the same one.
IN_ORDER_SHARE: Final = 0.25
# A want that found no free uplink for so many seconds no longer counts against the limit of wants.
WANT_PATIENCE: Final = 1.0


@attrs.frozen(kw_only=True)
class OfferLimits:
    """Bounds of the exchange.

    Attributes:
        slots: pieces being sent at once.  One at full rate is passed on sooner than two at half of it; a
            seeder whose uplink is faster than its peers' downlinks needs as many as fill it.
        ahead_min, ahead_max: bounds of the promises that run ahead of the uplink.
        inbound: claims outstanding; up to twice as many on long paths.
        send_timeout: seconds after which a piece of which no more bytes leave marks its receiver as stalled.
    """

    slots: int = attrs.field(default=3, validator=attrs.validators.ge(1))
    ahead_min: int = attrs.field(default=1, validator=attrs.validators.ge(1))
    ahead_max: int = attrs.field(default=16, validator=attrs.validators.ge(1))
    inbound: int = attrs.field(default=4, validator=attrs.validators.ge(1))
    send_timeout: float = attrs.field(default=60.0, validator=attrs.validators.gt(0))

    def __attrs_post_init__(self) -> None:
        if self.ahead_min > self.ahead_max:
            raise ValueError(f"ahead_min is {self.ahead_min}, ahead_max only {self.ahead_max}")

    def build(self, inbound: Inbound, outbox: Outbox, rng: random.Random) -> OfferExchange:
        """The exchange with these bounds."""
        inbound.slow_max = self.inbound
        return OfferExchange(self, inbound, outbox, rng)


@attrs.define(eq=False)
class _Line:
    """One connection as the exchange sees it.

    Attributes:
        wanted_at: when we last said that we want something there; None when no want is open.
        counted: whether that want counts against the limit.
        waits: whether the peer waits in line for an offer of ours.
        offered_until: when our offer to it lapses; None when none is open.
        suggested: the piece that we suggested with it, or -1.
        lapses: offers that it did not answer, since the last one that it did.
    """

    torrent: Torrent
    peer: Peer
    wanted_at: float | None = None
    counted: bool = False
    waits: bool = False
    offered_until: float | None = None
    suggested: int = -1
    lapses: int = 0


@attrs.define
class _Sending:
    """A piece on its way.

    Attributes:
        moved_at: when bytes of it last left, as far as was told, or it began.
        stuck: it takes so long that its slot is free for another.
    """

    index: int
    began: float
    moved_at: float
    stuck: bool = False


class OfferExchange:
    """Offer and claim for one host; implements `swarmpull.swarm.exchange.Exchange`."""

    def __init__(
        self, limits: OfferLimits, inbound: Inbound, outbox: Outbox, rng: random.Random
    ) -> None:
        self._limits = limits
        self._inbound = inbound
        self._outbox = outbox
        self._rng = rng
        self._lines: dict[int, _Line] = {}
        self._ahead = limits.ahead_min
        self._draining = False
        # As an uploader: who waits, by torrent; offers out; claims that wait; pieces on their way.
        self._queues: dict[Torrent, deque[_Line]] = {}
        self._waiting = 0
        self._offers: dict[int, _Line] = {}
        self._ready: deque[tuple[int, int]] = deque()
        self._sending: dict[int, _Sending] = {}
        self._stuck = 0
        self._pace = PieceTiming()
        self._ungiven: dict[Torrent, int] = {}
        # As a leecher: wants that count, and the connections on which none is open; how many claims may be
        # outstanding, which follows the bandwidth-delay product.
        self._wants = 0
        self._quiet: dict[int, _Line] = {}
        self._inbound_max = limits.inbound
        self._path = PathTiming()
        self._handlers: dict[type, Callable[[_Line, Any, float], None]] = {
            Want: self._want_received,
            Offer: self._offer_received,
            Claim: self._claim_received,
            Pass: self._pass_received,
            Cancel: self._cancel_received,
        }

    # --- called by the scheduler --------------------------------------------------------------

    def joined(self, torrent: Torrent, peer: Peer, now: float) -> None:
        line = self._lines[peer.connection] = _Line(torrent, peer)
        if torrent.is_complete:
            self._forget_given(torrent, peer.have)
        else:
            self._quiet[peer.connection] = line
        self._consider(line, now)

    def left(self, torrent: Torrent, peer: Peer, now: float) -> None:
        line = self._lines.pop(peer.connection)
        self._end_want(line)
        self._quiet.pop(peer.connection, None)
        self._leave_line(line)
        self._take_back_offer(line)
        sending = self._sending.pop(peer.connection, None)
        if sending is not None:
            self._stuck -= sending.stuck
            self._not_given(torrent, sending.index)
        for entry in [entry for entry in self._ready if entry[0] == peer.connection]:
            self._take_back_claim(torrent, entry)
        if not torrent.peers:
            self._queues.pop(torrent, None)
            self._ungiven.pop(torrent, None)
        self._proceed(now)

    def gained(self, torrent: Torrent, peer: Peer, index: int, now: float) -> None:
        if index < 0:
            self._leave_line(self._lines[peer.connection])
        if torrent.is_complete:
            self._forget_given(torrent, peer.have if index < 0 else 1 << index)
        else:
            self._consider(self._lines[peer.connection], now)

    def received(
        self,
        torrent: Torrent,  # noqa: ARG002
        peer: Peer,
        message: Message,
        now: float,
    ) -> None:
        self._handlers[type(message)](self._lines[peer.connection], message, now)

    def arrived(self, torrent: Torrent, peer: Peer, now: float) -> None:  # noqa: ARG002
        if torrent.full == torrent.have | torrent.verifying:
            for other in torrent.peers:
                self._stop_counting(self._lines[other])
        # What has only one piece may be tiny, and says nothing of how fast pieces come.
        if torrent.piece_count > 1 and self._path.arrived(now):
            inbound = self._limits.inbound
            self._inbound_max = inbound + min(self._path.pieces(), inbound)
        self._inbound.find_overdue(now)
        self._consider_all(now)

    def freed(self, torrent: Torrent, now: float) -> None:  # noqa: ARG002
        self._consider_all(now)

    def progressed(self, connection: int, index: int, now: float) -> None:
        sending = self._sending.get(connection)
        if sending is not None and sending.index == index:
            sending.moved_at = now

    def sent(self, connection: int, index: int, now: float) -> None:
        sending = self._sending.get(connection)
        if sending is None or sending.index != index:
            return
        del self._sending[connection]
        self._stuck -= sending.stuck
        if not sending.stuck:
            self._pace.add((now - sending.began) / self._lines[connection].torrent.piece_scale)
        self._adapt()
        self._find_stuck(now)
        self._proceed(now)

    def tick(self, now: float) -> list[int]:
        silent = self._lapse_offers(now)
        self._find_stuck(now)
        self._proceed(now)
        self._lose_patience(now)
        overdue = now - self._limits.send_timeout
        stalled = [c for c, sending in self._sending.items() if sending.moved_at <= overdue]
        return silent + stalled

    def is_busy(self, connection: int) -> bool:
        return (
            connection in self._sending
            or connection in self._offers
            or any(entry[0] == connection for entry in self._ready)
        )

    def drain(self) -> None:
        self._draining = True
        self._ready.clear()
        for line in list(self._offers.values()):
            self._take_back_offer(line)

    def uplink(self) -> Uplink:
        return Uplink(len(self._sending), len(self._ready), len(self._offers), self._waiting)

    def check_invariants(self) -> None:
        limits = self._limits
        assert limits.inbound <= self._inbound_max <= 2 * limits.inbound
        assert self._slots_taken() <= limits.slots
        assert self._stuck == sum(sending.stuck for sending in self._sending.values())
        assert self._waiting == sum(map(len, self._queues.values()))
        assert self._waiting == sum(line.waits for line in self._lines.values())
        for line in self._lines.values():
            assert (line in self._quiet.values()) <= (line.wanted_at is None)
            if line.wanted_at is None and not line.torrent.is_complete:
                assert line.peer.connection in self._quiet
        assert limits.ahead_min <= self._ahead <= limits.ahead_max
        assert self._wants == sum(line.counted for line in self._lines.values())
        for line in self._lines.values():
            assert line.counted <= (line.wanted_at is not None)
            assert (line.offered_until is not None) == (line.peer.connection in self._offers)
            assert not (line.waits and line not in self._queues[line.torrent])
        for connection in (*self._offers, *self._sending, *(entry[0] for entry in self._ready)):
            assert connection in self._lines, "promises are only made to connected peers"

    # --- uploading ----------------------------------------------------------------------------

    def _want_received(self, line: _Line, _want: Want, now: float) -> None:
        if line.waits or line.offered_until is not None:
            return
        line.waits = True
        self._waiting += 1
        self._queues.setdefault(line.torrent, deque()).append(line)
        self._proceed(now)

    def _lapse_offers(self, now: float) -> list[int]:
        """Take back the offers that were not answered; returns the connections of those who never do."""
        silent = []
        for line in [line for line in self._offers.values() if _lapsed(line, now)]:
            self._take_back_offer(line)
            line.lapses += 1
            if line.lapses >= LAPSES_MAX:
                silent.append(line.peer.connection)
        return silent

    def _claim_received(self, line: _Line, claim: Claim, now: float) -> None:
        index = claim.index
        self._answered(line, now)
        offered = line.offered_until is not None
        # Late or not, it answers: on a slow link an offer waits behind the bytes of a piece.
        line.lapses = 0
        if offered:
            self._end_offer(line, claimed=index)
        if not offered or self._draining or not (line.torrent.have >> index) & 1:
            self._outbox.send(line.peer.connection, Pass(index))
        elif not self._is_sending(line, index):
            self._forget_given(line.torrent, 1 << index)
            self._ready.append((line.peer.connection, index))
        self._proceed(now)

    def _is_sending(self, line: _Line, index: int) -> bool:
        """Whether this piece was taken back and claimed again while it was on its way."""
        sending = self._sending.get(line.peer.connection)
        return sending is not None and sending.index == index

    def _cancel_received(self, line: _Line, cancel: Cancel, now: float) -> None:
        entry = (line.peer.connection, cancel.index)
        if entry in self._ready:
            self._take_back_claim(line.torrent, entry)
            self._proceed(now)

    def _take_back_claim(self, torrent: Torrent, entry: tuple[int, int]) -> None:
        self._ready.remove(entry)
        self._not_given(torrent, entry[1])

    def _leave_line(self, line: _Line) -> None:
        if line.waits:
            line.waits = False
            self._waiting -= 1
            self._queues[line.torrent].remove(line)

    def _proceed(self, now: float) -> None:
        """Send what is claimed, and keep enough promises out to go on without a gap."""
        if self._ready:
            self._start(now)
        while self._waiting and self._promises(now) < self._ahead:
            line = self._next_in_line()
            if line is None:
                return
            self._offer(line, now)

    def _promises(self, now: float) -> int:
        """Claims that wait, and offers that may be answered any moment."""
        promises = len(self._ready)
        for line in self._offers.values():
            if line.offered_until is not None and line.offered_until - now > _UNPROMISED:
                promises += 1
        return promises

    def _start(self, now: float) -> None:
        while self._ready and self._slots_taken() < self._limits.slots:
            entry = next((e for e in self._ready if e[0] not in self._sending), None)
            if entry is None:
                return
            self._ready.remove(entry)
            connection, index = entry
            self._sending[connection] = _Sending(index, now, now)
            self._outbox.send_piece(connection, self._lines[connection].torrent.digest, index)

    def _slots_taken(self) -> int:
        return len(self._sending) - self._stuck

    def _find_stuck(self, now: float) -> None:
        """One receiver that takes its piece slowly must not hold up the others: its slot is free for another.

        Nor the swarm: until the piece is through, nobody has it who could pass it on.
        """
        for connection, sending in self._sending.items():
            if not sending.stuck:
                torrent = self._lines[connection].torrent
                if now - sending.began >= self._pace.timeout() * torrent.piece_scale:
                    sending.stuck = True
                    self._stuck += 1
                    self._pace.back_off()
                    self._not_given(torrent, sending.index)

    def _next_in_line(self) -> _Line | None:
        """Whoever has waited longest in the torrent whose turn it is."""
        if self._draining:
            return None
        for torrent in list(self._queues):
            queue = self._queues.pop(torrent)
            if queue:
                line = queue.popleft()
                self._waiting -= 1
                self._queues[torrent] = queue  # at the end: the other torrents come first
                return line
        return None

    def _offer(self, line: _Line, now: float) -> None:
        line.waits = False
        line.offered_until = now + OFFER_TIMEOUT
        line.suggested = self._suggestion(line)
        self._offers[line.peer.connection] = line
        message = _OFFER if line.suggested < 0 else Offer(line.suggested)
        self._outbox.send(line.peer.connection, message)

    def _suggestion(self, line: _Line) -> int:
        """A piece that this peer lacks, that no neighbour has, and that we have not given; or -1."""
        torrent = line.torrent
        if not torrent.is_complete or len(torrent.peers) == 1:
            return -1
        ungiven = self._ungiven.get(torrent)
        if ungiven is None:
            ungiven = torrent.full
            for peer in torrent.peers.values():
                ungiven &= ~peer.have
            self._ungiven[torrent] = ungiven
        ungiven &= ~line.peer.have
        if not ungiven:
            return -1
        if self._rng.random() < IN_ORDER_SHARE:
            index = bitfield.lowest(ungiven)
        else:
            index = _random_bit(ungiven, self._rng)
        self._forget_given(torrent, 1 << index)
        return index

    def _forget_given(self, torrent: Torrent, pieces: int) -> None:
        ungiven = self._ungiven.get(torrent)
        if ungiven:
            self._ungiven[torrent] = ungiven & ~pieces

    def _answered(self, line: _Line, now: float) -> None:
        """An offer is answered at once: that took the round trip."""
        if line.offered_until is not None:
            self._path.answered(now - (line.offered_until - OFFER_TIMEOUT))

    def _end_offer(self, line: _Line, *, claimed: int) -> None:
        """The offer is answered; a suggestion that was not taken is open again."""
        line.offered_until = None
        del self._offers[line.peer.connection]
        if line.suggested >= 0 and line.suggested != claimed:
            self._not_given(line.torrent, line.suggested)
        line.suggested = -1

    def _not_given(self, torrent: Torrent, index: int) -> None:
        """What was to leave has not left."""
        if torrent in self._ungiven:
            self._ungiven[torrent] |= 1 << index

    def _take_back_offer(self, line: _Line) -> None:
        if line.offered_until is not None:
            self._end_offer(line, claimed=-1)

    def _adapt(self) -> None:
        """Fit the promises to the bandwidth-delay product."""
        if not self._sending and not self._ready and self._waiting:
            self._ahead = min(self._ahead + 1, self._limits.ahead_max)
        elif len(self._ready) > self._limits.ahead_min:
            self._ahead = max(self._ahead - 1, self._limits.ahead_min)

    # --- downloading --------------------------------------------------------------------------

    def _offer_received(self, line: _Line, offer: Offer, now: float) -> None:
        self._end_want(line)
        torrent = line.torrent
        index = None
        if self._has_room(torrent) and not self._draining:
            index = self._choose(line, offer.index)
        if index is None:
            self._outbox.send(line.peer.connection, _PASS)
            self._consider(line, now)
            return
        torrent.claim(line.peer, index, now)
        self._outbox.send(line.peer.connection, Claim(index))
        self._consider(line, now)

    def _pass_received(self, line: _Line, refusal: Pass, now: float) -> None:
        if refusal.index < 0:
            self._answered(line, now)
            line.lapses = 0
            self._take_back_offer(line)
            self._proceed(now)
            return
        line.torrent.passed(line.peer, refusal.index)
        self._consider_all(now)

    def _has_room(self, torrent: Torrent) -> bool:
        return self._inbound.claims < self._inbound_max or not torrent.claimed

    def _choose(self, line: _Line, suggested: int) -> int | None:
        free = line.torrent.free_pieces(line.peer)
        overdue = line.torrent.overdue_pieces(line.peer) if line.torrent.overdue else 0
        if suggested >= 0 and (free >> suggested) & 1:
            return suggested  # before a reader's: as long as nobody has it, all their readers wait
        urgent = line.torrent.picker.pick_urgent(free | overdue)
        if urgent is not None:
            return urgent
        if not free:
            # Endgame: what others take too long over.
            return line.torrent.picker.pick_rarest(overdue) if overdue else None
        if line.torrent.is_only_leecher:
            # Nobody to be rare for, and in order the blob is hashed sooner.
            return bitfield.lowest(free)
        return line.torrent.picker.pick_rarest(free)

    def _consider(self, line: _Line, now: float) -> None:
        """Want something of this peer, if it has anything for us and we have room."""
        if line.wanted_at is not None or self._draining:
            return
        if line.peer.claims and not line.peer.is_proven:
            return  # one claim is enough to find out whether it gives anything
        torrent = line.torrent
        if not self._may_want(torrent):
            return
        if not torrent.free_pieces(line.peer) and not (
            torrent.overdue and torrent.overdue_pieces(line.peer)
        ):
            return
        line.wanted_at = now
        self._quiet.pop(line.peer.connection, None)
        line.counted = True
        self._wants += 1
        self._outbox.send(line.peer.connection, _WANT)

    def _consider_all(self, now: float) -> None:
        """Want something of others; begins at a random one, so that no neighbour is favoured."""
        lines = list(self._quiet.values())
        if not lines:
            return
        start = int(self._rng.random() * len(lines))
        wants_max = WANTS_FOR_ROOM * (self._inbound_max - self._inbound.claims)
        for line in lines[start:] + lines[:start]:
            torrent = line.torrent
            if (
                self._wants < wants_max or not torrent.claimed
            ):  # as `_may_want`, which is a call for each
                if torrent.is_complete:
                    del self._quiet[line.peer.connection]
                else:
                    self._consider(line, now)

    def _may_want(self, torrent: Torrent) -> bool:
        """Whether there is room for one more want; a torrent with no claim at all may always want."""
        room = self._inbound_max - self._inbound.claims
        return not torrent.claimed or self._wants < WANTS_FOR_ROOM * room

    def _end_want(self, line: _Line) -> None:
        line.wanted_at = None
        self._quiet[line.peer.connection] = line
        self._stop_counting(line)

    def _stop_counting(self, line: _Line) -> None:
        if line.counted:
            line.counted = False
            self._wants -= 1

    def _lose_patience(self, now: float) -> None:
        """Do not let neighbours that never offer use up the wants; ask those again that passed.

        A claim is passed when its offer had lapsed, which says nothing of the next one.
        """
        lost = self._inbound.find_overdue(now)
        for line in self._lines.values():
            if line.peer.passed:
                line.peer.passed = 0
                lost = True
            if line.counted and line.wanted_at is not None and now - line.wanted_at > WANT_PATIENCE:
                self._stop_counting(line)
                lost = True
        if lost:
            self._consider_all(now)


def _lapsed(line: _Line, now: float) -> bool:
    return line.offered_until is not None and line.offered_until <= now


def _random_bit(bits: int, rng: random.Random) -> int:
    """One of the set bits; the first at or after a random place."""
    start = int(rng.random() * bits.bit_length())
    part = bits >> start
    if part:
        return start + bitfield.lowest(part)
    return bitfield.lowest(bits)
