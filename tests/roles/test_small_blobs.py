"""Small blobs: whole with their metainfo, without a peer, verified like any other content."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
import trio.testing

from swarmpull.digest import Digest
from swarmpull.errors import StoreFull
from swarmpull.roles import small_blobs
from swarmpull.roles.small_blobs import SmallBlob
from swarmpull.store.blobs import BlobStore
from swarmpull.swarm.peers import AnnounceState, PeerContact
from swarmpull.wire.api import INLINE_BYTES_MAX, AnnounceReply, AnnounceRequest

from .peers import Content, Finder, make_content, running_node, until
from .roles import whole_cluster

REPOSITORY = "team/app"
LARGEST = make_content(INLINE_BYTES_MAX)
pytestmark = pytest.mark.usefixtures("descriptors")


def blob_path(data: bytes) -> str:
    return f"/v2/{REPOSITORY}/blobs/{Digest.of(data)}"


@attrs.define
class WholeFinder(Finder):
    """A tracker that sends content along."""

    content: bytes | None = None

    async def find(self, request: AnnounceRequest) -> AnnounceReply:
        return attrs.evolve(await super().find(request), content=self.content)


def finder(content: Content, *peers: PeerContact) -> WholeFinder:
    return WholeFinder(content.metainfo, peers, content=content.data)


@pytest.mark.parametrize("length", [0, 1, 50_000, INLINE_BYTES_MAX, INLINE_BYTES_MAX + 1])
async def test_a_small_blob_comes_without_a_piece_and_is_kept(tmp_path: Path, length: int) -> None:
    data = make_content(length, seed=3).data
    async with whole_cluster(tmp_path) as cluster:
        await cluster.push_blob("origin", REPOSITORY, data)
        await cluster.start_agent()

        for _ in range(2):
            assert (await cluster.get("agent", blob_path(data))).content == data

        is_small = length <= INLINE_BYTES_MAX
        assert await cluster.metric("agent", "small_blobs_received_total") == is_small
        received = (await cluster.status("agent"))["bytes_received"]
        assert received == {"origin": 0 if is_small else length, "agent": 0}


async def test_many_agents_cost_the_origin_one_call(tmp_path: Path) -> None:
    async with whole_cluster(tmp_path) as cluster:
        await cluster.push_blob("origin", REPOSITORY, LARGEST.data)
        names = ("one", "two", "three")
        for name in names:
            await cluster.start_agent(name)

        for name in names:
            assert (await cluster.get(name, blob_path(LARGEST.data))).content == LARGEST.data

        fetches = 'tracker_metainfo_requests_total{source="fetch"}'
        assert await cluster.metric("tracker", fetches) == 1


async def test_without_a_tracker_the_origin_sends_it_along(tmp_path: Path) -> None:
    async with whole_cluster(tmp_path) as cluster:
        await cluster.push_blob("origin", REPOSITORY, LARGEST.data)
        await cluster.start_agent()
        await cluster.roles["tracker"].kill()

        assert (await cluster.get("agent", blob_path(LARGEST.data))).content == LARGEST.data
        assert await cluster.metric("agent", "small_blobs_received_total") == 1


async def test_a_host_that_drains_keeps_what_it_has_handed_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small_blobs, "PAUSE", 3600.0)
    async with running_node(tmp_path / "node") as node:
        await node.host.download(LARGEST.digest, "", finder(LARGEST).find)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert not node.store.has(LARGEST.digest)

        with trio.fail_after(30):
            await node.host.drain()

        assert node.store.has(LARGEST.digest)


async def test_a_small_blob_is_seeded_like_any_other(tmp_path: Path) -> None:
    """Who has only its peers, and no content in the answer, gets it as a piece."""
    told: list[AnnounceState] = []

    async def announce(request: AnnounceRequest) -> AnnounceReply:
        told.append(request.state)
        return AnnounceReply((), 60.0)

    async with (
        running_node(tmp_path / "first", announce=announce) as first,
        running_node(tmp_path / "second") as second,
    ):
        blob = await first.host.download(LARGEST.digest, "", finder(LARGEST).find)
        await blob.wait()
        by_piece = Finder(LARGEST.metainfo, (first.contact,))
        download = await second.host.download(LARGEST.digest, "", by_piece.find)
        await download.wait()

        assert await second.stored(LARGEST)
        assert second.received()["agent"] == len(LARGEST.data)
        await until(lambda: bool(told))
        assert told == [AnnounceState.COMPLETE]


async def test_content_that_is_not_the_blob_is_ignored_and_the_swarm_asked(tmp_path: Path) -> None:
    async with (
        running_node(tmp_path / "seeder") as seeder,
        running_node(tmp_path / "leecher") as leecher,
    ):
        await seeder.seed(LARGEST)
        lying = finder(LARGEST, seeder.contact)
        lying.content = bytes(len(LARGEST.data))

        download = await leecher.host.download(LARGEST.digest, "", lying.find)
        await download.wait()

        assert await leecher.stored(LARGEST)
        assert sum(leecher.received().values()) == len(LARGEST.data)


WRONG_PIECES = attrs.evolve(LARGEST.metainfo, piece_hashes=bytes(32))
TOO_LARGE = make_content(INLINE_BYTES_MAX + 1)


@pytest.mark.parametrize(
    ("metainfo", "content"),
    [
        (LARGEST.metainfo, None),
        (LARGEST.metainfo, b""),
        (LARGEST.metainfo, LARGEST.data[:-1]),
        (LARGEST.metainfo, LARGEST.data + b"x"),
        (LARGEST.metainfo, LARGEST.data[:-1] + b"x"),
        (WRONG_PIECES, LARGEST.data),
        (TOO_LARGE.metainfo, TOO_LARGE.data),
    ],
    ids=["none", "empty", "short", "long", "changed", "wrong pieces", "too large"],
)
def test_only_what_matches_digest_and_pieces_is_taken(metainfo, content) -> None:
    assert SmallBlob.verified(metainfo, content) is None


async def test_a_full_disk_does_not_take_it_from_whoever_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(store: BlobStore, blobs: Sequence[object]) -> list[StoreFull]:
        return [StoreFull(store.name, 100) for _ in blobs]

    async with running_node(tmp_path / "agent") as node:
        monkeypatch.setattr(BlobStore, "put", full)
        blob = await node.host.download(LARGEST.digest, "", finder(LARGEST).find)
        reader = blob.reader()
        assert reader is not None

        with pytest.raises(StoreFull):
            await blob.wait()

        assert await reader.read_at(0, len(LARGEST.data)) == LARGEST.data
        assert node.host.torrents() == []


async def test_blobs_beyond_those_that_may_be_in_memory_wait_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small_blobs, "BLOBS_MAX", 2)
    contents = [make_content(100, seed=number) for number in range(3)]
    disk = trio.Event()
    put = BlobStore.put

    async with running_node(tmp_path / "agent") as node, trio.open_nursery() as nursery:

        async def waiting(store: BlobStore, blobs: Any) -> list[Any]:
            await disk.wait()
            return await put(store, blobs)

        monkeypatch.setattr(BlobStore, "put", waiting)
        begun: list[Digest] = []

        async def get(content: Content) -> None:
            await node.host.download(content.digest, "", finder(content).find)
            begun.append(content.digest)

        for content in contents:
            nursery.start_soon(get, content)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert len(begun) == 2
        disk.set()

    assert len(begun) == 3
