"""The other roles as this role sees them: a ring of members behind typed methods.

Every call goes to the members in ring order until one answers; `swarmpull.roles.ring_client` says how.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, TypeVar

import attrs
import structlog
import trio

from swarmpull.config import ClusterConfig
from swarmpull.digest import Digest
from swarmpull.errors import BackendUnavailable, RpcUnavailable, StoreFull, StoreUnavailable
from swarmpull.ring.announced import Announced
from swarmpull.roles.config_changes import ConfigChanges
from swarmpull.roles.held_announces import HeldAnnounces, Told
from swarmpull.roles.ring_client import RingClient, open_ring
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
from swarmpull.wire.preheat_api import GET_MANIFEST
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
# A tracker that began so many seconds ago may not have heard of all yet: completed peers announce
# themselves every 60 to 66 s.  A leecher that it gives fewer peers than that asks the next tracker in
# turn with it, where those may still be that have not noticed that this one is back.
YOUNG: Final = 90.0
PEERS_ENOUGH: Final = 20
# The name of the backend in the error of a tracker that reaches no origin.
ORIGIN_RING: Final = "origin ring"
TRACKER_RING: Final = "tracker ring"
# Of one origin's disk, which is no reason why another one could not take or give a blob.
NO_ROOM: Final = (StoreFull, StoreUnavailable)


class TrackerClient:
    """Announces to the trackers, and waits there for peers.

    Attributes:
        on_lost: is told of the blobs that have to be announced anew, because their tracker went away, hangs,
            was restarted, or is not the first one of the ring any more.
    """

    def __init__(self, ring: RingClient) -> None:
        self.on_lost: Callable[[tuple[Digest, ...]], None] | None = None
        self._ring = ring
        self._announced = Announced(ANNOUNCED_MAX)
        self._held = HeldAnnounces(
            ring, self._announced, self.announce, ANNOUNCE_TIMEOUT, self._restarted
        )
        ring.when_lost(self._lost)
        ring.members.when_changed(self._changed)

    def _lost(self, address: str) -> None:
        self._announce_anew("tracker_lost", address, self._announced.gone(address))

    def _changed(self, address: str, healthy: bool) -> None:
        if healthy:
            self._announce_anew("tracker_back", address, self._announced.back(address))
        else:
            self._lost(address)

    def _announce_anew(self, event: str, address: str, digests: tuple[Digest, ...]) -> None:
        if digests and self.on_lost is not None:
            log.info(event, tracker=address, blobs=len(digests))
            self.on_lost(digests)

    def _restarted(self, address: str, digests: tuple[Digest, ...]) -> None:
        self._announce_anew("tracker_restarted", address, digests)

    def give_metainfo(self, metainfo_of: Callable[[Digest], Awaitable[Metainfo]]) -> None:
        """Give trackers the metainfo of blobs that this host has, when no origin can."""
        self._held.metainfo_of = metainfo_of

    async def announce_held(
        self, contact: PeerContact, digests: Sequence[Digest], told: Told
    ) -> None:
        """Announce blobs that this host has, in one message to each tracker; see `HeldAnnounces`."""
        await self._held.announce(contact, digests, told)

    async def announce(
        self, request: AnnounceRequest, *, timeout: float | None = None, insist: bool = False
    ) -> AnnounceReply:
        """Announce to the tracker of this blob, or to another one while that is down.

        ``timeout`` in seconds is for each tracker, and by default longer when metainfo is wanted, because the
        tracker asks an origin for it.  Whoever wants metainfo is told at once when no tracker has answered of
        late, unless it does ``insist``.

        Raises:
            BlobNotFound: metainfo is wanted and no origin can get the blob.
            BackendUnavailable: metainfo is wanted and no origin answers.
            RpcUnavailable: no tracker answers, or none of them has of late and there is no time to try.
        """
        if timeout is None:
            timeout = METAINFO_TIMEOUT if request.want_metainfo else ANNOUNCE_TIMEOUT
        if request.state is AnnounceState.STOPPED:
            self._announced.forget(request.digest)
        former = self._announced.place(request.digest)
        # Only who looks for peers: a seeder would be missed where it belongs until its next announce.
        elsewhere = (
            former is not None
            and former.is_short
            and request.state is AnnounceState.LEECHING
            and not request.want_metainfo
        )
        address, reply = await self._announce_to(
            self._order(request, elsewhere, insist), request, timeout
        )
        if request.state is AnnounceState.STOPPED:
            return reply
        if reply.wanted:
            await self._held.give_metainfo(address, request.digest)
        anew = self._announced.answered_by(request.digest, address, reply.process)
        self._restarted(address, anew)
        return self._taken(request, address, reply, elsewhere=elsewhere)

    def _order(self, request: AnnounceRequest, elsewhere: bool, insist: bool) -> list[str]:
        members = self._ring.members
        order = members.order(str(request.digest))
        ill = set(members.unhealthy())
        if request.want_metainfo and order and not insist and ill.issuperset(order):
            # A reader waits, and origins can answer; probes tell when a tracker is back.
            raise RpcUnavailable(", ".join(order), api.ANNOUNCE.name, "no tracker answered of late")
        if elsewhere and len(order) > 1 and order[1] not in ill:
            order[:2] = order[1], order[0]
        return order

    async def _announce_to(
        self, order: list[str], request: AnnounceRequest, timeout: float
    ) -> tuple[str, AnnounceReply]:
        """The first tracker that answers, and its reply.

        One that reaches no origin is no reason to give up: another one may know metainfo and seeders.
        """
        failure: BackendUnavailable | None = None
        while True:
            try:
                return await self._ring.call_member(
                    str(request.digest), api.ANNOUNCE, request, timeout=timeout, order=order
                )
            except BackendUnavailable as error:
                if error.backend != ORIGIN_RING:
                    raise
                failure, order = failure or error, order[1:]
            except RpcUnavailable:
                if failure is not None:
                    raise failure from None
                raise

    def _taken(
        self, request: AnnounceRequest, address: str, reply: AnnounceReply, *, elsewhere: bool
    ) -> AnnounceReply:
        """Remember where a blob is announced, and whom to ask the next time."""
        digest = request.digest
        former = self._announced.place(digest)
        preferred = self._ring.members.preference(str(digest))
        if elsewhere and former is not None and former.tracker != address:
            self._announced.asked_elsewhere(digest)
            # It was asked for its peers only: the blob belongs where it is, and is watched there.
            return attrs.evolve(reply, position=former.position)
        complete = request.state is AnnounceState.COMPLETE
        is_young = reply.age is not None and reply.age < YOUNG
        is_short = len(reply.peers) < PEERS_ENOUGH and not complete and len(preferred) > 1
        self._announced.put(
            digest,
            address,
            preferred,
            reply.position,
            complete=complete,
            is_short=is_young and is_short,
        )
        return reply

    def _where(self, digest: Digest) -> str | None:
        place = self._announced.place(digest)
        return None if place is None else place.tracker

    async def watch(self, request: WatchRequest) -> WatchReply:
        """Wait for peers to appear; without any the tracker answers when ``request.seconds`` are over.

        Raises:
            RpcUnavailable: the tracker of this blob does not answer, or went away meanwhile.
            RpcFailed: it does not offer watches.
        """
        timeout = request.seconds + LOOKUP_TIMEOUT
        return await self._ring.call_first(
            str(request.digest),
            api.WATCH,
            request,
            timeout=timeout,
            at=self._where(request.digest),
        )

    async def hashes(self, request: HashesRequest) -> Growth:
        """Wait for more piece hashes of a blob that an origin is still fetching.

        Raises:
            RpcUnavailable: the tracker of this blob does not answer, or went away meanwhile.
            RpcFailed: it does not know the method.
            SwarmpullError: there will be no more: BlobNotFound, BackendUnavailable, ...
        """
        timeout = request.seconds + LOOKUP_TIMEOUT
        return await self._ring.call_first(
            str(request.digest),
            api.HASHES,
            request,
            timeout=timeout,
            at=self._where(request.digest),
        )


class OriginClient:
    """What origins do for other roles; the owner of the blob is asked first."""

    def __init__(self, ring: RingClient) -> None:
        self._ring = ring

    async def stat_blob(
        self, digest: Digest, namespace: str = "", *, timeout: float = LOOKUP_TIMEOUT
    ) -> int:
        """Length in bytes.  Raises BlobNotFound."""
        request = api.BlobRequest(digest, namespace)
        _, reply = await self._ring.look_up(str(digest), api.STAT_BLOB, request, timeout=timeout)
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
        # Not looked up at two of them: each origin that is asked begins to get the blob.
        order = self._ring.members.order(str(digest), pass_suspects=not decide)
        address, reply = await self._ring.call_member(
            str(digest), api.GET_METAINFO, request, timeout=timeout, order=order, unable=NO_ROOM
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
        return await self._ring.call(
            key, api.HASHES_OF_ORIGIN, request, timeout=timeout, patience=0.0
        )

    async def urge(self, digest: Digest, indices: tuple[int, ...]) -> None:
        """Have the origin of a blob fetch these pieces first, if it is fetching it.

        Raises:
            RpcUnavailable: it does not answer.
            RpcFailed: it does not know the method.
        """
        request = api.UrgeRequest(digest, indices)
        await self._ring.call_first(str(digest), api.URGE, request, timeout=LOOKUP_TIMEOUT)

    async def peers(self, digest: Digest) -> tuple[PeerContact, ...]:
        """The agents that are connected for a blob to the origin that is asked first.

        Raises:
            RpcUnavailable: no origin answers.
            RpcFailed: it does not know the method.
        """
        request = api.PeersRequest(digest)
        reply = await self._ring.call_first(
            str(digest), api.PEERS_OF_ORIGIN, request, timeout=LOOKUP_TIMEOUT
        )
        return reply.peers

    async def adopt_blob(
        self,
        metainfo: Metainfo,
        namespace: str,
        source: PeerContact,
        *,
        timeout: float = ADOPT_TIMEOUT,
    ) -> None:
        """Return when an origin has fetched the blob from ``source`` and accepted it.

        Raises StoreFull when none has room for it.
        """
        request = api.AdoptRequest(metainfo, namespace, source)
        key = str(metainfo.digest)
        await self._ring.call(key, api.ADOPT_BLOB, request, timeout=timeout, unable=NO_ROOM)

    async def read_manifest(self, digest: Digest, namespace: str) -> bytes:
        """The bytes of a manifest.  Raises BlobNotFound, BackendUnavailable."""
        request = api.BlobRequest(digest, namespace)
        reply = await self._ring.call(
            str(digest), api.READ_MANIFEST, request, timeout=WRITE_TIMEOUT, unable=NO_ROOM
        )
        return reply.content

    async def hand_over(self, request: api.HandOverRequest) -> api.HandOverReply:
        """Have a blob handed to another cluster, or hear how far that is.

        Raises what `swarmpull.roles.hand_over.HandOvers.hand_over` does.
        """
        timeout = request.seconds + WRITE_TIMEOUT
        return await self._ring.call(str(request.digest), api.HAND_OVER, request, timeout=timeout)

    async def put_manifest(
        self,
        repository: str,
        reference: str,
        media_type: str,
        content: bytes,
        *,
        stamp: api.Stamp | None = None,
        by: str = "",
        expect: str | None = None,
        timeout: float = WRITE_TIMEOUT,
    ) -> PutManifestReply:
        """Push a manifest.

        Raises ManifestInvalid, ManifestReferencesMissing, TagChanged, TagImmutable.

        ``stamp`` and ``by`` are of a change of the tag that was made in another cluster.
        """
        request = api.PutManifestRequest(
            repository, reference, media_type, content, stamp, by, expect
        )
        key = str(Digest.of(content))
        return await self._ring.call(
            key, api.PUT_MANIFEST, request, timeout=timeout, unable=NO_ROOM
        )

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
        reply = await self._ring.call(
            str(digest), api.MOUNT_BLOB, request, timeout=timeout, unable=NO_ROOM
        )
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

    async def get_manifest(
        self, repository: str, reference: str, *, timeout: float = UPSTREAM_TIMEOUT
    ) -> UpstreamManifestReply:
        """A manifest of the cluster or of an upstream with its content.

        Raises ManifestNotFound, RepositoryNotFound, and what `resolve_upstream` does.
        """
        request = api.ReferenceRequest(repository, reference)
        return await self._ring.call(repository, GET_MANIFEST, request, timeout=timeout)


class IndexClient:
    """Repositories: tags, manifests and what belongs to them.

    Every index can answer for every repository.  All changes of one repository go to the same index
    while it is healthy, because that is where concurrent puts are put in order.  Reads of one repository go
    to any of them, which is another one for each process, so that a popular repository is read from all.
    """

    def __init__(self, ring: RingClient) -> None:
        self._ring = ring
        self._salt = random.getrandbits(32)

    async def resolve(self, repository: str, reference: str) -> Descriptor:
        """Look up a tag or a digest.  Raises ManifestNotFound, RepositoryNotFound."""
        request = api.ReferenceRequest(repository, reference)
        return await self._read(repository, api.RESOLVE, request)

    async def tag_log(self, repository: str, tag: str) -> api.TagLogReply:
        """The last changes of a tag.  Raises ManifestNotFound, RepositoryNotFound."""
        request = api.ReferenceRequest(repository, tag)
        return await self._read(repository, api.TAG_LOG, request)

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

    async def delete_tag(
        self,
        repository: str,
        tag: str,
        *,
        stamp: api.Stamp | None = None,
        by: str = "",
        expect: str | None = None,
    ) -> None:
        """Raises ManifestNotFound, TagChanged, TagImmutable.

        A deletion that was made in another cluster has its stamp, and may be of a tag that is not here.
        """
        request = api.DeleteTagRequest(repository, tag, stamp, by, expect)
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

    async def describe_cluster(self) -> api.ClusterDescription:
        """Which origins this cluster has."""
        return await self._read("", api.DESCRIBE_CLUSTER, api.Empty())

    async def list_referrers(self, repository: str, digest: Digest) -> tuple[Descriptor, ...]:
        """The manifests whose subject is ``digest``; none for a digest that is not known."""
        request = api.DigestInRepository(repository, digest)
        return (await self._read(repository, api.LIST_REFERRERS, request)).manifests

    async def _read(self, repository: str, method: Method[Req, Rep], request: Req) -> Rep:
        # Every index reads the same backend.
        key = f"{repository} {self._salt}"
        _, reply = await self._ring.look_up(key, method, request, timeout=LOOKUP_TIMEOUT)
        return reply

    async def _write(self, repository: str, method: Method[Req, Rep], request: Req) -> Rep:
        return await self._ring.call(repository, method, request, timeout=WRITE_TIMEOUT)


class Cluster:
    """The three rings of the configuration, for a role that calls them."""

    def __init__(
        self, pool: RpcPool, config: ClusterConfig, changes: ConfigChanges | None = None
    ) -> None:
        """``changes``: whoever tells of another configuration; None when nobody does."""
        weights = config.weights_by_member()
        self.trackers = RingClient(pool, open_ring(pool, config.trackers, "tracker", weights))
        self.origins = RingClient(pool, open_ring(pool, config.origins, "origin", weights))
        self.indexes = RingClient(pool, open_ring(pool, config.indexes, "index", weights))
        if changes is not None:
            changes.follow(
                trackers=self.trackers.members,
                origins=self.origins.members,
                indexes=self.indexes.members,
            )
        self.tracker = TrackerClient(self.trackers)
        self.origin = OriginClient(self.origins)
        self.index = IndexClient(self.indexes)

    @property
    def rings(self) -> tuple[RingClient, ...]:
        """Those of the trackers, the origins, and the indexes."""
        return self.trackers, self.origins, self.indexes

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep DNS names resolved and members probed until cancelled; started once each name was tried."""
        async with trio.open_nursery() as nursery:
            for ring in self.rings:
                await nursery.start(ring.members.run)
            task_status.started()
