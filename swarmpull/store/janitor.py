"""Removes what the limits of a store say: once a minute, and at once when somebody needs room.

The decision is `swarmpull.store.eviction`.  From the look at what is pinned until the name of the file is
gone there is no checkpoint, so nobody can be handed a blob that is about to vanish; freeing its blocks, which
takes long for a large file, follows in a thread.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Final

import structlog
import trio

from swarmpull.digest import Digest
from swarmpull.errors import StoreFull, StoreUnavailable
from swarmpull.store.content import ContentTree
from swarmpull.store.disk import Disk, is_unreadable
from swarmpull.store.durable import remove
from swarmpull.store.eviction import UNLIMITED, Entry, Kind, Limits, Reason, Removal, plan
from swarmpull.store.holds import Holds, Pin
from swarmpull.store.ledger import KINDS, TEMPORARY, UPLOADS, Record
from swarmpull.store.partials import BLOCK_BYTES, PartialFiles
from swarmpull.telemetry import Metrics

log = structlog.get_logger()

# Seconds between two rounds; also how much of the times of use a killed process loses.
INTERVAL: Final = 60.0

Pins = Callable[[], Mapping[Digest, Pin]]
Forget = Callable[[Digest], object]
Chore = Callable[[], Awaitable[object]]


class Janitor:
    """Keeps one store within its limits.

    Attributes:
        limits: may be changed at any time.
    """

    def __init__(
        self,
        root: Path,
        tree: ContentTree,
        disk: Disk,
        holds: Holds,
        open_partials: Collection[Digest],
        limits: Limits,
        metrics: Metrics,
    ) -> None:
        self.limits = limits
        self._root = root
        self._tree = tree
        self._ledger = tree.ledger
        self._disk = disk
        self._holds = holds
        self._open_partials = open_partials
        self._users: list[tuple[Pins, Forget]] = []
        self._chores: list[Chore] = []
        self._making_room = trio.Lock()
        self._metrics = _StoreMetrics(metrics, self)

    @contextmanager
    def attached(self, pins: Pins, forget: Forget) -> Iterator[None]:
        """Ask ``pins`` what must stay, and tell ``forget`` of every blob that is gone, for the block."""
        user = (pins, forget)
        self._users.append(user)
        try:
            yield
        finally:
            self._users.remove(user)

    def add_chore(self, chore: Chore) -> None:
        """Have something done in every round."""
        self._chores.append(chore)

    async def run(self) -> None:
        """Sweep for ever; a disk that fails is logged, and tried again in the next round."""
        while True:
            try:
                await self.sweep()
            except StoreUnavailable as error:
                log.warning("store_not_swept", store=self._disk.name, reason=str(error))
            await trio.sleep(INTERVAL)

    async def sweep(self) -> list[Removal]:
        """One round: remove what has expired or is too much, and write down the times of use.

        Raises:
            StoreUnavailable: the disk failed.
        """
        self._ledger.clamp()
        for chore in self._chores:
            await chore()
        removals, files = self._evict(0)
        await self._remove(files)
        await self.save_uses()
        return removals

    def plan(self, needed: int = 0) -> list[Removal]:
        """What a sweep would remove now; with ``needed``, what would be removed for so many bytes."""
        return plan(
            self.entries(),
            self.limits,
            self._ledger.clock(),
            others=self._ledger.bytes(UPLOADS) + self._ledger.bytes(TEMPORARY),
            needed=needed,
            free=self._free() if needed else UNLIMITED,
        )

    def entries(self) -> list[Entry]:
        """All blobs and partials, with why they are pinned."""
        pins: dict[Digest, Pin] = {}
        for user_pins, _ in self._users:
            pins.update(user_pins())
        pins.update(self._holds.pins())
        return self._ledger.entries(pins, self._open_partials)

    async def admit(self, needed: int, enter: Callable[[], object]) -> None:
        """Let somebody add bytes: evict if need be, and call ``enter``, which puts them into the books.

        Raises:
            StoreFull: even so there is no room for them under the high watermark or on the disk.
            StoreUnavailable: the disk failed.
        """
        if self._fits(needed):
            enter()
            return
        async with self._making_room:
            # Those who waited here may find that the one before them has made room for all.
            files = [] if self._fits(needed) else self._evict(needed)[1]
            fits = self._fits(needed, freed=_allocated(files))
            if fits:
                enter()
            await self._remove(files)
        if not fits:
            self._metrics.refused.inc()
            raise self._full(needed)

    def take_out(self, entry: Entry) -> list[Path]:
        """Take one blob or partial out of the store, for `_remove`; without a checkpoint."""
        if entry.kind is Kind.PARTIAL:
            files = PartialFiles(self._root / "partials", entry.digest)
            return files.take_out(self._tree)
        taken = self._tree.take_out(entry.digest)
        for _, forget in self._users:
            forget(entry.digest)
        return taken

    async def condemn(self, digest: Digest, descriptor: int) -> None:
        """Remove a blob whose open file was found to be damaged, whatever holds it; open handles go on.

        Nothing happens when the file has gone meanwhile, or made way for another.
        """
        # With the books locked, so that no thread puts a right one there between the look and the removal.
        with self._disk.translating(), self._ledger.lock:
            try:
                status = os.stat(self._tree.blob_path(digest))
            except FileNotFoundError:
                return
            if not os.path.samestat(status, os.fstat(descriptor)):
                return
            entry = Entry(digest, Kind.BLOB, status.st_size, status.st_mtime, status.st_mtime)
            taken = self.take_out(entry)
        self._metrics.damaged.inc()
        log.error("blob_damaged", store=self._disk.name, digest=str(digest))
        await self._remove(taken)

    @asynccontextmanager
    async def watching(self, digest: Digest, descriptor: int) -> AsyncIterator[None]:
        """Remove a blob, as `condemn` does, when the block fails because the disk cannot read its file.

        Not one that waits for the backend: it may be the only copy, and some disks think better of it.
        """
        try:
            yield
        except StoreUnavailable as error:
            if is_unreadable(error) and not self._holds.has(digest, Pin.NOT_WRITTEN_BACK):
                await self.condemn(digest, descriptor)
            raise

    async def save_uses(self) -> None:
        """Write down the times at which blobs were used last.  Raises StoreUnavailable."""
        unsaved = self._ledger.unsaved()
        if unsaved:
            await self._disk.run(self._save_uses, unsaved, ahead=True)

    def bytes(self, kind: str) -> int:
        """What the files of one of `swarmpull.store.ledger.KINDS` take up."""
        return self._ledger.bytes(kind)

    # --- inside -------------------------------------------------------------------------------

    def _fits(self, needed: int, freed: int = 0) -> bool:
        return self._ledger.total() + needed <= self.limits.high and needed <= self._free() + freed

    def _free(self) -> float:
        with self._disk.translating():
            status = os.statvfs(self._root)
        return status.f_bavail * status.f_frsize

    def _evict(self, needed: int) -> tuple[list[Removal], list[Path]]:
        """Take out what has to go; returns the files that are left to remove."""
        files: list[Path] = []
        removals = self.plan(needed)
        for done, removal in enumerate(removals):
            try:
                files += self.take_out(removal.entry)
            except OSError as error:
                digest = str(removal.entry.digest)
                log.warning("not_evicted", store=self._disk.name, digest=digest, reason=str(error))
                return removals[:done], files
            self._report(removal)
        return removals, files

    def _report(self, removal: Removal) -> None:
        entry, reason = removal.entry, removal.reason
        now = self._ledger.clock()
        self._metrics.evictions.labels(reason.value).inc()
        self._metrics.evicted_bytes.labels(reason.value).inc(entry.size)
        log.info(
            "evicted",
            store=self._disk.name,
            kind=entry.kind.value,
            digest=str(entry.digest),
            bytes=entry.size,
            reason=reason.value,
            age=round(entry.age(now)),
            idle=round(entry.idle(now)),
        )

    async def _remove(self, files: list[Path]) -> None:
        """Free the room; what cannot be removed now is, being temporary, at the next start."""
        if not files:
            return
        with trio.CancelScope(shield=True):
            try:
                await self._disk.run(_remove_all, files)
            except StoreUnavailable as error:
                log.warning("evicted_not_removed", store=self._disk.name, reason=str(error))

    def _save_uses(self, unsaved: list[tuple[Digest, Record]]) -> None:
        for digest, record in unsaved:
            self._tree.save_use(digest, record)

    def _full(self, needed: int) -> StoreFull:
        limit = f"{self.limits.key or 'the high watermark'} ({self.limits.high:.0f} bytes)"
        size = self._disk_size()
        if needed > min(size, self.limits.high):
            # Nothing that is removed helps, so nobody should wait for it.
            small = f"the disk ({size:.0f} bytes)" if size < self.limits.high else limit
            remedy = f"more than all of {small}: make that larger"
        elif self._ledger.total() + needed <= self.limits.high:
            remedy = f"free disk space{self._not_written_back()}"
        else:
            beyond = f"what it has beyond {limit} is in use{self._not_written_back()}"
            remedy = f"{beyond}, so raise that or wait"
        return StoreFull(self._disk.name, needed, remedy)

    def _disk_size(self) -> float:
        with self._disk.translating():
            status = os.statvfs(self._root)
        return status.f_blocks * status.f_frsize

    def _not_written_back(self) -> str:
        """How much of what is in use waits for the backend, for who runs into it."""
        pin = Pin.NOT_WRITTEN_BACK
        waiting = sum(entry.size for entry in self.entries() if entry.pinned == pin.value)
        return f", {waiting} bytes of it {pin.value}" if waiting else ""


def _remove_all(files: list[Path]) -> None:
    for path in files:
        remove(path)


def _allocated(files: list[Path]) -> int:
    return sum(os.stat(path).st_blocks * BLOCK_BYTES for path in files)


class _StoreMetrics:
    """The metrics of one store."""

    def __init__(self, metrics: Metrics, janitor: Janitor) -> None:
        used = metrics.gauge("store_bytes", "Bytes of the store's own files, by kind.", ["kind"])
        for kind in KINDS:
            used.labels(kind).set_function(partial(janitor.bytes, kind))
        limit = metrics.gauge("store_high_watermark_bytes", "Bytes that the store may have.")
        limit.set_function(lambda: janitor.limits.high)
        self.evictions = metrics.counter(
            "store_evictions_total", "Blobs and partials that were removed, by reason.", ["reason"]
        )
        self.evicted_bytes = metrics.counter(
            "store_evicted_bytes_total", "Bytes of what was removed, by reason.", ["reason"]
        )
        self.refused = metrics.counter(
            "store_refused_total", "Requests that were refused for want of room."
        )
        self.damaged = metrics.counter(
            "store_damaged_total",
            "Blobs that were removed because their files had changed or could not be read.",
        )
        for reason in Reason:
            self.evictions.labels(reason.value)
            self.evicted_bytes.labels(reason.value)
