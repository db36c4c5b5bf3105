"""An HTTP listener: the one place that knows hypercorn."""

from __future__ import annotations

import logging
import os
import socket
from contextlib import suppress
from typing import Final

import attrs
import trio
from hypercorn.config import Config, Sockets
from hypercorn.trio import serve, tcp_server

from swarmpull.registry.asgi import AsgiApp
from swarmpull.wire.listen import BACKLOG, open_listeners

# hypercorn logs every listener at INFO, which the role that opens it does as well; what remains are faults.
_server_logger: Final = logging.getLogger("swarmpull.registry.hypercorn")
_server_logger.setLevel(logging.WARNING)

# hypercorn reads 64 KiB at a time and takes some 130 us for each; with 256 KiB a body arrives at 1 GB/s instead
# of 0.5.  Its queue of ten of them is what one upload holds in memory.
RECEIVE_BYTES: Final = 256 << 10
tcp_server.MAX_RECV = RECEIVE_BYTES

_Address = tuple[object, ...]


@attrs.frozen(kw_only=True)
class HttpLimits:
    """Bounds of one HTTP listener.

    Attributes:
        head_bytes: request line and headers together; more gets 431.  stargz asks for some thousand
            ranges in one header.
        keep_alive_timeout: seconds that a connection may wait for its next request to be there.
        stalled_timeout: seconds after which a client that takes nothing of what was sent is cut off.
            CRI gives up a pull without progress after as long.
    """

    head_bytes: int = 128 << 10
    keep_alive_timeout: float = 75.0
    stalled_timeout: float = 300.0


class _Config(Config):
    """hypercorn's configuration, for sockets that listen already.

    Every limit is set, since the defaults are made for web pages: 5 s of keep-alive, 1000 requests on a
    connection.
    """

    def __init__(self, sockets: list[socket.socket], grace: float, limits: HttpLimits) -> None:
        self._listening = sockets
        self.accesslog = None
        self.errorlog = _server_logger
        self.include_server_header = False
        self.backlog = BACKLOG
        self.graceful_timeout = grace
        self.h11_max_incomplete_size = limits.head_bytes
        self.keep_alive_timeout = limits.keep_alive_timeout
        self.keep_alive_max_requests = 1 << 62
        self.max_requests = None
        # It would run while a response is sent, too, and cut every long download.
        self.read_timeout = None

    def create_sockets(self) -> Sockets:
        return Sockets([], self._listening, [])


async def serve_http(
    app: AsgiApp,
    host: str,
    port: int,
    *,
    drain: trio.Event,
    grace: float,
    limits: HttpLimits | None = None,
    task_status: trio.TaskStatus[tuple[str, int]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve an ASGI application over HTTP/1.1 until drained; started with the bound (host, port).

    When cancelled, it cuts all connections.

    Args:
        app: what answers; it takes part in the lifespan protocol.
        host: address or name to listen on.
        port: 0 for any that is free.
        drain: once set, no connection is accepted, idle ones are closed, requests under way may end.
        grace: the seconds that they have for it; then they are cut.
        limits: bounds of this listener.

    Raises:
        StartupError: the address cannot be used.
    """
    limits = limits or HttpLimits()
    sockets = [
        socket.socket(fileno=listener.socket.detach())
        for listener in await open_listeners(host, port)
    ]
    addresses: list[_Address] = [sock.getsockname() for sock in sockets]
    for sock in sockets:
        # Accepted connections inherit it.
        timeout = round(limits.stalled_timeout * 1000)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, timeout)
    started = _Started((str(addresses[0][0]), sockets[0].getsockname()[1]), task_status)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_cut_when_late, addresses, drain, grace)
            config = _Config(sockets, grace, limits)
            await serve(app, config, shutdown_trigger=drain.wait, task_status=started, mode="asgi")  # type: ignore[arg-type]
            nursery.cancel_scope.cancel()
    finally:
        for sock in sockets:
            sock.close()


@attrs.frozen
class _Started:
    """Reports our address where hypercorn reports its URLs."""

    address: tuple[str, int]
    task_status: trio.TaskStatus[tuple[str, int]]

    def started(self, urls: list[str]) -> None:
        del urls
        self.task_status.started(self.address)


async def _cut_when_late(addresses: list[_Address], drain: trio.Event, grace: float) -> None:
    """Cut what is left of the connections when their time is over, or when this is cancelled.

    hypercorn shields its sends from cancellation, so a client that does not read would hold up the end for
    ever.  Its connections are out of reach; their descriptors are not.
    """
    try:
        await drain.wait()
        await trio.sleep(grace)
    finally:
        _cut_connections(addresses)


def _cut_connections(addresses: list[_Address]) -> None:
    for name in os.listdir("/proc/self/fd"):
        # Other threads close descriptors meanwhile, and a socket that listens has no peer.
        with suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                _cut_connection(os.dup(int(name)), addresses)


def _cut_connection(descriptor: int, addresses: list[_Address]) -> None:
    with socket.socket(fileno=descriptor) as connection:
        connection.getpeername()
        if _belongs(connection.getsockname(), addresses):
            connection.shutdown(socket.SHUT_RDWR)


def _belongs(local: _Address, addresses: list[_Address]) -> bool:
    return any(
        local[1] == address[1] and address[0] in (local[0], "0.0.0.0", "::")
        for address in addresses
        if len(local) == len(address)
    )
