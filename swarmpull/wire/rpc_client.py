"""The calling end of RPC: one connection for each address, shared by all calls to it."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext
from typing import Any

import attrs
import structlog
import trio

from swarmpull.errors import ProtocolError, RpcFailed, RpcUnavailable, TlsError
from swarmpull.identity import Identity
from swarmpull.wire.access import refuse_server
from swarmpull.wire.codec import decode, decode_error, encode
from swarmpull.wire.listen import parse_address, set_keepalive
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
    RpcReply,
    RpcRequest,
    pack,
    timeout_to_ms,
)
from swarmpull.wire.tls import AnyStream, Complaints, Tls

log = structlog.get_logger()


@asynccontextmanager
async def open_rpc_pool(
    limits: RpcLimits | None = None, tls: Tls | None = None
) -> AsyncIterator[RpcPool]:
    """A pool for the lifetime of a role; leaving the block closes its connections.

    With ``tls`` it calls only roles whose certificate says that they serve the method.
    """
    failure = None
    async with trio.open_nursery() as nursery:
        try:
            yield RpcPool(nursery, limits or RpcLimits(), tls)
        except Exception as error:
            # Raised again below: out of the nursery it would come wrapped in a group.
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


class RpcPool:
    """Calls methods of other roles.  Made by `open_rpc_pool`."""

    def __init__(self, nursery: trio.Nursery, limits: RpcLimits, tls: Tls | None = None) -> None:
        self._nursery = nursery
        self._limits = limits
        self.tls = tls
        self.complaints = Complaints()
        self._connections: dict[str, _Connection] = {}
        self._on_loss: list[Callable[[str], None]] = []

    def when_lost(self, tell: Callable[[str], None]) -> None:
        """Call ``tell(address)`` whenever the role at the other end of a connection went away.

        At once, also when it says that it drains; not when this side closes a connection, or the other one
        because nothing was asked for long.  ``tell`` must not block.
        """
        self._on_loss.append(tell)

    def lost(self, address: str) -> None:
        """A connection says that the other side went away."""
        for tell in self._on_loss:
            tell(address)

    async def call(
        self, address: str, method: Method[Req, Rep], request: Req, *, timeout: float
    ) -> Rep:
        """Call ``method`` of the role at ``address`` (``host:port``) and return its reply.

        ``timeout`` seconds cover the dial, the handshake and the request.  The role is told how many are
        left, and nothing of the deadlines of surrounding scopes, which may be put off: a call that ends early
        is cancelled there.

        Raises:
            RpcUnavailable: not reachable, connection lost, or no reply in time. The role may or may not
                have done what was asked; if it was not ``asked``, it has not.
            RpcFailed: the role failed in a way that has no type here, or the reply is malformed.
            SwarmpullError: those of ``errors.REMOTE_ERRORS`` that the handler raised.
            ValueError: ``address`` is not one.
        """
        host, port = parse_address(address)
        body = encode(request)
        if len(body) > self._limits.body_bytes_max:
            raise RpcFailed(
                address,
                method.name,
                f"the request has {len(body)} bytes, the limit is {self._limits.body_bytes_max}",
            )
        with trio.move_on_after(timeout) as scope:
            connection = await self._connected(address, host, port, method.name)
            call = await connection.call(method, body, scope.deadline)
            return _result(address, method, call, connection.reason)
        dialling = self._connections.get(address)
        if dialling is None or dialling.settled.is_set():
            raise RpcUnavailable(address, method.name, f"no reply within {timeout:g} s")
        raise RpcUnavailable(
            address, method.name, f"no connection within {timeout:g} s", asked=False
        )

    async def _connected(self, address: str, host: str, port: int, method: str) -> _Connection:
        connection = self._connections.get(address)
        if connection is None:
            self._make_room(address, method)
            connection = _Connection(self, address, host, port, self._limits)
            self._connections[address] = connection
            self._nursery.start_soon(connection.run)
        if not connection.settled.is_set():
            await connection.settled.wait()
        if not connection.usable:
            raise RpcUnavailable(address, method, connection.reason, asked=False)
        if connection.server is not None and (refusal := refuse_server(connection.server, method)):
            self.complaints.warn(host, refusal, address=address)
            raise RpcUnavailable(address, method, refusal, asked=False)
        return connection

    def _make_room(self, address: str, method: str) -> None:
        if len(self._connections) < self._limits.connections_max:
            return
        for connection in self._connections.values():
            if connection.unused:
                connection.close()
                return
        raise RpcUnavailable(
            address,
            method,
            f"all {self._limits.connections_max} connections of this process are in use",
            asked=False,
        )

    def forget(self, connection: _Connection) -> None:
        """The next call to this address dials anew."""
        if self._connections.get(connection.address) is connection:
            del self._connections[connection.address]


def _result(address: str, method: Method[Req, Rep], call: _Call, reason: str) -> Rep:
    match call.outcome:
        case RpcReply(body=body):
            try:
                return decode(body, method.reply)
            except ProtocolError as error:
                raise RpcFailed(address, method.name, error.reason) from error
        case RpcError(name=name, attributes=attributes, message=message):
            raise decode_error(name, attributes) or RpcFailed(address, method.name, message)
        case None:
            raise RpcUnavailable(address, method.name, reason)


@attrs.define(eq=False)
class _Call:
    """One caller that waits; its scope is cancelled when the connection is lost."""

    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    done: trio.Event = attrs.field(factory=trio.Event)
    outcome: RpcReply | RpcError | None = None


class _Connection:
    """One connection: dialling, then usable, then (after a BYE) only for calls under way, then gone.

    Attributes:
        settled: set when the dial has succeeded or failed.
        usable: the handshake is done and the connection not lost.
        reason: why the connection failed or ended.
        server: who is there by its certificate; None without TLS.
    """

    def __init__(
        self, pool: RpcPool, address: str, host: str, port: int, limits: RpcLimits
    ) -> None:
        self.address = address
        self.settled = trio.Event()
        self.usable = False
        self.reason = "closed"
        self.server: Identity | None = None
        self._pool = pool
        self._target = (host, port)
        self._limits = limits
        self._scope = trio.CancelScope()
        self._calls: set[_Call] = set()
        self._sent: dict[int, _Call] = {}
        self._ids = itertools.count(1)
        self._retired = False
        self._writer: FrameWriter
        self._slots: trio.Semaphore

    @property
    def unused(self) -> bool:
        """Connected, and nobody waits for a reply."""
        return self.usable and not self._calls

    def close(self) -> None:
        """End the connection; calls under way fail."""
        self._pool.forget(self)
        self.usable = False
        self._scope.cancel()

    # --- the caller's side -----------------------------------------------------------------

    async def call(self, method: Method[Any, Any], body: bytes, deadline: float) -> _Call:
        """Send a request and wait; the outcome is None when the connection was lost."""
        call = _Call()
        self._calls.add(call)
        try:
            with call.scope:
                async with nullcontext() if method.at_once else self._slots:
                    await self._exchange(call, method.name, body, deadline)
        finally:
            self._calls.discard(call)
            if self._retired and not self._calls:
                self._scope.cancel()
        return call

    async def _exchange(self, call: _Call, method: str, body: bytes, deadline: float) -> None:
        call_id = self._free_id()
        self._sent[call_id] = call
        try:
            left = deadline - trio.current_time()
            frame = pack(RpcRequest(call_id, timeout_to_ms(left), method, body))
            await self._writer.put(frame)
            try:
                await call.done.wait()
            finally:
                if not call.done.is_set() and not self._writer.withdraw(frame):
                    self._writer.put_nowait(pack(RpcCancel(call_id)))
        finally:
            del self._sent[call_id]

    def _free_id(self) -> int:
        for number in self._ids:
            if (call_id := number & 0xFFFFFFFF) not in self._sent:
                return call_id
        raise AssertionError("the counter is endless")

    # --- the connection's side -------------------------------------------------------------

    async def run(self) -> None:
        """Dial, then read until the connection ends."""
        trusted = True
        try:
            with self._scope:
                try:
                    await self._converse()
                except* CONNECTION_ERRORS as group:
                    self.reason = reason_of(group)
                    trusted = not isinstance(first_error(group), TlsError)
                if self.usable and not self._retired:
                    self._pool.lost(self.address)
        finally:
            self._pool.forget(self)
            self.usable = False
            self.settled.set()
            for call in self._calls:
                call.scope.cancel()
        if trusted:
            log.info("rpc_connection_ended", address=self.address, reason=self.reason)
        else:
            self._pool.complaints.warn(self._target[0], self.reason, address=self.address)

    async def _converse(self) -> None:
        stream, reader = await self._dial()
        async with stream, trio.open_nursery() as pumps:
            pumps.start_soon(self._writer.run)
            self.usable = True
            self.settled.set()
            await self._read_replies(reader)
            pumps.cancel_scope.cancel()

    async def _dial(self) -> tuple[AnyStream, MessageReader]:
        with _within(self._limits.handshake_timeout, "no connection"):
            plain = await trio.open_tcp_stream(*self._target)
            stream: AnyStream = plain
            try:
                set_keepalive(plain, dead_after=self._limits.dead_after)
                stream = await self._secure(plain)
                return stream, await self._shake_hands(stream)
            except BaseException:
                await trio.aclose_forcefully(stream)
                raise

    async def _secure(self, stream: trio.SocketStream) -> AnyStream:
        tls = self._pool.tls
        if tls is None:
            return stream
        secured, self.server = await tls.connect(stream)
        if refusal := tls.refuse(self.server, secured):
            await trio.aclose_forcefully(secured)
            raise TlsError(refusal)
        return secured

    async def _shake_hands(self, stream: AnyStream) -> MessageReader:
        reader = MessageReader(stream, self._limits)
        await stream.send_all(pack(RpcHello(self._limits.requests_max)))
        match await reader.receive():
            case RpcHello(requests_max=requests_max):
                self._slots = trio.Semaphore(min(requests_max, self._limits.requests_max))
            case RpcBye(reason=RpcByeReason.UNTRUSTED, text=text):
                raise TlsError(f"refused: {text}")
            case RpcBye(reason=reason, text=text):
                raise ProtocolError(f"refused, {reason.name.lower()}: {text}")
            case None:
                raise ProtocolError("closed before its HELLO: is this a swarmpull RPC port?")
            case message:
                raise ProtocolError(f"began with {type(message).__name__} instead of HELLO")
        reader.open_up()
        self._writer = FrameWriter(stream, self._limits)
        return reader

    async def _read_replies(self, reader: MessageReader) -> None:
        self.reason = "the connection was closed by the other side"
        while (message := await reader.receive()) is not None:
            match message:
                case RpcReply(id=call_id) | RpcError(id=call_id):
                    # None: the call was cancelled meanwhile.
                    if (call := self._sent.get(call_id)) is not None:
                        call.outcome = message
                        call.done.set()
                case RpcBye():
                    self._retire(message)
                case _:
                    raise ProtocolError(f"a server must not send {type(message).__name__}")

    def _retire(self, bye: RpcBye) -> None:
        said = f"{bye.reason.name.lower()} {bye.text}".rstrip()
        self.reason = f"the other side ended the connection: {said}"
        self._retired = True
        self._pool.forget(self)
        if bye.reason is not RpcByeReason.IDLE:
            self._pool.lost(self.address)
        if not self._calls:
            self._scope.cancel()


@contextmanager
def _within(seconds: float, what: str) -> Iterator[None]:
    try:
        with trio.fail_after(seconds):
            yield
    except trio.TooSlowError as error:
        raise ProtocolError(f"{what} within {seconds:g} s") from error
