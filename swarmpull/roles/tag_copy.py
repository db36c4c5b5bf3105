"""How one tag gets to another cluster: its blobs, then its manifests from the leaves up, then the tag.

What is there already is asked for first, so that only what is missing moves, and whoever does the same again
after a crash goes on where the other one stopped.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import attrs
import structlog
import trio

from swarmpull.digest import Digest
from swarmpull.errors import ManifestInvalid, SwarmpullError
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
_ASKING: Final = "asking what the tag is there"


@attrs.define(eq=False)
class Progress:
    """How far a copy is.

    Attributes:
        step: what is being done.
        blobs, blobs_done: that the other cluster lacked, and of these the ones that it has by now.
        bytes, bytes_sent: of those that are known so far, and what was sent of them.
        manifests_done: manifests that were put there.
    """

    step: str = _ASKING
    blobs: int = 0
    blobs_done: int = 0
    manifests_done: int = 0
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


class TagCopier:
    """Copies tags to other clusters; ``origins`` are those of our own."""

    def __init__(self, origins: OriginClient) -> None:
        self._origins = origins

    async def copy(
        self, remote: Remote, repository: str, tag: str, change: api.TagChange, progress: Progress
    ) -> bool:
        """Let a tag be there what it is here by ``change``; False if nothing was to be done.

        Raises:
            SwarmpullError: why it is not; what has arrived there stays.
        """
        progress.step = _ASKING
        there = await remote.latest(repository, tag)
        if there is not None and _order(there.stamp) >= _order(change.stamp):
            return False
        if change.digest is None:
            progress.step = "deleting the tag"
            await remote.delete_tag(repository, tag, change)
            return True
        manifest = await self._bring_what_it_needs(remote, repository, change.digest, progress)
        progress.step = "putting the tag"
        await remote.put_manifest(repository, tag, manifest.media_type, manifest.content, change)
        progress.manifests_done += 1
        return True

    async def _bring_what_it_needs(
        self,
        remote: Remote,
        repository: str,
        digest: Digest,
        progress: Progress,
        above: tuple[Digest, ...] = (),
    ) -> Manifest:
        """Have all there that a manifest refers to; the manifest, which is still to be put."""
        if len(above) >= DEPTH_MAX or digest in above:
            reason = f"manifest {digest} is nested more than {DEPTH_MAX} deep, or in itself"
            raise ManifestInvalid(reason)
        progress.step = f"reading manifest {digest}"
        content = await self._origins.read_manifest(digest, repository)
        parsed = await trio.to_thread.run_sync(parse_manifest, content, "")
        manifest = under_digest(parsed, digest)
        missing = await remote.missing(repository, manifest.blobs, manifest.manifests)
        await self._hand_over(remote, repository, missing & set(manifest.blobs), progress)
        for child in manifest.manifests:
            if child in missing:
                found = await self._bring_what_it_needs(
                    remote, repository, child, progress, (*above, digest)
                )
                progress.step = f"putting manifest {child}"
                await remote.put_manifest(repository, str(child), found.media_type, found.content)
                progress.manifests_done += 1
        return manifest

    # --- blobs --------------------------------------------------------------------------------

    async def _hand_over(
        self, remote: Remote, repository: str, blobs: Iterable[Digest], progress: Progress
    ) -> None:
        """Return when the other cluster has all of these; the first error ends it."""
        pending = sorted(blobs, key=str)
        progress.blobs += len(pending)
        failure: SwarmpullError | None = None

        async def work() -> None:
            nonlocal failure
            while pending:
                digest = pending.pop()
                try:
                    await self._hand_over_one(remote, repository, digest, progress)
                except SwarmpullError as error:
                    # Raised below: out of the nursery it would come wrapped in a group.
                    failure = failure or error
                    nursery.cancel_scope.cancel()
                    return
                progress.blobs_done += 1

        progress.step = "handing blobs over"
        async with trio.open_nursery() as nursery:
            for _ in range(min(BLOBS_AT_ONCE, len(pending))):
                nursery.start_soon(work)
        if failure is not None:
            raise failure

    async def _hand_over_one(
        self, remote: Remote, repository: str, digest: Digest, progress: Progress
    ) -> None:
        while True:
            owners = await remote.owners(digest)
            request = api.HandOverRequest(
                digest, repository, remote.name, owners, remote.rate, POLL
            )
            reply = await self._origins.hand_over(request)
            progress.moved(digest, reply)
            if reply.done:
                return


def _order(stamp: api.Stamp) -> tuple[int, str]:
    return stamp.time, stamp.source
