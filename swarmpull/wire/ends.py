"""Our end of a connection, for whoever reads and writes thousands of them in one task: nothing here waits.
`send_now` is for others, who want to be spared the turn of the event loop that any other send takes.

Both kinds raise trio.BrokenResourceError when the connection is lost; the secured one `TlsError` when the
other side does not trust us.
"""

from __future__ import annotations

import contextlib
import os
import socket

import trio

from swarmpull.errors import TlsError
from swarmpull.wire.tls import AnyStream, TlsStream


class PlainEnd:
    """The end of a connection without TLS.

    Attributes:
        held: nothing: what was received and not taken is with the kernel, which says so.
    """

    __slots__ = ("socket",)
    held = 0

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock

    def receive(self, size: int) -> bytes | None:
        """What is there, ``size`` bytes at the most; empty at the end, None when there is nothing now."""
        try:
            return self.socket.recv(size)
        except BlockingIOError:
            return None
        except OSError as error:
            raise trio.BrokenResourceError(str(error)) from error

    def send(self, data: bytes | memoryview) -> int:
        """Send what can be sent now; returns how many bytes that was.

        What comes after 0 bytes has to be the same data again.
        """
        try:
            return self.socket.send(data)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise trio.BrokenResourceError(str(error)) from error

    def close(self) -> None:
        self.socket.close()


class SecuredEnd:
    """The end of a connection with TLS, after its handshake; methods as of `PlainEnd`."""

    __slots__ = ("_stream", "socket")

    def __init__(self, stream: TlsStream) -> None:
        self._stream = stream
        self.socket: socket.socket = stream.socket

    @property
    def held(self) -> int:
        """How many bytes are left to receive of which the kernel says nothing."""
        return self._stream.held

    def receive(self, size: int) -> bytes | None:
        return self._stream.receive_now(size)

    def send(self, data: bytes | memoryview) -> int:
        return self._stream.send_now(data)

    def close(self) -> None:
        self._stream.close_now()


End = PlainEnd | SecuredEnd


def send_now(stream: AnyStream, data: bytes) -> int:
    """Send what goes without waiting, on a stream that nobody is sending on; returns how many bytes that was.

    0 also for a connection that is gone: the send that waits says so.
    """
    try:
        if isinstance(stream, TlsStream):
            return stream.send_now(data)
        return os.write(stream.socket.fileno(), data)
    except (OSError, trio.BrokenResourceError, trio.ClosedResourceError, TlsError):
        return 0


def end_of(stream: AnyStream) -> End:
    """Take the connection out of ``stream``, which nobody else may use, or close, any more."""
    if isinstance(stream, TlsStream):
        return SecuredEnd(stream)
    below = stream.socket
    kind = (below.family, below.type, below.proto)
    sock = socket.socket(*kind, fileno=below.detach())
    with contextlib.suppress(OSError):
        sock.setblocking(False)
    return PlainEnd(sock)
