"""The file of the write-back queue: what survives, and what is said when it cannot be used."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import attrs
import pytest
import trio
import trio.testing

from swarmpull.digest import Digest
from swarmpull.errors import StartupError, StoreFull, StoreUnavailable
from swarmpull.store import durable_queue
from swarmpull.store.write_back_queue import (
    FILE_NAME,
    WriteBackQueue,
    open_write_back_queue,
    queued_digests,
)
from swarmpull.store.write_back_schedule import QueuedBlob


def blob_named(name: str, **more: object) -> QueuedBlob:
    return QueuedBlob(Digest.of(name.encode()), 100, "team/app", 1000.5, **more)  # type: ignore[arg-type]


A, B, C = map(blob_named, "abc")


def opening(directory: Path, on_disk: Iterable[QueuedBlob] = ()):
    return open_write_back_queue(directory, "origin", lambda: on_disk)


async def loaded(directory: Path) -> list[QueuedBlob]:
    async with opening(directory) as queue:
        return queue.loaded


async def test_what_is_put_is_there_after_a_restart_the_oldest_first(tmp_path: Path) -> None:
    late = attrs.evolve(A, enqueued_at=2000.0, rank=2, attempts=7, next_at=5.5, last_error="é: no")
    async with opening(tmp_path) as queue:
        assert queue.loaded == []
        await queue.put(late)
        await queue.put(B)

    assert await loaded(tmp_path) == [B, late]


async def test_what_is_put_again_replaces_and_what_is_removed_is_gone(tmp_path: Path) -> None:
    async with opening(tmp_path) as queue:
        for blob in (A, B):
            await queue.put(blob)
        await queue.put(attrs.evolve(A, attempts=3))
        await queue.remove(B.key)
        await queue.remove(C.key)

    assert await loaded(tmp_path) == [attrs.evolve(A, attempts=3)]


async def test_a_blob_of_two_repositories_is_in_it_twice(tmp_path: Path) -> None:
    other = attrs.evolve(A, namespace="other/app")
    async with opening(tmp_path) as queue:
        for blob in (A, other, B):
            await queue.put(blob)
        await queue.remove(A.key)

    assert {blob.key for blob in await loaded(tmp_path)} == {other.key, B.key}


async def test_changes_made_at_the_same_time_share_a_flush_and_keep_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commits = []
    commit = durable_queue._commit
    monkeypatch.setattr(
        durable_queue,
        "_commit",
        lambda database, changes: (commits.append(len(changes)), commit(database, changes)),
    )
    names = [blob_named(str(number)) for number in range(100)]
    async with opening(tmp_path) as queue, trio.open_nursery() as nursery:
        for blob in names:
            nursery.start_soon(queue.put, blob)
        nursery.start_soon(queue.put, A)
        nursery.start_soon(queue.remove, A.key)

    assert sum(commits) == 102
    assert len(commits) <= 3
    found = {blob.digest for blob in await loaded(tmp_path)}
    assert found - {A.digest} == {blob.digest for blob in names}


async def test_a_caller_that_gives_up_does_not_take_the_changes_of_others_along(
    tmp_path: Path,
) -> None:
    async with opening(tmp_path) as queue:
        async with trio.open_nursery() as nursery:
            for blob in (A, B):
                nursery.start_soon(queue.put, blob)
            with trio.CancelScope() as scope:
                scope.cancel()
                await queue.put(C)
        assert scope.cancelled_caught

    found = {blob.digest for blob in await loaded(tmp_path)}
    assert found >= {A.digest, B.digest}


async def test_a_new_queue_begins_with_what_the_disk_has_and_an_old_one_does_not(
    tmp_path: Path,
) -> None:
    async with opening(tmp_path, [A, B]) as queue:
        assert {blob.digest for blob in queue.loaded} == {A.digest, B.digest}
        await queue.remove(A.key)

    async with opening(tmp_path, [A, C]) as queue:
        assert queue.loaded == [B]


async def test_a_queue_whose_making_failed_is_made_anew(tmp_path: Path) -> None:
    def broken() -> Iterable[QueuedBlob]:
        yield A
        raise OSError(5, "the disk fails")

    with pytest.raises(StartupError, match="the disk fails"):
        async with open_write_back_queue(tmp_path, "origin", broken):
            pass

    async with opening(tmp_path, [A, B]) as queue:
        assert {blob.digest for blob in queue.loaded} == {A.digest, B.digest}


@pytest.mark.parametrize("size", [100, 4096, 9000])
async def test_a_damaged_file_is_named_with_what_to_do(tmp_path: Path, size: int) -> None:
    (tmp_path / FILE_NAME).write_bytes(os.urandom(size))

    with pytest.raises(StartupError, match=r"write-back.sqlite is damaged .*move it .* away"):
        async with opening(tmp_path):
            pass
    with pytest.raises(StartupError, match="damaged"):
        queued_digests(tmp_path)


async def test_a_damaged_page_is_found_at_the_start(tmp_path: Path) -> None:
    async with opening(tmp_path, [blob_named(str(number)) for number in range(1000)]):
        pass
    path = tmp_path / FILE_NAME
    data = bytearray(path.read_bytes())
    data[8192:12288] = os.urandom(4096)
    path.write_bytes(data)

    with pytest.raises(StartupError, match="is damaged"):
        async with opening(tmp_path):
            pass


async def test_a_row_that_is_no_digest_is_damage(tmp_path: Path) -> None:
    async with opening(tmp_path, [A]):
        pass
    with sqlite3.connect(tmp_path / FILE_NAME) as database:
        database.execute("update blobs set digest = '../../etc/passwd'")
    database.close()

    with pytest.raises(StartupError, match="is not a digest"):
        async with opening(tmp_path):
            pass


async def test_an_older_file_is_brought_up_to_date(tmp_path: Path) -> None:
    async with opening(tmp_path) as queue:
        await queue.put(A)
    with sqlite3.connect(tmp_path / FILE_NAME) as database:
        database.execute("alter table blobs drop column is_found")
        database.execute("pragma user_version = 1")
    database.close()

    assert queued_digests(tmp_path) == {A.digest}, "without changing it"
    found = attrs.evolve(B, is_found=True)
    async with opening(tmp_path) as queue:
        assert queue.loaded == [A]
        await queue.put(found)
    assert await loaded(tmp_path) == [found, A]


async def test_a_newer_file_is_left_to_the_newer_version(tmp_path: Path) -> None:
    async with opening(tmp_path, [A]):
        pass
    with sqlite3.connect(tmp_path / FILE_NAME) as database:
        database.execute("pragma user_version = 3")
    database.close()

    with pytest.raises(StartupError, match=r"newer version \(schema 3, .* start that version"):
        async with opening(tmp_path):
            pass
    assert (tmp_path / FILE_NAME).exists()


async def test_a_database_of_somebody_else_is_not_touched(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / FILE_NAME) as database:
        database.execute("create table mine (x)")
    database.close()

    with pytest.raises(StartupError, match="not a write-back queue"):
        async with opening(tmp_path):
            pass


async def test_a_path_that_is_a_directory_is_an_error_of_the_operator(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).mkdir()

    with pytest.raises(StartupError, match="cannot be opened"):
        async with opening(tmp_path):
            pass


def fill(path: Path) -> None:
    with suppress(OSError), path.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


async def put_many(queue: WriteBackQueue) -> None:
    for number in range(1000):
        await queue.put(blob_named(str(number), last_error="x" * 500))


async def test_a_full_disk_refuses_the_entry_and_the_queue_goes_on(small_disk: Path) -> None:
    async with opening(small_disk) as queue:
        await queue.put(A)
        ballast = small_disk / "ballast"
        fill(ballast)
        with pytest.raises(StoreFull, match="free disk space"):
            await put_many(queue)
        ballast.unlink()
        await queue.put(B)

    found = {blob.digest for blob in await loaded(small_disk)}
    assert {A.digest, B.digest} <= found


async def test_a_failing_disk_is_an_error_of_each_request(tmp_path: Path) -> None:
    async with opening(tmp_path) as queue:
        with sqlite3.connect(tmp_path / FILE_NAME) as other:
            other.execute("drop table blobs")
        other.close()
        with pytest.raises(StoreUnavailable, match="write-back queue: no such table"):
            await queue.put(A)


async def test_the_queue_can_be_looked_at_while_a_process_has_it_open(tmp_path: Path) -> None:
    assert queued_digests(tmp_path) == frozenset()
    async with opening(tmp_path) as queue:
        await queue.put(A)
        found = await trio.to_thread.run_sync(queued_digests, tmp_path)

    assert found == {A.digest}


PUT_UNTIL_KILLED = """
import sys, trio
from pathlib import Path
from swarmpull.digest import Digest
from swarmpull.store.write_back_queue import open_write_back_queue
from swarmpull.store.write_back_schedule import QueuedBlob

async def put(queue, worker):
    for number in range(100_000):
        digest = Digest.of(f"{worker} {number}".encode())
        await queue.put(QueuedBlob(digest, 1, "", float(number)))
        print(digest, flush=True)

async def main():
    async with open_write_back_queue(Path(sys.argv[1]), "origin", lambda: ()) as queue:
        async with trio.open_nursery() as nursery:
            for worker in range(8):
                nursery.start_soon(put, queue, worker)

trio.run(main)
"""


def acknowledged_before_kill(directory: Path, lines: int) -> set[str]:
    """Kill a process that puts, when it has said so often that it did; returns all that it said."""
    command = [sys.executable, "-c", PUT_UNTIL_KILLED, str(directory)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = [process.stdout.readline() for _ in range(lines)]
        process.send_signal(signal.SIGKILL)
        said += process.stdout
    assert process.returncode == -signal.SIGKILL, "it ended before it was killed"
    return {line.strip() for line in said if line.endswith("\n")}


@pytest.mark.parametrize("lines", [1, 7, 50, 333])
async def test_what_was_acknowledged_survives_kill_9(tmp_path: Path, lines: int) -> None:
    acknowledged = acknowledged_before_kill(tmp_path, lines)

    found = {str(blob.digest) for blob in await loaded(tmp_path)}
    assert len(acknowledged) >= lines
    assert acknowledged <= found
