"""Work on one thing that several callers want at the same time: done once, for all of them."""

from __future__ import annotations

import copy
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

import attrs
import trio

from swarmpull.errors import DownloadFailed, SwarmpullError

K = TypeVar("K", bound=Hashable)
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
        self._works: dict[Hashable, _Work[T]] = {}

    async def run(self, key: K, job: Callable[[K], Awaitable[T]]) -> T:
        """Join the job under way for this key, or begin this one; returns what it returns.

        Raises:
            DownloadFailed: the nursery was cancelled before the job was done.
            SwarmpullError: what the job raises, a copy for each caller.
        """
        work = self._works.get(key)
        if work is None:
            work = self._works[key] = _Work()
            self._nursery.start_soon(self._run, key, job, work)
        await work.done.wait()
        if work.error is not None:
            # An exception collects the traceback of whoever raises it: each caller raises its own.
            raise copy.copy(work.error)
        if not work.results:
            raise DownloadFailed(str(key), "this host shuts down")
        return work.results[0]

    async def _run(self, key: K, job: Callable[[K], Awaitable[T]], work: _Work[T]) -> None:
        try:
            work.results.append(await job(key))
        except SwarmpullError as error:
            work.error = error
        finally:
            del self._works[key]
            work.done.set()
