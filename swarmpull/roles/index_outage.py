"""What an index acknowledges while its backend is down, from what it knows without it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import attrs

from swarmpull.digest import Digest
from swarmpull.errors import BackendUnavailable, ManifestInvalid, ManifestNotFound
from swarmpull.registry.errors import shorten
from swarmpull.registry.names import is_tag
from swarmpull.roles.catalog_objects import (
    ManifestEntry,
    check_levels,
    check_stamp,
    check_writable,
    pack_entry,
    tag_key,
)
from swarmpull.roles.catalog_tags import CatalogTags, check_expected
from swarmpull.roles.index_journal import Journal
from swarmpull.roles.journal_sharing import NotSure
from swarmpull.roles.keyed_locks import KeyedLocks
from swarmpull.roles.pending_changes import PendingChanges
from swarmpull.roles.tag_log import TagLog
from swarmpull.wire.api import (
    DeleteTagRequest,
    DigestInRepository,
    PendingChange,
    RecordManifestRequest,
    Stamp,
    TagChange,
)


class Outage:
    """Changes while the backend is down: they go to the journal.

    What depends on what only the backend knows raises BackendUnavailable.
    """

    def __init__(
        self,
        journal: Journal,
        pending: PendingChanges,
        tags: CatalogTags,
        backend: str,
        reason: Callable[[], str],
        since: Callable[[], int],
    ) -> None:
        """``reason``: why the backend is down; ``since``: when that was found, in ns."""
        self._journal = journal
        self._pending = pending
        self._tags = tags
        self._backend = backend
        self._reason = reason
        self._since = since
        # What a tag is must not change between the look at it and the change that depends on that.
        self._locks: KeyedLocks[tuple[str, str]] = KeyedLocks()

    async def link_blob(self, repository: str, digest: Digest) -> None:
        """Make a blob part of a repository.  Raises PushRefused, and what `Journal.add` does."""
        check_writable(repository)
        await self._link(repository, [digest])

    async def _link(self, repository: str, digests: Iterable[Digest]) -> None:
        """Those that were not since the outage began: what is older may be of a journal that was away, and
        deleted meanwhile.
        """
        since, now = self._since(), time.time_ns()
        changes = [
            PendingChange(link=DigestInRepository(repository, digest), at=now)
            for digest in dict.fromkeys(digests)
            if (self._pending.blob_at(repository, digest) or -1) < since
        ]
        if changes:
            await self._journal.add(*changes)

    async def record_manifest(self, request: RecordManifestRequest) -> None:
        """Enter a manifest, and move a tag to it; what it refers to must be pending too.

        Raises what `Catalog.record_manifest` and `Journal.add` do.
        """
        check_writable(request.repository)
        if request.tag is not None and not is_tag(request.tag):
            raise ManifestInvalid(f"{shorten(request.tag)!r} is not a tag")
        check_stamp(request.tag or str(request.manifest.digest), request.stamp)
        pack_entry(ManifestEntry(request.manifest, request.subject))
        self._check_references(request)
        below = {each: self._pending.levels(request.repository, each) for each in request.manifests}
        check_levels(request, below)
        # Whoever found them here has not sent them.
        await self._link(request.repository, request.blobs)
        if request.tag is None:
            # One from another cluster has the time that it has there.
            at = time.time_ns() if request.stamp is None else request.stamp.time
            request = attrs.evolve(request, stamp=None)
            await self._journal.add(PendingChange(manifest=request, at=at))
            return
        async with self._locks.hold((request.repository, request.tag)):
            change, judged_by = self._change(request, request.tag, request.manifest.digest)
            request = attrs.evolve(request, stamp=change.stamp, expect=None)
            pending = PendingChange(manifest=request, at=time.time_ns())
            await self._make(request.repository, request.tag or "", change, pending, judged_by)

    async def delete_tag(self, request: DeleteTagRequest) -> None:
        """Remove a tag that is pending, or one of which another cluster says so."""
        check_writable(request.repository)
        if not is_tag(request.reference):
            raise ManifestNotFound(request.repository, shorten(request.reference))
        check_stamp(request.reference, request.stamp)
        async with self._locks.hold((request.repository, request.reference)):
            await self._delete_tag(request)

    async def _delete_tag(self, request: DeleteTagRequest) -> None:
        log = self._log(request.repository, request.reference)
        if request.stamp is None and log.digest is None:
            last = self._pending.last_of(request.repository, request.reference)
            if not log.changes or self._pending.is_passed(last):
                raise self._unknown(tag_key(request.repository, request.reference))
            raise ManifestNotFound(request.repository, request.reference)
        change, judged_by = self._change(request, request.reference, None)
        request = attrs.evolve(request, stamp=change.stamp, expect=None)
        pending = PendingChange(deletion=request, at=time.time_ns())
        await self._make(request.repository, request.reference, change, pending, judged_by)

    def check_written(self, repository: str, digest: Digest) -> None:
        """Raise BackendUnavailable while it is still to be written: what is deleted now would come back."""
        if self._pending.has_blob(repository, digest) or self._pending.manifest(repository, digest):
            raise BackendUnavailable(
                self._backend,
                f"repositories/{repository}",
                f"{digest} was put while the backend was down, and is still to be written there: delete it "
                "in a moment",
            )

    async def _make(
        self,
        repository: str,
        tag: str,
        change: TagChange,
        pending: PendingChange,
        judged_by: str,
    ) -> None:
        counts = self._log(repository, tag).with_change(change).latest == change
        if counts:
            for watcher in self._tags.watchers:
                await watcher.changing(repository, tag, change)
        try:
            await self._journal.add(pending, judged_by=judged_by)
        except NotSure as error:
            raise self._not_sure(repository, tag, error.reason) from error
        if counts:
            for watcher in self._tags.watchers:
                await watcher.changed(repository, tag, change)

    def _log(self, repository: str, tag: str) -> TagLog:
        log = TagLog()
        for change in self._pending.tag_changes(repository, tag):
            log = log.with_change(change)
        return log

    def _change(
        self, request: RecordManifestRequest | DeleteTagRequest, tag: str, digest: Digest | None
    ) -> tuple[TagChange, str]:
        """The change, and the id of the one by which it was judged, if it depends on what the tag is.

        Raises TagChanged, or BackendUnavailable when only the backend knows whether it may be made.
        """
        repository = request.repository
        log = self._log(repository, tag)
        judged_by = ""
        if request.expect is not None or self._tags.is_immutable(repository):
            judged_by = self._pending.last_of(repository, tag)
            if not judged_by:
                raise self._unknown(tag_key(repository, tag))
            if not self._journal.is_sure(judged_by):
                raise self._not_sure(repository, tag, "this index may have changed it meanwhile")
        if log.digest != digest or digest is None:
            check_expected(repository, tag, log, request.expect)
            self._tags.check_mutable(repository, tag, log, digest)
        stamp: Stamp = request.stamp or log.next_stamp(time.time_ns(), self._tags.source)
        return TagChange(stamp, digest, request.by), judged_by

    def _check_references(self, request: RecordManifestRequest) -> None:
        repository = request.repository
        unknown = [each for each in request.blobs if not self._pending.has_blob(repository, each)]
        unknown += [
            each for each in request.manifests if self._pending.manifest(repository, each) is None
        ]
        if unknown:
            raise BackendUnavailable(
                self._backend,
                f"repositories/{repository}",
                f"{self._reason()}; whether the repository has {', '.join(map(str, unknown))} cannot be "
                "told: push that again, or wait",
            )

    def _not_sure(self, repository: str, tag: str, why: str) -> BackendUnavailable:
        return BackendUnavailable(
            self._backend,
            tag_key(repository, tag),
            f"{self._reason()}; whether the tag still is what the journal says cannot be told, because "
            f"{why}: ask again when the backend is back",
        )

    def _unknown(self, key: str) -> BackendUnavailable:
        return BackendUnavailable(self._backend, key, self._reason())
