"""Hosts of a swarm, end to end: real sockets, real stores, the tracker played by the test."""

from __future__ import annotations

import errno
import os
import shutil
from functools import partial
from pathlib import Path

import attrs
import pytest
import structlog
import trio
import trio.testing

from swarmpull.config import SwarmConfig
from swarmpull.digest import Digest
from swarmpull.errors import (
    BlobNotFound,
    DownloadFailed,
    InvalidMetainfo,
    RpcUnavailable,
    StartupError,
    StoreFull,
)
from swarmpull.roles import swarm_host
from swarmpull.roles.swarm_host import SwarmHost
from swarmpull.store import partials
from swarmpull.swarm import events as ev
from swarmpull.swarm import timing
from swarmpull.swarm.connections import ConnectionLimits
from swarmpull.swarm.messages import Bye, ByeReason, Claim, PieceChunk
from swarmpull.swarm.metainfo import PIECE_LENGTH_MIN, BlobShape, GrowingMetainfo
from swarmpull.swarm.peers import AnnounceState, PeerContact, PeerKind
from swarmpull.swarm.scheduler import SwarmLimits
from swarmpull.wire.api import AnnounceReply, AnnounceRequest
from swarmpull.wire.streams import PeerStream

from .peers import (
    Content,
    Finder,
    Node,
    ScriptedPeer,
    fetch,
    honestly,
    make_content,
    open_descriptors,
    running_node,
    swarm_host_over,
    until,
)

pytestmark = pytest.mark.usefixtures("descriptors")


@pytest.fixture(scope="module")
def content() -> Content:
    """Six pieces, the last one short."""
    return make_content(5 * PIECE_LENGTH_MIN + 12345)


@pytest.fixture(scope="module")
def small() -> Content:
    return make_content(1000, seed=1)


@pytest.fixture(scope="module")
def contents() -> list[Content]:
    return [make_content(100, seed=number) for number in range(6)]


async def read_all(node: Node, download, size: int = 1 << 20) -> bytes:
    reader = download.reader()
    assert reader is not None
    data = bytearray()
    try:
        while len(data) < reader.length:
            data += await reader.read_at(len(data), min(size, reader.length - len(data)))
    finally:
        reader.close()
    return bytes(data)


# --- the main thing -------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, PIECE_LENGTH_MIN, 5 * PIECE_LENGTH_MIN + 12345])
async def test_a_leecher_gets_a_blob_from_a_seeder(tmp_path: Path, length: int) -> None:
    content = make_content(length)
    async with (
        running_node(tmp_path / "seeder", kind=PeerKind.ORIGIN) as seeder,
        running_node(tmp_path / "leecher") as leecher,
    ):
        await seeder.seed(content)

        await fetch(leecher, content, seeder.contact)

        assert await leecher.stored(content)
        assert leecher.received() == {"agent": 0, "origin": length}
        assert seeder.host.metrics.sent() == length
        assert leecher.buffered == 0
        await until(lambda: leecher.connections == seeder.connections == 0)


async def test_a_blob_of_the_store_is_seeded_when_a_peer_asks_for_it(
    tmp_path: Path, small: Content
) -> None:
    async with (
        running_node(tmp_path / "seeder") as seeder,
        running_node(tmp_path / "leecher") as leecher,
    ):
        await seeder.add(small)

        await fetch(leecher, small, seeder.contact)

        assert await leecher.stored(small)


async def test_leechers_get_pieces_from_each_other(tmp_path: Path, content: Content) -> None:
    """Each has a source for one half of the pieces; the other half only the other leecher can give."""
    async with (
        running_node(tmp_path / "one") as one,
        running_node(tmp_path / "two") as two,
        trio.open_nursery() as sources,
    ):
        lower = await sources.start(ScriptedPeer(content, honestly, have=0b000111).serve)
        upper = await sources.start(ScriptedPeer(content, honestly, number=2, have=0b111000).serve)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fetch, one, content, lower, two.contact)
            nursery.start_soon(fetch, two, content, upper, one.contact)
        sources.cancel_scope.cancel()

    for node in (one, two):
        assert sum(node.received().values()) == len(content.data)
        assert node.host.metrics.sent() > 0


async def test_one_who_completed_goes_on_to_seed(tmp_path: Path, content: Content) -> None:
    async with running_node(tmp_path / "one") as one:
        async with running_node(tmp_path / "seeder") as seeder:
            await seeder.seed(content)
            await fetch(one, content, seeder.contact)
        async with running_node(tmp_path / "two") as two:
            await fetch(two, content, one.contact)

            assert await two.stored(content)


async def test_a_download_resumes_where_it_was_stopped(tmp_path: Path, content: Content) -> None:
    async def three_pieces(peer: ScriptedPeer, stream: PeerStream) -> None:
        for _ in range(3):
            index = await peer.hear_claim(stream)
            await peer.send_bytes(stream, index, content.piece(index))
        await peer.listen(stream)

    async with trio.open_nursery() as nursery:
        peer = ScriptedPeer(content, three_pieces)
        contact = await nursery.start(peer.serve)
        async with running_node(tmp_path / "leecher") as first:
            finder = Finder(content.metainfo, (contact,))
            download = await first.host.download(content.digest, "", finder.find)
            await until(lambda: download.partial.have.bit_count() == 3)
        nursery.cancel_scope.cancel()
    got = sum(first.received().values())

    async with (
        running_node(tmp_path / "seeder") as seeder,
        running_node(tmp_path / "leecher") as second,
    ):
        await seeder.seed(content)
        await fetch(second, content, seeder.contact)

        assert got > 0
        assert sum(second.received().values()) == len(content.data) - got
        assert await second.stored(content)


async def test_a_blob_of_one_piece_takes_one_connection_and_one_claim(
    tmp_path: Path, small: Content
) -> None:
    """The connection, the Hellos, the offer and the claim: four round trips after the metainfo."""
    async with running_node(tmp_path / "leecher") as leecher, trio.open_nursery() as nursery:
        peer = ScriptedPeer(small, honestly)
        contact = await nursery.start(peer.serve)

        await fetch(leecher, small, contact)

        assert peer.connections == 1
        said = [type(message).__name__ for message in peer.said[:3]]
        assert said == ["Hello", "Want", "Claim"]
        nursery.cancel_scope.cancel()


# --- readers --------------------------------------------------------------------------------------


async def test_several_readers_share_one_download(tmp_path: Path, content: Content) -> None:
    got: list[bytes] = []
    async with (
        running_node(tmp_path / "seeder") as seeder,
        running_node(tmp_path / "leecher") as leecher,
    ):
        finder = Finder(content.metainfo, (seeder.contact,))
        await seeder.seed(content)
        download = await leecher.host.download(content.digest, "", finder.find)

        async def read(size: int) -> None:
            got.append(await read_all(leecher, download, size))

        async with trio.open_nursery() as nursery:
            for size in (1 << 20, 3 << 20, 700_001):
                nursery.start_soon(read, size)

        assert all(data == content.data for data in got)
        assert sum(leecher.received().values()) == len(content.data)


async def test_the_first_bytes_are_there_long_before_the_last(
    tmp_path: Path, content: Content
) -> None:
    async def all_but_the_last(peer: ScriptedPeer, stream: PeerStream) -> None:
        while True:
            index = await peer.hear_claim(stream)
            if index != content.metainfo.piece_count - 1:
                await peer.send_bytes(stream, index, content.piece(index))

    async with running_node(tmp_path / "leecher") as leecher, trio.open_nursery() as nursery:
        contact = await nursery.start(ScriptedPeer(content, all_but_the_last).serve)
        finder = Finder(content.metainfo, (contact,))
        download = await leecher.host.download(content.digest, "", finder.find)
        reader = download.reader()
        assert reader is not None

        for offset in range(0, 5 * PIECE_LENGTH_MIN, PIECE_LENGTH_MIN):
            assert await reader.read_at(offset, 100) == content.data[offset : offset + 100]

        reader.close()
        nursery.cancel_scope.cancel()


async def test_a_download_goes_on_when_its_only_reader_leaves(
    tmp_path: Path, content: Content
) -> None:
    async with (
        running_node(tmp_path / "seeder") as seeder,
        running_node(tmp_path / "leecher") as leecher,
    ):
        await seeder.seed(content)
        finder = Finder(content.metainfo)
        download = await leecher.host.download(content.digest, "", finder.find)
        with trio.move_on_after(0.01):
            await read_all(leecher, download)

        leecher.host.dispatch(ev.PeersFound(content.digest, (seeder.contact,)))
        await download.wait()

        assert await leecher.stored(content)


async def test_an_unread_download_ends_when_it_is_told_to_and_is_resumed(
    tmp_path: Path, content: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swarm_host, "UNREAD_MIN", 0.05)

    async def only_two(peer: ScriptedPeer, stream: PeerStream) -> None:
        for _ in range(2):
            index = await peer.hear_claim(stream)
            await peer.send_bytes(stream, index, content.piece(index))
        while True:
            await peer.hear_claim(stream)

    async with (
        running_node(tmp_path / "seeder") as seeder,
        running_node(tmp_path / "leecher", unread_timeout=0.0) as leecher,
        trio.open_nursery() as nursery,
    ):
        await seeder.seed(content)
        contact = await nursery.start(ScriptedPeer(content, only_two).serve)
        download = await leecher.host.download(
            content.digest, "", Finder(content.metainfo, (contact,)).find
        )
        reader = download.reader()
        assert reader is not None
        for index in range(2):
            await reader.read_at(index * PIECE_LENGTH_MIN, 10)
        reader.close()

        with pytest.raises(DownloadFailed, match="nobody reads"):
            await download.wait()

        assert leecher.host.torrents() == []
        again = await leecher.host.download(
            content.digest, "", Finder(content.metainfo, (seeder.contact,)).find
        )
        assert await read_all(leecher, again) == content.data
        assert sum(leecher.received().values()) == len(content.data), "no piece came twice"
        nursery.cancel_scope.cancel()


async def test_a_reader_outlives_the_download_and_the_partial_closes_after_it(
    tmp_path: Path, content: Content
) -> None:
    async with (
        running_node(tmp_path / "seeder") as seeder,
        running_node(tmp_path / "leecher") as leecher,
    ):
        await seeder.seed(content)
        finder = Finder(content.metainfo, (seeder.contact,))
        download = await leecher.host.download(content.digest, "", finder.find)
        reader = download.reader()
        assert reader is not None
        await download.wait()
        before = open_descriptors()

        assert await reader.read_at(0, 100) == content.data[:100]
        reader.close()

        await until(lambda: open_descriptors() < before)
        assert download.reader() is None


# --- failures -------------------------------------------------------------------------------------


def quick_limits(_config: SwarmConfig, _kind: PeerKind) -> SwarmLimits:
    return SwarmLimits(
        connections=ConnectionLimits(backoff_initial=0.05, backoff_max=0.1), stall_timeout=0.5
    )


async def test_a_stalled_download_tells_its_readers_and_can_be_tried_again_at_once(
    tmp_path: Path, content: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swarm_host, "limits_of", quick_limits)
    async with (
        running_node(tmp_path / "seeder") as seeder,
        running_node(tmp_path / "leecher") as leecher,
    ):
        await seeder.seed(content)
        finder = Finder(content.metainfo)
        download = await leecher.host.download(content.digest, "", finder.find)
        reader = download.reader()
        assert reader is not None
        with pytest.raises(DownloadFailed, match="no piece for"):
            await reader.read_at(0, 10)

        # The first reader has not left yet.
        await fetch(leecher, content, seeder.contact)

        assert await leecher.stored(content)
        reader.close()


async def test_metainfo_of_another_blob_fails_at_the_end_and_nothing_is_visible(
    tmp_path: Path, content: Content
) -> None:
    wrong = make_content(5 * PIECE_LENGTH_MIN + 12345, digest=Digest.of(b"something else"))
    async with running_node(tmp_path / "leecher") as leecher, trio.open_nursery() as nursery:
        contact = await nursery.start(ScriptedPeer(wrong, honestly).serve)
        finder = Finder(wrong.metainfo, (contact,))
        download = await leecher.host.download(wrong.digest, "", finder.find)
        failures = 0

        async def read(size: int) -> None:
            nonlocal failures
            with pytest.raises(DownloadFailed, match="every piece matched"):
                await read_all(leecher, download, size)
            failures += 1

        async with trio.open_nursery() as readers:
            for size in (1 << 20, 8 << 20):
                readers.start_soon(read, size)
        with pytest.raises(DownloadFailed):
            await download.wait()

        assert failures == 2
        with pytest.raises(BlobNotFound):
            leecher.store.stat(wrong.digest)
        assert list((tmp_path / "leecher" / "partials").iterdir()) == []
        assert leecher.host.torrents() == []
        nursery.cancel_scope.cancel()


async def test_a_full_disk_fails_that_download_only(
    tmp_path: Path, content: Content, small: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    reserve = partials.reserve

    def no_room(descriptor: int, length: int) -> None:
        if length == len(content.data):
            raise OSError(errno.ENOSPC, "No space left on device")
        reserve(descriptor, length)

    monkeypatch.setattr(partials, "reserve", no_room)
    async with (
        running_node(tmp_path / "seeder") as seeder,
        running_node(tmp_path / "leecher") as leecher,
    ):
        await seeder.seed(content)
        await seeder.seed(small)

        with pytest.raises(StoreFull):
            await fetch(leecher, content, seeder.contact)
        await fetch(leecher, small, seeder.contact)

        assert await leecher.stored(small)
        monkeypatch.undo()
        await fetch(leecher, content, seeder.contact)
        assert await leecher.stored(content)


async def test_a_disk_that_fills_up_midway_fails_that_download_only(
    tmp_path: Path, content: Content, small: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_all = partials.write_all

    def no_room(descriptor: int, data, offset: int) -> None:
        if offset == 3 * PIECE_LENGTH_MIN and len(data) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_all(descriptor, data, offset)

    monkeypatch.setattr(partials, "write_all", no_room)
    async with (
        running_node(tmp_path / "seeder") as seeder,
        running_node(tmp_path / "leecher") as leecher,
    ):
        await seeder.seed(content)
        await seeder.seed(small)

        with pytest.raises(StoreFull):
            await fetch(leecher, content, seeder.contact)
        await fetch(leecher, small, seeder.contact)
        await until(lambda: leecher.buffered == 0)

        monkeypatch.undo()
        await fetch(leecher, content, seeder.contact)
        assert await leecher.stored(content)


async def test_a_piece_thrown_away_for_one_that_was_wrong_is_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two peers send the only piece: the first one wrong bytes, the second while those are checked."""
    content = make_content(PIECE_LENGTH_MIN)
    monkeypatch.setattr(timing, "TIMEOUT_INITIAL", 0.5)
    checking, second_begun = trio.Event(), trio.Event()

    async def wrong(peer: ScriptedPeer, stream: PeerStream) -> None:
        index = await peer.hear_claim(stream)
        await until(lambda: any(isinstance(message, Claim) for message in honest.said))
        await peer.send_bytes(stream, index, bytes(PIECE_LENGTH_MIN))
        await peer.listen(stream)

    async def late(peer: ScriptedPeer, stream: PeerStream) -> None:
        index = await peer.hear_claim(stream)
        await checking.wait()
        await peer.send_bytes(stream, index, content.piece(index)[:100_000])
        second_begun.set()
        await peer.send_bytes(stream, index, content.piece(index)[100_000:], offset=100_000)
        await peer.honest(stream)

    honest = ScriptedPeer(content, late, number=2)
    async with running_node(tmp_path / "leecher") as leecher, trio.open_nursery() as nursery:
        first = await nursery.start(ScriptedPeer(content, wrong).serve)
        second = await nursery.start(honest.serve)
        finder = Finder(content.metainfo, (first, second))
        download = await leecher.host.download(content.digest, "", finder.find)
        store_piece = download.partial.store_piece

        async def slowly(index: int, data) -> bool:
            checking.set()
            await second_begun.wait()
            return await store_piece(index, data)

        monkeypatch.setattr(download.partial, "store_piece", slowly)

        await download.wait()

        assert await leecher.stored(content)
        assert leecher.buffered == 0
        nursery.cancel_scope.cancel()


async def test_a_blob_that_vanished_behind_our_back_can_be_fetched_again(
    tmp_path: Path, small: Content
) -> None:
    async with (
        running_node(tmp_path / "seeder") as seeder,
        running_node(tmp_path / "leecher") as leecher,
    ):
        await seeder.seed(small)
        await fetch(leecher, small, seeder.contact)
        await leecher.store.delete(small.digest)

        await fetch(leecher, small, seeder.contact)

        assert await leecher.stored(small)


async def test_a_seeder_whose_blob_vanished_stops_seeding_it(
    tmp_path: Path, content: Content
) -> None:
    async with (
        running_node(tmp_path / "seeder") as seeder,
        running_node(tmp_path / "leecher") as leecher,
    ):
        await seeder.seed(content)
        await seeder.store.delete(content.digest)
        finder = Finder(content.metainfo, (seeder.contact,))
        await leecher.host.download(content.digest, "", finder.find)

        await until(lambda: seeder.host.torrents() == [])


def damage(node: Node, content: Content) -> None:
    with node.store.path(content.digest).open("r+b") as file:
        file.write(bytes([content.data[0] ^ 1]))


async def test_a_seeder_whose_blob_is_damaged_hears_so_and_stops_seeding_it(
    tmp_path: Path, content: Content
) -> None:
    async with (
        running_node(tmp_path / "rotten") as rotten,
        running_node(tmp_path / "seeder") as seeder,
        running_node(tmp_path / "leecher") as leecher,
    ):
        await rotten.seed(content)
        damage(rotten, content)
        with structlog.testing.capture_logs() as logs:
            finder = Finder(content.metainfo, (rotten.contact,))
            await leecher.host.download(content.digest, "", finder.find)
            # It learns of it from the one who got a wrong piece, and looks.
            await until(lambda: rotten.host.torrents() == [])
        assert not rotten.store.has(content.digest)
        assert "blob_damaged" in [entry["event"] for entry in logs]

        # The download goes on where somebody has the right bytes.
        await seeder.seed(content)
        download = leecher.host.downloading(content.digest)
        assert download is not None
        leecher.host.dispatch(ev.PeersFound(content.digest, (seeder.contact,)))
        await download.wait()
        assert await leecher.stored(content)


async def test_a_seeder_that_cannot_read_what_it_is_to_send_stops_seeding_it(
    tmp_path: Path, content: Content
) -> None:
    async with running_node(tmp_path / "rotten") as rotten, running_node(tmp_path / "x") as leecher:
        await rotten.seed(content)
        os.truncate(rotten.store.path(content.digest), 1000)
        with structlog.testing.capture_logs() as logs:
            finder = Finder(content.metainfo, (rotten.contact,))
            await leecher.host.download(content.digest, "", finder.find)
            await until(lambda: rotten.host.torrents() == [])
        assert not rotten.store.has(content.digest)
        assert "blob_damaged" in [entry["event"] for entry in logs]


async def test_a_seeder_that_is_accused_without_reason_looks_once_and_seeds_on(
    tmp_path: Path, small: Content
) -> None:
    async with running_node(tmp_path / "seeder") as seeder:
        await seeder.seed(small)
        with structlog.testing.capture_logs() as logs:
            for _ in range(100):
                seeder.host.accused(small.digest)
            await until(lambda: "blob_wrongly_accused" in [entry["event"] for entry in logs])
            seeder.host.accused(small.digest)
            await trio.testing.wait_all_tasks_blocked(0.05)
        assert [entry["event"] for entry in logs] == ["blob_wrongly_accused"]
        assert [torrent.digest for torrent in seeder.host.torrents()] == [small.digest]


async def test_a_blob_that_waits_to_be_examined_is_not_examined_twice(
    tmp_path: Path, small: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swarm_host, "SUSPICION_INTERVAL", 0.0)
    examined, go_on = [], trio.Event()

    async def verify(digest: Digest) -> None:
        examined.append(digest)
        await go_on.wait()

    async with running_node(tmp_path / "seeder") as seeder:
        await seeder.seed(small)
        monkeypatch.setattr(seeder.store, "verify", verify)
        for _ in range(10):
            seeder.host.accused(small.digest)
            await trio.lowlevel.checkpoint()
        go_on.set()
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert examined == [small.digest]
        # Once that is done it may be again.
        seeder.host.accused(small.digest)
        await until(lambda: examined == [small.digest] * 2)


async def test_running_out_of_descriptors_ends_a_connection_and_not_the_host(
    tmp_path: Path, content: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        swarm_host,
        "limits_of",
        lambda *about: attrs.evolve(quick_limits(*about), stall_timeout=60.0),
    )
    async with (
        running_node(tmp_path / "seeder") as seeder,
        running_node(tmp_path / "leecher") as leecher,
    ):
        await seeder.seed(content)
        failing = True
        dup = os.dup

        def no_more(descriptor: int) -> int:
            if failing:
                raise OSError(errno.EMFILE, "Too many open files")
            return dup(descriptor)

        monkeypatch.setattr(os, "dup", no_more)
        with structlog.testing.capture_logs() as logs:
            finder = Finder(content.metainfo, (seeder.contact,))
            download = await leecher.host.download(content.digest, "", finder.find)
            await until(lambda: any(entry["event"] == "piece_not_sent" for entry in logs))
        failing = False

        await download.wait()

        assert await leecher.stored(content)


@pytest.mark.parametrize(
    ("host", "port"), [("127.0.0.1", 99_999_999), ("a\0b", 1), ("x" * 300, 1), ("127.0.0.1", 0)]
)
async def test_contacts_that_nobody_can_dial_are_passed_over(
    tmp_path: Path, small: Content, host: str, port: int
) -> None:
    async with (
        running_node(tmp_path / "seeder") as seeder,
        running_node(tmp_path / "leecher") as leecher,
    ):
        await seeder.seed(small)
        nobody = PeerContact("e" * 32, host, port, PeerKind.AGENT)

        await fetch(leecher, small, nobody, seeder.contact)

        assert await leecher.stored(small)


# --- finding --------------------------------------------------------------------------------------


async def test_many_who_want_the_same_blob_cause_one_search(tmp_path: Path, small: Content) -> None:
    async with (
        running_node(tmp_path / "seeder") as seeder,
        running_node(tmp_path / "leecher") as leecher,
    ):
        await seeder.seed(small)
        finder = Finder(small.metainfo, (seeder.contact,), gate=trio.Event())
        downloads = []

        async def want() -> None:
            downloads.append(await leecher.host.download(small.digest, "", finder.find))

        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(want)
            await trio.testing.wait_all_tasks_blocked()
            finder.gate.set()

        assert finder.calls == 1
        assert len(downloads) == 20
        assert len(set(map(id, downloads))) == 1
        await downloads[0].wait()


async def test_a_search_that_fails_fails_for_all_and_the_next_one_tries_again(
    tmp_path: Path, small: Content
) -> None:
    async with (
        running_node(tmp_path / "seeder") as seeder,
        running_node(tmp_path / "leecher") as leecher,
    ):
        await seeder.seed(small)
        finder = Finder(
            small.metainfo,
            (seeder.contact,),
            error=BlobNotFound(str(small.digest), "the origins"),
            gate=trio.Event(),
        )
        errors = []

        async def want() -> None:
            with pytest.raises(BlobNotFound) as caught:
                await leecher.host.download(small.digest, "", finder.find)
            errors.append(caught.value)

        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(want)
            await trio.testing.wait_all_tasks_blocked()
            finder.gate.set()

        assert finder.calls == 1
        assert len(set(map(id, errors))) == 20, "each has an exception of its own"
        assert str(errors[0]) == str(finder.error)
        assert list((tmp_path / "leecher" / "partials").iterdir()) == []
        finder.error = None
        download = await leecher.host.download(small.digest, "", finder.find)
        await download.wait()


async def test_a_search_goes_on_when_those_who_wait_give_up(tmp_path: Path, small: Content) -> None:
    async with (
        running_node(tmp_path / "seeder") as seeder,
        running_node(tmp_path / "leecher") as leecher,
    ):
        await seeder.seed(small)
        finder = Finder(small.metainfo, (seeder.contact,), gate=trio.Event())
        with trio.move_on_after(0.01) as scope:
            await leecher.host.download(small.digest, "", finder.find)
        finder.gate.set()

        assert scope.cancelled_caught
        await until(lambda: leecher.host.metrics.received_by_source()[1]["agent"] == 1000)


async def test_an_answer_about_another_blob_is_refused(
    tmp_path: Path, small: Content, content: Content
) -> None:
    async with running_node(tmp_path / "leecher") as leecher:
        with pytest.raises(InvalidMetainfo):
            await leecher.host.download(content.digest, "", Finder(small.metainfo).find)


@pytest.mark.parametrize("interval", [0.0, -1.0, float("nan"), float("inf")])
async def test_a_tracker_cannot_make_a_host_flood_it_or_forget_it(interval: float) -> None:
    assert swarm_host.INTERVAL_MIN <= swarm_host._sane(interval) <= swarm_host.INTERVAL_MAX


# --- adopting -------------------------------------------------------------------------------------


async def test_adopting_twice_at_once_fetches_once(tmp_path: Path, content: Content) -> None:
    async with (
        running_node(tmp_path / "agent") as agent,
        running_node(tmp_path / "origin", kind=PeerKind.ORIGIN) as origin,
    ):
        await agent.seed(content)

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(origin.host.adopt, content.metainfo, "a/b", agent.contact)
        await origin.host.adopt(content.metainfo, "a/b", agent.contact)

        assert await origin.stored(content)
        assert sum(origin.received().values()) == len(content.data)


async def test_an_adoption_with_other_piece_hashes_is_refused_while_one_is_under_way(
    tmp_path: Path, content: Content
) -> None:
    wrong = attrs.evolve(content.metainfo, piece_hashes=bytes(len(content.metainfo.piece_hashes)))
    nobody = PeerContact("f" * 32, "127.0.0.1", 9, PeerKind.AGENT)
    async with running_node(tmp_path / "origin") as node, trio.open_nursery() as nursery:
        nursery.start_soon(node.host.adopt, wrong, "", nobody)
        await until(lambda: node.host.downloading(content.digest) is not None)

        with pytest.raises(InvalidMetainfo, match="other piece hashes"):
            await node.host.adopt(content.metainfo, "", nobody)

        nursery.cancel_scope.cancel()


async def test_who_only_knows_the_shape_of_a_blob_gets_no_part_in_its_download(
    tmp_path: Path, content: Content
) -> None:
    """The hashes of a blob that is being fetched are not known at first, so any would agree."""
    nobody = PeerContact("f" * 32, "127.0.0.1", 9, PeerKind.ORIGIN)
    made_up = attrs.evolve(content.metainfo, piece_hashes=bytes(len(content.metainfo.piece_hashes)))
    async with running_node(tmp_path / "origin") as node, trio.open_nursery() as nursery:
        download = await node.host.fetch(GrowingMetainfo.from_shape(shape_of(content)), "")

        with pytest.raises(InvalidMetainfo, match="not all is known of it yet"):
            await node.host.adopt(made_up, "", nobody, proven=True)

        download.metainfo.add_all(content.metainfo)
        nursery.start_soon(partial(node.host.adopt, content.metainfo, "", nobody, proven=True))
        await trio.testing.wait_all_tasks_blocked()
        assert node.host.downloading(content.digest) is download
        nursery.cancel_scope.cancel()


def shape_of(content: Content) -> BlobShape:
    metainfo = content.metainfo
    return BlobShape(metainfo.digest, metainfo.length, metainfo.piece_length)


async def test_adopting_goes_on_when_the_caller_gives_up(tmp_path: Path, content: Content) -> None:
    async with (
        running_node(tmp_path / "agent") as agent,
        running_node(tmp_path / "origin", kind=PeerKind.ORIGIN) as origin,
    ):
        with trio.move_on_after(0.05):
            await origin.host.adopt(content.metainfo, "a/b", agent.contact)
        await agent.seed(content)

        await origin.host.adopt(content.metainfo, "a/b", agent.contact)

        assert await origin.stored(content)


async def test_adopting_goes_on_when_the_caller_gives_up_before_it_has_begun(
    tmp_path: Path, content: Content
) -> None:
    async with (
        running_node(tmp_path / "agent") as agent,
        running_node(tmp_path / "origin", kind=PeerKind.ORIGIN) as origin,
    ):
        await agent.seed(content)
        with trio.CancelScope() as scope:
            scope.cancel()
            await origin.host.adopt(content.metainfo, "a/b", agent.contact)
        assert scope.cancelled_caught

        await until(lambda: origin.host.downloading(content.digest) is not None)
        await until(lambda: origin.host.downloading(content.digest) is None)

        assert await origin.stored(content)


# --- trackers -------------------------------------------------------------------------------------


@attrs.define
class Tracker:
    """Remembers announces; fails the first few."""

    failing: int = 0
    states: list[AnnounceState] = attrs.Factory(list)

    async def announce(self, request: AnnounceRequest) -> AnnounceReply:
        await trio.lowlevel.checkpoint()
        self.states.append(request.state)
        if self.failing:
            self.failing -= 1
            raise RpcUnavailable("tracker:1", "tracker.announce", "connection refused")
        return AnnounceReply((), 60.0)


async def test_completion_is_announced_until_a_tracker_answers(
    tmp_path: Path, small: Content
) -> None:
    tracker = Tracker(failing=2)
    async with (
        running_node(tmp_path / "seeder") as seeder,
        running_node(tmp_path / "leecher", announce=tracker.announce) as leecher,
    ):
        await seeder.seed(small)
        await fetch(leecher, small, seeder.contact)

        await until(lambda: len(tracker.states) == 3)

    assert tracker.states == [AnnounceState.COMPLETE] * 3


async def test_blobs_that_are_due_together_are_announced_together_until_each_is_taken(
    tmp_path: Path, contents: list[Content]
) -> None:
    calls: list[list[Digest]] = []

    async def announce_held(contact, digests, told) -> None:
        calls.append(list(digests))
        await trio.lowlevel.checkpoint()
        # Of one it is said that no tracker took it, of one nothing at all.
        refused, ignored = (digests[-2], digests[-1]) if len(calls) == 1 else (None, None)
        for digest in digests:
            if digest != ignored:
                told(digest, None if digest == refused else AnnounceReply((), 60.0))

    tracker = Tracker()
    async with running_node(
        tmp_path / "node", announce=tracker.announce, announce_held=announce_held
    ) as node:
        for content in contents:
            await node.add(content)
        for content in contents:
            node.host.seed(content.metainfo, "")
        await until(lambda: len(calls) + len(tracker.states) >= 2)

    assert sorted(calls[0]) == sorted(content.digest for content in contents)
    assert all(set(call) <= set(calls[0][-2:]) for call in calls[1:]), "only those two again"


async def test_a_host_that_cannot_announce_many_blobs_at_once_announces_each(
    tmp_path: Path, contents: list[Content]
) -> None:
    tracker = Tracker()
    async with running_node(tmp_path / "node", announce=tracker.announce) as node:
        for content in contents:
            await node.add(content)
        for content in contents:
            node.host.seed(content.metainfo, "")
        await until(lambda: len(tracker.states) == len(contents))

    assert set(tracker.states) == {AnnounceState.COMPLETE}


async def test_a_drain_tells_the_trackers_before_it_ends(tmp_path: Path, small: Content) -> None:
    tracker = Tracker()
    async with running_node(tmp_path / "seeder", announce=tracker.announce) as seeder:
        await seeder.seed(small)
        await until(lambda: tracker.states == [AnnounceState.COMPLETE])

        await seeder.host.drain()

        assert tracker.states == [AnnounceState.COMPLETE, AnnounceState.STOPPED]


# --- the end --------------------------------------------------------------------------------------


async def test_a_drain_lets_the_piece_that_is_being_sent_end(
    tmp_path: Path, content: Content
) -> None:
    async with running_node(tmp_path / "seeder") as seeder:
        await seeder.seed(content)
        peer = ScriptedPeer(content, honestly, have=0)
        stream = await peer.dial(seeder)
        await peer.claim(stream, 0)
        chunk = await stream.receive()
        assert isinstance(chunk, PieceChunk)
        piece = bytearray(len(content.piece(0)))

        async def receive_the_rest() -> None:
            message = chunk
            while not isinstance(message, Bye):
                view = memoryview(piece)[message.offset : message.offset + message.length]
                await stream.receive_into(view)
                message = await stream.receive()
            peer.goodbyes.append(message)
            await stream.aclose()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(seeder.host.drain)
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert seeder.connections == 1, "the piece is not finished"
            nursery.start_soon(receive_the_rest)

        assert piece == content.piece(0)
        assert [bye.reason for bye in peer.goodbyes] == [ByeReason.DRAINING]
        assert seeder.connections == 0


async def test_a_drain_with_a_stalled_receiver_is_bounded_by_cancelling(
    tmp_path: Path, content: Content
) -> None:
    async with running_node(tmp_path / "seeder") as seeder:
        await seeder.seed(content)
        peer = ScriptedPeer(content, honestly, have=0)
        stream = await peer.dial(seeder)
        await peer.claim(stream, 0)
        await stream.receive()

        with trio.move_on_after(0.2) as scope:
            await seeder.host.drain()

        assert scope.cancelled_caught
        started = trio.current_time()
    assert trio.current_time() - started < 2
    await stream.aclose()


async def test_a_host_that_is_draining_refuses_peers(tmp_path: Path, content: Content) -> None:
    async with running_node(tmp_path / "seeder") as seeder:
        await seeder.seed(content)
        await seeder.host.drain()
        peer = ScriptedPeer(content, honestly, have=0)

        stream = await peer.dial(seeder)

        assert peer.said == [Bye(ByeReason.DRAINING)]
        await stream.aclose()
        await until(lambda: seeder.connections == 0)


async def test_cancelling_a_host_midway_closes_partials_and_tells_who_waits(
    tmp_path: Path, content: Content
) -> None:
    async def one_piece(peer: ScriptedPeer, stream: PeerStream) -> None:
        index = await peer.hear_claim(stream)
        await peer.send_bytes(stream, index, content.piece(index))
        index = await peer.hear_claim(stream)
        await peer.send_bytes(stream, index, content.piece(index)[:700_000])
        await peer.listen(stream)

    errors: list[BaseException] = []
    async with trio.open_nursery() as nursery:
        contact = await nursery.start(ScriptedPeer(content, one_piece).serve)
        async with swarm_host_over(tmp_path) as (store, open_host):
            async with open_host() as host:
                finder = Finder(content.metainfo, (contact,))
                download = await host.download(content.digest, "", finder.find)

                async def wait() -> None:
                    with pytest.raises(DownloadFailed, match="shuts down") as caught:
                        await download.wait()
                    errors.append(caught.value)

                nursery.start_soon(wait)
                await until(lambda: download.partial.have.bit_count() == 1)
                await until(lambda: host._buffers.taken > 0)
            # The store is still open: whoever opens the partial again must find it closed.
            partial = await store.open_partial(content.metainfo)
            assert partial.have.bit_count() == 1
            await partial.aclose()
        nursery.cancel_scope.cancel()
    assert len(errors) == 1


async def test_a_host_that_ends_during_a_search_tells_who_waits(
    tmp_path: Path, small: Content
) -> None:
    finder = Finder(small.metainfo, gate=trio.Event())

    async def want(host: SwarmHost) -> None:
        with pytest.raises(DownloadFailed, match="shuts down"):
            await host.download(small.digest, "", finder.find)

    async with (
        trio.open_nursery() as nursery,
        swarm_host_over(tmp_path) as (_, open_host),
        open_host() as host,
    ):
        nursery.start_soon(want, host)
        await until(lambda: finder.calls == 1)


async def test_a_reader_may_be_closed_after_the_host(tmp_path: Path, content: Content) -> None:
    async with swarm_host_over(tmp_path) as (_, open_host):
        async with open_host() as host:
            download = await host.download(content.digest, "", Finder(content.metainfo).find)
            reader = download.reader()
            assert reader is not None
        with pytest.raises(DownloadFailed, match="shuts down"):
            await reader.read_at(0, 10)
        reader.close()


async def test_a_port_in_use_is_a_startup_error_without_a_group(tmp_path: Path) -> None:
    async with swarm_host_over(tmp_path) as (_, open_host), open_host() as host:
        with pytest.raises(StartupError, match="cannot listen"):
            async with open_host(host.contact.port):
                pass


async def test_an_error_of_the_block_is_raised_as_it_is(tmp_path: Path) -> None:
    async with swarm_host_over(tmp_path) as (_, open_host):
        with pytest.raises(KeyError):
            async with open_host():
                raise KeyError("mine")


async def test_forgetting_a_download_ends_it_and_its_peers(
    tmp_path: Path, content: Content
) -> None:
    async with running_node(tmp_path / "leecher") as leecher, trio.open_nursery() as nursery:
        peer = ScriptedPeer(content, ScriptedPeer.listen)
        contact = await nursery.start(peer.serve)
        finder = Finder(content.metainfo, (contact,))
        download = await leecher.host.download(content.digest, "", finder.find)
        await until(lambda: leecher.connections == 1)

        leecher.host.forget(content.digest)

        with pytest.raises(DownloadFailed, match="deleted"):
            await download.wait()
        await peer.ended.wait()
        assert leecher.host.torrents() == []
        nursery.cancel_scope.cancel()
    shutil.rmtree(tmp_path / "leecher")
