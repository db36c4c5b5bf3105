"""Whether the backends have answered since this process began: until then a role is not ready, and says why.

An origin of which a backend fails later stays ready: it takes pushes and serves what it has, and its
neighbours, which find the same, would all leave at once.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Final

import structlog
import trio

from swarmpull.digest import Digest
from swarmpull.errors import BackendUnavailable, ObjectNotFound
from swarmpull.store.backends.base import Backend, blob_key
from swarmpull.store.retry_schedule import PROBE_MAX, backoff

log = structlog.get_logger()

# Any object will do: that there is none is an answer.
PROBE_KEY: Final = blob_key(Digest.of(b""))


class BackendWatch:
    """Asks backends until each has answered."""

    def __init__(self, backends: Iterable[Backend]) -> None:
        self._watched = [_Watched(backend) for backend in backends]

    def reasons(self) -> Sequence[str]:
        """Why the role is not ready on account of its backends."""
        return [each.reason for each in self._watched if each.reason]

    async def run(self) -> None:
        """Return when all have answered."""
        async with trio.open_nursery() as nursery:
            for each in self._watched:
                nursery.start_soon(each.run)


class _Watched:
    """One backend.

    Attributes:
        reason: why it does not count as there; empty when it does.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.reason = f"backend {backend.name} has not answered yet"

    async def run(self) -> None:
        """Return when it has answered."""
        rng = random.Random()
        failures = 0
        while not await self._answers():
            if not failures:
                log.warning("backend_silent", reason=self.reason)
            failures += 1
            await trio.sleep(backoff(failures, PROBE_MAX, rng))
        self.reason = ""
        if failures:
            log.info("backend_answers", backend=self._backend.name)

    async def _answers(self) -> bool:
        try:
            await self._backend.stat(PROBE_KEY)
        except ObjectNotFound:
            return True
        except BackendUnavailable as error:
            self.reason = str(error)
            return False
        return True
