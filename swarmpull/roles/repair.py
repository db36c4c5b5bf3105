"""Copies of queued blobs that are missing on their owners: noticed, and made up for.

A blob that waits for the backend is to be on as many origins as configured, whoever dies, loses its disk,
joins or comes back meanwhile.  From time to time an origin asks the others what they have of its queue,
decides what is missing (`swarmpull.ring.repair`), and has them take copies, at a bounded rate.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from typing import Final

import structlog
import trio

from swarmpull.config import OriginConfig
from swarmpull.errors import BlobNotFound, SwarmpullError
from swarmpull.ring.membership import Membership
from swarmpull.ring.repair import Copy, Queued, missing_copies
from swarmpull.roles.replication import Replication
from swarmpull.roles.write_back import WriteBack
from swarmpull.store.blobs import BlobStore
from swarmpull.store.token_bucket import TokenBucket
from swarmpull.store.write_back_schedule import Key, QueuedBlob
from swarmpull.telemetry import Metrics

log = structlog.get_logger()

# Seconds between two rounds, and the share of the time that answers and decisions may take: for 50,000 blobs
# it is a second or two.
INTERVAL: Final = 15.0
SHARE: Final = 0.05
# A member that answers nothing for so many seconds is replaced.  A restart is over sooner, and copies of all
# that waits are dear.
GONE_AFTER: Final = 30.0
# For so many seconds copies are made as one round has found them: members fall and rise meanwhile.
MAKING: Final = 60.0
# Blobs that one call asks about: 330 kB at most.
BATCH: Final = 1000
# Copies that are made at the same time.
AT_ONCE: Final = 2


class Repair:
    """Keeps as many copies of what is queued as configured; see `run`."""

    def __init__(
        self,
        write_back: WriteBack,
        replication: Replication,
        store: BlobStore,
        members: Membership,
        metrics: Metrics,
        settings: OriginConfig,
    ) -> None:
        self._write_back = write_back
        self._replication = replication
        self._store = store
        self._members = members
        self._copies = settings.replicas
        self._bucket = TokenBucket(settings.repair_rate)
        self._at_once = trio.CapacityLimiter(AT_ONCE)
        self._wake = trio.Event()
        # Copies that are still to be made, with the bytes of each.
        self._left: dict[Copy[Key], int] = {}
        self._seen: set[Key] = set()
        members.when_changed(self._changed)
        metrics.gauge(
            "origin_repair_copies_left", "Copies of queued blobs that other origins still lack."
        ).set_function(lambda: len(self._left))
        metrics.gauge("origin_repair_bytes_left", "Bytes of these copies.").set_function(
            lambda: sum(self._left.values())
        )
        self._made = metrics.counter(
            "origin_repair_copies_total", "Copies made up for after their blob was acknowledged."
        )
        self._failures = metrics.counter(
            "origin_repair_failures_total", "Copies that could not be made; they are tried again."
        )

    async def run(self) -> None:
        """Look after the copies, until cancelled."""
        if self._copies == 1:
            return
        while True:
            self._wake = trio.Event()
            work = await self._round()
            # What was found and not made is found again, with what else is missing now.
            interval = 0.0 if self._left else INTERVAL * random.uniform(0.8, 1.2)
            pause = max(interval, work / SHARE)
            with trio.move_on_after(pause):
                await self._wake.wait()

    def _changed(self, _member: str, healthy: bool) -> None:
        # One that is back may have missed something; one that has fallen may be back in a moment.
        if healthy:
            self._wake.set()

    # --- one round ----------------------------------------------------------------------------

    async def _round(self) -> float:
        """Have what is missing copied; returns the seconds of work that it was to find out."""
        queued = self._write_back.settled()
        # One that has come since the last round may be on its way to others.
        blobs = [blob for blob in queued if blob.key in self._seen]
        self._seen = {blob.key for blob in queued}
        found, work = await self._missing(blobs) if blobs else ([], 0.0)
        lengths = {blob.key: blob.length for blob in blobs}
        self._left = {copy: lengths[copy.key] for copy in found}
        if found:
            log.info("repair_begun", copies=len(found), bytes=sum(self._left.values()))
            await self._make(found)
        return work

    async def _missing(self, blobs: Sequence[QueuedBlob]) -> tuple[Sequence[Copy[Key]], float]:
        """The copies to be made, and how long the answers and the decision took.

        To wait for one that does not answer is no work, and no reason to look more seldom: it is gone before
        long.
        """
        answers: dict[str, dict[Key, int]] = {}
        seconds: dict[str, float] = {}

        async def ask(member: str) -> None:
            said: dict[Key, int] = {}
            begun_at = trio.current_time()
            try:
                for start in range(0, len(keys), BATCH):
                    said |= await self._replication.ranks(member, keys[start : start + BATCH])
            except SwarmpullError as error:
                # What it did not say is not known to be missing.
                log.info("repair_not_asked", origin=member, reason=str(error))
            else:
                seconds[member] = trio.current_time() - begun_at
            answers[member] = said

        keys = [blob.key for blob in blobs]
        unhealthy = set(self._members.unhealthy())
        async with trio.open_nursery() as nursery:
            for member in self._members.members:
                if member in unhealthy:
                    self._members.want(member)
                else:
                    nursery.start_soon(ask, member)
        gone = {each for each in unhealthy if self._members.unhealthy_for(each) >= GONE_AFTER}
        queued = [Queued(blob.key, str(blob.digest), blob.rank) for blob in blobs]
        begun_at = trio.current_time()
        # In a thread: for 50,000 blobs it takes seconds.
        found = await trio.to_thread.run_sync(
            partial(
                missing_copies,
                queued,
                self._members.preference,
                answers,
                own=self._replication.own(),
                gone=gone,
                copies=self._copies,
            )
        )
        return found, max(seconds.values(), default=0.0) + trio.current_time() - begun_at

    # --- copies -------------------------------------------------------------------------------

    async def _make(self, found: Sequence[Copy[Key]]) -> None:
        failed: set[str] = set()
        until = trio.current_time() + MAKING
        async with trio.open_nursery() as nursery:
            for copy in found:
                await self._at_once.acquire_on_behalf_of(copy)
                nursery.start_soon(self._make_one, copy, failed)
                if trio.current_time() >= until:
                    break

    async def _make_one(self, copy: Copy[Key], failed: set[str]) -> None:
        try:
            # One that does not take this blob would hold up all others, each for its own time.
            if copy.member not in failed and not await self._copied(copy):
                failed.add(copy.member)
        finally:
            self._left.pop(copy, None)
            self._at_once.release_on_behalf_of(copy)

    async def _copied(self, copy: Copy[Key]) -> bool:
        """Whether the member has the blob now, or does not need it any more."""
        digest, namespace = copy.key
        if self._write_back.rank(copy.key) is None:
            return True
        try:
            metainfo = await self._store.metainfo(digest)
            await self._bucket.take(metainfo.length)
            failure = await self._replication.copy_to(copy.member, metainfo, namespace, copy.rank)
        except BlobNotFound:
            # It was damaged here, or has been written and evicted meanwhile: not for us to repair.
            return True
        except SwarmpullError as error:
            failure = str(error)
        if failure:
            self._failures.inc()
            log.warning("repair_failed", digest=str(digest), origin=copy.member, reason=failure)
            return False
        self._made.inc()
        log.info("repaired", digest=str(digest), origin=copy.member)
        return True
