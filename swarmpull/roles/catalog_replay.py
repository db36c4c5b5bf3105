"""What a journal brings to the backend: changes that may be older than what became of it meanwhile.

The stamp of a tag decides by itself.  Blobs and manifests have none, so a deletion leaves a record of when it
was made (`catalog_objects.deletion_key`), and what was acknowledged before that is not entered any more.  Who
stands still between the look and the write enters it all the same: it says when it was acknowledged, and does
not count (`catalog_parts`).  A tag that it got after the deletion is taken from it again.
"""

from __future__ import annotations

import attrs
import structlog

from swarmpull.errors import ManifestReferencesMissing
from swarmpull.roles.catalog import Catalog
from swarmpull.roles.catalog_objects import BLOBS, MANIFESTS
from swarmpull.wire.api import DigestInRepository, PendingChange, RecordManifestRequest, Stamp

log = structlog.get_logger()


class Replay:
    """Writes changes of a journal to the backend."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    async def write(self, change: PendingChange, at: int) -> None:
        """Enter a change that was acknowledged ``at``, in ns, unless it was deleted after that.

        Raises what the methods of `Catalog` do.
        """
        if change.link is not None:
            await self._link(change.link, at)
        if change.manifest is not None:
            await self._record(change.manifest, at)
        if change.deletion is not None:
            await self._catalog.delete_tag(change.deletion, from_journal=True)

    async def _link(self, link: DigestInRepository, at: int) -> None:
        if await self._catalog.deleted_at(link.repository, BLOBS, link.digest) >= at:
            log.info("journal_outdated", repository=link.repository, blob=str(link.digest))
            return
        await self._catalog.link_blob(link.repository, link.digest, at=at)

    async def _record(self, request: RecordManifestRequest, at: int) -> None:
        if not await self._is_deleted(request, at):
            await self._enter(request, at)
        # It may be deleted just now, by somebody who did not see the tag yet.
        if request.tag is not None and await self._is_deleted(request, at):
            digest, stamp = request.manifest.digest, request.stamp
            assert stamp is not None, "a change of a tag is kept with its stamp"
            await self._catalog.undo_tag(request.repository, request.tag, stamp, digest)

    async def _is_deleted(self, request: RecordManifestRequest, at: int) -> bool:
        """With its tag, if it has one: a deletion takes the tags of a manifest with it."""
        repository, digest = request.repository, request.manifest.digest
        if await self._catalog.deleted_at(repository, MANIFESTS, digest) < at:
            return False
        log.info("journal_outdated", repository=repository, manifest=str(digest))
        return True

    async def _enter(self, request: RecordManifestRequest, at: int) -> None:
        if request.tag is None:
            request = attrs.evolve(request, stamp=Stamp(at, self._catalog.tags.source))
        try:
            await self._catalog.record_manifest(request, at=at)
        except ManifestReferencesMissing as error:
            there = await self._without_deleted(request, set(error.missing), at)
            if there == request:
                raise
            await self._catalog.record_manifest(there, at=at)

    async def _without_deleted(
        self, request: RecordManifestRequest, missing: set[str], at: int
    ) -> RecordManifestRequest:
        """As if the manifest had been entered when it was acknowledged, and the rest deleted after that."""
        deleted = {
            digest
            for kind, digests in ((BLOBS, request.blobs), (MANIFESTS, request.manifests))
            for digest in digests
            if str(digest) in missing
            and await self._catalog.deleted_at(request.repository, kind, digest) >= at
        }
        return attrs.evolve(
            request,
            blobs=tuple(each for each in request.blobs if each not in deleted),
            manifests=tuple(each for each in request.manifests if each not in deleted),
        )
