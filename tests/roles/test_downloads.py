"""What readers of a download see; the pieces are stored by the test."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import attrs
import pytest
import trio
import trio.testing

from swarmpull.digest import Digest
from swarmpull.errors import DownloadFailed
from swarmpull.roles.downloads import Download, DownloadReader
from swarmpull.store.blobs import open_store
from swarmpull.swarm.metainfo import PIECE_LENGTH_MIN

from .peers import Content, make_content

TAIL = 1000


@attrs.define
class Play:
    """A download of three pieces whose pieces the test stores."""

    content: Content
    download: Download
    moves: list[int]
    closed: list[int]

    def reader(self) -> DownloadReader:
        reader = self.download.reader()
        assert reader is not None
        return reader

    async def store(self, index: int) -> None:
        assert await self.download.partial.store_piece(index, self.content.piece(index))
        self.download.progress()


@pytest.fixture
async def play(tmp_path: Path) -> AsyncIterator[Play]:
    content = make_content(2 * PIECE_LENGTH_MIN + TAIL)
    moves: list[int] = []
    closed: list[int] = []

    def moved(_digest: Digest, _reader: int, index: int) -> None:
        moves.append(index)

    def left(_digest: Digest, reader: int) -> None:
        closed.append(reader)

    async with (
        open_store(tmp_path, name="store") as store,
        await store.open_partial(content.metainfo) as partial,
    ):
        yield Play(content, Download(partial, moved, left), moves, closed)


async def read(reader: DownloadReader, offset: int, size: int, into: list[bytes]) -> None:
    into.append(await reader.read_at(offset, size))


async def test_a_read_waits_for_its_piece_and_makes_it_urgent(play: Play) -> None:
    got: list[bytes] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(read, play.reader(), PIECE_LENGTH_MIN + 5, 10, got)
        await trio.testing.wait_all_tasks_blocked()
        await play.store(0)
        await trio.testing.wait_all_tasks_blocked()
        assert not got
        await play.store(1)

    assert got == [play.content.piece(1)[5:15]]
    assert play.moves == [1]


async def test_a_read_across_pieces_returns_what_is_there(play: Play) -> None:
    await play.store(0)

    data = await play.reader().read_at(PIECE_LENGTH_MIN - 5, 100)

    assert data == play.content.piece(0)[-5:]


async def test_a_read_across_stored_pieces_returns_them_in_one(play: Play) -> None:
    await play.store(0)
    await play.store(1)

    data = await play.reader().read_at(PIECE_LENGTH_MIN - 5, 10)

    assert data == play.content.data[PIECE_LENGTH_MIN - 5 : PIECE_LENGTH_MIN + 5]


async def test_the_last_bytes_are_held_back_until_the_blob_is_verified(play: Play) -> None:
    for index in range(3):
        await play.store(index)
    reader = play.reader()
    got: list[bytes] = []
    assert await reader.read_at(2 * PIECE_LENGTH_MIN, 10) == play.content.piece(2)[:10]

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read, reader, 2 * PIECE_LENGTH_MIN, TAIL, got)
        await trio.testing.wait_all_tasks_blocked()
        assert not got
        await play.download.partial.commit()
        play.download.end()

    assert got == [play.content.piece(2)]


async def test_who_wants_only_the_end_does_not_wait_for_the_rest(play: Play) -> None:
    await play.store(2)

    with trio.fail_after(5):
        footer = await play.reader().read_at(2 * PIECE_LENGTH_MIN + 7, TAIL - 7, early=True)

    assert footer == play.content.piece(2)[7:]
    assert play.moves == [2]


async def test_the_window_follows_a_reader_through_what_is_stored(play: Play) -> None:
    for index in (0, 1):
        await play.store(index)
    reader = play.reader()

    for offset in (0, 100, PIECE_LENGTH_MIN, PIECE_LENGTH_MIN + 100):
        await reader.read_at(offset, 100)

    assert play.moves == [0, 1], "once for each piece, before it has to wait for one"


async def test_unread_is_a_download_whose_last_reader_left_some_time_ago(
    play: Play, autojump_clock: trio.testing.MockClock
) -> None:
    first, second = play.reader(), play.reader()
    unread_at: list[float] = []

    async def watch() -> None:
        assert await play.download.wait_unread(30.0)
        unread_at.append(trio.current_time())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        await trio.sleep(100)
        first.close()
        await trio.sleep(100)
        second.close()
        await trio.sleep(20)
        third = play.reader()  # as a client that comes back
        await trio.sleep(100)
        third.close()

    assert unread_at == [trio.current_time()] == pytest.approx([350.0])


async def test_a_reader_that_comes_at_the_last_moment_is_a_reader(
    play: Play, autojump_clock: trio.testing.MockClock
) -> None:
    readers_then: list[int] = []

    async def watch() -> None:
        await play.download.wait_unread(30.0)
        readers_then.append(play.download._readers)

    # Who is first in a turn of the event loop is left to chance.
    for _ in range(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            await trio.sleep(30)
            reader = play.reader()
            await trio.sleep(1)
            reader.close()

    assert readers_then == [0] * 20


async def test_a_download_that_has_ended_is_not_unread(play: Play) -> None:
    play.download.end()

    assert not await play.download.wait_unread(0.0)


async def test_the_last_bytes_do_not_wait_for_the_disk(play: Play) -> None:
    for index in range(3):
        await play.store(index)
    await play.download.partial.verify()

    play.download.confirm()

    with trio.fail_after(5):
        last = await play.reader().read_at(2 * PIECE_LENGTH_MIN, TAIL)
    assert last == play.content.piece(2)


async def test_a_failure_reaches_every_reader_and_everybody_who_waits(play: Play) -> None:
    failures: list[DownloadFailed] = []

    async def expect_failure(wait) -> None:
        with pytest.raises(DownloadFailed, match="no more peers") as caught:
            await wait()
        failures.append(caught.value)

    readers = [play.reader() for _ in range(3)]
    async with trio.open_nursery() as nursery:
        for reader in readers:
            nursery.start_soon(expect_failure, lambda reader=reader: reader.read_at(0, 10))
        nursery.start_soon(expect_failure, play.download.wait)
        await trio.testing.wait_all_tasks_blocked()
        play.download.end(DownloadFailed(str(play.content.digest), "no more peers"))

    assert len(failures) == 4
    assert len(set(map(id, failures))) == 4, "each raises an exception of its own"


async def test_after_a_failure_stored_pieces_are_not_read_either(play: Play) -> None:
    await play.store(0)
    reader = play.reader()
    play.download.end(DownloadFailed(str(play.content.digest), "no more peers"))

    with pytest.raises(DownloadFailed):
        await reader.read_at(0, 10)


async def test_a_failed_download_may_be_closed_although_it_is_read(play: Play) -> None:
    play.reader()

    play.download.end(DownloadFailed(str(play.content.digest), "no more peers"))

    with trio.fail_after(1):
        await play.download.wait_closable()


async def test_a_complete_download_is_closed_after_its_last_reader(play: Play) -> None:
    first, second = play.reader(), play.reader()
    play.download.end()
    closed = trio.Event()

    async def wait() -> None:
        await play.download.wait_closable()
        closed.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        first.close()
        first.close()
        await trio.testing.wait_all_tasks_blocked()
        assert not closed.is_set(), "closing twice is closing once"
        second.close()

    assert len(play.closed) == 2


async def test_a_reader_that_leaves_while_it_waits_changes_nothing(play: Play) -> None:
    reader = play.reader()
    with trio.move_on_after(0.01) as scope:
        await reader.read_at(0, 10)
    reader.close()

    await play.store(0)

    assert scope.cancelled_caught
    assert await play.reader().read_at(0, 10) == play.content.data[:10]


async def test_there_are_no_new_readers_after_the_end(play: Play) -> None:
    play.download.end()

    assert play.download.reader() is None


async def test_the_first_end_counts(play: Play) -> None:
    play.download.end()
    play.download.end(DownloadFailed(str(play.content.digest), "too late"))

    await play.download.wait()
    assert not play.download.failed
