"""The peer connections of one host: accepted and dialled, greeted, carried to their end.

A connection is a task.  It reports to the core what happens on it, beginning with `PeerConnected` and ending
with `PeerDisconnected`; whom to dial, what to send and when to close is the core's decision, which comes
back through `PeerConnections.send`, `send_piece`, `close` and `dial`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from itertools import count
from typing import Any, Final, Protocol

import attrs
import structlog
import trio

from swarmpull.digest import Digest
from swarmpull.errors import (
    BlobNotFound,
    ProtocolError,
    StoreFull,
    StoreUnavailable,
    SwarmpullError,
    TlsError,
)
from swarmpull.identity import Identity
from swarmpull.roles.buffers import PieceBuffers
from swarmpull.roles.peer_link import CONNECTION_ERRORS, PeerLink
from swarmpull.roles.rates import Rates, Toll
from swarmpull.roles.swarm_metrics import SwarmMetrics
from swarmpull.roles.uplink import Uplink
from swarmpull.swarm import bitfield
from swarmpull.swarm import events as ev
from swarmpull.swarm.messages import Bye, ByeReason, Hello, Message
from swarmpull.swarm.metainfo import BlobShape
from swarmpull.swarm.peers import PeerContact
from swarmpull.swarm.scheduler import Scheduler, contact_of
from swarmpull.wire import peer
from swarmpull.wire.access import refuse_kind, refuse_peer
from swarmpull.wire.listen import format_address, remote_host, serve_connections, set_keepalive
from swarmpull.wire.streams import PeerStream
from swarmpull.wire.tls import AnyStream, Entrance, Tls

log = structlog.get_logger()

# A dial, and a handshake, each; together below the time after which the core gives a dial up by itself.
HANDSHAKE_TIMEOUT: Final = 10.0
# A host that vanished without a word is noticed by the kernel after so many seconds at the latest.
DEAD_AFTER: Final = 60.0

# Ends that an operator should hear of; the others are the everyday life of a swarm.
_OFFENCES: Final = (
    ByeReason.PROTOCOL_ERROR,
    ByeReason.CORRUPT,
    ByeReason.STALLED,
    ByeReason.UNTRUSTED,
)


@attrs.frozen(eq=False)
class ArrivedPiece:
    """A piece whose bytes are all here, not yet verified; whoever takes it releases the buffer.

    Attributes:
        connection: on which it came.
        digest: the torrent.
        index: of the piece.
        buffer: its bytes.
        sender: who sent it.
    """

    connection: int
    digest: Digest
    index: int
    buffer: bytearray = attrs.field(repr=False)
    sender: PeerContact


class ConnectionHost(Protocol):
    """What connections need of the host that they belong to."""

    def dispatch(self, event: ev.Event) -> None: ...

    async def shape_for(self, hello: Hello) -> BlobShape | None:
        """The shape of a torrent that a peer asks for; None if the blob is not here."""
        ...

    def hands_over(self, digest: Digest, cluster: str) -> bool:
        """Whether another cluster may fetch a blob from here at the moment."""
        ...

    def toll_for(self, digest: Digest, peer_id: str, cluster: str) -> Toll | None:
        """What limits and counts what a peer is sent of a blob, beyond the rates of the host.

        ``cluster``: the other one that it is of; empty for our own, and without TLS.
        """
        ...

    def open_for_sending(self, digest: Digest) -> int:
        """A descriptor for the caller to close.  Raises BlobNotFound, StoreUnavailable, OSError."""
        ...

    def take_piece(self, piece: ArrivedPiece) -> bool:
        """Begin to verify and store a piece; False, and the buffer stays the caller's, if not wanted."""
        ...

    def accused(self, digest: Digest) -> None:
        """A peer says that a piece which it got from here is not what it must be."""
        ...

    def connection_ended(self) -> None: ...


class PeerConnections:
    """All peer connections of a host."""

    def __init__(
        self,
        host: ConnectionHost,
        scheduler: Scheduler,
        nursery: trio.Nursery,
        buffers: PieceBuffers,
        rates: Rates,
        metrics: SwarmMetrics,
        tls: Tls | None = None,
    ) -> None:
        self._tls = tls
        self._entrance = Entrance(tls, _say_untrusted, self._refuse, listener="peer")
        self._host = host
        self._scheduler = scheduler
        self._nursery = nursery
        self._buffers = buffers
        self._rates = rates
        self._metrics = metrics
        self._uplink = Uplink()
        self._links: dict[int, PeerLink] = {}
        self._numbers = count(1)
        buffers.reclaim = self._end_the_most_silent

    def __len__(self) -> int:
        """Connections that have come as far as the other side's Hello, and are not closed yet."""
        return len(self._links)

    async def serve(
        self,
        listeners: list[trio.SocketListener],
        connections_max: int,
        *,
        task_status: trio.TaskStatus[list[trio.SocketListener]] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Accept peers until cancelled; ``connections_max`` is what the core admits."""
        # Twice as many: those that the core refuses need a place for their goodbye.
        await serve_connections(
            listeners,
            self._accept,
            connections_max=2 * connections_max,
            refuse=partial(_refuse_busy, self._entrance),
            task_status=task_status,
        )

    # --- what the core decided ----------------------------------------------------------------

    def dial(self, digest: Digest, contact: PeerContact) -> None:
        """Begin to connect; `PeerConnected` or `DialFailed` will be reported."""
        self._nursery.start_soon(self._dial, digest, contact)

    def send(self, connection: int, message: Message) -> None:
        link = self._links.get(connection)
        if link is not None:
            link.send(message)

    def send_piece(self, connection: int, digest: Digest, index: int) -> None:
        """Begin to send a piece; `PieceSent` will be reported, or that the connection has ended."""
        link = self._links.get(connection)
        torrent = self._scheduler.torrent(digest)
        if link is None or torrent is None:
            return
        try:
            file = self._host.open_for_sending(digest)
        except BlobNotFound as error:
            log.warning("blob_lost", digest=str(digest), reason=str(error))
            self._host.dispatch(ev.TorrentRemoved(digest))
            return
        except (StoreUnavailable, OSError) as error:
            log.warning("piece_not_sent", digest=str(digest), piece=index, reason=str(error))
            link.close(ByeReason.BUSY, "the piece cannot be read just now")
            return
        shape = torrent.shape
        self._uplink.begin(connection)
        link.send_piece(index, file, shape.piece_offset(index), shape.piece_size(index))

    def close(self, connection: int, reason: ByeReason, text: str) -> None:
        link = self._links.get(connection)
        if link is not None:
            link.close(reason, text)

    def _end_the_most_silent(self) -> None:
        """Take a buffer, which somebody waits for, from the piece silent for longest beyond its patience."""
        most, silent = 0.0, None
        for link in self._links.values():
            held = link.silence()
            if held is not None and link.bye is None:
                index, seconds = held
                beyond = seconds - self._scheduler.patience(link.number, index)
                if beyond > most:
                    most, silent = beyond, link
        if silent is not None:
            silent.close(
                ByeReason.STALLED, "stopped inside a piece while others wait for its buffer"
            )

    # --- the beginning of a connection --------------------------------------------------------

    async def _accept(self, stream: trio.SocketStream) -> None:
        try:
            set_keepalive(stream, dead_after=DEAD_AFTER)
            host = remote_host(stream)
            admitted = await self._entrance.admit(stream)
            if admitted is None:
                return
            peer_stream, caller = PeerStream(admitted[0]), admitted[1]
        except (OSError, trio.ClosedResourceError) as error:
            _log_end(False, direction="accepted", reason=str(error))
            return
        async with self._closing(peer_stream, host, direction="accepted", peer=host):
            with _in_time("HELLO"):
                hello = await peer_stream.receive_hello()
            if isinstance(hello, Bye):
                return
            _check_kind(caller, hello)
            if caller is not None and (text := self._refuse_torrent(caller, hello.digest)):
                log.info("foreign_peer_refused", peer=host, reason=text)
                await peer_stream.leave(Bye(ByeReason.UNKNOWN_TORRENT, text))
                return
            shape = await self._host.shape_for(hello)
            if shape is None:
                await peer_stream.leave(Bye(ByeReason.UNKNOWN_TORRENT))
                return
            cluster = self._foreign_cluster(caller)
            await self._carry(peer_stream, hello, contact_of(hello, host), None, shape, cluster)

    async def _dial(self, digest: Digest, contact: PeerContact) -> None:
        reached = await self._connect(digest, contact)
        if reached is None or not await self._call(*reached, digest, contact):
            self._host.dispatch(ev.DialFailed(digest, contact.peer_id))

    def _refuse(self, other: Identity) -> str:
        """Why no pieces are exchanged with somebody; empty when they are."""
        return "" if self._tls is None else refuse_peer(other, self._tls.identity.cluster)

    def _refuse_torrent(self, caller: Identity, digest: Digest) -> str:
        """Why a peer that came in does not get a blob, whether we have it or not; empty when it may."""
        cluster = self._foreign_cluster(caller)
        if not cluster or self._host.hands_over(digest, cluster):
            return ""
        return f"{digest} is not being handed over to cluster {cluster}"

    def _foreign_cluster(self, other: Identity | None) -> str:
        """The cluster of a peer; empty for our own, and without TLS."""
        return "" if other is None or other.cluster == self._entrance.cluster else other.cluster

    async def _call(
        self, stream: PeerStream, other: Identity | None, digest: Digest, contact: PeerContact
    ) -> bool:
        """Use a connection that we dialled; False when it did not come to the other side's Hello."""
        greeted = False
        about = {"direction": "dialled", "digest": str(digest), "peer": _name(contact)}
        async with self._closing(stream, contact.host, **about):
            own = self._scheduler.hello(digest)
            torrent = self._scheduler.torrent(digest)
            if own is None or torrent is None:
                return False
            with _in_time("answer to our HELLO"):
                await stream.send(own)
                hello = await stream.receive_hello()
            if isinstance(hello, Bye) and hello.reason is ByeReason.UNTRUSTED:
                raise TlsError(f"refused: {hello.text}")
            if isinstance(hello, Bye):
                _log_bye(hello, digest, contact, said="by the peer")
                return False
            _check_kind(other, hello)
            if hello.digest != digest:
                raise ProtocolError("another torrent than the one that was dialled")
            if hello.peer_id != contact.peer_id:
                # The process was restarted; whoever answers there now will do as well.
                self._host.dispatch(ev.DialFailed(digest, contact.peer_id, is_gone=True))
                contact = contact_of(hello, contact.host)
            greeted = True
            announced = bitfield.from_bytes(own.have, own.piece_count)
            cluster = self._foreign_cluster(other)
            await self._carry(stream, hello, contact, announced, torrent.shape, cluster)
        return greeted

    async def _connect(
        self, digest: Digest, contact: PeerContact
    ) -> tuple[PeerStream, Identity | None] | None:
        """A connection to a peer, and who is there if that is known; None when there is none to be had."""
        try:
            with trio.fail_after(HANDSHAKE_TIMEOUT):
                return await self._open(contact)
        except trio.TooSlowError:
            reason = f"no connection within {HANDSHAKE_TIMEOUT:g} s"
        except TlsError as error:
            self._entrance.complain(contact.host, error.reason)
            return None
        except (*CONNECTION_ERRORS, ValueError, OverflowError) as error:
            # The last two: names and ports that no resolver takes; contacts come from other hosts.
            reason = str(error)
        about = {"direction": "dialled", "digest": str(digest), "peer": _name(contact)}
        _log_end(False, reason=reason, **about)
        return None

    async def _open(self, contact: PeerContact) -> tuple[PeerStream, Identity | None]:
        plain = await trio.open_tcp_stream(contact.host, contact.port)
        stream: AnyStream = plain
        other: Identity | None = None
        try:
            set_keepalive(plain, dead_after=DEAD_AFTER)
            if self._tls is not None:
                stream, other = await self._tls.connect(plain)
                if refusal := self._tls.refuse_visitor(other, stream) or self._refuse(other):
                    raise TlsError(refusal)
            return PeerStream(stream), other
        except BaseException:
            await trio.aclose_forcefully(stream)
            raise

    @asynccontextmanager
    async def _closing(self, stream: PeerStream, host: str, **about: str) -> AsyncIterator[None]:
        """Close at the end; the one place where the end of a connection is not an error of the program.

        A peer that broke the protocol is told how.
        """
        errors: list[Exception] = []
        try:
            try:
                yield
            except* (*CONNECTION_ERRORS, StoreFull) as group:
                errors = _most_telling_first(group)
            if errors and isinstance(errors[0], TlsError):
                self._entrance.complain(host, errors[0].reason)
            elif errors:
                reason = str(errors[0]) or type(errors[0]).__name__
                _log_end(isinstance(errors[0], SwarmpullError), reason=reason, **about)
            if errors and isinstance(errors[0], ProtocolError):
                await stream.leave(Bye(_reason_for(errors[0]), errors[0].reason))
        finally:
            await stream.aclose()

    # --- its life and its end -----------------------------------------------------------------

    async def _carry(
        self,
        stream: PeerStream,
        hello: Hello,
        contact: PeerContact,
        announced: int | None,
        shape: BlobShape,
        cluster: str,
    ) -> None:
        number = next(self._numbers)
        owner = _Owner(
            self._host,
            self._scheduler,
            self._buffers,
            self._rates,
            self._uplink,
            self._metrics,
            hello.digest,
            contact,
            cluster,
        )
        link = PeerLink(number, hello.digest, contact, stream, owner)
        self._links[number] = link
        try:
            try:
                self._host.dispatch(ev.PeerConnected(number, hello, contact, announced))
                await link.run(shape)
            except* StoreUnavailable:
                # What it was to be sent cannot be read: nor will it be for the next peer.
                self._host.accused(hello.digest)
                raise
            finally:
                # At once: what was claimed there is free for others while we say goodbye.
                self._uplink.end(number)
                self._host.dispatch(ev.PeerDisconnected(number))
            if link.bye is not None:
                _log_bye(link.bye, hello.digest, contact, said="by us")
                await stream.leave(link.bye)
        finally:
            del self._links[number]
            self._host.connection_ended()


@attrs.frozen
class _Owner:
    """The host as one link sees it: it adds what the link is about and who is at the other end."""

    host: ConnectionHost
    scheduler: Scheduler
    buffers: PieceBuffers
    rates: Rates
    uplink: Uplink
    metrics: SwarmMetrics
    digest: Digest
    contact: PeerContact
    cluster: str

    def message_received(self, connection: int, message: Message) -> None:
        if isinstance(message, Bye):
            _log_bye(message, self.digest, self.contact, said="by the peer")
            if message.reason is ByeReason.CORRUPT:
                self.host.accused(self.digest)
        self.host.dispatch(ev.MessageReceived(connection, message))

    def piece_progress(self, connection: int, index: int) -> None:
        self.host.dispatch(ev.PieceProgress(connection, index))

    def send_progress(self, connection: int, index: int) -> None:
        self.host.dispatch(ev.SendProgress(connection, index))

    def piece_sent(self, connection: int, index: int, size: int) -> None:
        self.uplink.end(connection)
        self.metrics.pieces_sent.inc()
        self.metrics.bytes_sent.inc(size)
        self.host.dispatch(ev.PieceSent(connection, index))

    def was_asked(self, connection: int, index: int) -> bool:
        return self.scheduler.was_asked(connection, index)

    def expects(self, connection: int, index: int) -> bool:
        return self.scheduler.expects(connection, index)

    def may_send_now(self, connection: int) -> bool:
        toll = self._toll()
        is_free = self.rates.upload.is_unlimited and (toll is None or toll.bucket.is_unlimited)
        return is_free and self.uplink.has_turn(connection)

    async def may_send(self, connection: int, size: int) -> int:
        toll = self._toll()
        if toll is not None:
            size = await toll.bucket.take_some(size)
        await self.uplink.turn(connection)
        if self.rates.upload.is_unlimited or toll is None:
            return await self.rates.upload.take_some(size)
        await self.rates.upload.take(size)
        return size

    def chunk_sent(self, connection: int, size: int) -> None:
        self.uplink.sent(connection, size)
        toll = self._toll()
        if toll is not None:
            toll.sent += size

    def _toll(self) -> Toll | None:
        return self.host.toll_for(self.digest, self.contact.peer_id, self.cluster)

    def may_receive_now(self) -> bool:
        return self.rates.download.is_unlimited

    async def may_receive(self, size: int) -> int:
        return await self.rates.download.take_some(size)

    async def acquire_buffer(self, size: int) -> bytearray:
        return await self.buffers.acquire(size)

    def release_buffer(self, buffer: bytearray) -> None:
        self.buffers.release(buffer)

    def piece_received(
        self, connection: int, index: int, buffer: bytearray | None, size: int
    ) -> None:
        # What the core expects at this moment it takes for being verified, and waits for the outcome.
        expected = self.scheduler.expects(connection, index)
        self.host.dispatch(ev.PieceReceived(connection, index))
        if expected and buffer is not None:
            piece = ArrivedPiece(connection, self.digest, index, buffer, self.contact)
            if self.host.take_piece(piece):
                return
        self.metrics.bytes_wasted.inc(size)
        if buffer is not None:
            self.buffers.release(buffer)
        if expected:
            # It was thrown away as it came, because another peer had sent it; that one was wrong.
            self.host.dispatch(ev.PieceLost(self.digest, index))


def _name(contact: PeerContact) -> str:
    return format_address(contact.host, contact.port)


@contextmanager
def _in_time(what: str) -> Iterator[None]:
    try:
        with trio.fail_after(HANDSHAKE_TIMEOUT):
            yield
    except trio.TooSlowError as error:
        raise ProtocolError(f"no {what} within {HANDSHAKE_TIMEOUT:g} s") from error


def _most_telling_first(group: BaseExceptionGroup[Exception]) -> list[Exception]:
    """The errors of a group, a broken protocol or a failing disk before their consequences."""
    errors: list[Exception] = []
    pending: list[Any] = [group]
    while pending:
        error = pending.pop()
        if isinstance(error, BaseExceptionGroup):
            pending.extend(error.exceptions)
        else:
            errors.append(error)
    return sorted(errors, key=lambda error: not isinstance(error, SwarmpullError))


def _log_end(offence: bool, **about: str) -> None:
    (log.info if offence else log.debug)("peer_connection_ended", **about)


def _log_bye(bye: Bye, digest: Digest, contact: PeerContact, *, said: str) -> None:
    reason = f"{bye.reason.name.lower()} {bye.text}".rstrip()
    offence = bye.reason in _OFFENCES
    _log_end(offence, ended=said, digest=str(digest), peer=_name(contact), reason=reason)


def _check_kind(other: Identity | None, hello: Hello) -> None:
    if other is not None and (refusal := refuse_kind(other, hello.kind.value)):
        raise TlsError(refusal)


def _reason_for(error: ProtocolError) -> ByeReason:
    return ByeReason.UNTRUSTED if isinstance(error, TlsError) else ByeReason.PROTOCOL_ERROR


async def _refuse_busy(entrance: Entrance, stream: trio.SocketStream) -> None:
    bye = Bye(ByeReason.BUSY, "this host has as many peers as it takes")
    await entrance.dismiss(stream, peer.pack(bye))


async def _say_untrusted(stream: trio.abc.SendStream, reason: str) -> None:
    await stream.send_all(peer.pack(Bye(ByeReason.UNTRUSTED, reason)))
