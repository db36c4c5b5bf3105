"""The index as its callers see it: real RPC on loopback, a directory as the backend."""

from __future__ import annotations

import json
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import httpx
import pytest
import trio
import trio.testing

from swarmpull.config import (
    Address,
    ApiConfig,
    BackendConfig,
    ClusterConfig,
    Config,
    IndexConfig,
    ListenerConfig,
)
from swarmpull.digest import Digest
from swarmpull.errors import (
    BackendUnavailable,
    BlobNotFound,
    ManifestInvalid,
    ManifestNotFound,
    ManifestReferencesMissing,
    PushRefused,
    RepositoryNotFound,
    RpcFailed,
    StartupError,
)
from swarmpull.roles import index as index_module
from swarmpull.roles.addresses import RoleAddresses
from swarmpull.roles.catalog import Catalog
from swarmpull.roles.cluster import Cluster, IndexClient
from swarmpull.roles.index import BackendWatch, run_index
from swarmpull.store.backends import s3
from swarmpull.wire import api
from swarmpull.wire.rpc import RpcPool, open_rpc_pool

LOOPBACK = ListenerConfig(listen=Address("127.0.0.1", 0))
LAYER = Digest.of(b"layer")
SUBJECT = Digest.of(b"subject")


def describe(number: int, **fields: object) -> api.Descriptor:
    digest = Digest.of(f"manifest {number}".encode())
    return api.Descriptor(digest, "type", number, **fields)  # type: ignore[arg-type]


def settings_for(backend: Path | str, data_dir: Path) -> IndexConfig:
    """``backend``: a directory, or the URL of something else."""
    url = backend if isinstance(backend, str) else backend.as_uri()
    return IndexConfig(
        rpc=LOOPBACK,
        admin=LOOPBACK,
        api=ApiConfig(listen=Address("127.0.0.1", 0)),
        backend=BackendConfig(url=url),
        data_dir=data_dir,
    )


@attrs.define
class Running:
    """A running index, and a client of it."""

    addresses: RoleAddresses
    drain: trio.Event
    ended: trio.Event
    pool: RpcPool
    client: IndexClient

    async def get(self, path: str) -> httpx.Response:
        async with httpx.AsyncClient() as client:
            return await client.get(f"http://{self.addresses.listeners['admin']}{path}")


@asynccontextmanager
async def running_index(backend: Path | str) -> AsyncIterator[Running]:
    drain, ended = trio.Event(), trio.Event()

    async def run(*, task_status: trio.TaskStatus[RoleAddresses]) -> None:
        with tempfile.TemporaryDirectory() as name:
            settings = settings_for(backend, Path(name))
            await run_index(Config(), settings, drain=drain, task_status=task_status)
        ended.set()

    with trio.fail_after(30):
        async with open_rpc_pool() as pool, trio.open_nursery() as nursery:
            addresses = await nursery.start(run)
            cluster = Cluster(pool, ClusterConfig(indexes=(addresses.listeners["rpc"],)))
            yield Running(addresses, drain, ended, pool, cluster.index)
            nursery.cancel_scope.cancel()


@pytest.fixture
async def index(tmp_path: Path, nursery: trio.Nursery) -> AsyncIterator[Running]:
    async with running_index(tmp_path / "backend") as running:
        yield running


async def test_the_life_of_an_image(index):
    client = index.client
    record = api.RecordManifestRequest("team/app", describe(1), "v1", blobs=(LAYER,))
    with pytest.raises(ManifestReferencesMissing) as missing:
        await client.record_manifest(record)
    assert missing.value.missing == (str(LAYER),)
    with pytest.raises(ManifestReferencesMissing):
        await client.check_references("team/app", blobs=(LAYER,))

    await client.link_blob("team/app", LAYER)
    assert await client.has_blob("team/app", LAYER)
    await client.check_references("team/app", blobs=(LAYER,))
    await client.record_manifest(record)
    assert await client.resolve("team/app", "v1") == describe(1)
    assert await client.list_tags("team/app") == api.ListReply(("v1",), more=False)
    assert await client.list_repositories() == api.ListReply(("team/app",), more=False)

    await client.delete_tag("team/app", "v1")
    await client.delete_manifest("team/app", describe(1).digest)
    await client.unlink_blob("team/app", LAYER)
    assert not await client.has_blob("team/app", LAYER)
    with pytest.raises(ManifestNotFound):
        await client.resolve("team/app", "v1")


async def test_referrers_travel_with_their_annotations(index):
    signature = describe(2, artifact_type="application/x.signature", annotations={"by": "ü"})
    await index.client.record_manifest(
        api.RecordManifestRequest("team/app", signature, subject=SUBJECT)
    )

    assert await index.client.list_referrers("team/app", SUBJECT) == (signature,)
    assert await index.client.list_referrers("team/app", LAYER) == ()


async def test_errors_arrive_as_what_they_are(index):
    client = index.client
    with pytest.raises(RepositoryNotFound):
        await client.list_tags("nobody")
    with pytest.raises(RepositoryNotFound):
        await client.resolve("../../etc", "passwd")
    with pytest.raises(BlobNotFound):
        await client.unlink_blob("nobody", LAYER)
    with pytest.raises(ManifestInvalid):
        await client.record_manifest(api.RecordManifestRequest("a", describe(1), "../../x"))
    with pytest.raises(PushRefused):
        await client.link_blob("../../x", LAYER)
    assert await client.list_repositories() == api.ListReply((), more=False)


async def test_a_listing_goes_on_where_it_ended(index):
    for number in range(7):
        request = api.RecordManifestRequest("team/app", describe(1), f"v{number}")
        await index.client.record_manifest(request)

    first = await index.client.list_tags("team/app", limit=4)
    second = await index.client.list_tags("team/app", after=first.names[-1], limit=4)

    assert (first.names, first.more) == (("v0", "v1", "v2", "v3"), True)
    assert (second.names, second.more) == (("v4", "v5", "v6"), False)


async def test_many_clients_may_push_to_one_tag(index):
    async with trio.open_nursery() as nursery:
        for number in range(40):
            request = api.RecordManifestRequest("team/app", describe(number), "latest")
            nursery.start_soon(index.client.record_manifest, request)

    found = await index.client.resolve("team/app", "latest")
    assert found in [describe(number) for number in range(40)]


async def test_a_restarted_index_has_everything(tmp_path):
    async with running_index(tmp_path) as index:
        request = api.RecordManifestRequest("team/app", describe(1), "v1")
        await index.client.record_manifest(request)
    async with running_index(tmp_path) as index:
        assert await index.client.resolve("team/app", "v1") == describe(1)


async def test_a_put_is_visible_on_every_index(tmp_path):
    async with running_index(tmp_path) as one, running_index(tmp_path) as other:
        for number in range(5):
            request = api.RecordManifestRequest("team/app", describe(number), "latest")
            await one.client.record_manifest(request)
            assert await other.client.resolve("team/app", "latest") == describe(number)


async def test_a_backend_that_is_gone_is_an_error_and_the_index_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "CHECK_INTERVAL", 0.02)
    directory = tmp_path / "backend"
    async with running_index(directory) as index:
        await index.client.record_manifest(api.RecordManifestRequest("a", describe(1), "v1"))
        assert (await index.get("/readiness")).status_code == 200

        directory.rename(tmp_path / "elsewhere")
        with pytest.raises(BackendUnavailable):
            await index.client.resolve("a", "v1")
        with pytest.raises(BackendUnavailable):
            await index.client.check_references("a", blobs=(LAYER,))
        while (answer := await index.get("/readiness")).status_code == 200:
            pass
        assert answer.status_code == 503
        assert str(directory) in answer.text

        (tmp_path / "elsewhere").rename(directory)
        while (await index.get("/readiness")).status_code != 200:
            pass
        assert await index.client.resolve("a", "v1") == describe(1)


async def test_a_backend_that_hangs_is_not_ready(autojump_clock):
    class Hanging:
        name = "hanging"

        async def list(self, prefix: str = "", *, after: str = "", limit: int = 1000) -> None:
            await trio.sleep_forever()

    watch = BackendWatch(Catalog(Hanging()))  # type: ignore[arg-type]
    async with trio.open_nursery() as nursery:
        await nursery.start(watch.run)
        assert watch.trouble == "the backend has not answered for 10 s"
        nursery.cancel_scope.cancel()


async def test_nobody_waits_for_long_when_the_bucket_says_nothing(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setattr(s3, "STARTUP_PATIENCE", 0.1)
    monkeypatch.setattr(index_module, "CHECK_TIMEOUT", 0.1)
    monkeypatch.setattr(index_module, "OBJECT_PATIENCE", 0.3)
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        endpoint = f"127.0.0.1:{listener.socket.getsockname()[1]}"
        url = f"s3://bucket?endpoint={endpoint}&secure=false&region=us-east-1"

        async with running_index(url) as index:
            # One request to the bucket would wait for 30 s, and five are made.
            with trio.fail_after(20):
                await index.client.link_blob("a", LAYER)
                with pytest.raises(BackendUnavailable, match=r"not answered for 0\.1 s"):
                    await index.client.resolve("a", "v1")


async def test_the_admin_pages_tell_what_goes_on(index):
    await index.client.link_blob("a", LAYER)
    with pytest.raises(RepositoryNotFound):
        await index.client.list_tags("b")

    status = json.loads((await index.get("/status")).text)
    metrics = (await index.get("/metrics")).text

    assert status["role"] == "index"
    assert status["backend"]["available"] is True
    assert 'swarmpull_index_requests_total{method="link_blob",result="ok"} 1.0' in metrics
    assert 'method="list_tags",result="RepositoryNotFound"} 1.0' in metrics
    assert 'swarmpull_index_request_seconds_count{method="link_blob"} 1.0' in metrics


async def test_a_malformed_request_ends_nothing(index):
    @attrs.frozen
    class Wrong:
        repository: int

    method = attrs.evolve(api.RESOLVE, request=Wrong)
    rpc = index.addresses.listeners["rpc"]
    with pytest.raises(RpcFailed):
        await index.pool.call(rpc, method, Wrong(3), timeout=5.0)

    assert await index.client.list_repositories() == api.ListReply((), more=False)


async def test_a_drain_lets_the_push_under_way_finish(index, monkeypatch):
    begun, gate = trio.Event(), trio.Event()
    mark = Catalog._mark

    async def slow_mark(self: Catalog, repository: str) -> None:
        begun.set()
        await gate.wait()
        await mark(self, repository)

    monkeypatch.setattr(Catalog, "_mark", slow_mark)
    request = api.RecordManifestRequest("team/app", describe(1), "v1")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(index.client.record_manifest, request)
        await begun.wait()
        index.drain.set()
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert not index.ended.is_set()
        gate.set()
    await index.ended.wait()


async def test_a_backend_url_that_cannot_be_used_is_an_error_for_the_operator(tmp_path):
    settings = attrs.evolve(
        settings_for(tmp_path, tmp_path / "data"), backend=BackendConfig(url="gopher://x/y")
    )

    with pytest.raises(StartupError, match="gopher"):
        await run_index(Config(), settings, drain=trio.Event())


async def test_a_directory_that_is_a_file_is_an_error_for_the_operator(tmp_path):
    (tmp_path / "file").write_text("")

    with pytest.raises(StartupError, match="file"):
        await run_index(
            Config(), settings_for(tmp_path / "file", tmp_path / "data"), drain=trio.Event()
        )
