"""What the HTTP face asks of the role behind it.

`swarmpull.registry` speaks HTTP and the OCI distribution specification; a role (agent, origin) implements
`RegistryService` and knows where content is.  The face never sees a peer, a ring or a backend; the role
never sees a status code.  Errors are those of `swarmpull.errors`; the face translates them.
"""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Protocol

import attrs

from swarmpull.digest import Digest
from swarmpull.registry.manifests import Manifest
from swarmpull.store.uploads import UploadStore
from swarmpull.wire.api import Descriptor, ListReply, Stamp, TagChange


class BlobReader(Protocol):
    """An open blob, perhaps still downloading."""

    @property
    def length(self) -> int: ...

    async def read_at(self, offset: int, size: int, *, early: bool = False) -> bytes:
        """At least one and at most ``size`` bytes from ``offset``; waits until they are verified.

        ``offset`` is below ``length``.  The last bytes come when the whole blob was verified, so that nobody
        reads all of a wrong one; ``early`` waits for their piece only, for who wants just that part.
        Raises DownloadFailed, StoreUnavailable: the response is then cut.
        """
        ...


@attrs.frozen
class Terms:
    """Who asks for a change of a tag, and what the tag has to be for it.

    Attributes:
        by: for the history of the tag.
        expect: the digest that the tag has to name, ``*`` for any; empty when it must not be there; None when
            it does not matter.
        stamp: of a change that was made in another cluster.
    """

    by: str = ""
    expect: str | None = None
    stamp: Stamp | None = None


@attrs.frozen
class StoredManifest:
    """A manifest exactly as it was pushed."""

    descriptor: Descriptor
    content: bytes = attrs.field(repr=False)


class RegistryService(Protocol):
    """The operations behind the registry API.

    ``repository`` is a valid name, or None for the generic blob API (``/blobs/<digest>``), which is
    outside any repository.  ``upstream`` is the registry that the client names, or None.
    """

    @property
    def uploads(self) -> UploadStore | None:
        """The upload sessions of this role; None when it does not take pushes."""
        ...

    def check_push(self, repository: str) -> None:
        """Return when content of a repository may come here.  Raises PushRefused.

        What a role cannot know yet is refused later, by `accept_blob` and `put_manifest`.
        """
        ...

    async def resolve(self, repository: str, reference: str, *, upstream: str | None) -> Descriptor:
        """Look up a tag or digest without fetching content.  Raises ManifestNotFound."""
        ...

    async def get_manifest(
        self, repository: str, reference: str, *, upstream: str | None
    ) -> StoredManifest:
        """Raises ManifestNotFound."""
        ...

    async def stat_blob(
        self, repository: str | None, digest: Digest, *, upstream: str | None
    ) -> int:
        """Length in bytes; never starts a download.  Raises BlobNotFound."""
        ...

    def open_blob(
        self, repository: str | None, digest: Digest, *, upstream: str | None
    ) -> AbstractAsyncContextManager[BlobReader]:
        """Open for reading; entering waits for the length only.  Raises BlobNotFound on entry."""
        ...

    async def accept_blob(self, repository: str | None, digest: Digest) -> None:
        """Make a blob of the local store durable and part of the repository.

        Returns when it may be acknowledged.  Raises BlobNotFound when it is not in the local store.
        """
        ...

    async def mount_blob(self, repository: str, digest: Digest, source: str | None) -> bool:
        """Make a blob of repository ``source`` part of ``repository`` too; False if it has none."""
        ...

    async def put_manifest(
        self, repository: str, reference: str, manifest: Manifest, terms: Terms
    ) -> None:
        """Raises ManifestReferencesMissing, TagChanged, TagImmutable."""
        ...

    async def delete_manifest(self, repository: str, digest: Digest) -> None:
        """Remove a manifest and the tags that point to it.  Raises ManifestNotFound, TagImmutable."""
        ...

    async def delete_tag(self, repository: str, tag: str, terms: Terms) -> None:
        """Raises ManifestNotFound, TagChanged, TagImmutable."""
        ...

    async def tag_log(self, repository: str, tag: str) -> tuple[TagChange, ...]:
        """The last changes of a tag, the latest at the end.  Raises ManifestNotFound, RepositoryNotFound."""
        ...

    async def delete_blob(self, repository: str, digest: Digest) -> None:
        """Take a blob out of a repository.  Raises BlobNotFound."""
        ...

    async def list_tags(self, repository: str, *, after: str, limit: int) -> ListReply:
        """Raises RepositoryNotFound."""
        ...

    async def list_repositories(self, *, after: str, limit: int) -> ListReply: ...

    async def list_referrers(self, repository: str, digest: Digest) -> tuple[Descriptor, ...]: ...
