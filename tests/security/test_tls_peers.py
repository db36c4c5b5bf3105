"""Pieces by TLS, and whole clusters of roles that trust only each other."""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import pytest
import structlog
import trio

from swarmpull.digest import Digest
from swarmpull.errors import RpcFailed, RpcUnavailable, StartupError
from swarmpull.swarm.messages import ByeReason, Have, Hello, PieceChunk
from swarmpull.swarm.peers import AnnounceState, PeerKind
from swarmpull.wire import api
from swarmpull.wire.rpc import open_rpc_pool
from swarmpull.wire.streams import CHUNK_BYTES_MAX, PeerStream
from swarmpull.wire.tls import Tls
from tests.roles.peers import assert_no_descriptor_leaked, open_descriptors
from tests.roles.roles import Cluster, cluster_under
from tests.roles.test_blob_finder import REQUEST

from .hosts import ALL, Authority, config_of, tls_of

DEADLINE = 60.0


@pytest.fixture(scope="module")
def prod(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.create(tmp_path_factory.mktemp("prod"), "prod")


# --- one connection -------------------------------------------------------------------------------


@asynccontextmanager
async def pair(tls: Tls) -> AsyncIterator[tuple[PeerStream, PeerStream]]:
    """Two ends of one connection on loopback."""
    before = open_descriptors()
    ends: dict[str, PeerStream] = {}
    with trio.fail_after(DEADLINE):
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")

        async def accept() -> None:
            ends["there"] = PeerStream((await tls.accept(await listener.accept()))[0])

        async with trio.open_nursery() as nursery:
            nursery.start_soon(accept)
            dialled = await trio.open_tcp_stream(*listener.socket.getsockname())
            ends["here"] = PeerStream((await tls.connect(dialled))[0])
        await listener.aclose()
        yield ends["here"], ends["there"]
        for end in ends.values():
            await end.aclose()
    assert_no_descriptor_leaked(before)


@pytest.fixture(scope="module")
def tls(prod: Authority) -> Tls:
    return tls_of(prod.issue("peer", "agent"))


async def test_chunks_and_messages_arrive_as_they_were_sent(tls: Tls, tmp_path: Path) -> None:
    content = random.randbytes(3 * CHUNK_BYTES_MAX + 12_345)
    (tmp_path / "blob").write_bytes(content)
    file = os.open(tmp_path / "blob", os.O_RDONLY)
    sizes = (1, 16_384, 16_385, CHUNK_BYTES_MAX, CHUNK_BYTES_MAX - 1, 12_345)
    told: list[int] = []
    received = bytearray()
    async with pair(tls) as (here, there), trio.open_nursery() as nursery:

        async def send() -> None:
            offset = 0
            for size in sizes:
                await here.send(Have(size % 100))
                await here.send_chunk(PieceChunk(7, offset, size), file, offset, told.append)
                offset += size

        nursery.start_soon(send)
        for size in sizes:
            assert await there.receive() == Have(size % 100)
            chunk = await there.receive()
            assert isinstance(chunk, PieceChunk)
            assert (chunk.index, chunk.offset, chunk.length) == (7, len(received), size)
            buffer = bytearray(size)
            await there.receive_into(memoryview(buffer))
            received += buffer
    os.close(file)
    assert received == content[: sum(sizes)]
    assert sum(told) == sum(sizes)


async def test_a_cancelled_receive_loses_nothing(tls: Tls, tmp_path: Path) -> None:
    content = random.randbytes(CHUNK_BYTES_MAX)
    (tmp_path / "blob").write_bytes(content)
    file = os.open(tmp_path / "blob", os.O_RDONLY)
    async with pair(tls) as (here, there), trio.open_nursery() as nursery:
        for _ in range(3):
            with trio.move_on_after(0.001):
                await there.receive()
        nursery.start_soon(here.send_chunk, PieceChunk(0, 0, len(content)), file, 0)
        assert await there.receive() == PieceChunk(0, 0, len(content))
        buffer, filled = bytearray(len(content)), 0
        while filled < len(content):
            with trio.move_on_after(0.0001):
                filled += await there.receive_some_into(memoryview(buffer)[filled:])
    os.close(file)
    assert buffer == content


async def test_the_end_of_the_other_side_is_seen(tls: Tls) -> None:
    async with pair(tls) as (here, there):
        await here.send(Have(1))
        await here.aclose()
        assert await there.receive() == Have(1)
        with pytest.raises(trio.EndOfChannel):
            await there.receive()
        with pytest.raises(trio.ClosedResourceError):
            await here.send(Have(2))


# --- whole clusters -------------------------------------------------------------------------------


@asynccontextmanager
async def secured_cluster(root: Path, prod: Authority, **more: str) -> AsyncIterator[Cluster]:
    """Index, origin and tracker; each role has a certificate of its own, and nothing more than it needs."""
    async with cluster_under(root) as cluster:
        as_role(cluster, prod, "index", **more)
        await cluster.start_index()
        as_role(cluster, prod, "origin", **more)
        await cluster.start_origin()
        as_role(cluster, prod, "tracker", **more)
        await cluster.start_tracker()
        as_role(cluster, prod, "agent", **more)
        yield cluster


def as_role(cluster: Cluster, authority: Authority, role: str, **more: str) -> None:
    """What starts next has a certificate of this role."""
    files = authority.issue(f"{role}-host", role, force=True)
    cluster.config = attrs.evolve(cluster.config, tls=config_of(files, **more))


@pytest.mark.parametrize("peer", ["on", "off"])
async def test_a_cluster_of_roles_with_their_own_certificates_pushes_and_pulls(
    tmp_path: Path, prod: Authority, peer: str
) -> None:
    layer = random.randbytes(9 << 20)
    with structlog.testing.capture_logs() as logs:
        async with secured_cluster(tmp_path, prod, peer=peer) as cluster:
            await cluster.start_agent("pusher", push=True)
            manifest = await cluster.push_image("pusher", "team/app", b"{}", layer)
            for name in ("first", "second"):
                await cluster.start_agent(name)
                reply = await cluster.get(name, "/v2/team/app/manifests/v1")
                assert reply.content == manifest
                reply = await cluster.get(name, f"/v2/team/app/blobs/{Digest.of(layer)}")
                assert reply.content == layer
            assert await cluster.metric("first", "tls_certificate_expires_timestamp_seconds") > 0
            await cluster.written_back()
    # Every role may do what it does, and nothing fell back to another way.
    wrong = [entry for entry in logs if entry["log_level"] in ("warning", "error")]
    assert [each for each in wrong if each["event"] != "write_back_queue_new"] == []


async def test_strangers_get_nothing(tmp_path: Path, prod: Authority) -> None:
    content = random.randbytes(1 << 20)
    digest = Digest.of(content)
    async with secured_cluster(tmp_path / "cluster", prod) as cluster:
        reply = await cluster.request("PUT", "origin", f"/blobs/{digest}", content=content)
        assert reply.status_code == 201
        origin = cluster.roles["origin"]

        with structlog.testing.capture_logs() as logs:
            plain = await trio.open_tcp_stream(*endpoint(origin.address("peer")))
            stranger = PeerStream(plain)
            await stranger.send(Have(1))
            bye = await stranger.receive_hello()
            assert "only one side speaks TLS" in bye.text
            await stranger.aclose()

            index = tls_of(prod.issue("curious", "index", "tracker"))
            dialled = await trio.open_tcp_stream(*endpoint(origin.address("peer")))
            known = PeerStream((await index.connect(dialled))[0])
            bye = await known.receive_hello()
            assert "is of no agent or origin" in bye.text
            await known.aclose()

            # The pool of the tests has no certificate at all.
            async with open_rpc_pool() as pool:
                request = api.BlobRequest(digest)
                with pytest.raises(RpcUnavailable, match="only one side speaks TLS"):
                    await pool.call(origin.address("rpc"), api.STAT_BLOB, request, timeout=20.0)
        reasons = {entry["reason"] for entry in logs if entry["log_level"] == "warning"}
        assert any("only one side speaks TLS" in reason for reason in reasons)


async def test_an_agent_cannot_pose_as_an_origin(tmp_path: Path, prod: Authority) -> None:
    async with secured_cluster(tmp_path, prod) as cluster:
        tracker = cluster.roles["tracker"].address("rpc")
        request = attrs.evolve(REQUEST, want_metainfo=False)
        posing = attrs.evolve(request, peer=attrs.evolve(request.peer, kind=PeerKind.ORIGIN))
        async with open_rpc_pool(tls=tls_of(prod.issue("honest", "agent"))) as pool:
            await pool.call(tracker, api.ANNOUNCE, request, timeout=20.0)
            with pytest.raises(RpcFailed, match="must not announce itself as origin"):
                await pool.call(tracker, api.ANNOUNCE, posing, timeout=20.0)


async def test_an_agent_cannot_speak_for_another_at_the_tracker(
    tmp_path: Path, prod: Authority
) -> None:
    request = attrs.evolve(REQUEST, want_metainfo=False)
    victim = attrs.evolve(request.peer, host="192.0.2.7")
    announce = attrs.evolve(request, peer=victim)
    forged = [
        (api.ANNOUNCE, announce, "peer id"),
        (api.ANNOUNCE, attrs.evolve(announce, state=AnnounceState.STOPPED), "peer id"),
        (api.ANNOUNCE, attrs.evolve(announce, want_metainfo=True), "peer id"),
        (api.ANNOUNCE, attrs.evolve(announce, peer=attrs.evolve(victim, peer_id="b" * 32)), "addr"),
        (api.ANNOUNCE_HELD, api.AnnounceHeldRequest(victim, (request.digest,)), "peer id"),
        (api.WATCH, api.WatchRequest(request.digest, victim.peer_id, 0, 1.0), "peer id"),
    ]
    async with secured_cluster(tmp_path, prod) as cluster:
        tracker = cluster.roles["tracker"].address("rpc")
        async with (
            open_rpc_pool(tls=tls_of(prod.issue("victim", "agent"))) as own,
            open_rpc_pool(tls=tls_of(prod.issue("forger", "agent"))) as other,
        ):
            await own.call(tracker, api.ANNOUNCE, announce, timeout=20.0)
            for method, message, what in forged:
                with pytest.raises(RpcFailed, match=f"{what}.* by the certificate of victim"):
                    await other.call(tracker, method, message, timeout=20.0)
            mine = attrs.evolve(request, peer=attrs.evolve(victim, peer_id="c" * 32, port=7109))
            reply = await other.call(tracker, api.ANNOUNCE, mine, timeout=20.0)
            assert [each.peer_id for each in reply.peers] == [victim.peer_id]
            assert await cluster.metric("tracker", "tracker_announces_refused_total") == len(forged)
            # The process of the certificate's holder is started again.
            again = attrs.evolve(announce, peer=attrs.evolve(victim, peer_id="d" * 32))
            reply = await own.call(tracker, api.ANNOUNCE, again, timeout=20.0)
            assert [each.peer_id for each in reply.peers] == ["c" * 32]


async def test_an_agent_cannot_pose_as_an_origin_among_peers(
    tmp_path: Path, prod: Authority
) -> None:
    content = random.randbytes(1 << 20)
    digest = Digest.of(content)
    tls = tls_of(prod.issue("poser", "agent"))
    async with secured_cluster(tmp_path / "cluster", prod) as cluster:
        await cluster.request("PUT", "origin", f"/blobs/{digest}", content=content)
        answers = []
        for kind in (PeerKind.AGENT, PeerKind.ORIGIN):
            address = endpoint(cluster.roles["origin"].address("peer"))
            stream = PeerStream((await tls.connect(await trio.open_tcp_stream(*address)))[0])
            await stream.send(Hello(digest, "", "a" * 32, kind, 1, 1, b"\0"))
            answers.append(await stream.receive_hello())
            await stream.aclose()

    greeting, refusal = answers
    assert isinstance(greeting, Hello)
    assert refusal.reason is ByeReason.UNTRUSTED
    assert "agent poser of cluster prod does not allow it to be an origin" in refusal.text


def endpoint(address: str) -> tuple[str, int]:
    host, port = address.split(":")
    return host, int(port)


async def test_a_role_does_not_start_with_the_certificate_of_another(
    tmp_path: Path, prod: Authority
) -> None:
    async with cluster_under(tmp_path) as cluster:
        as_role(cluster, prod, "agent")
        with pytest.raises(
            (StartupError, ExceptionGroup), match=r"which is no index|sub-exception"
        ) as e:
            await cluster.start_index()
        error = e.value if e.type is StartupError else e.value.exceptions[0]
        assert "which is no index: issue one with swarmpull certs issue --role index" in str(error)


async def test_one_certificate_may_have_all_roles(tmp_path: Path, prod: Authority) -> None:
    async with cluster_under(tmp_path) as cluster:
        files = prod.issue("box", *ALL)
        cluster.config = attrs.evolve(cluster.config, tls=config_of(files))
        await cluster.start_index()
        await cluster.start_origin()
        await cluster.start_tracker()
        await cluster.start_agent(push=True)
        await cluster.push_image("agent", "team/app", b"{}", b"layer")
