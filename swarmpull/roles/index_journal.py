"""The journal of an index: changes that were acknowledged while the backend was down.

A change is on the disk of every index that answers before it is acknowledged.  Each of them writes it to the
backend when that is back; made twice it is made once, because of its stamp.  One that did not answer asks
when it is there again (`index_contact`).
"""

from __future__ import annotations

import math
import random
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import attrs
import structlog
import trio

from swarmpull.digest import Digest
from swarmpull.errors import (
    BackendUnavailable,
    ManifestReferencesMissing,
    StoreFull,
    StoreUnavailable,
    SwarmpullError,
)
from swarmpull.roles.catalog import Catalog
from swarmpull.roles.catalog_replay import Replay
from swarmpull.roles.index_cache import ResolveCache
from swarmpull.roles.index_peers import IndexPeers
from swarmpull.roles.journal_file import Kept, keep, open_journal_file
from swarmpull.roles.journal_sharing import (
    BATCH,
    BATCH_BYTES,
    JournalSharing,
    NotSure,
    Shared,
    batches,
)
from swarmpull.roles.pending_changes import PendingChanges, id_of
from swarmpull.roles.set_aside_changes import (
    REFUSALS,
    REMEDY,
    SetAsideChanges,
    log_set_aside,
    refusal_of,
)
from swarmpull.store.durable_queue import DurableQueue
from swarmpull.store.retry_schedule import backoff
from swarmpull.telemetry import Metrics
from swarmpull.wire import api
from swarmpull.wire.api import PendingChange

log = structlog.get_logger()

# All changes are in memory, too.
CHANGES_MAX: Final = 100_000
BYTES_MAX: Final = 64 << 20
# Changes that are written to the backend before the other indexes are told of them.
WRITE_BATCH: Final = 200
# Changes on which the backend may fail before the rest is left for later: each may take seconds to fail.
FAILURES_MAX: Final = 3
# Seconds between two looks whether the backend is back.
LOOK_INTERVAL: Final = 0.5
# For so many seconds after the return of the backend the changes of others are left to them.
COURTESY: Final = 3.0
# Ids that are remembered of what is done with; older ones are made once more if another index still has them.
DONE_MAX: Final = 10_000
BACKOFF_MAX: Final = 5.0


class Journal:
    """Keeps changes until the backend has them.

    Attributes:
        trouble: why the last attempt to write a change to the backend failed; empty when it did not.
        set_aside: changes that can never be written; nobody sees them any more but the operator.
    """

    def __init__(
        self,
        rows: DurableQueue[Kept],
        pending: PendingChanges,
        catalog: Catalog,
        cache: ResolveCache,
        peers: IndexPeers,
        metrics: Metrics,
    ) -> None:
        self.trouble = ""
        self.set_aside = SetAsideChanges()
        self._direct = catalog.tags.direct
        self._rows = rows
        self._pending = pending
        self._replay = Replay(catalog)
        # Held while one change is written: it is dropped before or after that.
        self._writing = trio.Lock()
        self._cache = cache
        self._peers = peers
        self._sharing = JournalSharing(peers)
        self._bytes = 0
        # By id, in the order of their numbers.
        self._changes: dict[str, Kept] = {}
        self._number = 0
        # What this process has written (True), or dropped: others may have it for a while, and are asked for
        # theirs.
        self._done: dict[str, bool] = {}
        # How often the backend has failed on each.
        self._failed: Counter[str] = Counter()
        self._filled = trio.Event()
        self._depth = metrics.gauge(
            "index_journal_changes", "Acknowledged changes that the backend does not have yet."
        )
        self._age = metrics.gauge(
            "index_journal_age_seconds", "Age of the oldest such change; 0 when there is none."
        )
        metrics.gauge(
            "index_journal_set_aside_changes",
            "Acknowledged changes that can never be written as they are: see swarmpull journal status.",
        ).set_function(lambda: len(self.set_aside))
        for kept in rows.loaded:
            if kept.refusal:
                self._bytes += kept.size
                self.set_aside.add(kept)
            else:
                self._enter(kept)
        if self.set_aside:
            log.warning("index_journal_has_set_aside", changes=len(self.set_aside), remedy=REMEDY)

    @property
    def age(self) -> float:
        """Seconds since the oldest change was acknowledged; 0 when there is none."""
        # In the order of their coming: all of them would be looked at with each one that comes.
        oldest = next(iter(self._changes.values()), None)
        return 0.0 if oldest is None else max(0.0, time.time() - oldest.kept_at)

    def status(self) -> dict[str, Any]:
        """For the status of the role."""
        return {
            "changes": len(self._changes),
            "bytes": self._bytes,
            "age": self.age,
            "trouble": self.trouble if self._changes else "",
            "set_aside": len(self.set_aside),
            "set_aside_changes": self.set_aside.names(),
        }

    # --- keeping ------------------------------------------------------------------------------

    async def add(self, *changes: PendingChange, judged_by: str = "") -> None:
        """Return when changes are on the disk of every index that answers.

        Args:
            changes: what is to be acknowledged.
            judged_by: the change, by its id, that is taken for the last one of the tag: then every other
                index has to answer, and to know of nothing later.

        Raises:
            StoreFull: one of them has no room for it, or holds as many as it may.
            NotSure: the tag may have been changed since it was as ``judged_by`` says.
            StoreUnavailable: the disk of one of them fails; or one of these, and the change could not be
                withdrawn from all.
        """
        if judged_by:
            await self._check_sure(judged_by)
        # From here on, what may be wrong is withdrawn, whether somebody waits for it or not.
        with trio.CancelScope(shield=bool(judged_by)):
            await self._keep(changes, mine=True)
            shared = Shared()
            if judged_by and not self.is_sure(judged_by, changes):
                shared.failures.append(NotSure("this index has changed it meanwhile"))
            for batch in () if shared.failures else batches(changes):
                await self._sharing.share(batch, judged_by, shared)
            if shared.failures:
                await self._withdraw(changes, shared)

    async def _check_sure(self, judged_by: str) -> None:
        """Raise NotSure before anything is kept: if this process dies then, nothing wrong comes true."""
        if not self._peers.members.is_complete:
            raise NotSure("the names of the other indexes could not be resolved yet")
        shared = Shared()
        await self._sharing.share((), judged_by, shared)
        if shared.failures:
            raise shared.failures[0]

    def is_sure(self, judged_by: str, made: Iterable[PendingChange] = ()) -> bool:
        """Whether that is the last change of its tag: this index has made none since, and knows of no other.

        Args:
            judged_by: a pending change of a tag, by its id.
            made: what is being made.
        """
        kept = self._changes.get(judged_by)
        if kept is None:
            return False
        ((repository, tag),) = _tags_of([kept.change])
        last = self._pending.last_of(repository, tag, set(map(id_of, made)))
        known_at = min(kept.acknowledged_at, kept.kept_at * 1e9)
        if last != judged_by or self._pending.is_passed(judged_by):
            return False
        return self._direct.last(repository, tag) < known_at

    async def keep(self, request: api.KeepPendingRequest) -> api.PendingKept:
        """Changes that another index has acknowledged, or is about to.  Raises what `add` does."""
        if request.again:
            known = map(self.set_aside.get, map(id_of, request.changes))
            await self._readmit([kept for kept in known if kept is not None])
        judged_by = request.judged_by
        if judged_by and not self.is_sure(judged_by, request.changes):
            return api.PendingKept(self._peers.process)
        await self.take(request.changes)
        # While it went to the disk, the tag may have been changed.
        is_sure = not judged_by or self.is_sure(judged_by, request.changes)
        return api.PendingKept(self._peers.process, is_sure)

    async def take(self, changes: Iterable[PendingChange]) -> None:
        """The same, of changes that were asked for.  Raises what `add` does."""
        await self._keep(changes, mine=False)

    def pending(self, request: api.PendingRequest) -> api.PendingReply:
        """Changes that came after those that the caller has taken over."""
        after = request.after if request.process == self._peers.process else 0
        found: list[PendingChange] = []
        size = 0
        last = after
        for kept in self._changes.values() if after < self._number else ():
            if kept.number <= after:
                continue
            size += kept.size
            if found and (len(found) >= BATCH or size > BATCH_BYTES):
                return api.PendingReply(self._peers.process, tuple(found), more=True, last=last)
            found.append(kept.change)
            last = kept.number
        return api.PendingReply(self._peers.process, tuple(found), more=False, last=self._number)

    async def drop(self, deleted: api.ForgetRequest) -> None:
        """Another index has deleted a manifest or a blob, and the backend knows when."""
        async with self._writing:
            dropped = [
                kept
                for kept in self._changes.values()
                if kept.acknowledged_at <= deleted.at and _makes_part(kept.change, deleted)
            ]
            if dropped:
                # Who asked waits for a second; what the disk does not have any more must not stay in memory.
                with trio.CancelScope(shield=True):
                    await self._remove(dropped)

    async def _keep(self, changes: Iterable[PendingChange], *, mine: bool) -> None:
        now = time.time()
        named = {id_of(each): each for each in changes}
        added = [
            keep(change, mine, now)
            for change_id, change in named.items()
            if not self._knows(change_id)
        ]
        self._check_room(added)
        if added:
            # A caller that leaves meanwhile must not leave a row behind that comes true at the next start.
            with trio.CancelScope(shield=True):
                await self._rows.put_all(added)
        for kept in added:
            # Another call may have brought the same.
            if not self._knows(kept.id):
                self._enter(kept)

    def _knows(self, change_id: str) -> bool:
        """Whether it is here, or was."""
        return change_id in self._changes or change_id in self.set_aside or change_id in self._done

    def _check_room(self, added: Sequence[Kept]) -> None:
        size = sum(kept.size for kept in added)
        held = len(self._changes) + len(self.set_aside)
        if held + len(added) <= CHANGES_MAX and self._bytes + size <= BYTES_MAX:
            return
        remedy = "wait until the backend is back"
        if self.set_aside:
            remedy += f", and see swarmpull journal status: {len(self.set_aside)} are set aside"
        raise StoreFull(
            self._rows.name,
            size,
            f"the backend is down and the journal of the index holds {held} changes, as many as it may: "
            + remedy,
        )

    def _enter(self, kept: Kept) -> None:
        self._number += 1
        self._changes[kept.id] = attrs.evolve(kept, number=self._number)
        self._bytes += kept.size
        self._pending.add(kept.change)
        self._forget(kept.change)
        self._filled.set()
        self._tell_metrics()

    def _forget(self, change: PendingChange) -> None:
        """What is kept of a lookup may be what was before."""
        for repository, tag in _tags_of([change]):
            self._cache.forget(repository, (tag,))

    # --- the other indexes --------------------------------------------------------------------

    async def hand_out(self) -> None:
        """Give the others all that is kept, before this index answers anybody.

        They would give out what was before, until they ask the next time.
        """
        await self._sharing.hand_out([kept.change for kept in self._changes.values()])

    async def _withdraw(self, changes: Sequence[PendingChange], shared: Shared) -> None:
        """Have what must not be acknowledged not come true later, and raise why.

        Returns when the backend has it after all.  Raises StoreUnavailable when it may come true.
        """
        ids = [id_of(change) for change in changes]
        # One that was not tried may have asked for it.
        others = set(self._peers.others) - (shared.tried - shared.asked)
        # Whoever asked may leave meanwhile; the calls end by themselves.
        with trio.CancelScope(shield=True):
            silent = await self._sharing.drop(ids, others)
            try:
                clear = await self._drop(ids)
            except SwarmpullError as error:
                silent.append(f"this index ({error})")
            else:
                if all(map(self._done.get, ids)):
                    return
                if len(clear) < len(ids):
                    silent.append("this index, which was writing it,")
        failure = shared.failures[0]
        if silent:
            who = ", ".join(sorted(silent))
            raise StoreUnavailable(
                self._rows.name,
                f"{failure}; and {who} could not be told to forget it: whether it comes true is known when "
                "the backend is back",
            ) from failure
        raise failure

    # --- changes that can never be written ----------------------------------------------------

    async def retry(self, wanted: Sequence[Kept]) -> int:
        """Try what was set aside once more, here and at every index that answers; returns how much it is.

        Raises StoreFull, StoreUnavailable: the disk fails.
        """
        admitted = await self._readmit(wanted)
        await self._sharing.hand_out([kept.change for kept in admitted], again=True)
        return len(admitted)

    async def _readmit(self, wanted: Sequence[Kept]) -> list[Kept]:
        async with self._writing:
            found = [
                attrs.evolve(kept, refusal="", refused_at=0.0)
                for kept in wanted
                if kept.id in self.set_aside
            ]
            with trio.CancelScope(shield=True):
                await self._rows.put_all(found)
            for kept in found:
                self.set_aside.pop(kept.id)
                self._bytes -= kept.size
                self._enter(kept)
        return found

    async def forget_set_aside(self, wanted: Sequence[Kept]) -> int:
        """Drop what was set aside, here and at every index that answers; returns how much it was.

        Raises StoreFull, StoreUnavailable: the disk fails.
        """
        dropped = await self._drop(kept.id for kept in wanted)
        await self._sharing.drop(dropped, self._peers.others)
        return len(dropped)

    async def drop_pending(self, request: api.DropPendingRequest) -> api.PendingDropped:
        """Another index wants changes to be forgotten.  Raises StoreFull, StoreUnavailable."""
        return api.PendingDropped(self._peers.process, tuple(await self._drop(request.changes)))

    async def _drop(self, ids: Iterable[str]) -> list[str]:
        """Those of the ids that this index does not write any more, and surely has not written."""
        async with self._writing:
            left = [each for each in dict.fromkeys(ids) if not self._done.get(each)]
            # An attempt on which the backend failed may have happened all the same.
            clear = [each for each in left if each not in self._failed]
            with trio.CancelScope(shield=True):
                await self._rows.remove_rows([(each,) for each in left])
            for each in left:
                self._leave(each, written=False)
            self._trim()
        return clear

    async def _set_aside(self, kept: Kept, error: SwarmpullError) -> None:
        """It can never be written.  The caller is writing it, and nobody else is.

        Raises StoreFull, StoreUnavailable: the disk fails, and it is as it was.
        """
        refused = attrs.evolve(kept, refusal=refusal_of(error), refused_at=time.time())
        with trio.CancelScope(shield=True):
            await self._rows.put(refused)
        del self._changes[kept.id]
        self._failed.pop(kept.id, None)
        self._pending.remove(kept.change)
        self.set_aside.add(refused)
        # What is kept of lookups has seen it.
        self._forget(kept.change)
        self._tell_metrics()
        log_set_aside(refused)

    # --- writing to the backend ---------------------------------------------------------------

    async def run(self, is_down: Callable[[], bool]) -> None:
        """Write what there is to the backend whenever that is up, until cancelled."""
        failures = 0
        while True:
            if not self._changes:
                self._filled = trio.Event()
                await self._filled.wait()
            back_at = trio.current_time()
            while is_down():
                self._tell_metrics()
                await trio.sleep(LOOK_INTERVAL)
                back_at = trio.current_time()
            await self._write(mine_only=True)
            if self._changes:
                await trio.sleep_until(back_at + COURTESY)
                await self._write(mine_only=False)
            failures = failures + 1 if self._changes else 0
            if failures:
                await trio.sleep(backoff(failures, BACKOFF_MAX, random.Random()))

    async def _write(self, *, mine_only: bool) -> None:
        before = len(self._changes)
        wanted = self._with_references() if mine_only else list(self._changes.values())
        # What the backend fails on, perhaps one damaged object, comes last and does not hold up the rest.
        wanted.sort(key=lambda each: (self._failed.get(each.id, 0), each.kept_at))
        while wanted:
            batch, wanted = wanted[:WRITE_BATCH], wanted[WRITE_BATCH:]
            written, stuck = await self._write_batch(batch)
            await self._spread(written)
            try:
                await self._remove(written)
            except SwarmpullError as error:
                self._complain(written[0].change, error)
            if stuck:
                break
        if before and not self._changes:
            self.trouble = ""
            log.info("index_journal_written", changes=before, set_aside=len(self.set_aside))

    def _with_references(self) -> list[Kept]:
        """What was asked for here, and what that refers to, whoever was asked for it."""
        found = {kept.id: kept for kept in self._changes.values() if kept.mine}
        makers: defaultdict[tuple[str, Digest], list[Kept]] = defaultdict(list)
        for kept in self._changes.values():
            for key in () if kept.mine else _makes(kept.change):
                makers[key].append(kept)
        left = list(found.values())
        while left:
            for key in _needs(left.pop().change):
                for kept in makers.pop(key, ()):
                    found[kept.id] = kept
                    left.append(kept)
        return list(found.values())

    async def _write_batch(self, batch: Iterable[Kept]) -> tuple[list[Kept], bool]:
        """Returns what the backend has now, and whether it has failed."""
        written: list[Kept] = []
        failed = 0
        for kept in batch:
            try:
                async with self._writing:
                    if kept.id not in self._changes:
                        continue
                    if await self._write_one(kept):
                        written.append(kept)
            except SwarmpullError as error:
                self._complain(kept.change, error)
                if isinstance(error, BackendUnavailable):
                    self._failed[kept.id] += 1
                    failed += 1
                if failed >= FAILURES_MAX:
                    return written, True
        return written, False

    async def _write_one(self, kept: Kept) -> bool:
        """Whether the backend has it now; what it never can have is set aside.

        Raises what else is in the way.
        """
        try:
            await self._replay.write(kept.change, kept.acknowledged_at)
        except REFUSALS as error:
            if self._may_come(error):
                raise
            await self._set_aside(kept, error)
            return False
        # From now on it is too late to drop it.
        self._done[kept.id] = True
        return True

    def _may_come(self, error: SwarmpullError) -> bool:
        """Whether what a manifest lacks is on its way into the backend."""
        return isinstance(error, ManifestReferencesMissing) and any(
            self._pending.has_part(error.repository, Digest.parse(each)) for each in error.missing
        )

    def _complain(self, change: PendingChange, error: SwarmpullError) -> None:
        self.trouble = f"{id_of(change)}: {error}"
        log.warning("index_journal_not_written", change=id_of(change), reason=str(error))

    async def _spread(self, written: Iterable[Kept]) -> None:
        """An index that does not know of these may keep what it has read before they were written."""
        tags: dict[str, set[str]] = {}
        for repository, tag in _tags_of(kept.change for kept in written):
            tags.setdefault(repository, set()).add(tag)
        async with trio.open_nursery() as nursery:
            for repository, names in tags.items():
                nursery.start_soon(self._peers.spread, repository, tuple(sorted(names)))

    async def _remove(self, written: Sequence[Kept]) -> None:
        # From the disk first: what is found there after a crash is made once more, which does no harm.
        await self._rows.remove_rows([(kept.id,) for kept in written])
        for kept in written:
            self._leave(kept.id, written=True)
        self._trim()

    def _leave(self, change_id: str, *, written: bool) -> None:
        """It is not on the disk any more."""
        if (pending := self._changes.pop(change_id, None)) is not None:
            self._pending.remove(pending.change)
            if not written:
                self._forget(pending.change)
        kept = pending or self.set_aside.pop(change_id)
        self._bytes -= 0 if kept is None else kept.size
        self._failed.pop(change_id, None)
        self._done[change_id] = written

    def _trim(self) -> None:
        while len(self._done) > DONE_MAX:
            del self._done[next(iter(self._done))]
        self._tell_metrics()

    def _tell_metrics(self) -> None:
        self._depth.set(len(self._changes))
        self._age.set(math.ceil(self.age) if self._changes else 0)


def _makes_part(change: PendingChange, deleted: api.ForgetRequest) -> bool:
    """Whether a change puts into the repository what was deleted from it."""
    link, record = change.link, change.manifest
    return (
        link is not None and (link.repository, link.digest) == (deleted.repository, deleted.blob)
    ) or (
        record is not None
        and (record.repository, record.manifest.digest) == (deleted.repository, deleted.manifest)
    )


def _makes(change: PendingChange) -> Iterator[tuple[str, Digest]]:
    """What a change puts into a repository."""
    if change.link is not None:
        yield change.link.repository, change.link.digest
    if change.manifest is not None:
        yield change.manifest.repository, change.manifest.manifest.digest


def _needs(change: PendingChange) -> Iterator[tuple[str, Digest]]:
    """What has to be in the repository before it."""
    record = change.manifest
    if record is not None:
        for digest in (*record.blobs, *record.manifests):
            yield record.repository, digest


def _tags_of(changes: Iterable[PendingChange]) -> Iterator[tuple[str, str]]:
    """The repository and name of each tag that is changed."""
    for change in changes:
        if change.manifest is not None and change.manifest.tag:
            yield change.manifest.repository, change.manifest.tag
        if change.deletion is not None:
            yield change.deletion.repository, change.deletion.reference


@asynccontextmanager
async def open_journal(
    directory: Path,
    pending: PendingChanges,
    catalog: Catalog,
    cache: ResolveCache,
    peers: IndexPeers,
    metrics: Metrics,
) -> AsyncIterator[Journal]:
    """The journal in the data directory of an index, which is made if it is missing.

    Raises:
        StartupError: the file is damaged, or of a newer version, or the disk fails.
    """
    async with open_journal_file(directory) as rows:
        yield Journal(rows, pending, catalog, cache, peers, metrics)
