"""The request-queue exchange: a few claims outstanding at each peer that has something we lack.

This is the classic shape (BitTorrent, Kraken), kept as the baseline to compare `swarmpull.swarm.offers`
with.  It binds a piece to an uploader long before that uploader is free; by chance some have long queues
while others have nothing to do.
"""

from __future__ import annotations

import random

import attrs

from swarmpull.swarm.exchange import Outbox, Uplink
from swarmpull.swarm.messages import Cancel, Claim, Message, Pass
from swarmpull.swarm.torrent import Inbound, Peer, Torrent
from swarmpull.swarm.uploads import UploadLimits, Uploads


@attrs.frozen(kw_only=True)
class PipelineLimits:
    """Bounds on outstanding claims.

    Attributes:
        per_peer: claims outstanding at one peer: enough to hide the round trip, no more, for what
            waits there cannot be had elsewhere.
        endgame_claimants: peers at which the last missing pieces may be claimed at the same time.
        uploads: bounds on what is sent.
    """

    per_peer: int = attrs.field(default=3, validator=attrs.validators.ge(1))
    endgame_claimants: int = attrs.field(default=2, validator=attrs.validators.ge(1))
    uploads: UploadLimits = attrs.field(factory=UploadLimits)

    def build(self, _inbound: Inbound, outbox: Outbox, _rng: random.Random) -> PipelineExchange:
        """The exchange with these bounds."""
        return PipelineExchange(self, outbox)


class PipelineExchange:
    """Rarest first with a bounded pipeline, and an endgame; implements `swarmpull.swarm.exchange.Exchange`.

    In the endgame, when every missing piece is claimed somewhere, a peer with nothing outstanding may be
    asked for a piece that another one owes; the first to deliver wins and the other claim is cancelled.
    """

    def __init__(self, limits: PipelineLimits, outbox: Outbox) -> None:
        self._limits = limits
        self._outbox = outbox
        self._uploads = Uploads(limits.uploads)
        self._torrents: dict[int, Torrent] = {}
        self._draining = False

    def joined(self, torrent: Torrent, peer: Peer, now: float) -> None:
        self._torrents[peer.connection] = torrent
        self._claim_from(torrent, peer, now)

    def left(self, torrent: Torrent, peer: Peer, now: float) -> None:  # noqa: ARG002
        del self._torrents[peer.connection]
        self._uploads.drop_connection(peer.connection)
        self._start_uploads(now)

    def gained(self, torrent: Torrent, peer: Peer, index: int, now: float) -> None:  # noqa: ARG002
        self._claim_from(torrent, peer, now)

    def received(self, torrent: Torrent, peer: Peer, message: Message, now: float) -> None:
        match message:
            case Claim(index):
                self._claim_received(torrent, peer, index, now)
            case Cancel(index):
                self._uploads.cancel(peer.connection, index)
            case Pass(index) if index >= 0:
                self._pass_received(torrent, peer, index, now)

    def arrived(self, torrent: Torrent, peer: Peer, now: float) -> None:
        self._claim_from(torrent, peer, now)

    def freed(self, torrent: Torrent, now: float) -> None:
        # What was taken back from a late peer goes to another one if there is one.
        for peer in sorted(torrent.peers.values(), key=lambda peer: peer.late_in_a_row):
            self._claim_from(torrent, peer, now)

    def progressed(self, connection: int, index: int, now: float) -> None:
        self._uploads.progressed(connection, index, now)

    def sent(self, connection: int, index: int, now: float) -> None:
        self._uploads.sent(connection, index)
        self._start_uploads(now)

    def tick(self, now: float) -> list[int]:
        return self._uploads.stalled(now)

    def is_busy(self, connection: int) -> bool:
        return self._uploads.is_busy(connection)

    def drain(self) -> None:
        self._draining = True
        self._uploads.drop_waiting()

    def uplink(self) -> Uplink:
        return Uplink(self._uploads.sending_count, self._uploads.waiting_count, 0, 0)

    def check_invariants(self) -> None:
        self._uploads.check_invariants()

    def _claim_received(self, torrent: Torrent, peer: Peer, index: int, now: float) -> None:
        had = (torrent.have >> index) & 1
        if not had or self._draining or not self._uploads.claim(peer.connection, index):
            self._outbox.send(peer.connection, Pass(index))
        self._start_uploads(now)

    def _pass_received(self, torrent: Torrent, peer: Peer, index: int, now: float) -> None:
        torrent.passed(peer, index)
        for other in torrent.peers.values():
            # A peer that owes us pieces has passed for want of room: it would pass the next one too.
            if other is not peer or not peer.claims:
                self._claim_from(torrent, other, now)

    def _start_uploads(self, now: float) -> None:
        while (upload := self._uploads.start_next(now)) is not None:
            connection, index = upload
            self._outbox.send_piece(connection, self._torrents[connection].digest, index)

    def _claim_from(self, torrent: Torrent, peer: Peer, now: float) -> None:
        if torrent.is_complete or self._draining:
            return
        while (index := self._next_claim(torrent, peer)) is not None:
            torrent.claim(peer, index, now)
            self._outbox.send(peer.connection, Claim(index))

    def _next_claim(self, torrent: Torrent, peer: Peer) -> int | None:
        if len(peer.claims) >= self._limits.per_peer:
            return None
        index = torrent.picker.pick(torrent.free_pieces(peer))
        if index is None and not peer.claims:
            index = torrent.picker.pick(torrent.owed_pieces(peer, self._limits.endgame_claimants))
        return index
