"""The origin, run as it is, with a real index, by the calls of its neighbours."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import trio
import trio.testing

from swarmpull.digest import Digest
from swarmpull.errors import (
    BlobNotFound,
    DigestMismatch,
    ManifestReferencesMissing,
    RpcFailed,
    SwarmpullError,
)
from swarmpull.ring.membership import Membership
from swarmpull.roles.cluster import OriginClient, RingClient
from swarmpull.swarm.metainfo import PIECE_LENGTH_MIN
from swarmpull.swarm.peers import PeerContact, PeerKind

from .peers import ScriptedPeer, fetch, honestly, make_content, running_node
from .roles import MANIFEST_TYPE, Cluster, cluster_under, manifest_of

CONFIG, LAYER = b'{"architecture": "amd64"}', b"layer " * 1000
REPOSITORY = "team/app"


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with cluster_under(tmp_path) as cluster:
        await cluster.start_index()
        await cluster.start_origin()
        yield cluster


def client_of(cluster: Cluster) -> OriginClient:
    members = Membership(cluster.config.cluster.origins, name="origin")
    return OriginClient(RingClient(cluster.pool, members))


async def test_a_pushed_image_survives_the_loss_of_the_disk(cluster: Cluster) -> None:
    manifest = await cluster.push_image("origin", REPOSITORY, CONFIG, LAYER)
    await cluster.written_back()
    await cluster.roles["origin"].kill()
    shutil.rmtree(cluster.root / "origin")

    await cluster.start_origin()

    reply = await cluster.get("origin", f"/v2/{REPOSITORY}/manifests/v1")
    assert (reply.status_code, reply.content) == (200, manifest)
    for blob in (CONFIG, LAYER):
        reply = await cluster.get("origin", f"/v2/{REPOSITORY}/blobs/{Digest.of(blob)}")
        assert (reply.status_code, reply.content) == (200, blob)


async def test_metainfo_makes_the_origin_a_seeder_with_an_address(cluster: Cluster) -> None:
    content = make_content(PIECE_LENGTH_MIN + 5)
    await cluster.push_blob("origin", REPOSITORY, content.data)
    await cluster.written_back()
    shutil.rmtree(cluster.root / "origin" / "blobs")

    reply = await client_of(cluster).get_metainfo(content.digest, REPOSITORY)

    assert reply.metainfo == content.metainfo
    async with running_node(cluster.root / "leecher") as leecher:
        await fetch(leecher, content, reply.seeder)
        assert await leecher.stored(content)
        assert leecher.received()["origin"] == len(content.data)


async def test_an_unknown_blob_is_not_found_in_the_backend(cluster: Cluster) -> None:
    client = client_of(cluster)
    for ask in (client.stat_blob, client.get_metainfo):
        with pytest.raises(BlobNotFound, match="backend"):
            await ask(Digest.of(b"nowhere"))


async def test_a_namespace_that_is_no_repository_is_refused(cluster: Cluster) -> None:
    await cluster.push_blob("origin", REPOSITORY, LAYER)

    for namespace in ("x" * 300, "Upper/Case", "../up"):
        with pytest.raises(RpcFailed, match="is not a repository name"):
            await client_of(cluster).get_metainfo(Digest.of(LAYER), namespace)


# --- adopting -------------------------------------------------------------------------------------


async def test_a_blob_is_adopted_from_an_agent_and_durable(cluster: Cluster) -> None:
    content = make_content(2 * PIECE_LENGTH_MIN + 5)
    async with running_node(cluster.root / "agent") as agent:
        await agent.seed(content)

        await client_of(cluster).adopt_blob(content.metainfo, REPOSITORY, agent.contact)

    await cluster.written_back()
    assert cluster.backend_file(content.digest).read_bytes() == content.data
    path = f"/v2/{REPOSITORY}/blobs/{content.digest}"
    assert (await cluster.request("HEAD", "origin", path)).status_code == 200


async def test_an_agent_without_an_advertised_host_is_dialled_where_it_called_from(
    cluster: Cluster,
) -> None:
    content = make_content(5)
    async with running_node(cluster.root / "agent") as agent:
        await agent.seed(content)
        contact = PeerContact(agent.contact.peer_id, "", agent.contact.port, PeerKind.AGENT)

        await client_of(cluster).adopt_blob(content.metainfo, "", contact)

    await cluster.written_back()
    assert cluster.backend_file(content.digest).read_bytes() == content.data


async def test_the_same_blob_pushed_through_several_agents_at_once_is_adopted_once(
    cluster: Cluster,
) -> None:
    content = make_content(3 * PIECE_LENGTH_MIN + 5)
    async with (
        running_node(cluster.root / "one") as one,
        running_node(cluster.root / "two") as two,
        trio.open_nursery() as nursery,
    ):
        for agent in (one, two):
            await agent.seed(content)
        for agent in (one, two, one):
            nursery.start_soon(
                client_of(cluster).adopt_blob, content.metainfo, REPOSITORY, agent.contact
            )

    status = await cluster.status("origin")
    assert sum(status["bytes_received"].values()) == len(content.data)


async def test_what_the_backend_has_is_acknowledged_without_the_agent(cluster: Cluster) -> None:
    content = make_content(5)
    await cluster.push_blob("origin", "other/app", content.data)
    nobody = PeerContact("e" * 32, "127.0.0.1", 1, PeerKind.AGENT)

    await client_of(cluster).adopt_blob(content.metainfo, REPOSITORY, nobody)

    path = f"/v2/{REPOSITORY}/blobs/{content.digest}"
    assert (await cluster.request("HEAD", "origin", path)).status_code == 200


async def test_a_corrupt_object_is_refused_to_readers_and_repaired_by_a_push(
    cluster: Cluster,
) -> None:
    content = make_content(PIECE_LENGTH_MIN - 5)
    await cluster.push_blob("origin", REPOSITORY, content.data)
    await cluster.written_back()
    shutil.rmtree(cluster.root / "origin" / "blobs")
    file = cluster.backend_file(content.digest)
    file.write_bytes(b"x" * len(content.data))
    path = f"/v2/{REPOSITORY}/blobs/{content.digest}"

    reply = await cluster.get("origin", path)
    assert reply.status_code == 503
    assert "corrupt" in reply.json()["errors"][0]["message"]
    with pytest.raises(SwarmpullError, match="corrupt"):
        await client_of(cluster).get_metainfo(content.digest, REPOSITORY)
    assert not list((cluster.root / "origin").glob("blobs/*/*/*"))
    # Clients push only what they are told is missing.
    assert (await cluster.request("HEAD", "origin", path)).status_code == 404

    async with running_node(cluster.root / "agent") as agent:
        await agent.seed(content)
        await client_of(cluster).adopt_blob(content.metainfo, REPOSITORY, agent.contact)
    await cluster.written_back()
    assert file.read_bytes() == content.data
    assert (await cluster.get("origin", path)).content == content.data


async def test_absurd_contacts_do_not_harm_the_origin(cluster: Cluster) -> None:
    content = make_content(5)
    client = client_of(cluster)
    async with trio.open_nursery() as nursery:
        for host, port in (("127.0.0.1", 99_999_999), ("a\0b", 5), ("x" * 5000, 5), ("", -1)):
            absurd = PeerContact("e" * 32, host, port, PeerKind.AGENT)
            nursery.start_soon(client.adopt_blob, content.metainfo, "", absurd)
        # They are under way, and wait for a blob that nobody has.
        await trio.testing.wait_all_tasks_blocked()
        contact = await nursery.start(ScriptedPeer(content, honestly).serve)
        await client.adopt_blob(content.metainfo, "", contact)
        nursery.cancel_scope.cancel()
    await cluster.written_back()
    assert cluster.backend_file(content.digest).read_bytes() == content.data


# --- manifests ------------------------------------------------------------------------------------


async def test_a_manifest_with_missing_references_is_refused_and_not_visible(
    cluster: Cluster,
) -> None:
    await cluster.push_blob("origin", REPOSITORY, CONFIG)
    manifest = manifest_of(CONFIG, LAYER)

    with pytest.raises(ManifestReferencesMissing) as caught:
        await client_of(cluster).put_manifest(REPOSITORY, "v1", MANIFEST_TYPE, manifest)
    reply = await cluster.push_manifest("origin", REPOSITORY, "v1", manifest)

    assert caught.value.missing == (str(Digest.of(LAYER)),)
    assert reply.status_code == 400
    assert reply.json()["errors"][0]["code"] == "MANIFEST_BLOB_UNKNOWN"
    for reference in ("v1", str(Digest.of(manifest))):
        found = await cluster.get("origin", f"/v2/{REPOSITORY}/manifests/{reference}")
        assert found.status_code == 404
    assert not cluster.backend_file(Digest.of(manifest)).exists()


async def test_a_manifest_under_the_digest_of_another_is_refused(cluster: Cluster) -> None:
    for blob in (CONFIG, LAYER):
        await cluster.push_blob("origin", REPOSITORY, blob)
    other = str(Digest.of(b"other"))

    with pytest.raises(DigestMismatch):
        await client_of(cluster).put_manifest(
            REPOSITORY, other, MANIFEST_TYPE, manifest_of(CONFIG, LAYER)
        )


async def test_head_of_a_blob_does_not_fetch_it(cluster: Cluster) -> None:
    await cluster.push_blob("origin", REPOSITORY, LAYER)
    await cluster.written_back()
    shutil.rmtree(cluster.root / "origin" / "blobs")

    reply = await cluster.request("HEAD", "origin", f"/v2/{REPOSITORY}/blobs/{Digest.of(LAYER)}")

    assert reply.headers["content-length"] == str(len(LAYER))
    assert not list((cluster.root / "origin").glob("blobs/*/*/*"))


async def test_a_wrong_digest_leaves_nothing(cluster: Cluster) -> None:
    begun = await cluster.request("POST", "origin", f"/v2/{REPOSITORY}/blobs/uploads/")
    base = httpx.URL(f"http://{cluster.roles['origin'].address('registry')}")
    url = base.join(begun.headers["location"]).copy_merge_params({"digest": str(Digest.of(b"?"))})

    reply = await cluster.client.put(url, content=LAYER)

    assert reply.status_code == 400
    assert reply.json()["errors"][0]["code"] == "DIGEST_INVALID"
    for digest in (Digest.of(b"?"), Digest.of(LAYER)):
        found = await cluster.get("origin", f"/blobs/{digest}")
        assert found.status_code == 404


async def test_the_origin_says_that_no_index_answers(cluster: Cluster) -> None:
    await cluster.push_blob("origin", REPOSITORY, LAYER)
    await cluster.roles["index"].kill()

    reply = await cluster.push_blob("origin", REPOSITORY, b"more")

    assert reply.status_code == 503
    pulled = await cluster.get("origin", f"/v2/{REPOSITORY}/blobs/{Digest.of(LAYER)}")
    assert pulled.content == LAYER, "what is there can be pulled by digest"


async def test_a_drained_origin_ends_by_itself(tmp_path: Path) -> None:
    async with cluster_under(tmp_path, drain_timeout=600.0) as cluster:
        await cluster.start_index()
        await cluster.start_origin()
        await cluster.push_blob("origin", REPOSITORY, LAYER)
        await client_of(cluster).get_metainfo(Digest.of(LAYER), REPOSITORY)

        with trio.fail_after(60):
            await cluster.roles["origin"].stop()
