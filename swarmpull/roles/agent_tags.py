"""Tags as an agent knows them: for a short time without asking, and for good while no index answers."""

from __future__ import annotations

import math
from typing import Final

import structlog
import trio

from swarmpull.digest import Digest
from swarmpull.errors import (
    BackendUnavailable,
    ManifestNotFound,
    RepositoryNotFound,
    RpcFailed,
    RpcUnavailable,
    SwarmpullError,
)
from swarmpull.roles.cluster import IndexClient
from swarmpull.roles.stored_manifests import stored_descriptor
from swarmpull.store.blobs import BlobStore
from swarmpull.store.tags import Tagged, TagTable
from swarmpull.telemetry import Metrics
from swarmpull.wire.api import Descriptor

log = structlog.get_logger()

# Seconds that the indexes have when there is an answer of former times: better that than a client that waits.
CONFIRM_SECONDS: Final = 5.0
# After they have failed to confirm one tag they are not asked about others that are known, for so long.
DOWN_SECONDS: Final = 5.0


class AgentTags:
    """What tags and digests of the cluster's own repositories name."""

    def __init__(
        self,
        index: IndexClient,
        table: TagTable,
        store: BlobStore,
        freshness: float,
        metrics: Metrics,
    ) -> None:
        """``freshness``: seconds for which a tag is believed without asking."""
        self._index = index
        self._table = table
        self._store = store
        self._freshness = freshness
        self._down_until = -math.inf
        self._answers = metrics.counter(
            "agent_tags_total",
            "Tags that were asked for, by how that went: fresh, asked, stale, failed.",
            ["result"],
        )

    async def resolve(self, repository: str, reference: str) -> Descriptor:
        """Look up a tag or a digest; ``stale`` when nobody can confirm a tag just now.

        Raises:
            ManifestNotFound, RepositoryNotFound: as the index says.
            RpcUnavailable, BackendUnavailable, RpcFailed: nobody can say, and it is not known here.
        """
        if ":" in reference:
            return await self._resolve_digest(repository, reference)
        now = trio.current_time()
        known = self._table.get(repository, reference)
        if known is not None and now < known.confirmed_at + self._freshness:
            self._answers.labels("fresh").inc()
            return _descriptor(known)
        try:
            found = await self._ask(repository, reference, is_known=known is not None)
        except (ManifestNotFound, RepositoryNotFound):
            self._answers.labels("asked").inc()
            await self._table.remove(repository, reference)
            raise
        except (RpcUnavailable, BackendUnavailable, RpcFailed) as error:
            self._answers.labels("failed" if known is None else "stale").inc()
            if known is None:
                raise
            log.warning("tag_stale", repository=repository, tag=reference, reason=str(error))
            return _descriptor(known, stale=True)
        self._answers.labels("asked").inc()
        tagged = Tagged(found.digest, found.media_type, found.length, now)
        await self._table.put(repository, reference, tagged)
        return found

    async def changed(self, repository: str, tag: str) -> None:
        """It was changed through this agent: the next one who wants to know asks."""
        known = self._table.get(repository, tag)
        if known is not None:
            again = Tagged(known.digest, known.media_type, known.length)
            await self._table.put(repository, tag, again)

    async def _ask(self, repository: str, tag: str, *, is_known: bool) -> Descriptor:
        if not is_known:
            return await self._index.resolve(repository, tag)
        if trio.current_time() < self._down_until:
            raise RpcUnavailable("index ring", "index.resolve", "no index has answered of late")
        failure: SwarmpullError
        try:
            with trio.fail_after(CONFIRM_SECONDS):
                return await self._index.resolve(repository, tag)
        except trio.TooSlowError:
            reason = f"no answer within {CONFIRM_SECONDS:g} s"
            failure = RpcUnavailable("index ring", "index.resolve", reason)
        except (RpcUnavailable, BackendUnavailable, RpcFailed) as error:
            failure = error
        self._down_until = trio.current_time() + DOWN_SECONDS
        raise failure

    async def _resolve_digest(self, repository: str, reference: str) -> Descriptor:
        """A manifest that is on the disk is proof enough when no index can tell."""
        try:
            return await self._index.resolve(repository, reference)
        except (RpcUnavailable, BackendUnavailable, RpcFailed):
            found = await stored_descriptor(self._store, Digest.parse(reference))
            if found is None:
                raise
            return found


def _descriptor(tagged: Tagged, *, stale: bool = False) -> Descriptor:
    return Descriptor(tagged.digest, tagged.media_type, tagged.length, stale=stale)
