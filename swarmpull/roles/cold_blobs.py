"""The blobs that an origin does not have yet: from another origin if one is at it, else from the backend.

What the backend cannot give may still be queued on other origins, and is read from their disks.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Final, Protocol

import attrs
import structlog
import trio

from swarmpull.digest import Digest
from swarmpull.errors import (
    BackendUnavailable,
    BlobNotFound,
    DigestMismatch,
    ObjectNotFound,
    RepositoryUnmatched,
    RpcFailed,
    RpcUnavailable,
    StoreFull,
    SwarmpullError,
)
from swarmpull.roles.blob_places import BlobPlace, not_given
from swarmpull.roles.cluster import OriginClient
from swarmpull.roles.cold_fetch import ColdFetch, Quarantine
from swarmpull.roles.downloads import Download
from swarmpull.roles.ring_client import RingClient
from swarmpull.roles.shared_work import SharedWork
from swarmpull.roles.small_blobs import SmallBlob
from swarmpull.roles.swarm_host import SwarmHost
from swarmpull.store.backends.base import ObjectStat
from swarmpull.store.backends.namespaces import Namespaces
from swarmpull.store.blobs import BlobStore
from swarmpull.swarm.metainfo import BlobShape, GrowingMetainfo
from swarmpull.telemetry import Metrics
from swarmpull.wire.api import AnnounceReply, AnnounceRequest, Growth, HashesRequest, MetainfoReply

log = structlog.get_logger()

# Ranges that are read from the backend at the same time, over all blobs; further ones wait.
CONNECTIONS_MAX: Final = 12
# Blobs of one piece that are copied at the same time; each costs a connection to the backend, and more at
# once would only make each of them slower.
COPIES_MAX: Final = 16
# Seconds for another origin to ask the backend about a blob, or to copy a small one.
ASK_TIMEOUT: Final = 15.0
# For which the first bytes of an upstream are waited for, in seconds: many a registry says yes to HEAD and
# no to GET, and whoever asks is better told why than cut short.
BEGIN_PATIENCE: Final = 10.0
# Between two looks at a download from another origin, in seconds.  One that has no peer at two in a row is
# continued from the backend.
LOOK_INTERVAL: Final = 3.0


class Elsewhere(Protocol):
    """Where a blob may be that neither the disk nor the backend has: on the disks of other origins."""

    async def length(self, digest: Digest) -> int | None:
        """Its length in bytes; None when it is nowhere.  Raises RpcUnavailable when that is not known."""
        ...

    async def fetch(self, digest: Digest) -> bool:
        """Get it to the disk; False when it is nowhere.  Raises RpcUnavailable when that is not known."""
        ...


class ColdBlobs:
    """Brings blobs to the disk of an origin, once however many ask, and seeds them on their way.

    Attributes:
        quarantine: the blobs whose objects in the backend are something else.
    """

    def __init__(
        self,
        store: BlobStore,
        namespaces: Namespaces,
        host: SwarmHost,
        origins: RingClient | None,
        nursery: trio.Nursery,
        metrics: Metrics,
        *,
        fetch_connections: int,
        elsewhere: Elsewhere | None = None,
    ) -> None:
        """
        Args:
            origins: all origins, this one included; None when there is no other.
            elsewhere: where what the backend cannot give may be; None when there is no such place.
            fetch_connections: ranges of one blob that are read from the backend at the same time.
        """
        self.quarantine = Quarantine(metrics)
        self._elsewhere = elsewhere
        self._store = store
        self._namespaces = namespaces
        self._host = host
        self._origins = origins
        self._nursery = nursery
        self._workers = fetch_connections
        self._asking: SharedWork[Download | None] = SharedWork(nursery)
        self._beginning: SharedWork[Download | None] = SharedWork(nursery)
        self._fetches: dict[Digest, ColdFetch] = {}
        self._looked_after: set[Digest] = set()
        self._copies = trio.CapacityLimiter(COPIES_MAX)
        self._connections = trio.CapacityLimiter(CONNECTIONS_MAX)
        self._bytes_read = metrics.counter(
            "backend_bytes_read_total", "Bytes of blobs read from the backend."
        )
        self._pieces = metrics.counter(
            "backend_pieces_published_total",
            "Pieces read from the backend and seeded, most of them before the blob was complete.",
        )
        metrics.gauge(
            "backend_fetches", "Blobs that are being read from the backend."
        ).set_function(lambda: len(self._fetches))

    async def begin(self, digest: Digest, namespace: str, *, decide: bool) -> Download | None:
        """Return when a blob is on the disk, or on its way there as the download that is returned.

        Args:
            decide: get it from the backend, whatever other origins do.

        Raises:
            BlobNotFound: neither the backend has it nor another origin.
            RepositoryUnmatched: it is not here, and the repository has no backend.
            BackendUnavailable: the backend fails and no other origin has it, or its object is not what its
                name says.
            StoreFull, StoreUnavailable: the disk has no room for it, or fails.
        """
        if self._store.has(digest):
            return None
        under_way = self._host.downloading(digest)
        if under_way is not None:
            with suppress(RepositoryUnmatched):
                self._keep_going(under_way, namespace, self._place(digest, namespace))
            return under_way
        place = self._place(digest, namespace)
        if decide or not self._has_others():
            return await self._beginning.run(place, partial(self._begin, namespace))
        return await self._asking.run(place, partial(self._ask, namespace))

    async def recall(self, digest: Digest, namespace: str) -> None:
        """Begin to get a blob that a peer wants to have from here.  Raises what `begin` does.

        One that was found to be corrupt is not tried again for a peer: the next pull does that.
        """
        place = self._place(digest, namespace)
        if place in self.quarantine:
            raise BlobNotFound(str(digest), place.name)
        await self.begin(digest, namespace, decide=False)

    def check_followed(self, digest: Digest, namespace: str) -> None:
        """Raise ObjectCorrupt when the fetch of a blob that somebody follows has ended so.

        Who was told that it grows, and asks how it ended only now, gets the answer of those who asked in
        time; it is the next pull that tries again.  Raises RepositoryUnmatched as well.
        """
        if not self._store.has(digest) and self._host.downloading(digest) is None:
            self.quarantine.check(self._place(digest, namespace))

    def urge(self, digest: Digest, indices: tuple[int, ...]) -> bool:
        """Have pieces fetched first; False if they are not fetched here."""
        fetch = self._fetches.get(digest)
        if fetch is not None:
            fetch.urge(indices)
        return fetch is not None

    async def urge_for_readers(self, digest: Digest, indices: tuple[int, ...]) -> None:
        """Have pieces that are read here fetched first, by this origin or the one that owns the blob.

        Raises RpcUnavailable, RpcFailed.
        """
        if not self.urge(digest, indices) and self._origins is not None:
            await OriginClient(self._origins).urge(digest, indices)

    # --- from another origin ------------------------------------------------------------------

    def _has_others(self) -> bool:
        return self._origins is not None and len(self._origins.members.members) > 1

    async def _ask(self, namespace: str, place: BlobPlace) -> Download | None:
        """Ask the origins in the order of the ring to decide; one of them is this one."""
        assert self._origins is not None
        digest = place.digest
        origins = OriginClient(self._origins)
        try:
            reply = await origins.get_metainfo(
                digest, namespace, growing=True, decide=True, timeout=ASK_TIMEOUT
            )
        except (RpcUnavailable, RpcFailed) as error:
            log.warning("no_other_origin", digest=str(digest), reason=str(error))
            return await self.begin(digest, namespace, decide=True)
        if reply.seeder.peer_id == self._host.contact.peer_id:
            return await self.begin(digest, namespace, decide=True)
        log.info("blob_from_other_origin", digest=str(digest), origin=reply.seeder.host)
        download = await self._host.download(
            digest, namespace, _found(reply), partial(_follow, origins)
        )
        if isinstance(download, SmallBlob):
            await download.wait()
            return None
        self._keep_going(download, namespace, place)
        return download

    def _keep_going(self, download: Download, namespace: str, place: BlobPlace) -> None:
        """Look after a download that somebody waits for: a copy of another origin's push may be one, too."""
        if place.digest not in self._fetches and place.digest not in self._looked_after:
            self._looked_after.add(place.digest)
            self._nursery.start_soon(self._look_after, download, namespace, place)

    async def _look_after(self, download: Download, namespace: str, place: BlobPlace) -> None:
        try:
            if await self._is_left_alone(download):
                await self._continue(download, namespace, place)
        finally:
            self._looked_after.discard(place.digest)

    async def _is_left_alone(self, download: Download) -> bool:
        """Return when a download has ended, or is read from the backend; True when no peer is left to it."""
        digest = download.metainfo.digest
        alone = 0
        while alone < 2:
            with trio.move_on_after(LOOK_INTERVAL):
                await download.wait_ended()
            if download.ended or digest in self._fetches:
                return False
            peers = [t.agents + t.origins for t in self._host.torrents() if t.digest == digest]
            alone = 0 if any(peers) else alone + 1
        return True

    async def _continue(self, download: Download, namespace: str, place: BlobPlace) -> None:
        """Continue a download from the backend, or other origins, when nobody is left to give us pieces."""
        digest = place.digest
        log.warning("blob_from_backend_instead", digest=str(digest))
        try:
            found = await place.stat()
        except SwarmpullError as error:
            # What is only queued has more than one holder: another one becomes a peer of this download.
            if not await self._fetched_elsewhere(place):
                self._host.give_up(download, error)
            return
        if not download.ended:
            self._host.feed(download, namespace)
            await self._run(self._fetch_of(download, found, place))

    async def length_elsewhere(self, place: BlobPlace) -> int | None:
        """The length in bytes of a blob that the backend cannot give; None when that is not known."""
        if self._elsewhere is None or place.is_foreign:
            return None
        try:
            return await self._elsewhere.length(place.digest)
        except RpcUnavailable:
            return None

    async def _fetched_elsewhere(self, place: BlobPlace, *, absent: bool = False) -> bool:
        """Whether another origin gave what the backend did not.

        Raises BackendUnavailable when the object is ``absent``, and an origin did not say whether it has it.
        """
        if self._elsewhere is None or place.is_foreign:
            return False
        try:
            return await self._elsewhere.fetch(place.digest)
        except RpcUnavailable as silent:
            if not absent:
                return False
            reason = f"it is not there, and may wait on another origin ({silent}): try again"
            raise BackendUnavailable(place.name, place.key, reason) from silent

    def _place(self, digest: Digest, namespace: str) -> BlobPlace:
        return BlobPlace.of(self._namespaces, digest, namespace)

    # --- from the backend ---------------------------------------------------------------------

    async def _begin(self, namespace: str, place: BlobPlace) -> Download | None:
        if place in self.quarantine and await self._fetched_elsewhere(place):
            return None
        try:
            found = await place.stat()
        except (ObjectNotFound, BackendUnavailable) as error:
            if await self._fetched_elsewhere(place, absent=isinstance(error, ObjectNotFound)):
                return None
            raise not_given(place.digest, error) from error
        shape = BlobShape.of(place.digest, found.length)
        if shape.piece_count <= 1:
            await self._copy(place, found)
            return None
        metainfo = GrowingMetainfo.from_shape(shape)
        download = await self._host.fetch(metainfo, namespace)
        if isinstance(download, SmallBlob):
            await download.wait()
            return None
        if download.metainfo is not metainfo:
            return download
        fetch = self._fetch_of(download, found, place)
        self._nursery.start_soon(self._run, fetch)
        if place.is_foreign:
            with trio.move_on_after(BEGIN_PATIENCE):
                await fetch.begun.wait()
            if download.failed:
                await download.wait()
        return download

    def _fetch_of(self, download: Download, found: ObjectStat, place: BlobPlace) -> ColdFetch:
        return ColdFetch(
            download,
            found,
            place,
            self._host,
            self.quarantine,
            workers=self._workers,
            connections=self._connections,
            bytes_read=self._bytes_read,
            pieces=self._pieces,
        )

    async def _run(self, fetch: ColdFetch) -> None:
        self._fetches[fetch.digest] = fetch
        try:
            await fetch.run()
        finally:
            if self._fetches.get(fetch.digest) is fetch:
                del self._fetches[fetch.digest]

    async def _copy(self, place: BlobPlace, found: ObjectStat) -> None:
        """Bring a blob of one piece to the disk: it is there as soon as its piece would be."""
        digest = place.digest
        try:
            async with self._copies, self._store.create() as writer:
                async with place.backend.open(place.key) as chunks:
                    async for chunk in chunks:
                        await writer.write(chunk)
                        self._bytes_read.inc(len(chunk))
                await writer.commit(digest)
        except (ObjectNotFound, BackendUnavailable) as error:
            if await self._fetched_elsewhere(place, absent=isinstance(error, ObjectNotFound)):
                return
            raise not_given(digest, error) from error
        except StoreFull as full:
            raise full.of(str(digest)) from full
        except DigestMismatch as error:
            corrupt = self.quarantine.put(place, f"it hashes to {error.actual}")
            if await self._fetched_elsewhere(place):
                return
            raise corrupt from error
        self.quarantine.release(place)
        log.info("blob_fetched", digest=str(digest), backend=place.name, length=found.length)


Find = Callable[[AnnounceRequest], Awaitable[AnnounceReply]]


def _found(reply: MetainfoReply) -> Find:
    """What an origin has answered, as a tracker would say it."""

    async def find(_: AnnounceRequest) -> AnnounceReply:
        return AnnounceReply(
            (reply.seeder,),
            LOOK_INTERVAL,
            reply.metainfo,
            content=reply.content,
            growth=reply.growth,
        )

    return find


async def _follow(origins: OriginClient, request: HashesRequest) -> Growth:
    return await origins.hashes(attrs.evolve(request, decide=True))
