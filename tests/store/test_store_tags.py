"""What tags were: kept over restarts, bounded, and never a reason not to start."""

from __future__ import annotations

from pathlib import Path

import structlog

from swarmpull.digest import Digest
from swarmpull.store.tags import Tagged, open_tags

ONE = Tagged(Digest.of(b"one"), "application/json", 3, confirmed_at=5.0)
TWO = Tagged(Digest.of(b"two"), "application/json", 3, confirmed_at=6.0)


async def test_a_tag_is_remembered_over_a_restart_and_when_it_was_confirmed_is_not(
    tmp_path: Path,
) -> None:
    async with open_tags(tmp_path / "tags") as table:
        assert table.get("a/b", "v1") is None
        await table.put("a/b", "v1", ONE)
        await table.put("a/b", "v2", ONE)
        await table.put("a/b", "v2", TWO)
        await table.put("a/b", "v3", ONE)
        await table.remove("a/b", "v3")
        await table.remove("a/b", "v4")
        assert table.get("a/b", "v1").confirmed_at == 5.0
    async with open_tags(tmp_path / "tags") as table:
        assert [table.get("a/b", tag) for tag in ("v1", "v2", "v3")] == [ONE, TWO, None]
        assert table.get("a/b", "v1").confirmed_at < 0


async def test_of_too_many_tags_those_used_longest_ago_are_forgotten(tmp_path: Path) -> None:
    async with open_tags(tmp_path / "tags", capacity=2) as table:
        for tag in ("v1", "v2"):
            await table.put("a", tag, ONE)
        table.get("a", "v1")
        await table.put("a", "v3", ONE)
        assert [table.get("a", tag) for tag in ("v1", "v2", "v3")] == [ONE, None, ONE]
    async with open_tags(tmp_path / "tags") as table:
        assert len(table) == 2
    async with open_tags(tmp_path / "tags", capacity=1) as table:
        assert len(table) == 1


async def test_a_damaged_file_is_begun_anew(tmp_path: Path) -> None:
    file = tmp_path / "tags"
    file.write_bytes(b"this is no database, however long it is" * 100)
    with structlog.testing.capture_logs() as logs:
        async with open_tags(file) as table:
            await table.put("a", "v1", ONE)
    assert [entry["event"] for entry in logs] == ["tags_damaged"]
    async with open_tags(file) as table:
        assert table.get("a", "v1") == ONE


async def test_a_file_that_cannot_be_made_is_done_without(tmp_path: Path) -> None:
    with structlog.testing.capture_logs() as logs:
        async with open_tags(tmp_path / "absent" / "tags") as table:
            await table.put("a", "v1", ONE)
            assert table.get("a", "v1") == ONE
    assert [entry["event"] for entry in logs] == ["tags_not_kept"]
