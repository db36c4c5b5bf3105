"""The budget of bytes for pieces under way."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from swarmpull.roles.buffers import RECLAIM_EVERY, PieceBuffers


async def test_a_released_buffer_is_used_again() -> None:
    buffers = PieceBuffers(100)
    first = await buffers.acquire(40)
    buffers.release(first)

    assert await buffers.acquire(40) is first


async def test_a_buffer_of_another_size_does_not_displace_those_that_fit_the_budget() -> None:
    buffers = PieceBuffers(100)
    large = await buffers.acquire(40)
    buffers.release(large)

    buffers.release(await buffers.acquire(7))

    assert await buffers.acquire(40) is large


async def test_at_the_budget_the_next_one_waits_for_a_release() -> None:
    buffers = PieceBuffers(100)
    first = await buffers.acquire(60)
    acquired: list[bytearray] = []

    async def acquire() -> None:
        acquired.append(await buffers.acquire(60))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(acquire)
        await trio.testing.wait_all_tasks_blocked()
        assert not acquired
        buffers.release(first)

    assert acquired == [first]
    assert buffers.taken == 60


async def test_a_piece_above_the_whole_budget_gets_through_alone() -> None:
    buffers = PieceBuffers(100)

    buffer = await buffers.acquire(1000)

    assert buffers.taken == 1000
    buffers.release(buffer)
    assert buffers.taken == 0


async def test_a_large_piece_is_not_overtaken_by_small_ones_for_ever() -> None:
    buffers = PieceBuffers(100)
    held = await buffers.acquire(50)
    order: list[int] = []

    async def acquire(size: int) -> None:
        buffer = await buffers.acquire(size)
        order.append(size)
        buffers.release(buffer)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(acquire, 100)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(acquire, 10)
        await trio.testing.wait_all_tasks_blocked()
        buffers.release(held)

    assert order == [100, 10]


async def test_who_gives_up_waiting_takes_nothing_and_blocks_nobody() -> None:
    buffers = PieceBuffers(100)
    held = await buffers.acquire(100)

    with trio.move_on_after(0.01) as scope:
        await buffers.acquire(50)
    buffers.release(held)

    assert scope.cancelled_caught
    assert buffers.taken == 0
    with trio.fail_after(1):
        buffers.release(await buffers.acquire(100))


async def test_memory_of_buffers_in_use_and_free_stays_within_the_budget() -> None:
    buffers = PieceBuffers(100)
    for size in (40, 30, 20, 60, 90, 10, 100):
        buffers.release(await buffers.acquire(size))

        assert buffers.taken == 0
        assert sum(map(len, buffers._free)) <= 100


async def test_those_who_hold_buffers_are_asked_for_them_only_while_somebody_waits(
    autojump_clock: trio.testing.MockClock,
) -> None:
    buffers = PieceBuffers(100)
    held = [await buffers.acquire(50) for _ in range(2)]
    asked_at: list[float] = []

    def reclaim() -> None:
        asked_at.append(trio.current_time())
        if len(asked_at) == 3:
            buffers.release(held.pop())

    buffers.reclaim = reclaim
    began = trio.current_time()
    await buffers.acquire(50)

    pauses = [at - began for at in asked_at]
    assert pauses == pytest.approx([0.0, RECLAIM_EVERY, 2 * RECLAIM_EVERY])
    assert trio.current_time() == asked_at[-1], "what comes back is used at once"
    await trio.sleep(10)
    assert len(asked_at) == 3
