"""Metainfo that grows, and those who wait for it, on a clock of the test's own."""

from __future__ import annotations

import attrs
import pytest
import trio
import trio.testing

from swarmpull.digest import Digest
from swarmpull.errors import BackendUnavailable, InvalidMetainfo, RpcUnavailable
from swarmpull.roles.hash_log import (
    ENTRIES_MAX,
    POLL_PATIENCE,
    POLL_SECONDS,
    HashLog,
    HashPolls,
    complete_growth,
    follow_growth,
    log_of,
)
from swarmpull.swarm.metainfo import PIECE_LENGTH_MIN as PIECE
from swarmpull.swarm.metainfo import GrowingMetainfo, Metainfo
from swarmpull.wire.api import Growth, HashesRequest

BLOB = Digest.of(b"blob")


def hash_of(index: int) -> bytes:
    return index.to_bytes(32, "big")


def log_with(pieces: int, *known: int) -> HashLog:
    log = HashLog(GrowingMetainfo(BLOB, pieces * PIECE, PIECE))
    learn(log, *known)
    return log


def learn(log: HashLog, *indices: int) -> None:
    for index in indices:
        log.metainfo.add(index, hash_of(index))
    log.grew()


def request(source: str = "", position: int = 0, seconds: float = 30.0) -> HashesRequest:
    return HashesRequest(BLOB, "", source, position, seconds)


async def test_who_has_read_everything_waits_for_more(autojump_clock) -> None:
    log = log_with(3, 2)
    got: list[Growth] = []

    async def wait() -> None:
        got.append(await log.wait_since(log.source, 1, 30.0))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        assert not got
        learn(log, 0)

    assert (got[0].indices, got[0].position) == ((0,), 2)


async def test_a_position_in_another_log_means_the_beginning(autojump_clock) -> None:
    log = log_with(3, 2, 0)
    growth = await log.wait_since("another", 2, 30.0)
    assert growth.indices == (2, 0)
    assert growth.hashes == hash_of(2) + hash_of(0)
    assert growth.source == log.source


async def test_without_news_the_answer_comes_when_the_time_is_up(autojump_clock) -> None:
    log = log_with(3, 1)
    growth = await log.wait_since(log.source, 1, 7.0)
    assert trio.current_time() == 7.0
    assert (growth.indices, growth.position, growth.settled) == ((), 1, False)


async def test_the_last_hash_is_not_the_end_until_the_blob_has_matched_its_digest(
    autojump_clock,
) -> None:
    log = log_with(2, 0, 1)
    assert not log.since("", 0).settled
    async with trio.open_nursery() as nursery:
        nursery.start_soon(log.wait_since, log.source, 2, 30.0)
        await trio.testing.wait_all_tasks_blocked()
        log.settle()
    assert trio.current_time() < 1
    assert log.since(log.source, 2).settled


async def test_a_failure_reaches_all_who_wait_each_with_an_error_of_its_own(autojump_clock) -> None:
    log = log_with(2, 0, 1)
    caught = []

    async def wait() -> None:
        with pytest.raises(BackendUnavailable) as error:
            await log.wait_since(log.source, 2, 30.0)
        caught.append(error.value)

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        log.fail(BackendUnavailable("s3://b", "key", "corrupt"))

    assert len({id(error) for error in caught}) == 3
    assert {error.reason for error in caught} == {"corrupt"}


async def test_a_long_log_is_told_in_parts() -> None:
    pieces = ENTRIES_MAX + 5
    metainfo = Metainfo(BLOB, pieces * PIECE, PIECE, b"".join(map(hash_of, range(pieces))))
    first = complete_growth(metainfo, request())
    second = complete_growth(metainfo, request(first.source, first.position))

    assert (first.position, first.settled) == (ENTRIES_MAX, False)
    assert (second.position, second.settled) == (pieces, True)
    log = log_of(BLOB, first)
    log.add(second)
    assert log.metainfo.complete() == metainfo


async def test_many_who_wait_hear_of_several_pieces_at_a_time(autojump_clock) -> None:
    log = log_with(5)
    log_of_replies: list[Growth] = []

    async def wait() -> None:
        log_of_replies.append(await log.wait_since(log.source, 0, 30.0))

    async with trio.open_nursery() as nursery:
        for _ in range(400):
            nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        learn(log, 0)
        await trio.sleep(0.05)
        learn(log, 1, 2)

    assert len(log_of_replies) == 400
    assert {growth.indices for growth in log_of_replies} == {(0, 1, 2)}


@pytest.mark.parametrize(
    "growth",
    [
        Growth(3 * PIECE, PIECE, "s", 1, (0,), hash_of(7)),
        Growth(3 * PIECE, PIECE, "s", 1, (3,), hash_of(3)),
        Growth(3 * PIECE, PIECE, "s", 1, (1, 2), hash_of(1)),
        Growth(4 * PIECE, PIECE, "s", 0, (), b""),
        Growth(3 * PIECE, 2 * PIECE, "s", 0, (), b""),
    ],
    ids=[
        "another hash",
        "no such piece",
        "too few bytes",
        "another length",
        "another piece length",
    ],
)
async def test_what_contradicts_is_not_taken_in(growth) -> None:
    log = log_with(3, 0)
    with pytest.raises(InvalidMetainfo):
        log.add(growth)


# --- following --------------------------------------------------------------------------------


@attrs.define
class Source:
    """Answers with what a log says, or fails."""

    log: HashLog
    failing: bool = False
    requests: list[HashesRequest] = attrs.Factory(list)

    async def ask(self, request: HashesRequest) -> Growth:
        self.requests.append(request)
        if self.failing:
            raise RpcUnavailable("tracker", "hashes", "refused")
        return await self.log.wait_since(request.source, request.position, request.seconds)


async def test_following_ends_when_the_blob_has_matched_its_digest(autojump_clock) -> None:
    source, known = Source(log_with(3, 1)), log_with(3)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(follow_growth, known, "", source.ask)
        await trio.sleep(1.0)
        learn(source.log, 0, 2)
        await trio.sleep(1.0)
        assert known.metainfo.is_complete
        assert not known.is_settled
        source.log.settle()

    assert known.is_settled
    assert [r.position for r in source.requests] == [0, 1, 3]


async def test_following_goes_on_with_another_source(autojump_clock) -> None:
    """As after the restart of an origin, which has other pieces first."""
    source, known = Source(log_with(3, 1)), log_with(3)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(follow_growth, known, "", source.ask)
        await trio.sleep(1.0)
        former, source.log = source.log, log_with(3, 2, 1)
        learn(former, 0)
        await trio.sleep(1.0)
        learn(source.log, 0)
        source.log.settle()
    assert known.is_settled


async def test_a_source_that_does_not_answer_is_asked_again_for_a_minute(autojump_clock) -> None:
    source = Source(log_with(3, 1), failing=True)
    with pytest.raises(RpcUnavailable):
        await follow_growth(log_with(3), "", source.ask)
    assert POLL_PATIENCE <= trio.current_time() < POLL_PATIENCE + 2
    assert len(source.requests) <= POLL_PATIENCE + 2


async def test_a_source_that_answers_at_once_without_news_is_asked_once_a_second(
    autojump_clock,
) -> None:
    polls = HashPolls(0)
    log = log_with(3, 1)
    asked = []

    async def ask(request: HashesRequest) -> Growth:
        asked.append(trio.current_time())
        return await polls.answer(log, request)

    with trio.move_on_after(10.5):
        await follow_growth(log_with(3), "", ask)
    assert 10 <= len(asked) <= 12


async def test_calls_that_wait_are_answered_when_the_role_drains(autojump_clock) -> None:
    polls, log = HashPolls(10), log_with(3, 1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(polls.answer, log, request(log.source, 1))
        await trio.testing.wait_all_tasks_blocked()
        assert len(polls) == 1
        polls.end()
    assert trio.current_time() == 0
    growth = await polls.answer(log, request(log.source, 1))
    assert (growth.position, trio.current_time()) == (1, 0)


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -1.0, 1e9])
async def test_an_absurd_time_to_wait_is_the_usual_one(autojump_clock, seconds) -> None:
    polls, log = HashPolls(10), log_with(3, 1)
    await polls.answer(log, request(log.source, 1, seconds))
    assert trio.current_time() == pytest.approx(POLL_SECONDS)


async def test_a_source_that_says_it_is_settled_and_is_not_complete_is_not_believed() -> None:
    growth = Growth(3 * PIECE, PIECE, "s", 3, (0,), hash_of(0), settled=True)

    async def ask(_: HashesRequest) -> Growth:
        return growth

    with pytest.raises(InvalidMetainfo, match="hashes are missing"):
        await follow_growth(log_with(3), "", ask)
