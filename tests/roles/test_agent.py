"""The agent, run as it is, with real neighbours."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import attrs
import pytest
import trio
from trio.testing import MockClock

from swarmpull.digest import Digest
from swarmpull.errors import StoreFull
from swarmpull.registry.client import get_rates, put_rates
from swarmpull.roles.agent import seed_cache
from swarmpull.store.blobs import BlobStore
from swarmpull.swarm.metainfo import PIECE_LENGTH_MIN

from .peers import make_content, running_node
from .roles import Cluster, cluster_under, whole_cluster

REPOSITORY = "team/app"
CONFIG = b'{"architecture": "amd64"}'
LAYER = make_content(3 * PIECE_LENGTH_MIN + 77).data


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with whole_cluster(tmp_path) as cluster:
        yield cluster


def blob_path(data: bytes) -> str:
    return f"/v2/{REPOSITORY}/blobs/{Digest.of(data)}"


def files(cluster: Cluster, role: str, folder: str) -> list[Path]:
    return [p for p in (cluster.root / role / folder).rglob("*") if p.is_file()]


async def test_an_image_is_pulled_and_then_served_from_the_cache(cluster: Cluster) -> None:
    manifest = await cluster.push_image("origin", REPOSITORY, CONFIG, LAYER)
    await cluster.start_agent()

    for _ in range(2):
        pulled = await cluster.get("agent", f"/v2/{REPOSITORY}/manifests/v1")
        layer = await cluster.get("agent", blob_path(LAYER))
        assert (pulled.content, layer.content) == (manifest, LAYER)

    status = await cluster.status("agent")
    assert status["bytes_received"]["origin"] == len(LAYER)
    assert await cluster.metric("agent", "small_blob_bytes_received_total") == len(manifest)


async def test_rates_that_are_changed_on_the_admin_listener_hold_for_a_pull_under_way(
    cluster: Cluster,
) -> None:
    await cluster.push_image("origin", REPOSITORY, CONFIG, LAYER)
    await cluster.start_agent()
    admins = {role: cluster.roles[role].address("admin") for role in ("origin", "agent", "tracker")}
    # A byte per second: the burst passes, and then nothing for hours.
    [answer] = await put_rates([admins["origin"]], {"upload_rate": 1})
    assert answer.document == {"upload_rate": 1, "download_rate": None}

    async with trio.open_nursery() as nursery:
        pulled: list[bytes] = []

        async def pull() -> None:
            pulled.append((await cluster.get("agent", blob_path(LAYER))).content)

        nursery.start_soon(pull)
        await until_passes_no_more(cluster)
        assert pulled == []
        await put_rates([admins["origin"]], {"upload_rate": None})

    assert pulled == [LAYER]
    answers = await get_rates(list(admins.values()))
    unlimited = {"upload_rate": None, "download_rate": None}
    assert [answer.document for answer in answers] == [unlimited, unlimited, None]
    assert answers[2].failure.startswith("has no rates")


async def until_passes_no_more(cluster: Cluster) -> None:
    """The agent has begun to download the layer, and waits for its first piece."""
    while True:
        torrents = (await cluster.status("agent"))["torrents"]
        if any(t["have"] == 0 and t["length"] == len(LAYER) and t["peers"] for t in torrents):
            return
        await trio.sleep(0.01)


async def test_agents_get_pieces_from_each_other(cluster: Cluster) -> None:
    await cluster.push_image("origin", REPOSITORY, CONFIG, LAYER)
    for name in ("one", "two"):
        await cluster.start_agent(name)
        assert (await cluster.get(name, blob_path(LAYER))).content == LAYER

    await cluster.roles["origin"].kill()
    await cluster.start_agent("three")

    reply = await cluster.get("three", blob_path(LAYER))
    assert reply.content == LAYER
    status = await cluster.status("three")
    assert status["bytes_received"] == {"agent": len(LAYER), "origin": 0}


async def test_head_never_starts_a_download(cluster: Cluster) -> None:
    await cluster.push_image("origin", REPOSITORY, CONFIG, LAYER)
    await cluster.start_agent()

    reply = await cluster.request("HEAD", "agent", blob_path(LAYER))

    assert reply.headers["content-length"] == str(len(LAYER))
    assert (await cluster.status("agent"))["torrents"] == []
    assert files(cluster, "agent", "blobs") == files(cluster, "agent", "partials") == []


@pytest.fixture
def slow_clock() -> MockClock:
    """Twenty times as slow as real time: a wait for any limit of time shows, a busy machine does not."""
    return MockClock(rate=0.05)


async def test_an_unknown_blob_is_a_404_at_once_and_leaves_nothing(
    slow_clock: MockClock, cluster: Cluster
) -> None:
    await cluster.start_agent()
    await cluster.get("agent", blob_path(b"warms up the connections"))
    for attempt in range(3):
        started = trio.current_time()

        reply = await cluster.get("agent", blob_path(f"nowhere {attempt}".encode()))

        assert reply.status_code == 404
        assert reply.json()["errors"][0]["code"] == "BLOB_UNKNOWN"
        assert trio.current_time() - started < 0.5
    assert files(cluster, "agent", "partials") == []
    assert (await cluster.status("agent"))["torrents"] == []


async def test_without_a_tracker_the_origins_are_asked(cluster: Cluster) -> None:
    await cluster.push_image("origin", REPOSITORY, CONFIG, LAYER)
    await cluster.start_agent()
    await cluster.roles["tracker"].kill()

    reply = await cluster.get("agent", blob_path(LAYER))

    assert reply.content == LAYER


async def test_with_tracker_and_origin_down_the_answer_says_so(cluster: Cluster) -> None:
    await cluster.start_agent()
    await cluster.roles["tracker"].kill()
    await cluster.roles["origin"].kill()

    reply = await cluster.get("agent", blob_path(b"nowhere"))

    assert reply.status_code == 503
    assert files(cluster, "agent", "partials") == []


async def test_an_agent_that_does_not_take_pushes_says_so(cluster: Cluster) -> None:
    await cluster.start_agent()

    reply = await cluster.push_blob("agent", REPOSITORY, b"data")

    assert reply.status_code in (403, 405)
    assert reply.json()["errors"][0]["code"] in ("DENIED", "UNSUPPORTED")


async def test_a_push_through_an_agent_is_durable_when_it_is_acknowledged(
    cluster: Cluster,
) -> None:
    await cluster.start_agent(push=True)

    manifest = await cluster.push_image("agent", REPOSITORY, CONFIG, LAYER)

    await cluster.written_back()
    await cluster.roles["agent"].kill()
    await cluster.roles["origin"].kill()
    shutil.rmtree(cluster.root / "agent")
    shutil.rmtree(cluster.root / "origin")
    await cluster.start_origin()
    for data in (CONFIG, LAYER):
        assert (await cluster.get("origin", blob_path(data))).content == data
    pulled = await cluster.get("origin", f"/v2/{REPOSITORY}/manifests/v1")
    assert pulled.content == manifest


@pytest.mark.parametrize("role", ["origin", "agent"])
async def test_a_file_is_acknowledged_while_the_backend_takes_nothing_and_written_when_it_does(
    cluster: Cluster, role: str
) -> None:
    await cluster.start_agent(push=True)
    path = f"/blobs/{Digest.of(CONFIG)}"
    # The backend answers, and takes nothing.
    temporary = cluster.root / "backend" / "temporary"
    temporary.rmdir()
    temporary.touch()

    assert (await cluster.request("PUT", role, path, content=CONFIG)).status_code == 201
    assert (await cluster.request("PUT", role, path, content=CONFIG)).status_code == 200
    assert (await cluster.status("origin"))["write_back"]["queued"] == 1
    temporary.unlink()
    await cluster.written_back()

    assert cluster.backend_file(Digest.of(CONFIG)).read_bytes() == CONFIG


@pytest.mark.parametrize("role", ["origin", "agent"])
async def test_a_manifest_is_pushed_under_its_sha512(cluster: Cluster, role: str) -> None:
    await cluster.start_agent(push=True)
    manifest = await cluster.push_image(role, REPOSITORY, CONFIG, LAYER)
    reference = str(Digest.of(manifest, "sha512"))

    reply = await cluster.push_manifest(role, REPOSITORY, reference, manifest)

    assert (reply.status_code, reply.headers["docker-content-digest"]) == (201, reference)
    pulled = await cluster.get(role, f"/v2/{REPOSITORY}/manifests/{reference}")
    assert pulled.content == manifest


async def test_an_agent_that_takes_pushes_keeps_to_what_belongs_to_a_repository(
    cluster: Cluster,
) -> None:
    await cluster.start_agent(push=True)
    await cluster.push_image("agent", REPOSITORY, CONFIG, LAYER)

    there = await cluster.request("HEAD", "agent", blob_path(LAYER))
    elsewhere = await cluster.request("HEAD", "agent", f"/v2/other/app/blobs/{Digest.of(LAYER)}")

    assert (there.status_code, elsewhere.status_code) == (200, 404)


async def test_a_restarted_agent_seeds_what_it_has(cluster: Cluster) -> None:
    await cluster.push_image("origin", REPOSITORY, CONFIG, LAYER)
    await cluster.start_agent("one")
    await cluster.get("one", blob_path(LAYER))
    await cluster.roles["one"].stop()
    await cluster.start_agent("one")
    await cluster.roles["origin"].kill()

    await cluster.start_agent("two")
    # Until the tracker has heard of it, nobody knows where the blob is.
    while (reply := await cluster.get("two", blob_path(LAYER))).status_code == 503:
        await trio.lowlevel.checkpoint()

    assert reply.content == LAYER
    assert (await cluster.status("two"))["bytes_received"] == {"agent": len(LAYER), "origin": 0}


async def test_a_request_under_way_ends_while_the_agent_drains(cluster: Cluster) -> None:
    # Nothing may wait for its end.
    cluster.config = attrs.evolve(cluster.config, drain_timeout=600.0)
    await cluster.push_image("origin", REPOSITORY, CONFIG, LAYER)
    await cluster.start_agent()
    url = f"http://{cluster.roles['agent'].address('registry')}{blob_path(LAYER)}"
    async with cluster.client.stream("GET", url) as reply:
        body = reply.aiter_bytes(65536)
        data = bytearray(await anext(body))
        cluster.roles["agent"].drain.set()
        async for chunk in body:
            data += chunk

    assert data == LAYER
    with trio.fail_after(60):
        await cluster.roles["agent"].ended.wait()


async def test_killing_an_agent_in_the_middle_of_a_pull_leaves_what_can_be_resumed(
    cluster: Cluster,
) -> None:
    await cluster.push_image("origin", REPOSITORY, CONFIG, LAYER)
    await cluster.start_agent()
    address = cluster.roles["agent"].address("registry")
    host, _, port = address.rpartition(":")
    async with await trio.open_tcp_stream(host, int(port)) as client:
        await client.send_all(
            f"GET {blob_path(LAYER)} HTTP/1.1\r\nHost: {address}\r\n\r\n".encode()
        )
        assert await client.receive_some(100)
        await cluster.roles["agent"].kill()
    assert files(cluster, "agent", "temporary") == []

    await cluster.start_agent()

    assert (await cluster.get("agent", blob_path(LAYER))).content == LAYER


# --- what goes on without the others --------------------------------------------------------------


async def test_a_download_goes_on_with_the_peers_that_it_knows_when_all_trackers_are_gone(
    cluster: Cluster,
) -> None:
    await cluster.push_image("origin", REPOSITORY, CONFIG, LAYER)
    await cluster.start_agent()
    admin = cluster.roles["origin"].address("admin")
    await put_rates([admin], {"upload_rate": 1})
    async with trio.open_nursery() as nursery:
        pulled: list[bytes] = []

        async def pull() -> None:
            pulled.append((await cluster.get("agent", blob_path(LAYER))).content)

        nursery.start_soon(pull)
        await until_passes_no_more(cluster)
        await cluster.roles["tracker"].kill()
        await put_rates([admin], {"upload_rate": None})

    assert pulled == [LAYER]
    # And one that begins now asks the origins.
    assert (await cluster.get("agent", blob_path(CONFIG))).content == CONFIG


async def test_agents_that_begin_while_no_tracker_is_there_meet_at_the_origin(
    cluster: Cluster,
) -> None:
    await cluster.push_image("origin", REPOSITORY, CONFIG, LAYER)
    await cluster.start_agent()
    await cluster.start_agent("second")
    await cluster.roles["tracker"].kill()
    admin = cluster.roles["origin"].address("admin")
    await put_rates([admin], {"upload_rate": 1})
    pulled: list[bytes] = []

    async def pull(name: str) -> None:
        pulled.append((await cluster.get(name, blob_path(LAYER))).content)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(pull, "agent")
        await until_passes_no_more(cluster)
        nursery.start_soon(pull, "second")
        for name in ("agent", "second"):
            await until_peers(cluster, name, 2)
        await put_rates([admin], {"upload_rate": None})

    assert pulled == [LAYER, LAYER]


async def until_peers(cluster: Cluster, name: str, count: int) -> None:
    """An agent is connected to so many peers for the layer."""
    with trio.fail_after(30):
        while True:
            torrents = (await cluster.status(name))["torrents"]
            if any(t["length"] == len(LAYER) and t["peers"] == count for t in torrents):
                return
            await trio.sleep(0.01)


async def test_peers_finish_what_the_swarm_holds_when_all_origins_are_gone(
    cluster: Cluster,
) -> None:
    await cluster.push_image("origin", REPOSITORY, CONFIG, LAYER)
    await cluster.start_agent("one")
    assert (await cluster.get("one", blob_path(LAYER))).content == LAYER
    admins = [cluster.roles[role].address("admin") for role in ("origin", "one")]
    await put_rates(admins, {"upload_rate": 1})
    await cluster.start_agent()
    async with trio.open_nursery() as nursery:
        pulled: list[bytes] = []

        async def pull() -> None:
            pulled.append((await cluster.get("agent", blob_path(LAYER))).content)

        nursery.start_soon(pull)
        await until_passes_no_more(cluster)
        await cluster.roles["origin"].kill()
        await put_rates(admins[1:], {"upload_rate": None})

    assert pulled == [LAYER]
    assert (await cluster.status("agent"))["bytes_received"]["origin"] == 0


async def test_a_full_disk_at_the_start_does_not_end_the_agent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Metainfo that was lost is computed and saved, for which there may be no room."""
    content = make_content(5)
    async with running_node(tmp_path / "agent") as node:
        await node.add(content)
        other = make_content(6, seed=1)
        await node.add(other)
        metainfo = BlobStore.metainfo

        async def no_room(store: BlobStore, digest: Digest):
            if digest == content.digest:
                raise StoreFull(store.name, 100)
            return await metainfo(store, digest)

        monkeypatch.setattr(BlobStore, "metainfo", no_room)

        await seed_cache(node.store, node.host)

        assert [torrent.digest for torrent in node.host.torrents()] == [other.digest]


async def test_a_cluster_of_nothing_but_an_agent_answers_with_errors(tmp_path: Path) -> None:
    async with cluster_under(tmp_path) as cluster:
        await cluster.start_agent()

        reply = await cluster.get("agent", blob_path(b"anything"))

        assert reply.status_code == 503
        assert "no origin is known" in reply.json()["errors"][0]["message"]
