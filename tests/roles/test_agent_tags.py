"""Tags as an agent knows them: fresh, asked for, stale."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import attrs
import pytest
import trio

from swarmpull.digest import Digest
from swarmpull.errors import BackendUnavailable, ManifestNotFound, RpcUnavailable, SwarmpullError
from swarmpull.roles.agent_tags import CONFIRM_SECONDS, DOWN_SECONDS, AgentTags
from swarmpull.store.tags import TagTable, open_tags
from swarmpull.telemetry import Metrics
from swarmpull.wire.api import Descriptor

DOWN = RpcUnavailable("index ring", "index.resolve", "nobody answers")


def describe(number: int) -> Descriptor:
    return Descriptor(Digest.of(b"%d" % number), "type", number)


@attrs.define
class Index:
    """One answer, and how often it was asked for."""

    answer: Descriptor | SwarmpullError
    asked: int = 0
    delay: float = 0.0

    async def resolve(self, _repository: str, _reference: str) -> Descriptor:
        self.asked += 1
        await trio.sleep(self.delay)
        if isinstance(self.answer, SwarmpullError):
            raise self.answer
        return self.answer


@pytest.fixture
async def table(tmp_path: Path) -> AsyncIterator[TagTable]:
    async with open_tags(tmp_path / "tags") as table:
        yield table


def tags_of(index: Index, table: TagTable, freshness: float = 1.0) -> AgentTags:
    return AgentTags(cast(Any, index), table, cast(Any, None), freshness, Metrics())


async def test_a_tag_is_believed_as_long_as_it_is_fresh(table, mock_clock):
    index = Index(describe(1))
    tags = tags_of(index, table)
    for _ in range(3):
        assert await tags.resolve("a", "v1") == describe(1)
    assert index.asked == 1
    index.answer = describe(2)
    mock_clock.jump(1.0)
    assert await tags.resolve("a", "v1") == describe(2)


async def test_without_freshness_it_is_asked_for_every_time(table):
    index = Index(describe(1))
    tags = tags_of(index, table, 0.0)
    for number in range(3):
        index.answer = describe(number)
        assert await tags.resolve("a", "v1") == describe(number)


@pytest.mark.parametrize("failure", [DOWN, BackendUnavailable("b", "k", "down")])
async def test_what_cannot_be_confirmed_is_stale_also_after_a_restart(
    table, mock_clock, tmp_path, failure
):
    index = Index(describe(1))
    await tags_of(index, table).resolve("a", "v1")
    index.answer = failure
    mock_clock.jump(2.0)
    async with open_tags(tmp_path / "tags") as again:
        for each in (table, again):
            tags = tags_of(index, each)
            assert await tags.resolve("a", "v1") == attrs.evolve(describe(1), stale=True)
            with pytest.raises(type(failure)):
                await tags.resolve("a", "v2")


async def test_indexes_that_fail_are_left_alone_for_a_while(table, mock_clock):
    index = Index(describe(1))
    tags = tags_of(index, table, 0.0)
    for tag in ("v1", "v2"):
        await tags.resolve("a", tag)
    index.answer = DOWN
    for tag in ("v1", "v2", "v1"):
        assert (await tags.resolve("a", tag)).stale
    assert index.asked == 3
    index.answer = describe(2)
    mock_clock.jump(DOWN_SECONDS)
    assert await tags.resolve("a", "v1") == describe(2)


async def test_an_index_that_hangs_is_not_waited_for_when_the_tag_is_known(table, mock_clock):
    index = Index(describe(1))
    tags = tags_of(index, table, 0.0)
    await tags.resolve("a", "v1")
    index.delay = 1000.0
    mock_clock.autojump_threshold = 0.01
    begun_at = trio.current_time()
    assert (await tags.resolve("a", "v1")).stale
    assert trio.current_time() - begun_at == pytest.approx(CONFIRM_SECONDS, abs=0.1)


async def test_a_tag_that_was_deleted_or_changed_here_is_not_believed(table):
    index = Index(describe(1))
    tags = tags_of(index, table)
    await tags.resolve("a", "v1")
    await tags.changed("a", "v1")
    index.answer = ManifestNotFound("a", "v1")
    with pytest.raises(ManifestNotFound):
        await tags.resolve("a", "v1")
    index.answer = DOWN
    with pytest.raises(RpcUnavailable):
        await tags.resolve("a", "v1")
