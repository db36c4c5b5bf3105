"""What an agent or origin counts about its swarms."""

from __future__ import annotations

from prometheus_client import Counter

from swarmpull.swarm.peers import PeerKind
from swarmpull.telemetry import Metrics


class SwarmMetrics:
    """The swarm metrics of one role."""

    def __init__(self, metrics: Metrics) -> None:
        self.pieces_received = metrics.counter(
            "pieces_received_total",
            "Pieces that were received, matched their hash and were stored, by kind of sender.",
            ["source"],
        )
        self.bytes_received = metrics.counter(
            "piece_bytes_received_total",
            "Bytes of the pieces that were stored, by kind of sender.",
            ["source"],
        )
        self.pieces_sent = metrics.counter("pieces_sent_total", "Pieces sent to peers.")
        self.bytes_sent = metrics.counter("piece_bytes_sent_total", "Bytes of pieces sent.")
        self.bytes_wasted = metrics.counter(
            "piece_bytes_wasted_total",
            "Bytes of pieces that arrived when they were no longer needed.",
        )
        self.pieces_rejected = metrics.counter(
            "pieces_rejected_total", "Pieces that did not match their hash."
        )
        self.small_blobs = metrics.counter(
            "small_blobs_received_total", "Blobs that came whole with their metainfo."
        )
        self.small_blob_bytes = metrics.counter(
            "small_blob_bytes_received_total", "Bytes of those blobs."
        )
        self.downloads = metrics.counter(
            "downloads_total", "Downloads that ended, by outcome.", ["outcome"]
        )
        self.connections = metrics.gauge("peer_connections", "Peer connections that are up.")
        for kind in PeerKind:
            self.pieces_received.labels(kind.value)
            self.bytes_received.labels(kind.value)
        for outcome in ("complete", "failed", "unread"):
            self.downloads.labels(outcome)

    def received_by_source(self) -> tuple[dict[str, int], dict[str, int]]:
        """Pieces and bytes received, each by kind of sender."""
        pieces = {kind.value: _value(self.pieces_received.labels(kind.value)) for kind in PeerKind}
        received = {kind.value: _value(self.bytes_received.labels(kind.value)) for kind in PeerKind}
        return pieces, received

    def sent(self) -> int:
        """Bytes of pieces sent."""
        return _value(self.bytes_sent)


def _value(counter: Counter) -> int:
    return int(
        next(s.value for m in counter.collect() for s in m.samples if s.name.endswith("_total"))
    )
