"""What an index does so that other clusters get to know of its tags: a durable queue, and who works it off.

A change of a tag that a rule sends to a remote is in the queue, here and at another index, before it is
written; so whatever dies when, either the change never was or somebody sees to it.  What a tag is, is read
when its turn comes: an entry of the queue only says that there is something to do.

A standby leaves its entries alone as long as another index says that it sees to them.
"""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import attrs
import structlog
import trio

from swarmpull.digest import Digest
from swarmpull.errors import (
    BackendUnavailable,
    RpcFailed,
    RpcUnavailable,
    StoreFull,
    StoreUnavailable,
    SwarmpullError,
)
from swarmpull.patterns import compile_pattern, some_name_matches
from swarmpull.registry.names import REPOSITORY_LENGTH_MAX
from swarmpull.roles.catalog import Catalog
from swarmpull.roles.catalog_objects import digest_at_end
from swarmpull.roles.remotes import Remote, Rules
from swarmpull.roles.replicator_entries import Entries, Entry
from swarmpull.roles.standby import Standby
from swarmpull.roles.tag_copy import HOPELESS, Progress, TagCopier, is_digest
from swarmpull.store.remote_queue import ChangeKey, RemoteChange, RemoteQueue
from swarmpull.store.retry_schedule import Schedule
from swarmpull.telemetry import Metrics
from swarmpull.wire import api

log = structlog.get_logger()

# Tags that are copied to one remote at the same time, each of another repository.
COPIES_MAX: Final = 4
# The most seconds between two attempts with one tag.
BACKOFF_MAX: Final = 300.0
# Tags that other clusters have not been told of, over all remotes; some 600 bytes of memory each.
QUEUED_MAX: Final = 200_000
# Seconds until an entry is looked at whose change is being written; that it was written makes it due.
WRITING: Final = 30.0
# Nobody waits for a change to be written after so many seconds: it never will be.
ABANDONED: Final = 600.0
# How often standbys ask whether others see to what they keep, and how long they leave new entries alone.
STANDBY_INTERVAL: Final = 10.0
# Characters of an error that are kept with an entry, and entries that are shown.
ERROR_TEXT_MAX: Final = 500
SHOWN_MAX: Final = 1000
# Seconds between two lines in the log about the same kind of failure of one remote.
LOG_INTERVAL: Final = 600.0
# Of one page of a listing, when everything is to be sent.
PAGE: Final = 1000
# Patterns of which everything is to be sent, one after the other; further ones are refused.
SYNCS_MAX: Final = 100
# Entries of others that are looked at before other tasks have their turn.
LOOKED_AT_ONCE: Final = 1000
# Entries that are tried anew with one flush of the queue.
RETRIED_AT_ONCE: Final = 1000

# What others that go to the same remote would meet, too.
_OF_THE_REMOTE: Final = (RpcUnavailable, RpcFailed, BackendUnavailable)


@attrs.define
class _Lane:
    """The way to one remote.

    Attributes:
        copying: what is under way.
        failure: why the last copy failed; empty when it did not.
        logged_at: when the log had a line about a kind of failure.
    """

    remote: Remote
    schedule: Schedule[ChangeKey]
    copying: list[Progress] = attrs.Factory(list)
    failure: str = ""
    logged_at: dict[str, float] = attrs.Factory(dict)


class Replicator:
    """The queue at work; a `swarmpull.roles.catalog_tags.TagWatcher`, and what ``/replication`` shows."""

    def __init__(
        self,
        queue: RemoteQueue,
        rules: Rules,
        remotes: Iterable[Remote],
        copier: TagCopier,
        catalog: Catalog,
        standby: Standby,
        metrics: Metrics,
    ) -> None:
        self._queue = queue
        self._rules = rules
        self._copier = copier
        self._catalog = catalog
        self._standby = standby
        self._lanes = {remote.name: _lane_to(remote) for remote in remotes}
        self._entries = Entries()
        self._wake = trio.Event()
        # Patterns, the first one under way.
        self._syncs: list[str] = []
        self._sync_wanted = trio.Event()
        self._sync_failure = ""
        # Memory and disk change together, one entry at a time: what was looked at still holds afterwards.
        self._turn = trio.Lock()
        self._metrics = _ReplicatorMetrics(metrics, self)
        for change in queue.loaded:
            # Nobody writes a change any more that an earlier process had begun: it was written, or never is.
            delay = max(0.0, change.next_at - time.time()) if change.attempts else 0.0
            self._remember(change, delay)
        if self._entries:
            log.info("replication_resumed", queued=len(self._entries))

    # --- changes of tags, and manifests that refer to others ----------------------------------

    async def changing(self, repository: str, tag: str, change: api.TagChange) -> None:
        """Queue a change for each remote that a rule sends it to.

        Raises:
            StoreFull, StoreUnavailable: it cannot be queued, so it must not be made.
        """
        remotes = self._rules.remotes_of(repository)
        if not remotes:
            return
        self._rules.count(repository)
        await self._enter(repository, tag, change.stamp, remotes, WRITING)
        kept = tuple(
            api.ChangeForRemote(remote, repository, tag, change.stamp) for remote in remotes
        )
        await self._standby.keep(repository, kept)

    async def changed(self, repository: str, tag: str, _: api.TagChange) -> None:
        """It is written: its turn may come."""
        for remote in self._rules.remotes_of(repository):
            entry = self._entries.get((remote, repository, tag))
            if entry is not None and self._is_tried(entry.change):
                self._lanes[remote].schedule.add(entry.change.key, trio.current_time())
        self._wake.set()
        await trio.lowlevel.checkpoint()

    async def _enter(
        self, repository: str, tag: str, stamp: api.Stamp, remotes: Iterable[str], delay: float
    ) -> None:
        for remote in remotes:
            async with self._turn:
                known = self._entries.get((remote, repository, tag))
                now = time.time()
                self._check_room(known)
                latest = (stamp.time, stamp.source)
                if known is not None:
                    latest = max(latest, known.change.stamp)
                change = RemoteChange(
                    remote,
                    repository,
                    tag,
                    *latest,
                    known.change.enqueued_at if known else now,
                    next_at=now + delay,
                )
                await self._put(change, delay)

    async def _put(self, change: RemoteChange, delay: float) -> None:
        """On the disk first: what is in memory counts as queued.  The caller has the turn."""
        with trio.CancelScope(shield=True):
            await self._queue.put(change)
            self._remember(change, delay)

    def _check_room(self, known: Entry | None) -> None:
        if known is None and len(self._entries) >= QUEUED_MAX:
            remedy = (
                f"{QUEUED_MAX} changes of tags wait for other clusters: see swarmpull replication status, "
                "or take the remote that does not answer out of the configuration"
            )
            raise StoreFull(self._queue.name, 0, remedy)

    def _remember(self, change: RemoteChange, delay: float) -> None:
        known = self._entries.get(change.key)
        if known is None:
            self._entries.add(change, trio.current_time())
        else:
            self._entries.replace(known, change)
            known.entered_at = trio.current_time()
        if self._is_tried(change):
            due = trio.current_time() + delay
            self._lanes[change.remote].schedule.add(change.key, due)
            self._wake.set()

    def _is_tried(self, change: RemoteChange) -> bool:
        if change.standby or change.set_aside or change.remote not in self._lanes:
            return False
        return change.remote in self._rules.remotes_of(change.repository)

    # --- as a standby -------------------------------------------------------------------------

    async def keep(self, request: api.KeepChangesRequest) -> api.KeepChangesReply:
        """Stand by for another index.  Raises StoreFull, StoreUnavailable."""
        if self._standby.is_own(request.process):
            return api.KeepChangesReply(itself=True)
        for each in request.changes:
            if each.remote in self._lanes:
                async with self._turn:
                    await self._keep_one(each)
        return api.KeepChangesReply()

    async def _keep_one(self, each: api.ChangeForRemote) -> None:
        key = (each.remote, each.repository, each.tag)
        known = self._entries.get(key)
        self._check_room(known)
        stamp = (each.stamp.time, each.stamp.source)
        change = RemoteChange(*key, *stamp, time.time(), standby=True)
        if known is not None:
            # What this index sees to, it goes on seeing to.
            latest, source = max(stamp, known.change.stamp)
            change = attrs.evolve(known.change, time=latest, source=source)
        await self._put(change, WRITING)

    def kept(self, request: api.ChangesKeptRequest) -> api.ChangesKeptReply:
        """What this index sees to, of what another one stands by for."""
        if self._standby.is_own(request.process):
            return api.ChangesKeptReply(itself=True)
        return api.ChangesKeptReply(tuple(map(self._sees_to, request.changes)))

    def _sees_to(self, change: api.ChangeForRemote) -> bool:
        entry = self._entries.get((change.remote, change.repository, change.tag))
        stamp = (change.stamp.time, change.stamp.source)
        return entry is not None and not entry.change.standby and entry.change.stamp >= stamp

    async def _watch_others(self) -> None:
        """See to what this index stands by for once nobody else does."""
        while True:
            await trio.sleep(STANDBY_INTERVAL)
            mine = await self._kept_for_long()
            if not mine:
                continue
            left = mine.keys() - await self._standby.seen_to(list(mine))
            if left:
                log.info("replication_taken_over", changes=len(left))
            for change in left:
                await self._take_over(mine[change])

    async def _kept_for_long(self) -> dict[api.ChangeForRemote, ChangeKey]:
        """What this index stands by for, without what is new."""
        oldest = trio.current_time() - STANDBY_INTERVAL
        found: dict[api.ChangeForRemote, ChangeKey] = {}
        for number, key in enumerate(list(self._entries.standby)):
            if number % LOOKED_AT_ONCE == 0:
                # There may be very many, and others want their answers.
                await trio.lowlevel.checkpoint()
            entry = self._entries.get(key)
            if entry is not None and entry.change.standby and entry.entered_at <= oldest:
                found[_for_wire(entry.change)] = key
        return found

    async def _take_over(self, key: ChangeKey) -> None:
        async with self._turn:
            entry = self._entries.get(key)
            if entry is None or not entry.change.standby:
                return
            entered_at = entry.entered_at
            await self._update(entry, standby=False, next_at=time.time())
            self._remember(entry.change, 0.0)
            # When the change was made counts for how long it is waited for, not when it was taken over.
            entry.entered_at = entered_at

    # --- working it off -----------------------------------------------------------------------

    async def run(self) -> None:
        """Copy what is due, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch_others)
            nursery.start_soon(self._sync_in_turn)
            for lane in self._lanes.values():
                nursery.start_soon(lane.remote.run)
            while True:
                self._wake = trio.Event()
                for lane in self._lanes.values():
                    while (key := lane.schedule.take(trio.current_time())) is not None:
                        entry = self._entries.get(key)
                        assert entry is not None, "what is scheduled is queued"
                        nursery.start_soon(self._attempt, entry, lane)
                times = (lane.schedule.next_time() for lane in self._lanes.values())
                with trio.move_on_at(min(times, default=math.inf)):
                    await self._wake.wait()

    async def _attempt(self, entry: Entry, lane: _Lane) -> None:
        change, tried = entry.change, entry.change.stamp
        try:
            latest = await self._latest(change)
            known = None if latest is None else (latest.stamp.time, latest.stamp.source)
            if latest is not None and known is not None and known >= change.stamp:
                tried = known
                await self._copy(entry, lane, latest)
                await self._copied(entry, lane, known)
            elif trio.current_time() - entry.entered_at < ABANDONED:
                # It is being written, or whoever wrote it has died.
                lane.schedule.postpone(change.key, WRITING, trio.current_time())
            else:
                await self._copied(entry, lane, change.stamp)
        except SwarmpullError as error:
            await self._failed(entry, lane, error, tried)
        finally:
            self._wake.set()

    async def _latest(self, change: RemoteChange) -> api.TagChange | None:
        """What is to be sent; None when it never was anything here, or is a manifest that is not there."""
        if not is_digest(change.tag):
            return (await self._catalog.tags.log(change.repository, change.tag)).latest
        return await self._catalog.last_change_of_referrer(
            change.repository, Digest.parse(change.tag), api.Stamp(change.time, change.source)
        )

    async def _copy(self, entry: Entry, lane: _Lane, latest: api.TagChange) -> None:
        change, started_at = entry.change, trio.current_time()
        progress = entry.progress = Progress()
        lane.copying.append(progress)
        try:
            is_new = await self._copier.copy(
                lane.remote, change.repository, change.tag, latest, progress
            )
        finally:
            entry.progress = None
            lane.copying.remove(progress)
            self._metrics.bytes.labels(lane.remote.name).inc(progress.bytes_sent)
        for referrer in progress.refused:
            # Alone it fails again, and is set aside with the reason.
            await self._enter_referrer(change.repository, referrer, (lane.remote.name,))
        if is_new:
            self._metrics.copied.labels(lane.remote.name).inc()
            log.info(
                "referrer_replicated" if is_digest(change.tag) else "tag_replicated",
                **_named(change),
                digest=str(latest.digest or "deleted"),
                blobs=progress.blobs_done,
                bytes_sent=progress.bytes_sent,
                seconds=round(trio.current_time() - started_at, 3),
            )

    async def _copied(self, entry: Entry, lane: _Lane, stamp: tuple[int, str]) -> None:
        """The remote knows what the tag was with this stamp, or something later."""
        async with self._turn:
            now = trio.current_time()
            key = entry.change.key
            if entry.change.stamp > stamp:
                # It has changed meanwhile.
                lane.schedule.postpone(key, 0.0, now)
                return
            if lane.schedule.done(key, now):
                log.info("replication_goes_on", remote=lane.remote.name, after=lane.failure)
                lane.logged_at.clear()
            lane.failure = ""
            self._entries.remove(key)
            try:
                await self._queue.remove(key)
            except (StoreFull, StoreUnavailable) as error:
                # At the next start it is found to be there already.
                log.warning("replication_entry_left", key=key, reason=str(error))

    async def _failed(
        self, entry: Entry, lane: _Lane, error: SwarmpullError, tried: tuple[int, str]
    ) -> None:
        """What the tag was with the stamp ``tried`` did not get there."""
        async with self._turn:
            change, now = entry.change, trio.current_time()
            kind, reason = type(error).__name__, str(error)[:ERROR_TEXT_MAX]
            self._metrics.failures.labels(lane.remote.name, kind).inc()
            is_hopeless = isinstance(error, HOPELESS)
            # What is wrong with one tag says that the remote answers.
            lane.failure = "" if is_hopeless else reason
            attempts = change.attempts + 1
            # What it has become meanwhile may do better.
            if is_hopeless and change.stamp <= tried:
                lane.schedule.forget(change.key)
                log.warning(
                    "replication_set_aside",
                    **_named(change),
                    reason=reason,
                    remedy="swarmpull replication retry, once that is mended",
                )
                await self._update(entry, attempts=attempts, last_error=reason, set_aside=True)
                return
            is_of_remote = isinstance(error, _OF_THE_REMOTE)
            delay = lane.schedule.failed(change.key, attempts, now, target=is_of_remote)
            if now - lane.logged_at.get(kind, -math.inf) >= LOG_INTERVAL:
                lane.logged_at[kind] = now
                log.warning(
                    "replication_failing",
                    **_named(change),
                    attempts=attempts,
                    queued=len(self._entries),
                    reason=reason,
                )
            await self._update(
                entry, attempts=attempts, last_error=reason, next_at=time.time() + delay
            )

    async def _update(self, entry: Entry, **changes: Any) -> None:  # noqa: ANN401 - any field
        """Change an entry of the queue.  The caller has the turn."""
        await self._update_all((entry,), **changes)

    async def _update_all(self, entries: Sequence[Entry], **changes: Any) -> None:  # noqa: ANN401
        """Change entries of the queue alike, with one flush.  The caller has the turn."""
        for entry in entries:
            self._entries.replace(entry, attrs.evolve(entry.change, **changes))
        try:
            await self._queue.put_all([entry.change for entry in entries])
        except (StoreFull, StoreUnavailable) as failure:
            # The file still has the entries, as they were.
            log.info("replication_entry_not_updated", reason=str(failure))

    # --- for operators ------------------------------------------------------------------------

    def queued(self, remote: str) -> int:
        """Entries for a remote that this index sees to, or that are set aside."""
        return self._entries.queued(remote)

    def set_aside(self) -> int:
        """Entries that are not tried."""
        return self._entries.set_aside_count

    def oldest(self) -> float:
        """Seconds since the change was made that waits for longest; 0 when none waits."""
        first = next(self._entries.mine(), None)
        return 0.0 if first is None else max(0.0, time.time() - first.change.enqueued_at)

    def remotes(self) -> Iterable[str]:
        """Their names."""
        return self._lanes.keys()

    def document(self) -> Mapping[str, object]:
        """Everything that ``swarmpull replication status`` shows."""
        standby = len(self._entries.standby)
        shown = itertools.islice(self._entries.mine(), SHOWN_MAX)
        return {
            "remotes": [self._remote_document(lane) for lane in self._lanes.values()],
            "rules": [attrs.asdict(each, filter=_is_public) for each in self._rules.rules],
            "queued": len(self._entries) - standby,
            "standby": standby,
            "set_aside": self.set_aside(),
            "oldest_seconds": round(self.oldest(), 1),
            "entries": [self._entry_document(entry) for entry in shown],
            "syncs": list(self._syncs),
            "sync_failure": self._sync_failure,
        }

    def _remote_document(self, lane: _Lane) -> dict[str, object]:
        name = lane.remote.name
        # An answer to what is under way is later than any failure.
        answers = any(progress.is_answered for progress in lane.copying)
        return {
            "name": name,
            "queued": self.queued(name),
            "set_aside": self._entries.set_aside(name),
            "failing": lane.schedule.target_fails,
            "failure": "" if answers else lane.failure,
        }

    def _entry_document(self, entry: Entry) -> dict[str, object]:
        change, now = entry.change, time.time()
        failure = change.last_error
        if change.remote not in self._rules.remotes_of(change.repository):
            failure = "no rule of the configuration sends it there any more"
        return {
            **_named(change),
            "age_seconds": round(max(0.0, now - change.enqueued_at), 1),
            "state": _state(entry, self._is_tried(change)),
            "attempts": change.attempts,
            "next_in_seconds": round(max(0.0, change.next_at - now), 1),
            "failure": failure,
            "progress": None if entry.progress is None else entry.progress.document(),
        }

    async def change(self, document: object) -> Mapping[str, object]:
        """Do what ``swarmpull replication retry`` and ``sync`` ask for.

        ``{"retry": {...}}`` with any of remote, repository and tag tries what fits at once, also what is set
        aside; ``{"sync": PATTERN}`` queues every tag of the repositories that the pattern and a rule match.

        Raises:
            ValueError: it is anything else.
        """
        if isinstance(document, dict) and len(document) == 1:
            wanted, pattern = document.get("retry"), document.get("sync")
            if isinstance(wanted, dict):
                return {"retried": await self._retry(wanted)}
            if isinstance(pattern, str):
                self._check_pattern(pattern)
                self._want_sync(pattern)
                return {"syncing": pattern}
        raise ValueError('must be a JSON object, {"retry": {...}} or {"sync": "PATTERN"}')

    def _check_pattern(self, pattern: str) -> None:
        """Raises ValueError when no repository matches both the pattern and a rule."""
        rules = [rule.pattern for rule in self._rules.rules]
        is_short = len(pattern) <= REPOSITORY_LENGTH_MAX
        if not (is_short and any(some_name_matches(pattern, rule) for rule in rules)):
            raise ValueError(
                f"no rule of replications sends what {pattern[:REPOSITORY_LENGTH_MAX]!r} matches: "
                f"the rules have {', '.join(rules)}"
            )

    async def _retry(self, wanted: Mapping[str, object]) -> int:
        fields = ("remote", "repository", "tag")
        if unknown := sorted(map(str, wanted.keys() - set(fields))):
            raise ValueError(f"retry has no {unknown[0]}: remote, repository and tag are known")
        for field, value in wanted.items():
            if not isinstance(value, str):
                raise ValueError(f"{field} must be a text: {value!r:.100}")
        known = {*self._lanes, *self._entries.remotes}
        if wanted.get("remote", "") not in {"", *known}:
            raise ValueError(
                f"no remote is called {wanted['remote']!r}: {', '.join(sorted(known))}"
            )
        keys = [
            entry.change.key
            for entry in self._entries.mine()
            if all(getattr(entry.change, field) == value for field, value in wanted.items())
        ]
        count = 0
        for start in range(0, len(keys), RETRIED_AT_ONCE):
            count += await self._retry_all(keys[start : start + RETRIED_AT_ONCE])
        return count

    async def _retry_all(self, keys: Iterable[ChangeKey]) -> int:
        """Make entries due; returns how many the remotes do not have by now."""
        async with self._turn:
            entries = [entry for key in keys if (entry := self._entries.get(key)) is not None]
            await self._update_all(entries, set_aside=False, attempts=0, next_at=time.time())
            for entry in entries:
                self._remember(entry.change, 0.0)
        return len(entries)

    def _want_sync(self, pattern: str) -> None:
        """Raises ValueError when too many wait."""
        # What is under way may be past what has become of a remote since.
        if pattern in self._syncs[1:]:
            return
        if len(self._syncs) > SYNCS_MAX:
            raise ValueError(f"{SYNCS_MAX} patterns wait already: see swarmpull replication status")
        self._syncs.append(pattern)
        self._sync_wanted.set()

    async def _sync_in_turn(self) -> None:
        """Queue what was asked for, one pattern after the other, until cancelled."""
        while True:
            self._sync_wanted = trio.Event()
            while self._syncs:
                await self._sync(self._syncs[0])
                del self._syncs[0]
            await self._sync_wanted.wait()

    async def _sync(self, pattern: str) -> None:
        """Queue every tag that a pattern and a rule match, and what refers to something.

        The remotes know best what they lack.
        """
        matches = compile_pattern(pattern).fullmatch
        count = 0
        try:
            async for repository in _pages(self._catalog.list_repositories):
                remotes = self._rules.remotes_of(repository)
                if not remotes or not matches(repository):
                    continue

                async def list_tags(after: str, limit: int, of: str = repository) -> api.ListReply:
                    return await self._catalog.list_tags(of, after, limit)

                async for tag in _pages(list_tags):
                    latest = (await self._catalog.tags.log(repository, tag)).latest
                    if latest is not None:
                        await self._enter(repository, tag, latest.stamp, remotes, 0.0)
                        count += 1
                count += await self._sync_referrers(repository, remotes)
        except SwarmpullError as error:
            log.warning("replication_sync_failed", pattern=pattern, queued=count, reason=str(error))
            self._sync_failure = f"{pattern}: {error}"[:ERROR_TEXT_MAX]
            return
        self._sync_failure = ""
        log.info("replication_sync", pattern=pattern, queued=count)

    async def _sync_referrers(self, repository: str, remotes: Iterable[str]) -> int:
        async def list_names(after: str, limit: int) -> api.ListReply:
            return await self._catalog.list_all_referrers(repository, after, limit)

        count = 0
        async for name in _pages(list_names):
            await self._enter_referrer(repository, digest_at_end(name), remotes)
            count += 1
        return count

    async def _enter_referrer(
        self, repository: str, digest: Digest, remotes: Iterable[str]
    ) -> None:
        """Queue it as what it is; that has a stamp of its own, which is not before this one."""
        stamp = api.Stamp(0, self._catalog.tags.source)
        await self._enter(repository, str(digest), stamp, remotes, 0.0)


def _lane_to(remote: Remote) -> _Lane:
    schedule: Schedule[ChangeKey] = Schedule(
        random.Random(), COPIES_MAX, longest=BACKOFF_MAX, group=_repository_of
    )
    return _Lane(remote, schedule)


def _repository_of(key: ChangeKey) -> str:
    return key[1]


def _named(change: RemoteChange) -> dict[str, str]:
    """What a change is of, as logs and documents have it."""
    return {"remote": change.remote, "repository": change.repository, "tag": change.tag}


def _for_wire(change: RemoteChange) -> api.ChangeForRemote:
    stamp = api.Stamp(change.time, change.source)
    return api.ChangeForRemote(change.remote, change.repository, change.tag, stamp)


def _is_public(attribute: attrs.Attribute[Any], _: object) -> bool:
    return not attribute.name.startswith("_")


def _state(entry: Entry, is_tried: bool) -> str:
    if entry.progress is not None:
        return "copying"
    if not is_tried:
        return "set aside"
    return "failing" if entry.change.attempts else "waiting"


async def _pages(list_page: Callable[[str, int], Any]) -> Any:  # noqa: ANN401 - an iterator of names
    """The names of a listing, page by page."""
    after, more = "", True
    while more:
        page: api.ListReply = await list_page(after, PAGE)
        for name in page.names:
            yield name
        more = page.more and bool(page.names)
        after = page.names[-1] if page.names else after


class _ReplicatorMetrics:
    """The metrics of one index that replicates."""

    def __init__(self, metrics: Metrics, replicator: Replicator) -> None:
        queued = metrics.gauge(
            "replication_queue_changes", "Tags that a remote has not been told of yet.", ["remote"]
        )
        for remote in replicator.remotes():
            queued.labels(remote).set_function(_bound(replicator.queued, remote))
        metrics.gauge(
            "replication_set_aside_changes", "Of these, the ones that are not tried any more."
        ).set_function(replicator.set_aside)
        metrics.gauge(
            "replication_oldest_seconds", "Since the change was made that waits for longest."
        ).set_function(replicator.oldest)
        self.copied = metrics.counter(
            "replication_copied_total", "Changes of tags that a remote has taken.", ["remote"]
        )
        self.bytes = metrics.counter(
            "replication_bytes_total", "Bytes of blobs that were sent to a remote.", ["remote"]
        )
        for remote in replicator.remotes():
            # There from the start, with 0.
            self.copied.labels(remote)
            self.bytes.labels(remote)
        self.failures = metrics.counter(
            "replication_failures_total",
            "Attempts that failed, by the class of the error.",
            ["remote", "reason"],
        )


def _bound(function: Callable[[str], int], argument: str) -> Callable[[], float]:
    return lambda: function(argument)
