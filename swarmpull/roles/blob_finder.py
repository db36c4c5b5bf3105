"""Finds what a download begins with, whichever of trackers and origins are there."""

from __future__ import annotations

from typing import Final

import structlog
import trio

from swarmpull.errors import (
    BackendUnavailable,
    RpcFailed,
    RpcUnavailable,
    SwarmpullError,
)
from swarmpull.roles.cluster import ORIGIN_RING, TRACKER_RING, OriginClient, TrackerClient
from swarmpull.swarm.peers import AnnounceState, PeerContact
from swarmpull.wire.api import ANNOUNCE, AnnounceReply, AnnounceRequest, Growth, HashesRequest

log = structlog.get_logger()

# How long a tracker may take over a first announce, in seconds: one that knows the blob takes milliseconds.
TRACKER_PATIENCE: Final = 3.0
# The same for later ones, which nobody waits for: two trackers that hang are tried before a third.  What is
# left of `swarmpull.roles.swarm_host.ANNOUNCE_TIMEOUT` is for an origin.
ANNOUNCE_PATIENCE: Final = 7.0
# Until the next try to find a tracker when an origin had to stand in for one, in seconds.
TRACKERLESS_INTERVAL: Final = 3.0


class BlobFinder:
    """Where the metainfo and the peers of a blob come from: a tracker, or origins in place of all trackers.

    An origin names the agents that are connected to it, so that those who come while there is no tracker
    become one swarm, and not as many copies at the rate of that origin.
    """

    def __init__(self, trackers: TrackerClient, origins: OriginClient) -> None:
        self._trackers = trackers
        self._origins = origins

    async def find(self, request: AnnounceRequest) -> AnnounceReply:
        """Ask a tracker; when none answers, or none in good time, ask the origins themselves.

        A tracker that hangs must not stop pulls, and one that waits for an origin waits for what the
        origins then tell us.  When no origin answers either, trackers are asked that were ill a moment ago.

        Raises:
            BlobNotFound: no origin has the blob.
            SwarmpullError: nobody can say.
        """
        insist = False
        try:
            # Each pull of a small blob comes here: `trio.fail_after` would take twice as long.
            with trio.CancelScope(deadline=trio.current_time() + TRACKER_PATIENCE):
                return await self._trackers.announce(request)
            log.info("tracker_slow", digest=str(request.digest), waited=TRACKER_PATIENCE)
        except RpcUnavailable as error:
            insist = True
            log.warning("no_tracker", digest=str(request.digest), reason=str(error))
        except BackendUnavailable as error:
            if error.backend != ORIGIN_RING:
                raise
            # The trackers reach no origin: perhaps we do.
            log.info("tracker_without_origins", digest=str(request.digest), reason=error.reason)
        try:
            reply = await self._origins.get_metainfo(
                request.digest, request.namespace, growing=request.growing
            )
        except RpcUnavailable:
            late = await self._insist(request) if insist else None
            if late is None:
                raise
            return late
        others = () if reply.content is not None else await self._connected(request)
        return AnnounceReply(
            (reply.seeder, *others),
            TRACKERLESS_INTERVAL,
            reply.metainfo,
            content=reply.content,
            growth=reply.growth,
        )

    async def announce(self, request: AnnounceRequest) -> AnnounceReply:
        """Announce to a tracker; who looks for peers and finds none that answers is told those of an origin.

        Raises:
            SwarmpullError: nobody can say.
        """
        if request.state is not AnnounceState.LEECHING:
            return await self._trackers.announce(request)
        try:
            with trio.fail_after(ANNOUNCE_PATIENCE):
                return await self._trackers.announce(request)
        except trio.TooSlowError:
            silent = f"no answer in {ANNOUNCE_PATIENCE:g} s"
            failure = RpcUnavailable(TRACKER_RING, ANNOUNCE.name, silent)
        except RpcUnavailable as error:
            failure = error
        peers = await self._connected(request)
        if not peers:
            raise failure
        return AnnounceReply(peers, TRACKERLESS_INTERVAL)

    async def _connected(self, request: AnnounceRequest) -> tuple[PeerContact, ...]:
        """The agents that are connected to the origin of a blob, as far as it says so."""
        with trio.move_on_after(TRACKER_PATIENCE):
            try:
                peers = await self._origins.peers(request.digest)
            except SwarmpullError as error:
                log.info("no_peers_of_origin", digest=str(request.digest), reason=str(error))
            else:
                return tuple(p for p in peers if p.peer_id != request.peer.peer_id)
        return ()

    async def _insist(self, request: AnnounceRequest) -> AnnounceReply | None:
        """What a tracker says that was ill a moment ago, and may be back; None when none is."""
        with trio.move_on_after(TRACKER_PATIENCE):
            try:
                return await self._trackers.announce(request, insist=True)
            except RpcUnavailable as error:
                log.info("still_no_tracker", digest=str(request.digest), reason=str(error))
        return None

    async def follow(self, request: HashesRequest) -> Growth:
        """Wait for more piece hashes of a blob that an origin is still fetching, as `find` does.

        Raises:
            RpcUnavailable, RpcFailed: nobody can say just now.
            SwarmpullError: there will be no more.
        """
        try:
            return await self._trackers.hashes(request)
        except (RpcUnavailable, RpcFailed) as error:
            log.info("no_tracker", digest=str(request.digest), reason=str(error))
        return await self._origins.hashes(request)
