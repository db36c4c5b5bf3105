"""One peer connection at work: a task that reads, a task that writes, and nothing to decide.

Control messages go out ahead of the next chunk of a piece, so they wait for one chunk at the most; chunks are
the smaller the slower the link is.  A piece that takes longer than moments is reported on as it goes.
"""

from __future__ import annotations

import math
import os
from collections import deque
from functools import partial
from typing import Final, Protocol

import attrs
import trio

from swarmpull.digest import Digest
from swarmpull.errors import ProtocolError, StoreUnavailable
from swarmpull.swarm.messages import Bye, ByeReason, Have, Message, PieceChunk
from swarmpull.swarm.metainfo import BlobShape
from swarmpull.swarm.peers import PeerContact
from swarmpull.wire.streams import CHUNK_BYTES_MAX, PeerStream

# Haves of a very large blob may come in a burst; a peer that is this far behind does not read at all.
OUTBOX_MAX: Final = 20_000
# Messages that leave in one write.
BATCH_MAX: Final = 500
# A chunk that took longer than the one to leave is followed by one of half its length, after one that took
# less than the other the next has twice as many bytes.  A new connection begins in between.
CHUNK_SECONDS_MAX: Final = 1.0
CHUNK_SECONDS_MIN: Final = 0.25
CHUNK_BYTES_MIN: Final = 16 * 1024
CHUNK_BYTES_FIRST: Final = 64 * 1024
# Progress is so many bytes more of a piece, and is told when the piece takes longer than the one and then no
# more often than the other, in seconds.  The first time any bytes count: it may have been claimed at a peer
# that was fast, and be late half a second later.
PROGRESS_BYTES: Final = 16 * 1024
PROGRESS_AFTER: Final = 0.25
PROGRESS_EVERY: Final = 1.0
# Seconds inside a chunk without progress.  A peer stops nowhere inside a chunk, however slow its link: one
# that does hangs, and would keep a buffer for as long as its connection stands.
CHUNK_TIMEOUT: Final = 20.0
# At a time, of a piece that nobody needs any more.
_SCRATCH_BYTES: Final = 64 * 1024
# What may end a connection without being a fault of this program.
CONNECTION_ERRORS: Final = (
    OSError,
    trio.EndOfChannel,
    trio.BrokenResourceError,
    trio.ClosedResourceError,
    ProtocolError,
    StoreUnavailable,
)


class LinkOwner(Protocol):
    """What a link reports to, and asks about the pieces that arrive."""

    def message_received(self, connection: int, message: Message) -> None: ...

    def send_progress(self, connection: int, index: int) -> None:
        """More of a piece has left that takes long."""
        ...

    def piece_sent(self, connection: int, index: int, size: int) -> None: ...

    def was_asked(self, connection: int, index: int) -> bool: ...

    def expects(self, connection: int, index: int) -> bool: ...

    def may_send_now(self, connection: int) -> bool:
        """Whether a chunk of any length may go out on this connection without waiting."""
        ...

    async def may_send(self, connection: int, size: int) -> int:
        """Return when bytes of a piece may go out on this connection, and how many of ``size``."""
        ...

    def chunk_sent(self, connection: int, size: int) -> None: ...

    def may_receive_now(self) -> bool:
        """Whether a chunk of any length may be taken without waiting."""
        ...

    async def may_receive(self, size: int) -> int: ...

    async def acquire_buffer(self, size: int) -> bytearray: ...

    def release_buffer(self, buffer: bytearray) -> None: ...

    def piece_progress(self, connection: int, index: int) -> None:
        """More of a piece has arrived that takes long."""
        ...

    def piece_received(
        self, connection: int, index: int, buffer: bytearray | None, size: int
    ) -> None:
        """A piece is complete; with a buffer it is to be verified and the buffer given back."""
        ...


@attrs.define
class _Progress:
    """When to tell next of how far a piece has come."""

    due_at: float
    due_from: int = 1

    @classmethod
    def of_new_piece(cls) -> _Progress:
        return cls(trio.current_time() + PROGRESS_AFTER)

    def is_due(self, done: int, now: float) -> bool:
        """Whether to tell now that so many bytes are done; if so, it is not due again for a while."""
        if now < self.due_at or done < self.due_from:
            return False
        self.due_at = now + PROGRESS_EVERY
        self.due_from = done + PROGRESS_BYTES
        return True


@attrs.define
class _Outgoing:
    """A piece being sent from ``file``, a descriptor of our own."""

    index: int
    file: int
    offset: int
    size: int
    progress: _Progress
    sent: int = 0


@attrs.define
class _Incoming:
    """A piece being received; without a buffer its bytes are thrown away.

    ``moved_at``: when bytes of it last came, or it began; inf while it is our own rate that it waits for.
    """

    index: int
    size: int
    buffer: bytearray | None
    progress: _Progress
    moved_at: float
    filled: int = 0


class PeerLink:
    """A connection whose handshake has begun.

    Attributes:
        number: by which the core knows it.
        digest: the torrent.
        contact: the other side.
    """

    def __init__(
        self,
        number: int,
        digest: Digest,
        contact: PeerContact,
        stream: PeerStream,
        owner: LinkOwner,
    ) -> None:
        self.number = number
        self.digest = digest
        self.contact = contact
        self._stream = stream
        self._owner = owner
        self._outbox: deque[Message] = deque()
        self._work = trio.Event()
        self._outgoing: _Outgoing | None = None
        self._chunk_due = trio.Event()
        self._chunk_paid = 0
        self._chunk_bytes = CHUNK_BYTES_FIRST
        self._incoming: _Incoming | None = None
        self._haves = 0
        self._bye: Bye | None = None
        self._scope = trio.CancelScope()

    @property
    def bye(self) -> Bye | None:
        """Why this side ends the connection; None as long as it does not."""
        return self._bye

    # --- called by the owner, never blocking --------------------------------------------------

    def send(self, message: Message) -> None:
        """Queue a message; a peer that lets too many pile up is cut off."""
        if len(self._outbox) >= OUTBOX_MAX:
            self.close(ByeReason.STALLED, "does not read its messages")
            return
        self._outbox.append(message)
        self._work.set()

    def send_piece(self, index: int, file: int, offset: int, size: int) -> None:
        """Begin to send a piece; the link closes ``file``."""
        assert self._outgoing is None, "one piece at a time on a connection"
        self._outgoing = _Outgoing(index, file, offset, size, _Progress.of_new_piece())
        self._work.set()

    def close(self, reason: ByeReason, text: str = "") -> None:
        """End `run`; the first reason counts, and is in `bye`."""
        if self._bye is None:
            self._bye = Bye(reason, text)
            self._scope.cancel()

    def silence(self) -> tuple[int, float] | None:
        """The piece that holds a buffer here, and for how many seconds no byte of it has come; else None."""
        piece = self._incoming
        if piece is None or piece.buffer is None:
            return None
        return piece.index, trio.current_time() - piece.moved_at

    # --- the life of the connection -----------------------------------------------------------

    async def run(self, metainfo: BlobShape) -> None:
        """Carry messages and pieces until either side ends the connection.

        What this side has begun to receive is given back and what it has begun to send is closed.

        Raises, in an exception group, unless `close` was called before:
            trio.EndOfChannel: the other side closed.
            trio.BrokenResourceError, trio.ClosedResourceError: the connection is lost.
            ProtocolError: the other side broke the protocol.
            StoreUnavailable: a piece could not be read for sending.
        """
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._write)
                    nursery.start_soon(self._pace)
                    await self._read(metainfo)
                    nursery.cancel_scope.cancel()
        except* CONNECTION_ERRORS:
            if self._bye is None:
                raise
        finally:
            self._release()

    def _release(self) -> None:
        if self._outgoing is not None:
            os.close(self._outgoing.file)
            self._outgoing = None
        if self._incoming is not None and self._incoming.buffer is not None:
            self._owner.release_buffer(self._incoming.buffer)
        self._incoming = None

    # --- writing ------------------------------------------------------------------------------

    async def _write(self) -> None:
        while True:
            if self._outbox:
                batch = [self._outbox.popleft() for _ in range(min(len(self._outbox), BATCH_MAX))]
                await self._stream.send(*batch)
            elif self._outgoing is not None and self._chunk_is_paid(self._outgoing):
                await self._send_chunk(self._outgoing)
            else:
                if self._outgoing is not None:
                    self._chunk_due.set()
                self._work = trio.Event()
                await self._work.wait()

    def _chunk_is_paid(self, piece: _Outgoing) -> bool:
        """Whether the next chunk may leave; one that need not wait costs no turn of the event loop."""
        if not self._chunk_paid:
            # Nor while `_pace` waits for it: it would be paid for twice.
            if self._chunk_due.is_set() or not self._owner.may_send_now(self.number):
                return False
            self._chunk_paid = self._next_chunk(piece)
        return True

    def _next_chunk(self, piece: _Outgoing) -> int:
        return min(self._chunk_bytes, piece.size - piece.sent)

    async def _pace(self) -> None:
        """Wait for the host's rate, chunk by chunk, while messages go on being written."""
        while True:
            await self._chunk_due.wait()
            if self._outgoing is not None and not self._chunk_paid:
                length = self._next_chunk(self._outgoing)
                self._chunk_paid = await self._owner.may_send(self.number, length)
                self._work.set()
            self._chunk_due = trio.Event()

    async def _send_chunk(self, piece: _Outgoing) -> None:
        length, self._chunk_paid = self._chunk_paid, 0
        chunk = PieceChunk(piece.index, piece.sent, length)
        began = trio.current_time()
        offset = piece.offset + piece.sent
        await self._stream.send_chunk(chunk, piece.file, offset, partial(self._sent_some, piece))
        self._owner.chunk_sent(self.number, length)
        self._fit_chunk(length, trio.current_time() - began)
        if piece.sent == piece.size:
            os.close(piece.file)
            self._outgoing = None
            self._owner.piece_sent(self.number, piece.index, piece.size)

    def _sent_some(self, piece: _Outgoing, count: int) -> None:
        piece.sent += count
        if piece.progress.is_due(piece.sent, trio.current_time()):
            self._owner.send_progress(self.number, piece.index)

    def _fit_chunk(self, length: int, seconds: float) -> None:
        """Fit the length of chunks to the speed of the link."""
        if seconds > CHUNK_SECONDS_MAX:
            self._chunk_bytes = max(length // 2, CHUNK_BYTES_MIN)
        elif seconds < CHUNK_SECONDS_MIN and self._chunk_bytes < CHUNK_BYTES_MAX:
            self._chunk_bytes = min(2 * self._chunk_bytes, CHUNK_BYTES_MAX)

    # --- reading ------------------------------------------------------------------------------

    async def _read(self, metainfo: BlobShape) -> None:
        while True:
            message = await self._stream.receive()
            if isinstance(message, PieceChunk):
                await self._receive_chunk(metainfo, message)
                continue
            if isinstance(message, Have):
                self._count_have(metainfo)
            self._owner.message_received(self.number, message)
            if isinstance(message, Bye):
                return

    def _count_have(self, metainfo: BlobShape) -> None:
        # Each piece is told of once: a peer that goes on for ever would cost time and give nothing.
        self._haves += 1
        if self._haves > metainfo.piece_count:
            raise ProtocolError(f"more HAVEs than the {metainfo.piece_count} pieces of the blob")

    async def _receive_chunk(self, metainfo: BlobShape, chunk: PieceChunk) -> None:
        if self._incoming is None:
            self._incoming = await self._begin_piece(metainfo, chunk)
        piece = self._incoming
        if chunk.index != piece.index or chunk.offset != piece.filled:
            raise ProtocolError(
                f"bytes at {chunk.offset} of piece {chunk.index} "
                f"instead of those at {piece.filled} of piece {piece.index}"
            )
        if chunk.offset + chunk.length > piece.size:
            raise ProtocolError(f"more than the {piece.size} bytes of piece {piece.index}")
        left = chunk.length
        while left:
            portion = left
            if piece.buffer is not None and not self._owner.may_receive_now():
                piece.moved_at = math.inf
                portion = await self._owner.may_receive(left)
                piece.moved_at = trio.current_time()
            await self._take(piece, portion)
            left -= portion
        if piece.filled == piece.size:
            self._incoming = None
            self._owner.piece_received(self.number, piece.index, piece.buffer, piece.size)

    async def _take(self, piece: _Incoming, length: int) -> None:
        """Take so many bytes of a chunk off the connection, as long as they keep coming."""
        end = piece.filled + length
        if piece.buffer is None:
            view = memoryview(bytearray(min(length, _SCRATCH_BYTES)))
        else:
            view = memoryview(piece.buffer)[piece.filled : end]
        with trio.move_on_after(CHUNK_TIMEOUT) as scope:
            while piece.filled < end:
                count = await self._stream.receive_some_into(view[: end - piece.filled])
                if piece.buffer is not None:
                    view = view[count:]
                piece.filled += count
                now = piece.moved_at = trio.current_time()
                if piece.progress.is_due(piece.filled, now):
                    scope.deadline = now + CHUNK_TIMEOUT
                    self._owner.piece_progress(self.number, piece.index)
        if scope.cancelled_caught:
            self.close(ByeReason.STALLED, f"stopped inside piece {piece.index}")
            await trio.sleep_forever()  # until what `close` cancelled has ended

    async def _begin_piece(self, metainfo: BlobShape, chunk: PieceChunk) -> _Incoming:
        if not self._owner.was_asked(self.number, chunk.index):
            raise ProtocolError(f"piece {chunk.index} was not claimed")
        size = metainfo.piece_size(chunk.index)
        buffer = None
        if self._owner.expects(self.number, chunk.index):
            buffer = await self._owner.acquire_buffer(size)
        progress = _Progress.of_new_piece()
        return _Incoming(chunk.index, size, buffer, progress, trio.current_time())
