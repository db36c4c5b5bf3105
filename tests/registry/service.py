"""A small registry role for the tests: a real store on disk, its index in memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import attrs
import trio

from swarmpull.digest import Digest
from swarmpull.errors import (
    BlobNotFound,
    ManifestNotFound,
    ManifestReferencesMissing,
    RepositoryNotFound,
)
from swarmpull.registry.manifests import Manifest
from swarmpull.registry.service import BlobReader, StoredManifest, Terms
from swarmpull.store.blobs import BlobStore
from swarmpull.store.uploads import UploadStore
from swarmpull.wire.api import Descriptor, ListReply, Stamp, TagChange


@attrs.define
class Repository:
    """What was pushed under one name."""

    tags: dict[str, Digest] = attrs.field(factory=dict)
    manifests: dict[Digest, Manifest] = attrs.field(factory=dict)
    blobs: set[Digest] = attrs.field(factory=set)


class IndexedService:
    """`RegistryService` over one store.

    Attributes:
        takes_pushes: whether it has upload sessions.
        asked: what was asked of it, as ``operation argument``, to see what a request sets off.
        upstreams: the value of ``ns`` of each request that had one.
        terms: of each change of a tag or manifest.
        wrap: what a blob is read through.
    """

    def __init__(self, store: BlobStore) -> None:
        self.store = store
        self.takes_pushes = True
        self.asked: list[str] = []
        self.upstreams: list[str | None] = []
        self.terms: list[Terms] = []
        self.wrap: Callable[[BlobReader], BlobReader] = lambda reader: reader
        self.repositories: defaultdict[str, Repository] = defaultdict(Repository)

    @property
    def uploads(self) -> UploadStore | None:
        return self.store.uploads if self.takes_pushes else None

    def manifest(self, repository: str, reference: str) -> Manifest:
        found = self.repositories.get(repository, Repository())
        digest = Digest.parse(reference) if ":" in reference else found.tags.get(reference)
        if digest not in found.manifests:
            raise ManifestNotFound(repository, reference)
        return found.manifests[digest]

    def check_push(self, repository: str) -> None:
        """Whatever there is."""

    async def resolve(self, repository: str, reference: str, *, upstream: str | None) -> Descriptor:
        self.asked.append(f"resolve {reference}")
        self.upstreams.append(upstream)
        return describe(self.manifest(repository, reference))

    async def get_manifest(
        self, repository: str, reference: str, *, upstream: str | None
    ) -> StoredManifest:
        self.asked.append(f"get_manifest {reference}")
        self.upstreams.append(upstream)
        manifest = self.manifest(repository, reference)
        return StoredManifest(describe(manifest), manifest.content)

    def check_blob(self, repository: str | None, digest: Digest) -> None:
        if repository is not None and digest not in self.repositories[repository].blobs:
            raise BlobNotFound(str(digest), f"repository {repository}")

    async def stat_blob(
        self, repository: str | None, digest: Digest, *, upstream: str | None
    ) -> int:
        self.asked.append(f"stat_blob {digest}")
        self.upstreams.append(upstream)
        self.check_blob(repository, digest)
        return self.store.stat(digest).length

    @asynccontextmanager
    async def open_blob(
        self, repository: str | None, digest: Digest, *, upstream: str | None
    ) -> AsyncIterator[BlobReader]:
        self.asked.append(f"open_blob {digest}")
        self.upstreams.append(upstream)
        self.check_blob(repository, digest)
        with self.store.open(digest) as handle:
            yield self.wrap(handle)
            self.asked.append(f"close_blob {digest}")

    async def accept_blob(self, repository: str | None, digest: Digest) -> None:
        self.asked.append(f"accept_blob {digest}")
        self.store.stat(digest)
        if repository is not None:
            self.repositories[repository].blobs.add(digest)

    async def mount_blob(self, repository: str, digest: Digest, source: str | None) -> bool:
        self.asked.append(f"mount_blob {source}")
        sources = list(self.repositories) if source is None else [source]
        if not any(digest in self.repositories[name].blobs for name in sources):
            return False
        self.repositories[repository].blobs.add(digest)
        return True

    async def put_manifest(
        self, repository: str, reference: str, manifest: Manifest, terms: Terms
    ) -> None:
        target = self.repositories[repository]
        self.terms.append(terms)
        missing = [digest for digest in manifest.blobs if digest not in target.blobs]
        missing += [digest for digest in manifest.manifests if digest not in target.manifests]
        if missing:
            raise ManifestReferencesMissing(repository, tuple(map(str, missing)))
        target.manifests[manifest.digest] = manifest
        if ":" not in reference:
            target.tags[reference] = manifest.digest

    async def delete_manifest(self, repository: str, digest: Digest) -> None:
        self.manifest(repository, str(digest))
        target = self.repositories[repository]
        del target.manifests[digest]
        target.tags = {tag: found for tag, found in target.tags.items() if found != digest}

    async def tag_log(self, repository: str, tag: str) -> tuple[TagChange, ...]:
        self.manifest(repository, tag)
        digest = self.repositories[repository].tags[tag]
        return tuple(
            TagChange(Stamp(n, "index1"), each, "me") for n, each in enumerate([None, digest])
        )

    async def delete_tag(self, repository: str, tag: str, terms: Terms) -> None:
        self.manifest(repository, tag)
        self.terms.append(terms)
        del self.repositories[repository].tags[tag]

    async def delete_blob(self, repository: str, digest: Digest) -> None:
        self.check_blob(repository, digest)
        self.repositories[repository].blobs.remove(digest)

    async def list_tags(self, repository: str, *, after: str, limit: int) -> ListReply:
        if repository not in self.repositories:
            raise RepositoryNotFound(repository)
        return page(self.repositories[repository].tags, after, limit)

    async def list_repositories(self, *, after: str, limit: int) -> ListReply:
        return page(self.repositories, after, limit)

    async def list_referrers(self, repository: str, digest: Digest) -> tuple[Descriptor, ...]:
        manifests = self.repositories.get(repository, Repository()).manifests.values()
        return tuple(describe(manifest) for manifest in manifests if manifest.subject == digest)


def describe(manifest: Manifest) -> Descriptor:
    return Descriptor(
        manifest.digest,
        manifest.media_type,
        len(manifest.content),
        manifest.artifact_type,
        manifest.annotations or None,
    )


def page(names: dict[str, object] | dict[str, Digest], after: str, limit: int) -> ListReply:
    following = sorted(name for name in names if name > after)
    return ListReply(tuple(following[:limit]), len(following) > limit)


class FailingReader:
    """Reads like the reader behind it up to a point, and raises there."""

    def __init__(self, reader: BlobReader, fail_at: int, error: Exception) -> None:
        self.length = reader.length
        self._reader = reader
        self._fail_at = fail_at
        self._error = error

    async def read_at(self, offset: int, size: int, *, early: bool = False) -> bytes:
        if offset >= self._fail_at:
            raise self._error
        return await self._reader.read_at(offset, min(size, self._fail_at - offset))


class WaitingReader:
    """Reads like the reader behind it up to a point, and waits there as a download would.

    Attributes:
        waiting: set when somebody waits.
        given_up: set when they were cancelled.
    """

    def __init__(self, reader: BlobReader, wait_at: int) -> None:
        self.length = reader.length
        self.waiting = trio.Event()
        self.given_up = trio.Event()
        self.go_on = trio.Event()
        self._reader = reader
        self._wait_at = wait_at

    async def read_at(self, offset: int, size: int, *, early: bool = False) -> bytes:
        if offset < self._wait_at:
            return await self._reader.read_at(offset, min(size, self._wait_at - offset))
        self.waiting.set()
        try:
            await self.go_on.wait()
        except trio.Cancelled:
            self.given_up.set()
            raise
        return await self._reader.read_at(offset, size)
