"""Changes that were acknowledged while the backend was down, and that it does not have yet.  Pure.

Lookups see them beside what the backend has.
"""

from __future__ import annotations

from collections.abc import Container, Iterator

from swarmpull.digest import Digest
from swarmpull.roles.tag_log import order_of
from swarmpull.wire.api import Descriptor, PendingChange, TagChange


def id_of(change: PendingChange) -> str:
    """Names a change: the same one that is kept twice is one.

    What has no stamp goes by its time: it may have been made, undone, and made again.
    """
    at = str(change.at or "")
    if change.link is not None:
        return f"blob {change.link.repository} {change.link.digest} {at}".rstrip()
    if change.manifest is not None:
        request = change.manifest
        stamp = at if request.stamp is None else f"{request.stamp.time} {request.stamp.source}"
        return (
            f"manifest {request.repository} {request.manifest.digest} {request.tag or ''} {stamp}"
        )
    assert change.deletion is not None
    stamp_of = change.deletion.stamp
    assert stamp_of is not None, "a deletion is kept with its stamp"
    return (
        f"deletion {change.deletion.repository} {change.deletion.reference} "
        f"{stamp_of.time} {stamp_of.source}"
    )


class PendingChanges:
    """Changes by what they are of."""

    def __init__(self) -> None:
        self._tags: dict[tuple[str, str], dict[str, TagChange]] = {}
        # Ids of those after which the tag was changed in the backend.
        self._passed: set[str] = set()
        self._manifests: dict[tuple[str, Digest], Descriptor] = {}
        self._levels: dict[tuple[str, Digest], int] = {}
        # When each of these was acknowledged, in ns.
        self._parts: dict[tuple[str, Digest], list[int]] = {}
        self._blobs: dict[tuple[str, Digest], list[int]] = {}

    def tag_changes(self, repository: str, tag: str) -> tuple[TagChange, ...]:
        """Those of a tag, in no order."""
        return tuple(self._tags.get((repository, tag), {}).values())

    def last_of(self, repository: str, tag: str, but: Container[str] = ()) -> str:
        """The id of the last change of a tag, leaving some out; empty when there is none."""
        changes = self._tags.get((repository, tag), {})
        found = (each for each in changes if each not in but)
        return max(found, key=lambda each: order_of(changes[each]), default="")

    def pass_by(self, repository: str, tag: str) -> None:
        """The tag was changed in the backend: what is pending of it now is not the last change."""
        self._passed.update(self._tags.get((repository, tag), ()))

    def is_passed(self, change_id: str) -> bool:
        """Whether the tag was changed in the backend since, as far as is known."""
        return change_id in self._passed

    def manifest(self, repository: str, digest: Digest) -> Descriptor | None:
        """A manifest that was put."""
        return self._manifests.get((repository, digest))

    def levels(self, repository: str, digest: Digest) -> int:
        """How deep the tree below a manifest that was put is; 0 for another one."""
        return self._levels.get((repository, digest), 0)

    def has_blob(self, repository: str, digest: Digest) -> bool:
        """Whether a blob was made part of a repository."""
        return (repository, digest) in self._blobs

    def has_part(self, repository: str, digest: Digest) -> bool:
        """Whether a blob was made part of a repository, or such a manifest was put."""
        return (repository, digest) in self._blobs or (repository, digest) in self._manifests

    def blob_at(self, repository: str, digest: Digest) -> int | None:
        """When that was last acknowledged, in ns; None if it was not."""
        return max(self._blobs.get((repository, digest), ()), default=None)

    def manifest_at(self, repository: str, digest: Digest) -> int | None:
        """When a manifest was last put, likewise."""
        return max(self._parts.get((repository, digest), ()), default=None)

    def add(self, change: PendingChange) -> None:
        """A change is acknowledged; one that is known already must not be added again."""
        if change.link is not None:
            blob = change.link.repository, change.link.digest
            self._blobs.setdefault(blob, []).append(change.at)
        if change.manifest is not None:
            key = change.manifest.repository, change.manifest.manifest.digest
            self._manifests[key] = change.manifest.manifest
            self._parts.setdefault(key, []).append(change.at)
            below = (self.levels(key[0], each) for each in change.manifest.manifests)
            self._levels[key] = 1 + max(below, default=0)
        for key_of_tag, made in _tag_changes(change):
            self._tags.setdefault(key_of_tag, {})[id_of(change)] = made

    def remove(self, change: PendingChange) -> None:
        """The backend has a change."""
        if change.link is not None:
            blob = change.link.repository, change.link.digest
            self._blobs[blob].remove(change.at)
            if not self._blobs[blob]:
                del self._blobs[blob]
        if change.manifest is not None:
            key = change.manifest.repository, change.manifest.manifest.digest
            self._parts[key].remove(change.at)
            if not self._parts[key]:
                del self._parts[key]
                del self._manifests[key]
                del self._levels[key]
        for key_of_tag, _ in _tag_changes(change):
            changes = self._tags[key_of_tag]
            del changes[id_of(change)]
            self._passed.discard(id_of(change))
            if not changes:
                del self._tags[key_of_tag]


def _tag_changes(change: PendingChange) -> Iterator[tuple[tuple[str, str], TagChange]]:
    record, deletion = change.manifest, change.deletion
    if record is not None and record.tag is not None and record.stamp is not None:
        made = TagChange(record.stamp, record.manifest.digest, record.by)
        yield (record.repository, record.tag), made
    if deletion is not None and deletion.stamp is not None:
        yield (
            (deletion.repository, deletion.reference),
            TagChange(deletion.stamp, None, deletion.by),
        )
