"""The request-queue policy: a few claims outstanding at each peer that has something we lack.

This is the classic shape (BitTorrent, Kraken): simple, and it binds a piece to an uploader long before
that uploader is free.  It is one `ClaimPolicy`; the bookkeeping that any policy needs is in
`swarmpull.swarm.torrent`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import attrs

if TYPE_CHECKING:
    from swarmpull.swarm.torrent import Peer, Torrent


class ClaimPolicy(Protocol):
    """Decides what a leecher claims; holds no state of its own about a torrent."""

    def next_claim(self, torrent: Torrent, peer: Peer) -> int | None:
        """The piece to claim from this peer at this moment; None for nothing now.

        Asked again, until it answers None, whenever something changed that may free a claim.
        """
        ...


@attrs.frozen(kw_only=True)
class PipelineLimits:
    """Bounds on outstanding claims.

    Attributes:
        per_peer: claims outstanding at one peer: enough to hide the round trip, no more, for what
            waits there cannot be had elsewhere.
        endgame_claimants: peers at which the last missing pieces may be claimed at the same time.
    """

    per_peer: int = attrs.field(default=3, validator=attrs.validators.ge(1))
    endgame_claimants: int = attrs.field(default=2, validator=attrs.validators.ge(1))


@attrs.frozen
class PipelinePolicy:
    """Rarest first with a bounded pipeline, and an endgame.

    In the endgame, when every missing piece is claimed somewhere, a peer with nothing outstanding may be
    asked for a piece that another one owes; the first to deliver wins and the other claim is cancelled.
    """

    limits: PipelineLimits = attrs.field(factory=PipelineLimits)

    def next_claim(self, torrent: Torrent, peer: Peer) -> int | None:
        if len(peer.claims) >= self.limits.per_peer:
            return None
        index = torrent.picker.pick(torrent.free_pieces(peer))
        if index is None and not peer.claims:
            index = torrent.picker.pick(torrent.owed_pieces(peer, self.limits.endgame_claimants))
        return index
