"""Reads that are wanted at the same time share a hop to a thread, and nothing else."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import trio
import trio.testing

from swarmpull.store.backends import shared_reads
from swarmpull.store.backends.shared_reads import SharedReads


def reads(lanes: int = 1) -> SharedReads:
    return SharedReads(trio.CapacityLimiter(lanes), lanes)


class Gate:
    """A read that lasts until it is let go."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.open = threading.Event()

    def __call__(self) -> bytes:
        self.begun.set()
        assert self.open.wait(10)
        return b"late"


@pytest.fixture
def hops(monkeypatch) -> list[int]:
    """How many reads each hop had."""
    sizes: list[int] = []
    read_all = shared_reads._read_all

    def counted(batch: list[object]) -> None:
        sizes.append(len(batch))
        read_all(batch)

    monkeypatch.setattr(shared_reads, "_read_all", counted)
    return sizes


async def begun(gate: Gate) -> None:
    assert await trio.to_thread.run_sync(gate.begun.wait, 10)


async def test_those_that_come_during_a_hop_share_the_next_ones(hops):
    shared, gate = reads(), Gate()
    found: list[bytes] = []

    async def get(key: str, read: Callable[[], bytes]) -> None:
        found.append(await shared.get(key, read))

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(get, "first", gate)
            await begun(gate)
            for number in range(100):
                nursery.start_soon(get, str(number), str(number).encode)
            await trio.testing.wait_all_tasks_blocked()
            gate.open.set()
    assert hops == [1, shared_reads.BATCH_MAX, 100 - shared_reads.BATCH_MAX]
    assert sorted(found) == sorted([b"late", *(str(number).encode() for number in range(100))])


async def test_an_error_is_raised_to_the_one_who_wanted_that(hops):
    shared, gate = reads(), Gate()

    def fail() -> bytes:
        raise FileNotFoundError("not there")

    async def get_missing() -> None:
        with pytest.raises(FileNotFoundError, match="not there"):
            await shared.get("missing", fail)

    async def get_there() -> None:
        assert await shared.get("there", lambda: b"data") == b"data"

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(shared.get, "first", gate)
            await begun(gate)
            nursery.start_soon(get_missing)
            nursery.start_soon(get_there)
            await trio.testing.wait_all_tasks_blocked()
            gate.open.set()
    assert hops == [1, 2]


async def test_those_who_leave_take_nobody_with_them():
    shared, gate = reads(), Gate()
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(shared.get, "first", gate)
            await begun(gate)
            leaving = trio.CancelScope()

            async def leave() -> None:
                with leaving:
                    await shared.get("second", lambda: b"data")

            nursery.start_soon(leave)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(shared.get, "third", lambda: b"data")
            await trio.testing.wait_all_tasks_blocked()
            gate.open.set()
            leaving.cancel()
        assert await shared.get("again", lambda: b"data") == b"data"


async def test_one_that_is_cancelled_before_its_hop_passes_the_turn_on():
    limiter = trio.CapacityLimiter(1)
    shared = SharedReads(limiter, 1)
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            await limiter.acquire_on_behalf_of("somebody else")
            leaving = trio.CancelScope()

            async def leave() -> None:
                with leaving:
                    await shared.get("first", lambda: b"data")

            nursery.start_soon(leave)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(shared.get, "second", lambda: b"data")
            await trio.testing.wait_all_tasks_blocked()
            leaving.cancel()
            await trio.testing.wait_all_tasks_blocked()
            limiter.release_on_behalf_of("somebody else")
