import math

import pytest
import structlog
import trio
from trio.testing import MockClock

from swarmpull.roles.rates import Rates
from swarmpull.store.token_bucket import (
    BURST_BYTES_MIN,
    PORTION_BYTES_MIN,
    PORTION_SECONDS,
    TokenBucket,
)

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


@pytest.mark.parametrize("rate", [math.inf, 100.0 * MIB])
async def test_what_a_usual_rate_lets_pass_is_not_split(autojump_clock, rate):
    assert await TokenBucket(rate).take_some(MIB // 2) == MIB // 2


async def test_under_a_low_rate_bytes_pass_in_portions_and_at_the_rate(autojump_clock):
    bucket = TokenBucket(100_000)
    await bucket.take(BURST_BYTES_MIN + 100_000)
    began, passed = trio.current_time(), 0
    while passed < MIB:
        portion = await bucket.take_some(MIB - passed)
        assert portion <= 100_000 * PORTION_SECONDS
        passed += portion

    took = trio.current_time() - began
    assert 10.4 <= took - 1.0 + PORTION_SECONDS <= 10.6, "and the debt before it"


async def test_several_share_a_low_rate_evenly(autojump_clock):
    bucket = TokenBucket(30_000)
    passed = [0, 0, 0]

    async def take(number):
        while True:
            passed[number] += await bucket.take_some(MIB)

    async with trio.open_nursery() as nursery:
        for number in range(3):
            nursery.start_soon(take, number)
        await trio.sleep(100)
        nursery.cancel_scope.cancel()

    assert max(passed) - min(passed) <= 30_000 * PORTION_SECONDS
    assert sum(passed) == pytest.approx(BURST_BYTES_MIN + 100 * 30_000, rel=0.01)


async def test_a_rate_that_is_lifted_while_one_waits_lets_all_of_it_pass(autojump_clock):
    bucket = TokenBucket(1)
    await bucket.take(MIB)
    got = []

    async def take():
        got.append(await bucket.take_some(MIB))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(take)
        await trio.sleep(1)
        bucket.set_rate(math.inf)

    assert got == [MIB]
    assert await bucket.take_some(10) == 10


async def test_the_lowest_rate_lets_a_portion_pass_at_a_time(autojump_clock):
    assert await TokenBucket(1).take_some(MIB) == PORTION_BYTES_MIN


# --- shown and changed ----------------------------------------------------------------------------


async def test_rates_are_shown_in_bytes_per_second_and_none_is_unlimited():
    rates = Rates(TokenBucket(1e8))
    assert rates.document() == {"upload_rate": 100_000_000, "download_rate": None}


@pytest.mark.parametrize(
    ("change", "holds"),
    [
        ({"upload_rate": 5000}, {"upload_rate": 5000, "download_rate": 2000}),
        ({"download_rate": "1.5MB/s"}, {"upload_rate": 1000, "download_rate": 1_500_000}),
        ({"download_rate": None}, {"upload_rate": 1000, "download_rate": None}),
        (
            {"upload_rate": "unlimited", "download_rate": 1.5},
            {"upload_rate": None, "download_rate": 1.5},
        ),
    ],
)
async def test_a_change_sets_what_it_names_and_nothing_else(change, holds):
    rates = Rates(TokenBucket(1000), TokenBucket(2000))
    rates.change(change)
    assert rates.document() == holds


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, "upload_rate or download_rate, or both"),
        ([], "JSON object"),
        (None, "JSON object"),
        ("1MB/s", "JSON object"),
        ({"upload_rate": 1, "rate": 1}, "JSON object with upload_rate or download_rate"),
        ({"upload_rate": 0}, "upload_rate must be at least 1 byte per second"),
        ({"upload_rate": -5}, "at least 1"),
        ({"upload_rate": 0.5}, "at least 1"),
        ({"upload_rate": math.nan}, "at least 1"),
        ({"upload_rate": math.inf}, "null for unlimited"),
        ({"upload_rate": 10**400}, "null for unlimited"),
        ({"upload_rate": True}, "must be a rate such as"),
        ({"upload_rate": [1]}, "must be a rate such as"),
        (
            {"upload_rate": 7, "download_rate": "fast"},
            "download_rate must be a rate such as .*: 'fast'",
        ),
        ({"download_rate": "0"}, "above 0, or unlimited: '0'"),
    ],
)
async def test_a_change_that_is_wrong_says_so_and_changes_nothing(change, reason):
    rates = Rates(TokenBucket(1000), TokenBucket(2000))
    with pytest.raises(ValueError, match=reason):
        rates.change(change)
    assert rates.document() == {"upload_rate": 1000, "download_rate": 2000}


async def test_each_change_is_logged_with_the_old_and_the_new_rate():
    rates = Rates(TokenBucket(1000))
    with structlog.testing.capture_logs() as logs:
        rates.change({"upload_rate": "1MB/s", "download_rate": "unlimited"})
    assert logs == [
        {
            "event": "rate_changed",
            "log_level": "info",
            "rate": "upload_rate",
            "old": "1kB/s",
            "new": "1MB/s",
        }
    ], "and what stays is not"
