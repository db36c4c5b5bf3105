"""Calls of a ring whose members are a script, by a clock that jumps; over sockets see `test_cluster`."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import attrs
import pytest
import trio

from swarmpull.digest import Digest
from swarmpull.errors import BlobNotFound, RpcFailed, RpcUnavailable, StoreFull
from swarmpull.roles import ring_client
from swarmpull.roles.cluster import IndexClient
from swarmpull.roles.ring_client import RingClient, open_ring
from swarmpull.wire import api

BLOB = Digest.of(b"blob")
MEMBERS = ("127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3")
KEY = str(BLOB)


@attrs.define
class Members:
    """The members of the ring, as the pool of its client.

    Attributes:
        seconds: that each takes to answer; what is not here takes a millisecond.
        hanging: answer nothing.
        dead: refuse connections.
        without: do not have the blob.
        full: have no room for it.
        calls, cancelled: how often each was called, pings apart; how often that was given up.
    """

    seconds: dict[str, float] = attrs.Factory(dict)
    hanging: set[str] = attrs.Factory(set)
    dead: set[str] = attrs.Factory(set)
    without: set[str] = attrs.Factory(set)
    full: set[str] = attrs.Factory(set)
    calls: Counter[str] = attrs.Factory(Counter)
    pings: Counter[str] = attrs.Factory(Counter)
    cancelled: Counter[str] = attrs.Factory(Counter)

    async def call(self, address: str, method, request, *, timeout: float):
        if method is api.PING:
            self.pings[address] += 1
            await self._connect(address, method, timeout)
            raise RpcFailed(address, method.name, "not a method of this role")
        self.calls[address] += 1
        try:
            await self._connect(address, method, timeout)
            await trio.sleep(self.seconds.get(address, 0.001))
        except trio.Cancelled:
            self.cancelled[address] += 1
            raise
        if address in self.without:
            raise BlobNotFound(str(BLOB), address)
        if address in self.full:
            raise StoreFull(address, 1, "free disk space")
        return api.BlobStatReply(int(address[-1]))

    async def _connect(self, address: str, method, timeout: float) -> None:
        await trio.lowlevel.checkpoint()
        if address in self.dead:
            raise RpcUnavailable(address, method.name, "refused")
        if address in self.hanging:
            await trio.sleep(timeout)
            raise RpcUnavailable(address, method.name, f"no reply within {timeout:g} s")

    def when_lost(self, tell: Callable[[str], None]) -> None:
        pass


@attrs.define
class Play:
    members: Members
    client: RingClient
    order: list[str]

    async def look_up(self) -> tuple[str, float]:
        """Who answered, and after how many seconds."""
        begun = trio.current_time()
        address, _ = await self.client.look_up(
            KEY, api.STAT_BLOB, api.BlobRequest(BLOB), timeout=10.0
        )
        return address, trio.current_time() - begun

    async def write(self) -> tuple[str, float]:
        begun = trio.current_time()
        reply = await self.client.call(
            KEY, api.STAT_BLOB, api.BlobRequest(BLOB), timeout=3600.0, unable=(StoreFull,)
        )
        return f"127.0.0.1:{reply.length}", trio.current_time() - begun


@asynccontextmanager
async def play(*members: str) -> AsyncIterator[Play]:
    pool = Members()
    ring = open_ring(pool, members or MEMBERS, "origin")  # type: ignore[arg-type]
    async with trio.open_nursery() as nursery:
        await nursery.start(ring.run)
        yield Play(pool, RingClient(pool, ring), ring.order(KEY))  # type: ignore[arg-type]
        nursery.cancel_scope.cancel()


async def test_a_lookup_is_asked_of_one_member_while_that_answers(autojump_clock) -> None:
    async with play() as ring:
        for _ in range(50):
            assert (await ring.look_up())[0] == ring.order[0]

        assert ring.members.calls == {ring.order[0]: 50}
        assert ring.members.pings == {}


async def test_a_lookup_does_not_wait_for_a_member_that_hangs(autojump_clock) -> None:
    async with play() as ring:
        first, second, _ = ring.order
        for _ in range(50):
            await ring.look_up()
        ring.members.hanging = {first}

        waits = [await ring.look_up() for _ in range(100)]

        assert {address for address, _ in waits} == {second}
        # As long as an answer usually takes, and not at all once it is known.
        assert max(seconds for _, seconds in waits) < 0.1
        assert ring.members.cancelled[first] > 0, "nobody waits for it there either"
        await trio.sleep(3)
        calls = ring.members.calls[first]
        await ring.look_up()
        assert ring.members.calls[first] == calls


async def test_a_dead_member_costs_a_lookup_nothing(autojump_clock) -> None:
    async with play() as ring:
        ring.members.dead = set(ring.order[:2])

        assert await ring.look_up() == (ring.order[2], pytest.approx(0.001))


async def test_the_first_reply_wins_and_the_loser_is_cancelled(autojump_clock) -> None:
    async with play() as ring:
        first, second, _ = ring.order
        ring.members.seconds = {first: 0.7}

        assert (await ring.look_up())[0] == second
        assert ring.members.cancelled == {first: 1}
        assert ring.client.members.unhealthy() == ()


async def test_that_there_is_no_such_blob_is_not_believed_of_the_second_member(
    autojump_clock,
) -> None:
    async with play() as ring:
        first, second, third = ring.order
        ring.members.seconds = {first: 2.0}
        ring.members.without = {second}

        assert await ring.look_up() == (first, pytest.approx(2.0, abs=0.01))
        assert ring.members.calls[third] == 0


async def test_of_a_member_that_hangs_nobody_waits_to_hear_that_there_is_no_such_blob(
    autojump_clock,
) -> None:
    async with play() as ring:
        ring.members.hanging = {ring.order[0]}
        ring.members.without = {ring.order[1]}
        begun = trio.current_time()

        with pytest.raises(BlobNotFound) as caught:
            await ring.look_up()

        assert caught.value.where == ring.order[1]
        assert trio.current_time() - begun < 3.0


async def test_when_all_hang_the_error_names_them(autojump_clock) -> None:
    async with play() as ring:
        ring.members.hanging = set(ring.order)

        with pytest.raises(RpcUnavailable) as caught:
            await ring.look_up()

        assert all(address in caught.value.reason for address in ring.order)


async def test_a_ring_where_everything_is_slow_is_not_asked_twice_as_much(autojump_clock) -> None:
    async with play() as ring:
        ring.members.seconds = dict.fromkeys(ring.order, 1.5)
        for _ in range(200):
            await ring.look_up()

        assert sum(ring.members.calls.values()) < 1.2 * 200


async def test_what_changes_something_is_asked_of_one_at_a_time(autojump_clock) -> None:
    async with play() as ring:
        first, *_ = ring.order
        ring.members.seconds = {first: 500.0}

        assert await ring.write() == (first, pytest.approx(500.0))
        assert ring.members.calls == {first: 1}


async def test_what_changes_something_moves_on_when_its_member_is_found_to_hang(
    autojump_clock,
) -> None:
    async with play() as ring:
        first, second, _ = ring.order
        ring.members.hanging = {first}

        address, seconds = await ring.write()

        assert address == second
        assert ring_client.WRITE_PATIENCE < seconds < ring_client.WRITE_PATIENCE + 3.0


async def test_a_member_without_room_is_passed_over(autojump_clock) -> None:
    async with play() as ring:
        first, second, _ = ring.order
        ring.members.full = {first}

        address, _ = await ring.write()

        assert address == second
        assert ring.members.calls == {first: 1, second: 1}
        # It answers: nothing is wrong with it but its disk.
        assert ring.client.members.unhealthy() == ()


async def test_when_nobody_has_room_the_error_is_that_of_the_first(autojump_clock) -> None:
    async with play() as ring:
        first, second, third = ring.order
        ring.members.full = {first, third}
        ring.members.dead = {second}

        with pytest.raises(StoreFull) as caught:
            await ring.write()

        assert caught.value.store == first
        assert ring.members.calls == {first: 1, second: 1, third: 1}


async def test_a_call_that_waits_for_long_ends_when_its_member_is_found_to_hang(
    autojump_clock,
) -> None:
    async with play() as ring:
        first, *_ = ring.order
        ring.members.hanging = {first}
        begun = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ring.write)
            with pytest.raises(RpcUnavailable, match="answers nothing"):
                await ring.client.call_first(
                    KEY, api.STAT_BLOB, api.BlobRequest(BLOB), timeout=600.0
                )
            assert trio.current_time() - begun < 3.0


async def test_a_call_that_would_wait_for_members_that_all_hang_is_not_made(
    autojump_clock,
) -> None:
    async with play() as ring:
        ring.members.hanging = set(ring.order)
        with pytest.raises(RpcUnavailable):
            await ring.look_up()
        begun = trio.current_time()
        with pytest.raises(RpcUnavailable, match="answers nothing"):
            await ring.client.call_first(KEY, api.STAT_BLOB, api.BlobRequest(BLOB), timeout=600.0)
        assert trio.current_time() == begun


async def test_a_call_at_an_address_goes_there_while_it_is_a_member(autojump_clock) -> None:
    async with play() as ring:
        ask = ring.client.call_first
        request = api.BlobRequest(BLOB)
        last = ring.order[2]
        reply = await ask(KEY, api.STAT_BLOB, request, timeout=1.0, at=last)
        assert f"127.0.0.1:{reply.length}" == last

        ring.client.members.replace(ring.order[:2])
        reply = await ask(KEY, api.STAT_BLOB, request, timeout=1.0, at=last)
        assert f"127.0.0.1:{reply.length}" == ring.order[0]


# --- load -----------------------------------------------------------------------------------------


@attrs.define
class Indexes(Members):
    """Answer what an index is asked."""

    async def call(self, address: str, method, request, *, timeout: float):
        await trio.lowlevel.checkpoint()
        self.calls[address] += 1
        return api.Found(True) if method is api.HAS_BLOB else api.Empty()


async def test_a_repository_is_read_from_all_indexes_and_changed_at_one(autojump_clock) -> None:
    indexes = Indexes()
    ring = open_ring(indexes, MEMBERS, "index")  # type: ignore[arg-type]
    clients = [IndexClient(RingClient(indexes, ring)) for _ in range(300)]  # type: ignore[arg-type]
    for client in clients:
        for _ in range(3):
            await client.has_blob("team/app", BLOB)

    # 100 clients each, with a standard deviation of 8.2; each of them always asks the same one.
    assert all(count % 3 == 0 for count in indexes.calls.values())
    assert all(abs(indexes.calls[each] / 3 - 100) < 5 * 8.2 for each in MEMBERS)

    indexes.calls.clear()
    for client in clients:
        await client.link_blob("team/app", BLOB)
    assert indexes.calls == {ring.order("team/app")[0]: 300}
