"""Signatures and the like, which refer to an image and have no tag, follow it to another cluster."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from swarmpull.config import (
    Address,
    BackendConfig,
    IndexConfig,
    ListenerConfig,
    RemoteConfig,
    ReplicationConfig,
)
from swarmpull.digest import Digest
from swarmpull.errors import ManifestNotFound
from swarmpull.registry.manifests import OCI_INDEX, OCI_MANIFEST
from swarmpull.roles import catalog, replicator, tag_copy
from swarmpull.roles.catalog_objects import changes_key, manifest_key
from swarmpull.roles.index import run_index
from swarmpull.store.backends.directory import DirectoryBackend
from swarmpull.wire import api
from swarmpull.wire.rpc import RpcContext, RpcService, serve_rpc
from tests.ports import free_ports

from .roles import API, LISTEN, Cluster, cluster_under
from .test_replicator import East, digest_at, east_under, replication_of, until

EMPTY = b"{}"
COPIED = 'replication_copied_total{remote="west"}'


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicator, "STANDBY_INTERVAL", 0.2)
    monkeypatch.setattr(replicator, "BACKOFF_MAX", 0.5)
    monkeypatch.setattr("swarmpull.store.retry_schedule.PROBE_MAX", 0.3)


def descriptor_of(content: bytes, media_type: str) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": str(Digest.of(content)), "size": len(content)}


async def put(
    cluster: Cluster, reference: str, content: bytes, media_type: str = OCI_MANIFEST
) -> None:
    path = f"/v2/team/app/manifests/{reference}"
    headers = {"Content-Type": media_type}
    reply = await cluster.request("PUT", "origin", path, content=content, headers=headers)
    assert reply.status_code == 201, reply.text


async def attach(cluster: Cluster, subject: bytes, text: str) -> bytes:
    """Push by digest what refers to a manifest, with a blob of its own; returns its manifest."""
    for blob in (EMPTY, text.encode()):
        assert (await cluster.push_blob("origin", "team/app", blob)).status_code == 201
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "artifactType": "application/vnd.example.signature",
        "config": descriptor_of(EMPTY, "application/vnd.oci.empty.v1+json"),
        "layers": [descriptor_of(text.encode(), "text/plain")],
        "subject": descriptor_of(subject, OCI_MANIFEST),
        "annotations": {"org.example.text": text},
    }
    content = json.dumps(manifest).encode()
    await put(cluster, str(Digest.of(content)), content)
    return content


async def push(cluster: Cluster, name: str = "app") -> bytes:
    return await cluster.push_image("origin", "team/app", EMPTY, name.encode() * 10_000)


async def referrers(cluster: Cluster, subject: bytes) -> list[dict[str, Any]]:
    reply = await cluster.get("origin", f"/v2/team/app/referrers/{Digest.of(subject)}")
    assert reply.status_code == 200, reply.text
    return reply.json()["manifests"]


async def names(cluster: Cluster, subject: bytes) -> set[str]:
    return {each["digest"] for each in await referrers(cluster, subject)}


def digests(*manifests: bytes) -> set[str]:
    return {str(Digest.of(each)) for each in manifests}


async def until_idle(east: East) -> None:
    async def is_idle() -> bool:
        return not (await east.replication(0))["queued"]

    await until(is_idle)


async def start_again(east: East, remote: str) -> None:
    """The index of east gets a rule."""
    await east.cluster.roles["index-0"].stop()
    east.replicate(remote)
    await east.start_index(0)


async def start_west(west: Cluster, port: int, name: str = "index") -> None:
    """An index at a port that was told already, and its origin."""
    west._learn(indexes=(f"127.0.0.1:{port}",))
    settings = IndexConfig(
        rpc=ListenerConfig(listen=Address("127.0.0.1", port)),
        admin=LISTEN,
        api=API,
        backend=BackendConfig(url=(west.root / "index-backend").as_uri()),
        name=name,
        data_dir=west.root / "index",
    )
    await west.start("index", run_index, settings)
    await west.start_origin(port=int(west.config.cluster.origins[0].rpartition(":")[2]))


@asynccontextmanager
async def west_under(root: Path) -> AsyncIterator[Cluster]:
    """A cluster with an index and an origin that know of one another."""
    async with west_at(root, free_ports(1)[0]) as west:
        yield west


@asynccontextmanager
async def west_at(root: Path, index_port: int) -> AsyncIterator[Cluster]:
    """The same, with its index at a port."""
    async with cluster_under(root) as west:
        west._learn(origins=(f"127.0.0.1:{free_ports(1)[0]}",))
        await start_west(west, index_port)
        yield west


@asynccontextmanager
async def both_ways(root: Path) -> AsyncIterator[tuple[Cluster, Cluster]]:
    """Two clusters that replicate everything to one another."""
    ports = dict(zip(("east", "west"), free_ports(2), strict=True))
    clusters = []
    async with AsyncExitStack() as stack:
        for name, other in (("east", "west"), ("west", "east")):
            cluster = await stack.enter_async_context(cluster_under(root / name))
            cluster._learn(origins=(f"127.0.0.1:{free_ports(1)[0]}",))
            cluster.config = attrs.evolve(
                cluster.config,
                remotes=(RemoteConfig(name=other, indexes=(f"127.0.0.1:{ports[other]}",)),),
                replications=(ReplicationConfig(pattern="**", remote=other),),
            )
            await start_west(cluster, ports[name], name)
            clusters.append(cluster)
        yield clusters[0], clusters[1]


async def test_a_signature_that_is_attached_after_the_image_has_gone_follows_it(
    tmp_path: Path,
) -> None:
    async with west_under(tmp_path / "west") as west:
        remote = west.roles["index"].address("rpc")
        async with east_under(tmp_path / "east", remote_index=remote, indexes=1) as east:
            image = await push(east.cluster)
            await east.cluster.counted("index-0", COPIED, 1)
            signature = await attach(east.cluster, image, "signed")
            await east.cluster.counted("index-0", COPIED, 2)
            # Of the signature itself: a time stamp.
            stamp = await attach(east.cluster, signature, "stamped")
            await east.cluster.counted("index-0", COPIED, 3)

            assert await referrers(west, image) == await referrers(east.cluster, image)
            assert await names(west, image) == digests(signature)
            assert await names(west, signature) == digests(stamp)
            reply = await west.get("origin", f"/v2/team/app/blobs/{Digest.of(b'signed')}")
            assert reply.content == b"signed"

            # Again: it is there, and nothing moves.
            before = await west.status("origin")
            await attach(east.cluster, image, "signed")
            await until_idle(east)
            assert await east.cluster.metric("index-0", COPIED) == 3
            assert (await west.status("origin"))["bytes_received"] == before["bytes_received"]


async def test_a_tag_brings_what_was_attached_before_there_was_a_rule(tmp_path: Path) -> None:
    async with (
        west_under(tmp_path / "west") as west,
        east_under(tmp_path / "east", indexes=1) as east,
    ):
        here = east.cluster
        image = await push(here)
        signature = await attach(here, image, "signed")
        stamp = await attach(here, signature, "stamped")
        index = json.dumps(
            {
                "schemaVersion": 2,
                "mediaType": OCI_INDEX,
                "manifests": [descriptor_of(image, OCI_MANIFEST)],
            }
        ).encode()
        await put(here, str(Digest.of(index)), index, OCI_INDEX)
        document = await attach(here, index, "described")
        await start_again(east, west.roles["index"].address("rpc"))
        assert not (await east.replication(0))["queued"]

        await put(here, "released", index, OCI_INDEX)
        await east.cluster.counted("index-0", COPIED, 1)

        assert await digest_at(west, "released") == Digest.of(index)
        assert await names(west, index) == digests(document)
        assert await names(west, image) == digests(signature)
        assert await names(west, signature) == digests(stamp)
        # Whoever verified what the tag led to found the signatures from the first moment on.
        backend = DirectoryBackend(west.root / "index-backend")
        keys = [manifest_key("team/app", Digest.of(each)) for each in (document, signature, stamp)]
        made_at = [backend._path(key).stat().st_mtime_ns for key in keys]
        tagged_at = backend._path(changes_key("team/app", "released")).stat().st_mtime_ns
        assert max(made_at) <= tagged_at

        # The list is there, and so is its image; what was attached to that meanwhile is not.
        await here.roles["index-0"].stop()
        here.config = attrs.evolve(here.config, remotes=(), replications=())
        await east.start_index(0)
        late = await attach(here, image, "late")
        (here.root / "index-0" / "remote-changes.sqlite").unlink()
        await start_again(east, west.roles["index"].address("rpc"))
        await put(here, "again", index, OCI_INDEX)
        await east.cluster.counted("index-0", COPIED, 1)
        assert await names(west, image) == digests(signature, late)


async def test_what_goes_with_a_tag_has_bounds_and_sync_brings_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tag_copy, "REFERRERS_MAX", 4)
    monkeypatch.setattr(tag_copy, "REFERRER_DEPTH_MAX", 2)
    async with (
        west_under(tmp_path / "west") as west,
        east_under(tmp_path / "east", indexes=1) as east,
    ):
        here = east.cluster
        image = await push(here)
        chain = [await attach(here, image, "first")]
        for text in ("second", "third"):
            chain.append(await attach(here, chain[-1], text))
        other = await push(here, "other")
        many = [await attach(here, other, f"number {number}") for number in range(6)]
        await start_again(east, west.roles["index"].address("rpc"))

        await put(here, "deep", image)
        await put(here, "broad", other)
        await here.counted("index-0", COPIED, 2)
        assert await names(west, image) == digests(chain[0])
        assert await names(west, chain[0]) == digests(chain[1])
        assert await names(west, chain[1]) == set()
        assert len(await names(west, other)) == 4

        assert await east.change(0, {"sync": "team/**"}) == {"syncing": "team/**"}
        # v1 as well.
        await here.counted("index-0", COPIED, 2 + 1 + 1 + 2)
        assert await names(west, chain[1]) == digests(chain[2])
        assert await names(west, other) == digests(*many)


async def test_referrers_of_so_many_manifests_are_looked_for_and_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tag_copy, "TREE_MAX", 4)
    nobody: Any = None
    root, *children = (Digest.of(str(number).encode()) for number in range(6))
    # The first of the list has the second one below it, too.
    below = {root: tuple(children), children[0]: (children[1],)}
    below |= dict.fromkeys(children[1:], ())

    tree = await tag_copy.TagCopier(nobody, nobody)._tree("team/app", root, below)

    assert tree == [root, *children[:3]]


async def test_a_referrer_that_is_refused_is_set_aside_and_its_image_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        west_under(tmp_path / "west") as west,
        east_under(tmp_path / "east", indexes=1) as east,
    ):
        image = await push(east.cluster)
        signature = await attach(east.cluster, image, "signed at home")
        await attach(west, image, "signed by others")
        monkeypatch.setattr(catalog, "REFERRERS_MAX", 1)
        await start_again(east, west.roles["index"].address("rpc"))
        await put(east.cluster, "again", image)

        async def is_set_aside() -> bool:
            return (await east.replication(0))["set_aside"] == 1

        await until(is_set_aside)
        assert await digest_at(west, "again") == Digest.of(image)
        (entry,) = (await east.replication(0))["entries"]
        assert entry["tag"] == str(Digest.of(signature))
        assert "has 1 referrers, the most that is kept" in entry["failure"]

        monkeypatch.undo()
        assert await east.change(0, {"retry": {"tag": entry["tag"]}}) == {"retried": 1}
        await until_idle(east)
        assert digests(signature) < await names(west, image)


async def test_a_standby_sees_to_a_signature_that_a_dead_index_has_acknowledged(
    tmp_path: Path,
) -> None:
    (west_port,) = free_ports(1)
    async with east_under(tmp_path / "east", remote_index=f"127.0.0.1:{west_port}") as east:
        image = await push(east.cluster)
        signature = await attach(east.cluster, image, "signed")
        documents = [await east.replication(number) for number in range(2)]
        assert sorted((each["queued"], each["standby"]) for each in documents) == [(0, 2), (2, 0)]
        owner = 0 if documents[0]["queued"] else 1
        await east.cluster.roles[f"index-{owner}"].kill()
        async with cluster_under(tmp_path / "west") as west:
            west._learn(origins=(f"127.0.0.1:{free_ports(1)[0]}",))
            await start_west(west, west_port)

            async def is_idle() -> bool:
                document = await east.replication(1 - owner)
                return not document["queued"] and not document["standby"]

            await until(is_idle)
            assert await names(west, image) == digests(signature)
            assert await digest_at(west) == Digest.of(image)


async def test_signatures_do_not_go_round_between_two_clusters(tmp_path: Path) -> None:
    async with both_ways(tmp_path) as (east, west):

        async def both_are_idle() -> bool:
            return not any([(await replication_of(each))["queued"] for each in (east, west)])

        image = await push(east)
        await east.counted("index", COPIED, 1)
        at_home = await attach(east, image, "signed in the east")
        there = await attach(west, image, "signed in the west")
        await east.counted("index", COPIED, 2)
        to_east = 'replication_copied_total{remote="east"}'
        await west.counted("index", to_east, 1)
        await until(both_are_idle)

        for cluster in (east, west):
            assert await names(cluster, image) == digests(at_home, there)
        # What came from the other one was asked for there, and not sent back.
        assert await east.metric("index", COPIED) == 2
        assert await west.metric("index", to_east) == 1
        (rule,) = (await replication_of(west))["rules"]
        assert rule["matched"] == 3


async def delete(cluster: Cluster, manifest: bytes) -> None:
    path = f"/v2/team/app/manifests/{Digest.of(manifest)}"
    assert (await cluster.request("DELETE", "origin", path)).status_code == 202


async def test_a_referrer_that_is_deleted_here_is_deleted_there_and_stays_so(
    tmp_path: Path,
) -> None:
    async with both_ways(tmp_path) as (east, west):

        async def are_idle() -> bool:
            return not any([(await replication_of(each))["queued"] for each in (east, west)])

        image = await push(east)
        signature = await attach(east, image, "signed")
        await east.counted("index", COPIED, 2)
        await until(are_idle)
        assert await names(west, image) == digests(signature)

        # Not where it was made: a deletion counts as any change.
        await delete(west, signature)
        await west.counted("index", 'replication_copied_total{remote="east"}', 1)
        await until(are_idle)
        assert await names(west, image) == await names(east, image) == set()
        assert await digest_at(west) == await digest_at(east) == Digest.of(image)

        # A tag that leads to the image, and everything sent anew, do not bring it back.
        await put(east, "again", image)
        await east.counted("index", COPIED, 3)
        address = east.roles["index"].address("admin")
        reply = await east.client.put(f"http://{address}/replication", json={"sync": "**"})
        assert reply.status_code == 200
        await until(are_idle)
        assert await names(west, image) == await names(east, image) == set()

        # Who attaches it anew does so later.
        await attach(east, image, "signed")
        await east.counted("index", COPIED, 4)
        await until(are_idle)
        assert await names(west, image) == await names(east, image) == digests(signature)


async def test_a_tag_does_not_bring_back_a_referrer_that_was_deleted_there(tmp_path: Path) -> None:
    async with (
        west_under(tmp_path / "west") as west,
        east_under(
            tmp_path / "east", remote_index=west.roles["index"].address("rpc"), indexes=1
        ) as east,
    ):
        image = await push(east.cluster)
        signature = await attach(east.cluster, image, "signed")
        await east.cluster.counted("index-0", COPIED, 2)
        await delete(west, signature)

        await put(east.cluster, "again", image)
        await east.cluster.counted("index-0", COPIED, 3)
        assert await names(west, image) == set()
        assert await names(east.cluster, image) == digests(signature)


async def test_what_a_tag_needs_comes_though_it_was_deleted_there_as_a_referrer(
    tmp_path: Path,
) -> None:
    async with (
        west_under(tmp_path / "west") as west,
        east_under(
            tmp_path / "east", remote_index=west.roles["index"].address("rpc"), indexes=1
        ) as east,
    ):
        here = east.cluster
        image = await push(here)
        signature = await attach(here, image, "signed")
        entries = [descriptor_of(each, OCI_MANIFEST) for each in (image, signature)]
        index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}
        both = json.dumps(index).encode()
        await here.counted("index-0", COPIED, 2)
        await delete(west, signature)

        await put(here, "both", both, OCI_INDEX)
        await here.counted("index-0", COPIED, 3)
        assert await digest_at(west, "both") == Digest.of(both)
        assert await names(west, image) == digests(signature)


async def test_the_deletion_of_a_referrer_waits_for_a_remote_that_is_down(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    async with east_under(tmp_path / "east", remote_index=f"127.0.0.1:{port}", indexes=1) as east:
        async with west_at(tmp_path / "west", port) as west:
            image = await push(east.cluster)
            signature = await attach(east.cluster, image, "signed")
            await east.cluster.counted("index-0", COPIED, 2)
        await delete(east.cluster, signature)
        await east.cluster.roles["index-0"].kill()
        await east.start_index(0)
        async with west_at(tmp_path / "west", port) as west:
            assert await names(west, image) == digests(signature)
            await until_idle(east)
            assert await names(west, image) == set()


async def test_a_remote_of_a_former_version_is_named_that_deletes_no_referrers(
    tmp_path: Path,
) -> None:
    async def delete_tag(request: api.DeleteTagRequest, _: RpcContext) -> api.Empty:
        raise ManifestNotFound(request.repository, request.reference)

    service = RpcService()
    service.register(api.DELETE_TAG, delete_tag)
    (port,) = free_ports(1)
    async with (
        east_under(tmp_path / "east", remote_index=f"127.0.0.1:{port}", indexes=1) as east,
        trio.open_nursery() as nursery,
    ):
        signature = await attach(east.cluster, b"an image", "signed")
        await delete(east.cluster, signature)
        await nursery.start(partial(serve_rpc, service, "127.0.0.1", port))

        async def is_set_aside() -> bool:
            return (await east.replication(0))["set_aside"] == 1

        await until(is_set_aside)
        (entry,) = (await east.replication(0))["entries"]
        assert "west is of a version to which deletions of referrers are not" in entry["failure"]
        nursery.cancel_scope.cancel()
