"""The RPC methods of preheating: how agents get jobs from an index, and an index reads manifests."""

from __future__ import annotations

from typing import Final

import attrs

from swarmpull.digest import Digest
from swarmpull.swarm.peers import PeerContact
from swarmpull.wire.api import ReferenceRequest, UpstreamManifestReply
from swarmpull.wire.rpc_messages import Method


@attrs.frozen
class Part:
    """A blob or manifest of an image."""

    digest: Digest
    length: int


@attrs.frozen
class PreheatTask:
    """What an agent is to have on its disk.

    Attributes:
        job: the id of the job.
        repository: the cluster's name of it.
        reference: as the image was asked for, a tag or a digest.
        digest: of its manifest.
        manifests: all of the image, the children before their parents.
        blobs: configs and layers.
        tag: that a runtime which pulls it by its digest gives it; empty for none.
    """

    job: str
    repository: str
    reference: str
    digest: Digest
    manifests: tuple[Part, ...]
    blobs: tuple[Part, ...]
    tag: str = ""


@attrs.frozen
class TaskProgress:
    """How far an agent is with a job.

    Attributes:
        job: its id.
        received: bytes of it that are on the disk.
        state: running, done or failed.
        reason: why it failed.
    """

    job: str
    received: int
    state: str
    reason: str = ""


@attrs.frozen
class AwaitJobsRequest:
    """An agent says who it is and how far it is, and waits for something to do.

    A former call of the same agent that is still open ends.

    Attributes:
        contact: where its peers dial it; an empty host means "as you see me".
        name: of its host.
        known: ids of the jobs of this index that it has.
        progress: of those.
        seconds: for which to wait at most; the index may answer sooner.
    """

    contact: PeerContact
    name: str
    known: tuple[str, ...]
    progress: tuple[TaskProgress, ...]
    seconds: float


@attrs.frozen
class AwaitJobsReply:
    """What is new.

    Attributes:
        tasks: to be begun.
        cancelled: ids of jobs that are to be left.
        interval: seconds until the next call while there is something to report.
        retry_after: seconds for which not to call, because the index has too many callers or shuts down.
    """

    tasks: tuple[PreheatTask, ...] = ()
    cancelled: tuple[str, ...] = ()
    interval: float = 1.0
    retry_after: float = 0.0


AWAIT_JOBS: Final = Method("index.await_jobs", AwaitJobsRequest, AwaitJobsReply)
# A manifest with its content, of whatever repository.  Raises what `index.resolve` and
# `origin.get_upstream_manifest` do.
GET_MANIFEST: Final = Method("origin.get_manifest", ReferenceRequest, UpstreamManifestReply)
