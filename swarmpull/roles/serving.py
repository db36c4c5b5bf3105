"""The listeners of a role, from the moment it can serve until it has drained."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import Any, Final, cast

import attrs
import structlog
import trio

from swarmpull.config import AgentConfig, IndexConfig, OriginConfig, TrackerConfig
from swarmpull.registry.admin import QueueControl, RateControl, create_admin_app
from swarmpull.registry.asgi import AsgiApp
from swarmpull.registry.server import serve_http
from swarmpull.roles.addresses import RoleAddresses
from swarmpull.roles.security import open_listener_security
from swarmpull.telemetry import Metrics
from swarmpull.wire import api
from swarmpull.wire.listen import format_address
from swarmpull.wire.rpc import RpcContext, RpcLimits, RpcService, serve_rpc
from swarmpull.wire.rpc_memory import RpcMemory
from swarmpull.wire.tls import Tls

log = structlog.get_logger()

# Of the time to drain, what requests have before the rest is ended: peers want to be told goodbye, too.
REQUESTS_SHARE: Final = 0.8
# For a page of the admin listener that is under way at the very end, in seconds.
ADMIN_GRACE: Final = 0.5


async def serve_role(
    role: str,
    settings: AgentConfig | OriginConfig | TrackerConfig | IndexConfig,
    service: RpcService | None,
    *,
    tls: Tls | None = None,
    metrics: Metrics,
    readiness: Callable[[], Sequence[str]],
    status: Callable[[], Mapping[str, object]],
    drain: trio.Event,
    grace: float,
    registry: AsgiApp | None = None,
    more: Mapping[str, AsgiApp] | None = None,
    rates: RateControl | None = None,
    queues: Mapping[str, QueueControl] | None = None,
    bound: Mapping[str, str] | None = None,
    on_drain: Callable[[], Awaitable[None]] | None = None,
    task_status: trio.TaskStatus[RoleAddresses] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until ``drain`` is set and what is under way has ended, or ``grace`` seconds later.

    The admin listener stays to the end, so that it can be seen how a drain goes on.

    Args:
        role: its name.
        settings: with the addresses to bind.
        service, tls: the RPC methods, if the role has any, and how callers are known; None: in plain.
        readiness: the reasons why the role is not ready; while draining it is not in any case.
        status: for the admin listener; gets role, ready and reasons added.
        drain: once set, nothing new is accepted.
        grace: seconds that requests under way, and then ``on_drain``, have together.
        registry: the registry application, if the role has one.
        more: further applications by the section of ``settings`` with their listener.
        metrics, rates, queues: for the admin listener, the latter two if the role has any.
        bound: listeners that the role has bound itself, to be reported with the others.
        on_drain: called when the requests under way have ended, which may need what this ends.
        task_status: started when everything is bound.

    Raises:
        StartupError: a listener cannot be bound.
    """
    servers: dict[str, Callable[..., Awaitable[None]]] = {}
    deadline = _Deadline(drain, grace)
    servers_grace = grace if on_drain is None else grace * REQUESTS_SHARE
    over = trio.Event()
    async with AsyncExitStack() as files:
        for name, app in {"registry": registry, **(more or {})}.items():
            if app is not None:
                servers[name] = await _http(files, role, settings, name, app)
        if service is not None:
            service.register(api.PING, _answer_ping, at_once=_pong)
            servers["rpc"] = partial(serve_rpc, service, memory=_rpc_memory(metrics), tls=tls)
        pages = _admin_app(role, metrics, readiness, status, drain, rates, queues)
        admin, listen = await _http(files, role, settings, "admin", pages), settings.admin.listen
        to_the_end = await files.enter_async_context(trio.open_nursery())
        at = await to_the_end.start(
            partial(admin, listen.host, listen.port, drain=over, grace=ADMIN_GRACE)
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(deadline.watch)
            addresses = dict(bound or {})
            for name, serve in servers.items():
                listen = _section(settings, name).listen
                start = partial(serve, listen.host, listen.port, drain=drain, grace=servers_grace)
                addresses[name] = format_address(*await nursery.start(start))
            addresses["admin"] = format_address(*at)
            task_status.started(RoleAddresses(role, addresses))
        if on_drain is not None:
            await deadline.keep(on_drain, role)
        over.set()


def _rpc_memory(metrics: Metrics) -> RpcMemory[Any]:
    memory = RpcMemory[Any](RpcLimits().memory_bytes_max)
    metrics.gauge(
        "rpc_server_memory_bytes",
        "Frames in part, requests under way and replies that clients do not read, of all connections.",
    ).set_function(lambda: memory.bytes)
    metrics.gauge(
        "rpc_server_memory_ended",
        "Connections that were ended because all together had more kept than may be.",
    ).set_function(lambda: memory.ended)
    return memory


def _admin_app(
    role: str,
    metrics: Metrics,
    readiness: Callable[[], Sequence[str]],
    status: Callable[[], Mapping[str, object]],
    drain: trio.Event,
    rates: RateControl | None,
    queues: Mapping[str, QueueControl] | None,
) -> AsgiApp:
    def reasons() -> list[str]:
        return [*(["the role is draining"] if drain.is_set() else []), *readiness()]

    def full_status() -> Mapping[str, object]:
        found = reasons()
        return {"role": role, "ready": not found, "reasons": found, **status()}

    app = create_admin_app(
        readiness=reasons,
        metrics=metrics.render,
        status=full_status,
        rates=rates,
        queues=queues or {},
    )
    return cast("AsgiApp", app)


async def _http(
    files: AsyncExitStack, role: str, settings: object, name: str, app: AsgiApp
) -> Callable[..., Awaitable[None]]:
    """What serves a listener for HTTP, with its certificate and its passwords if it has any."""
    security = await files.enter_async_context(
        open_listener_security(f"{role}.{name}", _section(settings, name))
    )
    return partial(serve_http, security.protect(app), https=security.certificate)


@attrs.define
class _Deadline:
    """When a drain is over; known once it has begun."""

    drain: trio.Event
    grace: float
    at: float = math.inf

    async def watch(self) -> None:
        await self.drain.wait()
        self.at = trio.current_time() + self.grace

    async def keep(self, on_drain: Callable[[], Awaitable[None]], role: str) -> None:
        """Let what is left end; cut it short when the time is over."""
        with trio.move_on_at(self.at) as scope:
            await on_drain()
        if scope.cancelled_caught:
            log.warning("drain_cut_short", role=role, grace=self.grace)


def _pong(_: api.Empty, __: RpcContext) -> api.Empty:
    return api.Empty()


async def _answer_ping(request: api.Empty, context: RpcContext) -> api.Empty:
    return _pong(request, context)


def _section(settings: object, name: str) -> Any:  # noqa: ANN401 - the roles' sections differ
    return getattr(settings, name)
