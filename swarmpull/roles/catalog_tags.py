"""The tags of the catalog: one object for each, with its last changes, and a name in the listing.

A tag is in the listing (``_tags``) when the log of its changes (``_changes``) says that it is there.  A log
is written on the condition that it is the one that was read, so no change is lost whichever processes make
them.  The name in the listing is an object of its own: whoever has written a log sees to it that the listing
agrees, and looks again afterwards, so the last one to touch either leaves both alike.  Meanwhile another
object says so (``unsettled``), by which `unsettled_tags` finds what was cut off.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Awaitable, Callable, Iterable
from typing import Final, Protocol

import attrs

from swarmpull.digest import Digest
from swarmpull.errors import (
    BackendUnavailable,
    ManifestNotFound,
    ObjectNotFound,
    ObjectReplaced,
    TagChanged,
    TagImmutable,
)
from swarmpull.roles.catalog_objects import changes_key, tag_key, unpacked, unsettled_key
from swarmpull.roles.direct_changes import DirectChanges
from swarmpull.roles.pending_changes import PendingChanges
from swarmpull.roles.tag_log import (
    LOG_BYTES_MAX,
    NAME_MAX,
    TagLog,
    pack_log,
    unpack_log,
    unpack_marker,
)
from swarmpull.store.backends.base import Backend
from swarmpull.wire.api import Descriptor, Stamp, TagChange

# Others that change the same tag at the same moment are met so often before a change is given up.
ATTEMPTS: Final = 20

# The change to be made of a tag with these changes; None when there is nothing to do.
MakeChange = Callable[[TagLog], Awaitable[TagChange | None]]


# Of changes in a repository those that are not to manifests that were deleted since.
CountingChanges = Callable[[str, tuple[TagChange, ...]], Awaitable[tuple[TagChange, ...]]]


async def _all(_: str, changes: tuple[TagChange, ...]) -> tuple[TagChange, ...]:
    return changes


class TagWatcher(Protocol):
    """Who is told of every change that makes a tag what it is, before it is acknowledged.

    A manifest with a subject that is put without a tag, or deleted, is a change, too, with its digest in
    place of the tag.

    What either method raises is the answer to whoever asked for the change.
    """

    async def changing(self, repository: str, tag: str, change: TagChange) -> None:
        """The change is about to be written.

        It may yet come to nothing: the process may die, the backend fail, or a later change win.
        """
        ...

    async def changed(self, repository: str, tag: str, change: TagChange) -> None:
        """The change is written, and every `CatalogTags.log` from now on has it or a later one."""
        ...


class CatalogTags:
    """What tags are, and were.  The caller makes one change of a repository at a time.

    Attributes:
        watchers: are told of changes, in this order.
        direct: what this process has changed in the backend, but for what came from a journal.
        source: names this process in the stamps of its changes.
        is_immutable: whether the tags of a repository are neither moved nor deleted.
    """

    def __init__(
        self,
        backend: Backend,
        source: str,
        is_immutable: Callable[[str], bool] = lambda _repository: False,
        pending: PendingChanges | None = None,
        counting: CountingChanges = _all,
    ) -> None:
        """Tags in a backend.

        Args:
            backend: where.
            source: names this process in the stamps of its changes: no other one may have it.
            is_immutable: whether the tags of a repository are neither moved nor deleted.
            pending: changes that the backend is yet to have.
            counting: which of them still count.
        """
        self.watchers: list[TagWatcher] = []
        self.direct = DirectChanges()
        self._backend = backend
        self.source = source
        self.is_immutable = is_immutable
        self._pending = pending or PendingChanges()
        self._counting = counting

    async def log(self, repository: str, tag: str) -> TagLog:
        """The changes of a tag; none of one that never was.

        While the backend is down, of a tag that has pending changes those, unless it is known to have been
        changed in the backend since.
        """
        # Before the read: what is written meanwhile is pending no more.
        pending = self._pending.tag_changes(repository, tag)
        last = self._pending.last_of(repository, tag)
        try:
            log, _ = await self._read(repository, tag)
        except BackendUnavailable:
            if not pending or self._pending.is_passed(last):
                raise
            log = TagLog()
        return _with(log, await self._counting(repository, pending)) if pending else log

    async def _read(self, repository: str, tag: str) -> tuple[TagLog, str]:
        """The changes of a tag, and the version of the object that has them; empty if there is none."""
        key = changes_key(repository, tag)
        try:
            data, version = await self._backend.get_versioned(key, limit=LOG_BYTES_MAX)
        except ObjectNotFound:
            return await self._marker(repository, tag), ""
        return unpacked(self._backend, key, data, unpack_log), version

    async def _marker(self, repository: str, tag: str) -> TagLog:
        key = tag_key(repository, tag)
        try:
            data = await self._backend.get_bytes(key, limit=LOG_BYTES_MAX)
        except ObjectNotFound:
            return TagLog()
        return unpacked(self._backend, key, data, unpack_marker)

    async def put(
        self,
        repository: str,
        tag: str,
        manifest: Descriptor,
        *,
        stamp: Stamp | None = None,
        by: str = "",
        expect: str | None = None,
        from_journal: bool = False,
    ) -> None:
        """Make a tag name a manifest; if ``stamp`` is set, only if it is later than what is there.

        Without a stamp, a tag that names the manifest already stays as it is, whatever ``expect`` is: the
        answer to the put that made it so may have been lost.  ``from_journal``: it is a pending change
        itself, so what is there is what the backend has.

        Raises:
            TagChanged: it is not what is expected.
            TagImmutable: it is there, and of an immutable repository.
        """

        async def make(log: TagLog) -> TagChange | None:
            digest = manifest.digest
            if stamp is not None or log.digest != digest:
                check_expected(repository, tag, log, expect)
                return self._made(log, digest, stamp, by)
            # The one that made it so may have been cut off before the listing.
            await self._list(repository, tag)
            return None

        await self._change(repository, tag, make, manifest, from_journal=from_journal)

    async def delete(
        self,
        repository: str,
        tag: str,
        *,
        stamp: Stamp | None = None,
        by: str = "",
        expect: str | None = None,
        from_journal: bool = False,
    ) -> None:
        """Remove a tag; if ``stamp`` is set, only if it is later, and one that is not there, too.

        Raises:
            ManifestNotFound: there is no such tag.
            TagChanged: it is not what is expected.
            TagImmutable: it is there, and of an immutable repository.
        """

        async def make(log: TagLog) -> TagChange:
            if log.digest is not None:
                check_expected(repository, tag, log, expect)
            if stamp is not None or log.digest is not None:
                return self._made(log, None, stamp, by)
            # Another delete may have been cut off before the listing.
            await self._unlist(repository, tag)
            raise ManifestNotFound(repository, tag)

        await self._change(repository, tag, make, from_journal=from_journal)

    async def undo(self, repository: str, tag: str, stamp: Stamp, *, by: str) -> None:
        """Remove a tag if the change with this stamp makes it what it is.  Raises TagImmutable."""

        async def make(log: TagLog) -> TagChange | None:
            latest = log.latest
            return self._made(log, None, None, by) if latest and latest.stamp == stamp else None

        await self._change(repository, tag, make, from_journal=True)

    async def delete_if(
        self, repository: str, tag: str, digest: Digest, *, stamp: Stamp | None = None, by: str
    ) -> None:
        """Remove a tag if it names this manifest; with ``stamp``, if that is later.  Raises TagImmutable."""

        async def make(log: TagLog) -> TagChange | None:
            return self._made(log, None, stamp, by) if log.digest == digest else None

        await self._change(repository, tag, make)

    def _made(self, log: TagLog, digest: Digest | None, stamp: Stamp | None, by: str) -> TagChange:
        stamp = stamp or log.next_stamp(time.time_ns(), self.source)
        stamp = attrs.evolve(stamp, source=stamp.source[:NAME_MAX])
        return TagChange(stamp, digest, by[:NAME_MAX])

    async def _change(
        self,
        repository: str,
        tag: str,
        make: MakeChange,
        manifest: Descriptor | None = None,
        *,
        from_journal: bool = False,
    ) -> None:
        """Make a change of what is there; again when another process has changed that meanwhile."""
        if from_journal:
            await self._attempt(repository, tag, make, manifest, PendingChanges())
            return
        with self.direct.under_way(repository):
            await self._attempt(repository, tag, make, manifest, self._pending)

    async def _attempt(
        self,
        repository: str,
        tag: str,
        make: MakeChange,
        manifest: Descriptor | None,
        pending: PendingChanges,
    ) -> None:
        for _ in range(ATTEMPTS):
            log, version = await self._read(repository, tag)
            changes = pending.tag_changes(repository, tag)
            known = _with(log, await self._counting(repository, changes))
            change = await make(known)
            if change is None:
                return
            self.check_mutable(repository, tag, known, known.with_change(change).digest)
            try:
                await self._write(repository, tag, log, version, known, change, manifest)
            except ObjectReplaced:
                continue
            finally:
                if pending is self._pending:
                    self.direct.ended(repository, tag)
                    self._pending.pass_by(repository, tag)
            return
        raise self._restless(repository, tag)

    def check_mutable(self, repository: str, tag: str, log: TagLog, digest: Digest | None) -> None:
        """Raises TagImmutable when a tag with that log must not become ``digest``."""
        if log.digest not in (None, digest) and self.is_immutable(repository):
            raise TagImmutable(repository, tag, str(log.digest))

    async def _write(
        self,
        repository: str,
        tag: str,
        log: TagLog,
        version: str,
        known: TagLog,
        change: TagChange,
        manifest: Descriptor | None,
    ) -> None:
        """Write a change, and what else is ``known``, beside the ``log`` that is there.

        Raises ObjectReplaced when that is not of the version any more.
        """
        changed = known.with_change(change).described(manifest)
        if changed == log:
            await self._settle(repository, tag, log)
            return
        counts = changed.latest == change
        if counts:
            for watcher in self.watchers:
                await watcher.changing(repository, tag, change)
        key = changes_key(repository, tag)
        if (log.digest is None) == (changed.digest is None):
            await self._backend.put_bytes(key, pack_log(changed), if_version=version)
        else:
            await self._write_with_listing(repository, tag, changed, version)
        if counts:
            for watcher in self.watchers:
                await watcher.changed(repository, tag, change)

    async def _write_with_listing(
        self, repository: str, tag: str, changed: TagLog, version: str
    ) -> None:
        """Write a log with which the tag appears or disappears.  Raises ObjectReplaced."""
        unsettled = unsettled_key(repository, tag, uuid.uuid4().hex)
        await self._backend.put_bytes(unsettled, b"{}")
        if changed.digest is None:
            # Before: what was cut off leaves no name in the listing that nothing is behind.
            await self._unlist(repository, tag)
        key = changes_key(repository, tag)
        try:
            await self._backend.put_bytes(key, pack_log(changed), if_version=version)
        except ObjectReplaced:
            await self.settle(repository, tag)
            await self._delete_if_there(unsettled)
            raise
        await self._settle(repository, tag, changed)
        await self._delete_if_there(unsettled)

    # --- the listing --------------------------------------------------------------------------

    async def settle(self, repository: str, tag: str) -> None:
        """Have the listing agree with what the tag is, whatever was cut off."""
        await self._settle(repository, tag, await self.log(repository, tag))

    async def _settle(self, repository: str, tag: str, log: TagLog) -> None:
        """Have the listing agree with the log, which others may change meanwhile."""
        for _ in range(ATTEMPTS):
            if log.digest is None:
                await self._unlist(repository, tag)
            else:
                await self._list(repository, tag)
            now = await self.log(repository, tag)
            if (now.digest is None) == (log.digest is None):
                return
            log = now
        raise self._restless(repository, tag)

    def _restless(self, repository: str, tag: str) -> BackendUnavailable:
        reason = f"tag {tag} is changed again and again by others: try once more"
        return BackendUnavailable(self._backend.name, changes_key(repository, tag), reason)

    async def _list(self, repository: str, tag: str) -> None:
        key = tag_key(repository, tag)
        try:
            await self._backend.stat(key)
        except ObjectNotFound:
            await self._backend.put_bytes(key, b"{}")

    async def _unlist(self, repository: str, tag: str) -> None:
        await self._delete_if_there(tag_key(repository, tag))

    async def _delete_if_there(self, key: str) -> None:
        try:
            await self._backend.delete(key)
        except ObjectNotFound:
            return  # it was not there


def _with(log: TagLog, changes: Iterable[TagChange]) -> TagLog:
    for change in changes:
        log = log.with_change(change)
    return log


def check_expected(repository: str, tag: str, log: TagLog, expect: str | None) -> None:
    """Raises TagChanged when the tag is not what it has to be."""
    actual = "" if log.digest is None else str(log.digest)
    if expect is None or expect == actual or (expect == "*" and actual):
        return
    raise TagChanged(repository, tag, expect, actual)
