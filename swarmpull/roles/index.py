"""The index: which manifest a tag names, and what belongs to a repository.

All state is in the backend (`swarmpull.roles.catalog`), but for what other clusters were not told of yet
(`swarmpull.roles.replicator`), which another index has, too; an index that is lost is replaced by starting
another one.
"""

from __future__ import annotations

import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from math import inf
from typing import Any, Final, TypeVar

import attrs
import structlog
import trio

from swarmpull.config import ClusterConfig, Config, IndexConfig
from swarmpull.digest import Digest
from swarmpull.errors import BackendUnavailable, SwarmpullError
from swarmpull.registry.admin import QueueControl
from swarmpull.ring.membership import DNS_PREFIX, Membership
from swarmpull.roles.addresses import RoleAddresses
from swarmpull.roles.catalog import Catalog
from swarmpull.roles.cluster import OriginClient
from swarmpull.roles.config_changes import ConfigChanges
from swarmpull.roles.foreign_pools import ForeignPools
from swarmpull.roles.index_cache import ResolveCache
from swarmpull.roles.index_contact import Contact
from swarmpull.roles.index_journal import Journal, open_journal
from swarmpull.roles.index_outage import Outage
from swarmpull.roles.index_peers import IndexPeers
from swarmpull.roles.journal_control import JournalControl
from swarmpull.roles.pending_changes import PendingChanges
from swarmpull.roles.preheat import start_preheating
from swarmpull.roles.remotes import Remote, Rules
from swarmpull.roles.replicator import Replicator
from swarmpull.roles.ring_client import RingClient, open_ring
from swarmpull.roles.security import open_tls
from swarmpull.roles.serving import serve_role
from swarmpull.roles.standby import Standby
from swarmpull.roles.tag_copy import TagCopier, is_digest
from swarmpull.roles.unsettled_tags import UnsettledTags
from swarmpull.store.backends import open_backend
from swarmpull.store.backends.impatient import ImpatientBackend
from swarmpull.store.remote_queue import open_remote_queue
from swarmpull.telemetry import Metrics
from swarmpull.wire import api
from swarmpull.wire.api import Empty
from swarmpull.wire.rpc import Method, RpcContext, RpcPool, RpcService, open_rpc_pool
from swarmpull.wire.tls import Tls

log = structlog.get_logger()

Req = TypeVar("Req")
Rep = TypeVar("Rep")

# How often the backend is tried for the readiness, and how long it may take.
CHECK_INTERVAL: Final = 5.0
CHECK_TIMEOUT: Final = 10.0
# The same while it is down.
CHECK_INTERVAL_DOWN: Final = 1.0
# For one object, whatever timeouts and attempts its location has: less than callers wait for a lookup, so
# that it is the backend that they are told of, and this index does not look ill.
OBJECT_PATIENCE: Final = 8.0
# From a lookup in the page cache to a delete that walks over thousands of tags.
_BUCKETS: Final = (0.001, 0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 60.0)


class Index:
    """The answers of one index: what `swarmpull.wire.api` asks of a catalog."""

    def __init__(
        self,
        catalog: Catalog,
        cache: ResolveCache,
        peers: IndexPeers,
        watch: BackendWatch,
        journal: Journal,
        contact: Contact,
        outage: Outage,
        metrics: Metrics,
        origins: Membership,
        cluster: ClusterConfig,
    ) -> None:
        """``origins`` are those of ``cluster``, to be told to other clusters."""
        self._catalog = catalog
        self._cache = cache
        self._peers = peers
        self._watch = watch
        self._journal = journal
        self._contact = contact
        self._outage = outage
        self._origins = origins
        self._cluster = cluster
        self._requests = metrics.counter(
            "index_requests_total",
            "Requests by method, and by the class of the error or ok.",
            ["method", "result"],
        )
        self._seconds = metrics.histogram(
            "index_request_seconds", "Time to answer a request.", _BUCKETS, ["method"]
        )
        # Those that the cache answers; looking up labels takes as long as the rest.
        self._cached = self._requests.labels("resolve", "ok")
        self._cached_seconds = self._seconds.labels("resolve")

    def service(self) -> RpcService:
        """Every ``index.*`` method."""
        service = RpcService()
        self._register(service, api.RESOLVE, self._resolve, at_once=self._resolve_at_once)
        service.register(api.FORGET, self._forget, at_once=self._forget_at_once)
        self._register(service, api.KEEP_PENDING, self._keep_pending, among_indexes=True)
        self._register(service, api.DROP_PENDING, self._drop_pending, among_indexes=True)
        self._register(service, api.PENDING, self._pending, among_indexes=True)
        self._register(service, api.TAG_LOG, self._tag_log)
        self._register(service, api.CHECK_REFERENCES, self._check_references)
        self._register(service, api.RECORD_MANIFEST, self._record_manifest)
        self._register(service, api.DELETE_MANIFEST, self._delete_manifest)
        self._register(service, api.DELETE_TAG, self._delete_tag)
        self._register(service, api.LINK_BLOB, self._link_blob)
        self._register(service, api.UNLINK_BLOB, self._unlink_blob)
        self._register(service, api.HAS_BLOB, self._has_blob)
        self._register(service, api.LIST_TAGS, self._list_tags)
        self._register(service, api.LIST_REPOSITORIES, self._list_repositories)
        self._register(service, api.LIST_REFERRERS, self._list_referrers)
        self._register(service, api.DESCRIBE_CLUSTER, self._describe_cluster)
        return service

    def replicate(self, service: RpcService, replicator: Replicator) -> None:
        """Serve what indexes ask one another about replication."""

        async def keep(request: api.KeepChangesRequest, _: RpcContext) -> api.KeepChangesReply:
            return await replicator.keep(request)

        async def kept(request: api.ChangesKeptRequest, _: RpcContext) -> api.ChangesKeptReply:
            return replicator.kept(request)

        self._register(service, api.KEEP_CHANGES, keep, among_indexes=True)
        self._register(service, api.CHANGES_KEPT, kept, among_indexes=True)

    def _register(
        self,
        service: RpcService,
        method: Method[Req, Rep],
        answer: Callable[[Req, RpcContext], Awaitable[Rep]],
        *,
        at_once: Callable[[Req, RpcContext], bytes | None] | None = None,
        among_indexes: bool = False,
    ) -> None:
        """``among_indexes``: by these they find out what they have missed, before they answer all others."""
        name = method.name.removeprefix("index.")

        async def handle(request: Req, context: RpcContext) -> Rep:
            result = "cancelled"
            started_at = trio.current_time()
            try:
                if not (among_indexes or self._contact.holds):
                    await self._contact.renew()
                reply = await answer(request, context)
                result = "ok"
            except SwarmpullError as exc:
                result = type(exc).__name__
                if isinstance(exc, BackendUnavailable):
                    log.warning("index_backend_failed", method=name, reason=str(exc))
                raise
            finally:
                self._requests.labels(name, result).inc()
                self._seconds.labels(name).observe(trio.current_time() - started_at)
            return reply

        service.register(method, handle, at_once=at_once)

    async def _change(
        self, at_backend: Callable[[], Awaitable[None]], in_journal: Callable[[], Awaitable[None]]
    ) -> bool:
        """Make a change in the backend, or while that is down in the journal; True: in the backend."""
        if not self._watch.trouble:
            try:
                await at_backend()
            except BackendUnavailable:
                # It may be about this one object.
                await self._watch.look()
                if not self._watch.trouble:
                    raise
            else:
                return True
        await in_journal()
        return False

    async def _keep_pending(
        self, request: api.KeepPendingRequest, _: RpcContext
    ) -> api.PendingKept:
        return await self._journal.keep(request)

    async def _drop_pending(
        self, request: api.DropPendingRequest, _: RpcContext
    ) -> api.PendingDropped:
        return await self._journal.drop_pending(request)

    async def _pending(self, request: api.PendingRequest, _: RpcContext) -> api.PendingReply:
        return self._journal.pending(request)

    async def _resolve(self, request: api.ReferenceRequest, _: RpcContext) -> api.Descriptor:
        return await self._cache.resolve(
            request.repository, request.reference, self._catalog.resolve
        )

    def _resolve_at_once(self, request: api.ReferenceRequest, _: RpcContext) -> bytes | None:
        if not self._contact.holds:
            return None
        packed = self._cache.get(request.repository, request.reference)
        if packed is not None:
            self._cached.inc()
            self._cached_seconds.observe(0.0)
        return packed

    def _forget_at_once(self, request: api.ForgetRequest, _: RpcContext) -> api.ForgetReply | None:
        if request.manifest is not None or request.blob is not None:
            return None
        for reference in request.references if request.is_direct else ():
            self._catalog.pending.pass_by(request.repository, reference)
        return self._peers.forget(request)

    async def _forget(self, request: api.ForgetRequest, _: RpcContext) -> api.ForgetReply:
        if request.manifest is not None or request.blob is not None:
            await self._journal.drop(request)
        return self._peers.forget(request)

    async def _check_references(self, request: api.CheckReferencesRequest, _: RpcContext) -> Empty:
        await self._catalog.check_references(request.repository, request.blobs, request.manifests)
        return Empty()

    async def _tag_log(self, request: api.ReferenceRequest, _: RpcContext) -> api.TagLogReply:
        return await self._catalog.tag_log(request.repository, request.reference)

    async def _record_manifest(
        self, request: api.RecordManifestRequest, context: RpcContext
    ) -> Empty:
        request = attrs.evolve(request, by=request.by or _name_of(context))
        is_direct = await self._change(
            partial(self._catalog.record_manifest, request),
            partial(self._outage.record_manifest, request),
        )
        if request.tag is not None:
            # Also if nothing was changed: whoever did change it may have died before it told the others.
            await self._peers.spread(request.repository, (request.tag,), is_direct=is_direct)
        log.info(
            "manifest_recorded",
            repository=request.repository,
            tag=request.tag,
            digest=str(request.manifest.digest),
        )
        return Empty()

    async def _delete_manifest(self, request: api.DigestInRepository, context: RpcContext) -> Empty:
        by = _name_of(context)
        self._outage.check_written(request.repository, request.digest)
        drop = partial(self._peers.drop, request.repository, manifest=request.digest)
        await self._catalog.delete_manifest(
            request.repository, request.digest, by=by, recorded=drop
        )
        await self._peers.spread(request.repository)
        log.info("manifest_deleted", repository=request.repository, digest=str(request.digest))
        return Empty()

    async def _delete_tag(self, request: api.DeleteTagRequest, context: RpcContext) -> Empty:
        request = attrs.evolve(request, by=request.by or _name_of(context))
        if request.stamp is not None and is_digest(request.reference):
            await self._delete_referrer(request, request.stamp)
            return Empty()
        is_direct = await self._change(
            partial(self._catalog.delete_tag, request), partial(self._outage.delete_tag, request)
        )
        await self._peers.spread(request.repository, (request.reference,), is_direct=is_direct)
        log.info("tag_deleted", repository=request.repository, tag=request.reference)
        return Empty()

    async def _delete_referrer(self, request: api.DeleteTagRequest, stamp: api.Stamp) -> None:
        """Another cluster has deleted what refers to a manifest."""
        repository, digest = request.repository, Digest.parse(request.reference)
        self._outage.check_written(repository, digest)
        drop = partial(self._peers.drop, repository, manifest=digest, at=stamp.time)
        await self._catalog.delete_referrer(repository, digest, stamp, by=request.by, recorded=drop)
        await self._peers.spread(repository)
        log.info("referrer_deleted", repository=repository, digest=str(digest))

    async def _link_blob(self, request: api.DigestInRepository, _: RpcContext) -> Empty:
        await self._change(
            partial(self._catalog.link_blob, request.repository, request.digest),
            partial(self._outage.link_blob, request.repository, request.digest),
        )
        return Empty()

    async def _unlink_blob(self, request: api.DigestInRepository, _: RpcContext) -> Empty:
        self._outage.check_written(request.repository, request.digest)
        drop = partial(self._peers.drop, request.repository, blob=request.digest)
        await self._catalog.unlink_blob(request.repository, request.digest, recorded=drop)
        await self._peers.spread(request.repository, (str(request.digest),))
        log.info("blob_unlinked", repository=request.repository, digest=str(request.digest))
        return Empty()

    async def _has_blob(self, request: api.DigestInRepository, _: RpcContext) -> api.Found:
        return api.Found(await self._catalog.has_blob(request.repository, request.digest))

    async def _list_tags(self, request: api.ListRequest, _: RpcContext) -> api.ListReply:
        return await self._catalog.list_tags(request.repository, request.after, request.limit)

    async def _list_repositories(self, request: api.ListRequest, _: RpcContext) -> api.ListReply:
        return await self._catalog.list_repositories(request.after, request.limit)

    async def _list_referrers(
        self, request: api.DigestInRepository, _: RpcContext
    ) -> api.ReferrersReply:
        found = await self._catalog.list_referrers(request.repository, request.digest)
        return api.ReferrersReply(found)

    async def _describe_cluster(self, _: Empty, __: RpcContext) -> api.ClusterDescription:
        members, ill = self._origins.members, self._origins.unhealthy()
        healthy = tuple(each for each in members if each not in ill)
        return api.ClusterDescription(healthy or members, self._cluster.weights)


def _name_of(context: RpcContext) -> str:
    """Who asked, as the history of a tag has it."""
    host = context.remote_host
    return host if context.caller is None else f"{context.caller} at {host}"


@attrs.define(eq=False)
class BackendWatch:
    """Whether the backend answers, as of the last try; ``trouble`` is empty when it does.

    ``reason`` is the same without the name of the backend, ``since`` when that was found, in ns.
    """

    catalog: Catalog
    trouble: str = ""
    reason: str = ""
    since: int = 0
    _looking: trio.Lock = attrs.field(factory=trio.Lock, init=False)
    _looks: int = attrs.field(default=0, init=False)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Try it until cancelled; started after the first try."""
        await self.look()
        task_status.started()
        while True:
            await trio.sleep(min(CHECK_INTERVAL, CHECK_INTERVAL_DOWN if self.trouble else inf))
            await self.look()

    async def look(self) -> None:
        """Try it now; whoever waits for a look does not begin another one."""
        looks = self._looks
        async with self._looking:
            if self._looks > looks + 1:
                return  # one that began after the call
            await self._look()
            self._looks += 1

    async def _look(self) -> None:
        before, self.trouble = self.trouble, await self._try()
        if self.trouble and not before:
            self.since = time.time_ns()
            log.warning("index_backend_unavailable", reason=self.trouble)
        elif before and not self.trouble:
            log.info("index_backend_available")

    async def _try(self) -> str:
        try:
            with trio.fail_after(CHECK_TIMEOUT):
                await self.catalog.check_backend()
        except BackendUnavailable as exc:
            self.reason = exc.reason
            return str(exc)
        except trio.TooSlowError:
            self.reason = f"the backend has not answered for {CHECK_TIMEOUT:g} s"
            return self.reason
        self.reason = ""
        return ""


@asynccontextmanager
async def _open_replicator(
    config: Config,
    settings: IndexConfig,
    catalog: Catalog,
    origins: Membership,
    peers: IndexPeers,
    pool: RpcPool,
    tls: Tls | None,
    metrics: Metrics,
) -> AsyncIterator[Replicator | None]:
    """What replicates to other clusters, at work for the block; None when no rule wants that.

    Raises:
        StartupError: its queue cannot be used.
    """
    if not config.replications:
        yield None
        return
    async with (
        open_remote_queue(settings.data_dir, "index") as queue,
        trio.open_nursery() as nursery,
    ):
        pools = ForeignPools(nursery, tls)
        wanted = {rule.remote for rule in config.replications}
        replicator = Replicator(
            queue,
            Rules(config.replications),
            [Remote(each, pools.of(each.name)) for each in config.remotes if each.name in wanted],
            TagCopier(OriginClient(RingClient(pool, origins)), catalog),
            catalog,
            Standby(pool, peers, metrics),
            metrics,
        )
        catalog.tags.watchers.append(replicator)
        nursery.start_soon(replicator.run)
        yield replicator
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def _open_answers(
    config: Config,
    settings: IndexConfig,
    watch: BackendWatch,
    cache: ResolveCache,
    origins: Membership,
    indexes: Membership,
    pool: RpcPool,
    tls: Tls | None,
    metrics: Metrics,
) -> AsyncIterator[tuple[RpcService, Journal, Replicator | None]]:
    """The methods of an index; its journal, and what replicates, are at work for the block.

    Raises:
        StartupError: the journal or the queue cannot be used.
    """
    catalog = watch.catalog
    pending = catalog.pending
    peers = IndexPeers(pool, indexes, cache)
    async with (
        open_journal(settings.data_dir, pending, catalog, cache, peers, metrics) as journal,
        _open_replicator(
            config, settings, catalog, origins, peers, pool, tls, metrics
        ) as replicator,
        trio.open_nursery() as nursery,
    ):
        contact = Contact(journal, peers)
        await contact.ask_all()
        await journal.hand_out()
        nursery.start_soon(contact.run)
        nursery.start_soon(journal.run, lambda: bool(watch.trouble))
        outage = Outage(
            journal,
            pending,
            catalog.tags,
            catalog.backend_name,
            lambda: watch.reason,
            lambda: watch.since,
        )
        index = Index(
            catalog, cache, peers, watch, journal, contact, outage, metrics, origins, config.cluster
        )
        service = index.service()
        if replicator is not None:
            index.replicate(service, replicator)
        yield service, journal, replicator
        nursery.cancel_scope.cancel()


async def run_index(
    config: Config,
    settings: IndexConfig,
    *,
    drain: trio.Event,
    changes: ConfigChanges | None = None,
    task_status: trio.TaskStatus[RoleAddresses] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until ``drain`` is set and the requests under way have ended.

    Raises:
        StartupError: a listener cannot be bound, or the backend or the queue cannot be used at all.
    """
    metrics = Metrics()
    backend = await open_backend(settings.backend.url)
    guarded = ImpatientBackend(backend, OBJECT_PATIENCE, lambda: watch.reason)
    catalog = Catalog(
        guarded,
        _source(settings),
        settings.immutable,
        PendingChanges(),
        records_deletions=_has_others(config.cluster),
    )
    watch = BackendWatch(catalog)
    async with (
        open_tls("index", config.tls, metrics) as tls,
        open_rpc_pool(tls=tls) as pool,
        trio.open_nursery() as background,
    ):
        await background.start(watch.run)
        background.start_soon(UnsettledTags(guarded, catalog).run)
        weights = config.cluster.weights_by_member()
        origins = open_ring(pool, config.cluster.origins, "origin", weights)
        indexes = open_ring(pool, config.cluster.indexes, "index", weights)
        if changes is not None:
            changes.follow(origins=origins, indexes=indexes)
        background.start_soon(origins.run)
        # Before the first change: the others have to be told of it.
        await background.start(indexes.run)
        # Without knowing the others it can keep nothing that they may change.
        cache = ResolveCache(float(settings.lease) if config.cluster.indexes else 0.0)
        background.start_soon(_close_cache, cache, drain)
        background.start_soon(cache.run, catalog.resolve)
        async with _open_answers(
            config, settings, watch, cache, origins, indexes, pool, tls, metrics
        ) as (service, journal, replicator):
            preheating = start_preheating(
                config, settings, origins, pool, drain, metrics, background
            )
            preheating.register(service)
            await serve_role(
                "index",
                settings,
                service,
                tls=tls,
                metrics=metrics,
                readiness=lambda: [watch.trouble] if watch.trouble else [],
                status=lambda: {
                    **_status(watch, cache, journal),
                    "preheating": preheating.status(),
                },
                more={"api": preheating.app()},
                drain=drain,
                grace=config.drain_timeout,
                queues=_queues(journal, replicator),
                task_status=task_status,
            )
        background.cancel_scope.cancel()


def _has_others(cluster: ClusterConfig) -> bool:
    """Whether there may be journals of other indexes."""
    return len(cluster.indexes) > 1 or any(each.startswith(DNS_PREFIX) for each in cluster.indexes)


def _source(settings: IndexConfig) -> str:
    """What names this index in the stamps of tags."""
    return settings.name or f"{socket.gethostname()}:{settings.rpc.listen.port}"


async def _close_cache(cache: ResolveCache, drain: trio.Event) -> None:
    """Whoever drains is soon not told any more of what others change."""
    await drain.wait()
    cache.close()


def _queues(journal: Journal, replicator: Replicator | None) -> dict[str, QueueControl]:
    found: dict[str, QueueControl] = {"journal": JournalControl(journal)}
    if replicator is not None:
        found["replication"] = replicator
    return found


def _status(watch: BackendWatch, cache: ResolveCache, journal: Journal) -> dict[str, Any]:
    return {
        "backend": {
            "url": watch.catalog.backend_name,
            "available": not watch.trouble,
            "trouble": watch.trouble,
            "conditional_puts": watch.catalog.conditional,
        },
        "journal": journal.status(),
        "cache": {
            "lease": cache.lease,
            "entries": len(cache),
            "bytes": cache.size,
            "hits": cache.hits,
            "misses": cache.misses,
        },
    }
