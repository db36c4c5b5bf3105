"""The index: which manifest a tag names, and what belongs to a repository.

All state is in the backend (`swarmpull.roles.catalog`); an index that is lost is replaced by starting
another one.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final, TypeVar

import attrs
import structlog
import trio

from swarmpull.config import Config, IndexConfig
from swarmpull.errors import BackendUnavailable, SwarmpullError
from swarmpull.roles.addresses import RoleAddresses
from swarmpull.roles.catalog import Catalog
from swarmpull.roles.config_changes import ConfigChanges
from swarmpull.roles.security import open_tls
from swarmpull.roles.serving import serve_role
from swarmpull.store.backends import open_backend
from swarmpull.store.backends.impatient import ImpatientBackend
from swarmpull.telemetry import Metrics
from swarmpull.wire import api
from swarmpull.wire.api import Empty
from swarmpull.wire.rpc import Method, RpcContext, RpcService

log = structlog.get_logger()

Req = TypeVar("Req")
Rep = TypeVar("Rep")

# How often the backend is tried for the readiness, and how long it may take.
CHECK_INTERVAL: Final = 5.0
CHECK_TIMEOUT: Final = 10.0
# For one object, whatever timeouts and attempts its location has: less than callers wait for a lookup, so
# that it is the backend that they are told of, and this index does not look ill.
OBJECT_PATIENCE: Final = 8.0
# From a lookup in the page cache to a delete that walks over thousands of tags.
_BUCKETS: Final = (0.001, 0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 60.0)


class Index:
    """The answers of one index: what `swarmpull.wire.api` asks of a catalog."""

    def __init__(self, catalog: Catalog, metrics: Metrics) -> None:
        self._catalog = catalog
        self._requests = metrics.counter(
            "index_requests_total",
            "Requests by method, and by the class of the error or ok.",
            ["method", "result"],
        )
        self._seconds = metrics.histogram(
            "index_request_seconds", "Time to answer a request.", _BUCKETS, ["method"]
        )

    def service(self) -> RpcService:
        """Every ``index.*`` method."""
        service = RpcService()
        self._register(service, api.RESOLVE, self._resolve)
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
        return service

    def _register(
        self,
        service: RpcService,
        method: Method[Req, Rep],
        answer: Callable[[Req, RpcContext], Awaitable[Rep]],
    ) -> None:
        name = method.name.removeprefix("index.")

        async def handle(request: Req, context: RpcContext) -> Rep:
            result = "cancelled"
            started_at = trio.current_time()
            try:
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

        service.register(method, handle)

    async def _resolve(self, request: api.ReferenceRequest, _: RpcContext) -> api.Descriptor:
        return await self._catalog.resolve(request.repository, request.reference)

    async def _check_references(self, request: api.CheckReferencesRequest, _: RpcContext) -> Empty:
        await self._catalog.check_references(request.repository, request.blobs, request.manifests)
        return Empty()

    async def _tag_log(self, request: api.ReferenceRequest, _: RpcContext) -> api.TagLogReply:
        return await self._catalog.tag_log(request.repository, request.reference)

    async def _record_manifest(
        self, request: api.RecordManifestRequest, context: RpcContext
    ) -> Empty:
        request = attrs.evolve(request, by=request.by or _name_of(context))
        await self._catalog.record_manifest(request)
        log.info(
            "manifest_recorded",
            repository=request.repository,
            tag=request.tag,
            digest=str(request.manifest.digest),
        )
        return Empty()

    async def _delete_manifest(self, request: api.DigestInRepository, context: RpcContext) -> Empty:
        by = _name_of(context)
        await self._catalog.delete_manifest(request.repository, request.digest, by=by)
        log.info("manifest_deleted", repository=request.repository, digest=str(request.digest))
        return Empty()

    async def _delete_tag(self, request: api.DeleteTagRequest, context: RpcContext) -> Empty:
        request = attrs.evolve(request, by=request.by or _name_of(context))
        await self._catalog.delete_tag(request)
        log.info("tag_deleted", repository=request.repository, tag=request.reference)
        return Empty()

    async def _link_blob(self, request: api.DigestInRepository, _: RpcContext) -> Empty:
        await self._catalog.link_blob(request.repository, request.digest)
        return Empty()

    async def _unlink_blob(self, request: api.DigestInRepository, _: RpcContext) -> Empty:
        await self._catalog.unlink_blob(request.repository, request.digest)
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


def _name_of(context: RpcContext) -> str:
    """Who asked, as the history of a tag has it."""
    host = context.remote_host
    return host if context.caller is None else f"{context.caller} at {host}"


@attrs.define(eq=False)
class BackendWatch:
    """Whether the backend answers, as of the last try; ``trouble`` is empty when it does."""

    catalog: Catalog
    trouble: str = ""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Try it until cancelled; started after the first try."""
        await self._look()
        task_status.started()
        while True:
            await trio.sleep(CHECK_INTERVAL)
            await self._look()

    async def _look(self) -> None:
        before, self.trouble = self.trouble, await self._try()
        if self.trouble and not before:
            log.warning("index_backend_unavailable", reason=self.trouble)
        elif before and not self.trouble:
            log.info("index_backend_available")

    async def _try(self) -> str:
        try:
            with trio.fail_after(CHECK_TIMEOUT):
                await self.catalog.check_backend()
        except BackendUnavailable as exc:
            return str(exc)
        except trio.TooSlowError:
            return f"the backend has not answered for {CHECK_TIMEOUT:g} s"
        return ""


async def run_index(
    config: Config,
    settings: IndexConfig,
    *,
    drain: trio.Event,
    changes: ConfigChanges | None = None,  # noqa: ARG001 - an index calls nobody
    task_status: trio.TaskStatus[RoleAddresses] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until ``drain`` is set and the requests under way have ended.

    Raises:
        StartupError: a listener cannot be bound, or the backend cannot be used at all.
    """
    metrics = Metrics()
    backend = await open_backend(settings.backend.url)
    catalog = Catalog(
        ImpatientBackend(backend, OBJECT_PATIENCE), _source(settings), settings.immutable
    )
    watch = BackendWatch(catalog)
    async with (
        open_tls("index", config.tls, metrics) as tls,
        trio.open_nursery() as background,
    ):
        await background.start(watch.run)
        await serve_role(
            "index",
            settings,
            Index(catalog, metrics).service(),
            tls=tls,
            metrics=metrics,
            readiness=lambda: [watch.trouble] if watch.trouble else [],
            status=partial(_status, watch),
            drain=drain,
            grace=config.drain_timeout,
            task_status=task_status,
        )
        background.cancel_scope.cancel()


def _source(settings: IndexConfig) -> str:
    """What names this index in the stamps of tags."""
    return settings.name or f"{socket.gethostname()}:{settings.rpc.listen.port}"


def _status(watch: BackendWatch) -> dict[str, Any]:
    return {
        "backend": {
            "url": watch.catalog.backend_name,
            "available": not watch.trouble,
            "trouble": watch.trouble,
            "conditional_puts": watch.catalog.conditional,
        },
    }
