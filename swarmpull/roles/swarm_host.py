"""The trio shell around the scheduler: downloads, seeding, trackers and the clock of one agent or origin.

`dispatch` is synchronous: trio runs one task at a time between checkpoints, so the core needs neither a lock
nor a mailbox.  An action that leads to a further event queues it behind the actions at hand.  One task
sleeps until the core's next deadline; each announce, and each piece under verification, is a task of one
nursery and ends in an event.  Connections are in `swarmpull.roles.peer_connections`.
"""

from __future__ import annotations

import math
import os
import random
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Final, Protocol

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
    ObjectCorrupt,
    StoreUnavailable,
    SwarmpullError,
)
from swarmpull.roles.buffers import PieceBuffers
from swarmpull.roles.downloads import Download
from swarmpull.roles.hash_log import AskForHashes, follow_growth, log_of
from swarmpull.roles.peer_connections import ArrivedPiece, PeerConnections
from swarmpull.roles.rates import Rates, Toll
from swarmpull.roles.shared_work import SharedWork
from swarmpull.roles.small_blobs import SmallBlob, SmallBlobs
from swarmpull.roles.swarm_metrics import SwarmMetrics
from swarmpull.store.blobs import BlobStore
from swarmpull.store.holds import Pin
from swarmpull.store.token_bucket import TokenBucket
from swarmpull.swarm import actions as act
from swarmpull.swarm import bitfield
from swarmpull.swarm import events as ev
from swarmpull.swarm.limits import HostLimits
from swarmpull.swarm.messages import Hello
from swarmpull.swarm.metainfo import PIECE_LENGTH_MIN, BlobShape, GrowingMetainfo, Metainfo
from swarmpull.swarm.peers import AnnounceState, PeerContact, PeerKind
from swarmpull.swarm.scheduler import Scheduler, SwarmLimits
from swarmpull.swarm.torrent import TorrentStatistics
from swarmpull.telemetry import Metrics
from swarmpull.wire.api import AnnounceReply, AnnounceRequest, Growth, WatchReply, WatchRequest
from swarmpull.wire.listen import format_address, open_listeners
from swarmpull.wire.tls import Tls

log = structlog.get_logger()

# Announces that wait for a tracker at the same time, over all torrents.
ANNOUNCES_MAX: Final = 16
# For one announce, however many trackers are asked: long enough for three that hang.
ANNOUNCE_TIMEOUT: Final = 10.0

# Torrents that watch for peers at the same time, a quarter of the calls that one tracker takes from us; the
# others hear of peers with their next announce.
WATCHES_MAX: Final = 16
# For which one watch waits, in seconds: seldom enough to cost nothing.
WATCH_SECONDS: Final = 30.0

# The least time for which a download goes on unread, in seconds: whoever it begins for comes a moment later.
UNREAD_MIN: Final = 1.0

# For which a piece that has arrived waits for its hash, in seconds; it keeps its buffer meanwhile.  The hash
# comes by way of the tracker and is most often there first.
HASH_PATIENCE: Final = 10.0
# Calls that tell an origin of urgent pieces, at the same time; further needs are told with the next ones.
URGES_MAX: Final = 16

# A blob of which a peer says that it is wrong is read again, one at a time, and each at most so often, in
# seconds: whoever accuses without reason does not keep the disk busy.
SUSPICION_INTERVAL: Final = 60.0
# Blobs that were accused of late; further accusations are not looked into.
SUSPICIONS_MAX: Final = 1000

# What a tracker may ask for, in seconds: it must neither be flooded nor forget us.
INTERVAL_MIN: Final = 1.0
INTERVAL_MAX: Final = 600.0

Announce = Callable[[AnnounceRequest], Awaitable[AnnounceReply]]
AnnounceHeld = Callable[
    [PeerContact, Sequence[Digest], Callable[[Digest, AnnounceReply | None], None]],
    Awaitable[None],
]
Watch = Callable[[WatchRequest], Awaitable[WatchReply]]
FindPeers = Callable[[AnnounceRequest], Awaitable[AnnounceReply]]


class HandedOver(Protocol):
    """What is handed over to other clusters."""

    def is_for(self, digest: Digest, cluster: str) -> bool:
        """Whether a blob is being handed over to a cluster."""
        ...

    def toll(self, digest: Digest, cluster: str) -> Toll:
        """Of what is sent of a blob to a cluster, whoever takes it there."""
        ...


class SwarmHost:
    """Downloads and seeds the blobs of one store; see `open_swarm_host`.

    Attributes:
        contact: this host as others may dial it; the host is empty unless it is advertised.
        address: where peers dial, as it was bound.
        rates: at which it sends and receives pieces; may be changed at any time.
        metrics: what it counts.
        recall: begins to bring a blob that a peer asks for into the store, or raises SwarmpullError; None for
            a host that has no other place to get it from.
        handed_over: what origins of other clusters may fetch from here; None: nothing.
        urge: has pieces that readers wait for, and no peer has, fetched first; None if nobody can.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        store: BlobStore,
        contact: PeerContact,
        address: str,
        nursery: trio.Nursery,
        buffers: PieceBuffers,
        rates: Rates,
        announce: Announce | None,
        announce_held: AnnounceHeld | None,
        watch: Watch | None,
        metrics: SwarmMetrics,
        unread_timeout: float = math.inf,
        tls: Tls | None = None,
    ) -> None:
        self.contact = contact
        self.address = address
        self.rates = rates
        self.metrics = metrics
        self.recall: Callable[[Digest, str], Awaitable[object]] | None = None
        self.handed_over: HandedOver | None = None
        self.urge: Callable[[Digest, tuple[int, ...]], Awaitable[None]] | None = None
        self._urging = trio.CapacityLimiter(URGES_MAX)
        self._scheduler = scheduler
        self._store = store
        self._nursery = nursery
        self._buffers = buffers
        self._announce = announce
        self._announce_held = announce_held
        self._announces = trio.CapacityLimiter(ANNOUNCES_MAX)
        self._announcing = 0
        self._watch = watch
        self._watches: dict[Digest, trio.CancelScope] = {}
        self._unread_timeout = max(unread_timeout, UNREAD_MIN)
        self.speaks_tls = tls is not None
        self._connections = PeerConnections(self, scheduler, nursery, buffers, rates, metrics, tls)
        self._tolls: dict[tuple[Digest, str], Toll] = {}
        self._starting: SharedWork[Download | SmallBlob] = SharedWork(nursery)
        self._small = SmallBlobs(store, nursery, self.seed)
        self._downloads: dict[Digest, Download] = {}
        # Downloads whose partial is open, and may be so after their end.
        self._open: set[Download] = set()
        self._closing = False
        self._suspicion_until: dict[Digest, float] = {}
        self._examining = trio.Lock()
        self._events: deque[ev.Event] = deque()
        self._dispatching = False
        self._deadline_moved = trio.Event()
        self._awaited_deadline = math.inf
        self._something_ended = trio.Event()

    # --- for roles ----------------------------------------------------------------------------

    def seed(self, metainfo: Metainfo, namespace: str) -> None:
        """Offer a blob of the store to peers, and keep the trackers informed if there are any."""
        have = bitfield.full(metainfo.piece_count)
        announce = self._announce is not None
        self.dispatch(ev.TorrentAdded(metainfo, namespace, have, verified=True, announce=announce))

    def forget(self, digest: Digest) -> None:
        """Stop downloading or seeding a blob."""
        self._fail(digest, DownloadFailed(str(digest), "the blob was deleted here"))
        self.dispatch(ev.TorrentRemoved(digest))

    def tracker_lost(self, digests: tuple[Digest, ...]) -> None:
        """The tracker of these blobs went away: announce them to its successor soon."""
        self.dispatch(ev.TrackerLost(digests))

    def downloading(self, digest: Digest) -> Download | None:
        """The download of a blob that is under way, if any."""
        return self._downloads.get(digest)

    async def download(
        self, digest: Digest, namespace: str, find: FindPeers, follow: AskForHashes | None = None
    ) -> Download | SmallBlob:
        """Begin to download a blob, or join the download that is under way.

        A small blob may come with its metainfo; then all of it is there, and on its way into the store.
        ``find`` gets the metainfo and the first peers; it is called once however many want the blob, and
        goes on when those who wait give up.  When the metainfo is not complete, ``follow`` waits for more.

        Raises:
            BlobNotFound: nobody has it.
            SwarmpullError: whatever else ``find`` raises, or the store for want of room.
        """
        under_way = self._under_way(digest)
        if under_way is not None:
            return under_way
        job = partial(self._find_and_begin, namespace, find, follow)
        return await self._starting.run(digest, job)

    async def fetch(self, metainfo: GrowingMetainfo, namespace: str) -> Download | SmallBlob:
        """Begin to seed a blob whose pieces the caller gets from elsewhere, or join what is under way.

        The caller stores pieces in the partial of the download and tells of each with `piece_fetched`.

        Raises:
            StoreFull, StoreUnavailable: the store has no room for it, or failed.
        """
        digest = metainfo.digest
        under_way = self._under_way(digest)
        if under_way is not None:
            return under_way
        job = partial(self._begin, metainfo, namespace, announce=False, fed=True)
        return await self._starting.run(digest, job)

    def feed(self, download: Download, namespace: str) -> None:
        """From now on the caller gets the pieces of a download from elsewhere, as with `fetch`."""
        download.following.cancel()
        self._add_torrent(download, namespace, announce=False, fed=True)

    def piece_fetched(self, download: Download, index: int) -> None:
        """A piece that did not come from a peer is stored, and its hash is known."""
        digest = download.metainfo.digest
        if self._downloads.get(digest) is download:
            download.hashes.grew()
            download.progress()
            self.dispatch(ev.PieceFetched(digest, index))

    def give_up(self, download: Download, error: SwarmpullError, *, keep: bool = True) -> None:
        """End a download; its readers get the error.  Without ``keep``, what it has fetched is removed."""
        digest = download.metainfo.digest
        if self._downloads.get(digest) is download:
            if not keep:
                download.partial.condemn()
            self._fail(digest, error)
            self.dispatch(ev.TorrentRemoved(digest))

    async def adopt(
        self, metainfo: Metainfo, namespace: str, source: PeerContact, *, proven: bool = False
    ) -> None:
        """Download a blob from a peer that is known to have it; return when it is in the store.

        With ``proven`` only if every piece hash is known here, when somebody else's download is joined: the
        peer could get pieces of it without having any.

        Raises:
            SwarmpullError: why it cannot be: DownloadFailed, DigestMismatch, StoreFull, ...
        """
        digest = metainfo.digest
        if self._store.has(digest):
            return
        download = self._under_way(digest)
        if download is None:
            job = partial(self._begin_from, source, metainfo, namespace)
            download = await self._starting.run(digest, job)
        if not _agree(download.metainfo, metainfo):
            # Of two that disagree about the pieces one is wrong; the blob's own digest will tell.
            raise InvalidMetainfo(
                str(digest), "a download with other piece hashes is under way: try again later"
            )
        known = download.metainfo
        if proven and isinstance(known, GrowingMetainfo) and not known.is_complete:
            raise InvalidMetainfo(
                str(digest),
                "it is being fetched here and not all is known of it yet: try again later",
            )
        self.dispatch(ev.PeersFound(digest, (source,)))
        await download.wait()

    @contextmanager
    def toll(self, digest: Digest, peer_id: str, toll: Toll) -> Iterator[None]:
        """For the block, limit and count what a peer is sent of a blob whose cluster is not known."""
        key = (digest, peer_id)
        self._tolls[key] = toll
        try:
            yield
        finally:
            if self._tolls.get(key) is toll:
                del self._tolls[key]

    async def drain(self) -> None:
        """Refuse new work, let what is being sent end, leave the swarms.

        Takes as long as the slowest peer and the trackers do: bound it by cancelling.
        """
        self.dispatch(ev.DrainStarted())
        while len(self._connections) or self._announcing:
            self._something_ended = trio.Event()
            await self._something_ended.wait()
        await self._small.settle()

    def pins(self) -> dict[Digest, Pin]:
        """The blobs that must not be evicted now: those of downloads, and those that peers fetch.

        No two complete peers stay connected, so whoever is connected to a seeder is fetching.
        """
        pins = {t.digest: Pin.SENDING for t in self.torrents() if t.agents + t.origins}
        return pins | {d.metainfo.digest: Pin.DOWNLOADING for d in self._open}

    def torrents(self) -> list[TorrentStatistics]:
        """A snapshot of every torrent."""
        return self._scheduler.statistics()

    def neighbours(self, digest: Digest) -> tuple[PeerContact, ...]:
        """Some of the agents that are connected for a blob, as `Scheduler.neighbours` says."""
        return self._scheduler.neighbours(digest)

    def _under_way(self, digest: Digest) -> Download | SmallBlob | None:
        return self._downloads.get(digest) or self._small.get(digest)

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
        # Later is no reason to wake: the one that is waited for comes, and is found to have moved.
        if self._scheduler.next_deadline() < self._awaited_deadline:
            self._deadline_moved.set()

    async def serve(
        self,
        listeners: list[trio.SocketListener],
        connections_max: int,
        *,
        task_status: trio.TaskStatus[list[trio.SocketListener]] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Accept peers and keep the core's time, until cancelled; by `open_swarm_host`."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_time)
            await self._connections.serve(listeners, connections_max, task_status=task_status)

    async def _keep_time(self) -> None:
        """Report each deadline of the core when it has come."""
        while True:
            self._deadline_moved = trio.Event()
            self._awaited_deadline = deadline = self._scheduler.next_deadline()
            with trio.move_on_at(deadline):
                await self._deadline_moved.wait()
            if trio.current_time() >= self._scheduler.next_deadline():
                self.dispatch(ev.DeadlinePassed())

    def _perform(self, action: act.Action) -> None:
        match action:
            case act.Send(connection, message):
                self._connections.send(connection, message)
            case act.SendAll(connections, message):
                for connection in connections:
                    self._connections.send(connection, message)
            case act.SendPiece(connection, digest, index):
                self._connections.send_piece(connection, digest, index)
            case act.Close(connection, reason, text):
                self._connections.close(connection, reason, text)
            case act.Dial(digest, contact):
                self._connections.dial(digest, contact)
            case act.Announce(digest, namespace, state):
                # Counted from here on, so that a drain waits for the last words to the trackers.
                self._announcing += 1
                self._nursery.start_soon(self._tell_trackers, digest, namespace, state)
            case act.AnnounceHeld(digests):
                self._announce_all(digests)
            case act.Watch(digest, position):
                self._begin_watch(digest, position)
            case act.Urge(digest, indices):
                if self.urge is not None and self._urging.available_tokens:
                    self._nursery.start_soon(self._urge, self.urge, digest, indices)
            case act.Finish(digest):
                self._nursery.start_soon(self._finish, digest)
            case act.Fail(digest, reason):
                self._fail(digest, DownloadFailed(str(digest), reason))

    # --- downloads ----------------------------------------------------------------------------

    async def _find_and_begin(
        self, namespace: str, find: FindPeers, follow: AskForHashes | None, digest: Digest
    ) -> Download | SmallBlob:
        request = AnnounceRequest(
            digest,
            namespace,
            self.contact,
            AnnounceState.LEECHING,
            want_metainfo=True,
            growing=follow is not None,
        )
        try:
            reply = await find(request)
            small = _small_in(reply, digest)
            if small is not None:
                self.metrics.small_blobs.inc()
                self.metrics.small_blob_bytes.inc(small.metainfo.length)
                return await self._small.take(small, namespace)
            metainfo = _metainfo_in(reply, digest)
            announce = self._announce is not None
            download = await self._begin(metainfo, namespace, digest, announce=announce)
        except SwarmpullError as error:
            log.info("download_not_started", digest=str(digest), reason=str(error))
            raise
        if follow is not None and reply.growth is not None:
            self._nursery.start_soon(self._follow, download, namespace, follow, reply.growth)
        self.dispatch(_replied(digest, reply))
        return download

    async def _follow(
        self, download: Download, namespace: str, ask: AskForHashes, growth: Growth | None
    ) -> None:
        """Learn the hashes that are not known yet; without them the download fails."""
        with download.following:
            try:
                await follow_growth(download.hashes, namespace, ask, growth)
            except SwarmpullError as error:
                # Nobody can say which of its pieces are right.
                is_wrong = isinstance(error, InvalidMetainfo | ObjectCorrupt)
                self.give_up(download, error, keep=not is_wrong)

    async def _begin(
        self,
        metainfo: BlobShape,
        namespace: str,
        digest: Digest,
        *,
        announce: bool,
        fed: bool = False,
    ) -> Download:
        for former in [d for d in self._open if d.metainfo.digest == digest and d.failed]:
            await former.partial.aclose()
        partial_blob = await self._store.open_partial(metainfo)
        if self._closing:
            await partial_blob.aclose()
            raise _shutting_down(digest)
        download = Download(partial_blob, self._reader_moved, self._reader_closed)
        self._downloads[digest] = download
        self._open.add(download)
        if self._unread_timeout < math.inf:
            self._nursery.start_soon(self._give_up_unread, download)
        log.info(
            "download_started",
            digest=str(digest),
            length=metainfo.length,
            pieces=metainfo.piece_count,
            have=partial_blob.have.bit_count(),
        )
        self._add_torrent(download, namespace, announce=announce, fed=fed)
        return download

    async def _begin_from(
        self, source: PeerContact, metainfo: Metainfo, namespace: str, digest: Digest
    ) -> Download:
        """Begin a download of which a peer is known; it goes on when the caller has given up."""
        download = await self._begin(metainfo, namespace, digest, announce=False)
        self.dispatch(ev.PeersFound(digest, (source,)))
        return download

    async def _give_up_unread(self, download: Download) -> None:
        """End a download that nobody reads, keeping its pieces; one that has all of them is finished."""
        digest = download.metainfo.digest
        while await download.wait_unread(self._unread_timeout):
            if self._downloads.get(digest) is not download or download.partial.complete:
                return
            log.info("download_unread", digest=str(digest), seconds=self._unread_timeout)
            self.metrics.downloads.labels("unread").inc()
            self._end(download, DownloadFailed(str(digest), "nobody reads it any more"))
            self.dispatch(ev.TorrentRemoved(digest))

    def _add_torrent(
        self, download: Download, namespace: str, *, announce: bool, fed: bool
    ) -> None:
        shape, have = download.metainfo, download.partial.have
        # The core may still seed it: the blob was deleted behind our back.
        self.dispatch(ev.TorrentRemoved(shape.digest))
        self.dispatch(
            ev.TorrentAdded(shape, namespace, have, verified=False, announce=announce, fed=fed)
        )

    def _reader_moved(self, digest: Digest, reader: int, index: int) -> None:
        self.dispatch(ev.ReaderMoved(digest, reader, index))

    def _reader_closed(self, digest: Digest, reader: int) -> None:
        self.dispatch(ev.ReaderClosed(digest, reader))

    async def _finish(self, digest: Digest) -> None:
        """Every piece is there: check the whole blob, put it into the store, become a seeder."""
        download = self._downloads.get(digest)
        if download is None:
            return
        failure: SwarmpullError | None = None
        try:
            await download.partial.verify()
            # Readers need not wait for the disk to be done, only for the digest.
            download.confirm()
            await download.partial.commit()
        except DigestMismatch as error:
            failure = download.explain(error)
        except SwarmpullError as error:
            failure = error
        except ValueError:
            if self._downloads.get(digest) is download:
                raise
        if self._downloads.get(digest) is not download:
            return  # it was given up meanwhile
        if failure is not None:
            self.give_up(download, failure)
            return
        log.info("download_complete", digest=str(digest), length=download.metainfo.length)
        self.metrics.downloads.labels("complete").inc()
        self._end(download)
        self.dispatch(ev.BlobVerified(digest))

    def _fail(self, digest: Digest, error: SwarmpullError) -> None:
        download = self._downloads.get(digest)
        if download is not None:
            log.warning("download_failed", digest=str(digest), reason=str(error))
            self.metrics.downloads.labels("failed").inc()
            self._end(download, error)

    def _end(self, download: Download, error: SwarmpullError | None = None) -> None:
        del self._downloads[download.metainfo.digest]
        download.end(error)
        self._nursery.start_soon(self._close_partial, download)

    async def _close_partial(self, download: Download) -> None:
        await download.wait_closable()
        await download.partial.aclose()
        self._open.discard(download)

    async def close_downloads(self) -> None:
        """Give up what is under way, keeping what it has fetched; by `open_swarm_host`."""
        self._closing = True
        self._downloads.clear()
        with trio.CancelScope(shield=True):
            for download in list(self._open):
                download.end(_shutting_down(download.metainfo.digest))
                await download.partial.aclose()

    # --- trackers -----------------------------------------------------------------------------

    async def _tell_trackers(self, digest: Digest, namespace: str, state: AnnounceState) -> None:
        if self._announce is None:
            return
        request = AnnounceRequest(digest, namespace, self.contact, state)
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
                self.dispatch(_replied(digest, reply))
        finally:
            self._announcing -= 1
            self._something_ended.set()

    def _announce_all(self, digests: tuple[Digest, ...]) -> None:
        if self._announce_held is not None:
            self._announcing += 1
            self._nursery.start_soon(self._tell_trackers_held, self._announce_held, digests)
            return
        for digest in digests:
            self._perform(act.Announce(digest, "", AnnounceState.COMPLETE))

    async def _tell_trackers_held(
        self, announce: AnnounceHeld, digests: tuple[Digest, ...]
    ) -> None:
        """Announce many blobs; what no tracker answered in time has failed."""
        left = set(digests)

        def told(digest: Digest, reply: AnnounceReply | None) -> None:
            left.discard(digest)
            failed = ev.AnnounceFailed(digest)
            self.dispatch(failed if reply is None else _replied(digest, reply))

        try:
            async with self._announces:
                with trio.move_on_after(ANNOUNCE_TIMEOUT):
                    await announce(self.contact, digests, told)
            if left:
                log.info("announces_failed", blobs=len(left), digest=str(next(iter(left))))
            for digest in tuple(left):
                self.dispatch(ev.AnnounceFailed(digest))
        finally:
            self._announcing -= 1
            self._something_ended.set()

    def _begin_watch(self, digest: Digest, position: int) -> None:
        former = self._watches.pop(digest, None)
        if former is not None:
            former.cancel()
        if self._watch is None or len(self._watches) >= WATCHES_MAX:
            self.dispatch(ev.WatchEnded(digest))
            return
        scope = self._watches[digest] = trio.CancelScope()
        request = WatchRequest(digest, self.contact.peer_id, position, WATCH_SECONDS)
        self._nursery.start_soon(self._wait_for_peers, self._watch, request, scope)

    async def _wait_for_peers(
        self, watch: Watch, request: WatchRequest, scope: trio.CancelScope
    ) -> None:
        digest = request.digest
        ended = ev.WatchEnded(digest)
        with scope:
            try:
                reply = await watch(request)
            except SwarmpullError as error:
                # The next announce finds another tracker, or says that there is none.
                log.info("watch_failed", digest=str(digest), reason=str(error))
            else:
                ended = ev.WatchEnded(digest, reply.peers, reply.position)
        if self._watches.get(digest) is scope:
            del self._watches[digest]
            self.dispatch(ended)

    async def _urge(
        self,
        urge: Callable[[Digest, tuple[int, ...]], Awaitable[None]],
        digest: Digest,
        indices: tuple[int, ...],
    ) -> None:
        async with self._urging:
            try:
                await urge(digest, indices)
            except SwarmpullError as error:
                # The core says so again as long as somebody waits.
                log.info("urge_failed", digest=str(digest), reason=str(error))

    # --- for the connections ------------------------------------------------------------------

    def hands_over(self, digest: Digest, cluster: str) -> bool:
        """Whether origins of another cluster may fetch a blob from here at the moment."""
        return self.handed_over is not None and self.handed_over.is_for(digest, cluster)

    def toll_for(self, digest: Digest, peer_id: str, cluster: str) -> Toll | None:
        """What limits and counts what a peer is sent of a blob, beyond the rates of the host.

        ``cluster``: the other one that it is of, as far as that is known.
        """
        if cluster and self.handed_over is not None:
            return self.handed_over.toll(digest, cluster)
        return self._tolls.get((digest, peer_id))

    async def shape_for(self, hello: Hello) -> BlobShape | None:
        """The shape of a torrent that a peer asks for; a blob of the store becomes a torrent.

        A tracker may send peers to an origin for a while after it has evicted the blob: it is fetched again.
        """
        torrent = self._scheduler.torrent(hello.digest)
        if torrent is not None:
            return torrent.shape
        if self.recall is not None and not self._store.has(hello.digest):
            try:
                await self.recall(hello.digest, hello.namespace)
            except SwarmpullError as error:
                log.info("blob_not_recalled", digest=str(hello.digest), reason=str(error))
                return None
            torrent = self._scheduler.torrent(hello.digest)
            if torrent is not None:
                return torrent.shape
        with self._store.hold(hello.digest, Pin.SENDING):
            try:
                metainfo = await self._store.metainfo(hello.digest)
            except BlobNotFound:
                return None
            self.seed(metainfo, hello.namespace)
        return metainfo

    def open_for_sending(self, digest: Digest) -> int:
        """A descriptor of its own for the caller, which stays good whatever happens to the blob."""
        download = self._downloads.get(digest)
        if download is not None:
            return os.dup(download.partial.fileno())
        with self._store.open(digest) as handle:
            return os.dup(handle.fileno())

    def take_piece(self, piece: ArrivedPiece) -> bool:
        """Begin to verify and store a piece; False when its download is over."""
        download = self._downloads.get(piece.digest)
        if download is None:
            return False
        self._nursery.start_soon(self._store_piece, download, piece)
        return True

    def accused(self, digest: Digest) -> None:
        """Look whether a blob is still what it was, unless that was seen a moment ago."""
        now = trio.current_time()
        if now < self._suspicion_until.get(digest, -math.inf) or not self._store.has(digest):
            return
        for settled in [d for d, until in self._suspicion_until.items() if until <= now]:
            del self._suspicion_until[settled]
        if len(self._suspicion_until) < SUSPICIONS_MAX:
            # However long it waits for its turn: once is enough.
            self._suspicion_until[digest] = math.inf
            self._nursery.start_soon(self._examine, digest)

    async def _examine(self, digest: Digest) -> None:
        """Read a blob again; a damaged one is removed and forgotten, so that it is fetched anew."""
        try:
            async with self._examining:
                await self._store.verify(digest)
        except DigestMismatch:
            return  # the store has said so
        except (BlobNotFound, StoreUnavailable) as error:
            log.info("blob_not_examined", digest=str(digest), reason=str(error))
            return
        finally:
            self._suspicion_until[digest] = trio.current_time() + SUSPICION_INTERVAL
        log.warning("blob_wrongly_accused", digest=str(digest))

    def connection_ended(self) -> None:
        self._something_ended.set()

    async def _store_piece(self, download: Download, piece: ArrivedPiece) -> None:
        """Verify and store a piece as soon as its hash is known, tell the core, and give the buffer back."""
        size = download.metainfo.piece_size(piece.index)
        data = memoryview(piece.buffer)[:size]
        try:
            if await self._verify_and_store(download, piece, data):
                # Others have heard of it: what is left is for the digest of the whole blob.
                await download.partial.hash_stored(piece.index, data)
        finally:
            self._buffers.release(piece.buffer)

    async def _verify_and_store(
        self, download: Download, piece: ArrivedPiece, data: memoryview
    ) -> bool:
        digest, index = piece.digest, piece.index
        failure: SwarmpullError | None = None
        is_known = stored = False
        try:
            if await download.hashes.wait_hash(index, HASH_PATIENCE):
                is_known = True
                stored = await download.partial.store_piece(index, data)
        except SwarmpullError as error:
            failure = error
        except ValueError:
            if self._downloads.get(digest) is download:
                raise
        if self._downloads.get(digest) is not download:
            return False  # it was given up meanwhile; another download of the blob may be under way
        if failure is not None:
            self.give_up(download, failure)
        elif not is_known:
            self.metrics.bytes_wasted.inc(len(data))
            self.dispatch(ev.PieceLost(digest, index))
        elif stored:
            self._count_received(piece.sender.kind, len(data))
            download.progress()
            self.dispatch(ev.PieceStored(piece.connection, digest, index))
        else:
            self._piece_rejected(piece)
        return stored

    def _piece_rejected(self, piece: ArrivedPiece) -> None:
        self.metrics.pieces_rejected.inc()
        sender = format_address(piece.sender.host, piece.sender.port)
        log.warning("piece_rejected", digest=str(piece.digest), piece=piece.index, peer=sender)
        self.dispatch(ev.PieceRejected(piece.connection, piece.digest, piece.index))

    def _count_received(self, kind: PeerKind, size: int) -> None:
        self.metrics.pieces_received.labels(kind.value).inc()
        self.metrics.bytes_received.labels(kind.value).inc(size)


def _shutting_down(digest: Digest) -> DownloadFailed:
    return DownloadFailed(str(digest), "this host shuts down")


def _replied(digest: Digest, reply: AnnounceReply) -> ev.AnnounceReplied:
    return ev.AnnounceReplied(digest, _sane(reply.interval), reply.peers, reply.position)


def _metainfo_in(reply: AnnounceReply, digest: Digest) -> GrowingMetainfo:
    """What a reply says of a blob.  Raises InvalidMetainfo: nothing, or what cannot be."""
    if reply.metainfo is not None and reply.metainfo.digest == digest:
        return GrowingMetainfo.from_shape(reply.metainfo)
    if reply.metainfo is None and reply.growth is not None:
        return log_of(digest, reply.growth).metainfo
    raise InvalidMetainfo(str(digest), "the answer was about another blob")


def _small_in(reply: AnnounceReply, digest: Digest) -> SmallBlob | None:
    """The blob itself, if a reply brings all of it and it is right."""
    if reply.metainfo is None or reply.metainfo.digest != digest:
        return None
    return SmallBlob.verified(reply.metainfo, reply.content)


def _agree(known: Metainfo | GrowingMetainfo, metainfo: Metainfo) -> bool:
    """Whether what is known of a blob does not contradict its metainfo."""
    if isinstance(known, Metainfo):
        return known == metainfo
    try:
        known.check_shape(metainfo)
    except InvalidMetainfo:
        return False
    return known.agrees_with(metainfo)


def _sane(interval: float) -> float:
    # Written so that NaN becomes the least.
    return min(interval, INTERVAL_MAX) if interval >= INTERVAL_MIN else INTERVAL_MIN


def limits_of(config: SwarmConfig, kind: PeerKind) -> SwarmLimits:
    """The configured limits as the core takes them."""
    configured = {field.name: getattr(config, field.name) for field in attrs.fields(HostLimits)}
    return HostLimits(**configured).of(kind)


@asynccontextmanager
async def open_swarm_host(
    store: BlobStore,
    kind: PeerKind,
    listen: PeerListenerConfig,
    config: SwarmConfig,
    metrics: Metrics,
    *,
    announce: Announce | None = None,
    announce_held: AnnounceHeld | None = None,
    watch: Watch | None = None,
    unread_timeout: float = math.inf,
    tls: Tls | None = None,
) -> AsyncIterator[SwarmHost]:
    """Listen for peers and run the swarm of a store for the length of the block.

    ``announce`` tells a tracker of one blob, ``announce_held`` of many, and ``watch`` waits there for peers;
    None for a host that peers find without one.  A download that nobody reads for ``unread_timeout`` seconds
    ends; its pieces are kept.  With ``tls`` pieces are exchanged only with those who have a certificate of an
    agent or origin.

    Raises:
        StartupError: the peer port cannot be had.
    """
    peer_id = f"{random.SystemRandom().getrandbits(128):032x}"
    counters = SwarmMetrics(metrics)
    listeners = await open_listeners(listen.listen.host, listen.listen.port)
    port = listeners[0].socket.getsockname()[1]
    scheduler = Scheduler(
        peer_id,
        kind,
        port,
        rng=random.Random(),
        limits=limits_of(config, kind),
    )
    counters.connections.set_function(lambda: scheduler.connection_count)
    contact = PeerContact(peer_id, listen.advertise, port, kind)
    # As many pieces again as are claimed may be waiting for their hash and the disk.
    buffers = PieceBuffers(2 * config.inbound_pieces * PIECE_LENGTH_MIN)
    rates = Rates(TokenBucket(config.upload_rate), TokenBucket(config.download_rate))
    address = format_address(listen.listen.host, port)
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        host = SwarmHost(
            scheduler,
            store,
            contact,
            address,
            nursery,
            buffers,
            rates,
            announce,
            announce_held,
            watch,
            counters,
            unread_timeout,
            tls,
        )
        try:
            await nursery.start(host.serve, listeners, config.max_total_connections)
            with store.janitor.attached(host.pins, host.forget):
                yield host
        except Exception as error:
            # Raised again outside: the nursery would hand it to the caller inside a group.
            failure = error
        finally:
            nursery.cancel_scope.cancel()
            await host.close_downloads()
    if failure is not None:
        raise failure
