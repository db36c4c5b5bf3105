"""The connections of one RPC server, all of them read and written by one task.

A tracker has a connection from each of thousands of hosts, of which most say nothing at any moment.  A task
for each would keep some twenty kilobytes and a hundred objects, through which the garbage collector walks
again and again, and a message would cost two turns of the event loop and five system calls.  Here a
connection is a few objects; the kernel says which of them have something to read, and one is read, answered
and left.

Only a request that has to wait gets a task (see `RpcService.register`).  The times that a connection has to
keep to are looked at by one task for all of them, about once a second.
"""

from __future__ import annotations

import collections
import contextlib
import math
import os
import select
import socket
import time
from collections.abc import Iterator
from typing import Final

import structlog
import trio

from swarmpull.errors import ProtocolError, TlsError
from swarmpull.identity import Identity
from swarmpull.wire.ends import End, end_of
from swarmpull.wire.frames import FrameBuffer
from swarmpull.wire.listen import format_address
from swarmpull.wire.rpc_link import CONNECTION_ERRORS, RpcLimits, reason_of
from swarmpull.wire.rpc_memory import RpcMemory
from swarmpull.wire.rpc_messages import (
    ENVELOPE_BYTES_MAX,
    HANDSHAKE_BODY_BYTES_MAX,
    RpcBye,
    RpcByeReason,
    RpcCancel,
    RpcHello,
    RpcMessage,
    RpcRequest,
    pack,
    timeout_from_ms,
    unpack,
)
from swarmpull.wire.rpc_service import Answers, Begun, RpcContext, RpcService
from swarmpull.wire.tls import AnyStream, Entrance

log = structlog.get_logger()

# After a BYE the client closes as soon as its last reply has come; this is for clients that do not.
BYE_TIMEOUT: Final = 5.0
# Connections that are served before other tasks get their turn, a few milliseconds; and how many seconds
# that may take in any case, looked at after each message.
READY_MAX: Final = 32
TURN_SECONDS: Final = 0.003
# Of one connection in one turn, however short its messages are: what has come of others goes before the rest.
MESSAGES_AT_ONCE: Final = 16
# Read from one connection in one turn: a request has a few hundred bytes. Of a longer one what it lacks.
RECEIVE_BYTES: Final = 8 * 1024
RECEIVE_MORE_BYTES: Final = 256 * 1024
# Less than this of one connection is not counted: no more than what the connection itself takes.
KEPT_MIN: Final = 1024
# How often the connections are looked at for times that are over, in seconds, and how many before other
# tasks get their turn.
LOOK_INTERVAL: Final = 1.0
LOOKED_AT_ONCE: Final = 2000

_HELD_UP: Final = select.EPOLLERR | select.EPOLLHUP


class _MemoryFull(ProtocolError):
    """A connection has more kept for it than any other, and all together have too much."""

    def __str__(self) -> str:
        return self.reason


class ServedConnections:
    """The connections of one server; made by `serve_rpc`, and at work while `run` is."""

    def __init__(
        self,
        service: RpcService,
        limits: RpcLimits,
        entrance: Entrance,
        memory: RpcMemory[_Connection],
    ) -> None:
        self.limits = limits
        self._memory = memory
        self.entrance = entrance
        self.answers = Answers(
            service,
            limits.body_bytes_max,
            entrance.complain,
            lambda: entrance.cluster,
            entrance.foreign,
        )
        self._by_descriptor: dict[int, _Connection] = {}
        self._poll = select.epoll()
        self._resting: list[_Connection] = []
        self._rested = trio.lowlevel.ParkingLot()
        self._turn_until = 0.0
        self._arriving = 0
        self._draining = False
        self._over = trio.CancelScope()
        self._nursery: trio.Nursery

    def __len__(self) -> int:
        return len(self._by_descriptor)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled, or until the last connection has ended after `drain`."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._look_at_times)
                nursery.start_soon(self._serve_rested)
                task_status.started()
                with self._over:
                    await self._serve_ready()
                nursery.cancel_scope.cancel()
        finally:
            for connection in list(self._by_descriptor.values()):
                connection.end()
            self._poll.close()

    @contextlib.contextmanager
    def arriving(self) -> Iterator[None]:
        """For the length of the block somebody comes in, of whom it is not known yet who it is."""
        self._arriving += 1
        try:
            yield
        finally:
            self._arriving -= 1
            self._end_if_over()

    def add(self, stream: AnyStream, caller: Identity | None) -> None:
        """Serve a connection, whose stream nobody else may use any more."""
        end = end_of(stream)
        if self._poll.closed:
            # It came in while the server was being cancelled.
            end.close()
            return
        try:
            host, port = end.socket.getpeername()[:2]
            is_foreign = caller is not None and caller.cluster != self.entrance.cluster
            context = RpcContext(host, end.socket.getsockname()[0], caller, is_foreign)
        except OSError as error:
            end.close()
            log.info("rpc_connection_closed", remote="unknown", reason=str(error))
            return
        connection = _Connection(self, end, context, port)
        self._by_descriptor[connection.descriptor] = connection
        self._poll.register(connection.descriptor, select.EPOLLIN)
        if self._draining:
            connection.say_bye(RpcByeReason.DRAINING)
        # It may have been there before us, or with OpenSSL.
        connection.ready(select.EPOLLIN)

    def drain(self) -> None:
        """Ask every client to take further calls elsewhere; `run` ends with the last connection."""
        self._draining = True
        for connection in list(self._by_descriptor.values()):
            connection.say_bye(RpcByeReason.DRAINING)
        self._end_if_over()

    def start(self, connection: _Connection, request: RpcRequest, begun: Begun) -> None:
        """Have a request answered by a task."""
        scope = trio.CancelScope(deadline=trio.current_time() + timeout_from_ms(request.timeout_ms))
        connection.scopes[request.id] = scope
        self._nursery.start_soon(connection.answer, request, begun, scope)

    def wait_for(self, connection: _Connection, events: int) -> None:
        """What the connection waits for from now on."""
        self._poll.modify(connection.descriptor, events)

    def forget(self, connection: _Connection) -> None:
        """A connection has ended; its socket is still open."""
        self._poll.unregister(connection.descriptor)
        del self._by_descriptor[connection.descriptor]
        self._memory.set(connection, 0)
        self._end_if_over()

    def keep(self, connection: _Connection, held: int) -> None:
        """So many bytes are kept for a connection from now on; ends those with the most if it is too much."""
        memory = self._memory
        memory.set(connection, held)
        greedy = memory.too_greedy()
        if not greedy:
            return
        log.warning(
            "rpc_memory_full",
            limit=memory.bytes_max,
            connections_ended=len(greedy),
            most=memory.held_by(greedy[0]),
            remote=greedy[0].remote,
        )
        for each in greedy:
            each.end(
                _MemoryFull(
                    f"{memory.held_by(each)} bytes of requests and unread replies are kept for this "
                    f"connection, and {memory.bytes_max} are the limit for all together: read replies sooner"
                )
            )

    def turn_is_over(self) -> bool:
        """Whether what is to be done in one go has taken as long as it may."""
        return time.perf_counter() >= self._turn_until

    def rest(self, connection: _Connection) -> None:
        """Have a connection go on with what has come of it in one of the next turns."""
        self._resting.append(connection)
        self._rested.unpark()

    def _end_if_over(self) -> None:
        if self._draining and not self._by_descriptor and not self._arriving:
            self._over.cancel()

    async def _serve_ready(self) -> None:
        poll, connections = self._poll, self._by_descriptor
        while True:
            await trio.lowlevel.wait_readable(poll.fileno())
            self._begin_turn()
            # A descriptor may be another connection's after a pause.
            ready = [(connections[number], events) for number, events in poll.poll(0, READY_MAX)]
            for connection, events in ready:
                connection.ready(events)
                if self.turn_is_over():
                    await self._pause()

    async def _serve_rested(self) -> None:
        while True:
            if not self._resting:
                await self._rested.park()
            await self._pause()
            resting, self._resting = self._resting, []
            for connection in resting:
                connection.resume()
                if self.turn_is_over():
                    await self._pause()

    async def _pause(self) -> None:
        await trio.lowlevel.checkpoint()
        self._begin_turn()

    def _begin_turn(self) -> None:
        self._turn_until = time.perf_counter() + TURN_SECONDS

    async def _look_at_times(self) -> None:
        limits = self.limits
        shortest = min(
            limits.handshake_timeout,
            limits.frame_timeout,
            limits.write_timeout,
            limits.idle_timeout,
        )
        pause = min(LOOK_INTERVAL, shortest / 2)
        while True:
            await trio.sleep(pause)
            connections = list(self._by_descriptor.values())
            for begin in range(0, len(connections), LOOKED_AT_ONCE):
                now = trio.current_time()
                for connection in connections[begin : begin + LOOKED_AT_ONCE]:
                    if connection.due_at <= now:
                        connection.overdue(now)
                await trio.lowlevel.checkpoint()


class _Connection:
    """One client: its requests, the answers on their way, and until when it has to do what.

    It stops reading while more answers wait to be written than the limit says, while as many requests are
    under way as it takes, and for a turn when it has had its share of one; what the client sends then waits
    in the kernel, and in the end at the client.

    Attributes:
        descriptor: of its socket.
        due_at: when `overdue` has something to decide.
        scopes: of the requests that tasks answer, by id.
    """

    __slots__ = (
        "_active_at",
        "_context",
        "_end",
        "_ended",
        "_events",
        "_frame_since",
        "_greeted",
        "_in_hand",
        "_inbox",
        "_kept",
        "_out",
        "_out_bytes",
        "_owner",
        "_port",
        "_resting",
        "_room",
        "_said_bye",
        "_sent",
        "_stuck_since",
        "_waiting",
        "descriptor",
        "due_at",
        "scopes",
    )

    def __init__(self, owner: ServedConnections, end: End, context: RpcContext, port: int) -> None:
        self._owner = owner
        self._end = end
        self._context = context
        self._port = port
        self.descriptor = end.socket.fileno()
        self.scopes: dict[int, trio.CancelScope] = {}
        self._inbox = FrameBuffer(body_bytes_max=HANDSHAKE_BODY_BYTES_MAX)
        self._events = select.EPOLLIN
        self._greeted = False
        self._said_bye = False
        self._ended = False
        self._resting = False
        # The request for which there is no place yet.
        self._waiting: tuple[RpcRequest, Begun] | None = None
        # Frames to be written, and how much of the first one has been; None for the many that have none.
        self._out: collections.deque[bytes] | None = None
        self._out_bytes = 0
        self._sent = 0
        self._room: trio.lowlevel.ParkingLot | None = None
        # Bytes of requests that are under way and of replies that wait for a place in the queue; and what the
        # owner was last told of all that is kept.
        self._in_hand = self._kept = 0
        # Since when it has said nothing, a frame has been coming, one has been going out.
        self._active_at = trio.current_time()
        self._frame_since = self._stuck_since = math.inf
        self.due_at = self._active_at + owner.limits.handshake_timeout

    # --- reading ------------------------------------------------------------------------------

    def ready(self, events: int) -> None:
        """There is something to read, or room to write."""
        if self._ended:
            return
        try:
            if events & select.EPOLLOUT:
                self._flush()
                self._go_on()
            if events & ~select.EPOLLOUT:
                if self._is_held_up():
                    self._check_alive(events)
                else:
                    lacking = self._inbox.lacking() if len(self._inbox) else 0
                    self._read(min(max(lacking, RECEIVE_BYTES), RECEIVE_MORE_BYTES))
        except CONNECTION_ERRORS as error:
            self.end(error)
        if not self._ended:
            self._settle()

    def resume(self) -> None:
        """Go on after a rest."""
        self._resting = False
        if self._ended:
            return
        try:
            self._go_on()
        except CONNECTION_ERRORS as error:
            self.end(error)
        else:
            self._settle()

    def _rest(self) -> None:
        if not self._resting:
            self._resting = True
            self._owner.rest(self)

    def _go_on(self) -> None:
        """Take in what is here already, which nothing will tell of, after having been held up."""
        if len(self._inbox):
            self._process()
        self._read(self._end.held)

    def _read(self, size: int) -> None:
        while size and not self._ended and not self._is_held_up():
            data = self._end.receive(size)
            if data is None:
                return
            if not data:
                self._client_closed()
                return
            self._inbox.feed(data)
            self._process()
            # The rest of a record and not the next one: what the kernel still has comes with the next turn.
            size = self._end.held

    def _check_alive(self, events: int) -> None:
        """Whether a connection that is not read from at the moment still is one."""
        if events & _HELD_UP:
            code = self._end.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            raise trio.BrokenResourceError(os.strerror(code) if code else "reset")

    def _is_held_up(self) -> bool:
        return (
            self._resting
            or self._waiting is not None
            or (self._out_bytes > 0 and self._out_bytes >= self._owner.limits.write_queue_bytes_max)
        )

    def _client_closed(self) -> None:
        if len(self._inbox):
            raise ProtocolError("the connection ended inside a frame")
        if not self._greeted:
            raise ProtocolError("closed before its HELLO")
        self.end()

    def _process(self) -> None:
        """Take in whole frames; also those of before, when it has been held up."""
        taken = 0
        while not self._ended and not self._is_held_up():
            frame = self._inbox.take()
            if frame is None:
                break
            self._frame_since = math.inf
            # Messages of a newer version are skipped.
            if (message := unpack(frame.type, frame.body)) is not None:
                self._receive(message)
            taken += 1
            if (len(self._inbox) or self._end.held) and (
                taken >= MESSAGES_AT_ONCE or self._owner.turn_is_over()
            ):
                self._rest()
        now = self._active_at = trio.current_time()
        if not len(self._inbox) or self._is_held_up():
            self._frame_since = math.inf
        elif self._frame_since == math.inf:
            self._frame_since = now

    def _receive(self, message: RpcMessage) -> None:
        if not self._greeted:
            self._greet(message)
            return
        match message:
            case RpcRequest():
                self._accept(message)
            case RpcCancel():
                if (scope := self.scopes.get(message.id)) is not None:
                    scope.cancel()
            case RpcBye():
                self.end()
            case _:
                raise ProtocolError(f"a client must not send {type(message).__name__}")

    def _greet(self, message: RpcMessage) -> None:
        if isinstance(message, RpcBye):
            self.end()
            return
        if not isinstance(message, RpcHello):
            raise ProtocolError(f"began with {type(message).__name__} instead of HELLO")
        limits = self._owner.limits
        self._greeted = True
        self._inbox.body_bytes_max = limits.body_bytes_max + ENVELOPE_BYTES_MAX
        self._write(pack(RpcHello(limits.requests_max)))

    # --- requests -----------------------------------------------------------------------------

    def _accept(self, request: RpcRequest) -> None:
        if request.id in self.scopes:
            raise ProtocolError(f"request id {request.id} is in use")
        begun = self._owner.answers.begin(request, self._context)
        if isinstance(begun, bytes):
            self._write(begun)
            return
        self._in_hand += len(request.body)
        if len(self.scopes) >= self._owner.limits.requests_max:
            self._waiting = (request, begun)
        else:
            self._owner.start(self, request, begun)

    async def answer(self, request: RpcRequest, begun: Begun, scope: trio.CancelScope) -> None:
        """Answer a request that has to wait; with nothing when its caller's time is over."""
        frame = None
        try:
            with scope:
                frame = await self._owner.answers.finish(request, begun)
            # Outside of the scope and before its place is free: of a client that does not read its replies
            # no further requests are taken.
            if frame is not None:
                await self._put(frame)
        finally:
            del self.scopes[request.id]
            self._in_hand -= len(request.body)
            self._place_freed()

    async def _put(self, frame: bytes) -> None:
        limit = self._owner.limits.write_queue_bytes_max
        self._in_hand += len(frame)
        self._account()
        while not self._ended and self._out and self._out_bytes + len(frame) > limit:
            if self._room is None:
                self._room = trio.lowlevel.ParkingLot()
            await self._room.park()
        self._in_hand -= len(frame)
        if self._ended:
            return
        try:
            self._write(frame)
        except CONNECTION_ERRORS as error:
            self.end(error)
        else:
            self._settle()

    def _place_freed(self) -> None:
        if not self._ended and self._waiting is not None:
            request, begun = self._waiting
            self._waiting = None
            self._owner.start(self, request, begun)
            # Many may end at the same time, and each has let in others.
            self._rest()
        self._account()

    # --- writing ------------------------------------------------------------------------------

    def say_bye(self, reason: RpcByeReason, text: str = "") -> None:
        """Ask the client to take further calls elsewhere."""
        if self._said_bye or self._ended:
            return
        self._said_bye = True
        self._active_at = trio.current_time()
        try:
            self._write(pack(RpcBye(reason, text)))
        except CONNECTION_ERRORS as error:
            self.end(error)
        else:
            self._settle()

    def _write(self, frame: bytes) -> None:
        """Write a frame after those that wait; as much of it as can be now."""
        if not self._out:
            sent = self._end.send(frame)
            if sent == len(frame):
                return
            self._out = collections.deque()
            self._sent = sent
            self._stuck_since = trio.current_time()
        self._out.append(frame)
        self._out_bytes += len(frame)
        if len(self._out) == 1:
            self._flush()

    def _flush(self) -> None:
        while self._out:
            frame = self._out[0]
            while self._sent < len(frame):
                sent = self._end.send(memoryview(frame)[self._sent :])
                if not sent:
                    return
                self._sent += sent
            self._out.popleft()
            self._out_bytes -= len(frame)
            self._sent = 0
            self._stuck_since = trio.current_time()
            if self._room is not None:
                self._room.unpark_all()
        self._out = None
        self._stuck_since = math.inf

    # --- times and the end --------------------------------------------------------------------

    def _settle(self) -> None:
        """Say what is waited for next, and until when."""
        self._account()
        if self._ended:
            return
        events = (0 if self._is_held_up() else select.EPOLLIN) | (
            select.EPOLLOUT if self._out else 0
        )
        if events != self._events:
            self._events = events
            self._owner.wait_for(self, events)
        if self._greeted:
            self.due_at = self._next_due()

    def _account(self) -> None:
        """Say how much is kept; which may be the end of the connection."""
        kept = len(self._inbox) + self._out_bytes + self._in_hand
        if kept < KEPT_MIN:
            kept = 0
        if kept != self._kept and not self._ended:
            self._kept = kept
            self._owner.keep(self, kept)

    def _next_due(self) -> float:
        limits = self._owner.limits
        quiet = BYE_TIMEOUT if self._said_bye else limits.idle_timeout
        return min(
            self._stuck_since + limits.write_timeout,
            self._frame_since + limits.frame_timeout,
            self._active_at + quiet,
        )

    def overdue(self, now: float) -> None:
        """A time is over: end the connection, or ask the client to."""
        limits = self._owner.limits
        if not self._greeted:
            self.end(ProtocolError(f"no HELLO within {limits.handshake_timeout} s"))
        elif (
            min(self._stuck_since + limits.write_timeout, self._frame_since + limits.frame_timeout)
            <= now
        ):
            self.end(trio.TooSlowError())
        elif self.scopes:
            self._active_at = now
            self._settle()
        elif self._said_bye:
            self.end()
        else:
            self.say_bye(RpcByeReason.IDLE)

    def end(self, error: BaseException | None = None) -> None:
        """Close the connection and cancel its requests; says why unless the client wanted it so."""
        if self._ended:
            return
        self._ended = True
        if isinstance(error, ProtocolError) and not self._out:
            # Last words, if they need not wait.
            with contextlib.suppress(*CONNECTION_ERRORS):
                self._end.send(pack(RpcBye(_reason_for(error), error.reason)))
        self._owner.forget(self)
        self._end.close()
        self._out, self._waiting = None, None
        for scope in self.scopes.values():
            scope.cancel()
        if self._room is not None:
            self._room.unpark_all()
        self._report(error)

    @property
    def remote(self) -> str:
        """The client's address."""
        return format_address(self._context.remote_host, self._port)

    def _report(self, error: BaseException | None) -> None:
        if isinstance(error, TlsError):
            self._owner.entrance.complain(self._context.remote_host, error.reason)
            return
        remote = self.remote
        if error is None:
            log.debug("rpc_connection_closed", remote=remote, reason="closed by the client")
        else:
            log.info("rpc_connection_closed", remote=remote, reason=reason_of(error))


def _reason_for(error: ProtocolError) -> RpcByeReason:
    if isinstance(error, TlsError):
        return RpcByeReason.UNTRUSTED
    if isinstance(error, _MemoryFull):
        return RpcByeReason.BUSY
    return RpcByeReason.PROTOCOL_ERROR
