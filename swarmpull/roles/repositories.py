"""What agents and origins do alike as a registry: everything that only concerns the index."""

from __future__ import annotations

import structlog

from swarmpull.config import Config
from swarmpull.digest import Digest
from swarmpull.errors import (
    BackendUnavailable,
    BlobNotFound,
    ManifestNotFound,
    RepositoryNotFound,
    RpcUnavailable,
)
from swarmpull.registry.names import UpstreamNames
from swarmpull.registry.service import Terms
from swarmpull.roles.cluster import IndexClient
from swarmpull.wire.api import Descriptor, ListReply, TagChange

log = structlog.get_logger()


def upstream_names(config: Config) -> UpstreamNames:
    """Which requests are for which upstream, as the configuration says."""
    return UpstreamNames((entry.name for entry in config.upstreams), config.cluster.names)


class Repositories:
    """The part of a `RegistryService` that the index answers, which knows nothing of upstreams."""

    def __init__(self, index: IndexClient, names: UpstreamNames) -> None:
        self._index = index
        self._names = names

    async def delete_manifest(self, repository: str, digest: Digest) -> None:
        await self._index.delete_manifest(repository, digest)

    async def delete_tag(self, repository: str, tag: str, terms: Terms) -> None:
        await self._index.delete_tag(repository, tag, by=terms.by, expect=terms.expect)

    async def tag_log(self, repository: str, tag: str) -> tuple[TagChange, ...]:
        return (await self._index.tag_log(repository, tag)).changes

    async def list_tags(self, repository: str, *, after: str, limit: int) -> ListReply:
        return await self._index.list_tags(repository, after=after, limit=limit)

    async def list_repositories(self, *, after: str, limit: int) -> ListReply:
        return await self._index.list_repositories(after=after, limit=limit)

    async def list_referrers(self, repository: str, digest: Digest) -> tuple[Descriptor, ...]:
        return await self._index.list_referrers(repository, digest)

    async def check_membership(self, repository: str | None, digest: Digest) -> None:
        """Raise BlobNotFound when a repository does not have a blob.

        Content is addressed by its digest, so where no index can tell, availability goes first and the
        blob is taken to be there.
        """
        if repository is None:
            return
        try:
            # Some clients ask for manifests as blobs when they copy by digest.
            if await self._index.has_blob(repository, digest) or await self._is_manifest(
                repository, digest
            ):
                return
        except (RpcUnavailable, BackendUnavailable) as error:
            log.warning(
                "membership_unknown", repository=repository, digest=str(digest), reason=str(error)
            )
            return
        raise BlobNotFound(str(digest), f"repository {repository}")

    async def _is_manifest(self, repository: str, digest: Digest) -> bool:
        try:
            await self._index.resolve(repository, str(digest))
        except (ManifestNotFound, RepositoryNotFound):
            return False
        return True
