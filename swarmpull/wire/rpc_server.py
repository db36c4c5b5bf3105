"""The serving end of RPC: who comes in, until when it is served, and how it drains."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import Any

import trio

from swarmpull.wire.listen import open_listeners, serve_connections, set_keepalive
from swarmpull.wire.rpc_connections import ServedConnections
from swarmpull.wire.rpc_link import RpcLimits
from swarmpull.wire.rpc_memory import RpcMemory
from swarmpull.wire.rpc_messages import RpcBye, RpcByeReason, pack
from swarmpull.wire.rpc_service import RpcService
from swarmpull.wire.tls import Entrance, Tls


async def serve_rpc(
    service: RpcService,
    host: str,
    port: int,
    *,
    limits: RpcLimits | None = None,
    memory: RpcMemory[Any] | None = None,
    tls: Tls | None = None,
    drain: trio.Event | None = None,
    grace: float = 5.0,
    task_status: trio.TaskStatus[tuple[str, int]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until cancelled, or until ``drain`` is set and the connections have ended.

    Args:
        service: the methods.
        host: address to listen on.
        port: 0 takes a free one.
        limits: of connections, requests and frames.
        memory: where it can be seen what the connections have kept; with a limit of its own.
        tls: callers must show a certificate that allows what they call; None serves everybody, in plain.
        drain: once set, no connection is accepted any more and each client gets BYE draining: it sends
            new calls elsewhere and closes when the calls under way are answered.
        grace: seconds that draining may take; what is not done then is cancelled.
        task_status: is started with the bound ``(host, port)``.

    Raises:
        StartupError: the port is in use, not permitted, or the host is not of this machine.
    """
    limits = limits or RpcLimits()
    listeners = await open_listeners(host, port)
    bound: tuple[str, int] = listeners[0].socket.getsockname()[:2]
    entrance = Entrance(tls, _say_untrusted, listener="rpc")
    memory = memory or RpcMemory(limits.memory_bytes_max)
    connections = ServedConnections(service, limits, entrance, memory)

    async def handle(stream: trio.SocketStream) -> None:
        with connections.arriving():
            with suppress(OSError):  # the next use of a lost connection says so
                set_keepalive(stream, dead_after=limits.dead_after)
            admitted = await entrance.admit(stream)
            if admitted is not None:
                connections.add(*admitted)

    async with trio.open_nursery() as handlers, trio.open_nursery() as accepting:
        await handlers.start(connections.run)
        await accepting.start(
            partial(
                serve_connections,
                listeners,
                handle,
                connections_max=limits.connections_max,
                refuse=partial(_refuse, entrance),
                handler_nursery=handlers,
                kept=connections.__len__,
            )
        )
        task_status.started(bound)
        if drain is None:
            await trio.sleep_forever()
        else:
            await drain.wait()
        accepting.cancel_scope.cancel()
        handlers.cancel_scope.deadline = trio.current_time() + grace
        connections.drain()


async def _refuse(entrance: Entrance, stream: trio.SocketStream) -> None:
    await entrance.dismiss(stream, pack(RpcBye(RpcByeReason.BUSY, "too many connections")))


async def _say_untrusted(stream: trio.abc.SendStream, reason: str) -> None:
    await stream.send_all(pack(RpcBye(RpcByeReason.UNTRUSTED, reason)))
