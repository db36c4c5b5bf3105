"""What a role shows of the rings that it calls: how their members are, and lookups that were asked twice."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from swarmpull.ring.membership import Membership
from swarmpull.roles.ring_client import RingClient
from swarmpull.telemetry import Metrics


class RingMetrics:
    """The metrics of all rings of one role, by name of the ring."""

    def __init__(self, metrics: Metrics) -> None:
        self._members = metrics.gauge(
            "ring_members",
            "Members of a ring, by how this role finds them: healthy, suspect, unhealthy.",
            ["ring", "state"],
        )
        self._lookups = metrics.counter(
            "ring_lookups_total", "Lookups that may be asked of a second member.", ["ring"]
        )
        self._hedges = metrics.counter(
            "ring_hedges_total",
            "Second members that a lookup was asked of (sent), that were believed (won), and that there "
            "was no budget to ask (refused).",
            ["ring", "what"],
        )

    def show_all(self, clients: Iterable[RingClient]) -> None:
        """Show several rings, each once."""
        for client in clients:
            self.show(client)

    def show(self, client: RingClient) -> RingClient:
        """Show one more ring; returns it."""
        lookups = self._lookups.labels(client.name)
        hedges = {what: self._hedges.labels(client.name, what) for what in client.HEDGES}
        client.on_lookup = lookups.inc
        client.on_hedge = lambda what: hedges[what].inc()
        for state in client.members.STATES:
            gauge = self._members.labels(client.name, state)
            gauge.set_function(partial(_count, client.members, state))
        return client


def _count(members: Membership, state: str) -> float:
    return members.states()[state]
