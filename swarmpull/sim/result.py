"""What comes out of a simulated experiment."""

from __future__ import annotations

import math
from typing import Any

import attrs

from swarmpull.sim.options import Policy, SimulationOptions
from swarmpull.sim.sampling import Sample, quantile

QUANTILES = {"p1": 0.01, "p50": 0.5, "p99": 0.99, "p99.9": 0.999, "max": 1.0}


@attrs.frozen(kw_only=True)
class SimulationResult:
    """Times are in seconds from each pull's own start, sorted.

    Attributes:
        policy: that was simulated.
        completed: pulls of surviving, honest agents that finished every layer.
        expected: how many were to.
        gave_up: of those, how many downloads failed for want of progress.
        times: of the pulls of healthy agents.
        faulty_times: of those that were slow, delayed or cut off.
        first_bytes: until the first piece of the first layer was stored; of healthy agents.
        makespan: from the start of the simulation to the last finish of a healthy agent; ``last_finish``: of
            any that survived.
        longest_wait: of a healthy agent for its next piece, from its start to its last piece.
        bound: the least time for the last pull; with many images, for the busiest link from the start.
        bytes_total: of all images, each once.
        bytes_from_origins, bytes_from_agents: payload that left them.
        pieces: that were stored.
        messages: control messages of the peer protocol.
        announces, watches: that reached a tracker.
        connections: that came up; ``dropped``: of those, that ended before the end of the run.
        refused: dials that did not become a connection.
        agent_uplinks, origin_uplinks: which share of the time they did what, by `Idleness`.
        samples: the swarm over time.
        events: happenings processed.
    """

    policy: Policy
    completed: int
    expected: int
    gave_up: int
    times: tuple[float, ...]
    faulty_times: tuple[float, ...]
    first_bytes: tuple[float, ...]
    makespan: float
    last_finish: float
    longest_wait: float
    bound: float
    bytes_total: int
    bytes_from_origins: int
    bytes_from_agents: int
    pieces: int
    messages: int
    announces: int
    watches: int
    connections: int
    dropped: int
    refused: int
    agent_uplinks: dict[str, float]
    origin_uplinks: dict[str, float]
    samples: tuple[Sample, ...]
    events: int

    def quantile(self, share: float) -> float:
        """The time within which that share of the healthy pulls finished; nan when none did."""
        return quantile(self.times, share)

    def ratio(self, share: float) -> float:
        """`quantile` as a multiple of the bound."""
        return self.quantile(share) / self.bound

    @property
    def copies_from_origins(self) -> float:
        """How often everything left the origins."""
        return self.bytes_from_origins / self.bytes_total

    @property
    def messages_per_piece(self) -> float:
        return self.messages / max(self.pieces, 1)

    def document(self, options: SimulationOptions) -> dict[str, Any]:
        """Everything but the samples, for JSON: numbers that do not exist are None."""
        times = {name: _number(self.quantile(share)) for name, share in QUANTILES.items()}
        ratios = {name: _number(self.ratio(share)) for name, share in QUANTILES.items()}
        return {
            "options": _options_document(options),
            "policy": self.policy.value,
            "completed": self.completed,
            "expected": self.expected,
            "gave_up": self.gave_up,
            "bound": self.bound,
            "seconds": times,
            "ratio": ratios,
            "faulty_seconds": {
                name: _number(quantile(self.faulty_times, share))
                for name, share in QUANTILES.items()
            },
            "first_byte": {
                name: _number(quantile(self.first_bytes, QUANTILES[name]))
                for name in ("p50", "p99", "max")
            },
            "makespan": _number(self.makespan),
            "makespan_ratio": _number(self.makespan / self.bound),
            "copies_from_origins": self.copies_from_origins,
            "bytes_from_agents": self.bytes_from_agents,
            "messages_per_piece": self.messages_per_piece,
            "announces": self.announces,
            "watches": self.watches,
            "connections": {
                "made": self.connections,
                "dropped": self.dropped,
                "refused": self.refused,
            },
            "uplinks": {"agents": self.agent_uplinks, "origins": self.origin_uplinks},
            "events": self.events,
        }


def _options_document(options: SimulationOptions) -> dict[str, Any]:
    document: dict[str, Any] = attrs.asdict(options, recurse=False)
    document["faults"] = ",".join(map(str, options.faults))
    document["policy"] = options.policy.value
    return {
        key: _number(value) if isinstance(value, float) else value
        for key, value in document.items()
    }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
