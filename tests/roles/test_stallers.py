"""More peers that stop inside a piece than there are buffers for pieces, over real sockets."""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest
import trio

from swarmpull.config import SwarmConfig
from swarmpull.roles import peer_link, swarm_host
from swarmpull.roles.swarm_host import limits_of
from swarmpull.swarm import events as ev
from swarmpull.swarm import timing, torrent
from swarmpull.swarm.messages import ByeReason, PieceChunk
from swarmpull.swarm.metainfo import PIECE_LENGTH_MIN
from swarmpull.swarm.peers import PeerKind
from swarmpull.swarm.scheduler import SwarmLimits
from swarmpull.wire.peer import pack_chunk_header
from swarmpull.wire.streams import CHUNK_BYTES_MAX, PeerStream

from .peers import Content, Finder, ScriptedPeer, honestly, make_content, running_node, until

pytestmark = pytest.mark.usefixtures("descriptors")

STALLERS = 12
HOUR = 3600.0
# Buffers for eight pieces; connections for all who are there.
CONFIG = SwarmConfig(dial_connections=STALLERS + 1)
BUFFERS = 2 * CONFIG.inbound_pieces


@pytest.fixture(scope="module")
def content() -> Content:
    return make_content(24 * PIECE_LENGTH_MIN)


def without_other_ends(config: SwarmConfig, kind: PeerKind) -> SwarmLimits:
    limits = limits_of(config, kind)
    connections = attrs.evolve(limits.connections, idle_timeout=HOUR)
    return attrs.evolve(limits, connections=connections)


@pytest.fixture(autouse=True)
def soon_overdue(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claims are overdue soon; nothing but the want of buffers ends a connection that stalls."""
    monkeypatch.setattr(timing, "TIMEOUT_INITIAL", 0.5)
    monkeypatch.setattr(torrent, "SILENCE_MIN", 0.2)
    monkeypatch.setattr(peer_link, "CHUNK_TIMEOUT", HOUR)
    monkeypatch.setattr(swarm_host, "limits_of", without_other_ends)


async def stop_inside_a_chunk(peer: ScriptedPeer, stream: PeerStream) -> None:
    index = await peer.hear_claim(stream)
    header = pack_chunk_header(PieceChunk(index, 0, CHUNK_BYTES_MAX))
    await stream._stream.send_all(header + peer.content.piece(index)[:1000])
    await peer.listen(stream)


async def stop_between_two_chunks(peer: ScriptedPeer, stream: PeerStream) -> None:
    index = await peer.hear_claim(stream)
    await peer.send_bytes(stream, index, peer.content.piece(index)[:CHUNK_BYTES_MAX])
    await peer.listen(stream)


@pytest.mark.parametrize("script", [stop_inside_a_chunk, stop_between_two_chunks])
async def test_stallers_that_hold_all_buffers_have_to_give_them_to_one_who_delivers(
    tmp_path: Path, content: Content, script
) -> None:
    stallers = [ScriptedPeer(content, script, number=n) for n in range(1, STALLERS + 1)]
    honest = ScriptedPeer(content, honestly, number=STALLERS + 1)
    async with (
        trio.open_nursery() as nursery,
        running_node(tmp_path / "leecher", config=CONFIG) as node,
    ):
        contacts = [await nursery.start(peer.serve) for peer in stallers]
        finder = Finder(content.metainfo, tuple(contacts))
        download = await node.host.download(content.digest, "", finder.find)
        await until(lambda: node.buffered == BUFFERS * PIECE_LENGTH_MIN)

        contact = await nursery.start(honest.serve)
        node.host.dispatch(ev.PeersFound(content.digest, (contact,)))
        await download.wait()
        assert await node.stored(content)
        await until(lambda: node.buffered == 0)
        nursery.cancel_scope.cancel()

    stalled = [bye for peer in stallers for bye in peer.goodbyes if bye.reason is ByeReason.STALLED]
    assert any("buffer" in bye.text for bye in stalled)
    assert honest.goodbyes == [] or honest.goodbyes[-1].reason is not ByeReason.STALLED


async def test_peers_that_go_on_slowly_keep_their_buffers_however_many_wait(
    tmp_path: Path, content: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two hold both buffers, and a third waits until one of them is done."""
    # A fifth of what their first pieces take, and several times what this process may lose of its time.
    monkeypatch.setattr(torrent, "SILENCE_MIN", 0.6)
    config = SwarmConfig(inbound_pieces=1)
    slow = [ScriptedPeer(content, trickle, number=n) for n in (1, 2)]
    third = ScriptedPeer(content, honestly, number=3)
    async with (
        trio.open_nursery() as nursery,
        running_node(tmp_path / "leecher", config=config) as node,
    ):
        finder = Finder(content.metainfo, tuple([await nursery.start(p.serve) for p in slow]))
        download = await node.host.download(content.digest, "", finder.find)
        await until(lambda: node.buffered == 2 * PIECE_LENGTH_MIN)
        node.host.dispatch(ev.PeersFound(content.digest, (await nursery.start(third.serve),)))
        await download.wait()
        assert await node.stored(content)
        nursery.cancel_scope.cancel()

    goodbyes = [bye for peer in slow for bye in peer.goodbyes]
    assert not [bye for bye in goodbyes if bye.reason is ByeReason.STALLED]


async def test_a_peer_that_turns_into_a_black_hole_is_given_up_by_what_pieces_usually_take(
    tmp_path: Path, content: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under SIGSTOP: the connection stays, and nothing comes.  No fixed time would end it within an
    hour."""
    monkeypatch.setattr(timing, "TIMEOUT_INITIAL", HOUR)
    monkeypatch.setattr(timing, "PROGRESS_TIMEOUT_MIN", HOUR)
    hole = ScriptedPeer(content, give_three_pieces_and_stop, number=1)
    honest = ScriptedPeer(content, honestly, number=2)
    async with (
        trio.open_nursery() as nursery,
        running_node(tmp_path / "leecher", config=CONFIG) as node,
    ):
        contacts = tuple([await nursery.start(peer.serve) for peer in (hole, honest)])
        download = await node.host.download(
            content.digest, "", Finder(content.metainfo, contacts).find
        )
        await download.wait()
        assert await node.stored(content)
        nursery.cancel_scope.cancel()


async def give_three_pieces_and_stop(peer: ScriptedPeer, stream: PeerStream) -> None:
    for _ in range(3):
        index = await peer.hear_claim(stream)
        await peer.send_bytes(stream, index, peer.content.piece(index))
    await stop_between_two_chunks(peer, stream)


async def trickle(peer: ScriptedPeer, stream: PeerStream) -> None:
    """The first piece takes several times as long as silence is allowed; the others come as they can."""
    index = await peer.hear_claim(stream)
    piece = peer.content.piece(index)
    part = PIECE_LENGTH_MIN // 32
    for start in range(0, len(piece), part):
        await peer.send_bytes(stream, index, piece[start : start + part], offset=start)
        await trio.sleep(0.1)
    await peer.honest(stream)
