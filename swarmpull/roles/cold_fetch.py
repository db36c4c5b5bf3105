"""One blob on its way from the backend to the disk of an origin, by ranges, and seeded meanwhile.

A few workers read runs of pieces, as `swarmpull.store.fetch_plan` says.  A piece goes chunk by chunk to its
place in the partial; as soon as it is whole its hash is in the metainfo, peers and readers hear of it, and it
is seeded.  There is no other copy of it anywhere.  A fetch that fails leaves what it has in the partial, and
the next one goes on from there.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import AsyncIterator
from typing import Any, Final

import structlog
import trio
from prometheus_client import Counter

from swarmpull.digest import Digest
from swarmpull.errors import (
    BackendUnavailable,
    DigestMismatch,
    InvalidMetainfo,
    InvalidRange,
    ObjectCorrupt,
    ObjectNotFound,
    ObjectReplaced,
    StoreFull,
    StoreUnavailable,
    SwarmpullError,
    UpstreamBusy,
    UpstreamRefused,
)
from swarmpull.roles.blob_places import BlobPlace
from swarmpull.roles.downloads import Download
from swarmpull.roles.swarm_host import SwarmHost
from swarmpull.store.backends.base import ObjectStat
from swarmpull.store.backends.metainfo import load_metainfo, save_metainfo
from swarmpull.store.backends.paced import PacedBackend
from swarmpull.store.fetch_plan import FetchPlan, Run
from swarmpull.swarm import bitfield
from swarmpull.swarm.torrent import URGES_MAX
from swarmpull.telemetry import Metrics

log = structlog.get_logger()

# Seconds without a chunk, of 1 MiB at most, after which a read is given up and made anew: some backends have
# no time-out of their own.
CHUNK_TIMEOUT: Final = 30.0
# Failures of one worker in a row, without any piece of any worker in between, until the fetch has failed.
# Backends try several times themselves before they fail.
FAILURES_MAX: Final = 3
# Seconds until a worker tries again, at most; twice as many after every failure.
PAUSE: Final = 0.5
# After these what was fetched is no part of the blob.
USELESS: Final = (ObjectCorrupt, ObjectReplaced)
# After these another attempt is of no use.
FINAL: Final = (*USELESS, UpstreamBusy, UpstreamRefused)


class Quarantine:
    """Blobs whose object in the backend was found to be something else.

    The next pull tries again, and the next push replaces the object.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._places: dict[BlobPlace, ObjectCorrupt] = {}
        self._found = metrics.counter(
            "backend_corrupt_objects_total",
            "Times that an object of the backend was found not to be what its name says.",
        )
        metrics.gauge(
            "backend_quarantined_objects",
            "Objects of the backend that were not what their name says when they were last read.",
        ).set_function(lambda: len(self._places))

    def __contains__(self, place: BlobPlace) -> bool:
        return place in self._places

    def put(self, place: BlobPlace, what: str) -> ObjectCorrupt:
        """An object was found to be corrupt; returns the error for those who wanted it."""
        self._found.inc()
        log.error(
            "backend_object_corrupt",
            digest=str(place.digest),
            backend=place.name,
            key=place.key,
            reason=what,
        )
        remedy = "the next pull tries it again"
        if not place.is_foreign:
            remedy = f"a push replaces it, and {remedy}"
        reason = f"the object is corrupt, {what}: {remedy}"
        error = self._places[place] = ObjectCorrupt(place.name, place.key, reason)
        # An exception collects the traceback of whoever raises it: each raises its own.
        return copy.copy(error)

    def check(self, place: BlobPlace) -> None:
        """Raise ObjectCorrupt if the object is something else, as far as is known."""
        error = self._places.get(place)
        if error is not None:
            raise copy.copy(error)

    def release(self, place: BlobPlace) -> None:
        """The object is right after all, or was replaced."""
        self._places.pop(place, None)


class WrongPiece(Exception):
    """A piece does not match the hash that is known of it."""


class ColdFetch:
    """The fetch of one blob; `run` it once.

    Attributes:
        begun: the first bytes have come, or it has ended.
    """

    def __init__(
        self,
        download: Download,
        found: ObjectStat,
        place: BlobPlace,
        host: SwarmHost,
        quarantine: Quarantine,
        *,
        workers: int,
        connections: trio.CapacityLimiter,
        bytes_read: Counter,
        pieces: Counter,
    ) -> None:
        """
        Args:
            found: the object.
            place: where it is.
            workers: ranges that are read at the same time.
            connections: limits those of all fetches together.
        """
        shape = download.metainfo
        missing = bitfield.full(shape.piece_count) & ~download.partial.have
        self.download = download
        self.plan = FetchPlan(missing, piece_length=shape.piece_length, workers=workers)
        self._found = found
        self._pin: dict[str, Any] = {"version": found.version} if found.version else {}
        self._place = place
        self._backend = place.backend
        self._host = host
        self._quarantine = quarantine
        self._workers = workers
        self._connections = connections
        self._bytes_read = bytes_read
        self._pieces = pieces
        self.begun = trio.Event()
        self._changed = trio.Event()
        self._published = 0
        self._wrong: set[int] = set()
        self._metainfo_was_known = False
        self._random = random.Random()
        download.explain = self._explain

    @property
    def digest(self) -> Digest:
        return self.download.metainfo.digest

    def urge(self, indices: tuple[int, ...]) -> None:
        """Readers wait for these pieces; what may come from other hosts is not trusted to exist."""
        for index in indices[:URGES_MAX]:
            if 0 <= index < self.download.metainfo.piece_count:
                self.plan.urge(index)
        self._wake()

    async def run(self) -> None:
        """Fetch until the blob is in the store, or the download has failed."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._learn_hashes)
            for _ in range(self._workers):
                nursery.start_soon(self._work)
            await self.download.wait_ended()
            nursery.cancel_scope.cancel()
        self.begun.set()
        if self.download.failed:
            return
        self._quarantine.release(self._place)
        log.info("blob_fetched", digest=str(self.digest), length=self.download.metainfo.length)
        await self._keep_hashes()

    # --- metainfo beside the blob -------------------------------------------------------------

    async def _learn_hashes(self) -> None:
        """Take over what an earlier fetch found out about the same blob."""
        if self._place.is_foreign or self._place in self._quarantine:
            return  # there is none, or it may have been this that was wrong
        metainfo = await load_metainfo(self._backend, self.download.metainfo)
        if metainfo is None:
            return
        try:
            self.download.metainfo.add_all(metainfo)
        except InvalidMetainfo as error:
            # What was read now and then differ: the digest of the whole decides.
            log.warning("metainfo_not_used", digest=str(self.digest), reason=str(error))
        else:
            self._metainfo_was_known = True
            self.download.hashes.grew()

    async def _keep_hashes(self) -> None:
        metainfo = self.download.metainfo.complete()
        if metainfo is None or self._metainfo_was_known or self._place.is_foreign:
            return
        try:
            await save_metainfo(self._backend, metainfo)
        except BackendUnavailable as error:
            log.info("metainfo_not_saved", digest=str(self.digest), reason=str(error))

    # --- the workers --------------------------------------------------------------------------

    async def _work(self) -> None:
        failures, published = 0, 0
        while not self.plan.is_done:
            try:
                await self._fetch_next()
            except BackendUnavailable as error:
                failures = failures + 1 if self._published == published else 1
                published = self._published
                if failures >= FAILURES_MAX or isinstance(error, FINAL):
                    self._fail(error)
                    return
                log.info("range_not_fetched", digest=str(self.digest), reason=str(error))
                longest = PAUSE * 2 ** (failures - 1)
                await trio.sleep(longest * self._random.uniform(0.5, 1.0))
            except StoreFull as full:
                self._fail(full.of(str(self.digest)))
                return
            except StoreUnavailable as error:
                self._fail(error)
                return

    async def _fetch_next(self) -> None:
        """Fetch one run, or wait until there may be one."""
        changed = self._changed
        async with self._connections:
            run = self.plan.next_run()
            if run is not None:
                try:
                    await self._fetch(run)
                finally:
                    self.plan.give_up(run)
                    self._wake()
                return
        await changed.wait()

    async def _fetch(self, run: Run) -> None:
        try:
            await self._read(run)
        except (ObjectNotFound, InvalidRange) as error:
            is_gone = isinstance(error, ObjectNotFound)
            reason = f"the object was {'deleted' if is_gone else 'replaced'} while it was fetched"
            raise ObjectReplaced(self._backend.name, self._found.key, reason) from error
        except WrongPiece as error:
            if run.next in self._wrong:
                # Not the connection's fault: what was known of the blob, or the object, is wrong.
                what = f"piece {run.next} is not what it was"
                raise self._quarantine.put(self._place, what) from error
            self._wrong.add(run.next)
            reason = f"piece {run.next} does not match its hash"
            raise BackendUnavailable(self._backend.name, self._found.key, reason) from error
        except ValueError:
            # The partial is closed because the download has failed; `run` cancels this.
            if not self.download.ended:
                raise
            await trio.sleep_forever()

    async def _read(self, run: Run) -> None:
        """Read a run with one request, for as long as the plan says."""
        shape = self.download.metainfo
        start = shape.piece_offset(run.next)
        stop = min(shape.piece_offset(run.stop), shape.length)
        opened = self._backend.open(self._found.key, start=start, stop=stop, **self._pin)
        async with opened as chunks:
            writer = self.download.partial.piece_writer(run.next)
            while True:
                rest = memoryview(await self._next_chunk(chunks))
                self._bytes_read.inc(len(rest))
                self.begun.set()
                while rest:
                    part, rest = rest[: writer.left], rest[writer.left :]
                    await writer.write(part)
                    if writer.left:
                        continue
                    if not await writer.finish():
                        raise WrongPiece
                    self._publish(run.next)
                    if not self.plan.fetched(run):
                        return
                    writer = self.download.partial.piece_writer(run.next)

    async def _next_chunk(self, chunks: AsyncIterator[bytes]) -> bytes:
        # One that is paced waits on purpose, and knows itself when nothing comes.
        is_paced = isinstance(self._backend, PacedBackend)
        reason = f"no bytes for {CHUNK_TIMEOUT:g} s"
        with trio.move_on_after(math.inf if is_paced else CHUNK_TIMEOUT):
            async for chunk in chunks:
                return chunk
            reason = "the object ends too soon"
        raise BackendUnavailable(self._backend.name, self._found.key, reason)

    def _publish(self, index: int) -> None:
        self._published += 1
        self._pieces.inc()
        self._host.piece_fetched(self.download, index)

    def _wake(self) -> None:
        """Let workers that have nothing to do look again."""
        self._changed.set()
        self._changed = trio.Event()

    # --- the end ------------------------------------------------------------------------------

    def _explain(self, error: DigestMismatch) -> SwarmpullError:
        return self._quarantine.put(self._place, f"it hashes to {error.actual}")

    def _fail(self, error: SwarmpullError) -> None:
        self._host.give_up(self.download, error, keep=not isinstance(error, USELESS))
