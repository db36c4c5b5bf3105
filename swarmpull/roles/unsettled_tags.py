"""Tags whose last change was cut off before, or after, their name in the listing was changed.

Whoever makes a tag appear or disappear says so in an object of the backend until both are done
(`catalog_tags`).  One that stays there was left by a process that died, or that the backend failed.
"""

from __future__ import annotations

from typing import Final

import structlog
import trio

from swarmpull.errors import ObjectNotFound, SwarmpullError
from swarmpull.roles.catalog import Catalog
from swarmpull.roles.catalog_objects import UNSETTLED, unsettled_tag
from swarmpull.store.backends.base import Backend

log = structlog.get_logger()

# Seconds from one look to the next; whoever is at a change is done with it much sooner.
INTERVAL: Final = 60.0
# Tags of one look; further ones have their turn when these are settled.
LOOK_MAX: Final = 1000


class UnsettledTags:
    """Finds them, and has the listing agree with what they are."""

    def __init__(self, backend: Backend, catalog: Catalog) -> None:
        self._backend = backend
        self._catalog = catalog
        self._seen: frozenset[str] = frozenset()

    async def run(self) -> None:
        """Look once a minute until cancelled, from the start on."""
        while True:
            try:
                await self.look()
            except SwarmpullError as error:
                log.info("tags_not_settled", reason=str(error))
            await trio.sleep(INTERVAL)

    async def look(self) -> None:
        """Settle what was there at the last look already, as far as it can be.  Raises BackendUnavailable."""
        page = await self._backend.list(UNSETTLED, limit=LOOK_MAX)
        left = self._seen.intersection(page.keys)
        self._seen = frozenset(page.keys)
        for key in sorted(left):
            try:
                await self._settle(key)
            except SwarmpullError as error:
                # It may be about this tag alone, whose object is damaged.
                log.warning("tag_not_settled", key=key, reason=str(error))

    async def _settle(self, key: str) -> None:
        found = unsettled_tag(key)
        if found is None:
            log.warning("unsettled_tag_unknown", key=key)
            return
        repository, tag = found
        await self._catalog.settle_tag(repository, tag)
        try:
            await self._backend.delete(key)
        except ObjectNotFound:
            return  # another index was at it as well
        log.info("tag_settled", repository=repository, tag=tag)
