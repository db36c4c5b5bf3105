"""Other registries through agents and origins: real roles, and real registries behind them."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import httpx
import pytest
import trio

from swarmpull.config import Duration, Secret, UpstreamConfig
from swarmpull.digest import Digest
from swarmpull.roles import origin_upstreams

from .docker_registry import (
    PASSWORD,
    USER,
    certificate_for_loopback,
    docker_registry,
    push_image,
)
from .roles import MANIFEST_TYPE, Cluster, cluster_under, manifest_of, whole_cluster
from .upstream_server import FakeUpstream, Reply, fake_upstream

CONFIG = b'{"architecture": "amd64", "os": "linux"}'
LAYER = random.Random(11).randbytes(9 << 20)
REPOSITORY = "team/app"


@asynccontextmanager
async def mirror(
    root: Path,
    *upstreams: UpstreamConfig,
    names: tuple[str, ...] = (),
    agents: int = 1,
    push: bool = False,
) -> AsyncIterator[Cluster]:
    """A whole cluster that pulls through."""
    async with cluster_under(root) as cluster:
        cluster.config = attrs.evolve(
            cluster.config,
            upstreams=upstreams,
            cluster=attrs.evolve(cluster.config.cluster, names=names),
        )
        await cluster.start_index()
        await cluster.start_origin()
        await cluster.start_tracker()
        for number in range(agents):
            await cluster.start_agent(f"agent-{number}", push=push)
        yield cluster


def upstream_config(server: FakeUpstream, name: str = "docker.io", **more: Any) -> UpstreamConfig:
    return UpstreamConfig(name=name, url=server.url, **more)


@pytest.fixture
async def server() -> AsyncIterator[FakeUpstream]:
    async with fake_upstream() as server:
        server.add_image("library/app", "v1", CONFIG, LAYER)
        yield server


def error_of(reply: httpx.Response) -> tuple[int, str, str]:
    first = reply.json()["errors"][0]
    return reply.status_code, first["code"], first["message"]


async def pull(
    cluster: Cluster, role: str, repository: str, tag: str = "v1", ns: str = ""
) -> bytes:
    """As a runtime does: HEAD, manifest by digest, blobs; returns the manifest."""
    query = f"?ns={ns}" if ns else ""
    head = await cluster.request("HEAD", role, f"/v2/{repository}/manifests/{tag}{query}")
    assert head.status_code == 200, head.headers
    digest = head.headers["docker-content-digest"]
    reply = await cluster.get(role, f"/v2/{repository}/manifests/{digest}{query}")
    assert reply.status_code == 200, reply.text
    assert str(Digest.of(reply.content)) == digest
    assert reply.headers["content-type"] == MANIFEST_TYPE == head.headers["content-type"]
    document = reply.json()
    for entry in (document["config"], *document["layers"]):
        blob = await cluster.get(role, f"/v2/{repository}/blobs/{entry['digest']}{query}")
        assert blob.status_code == 200, blob.text
        assert str(Digest.of(blob.content)) == entry["digest"]
    return reply.content


# --- which upstream -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("repository", "ns"),
    [
        ("library/app", "docker.io"),
        ("app", "docker.io"),
        ("docker.io/library/app", ""),
        ("docker.io/app", ""),
    ],
)
async def test_both_forms_select_the_upstream(tmp_path, server, repository, ns) -> None:
    async with mirror(tmp_path, upstream_config(server)) as cluster:
        for role in ("agent-0", "origin"):
            assert await pull(cluster, role, repository, ns=ns) == manifest_of(CONFIG, LAYER)


async def test_a_registry_with_a_port_is_selected_too(tmp_path, server) -> None:
    async with mirror(tmp_path, upstream_config(server, server.address)) as cluster:
        assert await pull(cluster, "agent-0", f"{server.address}/library/app")
        assert await pull(cluster, "agent-0", "library/app", ns=server.address)


async def test_a_registry_that_is_not_configured_is_refused_by_name(tmp_path, server) -> None:
    async with mirror(tmp_path, upstream_config(server), names=("mine.example",)) as cluster:
        for role in ("agent-0", "origin"):
            for path in (
                "/v2/library/app/manifests/v1?ns=quay.io",
                f"/v2/library/app/blobs/{Digest.of(LAYER)}?ns=quay.io",
                "/v2/quay.io:443/library/app/manifests/v1",
            ):
                status, code, message = error_of(await cluster.get(role, path))
                assert (status, code) == (403, "DENIED")
                assert "quay.io" in message
                assert "docker.io" in message
            # Neither a name of our own nor one that only looks like a host is another registry.
            for path in ("/v2/a/b/manifests/v1?ns=mine.example", "/v2/a.b/c/manifests/v1"):
                assert (await cluster.get(role, path)).status_code == 404
    assert server.seen == []


async def test_without_upstreams_a_cluster_is_what_its_clients_take_it_for(tmp_path) -> None:
    async with whole_cluster(tmp_path) as cluster:
        await cluster.start_agent()
        await cluster.push_image("origin", "team/app", CONFIG, b"layer")
        reply = await cluster.get("agent", "/v2/team/app/manifests/v1?ns=registry.example")
        assert reply.status_code == 200
        status, code, _ = error_of(await cluster.get("agent", "/v2/quay.io:443/a/manifests/v1"))
        assert (status, code) == (403, "DENIED")


async def test_nothing_can_be_pushed_to_an_upstream(tmp_path, server) -> None:
    async with mirror(tmp_path, upstream_config(server), push=True) as cluster:
        for role in ("agent-0", "origin"):
            reply = await cluster.push_blob(role, "docker.io/library/app", b"blob")
            assert error_of(reply)[:2] == (403, "DENIED")
            reply = await cluster.push_manifest(
                role, "docker.io/library/app", "v2", manifest_of(CONFIG, LAYER)
            )
            assert error_of(reply)[:2] == (403, "DENIED")
            reply = await cluster.request("POST", role, "/v2/quay.io:443/x/blobs/uploads/")
            assert error_of(reply)[:2] == (403, "DENIED")
        assert (await cluster.push_blob("agent-0", "team/own", b"blob")).status_code == 201
    assert server.seen == []


# --- once for the cluster -------------------------------------------------------------------------


async def test_every_byte_is_fetched_once_for_two_agents_at_the_same_time(tmp_path, server) -> None:
    async with mirror(tmp_path, upstream_config(server), agents=2) as cluster:
        async with trio.open_nursery() as nursery:
            for role in ("agent-0", "agent-1"):
                nursery.start_soon(pull, cluster, role, "docker.io/library/app")
        await pull(cluster, "agent-0", "library/app", ns="docker.io")
        assert await cluster.metric("origin", "backend_bytes_read_total") == len(CONFIG + LAYER)
    assert server.sent == len(CONFIG + LAYER)
    manifests = [line for line in server.lines if "/manifests/" in line]
    assert sorted(line.split()[0] for line in manifests) == ["GET", "HEAD"]


async def test_two_origins_fetch_a_blob_once_between_them(tmp_path, server) -> None:
    async with cluster_under(tmp_path) as cluster:
        cluster.config = attrs.evolve(cluster.config, upstreams=(upstream_config(server),))
        await cluster.start_index()
        await cluster.start_origin()
        await cluster.start_origin("origin-2")
        await cluster.start_tracker()
        for role in ("agent-0", "agent-1"):
            await cluster.start_agent(role)
            await pull(cluster, role, "docker.io/library/app")
    assert server.sent == len(CONFIG + LAYER)


async def test_head_starts_no_download(tmp_path, server) -> None:
    async with mirror(tmp_path, upstream_config(server)) as cluster:
        path = f"/v2/docker.io/library/app/blobs/{Digest.of(LAYER)}"
        reply = await cluster.request("HEAD", "agent-0", path)
        assert reply.headers["content-length"] == str(len(LAYER))
        reply = await cluster.request("HEAD", "agent-0", "/v2/docker.io/app/manifests/v1")
        assert reply.status_code == 200
    assert server.sent == 0
    assert {line.split()[0] for line in server.lines} == {"HEAD"}


async def test_what_the_upstream_lacks_is_not_found(tmp_path, server) -> None:
    async with mirror(tmp_path, upstream_config(server)) as cluster:
        reply = await cluster.get("agent-0", "/v2/docker.io/app/manifests/v2")
        assert error_of(reply)[:2] == (404, "MANIFEST_UNKNOWN")
        reply = await cluster.get("agent-0", f"/v2/docker.io/app/blobs/{Digest.of(b'none')}")
        assert error_of(reply)[:2] == (404, "BLOB_UNKNOWN")


# --- tags that move, and upstreams that are down --------------------------------------------------


async def test_a_fresh_tag_is_not_asked_for_again_and_a_stale_one_is(tmp_path, server) -> None:
    other = manifest_of(b"another", b"layer")
    for freshness, requests, newest in ((3600.0, 1, False), (0.0, 3, True)):
        server.seen.clear()
        server.manifests["library/app", "v1"] = manifest_of(CONFIG, LAYER)
        config = upstream_config(server, freshness=Duration(freshness))
        async with mirror(tmp_path / str(freshness), config) as cluster:
            path = "/v2/docker.io/library/app/manifests/v1"
            first = await cluster.get("agent-0", path)
            assert (await cluster.get("agent-0", path)).content == first.content
            server.manifests["library/app", "v1"] = other
            server.manifests["library/app", str(Digest.of(other))] = other
            moved = (await cluster.get("agent-0", path)).content
            assert (moved == other) is newest
        assert len([line for line in server.lines if line.endswith("/v1")]) == requests


async def test_while_the_upstream_is_down_a_tag_is_served_stale_with_a_warning(
    tmp_path, server
) -> None:
    config = upstream_config(server, freshness=Duration(0.0))
    async with mirror(tmp_path, config) as cluster:
        path = "/v2/docker.io/library/app/manifests/v1"
        fresh = await cluster.get("agent-0", path)
        assert "warning" not in fresh.headers
        server.fail(99, "HEAD|GET", Reply(503, {"Retry-After": "3600"}))
        for method in ("GET", "HEAD"):
            stale = await cluster.request(method, "agent-0", path)
            assert stale.status_code == 200
            assert stale.headers["warning"].startswith("110 ")
            assert stale.headers["docker-content-digest"] == fresh.headers["docker-content-digest"]
        assert (await cluster.get("agent-0", path)).content == fresh.content
        by_digest = await cluster.get("agent-0", path.replace("v1", str(Digest.of(fresh.content))))
        assert by_digest.content == fresh.content
        assert "warning" not in by_digest.headers
        # Nothing is known of another tag: the client hears how long to wait.
        reply = await cluster.get("agent-0", path.replace("v1", "v2"))
        assert error_of(reply)[:2] == (429, "TOOMANYREQUESTS")
        assert 3500 < int(reply.headers["retry-after"]) <= 3600


async def test_a_tag_survives_a_restart_of_the_origin_while_the_upstream_is_down(
    tmp_path, server
) -> None:
    async with mirror(tmp_path, upstream_config(server)) as cluster:
        path = "/v2/docker.io/library/app/manifests/v1"
        fresh = await cluster.get("origin", path)
        await cluster.roles["origin"].kill()
        server.fail(99, "HEAD|GET", Reply(500))
        await cluster.start_origin()
        stale = await cluster.get("origin", path)
        assert stale.content == fresh.content
        assert stale.headers["warning"].startswith("110 ")


async def test_an_upstream_that_hangs_holds_up_nobody_who_can_have_a_stale_answer(
    tmp_path, server, monkeypatch
) -> None:
    monkeypatch.setattr(origin_upstreams, "CONFIRM_SECONDS", 0.05)
    config = upstream_config(server, freshness=Duration(0.0))
    async with mirror(tmp_path, config) as cluster:
        path = "/v2/docker.io/library/app/manifests/v1"
        await cluster.get("agent-0", path)
        server.hanging = True
        for _ in range(3):
            reply = await cluster.get("agent-0", path)
            assert reply.headers["warning"].startswith("110 ")
        # It is believed to be down after the first, and not asked by the others.
        assert len([line for line in server.lines if line.endswith("/v1")]) == 2


async def test_a_blob_that_the_upstream_limits_says_when_to_come_back(tmp_path, server) -> None:
    server.fail(99, "GET .*/blobs/", Reply(429, {"Retry-After": "600"}, b"slow down"))
    async with mirror(tmp_path, upstream_config(server)) as cluster:
        path = f"/v2/docker.io/library/app/blobs/{Digest.of(LAYER)}"
        reply = await cluster.get("agent-0", path)
        status, code, message = error_of(reply)
        assert (status, code) == (429, "TOOMANYREQUESTS")
        assert "slow down" in message
        assert 500 < int(reply.headers["retry-after"]) <= 600


async def test_a_login_that_is_refused_is_said_so(tmp_path, server) -> None:
    server.login = "token"
    config = upstream_config(server, username="bob", password=Secret("wrong"))
    async with mirror(tmp_path, config) as cluster:
        for path in ("manifests/v1", f"blobs/{Digest.of(LAYER)}"):
            reply = await cluster.get("agent-0", f"/v2/docker.io/library/app/{path}")
            status, code, message = error_of(reply)
            assert (status, code) == (403, "DENIED")
            assert "does not take this user and password" in message
            assert "wrong" not in message


async def test_wrong_content_is_given_to_nobody_and_the_next_pull_tries_again(
    tmp_path, server
) -> None:
    digest = Digest.of(LAYER)
    server.blobs["library/app", str(digest)] = LAYER[:-1] + bytes([LAYER[-1] ^ 1])
    async with mirror(tmp_path, upstream_config(server)) as cluster:
        path = f"/v2/docker.io/library/app/blobs/{digest}"
        with pytest.raises(httpx.RemoteProtocolError):
            await cluster.get("agent-0", path)
        assert await cluster.metric("origin", "backend_corrupt_objects_total") == 1
        reply = await cluster.request("HEAD", "agent-0", path)
        assert reply.status_code == 200
        server.blobs["library/app", str(digest)] = LAYER
        reply = await cluster.get("agent-0", path)
        assert reply.content == LAYER


# --- real registries ------------------------------------------------------------------------------


@pytest.mark.parametrize("login", [False, True])
async def test_the_distribution_registry_is_pulled_through(tmp_path: Path, login) -> None:
    manifest = manifest_of(CONFIG, LAYER)
    with docker_registry(tmp_path / "upstream", login=login) as address:
        await push_image(
            f"http://{address}", REPOSITORY, "v1", manifest, MANIFEST_TYPE, CONFIG, LAYER
        )
        more: dict[str, Any] = {"username": USER, "password": Secret(PASSWORD)} if login else {}
        upstream = UpstreamConfig(
            name="hub.example", url=f"registry+http://{address}", freshness=Duration(0.0), **more
        )
        async with mirror(tmp_path / "mirror", upstream, agents=2) as cluster:
            for role in ("agent-0", "agent-1"):
                assert await pull(cluster, role, f"hub.example/{REPOSITORY}") == manifest
                assert await pull(cluster, role, REPOSITORY, ns="hub.example") == manifest
            assert await cluster.metric("origin", "backend_bytes_read_total") == len(CONFIG + LAYER)
            reply = await cluster.get("agent-0", f"/v2/hub.example/{REPOSITORY}/manifests/v9")
            assert reply.status_code == 404


async def test_over_tls_the_certificate_is_checked(tmp_path: Path, monkeypatch) -> None:
    certificate = certificate_for_loopback(tmp_path)
    with docker_registry(tmp_path / "upstream", certificate=certificate) as address:
        upstream = UpstreamConfig(name="hub.example", url=f"registry+https://{address}")
        path = f"/v2/hub.example/{REPOSITORY}/manifests/v1"
        async with mirror(tmp_path / "stranger", upstream) as cluster:
            reply = await cluster.get("agent-0", path)
            assert reply.status_code == 503
            assert "certificate is not trusted: self-signed" in reply.text
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        manifest = manifest_of(CONFIG, LAYER)
        base = f"https://{address}"
        await push_image(base, REPOSITORY, "v1", manifest, MANIFEST_TYPE, CONFIG, LAYER)
        async with mirror(tmp_path / "friend", upstream) as cluster:
            assert await pull(cluster, "agent-0", f"hub.example/{REPOSITORY}") == manifest


async def test_a_cluster_is_pulled_through_another_cluster(tmp_path: Path) -> None:
    async with whole_cluster(tmp_path / "far") as far:
        await far.start_agent()
        manifest = await far.push_image("origin", REPOSITORY, CONFIG, LAYER)
        url = f"registry+http://{far.roles['agent'].address('registry')}"
        upstream = UpstreamConfig(name="far.example", url=url)
        async with mirror(tmp_path / "near", upstream) as near:
            assert await pull(near, "agent-0", f"far.example/{REPOSITORY}") == manifest
