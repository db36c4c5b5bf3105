"""What the admin listener of an agent or origin says about it."""

from __future__ import annotations

from swarmpull.ring.membership import Membership
from swarmpull.roles.swarm_host import SwarmHost
from swarmpull.swarm.torrent import TorrentStatistics


def unreachable(*rings: Membership) -> list[str]:
    """A reason for each ring of which no member answers."""
    return [
        f"no {ring.name} answers: {', '.join(ring.entries)}"
        for ring in rings
        if set(ring.members) <= set(ring.unhealthy())
    ]


def swarm_status(host: SwarmHost) -> dict[str, object]:
    """The swarm part of the document that ``swarmpull status`` shows."""
    pieces, received = host.metrics.received_by_source()
    torrents = sorted(host.torrents(), key=lambda torrent: torrent.have == torrent.pieces)
    return {
        "pieces_received": pieces,
        "bytes_received": received,
        "bytes_sent": host.metrics.sent(),
        "torrents": [_row(torrent) for torrent in torrents],
    }


def _row(torrent: TorrentStatistics) -> dict[str, object]:
    return {
        "digest": str(torrent.digest),
        "length": torrent.length,
        "pieces": torrent.pieces,
        "have": torrent.have,
        "state": "seeding" if torrent.have == torrent.pieces else "downloading",
        "peers": torrent.agents + torrent.origins,
    }
