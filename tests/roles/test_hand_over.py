"""An origin hands blobs to another cluster: when one side is gone, and when only the backend has them."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from swarmpull.digest import Digest
from swarmpull.errors import BackendUnavailable
from swarmpull.roles import cold_fetch, hand_over, origin_backends, replicator, swarm_host
from swarmpull.store.backends import open_backend
from swarmpull.swarm.connections import ConnectionLimits
from swarmpull.swarm.peers import PeerContact, PeerKind
from swarmpull.swarm.scheduler import SwarmLimits
from swarmpull.wire import api
from swarmpull.wire.rpc import RpcContext, RpcService, serve_rpc

from .roles import Cluster, whole_cluster
from .test_cold_blobs import Gated
from .test_replicated_referrers import west_under
from .test_replicator import CONFIG, East, digest_at, east_under, until

MIB = 1 << 20
PIECES = 4
LAYER = b"".join(bytes([number]) * (4 * MIB) for number in range(PIECES))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicator, "BACKOFF_MAX", 0.5)
    monkeypatch.setattr("swarmpull.store.retry_schedule.PROBE_MAX", 0.3)


def at_rate(cluster: Cluster, rate: float) -> None:
    (remote,) = cluster.config.remotes
    cluster.config = attrs.evolve(cluster.config, remotes=(attrs.evolve(remote, rate=rate),))


async def test_what_was_begun_ends_when_its_source_is_gone_and_goes_on_when_it_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def limits_of(*_: Any) -> SwarmLimits:
        connections = ConnectionLimits(backoff_initial=0.05, backoff_max=0.1)
        return SwarmLimits(connections=connections, stall_timeout=3.0)

    monkeypatch.setattr(swarm_host, "limits_of", limits_of)
    async with (
        west_under(tmp_path / "west") as west,
        east_under(tmp_path / "east", indexes=1) as east,
    ):
        here = east.cluster
        await here.roles["index-0"].stop()
        east.replicate(west.roles["index"].address("rpc"))
        at_rate(here, 8 * MIB)
        await east.start_index(0)
        digest = Digest.of(await here.push_image("origin", "team/app", CONFIG, LAYER))
        partial = tmp_path / "west" / "origin" / "partials"

        async def has_begun() -> bool:
            return await received(west) >= 4 * MIB

        await until(has_begun)
        await here.roles["origin"].kill()

        async def has_ended() -> bool:
            torrents = (await west.status("origin"))["torrents"]
            return not [each for each in torrents if each["have"] < each["pieces"]]

        await until(has_ended)
        assert await west.metric("origin", 'downloads_total{outcome="failed"}') == 1
        # What has arrived is kept, and evicted as any other partial that gets nothing.
        assert list(partial.iterdir())

        port = int(here.config.cluster.origins[0].rpartition(":")[2])
        await here.start_origin(port=port)
        await here.counted("index-0", 'replication_copied_total{remote="west"}', 1)
        assert await digest_at(west) == digest
        assert len(LAYER) <= await received(west) <= len(LAYER) + 4 * MIB + len(CONFIG)


async def received(west: Cluster) -> float:
    return (await west.status("origin"))["bytes_received"]["origin"]


@pytest.fixture
async def backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gated:
    """The one of the origins in the east."""
    gated = Gated(await open_backend((tmp_path / "east" / "backend").as_uri()))

    async def open_of(url: str) -> Any:
        return gated if "/east/backend" in url else await open_backend(url)

    monkeypatch.setattr(origin_backends, "open_backend", open_of)
    monkeypatch.setattr(cold_fetch, "PAUSE", 0.01)
    return gated


async def begin_with_a_cold_layer(east: East, west: Cluster) -> Digest:
    """Push an image, evict it in the east, and begin to replicate it."""
    here = east.cluster
    digest = Digest.of(await here.push_image("origin", "team/app", CONFIG, LAYER))
    await here.written_back()
    for role in ("origin", "index-0"):
        await here.roles[role].stop()
    shutil.rmtree(here.root / "origin")
    await here.start_origin(port=int(here.config.cluster.origins[0].rpartition(":")[2]))
    east.replicate(west.roles["index"].address("rpc"))
    await east.start_index(0)
    assert await east.change(0, {"sync": "team/**"}) == {"syncing": "team/**"}
    return digest


async def test_what_only_the_backend_has_is_handed_over_while_it_is_fetched(
    tmp_path: Path, backend: Gated
) -> None:
    async with (
        west_under(tmp_path / "west") as west,
        east_under(tmp_path / "east", indexes=1) as east,
    ):
        backend.allow(0, 2)
        digest = await begin_with_a_cold_layer(east, west)

        async def has_two_pieces() -> bool:
            return await received(west) >= 8 * MIB

        await until(has_two_pieces)
        assert await east.cluster.metric("origin", "backend_fetches") == 1

        backend.allow()
        await east.cluster.counted("index-0", 'replication_copied_total{remote="west"}', 1)
        assert await digest_at(west) == digest
        reply = await west.get("origin", f"/v2/team/app/blobs/{Digest.of(LAYER)}")
        assert reply.content == LAYER
        # Once, from the backend and to the other cluster.
        assert await east.cluster.metric("origin", "backend_bytes_read_total") < len(LAYER) + MIB
        assert await received(west) < len(LAYER) + MIB


async def test_a_hand_over_whose_fetch_fails_says_so_and_goes_on_from_what_has_arrived(
    tmp_path: Path, backend: Gated
) -> None:
    def fail(offset: int) -> None:
        if offset >= 8 * MIB:
            raise BackendUnavailable("the bucket", "a key", "it burns")

    async with (
        west_under(tmp_path / "west") as west,
        east_under(tmp_path / "east", indexes=1) as east,
    ):
        backend.fault = fail
        digest = await begin_with_a_cold_layer(east, west)

        async def says_why() -> bool:
            return "it burns" in str(await east.replication(0))

        async def has_two_pieces() -> bool:
            return await received(west) >= 8 * MIB

        await until(says_why)
        await until(has_two_pieces)
        backend.fault = None
        await east.cluster.counted("index-0", 'replication_copied_total{remote="west"}', 1)
        assert await digest_at(west) == digest
        assert await received(west) < len(LAYER) + MIB


@asynccontextmanager
async def hung_origin(taker: PeerContact, *, answers_pings: bool) -> AsyncIterator[str]:
    """An origin of another cluster that wants every blob, and then says nothing more."""

    async def offer(_: api.OfferRequest, __: RpcContext) -> api.OfferReply:
        return api.OfferReply(True, taker)

    async def hang(_: object, __: RpcContext) -> api.Empty:
        await trio.sleep_forever()
        raise AssertionError

    service = RpcService()
    service.register(api.OFFER_BLOB, offer)
    service.register(api.ADOPT_BLOB, hang)
    if not answers_pings:
        service.register(api.PING, hang)
    async with trio.open_nursery() as nursery:
        host, port = await nursery.start(partial(serve_rpc, service, "127.0.0.1", 0))
        yield f"{host}:{port}"
        nursery.cancel_scope.cancel()


NOBODY = PeerContact("0" * 32, "127.0.0.1", 1, PeerKind.ORIGIN)


async def test_a_cluster_that_hangs_does_not_hold_up_another_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hand_over, "HAND_OVERS_MAX", 2)
    async with (
        whole_cluster(tmp_path / "east") as east,
        whole_cluster(tmp_path / "west") as west,
        hung_origin(NOBODY, answers_pings=True) as hung,
    ):
        blobs = [b"blob %d" % number for number in range(3)]
        for blob in blobs:
            assert (await east.push_blob("origin", "team/app", blob)).status_code == 201

        async def hand(blob: bytes, remote: str, owner: str) -> api.HandOverReply:
            request = api.HandOverRequest(Digest.of(blob), "team/app", remote, (owner,), None, 0.5)
            address = east.roles["origin"].address("rpc")
            return await east.pool.call(address, api.HAND_OVER, request, timeout=20.0)

        for blob in blobs[:2]:
            assert not (await hand(blob, "north", hung)).done
        owner = west.roles["origin"].address("rpc")
        while not (await hand(blobs[2], "west", owner)).done:  # noqa: ASYNC110 - of another role
            await trio.sleep(0.02)


async def test_an_origin_that_hangs_is_given_up_for_another_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hand_over, "PROBE_INTERVAL", 0.1)
    monkeypatch.setattr(hand_over, "PROBE_PATIENCE", 0.3)
    async with (
        whole_cluster(tmp_path / "east") as east,
        whole_cluster(tmp_path / "west") as west,
        hung_origin(NOBODY, answers_pings=False) as hung,
    ):
        assert (await east.push_blob("origin", "team/app", LAYER)).status_code == 201
        owners = (hung, west.roles["origin"].address("rpc"))
        request = api.HandOverRequest(Digest.of(LAYER), "team/app", "west", owners, None, 1.0)
        address = east.roles["origin"].address("rpc")
        while not (await east.pool.call(address, api.HAND_OVER, request, timeout=20.0)).done:
            pass
        assert await received(west) == len(LAYER)
