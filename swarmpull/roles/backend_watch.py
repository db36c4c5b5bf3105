"""Whether the backend has answered since this process began: until then a role is not ready, and says why.

An origin whose backend fails later stays ready: it takes pushes and serves what it has, and its neighbours,
which find the same, would all leave at once.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Final

import structlog
import trio

from swarmpull.digest import Digest
from swarmpull.errors import BackendUnavailable, ObjectNotFound
from swarmpull.store.backends.base import Backend, blob_key
from swarmpull.store.write_back_schedule import PROBE_MAX, backoff

log = structlog.get_logger()

# Any object will do: that there is none is an answer.
PROBE_KEY: Final = blob_key(Digest.of(b""))


class BackendWatch:
    """Asks a backend until it answers."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._reason = f"backend {backend.name} has not answered yet"

    def reasons(self) -> Sequence[str]:
        """Why the role is not ready on account of its backend."""
        return [self._reason] if self._reason else []

    async def run(self) -> None:
        """Return when the backend has answered."""
        rng = random.Random()
        failures = 0
        while not await self._answers():
            if not failures:
                log.warning("backend_silent", reason=self._reason)
            failures += 1
            await trio.sleep(backoff(failures, PROBE_MAX, rng))
        self._reason = ""
        if failures:
            log.info("backend_answers", backend=self._backend.name)

    async def _answers(self) -> bool:
        try:
            await self._backend.stat(PROBE_KEY)
        except ObjectNotFound:
            return True
        except BackendUnavailable as error:
            self._reason = str(error)
            return False
        return True
