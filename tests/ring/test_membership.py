from __future__ import annotations

import pytest
import structlog
import trio

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
