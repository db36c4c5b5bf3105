"""What a store removes, seen by the swarm and by clients."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, cast

import attrs
import pytest
import trio

from swarmpull.config import Capacity, StoreConfig
from swarmpull.digest import Digest
from swarmpull.registry.names import UpstreamNames
from swarmpull.roles import tracker
from swarmpull.roles.agent import AgentRegistry
from swarmpull.roles.role_store import limits_of
from swarmpull.store.eviction import Limits
from swarmpull.store.holds import Pin
from swarmpull.swarm.messages import Bye, ByeReason
from swarmpull.swarm.metainfo import PIECE_LENGTH_MIN
from swarmpull.swarm.peers import AnnounceState
from swarmpull.wire.api import AnnounceReply, AnnounceRequest

from .peers import Content, Finder, ScriptedPeer, honestly, make_content, running_node, until
from .roles import whole_cluster

# Whatever is there is too old.
EXPIRED = Limits(ttl=-1.0, partial_ttl=-1.0)


@pytest.fixture(scope="module")
def content() -> Content:
    return make_content(2 * PIECE_LENGTH_MIN + 12345)


async def test_an_evicted_blob_is_no_longer_seeded_and_a_tracker_hears_of_it(
    tmp_path: Path, content: Content
) -> None:
    states: list[AnnounceState] = []

    async def announce(request: AnnounceRequest) -> AnnounceReply:
        states.append(request.state)
        return AnnounceReply((), 60.0)

    async with running_node(tmp_path / "seeder", announce=announce) as seeder:
        await seeder.seed(content)
        await until(lambda: states == [AnnounceState.COMPLETE])

        seeder.store.janitor.limits = EXPIRED
        await seeder.store.janitor.sweep()

        assert seeder.host.torrents() == []
        await until(lambda: states == [AnnounceState.COMPLETE, AnnounceState.STOPPED])
        stream = await ScriptedPeer(content, honestly, have=0).dial(seeder)
        await stream.aclose()
        peer = ScriptedPeer(content, honestly, have=0)
        stream = await peer.dial(seeder)
        assert [type(said) for said in peer.said] == [Bye]
        assert cast(Bye, peer.said[0]).reason is ByeReason.UNKNOWN_TORRENT
        await stream.aclose()


async def test_a_blob_that_a_peer_fetches_stays_until_the_peer_has_left(
    tmp_path: Path, content: Content
) -> None:
    async with running_node(tmp_path / "seeder") as seeder:
        await seeder.seed(content)
        seeder.store.janitor.limits = EXPIRED
        stream = await ScriptedPeer(content, honestly, have=0).dial(seeder)
        await until(lambda: seeder.connections == 1)

        assert await seeder.store.janitor.sweep() == []
        assert seeder.host.pins() == {content.digest: Pin.SENDING}

        await stream.aclose()
        await until(lambda: seeder.connections == 0)
        assert len(await seeder.store.janitor.sweep()) == 1


async def test_neither_a_download_nor_its_blob_goes_while_somebody_reads_it(
    tmp_path: Path, content: Content
) -> None:
    async with running_node(tmp_path / "leecher") as leecher, trio.open_nursery() as nursery:
        leecher.store.janitor.limits = EXPIRED
        peer = ScriptedPeer(content, honestly)
        contact = await nursery.start(peer.serve)
        finder = Finder(content.metainfo, (contact,))
        download = await leecher.host.download(content.digest, "", finder.find)
        reader = download.reader()
        assert reader is not None
        assert await leecher.store.janitor.sweep() == []
        await download.wait()

        assert await leecher.store.janitor.sweep() == []
        assert leecher.store.has(content.digest)
        assert await reader.read_at(0, 100) == content.data[:100]
        reader.close()
        nursery.cancel_scope.cancel()


@attrs.define
class Origins:
    """An origin that is slow to adopt, so that the janitor comes by."""

    node: Any
    found: list[str] = attrs.Factory(list)

    async def adopt_blob(self, metainfo: object, repository: str, source: object) -> None:
        assert await self.node.store.janitor.sweep() == []
        self.found += [entry.pinned for entry in self.node.store.janitor.entries()]


async def test_a_blob_that_was_pushed_to_an_agent_stays_until_an_origin_has_it(
    tmp_path: Path, content: Content
) -> None:
    async with running_node(tmp_path / "agent") as agent:
        await agent.add(content)
        agent.store.janitor.limits = EXPIRED
        origins = Origins(agent)
        unused: Any = None
        registry = AgentRegistry(
            agent.store,
            agent.host,
            unused,
            cast(Any, origins),
            unused,
            UpstreamNames(()),
            unused,
            push=True,
        )

        await registry.accept_blob("team/app", content.digest)

        assert origins.found == ["not written back"]
        assert len(await agent.store.janitor.sweep()) == 1


async def test_an_agent_and_an_origin_with_little_room_pass_on_more_than_they_keep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker, "ORIGIN_LIFETIME", 3600.0)
    blobs = [random.Random(seed).randbytes(3 << 20) for seed in range(4)]
    room = {"max_bytes": Capacity(str(7 << 20)), "low_watermark": Capacity("50%")}
    async with whole_cluster(tmp_path) as cluster:
        await cluster.roles["origin"].stop()
        origin = await cluster.start_origin(**room)
        await cluster.roles["tracker"].stop()
        await cluster.start_tracker()
        await cluster.start_agent(**room)
        for blob in blobs:
            reply = await cluster.push_blob("origin", "team/app", blob)
            assert reply.status_code == 201, reply.text
        # The tracker goes on to send peers to an origin that has evicted the blob meanwhile.
        with trio.fail_after(60.0):
            for blob in blobs + blobs:
                reply = await cluster.get("agent", f"/blobs/{Digest.of(blob)}")
                assert (reply.status_code, reply.content) == (200, blob)

        for role in ("agent", "origin"):
            assert await cluster.metric(role, 'store_evictions_total{reason="room"}') >= 2
            assert await cluster.metric(role, 'store_bytes{kind="blob"}') <= 7 << 20
            assert await cluster.metric(role, "store_refused_total") == 0
        big = random.Random(9).randbytes(8 << 20)
        reply = await cluster.push_blob("origin", "team/app", big)
        assert reply.status_code == 507
        assert "origin.store.max_bytes" in reply.text
        await origin.stop()


def test_percentages_are_of_the_file_system_and_of_the_high_watermark(tmp_path: Path) -> None:
    config = StoreConfig(max_bytes=Capacity("50%"), low_watermark=Capacity("40%"))
    limits = limits_of("agent", tmp_path / "not" / "yet", config)
    whole = limits_of("agent", tmp_path, attrs.evolve(config, max_bytes=Capacity("100%"))).high

    assert whole > 0
    assert limits.high == pytest.approx(whole / 2)
    assert limits.low == pytest.approx(whole / 5)
    assert limits.key == "agent.store.max_bytes"


def test_a_low_watermark_is_never_above_the_high_one(tmp_path: Path) -> None:
    config = StoreConfig(max_bytes=Capacity("1000"), low_watermark=Capacity("2000"))
    assert limits_of("agent", tmp_path, config).low == 1000
