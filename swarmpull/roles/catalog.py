"""The durable state of repositories, as objects of a backend (`catalog_objects` has their keys).

Every change is a sequence of single objects in an order in which each beginning of it is a
readable state: what is pointed to is written before what points to it, and removed after it, but for the
names of referrers, which lead nowhere for a moment.  A change that was cut off is made whole by making it
again.

Any number of processes may share a backend.  Changes to one repository are in sequence within one
process.  `catalog_tags` has what is done with tags.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Final, TypeVar

import structlog
import trio

from swarmpull.digest import Digest
from swarmpull.errors import (
    BackendUnavailable,
    BlobNotFound,
    InvalidDigest,
    ManifestInvalid,
    ManifestNotFound,
    ManifestReferencesMissing,
    ObjectNotFound,
    PushRefused,
    RepositoryNotFound,
    SwarmpullError,
)
from swarmpull.patterns import compile_pattern
from swarmpull.registry.errors import shorten
from swarmpull.registry.names import is_tag
from swarmpull.roles.catalog_objects import (
    BLOBS,
    MANIFESTS,
    MARKERS,
    ManifestEntry,
    ReferrerTimes,
    all_referrers_prefix,
    annotation_bytes,
    blob_key,
    can_be_kept,
    check_known,
    check_levels,
    check_stamp,
    check_writable,
    digest_at_end,
    manifest_key,
    marked,
    marker_key,
    marker_name,
    pack_entry,
    pack_put,
    referrer_key,
    referrers_prefix,
    tags_prefix,
    unpack_put,
    unpacked,
    without_annotations,
)
from swarmpull.roles.catalog_parts import CatalogParts
from swarmpull.roles.catalog_tags import CatalogTags
from swarmpull.roles.keyed_locks import KeyedLocks
from swarmpull.roles.pending_changes import PendingChanges
from swarmpull.roles.tag_log import TagLog
from swarmpull.store.backends.base import Backend
from swarmpull.wire.api import (
    DeleteTagRequest,
    Descriptor,
    ListReply,
    RecordManifestRequest,
    Stamp,
    TagChange,
    TagLogReply,
)

log = structlog.get_logger()

T = TypeVar("T")
U = TypeVar("U")

# Objects that one operation asks the backend for at the same time.
CONCURRENCY: Final = 16
# The most names that one page of a listing has, whatever was asked for.
PAGE_MAX: Final = 10_000
# All referrers of a manifest travel in one reply: so many entries, and so many bytes of annotations.
REFERRERS_MAX: Final = 1000
ANNOTATION_BYTES_MAX: Final = 4 << 20

# What is waited for before something is deleted.
Recorded = Callable[[], Awaitable[None]]


async def _nothing() -> None:
    """Nobody else has to know."""


class Catalog:
    """Tags, manifests, referrers and blobs of all repositories.

    Every method raises BackendUnavailable when the backend fails.

    Attributes:
        tags: where changes of tags can be watched.
        pending: changes that the backend is yet to have.
    """

    def __init__(
        self,
        backend: Backend,
        source: str = "index",
        immutable: Sequence[str] = (),
        pending: PendingChanges | None = None,
        *,
        records_deletions: bool = False,
    ) -> None:
        """A catalog in a backend.

        Args:
            backend: where.
            source: names this process in the stamps of changes.
            immutable: patterns of the repositories whose tags are neither moved nor deleted.
            pending: changes that the backend is yet to have; lookups see them, listings do not.
            records_deletions: whether anybody else may have older changes that he is yet to write.
        """
        self.pending = pending or PendingChanges()
        self._parts = CatalogParts(backend, self.pending)
        patterns = [compile_pattern(pattern) for pattern in immutable]
        self.tags = CatalogTags(
            backend,
            source,
            lambda name: any(each.fullmatch(name) for each in patterns),
            self.pending,
            self._parts.counting,
        )
        self._backend = backend
        self._records_deletions = records_deletions
        # One change of a repository at a time.
        self._locks: KeyedLocks[str] = KeyedLocks()

    @property
    def backend_name(self) -> str:
        """The URL of the backend, without secrets."""
        return self._backend.name

    @property
    def conditional(self) -> bool | None:
        """Whether the backend has conditional puts; None as long as nobody knows."""
        found: bool | None = getattr(self._backend, "conditional", None)
        return found

    # --- looking up ---------------------------------------------------------------------------

    async def resolve(self, repository: str, reference: str) -> Descriptor:
        """The manifest that a tag, or a digest as text, names in this repository.

        Raises:
            ManifestNotFound: no such tag or manifest.
            RepositoryNotFound: no such repository.
        """
        check_known(repository)
        try:
            digest, described = await self._named_by(repository, reference)
            if described is not None:
                return described
            pending = await self._parts.pending_manifest(repository, digest)
            return pending or (await self._parts.entry(repository, digest)).descriptor
        except ObjectNotFound as exc:
            await self._check_exists(repository)
            raise ManifestNotFound(repository, reference) from exc

    async def tag_log(self, repository: str, tag: str) -> TagLogReply:
        """The last changes of a tag, of one that was deleted too.

        Raises:
            ManifestNotFound: there never was such a tag.
            RepositoryNotFound: no such repository.
        """
        check_known(repository)
        found = await self.tags.log(repository, tag) if is_tag(tag) else TagLog()
        if not found.changes:
            await self._check_exists(repository)
            raise ManifestNotFound(repository, shorten(tag))
        return TagLogReply(found.changes)

    async def has_blob(self, repository: str, digest: Digest) -> bool:
        """Whether the blob is part of the repository."""
        if not can_be_kept(repository):
            return False
        return await self._parts.is_blob_pending(repository, digest) or await self._parts.has_blob(
            repository, digest
        )

    async def check_references(
        self, repository: str, blobs: Iterable[Digest], manifests: Iterable[Digest]
    ) -> None:
        """Raises ManifestReferencesMissing, with all that are missing; PushRefused for the name."""
        await self._check_references(repository, blobs, manifests, self._parts)

    async def _check_references(
        self,
        repository: str,
        blobs: Iterable[Digest],
        manifests: Iterable[Digest],
        parts: CatalogParts,
    ) -> None:
        check_writable(repository)

        async def has_blob(digest: Digest) -> bool:
            return await parts.is_blob_pending(repository, digest) or await parts.has_blob(
                repository, digest
            )

        async def has_manifest(digest: Digest) -> bool:
            pending = await parts.pending_manifest(repository, digest)
            return pending is not None or await parts.has_manifest(repository, digest)

        missing: list[str] = []
        for has, digests in ((has_blob, blobs), (has_manifest, manifests)):
            wanted = tuple(dict.fromkeys(digests))
            found = await _map(has, wanted)
            missing += [
                str(each) for each, is_there in zip(wanted, found, strict=True) if not is_there
            ]
        if missing:
            raise ManifestReferencesMissing(repository, tuple(missing))

    async def list_tags(self, repository: str, after: str, limit: int) -> ListReply:
        """Tags in byte order, strictly after ``after``.  Raises RepositoryNotFound."""
        check_known(repository)
        page = await self._names(tags_prefix(repository), after, limit)
        if not page.names:
            await self._check_exists(repository)
        return page

    async def list_repositories(self, after: str, limit: int) -> ListReply:
        """Repository names in byte order, strictly after ``after``."""
        page = await self._names(MARKERS, marker_name(after), limit)
        return ListReply(tuple(map(marked, page.names)), page.more)

    async def list_referrers(self, repository: str, digest: Digest) -> tuple[Descriptor, ...]:
        """Manifests of the repository whose subject is ``digest``, in the order of their digests.

        Annotations beyond ``ANNOTATION_BYTES_MAX`` in all are left out; the manifests have them.
        """
        if not can_be_kept(repository):
            return ()
        page = await self._backend.list(referrers_prefix(repository, digest), limit=REFERRERS_MAX)
        pending = [(repository, digest_at_end(key)) for key in page.keys]
        found: list[Descriptor] = []
        room = ANNOTATION_BYTES_MAX
        while pending:
            # A few at a time: together they may be larger than what is kept of them.
            batch, pending = pending[:CONCURRENCY], pending[CONCURRENCY:]
            for descriptor in await _map(self._descriptor_or_none, batch):
                # None: a put that was cut off has left the name of a manifest that never came, or a delete
                # that of one that is gone.
                if descriptor is not None:
                    room -= annotation_bytes(descriptor)
                    found.append(descriptor if room >= 0 else without_annotations(descriptor))
        return tuple(found)

    async def referrers_to_send(self, repository: str, digest: Digest) -> tuple[Digest, ...]:
        """As `list_referrers`; while the backend is down nothing, of a manifest that was put meanwhile.

        What refers to that was put meanwhile, too, and watchers are told when the backend has it.
        """
        try:
            found = await self.list_referrers(repository, digest)
        except BackendUnavailable:
            if self.pending.manifest(repository, digest) is None:
                raise
            return ()
        return tuple(each.digest for each in found)

    async def referrer_stamp(
        self, repository: str, subject: Digest, digest: Digest
    ) -> Stamp | None:
        """Of the last put of a manifest that refers to another one; None when that is not known.

        What a former version put is older than any deletion.
        """
        try:
            at = await self._put_at(repository, subject, digest)
        except BackendUnavailable:
            if self.pending.manifest(repository, digest) is None:
                raise
            return None
        return None if at is None else Stamp(max(at, 1), self.tags.source)

    async def last_change_of_referrer(
        self, repository: str, digest: Digest, known: Stamp
    ) -> TagChange | None:
        """What became of a manifest that refers to another one, or nothing is known of it.

        ``known`` is the stamp of a change of it; that of what is there has its source, and where nobody has
        kept it its time.
        """
        if self.pending.manifest(repository, digest) is not None:
            return TagChange(known, digest)
        try:
            entry = await self._parts.entry(repository, digest)
        except ObjectNotFound:
            at = await self.deleted_at(repository, MANIFESTS, digest)
            return TagChange(Stamp(at, known.source), None) if at else None
        if entry.subject is None:
            return TagChange(known, digest)
        put_at = await self._put_at(repository, entry.subject, digest)
        # It is being deleted.
        if put_at is None:
            return None
        return TagChange(Stamp(put_at or known.time, known.source), digest)

    async def list_all_referrers(self, repository: str, after: str, limit: int) -> ListReply:
        """Names of everything in a repository that refers to something; `digest_at_end` has the digest."""
        return await self._names(all_referrers_prefix(repository), after, limit)

    # --- changing -----------------------------------------------------------------------------

    async def record_manifest(
        self, request: RecordManifestRequest, *, at: int | None = None
    ) -> None:
        """Enter a manifest whose content is durable, and move a tag to it.

        A change of the tag that comes with a stamp counts if that is later than what is there; without a tag
        the same goes for a manifest that refers to another one.

        Args:
            request: the manifest, and the tag if there is one.
            at: when it was acknowledged, in ns, if a journal brings it: then what is there is what the
                backend has.

        Raises:
            ManifestReferencesMissing: the repository lacks what the manifest refers to.
            ManifestInvalid: the tag is outside the grammar, the entry is too long, or lists are nested too
                deeply.
            PushRefused: the name cannot be kept, the stamp is far ahead of the clock, or the subject has
                too many referrers.
            TagChanged: the tag is not what is expected.
            TagImmutable: the tag is there, and of an immutable repository.
        """
        repository = request.repository
        check_writable(repository)
        if request.tag is not None and not is_tag(request.tag):
            raise ManifestInvalid(f"{shorten(request.tag)!r} is not a tag")
        check_stamp(request.tag or str(request.manifest.digest), request.stamp)
        pending = self.pending if at is None else PendingChanges()
        parts = self._parts if at is None else CatalogParts(self._backend, pending)
        async with self._locks.hold(repository):
            await self._check_references(repository, request.blobs, request.manifests, parts)
            below = await self._levels(repository, request.manifests, pending)
            levels = check_levels(request, below)
            entry = ManifestEntry(request.manifest, request.subject, levels, at)
            # Before anything is changed.
            pack_entry(entry)
            if request.subject is None:
                await self._mark(repository)
                await self._parts.put_entry(repository, entry)
            else:
                await self._record_referrer(request, request.subject, entry)
            if request.tag is not None:
                await self.tags.put(
                    repository,
                    request.tag,
                    request.manifest,
                    stamp=request.stamp,
                    by=request.by,
                    expect=request.expect,
                    from_journal=at is not None,
                )

    async def delete_manifest(
        self, repository: str, digest: Digest, *, by: str = "", recorded: Recorded = _nothing
    ) -> None:
        """Remove a manifest and every tag that points to it.

        Args:
            by: who asked for it.
            recorded: is waited for when journals can see that it is deleted, and before it is: what one of
                them is writing by then has to be there to be deleted.

        Raises ManifestNotFound, TagImmutable.
        """
        check_known(repository)
        async with self._locks.hold(repository):
            try:
                entry = await self._parts.stored_entry(repository, digest)
            except ObjectNotFound as exc:
                await self._check_exists(repository)
                raise ManifestNotFound(repository, str(digest)) from exc
            # What is refused must leave no record: journals would drop what they have by it.
            await self._check_deletable(repository, digest)
            if entry.subject is None:
                if self._records_deletions:
                    await self._parts.record_deletion(repository, MANIFESTS, digest, time.time_ns())
                await recorded()
                await self._delete_manifest(repository, digest, by)
                return
            times = await self._times_of(repository, entry.subject, digest)
            stamp = Stamp(times.next_time(time.time_ns()), self.tags.source)
            async with self._watched(repository, digest, TagChange(stamp, None, by)):
                await self._parts.record_deletion(repository, MANIFESTS, digest, stamp.time)
                await recorded()
                await self._delete_manifest(repository, digest, by, entry.subject)

    async def delete_referrer(
        self,
        repository: str,
        digest: Digest,
        stamp: Stamp,
        *,
        by: str = "",
        recorded: Recorded = _nothing,
    ) -> None:
        """Remove a manifest that refers to another one, as was done in another cluster, with its tags.

        It counts if it is later than what is known here; it is remembered also when the manifest is not here,
        since an earlier put may be on its way.

        Raises:
            PushRefused: the name cannot be kept, the stamp is far ahead of the clock, or the manifest
                refers to no other one.
            TagImmutable: a tag that leads to it has to stay.
        """
        check_writable(repository)
        check_stamp(str(digest), stamp)
        async with self._locks.hold(repository):
            subject = await self._subject_of(repository, digest)
            times = await self._times_of(repository, subject, digest)
            # A deletion that was cut off is made whole; one that leaves nothing to do is not told again.
            done_at = times.deleted_at if subject is None else 0
            if stamp.time <= max(times.put_at or 0, done_at):
                return
            await self._check_deletable(repository, digest)
            if await self._is_tagged_after(repository, digest, stamp):
                return
            async with self._watched(repository, digest, TagChange(stamp, None, by)):
                at = max(stamp.time, times.deleted_at)
                await self._parts.record_deletion(repository, MANIFESTS, digest, at)
                await recorded()
                await self._delete_manifest(repository, digest, by, subject, stamp)

    async def delete_tag(self, request: DeleteTagRequest, *, from_journal: bool = False) -> None:
        """Remove a tag; the manifest stays; ``from_journal`` as for a manifest.

        A deletion that comes with a stamp counts if that is later than what is there; it is remembered also
        when there is no such tag, since an earlier put may be on its way.

        Raises:
            ManifestNotFound, RepositoryNotFound: there is no such tag.
            PushRefused: the name cannot be kept, or the stamp is far ahead of the clock.
            TagChanged: the tag is not what is expected.
            TagImmutable: the repository is immutable.
        """
        repository, tag = request.repository, request.reference
        if request.stamp is None:
            check_known(repository)
        else:
            check_writable(repository)
        if not is_tag(tag):
            raise ManifestNotFound(repository, shorten(tag))
        check_stamp(tag, request.stamp)
        async with self._locks.hold(repository):
            try:
                await self.tags.delete(
                    repository,
                    tag,
                    stamp=request.stamp,
                    by=request.by,
                    expect=request.expect,
                    from_journal=from_journal,
                )
            except ManifestNotFound:
                await self._check_exists(repository)
                raise

    async def undo_tag(self, repository: str, tag: str, stamp: Stamp, digest: Digest) -> None:
        """Take back a change of a tag that made it name a manifest which was deleted meanwhile.

        Raises TagImmutable.
        """
        async with self._locks.hold(repository):
            # If it is there, it was put again since, with this tag or without.
            if not await self._parts.has_manifest(repository, digest):
                await self.tags.undo(repository, tag, stamp, by="deletion of its manifest")

    async def settle_tag(self, repository: str, tag: str) -> None:
        """Have the listing of a tag agree with what it is, when a change of it was cut off."""
        async with self._locks.hold(repository):
            await self.tags.settle(repository, tag)

    async def link_blob(self, repository: str, digest: Digest, *, at: int | None = None) -> None:
        """Make a blob, which is durable already, part of a repository; ``at`` as for a manifest.

        Raises PushRefused.
        """
        check_writable(repository)
        await self._mark(repository)
        await self._parts.put_blob(repository, digest, at)

    async def unlink_blob(
        self, repository: str, digest: Digest, *, recorded: Recorded = _nothing
    ) -> None:
        """Take a blob out of a repository; ``recorded`` as for a manifest.  Raises BlobNotFound."""
        if not can_be_kept(repository):
            raise BlobNotFound(str(digest), f"repository {shorten(repository)}")
        async with self._locks.hold(repository):
            if not await self._exists(blob_key(repository, digest)):
                raise BlobNotFound(str(digest), f"repository {repository}")
            if self._records_deletions:
                await self._parts.record_deletion(repository, BLOBS, digest, time.time_ns())
            await recorded()
            await self._delete_if_there(blob_key(repository, digest))

    async def deleted_at(self, repository: str, kind: str, digest: Digest) -> int:
        """When a manifest or a blob was last deleted, in ns; 0 if that is not known."""
        return await self._parts.deleted_at(repository, kind, digest)

    async def check_backend(self) -> None:
        """Raises BackendUnavailable when the backend does not answer."""
        await self._backend.list(MARKERS, limit=1)

    # --- parts --------------------------------------------------------------------------------

    async def _named_by(self, repository: str, reference: str) -> tuple[Digest, Descriptor | None]:
        """The manifest, and its descriptor if the tag has it: one object less to be read."""
        if ":" in reference:
            try:
                return Digest.parse(reference), None
            except InvalidDigest as exc:
                raise ManifestNotFound(repository, shorten(reference)) from exc
        if not is_tag(reference):
            raise ManifestNotFound(repository, shorten(reference))
        found = await self.tags.log(repository, reference)
        if found.digest is None:
            await self._check_exists(repository)
            raise ManifestNotFound(repository, reference)
        return found.digest, found.descriptor

    async def _levels(
        self, repository: str, manifests: tuple[Digest, ...], pending: PendingChanges
    ) -> dict[Digest, int]:
        """How deep the trees below some manifests are.  Raises ManifestReferencesMissing."""

        async def levels_of(digest: Digest) -> int:
            if levels := pending.levels(repository, digest):
                return levels
            try:
                return (await self._parts.entry(repository, digest)).levels
            except ObjectNotFound as exc:
                raise ManifestReferencesMissing(repository, (str(digest),)) from exc

        wanted = tuple(dict.fromkeys(manifests))
        return dict(zip(wanted, await _map(levels_of, wanted), strict=True))

    async def _descriptor_or_none(self, name: tuple[str, Digest]) -> Descriptor | None:
        try:
            return (await self._parts.entry(*name)).descriptor
        except ObjectNotFound:
            return None

    async def _names(self, prefix: str, after: str, limit: int) -> ListReply:
        limit = min(limit, PAGE_MAX)
        if limit < 1:
            return ListReply((), more=False)
        names: list[str] = []
        more = True
        while more and len(names) < limit:
            page = await self._backend.list(
                # All at once: a backend that is not in order goes through everything for each page.
                prefix,
                after=prefix + after,
                limit=limit - len(names),
            )
            names += [key.removeprefix(prefix) for key in page.keys]
            more = page.more and bool(page.keys)
            after = names[-1] if names else after
        return ListReply(tuple(names), more)

    async def _check_deletable(self, repository: str, digest: Digest) -> None:
        """Raises TagImmutable when a tag that points to the manifest has to stay."""

        async def check(tag: str) -> None:
            found = await self.tags.log(repository, tag)
            if found.digest == digest:
                self.tags.check_mutable(repository, tag, found, None)

        if self.tags.is_immutable(repository):
            await self._for_all_tags(repository, check)

    async def _delete_manifest(
        self,
        repository: str,
        digest: Digest,
        by: str,
        subject: Digest | None = None,
        stamp: Stamp | None = None,
    ) -> None:
        await self._for_all_tags(
            repository,
            lambda tag: self.tags.delete_if(repository, tag, digest, stamp=stamp, by=by),
        )
        if subject is not None:
            await self._delete_if_there(referrer_key(repository, subject, digest))
        # Last: without it nobody could find out what else was to be removed.
        await self._delete_if_there(manifest_key(repository, digest))

    async def _for_all_tags(self, repository: str, do: Callable[[str], Awaitable[None]]) -> None:
        prefix, after, more = tags_prefix(repository), "", True
        while more:
            page = await self._backend.list(prefix, after=after, limit=1000)
            await _map(do, [key.removeprefix(prefix) for key in page.keys])
            more = page.more and bool(page.keys)
            after = page.keys[-1] if page.keys else after

    # --- manifests that refer to others -------------------------------------------------------

    async def _record_referrer(
        self, request: RecordManifestRequest, subject: Digest, entry: ManifestEntry
    ) -> None:
        """Enter a manifest that refers to another one, unless it was deleted after that put."""
        repository, digest = request.repository, request.manifest.digest
        times = await self._times_of(repository, subject, digest)
        stamp = request.stamp or Stamp(times.next_time(time.time_ns()), self.tags.source)
        if request.tag is None and stamp.time <= times.deleted_at:
            log.info("referrer_outdated", repository=repository, digest=str(digest))
            return
        if times.put_at is None:
            await self._check_room_for_referrer(repository, subject, digest)
        # A tag is a change of its own, and brings its manifest.
        is_news = request.tag is None and stamp.time > (times.put_at or 0)
        change = TagChange(stamp, digest, request.by) if is_news else None
        async with self._watched(repository, digest, change):
            await self._mark(repository)
            # Before the manifest: who finds that takes it that nothing is left to be done.
            data = pack_put(max(stamp.time, times.put_at or 0))
            await self._backend.put_bytes(referrer_key(repository, subject, digest), data)
            await self._parts.put_entry(repository, entry)

    @asynccontextmanager
    async def _watched(
        self, repository: str, digest: Digest, change: TagChange | None
    ) -> AsyncIterator[None]:
        """Tell watchers of a change of a manifest that is made in the block; of none, nothing."""
        if change is None:
            yield
            return
        for watcher in self.tags.watchers:
            await watcher.changing(repository, str(digest), change)
        yield
        for watcher in self.tags.watchers:
            await watcher.changed(repository, str(digest), change)

    async def _times_of(
        self, repository: str, subject: Digest | None, digest: Digest
    ) -> ReferrerTimes:
        put_at = None if subject is None else await self._put_at(repository, subject, digest)
        return ReferrerTimes(put_at, await self.deleted_at(repository, MANIFESTS, digest))

    async def _put_at(self, repository: str, subject: Digest, digest: Digest) -> int | None:
        key = referrer_key(repository, subject, digest)
        try:
            data = await self._backend.get_bytes(key)
        except ObjectNotFound:
            return None
        return unpacked(self._backend, key, data, unpack_put)

    async def _subject_of(self, repository: str, digest: Digest) -> Digest | None:
        """None when it is not here.  Raises PushRefused when it has none."""
        try:
            entry = await self._parts.stored_entry(repository, digest)
        except ObjectNotFound:
            return None
        if entry.subject is None:
            raise PushRefused(
                f"manifest {digest} of repository {repository} refers to no other one: other clusters "
                "delete tags and referrers here, and nothing else"
            )
        return entry.subject

    async def _is_tagged_after(self, repository: str, digest: Digest, stamp: Stamp) -> bool:
        """Whether a change that is not before ``stamp`` has made a tag lead to a manifest."""
        found = False

        async def look(tag: str) -> None:
            nonlocal found
            latest = (await self.tags.log(repository, tag)).latest
            if latest is not None and latest.digest == digest:
                found = found or latest.stamp.time >= stamp.time

        await self._for_all_tags(repository, look)
        return found

    async def _check_room_for_referrer(
        self, repository: str, subject: Digest, digest: Digest
    ) -> None:
        page = await self._backend.list(referrers_prefix(repository, subject), limit=REFERRERS_MAX)
        if len(page.keys) < REFERRERS_MAX:
            return
        # Another index that enters the same one may have taken the last place for it.
        if not await self._exists(referrer_key(repository, subject, digest)):
            raise PushRefused(
                f"manifest {subject} of repository {repository} has {REFERRERS_MAX} "
                "referrers, the most that is kept: delete some of them first"
            )

    # --- what is there ------------------------------------------------------------------------

    async def _mark(self, repository: str) -> None:
        """Let the repository exist, before anything in it does."""
        key = marker_key(repository)
        if not await self._exists(key):
            await self._backend.put_bytes(key, b"{}")

    async def _check_exists(self, repository: str) -> None:
        if not await self._exists(marker_key(repository)):
            raise RepositoryNotFound(repository)

    async def _exists(self, key: str) -> bool:
        try:
            await self._backend.stat(key)
        except ObjectNotFound:
            return False
        return True

    async def _delete_if_there(self, key: str) -> None:
        try:
            await self._backend.delete(key)
        except ObjectNotFound:
            return  # an earlier delete was cut off after this step


# --- concurrency ------------------------------------------------------------------------------


async def _map(function: Callable[[T], Awaitable[U]], items: Iterable[T]) -> list[U]:
    """``function`` of each item, in order, ``CONCURRENCY`` at a time; the first error ends it all."""
    pending = list(enumerate(items))[::-1]
    results: dict[int, U] = {}
    failure: SwarmpullError | None = None

    async def work() -> None:
        nonlocal failure
        while pending:
            index, item = pending.pop()
            try:
                results[index] = await function(item)
            except SwarmpullError as exc:
                # Raised below: out of the nursery it would come wrapped in a group.
                failure = failure or exc
                nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for _ in range(min(CONCURRENCY, len(pending))):
            nursery.start_soon(work)
    if failure is not None:
        raise failure
    return [results[index] for index in range(len(results))]
