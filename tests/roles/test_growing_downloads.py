"""A download whose piece hashes become known as it goes on."""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest
import trio

from swarmpull.errors import DownloadFailed, InvalidMetainfo, ObjectCorrupt
from swarmpull.roles import swarm_host
from swarmpull.roles.hash_log import HashLog
from swarmpull.swarm.metainfo import PIECE_LENGTH_MIN as PIECE
from swarmpull.swarm.metainfo import BlobShape, GrowingMetainfo
from swarmpull.wire.api import AnnounceReply, AnnounceRequest, Growth, HashesRequest

from .peers import Content, Node, make_content, running_node, until


@attrs.define
class Source:
    """Stands for the tracker: hands out a seeder, and tells hashes when the test says so."""

    content: Content
    seeder: Node
    log: HashLog

    @classmethod
    def of(cls, content: Content, seeder: Node) -> Source:
        shape = BlobShape.of(content.digest, len(content.data))
        return cls(content, seeder, HashLog(GrowingMetainfo.from_shape(shape)))

    async def find(self, request: AnnounceRequest) -> AnnounceReply:
        assert request.growing
        return AnnounceReply((self.seeder.contact,), 60.0, growth=self.log.since("", 0))

    async def follow(self, request: HashesRequest) -> Growth:
        return await self.log.wait_since(request.source, request.position, request.seconds)

    def tell(self, *indices: int) -> None:
        for index in indices:
            self.log.metainfo.add(index, self.content.metainfo.piece_hash(index))
        self.log.grew()


@pytest.fixture(scope="module")
def content() -> Content:
    return make_content(3 * PIECE + 100, seed=11)


async def test_pieces_that_arrive_before_their_hash_wait_for_it(
    tmp_path: Path, content: Content
) -> None:
    async with running_node(tmp_path / "a") as seeder, running_node(tmp_path / "b") as leecher:
        await seeder.seed(content)
        source = Source.of(content, seeder)
        download = await leecher.host.download(content.digest, "", source.find, source.follow)
        await until(lambda: leecher.buffered >= 3 * PIECE)
        assert download.partial.have == 0

        source.tell(2)
        await until(lambda: download.partial.have == 0b100)
        source.tell(0, 1, 3)
        await download.wait()

        assert await leecher.stored(content)
        assert leecher.buffered == 0
        assert leecher.received() == {"agent": len(content.data), "origin": 0}


async def test_a_hash_that_does_not_come_in_time_costs_the_piece_and_nobody_is_blamed(
    tmp_path: Path, content: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swarm_host, "HASH_PATIENCE", 0.05)
    async with running_node(tmp_path / "a") as seeder, running_node(tmp_path / "b") as leecher:
        await seeder.seed(content)
        source = Source.of(content, seeder)
        download = await leecher.host.download(content.digest, "", source.find, source.follow)
        await until(lambda: leecher.host.metrics.bytes_wasted._value.get() > 0)

        source.tell(0, 1, 2, 3)
        await download.wait()

        assert leecher.host.metrics.pieces_rejected._value.get() == 0
        assert await leecher.stored(content)


async def test_a_piece_that_does_not_match_the_hash_that_comes_later_is_refused(
    tmp_path: Path, content: Content
) -> None:
    async with running_node(tmp_path / "a") as seeder, running_node(tmp_path / "b") as leecher:
        await seeder.seed(content)
        source = Source.of(content, seeder)
        await leecher.host.download(content.digest, "", source.find, source.follow)
        await until(lambda: leecher.buffered > 0)
        for index in range(4):
            source.log.metainfo.add(index, bytes(32))
        source.log.grew()

        await until(lambda: leecher.host.metrics.pieces_rejected._value.get() > 0)


async def test_a_download_that_is_resumed_keeps_the_hashes_of_its_pieces(
    tmp_path: Path, content: Content
) -> None:
    async with running_node(tmp_path / "a") as seeder:
        await seeder.seed(content)
        async with running_node(tmp_path / "b") as leecher:
            source = Source.of(content, seeder)
            source.tell(1, 3)
            download = await leecher.host.download(content.digest, "", source.find, source.follow)
            await until(lambda: download.partial.have == 0b1010)
        async with running_node(tmp_path / "b") as leecher:
            source = Source.of(content, seeder)
            download = await leecher.host.download(content.digest, "", source.find, source.follow)
            assert download.partial.have == 0b1010
            source.tell(0, 1, 2, 3)
            await download.wait()
            assert await leecher.stored(content)


async def test_the_end_of_the_fetch_ends_the_download_and_readers_hear_why(
    tmp_path: Path, content: Content
) -> None:
    async with running_node(tmp_path / "a") as seeder, running_node(tmp_path / "b") as leecher:
        await seeder.seed(content)
        source = Source.of(content, seeder)
        source.tell(0)
        download = await leecher.host.download(content.digest, "", source.find, source.follow)
        reader = download.reader()
        assert reader is not None
        assert await reader.read_at(0, 10) == content.data[:10]

        source.log.fail(ObjectCorrupt("s3://b", "key", "it hashes to something else"))

        with pytest.raises(ObjectCorrupt, match="something else"):
            await reader.read_at(PIECE, 10)
        reader.close()
        await until(lambda: not list((tmp_path / "b" / "partials").iterdir()))


async def test_hashes_that_contradict_what_was_kept_end_the_download_and_the_next_begins_anew(
    tmp_path: Path, content: Content
) -> None:
    """The object in the backend was replaced while this host was away."""
    other = make_content(len(content.data), seed=12)
    async with running_node(tmp_path / "a") as seeder, running_node(tmp_path / "b") as leecher:
        await seeder.seed(content)
        first = Source.of(content, seeder)
        first.log.metainfo.add(0, content.metainfo.piece_hash(0))
        download = await leecher.host.download(content.digest, "", first.find, first.follow)
        await until(lambda: download.partial.have == 1)
        first.log.fail(DownloadFailed(str(content.digest), "the origin has ended"))
        with pytest.raises(DownloadFailed):
            await download.wait()

        second = Source.of(content, seeder)
        download = await leecher.host.download(content.digest, "", second.find, second.follow)
        second.log.metainfo.add(0, other.metainfo.piece_hash(0))
        second.log.grew()
        with pytest.raises(InvalidMetainfo):
            await download.wait()

        third = Source.of(content, seeder)
        third.tell(0, 1, 2, 3)
        download = await leecher.host.download(content.digest, "", third.find, third.follow)
        with trio.fail_after(20):
            await download.wait()
        assert await leecher.stored(content)
