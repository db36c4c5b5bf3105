"""How one tag gets to another cluster: its blobs, then its manifests from the leaves up, what refers to them
(signatures, SBOMs), then the tag.

What is there already is asked for first, so that only what is missing moves, and whoever does the same again
after a crash goes on where the other one stopped.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Protocol

import attrs
import structlog
import trio

from swarmpull.digest import Digest
from swarmpull.errors import (
    BlobNotFound,
    DigestMismatch,
    InvalidDigest,
    ManifestInvalid,
    PushRefused,
    RepositoryUnmatched,
    SwarmpullError,
    TagImmutable,
)
from swarmpull.registry.manifests import Manifest, parse_manifest, under_digest
from swarmpull.roles.cluster import OriginClient
from swarmpull.roles.remotes import Remote
from swarmpull.wire import api

log = structlog.get_logger()

# Blobs of one image that are handed over at the same time, most of them by origins of their own.
BLOBS_AT_ONCE: Final = 8
# For which one call about a blob waits before it says how far it is, in seconds.
POLL: Final = 2.0
# Lists within lists; no index takes deeper ones.
DEPTH_MAX: Final = 16
_ASKING: Final = "asking what is there"
# Manifests of one tag whose referrers are looked for; referrers of one tag; and how far they refer to one
# another: the signature of an SBOM of an image is two.
TREE_MAX: Final = 1000
REFERRERS_MAX: Final = 256
REFERRER_DEPTH_MAX: Final = 3

# What does not change by waiting: what is sent, or its repository there, has to be another one.
HOPELESS: Final = (
    ManifestInvalid,
    PushRefused,
    RepositoryUnmatched,
    DigestMismatch,
    InvalidDigest,
    BlobNotFound,
    TagImmutable,
)


def is_digest(tag: str) -> bool:
    """Whether what a change is of is not a tag but a manifest, by its digest."""
    return ":" in tag


class Referrers(Protocol):
    """What the catalog of a cluster knows of what refers to its manifests."""

    async def referrers_to_send(self, repository: str, digest: Digest) -> tuple[Digest, ...]: ...

    async def referrer_stamp(
        self, repository: str, subject: Digest, digest: Digest
    ) -> api.Stamp | None: ...


@attrs.define(eq=False)
class Progress:
    """How far a copy is.

    Attributes:
        step: what is being done.
        blobs, blobs_done: that the other cluster lacked, and of these the ones that it has by now.
        bytes, bytes_sent: of those that are known so far, and what was sent of them.
        manifests_done: manifests that were put there.
        refused: referrers that cannot be put there as they are.
    """

    step: str = _ASKING
    blobs: int = 0
    blobs_done: int = 0
    manifests_done: int = 0
    refused: list[Digest] = attrs.Factory(list)
    _lengths: dict[Digest, int] = attrs.Factory(dict)
    _sent: dict[Digest, int] = attrs.Factory(dict)

    @property
    def is_answered(self) -> bool:
        """Whether the other cluster has said something."""
        return self.step != _ASKING

    @property
    def bytes(self) -> int:
        return sum(self._lengths.values())

    @property
    def bytes_sent(self) -> int:
        return sum(self._sent.values())

    def moved(self, digest: Digest, reply: api.HandOverReply) -> None:
        """A reply about a blob has come."""
        self._lengths[digest] = reply.length
        self._sent[digest] = max(reply.sent, self._sent.get(digest, 0))

    def document(self) -> dict[str, object]:
        return {
            "step": self.step,
            "blobs": self.blobs,
            "blobs_done": self.blobs_done,
            "bytes": self.bytes,
            "bytes_sent": self.bytes_sent,
            "manifests_done": self.manifests_done,
        }


@attrs.frozen(eq=False)
class _Copy:
    """One copy under way: to whom, of which repository, and how far it is."""

    remote: Remote
    repository: str
    progress: Progress


class TagCopier:
    """Copies tags, and what refers to their manifests, to other clusters.

    ``origins`` are those of our own, and so is what is known of ``referrers``.
    """

    def __init__(self, origins: OriginClient, referrers: Referrers) -> None:
        self._origins = origins
        self._referrers = referrers

    async def copy(
        self, remote: Remote, repository: str, tag: str, change: api.TagChange, progress: Progress
    ) -> bool:
        """Let a tag be there what it is here by ``change``; False if nothing was to be done.

        In place of a tag it may be the digest of a manifest that refers to another one.

        Raises:
            SwarmpullError: why it is not; what has arrived there stays.
        """
        job = _Copy(remote, repository, progress)
        progress.step = _ASKING
        if is_digest(tag):
            return await self._copy_referrer(job, tag, change)
        there = await remote.latest(repository, tag)
        if there is not None and _order(there.stamp) >= _order(change.stamp):
            return False
        if change.digest is None:
            progress.step = "deleting the tag"
            await remote.delete_tag(repository, tag, change)
            return True
        below: dict[Digest, tuple[Digest, ...]] = {}
        manifest = await self._bring_what_it_needs(job, change.digest, below)
        # Before the tag: who verifies what he pulls by it finds the signatures.
        await self._bring_referrers(job, change.digest, below)
        progress.step = "putting the tag"
        await remote.put_manifest(repository, tag, manifest.media_type, manifest.content, change)
        progress.manifests_done += 1
        return True

    async def _copy_referrer(self, job: _Copy, digest: str, change: api.TagChange) -> bool:
        if change.digest is None:
            job.progress.step = f"deleting manifest {digest}"
            await job.remote.delete_referrer(job.repository, digest, change)
            return True
        if not await job.remote.missing(job.repository, (), (change.digest,)):
            return False
        await self._bring(job, change.digest, {})
        return True

    async def _bring_what_it_needs(
        self,
        job: _Copy,
        digest: Digest,
        below: dict[Digest, tuple[Digest, ...]],
        above: tuple[Digest, ...] = (),
    ) -> Manifest:
        """Have all there that a manifest refers to; the manifest, which is still to be put.

        ``below`` gets what each manifest that was read leads to.
        """
        if len(above) >= DEPTH_MAX or digest in above:
            reason = f"manifest {digest} is nested more than {DEPTH_MAX} deep, or in itself"
            raise ManifestInvalid(reason)
        job.progress.step = f"reading manifest {digest}"
        manifest = await self._read(job.repository, digest)
        below[digest] = manifest.manifests
        missing = await job.remote.missing(job.repository, manifest.blobs, manifest.manifests)
        await self._hand_over(job, missing & set(manifest.blobs))
        for child in manifest.manifests:
            if child in missing:
                await self._bring(job, child, below, (*above, digest))
        return manifest

    async def _bring(
        self,
        job: _Copy,
        digest: Digest,
        below: dict[Digest, tuple[Digest, ...]],
        above: tuple[Digest, ...] = (),
    ) -> None:
        """Have a manifest there, with all that it refers to."""
        found = await self._bring_what_it_needs(job, digest, below, above)
        stamp = None
        # What something else consists of is put with that, whatever it refers to and became of it.
        if found.subject is not None and not above:
            stamp = await self._referrers.referrer_stamp(job.repository, found.subject, digest)
        change = None if stamp is None else api.TagChange(stamp, digest)
        job.progress.step = f"putting manifest {digest}"
        await job.remote.put_manifest(
            job.repository, str(digest), found.media_type, found.content, change
        )
        job.progress.manifests_done += 1

    async def _read(self, repository: str, digest: Digest) -> Manifest:
        content = await self._origins.read_manifest(digest, repository)
        parsed = await trio.to_thread.run_sync(parse_manifest, content, "")
        return under_digest(parsed, digest)

    # --- referrers ----------------------------------------------------------------------------

    async def _bring_referrers(
        self, job: _Copy, root: Digest, below: dict[Digest, tuple[Digest, ...]]
    ) -> None:
        """Have there what refers to the manifests below ``root``, and what refers to that."""
        job.progress.step = "looking for referrers"
        subjects = await self._tree(job.repository, root, below)
        known, room = set(subjects), REFERRERS_MAX
        for depth in range(REFERRER_DEPTH_MAX + 1):
            found = await self._referring(job.repository, subjects, known)
            fitting = found[: room if depth < REFERRER_DEPTH_MAX else 0]
            if len(fitting) < len(found):
                log.warning(
                    "referrers_left_out",
                    remote=job.remote.name,
                    repository=job.repository,
                    digest=str(root),
                    left_out=len(found) - len(fitting),
                    referrers_max=REFERRERS_MAX,
                    depth_max=REFERRER_DEPTH_MAX,
                    remedy=f"swarmpull replication sync {job.repository}",
                )
            if not fitting:
                return
            room -= len(fitting)
            known.update(fitting)
            missing = await job.remote.missing(job.repository, (), tuple(fitting))
            for referrer in fitting:
                if referrer in missing:
                    await self._bring_referrer(job, referrer)
            subjects = fitting

    async def _bring_referrer(self, job: _Copy, digest: Digest) -> None:
        """One that can never be put there, which its own entry will say, does not hold up the image."""
        try:
            await self._bring(job, digest, {})
        except HOPELESS:
            job.progress.refused.append(digest)

    async def _referring(
        self, repository: str, subjects: Iterable[Digest], known: set[Digest]
    ) -> list[Digest]:
        """What refers to any of these manifests, each once, without what is known."""
        found: dict[Digest, None] = {}
        for subject in subjects:
            found.update(
                dict.fromkeys(await self._referrers.referrers_to_send(repository, subject))
            )
        return [each for each in found if each not in known]

    async def _tree(
        self, repository: str, root: Digest, below: dict[Digest, tuple[Digest, ...]]
    ) -> list[Digest]:
        """The manifests that one leads to, with itself first; those not in ``below`` are read."""
        tree, following = {root: None}, [root]
        while following:
            digest = following.pop()
            try:
                children = below.get(digest)
                if children is None:
                    children = (await self._read(repository, digest)).manifests
            except HOPELESS as error:
                # The other cluster has it, or it would have been read before.
                log.info("manifest_not_read", digest=str(digest), reason=str(error))
                continue
            new = [each for each in dict.fromkeys(children) if each not in tree]
            if len(tree) + len(new) > TREE_MAX:
                log.warning(
                    "referrers_left_out",
                    repository=repository,
                    digest=str(root),
                    manifests_max=TREE_MAX,
                    remedy=f"swarmpull replication sync {repository}",
                )
                new = new[: TREE_MAX - len(tree)]
            tree.update(dict.fromkeys(new))
            following += new
        return list(tree)

    # --- blobs --------------------------------------------------------------------------------

    async def _hand_over(self, job: _Copy, blobs: Iterable[Digest]) -> None:
        """Return when the other cluster has all of these; the first error ends it."""
        pending = sorted(blobs, key=str)
        job.progress.blobs += len(pending)
        failure: SwarmpullError | None = None

        async def work() -> None:
            nonlocal failure
            while pending:
                digest = pending.pop()
                try:
                    await self._hand_over_one(job, digest)
                except SwarmpullError as error:
                    # Raised below: out of the nursery it would come wrapped in a group.
                    failure = failure or error
                    nursery.cancel_scope.cancel()
                    return
                job.progress.blobs_done += 1

        job.progress.step = "handing blobs over"
        async with trio.open_nursery() as nursery:
            for _ in range(min(BLOBS_AT_ONCE, len(pending))):
                nursery.start_soon(work)
        if failure is not None:
            raise failure

    async def _hand_over_one(self, job: _Copy, digest: Digest) -> None:
        while True:
            owners = await job.remote.owners(digest)
            request = api.HandOverRequest(
                digest, job.repository, job.remote.name, owners, job.remote.rate, POLL
            )
            reply = await self._origins.hand_over(request)
            job.progress.moved(digest, reply)
            if reply.done:
                return


def _order(stamp: api.Stamp) -> tuple[int, str]:
    return stamp.time, stamp.source
