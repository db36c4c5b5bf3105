"""A small cluster of real roles on loopback, and how clients talk to it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import httpx
import trio

from swarmpull.config import (
    Address,
    AgentConfig,
    AgentRegistryConfig,
    ApiConfig,
    BackendConfig,
    ClusterConfig,
    Config,
    Duration,
    IndexConfig,
    ListenerConfig,
    NamespaceConfig,
    OriginBackendConfig,
    OriginConfig,
    PeerListenerConfig,
    StoreConfig,
    TrackerConfig,
)
from swarmpull.digest import Digest
from swarmpull.roles.addresses import RoleAddresses
from swarmpull.roles.agent import run_agent
from swarmpull.roles.config_changes import ConfigChanges
from swarmpull.roles.index import run_index
from swarmpull.roles.origin import run_origin
from swarmpull.roles.tracker import run_tracker
from swarmpull.store.backends.base import blob_key
from swarmpull.store.backends.directory import DirectoryBackend
from swarmpull.wire.rpc import RpcPool, open_rpc_pool

ANY = Address("127.0.0.1", 0)
LISTEN = ListenerConfig(listen=ANY)
PEER = PeerListenerConfig(listen=ANY)
API = ApiConfig(listen=ANY)
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
DEADLINE = 300.0


def manifest_of(config: bytes, *layers: bytes) -> bytes:
    def describe(content: bytes) -> dict[str, object]:
        return {
            "mediaType": "application/octet-stream",
            "digest": str(Digest.of(content)),
            "size": len(content),
        }

    document = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "config": describe(config),
        "layers": [describe(layer) for layer in layers],
    }
    return json.dumps(document).encode()


@attrs.define(eq=False)
class Role:
    """A running role."""

    addresses: RoleAddresses
    drain: trio.Event
    scope: trio.CancelScope
    ended: trio.Event

    def address(self, listener: str) -> str:
        return self.addresses.listeners[listener]

    async def stop(self) -> None:
        """End it as SIGTERM does."""
        self.drain.set()
        await self.ended.wait()

    async def kill(self) -> None:
        """End it in the middle of whatever it does."""
        self.scope.cancel()
        await self.ended.wait()


@attrs.define
class Cluster:
    """Roles by name, started one by one, over directories under ``root``."""

    root: Path
    nursery: trio.Nursery
    pool: RpcPool
    client: httpx.AsyncClient
    config: Config
    roles: dict[str, Role] = attrs.Factory(dict)
    namespaces: tuple[NamespaceConfig, ...] = ()
    changes: ConfigChanges = attrs.Factory(ConfigChanges)

    async def start(
        self, name: str, main: Callable[..., Awaitable[None]], settings: object
    ) -> Role:
        drain, ended, scope = trio.Event(), trio.Event(), trio.CancelScope()

        async def run(*, task_status: trio.TaskStatus[RoleAddresses]) -> None:
            try:
                with scope:
                    await main(
                        self.config,
                        settings,
                        drain=drain,
                        changes=self.changes,
                        task_status=task_status,
                    )
            finally:
                ended.set()

        role = self.roles[name] = Role(await self.nursery.start(run), drain, scope, ended)
        return role

    def _learn(self, **members: tuple[str, ...]) -> None:
        self.config = attrs.evolve(
            self.config, cluster=attrs.evolve(self.config.cluster, **members)
        )

    async def start_index(self) -> Role:
        backend = BackendConfig(url=(self.root / "index-backend").as_uri())
        settings = IndexConfig(
            rpc=LISTEN, admin=LISTEN, api=API, backend=backend, data_dir=self.root / "index"
        )
        role = await self.start("index", run_index, settings)
        self._learn(indexes=(role.address("rpc"),))
        return role

    async def start_origin(
        self, name: str = "origin", *, port: int = 0, fetch_connections: int = 4, **store: Any
    ) -> Role:
        """``port``: for its RPC; ``store``: settings of its store that are not the default."""
        role = await self.start_one_origin(
            name,
            rpc=ListenerConfig(listen=Address("127.0.0.1", port)),
            fetch_connections=fetch_connections,
            store=StoreConfig(**store),
        )
        if role.address("rpc") not in self.config.cluster.origins:
            others = self.config.cluster.origins if name != "origin" else ()
            self._learn(origins=(*others, role.address("rpc")))
        return role

    async def start_one_origin(self, name: str, **settings: Any) -> Role:
        """``settings``: what is not as usual.  The others learn nothing of it."""
        usual: dict[str, Any] = {
            "registry": LISTEN,
            "rpc": LISTEN,
            "peer": PEER,
            "admin": LISTEN,
            "backend": OriginBackendConfig(url=(self.root / "backend").as_uri()),
            "namespaces": self.namespaces,
            "data_dir": self.root / name,
        }
        return await self.start(name, run_origin, OriginConfig(**usual | settings))

    async def start_tracker(self) -> Role:
        role = await self.start("tracker", run_tracker, TrackerConfig(rpc=LISTEN, admin=LISTEN))
        self._learn(trackers=(role.address("rpc"),))
        return role

    async def start_agent(
        self, name: str = "agent", *, push: bool = False, peer_port: int = 0, **store: Any
    ) -> Role:
        settings = AgentConfig(
            registry=AgentRegistryConfig(listen=ANY, push=push),
            peer=PeerListenerConfig(listen=Address("127.0.0.1", peer_port)),
            admin=LISTEN,
            data_dir=self.root / name,
            tag_freshness=Duration(0.0),
            store=StoreConfig(**store),
        )
        return await self.start(name, run_agent, settings)

    def backend_file(self, digest: Digest) -> Path:
        return DirectoryBackend(self.root / "backend")._path(blob_key(digest))

    async def request(self, method: str, role: str, path: str, **options: Any) -> httpx.Response:
        url = f"http://{self.roles[role].address('registry')}{path}"
        return await self.client.request(method, url, **options)

    async def get(self, role: str, path: str, **options: Any) -> httpx.Response:
        return await self.request("GET", role, path, **options)

    async def push_blob(self, role: str, repository: str, content: bytes) -> httpx.Response:
        begun = await self.request("POST", role, f"/v2/{repository}/blobs/uploads/")
        if begun.status_code != 202:
            return begun
        location = httpx.URL(f"http://{self.roles[role].address('registry')}").join(
            begun.headers["location"]
        )
        url = location.copy_merge_params({"digest": str(Digest.of(content))})
        return await self.client.put(url, content=content)

    async def push_manifest(
        self, role: str, repository: str, tag: str, manifest: bytes
    ) -> httpx.Response:
        return await self.request(
            "PUT",
            role,
            f"/v2/{repository}/manifests/{tag}",
            content=manifest,
            headers={"Content-Type": MANIFEST_TYPE},
        )

    async def push_image(self, role: str, repository: str, config: bytes, layer: bytes) -> bytes:
        for blob in (config, layer):
            reply = await self.push_blob(role, repository, blob)
            assert reply.status_code == 201, reply.text
        manifest = manifest_of(config, layer)
        reply = await self.push_manifest(role, repository, "v1", manifest)
        assert reply.status_code == 201, reply.text
        return manifest

    async def metric(self, role: str, name: str) -> float:
        """The value of a metric, with its labels if it has any."""
        reply = await self.client.get(f"http://{self.roles[role].address('admin')}/metrics")
        values = dict(line.rsplit(" ", 1) for line in reply.text.splitlines() if line[0] != "#")
        return float(values[f"swarmpull_{name}"])

    async def written_back(self, role: str = "origin") -> None:
        """Wait until the backend has all that an origin has accepted."""
        while await self.metric(role, "write_back_queue_blobs"):  # noqa: ASYNC110 - of a role's admin port
            await trio.sleep(0.01)

    async def counted(self, role: str, name: str, count: float) -> None:
        """Wait until a counter has come so far."""
        while await self.metric(role, name) < count:  # noqa: ASYNC110
            await trio.sleep(0.01)

    async def status(self, role: str) -> dict[str, Any]:
        reply = await self.client.get(f"http://{self.roles[role].address('admin')}/status")
        return reply.json()


@asynccontextmanager
async def cluster_under(root: Path, *, drain_timeout: float = 5.0) -> AsyncIterator[Cluster]:
    """No role runs yet."""
    config = Config(
        cluster=ClusterConfig(),
        drain_timeout=drain_timeout,  # type: ignore[arg-type]
    )
    client = partial(httpx.AsyncClient, timeout=120.0)
    with trio.fail_after(DEADLINE):
        async with (
            open_rpc_pool() as pool,
            client() as http,
            trio.open_nursery() as nursery,
        ):
            yield Cluster(root, nursery, pool, http, config)
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def whole_cluster(root: Path) -> AsyncIterator[Cluster]:
    """Index, origin and tracker run; agents are the test's."""
    async with cluster_under(root) as cluster:
        await cluster.start_index()
        await cluster.start_origin()
        await cluster.start_tracker()
        yield cluster
