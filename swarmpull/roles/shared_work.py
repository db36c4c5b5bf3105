"""Work on one blob that several callers want at the same time: done once, for all of them."""

from __future__ import annotations

import copy
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

import attrs
import trio

from swarmpull.digest import Digest
from swarmpull.errors import DownloadFailed, SwarmpullError

T = TypeVar("T")


@attrs.define(eq=False)
class _Work(Generic[T]):
    done: trio.Event = attrs.field(factory=trio.Event)
    results: list[T] = attrs.field(factory=list)  # one, when it has succeeded
    error: SwarmpullError | None = None


class SharedWork(Generic[T]):
    """Runs a job once for all who ask for it at the same time, and to its end if they leave.

    Jobs run in ``nursery``.  Nothing is remembered: who asks after the end begins anew.
    """

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._works: dict[Digest, _Work[T]] = {}

    async def run(self, digest: Digest, job: Callable[[Digest], Awaitable[T]]) -> T:
        """Join the job under way for this digest, or begin this one; returns what it returns.

        Raises:
            DownloadFailed: the nursery was cancelled before the job was done.
            SwarmpullError: what the job raises, a copy for each caller.
        """
        work = self._works.get(digest)
        if work is None:
            work = self._works[digest] = _Work()
            self._nursery.start_soon(self._run, digest, job, work)
        await work.done.wait()
        if work.error is not None:
            # An exception collects the traceback of whoever raises it: each caller raises its own.
            raise copy.copy(work.error)
        if not work.results:
            raise DownloadFailed(str(digest), "this host shuts down")
        return work.results[0]

    async def _run(
        self, digest: Digest, job: Callable[[Digest], Awaitable[T]], work: _Work[T]
    ) -> None:
        try:
            work.results.append(await job(digest))
        except SwarmpullError as error:
            work.error = error
        finally:
            del self._works[digest]
            work.done.set()
