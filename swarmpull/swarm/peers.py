"""Who a peer is: identity and address, as trackers hand them out."""

from __future__ import annotations

import enum

import attrs


class PeerKind(enum.Enum):
    """What role a peer runs in; origins are dedicated seeders."""

    AGENT = "agent"
    ORIGIN = "origin"


class AnnounceState(enum.Enum):
    """What a peer tells the tracker that it is in a swarm."""

    LEECHING = "leeching"
    COMPLETE = "complete"
    STOPPED = "stopped"


@attrs.frozen(cache_hash=True)
class PeerContact:
    """One peer and where it listens.

    Attributes:
        peer_id: 32 hex digits, made anew at each start of the process.
        host: address that others dial; empty means "the address you see me at".
        port: TCP port of the peer protocol.
        kind: agent or origin.
        encoded: its form on the wire, kept here by whoever sends it again and again; no part of its value.
    """

    peer_id: str
    host: str
    port: int
    kind: PeerKind
    encoded: bytes = attrs.field(default=b"", init=False, eq=False, repr=False)

    def seen_at(self, host: str) -> PeerContact:
        """As others can dial it, who see it at ``host``: what it advertises goes before."""
        return self if self.host else attrs.evolve(self, host=host)
