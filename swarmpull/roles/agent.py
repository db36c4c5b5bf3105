"""The agent: answers this host's container runtime as a registry, and gets blobs through the swarm."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial

import structlog
import trio

from swarmpull.config import AgentConfig, Config
from swarmpull.digest import Digest
from swarmpull.errors import (
    BlobNotFound,
    PushRefused,
    StoreFull,
    StoreUnavailable,
)
from swarmpull.registry.app import create_registry_app
from swarmpull.registry.asgi import AsgiApp
from swarmpull.registry.manifests import Manifest
from swarmpull.registry.names import UpstreamNames
from swarmpull.registry.service import BlobReader, StoredManifest, Terms
from swarmpull.roles.addresses import RoleAddresses
from swarmpull.roles.agent_preheat import AgentPreheating
from swarmpull.roles.agent_runtime import open_runtime
from swarmpull.roles.agent_tags import AgentTags
from swarmpull.roles.blob_finder import BlobFinder
from swarmpull.roles.cluster import Cluster, IndexClient, OriginClient
from swarmpull.roles.config_changes import ConfigChanges
from swarmpull.roles.repositories import Repositories, upstream_names
from swarmpull.roles.ring_metrics import RingMetrics
from swarmpull.roles.role_store import open_role_store
from swarmpull.roles.security import open_tls, peer_tls
from swarmpull.roles.serving import serve_role
from swarmpull.roles.stored_manifests import store_manifest, stored_manifest
from swarmpull.roles.swarm_host import SwarmHost, open_swarm_host
from swarmpull.roles.swarm_status import swarm_status, unreachable
from swarmpull.store.blobs import BlobStore
from swarmpull.store.holds import Pin
from swarmpull.store.tags import open_tags
from swarmpull.store.uploads import UploadStore
from swarmpull.swarm.peers import PeerKind
from swarmpull.telemetry import Metrics
from swarmpull.wire.api import Descriptor
from swarmpull.wire.rpc import open_rpc_pool
from swarmpull.wire.tls import Tls

log = structlog.get_logger()


class AgentRegistry(Repositories):
    """The registry of an agent; implements `swarmpull.registry.service.RegistryService`.

    An agent that only pulls answers for any digest that the cluster has: content is its own proof.  One
    that takes pushes keeps to what belongs to a repository, as an origin does, because clients decide by
    that what they need to push.
    """

    def __init__(
        self,
        store: BlobStore,
        host: SwarmHost,
        index: IndexClient,
        origins: OriginClient,
        finder: BlobFinder,
        names: UpstreamNames,
        tags: AgentTags,
        *,
        push: bool,
    ) -> None:
        super().__init__(index, names)
        self._tags = tags
        self._store = store
        self._host = host
        self._origins = origins
        self._finder = finder
        self._push = push

    @property
    def uploads(self) -> UploadStore | None:
        return self._store.uploads if self._push else None

    def check_push(self, repository: str) -> None:
        """Refuse what belongs to an upstream; origins know which other repositories they keep."""
        if self._names.select(repository, None) is not None:
            raise PushRefused(
                f"repository {repository} is of an upstream, which is only pulled from"
            )

    async def resolve(self, repository: str, reference: str, *, upstream: str | None) -> Descriptor:
        """Look up a tag or a digest.  Raises ManifestNotFound, RepositoryNotFound."""
        foreign = self._names.select(repository, upstream)
        if foreign is None:
            return await self._tags.resolve(repository, reference)
        known = await self._known(reference)
        if known is not None:
            return known.descriptor
        return await self._origins.resolve_upstream(foreign, reference)

    async def get_manifest(
        self, repository: str, reference: str, *, upstream: str | None
    ) -> StoredManifest:
        foreign = self._names.select(repository, upstream)
        if foreign is not None:
            return await self._get_foreign(foreign, reference)
        descriptor = await self._tags.resolve(repository, reference)
        async with self._open(repository, descriptor.digest) as reader:
            content = bytearray()
            while len(content) < reader.length:
                content += await reader.read_at(len(content), reader.length - len(content))
        return StoredManifest(descriptor, bytes(content))

    async def _get_foreign(self, repository: str, reference: str) -> StoredManifest:
        """A manifest of an upstream: small, and always the same under its digest, so it is kept here."""
        known = await self._known(reference)
        if known is not None:
            return known
        reply = await self._origins.get_upstream_manifest(repository, reference)
        await store_manifest(self._store, reply.descriptor.digest, reply.content)
        return StoredManifest(reply.descriptor, reply.content)

    async def _known(self, reference: str) -> StoredManifest | None:
        return (
            await stored_manifest(self._store, Digest.parse(reference))
            if ":" in reference
            else None
        )

    async def stat_blob(
        self, repository: str | None, digest: Digest, *, upstream: str | None
    ) -> int:
        namespace = await self._namespace(repository, digest, upstream)
        download = self._host.downloading(digest)
        if download is not None:
            return download.metainfo.length
        try:
            return self._store.stat(digest).length
        except BlobNotFound:
            return await self._origins.stat_blob(digest, namespace)

    @asynccontextmanager
    async def open_blob(
        self, repository: str | None, digest: Digest, *, upstream: str | None
    ) -> AsyncIterator[BlobReader]:
        namespace = await self._namespace(repository, digest, upstream)
        async with self._open(namespace, digest) as reader:
            yield reader

    async def _namespace(self, repository: str | None, digest: Digest, upstream: str | None) -> str:
        """Where a blob is looked for.  Raises BlobNotFound when the repository does not have it."""
        foreign = self._names.select(repository, upstream)
        if foreign is not None:
            return foreign
        if self._push:
            await self.check_membership(repository, digest)
        return repository or ""

    async def mount_blob(self, repository: str, digest: Digest, source: str | None) -> bool:
        """Leave it to an origin, which knows whether the two repositories have one backend."""
        return source is not None and await self._origins.mount_blob(repository, digest, source)

    async def accept_blob(self, repository: str | None, digest: Digest) -> None:
        """Seed a blob that was pushed here, and have an origin fetch and accept it.

        Until then nobody else has it, so it must stay.  Every other blob of an agent came through an
        origin, and is in the backend or pinned on origins.
        """
        with self._store.hold(digest, Pin.NOT_WRITTEN_BACK):
            metainfo = await self._store.metainfo(digest)
            self._host.seed(metainfo, repository or "")
            await self._origins.adopt_blob(metainfo, repository or "", self._host.contact)

    async def put_manifest(
        self, repository: str, reference: str, manifest: Manifest, terms: Terms
    ) -> None:
        await self._origins.put_manifest(
            repository,
            reference,
            manifest.media_type,
            manifest.content,
            by=terms.by,
            expect=terms.expect,
        )
        await self._tags.changed(repository, reference)

    async def delete_tag(self, repository: str, tag: str, terms: Terms) -> None:
        await super().delete_tag(repository, tag, terms)
        await self._tags.changed(repository, tag)

    async def delete_blob(self, repository: str, digest: Digest) -> None:
        await self._index.unlink_blob(repository, digest)

    # --- for preheating -----------------------------------------------------------------------

    async def keep_manifest(self, repository: str, digest: Digest) -> None:
        """Have a manifest on the disk, as a pull has it."""
        await self.get_manifest(repository, str(digest), upstream=None)

    async def keep_blob(self, repository: str, digest: Digest) -> None:
        """Have a blob on the disk."""
        while not self._store.has(digest):
            finder = self._finder
            download = await self._host.download(digest, repository, finder.find, finder.follow)
            # Somebody reads it, so it goes on.
            reader = download.reader()
            try:
                await download.wait()
            finally:
                if reader is not None:
                    reader.close()

    def received(self, digest: Digest) -> int:
        """Bytes of a blob that are on the disk."""
        download = self._host.downloading(digest)
        if download is not None:
            return download.partial.have.bit_count() * download.metainfo.piece_length
        return self._store.stat(digest).length if self._store.has(digest) else 0

    @asynccontextmanager
    async def _open(self, namespace: str, digest: Digest) -> AsyncIterator[BlobReader]:
        """A blob of this host's store, or one on its way into it."""
        while not self._store.has(digest):
            finder = self._finder
            download = await self._host.download(digest, namespace, finder.find, finder.follow)
            reader = download.reader()
            if reader is not None:
                try:
                    yield reader
                finally:
                    reader.close()
                return
            await download.wait()
        with self._store.open(digest) as handle:
            yield handle


async def seed_cache(store: BlobStore, host: SwarmHost) -> None:
    """Offer everything in the store to peers, as after a restart."""
    seeded = 0
    try:
        for stat in store.list():
            seeded += await _seed(stat.digest, store, host)
    except StoreUnavailable as error:
        log.warning("cache_not_listed", reason=str(error))
    if seeded:
        log.info("cache_seeded", blobs=seeded)


async def _seed(digest: Digest, store: BlobStore, host: SwarmHost) -> bool:
    with store.hold(digest, Pin.READING):
        try:
            metainfo = await store.metainfo(digest)
        except (BlobNotFound, StoreFull, StoreUnavailable) as error:
            log.warning("blob_not_seeded", digest=str(digest), reason=str(error))
            return False
        host.seed(metainfo, "")
    return True


def _swarm_of(
    store: BlobStore,
    cluster: Cluster,
    finder: BlobFinder,
    settings: AgentConfig,
    config: Config,
    metrics: Metrics,
    tls: Tls | None,
) -> AbstractAsyncContextManager[SwarmHost]:
    return open_swarm_host(
        store,
        PeerKind.AGENT,
        settings.peer,
        config.swarm,
        metrics,
        announce=finder.announce,
        announce_held=cluster.tracker.announce_held,
        watch=cluster.tracker.watch,
        unread_timeout=settings.unread_timeout,
        tls=peer_tls(tls, config.tls),
    )


def _mirror(registry: AgentRegistry, stands_for: str) -> dict[str, AsgiApp]:
    """The listener that stands for an upstream, if there is to be one."""
    if not stands_for:
        return {}
    return {"mirror": create_registry_app(registry, stands_for=stands_for)}


async def run_agent(
    config: Config,
    settings: AgentConfig,
    *,
    drain: trio.Event,
    changes: ConfigChanges | None = None,
    task_status: trio.TaskStatus[RoleAddresses] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until ``drain`` is set and what is under way has ended.

    Raises:
        StartupError: a listener or the data directory cannot be had.
    """
    metrics = Metrics()
    async with (
        open_tls("agent", config.tls, metrics) as tls,
        open_rpc_pool(tls=tls) as pool,
    ):
        cluster = Cluster(pool, config.cluster, changes)
        finder = BlobFinder(cluster.tracker, cluster.origin)
        RingMetrics(metrics).show_all(cluster.rings)
        async with (
            open_role_store("agent", settings.data_dir, settings.store, metrics) as store,
            open_tags(settings.data_dir / "tags.sqlite") as tags,
            _swarm_of(store, cluster, finder, settings, config, metrics, tls) as host,
            trio.open_nursery() as nursery,
        ):
            cluster.tracker.on_lost = host.tracker_lost
            cluster.tracker.give_metainfo(store.metainfo)
            await nursery.start(cluster.run)
            nursery.start_soon(store.janitor.run)
            nursery.start_soon(seed_cache, store, host)
            host.urge = cluster.origin.urge
            registry = AgentRegistry(
                store,
                host,
                cluster.index,
                cluster.origin,
                finder,
                upstream_names(config),
                AgentTags(cluster.index, tags, store, settings.tag_freshness, metrics),
                push=settings.registry.push,
            )
            if settings.preheat:
                members = cluster.indexes.members
                runtime = open_runtime(
                    config, settings.runtime, str(settings.registry.listen.local())
                )
                preheating = AgentPreheating(
                    registry, host.contact, members, pool, metrics, runtime
                )
                nursery.start_soon(preheating.run, drain)
            await serve_role(
                "agent",
                settings,
                None,
                metrics=metrics,
                readiness=partial(unreachable, *(ring.members for ring in cluster.rings)),
                status=partial(swarm_status, host),
                drain=drain,
                grace=config.drain_timeout,
                registry=create_registry_app(registry),
                more=_mirror(registry, settings.mirror.registry),
                rates=host.rates,
                bound={"peer": host.address},
                on_drain=host.drain,
                task_status=task_status,
            )
            nursery.cancel_scope.cancel()
