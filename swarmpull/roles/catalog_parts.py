"""What belongs to a repository by its digest, manifests and blobs, and what was deleted from it.

What a journal brings may be older than a deletion, and whoever writes it may stand still between its look at
the record of that and the write.  So what comes from a journal says when it was acknowledged, and counts only
if no deletion is as late, whenever it was written; and it takes the place of nothing but older ones of its
kind.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

from swarmpull.digest import Digest
from swarmpull.errors import BackendUnavailable, ObjectNotFound, ObjectReplaced
from swarmpull.roles.catalog_objects import (
    BLOBS,
    ENTRY_BYTES_MAX,
    MANIFESTS,
    PART,
    ManifestEntry,
    blob_key,
    deletion_key,
    manifest_key,
    pack_deletion,
    pack_entry,
    pack_part,
    unpack_deletion,
    unpack_entry,
    unpack_part,
    unpacked,
)
from swarmpull.roles.pending_changes import PendingChanges
from swarmpull.store.backends.base import Backend
from swarmpull.wire.api import Descriptor, TagChange

# Others that write the same object at the same moment are met so often before it is given up.
ATTEMPTS: Final = 20


class CatalogParts:
    """Manifests and blobs of repositories, in the backend and beside it."""

    def __init__(self, backend: Backend, pending: PendingChanges) -> None:
        self._backend = backend
        self._pending = pending

    # --- looking up ---------------------------------------------------------------------------

    async def entry(self, repository: str, digest: Digest) -> ManifestEntry:
        """What the backend has of a manifest.  Raises ObjectNotFound."""
        entry = await self.stored_entry(repository, digest)
        if await self._is_outdated(repository, MANIFESTS, digest, entry.at):
            raise ObjectNotFound(self._backend.name, manifest_key(repository, digest))
        return entry

    async def stored_entry(self, repository: str, digest: Digest) -> ManifestEntry:
        """The same, also of one whose deletion was cut off, or that came after it.  Raises ObjectNotFound."""
        key = manifest_key(repository, digest)
        data = await self._backend.get_bytes(key, limit=ENTRY_BYTES_MAX)
        return unpacked(self._backend, key, data, partial(unpack_entry, digest))

    async def has_manifest(self, repository: str, digest: Digest) -> bool:
        """Whether the backend has it."""
        try:
            await self.entry(repository, digest)
        except ObjectNotFound:
            return False
        return True

    async def has_blob(self, repository: str, digest: Digest) -> bool:
        """Whether the backend says that the blob is part of the repository."""
        key = blob_key(repository, digest)
        try:
            if (await self._backend.stat(key)).length == len(PART):
                return True
            data = await self._backend.get_bytes(key)
        except ObjectNotFound:
            return False
        at = unpacked(self._backend, key, data, unpack_part)
        return not await self._is_outdated(repository, BLOBS, digest, at)

    async def pending_manifest(self, repository: str, digest: Digest) -> Descriptor | None:
        """A manifest that is pending, and was not deleted since as far as that can be told."""
        found = self._pending.manifest(repository, digest)
        at = self._pending.manifest_at(repository, digest)
        return None if await self._is_deleted_since(repository, MANIFESTS, digest, at) else found

    async def is_blob_pending(self, repository: str, digest: Digest) -> bool:
        """Whether that it became part of the repository is pending, and it was not deleted since."""
        at = self._pending.blob_at(repository, digest)
        return at is not None and not await self._is_deleted_since(repository, BLOBS, digest, at)

    async def counting(
        self, repository: str, changes: tuple[TagChange, ...]
    ) -> tuple[TagChange, ...]:
        """Of pending changes of a tag those that are not to manifests that were deleted since."""
        put = {change.digest for change in changes if change.digest is not None}
        times = {digest: self._pending.manifest_at(repository, digest) for digest in put}
        gone = {
            digest
            for digest, at in times.items()
            if await self._is_deleted_since(repository, MANIFESTS, digest, at)
        }
        return tuple(change for change in changes if change.digest not in gone)

    async def deleted_at(self, repository: str, kind: str, digest: Digest) -> int:
        """When a manifest or a blob was last deleted, in ns; 0 if that is not known."""
        key = deletion_key(repository, kind, digest)
        try:
            data = await self._backend.get_bytes(key)
        except ObjectNotFound:
            return 0
        return unpacked(self._backend, key, data, unpack_deletion)

    async def _is_outdated(
        self, repository: str, kind: str, digest: Digest, at: int | None
    ) -> bool:
        """Whether what a journal brought was deleted after it was acknowledged; None: none did."""
        return at is not None and await self.deleted_at(repository, kind, digest) >= at

    async def _is_deleted_since(
        self, repository: str, kind: str, digest: Digest, at: int | None
    ) -> bool:
        """The same of what is pending; while the backend is down nobody can tell."""
        try:
            return await self._is_outdated(repository, kind, digest, at or None)
        except BackendUnavailable:
            return False

    # --- changing -----------------------------------------------------------------------------

    async def put_blob(self, repository: str, digest: Digest, at: int | None) -> None:
        """Make a blob part of a repository; ``at``: when that was acknowledged, if a journal brings it."""
        key = blob_key(repository, digest)
        await self._put(key, pack_part(at), at, unpack_part)

    async def put_entry(self, repository: str, entry: ManifestEntry) -> None:
        """Enter a manifest.  Raises ManifestInvalid for what cannot be kept."""
        digest = entry.descriptor.digest
        key = manifest_key(repository, digest)
        await self._put(
            key, pack_entry(entry), entry.at, lambda data: unpack_entry(digest, data).at
        )

    async def _put(
        self, key: str, data: bytes, at: int | None, time_of: Callable[[bytes], int | None]
    ) -> None:
        """Write an object; from a journal only in the place of none, or of an older one from a journal."""
        if at is None:
            await self._backend.put_bytes(key, data)
            return
        for _ in range(ATTEMPTS):
            try:
                there, version = await self._backend.get_versioned(key, limit=ENTRY_BYTES_MAX)
            except ObjectNotFound:
                version = ""
            else:
                since = unpacked(self._backend, key, there, time_of)
                if since is None or since >= at:
                    return
            try:
                await self._backend.put_bytes(key, data, if_version=version)
            except ObjectReplaced:
                continue
            return
        reason = "it is written again and again by others: try once more"
        raise BackendUnavailable(self._backend.name, key, reason)

    async def record_deletion(self, repository: str, kind: str, digest: Digest, at: int) -> None:
        """Before a deletion, so that what is older can be told from what is later."""
        key = deletion_key(repository, kind, digest)
        await self._backend.put_bytes(key, pack_deletion(at))
