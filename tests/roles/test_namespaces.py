"""Repositories with backends of their own, through real roles."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import attrs
import pytest
import trio

from swarmpull.config import (
    NamespaceConfig,
    OriginBackendConfig,
    OriginConfig,
    Rate,
    UpstreamConfig,
)
from swarmpull.digest import Digest
from swarmpull.errors import (
    BackendUnavailable,
    BlobNotFound,
    PushRefused,
    RepositoryUnmatched,
    UpstreamBusy,
)
from swarmpull.patterns import compile_pattern
from swarmpull.roles import cold_fetch
from swarmpull.roles.backend_watch import BackendWatch
from swarmpull.roles.cold_blobs import ColdBlobs, Elsewhere
from swarmpull.roles.origin_backends import open_backends
from swarmpull.roles.origin_content import OriginContent
from swarmpull.store.backends import open_backend
from swarmpull.store.backends import paced as paced_module
from swarmpull.store.backends.base import ObjectStat, blob_key
from swarmpull.store.backends.directory import DirectoryBackend
from swarmpull.store.backends.namespaces import Namespace, Namespaces
from swarmpull.store.backends.paced import PacedBackend
from swarmpull.store.blobs import BlobStore
from swarmpull.store.token_bucket import BURST_BYTES_MIN, TokenBucket
from swarmpull.store.write_back_queue import FILE_NAME
from swarmpull.swarm.metainfo import PIECE_LENGTH_MIN
from swarmpull.swarm.peers import PeerContact, PeerKind
from swarmpull.telemetry import Metrics
from swarmpull.wire.api import ADOPT_BLOB, REPLICATE_BLOB, AdoptRequest, ReplicateRequest

from .peers import Node, make_content, running_node
from .roles import Cluster, cluster_under, manifest_of

DATA = random.Random(3).randbytes(200_000)
BLOB = Digest.of(DATA)


@asynccontextmanager
async def divided(
    root: Path, *, push: bool = False, upstreams: tuple[UpstreamConfig, ...] = ()
) -> AsyncIterator[Cluster]:
    """A cluster with a backend for ``red/**`` and one for ``blue/*``."""
    async with cluster_under(root) as cluster:
        cluster.config = attrs.evolve(cluster.config, upstreams=upstreams)
        cluster.namespaces = tuple(
            NamespaceConfig(pattern=pattern, url=(root / name).as_uri())
            for pattern, name in (("red/**", "red-backend"), ("blue/*", "blue-backend"))
        )
        await cluster.start_index()
        await cluster.start_origin()
        await cluster.start_tracker()
        await cluster.start_agent(push=push)
        yield cluster


def has(root: Path, name: str, content: bytes) -> bool:
    return DirectoryBackend(root / name)._path(blob_key(Digest.of(content))).exists()


# --- which backend --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "matching", "other"),
    [
        ("team/*", ["team/app"], ["team", "team/app/x", "xteam/app", "team/app/", "steam/app"]),
        ("team/**", ["team/app", "team/app/x"], ["team", "tea/m"]),
        ("**", ["a", "a/b/c"], []),
        ("*", ["a"], ["a/b"]),
        ("a.b/c", ["a.b/c"], ["axb/c"]),
        ("*/app-*", ["x/app-1"], ["x/app", "x/y/app-1"]),
    ],
)
def test_a_pattern_matches_whole_names(pattern, matching, other) -> None:
    compiled = compile_pattern(pattern)
    assert [name for name in (*matching, *other) if compiled.fullmatch(name)] == matching


async def test_the_first_pattern_that_matches_wins(tmp_path: Path) -> None:
    default, first, second = [
        await open_backend((tmp_path / name).as_uri()) for name in ("default", "first", "second")
    ]
    upstream = await open_backend((tmp_path / "upstream").as_uri())
    namespaces = Namespaces(
        default,
        [Namespace("team/app", first), Namespace("team/*", second)],
        {"docker.io": lambda repository: {"library/app": upstream}[repository]},
    )
    assert namespaces.backend_for("team/app") is first
    assert namespaces.backend_for("team/other") is second
    assert namespaces.backend_for("") is default, "generic blobs"
    assert namespaces.backend_for("docker.io/library/app") is upstream
    with pytest.raises(RepositoryUnmatched, match=r"other/app .*\(team/app, team/\*\)"):
        namespaces.backend_for("other/app")
    with pytest.raises(RepositoryUnmatched):
        namespaces.backend_for("docker.io")
    with pytest.raises(PushRefused, match=r"docker\.io"):
        namespaces.check_push("docker.io/library/app")
    with pytest.raises(PushRefused, match="other/app"):
        namespaces.check_push("other/app")
    namespaces.check_push("team/app")
    namespaces.check_push("")


async def test_without_namespaces_everything_is_in_the_default_backend(tmp_path: Path) -> None:
    default = await open_backend(tmp_path.as_uri())
    assert Namespaces(default).backend_for("any/thing") is default


# --- through roles --------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["origin", "agent"])
async def test_content_goes_to_the_backend_of_its_repository_only(tmp_path, role) -> None:
    async with divided(tmp_path, push=True) as cluster:
        manifest = await cluster.push_image(role, "red/deep/app", b"config", DATA)
        assert (await cluster.push_blob(role, "blue/app", b"blue")).status_code == 201
        generic = await cluster.request(
            "PUT", role, f"/blobs/{Digest.of(b'generic')}", content=b"generic"
        )
        assert generic.status_code == 201, generic.text
        await cluster.written_back()
    places = {
        content: [
            name
            for name in ("red-backend", "blue-backend", "backend")
            if has(tmp_path, name, content)
        ]
        for content in (DATA, b"config", manifest, b"blue", b"generic")
    }
    assert places == {
        DATA: ["red-backend"],
        b"config": ["red-backend"],
        manifest: ["red-backend"],
        b"blue": ["blue-backend"],
        b"generic": ["backend"],
    }


@pytest.mark.parametrize("role", ["origin", "agent"])
async def test_a_push_that_no_pattern_matches_is_denied_and_nothing_is_kept(tmp_path, role) -> None:
    async with divided(tmp_path, push=True) as cluster:
        replies = [
            await cluster.push_blob(role, "green/app", DATA),
            await cluster.push_manifest(role, "green/app", "v1", manifest_of(b"", b"")),
        ]
        for reply in replies:
            assert reply.status_code == 403, reply.text
            error = reply.json()["errors"][0]
            assert error["code"] == "DENIED"
            for word in ("green/app", "red/**", "blue/*"):
                assert word in error["message"]
        assert await cluster.metric("origin", "write_back_queue_blobs") == 0, "or it waits for ever"
        tags = await cluster.get(role, "/v2/green/app/tags/list")
        assert tags.status_code == 404
        gone = await cluster.request("DELETE", role, "/v2/green/app/manifests/v1")
        assert gone.status_code == 404, "there is nothing to delete, and no reason not to ask"
    assert not any(has(tmp_path, name, DATA) for name in ("red-backend", "blue-backend", "backend"))


async def test_a_pull_that_no_pattern_matches_is_not_found(tmp_path) -> None:
    async with divided(tmp_path) as cluster:
        for path in ("manifests/v1", f"blobs/{BLOB}"):
            reply = await cluster.get("agent", f"/v2/green/app/{path}")
            assert reply.status_code == 404, reply.text
            assert "green/app" in reply.text


async def test_blobs_come_from_the_backend_of_their_repository(tmp_path) -> None:
    red = await open_backend((tmp_path / "red-backend").as_uri())
    await red.put_bytes(blob_key(BLOB), DATA)
    async with divided(tmp_path) as cluster:
        reply = await cluster.get("agent", f"/v2/blue/app/blobs/{BLOB}")
        assert reply.status_code == 404
        reply = await cluster.get("agent", f"/v2/red/app/blobs/{BLOB}")
        assert reply.content == DATA


@pytest.mark.parametrize("role", ["origin", "agent"])
async def test_a_mount_between_two_backends_copies_the_blob(tmp_path, role) -> None:
    async with divided(tmp_path, push=True) as cluster:
        assert (await cluster.push_blob(role, "red/app", DATA)).status_code == 201
        mount = f"/v2/blue/app/blobs/uploads/?mount={BLOB}&from=red/app"
        reply = await cluster.request("POST", role, mount)
        assert reply.status_code == 201, reply.text
        assert (await cluster.get(role, f"/v2/blue/app/blobs/{BLOB}")).content == DATA
        reply = await cluster.request("POST", role, mount.replace("blue/", "green/"))
        assert reply.status_code == 403, reply.text
        await cluster.written_back()
    assert has(tmp_path, "blue-backend", DATA)


# --- what waits to be written ---------------------------------------------------------------------


@contextmanager
def broken(backend: Path) -> Iterator[None]:
    """Every operation of a directory backend fails inside."""
    away = backend.with_name("away")
    backend.rename(away)
    backend.write_bytes(b"not a directory")
    yield
    backend.unlink()
    away.rename(backend)


async def test_a_backend_that_is_down_holds_up_nothing_of_another(tmp_path) -> None:
    blobs = [b"%d" % number for number in range(20)]
    async with divided(tmp_path) as cluster:
        with broken(tmp_path / "red-backend"):
            assert (await cluster.push_blob("origin", "red/app", DATA)).status_code == 201
            await cluster.counted("origin", "write_back_failures_total", 2)
            mount = f"/v2/blue/app/blobs/uploads/?mount={BLOB}&from=red/app"
            assert (await cluster.request("POST", "origin", mount)).status_code == 201
            for blob in blobs:
                assert (await cluster.push_blob("origin", "blue/app", blob)).status_code == 201
            await cluster.counted("origin", "write_back_written_total", len(blobs) + 1)

            assert all(has(tmp_path, "blue-backend", blob) for blob in (*blobs, DATA))
            status = (await cluster.status("origin"))["write_back"]
            assert status["queued"] == 1
            assert "red-backend" in status["failure"]
        await cluster.written_back()
    assert has(tmp_path, "red-backend", DATA)


async def test_a_queued_blob_whose_pattern_is_gone_is_kept_until_one_matches_again(
    tmp_path, logs: list[dict]
) -> None:
    async with divided(tmp_path) as cluster:
        with broken(tmp_path / "red-backend"):
            assert (await cluster.push_blob("origin", "red/app", DATA)).status_code == 201
            await cluster.roles["origin"].kill()
        both = cluster.namespaces
        cluster.namespaces = both[1:]
        await cluster.start_origin()
        await cluster.counted("origin", "write_back_failures_total", 1)
        status = (await cluster.status("origin"))["write_back"]
        assert status["queued"] == 1
        assert "red/app has no backend" in status["failure"]
        assert await cluster.metric("origin", "write_back_attempts_total") == 1
        assert not has(tmp_path, "blue-backend", DATA)
        assert not has(tmp_path, "backend", DATA)
        await cluster.roles["origin"].kill()

        cluster.namespaces = both
        await cluster.start_origin()
        await cluster.written_back()
    assert has(tmp_path, "red-backend", DATA)
    (entry,) = [
        entry
        for entry in logs
        if entry["event"] == "write_back_failing" and "has no backend" in entry["reason"]
    ]
    assert entry["namespace"] == "red/app"


async def test_a_queue_made_anew_writes_nothing_to_a_backend_it_may_not_belong_to(
    tmp_path, logs: list[dict]
) -> None:
    async with divided(tmp_path) as cluster:
        assert (await cluster.push_blob("origin", "red/app", DATA)).status_code == 201
        await cluster.written_back()
        await cluster.roles["origin"].kill()
        for path in (tmp_path / "origin").glob(f"{FILE_NAME}*"):
            path.unlink()
        await cluster.start_origin()

        assert await cluster.metric("origin", "write_back_queue_blobs") == 0
        assert (await cluster.get("origin", f"/v2/red/app/blobs/{BLOB}")).content == DATA
    assert not has(tmp_path, "backend", DATA)
    (entry,) = [entry for entry in logs if entry["event"] == "write_back_queue_new"]
    assert (entry["on_disk"], entry["queued"]) == (1, 0)


@pytest.mark.parametrize("repository", ["green/app", "far_1/app"])
async def test_a_replica_takes_no_copy_of_what_it_could_not_write(tmp_path, repository) -> None:
    upstream = UpstreamConfig(name="far:1", url="registry+http://127.0.0.1:1")
    async with divided(tmp_path, upstreams=(upstream,)) as cluster:
        source = PeerContact("0" * 32, "127.0.0.1", 1, PeerKind.AGENT)
        address = cluster.roles["origin"].address("rpc")
        content = make_content(1000)
        replicate = ReplicateRequest(content.metainfo, repository, source, rank=1, seconds=5.0)
        adopt = AdoptRequest(content.metainfo, repository, source)
        for method, request in ((REPLICATE_BLOB, replicate), (ADOPT_BLOB, adopt)):
            with pytest.raises(PushRefused, match=repository):
                await cluster.pool.call(address, method, request, timeout=5.0)
        assert await cluster.metric("origin", "write_back_queue_blobs") == 0


async def test_an_origin_is_ready_when_each_backend_has_answered(tmp_path, autojump_clock) -> None:
    good, bad = [await open_backend((tmp_path / name).as_uri()) for name in ("good", "bad")]
    watch = BackendWatch((good, bad))
    async with trio.open_nursery() as nursery:
        with broken(tmp_path / "bad"):
            assert len(watch.reasons()) == 2
            nursery.start_soon(watch.run)
            while len(watch.reasons()) == 2:  # noqa: ASYNC110 - of a disk that nobody watches
                await trio.sleep(0.1)
            await trio.sleep(60.0)
            (reason,) = watch.reasons()
            assert bad.name in reason
    assert not watch.reasons()


# --- what is known of one backend -----------------------------------------------------------------


def content_of(
    node: Node, namespaces: Namespaces, nursery: trio.Nursery, elsewhere: Elsewhere | None = None
) -> OriginContent:
    """The blobs of an origin that is alone, but for ``elsewhere``."""
    metrics = Metrics()
    cold = ColdBlobs(
        node.store,
        namespaces,
        node.host,
        None,
        nursery,
        metrics,
        fetch_connections=2,
        elsewhere=elsewhere,
    )
    return OriginContent(node.store, namespaces, node.host, cold, nursery, metrics)


async def test_what_is_known_of_one_backend_says_nothing_about_another(tmp_path) -> None:
    red, blue = [await open_backend((tmp_path / name).as_uri()) for name in ("red", "blue")]
    namespaces = Namespaces(red, [Namespace("red/*", red), Namespace("blue/*", blue)])
    await red.put_bytes(blob_key(BLOB), b"x" * len(DATA))
    async with (
        running_node(tmp_path / "store", kind=PeerKind.ORIGIN) as node,
        trio.open_nursery() as nursery,
    ):
        content = content_of(node, namespaces, nursery)
        with pytest.raises(BackendUnavailable, match="corrupt"):
            await content.ensure_local(BLOB, "red/app")
        assert content.is_corrupt(BLOB, "red/app")
        assert not content.is_corrupt(BLOB, "blue/app")
        with pytest.raises(BlobNotFound):
            await content.stat(BLOB, "blue/app")

        await blue.put_bytes(blob_key(BLOB), DATA)
        assert await content.stat(BLOB, "blue/app") == len(DATA)
        await content.ensure_local(BLOB, "blue/app")
        # On the disk now, so that it can mend the other one.
        await content.make_durable(BLOB, "red/app")
        assert not content.is_corrupt(BLOB, "red/app")
        nursery.cancel_scope.cancel()
    assert await red.get_bytes(blob_key(BLOB)) == DATA


async def test_a_blob_that_two_repositories_want_is_looked_for_in_both_backends(tmp_path) -> None:
    red, blue = [await open_backend((tmp_path / name).as_uri()) for name in ("red", "blue")]
    await blue.put_bytes(blob_key(BLOB), DATA)
    namespaces = Namespaces(red, [Namespace("red/*", red), Namespace("blue/*", blue)])
    outcomes: dict[str, bool] = {}
    async with (
        running_node(tmp_path / "store", kind=PeerKind.ORIGIN) as node,
        trio.open_nursery() as nursery,
    ):
        content = content_of(node, namespaces, nursery)

        async def want(repository: str) -> None:
            try:
                await content.ensure_local(BLOB, repository)
            except BlobNotFound:
                outcomes[repository] = False
            else:
                outcomes[repository] = True

        async with trio.open_nursery() as both:
            both.start_soon(want, "red/app")
            both.start_soon(want, "blue/app")
        nursery.cancel_scope.cancel()
    assert outcomes["blue/app"], "what red lacks says nothing about blue"


async def test_a_cold_blob_at_a_low_rate_is_slow_and_not_silent(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(cold_fetch, "CHUNK_TIMEOUT", 0.005)
    blob = make_content(2 * PIECE_LENGTH_MIN, seed=3)
    backend = await open_backend((tmp_path / "backend").as_uri())
    await backend.put_bytes(blob_key(blob.digest), blob.data)
    paced = PacedBackend(backend, TokenBucket(20e6))
    async with (
        running_node(tmp_path / "store", kind=PeerKind.ORIGIN) as node,
        trio.open_nursery() as nursery,
    ):
        content = content_of(node, Namespaces(paced), nursery)
        await content.ensure_local(blob.digest, "")
        nursery.cancel_scope.cancel()


async def test_a_paced_read_of_a_backend_that_hangs_ends(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(paced_module, "SILENCE_MAX", 0.05)

    @asynccontextmanager
    async def hang(_key: str, **_where: object) -> AsyncIterator[AsyncIterator[bytes]]:
        yield never()

    async def never() -> AsyncIterator[bytes]:
        await trio.sleep_forever()
        yield b""

    backend = await open_backend((tmp_path / "backend").as_uri())
    monkeypatch.setattr(backend, "open", hang)
    async with PacedBackend(backend, TokenBucket(1e6)).open("a/b") as chunks:
        with pytest.raises(BackendUnavailable, match="no bytes for"):
            await anext(chunks)


@attrs.define
class Others:
    """Origins that have the blob, and what they were asked for."""

    store: BlobStore
    asked: list[Digest] = attrs.Factory(list)

    async def length(self, digest: Digest) -> int | None:
        self.asked.append(digest)
        return len(DATA)

    async def fetch(self, digest: Digest) -> bool:
        self.asked.append(digest)
        async with self.store.create() as writer:
            await writer.write(DATA)
            await writer.commit(digest)
        return True


async def test_other_origins_are_asked_for_what_was_pushed_here_and_not_for_an_upstreams(
    tmp_path,
) -> None:
    empty = await open_backend((tmp_path / "empty").as_uri())
    namespaces = Namespaces(empty, upstreams={"docker.io": lambda _: empty})
    async with (
        running_node(tmp_path / "store", kind=PeerKind.ORIGIN) as node,
        trio.open_nursery() as nursery,
    ):
        others = Others(node.store)
        content = content_of(node, namespaces, nursery, others)
        for ask in (content.stat, content.ensure_local):
            with pytest.raises(BlobNotFound):
                await ask(BLOB, "docker.io/library/app")
        assert not others.asked
        assert await content.stat(BLOB, "team/app") == len(DATA)
        await content.ensure_local(BLOB, "team/app")
        assert others.asked == [BLOB, BLOB]
        nursery.cancel_scope.cancel()


async def test_what_an_upstream_says_of_a_failure_is_passed_on_whole(tmp_path) -> None:
    default = await open_backend((tmp_path / "default").as_uri())
    namespaces = Namespaces(default, upstreams={"docker.io": lambda _: Busy()})
    async with (
        running_node(tmp_path / "store", kind=PeerKind.ORIGIN) as node,
        trio.open_nursery() as nursery,
    ):
        content = content_of(node, namespaces, nursery)
        for ask in (content.stat, content.ensure_local):
            with pytest.raises(UpstreamBusy) as caught:
                await ask(BLOB, "docker.io/library/app")
            assert caught.value.retry_after == 7.0
        nursery.cancel_scope.cancel()


class Busy(DirectoryBackend):
    """Asks to be left alone."""

    def __init__(self) -> None:
        super().__init__(Path("/nowhere"))

    async def stat(self, key: str) -> ObjectStat:
        raise UpstreamBusy(self.name, key, "429", 7.0)

    @asynccontextmanager
    async def open(self, key: str, *, start: int = 0) -> AsyncIterator[AsyncIterator[bytes]]:
        raise UpstreamBusy(self.name, key, f"429 from {start}", 7.0)
        yield


# --- rates ----------------------------------------------------------------------------------------


async def test_a_backend_keeps_to_its_rate_in_both_directions(
    tmp_path, autojump_clock, monkeypatch
) -> None:
    # The clock jumps while a thread reads the disk.
    monkeypatch.setattr(paced_module, "SILENCE_MAX", float("inf"))
    inner = await open_backend((tmp_path / "backend").as_uri())
    file = tmp_path / "file"
    file.write_bytes(bytes(BURST_BYTES_MIN))
    backend = PacedBackend(inner, TokenBucket(float(BURST_BYTES_MIN)))
    began = trio.current_time()
    for _ in range(3):
        await backend.put_file("key", file)
    # The first is the burst; what the others owe is waited for by whoever comes next.
    assert trio.current_time() - began == pytest.approx(1.0, abs=0.1)
    async with backend.open("key") as chunks:
        assert b"".join([chunk async for chunk in chunks]) == bytes(BURST_BYTES_MIN)
    assert trio.current_time() - began == pytest.approx(2.0, abs=0.1)
    assert backend.name == inner.name


async def test_each_backend_has_the_rate_of_its_configuration(tmp_path) -> None:
    settings = OriginConfig(
        backend=OriginBackendConfig(url=(tmp_path / "default").as_uri()),
        namespaces=(
            NamespaceConfig(pattern="a/*", url=(tmp_path / "a").as_uri(), rate=Rate(1e6)),
            NamespaceConfig(pattern="b/*", url=(tmp_path / "b").as_uri(), rate=Rate(1e6)),
        ),
    )
    upstreams = [UpstreamConfig(name="far:1", url="registry+http://127.0.0.1:1", rate=Rate(2e6))]
    async with open_backends(settings, upstreams) as backends:
        one, other, default, far, farther = map(
            backends.namespaces.backend_for, ("a/x", "b/x", "", "far_1/x", "far_1/y")
        )
    assert isinstance(default, DirectoryBackend), "nothing is in the way without a rate"
    for paced, rate in ((one, 1e6), (other, 1e6), (far, 2e6)):
        assert isinstance(paced, PacedBackend)
        assert paced._bucket.rate == rate
    assert one._bucket is not other._bucket
    assert far._bucket is farther._bucket, "an upstream has one rate over all of its repositories"
