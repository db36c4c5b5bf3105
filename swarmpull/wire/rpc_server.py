"""The serving end of RPC."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any

import attrs
import structlog
import trio

from swarmpull.errors import ProtocolError, SwarmpullError, TlsError
from swarmpull.identity import Identity
from swarmpull.wire.access import refuse_caller
from swarmpull.wire.codec import decode, encode, encode_error
from swarmpull.wire.listen import (
    format_address,
    open_listeners,
    serve_connections,
    set_keepalive,
)
from swarmpull.wire.rpc_link import (
    CONNECTION_ERRORS,
    FrameWriter,
    MessageReader,
    RpcLimits,
    first_error,
    reason_of,
)
from swarmpull.wire.rpc_messages import (
    Method,
    Rep,
    Req,
    RpcBye,
    RpcByeReason,
    RpcCancel,
    RpcError,
    RpcHello,
    RpcMessage,
    RpcReply,
    RpcRequest,
    pack,
    timeout_from_ms,
)
from swarmpull.wire.tls import AnyStream, Entrance, Tls

log = structlog.get_logger()

# After a BYE the client closes as soon as its last reply has come; this is for clients that do not.
BYE_TIMEOUT = 5.0


@attrs.frozen
class RpcContext:
    """What a handler may know of its caller; addresses without a port.

    Attributes:
        remote_host: the address that the connection came from.
        local_host: our own address, at which the caller reached us.
        caller: who it is by its certificate; None without TLS.
    """

    remote_host: str
    local_host: str = ""
    caller: Identity | None = None


Handler = Callable[[Any, RpcContext], Awaitable[object]]


@attrs.frozen
class _Served:
    """One method and who answers it."""

    method: Method[Any, Any]
    handler: Handler
    at_once: Callable[[Any, RpcContext], object] | None


class RpcService:
    """The methods that one server offers."""

    def __init__(self) -> None:
        self._served: dict[str, _Served] = {}

    def register(
        self,
        method: Method[Req, Rep],
        handler: Callable[[Req, RpcContext], Awaitable[Rep]],
        *,
        at_once: Callable[[Req, RpcContext], Rep | None] | None = None,
    ) -> None:
        """Serve ``method`` with ``handler``.

        Calls that need not wait for anything can be answered by ``at_once``, which costs no task: it returns
        None to leave a call to the handler, and may raise what that may.

        Errors of ``errors.REMOTE_ERRORS`` that the handler raises are raised again at the caller; any
        other SwarmpullError reaches it as RpcFailed with the text.  Every other exception (an exception
        group too: a handler with a nursery must take its errors out of the group) is a bug and ends
        `serve_rpc` with it.  The handler is cancelled when the caller is cancelled, has lost its
        patience or is gone.
        """
        if method.name in self._served:
            raise ValueError(f"{method.name} has a handler already")
        self._served[method.name] = _Served(method, handler, at_once)

    def find(self, name: str) -> _Served | None:
        """The method of that name and its handler."""
        return self._served.get(name)


async def serve_rpc(
    service: RpcService,
    host: str,
    port: int,
    *,
    limits: RpcLimits | None = None,
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
    connections: set[_Connection] = set()
    entrance = Entrance(tls, _say_untrusted, listener="rpc")

    async def handle(stream: trio.SocketStream) -> None:
        with suppress(OSError):  # the next use of a lost connection says so
            set_keepalive(stream, dead_after=limits.dead_after)
        admitted = await entrance.admit(stream)
        if admitted is None:
            return
        connection = _Connection(service, *admitted, limits, entrance)
        connections.add(connection)
        try:
            if drain is not None and drain.is_set():
                connection.say_bye(RpcByeReason.DRAINING)
            await connection.run()
        finally:
            connections.discard(connection)
            await trio.aclose_forcefully(admitted[0])

    async with trio.open_nursery() as handlers, trio.open_nursery() as accepting:
        await accepting.start(
            partial(
                serve_connections,
                listeners,
                handle,
                connections_max=limits.connections_max,
                refuse=partial(_refuse, entrance),
                handler_nursery=handlers,
            )
        )
        task_status.started(bound)
        if drain is None:
            await trio.sleep_forever()
        else:
            await drain.wait()
        accepting.cancel_scope.cancel()
        handlers.cancel_scope.deadline = trio.current_time() + grace
        for connection in connections:
            connection.say_bye(RpcByeReason.DRAINING)


async def _refuse(entrance: Entrance, stream: trio.SocketStream) -> None:
    await entrance.dismiss(stream, pack(RpcBye(RpcByeReason.BUSY, "too many connections")))


async def _say_untrusted(stream: trio.abc.SendStream, reason: str) -> None:
    await stream.send_all(pack(RpcBye(RpcByeReason.UNTRUSTED, reason)))


class _Connection:
    """One client: reads its requests, runs the handlers, writes the replies.

    Handlers run in a nursery outside of the error boundary: an OSError of a handler is a bug of ours and
    must not pass for a lost connection.
    """

    def __init__(
        self,
        service: RpcService,
        stream: AnyStream,
        caller: Identity | None,
        limits: RpcLimits,
        entrance: Entrance,
    ) -> None:
        self._service = service
        self._stream = stream
        self._caller = caller
        self._limits = limits
        self._entrance = entrance
        self._reader = MessageReader(stream, limits)
        self._writer = FrameWriter(stream, limits)
        self._slots = trio.Semaphore(limits.requests_max)
        self._scopes: dict[int, trio.CancelScope] = {}
        self._said_bye = False

    def say_bye(self, reason: RpcByeReason, text: str = "") -> None:
        """Ask the client to take further calls elsewhere."""
        if not self._said_bye:
            self._said_bye = True
            self._writer.put_nowait(pack(RpcBye(reason, text)))

    async def run(self) -> None:
        """Serve until the connection ends; only bugs of handlers are raised."""
        error: BaseException | None = None
        remote = host = "unknown"
        async with trio.open_nursery() as handlers:
            try:
                host, port = self._stream.socket.getpeername()[:2]
                remote = format_address(host, port)
                context = RpcContext(host, self._stream.socket.getsockname()[0], self._caller)
                await self._converse(context, handlers)
            except* CONNECTION_ERRORS as group:
                error = first_error(group)
            if isinstance(error, ProtocolError):
                bye = RpcBye(_reason_for(error), error.reason)
                await self._writer.last_words(pack(bye))
            handlers.cancel_scope.cancel()
        if isinstance(error, TlsError):
            self._entrance.complain(host, error.reason)
        elif error is None:
            log.debug("rpc_connection_closed", remote=remote, reason="closed by the client")
        else:
            log.info("rpc_connection_closed", remote=remote, reason=reason_of(error))

    async def _converse(self, context: RpcContext, handlers: trio.Nursery) -> None:
        async with trio.open_nursery() as pumps:
            pumps.start_soon(self._writer.run)
            await self._shake_hands()
            await self._read_requests(context, handlers)
            pumps.cancel_scope.cancel()

    async def _shake_hands(self) -> None:
        with trio.move_on_after(self._limits.handshake_timeout):
            message = await self._reader.receive()
            if message is None:
                raise ProtocolError("closed before its HELLO")
            if not isinstance(message, RpcHello):
                raise ProtocolError(f"began with {type(message).__name__} instead of HELLO")
            self._reader.open_up()
            self._writer.put_nowait(pack(RpcHello(self._limits.requests_max)))
            return
        raise ProtocolError(f"no HELLO within {self._limits.handshake_timeout} s")

    async def _read_requests(self, context: RpcContext, handlers: trio.Nursery) -> None:
        while True:
            message = await self._next_message()
            match message:
                case None | RpcBye():
                    return
                case RpcRequest():
                    await self._accept(message, context, handlers)
                case RpcCancel():
                    if (scope := self._scopes.get(message.id)) is not None:
                        scope.cancel()
                case _:
                    raise ProtocolError(f"a client must not send {type(message).__name__}")

    async def _next_message(self) -> RpcMessage | None:
        while True:
            timeout = BYE_TIMEOUT if self._said_bye else self._limits.idle_timeout
            with trio.move_on_after(timeout):
                return await self._reader.receive()
            if self._scopes:
                continue
            if self._said_bye:
                return None
            self.say_bye(RpcByeReason.IDLE)

    async def _accept(
        self, request: RpcRequest, context: RpcContext, handlers: trio.Nursery
    ) -> None:
        if request.id in self._scopes:
            raise ProtocolError(f"request id {request.id} is in use")
        begun = self._begin(request, context)
        if isinstance(begun, bytes):
            # A client that does not read its replies is not read from either.
            await self._writer.write(begun)
            return
        deadline = trio.current_time() + timeout_from_ms(request.timeout_ms)
        # At the limit this stops reading: the client's own writes wait.
        await self._slots.acquire()
        scope = trio.CancelScope(deadline=deadline)
        self._scopes[request.id] = scope
        handlers.start_soon(self._handle, request, begun, scope)

    def _begin(
        self, request: RpcRequest, context: RpcContext
    ) -> bytes | Callable[[], Awaitable[object]]:
        """The answer to a request that needs no waiting, or who will give it."""
        served = self._service.find(request.method)
        if served is None:
            return _failure(request, f"{request.method!r} is not a method of this role")
        if self._caller is not None and (refusal := refuse_caller(self._caller, request.method)):
            self._entrance.complain(context.remote_host, refusal)
            return _failure(request, f"refused: {refusal}")
        try:
            body = decode(request.body, served.method.request)
        except ProtocolError as error:
            # The framing is whole, so this one call fails and the connection goes on.
            return _failure(request, error.reason)
        if served.at_once is not None:
            try:
                reply = served.at_once(body, context)
            except SwarmpullError as error:
                return self._error(request, error)
            except CONNECTION_ERRORS as error:
                # Here it would pass for the end of the connection.
                return partial(_raise, error)
            if reply is not None:
                return self._reply(request, reply)
        return partial(served.handler, body, context)

    async def _handle(
        self, request: RpcRequest, answer: Callable[[], Awaitable[object]], scope: trio.CancelScope
    ) -> None:
        frame = None
        try:
            with scope:
                frame = await self._answer(request, answer)
            # Outside of the scope and before the slot is free: a client that does not read its
            # replies is not read from either.
            if frame is not None:
                await self._writer.put(frame)
        finally:
            del self._scopes[request.id]
            self._slots.release()

    async def _answer(self, request: RpcRequest, answer: Callable[[], Awaitable[object]]) -> bytes:
        try:
            return self._reply(request, await answer())
        except SwarmpullError as error:
            return self._error(request, error)

    def _reply(self, request: RpcRequest, reply: object) -> bytes:
        encoded = encode(reply)
        if len(encoded) > self._limits.body_bytes_max:
            return _failure(
                request,
                f"the reply has {len(encoded)} bytes, the limit is {self._limits.body_bytes_max}",
            )
        return pack(RpcReply(request.id, encoded))

    def _error(self, request: RpcRequest, error: SwarmpullError) -> bytes:
        name, attributes = encode_error(error)
        if len(attributes) > self._limits.body_bytes_max // 2:
            name, attributes = "", b""
        return pack(RpcError(request.id, name, str(error), attributes))


async def _raise(error: Exception) -> object:
    """The handler of a request that a bug has met already."""
    raise error


def _reason_for(error: ProtocolError) -> RpcByeReason:
    if isinstance(error, TlsError):
        return RpcByeReason.UNTRUSTED
    return RpcByeReason.PROTOCOL_ERROR


def _failure(request: RpcRequest, message: str) -> bytes:
    return pack(RpcError(request.id, "", message))
