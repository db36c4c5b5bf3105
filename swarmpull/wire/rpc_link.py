"""One RPC connection as both ends see it: limits, reading and writing of whole frames."""

from __future__ import annotations

import collections
import os
from typing import Final, TypeVar

import attrs
import trio

from swarmpull.errors import ProtocolError
from swarmpull.wire.ends import send_now
from swarmpull.wire.frames import FrameBuffer
from swarmpull.wire.rpc_messages import (
    ENVELOPE_BYTES_MAX,
    HANDSHAKE_BODY_BYTES_MAX,
    RpcMessage,
    unpack,
)
from swarmpull.wire.tls import AnyStream

RECEIVE_BYTES: Final = 64 * 1024

# What may end a connection without being a bug of ours: the network, or the other side.
CONNECTION_ERRORS: Final = (
    OSError,
    trio.BrokenResourceError,
    trio.ClosedResourceError,
    trio.TooSlowError,
    ProtocolError,
)


T = TypeVar("T", int, float)


def _positive(_: object, attribute: attrs.Attribute[T], value: T) -> None:
    if not value > 0:
        raise ValueError(f"'{attribute.name}' must be above 0: {value}")


@attrs.frozen(kw_only=True)
class RpcLimits:
    """Bounds of RPC servers and pools; sizes in bytes, times in seconds.

    Attributes:
        connections_max: of one server, or of one pool. A server refuses further ones with BYE busy; a
            pool closes one that is not in use, or fails the call.
        requests_max: under way at a time on one connection. A server stops reading there; a client
            learns the number in the handshake and waits.
        body_bytes_max: of one request or reply.
        write_queue_bytes_max: of frames waiting to be written on one connection; senders wait.
        memory_bytes_max: of frames in part, requests under way and unread replies, over all connections of
            one server; beyond it those with the most are ended with BYE busy.
        handshake_timeout: from accept, or from dial, to the HELLO of the other side.
        frame_timeout: from the first byte of a frame to its last.
        write_timeout: for the other side to read one frame.
        idle_timeout: without a request, until a server says BYE idle.
        dead_after: until the kernel gives up a host that no longer acknowledges.
    """

    # A tracker has one connection from each agent of its cluster.
    connections_max: int = attrs.field(default=16384, validator=_positive)
    requests_max: int = attrs.field(default=64, validator=_positive)
    # A manifest has 4 MiB at most (OCI distribution specification); metainfo of 8 TiB has 4 MiB.
    body_bytes_max: int = attrs.field(default=8 << 20, validator=_positive)
    write_queue_bytes_max: int = attrs.field(default=1 << 20, validator=_positive)
    # 10,000 hosts that all wait for the metainfo of the same 6 GiB, and none has read any of it.
    memory_bytes_max: int = attrs.field(default=512 << 20, validator=_positive)
    handshake_timeout: float = attrs.field(default=10.0, validator=_positive)
    frame_timeout: float = attrs.field(default=30.0, validator=_positive)
    write_timeout: float = attrs.field(default=30.0, validator=_positive)
    idle_timeout: float = attrs.field(default=300.0, validator=_positive)
    dead_after: float = attrs.field(default=20.0, validator=_positive)


class MessageReader:
    """Reads the messages of one connection; only small frames until `open_up`."""

    def __init__(self, stream: trio.abc.ReceiveStream, limits: RpcLimits) -> None:
        self._stream = stream
        self._limits = limits
        self._buffer = FrameBuffer(body_bytes_max=HANDSHAKE_BODY_BYTES_MAX)
        self._frame_due_at = 0.0

    def open_up(self) -> None:
        """The handshake is done: allow frames of full size."""
        self._buffer.body_bytes_max = self._limits.body_bytes_max + ENVELOPE_BYTES_MAX

    async def receive(self) -> RpcMessage | None:
        """The next message, None when the other side closed between frames.

        May be cancelled and called again: nothing is lost.

        Raises:
            ProtocolError: malformed, above the limit, or the connection ended inside a frame.
            trio.TooSlowError: a frame began and did not end in time.
        """
        while True:
            frame = self._buffer.take()
            if frame is None:
                if not await self._fill():
                    return None
                continue
            # What is left in the buffer is the beginning of the next frame.
            self._frame_due_at = trio.current_time() + self._limits.frame_timeout
            # Messages of a newer version are skipped.
            if (message := unpack(frame.type, frame.body)) is not None:
                return message

    async def _fill(self) -> bool:
        if not len(self._buffer):
            data = await self._stream.receive_some(RECEIVE_BYTES)
            self._frame_due_at = trio.current_time() + self._limits.frame_timeout
        else:
            with trio.fail_at(self._frame_due_at):
                data = await self._stream.receive_some(RECEIVE_BYTES)
            if not data:
                raise ProtocolError("the connection ended inside a frame")
        self._buffer.feed(data)
        return bool(data)


class FrameWriter:
    """Writes frames: at once when that need not wait, else from one task.

    So a cancelled sender never leaves half a frame behind, and a small frame costs no turn of the event loop.
    """

    def __init__(self, stream: AnyStream, limits: RpcLimits) -> None:
        self._stream = stream
        self._limits = limits
        self._frames: collections.deque[bytes | memoryview] = collections.deque()
        self._bytes = 0
        self._lot = trio.lowlevel.ParkingLot()
        self._work = trio.Event()
        self._mid_frame = False

    async def put(self, frame: bytes) -> None:
        """Write or queue a frame; waits while the queue has no room. Cancelled: neither was done."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while self._frames and self._bytes + len(frame) > self._limits.write_queue_bytes_max:
            await self._lot.park()
        self.put_nowait(frame)

    def put_nowait(self, frame: bytes) -> None:
        """The same for a small frame whose number is bounded otherwise: a CANCEL, a BYE."""
        left: bytes | memoryview = frame
        if not self._frames and not self._mid_frame:
            sent = send_now(self._stream, frame)
            if sent == len(frame):
                return
            # Another object, so that it cannot be withdrawn: with TLS it has begun even if nothing was sent.
            left = memoryview(frame)[sent:]
            self._mid_frame = True
        self._frames.append(left)
        self._bytes += len(left)
        self._work.set()

    def withdraw(self, frame: bytes) -> bool:
        """Take back a frame object; False when its writing has begun."""
        for index, queued in enumerate(self._frames):
            if queued is frame:
                del self._frames[index]
                self._forget(frame)
                return True
        return False

    async def run(self) -> None:
        """Write what is queued, until cancelled.

        Raises:
            trio.TooSlowError: the other side did not take a frame in time.
            trio.BrokenResourceError: the connection is gone.
        """
        while True:
            while self._frames:
                frame = self._frames.popleft()
                await self._write(frame)
                self._forget(frame)
            self._work = trio.Event()
            await self._work.wait()

    async def _write(self, frame: bytes | memoryview) -> None:
        self._mid_frame = True
        # `trio.fail_after` costs as much as the sending of a small frame.
        with trio.CancelScope(deadline=trio.current_time() + self._limits.write_timeout) as scope:
            await self._stream.send_all(frame)
        if scope.cancelled_caught:
            raise trio.TooSlowError
        self._mid_frame = False

    def _forget(self, frame: bytes | memoryview) -> None:
        self._bytes -= len(frame)
        self._lot.unpark_all()


def first_error(error: BaseException) -> BaseException:
    """The first plain exception in a group."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def reason_of(error: BaseException) -> str:
    """One line of text for a connection error, with its cause where the text alone says little."""
    error = first_error(error)
    if isinstance(error, trio.TooSlowError):
        return "the other side was too slow"
    if isinstance(error, trio.BrokenResourceError | trio.ClosedResourceError):
        cause = error.__cause__ or error.__context__ or str(error)
        return f"connection lost: {cause}" if cause else "connection lost"
    if isinstance(error, OSError) and error.__cause__ is not None:
        # trio's "all attempts to connect failed" says little; the first attempt says why.
        cause = first_error(error.__cause__)
        if isinstance(cause, OSError) and cause.errno:
            return f"cannot connect: {os.strerror(cause.errno)}"
        return f"{error}: {cause}"
    return str(error) or type(error).__name__
