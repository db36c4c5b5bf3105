"""What an origin has acknowledged and the backend does not have yet: accepted, kept, written.

An accepted blob is on the disk and in the queue of this origin, and of its replicas.  The worker writes what
is queued; until the backend has a blob, it is pinned in the store.

Which backend that is depends on the repository of the push, the namespace.  Each has a lane of its own, so
that one which is down holds up nothing that goes to another.
"""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import attrs
import structlog
import trio

from swarmpull.config import WriteBackMode
from swarmpull.digest import Digest
from swarmpull.errors import (
    BackendUnavailable,
    BlobNotFound,
    PushRefused,
    StoreFull,
    StoreUnavailable,
    SwarmpullError,
)
from swarmpull.roles.origin_content import OriginContent
from swarmpull.roles.replication import Replication
from swarmpull.roles.swarm_host import SwarmHost
from swarmpull.store.holds import Hold, Pin
from swarmpull.store.retry_schedule import Schedule
from swarmpull.store.write_back_queue import WriteBackQueue
from swarmpull.store.write_back_schedule import Key, QueuedBlob, rank_delay
from swarmpull.swarm.metainfo import Metainfo
from swarmpull.swarm.peers import PeerContact
from swarmpull.telemetry import Metrics

log = structlog.get_logger()

# Blobs written to one backend at the same time; a large one goes up in several parts at once as it is.
UPLOADS_MAX: Final = 4
# Blobs that were accepted and wait: an hour without a backend at 13 pushes per second, and 65 MB of memory.
# What a queue that is made anew finds on the disk does not count: it would refuse all pushes until a backend
# has been asked for every blob.
QUEUED_MAX: Final = 50_000
# Blobs that are remembered as written, so that replicas which look later need not have them copied again; as
# many as may wait at all, some 300 bytes each.
WRITTEN_MAX: Final = QUEUED_MAX
# Seconds until a blob is looked at again whose repository has no backend any more.  It needs another
# configuration, and with that a restart, which tries everything at once.
REFUSED_DELAY: Final = 3600.0
# How often a replica finds one before it alive and yet the backend without the blob, and lets it be.
POSTPONED_MAX: Final = 20
# Seconds between two lines in the log about the same kind of failure.
LOG_INTERVAL: Final = 600.0
# Characters of an error that are kept with a blob.
ERROR_TEXT_MAX: Final = 500


@attrs.define
class _Queued:
    """A blob of the queue in memory."""

    blob: QueuedBlob
    hold: Hold
    postponed: int = 0


@attrs.define
class _Lane:
    """The way to one backend."""

    schedule: Schedule[Key]
    failures: _Failures


class WriteBack:
    """The queue at work.

    Made before the store's janitor runs: it pins what an earlier process has left in the queue.
    """

    def __init__(
        self,
        queue: WriteBackQueue,
        content: OriginContent,
        host: SwarmHost,
        replication: Replication,
        metrics: Metrics,
        mode: WriteBackMode,
    ) -> None:
        self._queue = queue
        self._content = content
        self._store = content.store
        self._host = host
        self._replication = replication
        self._mode = mode
        # By the name of the backend; empty for what no backend takes any more.
        self._lanes: dict[str, _Lane] = {}
        # In the order in which they were accepted.
        self._queued: dict[Key, _Queued] = {}
        self._spreading: Counter[Key] = Counter()
        # What has left the queue, the latest at the end.
        self._written_keys: dict[Key, None] = {}
        self._bytes = 0
        # Of these, the ones that were found on the disk.
        self._found = 0
        self._wake = trio.Event()
        self._metrics = _WriteBackMetrics(metrics, self)
        for blob in queue.loaded:
            self._enter(blob, max(0.0, blob.next_at - time.time()))
        if self._queued:
            log.info("write_back_resumed", queued=len(self._queued), bytes=self._bytes)

    # --- for the role -------------------------------------------------------------------------

    async def accept(self, digest: Digest, namespace: str) -> None:
        """Return when a blob of the disk may be acknowledged.

        It is queued, and will be written, even if the caller gives up meanwhile.

        Raises:
            BlobNotFound: it is not on the disk.
            PushRefused: the repository has no backend that could be written to.
            StoreFull: no room on the disk for the queue, or too much waits.
            StoreUnavailable: the disk failed.
            BackendUnavailable: in mode ``sync``, the backend does not have it; try again.
        """
        # What is refused must not be queued: it would wait for ever.
        self._content.namespaces.check_push(namespace)
        if self._mode == "sync":
            await self._content.make_durable(digest, namespace)
            return
        with (
            self._store.hold(digest, Pin.NOT_WRITTEN_BACK),
            self._spreading_of((digest, namespace)),
        ):
            await self._enqueue(digest, namespace, 0)
            await self._replication.spread(await self._store.metainfo(digest), namespace)

    async def keep_copy(
        self, metainfo: Metainfo, namespace: str, source: PeerContact, rank: int
    ) -> None:
        """Be a replica: return when a blob is on the disk and in the queue.

        The download goes on when the caller gives up.  Raises what `SwarmHost.adopt` and `accept` do.
        """
        self._content.namespaces.check_push(namespace)
        with self._store.hold(metainfo.digest, Pin.NOT_WRITTEN_BACK):
            await self._host.adopt(metainfo, namespace, source)
            await self._enqueue(metainfo.digest, namespace, rank)

    def rank(self, key: Key) -> int | None:
        """The rank of a blob in the queue; None when it is not in it."""
        queued = self._queued.get(key)
        return queued.blob.rank if queued else None

    def has_written(self, key: Key) -> bool:
        """Whether a blob has left the queue of late, because the backend has it."""
        return key in self._written_keys

    def settled(self) -> list[QueuedBlob]:
        """What is in the queue and not just being replicated, in the order in which it was accepted."""
        return [queued.blob for key, queued in self._queued.items() if key not in self._spreading]

    @contextmanager
    def _spreading_of(self, key: Key) -> Iterator[None]:
        """The block replicates a blob; others may do the same for the same push."""
        self._spreading[key] += 1
        try:
            yield
        finally:
            self._spreading[key] -= 1
            if not self._spreading[key]:
                del self._spreading[key]

    def status(self) -> dict[str, object]:
        """The write-back part of the document that ``swarmpull status`` shows."""
        return {
            "write_back": {
                "queued": len(self._queued),
                "bytes": self._bytes,
                "oldest_seconds": round(self.oldest(), 1),
                "failure": self._failure(),
            }
        }

    def oldest(self) -> float:
        """Seconds since the blob that waits for longest was accepted; 0 when none waits."""
        first = next(iter(self._queued.values()), None)
        return max(0.0, time.time() - first.blob.enqueued_at) if first else 0.0

    def _failure(self) -> str | None:
        lasts = (lane.failures.last for lane in self._lanes.values())
        return next((last for last in lasts if last is not None), None)

    def depth(self) -> int:
        """Blobs in the queue."""
        return len(self._queued)

    def bytes(self) -> int:
        """Bytes of the blobs in the queue."""
        return self._bytes

    async def run(self) -> None:
        """Write what is due, until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                self._wake = trio.Event()
                for lane in self._lanes.values():
                    while (key := lane.schedule.take(trio.current_time())) is not None:
                        nursery.start_soon(self._attempt, self._queued[key], lane)
                times = (lane.schedule.next_time() for lane in self._lanes.values())
                with trio.move_on_at(min(times, default=math.inf)):
                    await self._wake.wait()

    def _lane(self, namespace: str) -> _Lane:
        namespaces = self._content.namespaces
        try:
            namespaces.check_push(namespace)
            name = namespaces.backend_for(namespace).name
        except PushRefused:
            name = ""
        if name not in self._lanes:
            self._lanes[name] = _Lane(Schedule(random.Random(), UPLOADS_MAX), _Failures())
        return self._lanes[name]

    # --- accepting ----------------------------------------------------------------------------

    async def _enqueue(self, digest: Digest, namespace: str, rank: int) -> None:
        length = self._store.stat(digest).length
        known = self._queued.get((digest, namespace))
        if known is not None and known.blob.rank <= rank:
            return
        if known is None and len(self._queued) - self._found >= QUEUED_MAX:
            remedy = f"{QUEUED_MAX} blobs wait to be written to the backend: see why it takes none"
            raise StoreFull(self._store.name, length, remedy)
        now, delay = time.time(), rank_delay(rank, length)
        blob = QueuedBlob(digest, length, namespace, now, rank, next_at=now + delay)
        # On the disk first: what is in memory counts as acknowledged.  A row that nobody knows of would be
        # missed when its blob is evicted.
        with trio.CancelScope(shield=True):
            await self._queue.put(blob)
            self._enter(blob, delay)

    def _enter(self, blob: QueuedBlob, delay: float) -> None:
        known = self._queued.get(blob.key)
        if known is None:
            hold = self._store.hold(blob.digest, Pin.NOT_WRITTEN_BACK)
            self._queued[blob.key] = _Queued(blob, hold)
            self._bytes += blob.length
        else:
            self._found -= known.blob.is_found
            known.blob = blob
        self._found += blob.is_found
        behind = rank_delay(blob.rank, blob.length)
        due = trio.current_time() + min(delay, behind)
        self._lane(blob.namespace).schedule.add(blob.key, due, behind)
        self._wake.set()

    # --- writing ------------------------------------------------------------------------------

    async def _attempt(self, queued: _Queued, lane: _Lane) -> None:
        self._metrics.attempts.inc()
        try:
            self._content.namespaces.check_push(queued.blob.namespace)
            if await self._is_left_to_another(queued):
                queued.postponed += 1
                # One step, whatever the rank: the one that is ahead writes when it is alone, too.
                delay = rank_delay(1, queued.blob.length)
                lane.schedule.postpone(queued.blob.key, delay, trio.current_time())
            else:
                await self._write(queued)
                await self._written(queued, lane)
        except SwarmpullError as error:
            await self._failed(queued, lane, error)
        finally:
            self._wake.set()

    async def _is_left_to_another(self, queued: _Queued) -> bool:
        """Whether this replica need not write a blob yet: one before it is alive and has it queued too."""
        blob = queued.blob
        if not blob.rank or queued.postponed >= POSTPONED_MAX:
            return False
        if await self._content.is_in_backend(blob.digest, blob.namespace, blob.length):
            return False
        return await self._replication.is_ahead(blob.key, blob.rank)

    async def _write(self, queued: _Queued) -> None:
        digest, namespace = queued.blob.key
        try:
            await self._content.make_durable(digest, namespace)
        except BlobNotFound:
            if not await self._content.is_in_backend(digest, namespace, queued.blob.length):
                if not await self._replication.fetch(digest):
                    raise
                await self._content.make_durable(digest, namespace)

    async def _written(self, queued: _Queued, lane: _Lane) -> None:
        key = queued.blob.key
        del self._queued[key]
        self._remember_written(key)
        self._bytes -= queued.blob.length
        self._found -= queued.blob.is_found
        # Even if the file cannot be changed: a full disk is mended by evicting what is in the backend.
        queued.hold.release()
        self._metrics.written.inc()
        back = lane.schedule.done(key, trio.current_time())
        lane.failures.over(len(self._queued), back=back)
        try:
            await self._queue.remove(key)
        except (StoreFull, StoreUnavailable) as error:
            # At the next start it is looked for in the backend, found, and removed then.
            log.warning("write_back_entry_left", digest=str(key[0]), reason=str(error))

    def _remember_written(self, key: Key) -> None:
        self._written_keys.pop(key, None)
        self._written_keys[key] = None
        if len(self._written_keys) > WRITTEN_MAX:
            del self._written_keys[next(iter(self._written_keys))]

    async def _failed(self, queued: _Queued, lane: _Lane, error: SwarmpullError) -> None:
        self._metrics.failures.inc()
        lane.failures.note(error, queued.blob, len(self._queued))
        key, attempts, now = queued.blob.key, queued.blob.attempts + 1, trio.current_time()
        if isinstance(error, PushRefused):
            delay = lane.schedule.postpone(key, REFUSED_DELAY, now)
        else:
            backend = isinstance(error, BackendUnavailable)
            delay = lane.schedule.failed(key, attempts, now, target=backend)
        queued.blob = attrs.evolve(
            queued.blob,
            attempts=attempts,
            next_at=time.time() + delay,
            last_error=str(error)[:ERROR_TEXT_MAX],
        )
        try:
            await self._queue.put(queued.blob)
        except (StoreFull, StoreUnavailable) as failure:
            # The file still has the blob, with an older count.
            log.info("write_back_entry_not_updated", reason=str(failure))


class _Failures:
    """Why a backend takes nothing just now: one line in the log for each kind, not for each attempt.

    Attributes:
        last: why the last attempt failed; None when it did not.
    """

    def __init__(self) -> None:
        self.last: str | None = None
        self._logged_at: dict[str, float] = {}

    def note(self, error: SwarmpullError, blob: QueuedBlob, queued: int) -> None:
        self.last = str(error)
        kind, now = type(error).__name__, trio.current_time()
        if now - self._logged_at.get(kind, -math.inf) >= LOG_INTERVAL:
            self._logged_at[kind] = now
            log.warning(
                "write_back_failing",
                digest=str(blob.digest),
                namespace=blob.namespace,
                attempts=blob.attempts + 1,
                queued=queued,
                reason=self.last,
            )

    def over(self, queued: int, *, back: bool) -> None:
        if back:
            log.info("write_back_goes_on", queued=queued, after=self.last)
            self._logged_at.clear()
        self.last = None


class _WriteBackMetrics:
    """The metrics of one queue."""

    def __init__(self, metrics: Metrics, write_back: WriteBack) -> None:
        depth = metrics.gauge("write_back_queue_blobs", "Blobs that the backend does not have yet.")
        depth.set_function(write_back.depth)
        size = metrics.gauge("write_back_queue_bytes", "Bytes of these blobs.")
        size.set_function(write_back.bytes)
        oldest = metrics.gauge(
            "write_back_oldest_seconds", "Since the one that waits for longest was accepted."
        )
        oldest.set_function(write_back.oldest)
        self.attempts = metrics.counter(
            "write_back_attempts_total", "Attempts to write a blob, or to find it written."
        )
        self.failures = metrics.counter(
            "write_back_failures_total", "Of these, the ones that failed and are repeated."
        )
        self.written = metrics.counter(
            "write_back_written_total", "Blobs that left the queue because the backend has them."
        )
