"""Peers that break the rules, over real sockets: each loses its connection and nothing else happens."""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import AsyncIterator, Sized
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from swarmpull.config import SwarmConfig
from swarmpull.roles import peer_connections, peer_link, swarm_host
from swarmpull.roles.downloads import Download
from swarmpull.roles.swarm_host import limits_of
from swarmpull.swarm import events as ev
from swarmpull.swarm import timing
from swarmpull.swarm.messages import (
    Bye,
    ByeReason,
    Cancel,
    Claim,
    Have,
    Message,
    Offer,
    Pass,
    PieceChunk,
    Want,
)
from swarmpull.swarm.metainfo import PIECE_LENGTH_MIN
from swarmpull.swarm.peers import PeerKind
from swarmpull.swarm.scheduler import SwarmLimits
from swarmpull.wire.peer import pack_chunk_header
from swarmpull.wire.streams import CHUNK_BYTES_MAX, PeerStream

from .peers import (
    GONE,
    Content,
    Finder,
    Node,
    ScriptedPeer,
    honestly,
    make_content,
    open_descriptors,
    reasons,
    receive_piece,
    running_node,
    until,
)

pytestmark = pytest.mark.usefixtures("descriptors")

ONE_CLAIM = SwarmConfig(inbound_pieces=1)


@pytest.fixture(scope="module")
def content() -> Content:
    """Three pieces, the last one short."""
    return make_content(2 * PIECE_LENGTH_MIN + 12345)


def soon_idle(config: SwarmConfig, kind: PeerKind) -> SwarmLimits:
    """The limits of the program, with less patience for peers that give and take nothing."""
    limits = limits_of(config, kind)
    connections = attrs.evolve(limits.connections, idle_timeout=3.0)
    return attrs.evolve(limits, connections=connections)


def lose_patience(patch: pytest.MonkeyPatch) -> None:
    """For peers that are late.  Where others have to be in time it is undone: a busy machine is late, too."""
    patch.setattr(timing, "TIMEOUT_INITIAL", 0.5)
    patch.setattr(timing, "TIMEOUT_MIN", 0.5)
    patch.setattr(peer_link, "CHUNK_TIMEOUT", 0.5)
    patch.setattr(swarm_host, "limits_of", soon_idle)


# --- what hostile peers do ------------------------------------------------------------------------


async def unclaimed_piece(peer: ScriptedPeer, stream: PeerStream) -> None:
    index = await peer.hear_claim(stream)
    other = (index + 1) % 3
    await peer.send_bytes(stream, other, peer.content.piece(other)[:1000])
    await peer.listen(stream)


async def wrong_bytes(peer: ScriptedPeer, stream: PeerStream) -> None:
    index = await peer.hear_claim(stream)
    await peer.send_bytes(stream, index, random.randbytes(len(peer.content.piece(index))))
    await peer.listen(stream)


async def wrong_offset(peer: ScriptedPeer, stream: PeerStream) -> None:
    index = await peer.hear_claim(stream)
    await peer.send_bytes(stream, index, peer.content.piece(index)[5:1000], offset=5)
    await peer.listen(stream)


async def the_same_bytes_twice(peer: ScriptedPeer, stream: PeerStream) -> None:
    index = await peer.hear_claim(stream)
    for _ in range(2):
        await peer.send_bytes(stream, index, peer.content.piece(index)[:1000])
    await peer.listen(stream)


async def too_many_bytes(peer: ScriptedPeer, stream: PeerStream) -> None:
    index = await peer.hear_claim(stream)
    piece = peer.content.piece(index)
    part = len(piece) - 10
    await peer.send_bytes(stream, index, piece[:part])
    await peer.send_bytes(stream, index, bytes(20), offset=part)
    await peer.listen(stream)


async def oversize_chunk(peer: ScriptedPeer, stream: PeerStream) -> None:
    index = await peer.hear_claim(stream)
    header = bytearray(pack_chunk_header(PieceChunk(index, 0, CHUNK_BYTES_MAX)))
    header[:4] = (0x7FFFFFFF).to_bytes(4, "big")
    await stream._stream.send_all(header)
    await peer.listen(stream)


async def garbage(peer: ScriptedPeer, stream: PeerStream) -> None:
    await stream._stream.send_all(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * 20)
    await peer.listen(stream)


async def silence(peer: ScriptedPeer, stream: PeerStream) -> None:
    await peer.listen(stream)


async def offers_without_pieces(peer: ScriptedPeer, stream: PeerStream) -> None:
    while True:
        await peer.hear_claim(stream)


async def offers_that_nobody_asked_for(peer: ScriptedPeer, stream: PeerStream) -> None:
    await stream.send(*[Offer()] * 100)
    await offers_without_pieces(peer, stream)


async def offers_between_two_chunks_of_a_piece(peer: ScriptedPeer, stream: PeerStream) -> None:
    index = await peer.hear_claim(stream)
    await peer.send_bytes(stream, index, peer.content.piece(index)[:1000])
    await offers_without_pieces(peer, stream)


async def silence_inside_a_piece(peer: ScriptedPeer, stream: PeerStream) -> None:
    index = await peer.hear_claim(stream)
    header = pack_chunk_header(PieceChunk(index, 0, 5000))
    await stream._stream.send_all(header + peer.content.piece(index)[:2000])
    await peer.listen(stream)


async def hanging_up_inside_a_piece(peer: ScriptedPeer, stream: PeerStream) -> None:
    index = await peer.hear_claim(stream)
    header = pack_chunk_header(PieceChunk(index, 0, 5000))
    await stream._stream.send_all(header + peer.content.piece(index)[:2000])


async def endless_haves(peer: ScriptedPeer, stream: PeerStream) -> None:
    while True:
        await stream.send(*[Have(0)] * 100)


async def a_have_beyond_the_end(peer: ScriptedPeer, stream: PeerStream) -> None:
    await stream.send(Have(3))
    await peer.listen(stream)


async def an_offer_beyond_the_end(peer: ScriptedPeer, stream: PeerStream) -> None:
    await stream.send(Offer(3))
    await peer.listen(stream)


async def a_pass_beyond_the_end(peer: ScriptedPeer, stream: PeerStream) -> None:
    await peer.hear_claim(stream)
    await stream.send(Pass(3))
    await peer.listen(stream)


async def a_second_hello(peer: ScriptedPeer, stream: PeerStream) -> None:
    await stream.send(peer.hello)
    await peer.listen(stream)


HOSTILE = [
    (unclaimed_piece, "was not claimed"),
    (wrong_bytes, "corrupt"),
    (wrong_offset, "bytes at 5 of piece"),
    (the_same_bytes_twice, "bytes at 0 of piece"),
    (too_many_bytes, "more than the"),
    (oversize_chunk, "allowed are 1 to 524288"),
    (garbage, "protocol error"),
    (silence, "useless"),
    (offers_without_pieces, "stalled"),
    (offers_that_nobody_asked_for, "stalled"),
    (offers_between_two_chunks_of_a_piece, "stalled"),
    (an_offer_beyond_the_end, "protocol_error"),
    (a_pass_beyond_the_end, "protocol_error"),
    (silence_inside_a_piece, "stalled"),
    (hanging_up_inside_a_piece, "ended inside"),
    (endless_haves, "more HAVEs than the 3 pieces"),
    (a_have_beyond_the_end, "protocol_error"),
    (a_second_hello, "protocol_error"),
]
LATE = {"useless", "stalled"}


@asynccontextmanager
async def downloading(
    tmp_path: Path, content: Content, peer: ScriptedPeer
) -> AsyncIterator[tuple[Node, Download]]:
    """A node that has begun to download, with the peer as the only one it knows."""
    with trio.fail_after(120):
        async with (
            trio.open_nursery() as nursery,
            running_node(tmp_path / "leecher", config=ONE_CLAIM) as node,
        ):
            contact = await nursery.start(peer.serve)
            finder = Finder(content.metainfo, (contact,))
            yield node, await node.host.download(content.digest, "", finder.find)
            nursery.cancel_scope.cancel()


async def complete_from_an_honest_peer(
    node: Node, content: Content, download: Download, nursery: trio.Nursery
) -> None:
    honest = ScriptedPeer(content, honestly, number=2)
    contact = await nursery.start(honest.serve)
    node.host.dispatch(ev.PeersFound(content.digest, (contact,)))
    await download.wait()
    assert await node.stored(content)
    await until(lambda: node.buffered == 0)


@pytest.mark.parametrize(
    ("script", "reason"), HOSTILE, ids=[script.__name__ for script, _ in HOSTILE]
)
async def test_a_hostile_peer_loses_its_connection_and_an_honest_one_completes_the_download(
    tmp_path: Path,
    content: Content,
    logs: list[dict],
    monkeypatch: pytest.MonkeyPatch,
    script,
    reason: str,
) -> None:
    if reason in LATE:
        lose_patience(monkeypatch)
    hostile = ScriptedPeer(content, script)
    async with downloading(tmp_path, content, hostile) as (node, download):
        await hostile.ended.wait()
        await until(lambda: any(reason in found for found in reasons(logs)))
        await until(lambda: node.buffered == 0 and node.connections == 0)
        monkeypatch.undo()

        async with trio.open_nursery() as nursery:
            await complete_from_an_honest_peer(node, content, download, nursery)
            nursery.cancel_scope.cancel()

    assert sum(node.received().values()) == len(content.data)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"piece_count": 4}, "4 pieces, not 3"),
        ({"digest": make_content(1).digest}, "another torrent"),
    ],
)
async def test_a_peer_that_answers_with_a_wrong_hello_is_dropped(
    tmp_path: Path, content: Content, logs: list[dict], changes: dict, reason: str
) -> None:
    hostile = ScriptedPeer(content, silence)
    hostile.hello = hostile.make_hello(**changes)
    async with downloading(tmp_path, content, hostile) as (node, download):
        await hostile.ended.wait()
        await until(lambda: any(reason in found for found in reasons(logs)))

        async with trio.open_nursery() as nursery:
            await complete_from_an_honest_peer(node, content, download, nursery)
            nursery.cancel_scope.cancel()

    assert [bye.reason for bye in hostile.goodbyes] == [ByeReason.PROTOCOL_ERROR]


async def test_a_peer_that_was_restarted_is_used_under_its_new_id(
    tmp_path: Path, content: Content
) -> None:
    """The tracker still hands out the id from before the restart."""
    restarted = ScriptedPeer(content, honestly)
    restarted.hello = restarted.make_hello(peer_id="9" * 32)
    async with downloading(tmp_path, content, restarted) as (node, download):
        await download.wait()
        assert await node.stored(content)


async def test_a_peer_that_never_says_hello_is_given_up(
    tmp_path: Path, content: Content, logs: list[dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_connections, "HANDSHAKE_TIMEOUT", 0.5)

    async def accept(stream: trio.SocketStream) -> None:
        async with stream:
            while await stream.receive_some():
                pass

    mute = ScriptedPeer(content, honestly)
    mute._accept = accept  # type: ignore[method-assign]
    async with downloading(tmp_path, content, mute) as (node, download):
        await until(lambda: any("no answer to our HELLO within" in r for r in reasons(logs)))
        monkeypatch.undo()

        async with trio.open_nursery() as nursery:
            await complete_from_an_honest_peer(node, content, download, nursery)
            nursery.cancel_scope.cancel()


# --- those that dial us ---------------------------------------------------------------------------


async def test_garbage_and_silence_on_the_peer_port_end_with_a_reason(
    tmp_path: Path, content: Content, logs: list[dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_connections, "HANDSHAKE_TIMEOUT", 0.5)
    with trio.fail_after(60):
        async with running_node(tmp_path / "seeder") as node:
            await node.seed(content)
            garbage = await trio.open_tcp_stream("127.0.0.1", node.contact.port)
            await garbage.send_all(b"\x7f\x03\x01\x02\x00" + random.randbytes(600))
            silent = await trio.open_tcp_stream("127.0.0.1", node.contact.port)
            closing = await trio.open_tcp_stream("127.0.0.1", node.contact.port)
            await closing.aclose()

            await until(lambda: len(reasons(logs)) == 3)

            assert any("no HELLO within" in reason for reason in reasons(logs))
            for stream in (garbage, silent):
                with contextlib.suppress(trio.BrokenResourceError):
                    while await stream.receive_some():
                        pass
                await stream.aclose()
            assert node.connections == 0


async def test_an_unknown_blob_is_answered_so(tmp_path: Path, content: Content) -> None:
    with trio.fail_after(60):
        async with running_node(tmp_path / "seeder") as node:
            peer = ScriptedPeer(content, silence, have=0)

            stream = await peer.dial(node)
            await stream.aclose()

    assert peer.said == [Bye(ByeReason.UNKNOWN_TORRENT)]


async def test_claims_of_what_is_not_there_are_passed(tmp_path: Path, content: Content) -> None:
    with trio.fail_after(60):
        async with running_node(tmp_path / "leecher") as node:
            finder = Finder(content.metainfo)
            await node.host.download(content.digest, "", finder.find)
            peer = ScriptedPeer(content, silence, have=0)
            stream = await peer.dial(node)

            assert await peer.claim(stream, 0) == Offer(-1)
            await stream.send(Claim(1), Cancel(1), Claim(2))

            heard = [await peer.hear(stream) for _ in range(3)]
            assert heard == [Pass(0), Pass(1), Pass(2)]
            await stream.aclose()


async def test_a_claim_without_an_offer_is_passed_and_nothing_else_happens(
    tmp_path: Path, content: Content
) -> None:
    with trio.fail_after(60):
        async with running_node(tmp_path / "seeder") as node:
            await node.seed(content)
            peer = ScriptedPeer(content, silence, have=0)
            stream = await peer.dial(node)

            await stream.send(Claim(2), Claim(0), Claim(0))
            heard = [await peer.hear(stream) for _ in range(3)]

            assert heard == [Pass(2), Pass(0), Pass(0)]
            # What was claimed without an offer is neither remembered nor sent when an offer comes.
            await peer.claim(stream, 1)
            size = content.metainfo.piece_size(1)
            assert await receive_piece(stream, size, 1) == content.piece(1)
            await until(lambda: node.host.metrics.sent() == size)
            assert node.connections == 1
            await stream.aclose()


async def test_an_offer_answers_one_claim_only(tmp_path: Path, content: Content) -> None:
    with trio.fail_after(60):
        async with running_node(tmp_path / "seeder") as node:
            await node.seed(content)
            peer = ScriptedPeer(content, silence, have=0)
            stream = await peer.dial(node)
            heard: list[Message] = []

            async def hear(message: Message) -> None:
                heard.append(message)

            await stream.send(Want())
            await peer.hear_offer(stream)
            await stream.send(Claim(0), Claim(1))
            await receive_piece(stream, content.metainfo.piece_size(0), 0, hear=hear)

            assert heard == [Pass(1)]
            await stream.aclose()


async def test_a_receiver_that_vanishes_inside_a_piece_costs_no_descriptor(
    tmp_path: Path, content: Content
) -> None:
    with trio.fail_after(60):
        async with running_node(tmp_path / "seeder") as node:
            await node.seed(content)
            await trio.to_thread.run_sync(lambda: None)
            before = open_descriptors()
            for number in range(1, 6):
                peer = ScriptedPeer(content, silence, number=number, have=0)
                stream = await peer.dial(node)
                await peer.claim(stream, 0)
                await stream.receive()
                await stream.aclose()
            await until(lambda: node.connections == 0)

            assert open_descriptors() == before


async def test_a_piece_is_sent_while_messages_go_on(tmp_path: Path, content: Content) -> None:
    with trio.fail_after(60):
        async with running_node(tmp_path / "seeder") as node:
            await node.seed(content)
            peer = ScriptedPeer(content, silence, have=0)
            stream = await peer.dial(node)

            async def hear(message: Message) -> None:
                assert isinstance(message, Offer)
                await stream.send(Claim(2))
                claimed.append(2)

            claimed: list[int] = []
            await stream.send(Want())
            await peer.hear_offer(stream)
            await stream.send(Claim(0), Want())

            size = content.metainfo.piece_size(0)
            assert await receive_piece(stream, size, 0, hear=hear) == content.piece(0)
            assert claimed == [2], "the offer came between the chunks of the piece"
            size = content.metainfo.piece_size(2)
            assert await receive_piece(stream, size, 2) == content.piece(2)
            await stream.send(Bye(ByeReason.USELESS))
            await stream.aclose()


@pytest.mark.parametrize(
    "messages", [(Claim(0),), (Want(), Pass()), (Offer(),)], ids=["claims", "wants", "offers"]
)
async def test_a_peer_that_reads_nothing_is_cut_off(
    tmp_path: Path,
    content: Content,
    logs: list[dict],
    monkeypatch: pytest.MonkeyPatch,
    messages: tuple[Message, ...],
) -> None:
    def small_buffer(stream: trio.SocketStream, *, dead_after: float) -> None:
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)

    monkeypatch.setattr("swarmpull.roles.peer_link.OUTBOX_MAX", 2000)
    monkeypatch.setattr(peer_connections, "set_keepalive", small_buffer)
    with trio.fail_after(30):
        async with running_node(tmp_path / "leecher") as node:
            await node.host.download(content.digest, "", Finder(content.metainfo).find)
            peer = ScriptedPeer(content, silence, have=0)
            stream = await peer.dial(node)
            assert stream._socket is not None
            stream._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            with contextlib.suppress(*GONE):
                while node.connections:
                    await stream.send(*messages * 500)
            await until(lambda: node.connections == 0)
            await stream.aclose()

    assert "stalled does not read its messages" in reasons(logs)


FLOODS = {
    "wants": (Want(),),
    "wants and passes": (Want(), Pass()),
    "offers": (Offer(),),
    "offers of a piece": (Offer(1),),
    "passes": (Pass(), Pass(1)),
    "claims": (Claim(0),),
    "claims and cancels": (Want(), Claim(0), Cancel(0)),
}


@attrs.define
class Flood:
    """Sends the same messages to a node without end and throws away whatever comes back."""

    peer: ScriptedPeer
    messages: tuple[Message, ...]
    sent: int = 0
    goodbye: Bye | None = None

    async def run(self, node: Node) -> None:
        stream = await self.peer.dial(node)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._send, stream)
                await self._receive(stream)
                nursery.cancel_scope.cancel()
        finally:
            await stream.aclose()

    async def _receive(self, stream: PeerStream) -> None:
        with contextlib.suppress(*GONE):
            while self.goodbye is None:
                message = await stream.receive()
                if isinstance(message, PieceChunk):
                    await stream.discard()
                elif isinstance(message, Bye):
                    self.goodbye = message

    async def _send(self, stream: PeerStream) -> None:
        with contextlib.suppress(*GONE):
            while True:
                await stream.send(*self.messages * 100)
                self.sent += 100 * len(self.messages)


@pytest.mark.parametrize("messages", FLOODS.values(), ids=FLOODS.keys())
async def test_a_flood_of_messages_neither_grows_nor_stops_an_honest_download(
    tmp_path: Path, content: Content, messages: tuple[Message, ...]
) -> None:
    with trio.fail_after(60):
        async with (
            trio.open_nursery() as nursery,
            running_node(tmp_path / "seeder") as seeder,
            running_node(tmp_path / "leecher") as leecher,
        ):
            await seeder.seed(content)
            download = await leecher.host.download(
                content.digest, "", Finder(content.metainfo).find
            )
            # One floods him who gives; the other floods him who takes, and says that it has everything.
            taking = Flood(ScriptedPeer(content, silence, number=1, have=0), messages)
            giving = Flood(ScriptedPeer(content, silence, number=2), messages)
            nursery.start_soon(taking.run, seeder)
            nursery.start_soon(giving.run, leecher)
            await until(lambda: min(taking.sent, giving.sent) > 2000)
            leecher.host.dispatch(ev.PeersFound(content.digest, (seeder.contact,)))
            queued = 0
            while leecher.host.downloading(content.digest):
                for node in (seeder, leecher):
                    queued = max(queued, *map(len, books_of(node)))
                await trio.lowlevel.checkpoint()
            await download.wait()

            assert await leecher.stored(content)
            assert queued <= 2000
            nursery.cancel_scope.cancel()


def books_of(node: Node) -> list[Sized]:
    """Everything in which a host remembers what its peers said."""
    exchange: Any = node.host._scheduler._exchange
    links = node.host._connections._links.values()
    return [
        node.host._events,
        exchange._lines,
        exchange._offers,
        exchange._ready,
        exchange._sending,
        *exchange._queues.values(),
        *(link._outbox for link in links),
    ]


async def test_the_second_connection_of_a_peer_is_refused_as_a_duplicate(
    tmp_path: Path, content: Content
) -> None:
    with trio.fail_after(60):
        async with running_node(tmp_path / "seeder") as node:
            await node.seed(content)
            peer = ScriptedPeer(content, silence, have=0)
            first = await peer.dial(node)

            second = await peer.dial(node)

            assert isinstance(peer.said[1], Bye)
            assert peer.said[1].reason is ByeReason.DUPLICATE
            await second.aclose()
            await until(lambda: node.connections == 1)
            await first.aclose()


async def test_a_malformed_message_is_told_to_the_peer(tmp_path: Path, content: Content) -> None:
    with trio.fail_after(60):
        async with running_node(tmp_path / "seeder") as node:
            await node.seed(content)
            peer = ScriptedPeer(content, silence, have=0)
            stream = await peer.dial(node)

            await stream._stream.send_all(b"\x00\x00\x00\x02\x05\x00")

            message = await peer.hear(stream)
            assert isinstance(message, Bye)
            assert message.reason is ByeReason.PROTOCOL_ERROR
            assert "CLAIM" in message.text
            await stream.aclose()
