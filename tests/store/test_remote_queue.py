"""The file of what other clusters have not been told of: what survives, and in which order it comes back."""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest

from swarmpull.errors import StartupError, StoreUnavailable
from swarmpull.store.remote_queue import FILE_NAME, RemoteChange, open_remote_queue
from swarmpull.store.write_back_queue import open_write_back_queue

A = RemoteChange("west", "team/app", "v1", 1_800_000_000_000_000_001, "index-1", 1000.5)
B = RemoteChange("east", "team/app", "v1", 7, "", 900.0, standby=True, attempts=3, last_error="é")


async def loaded(directory: Path) -> list[RemoteChange]:
    async with open_remote_queue(directory, "index") as queue:
        return queue.loaded


async def test_what_is_put_is_there_after_a_restart_the_oldest_first(tmp_path: Path) -> None:
    directory = tmp_path / "not" / "there" / "yet"
    async with open_remote_queue(directory, "index") as queue:
        assert queue.loaded == []
        for change in (A, B):
            await queue.put(change)

    assert await loaded(directory) == [B, A]


async def test_a_later_change_of_a_tag_replaces_the_one_before(tmp_path: Path) -> None:
    later = attrs.evolve(A, time=A.time + 1, set_aside=True)
    async with open_remote_queue(tmp_path, "index") as queue:
        for change in (A, B, later):
            await queue.put(change)
        await queue.remove(B.key)
        await queue.remove(B.key)

    assert await loaded(tmp_path) == [later]
    assert later.stamp > A.stamp


async def test_a_number_that_no_row_takes_does_not_stop_the_queue(tmp_path: Path) -> None:
    async with open_remote_queue(tmp_path, "index") as queue:
        with pytest.raises(StoreUnavailable, match="too large"):
            await queue.put(attrs.evolve(A, time=1 << 63))
        await queue.put(B)

    assert await loaded(tmp_path) == [B]


async def test_a_directory_has_one_index(tmp_path: Path) -> None:
    async with open_remote_queue(tmp_path, "index"):
        with pytest.raises(StartupError, match="in use by another process"):
            await loaded(tmp_path)
    assert await loaded(tmp_path) == []


async def test_the_file_of_another_queue_is_not_touched(tmp_path: Path) -> None:
    async with open_write_back_queue(tmp_path, "origin", tuple):
        pass
    (tmp_path / "write-back.sqlite").rename(tmp_path / FILE_NAME)

    with pytest.raises(StartupError, match="is not a queue of changes for remote clusters"):
        await loaded(tmp_path)
