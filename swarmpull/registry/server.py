"""An HTTP listener: the one place that knows hypercorn."""

from __future__ import annotations

import logging
import math
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from typing import Final, cast

import attrs
import hypercorn.trio.run
import structlog
import trio
from hypercorn.config import Config, Sockets
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.trio.task_group import TaskGroup
from hypercorn.trio.tcp_server import TCPServer

from swarmpull.errors import TlsError
from swarmpull.registry.asgi import CLIENT, AsgiApp, Client
from swarmpull.registry.http import HTTPS_ONLY
from swarmpull.watched_files import WatchedFiles
from swarmpull.wire.ends import send_now
from swarmpull.wire.listen import BACKLOG, open_listeners, remote_host
from swarmpull.wire.tls import (
    HANDSHAKE_TIMEOUT,
    AnyStream,
    Complaints,
    TlsStream,
    speaks_tls,
    take_socket,
)

log = structlog.get_logger()

# hypercorn logs every listener at INFO, which the role that opens it does as well; what remains are faults.
_server_logger: Final = logging.getLogger("swarmpull.registry.hypercorn")
_server_logger.setLevel(logging.WARNING)

# Read at once.  Each read costs some 130 us: with hypercorn's own 64 KiB a body arrives at 0.5 GB/s, with
# this at 1 GB/s.  Its queue of ten reads is what one upload holds in memory.
RECEIVE_BYTES: Final = 256 << 10
# What is sent without waiting, if the kernel takes it: to copy the rest of more costs more than the turns
# of the event loop that are saved.
SEND_NOW_BYTES_MAX: Final = 128 << 10
_HTTPS_ONLY_BODY: Final = f"{HTTPS_ONLY}: use it\n".encode()
# The reason is in the first line, too: the answer to a HEAD has no more than that.
_HTTPS_ONLY: Final = (
    f"HTTP/1.1 400 {HTTPS_ONLY}\r\nContent-Type: text/plain\r\nConnection: close\r\n"
    f"Content-Length: {len(_HTTPS_ONLY_BODY)}\r\n\r\n"
).encode() + _HTTPS_ONLY_BODY


@attrs.frozen(kw_only=True)
class HttpLimits:
    """Bounds of one HTTP listener.

    Attributes:
        connections: at once; further ones are closed at once.
        head_bytes: request line and headers together; more gets 431.  stargz asks for some thousand
            ranges in one header.
        keep_alive_timeout: seconds that a connection may wait for its next request to be there.
        stalled_timeout: seconds after which a client that takes nothing of what was sent is cut off.
            CRI gives up a pull without progress after as long.
    """

    connections: int = 4096
    head_bytes: int = 128 << 10
    keep_alive_timeout: float = 75.0
    stalled_timeout: float = 300.0


class _Config(Config):
    """hypercorn's configuration, for sockets that listen already, and their connections.

    Every limit is set, since the defaults are made for web pages: 5 s of keep-alive, 1000 requests on a
    connection.
    """

    def __init__(
        self,
        sockets: list[socket.socket],
        drain: trio.Event,
        grace: float,
        limits: HttpLimits,
        https: WatchedFiles[ssl.SSLContext] | None,
    ) -> None:
        self.listening = sockets
        self.drain = drain
        self.https = https
        self.complaints = Complaints()
        self.connections: set[AnyStream] = set()
        self.connections_max = limits.connections
        self.accesslog = None
        self.errorlog = _server_logger
        self.include_server_header = False
        self.backlog = BACKLOG
        self.graceful_timeout = grace
        self.h11_max_incomplete_size = limits.head_bytes
        self.keep_alive_timeout = limits.keep_alive_timeout
        self.max_requests = None

    @property
    def keep_alive_max_requests(self) -> int:  # type: ignore[override]
        # hypercorn asks before each head of a response, and then says "Connection: close".
        return 0 if self.drain.is_set() else 1 << 62

    def create_sockets(self) -> Sockets:
        return Sockets([], self.listening, [])


class _Idleness:
    """Until when a connection may be idle, in place of a task that begins and is cancelled with each request.

    Attributes:
        until: a time of trio; infinity during a request.
    """

    def __init__(self, seconds: float) -> None:
        self.until = math.inf
        self._seconds = seconds
        self._scope = trio.CancelScope()
        self._is_watched = False

    async def restart(self, task_group: TaskGroup, watch: Callable[[], Awaitable[None]]) -> None:
        """It is idle from now on; the first time ``watch`` begins, and goes on until `end`."""
        self.until = trio.current_time() + self._seconds
        if not self._is_watched:
            self._is_watched = True
            task_group.spawn(self._run, watch)

    async def stop(self) -> None:
        """A request is under way."""
        self.until = math.inf

    def end(self) -> None:
        """Nobody will look at it any more."""
        self._scope.cancel()

    def look_at(self) -> float:
        """When it may have been idle for too long; not later, whatever happens meanwhile."""
        return min(self.until, trio.current_time() + self._seconds)

    async def _run(self, watch: Callable[[], Awaitable[None]]) -> None:
        with self._scope:
            await watch()


class _Connection(TCPServer):
    """A connection of hypercorn, with what that lacks: a cap, a way to cut it, an end with its client.

    Hypercorn takes fourteen turns of the event loop for a small response; without its locks around sends that
    need not wait, and its task for each time of idleness, it is five.  All this leans on what hypercorn does
    inside, so setup.cfg names the versions that the tests were run with.
    """

    config: _Config
    # hypercorn declares what it gets with its own TLS.
    stream: AnyStream  # type: ignore[assignment]
    idle_task: _Idleness  # type: ignore[assignment]

    async def run(self) -> None:
        self._reading = trio.CancelScope()
        self.idle_task = _Idleness(self.config.keep_alive_timeout)
        self._client = Client()
        self.state = {**self.state, CLIENT: self._client}
        connections = self.config.connections
        if len(connections) >= self.config.connections_max:
            log.warning("connection_refused", reason="busy", connections_max=len(connections))
            await trio.aclose_forcefully(self.stream)
            return
        plain = cast("trio.SocketStream", self.stream)
        connections.add(plain)
        remote = "unknown"
        try:
            remote = remote_host(plain)
            if self.config.https is not None:
                self.stream = await _secured(plain, self.config.https.current)
                connections.remove(plain)
                connections.add(self.stream)
            await super().run()
        except TlsError as error:
            self.config.complaints.warn(remote, error.reason, listener="https")
        except (OSError, trio.BrokenResourceError, trio.TooSlowError):
            # Not even a handshake.
            pass
        except Exception:
            # Whatever one client brings about, the listener goes on.
            log.exception("connection_failed")
        finally:
            connections -= {plain, self.stream}
            await trio.aclose_forcefully(self.stream)

    async def protocol_send(self, event: Event) -> None:
        # hypercorn tells the application that its client is gone before it closes the connection, or waits
        # for the next request, and does so in the application's task.  One that watches for its client is
        # cancelled by that: the connection would stay open, with nobody to close it when it is idle.
        if isinstance(event, RawData):
            left = self._send_now(event.data)
            if left:
                await self._send(left)
        elif isinstance(event, Closed) or self._is_over(event):
            with trio.CancelScope(shield=True):
                await self._close()
            await self.protocol.handle(Closed())
            # The reader may wait for the end of this response, to go on with the request that is behind it.
            self._reading.cancel()
        else:
            with trio.CancelScope(shield=True):
                await super().protocol_send(event)

    async def _send(self, data: bytes) -> None:
        async with self.send_lock:
            try:
                with trio.CancelScope(shield=True):
                    await self.stream.send_all(data)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                self._client.leave()
                await self.protocol.handle(Closed())

    def _is_over(self, event: Event) -> bool:
        # hypercorn hears of a drain some turns of the event loop later, and would take the next request.
        return isinstance(event, Updated) and event.idle and self.config.drain.is_set()

    def _send_now(self, data: bytes) -> bytes:
        """Send what goes without waiting; returns the rest."""
        if not data or len(data) > SEND_NOW_BYTES_MAX or self.send_lock.locked():
            return data
        return data[send_now(self.stream, data) :]

    async def _read_data(self) -> None:
        with self._reading:
            data = b"-"
            while data:
                try:
                    data = bytes(await self.stream.receive_some(RECEIVE_BYTES))
                except (trio.ClosedResourceError, trio.BrokenResourceError, TlsError):
                    break
                await self.protocol.handle(RawData(data))
        self._client.leave()
        await self.protocol.handle(Closed())
        # hypercorn would keep the connection of a client that is gone for as long as an idle one.
        self.idle_task.end()

    async def _idle_timeout(self) -> None:
        idleness, terminated = self.idle_task, self.context.terminated
        while trio.current_time() < idleness.until:
            with trio.move_on_at(idleness.look_at()):
                await terminated.wait()
            if terminated.is_set():
                break
        if idleness.until < math.inf:
            with trio.CancelScope(shield=True):
                await self._initiate_server_close()


class _HttpsStream(TlsStream):
    """What hypercorn expects of a stream with TLS; the handshake has been made."""

    @property
    def transport_stream(self) -> _HttpsStream:
        """Of which it wants the socket."""
        return self

    async def do_handshake(self) -> None:
        await trio.lowlevel.checkpoint()

    def selected_alpn_protocol(self) -> str:
        return "http/1.1"

    async def send_eof(self) -> None:
        # `aclose` says in TLS that this is the end; by TCP alone it would look cut off.
        await trio.lowlevel.checkpoint()


async def _secured(stream: trio.SocketStream, context: ssl.SSLContext) -> _HttpsStream:
    """Make the handshake.  Raises TlsError, and closes the stream then."""
    with trio.fail_after(HANDSHAKE_TIMEOUT):
        if not await speaks_tls(stream):
            await stream.send_all(_HTTPS_ONLY)
            raise TlsError("plain HTTP on a port for HTTPS: use https:// there")
        secured = _HttpsStream(take_socket(stream, context, server_side=True))
        try:
            await secured.shake_hands()
        except BaseException:
            await trio.aclose_forcefully(secured)
            raise
    return secured


# There is no setting for the class; the tests notice when this has lost its effect.
hypercorn.trio.run.TCPServer = _Connection  # type: ignore[attr-defined]


async def serve_http(
    app: AsgiApp,
    host: str,
    port: int,
    *,
    drain: trio.Event,
    grace: float,
    limits: HttpLimits | None = None,
    https: WatchedFiles[ssl.SSLContext] | None = None,
    task_status: trio.TaskStatus[tuple[str, int]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve an ASGI application over HTTP/1.1 until drained; started with the bound (host, port).

    When cancelled, it cuts all connections.

    Args:
        app: what answers; it takes part in the lifespan protocol.
        host: address or name to listen on.
        port: 0 for any that is free.
        drain: once set, no connection is accepted, idle ones are closed, the others after the response that
            is under way.
        grace: the seconds that they have for it; then they are cut.
        limits: bounds of this listener.
        https: the certificate, where this is to be HTTPS; each connection begins with the one of that moment.

    Raises:
        StartupError: the address cannot be used.
    """
    limits = limits or HttpLimits()
    listeners = await open_listeners(host, port)
    sockets = [socket.socket(fileno=listener.socket.detach()) for listener in listeners]
    for sock in sockets:
        # Accepted connections inherit it.
        timeout = round(limits.stalled_timeout * 1000)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, timeout)
    config = _Config(sockets, drain, grace, limits, https)
    started = _Started(sockets[0].getsockname()[:2], task_status)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_cut_when_late, config)
            # Without a trigger of its own hypercorn would swallow KeyboardInterrupt.
            await hypercorn.trio.serve(
                app,  # type: ignore[arg-type]  # its types name each message
                config,
                shutdown_trigger=drain.wait,
                task_status=started,
                mode="asgi",
            )
            nursery.cancel_scope.cancel()
    finally:
        for sock in sockets:
            sock.close()


@attrs.frozen
class _Started:
    """Reports our address where hypercorn reports its URLs."""

    address: tuple[str, int]
    task_status: trio.TaskStatus[tuple[str, int]]

    def started(self, _: list[str] | None = None) -> None:
        self.task_status.started(self.address)


async def _cut_when_late(config: _Config) -> None:
    """Cut the connections that are left when their time is over, or when this is cancelled.

    hypercorn shields its sends from cancellation: a client that does not read would hold up the end.
    """
    try:
        await config.drain.wait()
        await trio.sleep(config.graceful_timeout)
    finally:
        _cut(config.connections)


def _cut(connections: Iterable[AnyStream]) -> None:
    for stream in connections:
        # Gone meanwhile.
        with suppress(OSError):
            if isinstance(stream, trio.SocketStream):
                stream.socket.shutdown(socket.SHUT_RDWR)
            else:
                # That of an SSLSocket would go on in plain text.
                socket.socket.shutdown(stream.socket, socket.SHUT_RDWR)
