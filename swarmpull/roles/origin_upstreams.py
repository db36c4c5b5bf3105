"""Manifests of upstream registries: which one a tag is, for how long that is believed, and their content.

Content is kept in the store of the origin under its digest, for good as far as eviction allows, and what it
is called is kept here.  A tag is believed for as long as its upstream is configured to be fresh, and then
asked for again; while the upstream cannot say, the last answer is given and marked as stale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import attrs
import structlog
import trio

from swarmpull.digest import Digest
from swarmpull.errors import (
    BackendUnavailable,
    ManifestNotFound,
    UpstreamRefused,
    UpstreamUnknown,
)
from swarmpull.registry.upstream import Upstream
from swarmpull.roles.shared_work import SharedWork
from swarmpull.roles.stored_manifests import store_manifest, stored_descriptor
from swarmpull.store.blobs import BlobStore
from swarmpull.store.holds import Pin
from swarmpull.store.tags import Tagged, TagTable
from swarmpull.telemetry import Metrics
from swarmpull.wire.api import Descriptor, UpstreamManifestReply

log = structlog.get_logger()

# Seconds that an upstream has to answer.  Agents wait 60 and take an origin that says nothing for dead.
ANSWER_SECONDS: Final = 45.0
# The same when there is an answer of former times: better that one than a client that waits.
CONFIRM_SECONDS: Final = 5.0
# After it has failed to confirm one tag an upstream is not asked about others that are known, for so long.
DOWN_SECONDS: Final = 10.0


@attrs.frozen
class _Wanted:
    """A manifest by tag or digest; ``content`` unless only its descriptor is wanted."""

    repository: str
    reference: str
    content: bool

    def __str__(self) -> str:
        return f"{self.repository}:{self.reference}"


class UpstreamManifests:
    """The manifests of all upstreams of one origin."""

    def __init__(
        self,
        upstreams: Mapping[str, tuple[Upstream, float]],
        store: BlobStore,
        tags: TagTable,
        nursery: trio.Nursery,
        metrics: Metrics,
    ) -> None:
        """``upstreams``: each with the seconds that its tags are fresh, by its component of names."""
        self._upstreams = upstreams
        self._store = store
        self._tags = tags
        self._down_until: dict[str, float] = {}
        self._asking: SharedWork[Descriptor] = SharedWork(nursery)
        self._answers = metrics.counter(
            "upstream_manifests_total",
            "Manifests of upstreams that were asked for, by how that went: fresh, asked, stale, failed.",
            ["result"],
        )

    async def resolve(self, repository: str, reference: str) -> Descriptor:
        """Look up a tag or digest of ``docker.io/library/alpine`` without fetching content.

        Raises:
            UpstreamUnknown: no upstream is called like the first component.
            ManifestNotFound: the upstream has no such manifest.
            BackendUnavailable, UpstreamBusy, UpstreamRefused: nobody can say.
        """
        return await self._find(_Wanted(repository, reference, content=False))

    async def get(self, repository: str, reference: str) -> UpstreamManifestReply:
        """A manifest with its content.  Raises what `resolve` does, and StoreFull, StoreUnavailable."""
        descriptor = await self._find(_Wanted(repository, reference, content=True))
        digest = descriptor.digest
        with self._store.hold(digest, Pin.READING):
            if not self._store.has(digest):
                # A tag that is known, or was found by a HEAD: its content is asked for by digest.
                await self._find(_Wanted(repository, str(digest), content=True))
            with self._store.open(digest) as handle:
                return UpstreamManifestReply(descriptor, await handle.read_at(0, handle.length))

    async def _find(self, wanted: _Wanted) -> Descriptor:
        _, freshness = self._upstream_of(wanted.repository)
        is_digest = ":" in wanted.reference
        known = None if is_digest else self._known(wanted)
        if is_digest:
            fresh = await stored_descriptor(self._store, Digest.parse(wanted.reference))
        elif known is not None and trio.current_time() < known.confirmed_at + freshness:
            fresh = described(known)
        else:
            fresh = None
        if fresh is not None:
            self._answers.labels("fresh").inc()
            return fresh
        if known is not None and self._is_down(wanted):
            return self._stale(known)
        try:
            descriptor = await self._asking.run(wanted, self._ask)
        except BackendUnavailable as error:
            if known is None or isinstance(error, UpstreamRefused):
                self._answers.labels("failed").inc()
                raise
            self._down_until[component_of(wanted)] = trio.current_time() + DOWN_SECONDS
            log.warning("upstream_answer_stale", manifest=str(wanted), reason=str(error))
            return self._stale(known)
        except ManifestNotFound:
            await self._tags.remove(wanted.repository, wanted.reference)
            self._answers.labels("asked").inc()
            raise
        self._answers.labels("asked").inc()
        return descriptor

    def _is_down(self, wanted: _Wanted) -> bool:
        return trio.current_time() < self._down_until.get(component_of(wanted), -math.inf)

    def _stale(self, known: Tagged) -> Descriptor:
        self._answers.labels("stale").inc()
        return attrs.evolve(described(known), stale=True)

    def _upstream_of(self, repository: str) -> tuple[Upstream, float]:
        component = repository.partition("/")[0]
        try:
            return self._upstreams[component]
        except KeyError:
            raise UpstreamUnknown(component, tuple(self._upstreams)) from None

    async def _ask(self, wanted: _Wanted) -> Descriptor:
        known = None if ":" in wanted.reference else self._known(wanted)
        seconds = ANSWER_SECONDS if known is None else CONFIRM_SECONDS
        try:
            with trio.fail_after(seconds):
                return await self._ask_now(wanted, known)
        except trio.TooSlowError as error:
            upstream, _ = self._upstream_of(wanted.repository)
            reason = f"no answer within {seconds:.0f} seconds"
            raise BackendUnavailable(upstream.name, str(wanted), reason) from error

    async def _ask_now(self, wanted: _Wanted, known: Tagged | None) -> Descriptor:
        """Ask the upstream, keep what it says, and keep the content if there is any."""
        upstream, _ = self._upstream_of(wanted.repository)
        name = wanted.repository.partition("/")[2]
        if not wanted.content or known is not None:
            descriptor = await upstream.head_manifest(
                name, wanted.reference, known=None if known is None else described(known)
            )
        else:
            manifest = await upstream.get_manifest(name, wanted.reference)
            descriptor = manifest.descriptor
            await store_manifest(self._store, descriptor.digest, manifest.content)
            log.info(
                "upstream_manifest_fetched", manifest=str(wanted), digest=str(descriptor.digest)
            )
        if ":" not in wanted.reference:
            tagged = Tagged(
                descriptor.digest, descriptor.media_type, descriptor.length, trio.current_time()
            )
            await self._tags.put(wanted.repository, wanted.reference, tagged)
        return descriptor

    def _known(self, wanted: _Wanted) -> Tagged | None:
        return self._tags.get(wanted.repository, wanted.reference)


def described(tagged: Tagged) -> Descriptor:
    """What a tag was, as it is answered."""
    return Descriptor(tagged.digest, tagged.media_type, tagged.length)


def component_of(wanted: _Wanted) -> str:
    """The upstream of a manifest, as it is called in names."""
    return wanted.repository.partition("/")[0]
