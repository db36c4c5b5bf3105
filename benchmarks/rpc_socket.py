"""One connection that speaks RPC without any event loop: what a benchmark sends and hears costs little."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from typing import Final

from swarmpull.errors import ProtocolError
from swarmpull.wire.frames import FrameBuffer
from swarmpull.wire.rpc_messages import FrameType, RpcHello, RpcReply, pack, unpack

RECEIVE_BYTES: Final = 1 << 20
FRAME_BYTES_MAX: Final = 1 << 20
# A frame begins with its length and type; the body of a request with its number.
_HEAD_BYTES: Final = 5
_REQUEST_ID: Final = struct.Struct("!I")


class RpcSocket:
    """A connection to a role on this machine; `shake_hands` before anything else.

    Attributes:
        socket: to be polled; blocking, with the timeout that was given, unless it is set otherwise.
    """

    def __init__(self, role: str, port: int, timeout: float) -> None:
        self._role = role
        self._buffer = FrameBuffer(body_bytes_max=FRAME_BYTES_MAX)
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=timeout)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.sendall(pack(RpcHello(64)))

    def shake_hands(self) -> None:
        """Take the HELLO of the role."""
        if not isinstance(self.wait(), RpcHello):
            raise ProtocolError(f"the {self._role} did not begin with HELLO")

    def wait(self) -> object:
        """The next message."""
        while (frame := self._buffer.take()) is None:
            self._buffer.feed(self._received())
        return unpack(frame.type, frame.body)

    def answers(self) -> Iterator[RpcReply]:
        """What has come since the last time."""
        self._buffer.feed(self._received())
        while (frame := self._buffer.take()) is not None:
            message = unpack(frame.type, frame.body)
            if isinstance(message, RpcReply):
                yield message
            elif frame.type != FrameType.HELLO:
                raise RuntimeError(f"the {self._role} answered {message}")

    def _received(self) -> bytes:
        data = self.socket.recv(RECEIVE_BYTES)
        if not data:
            raise RuntimeError(f"the {self._role} has closed a connection")
        return data


def numbered(frame: bytes, number: int) -> bytes:
    """A packed request as request ``number``."""
    return frame[:_HEAD_BYTES] + _REQUEST_ID.pack(number) + frame[_HEAD_BYTES + _REQUEST_ID.size :]
