"""Links on which a piece takes several times as long as a claim is waited for, with real sockets.

All patience is a fraction of what it is in the program, and so is the size of what counts as progress.
"""

from __future__ import annotations

import socket
from pathlib import Path

import attrs
import pytest
import trio

from swarmpull.config import SwarmConfig
from swarmpull.roles import peer_link, swarm_host
from swarmpull.roles.swarm_host import limits_of
from swarmpull.store.token_bucket import BURST_BYTES_MIN, TokenBucket
from swarmpull.swarm import timing
from swarmpull.swarm.messages import PieceChunk
from swarmpull.swarm.offers import OfferLimits
from swarmpull.swarm.peers import PeerKind
from swarmpull.swarm.scheduler import SwarmLimits
from swarmpull.wire.peer import pack_chunk_header
from swarmpull.wire.streams import PeerStream

from .peers import (
    Content,
    Finder,
    Node,
    ScriptedPeer,
    fetch,
    honestly,
    make_content,
    reasons,
    running_node,
    until,
)

pytestmark = pytest.mark.usefixtures("descriptors")

KIB = 1024
# Beyond the burst 200 KiB at 50 KiB/s: 4 s, several times any patience.
RATE = 50 * KIB
# For a claim of which nothing has come; the other for what goes on, and then for what stopped.
PATIENCE = 1.0
STALLED_AFTER = 2.0


def impatient(config: SwarmConfig, kind: PeerKind) -> SwarmLimits:
    """The limits of the program, with less patience for a piece being sent and for the whole download."""
    limits = limits_of(config, kind)
    assert isinstance(limits.exchange, OfferLimits)
    return attrs.evolve(
        limits,
        connections=attrs.evolve(limits.connections, idle_timeout=PATIENCE),
        exchange=attrs.evolve(limits.exchange, send_timeout=STALLED_AFTER),
        stall_timeout=STALLED_AFTER + 0.5,
    )


@pytest.fixture(autouse=True)
def little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swarm_host, "limits_of", impatient)
    monkeypatch.setattr(timing, "TIMEOUT_INITIAL", PATIENCE)
    monkeypatch.setattr(timing, "TIMEOUT_MIN", PATIENCE)
    monkeypatch.setattr(timing, "PROGRESS_TIMEOUT_MIN", STALLED_AFTER)
    monkeypatch.setattr(peer_link, "PROGRESS_AFTER", 0.05)
    monkeypatch.setattr(peer_link, "PROGRESS_EVERY", 0.1)
    monkeypatch.setattr(peer_link, "PROGRESS_BYTES", 4 * KIB)
    monkeypatch.setattr(peer_link, "CHUNK_TIMEOUT", STALLED_AFTER)


@pytest.fixture(scope="module")
def content() -> Content:
    """One short piece."""
    return make_content(BURST_BYTES_MIN + 200 * KIB)


@pytest.mark.parametrize("direction", ["upload", "download"])
async def test_a_download_at_a_very_low_rate_comes_to_its_end(
    tmp_path: Path, content: Content, direction: str, logs: list[dict]
) -> None:
    slow = SwarmConfig(**{f"{direction}_rate": float(RATE)})
    seeding, leeching = (slow, None) if direction == "upload" else (None, slow)
    async with (
        running_node(tmp_path / "seeder", config=seeding) as seeder,
        running_node(tmp_path / "leecher", config=leeching) as leecher,
    ):
        await seeder.seed(content)
        began = trio.current_time()
        await fetch(leecher, content, seeder.contact)

        assert trio.current_time() - began > 3 * PATIENCE
        assert await leecher.stored(content)
        assert seeder.host.metrics.sent() == len(content.data), "it was sent once"
        assert not [reason for reason in reasons(logs) if "stalled" in reason]


async def test_a_sender_inside_one_chunk_is_waited_for_as_long_as_bytes_come(
    tmp_path: Path,
) -> None:
    """As from a sender that writes whole chunks into a slow network."""
    content = make_content(200 * KIB)

    async def slowly(peer: ScriptedPeer, stream: PeerStream) -> None:
        index = await peer.hear_claim(stream)
        await write_slowly(stream, PieceChunk(index, 0, len(content.data)), content.data, 4 * KIB)
        await peer.listen(stream)

    async with running_node(tmp_path / "node") as node, trio.open_nursery() as nursery:
        peer = ScriptedPeer(content, slowly)
        source = await nursery.start(peer.serve)
        await fetch(node, content, source)
        assert await node.stored(content)
        assert peer.connections == 1
        nursery.cancel_scope.cancel()


async def test_a_peer_that_sends_next_to_nothing_is_given_up(
    tmp_path: Path, logs: list[dict]
) -> None:
    content = make_content(200 * KIB)
    gate = trio.Event()

    async def hardly(peer: ScriptedPeer, stream: PeerStream) -> None:
        if gate.is_set():
            return await honestly(peer, stream)
        index = await peer.hear_claim(stream)
        gate.set()
        return await write_slowly(stream, PieceChunk(index, 0, len(content.data)), content.data, 50)

    async with running_node(tmp_path / "node") as node, trio.open_nursery() as nursery:
        source = await nursery.start(ScriptedPeer(content, hardly).serve)
        finder = Finder(content.metainfo, (source,))
        download = await node.host.download(content.digest, "", finder.find)
        await until(lambda: any("stalled" in reason for reason in reasons(logs)))
        assert node.buffered == 0 or download.partial.have
        nursery.cancel_scope.cancel()


async def write_slowly(stream: PeerStream, chunk: PieceChunk, data: bytes, step: int) -> None:
    """``step`` bytes every twentieth of a second."""
    await stream._stream.send_all(pack_chunk_header(chunk))
    for start in range(0, len(data), step):
        await stream._stream.send_all(data[start : start + step])
        await trio.sleep(0.05)


async def test_a_receiver_that_reads_slowly_gets_its_piece_to_the_end(tmp_path: Path) -> None:
    content = make_content(1 << 20)
    async with running_node(tmp_path / "node") as node:
        await node.seed(content)
        taker = ScriptedPeer(content, honestly, have=0)
        stream = await dial_with_small_buffer(taker, node)
        try:
            began = trio.current_time()
            await taker.claim(stream, 0)
            piece = bytearray()
            while len(piece) < len(content.data):
                chunk = await stream.receive()
                assert isinstance(chunk, PieceChunk), chunk
                piece += await read_slowly(stream, chunk)
            assert piece == content.data
            assert trio.current_time() - began > STALLED_AFTER
        finally:
            await stream.aclose()


async def read_slowly(stream: PeerStream, chunk: PieceChunk) -> bytearray:
    """A few KiB every hundredth of a second."""
    part = bytearray(chunk.length)
    filled = 0
    while filled < chunk.length:
        filled += await stream.receive_some_into(memoryview(part)[filled : filled + 3 * KIB])
        await trio.sleep(0.01)
    return part


async def dial_with_small_buffer(peer: ScriptedPeer, node: Node) -> PeerStream:
    sock = trio.socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * KIB)
    await sock.connect(("127.0.0.1", node.contact.port))
    stream = PeerStream(trio.SocketStream(sock))
    await stream.send(peer.hello)
    await stream.receive_hello()
    return stream


async def test_a_rate_that_is_raised_lets_a_slow_transfer_end_at_once(
    tmp_path: Path, content: Content
) -> None:
    async with (
        running_node(tmp_path / "seeder") as seeder,
        running_node(tmp_path / "leecher") as leecher,
    ):
        await seeder.seed(content)
        bucket: TokenBucket = seeder.host.rates.upload
        bucket.set_rate(4.0 * KIB)  # more than half a minute
        finder = Finder(content.metainfo, (seeder.contact,))
        download = await leecher.host.download(content.digest, "", finder.find)
        await until(lambda: bucket._tokens <= -1)
        bucket.set_rate(float("inf"))
        with trio.fail_after(30):
            await download.wait()
        assert await leecher.stored(content)
