"""The journal of an index: changes that were acknowledged while the backend was down.

A change is on the disk of every index that answers before it is acknowledged.  Each of them writes it to the
backend when that is back; made twice it is made once, because of its stamp.  One that did not answer asks
when it is there again (`index_contact`).
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import attrs
import structlog
import trio

from swarmpull.errors import (
    BackendUnavailable,
    ProtocolError,
    RpcUnavailable,
    StartupError,
    StoreFull,
    SwarmpullError,
)
from swarmpull.roles.catalog import Catalog
from swarmpull.roles.catalog_replay import Replay
from swarmpull.roles.index_cache import ResolveCache
from swarmpull.roles.index_peers import IndexPeers
from swarmpull.roles.pending_changes import PendingChanges, id_of
from swarmpull.store.durable import make_directory
from swarmpull.store.durable_queue import DurableQueue, QueueFile, Row, open_durable_queue
from swarmpull.store.retry_schedule import backoff
from swarmpull.telemetry import Metrics
from swarmpull.wire import api
from swarmpull.wire.api import PendingChange
from swarmpull.wire.codec import decode, encode

log = structlog.get_logger()

FILE_NAME: Final = "index-journal.sqlite"
# All changes are in memory, too.
CHANGES_MAX: Final = 100_000
BYTES_MAX: Final = 64 << 20
# Seconds for another index to have a change on its disk.
SHARE_TIMEOUT: Final = 3.0
# Of one call among indexes: changes, and bytes of them.
BATCH: Final = 200
BATCH_BYTES: Final = 1 << 20
# Changes that are written to the backend before the other indexes are told of them.
WRITE_BATCH: Final = 200
# Seconds between two looks whether the backend is back.
LOOK_INTERVAL: Final = 0.5
# For so many seconds after the return of the backend the changes of others are left to them.
COURTESY: Final = 3.0
# Ids that are remembered of what is done with; older ones are made once more if another index still has them.
DONE_MAX: Final = 10_000
BACKOFF_MAX: Final = 5.0


@attrs.frozen
class _Kept:
    """``mine``: it was asked for here, not at another index; ``kept_at`` is in seconds since the epoch.

    ``number`` says in which order they came to this process.
    """

    change: PendingChange
    mine: bool
    kept_at: float
    size: int
    number: int = 0


def _row(kept: _Kept) -> Row:
    return id_of(kept.change), kept.mine, kept.kept_at, encode(kept.change)


def _kept(row: Row) -> _Kept:
    _, mine, kept_at, body = row
    return _Kept(decode(body, PendingChange), bool(mine), kept_at, len(body))


_FILE: Final = QueueFile(
    what="the journal of the index",
    # "swpj"
    application_id=0x7377706A,
    create="""
        create table changes (
            id text not null primary key,
            mine integer not null,
            kept_at real not null,
            body blob not null
        ) strict
    """,
    put="insert or replace into changes values (?, ?, ?, ?)",
    remove="delete from changes where id = ?",
    all="select * from changes order by kept_at, id",
    pack=_row,
    unpack=_kept,
    when_damaged=(
        "move it and what is named like it away: the other indexes have what was in it; what only this one "
        "had has to be pushed again"
    ),
)


class Journal:
    """Keeps changes until the backend has them.

    Attributes:
        trouble: why the last attempt to write a change to the backend failed; empty when it did not.
    """

    def __init__(
        self,
        rows: DurableQueue[_Kept],
        pending: PendingChanges,
        catalog: Catalog,
        cache: ResolveCache,
        peers: IndexPeers,
        metrics: Metrics,
    ) -> None:
        self.trouble = ""
        self._rows = rows
        self._pending = pending
        self._replay = Replay(catalog)
        # Held while one change is written: it is dropped before or after that.
        self._writing = trio.Lock()
        self._cache = cache
        self._peers = peers
        self._bytes = 0
        # By id, in the order of their numbers.
        self._changes: dict[str, _Kept] = {}
        self._number = 0
        # What this process has written, or dropped: others may have it for a while, and are asked for theirs.
        self._done: dict[str, None] = {}
        self._filled = trio.Event()
        self._depth = metrics.gauge(
            "index_journal_changes", "Acknowledged changes that the backend does not have yet."
        )
        self._age = metrics.gauge(
            "index_journal_age_seconds", "Age of the oldest such change; 0 when there is none."
        )
        for kept in rows.loaded:
            self._enter(kept)

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
        }

    # --- keeping ------------------------------------------------------------------------------

    async def add(self, *changes: PendingChange) -> None:
        """Return when changes are on the disk of every index that answers.

        Raises:
            StoreFull: one of them has no room for it, or holds as many as it may.
            StoreUnavailable: the disk of one of them fails.
        """
        await self._keep(changes, mine=True)
        for batch in _batches(changes):
            await self._share(batch)

    async def keep(self, request: api.KeepPendingRequest) -> api.PendingKept:
        """Changes that another index has acknowledged, or is about to.  Raises what `add` does."""
        await self.take(request.changes)
        return api.PendingKept(self._peers.process)

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
                if kept.change.at <= deleted.at and _makes_part(kept.change, deleted)
            ]
            if dropped:
                await self._remove(dropped)

    async def _keep(self, changes: Iterable[PendingChange], *, mine: bool) -> None:
        now = time.time()
        added = [
            _Kept(change, mine, now, len(encode(change)))
            for change in {id_of(each): each for each in changes}.values()
            if id_of(change) not in self._changes and id_of(change) not in self._done
        ]
        size = sum(kept.size for kept in added)
        if len(self._changes) + len(added) > CHANGES_MAX or self._bytes + size > BYTES_MAX:
            raise StoreFull(
                self._rows.name,
                size,
                f"the backend is down and the journal of the index holds {len(self._changes)} changes, "
                "as many as it may: wait until the backend is back",
            )
        if added:
            # A caller that leaves meanwhile must not leave a row behind that comes true at the next start.
            with trio.CancelScope(shield=True):
                await self._rows.put_all(added)
        for kept in added:
            # Another call may have brought the same.
            if id_of(kept.change) not in self._changes:
                self._enter(kept)

    def _enter(self, kept: _Kept) -> None:
        self._number += 1
        self._changes[id_of(kept.change)] = attrs.evolve(kept, number=self._number)
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
        changes = [kept.change for kept in self._changes.values()]
        async with trio.open_nursery() as nursery:
            for address in self._peers.others if changes else ():
                nursery.start_soon(self._hand_out_to, address, changes)

    async def _hand_out_to(self, address: str, changes: Sequence[PendingChange]) -> None:
        for batch in _batches(changes):
            request = api.KeepPendingRequest(batch)
            try:
                await self._peers.call(address, api.KEEP_PENDING, request, timeout=SHARE_TIMEOUT)
            except SwarmpullError as error:
                log.info("index_journal_not_shared", index=address, reason=str(error))
                return

    async def _share(self, changes: Sequence[PendingChange]) -> None:
        failures: list[SwarmpullError] = []
        request = api.KeepPendingRequest(tuple(changes))
        deadline = trio.current_time() + SHARE_TIMEOUT

        async def give(address: str) -> None:
            try:
                await self._peers.insist(address, api.KEEP_PENDING, request, deadline)
            except RpcUnavailable as error:
                # It asks before it answers anybody again; until then it does not count as healthy.
                log.info("index_journal_not_shared", index=address, reason=error.reason)
            except SwarmpullError as error:
                failures.append(error)

        async with trio.open_nursery() as nursery:
            for address in self._peers.others:
                nursery.start_soon(give, address)
        if failures:
            raise failures[0]

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
        wanted = [kept for kept in self._changes.values() if kept.mine or not mine_only]
        wanted.sort(key=lambda each: each.kept_at)
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
            log.info("index_journal_written", changes=before)

    async def _write_batch(self, batch: Iterable[_Kept]) -> tuple[list[_Kept], bool]:
        """Returns what the backend has now, and whether it has failed."""
        written: list[_Kept] = []
        for kept in batch:
            try:
                async with self._writing:
                    if id_of(kept.change) in self._changes:
                        await self._replay.write(
                            kept.change, kept.change.at or int(kept.kept_at * 1e9)
                        )
            except SwarmpullError as error:
                self._complain(kept.change, error)
                if isinstance(error, BackendUnavailable):
                    return written, True
            else:
                written.append(kept)
        return written, False

    def _complain(self, change: PendingChange, error: SwarmpullError) -> None:
        self.trouble = f"{id_of(change)}: {error}"
        log.warning("index_journal_not_written", change=id_of(change), reason=str(error))

    async def _spread(self, written: Iterable[_Kept]) -> None:
        """An index that does not know of these may keep what it has read before they were written."""
        tags: dict[str, set[str]] = {}
        for repository, tag in _tags_of(kept.change for kept in written):
            tags.setdefault(repository, set()).add(tag)
        async with trio.open_nursery() as nursery:
            for repository, names in tags.items():
                nursery.start_soon(self._peers.spread, repository, tuple(sorted(names)))

    async def _remove(self, written: Sequence[_Kept]) -> None:
        # From the disk first: what is found there after a crash is made once more, which does no harm.
        await self._rows.remove_rows([(id_of(kept.change),) for kept in written])
        for kept in written:
            if self._changes.pop(id_of(kept.change), None) is not None:
                self._bytes -= kept.size
                self._pending.remove(kept.change)
                self._done[id_of(kept.change)] = None
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


def _tags_of(changes: Iterable[PendingChange]) -> Iterator[tuple[str, str]]:
    """The repository and name of each tag that is changed."""
    for change in changes:
        if change.manifest is not None and change.manifest.tag:
            yield change.manifest.repository, change.manifest.tag
        if change.deletion is not None:
            yield change.deletion.repository, change.deletion.reference


def _batches(changes: Iterable[PendingChange]) -> Iterator[tuple[PendingChange, ...]]:
    """No more in each than goes into one call."""
    batch: list[PendingChange] = []
    size = 0
    for change in changes:
        size += len(encode(change))
        if batch and (len(batch) >= BATCH or size > BATCH_BYTES):
            yield tuple(batch)
            batch, size = [], len(encode(change))
        batch.append(change)
    if batch:
        yield tuple(batch)


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
    await trio.to_thread.run_sync(_prepare, directory)
    try:
        async with open_durable_queue(directory / FILE_NAME, "index", _FILE, tuple) as rows:
            yield Journal(rows, pending, catalog, cache, peers, metrics)
    except ProtocolError as error:
        raise StartupError(
            f"{directory / FILE_NAME} is damaged ({error})", _FILE.when_damaged
        ) from error


def _prepare(directory: Path) -> None:
    try:
        make_directory(directory)
    except OSError as error:
        raise StartupError(
            f"the data directory {directory} cannot be made ({error.strerror or error})",
            "make its parent one that this user can write to, or set index.data_dir",
        ) from error
