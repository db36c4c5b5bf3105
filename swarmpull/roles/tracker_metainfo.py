"""Metainfo for the tracker, from the origins: asked for once however many agents want it.

While an origin is still fetching a blob, the tracker follows the growth of its metainfo with one call at a
time, and keeps a log of its own for all agents that want to hear of it.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Hashable, Iterable
from typing import Final, Generic, TypeVar

import attrs
import structlog
import trio

from swarmpull.digest import Digest
from swarmpull.errors import (
    BackendUnavailable,
    BlobNotFound,
    ProtocolError,
    RpcUnavailable,
    SwarmpullError,
)
from swarmpull.roles.cluster import ORIGIN_RING, OriginClient
from swarmpull.roles.hash_log import HashLog, follow_growth, log_of
from swarmpull.swarm.metainfo import Metainfo
from swarmpull.swarm.peers import PeerContact
from swarmpull.telemetry import Metrics
from swarmpull.wire.api import INLINE_BYTES_MAX, Growth, MetainfoReply

log = structlog.get_logger()

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

# Blobs whose metainfo one agent is asked for at a time.
WANTED_MAX: Final = 8
# What an entry of the cache takes besides its piece hashes, about.
ENTRY_BYTES: Final = 1024
# From an answer out of another host's memory to a cold blob that an origin must read whole.
_FETCH_BUCKETS: Final = (0.001, 0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 60.0, 300.0)


@attrs.frozen(kw_only=True)
class MetainfoLimits:
    """Bounds of what a tracker keeps of metainfo; times in seconds.

    Attributes:
        bytes_max: of cached metainfo; the least recently used goes.  A blob of 10 GB has 80 KB.
        content_bytes_max: of cached small blobs, which travel with their metainfo; likewise.
        ttl: of cached metainfo; it never changes, but the blob may be deleted.  What is older is given out
            only while no origin can be asked.
        not_found_ttl: how long "no such blob" is repeated without asking: a push may come any moment.
        ask_interval: between two calls for one digest that are made only to learn of an origin.
        fetches_max: digests that origins are being asked for at the same time; more fail at once.
        hearsay_bytes_max: of metainfo that agents gave while no origin could.
        hearsay_ttl: of that; it is as good as whoever gave it.
        missed_ttl: how long agents are asked for metainfo that somebody did not get.
        hearsay_patience: how long a request waits for an agent to give it; the caller is to have time for
            another tracker, which may remember it (`swarmpull.roles.blob_finder.TRACKER_PATIENCE`).
    """

    bytes_max: int = attrs.field(default=128 << 20, validator=attrs.validators.gt(0))
    content_bytes_max: int = attrs.field(default=64 << 20, validator=attrs.validators.gt(0))
    ttl: float = attrs.field(default=300.0, validator=attrs.validators.gt(0))
    not_found_ttl: float = attrs.field(default=1.0, validator=attrs.validators.ge(0))
    ask_interval: float = attrs.field(default=5.0, validator=attrs.validators.gt(0))
    fetches_max: int = attrs.field(default=1024, validator=attrs.validators.gt(0))
    hearsay_bytes_max: int = attrs.field(default=32 << 20, validator=attrs.validators.gt(0))
    hearsay_ttl: float = attrs.field(default=300.0, validator=attrs.validators.gt(0))
    missed_ttl: float = attrs.field(default=120.0, validator=attrs.validators.gt(0))
    hearsay_patience: float = attrs.field(default=1.0, validator=attrs.validators.ge(0))


class TtlCache(Generic[K, V]):
    """A dictionary that forgets: what is older than ``ttl``, and the least recently used above
    ``capacity``, which is in units of the costs given to `put`.

    With ``keeps_stale`` what is older stays for `stale`, as far as there is room.
    """

    def __init__(self, *, ttl: float, capacity: int, keeps_stale: bool = False) -> None:
        self._ttl = ttl
        self._capacity = capacity
        self._keeps_stale = keeps_stale
        self._entries: dict[K, tuple[V, float, int]] = {}
        self.size = 0

    def get(self, key: K, now: float) -> V | None:
        entry = self._entries.pop(key, None)
        if entry is None:
            return None
        value, expires_at, cost = entry
        is_fresh = now < expires_at
        if is_fresh or self._keeps_stale:
            self._entries[key] = entry
        else:
            self.size -= cost
        return value if is_fresh else None

    def stale(self, key: K) -> V | None:
        """What is there, however old."""
        entry = self._entries.get(key)
        return None if entry is None else entry[0]

    def pop(self, key: K) -> V | None:
        """Take out what is there, however old."""
        entry = self._entries.pop(key, None)
        if entry is None:
            return None
        self.size -= entry[2]
        return entry[0]

    def put(self, key: K, value: V, now: float, *, cost: int = 1) -> None:
        former = self._entries.pop(key, None)
        if former is not None:
            self.size -= former[2]
        self._entries[key] = (value, now + self._ttl, cost)
        self.size += cost
        while self.size > self._capacity:
            oldest = next(iter(self._entries))
            self.size -= self._entries.pop(oldest)[2]

    def __len__(self) -> int:
        return len(self._entries)


@attrs.define(eq=False)
class _Fetch:
    """One call to the origins that is under way, for all who want its result."""

    namespace: str
    done: trio.Event = attrs.field(factory=trio.Event)
    result: Metainfo | HashLog | SwarmpullError | None = None


class MetainfoSource:
    """Metainfo by digest, from a cache or from the origins.

    Calls to origins run in ``nursery`` and not in the request that caused them: an agent that hangs up
    does not take the answer away from the others.
    """

    def __init__(
        self,
        origins: OriginClient,
        nursery: trio.Nursery,
        *,
        on_seeder: Callable[[Digest, PeerContact], None],
        limits: MetainfoLimits,
        metrics: Metrics,
    ) -> None:
        """``on_seeder`` is told of the origin that has a blob each time one says so."""
        self._origins = origins
        self._nursery = nursery
        self._on_seeder = on_seeder
        self._limits = limits
        self._cache: TtlCache[Digest, Metainfo] = TtlCache(
            ttl=limits.ttl, capacity=limits.bytes_max, keeps_stale=True
        )
        self._contents: TtlCache[Digest, bytes] = TtlCache(
            ttl=limits.ttl, capacity=limits.content_bytes_max
        )
        self._absent: TtlCache[tuple[Digest, str], BlobNotFound] = TtlCache(
            ttl=limits.not_found_ttl, capacity=16 * limits.fetches_max
        )
        self._asked: TtlCache[Digest, bool] = TtlCache(
            ttl=limits.ask_interval, capacity=16 * limits.fetches_max
        )
        self._hearsay: TtlCache[Digest, Metainfo] = TtlCache(
            ttl=limits.hearsay_ttl, capacity=limits.hearsay_bytes_max
        )
        self._missed: TtlCache[Digest, trio.Event] = TtlCache(
            ttl=limits.missed_ttl, capacity=limits.fetches_max
        )
        self._fetches: dict[Digest, _Fetch] = {}
        self._growing: dict[Digest, HashLog] = {}
        self._requests = metrics.counter(
            "tracker_metainfo_requests_total",
            "Metainfo that was wanted, by where it came from: cache, growing, fetch, stale, hearsay, absent, "
            "failed.",
            ["source"],
        )
        self._seconds = metrics.histogram(
            "tracker_metainfo_fetch_seconds", "Time to get metainfo from an origin.", _FETCH_BUCKETS
        )
        metrics.gauge("tracker_metainfo_cache_bytes", "Metainfo kept in memory.").set_function(
            lambda: self._cache.size
        )
        metrics.gauge("tracker_content_cache_bytes", "Small blobs kept in memory.").set_function(
            lambda: self._contents.size
        )
        metrics.gauge(
            "tracker_metainfo_fetches", "Digests that origins are being asked for."
        ).set_function(lambda: len(self._fetches))
        metrics.gauge(
            "tracker_metainfo_growing", "Blobs that an origin is still fetching."
        ).set_function(lambda: len(self._growing))

    async def get(self, digest: Digest, namespace: str, *, use_cache: bool) -> Metainfo | HashLog:
        """Metainfo of a blob, or its log while it grows.

        ``use_cache``, when somebody is known to have the blob, allows an answer from the cache without asking
        an origin, and when no origin can say anything an old one, or what an agent gives.

        Raises:
            BlobNotFound: no origin can get the blob.
            BackendUnavailable: no origin answers, or too many blobs are being asked for.
        """
        cached = self._cache.get(digest, trio.current_time()) if use_cache else None
        if cached is not None:
            self._requests.labels("cache").inc()
            return cached
        growing = self._growing.get(digest)
        if growing is not None:
            self._requests.labels("growing").inc()
            return growing
        try:
            metainfo = await self._fetched(digest, namespace)
        except BlobNotFound:
            self._requests.labels("absent").inc()
            raise
        except SwarmpullError as error:
            found = await self._without_origins(digest, use_cache) if _is_silence(error) else None
            if found is None:
                self._requests.labels("failed").inc()
                raise
            return found
        self._requests.labels("fetch").inc()
        return metainfo

    async def _without_origins(self, digest: Digest, is_seeded: bool) -> Metainfo | None:
        """What is remembered of a blob that somebody has, or what such a one gives before long."""
        stale = self._cache.stale(digest) if is_seeded else None
        if stale is not None:
            self._requests.labels("stale").inc()
            return stale
        if is_seeded and (heard := self._hearsay.get(digest, trio.current_time())):
            self._requests.labels("hearsay").inc()
            return heard
        # Whoever announces the blob within the next minutes is asked for it.
        given = self._missed.stale(digest)
        if given is None:
            given = trio.Event()
        self._missed.put(digest, given, trio.current_time())
        if not is_seeded:
            return None
        with trio.move_on_after(self._limits.hearsay_patience):
            await given.wait()
            self._requests.labels("hearsay").inc()
        return self._hearsay.get(digest, trio.current_time())

    def wanted(self, digests: Iterable[Digest]) -> tuple[Digest, ...]:
        """Those of which metainfo was asked for lately in vain, `WANTED_MAX` at most."""
        if not self._missed:
            return ()
        now = trio.current_time()
        missed = (each for each in digests if self._missed.get(each, now) is not None)
        return tuple(itertools.islice(missed, WANTED_MAX))

    def hear(self, metainfo: Metainfo) -> bool:
        """Keep what an agent gives, if it is wanted; only for as long as no origin can be asked.

        Nobody can say whether it is right before the whole blob is there, which is compared with its digest.
        """
        given = self._missed.pop(metainfo.digest)
        if given is None:
            return False
        _keep(self._hearsay, metainfo)
        given.set()
        return True

    def content(self, digest: Digest) -> bytes | None:
        """The blob itself if it is small and was got with its metainfo; whoever takes it verifies it."""
        return self._contents.get(digest, trio.current_time())

    def seek_origin(self, digest: Digest, namespace: str) -> None:
        """Ask for the origin of a blob in the background, unless that was done just now."""
        now = trio.current_time()
        if digest in self._fetches or self._asked.get(digest, now):
            return
        if len(self._fetches) < self._limits.fetches_max:
            self._begin(digest, namespace)

    async def get_settled(self, digest: Digest, namespace: str, *, use_cache: bool) -> Metainfo:
        """The same, once all of it is known to be right.  Raises also why it will not be."""
        found = await self.get(digest, namespace, use_cache=use_cache)
        if isinstance(found, HashLog):
            return await found.wait_settled()
        return found

    async def _fetched(self, digest: Digest, namespace: str) -> Metainfo | HashLog:
        while True:
            absent = self._absent.get((digest, namespace), trio.current_time())
            if absent is not None:
                raise BlobNotFound(absent.digest, absent.where)
            fetch = self._fetches.get(digest)
            if fetch is None:
                if len(self._fetches) >= self._limits.fetches_max:
                    raise BackendUnavailable(
                        ORIGIN_RING,
                        str(digest),
                        f"the tracker asks for {self._limits.fetches_max} blobs already, retry later",
                    )
                fetch = self._begin(digest, namespace)
            await fetch.done.wait()
            if isinstance(fetch.result, Metainfo | HashLog):
                return fetch.result
            # Another repository may have the blob in another backend: that one has not been asked.
            if fetch.result is None or fetch.namespace == namespace:
                raise _copy(fetch.result, digest)

    def _begin(self, digest: Digest, namespace: str) -> _Fetch:
        fetch = self._fetches[digest] = _Fetch(namespace)
        self._asked.put(digest, True, trio.current_time())
        self._nursery.start_soon(self._run, digest, fetch)
        return fetch

    async def _run(self, digest: Digest, fetch: _Fetch) -> None:
        started_at = trio.current_time()
        try:
            reply = await self._origins.get_metainfo(digest, fetch.namespace, growing=True)
            fetch.result = self._taken(digest, fetch.namespace, reply)
        except SwarmpullError as exc:
            fetch.result = exc
            if isinstance(exc, BlobNotFound):
                self._absent.put((digest, fetch.namespace), exc, trio.current_time())
            log.info("metainfo_not_fetched", digest=str(digest), reason=str(exc))
        else:
            self._seconds.observe(trio.current_time() - started_at)
            self._on_seeder(digest, reply.seeder)
        finally:
            del self._fetches[digest]
            fetch.done.set()

    def _taken(self, digest: Digest, namespace: str, reply: MetainfoReply) -> Metainfo | HashLog:
        """What an origin answered, to be kept, or followed while it grows."""
        if reply.metainfo is not None:
            if reply.metainfo.digest != digest:
                raise ProtocolError(f"an origin answered with metainfo of {reply.metainfo.digest}")
            _keep(self._cache, reply.metainfo)
            if reply.content is not None and len(reply.content) <= INLINE_BYTES_MAX:
                cost = len(reply.content) + ENTRY_BYTES
                self._contents.put(digest, reply.content, trio.current_time(), cost=cost)
            return reply.metainfo
        if reply.growth is None:
            raise ProtocolError(f"an origin answered without metainfo of {digest}")
        known = self._growing.get(digest)
        if known is None:
            known = self._growing[digest] = log_of(digest, reply.growth)
            self._nursery.start_soon(self._follow, known, namespace, reply.growth)
        return known

    async def _follow(self, known: HashLog, namespace: str, growth: Growth) -> None:
        digest = known.metainfo.digest
        try:
            await follow_growth(known, namespace, self._origins.hashes, growth)
        except SwarmpullError as error:
            log.info("metainfo_stopped_growing", digest=str(digest), reason=str(error))
            known.fail(_copy(error, digest))
        else:
            metainfo = known.metainfo.complete()
            assert metainfo is not None
            _keep(self._cache, metainfo)
        finally:
            del self._growing[digest]


def _keep(cache: TtlCache[Digest, Metainfo], metainfo: Metainfo) -> None:
    cost = len(metainfo.piece_hashes) + ENTRY_BYTES
    cache.put(metainfo.digest, metainfo, trio.current_time(), cost=cost)


def _is_silence(error: SwarmpullError) -> bool:
    """Whether nothing was said of the blob: no origin answers, or theirs is a backend that does not."""
    return isinstance(error, BackendUnavailable)


def _copy(error: SwarmpullError | None, digest: Digest) -> SwarmpullError:
    """An error for one of the waiters: each raises its own, because tracebacks grow as they travel.

    An origin that does not answer is, to an agent, a backend that cannot be used.
    """
    if error is None:
        return BackendUnavailable(ORIGIN_RING, str(digest), "the tracker shuts down")
    if isinstance(error, RpcUnavailable):
        return BackendUnavailable(ORIGIN_RING, str(digest), str(error))
    return copy.copy(error)
