"""The origin: a dedicated seeder in front of the backend, and where pushes end up."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Final

import structlog
import trio

from swarmpull.config import ClusterConfig, Config, OriginConfig
from swarmpull.digest import Digest
from swarmpull.errors import BackendUnavailable, ManifestInvalid, ProtocolError
from swarmpull.registry.app import create_registry_app
from swarmpull.registry.manifests import (
    MANIFEST_BYTES_MAX,
    Manifest,
    parse_manifest,
    under_digest,
)
from swarmpull.registry.names import UpstreamNames, is_repository
from swarmpull.registry.service import BlobReader, StoredManifest, Terms
from swarmpull.ring.membership import Membership
from swarmpull.ring.repair import ABSENT, NOT_QUEUED, WRITTEN
from swarmpull.roles.addresses import RoleAddresses
from swarmpull.roles.backend_watch import BackendWatch
from swarmpull.roles.cluster import IndexClient
from swarmpull.roles.cold_blobs import ColdBlobs
from swarmpull.roles.config_changes import ConfigChanges
from swarmpull.roles.foreign_pools import ForeignPools
from swarmpull.roles.hand_over import HandOvers
from swarmpull.roles.hash_log import HashPolls, complete_growth
from swarmpull.roles.origin_backends import open_backends
from swarmpull.roles.origin_content import OriginContent
from swarmpull.roles.origin_upstreams import UpstreamManifests
from swarmpull.roles.repair import BATCH, Repair
from swarmpull.roles.replication import Replication
from swarmpull.roles.repositories import Repositories, upstream_names
from swarmpull.roles.ring_client import RingClient, open_ring
from swarmpull.roles.ring_metrics import RingMetrics
from swarmpull.roles.role_store import open_role_store
from swarmpull.roles.security import open_tls, peer_tls
from swarmpull.roles.serving import serve_role
from swarmpull.roles.stored_manifests import store_manifest
from swarmpull.roles.swarm_host import SwarmHost, open_swarm_host
from swarmpull.roles.swarm_status import swarm_status, unreachable
from swarmpull.roles.write_back import WriteBack
from swarmpull.store.blobs import BlobStore
from swarmpull.store.holds import Pin
from swarmpull.store.tags import open_tags
from swarmpull.store.uploads import UploadStore
from swarmpull.store.write_back_queue import open_write_back_queue
from swarmpull.store.write_back_schedule import QueuedBlob
from swarmpull.swarm.peers import PeerContact, PeerKind
from swarmpull.telemetry import Metrics
from swarmpull.wire import api
from swarmpull.wire.api import Descriptor
from swarmpull.wire.preheat_api import GET_MANIFEST
from swarmpull.wire.rpc import RpcContext, RpcPool, RpcService, open_rpc_pool
from swarmpull.wire.tls import Tls

log = structlog.get_logger()

# How long one call about a copy may wait, in seconds, and the last place in a ring that has a meaning.
REPLICATION_WAIT_MAX: Final = 10.0
RANK_MAX: Final = 100
# Calls that wait for piece hashes, of all blobs: of trackers and other origins one for each blob.
HASH_POLLS_MAX: Final = 1000


class OriginRegistry(Repositories):
    """The registry of an origin; implements `swarmpull.registry.service.RegistryService`."""

    def __init__(
        self,
        content: OriginContent,
        write_back: WriteBack,
        index: IndexClient,
        upstreams: UpstreamManifests,
        names: UpstreamNames,
    ) -> None:
        super().__init__(index, names)
        self._content = content
        self._write_back = write_back
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
        async with self._content.open(digest, namespace) as reader:
            yield reader

    async def _namespace(self, repository: str | None, digest: Digest, upstream: str | None) -> str:
        """Where a blob is looked for.  Raises BlobNotFound when the repository does not have it."""
        foreign = self._names.select(repository, upstream)
        if foreign is not None:
            return foreign
        await self.check_membership(repository, digest)
        return repository or ""

    async def accept_blob(self, repository: str | None, digest: Digest) -> None:
        with self._content.store.hold(digest, Pin.NOT_WRITTEN_BACK):
            await self._write_back.accept(digest, repository or "")
        if repository is not None:
            await self._index.link_blob(repository, digest)

    async def mount_blob(self, repository: str, digest: Digest, source: str | None) -> bool:
        """Make a blob of another repository part of this one; between two backends it is copied."""
        try:
            if source is None or not await self._index.has_blob(source, digest):
                return False
        except BackendUnavailable:
            return False  # nobody can tell just now: the client sends it
        if not self._content.namespaces.share_backend(source, repository):
            with self._content.store.hold(digest, Pin.NOT_WRITTEN_BACK):
                await self._content.ensure_local(digest, source)
                await self._write_back.accept(digest, repository)
        await self._index.link_blob(repository, digest)
        return True

    async def put_manifest(
        self, repository: str, reference: str, manifest: Manifest, terms: Terms
    ) -> None:
        """Check what it refers to, accept its bytes, and only then let the index know it."""
        self.check_push(repository)
        await self._check_references(repository, manifest)
        with self._content.store.hold(manifest.digest, Pin.NOT_WRITTEN_BACK):
            await store_manifest(self._content.store, manifest.digest, manifest.content)
            await self._write_back.accept(manifest.digest, repository)
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
                stamp=terms.stamp,
                by=terms.by,
                expect=terms.expect if is_tag else None,
            )
        )
        log.info(
            "manifest_accepted",
            repository=repository,
            reference=reference,
            digest=str(manifest.digest),
        )

    async def is_here(self, repository: str, digest: Digest, length: int) -> bool:
        """Make a blob that this origin, or its backend, has part of a repository; False if neither has it."""
        self.check_push(repository)
        if self._content.store.has(digest):
            await self.accept_blob(repository, digest)
            return True
        try:
            if not await self._content.is_in_backend(digest, repository, length):
                return False
        except BackendUnavailable:
            # Whatever it has cannot be known now; what is accepted will be compared with it later.
            return False
        await self._index.link_blob(repository, digest)
        return True

    async def _check_references(self, repository: str, manifest: Manifest) -> None:
        """Raises ManifestReferencesMissing.

        While the index cannot tell, since its backend is down, what is here becomes part of the repository.
        """
        try:
            await self._index.check_references(
                repository, blobs=manifest.blobs, manifests=manifest.manifests
            )
        except BackendUnavailable:
            for digest in manifest.blobs:
                await self._content.stat(digest, repository)
                await self._index.link_blob(repository, digest)

    async def delete_blob(self, repository: str, digest: Digest) -> None:
        """Take a blob out of a repository; its bytes stay for the other repositories."""
        await self._index.unlink_blob(repository, digest)


class OriginCalls:
    """The RPC methods of an origin."""

    def __init__(
        self,
        content: OriginContent,
        write_back: WriteBack,
        registry: OriginRegistry,
        upstreams: UpstreamManifests,
        host: SwarmHost,
        hand_overs: HandOvers,
    ) -> None:
        self._content = content
        self._hand_overs = hand_overs
        self._write_back = write_back
        self._registry = registry
        self._upstreams = upstreams
        self._host = host
        self._polls = HashPolls(HASH_POLLS_MAX)

    def service(self) -> RpcService:
        service = RpcService()
        service.register(api.STAT_BLOB, self.stat_blob)
        service.register(api.GET_METAINFO, self.get_metainfo)
        service.register(api.HASHES_OF_ORIGIN, self.hashes)
        service.register(api.URGE, self.urge)
        service.register(api.PEERS_OF_ORIGIN, self.peers)
        service.register(api.ADOPT_BLOB, self.adopt_blob)
        service.register(api.REPLICATE_BLOB, self.replicate_blob)
        service.register(api.HELD_BLOB, self.held_blob)
        service.register(api.QUEUED, self.queued)
        service.register(api.PUT_MANIFEST, self.put_manifest)
        service.register(api.OFFER_BLOB, self.offer_blob)
        service.register(api.HAND_OVER, self.hand_over)
        service.register(api.READ_MANIFEST, self.read_manifest)
        service.register(api.MOUNT_BLOB, self.mount_blob)
        service.register(api.RESOLVE_UPSTREAM, self.resolve_upstream)
        service.register(api.GET_UPSTREAM_MANIFEST, self.get_upstream_manifest)
        service.register(GET_MANIFEST, self.get_manifest)
        return service

    async def stat_blob(self, request: api.BlobRequest, _context: RpcContext) -> api.BlobStatReply:
        _check_namespace(request.namespace)
        return api.BlobStatReply(await self._content.stat(request.digest, request.namespace))

    async def get_metainfo(
        self, request: api.BlobRequest, context: RpcContext
    ) -> api.MetainfoReply:
        """Begin to get the blob to the disk, seed it from then on, and say so."""
        _check_namespace(request.namespace)
        digest = request.digest
        with self._content.store.hold(digest, Pin.SENDING):
            if not request.growing:
                await self._content.ensure_local(digest, request.namespace, decide=request.decide)
            download = await self._content.cold.begin(
                digest, request.namespace, decide=request.decide
            )
            if download is not None:
                growth = download.hashes.since("", 0)
                return api.MetainfoReply(None, self._contact(context), growth=growth)
            metainfo, content = await self._content.store.read_small(digest, api.INLINE_BYTES_MAX)
            self._host.seed(metainfo, request.namespace)
        return api.MetainfoReply(metainfo, self._contact(context), content)

    async def _read_whole(self, digest: Digest) -> bytes:
        with self._content.store.open(digest) as handle:
            return await handle.read_at(0, handle.length) if handle.length else b""

    async def hashes(self, request: api.HashesRequest, _context: RpcContext) -> api.Growth:
        """Answer when more piece hashes are known than the caller has; a blob that is not here is got."""
        _check_namespace(request.namespace)
        digest = request.digest
        if request.source:
            self._content.cold.check_followed(digest, request.namespace)
        with self._content.store.hold(digest, Pin.SENDING):
            download = await self._content.cold.begin(
                digest, request.namespace, decide=request.decide
            )
            if download is not None:
                return await self._polls.answer(download.hashes, request)
            return complete_growth(await self._content.store.metainfo(digest), request)

    async def urge(self, request: api.UrgeRequest, _context: RpcContext) -> api.Empty:
        """Fetch some pieces of a blob first, if it is being fetched."""
        self._content.cold.urge(request.digest, request.indices)
        return api.Empty()

    async def peers(self, request: api.PeersRequest, _context: RpcContext) -> api.PeersReply:
        """Who is connected for a blob, for an agent that no tracker answers."""
        return api.PeersReply(self._host.neighbours(request.digest))

    async def end_polls(self, drain: trio.Event) -> None:
        """Answer all calls that wait for hashes once ``drain`` is set: they would hold it up."""
        await drain.wait()
        self._polls.end()

    async def adopt_blob(self, request: api.AdoptRequest, context: RpcContext) -> api.Empty:
        """Fetch a blob from the agent that took the push, and accept it."""
        digest = request.metainfo.digest
        _check_namespace(request.namespace)
        self._content.namespaces.check_push(request.namespace)
        with self._content.store.hold(digest, Pin.NOT_WRITTEN_BACK):
            # Not from the backend, even if it has the blob: it may be down, and the agent is there.
            source = request.source.seen_at(context.remote_host)
            await self._host.adopt(
                request.metainfo, request.namespace, source, proven=context.is_foreign
            )
            await self._registry.accept_blob(request.namespace or None, digest)
        return api.Empty()

    async def replicate_blob(
        self, request: api.ReplicateRequest, context: RpcContext
    ) -> api.ReplicateReply:
        """Keep a copy of a blob that another origin accepts; or say how far that is."""
        digest = request.metainfo.digest
        _check_namespace(request.namespace)
        if request.source.peer_id == self._host.contact.peer_id:
            return api.ReplicateReply(stored=False, itself=True)
        with trio.move_on_after(_sane(request.seconds)):
            await self._write_back.keep_copy(
                request.metainfo,
                request.namespace,
                request.source.seen_at(context.remote_host),
                max(1, min(request.rank, RANK_MAX)),
            )
            return api.ReplicateReply(stored=True)
        download = self._host.downloading(digest)
        pieces = download.partial.have.bit_count() if download else 0
        return api.ReplicateReply(stored=False, received=pieces * request.metainfo.piece_length)

    async def held_blob(self, request: api.HeldRequest, context: RpcContext) -> api.HeldReply:
        """Whether the disk has a blob, whatever the backend has; a peer that asks for it gets it."""
        metainfo = await self._content.store.metainfo(request.digest)
        rank = self._write_back.rank((request.digest, request.namespace))
        return api.HeldReply(metainfo, self._contact(context), rank)

    async def queued(self, request: api.QueuedRequest, _context: RpcContext) -> api.QueuedReply:
        """What this origin has of the blobs that another one has queued."""
        if request.peer_id == self._host.contact.peer_id:
            return api.QueuedReply(itself=True)
        blobs = request.blobs[:BATCH]
        return api.QueuedReply(tuple(self._rank(each) for each in blobs))

    def _rank(self, blob: api.BlobOfRepository) -> int:
        key = (blob.digest, blob.namespace)
        is_here, rank = self._content.store.has(blob.digest), self._write_back.rank(key)
        if rank is not None and is_here:
            return rank
        if rank is None and self._write_back.has_written(key):
            return WRITTEN
        return NOT_QUEUED if is_here else ABSENT

    def _contact(self, context: RpcContext) -> PeerContact:
        """Where this origin seeds, as its caller can dial it."""
        return self._host.contact.seen_at(context.local_host)

    async def put_manifest(
        self, request: api.PutManifestRequest, _context: RpcContext
    ) -> api.PutManifestReply:
        manifest = await trio.to_thread.run_sync(
            parse_manifest, request.content, request.media_type
        )
        if ":" in request.reference:
            manifest = under_digest(manifest, Digest.parse(request.reference))
        terms = Terms(request.by, request.expect, request.stamp)
        await self._registry.put_manifest(request.repository, request.reference, manifest, terms)
        return api.PutManifestReply(manifest.digest, manifest.subject)

    async def read_manifest(
        self, request: api.BlobRequest, _context: RpcContext
    ) -> api.ManifestReply:
        """The bytes of a manifest, whatever is in them."""
        _check_namespace(request.namespace)
        with self._content.store.hold(request.digest, Pin.READING):
            length = await self._content.stat(request.digest, request.namespace)
            if length > MANIFEST_BYTES_MAX:
                reason = f"{request.digest} has {length} bytes, {MANIFEST_BYTES_MAX} are allowed"
                raise ManifestInvalid(reason)
            await self._content.ensure_local(request.digest, request.namespace)
            return api.ManifestReply(await self._read_whole(request.digest))

    async def offer_blob(self, request: api.OfferRequest, context: RpcContext) -> api.OfferReply:
        """Whether this origin has to fetch a blob to have it in a repository."""
        _check_namespace(request.namespace)
        is_here = await self._registry.is_here(request.namespace, request.digest, request.length)
        contact, speaks_tls = self._contact(context), self._host.speaks_tls
        return api.OfferReply(not is_here, contact, tls=speaks_tls)

    async def hand_over(
        self, request: api.HandOverRequest, _context: RpcContext
    ) -> api.HandOverReply:
        """Have an origin of another cluster adopt a blob, or say how far that is."""
        _check_namespace(request.namespace)
        return await self._hand_overs.hand_over(request)

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

    async def get_manifest(
        self, request: api.ReferenceRequest, _context: RpcContext
    ) -> api.UpstreamManifestReply:
        """A manifest of whatever repository."""
        _check_namespace(request.repository)
        found = await self._registry.get_manifest(
            request.repository, request.reference, upstream=None
        )
        return api.UpstreamManifestReply(found.descriptor, found.content)


def _sane(seconds: float) -> float:
    # Written so that NaN becomes the most.
    return seconds if 0 <= seconds <= REPLICATION_WAIT_MAX else REPLICATION_WAIT_MAX


def _blobs_on_disk(store: BlobStore, settings: OriginConfig) -> list[QueuedBlob]:
    """What a queue that is new begins with; blocking.

    Everything in the store: what was acknowledged and not written is among it.  Nothing where repositories
    have backends of their own, for nobody knows any more which of them a blob belongs to.
    """
    now = time.time()
    blobs = [
        QueuedBlob(stat.digest, stat.length, "", now, next_at=now, is_found=True)
        for stat in list(store.list())
    ]
    queued = [] if settings.namespaces else blobs
    if blobs:
        log.warning("write_back_queue_new", on_disk=len(blobs), queued=len(queued))
    return queued


def _check_namespace(namespace: str) -> None:
    """Raise ProtocolError for what peers could not be told, and no index would take."""
    if namespace and not is_repository(namespace):
        raise ProtocolError(f"{namespace[:80]!r} is not a repository name")


def _rings(
    pool: RpcPool, cluster: ClusterConfig, changes: ConfigChanges | None
) -> tuple[Membership, Membership]:
    """The indexes and the origins, as the configuration has them from time to time."""
    weights = cluster.weights_by_member()
    indexes = open_ring(pool, cluster.indexes, "index", weights)
    origins = open_ring(pool, cluster.origins, "origin", weights)
    if changes is not None:
        changes.follow(origins=origins, indexes=indexes)
    return indexes, origins


def _swarm_of(
    store: BlobStore, settings: OriginConfig, config: Config, metrics: Metrics, tls: Tls | None
) -> AbstractAsyncContextManager[SwarmHost]:
    return open_swarm_host(
        store,
        PeerKind.ORIGIN,
        settings.peer,
        config.swarm,
        metrics,
        tls=peer_tls(tls, config.tls),
    )


async def run_origin(
    config: Config,
    settings: OriginConfig,
    *,
    drain: trio.Event,
    changes: ConfigChanges | None = None,
    task_status: trio.TaskStatus[RoleAddresses] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until ``drain`` is set and what is under way has ended.

    Raises:
        StartupError: a listener, the data directory or the backend cannot be had.
    """
    metrics = Metrics()
    async with (
        open_tls("origin", config.tls, metrics) as tls,
        open_backends(settings, config.upstreams) as backends,
        open_role_store("origin", settings.data_dir, settings.store, metrics) as store,
        open_write_back_queue(
            store.root, store.name, partial(_blobs_on_disk, store, settings)
        ) as queue,
        open_tags(settings.data_dir / "upstream-tags.sqlite") as tags,
        open_rpc_pool(tls=tls) as pool,
        _swarm_of(store, settings, config, metrics, tls) as host,
        trio.open_nursery() as nursery,
    ):
        indexes, origins = _rings(pool, config.cluster, changes)
        rings = RingMetrics(metrics)
        index = IndexClient(rings.show(RingClient(pool, indexes, "index")))
        replication = Replication(pool, origins, host, settings.replicas, metrics)
        cold = ColdBlobs(
            store,
            backends.namespaces,
            host,
            rings.show(RingClient(pool, origins)),
            nursery,
            metrics,
            fetch_connections=settings.fetch_connections,
            elsewhere=replication,
        )
        content = OriginContent(store, backends.namespaces, host, cold, nursery, metrics)
        write_back = WriteBack(queue, content, host, replication, metrics, settings.write_back)
        upstreams = UpstreamManifests(backends.upstreams, store, tags, nursery, metrics)
        repair = Repair(write_back, replication, store, origins, metrics, settings)
        watch = BackendWatch(backends.namespaces.own())
        # The janitor after the queue has pinned its blobs.
        for each in (store.janitor, write_back, repair, watch, indexes, origins):
            nursery.start_soon(each.run)
        host.recall, host.urge = cold.recall, cold.urge_for_readers
        registry = OriginRegistry(content, write_back, index, upstreams, upstream_names(config))
        hand_overs = HandOvers(content, host, ForeignPools(nursery, tls), nursery, metrics)
        calls = OriginCalls(content, write_back, registry, upstreams, host, hand_overs)
        nursery.start_soon(calls.end_polls, drain)
        await serve_role(
            "origin",
            settings,
            calls.service(),
            tls=tls,
            metrics=metrics,
            readiness=lambda: [*unreachable(indexes), *watch.reasons()],
            status=lambda: {**swarm_status(host), **write_back.status()},
            drain=drain,
            grace=config.drain_timeout,
            registry=create_registry_app(registry),
            rates=host.rates,
            bound={"peer": host.address},
            on_drain=host.drain,
            task_status=task_status,
        )
        nursery.cancel_scope.cancel()
