import math

import pytest
import trio
from trio.testing import MockClock

from swarmpull.roles.rates import BURST_BYTES_MIN, TokenBucket

MIB = 1 << 20


@pytest.fixture
def autojump_clock():
    return MockClock(autojump_threshold=0)


async def seconds_for(bucket, size, times):
    began = trio.current_time()
    for _ in range(times):
        await bucket.take(size)
    return trio.current_time() - began


async def test_without_a_rate_nothing_waits(autojump_clock):
    assert await seconds_for(TokenBucket(), 100 * MIB, 100) == 0


async def test_bytes_pass_at_the_rate(autojump_clock):
    bucket = TokenBucket(10 * MIB)

    took = await seconds_for(bucket, MIB, 101)

    # The burst at the beginning, and the debt of the last one at the end.
    assert 9.9 <= took <= 10.0


async def test_a_pause_earns_no_more_than_the_burst(autojump_clock):
    bucket = TokenBucket(10 * MIB)
    await bucket.take(1)
    await trio.sleep(60)

    took = await seconds_for(bucket, BURST_BYTES_MIN, 21)

    assert took >= (19 * BURST_BYTES_MIN) / (10 * MIB)


async def test_a_new_rate_holds_for_those_who_wait_already(autojump_clock):
    bucket = TokenBucket(1)
    await bucket.take(10 * MIB)
    passed = []

    async def wait():
        await bucket.take(1)
        passed.append(trio.current_time())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.sleep(5)
        assert passed == []
        bucket.set_rate(100 * MIB)

    assert passed[0] < trio.current_time() + 1


async def test_lifting_the_limit_lets_everybody_go(autojump_clock):
    bucket = TokenBucket(1)
    await bucket.take(10 * MIB)
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(bucket.take, MIB)
            await trio.sleep(1)
            bucket.set_rate(math.inf)


async def test_those_who_wait_go_in_turn(autojump_clock):
    bucket = TokenBucket(MIB)
    await bucket.take(MIB)
    order = []

    async def take(name):
        await bucket.take(MIB)
        order.append(name)

    async with trio.open_nursery() as nursery:
        for name in range(5):
            nursery.start_soon(take, name)
            await trio.sleep(0.001)

    assert order == [0, 1, 2, 3, 4]


async def test_a_wait_can_be_cancelled_and_costs_nothing(autojump_clock):
    bucket = TokenBucket(MIB)
    await bucket.take(2 * MIB)
    with trio.move_on_after(0.1):
        await bucket.take(1000 * MIB)

    assert await seconds_for(bucket, 1, 1) <= 2


@pytest.mark.parametrize("rate", [0, -1, math.nan])
def test_a_rate_that_is_not_positive_is_refused(rate):
    with pytest.raises(ValueError, match="must be positive"):
        TokenBucket(1).set_rate(rate)
