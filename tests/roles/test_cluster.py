from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial

import attrs
import pytest
import trio

from swarmpull.config import ClusterConfig
from swarmpull.digest import Digest
from swarmpull.errors import BlobNotFound, RpcFailed, RpcUnavailable, SwarmpullError
from swarmpull.ring.health import HealthLimits
from swarmpull.ring.membership import Membership
from swarmpull.roles import cluster, swarm_host
from swarmpull.roles.cluster import Cluster, OriginClient, RingClient, TrackerClient
from swarmpull.swarm.metainfo import PIECE_LENGTH_MIN, Metainfo
from swarmpull.swarm.peers import AnnounceState, PeerContact, PeerKind
from swarmpull.wire import api
from swarmpull.wire.rpc import RpcContext, RpcPool, RpcService, open_rpc_pool, serve_rpc

BLOB = Digest.of(b"blob")
# Ports on which nothing listens: 9 is discard, 11 systat, 13 daytime.
DEAD = ("127.0.0.1:9", "127.0.0.1:11", "127.0.0.1:13")


@attrs.define
class Member:
    """A member that answers with the length it was given, or with an error."""

    length: int = 7
    error: SwarmpullError | None = None
    calls: int = 0
    address: str = ""

    async def stat(self, request: api.BlobRequest, _: RpcContext) -> api.BlobStatReply:
        self.calls += 1
        if self.error is not None:
            raise self.error
        return api.BlobStatReply(self.length)

    async def serve(self, *, task_status: trio.TaskStatus[None]) -> None:
        service = RpcService()
        service.register(api.STAT_BLOB, self.stat)
        async with trio.open_nursery() as nursery:
            host, port = await nursery.start(partial(serve_rpc, service, "127.0.0.1", 0))
            self.address = f"{host}:{port}"
            task_status.started()


@pytest.fixture
async def pool() -> AsyncIterator[RpcPool]:
    async with open_rpc_pool() as pool:
        yield pool


@pytest.fixture
async def member(nursery: trio.Nursery) -> Member:
    member = Member()
    await nursery.start(member.serve)
    return member


def ring(pool: RpcPool, *members: str, **health: float) -> RingClient:
    limits = HealthLimits(**health)  # type: ignore[arg-type]
    return RingClient(pool, Membership(members, name="origin", health=limits))


async def test_the_next_member_is_asked_when_one_does_not_answer(pool, member):
    client = OriginClient(ring(pool, *DEAD, member.address))

    for number in range(20):
        assert await client.stat_blob(Digest.of(bytes([number]))) == 7
    assert member.calls == 20


async def test_a_tracker_that_hangs_is_passed_over_within_one_announce(pool, nursery, monkeypatch):
    # The third tracker must answer within it, however busy this machine is.
    monkeypatch.setattr(cluster, "ANNOUNCE_TIMEOUT", 1.5)

    async def hang(request: api.AnnounceRequest, _: RpcContext) -> api.AnnounceReply:
        await trio.sleep_forever()
        raise AssertionError

    async def answer(request: api.AnnounceRequest, _: RpcContext) -> api.AnnounceReply:
        return api.AnnounceReply((), 5.0)

    addresses = []
    for handler in (hang, hang, answer):
        service = RpcService()
        service.register(api.ANNOUNCE, handler)
        host, port = await nursery.start(partial(serve_rpc, service, "127.0.0.1", 0))
        addresses.append(f"{host}:{port}")
    client = ring(pool, *addresses, fall=1, expiry=1000.0)
    contact = PeerContact("0" * 32, "", 1, PeerKind.AGENT)
    with trio.fail_after(swarm_host.ANNOUNCE_TIMEOUT):
        for number in range(20):
            request = api.AnnounceRequest(
                Digest.of(bytes([number])), "", contact, AnnounceState.LEECHING
            )
            assert (await TrackerClient(client).announce(request)).interval == 5.0

    assert set(client.members.unhealthy()) == set(addresses[:2])


def test_three_trackers_that_hang_are_asked_within_one_announce():
    assert 3 * cluster.ANNOUNCE_TIMEOUT < swarm_host.ANNOUNCE_TIMEOUT


async def test_members_that_do_not_answer_are_tried_last(pool, member):
    client = ring(pool, *DEAD, member.address, fall=1, expiry=1000.0)
    assert await OriginClient(client).stat_blob(BLOB) == 7
    for number in range(20):
        await OriginClient(client).stat_blob(Digest.of(bytes([number])))

    assert client.members.order("any")[0] == member.address
    assert set(client.members.unhealthy()) <= set(DEAD)


async def test_calls_for_one_key_go_to_one_member(pool, nursery):
    members = [Member(length=n) for n in range(3)]
    for each in members:
        await nursery.start(each.serve)
    client = OriginClient(ring(pool, *(each.address for each in members)))

    for _ in range(9):
        await client.stat_blob(BLOB)

    assert sorted(each.calls for each in members) == [0, 0, 9]


async def test_an_error_about_the_blob_is_an_answer(pool, nursery):
    members = [Member(error=BlobNotFound(str(BLOB), "backend")) for _ in range(3)]
    for each in members:
        await nursery.start(each.serve)
    client = ring(pool, *(each.address for each in members))

    with pytest.raises(BlobNotFound):
        await OriginClient(client).stat_blob(BLOB)

    assert sum(each.calls for each in members) == 1
    assert client.members.unhealthy() == ()


async def test_a_member_that_answers_with_errors_is_healthy_again(pool, member):
    member.error = BlobNotFound(str(BLOB), "backend")
    client = ring(pool, member.address, fall=1, rise=2, expiry=1000.0)
    client.members.record_failure(member.address, "refused")
    assert client.members.unhealthy() == (member.address,)

    for _ in range(2):
        with pytest.raises(BlobNotFound):
            await OriginClient(client).stat_blob(BLOB)

    assert client.members.unhealthy() == ()


async def test_when_nobody_answers_the_error_names_all_who_were_tried(pool):
    client = OriginClient(ring(pool, *DEAD))

    with pytest.raises(RpcUnavailable) as caught:
        await client.stat_blob(BLOB)

    assert caught.value.method == "origin.stat_blob"
    for address in DEAD:
        assert address in caught.value.reason
    assert str(caught.value).startswith("origin.stat_blob at origin ring (")


async def test_a_ring_without_members_says_so(pool):
    with pytest.raises(RpcUnavailable, match="no origin is known"):
        await OriginClient(ring(pool)).stat_blob(BLOB)


async def test_a_name_that_does_not_resolve_is_in_the_error(pool):
    with pytest.raises(RpcUnavailable, match=r"dns\+origins:7200"):
        await OriginClient(ring(pool, "dns+origins:7200")).stat_blob(BLOB)


async def test_a_silent_member_is_passed_over_after_the_timeout(pool, member):
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    silent = f"127.0.0.1:{listeners[0].socket.getsockname()[1]}"
    client = ring(pool, silent, member.address)
    key = next(key for key in map(str, range(100)) if client.members.order(key)[0] == silent)
    try:
        with trio.fail_after(20):
            # For each of them; the second one is to answer within it.
            reply = await client.call(key, api.STAT_BLOB, api.BlobRequest(BLOB), timeout=1.5)
    finally:
        await listeners[0].aclose()

    assert reply.length == 7


async def test_a_member_that_fails_by_a_bug_is_not_passed_over(pool, member):
    """The method is not registered there: others would answer the same."""
    client = ring(pool, member.address)
    with pytest.raises(RpcFailed):
        await client.call("key", api.HAS_BLOB, api.DigestInRepository("a", BLOB), timeout=5.0)

    assert client.members.unhealthy() == ()


PEER = PeerContact("a" * 32, "host", 7100, PeerKind.AGENT)
METAINFO = Metainfo(BLOB, 5, PIECE_LENGTH_MIN, bytes(32))
DESCRIPTOR = api.Descriptor(BLOB, "type", 5)
CHANGE = api.TagChange(api.Stamp(1, "index1"), BLOB, "somebody")


async def serve_every_method(seen: list[object], *, task_status: trio.TaskStatus[str]) -> None:
    """Answers every method with one fixed reply and keeps the requests."""
    replies = {
        api.ANNOUNCE: api.AnnounceReply((PEER,), 3.0, METAINFO),
        api.STAT_BLOB: api.BlobStatReply(5),
        api.GET_METAINFO: api.MetainfoReply(METAINFO, PEER),
        api.ADOPT_BLOB: api.Empty(),
        api.PUT_MANIFEST: api.PutManifestReply(BLOB),
        api.RESOLVE: DESCRIPTOR,
        api.TAG_LOG: api.TagLogReply((CHANGE,)),
        api.CHECK_REFERENCES: api.Empty(),
        api.RECORD_MANIFEST: api.Empty(),
        api.DELETE_MANIFEST: api.Empty(),
        api.DELETE_TAG: api.Empty(),
        api.LINK_BLOB: api.Empty(),
        api.UNLINK_BLOB: api.Empty(),
        api.HAS_BLOB: api.Found(True),
        api.LIST_TAGS: api.ListReply(("v1",), True),
        api.LIST_REPOSITORIES: api.ListReply(("a",), False),
        api.LIST_REFERRERS: api.ReferrersReply((DESCRIPTOR,)),
    }
    service = RpcService()

    async def answer(reply: object, request: object, _: RpcContext) -> object:
        seen.append(request)
        return reply

    for method, reply in replies.items():
        service.register(method, partial(answer, reply))  # type: ignore[arg-type]
    async with trio.open_nursery() as nursery:
        host, port = await nursery.start(partial(serve_rpc, service, "127.0.0.1", 0))
        task_status.started(f"{host}:{port}")


async def test_every_method_has_a_typed_call(pool, nursery):
    seen: list[object] = []
    address = await nursery.start(serve_every_method, seen)
    cluster = Cluster(
        pool, ClusterConfig(trackers=(address,), origins=(address,), indexes=(address,))
    )
    await nursery.start(cluster.run)
    tracker, origin, index = cluster.tracker, cluster.origin, cluster.index
    announce = api.AnnounceRequest(BLOB, "a", PEER, AnnounceState.LEECHING, True)
    record = api.RecordManifestRequest("a", DESCRIPTOR, "v1")

    assert (await tracker.announce(announce)).metainfo == METAINFO
    assert await origin.stat_blob(BLOB, "a") == 5
    assert (await origin.get_metainfo(BLOB, "a")).seeder == PEER
    assert await origin.adopt_blob(METAINFO, "a", PEER) is None
    assert (await origin.put_manifest("a", "v1", "type", b"{}")).digest == BLOB
    assert await index.resolve("a", "v1") == DESCRIPTOR
    assert await index.check_references("a", blobs=(BLOB,)) is None
    assert await index.record_manifest(record) is None
    assert await index.delete_manifest("a", BLOB) is None
    assert await index.delete_tag("a", "v1") is None
    assert await index.link_blob("a", BLOB) is None
    assert await index.unlink_blob("a", BLOB) is None
    assert await index.has_blob("a", BLOB) is True
    assert await index.list_tags("a", after="v0", limit=5) == api.ListReply(("v1",), True)
    assert await index.list_repositories(after="9") == api.ListReply(("a",), False)
    assert await index.list_referrers("a", BLOB) == (DESCRIPTOR,)
    assert (await index.tag_log("a", "v1")).changes == (CHANGE,)

    assert len(seen) == 17
    assert seen[0] == announce
    assert seen[4] == api.PutManifestRequest("a", "v1", "type", b"{}")
    assert seen[13] == api.ListRequest("a", "v0", 5)
