"""Preheating at an agent: it waits at each index, gets what it is told to, and says how far it is."""

from __future__ import annotations

import random
import socket
from functools import partial
from typing import Final, Protocol

import attrs
import structlog
import trio

from swarmpull.digest import Digest
from swarmpull.errors import RpcFailed, SwarmpullError
from swarmpull.ring.membership import Membership
from swarmpull.swarm.peers import PeerContact
from swarmpull.telemetry import Metrics
from swarmpull.wire.preheat_api import (
    AWAIT_JOBS,
    AwaitJobsReply,
    AwaitJobsRequest,
    Part,
    PreheatTask,
    TaskProgress,
)
from swarmpull.wire.rpc import RpcPool

log = structlog.get_logger()

# For which an index may leave a call unanswered, and how much longer the answer may take, in seconds.
WAIT: Final = 30.0
GRACE: Final = 15.0
# Between two looks at which indexes there are, in seconds.
MEMBERS_INTERVAL: Final = 5.0
# After a call that failed, in seconds; one that an index does not know is tried again much later.
PAUSE_MIN: Final = 1.0
PAUSE_MAX: Final = 30.0
UNKNOWN_PAUSE: Final = 300.0
# Blobs that are fetched at the same time, of all jobs; what a client pulls is not held up by them.
BLOBS_AT_ONCE: Final = 3
ATTEMPTS: Final = 3


class Content(Protocol):
    """What the registry of the agent does for us."""

    async def keep_manifest(self, repository: str, digest: Digest) -> None:
        """Have a manifest on the disk.  Raises SwarmpullError."""
        ...

    async def keep_blob(self, repository: str, digest: Digest) -> None:
        """Have a blob on the disk.  Raises SwarmpullError."""
        ...

    def received(self, digest: Digest) -> int:
        """Bytes of a blob that are on the disk; all of them when it is complete."""
        ...


class RuntimePull(Protocol):
    """Has the container runtime of this host pull an image."""

    async def __call__(self, repository: str, reference: str, tag: str) -> None:
        """By the tag or digest ``reference``, and called ``tag`` then, if there is one.

        Raises SwarmpullError.
        """
        ...


@attrs.define(eq=False)
class _Work:
    """One job of one index."""

    task: PreheatTask
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    state: str = "running"
    reason: str = ""


class AgentPreheating:
    """Waits at all indexes of the cluster for jobs, and does them."""

    def __init__(
        self,
        content: Content,
        contact: PeerContact,
        indexes: Membership,
        pool: RpcPool,
        metrics: Metrics,
        runtime: RuntimePull | None = None,
    ) -> None:
        self._content = content
        self._contact = contact
        self._indexes = indexes
        self._pool = pool
        self._runtime = runtime
        self._name = socket.gethostname()
        self._works: dict[str, dict[str, _Work]] = {}
        self._blobs = trio.CapacityLimiter(BLOBS_AT_ONCE)
        self._ended = metrics.counter(
            "preheat_tasks_total",
            "Jobs of preheating that have ended, by how.",
            ["state"],
        )
        for state in ("done", "failed", "cancelled"):
            self._ended.labels(state)
        metrics.gauge("preheat_tasks_running", "Jobs of preheating under way here.").set_function(
            lambda: sum(
                work.state == "running" for works in self._works.values() for work in works.values()
            )
        )

    async def run(self, drain: trio.Event) -> None:
        """Wait at each index there is, until ``drain`` is set."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._wait_at_all)
            await drain.wait()
            nursery.cancel_scope.cancel()

    async def _wait_at_all(self) -> None:
        scopes: dict[str, trio.CancelScope] = {}
        async with trio.open_nursery() as nursery:
            while True:
                members = set(self._indexes.members)
                for gone in scopes.keys() - members:
                    scopes.pop(gone).cancel()
                for new in sorted(members - scopes.keys()):
                    scopes[new] = await nursery.start(self._wait_at, new)
                await trio.sleep(MEMBERS_INTERVAL)

    async def _wait_at(
        self,
        address: str,
        *,
        task_status: trio.TaskStatus[trio.CancelScope] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Call one index again and again; its jobs end with this."""
        works = self._works[address] = {}
        pause = PAUSE_MIN
        try:
            with trio.CancelScope() as scope:
                task_status.started(scope)
                async with trio.open_nursery() as nursery:
                    interval = WAIT
                    while True:
                        try:
                            reply = await self._call(address, works, interval)
                        except SwarmpullError as error:
                            pause = await self._pause_after(error, address, pause)
                            continue
                        pause = PAUSE_MIN
                        self._take(reply, works, nursery)
                        interval = min(reply.interval, WAIT) if works else WAIT
                        # Not all at once: thousands were told the same.
                        pause_asked = min(reply.retry_after, UNKNOWN_PAUSE)
                        await trio.sleep(pause_asked * random.uniform(0.5, 1.5))
        finally:
            del self._works[address]

    async def _call(self, address: str, works: dict[str, _Work], seconds: float) -> AwaitJobsReply:
        reported = {number: self._progress(work) for number, work in works.items()}
        request = AwaitJobsRequest(
            self._contact, self._name, tuple(works), tuple(reported.values()), seconds
        )
        reply = await self._pool.call(address, AWAIT_JOBS, request, timeout=seconds + GRACE)
        # What has ended is known there now.
        for number, progress in reported.items():
            if progress.state != "running":
                works.pop(number, None)
        return reply

    async def _pause_after(self, error: SwarmpullError, address: str, pause: float) -> float:
        """Wait before the next call; returns how long to wait after another failure."""
        if isinstance(error, RpcFailed):
            # An index of an older version, most likely.
            log.info("no_preheating_at_index", index=address, reason=str(error))
            pause = UNKNOWN_PAUSE
        await trio.sleep(pause * random.uniform(0.5, 1.5))
        return min(2 * pause, PAUSE_MAX)

    def _take(self, reply: AwaitJobsReply, works: dict[str, _Work], nursery: trio.Nursery) -> None:
        for number in reply.cancelled:
            work = works.pop(number, None)
            if work is not None:
                work.scope.cancel()
        for task in reply.tasks:
            if task.job not in works:
                works[task.job] = work = _Work(task)
                nursery.start_soon(self._do, work)

    def _progress(self, work: _Work) -> TaskProgress:
        parts = (*work.task.manifests, *work.task.blobs)
        received = sum(min(self._content.received(part.digest), part.length) for part in parts)
        return TaskProgress(work.task.job, received, work.state, work.reason)

    # --- one job ------------------------------------------------------------------------------

    async def _do(self, work: _Work) -> None:
        task = work.task
        started_at = trio.current_time()
        with work.scope:
            work.reason = await self._fetch_all(task)
            if not work.reason and self._runtime is not None:
                try:
                    await self._runtime(task.repository, task.reference, task.tag)
                except SwarmpullError as error:
                    work.reason = f"all of it is here, but the runtime did not pull it: {error}"
            work.state = "failed" if work.reason else "done"
        if work.scope.cancelled_caught:
            work.state = "cancelled"
        self._ended.labels(work.state).inc()
        log.info(
            "preheat_task_ended",
            job=task.job,
            repository=task.repository,
            digest=str(task.digest),
            state=work.state,
            reason=work.reason,
            seconds=round(trio.current_time() - started_at, 1),
        )

    async def _fetch_all(self, task: PreheatTask) -> str:
        """Have all of an image on the disk; why that failed, empty if it did not."""
        failures: list[str] = []

        async def fetch(part: Part, *, is_manifest: bool) -> None:
            async with self._blobs:
                failure = await self._fetch(task.repository, part.digest, is_manifest=is_manifest)
            if failure:
                failures.append(failure)
                nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            for parts, is_manifest in ((task.manifests, True), (task.blobs, False)):
                for part in parts:
                    nursery.start_soon(partial(fetch, part, is_manifest=is_manifest))
        return failures[0] if failures else ""

    async def _fetch(self, repository: str, digest: Digest, *, is_manifest: bool) -> str:
        reason = ""
        keep = self._content.keep_manifest if is_manifest else self._content.keep_blob
        for attempt in range(1, ATTEMPTS + 1):
            try:
                await keep(repository, digest)
            except SwarmpullError as error:
                reason = str(error)
                log.info("preheat_blob_failed", digest=str(digest), attempt=attempt, reason=reason)
                await trio.sleep(PAUSE_MIN * attempt if attempt < ATTEMPTS else 0)
            else:
                return ""
        return reason
