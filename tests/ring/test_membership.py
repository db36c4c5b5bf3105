from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import structlog
import trio

from swarmpull.errors import RpcUnavailable
from swarmpull.ring.health import HealthLimits
from swarmpull.ring.membership import MEMBERS_PER_NAME_MAX, Membership


class FakeResolver(trio.abc.HostnameResolver):
    """Answers from a table that a test changes; a name that is not in it does not resolve."""

    def __init__(self, **names: list[str]) -> None:
        self.names = names
        self.asked = 0

    async def getaddrinfo(self, host, port, family=0, type=0, proto=0, flags=0):  # noqa: A002
        self.asked += 1
        await trio.lowlevel.checkpoint()
        name = host.decode() if isinstance(host, bytes) else host
        if name not in self.names:
            raise OSError(f"{name} is not known")
        return [(trio.socket.AF_INET, type, 6, "", (address, port)) for address in self.names[name]]

    async def getnameinfo(self, sockaddr, flags):
        raise NotImplementedError


@pytest.fixture
async def resolver():
    resolver = FakeResolver()
    trio.socket.set_custom_hostname_resolver(resolver)
    yield resolver
    trio.socket.set_custom_hostname_resolver(None)


async def test_a_fixed_list_needs_no_resolver():
    ring = Membership(["b:1", "a:1", "b:1"], name="tracker")
    async with trio.open_nursery() as nursery:
        assert await nursery.start(ring.run) == ("a:1", "b:1")

    assert ring.members == ("a:1", "b:1")


async def test_every_address_of_a_name_is_a_member(autojump_clock, resolver):
    resolver.names["origins"] = ["10.0.0.2", "10.0.0.1", "10.0.0.2", "fd00::1"]
    ring = Membership(["fixed:9", "dns+origins:7200"], name="origin")
    assert ring.members == ("fixed:9",)

    async with trio.open_nursery() as nursery:
        members = await nursery.start(ring.run)
        nursery.cancel_scope.cancel()

    assert members == ("10.0.0.1:7200", "10.0.0.2:7200", "[fd00::1]:7200", "fixed:9")


async def test_names_are_resolved_again(autojump_clock, resolver):
    resolver.names["origins"] = ["10.0.0.1"]
    ring = Membership(["dns+origins:7200"], name="origin", interval=30.0)
    async with trio.open_nursery() as nursery:
        await nursery.start(ring.run)
        resolver.names["origins"] = ["10.0.0.3"]
        await trio.sleep(29.0)
        assert ring.members == ("10.0.0.1:7200",)
        await trio.sleep(2.0)
        assert ring.members == ("10.0.0.3:7200",)
        nursery.cancel_scope.cancel()


async def test_the_last_good_answer_is_kept(autojump_clock, resolver):
    resolver.names["origins"] = ["10.0.0.1"]
    ring = Membership(["dns+origins:7200"], name="origin", interval=30.0)
    async with trio.open_nursery() as nursery:
        await nursery.start(ring.run)
        del resolver.names["origins"]
        await trio.sleep(100.0)
        assert resolver.asked >= 4
        assert ring.members == ("10.0.0.1:7200",)
        resolver.names["origins"] = []
        await trio.sleep(100.0)
        assert ring.members == ("10.0.0.1:7200",)
        nursery.cancel_scope.cancel()


async def test_a_name_that_never_resolved_is_asked_for_again_soon(autojump_clock, resolver):
    ring = Membership(["dns+origins:7200"], name="origin", interval=30.0)
    with structlog.testing.capture_logs() as logs:
        async with trio.open_nursery() as nursery:
            assert await nursery.start(ring.run) == ()
            resolver.names["origins"] = ["10.0.0.1"]
            await trio.sleep(3.0)
            assert ring.members == ("10.0.0.1:7200",)
            nursery.cancel_scope.cancel()

    assert logs[0]["event"] == "ring_name_not_resolved"
    assert logs[0]["reason"] == "origins is not known"


async def test_a_name_with_absurdly_many_addresses_is_bounded(autojump_clock, resolver):
    resolver.names["origins"] = [f"10.0.{n // 250}.{n % 250}" for n in range(1000)]
    ring = Membership(["dns+origins:7200"], name="origin")
    async with trio.open_nursery() as nursery:
        members = await nursery.start(ring.run)
        nursery.cancel_scope.cancel()

    assert len(members) == MEMBERS_PER_NAME_MAX


async def test_unhealthy_members_are_tried_last_but_always_tried(autojump_clock):
    limits = HealthLimits(fall=1, expiry=10.0)
    ring = Membership(["a:1", "b:1", "c:1"], name="origin", health=limits)
    first, second, third = ring.order("key")

    ring.record_failure(first, "refused")
    assert ring.order("key") == [second, third, first]
    assert ring.unhealthy() == (first,)

    ring.record_failure(second, "refused")
    ring.record_failure(third, "refused")
    assert ring.order("key") == [first, second, third]

    await trio.sleep(10.0)
    assert ring.unhealthy() == ()


@pytest.mark.parametrize(
    "entry", ["dns+origins", "dns+:7200", "dns+origins:x", "dns+origins:65536"]
)
def test_a_name_without_a_usable_port_is_refused(entry: str):
    with pytest.raises(ValueError, match=r"must be dns\+name:port"):
        Membership([entry], name="origin")


async def test_localhost_really_resolves():
    ring = Membership(["dns+localhost:7200"], name="origin")
    async with trio.open_nursery() as nursery:
        members = await nursery.start(ring.run)
        nursery.cancel_scope.cancel()

    assert set(members) & {"127.0.0.1:7200", "[::1]:7200"}


# --- probes ---------------------------------------------------------------------------------------


class Hosts:
    """What answers probes, and how often each was probed."""

    def __init__(self) -> None:
        self.silent: set[str] = set()
        self.probed: list[tuple[float, str]] = []
        # For so long the process that probes does nothing.
        self.standstill = 0.0

    async def probe(self, member: str, timeout: float) -> None:
        self.probed.append((trio.current_time(), member))
        await trio.sleep(timeout + self.standstill if member in self.silent else 0.001)
        if member in self.silent:
            raise RpcUnavailable(member, "ping", "no reply")


@asynccontextmanager
async def probed_ring(*members: str) -> AsyncIterator[tuple[Membership, Hosts]]:
    hosts = Hosts()
    ring = Membership(members, name="origin", probe=hosts.probe, health=HealthLimits(expiry=30.0))
    async with trio.open_nursery() as nursery:
        await nursery.start(ring.run)
        yield ring, hosts
        nursery.cancel_scope.cancel()


async def test_healthy_members_are_not_probed(autojump_clock):
    async with probed_ring("a:1", "b:1") as (ring, hosts):
        for _ in range(1000):
            with ring.calling(ring.order("key")[0]):
                await trio.sleep(0.1)
            ring.record_success(ring.order("key")[0])

    assert hosts.probed == []


async def test_a_member_that_hangs_is_found_within_seconds_by_those_who_wait_for_it(
    autojump_clock,
):
    async with probed_ring("a:1", "b:1") as (ring, hosts):
        first, second = ring.order("key")
        hosts.silent = {first}
        begun = trio.current_time()
        with ring.calling(first, patience=0.0) as scope:
            await trio.sleep(3600)

        assert scope.cancelled_caught
        assert trio.current_time() - begun < 3.0
        assert ring.order("key") == [second, first]


async def test_a_member_that_is_slow_and_answers_probes_is_waited_for(autojump_clock):
    async with probed_ring("a:1") as (ring, hosts):
        with ring.calling("a:1", patience=0.0) as scope:
            await trio.sleep(600)

        assert not scope.cancelled_caught
        assert ring.unhealthy() == ()
        # Ever more seldom: every half a minute in the end.
        assert 10 < len(hosts.probed) < 30


async def test_a_call_outlasts_a_fall_for_as_long_as_its_patience(autojump_clock):
    async with probed_ring("a:1") as (ring, hosts):
        hosts.silent = {"a:1"}
        begun = trio.current_time()
        with ring.calling("a:1", patience=5.0) as scope:
            await trio.sleep(3600)
        assert scope.cancelled_caught
        assert 5.0 < trio.current_time() - begun < 8.0

        hosts.silent = set()
        await trio.sleep(10)
        assert ring.unhealthy() == ()
        with ring.calling("a:1", patience=5.0) as scope:
            hosts.silent = {"a:1"}
            await trio.sleep(4)
            assert ring.unhealthy() == ("a:1",)
            hosts.silent = set()
            await trio.sleep(60)
        assert not scope.cancelled_caught, "it was only stopped for a moment"


async def test_a_member_that_is_back_is_found_before_anybody_calls_it(autojump_clock):
    async with probed_ring("a:1", "b:1") as (ring, hosts):
        first, second = ring.order("key")
        changes: list[tuple[str, bool]] = []
        ring.when_changed(lambda member, healthy: changes.append((member, healthy)))
        hosts.silent = {first}
        ring.record_failure(first, "refused")
        await trio.sleep(3)
        assert ring.order("key") == [second, first]
        for _ in range(30):
            await trio.sleep(1)
            assert ring.order("key") == [second, first], "its failures do not expire meanwhile"

        hosts.silent = set()
        await trio.sleep(11)
        assert ring.order("key") == [first, second]
        assert changes == [(first, False), (first, True)]


async def test_a_dead_member_that_nobody_wants_is_left_alone(autojump_clock):
    async with probed_ring("a:1", "b:1") as (ring, hosts):
        hosts.silent = {"a:1"}
        ring.record_failure("a:1", "refused")
        await trio.sleep(300)
        probed = len(hosts.probed)
        await trio.sleep(3600)

        assert len(hosts.probed) == probed < 20


async def test_a_probe_during_which_this_process_stood_still_says_nothing(autojump_clock):
    async with probed_ring("a:1") as (ring, hosts):
        hosts.silent = {"a:1"}
        hosts.standstill = 1.0
        ring.suspect("a:1")
        await trio.sleep(60)
        assert len(hosts.probed) > 10
        assert ring.unhealthy() == ()

        hosts.standstill = 0.0
        await trio.sleep(5)
        assert ring.unhealthy() == ("a:1",)


# --- another list ---------------------------------------------------------------------------------


async def test_a_list_that_is_replaced_counts_at_once(autojump_clock):
    async with probed_ring("a:1", "b:1") as (ring, _):
        ring.replace(["b:1", "c:1"], {"c:1": 1e9})

        assert ring.members == ("b:1", "c:1")
        assert ring.entries == ("b:1", "c:1")
        assert ring.order("any key")[0] == "c:1"


async def test_a_member_that_left_is_not_probed_although_a_call_to_it_fails(autojump_clock):
    async with probed_ring("a:1", "b:1") as (ring, hosts):
        hosts.silent = {"a:1"}
        with ring.calling("a:1"):
            ring.replace(["b:1"])
            ring.suspect("a:1")
            await trio.sleep(10)
        ring.record_failure("a:1", "refused")
        await trio.sleep(60)

        assert hosts.probed == []
        assert ring.unhealthy() == ()


async def test_a_name_that_is_added_is_resolved_at_once_and_one_that_is_gone_is_gone(
    autojump_clock, resolver
):
    resolver.names |= {"old": ["10.0.0.1"], "new": ["10.0.0.2"]}
    async with probed_ring("dns+old:7200") as (ring, _):
        ring.replace(["dns+new:7200"])
        assert ring.members == ("10.0.0.1:7200",), "better the old ones than none"
        await trio.sleep(0.1)
        assert ring.members == ("10.0.0.2:7200",)


async def test_a_list_that_is_wrong_changes_nothing(autojump_clock):
    ring = Membership(["a:1"], name="origin")
    with pytest.raises(ValueError, match=r"dns\+name:port"):
        ring.replace(["b:1", "dns+origins"])
    with pytest.raises(ValueError, match="weight of ring member b:1"):
        ring.replace(["b:1"], {"b:1": 0.0})

    assert ring.members == ring.entries == ("a:1",)
