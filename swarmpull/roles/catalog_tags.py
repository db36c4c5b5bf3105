"""The tags of the catalog: one object for each, with its last changes, and a name in the listing.

A tag is in the listing (``_tags``) when the log of its changes (``_changes``) says that it is there.  The two
are objects of their own, and other processes change them too: whoever has written a log sees to it that
the listing agrees, and looks again afterwards, so the last one to touch either leaves both alike.
"""

from __future__ import annotations

import time
from typing import Final, Protocol

import attrs

from swarmpull.digest import Digest
from swarmpull.errors import BackendUnavailable, ManifestNotFound, ObjectNotFound
from swarmpull.roles.catalog_objects import changes_key, tag_key, unpacked
from swarmpull.roles.tag_log import (
    LOG_BYTES_MAX,
    NAME_MAX,
    TagLog,
    pack_log,
    unpack_log,
    unpack_marker,
)
from swarmpull.store.backends.base import Backend
from swarmpull.wire.api import Stamp, TagChange

# Others that change the same tag at the same moment are met so often before a change is given up.
ATTEMPTS: Final = 20


class TagWatcher(Protocol):
    """Who is told of every change that makes a tag what it is, before it is acknowledged.

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
    """

    def __init__(self, backend: Backend, source: str) -> None:
        """``source`` names this process in the stamps of its changes: no other one may have it."""
        self.watchers: list[TagWatcher] = []
        self._backend = backend
        self._source = source

    async def log(self, repository: str, tag: str) -> TagLog:
        """The changes of a tag; none of one that never was."""
        try:
            key = changes_key(repository, tag)
            data = await self._backend.get_bytes(key, limit=LOG_BYTES_MAX)
            return unpacked(self._backend, key, data, unpack_log)
        except ObjectNotFound:
            return await self._marker(repository, tag)

    async def _marker(self, repository: str, tag: str) -> TagLog:
        key = tag_key(repository, tag)
        try:
            data = await self._backend.get_bytes(key, limit=LOG_BYTES_MAX)
        except ObjectNotFound:
            return TagLog()
        return unpacked(self._backend, key, data, unpack_marker)

    async def put(
        self, repository: str, tag: str, digest: Digest, *, stamp: Stamp | None, by: str
    ) -> None:
        """Make a tag name a manifest; if ``stamp`` is set, only if it is later than what is there.

        Without a stamp, a tag that names the manifest already stays as it is.
        """
        log = await self.log(repository, tag)
        if stamp is None and log.digest == digest:
            # The one that made it so may have been cut off before the listing.
            await self._list(repository, tag)
            return
        await self._change(repository, tag, log, self._made(log, digest, stamp, by))

    async def delete(self, repository: str, tag: str, *, stamp: Stamp | None, by: str) -> None:
        """Remove a tag; if ``stamp`` is set, only if it is later, and one that is not there, too.

        Raises:
            ManifestNotFound: there is no such tag.
        """
        log = await self.log(repository, tag)
        if stamp is None and log.digest is None:
            # Another delete may have been cut off before the listing.
            await self._unlist(repository, tag)
            raise ManifestNotFound(repository, tag)
        await self._change(repository, tag, log, self._made(log, None, stamp, by))

    async def delete_if(self, repository: str, tag: str, digest: Digest, *, by: str) -> None:
        """Remove a tag if it names this manifest."""
        log = await self.log(repository, tag)
        if log.digest == digest:
            await self._change(repository, tag, log, self._made(log, None, None, by))

    def _made(self, log: TagLog, digest: Digest | None, stamp: Stamp | None, by: str) -> TagChange:
        stamp = stamp or log.next_stamp(time.time_ns(), self._source)
        stamp = attrs.evolve(stamp, source=stamp.source[:NAME_MAX])
        return TagChange(stamp, digest, by[:NAME_MAX])

    async def _change(self, repository: str, tag: str, log: TagLog, change: TagChange) -> None:
        changed = log.with_change(change)
        if changed == log:
            await self._settle(repository, tag, log)
            return
        counts = changed.latest == change
        if counts:
            for watcher in self.watchers:
                await watcher.changing(repository, tag, change)
        if changed.digest is None:
            # Before: what was cut off leaves no name in the listing that nothing is behind.
            await self._unlist(repository, tag)
        await self._backend.put_bytes(changes_key(repository, tag), pack_log(changed))
        if (log.digest is None) != (changed.digest is None):
            await self._settle(repository, tag, changed)
        if counts:
            for watcher in self.watchers:
                await watcher.changed(repository, tag, change)

    # --- the listing --------------------------------------------------------------------------

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
        reason = f"tag {tag} is made and deleted again and again by others: try once more"
        raise BackendUnavailable(self._backend.name, tag_key(repository, tag), reason)

    async def _list(self, repository: str, tag: str) -> None:
        key = tag_key(repository, tag)
        try:
            await self._backend.stat(key)
        except ObjectNotFound:
            await self._backend.put_bytes(key, b"{}")

    async def _unlist(self, repository: str, tag: str) -> None:
        try:
            await self._backend.delete(tag_key(repository, tag))
        except ObjectNotFound:
            return  # it was not there
