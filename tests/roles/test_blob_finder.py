"""What a download begins with, whoever of trackers and origins is away."""

from __future__ import annotations

import attrs
import pytest
import trio

from swarmpull.digest import Digest
from swarmpull.errors import BlobNotFound, RpcFailed, RpcUnavailable
from swarmpull.roles.blob_finder import (
    ANNOUNCE_PATIENCE,
    TRACKER_PATIENCE,
    TRACKERLESS_INTERVAL,
    BlobFinder,
)
from swarmpull.roles.swarm_host import ANNOUNCE_TIMEOUT
from swarmpull.swarm.peers import AnnounceState, PeerContact, PeerKind
from swarmpull.wire import api
from swarmpull.wire.api import AnnounceReply, AnnounceRequest, MetainfoReply

from .peers import make_content

REPOSITORY = "team/app"
CONTENT = make_content(5)
REQUEST = AnnounceRequest(
    CONTENT.digest,
    REPOSITORY,
    PeerContact("a" * 32, "", 7100, PeerKind.AGENT),
    AnnounceState.LEECHING,
    want_metainfo=True,
)
SEEDER = PeerContact("f" * 32, "origin", 7201, PeerKind.ORIGIN)


LATER = attrs.evolve(REQUEST, want_metainfo=False)
OTHER = PeerContact("b" * 32, "other", 7100, PeerKind.AGENT)


class Origins:
    """They have the blob, and two agents are connected for it: the one that asks, and another."""

    async def get_metainfo(self, digest: Digest, namespace: str, *, growing: bool) -> MetainfoReply:
        assert (digest, namespace) == (CONTENT.digest, REPOSITORY)
        return MetainfoReply(CONTENT.metainfo, SEEDER)

    async def peers(self, digest: Digest) -> tuple[PeerContact, ...]:
        assert digest == CONTENT.digest
        return (REQUEST.peer.seen_at("here"), OTHER)


class OldOrigins(Origins):
    async def peers(self, digest: Digest) -> tuple[PeerContact, ...]:
        raise RpcFailed("the origin", api.PEERS_OF_ORIGIN.name, "unknown method")


class Hanging:
    async def announce(self, request: AnnounceRequest) -> AnnounceReply:
        await trio.sleep_forever()
        raise AssertionError


class Gone:
    async def announce(self, request: AnnounceRequest) -> AnnounceReply:
        raise RpcUnavailable("the trackers", api.ANNOUNCE.name, "connection refused")


def finder(trackers: object, origins: object) -> BlobFinder:
    return BlobFinder(trackers, origins)  # type: ignore[arg-type]


async def test_a_tracker_that_hangs_does_not_stop_a_pull(autojump_clock) -> None:
    reply = await finder(Hanging(), Origins()).find(REQUEST)

    assert (reply.peers, reply.metainfo) == ((SEEDER, OTHER), CONTENT.metainfo)
    assert trio.current_time() == pytest.approx(TRACKER_PATIENCE)


async def test_a_tracker_that_knows_that_the_blob_is_nowhere_is_believed() -> None:
    class Knowing:
        async def announce(self, request: AnnounceRequest) -> AnnounceReply:
            raise BlobNotFound(str(request.digest), "the origins")

    with pytest.raises(BlobNotFound):
        await finder(Knowing(), Origins()).find(REQUEST)


async def test_a_tracker_that_was_ill_a_moment_ago_is_asked_when_nobody_else_answers() -> None:
    answer = AnnounceReply((SEEDER,), 3.0, CONTENT.metainfo)

    class IllOfLate:
        async def announce(
            self, request: AnnounceRequest, *, insist: bool = False
        ) -> AnnounceReply:
            if insist:
                return answer
            raise RpcUnavailable("the trackers", api.ANNOUNCE.name, "no tracker answered of late")

    class Away:
        async def get_metainfo(self, *_: object, growing: bool) -> MetainfoReply:
            raise RpcUnavailable("the origins", api.GET_METAINFO.name, "no member answers")

    assert await finder(IllOfLate(), Away()).find(REQUEST) == answer


async def test_an_origin_of_yesterday_stands_in_for_the_trackers_alone() -> None:
    reply = await finder(Gone(), OldOrigins()).find(REQUEST)

    assert (reply.peers, reply.metainfo) == ((SEEDER,), CONTENT.metainfo)


@pytest.mark.parametrize("trackers", [Gone(), Hanging()])
async def test_who_goes_on_looking_for_peers_is_told_those_of_the_origin(
    trackers: object, autojump_clock
) -> None:
    reply = await finder(trackers, Origins()).announce(LATER)

    assert reply == AnnounceReply((OTHER,), TRACKERLESS_INTERVAL)


@pytest.mark.parametrize("state", [AnnounceState.COMPLETE, AnnounceState.STOPPED])
async def test_only_trackers_hear_of_those_who_look_for_nobody(state: AnnounceState) -> None:
    with pytest.raises(RpcUnavailable, match="connection refused"):
        await finder(Gone(), Origins()).announce(attrs.evolve(LATER, state=state))


async def test_an_announce_has_failed_when_no_origin_names_anybody() -> None:
    with pytest.raises(RpcUnavailable, match="connection refused"):
        await finder(Gone(), OldOrigins()).announce(LATER)


async def test_origins_have_their_turn_before_a_host_gives_an_announce_up(autojump_clock) -> None:
    class Silent(Origins):
        async def peers(self, digest: Digest) -> tuple[PeerContact, ...]:
            await trio.sleep_forever()
            raise AssertionError

    with pytest.raises(RpcUnavailable, match="no answer in 7 s"):
        await finder(Hanging(), Silent()).announce(LATER)
    assert trio.current_time() == pytest.approx(ANNOUNCE_PATIENCE + TRACKER_PATIENCE)
    assert trio.current_time() <= ANNOUNCE_TIMEOUT
