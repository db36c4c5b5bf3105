"""The RPC methods between roles, with their request and reply bodies.

Bodies are attrs classes; cattrs turns them into MessagePack maps by field name, so a field with a
default may be added without breaking an older peer.  ``docs/protocol.md`` has the table.
"""

from __future__ import annotations

from typing import Final

import attrs

from swarmpull.digest import Digest
from swarmpull.swarm.metainfo import Metainfo
from swarmpull.swarm.peers import AnnounceState, PeerContact
from swarmpull.wire.rpc_messages import Method

# Up to here a blob travels whole with its metainfo: two calls instead of a connection and a piece exchange.
INLINE_BYTES_MAX: Final = 64 << 10
# Blobs that are announced in one message: some 20 kB, and two or three milliseconds of a tracker's time.
HELD_BLOBS_MAX: Final = 256


@attrs.frozen
class Empty:
    """A reply that only says "done"."""


# Answered by every role, from memory.  Any answer says that the process is alive, also that the method is
# unknown.
# A probe that waited behind slow calls would take a member for dead that is only slow.
PING: Final = Method("ping", Empty, Empty, at_once=True)


# --- metainfo that grows ------------------------------------------------------------------------


@attrs.frozen
class Growth:
    """What is known of the metainfo of a blob that an origin is still fetching: its shape and some hashes.

    The hashes are a part of the log of one source, in the order in which they became known there.

    Attributes:
        length: of the blob, in bytes.
        piece_length: of every piece but the last, in bytes.
        source: names the log: a position in another one, such as that of a restarted origin, means nothing.
        position: how many entries of the log there are up to the last one here.
        indices: the pieces whose hashes these are; at most 4096.
        hashes: 32 bytes for each of them, joined.
        settled: these are the last ones, and the whole blob has matched its digest.  Until then it may still
            turn out to be wrong, or not to come, and asking for more says so.
    """

    length: int
    piece_length: int
    source: str
    position: int
    indices: tuple[int, ...]
    hashes: bytes = attrs.field(repr=False)
    settled: bool = False


@attrs.frozen
class HashesRequest:
    """Wait until more hashes of a blob are known than the caller has, or how it ends.

    Attributes:
        digest: the blob.
        namespace: the repository through which it was asked for; empty for a generic blob.
        source, position: how far the caller has read in which log; empty and 0 if in none.  In another log
            than that of the callee it begins anew.
        seconds: for which to wait at most.
        decide: as in `BlobRequest`.
    """

    digest: Digest
    namespace: str
    source: str
    position: int
    seconds: float
    decide: bool = False


# --- tracker ----------------------------------------------------------------------------------


@attrs.frozen
class AnnounceRequest:
    """An agent or origin tells the tracker that it takes part in the swarm of a blob.

    Attributes:
        digest: the blob.
        namespace: the repository through which the blob was asked for; empty for a generic blob.
        peer: the announcer; an empty host means "as you see me".
        state: leeching, complete or stopped.
        want_metainfo: also return the metainfo (the first announce of a download).
        growing: the announcer takes metainfo that grows; else the answer waits until it is settled.
    """

    digest: Digest
    namespace: str
    peer: PeerContact
    state: AnnounceState
    want_metainfo: bool = False
    growing: bool = False


@attrs.frozen
class AnnounceReply:
    """The handout.

    Attributes:
        peers: at most 50, in the order to dial them in (`swarmpull.swarm.handout`); never the announcer.
        interval: seconds until the next announce is due.
        metainfo: when it was wanted, of a blob that some origin has.
        position: where a watch goes on from this handout; None from a tracker that offers none.
        content: the whole blob, when metainfo was wanted and it has at most INLINE_BYTES_MAX; to be verified.
        growth: when metainfo was wanted of a blob that is being fetched; `HASHES` tells of more.
        process: names the tracker's process: another one has lost what was announced to the former; empty
            from a tracker that does not say.
        age: seconds since it began; None from a tracker that does not say.
        wanted: metainfo of the blob is asked for, and no origin can give it: the caller, who has the blob,
            may (`GIVE_METAINFO`).
    """

    peers: tuple[PeerContact, ...]
    interval: float
    metainfo: Metainfo | None = None
    position: int | None = None
    content: bytes | None = attrs.field(default=None, repr=False)
    growth: Growth | None = None
    process: str = ""
    age: float | None = None
    wanted: bool = False


@attrs.frozen
class AnnounceHeldRequest:
    """A host says that it has all of these blobs: the same as an announce of each as complete.

    Attributes:
        peer: as in `AnnounceRequest`.
        digests: at most HELD_BLOBS_MAX.
    """

    peer: PeerContact
    digests: tuple[Digest, ...]


@attrs.frozen
class BlobLeechers:
    """Who is fetching a blob."""

    digest: Digest
    peers: tuple[PeerContact, ...]


@attrs.frozen
class AnnounceHeldReply:
    """The answer to an announce of many blobs.

    Attributes:
        interval: seconds until the next announce of all of them is due.
        leechers: of those blobs that have any, and not more than a few.
        process, age: as in `AnnounceReply`.
        wanted: of those blobs, some whose metainfo is asked for, and that no origin can give: the caller may
            (`GIVE_METAINFO`).
    """

    interval: float
    leechers: tuple[BlobLeechers, ...] = ()
    process: str = ""
    age: float | None = None
    wanted: tuple[Digest, ...] = ()


@attrs.frozen
class GiveMetainfoRequest:
    """Metainfo of a blob that the caller has, to a tracker that has said that it wants it."""

    metainfo: Metainfo


@attrs.frozen
class WatchRequest:
    """A leecher that is short of connections waits until peers appear in the swarm of a blob.

    Attributes:
        digest: the blob.
        peer_id: the caller, as it has announced itself; a former watch of the two ends.
        position: after which arrival to begin: that of the last handout, or of the last watch.
        seconds: for which to wait at most; the tracker may answer sooner.
    """

    digest: Digest
    peer_id: str
    position: int
    seconds: float


@attrs.frozen
class WatchReply:
    """Who has appeared: at most 8, the last one first; nobody when the time is up.

    ``position`` is where the next watch goes on; None when there is to be none before the next announce:
    the tracker has too many, or shuts down, or the caller is not a leecher of that blob.
    """

    peers: tuple[PeerContact, ...]
    position: int | None = None


# Raises BlobNotFound when metainfo is wanted and no origin can get the blob.
ANNOUNCE: Final = Method("tracker.announce", AnnounceRequest, AnnounceReply)
ANNOUNCE_HELD: Final = Method("tracker.announce_held", AnnounceHeldRequest, AnnounceHeldReply)
GIVE_METAINFO: Final = Method("tracker.give_metainfo", GiveMetainfoRequest, Empty)
WATCH: Final = Method("tracker.watch", WatchRequest, WatchReply)
# Raises what HASHES_OF_ORIGIN does.
HASHES: Final = Method("tracker.hashes", HashesRequest, Growth)


# --- origin -----------------------------------------------------------------------------------


@attrs.frozen
class BlobRequest:
    """Which blob.

    Attributes:
        digest: the blob.
        namespace: the repository through which it was asked for; empty for a generic blob.
        growing: the caller takes metainfo that grows; else the answer waits until the blob is here.
        decide: the callee is to get the blob from the backend itself, and to ask no other origin.
    """

    digest: Digest
    namespace: str = ""
    growing: bool = False
    decide: bool = False


@attrs.frozen
class HeldRequest:
    """Ask an origin for a blob of its own disk: it asks nobody else, not even the backend.

    ``namespace`` is the repository through which it was pushed, for those who ask about the queue.
    """

    digest: Digest
    namespace: str = ""


@attrs.frozen
class HeldReply:
    """A blob of an origin's disk, and where that origin seeds it.

    ``write_back_rank`` is set as long as the origin has it in its write-back queue, for that namespace.
    """

    metainfo: Metainfo
    seeder: PeerContact
    write_back_rank: int | None = None


@attrs.frozen
class BlobStatReply:
    length: int


@attrs.frozen
class MetainfoReply:
    """Metainfo, and the origin that seeds the blob from now on.

    Either ``metainfo``, or ``growth`` while the blob is on its way.  ``content`` is the whole blob when it
    has at most INLINE_BYTES_MAX.
    """

    metainfo: Metainfo | None
    seeder: PeerContact
    content: bytes | None = attrs.field(default=None, repr=False)
    growth: Growth | None = None


@attrs.frozen
class UrgeRequest:
    """Readers wait for these pieces of a blob that the origin fetches, and no peer has them."""

    digest: Digest
    indices: tuple[int, ...]


@attrs.frozen
class PeersRequest:
    """Which agents are connected to the origin for a blob; asked when no tracker answers."""

    digest: Digest


@attrs.frozen
class PeersReply:
    """At most 50 of them, drawn at random."""

    peers: tuple[PeerContact, ...]


@attrs.frozen
class AdoptRequest:
    """Ask an origin to take a blob that the caller seeds, through the swarm, and to accept it.

    The origin answers when the push may be acknowledged: `docs/store.md` says what that means.
    """

    metainfo: Metainfo
    namespace: str
    source: PeerContact


@attrs.frozen
class ReplicateRequest:
    """An origin that accepts a blob asks another one to have it too, on its disk and in its queue.

    Attributes:
        metainfo: of the blob.
        namespace: the repository through which it was pushed; empty for a generic blob.
        source: the caller, which seeds it.
        rank: 1 and more: the later, the longer it leaves writing to the backend to those before it.
        seconds: for which the reply may wait; ask again as long as there is progress.
    """

    metainfo: Metainfo
    namespace: str
    source: PeerContact
    rank: int
    seconds: float


@attrs.frozen
class ReplicateReply:
    """How far it is.

    Attributes:
        stored: the blob is on the disk and in the queue.
        received: bytes that it has so far.
        itself: the caller has called itself.
    """

    stored: bool
    received: int = 0
    itself: bool = False


@attrs.frozen
class BlobOfRepository:
    """A blob, and the repository through which it was pushed; empty for a generic blob."""

    digest: Digest
    namespace: str = ""


@attrs.frozen
class QueuedRequest:
    """What of these blobs does an origin have?

    Attributes:
        peer_id: the caller.
        blobs: 1000 at most.
    """

    peer_id: str
    blobs: tuple[BlobOfRepository, ...]


@attrs.frozen
class QueuedReply:
    """For each of the blobs its rank in the queue.

    Of what is not queued: -1 when it is not on the disk, -2 when it is, -3 when this origin has written it.

    ``itself`` and no ranks when the caller has called itself.
    """

    ranks: tuple[int, ...] = ()
    itself: bool = False


@attrs.frozen
class Stamp:
    """When a tag was changed, in ns since 1970, and which index made the change; they sort in that order.

    A change keeps its stamp in every cluster that it is replicated to.
    """

    time: int
    source: str


@attrs.frozen
class OfferRequest:
    """Another cluster wants an origin to have a blob: does it need the bytes?

    Attributes:
        digest: the blob.
        namespace: the repository that it is to be part of.
        length: in bytes.
    """

    digest: Digest
    namespace: str
    length: int


@attrs.frozen
class OfferReply:
    """Whether the bytes are wanted; if not, the blob is part of the repository from now on.

    ``taker`` is the peer that will fetch them; ``tls`` says whether it exchanges pieces by TLS, and None that
    it is of a version which does not say.
    """

    wanted: bool
    taker: PeerContact
    tls: bool | None = None


@attrs.frozen
class HandOverRequest:
    """Have an origin of another cluster adopt a blob of this one.

    Attributes:
        digest: the blob.
        namespace: the repository that it belongs to, here and there.
        remote: the other cluster, by its name in the configuration.
        owners: its origins, the first one to be tried first.
        rate: bytes per second at which the callee sends to that cluster in all; None: as fast as it goes.
        seconds: for which the reply may wait; ask again as long as there is progress.
    """

    digest: Digest
    namespace: str
    remote: str
    owners: tuple[str, ...]
    rate: float | None
    seconds: float


@attrs.frozen
class HandOverReply:
    """How far it is.

    Attributes:
        done: the other cluster has the blob.
        sent: bytes that were sent there, by calls about this blob that are under way or were the last ones.
        length: of the blob.
    """

    done: bool
    sent: int
    length: int


@attrs.frozen
class ManifestReply:
    """The bytes of a manifest, exactly as pushed."""

    content: bytes = attrs.field(repr=False)


@attrs.frozen
class PutManifestRequest:
    """Push a manifest.

    Attributes:
        repository: where.
        reference: a tag, or the manifest's own digest.
        media_type: of the content.
        content: exactly as it is to be kept.
        stamp: of a change of the tag that was made in another cluster, as in `RecordManifestRequest`.
        by: who pushed it, here or there.
        expect: as in `RecordManifestRequest`.
    """

    repository: str
    reference: str
    media_type: str
    content: bytes = attrs.field(repr=False)
    stamp: Stamp | None = None
    by: str = ""
    expect: str | None = None


@attrs.frozen
class PutManifestReply:
    digest: Digest
    subject: Digest | None = None


@attrs.frozen
class MountRequest:
    """Make a blob of repository ``source`` part of ``repository`` too, in whatever backends they are."""

    repository: str
    source: str
    digest: Digest


STAT_BLOB: Final = Method("origin.stat_blob", BlobRequest, BlobStatReply)
GET_METAINFO: Final = Method("origin.get_metainfo", BlobRequest, MetainfoReply)
# Raises BlobNotFound, BackendUnavailable, DownloadFailed: there will be no more.
HASHES_OF_ORIGIN: Final = Method("origin.hashes", HashesRequest, Growth)
URGE: Final = Method("origin.urge", UrgeRequest, Empty)
PEERS_OF_ORIGIN: Final = Method("origin.peers", PeersRequest, PeersReply)
ADOPT_BLOB: Final = Method("origin.adopt_blob", AdoptRequest, Empty)
REPLICATE_BLOB: Final = Method("origin.replicate_blob", ReplicateRequest, ReplicateReply)
# Raises BlobNotFound.
HELD_BLOB: Final = Method("origin.held_blob", HeldRequest, HeldReply)
QUEUED: Final = Method("origin.queued", QueuedRequest, QueuedReply)
PUT_MANIFEST: Final = Method("origin.put_manifest", PutManifestRequest, PutManifestReply)
# Raises PushRefused.
OFFER_BLOB: Final = Method("origin.offer_blob", OfferRequest, OfferReply)
# Raises BlobNotFound, and what the origins of the other cluster do.
HAND_OVER: Final = Method("origin.hand_over", HandOverRequest, HandOverReply)
# Raises BlobNotFound, ManifestInvalid for what is too long to be a manifest.
READ_MANIFEST: Final = Method("origin.read_manifest", BlobRequest, ManifestReply)


# --- index ------------------------------------------------------------------------------------


@attrs.frozen
class Descriptor:
    """A manifest as the index knows it; annotations and artifact type as referrers list them.

    ``stale`` when it is of an upstream registry that could not be asked whether it still is the one.
    """

    digest: Digest
    media_type: str
    length: int
    artifact_type: str | None = None
    annotations: dict[str, str] | None = None
    stale: bool = False


@attrs.frozen
class ReferenceRequest:
    """A tag, or a digest as text, in a repository."""

    repository: str
    reference: str


@attrs.frozen
class TagChange:
    """One change of a tag.

    Attributes:
        stamp: of two changes the later one counts, wherever and in whatever order they arrive.
        digest: of the manifest that the tag names from then on; None when it was deleted.
        by: who asked for it, for people.
    """

    stamp: Stamp
    digest: Digest | None
    by: str = ""


@attrs.frozen
class TagLogReply:
    """The last changes of a tag, the latest one at the end; that says what the tag is."""

    changes: tuple[TagChange, ...]


@attrs.frozen
class DeleteTagRequest:
    """Remove a tag; with a stamp it may be a manifest that refers to another one.

    Attributes:
        repository: where.
        reference: the tag, or the digest of that manifest.
        stamp: of a deletion that was made in another cluster; it counts if it is later than what is here.
        by: who asked for it.
        expect: as in `RecordManifestRequest`.
    """

    repository: str
    reference: str
    stamp: Stamp | None = None
    by: str = ""
    expect: str | None = None


@attrs.frozen
class RecordManifestRequest:
    """Enter a manifest, whose bytes are durable already, into a repository.

    Attributes:
        repository: where.
        manifest: digest, media type, length; artifact type and annotations for referrers.
        tag: the tag to move to it, if any.
        subject: the manifest that this one refers to as its subject; need not exist.
        blobs: digests of config and layers that must be in the repository.
        manifests: digests of child manifests that must be in the repository.
        stamp: of a change of the tag that was made in another cluster; the tag moves if it is later than what
            the tag is here.
        by: who pushed it.
        expect: the digest that the tag has to name, ``*`` for any; empty when it must not be there; None when
            it does not matter.  A tag that names this manifest already does in any case.
    """

    repository: str
    manifest: Descriptor
    tag: str | None = None
    subject: Digest | None = None
    blobs: tuple[Digest, ...] = ()
    manifests: tuple[Digest, ...] = ()
    stamp: Stamp | None = None
    by: str = ""
    expect: str | None = None


@attrs.frozen
class DigestInRepository:
    repository: str
    digest: Digest


@attrs.frozen
class PendingChange:
    """A change that is acknowledged although the backend does not have it: one of the three.

    Attributes:
        link: a blob became part of a repository.
        manifest: a manifest was put; with a stamp if a tag was.
        deletion: a tag was deleted, with a stamp.
        at: when it was acknowledged, in ns; what was deleted after that stays deleted.
    """

    link: DigestInRepository | None = None
    manifest: RecordManifestRequest | None = None
    deletion: DeleteTagRequest | None = None
    at: int = 0


@attrs.frozen
class KeepPendingRequest:
    """Another index acknowledges changes while the backend is down: to be kept on the disk, too.

    Attributes:
        changes: in the order in which they were made.
        again: those that were set aside are to be tried once more.
        judged_by: the change of the same tag, by its id, that was taken for the last one when the only change
            was found to be allowed.
    """

    changes: tuple[PendingChange, ...]
    again: bool = False
    judged_by: str = ""


@attrs.frozen
class PendingKept:
    """They are.  ``process`` as in `ForgetReply`.

    ``sure``: the callee has not changed the tag in the backend since the change that they were judged by, and
    knows of no later one; without that nothing need be kept.
    """

    process: str
    sure: bool = False


@attrs.frozen
class DropPendingRequest:
    """Changes, by their ids, that are not to be written: nobody was told that they are made, or the operator
    drops them."""

    changes: tuple[str, ...]


@attrs.frozen
class PendingDropped:
    """Of these the ones that the callee has not written, and never will.  ``process`` as in `ForgetReply`."""

    process: str
    dropped: tuple[str, ...]


@attrs.frozen
class PendingRequest:
    """An index asks another one for what it keeps, or for what it has come to keep since the last time.

    Attributes:
        process: of the callee, as its last reply had it; of another process everything is asked for.
        after: the ``last`` of that reply.
    """

    process: str = ""
    after: int = 0


@attrs.frozen
class PendingReply:
    """Some of them in the order in which they came; ``more`` when others follow the ``last`` one."""

    process: str
    changes: tuple[PendingChange, ...]
    more: bool
    last: int


@attrs.frozen
class CheckReferencesRequest:
    """Would a manifest with these references be accepted?"""

    repository: str
    blobs: tuple[Digest, ...] = ()
    manifests: tuple[Digest, ...] = ()


@attrs.frozen
class Found:
    found: bool


@attrs.frozen
class ListRequest:
    """A page: names that sort after ``after``, ``limit`` of them at most.

    ``repository`` is empty where repositories themselves are listed.
    """

    repository: str = ""
    after: str = ""
    limit: int = 1000


@attrs.frozen
class ListReply:
    """One page of names in byte order; ``more`` when others follow."""

    names: tuple[str, ...]
    more: bool


@attrs.frozen
class ChangeForRemote:
    """A tag that has changed, and a remote cluster that is to know; ``stamp`` is that of the change.

    ``tag`` may be the digest of a manifest that refers to another one, and has no tag.
    """

    remote: str
    repository: str
    tag: str
    stamp: Stamp


@attrs.frozen
class KeepChangesRequest:
    """Another index of the cluster is to stand by: to have these changes in its queue, too.

    Attributes:
        process: of the caller.
        changes: 1000 at most.
    """

    process: str
    changes: tuple[ChangeForRemote, ...]


@attrs.frozen
class KeepChangesReply:
    """They are in its queue, on its disk; or nothing was done: the caller has called itself."""

    itself: bool = False


@attrs.frozen
class ChangesKeptRequest:
    """Does another index see to these changes?

    Attributes:
        process: of the caller.
        changes: 1000 at most.
    """

    process: str
    changes: tuple[ChangeForRemote, ...]


@attrs.frozen
class ChangesKeptReply:
    """For each of them whether it is in the queue of the callee, and not there as a standby."""

    kept: tuple[bool, ...] = ()
    itself: bool = False


@attrs.frozen
class ClusterDescription:
    """What an index says of its cluster to another one that replicates to it.

    Attributes:
        origins: ``host:port`` of the origins that are healthy as far as it knows.
        weights: of some of them, as ``host:port=weight``.
    """

    origins: tuple[str, ...]
    weights: tuple[str, ...] = ()


@attrs.frozen
class ReferrersReply:
    manifests: tuple[Descriptor, ...]


@attrs.frozen
class ForgetRequest:
    """An index has changed something: others that keep what these references were have to drop it.

    All references of the repository when none is named.

    Attributes:
        is_direct: it was changed in the backend, not in the journals.
        manifest, blob: it was deleted from the repository ``at`` that time, in ns: a journal that has an
            earlier change which makes it part of it drops that.
    """

    repository: str
    references: tuple[str, ...] = ()
    manifest: Digest | None = None
    blob: Digest | None = None
    at: int = 0
    is_direct: bool = False


@attrs.frozen
class ForgetReply:
    """It is done.  ``process`` names the callee, so that a caller finds out which member is itself."""

    process: str


@attrs.frozen
class UpstreamManifestReply:
    """A manifest of an upstream registry."""

    descriptor: Descriptor
    content: bytes = attrs.field(repr=False)


# The repository is that of the cluster's name for it: docker.io/library/alpine.
MOUNT_BLOB: Final = Method("origin.mount_blob", MountRequest, Found)
RESOLVE_UPSTREAM: Final = Method("origin.resolve_upstream", ReferenceRequest, Descriptor)
GET_UPSTREAM_MANIFEST: Final = Method(
    "origin.get_upstream_manifest", ReferenceRequest, UpstreamManifestReply
)
# Raises ManifestNotFound (or RepositoryNotFound).
RESOLVE: Final = Method("index.resolve", ReferenceRequest, Descriptor)
# Both raise ManifestReferencesMissing.
CHECK_REFERENCES: Final = Method("index.check_references", CheckReferencesRequest, Empty)
RECORD_MANIFEST: Final = Method("index.record_manifest", RecordManifestRequest, Empty)
# Removes the manifest and every tag of the repository that points to it.  Raises ManifestNotFound.
DELETE_MANIFEST: Final = Method("index.delete_manifest", DigestInRepository, Empty)
# Raises ManifestNotFound.
DELETE_TAG: Final = Method("index.delete_tag", DeleteTagRequest, Empty)
# Also of a tag that was deleted.  Raises ManifestNotFound, RepositoryNotFound.
TAG_LOG: Final = Method("index.tag_log", ReferenceRequest, TagLogReply)
# All among the indexes of a cluster.  The first two raise StoreFull, StoreUnavailable.
KEEP_PENDING: Final = Method("index.keep_pending", KeepPendingRequest, PendingKept)
DROP_PENDING: Final = Method("index.drop_pending", DropPendingRequest, PendingDropped)
PENDING: Final = Method("index.pending", PendingRequest, PendingReply)
FORGET: Final = Method("index.forget", ForgetRequest, ForgetReply)
LINK_BLOB: Final = Method("index.link_blob", DigestInRepository, Empty)
# Raises BlobNotFound.
UNLINK_BLOB: Final = Method("index.unlink_blob", DigestInRepository, Empty)
HAS_BLOB: Final = Method("index.has_blob", DigestInRepository, Found)
# Raises RepositoryNotFound.
LIST_TAGS: Final = Method("index.list_tags", ListRequest, ListReply)
LIST_REPOSITORIES: Final = Method("index.list_repositories", ListRequest, ListReply)
DESCRIBE_CLUSTER: Final = Method("index.describe_cluster", Empty, ClusterDescription)
# An unknown digest has no referrers; that is not an error.
LIST_REFERRERS: Final = Method("index.list_referrers", DigestInRepository, ReferrersReply)
KEEP_CHANGES: Final = Method("index.keep_changes", KeepChangesRequest, KeepChangesReply)
CHANGES_KEPT: Final = Method("index.changes_kept", ChangesKeptRequest, ChangesKeptReply)
