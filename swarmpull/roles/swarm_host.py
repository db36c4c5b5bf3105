"""The trio shell around the scheduler: sockets, disk, trackers and the clock of one agent or origin.

`dispatch` is synchronous: trio runs one task at a time between checkpoints, so the core needs neither a lock
nor a mailbox.  An action that leads to a further event queues it behind the actions at hand.  One task
sleeps until the core's next deadline; each connection, dial, announce and piece under verification is a task
of one nursery and ends in an event.
"""

from __future__ import annotations

import os
import random
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from itertools import count
from typing import Any, Final

import attrs
import structlog
import trio

from swarmpull.config import PeerListenerConfig, SwarmConfig
from swarmpull.digest import Digest
from swarmpull.errors import (
    BlobNotFound,
    DigestMismatch,
    DownloadFailed,
    InvalidMetainfo,
    ProtocolError,
    StoreFull,
    StoreUnavailable,
    SwarmpullError,
)
from swarmpull.roles.buffers import PieceBuffers
from swarmpull.roles.downloads import Download
from swarmpull.roles.peer_link import PeerLink
from swarmpull.roles.swarm_metrics import SwarmMetrics
from swarmpull.store.blobs import BlobStore
from swarmpull.swarm import actions as act
from swarmpull.swarm import bitfield
from swarmpull.swarm import events as ev
from swarmpull.swarm.connections import ConnectionLimits
from swarmpull.swarm.messages import Bye, ByeReason, Hello, Message
from swarmpull.swarm.metainfo import PIECE_LENGTH_MIN, Metainfo
from swarmpull.swarm.peers import AnnounceState, PeerContact, PeerKind
from swarmpull.swarm.pipeline import PipelineLimits, PipelinePolicy
from swarmpull.swarm.scheduler import Scheduler, SwarmLimits, contact_of
from swarmpull.swarm.torrent import TorrentStatistics
from swarmpull.swarm.uploads import UploadLimits
from swarmpull.telemetry import Metrics
from swarmpull.wire.api import AnnounceReply, AnnounceRequest
from swarmpull.wire.listen import (
    format_address,
    open_listeners,
    remote_host,
    serve_connections,
    set_keepalive,
)
from swarmpull.wire.streams import PeerStream

log = structlog.get_logger()

# Dial and handshake together; below the time after which the core gives a dial up by itself.
HANDSHAKE_TIMEOUT: Final = 10.0
# A host that vanished without a word is noticed by the kernel after so many seconds at the latest.
DEAD_AFTER: Final = 60.0
# Announces that wait for a tracker at the same time, over all torrents.
ANNOUNCES_MAX: Final = 16
# A first announce may wait for an origin that has to fetch the blob; the others wait for nobody.
ANNOUNCE_TIMEOUT: Final = 10.0

# What may end a connection without being a fault of this program.
CONNECTION_ERRORS: Final = (
    OSError,
    trio.EndOfChannel,
    trio.BrokenResourceError,
    trio.ClosedResourceError,
    trio.TooSlowError,
    ProtocolError,
    StoreUnavailable,
)

Announce = Callable[[AnnounceRequest], Awaitable[AnnounceReply]]
FindPeers = Callable[[AnnounceRequest], Awaitable[AnnounceReply]]


@attrs.define(eq=False)
class _Start:
    """A download whose metainfo is being looked up; everybody who wants the blob waits for the same."""

    done: trio.Event = attrs.field(factory=trio.Event)
    download: Download | None = None
    error: SwarmpullError | None = None


class SwarmHost:
    """Downloads and seeds the blobs of one store; see `open_swarm_host`.

    Attributes:
        contact: this host as others may dial it; the host is empty unless it is advertised.
        metrics: what it counts.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        store: BlobStore,
        contact: PeerContact,
        nursery: trio.Nursery,
        buffers: PieceBuffers,
        announce: Announce | None,
        metrics: SwarmMetrics,
        bound_host: str,
    ) -> None:
        self.contact = contact
        self._bound_host = bound_host
        self.metrics = metrics
        self._scheduler = scheduler
        self._store = store
        self._nursery = nursery
        self._buffers = buffers
        self._announce = announce
        self._announces = trio.CapacityLimiter(ANNOUNCES_MAX)
        self._links: dict[int, PeerLink] = {}
        self._numbers = count(1)
        self._downloads: dict[Digest, Download] = {}
        self._starts: dict[Digest, _Start] = {}
        self._events: deque[ev.Event] = deque()
        self._dispatching = False
        self._deadline_moved = trio.Event()
        self._announcing = 0
        self._something_ended = trio.Event()

    # --- for roles ----------------------------------------------------------------------------

    def seed(self, metainfo: Metainfo, namespace: str) -> None:
        """Offer a blob of the store to peers, and keep the trackers informed if there are any."""
        have = bitfield.full(metainfo.piece_count)
        announce = self._announce is not None
        self.dispatch(ev.TorrentAdded(metainfo, namespace, have, verified=True, announce=announce))

    def forget(self, digest: Digest) -> None:
        """Stop downloading or seeding a blob."""
        download = self._downloads.pop(digest, None)
        if download is not None:
            self._end(download, DownloadFailed(str(digest), "the blob was deleted here"))
        self.dispatch(ev.TorrentRemoved(digest))

    def downloading(self, digest: Digest) -> Download | None:
        """The download of a blob that is under way, if any."""
        return self._downloads.get(digest)

    async def download(self, digest: Digest, namespace: str, find: FindPeers) -> Download:
        """Begin to download a blob, or join the download that is under way.

        ``find`` gets the metainfo and the first peers; it is called once however many want the blob, and
        goes on when those who wait give up.

        Raises:
            BlobNotFound: nobody has it.
            SwarmpullError: whatever else ``find`` raises, or the store for want of room.
        """
        while True:
            under_way = self._downloads.get(digest)
            if under_way is not None:
                return under_way
            start = self._starts.get(digest)
            if start is None:
                start = self._starts[digest] = _Start()
                self._nursery.start_soon(self._find_and_start, digest, namespace, find, start)
            await start.done.wait()
            if start.error is not None:
                raise start.error.with_traceback(None)
            assert start.download is not None
            return start.download

    async def adopt(self, metainfo: Metainfo, namespace: str, source: PeerContact) -> None:
        """Download a blob from a peer that is known to have it; return when it is in the store.

        Raises:
            SwarmpullError: why it cannot be: DownloadFailed, DigestMismatch, StoreFull, ...
        """
        digest = metainfo.digest
        download = self._downloads.get(digest)
        if download is None:
            download = await self._begin(metainfo, namespace, announce=False)
        self.dispatch(ev.PeersFound(digest, (source,)))
        await download.wait()

    async def drain(self) -> None:
        """Refuse new work, let what is being sent end, leave the swarms."""
        self.dispatch(ev.DrainStarted())
        while self._links or self._announcing:
            self._something_ended = trio.Event()
            await self._something_ended.wait()

    def torrents(self) -> list[TorrentStatistics]:
        """A snapshot of every torrent."""
        return self._scheduler.statistics()

    @property
    def address(self) -> str:
        """Where peers dial, as it was bound."""
        return format_address(self._bound_host, self.contact.port)

    # --- the core -----------------------------------------------------------------------------

    def dispatch(self, event: ev.Event) -> None:
        """Let the core decide about an event, and begin whatever it decided."""
        self._events.append(event)
        if self._dispatching:
            return
        self._dispatching = True
        try:
            while self._events:
                actions = self._scheduler.handle(self._events.popleft(), trio.current_time())
                for action in actions:
                    self._perform(action)
        finally:
            self._dispatching = False
        self.metrics.connections.set(self._scheduler.connection_count)
        self._deadline_moved.set()

    async def keep_time(self) -> None:
        """Report each deadline of the core when it has come."""
        while True:
            self._deadline_moved = trio.Event()
            deadline = self._scheduler.next_deadline()
            with trio.move_on_at(deadline):
                await self._deadline_moved.wait()
            if trio.current_time() >= deadline:
                self.dispatch(ev.DeadlinePassed())

    def _perform(self, action: act.Action) -> None:
        match action:
            case act.Send(connection, message):
                link = self._links.get(connection)
                if link is not None:
                    link.send(message)
            case act.SendPiece(connection, digest, index):
                self._send_piece(connection, digest, index)
            case act.Close(connection, reason, text):
                self._close(connection, reason, text)
            case act.Dial(digest, contact):
                self._nursery.start_soon(self._dial, digest, contact)
            case act.Announce(digest, namespace, state):
                self._nursery.start_soon(self._tell_trackers, digest, namespace, state)
            case act.Finish(digest):
                self._nursery.start_soon(self._finish, digest)
            case act.Fail(digest, reason):
                self._fail(digest, DownloadFailed(str(digest), reason))

    # --- downloads ----------------------------------------------------------------------------

    async def _find_and_start(
        self, digest: Digest, namespace: str, find: FindPeers, start: _Start
    ) -> None:
        try:
            start.download = await self._find_and_begin(digest, namespace, find)
        except SwarmpullError as error:
            log.info("download_not_started", digest=str(digest), reason=str(error))
            start.error = error
        finally:
            del self._starts[digest]
            start.done.set()

    async def _find_and_begin(self, digest: Digest, namespace: str, find: FindPeers) -> Download:
        request = AnnounceRequest(
            digest, namespace, self.contact, AnnounceState.LEECHING, want_metainfo=True
        )
        reply = await find(request)
        metainfo = reply.metainfo
        if metainfo is None or metainfo.digest != digest:
            raise InvalidMetainfo(str(digest), "the answer was about another blob")
        download = await self._begin(metainfo, namespace, announce=self._announce is not None)
        self.dispatch(ev.AnnounceReplied(digest, reply.interval, reply.peers))
        return download

    async def _begin(self, metainfo: Metainfo, namespace: str, *, announce: bool) -> Download:
        partial = await self._store.open_partial(metainfo)
        download = Download(metainfo, partial, self._reader_moved, self._reader_closed)
        self._downloads[metainfo.digest] = download
        log.info(
            "download_started",
            digest=str(metainfo.digest),
            length=metainfo.length,
            pieces=metainfo.piece_count,
            have=partial.have.bit_count(),
        )
        self.dispatch(
            ev.TorrentAdded(metainfo, namespace, partial.have, verified=False, announce=announce)
        )
        return download

    def _reader_moved(self, digest: Digest, reader: int, index: int) -> None:
        self.dispatch(ev.ReaderMoved(digest, reader, index))

    def _reader_closed(self, digest: Digest, reader: int) -> None:
        self.dispatch(ev.ReaderClosed(digest, reader))

    async def _finish(self, digest: Digest) -> None:
        """Every piece is there: check the whole blob, put it into the store, become a seeder."""
        download = self._downloads.get(digest)
        if download is None:
            return
        try:
            await download.partial.commit()
        except (DigestMismatch, StoreFull, StoreUnavailable) as error:
            log.error("download_not_stored", digest=str(digest), reason=str(error))
            self._fail(digest, error)
            self.dispatch(ev.TorrentRemoved(digest))
            return
        log.info("download_complete", digest=str(digest), length=download.metainfo.length)
        self.metrics.downloads.labels("complete").inc()
        del self._downloads[digest]
        self._end(download)
        self.dispatch(ev.BlobVerified(digest))

    def _fail(self, digest: Digest, error: SwarmpullError) -> None:
        download = self._downloads.pop(digest, None)
        if download is not None:
            log.warning("download_failed", digest=str(digest), reason=str(error))
            self.metrics.downloads.labels("failed").inc()
            self._end(download, error)

    def _end(self, download: Download, error: SwarmpullError | None = None) -> None:
        download.end(error)
        self._nursery.start_soon(self._close_partial, download)

    async def _close_partial(self, download: Download) -> None:
        await download.wait_unused()
        await download.partial.aclose()

    # --- trackers -----------------------------------------------------------------------------

    async def _tell_trackers(self, digest: Digest, namespace: str, state: AnnounceState) -> None:
        if self._announce is None:
            return
        request = AnnounceRequest(digest, namespace, self.contact, state)
        self._announcing += 1
        try:
            async with self._announces:
                with trio.fail_after(ANNOUNCE_TIMEOUT):
                    reply = await self._announce(request)
        except (SwarmpullError, trio.TooSlowError) as error:
            log.info("announce_failed", digest=str(digest), state=state.value, reason=str(error))
            if state is not AnnounceState.STOPPED:
                self.dispatch(ev.AnnounceFailed(digest))
        else:
            if state is not AnnounceState.STOPPED:
                self.dispatch(ev.AnnounceReplied(digest, reply.interval, reply.peers))
        finally:
            self._announcing -= 1
            self._something_ended.set()

    # --- connections --------------------------------------------------------------------------

    async def accept(self, stream: trio.SocketStream) -> None:
        """Serve a peer that dialled us, until the connection ends."""
        peer_stream = PeerStream(stream)
        async with _closing(peer_stream):
            with self._connection_boundary("accept") as boundary:
                set_keepalive(stream, dead_after=DEAD_AFTER)
                host = remote_host(stream)
                with trio.fail_after(HANDSHAKE_TIMEOUT):
                    hello = await peer_stream.receive_hello()
                    if isinstance(hello, Bye):
                        return
                    metainfo = await self._metainfo_for(hello)
                if metainfo is None:
                    await peer_stream.send(Bye(ByeReason.UNKNOWN_TORRENT))
                    return
                await self._run_link(peer_stream, hello, contact_of(hello, host), None, metainfo)
            if boundary.protocol_error is not None:
                await _refuse(peer_stream, boundary.protocol_error)

    async def _metainfo_for(self, hello: Hello) -> Metainfo | None:
        """The metainfo of a torrent that a peer asks for; a blob of the store becomes a torrent."""
        torrent = self._scheduler.torrent(hello.digest)
        if torrent is not None:
            return torrent.metainfo
        try:
            metainfo = await self._store.metainfo(hello.digest)
        except BlobNotFound:
            return None
        self.seed(metainfo, hello.namespace)
        return metainfo

    async def _dial(self, digest: Digest, contact: PeerContact) -> None:
        connected = False
        with self._connection_boundary("dial", contact):
            with trio.fail_after(HANDSHAKE_TIMEOUT):
                stream = await trio.open_tcp_stream(contact.host, contact.port)
            peer_stream = PeerStream(stream)
            async with _closing(peer_stream):
                set_keepalive(stream, dead_after=DEAD_AFTER)
                greeting = await self._greet(peer_stream, digest, contact)
                if greeting is not None:
                    connected = True
                    hello, announced, metainfo = greeting
                    await self._run_link(peer_stream, hello, contact, announced, metainfo)
        if not connected:
            self.dispatch(ev.DialFailed(digest, contact.peer_id))

    async def _greet(
        self, stream: PeerStream, digest: Digest, contact: PeerContact
    ) -> tuple[Hello, int, Metainfo] | None:
        """Exchange Hellos on a connection that we dialled; None when it comes to nothing."""
        own = self._scheduler.hello(digest)
        torrent = self._scheduler.torrent(digest)
        if own is None or torrent is None:
            return None
        with trio.fail_after(HANDSHAKE_TIMEOUT):
            await stream.send(own)
            hello = await stream.receive_hello()
        if isinstance(hello, Bye):
            log.debug(
                "peer_refused", digest=str(digest), peer=contact.host, reason=hello.reason.name
            )
            return None
        if hello.digest != digest or hello.peer_id != contact.peer_id:
            raise ProtocolError("another peer or torrent than the one that was dialled")
        return hello, bitfield.from_bytes(own.have, own.piece_count), torrent.metainfo

    async def _run_link(
        self,
        stream: PeerStream,
        hello: Hello,
        contact: PeerContact,
        announced: int | None,
        metainfo: Metainfo,
    ) -> None:
        number = next(self._numbers)
        owner = _Owner(self, self._scheduler, self._buffers, contact)
        link = self._links[number] = PeerLink(number, hello.digest, stream, owner)
        try:
            self.dispatch(ev.PeerConnected(number, hello, contact, announced))
            await link.run(metainfo)
        finally:
            del self._links[number]
            self.dispatch(ev.PeerDisconnected(number))
            self._something_ended.set()

    @contextmanager
    def _connection_boundary(
        self, direction: str, contact: PeerContact | None = None
    ) -> Iterator[_Boundary]:
        """The one place where the end of a connection is not an error of the program."""
        boundary = _Boundary()
        try:
            yield boundary
        except* CONNECTION_ERRORS as group:
            error = _first(group)
            if isinstance(error, ProtocolError):
                boundary.protocol_error = error
            level = "info" if isinstance(error, ProtocolError | StoreUnavailable) else "debug"
            peer = None if contact is None else f"{contact.host}:{contact.port}"
            getattr(log, level)(
                "peer_connection_ended",
                direction=direction,
                peer=peer,
                reason=str(error) or type(error).__name__,
            )

    def _close(self, connection: int, reason: ByeReason, text: str) -> None:
        link = self._links.get(connection)
        if link is not None:
            if reason in (ByeReason.PROTOCOL_ERROR, ByeReason.CORRUPT, ByeReason.STALLED):
                log.info(
                    "peer_dropped", digest=str(link.digest), reason=reason.name.lower(), detail=text
                )
            link.close(reason, text)

    # --- pieces -------------------------------------------------------------------------------

    def _send_piece(self, connection: int, digest: Digest, index: int) -> None:
        link = self._links.get(connection)
        torrent = self._scheduler.torrent(digest)
        if link is None or torrent is None:
            return
        try:
            file = self._open_for_sending(digest)
        except (BlobNotFound, StoreUnavailable) as error:
            log.warning("blob_lost", digest=str(digest), reason=str(error))
            self.dispatch(ev.TorrentRemoved(digest))
            return
        metainfo = torrent.metainfo
        link.send_piece(index, file, metainfo.piece_offset(index), metainfo.piece_size(index))

    def _open_for_sending(self, digest: Digest) -> int:
        """A descriptor of our own, which stays good whatever happens to the blob meanwhile."""
        download = self._downloads.get(digest)
        if download is not None:
            return os.dup(download.partial.fileno())
        with self._store.open(digest) as handle:
            return os.dup(handle.fileno())

    def piece_received(
        self, connection: int, index: int, buffer: bytearray | None, size: int, contact: PeerContact
    ) -> None:
        """All bytes of a piece have arrived; a buffer holds those that were wanted when it began."""
        wanted = buffer is not None and self._scheduler.expects(connection, index)
        link = self._links[connection]
        self.dispatch(ev.PieceReceived(connection, index))
        download = self._downloads.get(link.digest)
        if buffer is not None and wanted and download is not None:
            self._nursery.start_soon(
                self._store_piece, download, connection, index, buffer, size, contact
            )
            return
        self.metrics.bytes_wasted.inc(size)
        if buffer is not None:
            self._buffers.release(buffer)

    async def _store_piece(
        self,
        download: Download,
        connection: int,
        index: int,
        buffer: bytearray,
        size: int,
        contact: PeerContact,
    ) -> None:
        digest = download.metainfo.digest
        try:
            stored = await download.partial.store_piece(index, memoryview(buffer)[:size])
        except (StoreFull, StoreUnavailable) as error:
            self._fail(digest, error)
            self.dispatch(ev.TorrentRemoved(digest))
            return
        except ValueError:
            # The download was given up, and its partial closed, while the piece was under way.
            self.dispatch(ev.PieceLost(digest, index))
            return
        finally:
            self._buffers.release(buffer)
        if stored:
            self.metrics.pieces_received.labels(contact.kind.value).inc()
            self.metrics.bytes_received.labels(contact.kind.value).inc(size)
            download.progress()
            self.dispatch(ev.PieceStored(connection, digest, index))
        else:
            self.metrics.pieces_rejected.inc()
            log.warning(
                "piece_rejected",
                digest=str(digest),
                piece=index,
                peer=f"{contact.host}:{contact.port}",
            )
            self.dispatch(ev.PieceRejected(connection, digest, index))


@attrs.define
class _Boundary:
    """What ended a connection, where the other side is to be told."""

    protocol_error: ProtocolError | None = None


@attrs.frozen
class _Owner:
    """The host as one link sees it: it adds who is at the other end."""

    host: SwarmHost
    scheduler: Scheduler
    buffers: PieceBuffers
    contact: PeerContact

    def message_received(self, connection: int, message: Message) -> None:
        self.host.dispatch(ev.MessageReceived(connection, message))

    def piece_sent(self, connection: int, index: int, size: int) -> None:
        self.host.metrics.pieces_sent.inc()
        self.host.metrics.bytes_sent.inc(size)
        self.host.dispatch(ev.PieceSent(connection, index))

    def was_asked(self, connection: int, index: int) -> bool:
        return self.scheduler.was_asked(connection, index)

    def expects(self, connection: int, index: int) -> bool:
        return self.scheduler.expects(connection, index)

    async def acquire_buffer(self, size: int) -> bytearray:
        return await self.buffers.acquire(size)

    def release_buffer(self, buffer: bytearray) -> None:
        self.buffers.release(buffer)

    def piece_received(
        self, connection: int, index: int, buffer: bytearray | None, size: int
    ) -> None:
        self.host.piece_received(connection, index, buffer, size, self.contact)


@asynccontextmanager
async def _closing(stream: PeerStream) -> AsyncIterator[None]:
    try:
        yield
    finally:
        await stream.aclose()


async def _refuse(stream: PeerStream, error: ProtocolError) -> None:
    """Tell a peer what it did wrong, if it still listens."""
    with trio.move_on_after(1.0):
        try:
            await stream.send(Bye(ByeReason.PROTOCOL_ERROR, error.reason))
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            return


async def _refuse_busy(stream: trio.SocketStream) -> None:
    await PeerStream(stream).send(Bye(ByeReason.BUSY, "this host has as many peers as it takes"))


def _first(group: BaseExceptionGroup[Exception]) -> Exception:
    """The most telling error of a group: a broken protocol over its consequences."""
    errors: list[Exception] = []
    pending: list[Any] = [group]
    while pending:
        error = pending.pop()
        if isinstance(error, BaseExceptionGroup):
            pending.extend(error.exceptions)
        else:
            errors.append(error)
    return min(errors, key=lambda error: not isinstance(error, ProtocolError))


def limits_of(config: SwarmConfig) -> SwarmLimits:
    """The configured limits as the core takes them."""
    return SwarmLimits(
        connections=ConnectionLimits(
            per_torrent=config.max_connections, per_host=config.max_total_connections
        ),
        uploads=UploadLimits(slots=config.upload_slots),
    )


@asynccontextmanager
async def open_swarm_host(
    store: BlobStore,
    kind: PeerKind,
    listen: PeerListenerConfig,
    config: SwarmConfig,
    metrics: Metrics,
    *,
    announce: Announce | None = None,
) -> AsyncIterator[SwarmHost]:
    """Listen for peers and run the swarm of a store for the length of the block.

    ``announce`` tells a tracker; None for a host that peers find without one.

    Raises:
        StartupError: the peer port cannot be had.
    """
    rng = random.Random()
    peer_id = f"{random.SystemRandom().getrandbits(128):032x}"
    listeners = await open_listeners(listen.listen.host, listen.listen.port)
    port = listeners[0].socket.getsockname()[1]
    scheduler = Scheduler(
        peer_id,
        kind,
        port,
        rng=rng,
        limits=limits_of(config),
        policy=PipelinePolicy(PipelineLimits(per_peer=config.pipeline_per_peer)),
    )
    contact = PeerContact(peer_id, listen.advertise, port, kind)
    buffers = PieceBuffers(config.max_inbound_pieces * PIECE_LENGTH_MIN)
    async with trio.open_nursery() as nursery:
        host = SwarmHost(
            scheduler,
            store,
            contact,
            nursery,
            buffers,
            announce,
            SwarmMetrics(metrics),
            listen.listen.host,
        )
        nursery.start_soon(host.keep_time)
        await nursery.start(_serve, host, listeners, config.max_total_connections)
        try:
            yield host
        finally:
            nursery.cancel_scope.cancel()


async def _serve(
    host: SwarmHost,
    listeners: list[trio.SocketListener],
    connections_max: int,
    *,
    task_status: trio.TaskStatus[list[trio.SocketListener]] = trio.TASK_STATUS_IGNORED,
) -> None:
    # Twice the connections that the core admits: those that it refuses need a place for their goodbye.
    await serve_connections(
        listeners,
        host.accept,
        connections_max=2 * connections_max,
        refuse=_refuse_busy,
        task_status=task_status,
    )
