"""The order of pieces on a modelled link: it carries frames at its rate, receivers take them at theirs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from swarmpull.roles.uplink import PATIENCE_BYTES, Uplink

MIB = 1 << 20
CHUNK = MIB // 2
FRAME = CHUNK // 2
RATE = 100.0 * MIB


@pytest.fixture
def autojump_clock():
    return MockClock(autojump_threshold=0)


class Link:
    """A host's uplink: those that send at once take turns, a frame each."""

    def __init__(self, rate=RATE):
        self.rate = rate
        self.carried = 0
        self._line = trio.Lock()

    async def carry(self, size, receiver):
        while size:
            began = trio.current_time()
            frame = min(size, FRAME)
            async with self._line:
                await trio.sleep(frame / self.rate)
            self.carried += frame
            size -= frame
            await trio.sleep_until(began + frame / receiver)


class Host:
    """Sends pieces as connections do; ``ended`` has the seconds since the beginning, by connection."""

    def __init__(self, link=None):
        self.link = link or Link()
        self.uplink = Uplink()
        self.ended = {}
        self.began = trio.current_time()

    async def send(self, connection, size, receiver=math.inf):
        """The rest of a piece that has begun."""
        left = size
        try:
            while left:
                chunk = min(CHUNK, left)
                await self.uplink.turn(connection)
                await self.link.carry(chunk, receiver)
                left -= chunk
                self.uplink.sent(connection, chunk)
        finally:
            self.uplink.end(connection)
        self.ended[connection] = trio.current_time() - self.began

    async def send_together(self, sizes: Sequence[int], receivers: Sequence[float]) -> None:
        self.began = trio.current_time()
        pieces = list(enumerate(zip(sizes, receivers, strict=True)))
        for connection, _ in pieces:
            self.uplink.begin(connection)
        async with trio.open_nursery() as nursery:
            for connection, (size, receiver) in pieces:
                nursery.start_soon(self.send, connection, size, receiver)

    @property
    def took(self):
        return max(self.ended.values())

    @property
    def use(self):
        """The share of what the link could have carried until the last piece ended."""
        return self.link.carried / self.link.rate / self.took

    def assert_nothing_left(self):
        assert not self.uplink._sending
        assert not self.uplink._waiting


async def test_equal_pieces_end_one_after_the_other(autojump_clock):
    host = Host()

    await host.send_together([64 * MIB] * 3, [RATE] * 3)

    assert host.use > 0.98
    assert host.ended[0] < 0.45 * host.took
    assert host.ended[0] < host.ended[1] < 0.75 * host.took
    assert host.uplink.capacity == pytest.approx(RATE, rel=0.2)
    host.assert_nothing_left()


async def test_of_pieces_that_follow_one_another_none_is_passed_by(autojump_clock):
    host = Host()
    size, each = 4 * MIB, 40
    durations = []

    async def keep_sending(connection):
        for _ in range(each):
            began = trio.current_time()
            host.uplink.begin(connection)
            await host.send(connection, size, RATE)
            durations.append(trio.current_time() - began)

    async with trio.open_nursery() as nursery:
        for connection in range(3):
            nursery.start_soon(keep_sending, connection)

    assert host.use > 0.98
    # In the order of their beginning each waits for two others; it was not passed by for more than that.
    assert len(durations) == 3 * each
    assert max(durations) < 2 * 3 * size / RATE


@pytest.mark.parametrize("share", [0.5, 0.1])
async def test_the_next_piece_fills_what_a_slow_first_receiver_leaves(autojump_clock, share):
    host = Host()

    await host.send_together([64 * MIB, 256 * MIB, 256 * MIB], [share * RATE, RATE, RATE])

    assert host.use > 0.85
    # Not both of them together.
    assert host.ended[1] < host.ended[2]


async def test_a_fast_uplink_is_filled_by_many_slow_receivers(autojump_clock):
    host = Host()

    await host.send_together([64 * MIB] * 8, [RATE / 4] * 8)

    assert host.use > 0.8


async def test_slow_receivers_that_cannot_fill_the_uplink_hardly_wait(autojump_clock):
    host = Host()

    await host.send_together([64 * MIB] * 3, [RATE / 4] * 3)

    # All three at once would be through after this; one after the other takes three times as long.
    at_once = 64 * MIB / (RATE / 4)
    assert host.took < 1.5 * at_once


async def test_a_receiver_that_stops_holds_nobody_up(autojump_clock):
    host = Host()
    host.uplink.begin(0)  # and never sends
    host.uplink.begin(1)
    host.uplink.begin(2)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(host.send, 1, 256 * MIB, RATE)
        nursery.start_soon(host.send, 2, 256 * MIB, RATE)

    assert host.use > 0.75


async def test_an_uplink_that_becomes_slower_is_measured_anew(autojump_clock):
    host = Host()
    await host.send_together([64 * MIB] * 3, [RATE] * 3)
    host.link.rate = RATE / 5

    host.ended.clear()
    await host.send_together([64 * MIB] * 3, [RATE] * 3)

    assert host.uplink.capacity == pytest.approx(RATE / 5, rel=0.2)
    assert host.ended[0] < 0.45 * host.took
    assert host.ended[0] < host.ended[1] < 0.8 * host.took


async def test_a_slower_uplink_is_found_while_pieces_are_on_their_way(autojump_clock):
    host = Host()

    async def slow_down():
        await trio.sleep(0.5)
        host.link.rate = RATE / 5
        await trio.sleep(3)
        assert host.uplink.capacity == pytest.approx(RATE / 5, rel=0.2)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(slow_down)
        await host.send_together([128 * MIB] * 3, [RATE] * 3)

    assert host.ended[0] < 0.45 * host.took


async def test_an_uplink_that_becomes_faster_is_measured_anew(autojump_clock):
    host = Host(Link(RATE / 5))
    await host.send_together([64 * MIB] * 3, [RATE / 4] * 3)
    host.link.rate = RATE

    host.ended.clear()
    await host.send_together([128 * MIB] * 4, [RATE / 4] * 4)

    assert host.uplink.capacity > 0.5 * RATE


async def test_every_piece_ends(autojump_clock):
    host = Host()
    count = 20

    await host.send_together(
        [(1 + index % 5) * MIB + index for index in range(count)],
        [RATE / (1 + index % 7) for index in range(count)],
    )

    assert sorted(host.ended) == list(range(count))
    host.assert_nothing_left()


async def begin_on_a_full_uplink(host):
    """Connections 1 and 2 have to wait, for it is known what the uplink carries, and it is full."""
    for connection in range(3):
        host.uplink.begin(connection)
    for index in range(24):
        await trio.sleep(CHUNK / RATE)
        host.uplink.sent(index % 3, CHUNK)
    assert host.uplink.capacity == pytest.approx(RATE)


async def test_a_pause_does_not_count_as_time_in_which_little_was_carried(autojump_clock):
    host = Host()
    await begin_on_a_full_uplink(host)
    for connection in range(3):
        host.uplink.end(connection)
    await trio.sleep(3600)

    host.uplink.begin(0)
    host.uplink.begin(1)
    resumed = trio.current_time()
    await host.uplink.turn(1)

    assert 0 < trio.current_time() - resumed < 1


async def test_whoever_waits_sends_a_chunk_now_and_then(autojump_clock):
    host = Host()
    await begin_on_a_full_uplink(host)
    chunks = 0

    async with trio.open_nursery() as nursery:

        async def wait():
            await host.uplink.turn(1)
            nursery.cancel_scope.cancel()

        nursery.start_soon(wait)
        while True:
            await trio.sleep(CHUNK / RATE)
            host.uplink.sent(0, CHUNK)
            chunks += 1

    assert chunks == pytest.approx(3 * PATIENCE_BYTES / CHUNK, abs=1)


async def test_what_a_piece_alone_is_sent_at_is_not_taken_for_the_capacity(autojump_clock):
    host = Host()
    host.uplink.begin(0)
    await host.send(0, 64 * MIB, RATE / 10)
    host.uplink.begin(1)
    host.uplink.begin(2)

    now = trio.current_time()
    await host.uplink.turn(2)

    assert trio.current_time() == now


async def test_the_end_in_the_middle_of_a_piece_wakes_the_next(autojump_clock):
    host = Host()
    await begin_on_a_full_uplink(host)
    turns = []

    async def wait(connection):
        await host.uplink.turn(connection)
        turns.append((connection, trio.current_time()))

    async with trio.open_nursery() as nursery:
        for connection in (2, 1):
            nursery.start_soon(wait, connection)
        await wait_all_tasks_blocked()
        assert turns == []
        now = trio.current_time()
        host.uplink.end(0)
        await wait_all_tasks_blocked()
        assert turns == [(1, now)]
        host.uplink.end(1)
        await wait_all_tasks_blocked()
        assert turns == [(1, now), (2, now)]


async def test_a_piece_that_ends_while_it_waits_does_not_wait_for_ever(autojump_clock):
    host = Host()
    await begin_on_a_full_uplink(host)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(host.uplink.turn, 1)
        await wait_all_tasks_blocked()
        now = trio.current_time()
        host.uplink.end(1)
    assert trio.current_time() == now


async def test_a_cancelled_turn_leaves_nothing_behind(autojump_clock):
    host = Host()
    await begin_on_a_full_uplink(host)
    now = trio.current_time()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(host.uplink.turn, 1)
        nursery.start_soon(host.uplink.turn, 2)
        await wait_all_tasks_blocked()
        assert set(host.uplink._waiting) == {1, 2}
        nursery.cancel_scope.cancel()
    assert trio.current_time() == now
    assert not host.uplink._waiting

    # It is not waited for: the other one is let in when its time has come.
    with trio.fail_after(1):
        await host.uplink.turn(2)
    for connection in range(3):
        host.uplink.end(connection)
    host.assert_nothing_left()


async def test_a_connection_that_never_began_is_of_no_account(autojump_clock):
    uplink = Uplink()

    uplink.sent(7, CHUNK)
    uplink.end(7)
    await uplink.turn(7)

    assert uplink.capacity == 0
    assert trio.current_time() == 0

    uplink.begin(1)
    uplink.sent(7, CHUNK)
    uplink.end(7)
    await uplink.turn(1)
    assert uplink.capacity == 0
    assert list(uplink._sending) == [1]


async def test_chunks_at_one_and_the_same_moment_measure_nothing(autojump_clock):
    uplink = Uplink()
    uplink.begin(1)
    uplink.begin(2)

    for _ in range(100):
        uplink.sent(1, CHUNK)
    with trio.fail_after(1):
        await uplink.turn(2)

    assert uplink.capacity == 0
