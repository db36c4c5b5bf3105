"""Other clusters that images are replicated to, as an index sees them: rules, and calls of their roles."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Final

import attrs
import structlog
import trio

from swarmpull.config import Config, RemoteConfig, ReplicationConfig
from swarmpull.digest import Digest
from swarmpull.errors import (
    InvalidDigest,
    ManifestNotFound,
    ManifestReferencesMissing,
    PushRefused,
    RepositoryNotFound,
    RpcFailed,
)
from swarmpull.patterns import compile_pattern
from swarmpull.roles.catalog import Catalog
from swarmpull.roles.cluster import IndexClient, OriginClient
from swarmpull.roles.ring_client import RingClient, open_ring
from swarmpull.store.backends import open_backend
from swarmpull.wire import api
from swarmpull.wire.listen import parse_address
from swarmpull.wire.rpc import RpcPool

log = structlog.get_logger()

# For so many seconds it is believed which origins a remote has.
DESCRIPTION_BELIEVED: Final = 30.0
# Names of repositories that are read at once.
CATALOG_PAGE: Final = 1000
# More than a cluster has.
ORIGINS_MAX: Final = 1000


@attrs.define(eq=False)
class Rule:
    """Repositories that go to a remote.

    Attributes:
        pattern, remote: as configured.
        matched: changes of tags that it matched since the start.
    """

    pattern: str
    remote: str
    matched: int = 0
    _matcher: re.Pattern[str] = attrs.field(init=False, repr=False)

    @_matcher.default
    def _compile(self) -> re.Pattern[str]:
        return compile_pattern(self.pattern)

    def matches(self, repository: str) -> bool:
        return self._matcher.fullmatch(repository) is not None


class Rules:
    """What goes where."""

    def __init__(self, rules: Iterable[ReplicationConfig]) -> None:
        self.rules = tuple(Rule(rule.pattern, rule.remote) for rule in rules)

    def remotes_of(self, repository: str) -> Sequence[str]:
        """The remotes that a repository goes to, each once."""
        return tuple(dict.fromkeys(rule.remote for rule in self.rules if rule.matches(repository)))

    def count(self, repository: str) -> None:
        """A tag of a repository has changed."""
        for rule in self.rules:
            rule.matched += rule.matches(repository)


async def rules_without_repositories(config: Config) -> tuple[Sequence[str], int]:
    """The patterns of rules that match nothing of what is in the index backend, and how much that is.

    Raises:
        SwarmpullError: the backend cannot be asked.
    """
    url = config.index.backend.url
    if url.startswith("file:") and "create=" not in url:
        # Looking must not begin one.
        url += "&create=false" if "?" in url else "?create=false"
    rules = Rules(config.replications)
    catalog = Catalog(await open_backend(url))
    after, more, count = "", True, 0
    while more:
        page = await catalog.list_repositories(after, CATALOG_PAGE)
        for name in page.names:
            rules.count(name)
        count += len(page.names)
        more = page.more and bool(page.names)
        after = page.names[-1] if page.names else after
    return [rule.pattern for rule in rules.rules if not rule.matched], count


class Remote:
    """One other cluster.  Errors of its methods are those of `RingClient.call`."""

    def __init__(self, config: RemoteConfig, pool: RpcPool) -> None:
        self.name = config.name
        self.rate = None if config.rate == math.inf else config.rate
        self._index_ring = open_ring(pool, config.indexes, f"{config.name} index")
        self._index = IndexClient(RingClient(pool, self._index_ring))
        self._origin_ring = open_ring(pool, config.origins, f"{config.name} origin")
        self._origin = OriginClient(RingClient(pool, self._origin_ring))
        self._is_described = not config.origins
        self._described_at = -math.inf
        self._describing = trio.Lock()

    async def run(self) -> None:
        """Keep names resolved, and members that seem to be ill probed, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._index_ring.run)
            nursery.start_soon(self._origin_ring.run)

    async def latest(self, repository: str, tag: str) -> api.TagChange | None:
        """What a tag is there; None if it never was anything."""
        try:
            return (await self._index.tag_log(repository, tag)).changes[-1]
        except (ManifestNotFound, RepositoryNotFound, IndexError):
            return None

    async def missing(
        self, repository: str, blobs: tuple[Digest, ...], manifests: tuple[Digest, ...]
    ) -> frozenset[Digest]:
        """What of these a repository does not have there."""
        try:
            await self._index.check_references(repository, blobs=blobs, manifests=manifests)
        except ManifestReferencesMissing as error:
            try:
                return frozenset(map(Digest.parse, error.missing))
            except InvalidDigest as wrong:
                method = api.CHECK_REFERENCES.name
                raise RpcFailed(self.name, method, f"it says what is no digest: {wrong}") from wrong
        return frozenset()

    async def owners(self, digest: Digest) -> tuple[str, ...]:
        """The origins there, the owner of a blob first."""
        await self._describe()
        return tuple(self._origin_ring.order(str(digest)))

    async def put_manifest(
        self,
        repository: str,
        reference: str,
        media_type: str,
        content: bytes,
        change: api.TagChange | None = None,
    ) -> None:
        """Push a manifest there, by its digest, or under the tag that a change is of.

        By its digest it counts, if ``change`` says when it was put, unless it was deleted later there.
        """
        await self._describe()
        stamp, by = (None, "") if change is None else (change.stamp, change.by)
        await self._origin.put_manifest(
            repository, reference, media_type, content, stamp=stamp, by=by
        )

    async def delete_tag(self, repository: str, tag: str, change: api.TagChange) -> None:
        """Delete a tag there, if the deletion is later than what it is."""
        await self._index.delete_tag(repository, tag, stamp=change.stamp, by=change.by)

    async def delete_referrer(self, repository: str, digest: str, change: api.TagChange) -> None:
        """Delete a manifest that refers to another one there, if that is later than its last put."""
        try:
            await self._index.delete_tag(repository, digest, stamp=change.stamp, by=change.by)
        except ManifestNotFound as error:
            # One that knows of stamps of referrers keeps those of what it does not have.
            reason = (
                f"{self.name} is of a version to which deletions of referrers are not replicated: "
                "delete it there"
            )
            raise PushRefused(reason) from error

    async def _describe(self) -> None:
        """Know the origins there, as its indexes have them."""
        async with self._describing:
            now = trio.current_time()
            if not self._is_described or now - self._described_at < DESCRIPTION_BELIEVED:
                return
            description = await self._index.describe_cluster()
            try:
                for address in description.origins[:ORIGINS_MAX]:
                    parse_address(address)
                weights = _weights(description.weights[:ORIGINS_MAX])
                if description.origins != self._origin_ring.members:
                    log.info("remote_origins", remote=self.name, origins=description.origins)
                self._origin_ring.replace(description.origins[:ORIGINS_MAX], weights)
            except ValueError as error:
                reason = f"it describes its origins as what cannot be used: {error}"
                raise RpcFailed(self.name, api.DESCRIBE_CLUSTER.name, reason) from error
            if not description.origins:
                reason = "it does not say which origins it has: set cluster.origins at its indexes"
                raise RpcFailed(self.name, api.DESCRIBE_CLUSTER.name, reason)
            self._described_at = now


def _weights(entries: Iterable[str]) -> dict[str, float]:
    """As `ClusterConfig.weights_by_member`, of what another cluster says.  Raises ValueError."""
    weights = {}
    for entry in entries:
        member, _, text = entry.rpartition("=")
        try:
            weight = float(text)
        except ValueError:
            weight = math.nan
        # NaN is not above 0 either.
        if not 0.0 < weight < math.inf:
            raise ValueError(f"{entry[:120]!r} is no origin=weight with a number above 0")
        weights[member] = weight
    return weights
