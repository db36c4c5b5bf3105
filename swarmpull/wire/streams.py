"""Peer connections: messages and piece payloads over one TCP connection.

Payload bytes go from the file into the socket by sendfile and from the socket into the caller's buffer by
recv_into; neither passes through a Python object.  With TLS they are read into memory, and OpenSSL encrypts
them from there into the socket, and decrypts into the caller's buffer.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import socket
import ssl
from collections.abc import Callable
from typing import Final

import trio

from swarmpull.errors import ProtocolError, StoreUnavailable
from swarmpull.swarm.messages import Bye, Hello, Message, PieceChunk
from swarmpull.wire import peer
from swarmpull.wire.frames import HEADER_BYTES, oversized, unpack_header
from swarmpull.wire.peer import CHUNK_BYTES_MAX
from swarmpull.wire.tls import RECORD_BYTES_MAX, TlsStream

__all__ = ["CHUNK_BYTES_MAX", "PeerStream"]

# What is read beyond a header is payload that has to be copied, so headers are read in small bites.
READ_AHEAD_BYTES: Final = 4096
# Unsent bytes in the kernel, behind which a message has to wait: what the connection carries in so many
# seconds, between these bounds.  Fewer would leave a fast connection idle until this process is awake again.
NOTSENT_SECONDS: Final = 0.016
NOTSENT_BYTES_MIN: Final = 32 * 1024
NOTSENT_BYTES_MAX: Final = 512 * 1024
# Payload is read when the rest of its chunk is there, or what arrives in so many seconds: nobody can use a
# part of a piece, and on a link of 25 MB/s segments arrive a few KiB at a time, each of which would take a
# turn of the event loop.  What stops to come is read after the patience, in seconds.
GATHER_SECONDS: Final = 0.05
GATHER_PATIENCE: Final = 0.25
LEAVE_TIMEOUT: Final = 1.0
# What is read of a file at once to be encrypted: eight records, of which a copy is in memory.
SLICE_BYTES: Final = 128 * 1024
# Disk reads of streams without sendfile, and of pages that sendfile would have to wait for.
_disk_limiter = trio.CapacityLimiter(4)
_SKIP_BYTES: Final = 64 * 1024
# Errors of sendfile that are about the file; all others are about the connection.
_FILE_ERRORS: Final = (errno.EBADF, errno.EIO, errno.EINVAL, errno.EOVERFLOW, errno.ESTALE)


_Socket = trio.socket.SocketType | socket.socket


def _ignore(_count: int) -> None:
    pass


class PeerStream:
    """One connection of the peer protocol, over TCP, TLS, or any other trio stream.

    Several tasks may send: frames never mix, and those of one task keep their order.  One task receives.

    Cancelling `send` or `send_chunk` while a frame is half written, or `receive_into` before it has
    filled its view, leaves the stream at an unknown place: that direction is then broken and each later
    use of it raises trio.BrokenResourceError.  Cancelling `receive` loses nothing.

    All methods raise trio.BrokenResourceError when the connection is lost and trio.ClosedResourceError
    after `aclose`.
    """

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self._socket = stream.socket if type(stream) is trio.SocketStream else None
        self._tls = stream if isinstance(stream, TlsStream) else None
        # What options are set on; whatever else goes through the stream.
        self._options: _Socket | None = None
        if isinstance(stream, trio.SocketStream | TlsStream):
            self._options = stream.socket
            self._options.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
            self._options.setsockopt(
                socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, NOTSENT_BYTES_MIN
            )
        self._notsent = NOTSENT_BYTES_MIN
        self._send_lock = trio.Lock()
        self._send_broken = False
        self._receive_broken = False
        # Bytes that came with a header: at most READ_AHEAD_BYTES, or one message.
        self._buffer = bytearray()
        # Of the chunk that `receive` returned last, not yet taken.
        self._payload_left = 0
        # How long that chunk is and when it began to arrive; how many bytes of the next one are worth a turn
        # of the event loop, and what the kernel was told of it.
        self._chunk_length = 0
        self._chunk_began = 0.0
        self._gather = 1
        self._low_water = 1
        # Whether the last read took all that had arrived.
        self._drained = True

    # --- sending ---------------------------------------------------------------------------

    async def send(self, *messages: Message) -> None:
        """Send messages in one write."""
        data = b"".join(map(peer.pack, messages))
        async with self._send_lock:
            await self._begin_frame()
            await self._stream.send_all(data)
            self._send_broken = False

    async def send_chunk(
        self,
        chunk: PieceChunk,
        file: int,
        offset: int,
        on_sent: Callable[[int], None] = _ignore,
    ) -> None:
        """Send ``chunk`` with the payload that file descriptor ``file`` has at ``offset``.

        The caller keeps ``file`` open until this returns.  ``on_sent`` is called with the number of payload
        bytes whenever the connection has taken some.

        Raises:
            StoreUnavailable: the file ended early or could not be read; the stream is broken then.
            ValueError: the chunk is empty or above CHUNK_BYTES_MAX.
        """
        header = peer.pack_chunk_header(chunk)
        if self._options is None:
            await self._send_copy(header, chunk, file, offset)
            on_sent(chunk.length)
            return
        if _must_wait_for_disk(file, offset, chunk.length):
            await _read_in_thread(file, chunk.length, offset)
        async with self._send_lock:
            await self._begin_frame()
            began = trio.current_time()
            if self._socket is None:
                await self._send_slices(header, chunk, file, offset, on_sent)
            else:
                await self._send_header(self._socket, header)
                await self._send_file(self._socket, chunk, file, offset, on_sent)
            self._send_broken = False
            self._fit_notsent(self._options, chunk.length, trio.current_time() - began)

    async def _begin_frame(self) -> None:
        if self._send_broken:
            raise trio.BrokenResourceError("an earlier send was interrupted inside a frame")
        await trio.lowlevel.checkpoint_if_cancelled()
        # Until the frame is whole: whatever interrupts it leaves this set.
        self._send_broken = True

    async def _send_copy(self, header: bytes, chunk: PieceChunk, file: int, offset: int) -> None:
        payload = await _read_in_thread(file, chunk.length, offset)
        if len(payload) != chunk.length:
            raise _truncated(chunk)
        async with self._send_lock:
            await self._begin_frame()
            await self._stream.send_all(header + payload)
            self._send_broken = False

    async def _send_slices(
        self,
        header: bytes,
        chunk: PieceChunk,
        file: int,
        offset: int,
        on_sent: Callable[[int], None],
    ) -> None:
        """Send a chunk whose pages are in memory through a stream that has to see its bytes."""
        end = offset + chunk.length
        while offset < end:
            try:
                payload = os.pread(file, min(end - offset, SLICE_BYTES), offset)
            except OSError as error:
                raise StoreUnavailable("for pieces", str(error)) from error
            if not payload:
                raise _truncated(chunk)
            await self._stream.send_all(header + payload)
            header = b""
            offset += len(payload)
            on_sent(len(payload))

    def _fit_notsent(self, sock: _Socket, length: int, seconds: float) -> None:
        """Let as much wait in the kernel as the connection carries in `NOTSENT_SECONDS`."""
        worth = length * NOTSENT_SECONDS / max(seconds, 1e-6)
        # Powers of two, and not back and forth between two of them: each change is a system call.
        if self._notsent > NOTSENT_BYTES_MIN and worth < self._notsent / 3:
            self._notsent //= 2
        elif self._notsent < NOTSENT_BYTES_MAX and worth > self._notsent * 1.5:
            self._notsent *= 2
        else:
            return
        with contextlib.suppress(OSError):  # the next use of a lost connection says so
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, self._notsent)

    async def _send_header(self, sock: trio.socket.SocketType, header: bytes) -> None:
        # MSG_MORE: the header leaves together with the first payload bytes.
        try:
            while header:
                sent = await sock.send(header, socket.MSG_MORE)
                header = header[sent:]
        except OSError as error:
            raise _lost(error) from error

    async def _send_file(
        self,
        sock: trio.socket.SocketType,
        chunk: PieceChunk,
        file: int,
        offset: int,
        on_sent: Callable[[int], None],
    ) -> None:
        left = chunk.length
        while left:
            try:
                sent = os.sendfile(_open_fileno(sock), file, offset, left)
            except BlockingIOError:
                await trio.lowlevel.wait_writable(sock)
                continue
            except OSError as error:
                if error.errno in _FILE_ERRORS:
                    raise StoreUnavailable("for pieces", str(error)) from error
                raise _lost(error) from error
            if sent == 0:
                raise _truncated(chunk)
            offset += sent
            left -= sent
            on_sent(sent)

    # --- receiving -------------------------------------------------------------------------

    async def receive(self) -> Message | PieceChunk:
        """The next message.  After a PieceChunk take its payload: `receive_into` or `discard`.

        Raises:
            trio.EndOfChannel: the other side closed between two messages.
            ProtocolError: malformed, too long, or the connection ended inside a message.
        """
        if self._payload_left:
            raise RuntimeError(f"{self._payload_left} bytes of payload were not taken")
        self._check_receiving()
        while True:
            await self._read_ahead(HEADER_BYTES, between_messages=True)
            frame_type, body_length = unpack_header(self._buffer)
            if frame_type == peer.FrameType.PIECE:
                return await self._receive_chunk_head(body_length)
            if body_length > peer.BODY_BYTES_MAX:
                raise oversized(body_length, peer.BODY_BYTES_MAX)
            end = HEADER_BYTES + body_length
            await self._read_ahead(end)
            message = peer.unpack(frame_type, bytes(self._buffer[HEADER_BYTES:end]))
            del self._buffer[:end]
            if message is not None:
                return message

    async def receive_hello(self) -> Hello | Bye:
        """The first message, which has to be a HELLO (or a BYE from a side that does not want us).

        Raises:
            ProtocolError: anything else; also when the other side closed without a word.
        """
        try:
            message = await self.receive()
        except trio.EndOfChannel as error:
            raise ProtocolError("closed before its HELLO") from error
        if not isinstance(message, Hello | Bye):
            raise ProtocolError(f"began with {type(message).__name__} instead of HELLO")
        return message

    async def receive_into(self, view: memoryview) -> None:
        """Fill ``view`` with the next ``len(view)`` bytes of the payload of the last PieceChunk.

        Raises:
            ProtocolError: the connection ended inside the payload.
            ValueError: ``view`` is longer than what is left of the payload.
        """
        size = len(view)
        if size > self._payload_left:
            raise ValueError(f"{size} bytes wanted, {self._payload_left} are left of the payload")
        self._check_receiving()
        await trio.lowlevel.checkpoint_if_cancelled()
        self._receive_broken = True
        filled = 0
        while filled < size:
            filled += await self._take_some(view[filled:])
        self._receive_broken = False

    async def receive_some_into(self, view: memoryview) -> int:
        """Put some bytes of the payload of the last PieceChunk into ``view``, at least one; returns how many.

        Cancelling it loses nothing.

        Raises:
            ProtocolError: the connection ended inside the payload.
            ValueError: ``view`` is empty, or longer than what is left of the payload.
        """
        if not 0 < len(view) <= self._payload_left:
            raise ValueError(f"{len(view)} bytes wanted, {self._payload_left} are left")
        self._check_receiving()
        return await self._take_some(view)

    async def discard(self) -> None:
        """Read what is left of the payload of the last PieceChunk and throw it away."""
        scratch = memoryview(bytearray(min(self._payload_left, _SKIP_BYTES)))
        while self._payload_left:
            await self.receive_into(scratch[: self._payload_left])

    async def leave(self, bye: Bye) -> None:
        """Say ``bye``, where a frame is not half written, and close; no other task may use the stream.

        Takes LEAVE_TIMEOUT seconds at most and is shielded from cancellation, so that it can be the last
        act of a task that is being cancelled.  A connection that is gone already is no error.
        """
        with (
            trio.CancelScope(deadline=trio.current_time() + LEAVE_TIMEOUT, shield=True),
            contextlib.suppress(OSError, trio.BrokenResourceError, trio.ClosedResourceError),
        ):
            await self.send(bye)
            if self._tls is not None:
                await self._tls.linger()
                return
            if isinstance(self._stream, trio.SocketStream):
                await self._stream.send_eof()
            # Closing with unread bytes resets the connection, and the other side may lose the BYE.
            while await self._stream.receive_some(_SKIP_BYTES):
                pass
        with trio.CancelScope(shield=True):
            await self.aclose()

    async def aclose(self) -> None:
        """Close the connection; does not wait for the other side."""
        await trio.aclose_forcefully(self._stream)

    def _check_receiving(self) -> None:
        if self._receive_broken:
            raise trio.BrokenResourceError("an earlier receive_into was interrupted")

    async def _receive_chunk_head(self, body_length: int) -> PieceChunk:
        peer.check_chunk_length(body_length)
        end = HEADER_BYTES + peer.CHUNK_HEAD_BYTES
        await self._read_ahead(end)
        chunk = peer.unpack_chunk_head(body_length, self._buffer[HEADER_BYTES:end])
        del self._buffer[:end]
        self._payload_left = self._chunk_length = chunk.length
        self._chunk_began = trio.current_time()
        return chunk

    async def _read_ahead(self, size: int, *, between_messages: bool = False) -> None:
        # At least ``size`` bytes into the buffer.
        if len(self._buffer) >= size:
            await trio.lowlevel.checkpoint()
            return
        while len(self._buffer) < size:
            if self._options is not None:
                # A message may be shorter than what the chunk before it was gathered by.
                self._set_low_water(self._options, 1)
            room = max(READ_AHEAD_BYTES, size - len(self._buffer))
            data = await self._stream.receive_some(room)
            self._drained = len(data) < room
            if not data:
                if between_messages and not self._buffer:
                    raise trio.EndOfChannel
                raise ProtocolError("the connection ended inside a message")
            self._buffer += data

    async def _take_some(self, view: memoryview) -> int:
        if self._buffer:
            await trio.lowlevel.checkpoint_if_cancelled()
            count = min(len(view), len(self._buffer))
            view[:count] = self._buffer[:count]
            del self._buffer[:count]
        else:
            count = await self._receive_some_into(view)
            if count == 0:
                raise ProtocolError("the connection ended inside a PIECE")
        self._payload_left -= count
        if not self._payload_left:
            self._fit_gather()
        return count

    async def _receive_some_into(self, view: memoryview) -> int:
        if self._tls is not None:
            return await self._decrypt_into(self._tls, view)
        if self._socket is None:
            data = await self._stream.receive_some(len(view))
            view[: len(data)] = data
            return len(data)
        await trio.lowlevel.checkpoint_if_cancelled()
        while True:
            if self._drained:
                await self._wait_for_payload(self._socket, len(view))
            try:
                return self._read_payload(_open_fileno(self._socket), view)
            except BlockingIOError:
                self._drained = True
            except OSError as error:
                raise _lost(error) from error

    async def _decrypt_into(self, tls: TlsStream, view: memoryview) -> int:
        await trio.lowlevel.checkpoint_if_cancelled()
        while True:
            try:
                return tls.read_into(view)
            except ssl.SSLWantReadError:
                # The beginning of a record may be with OpenSSL already, and will not come again.
                await self._wait_for_payload(tls.socket, len(view) - RECORD_BYTES_MAX)

    def _read_payload(self, descriptor: int, view: memoryview) -> int:
        """Read into ``view``, and the header that follows the chunk into the buffer of headers."""
        ahead = bytearray(READ_AHEAD_BYTES if len(view) == self._payload_left else 0)
        count = os.readv(descriptor, [view, ahead])
        self._drained = count < len(view) + len(ahead)
        if count > len(view):
            self._buffer += ahead[: count - len(view)]
        return min(count, len(view))

    async def _wait_for_payload(self, sock: _Socket, wanted: int) -> None:
        """Return when payload is worth reading: enough of it, or no more of it for a while."""
        self._set_low_water(sock, max(1, min(wanted, self._gather)))
        # A read takes what is there, however little it is.
        with trio.move_on_after(GATHER_PATIENCE if self._low_water > 1 else math.inf):
            await trio.lowlevel.wait_readable(sock)

    def _set_low_water(self, sock: _Socket, size: int) -> None:
        """Have the kernel tell of no fewer bytes than these, unless the connection ends."""
        _open_fileno(sock)
        if size != self._low_water:
            with contextlib.suppress(OSError):  # the next read of a lost connection says so
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, size)
            self._low_water = size

    def _fit_gather(self) -> None:
        """After a chunk: what arrives in `GATHER_SECONDS` at the rate at which it came."""
        seconds = max(trio.current_time() - self._chunk_began, 1e-6)
        worth = int(self._chunk_length / seconds * GATHER_SECONDS)
        self._gather = max(1, min(worth, CHUNK_BYTES_MAX))


def _must_wait_for_disk(file: int, offset: int, length: int) -> bool:
    # sendfile from pages that are not in memory would stop the event loop until the disk has them.
    probe = [bytearray(1)]
    try:
        os.preadv(file, probe, offset + length - 1, os.RWF_NOWAIT)
        os.preadv(file, probe, offset, os.RWF_NOWAIT)
    except BlockingIOError:
        return True
    except OSError:
        # Not every file system can say; a real error comes again from sendfile.
        return False
    return False


async def _read_in_thread(file: int, size: int, offset: int) -> bytes:
    try:
        return await trio.to_thread.run_sync(os.pread, file, size, offset, limiter=_disk_limiter)
    except OSError as error:
        raise StoreUnavailable("for pieces", str(error)) from error


def _open_fileno(sock: _Socket) -> int:
    """The descriptor; another task may have closed the socket meanwhile."""
    descriptor = sock.fileno()
    if descriptor < 0:
        raise trio.ClosedResourceError("this stream was closed meanwhile")
    return descriptor


def _truncated(chunk: PieceChunk) -> StoreUnavailable:
    return StoreUnavailable(
        "for pieces", f"the file ended inside piece {chunk.index} while it was being sent"
    )


def _lost(error: OSError) -> trio.BrokenResourceError | trio.ClosedResourceError:
    if error.errno == errno.EBADF:
        return trio.ClosedResourceError("this stream was closed meanwhile")
    return trio.BrokenResourceError(str(error))
