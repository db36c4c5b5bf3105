"""Files that are read again when they change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import structlog
import trio

from swarmpull.errors import CertificateError
from swarmpull.watched_files import WatchedFiles

DEADLINE = 60.0


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - of what a thread does
        await trio.sleep(0.01)


async def test_files_that_cannot_be_used_are_tried_again_and_complained_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swarmpull.watched_files.LOOK_EVERY", 0.01)
    file = tmp_path / "file"
    file.write_text("old")
    refused: list[str] = []
    is_readable = True

    def load() -> str:
        if not is_readable:
            refused.append(file.read_text())
            raise CertificateError("cannot be read", "key")
        return file.read_text()

    watched = WatchedFiles((str(file),), load)
    with structlog.testing.capture_logs() as logs, trio.fail_after(DEADLINE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watched.run)
            is_readable = False
            file.write_text("newer")
            await until(lambda: len(refused) > 3)
            assert watched.current == "old"
            # As a change of the owner does: nothing that a look can see.
            is_readable = True
            await until(lambda: watched.current == "newer")
            nursery.cancel_scope.cancel()

    events = [entry["event"] for entry in logs]
    assert events.count("files_not_reloaded") == 1


async def test_who_waits_for_another_value_is_told_and_of_none_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swarmpull.watched_files.LOOK_EVERY", 0.01)
    file = tmp_path / "file"
    file.write_text("old")
    looks = 0

    def load() -> str:
        nonlocal looks
        looks += 1
        if file.read_text() == "wrong":
            raise CertificateError("cannot be used", "key")
        return file.read_text()

    watched = WatchedFiles((str(file),), load)
    seen: list[str] = []

    async def see() -> None:
        while True:
            await watched.renewed()
            seen.append(watched.current)

    with trio.fail_after(DEADLINE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(see)
            nursery.start_soon(watched.run)
            file.write_text("wrong")
            await until(lambda: looks > 3)
            assert seen == []
            file.write_text("newer")
            await until(lambda: bool(seen))
            nursery.cancel_scope.cancel()
    assert seen == ["newer"]
