"""The other roles as this role sees them: a ring of members behind typed methods.

Every call goes to the members in ring order until one answers.  An answer is also an error that says
something about what was asked for (`BlobNotFound`); only a member that does not answer at all is
passed over, and remembered as failing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeVar

import attrs
import structlog
import trio

from swarmpull.config import ClusterConfig
from swarmpull.digest import Digest
from swarmpull.errors import RpcUnavailable, SwarmpullError
from swarmpull.ring.membership import Membership
from swarmpull.swarm.metainfo import Metainfo
from swarmpull.swarm.peers import AnnounceState, PeerContact
from swarmpull.wire import api
from swarmpull.wire.api import (
    AnnounceReply,
    AnnounceRequest,
    Descriptor,
    Growth,
    HashesRequest,
    ListReply,
    MetainfoReply,
    PutManifestReply,
    RecordManifestRequest,
    UpstreamManifestReply,
    WatchReply,
    WatchRequest,
)
from swarmpull.wire.listen import parse_address
from swarmpull.wire.rpc import Method, RpcPool

log = structlog.get_logger()

Req = TypeVar("Req")
Rep = TypeVar("Rep")

# Seconds for a member to answer a call that needs no other host: after that the next one is asked.
LOOKUP_TIMEOUT: Final = 10.0
# A tracker answers from memory.  Three that hang are asked in less time than an announce may take in all
# (`swarmpull.roles.swarm_host.ANNOUNCE_TIMEOUT`).
ANNOUNCE_TIMEOUT: Final = 3.0
# A put or delete may wait for a busy backend, and is better answered late than done twice.
WRITE_TIMEOUT: Final = 60.0
# An origin may have to hash the whole blob before it has its metainfo: 10 GB at 17 MB/s.
METAINFO_TIMEOUT: Final = 600.0
# An upstream is asked several times before an origin gives up, and may want to be left alone in between.
UPSTREAM_TIMEOUT: Final = 60.0
# An origin answers when the blob is on its disk and on those of its replicas.
ADOPT_TIMEOUT: Final = 3600.0
# Blobs of which a host remembers where it announced them, some 200 bytes each; as many as a tracker keeps.
ANNOUNCED_MAX: Final = 100_000


class RingClient:
    """Calls the members of one ring.

    ``name`` says in errors which ring it is: tracker, origin, index; that of ``members`` by default.
    """

    def __init__(self, pool: RpcPool, members: Membership, name: str | None = None) -> None:
        self._pool = pool
        self.members = members
        self.name = name or members.name

    def when_lost(self, tell: Callable[[str], None]) -> None:
        """Call ``tell(address)`` whenever a member that we are connected to went away; see `RpcPool`."""
        self._pool.when_lost(tell)

    async def call(
        self, key: str, method: Method[Req, Rep], request: Req, *, timeout: float
    ) -> Rep:
        """Call the first member that answers, in the order that the ring has for ``key``.

        ``timeout`` is in seconds and for each member: a call of a ring whose hosts are all silent takes
        as often that.  A member that did not answer may have done what was asked.

        Raises:
            RpcUnavailable: no member answered; the reason has what each of them failed with.
            RpcFailed: a member failed in a way that has no type.
            SwarmpullError: the errors of the method.
        """
        _, reply = await self.call_member(key, method, request, timeout=timeout)
        return reply

    async def call_member(
        self, key: str, method: Method[Req, Rep], request: Req, *, timeout: float
    ) -> tuple[str, Rep]:
        """The same as `call`, with the address of the member that answered before its reply."""
        failures: dict[str, str] = {}
        for address in self.members.order(key):
            try:
                reply = await self._pool.call(address, method, request, timeout=timeout)
            except RpcUnavailable as exc:
                self.members.record_failure(address, exc.reason)
                log.info("rpc_member_passed_over", method=method.name, key=key, error=str(exc))
                failures[address] = exc.reason
            except SwarmpullError:
                self.members.record_success(address)
                raise
            else:
                self.members.record_success(address)
                return address, reply
        raise self._nobody_answered(method.name, failures)

    async def call_first(
        self, key: str, method: Method[Req, Rep], request: Req, *, timeout: float
    ) -> Rep:
        """Call only the member that is asked first for ``key``, whatever comes of it.

        For calls that wait for long: many of them end at once when their connection does, which says no more
        about the member than one failure, and that the next ordinary call will find out.

        Raises:
            RpcUnavailable: it did not answer within ``timeout`` seconds.
            RpcFailed: it failed in a way that has no type, or does not know the method.
            SwarmpullError: the errors of the method.
        """
        for address in self.members.order(key):
            return await self._pool.call(address, method, request, timeout=timeout)
        raise self._nobody_answered(method.name, {})

    def _nobody_answered(self, method: str, failures: dict[str, str]) -> RpcUnavailable:
        where = f"{self.name} ring ({', '.join(failures or self.members.entries)})"
        if not failures:
            return RpcUnavailable(
                where, method, f"no {self.name} is known: configure or resolve one"
            )
        tried = "; ".join(f"{address}: {reason}" for address, reason in failures.items())
        return RpcUnavailable(where, method, f"no member answered: {tried}")


class TrackerClient:
    """Announces to the trackers, and waits there for peers.

    Attributes:
        on_lost: is told of the blobs whose tracker went away: its successor knows nobody.
    """

    def __init__(self, ring: RingClient) -> None:
        self.on_lost: Callable[[tuple[Digest, ...]], None] | None = None
        self._ring = ring
        # Who answered the last announce of each blob, the latest at the end.
        self._announced: dict[Digest, str] = {}
        ring.when_lost(self._lost)

    def _lost(self, address: str) -> None:
        digests = tuple(digest for digest, there in self._announced.items() if there == address)
        if digests and self.on_lost is not None:
            log.info("tracker_lost", tracker=address, blobs=len(digests))
            self.on_lost(digests)

    async def announce(
        self, request: AnnounceRequest, *, timeout: float | None = None
    ) -> AnnounceReply:
        """Announce to the tracker of this blob, or to another one while that is down.

        ``timeout`` in seconds is for each tracker, and by default longer when metainfo is wanted, because the
        tracker asks an origin for it.

        Raises:
            BlobNotFound: metainfo is wanted and no origin can get the blob.
            BackendUnavailable: metainfo is wanted and no origin answers.
            RpcUnavailable: no tracker answers.
        """
        if timeout is None:
            timeout = METAINFO_TIMEOUT if request.want_metainfo else ANNOUNCE_TIMEOUT
        if request.state is AnnounceState.STOPPED:
            self._announced.pop(request.digest, None)
        address, reply = await self._ring.call_member(
            str(request.digest), api.ANNOUNCE, request, timeout=timeout
        )
        if request.state is not AnnounceState.STOPPED:
            self._remember(request.digest, address)
        return reply

    def _remember(self, digest: Digest, address: str) -> None:
        self._announced.pop(digest, None)
        self._announced[digest] = address
        if len(self._announced) > ANNOUNCED_MAX:
            del self._announced[next(iter(self._announced))]

    async def watch(self, request: WatchRequest) -> WatchReply:
        """Wait for peers to appear; without any the tracker answers when ``request.seconds`` are over.

        Raises:
            RpcUnavailable: the tracker of this blob does not answer, or went away meanwhile.
            RpcFailed: it does not offer watches.
        """
        timeout = request.seconds + LOOKUP_TIMEOUT
        return await self._ring.call_first(str(request.digest), api.WATCH, request, timeout=timeout)

    async def hashes(self, request: HashesRequest) -> Growth:
        """Wait for more piece hashes of a blob that an origin is still fetching.

        Raises:
            RpcUnavailable: the tracker of this blob does not answer, or went away meanwhile.
            RpcFailed: it does not know the method.
            SwarmpullError: there will be no more: BlobNotFound, BackendUnavailable, ...
        """
        timeout = request.seconds + LOOKUP_TIMEOUT
        key = str(request.digest)
        return await self._ring.call_first(key, api.HASHES, request, timeout=timeout)


class OriginClient:
    """What origins do for other roles; the owner of the blob is asked first."""

    def __init__(self, ring: RingClient) -> None:
        self._ring = ring

    async def stat_blob(
        self, digest: Digest, namespace: str = "", *, timeout: float = LOOKUP_TIMEOUT
    ) -> int:
        """Length in bytes.  Raises BlobNotFound."""
        request = api.BlobRequest(digest, namespace)
        reply = await self._ring.call(str(digest), api.STAT_BLOB, request, timeout=timeout)
        return reply.length

    async def get_metainfo(
        self,
        digest: Digest,
        namespace: str = "",
        *,
        growing: bool = False,
        decide: bool = False,
        timeout: float = METAINFO_TIMEOUT,
    ) -> MetainfoReply:
        """Metainfo and who seeds the blob from now on, always with a host.  Raises BlobNotFound.

        Args:
            growing: take metainfo of which more becomes known, while the origin is fetching the blob.
            decide: the origin gets the blob from the backend itself, and asks no other one.
        """
        request = api.BlobRequest(digest, namespace, growing, decide)
        address, reply = await self._ring.call_member(
            str(digest), api.GET_METAINFO, request, timeout=timeout
        )
        host, _ = parse_address(address)
        return attrs.evolve(reply, seeder=reply.seeder.seen_at(host))

    async def hashes(self, request: HashesRequest) -> Growth:
        """Wait for more piece hashes of a blob that is still being fetched.

        An origin that does not have it begins to get it, so any of them can answer.

        Raises:
            RpcUnavailable: no origin answers.
            SwarmpullError: there will be no more: BlobNotFound, BackendUnavailable, ...
        """
        timeout = request.seconds + LOOKUP_TIMEOUT
        key = str(request.digest)
        return await self._ring.call(key, api.HASHES_OF_ORIGIN, request, timeout=timeout)

    async def urge(self, digest: Digest, indices: tuple[int, ...]) -> None:
        """Have the origin of a blob fetch these pieces first, if it is fetching it.

        Raises:
            RpcUnavailable: it does not answer.
            RpcFailed: it does not know the method.
        """
        request = api.UrgeRequest(digest, indices)
        await self._ring.call_first(str(digest), api.URGE, request, timeout=LOOKUP_TIMEOUT)

    async def adopt_blob(
        self,
        metainfo: Metainfo,
        namespace: str,
        source: PeerContact,
        *,
        timeout: float = ADOPT_TIMEOUT,
    ) -> None:
        """Return when an origin has fetched the blob from ``source`` and accepted it."""
        request = api.AdoptRequest(metainfo, namespace, source)
        await self._ring.call(str(metainfo.digest), api.ADOPT_BLOB, request, timeout=timeout)

    async def put_manifest(
        self,
        repository: str,
        reference: str,
        media_type: str,
        content: bytes,
        *,
        timeout: float = WRITE_TIMEOUT,
    ) -> PutManifestReply:
        """Push a manifest.  Raises ManifestInvalid, ManifestReferencesMissing."""
        request = api.PutManifestRequest(repository, reference, media_type, content)
        key = str(Digest.of(content))
        return await self._ring.call(key, api.PUT_MANIFEST, request, timeout=timeout)

    async def mount_blob(
        self,
        repository: str,
        digest: Digest,
        source: str,
        *,
        timeout: float = ADOPT_TIMEOUT,
    ) -> bool:
        """Make a blob of another repository part of this one; False if that does not have it."""
        request = api.MountRequest(repository, source, digest)
        reply = await self._ring.call(str(digest), api.MOUNT_BLOB, request, timeout=timeout)
        return reply.found

    async def resolve_upstream(
        self, repository: str, reference: str, *, timeout: float = UPSTREAM_TIMEOUT
    ) -> Descriptor:
        """Look up a tag or digest of an upstream.

        All calls about one repository go to the same origin while it is healthy: what it has learnt from
        the upstream is shared.

        Raises:
            UpstreamUnknown, ManifestNotFound, BackendUnavailable, UpstreamBusy, UpstreamRefused.
        """
        request = api.ReferenceRequest(repository, reference)
        return await self._ring.call(repository, api.RESOLVE_UPSTREAM, request, timeout=timeout)

    async def get_upstream_manifest(
        self, repository: str, reference: str, *, timeout: float = UPSTREAM_TIMEOUT
    ) -> UpstreamManifestReply:
        """A manifest of an upstream with its content.  Raises what `resolve_upstream` does."""
        request = api.ReferenceRequest(repository, reference)
        return await self._ring.call(
            repository, api.GET_UPSTREAM_MANIFEST, request, timeout=timeout
        )


class IndexClient:
    """Repositories: tags, manifests and what belongs to them.

    Every index can answer for every repository.  All calls about one repository go to the same index
    while it is healthy, because that is where concurrent puts are put in order.
    """

    def __init__(self, ring: RingClient) -> None:
        self._ring = ring

    async def resolve(self, repository: str, reference: str) -> Descriptor:
        """Look up a tag or a digest.  Raises ManifestNotFound, RepositoryNotFound."""
        request = api.ReferenceRequest(repository, reference)
        return await self._read(repository, api.RESOLVE, request)

    async def check_references(
        self,
        repository: str,
        *,
        blobs: tuple[Digest, ...] = (),
        manifests: tuple[Digest, ...] = (),
    ) -> None:
        """Raises ManifestReferencesMissing when the repository lacks any of these."""
        request = api.CheckReferencesRequest(repository, blobs, manifests)
        await self._read(repository, api.CHECK_REFERENCES, request)

    async def record_manifest(self, request: RecordManifestRequest) -> None:
        """Enter a manifest whose bytes are durable.  Raises ManifestReferencesMissing."""
        await self._write(request.repository, api.RECORD_MANIFEST, request)

    async def delete_manifest(self, repository: str, digest: Digest) -> None:
        """Remove a manifest and every tag that points to it.  Raises ManifestNotFound."""
        request = api.DigestInRepository(repository, digest)
        await self._write(repository, api.DELETE_MANIFEST, request)

    async def delete_tag(self, repository: str, tag: str) -> None:
        """Raises ManifestNotFound."""
        request = api.ReferenceRequest(repository, tag)
        await self._write(repository, api.DELETE_TAG, request)

    async def link_blob(self, repository: str, digest: Digest) -> None:
        """Make a blob part of a repository; once more is no error."""
        request = api.DigestInRepository(repository, digest)
        await self._write(repository, api.LINK_BLOB, request)

    async def unlink_blob(self, repository: str, digest: Digest) -> None:
        """Take a blob out of a repository.  Raises BlobNotFound."""
        request = api.DigestInRepository(repository, digest)
        await self._write(repository, api.UNLINK_BLOB, request)

    async def has_blob(self, repository: str, digest: Digest) -> bool:
        request = api.DigestInRepository(repository, digest)
        return (await self._read(repository, api.HAS_BLOB, request)).found

    async def list_tags(self, repository: str, *, after: str = "", limit: int = 1000) -> ListReply:
        """A page of tags in byte order.  Raises RepositoryNotFound."""
        request = api.ListRequest(repository, after, limit)
        return await self._read(repository, api.LIST_TAGS, request)

    async def list_repositories(self, *, after: str = "", limit: int = 1000) -> ListReply:
        """A page of repository names in byte order."""
        request = api.ListRequest("", after, limit)
        return await self._read("", api.LIST_REPOSITORIES, request)

    async def list_referrers(self, repository: str, digest: Digest) -> tuple[Descriptor, ...]:
        """The manifests whose subject is ``digest``; none for a digest that is not known."""
        request = api.DigestInRepository(repository, digest)
        return (await self._read(repository, api.LIST_REFERRERS, request)).manifests

    async def _read(self, repository: str, method: Method[Req, Rep], request: Req) -> Rep:
        return await self._ring.call(repository, method, request, timeout=LOOKUP_TIMEOUT)

    async def _write(self, repository: str, method: Method[Req, Rep], request: Req) -> Rep:
        return await self._ring.call(repository, method, request, timeout=WRITE_TIMEOUT)


class Cluster:
    """The three rings of the configuration, for a role that calls them."""

    def __init__(self, pool: RpcPool, config: ClusterConfig) -> None:
        self.trackers = RingClient(pool, Membership(config.trackers, name="tracker"))
        self.origins = RingClient(pool, Membership(config.origins, name="origin"))
        self.indexes = RingClient(pool, Membership(config.indexes, name="index"))
        self.tracker = TrackerClient(self.trackers)
        self.origin = OriginClient(self.origins)
        self.index = IndexClient(self.indexes)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep DNS names resolved until cancelled; started once each was tried."""
        async with trio.open_nursery() as nursery:
            for ring in (self.trackers, self.origins, self.indexes):
                await nursery.start(ring.members.run)
            task_status.started()
