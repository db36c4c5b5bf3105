"""The origin: a dedicated seeder in front of the backend, and where pushes end up."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import attrs
import structlog
import trio

from swarmpull.config import Config, OriginConfig
from swarmpull.digest import Digest
from swarmpull.errors import BackendUnavailable, BlobNotFound, ProtocolError
from swarmpull.registry.app import create_registry_app
from swarmpull.registry.manifests import Manifest, parse_manifest, under_digest
from swarmpull.registry.names import UpstreamNames, is_repository
from swarmpull.registry.service import BlobReader, StoredManifest
from swarmpull.ring.membership import Membership
from swarmpull.roles.addresses import RoleAddresses
from swarmpull.roles.cluster import IndexClient, RingClient
from swarmpull.roles.origin_backends import open_backends
from swarmpull.roles.origin_content import OriginContent
from swarmpull.roles.origin_upstreams import UpstreamManifests
from swarmpull.roles.repositories import Repositories, upstream_names
from swarmpull.roles.role_store import open_role_store
from swarmpull.roles.serving import serve_role
from swarmpull.roles.stored_manifests import store_manifest
from swarmpull.roles.swarm_host import SwarmHost, open_swarm_host
from swarmpull.roles.swarm_status import swarm_status, unreachable
from swarmpull.store.holds import Pin
from swarmpull.store.tags import open_tags
from swarmpull.store.uploads import UploadStore
from swarmpull.swarm.peers import PeerKind
from swarmpull.telemetry import Metrics
from swarmpull.wire import api
from swarmpull.wire.api import Descriptor
from swarmpull.wire.rpc import RpcContext, RpcService, open_rpc_pool

log = structlog.get_logger()


class OriginRegistry(Repositories):
    """The registry of an origin; implements `swarmpull.registry.service.RegistryService`."""

    def __init__(
        self,
        content: OriginContent,
        index: IndexClient,
        upstreams: UpstreamManifests,
        names: UpstreamNames,
    ) -> None:
        super().__init__(index, names)
        self._content = content
        self._upstreams = upstreams

    @property
    def uploads(self) -> UploadStore | None:
        return self._content.store.uploads

    def check_push(self, repository: str) -> None:
        self._content.namespaces.check_push(repository)

    async def resolve(self, repository: str, reference: str, *, upstream: str | None) -> Descriptor:
        """Look up a tag or a digest.  Raises ManifestNotFound, RepositoryNotFound."""
        foreign = self._names.select(repository, upstream)
        if foreign is not None:
            return await self._upstreams.resolve(foreign, reference)
        return await self._index.resolve(repository, reference)

    async def get_manifest(
        self, repository: str, reference: str, *, upstream: str | None
    ) -> StoredManifest:
        foreign = self._names.select(repository, upstream)
        if foreign is not None:
            reply = await self._upstreams.get(foreign, reference)
            return StoredManifest(reply.descriptor, reply.content)
        descriptor = await self._index.resolve(repository, reference)
        with self._content.store.hold(descriptor.digest, Pin.READING):
            await self._content.ensure_local(descriptor.digest, repository)
            with self._content.store.open(descriptor.digest) as handle:
                content = await handle.read_at(0, handle.length)
        return StoredManifest(descriptor, content)

    async def stat_blob(
        self, repository: str | None, digest: Digest, *, upstream: str | None
    ) -> int:
        namespace = await self._namespace(repository, digest, upstream)
        return await self._content.stat(digest, namespace)

    @asynccontextmanager
    async def open_blob(
        self, repository: str | None, digest: Digest, *, upstream: str | None
    ) -> AsyncIterator[BlobReader]:
        namespace = await self._namespace(repository, digest, upstream)
        # Held from before it comes, so that it cannot go before it is opened.
        with self._content.store.hold(digest, Pin.READING):
            await self._content.ensure_local(digest, namespace)
            with self._content.store.open(digest) as handle:
                yield handle

    async def _namespace(self, repository: str | None, digest: Digest, upstream: str | None) -> str:
        """Where a blob is looked for.  Raises BlobNotFound when the repository does not have it."""
        foreign = self._names.select(repository, upstream)
        if foreign is not None:
            return foreign
        await self.check_membership(repository, digest)
        return repository or ""

    async def accept_blob(self, repository: str | None, digest: Digest) -> None:
        with self._content.store.hold(digest, Pin.NOT_WRITTEN_BACK):
            await self._content.make_durable(digest, repository or "")
        if repository is not None:
            await self._index.link_blob(repository, digest)

    async def mount_blob(self, repository: str, digest: Digest, source: str | None) -> bool:
        """Make a blob of another repository part of this one; between two backends it is copied."""
        if source is None or not await self._index.has_blob(source, digest):
            return False
        if not self._content.namespaces.share_backend(source, repository):
            with self._content.store.hold(digest, Pin.NOT_WRITTEN_BACK):
                await self._content.ensure_local(digest, source)
                await self._content.make_durable(digest, repository)
        await self._index.link_blob(repository, digest)
        return True

    async def put_manifest(self, repository: str, reference: str, manifest: Manifest) -> None:
        """Check what it refers to, make its bytes durable, and only then let the index know it."""
        self.check_push(repository)
        await self._index.check_references(
            repository, blobs=manifest.blobs, manifests=manifest.manifests
        )
        with self._content.store.hold(manifest.digest, Pin.NOT_WRITTEN_BACK):
            await store_manifest(self._content.store, manifest.digest, manifest.content)
            await self._content.make_durable(manifest.digest, repository)
        is_tag = (
            ":" not in reference
        )  # the grammar of tags has no colon, that of digests requires one
        await self._index.record_manifest(
            api.RecordManifestRequest(
                repository=repository,
                manifest=api.Descriptor(
                    digest=manifest.digest,
                    media_type=manifest.media_type,
                    length=len(manifest.content),
                    artifact_type=manifest.artifact_type,
                    annotations=manifest.annotations or None,
                ),
                tag=reference if is_tag else None,
                subject=manifest.subject,
                blobs=manifest.blobs,
                manifests=manifest.manifests,
            )
        )
        log.info(
            "manifest_accepted",
            repository=repository,
            reference=reference,
            digest=str(manifest.digest),
        )

    async def delete_blob(self, repository: str, digest: Digest) -> None:
        """Take a blob out of a repository; its bytes stay for the other repositories."""
        await self._index.unlink_blob(repository, digest)


class OriginCalls:
    """The RPC methods of an origin."""

    def __init__(
        self,
        content: OriginContent,
        registry: OriginRegistry,
        upstreams: UpstreamManifests,
        host: SwarmHost,
    ) -> None:
        self._content = content
        self._registry = registry
        self._upstreams = upstreams
        self._host = host

    def service(self) -> RpcService:
        service = RpcService()
        service.register(api.STAT_BLOB, self.stat_blob)
        service.register(api.GET_METAINFO, self.get_metainfo)
        service.register(api.ADOPT_BLOB, self.adopt_blob)
        service.register(api.PUT_MANIFEST, self.put_manifest)
        service.register(api.MOUNT_BLOB, self.mount_blob)
        service.register(api.RESOLVE_UPSTREAM, self.resolve_upstream)
        service.register(api.GET_UPSTREAM_MANIFEST, self.get_upstream_manifest)
        return service

    async def stat_blob(self, request: api.BlobRequest, _context: RpcContext) -> api.BlobStatReply:
        _check_namespace(request.namespace)
        return api.BlobStatReply(await self._content.stat(request.digest, request.namespace))

    async def get_metainfo(
        self, request: api.BlobRequest, context: RpcContext
    ) -> api.MetainfoReply:
        """Get the blob to the disk, seed it, and say so."""
        _check_namespace(request.namespace)
        with self._content.store.hold(request.digest, Pin.SENDING):
            metainfo = await self._content.metainfo(request.digest, request.namespace)
            self._host.seed(metainfo, request.namespace)
        contact = self._host.contact
        if not contact.host:
            contact = attrs.evolve(contact, host=context.local_host)
        return api.MetainfoReply(metainfo, contact)

    async def adopt_blob(self, request: api.AdoptRequest, context: RpcContext) -> api.Empty:
        """Fetch a blob from the agent that took the push, and make it durable."""
        digest = request.metainfo.digest
        _check_namespace(request.namespace)
        source = request.source
        if not source.host:
            source = attrs.evolve(source, host=context.remote_host)
        self._content.namespaces.check_push(request.namespace)
        with self._content.store.hold(digest, Pin.NOT_WRITTEN_BACK):
            try:
                await self._content.ensure_local(digest, request.namespace)
            except (BlobNotFound, BackendUnavailable) as error:
                if isinstance(error, BackendUnavailable) and not self._content.is_corrupt(
                    digest, request.namespace
                ):
                    raise
                await self._host.adopt(request.metainfo, request.namespace, source)
            await self._registry.accept_blob(request.namespace or None, digest)
        return api.Empty()

    async def put_manifest(
        self, request: api.PutManifestRequest, _context: RpcContext
    ) -> api.PutManifestReply:
        manifest = await trio.to_thread.run_sync(
            parse_manifest, request.content, request.media_type
        )
        if ":" in request.reference:
            manifest = under_digest(manifest, Digest.parse(request.reference))
        await self._registry.put_manifest(request.repository, request.reference, manifest)
        return api.PutManifestReply(manifest.digest, manifest.subject)

    async def mount_blob(self, request: api.MountRequest, _context: RpcContext) -> api.Found:
        self._registry.check_push(request.repository)
        return api.Found(
            await self._registry.mount_blob(request.repository, request.digest, request.source)
        )

    async def resolve_upstream(
        self, request: api.ReferenceRequest, _context: RpcContext
    ) -> Descriptor:
        _check_namespace(request.repository)
        return await self._upstreams.resolve(request.repository, request.reference)

    async def get_upstream_manifest(
        self, request: api.ReferenceRequest, _context: RpcContext
    ) -> api.UpstreamManifestReply:
        _check_namespace(request.repository)
        return await self._upstreams.get(request.repository, request.reference)


def _check_namespace(namespace: str) -> None:
    """Raise ProtocolError for what peers could not be told, and no index would take."""
    if namespace and not is_repository(namespace):
        raise ProtocolError(f"{namespace[:80]!r} is not a repository name")


async def run_origin(
    config: Config,
    settings: OriginConfig,
    *,
    drain: trio.Event,
    task_status: trio.TaskStatus[RoleAddresses] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until ``drain`` is set and what is under way has ended.

    Raises:
        StartupError: a listener, the data directory or the backend cannot be had.
    """
    metrics = Metrics()
    indexes = Membership(config.cluster.indexes, name="index")
    async with (
        open_backends(settings, config.upstreams) as backends,
        open_role_store("origin", settings.data_dir, settings.store, metrics) as store,
        open_tags(settings.data_dir / "upstream-tags.sqlite") as tags,
        open_rpc_pool() as pool,
        open_swarm_host(store, PeerKind.ORIGIN, settings.peer, config.swarm, metrics) as host,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(indexes.run)
        nursery.start_soon(store.janitor.run)
        index = IndexClient(RingClient(pool, indexes, "index"))
        content = OriginContent(store, backends.namespaces, nursery, metrics)
        upstreams = UpstreamManifests(backends.upstreams, store, tags, nursery, metrics)
        host.recall = content.ensure_local
        registry = OriginRegistry(content, index, upstreams, upstream_names(config))
        calls = OriginCalls(content, registry, upstreams, host)
        await serve_role(
            "origin",
            settings,
            calls.service(),
            metrics=metrics,
            readiness=partial(unreachable, indexes),
            status=partial(swarm_status, host),
            drain=drain,
            grace=config.drain_timeout,
            registry=create_registry_app(registry),
            rates=host.rates,
            bound={"peer": host.address},
            on_drain=host.drain,
            task_status=task_status,
        )
        nursery.cancel_scope.cancel()
