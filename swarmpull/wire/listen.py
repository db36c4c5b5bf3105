"""Listening sockets with a cap on connections, and addresses as text."""

from __future__ import annotations

import contextlib
import errno
import math
import socket
from collections.abc import Awaitable, Callable
from typing import Final

import structlog
import trio

from swarmpull.errors import StartupError

log = structlog.get_logger()

# Connections that are being told "busy" at the same time; beyond it they are closed without a word.
REFUSALS_MAX: Final = 64
REFUSAL_TIMEOUT: Final = 2.0
# The kernel cuts this to net.core.somaxconn (4096 since Linux 5.4); a flash crowd dials at once.
BACKLOG: Final = 4096


def parse_address(text: str) -> tuple[str, int]:
    """Split ``host:port`` or ``[v6 address]:port``.

    Raises:
        ValueError: anything else; the message says what is expected.
    """
    host, colon, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if bracketed:
        host = host[1:-1]
    numeric = port.isascii() and port.isdigit() and len(port) <= 5 and int(port) <= 65535
    if not (colon and host and numeric) or bracketed != (":" in host):
        raise ValueError(f"{text!r} is not an address: expected host:port or [IPv6 address]:port")
    return host, int(port)


def format_address(host: str, port: int) -> str:
    """The text form that `parse_address` reads."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


async def open_listeners(host: str, port: int) -> list[trio.SocketListener]:
    """Listen on every address that ``host`` has; port 0 takes a free port, the same one for all.

    Raises:
        StartupError: the port is in use or not permitted, or the host is not one of this machine.
    """
    listeners: list[trio.SocketListener] = []
    try:
        for family, (ip, _, *scope) in await _resolve(host, port):
            chosen = listeners[0].socket.getsockname()[1] if listeners else port
            listeners.append(await _listen(family, (ip, chosen, *scope)))
    except OSError as error:
        for listener in listeners:
            await listener.aclose()
        raise _cannot_listen(host, port, error) from error
    return listeners


async def _resolve(host: str, port: int) -> list[tuple[int, tuple[object, ...]]]:
    found = await trio.socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    return list(dict.fromkeys((family, tuple(address)) for family, _, _, _, address in found))


async def _listen(family: int, address: tuple[object, ...]) -> trio.SocketListener:
    sock = trio.socket.socket(family, socket.SOCK_STREAM)
    try:
        # A restarted role must get its port back while old connections are in TIME_WAIT.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        await sock.bind(address)
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return trio.SocketListener(sock)


def _cannot_listen(host: str, port: int, error: OSError) -> StartupError:
    if isinstance(error, socket.gaierror):
        remedy = "listen on an address or name of this machine"
    elif error.errno == errno.EADDRINUSE:
        remedy = "stop the process that has the port, or configure another port"
    elif error.errno in (errno.EACCES, errno.EPERM):
        remedy = "ports below 1024 need a privilege: configure a higher port"
    elif error.errno == errno.EADDRNOTAVAIL:
        remedy = "no interface of this machine has that address: listen on one that it has"
    else:
        remedy = "configure another address"
    problem = error.strerror or str(error)
    return StartupError(f"cannot listen on {format_address(host, port)} ({problem})", remedy)


async def serve_connections(
    listeners: list[trio.SocketListener],
    handler: Callable[[trio.SocketStream], Awaitable[object]],
    *,
    connections_max: int,
    refuse: Callable[[trio.SocketStream], Awaitable[object]],
    handler_nursery: trio.Nursery | None = None,
    kept: Callable[[], int] = lambda: 0,
    task_status: trio.TaskStatus[list[trio.SocketListener]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Accept connections for ever, ``connections_max`` at a time.

    Further ones are given to ``refuse``, which may send a last message and has REFUSAL_TIMEOUT seconds
    for it; they are closed afterwards.  An exception of ``handler`` other than the connection's own
    errors is a bug and ends this function.  The listeners are closed on the way out.

    ``kept`` says how many connections stay open although ``handler`` has returned, having taken the socket
    out of its stream.
    """
    active = 0
    refusing = 0

    async def handle(stream: trio.SocketStream) -> None:
        nonlocal active, refusing
        if active + kept() < connections_max:
            active += 1
            try:
                await handler(stream)
            finally:
                active -= 1
                await trio.aclose_forcefully(stream)
            return
        log.warning("connection_refused", reason="busy", connections_max=connections_max)
        refusing += 1
        try:
            if refusing <= REFUSALS_MAX:
                await _refuse(stream, refuse)
        finally:
            refusing -= 1
            await trio.aclose_forcefully(stream)

    await trio.serve_listeners(
        handle, listeners, handler_nursery=handler_nursery, task_status=task_status
    )


async def _refuse(
    stream: trio.SocketStream, refuse: Callable[[trio.SocketStream], Awaitable[object]]
) -> None:
    with (
        trio.move_on_after(REFUSAL_TIMEOUT),
        contextlib.suppress(OSError, trio.BrokenResourceError, trio.ClosedResourceError),
    ):
        await refuse(stream)
        await stream.send_eof()
        # Closing with unread bytes resets the connection, and the other side may lose our last words.
        while await stream.receive_some():
            pass


def set_keepalive(stream: trio.SocketStream, *, dead_after: float) -> None:
    """Let the kernel find out within ``dead_after`` seconds that the other host is gone.

    What is set stays when TLS takes the socket over.
    """
    probe = max(1, math.ceil(dead_after / 4))
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", probe),
        ("TCP_KEEPINTVL", probe),
        ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", math.ceil(dead_after * 1000)),
    ):
        if hasattr(socket, name):
            stream.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def remote_host(stream: trio.SocketStream) -> str:
    """The address of the other side, without the port.

    Raises:
        OSError: the connection is gone already.
    """
    host: str = stream.socket.getpeername()[0]
    return host
