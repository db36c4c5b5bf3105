"""What a role shows of the rings that it calls."""

from __future__ import annotations

import attrs
import pytest
import trio

from swarmpull.errors import RpcUnavailable
from swarmpull.roles.ring_client import RingClient, open_ring
from swarmpull.roles.ring_metrics import RingMetrics
from swarmpull.telemetry import Metrics
from swarmpull.wire import api
from swarmpull.wire.rpc import Method

ADDRESSES = ("127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3")
LOOK = Method("test.look", api.Empty, api.Empty)


@attrs.define
class Pool:
    """Members that answer, hang for a while, or are dead."""

    slow: dict[str, float] = attrs.Factory(dict)
    dead: set[str] = attrs.Factory(set)

    async def call(self, address: str, method, request, *, timeout: float):
        if address in self.dead:
            await trio.lowlevel.checkpoint()
            raise RpcUnavailable(address, method.name, "refused")
        await trio.sleep(self.slow.get(address, 0.001) if method is LOOK else 0.001)
        return api.Empty()


def shown(metrics: Metrics) -> dict[str, float]:
    """What is not 0, by name and labels."""
    lines = metrics.render()[0].decode().splitlines()
    rings = [line.split() for line in lines if line.startswith("swarmpull_ring_")]
    return {
        name.removeprefix("swarmpull_ring_"): float(value)
        for name, value in rings
        if float(value) and "_created" not in name
    }


@pytest.fixture
async def ring(autojump_clock, nursery):
    pool, metrics = Pool(), Metrics()
    members = open_ring(pool, ADDRESSES, "index")
    await nursery.start(members.run)
    return pool, RingMetrics(metrics).show(RingClient(pool, members)), metrics


async def look(client: RingClient, times: int = 1) -> None:
    for _ in range(times):
        await client.look_up("key", LOOK, api.Empty(), timeout=10.0)


async def test_a_ring_that_is_well_shows_its_members_and_lookups(ring) -> None:
    _, client, metrics = ring
    await look(client, 3)

    assert shown(metrics) == {
        'members{ring="index",state="healthy"}': 3.0,
        'lookups_total{ring="index"}': 3.0,
    }


async def test_a_dead_member_is_suspect_and_then_unhealthy(ring) -> None:
    pool, client, metrics = ring
    pool.dead = {client.members.preference("key")[0]}
    await look(client)
    assert shown(metrics)['members{ring="index",state="suspect"}'] == 1.0
    await trio.sleep(3)

    states = {name: value for name, value in shown(metrics).items() if "state" in name}
    assert states == {
        'members{ring="index",state="healthy"}': 2.0,
        'members{ring="index",state="unhealthy"}': 1.0,
    }
    assert 'hedges_total{ring="index",what="sent"}' not in shown(metrics), "it failed: no hedge"


async def test_second_members_that_are_asked_and_believed_are_counted(ring) -> None:
    pool, client, metrics = ring
    first, second, third = client.members.preference("key")
    await look(client, 20)
    pool.slow = {first: 5.0}
    await look(client)
    # The first one is a suspect now, and passed over; so is the second, which is slow but first to answer.
    pool.slow = {first: 5.0, second: 0.2, third: 5.0}
    await look(client)

    hedges = {name: value for name, value in shown(metrics).items() if "hedges" in name}
    assert hedges['hedges_total{ring="index",what="sent"}'] >= 2.0
    assert hedges['hedges_total{ring="index",what="won"}'] == 1.0


async def test_a_ring_that_is_slow_as_a_whole_shows_that_no_more_is_asked_twice(ring) -> None:
    pool, client, metrics = ring
    await look(client, 20)
    pool.slow = dict.fromkeys(ADDRESSES, 3.0)
    async with trio.open_nursery() as lookups:
        for _ in range(40):
            lookups.start_soon(look, client)

    assert shown(metrics)['hedges_total{ring="index",what="sent"}'] <= 24.0
    assert shown(metrics)['hedges_total{ring="index",what="refused"}'] >= 16.0
