"""Rates over real sockets: what is paced, what is not, and what a change does.

Nothing is timed from above: a rate of a byte per second lets the burst pass and then nothing for hours, and
a rate that holds shows as a time that is not fallen short of.
"""

from __future__ import annotations

import math
from pathlib import Path

import attrs
import pytest
import trio

from swarmpull.config import SwarmConfig
from swarmpull.store.token_bucket import BURST_BYTES_MIN, PORTION_BYTES_MIN, TokenBucket
from swarmpull.swarm.messages import Have, Message, PieceChunk
from swarmpull.swarm.metainfo import PIECE_LENGTH_MIN
from swarmpull.wire.streams import CHUNK_BYTES_MAX, PeerStream

from .peers import (
    Content,
    Finder,
    Node,
    ScriptedPeer,
    fetch,
    honestly,
    make_content,
    receive_piece,
    running_node,
    until,
)

pytestmark = pytest.mark.usefixtures("descriptors")

MIB = 1 << 20
# So slow that nothing passes after the burst, and the portion that may exceed it.
AT_A_STANDSTILL = 1.0
PASSES_AT_ONCE = BURST_BYTES_MIN + PORTION_BYTES_MIN


@pytest.fixture(scope="module")
def content() -> Content:
    """Two pieces."""
    return make_content(2 * PIECE_LENGTH_MIN)


def limited(direction: str, rate: float) -> SwarmConfig:
    return SwarmConfig(**{f"{direction}_rate": rate})


@attrs.define
class Receiver:
    """Takes a piece off a connection and remembers what came with it, and when."""

    stream: PeerStream
    size: int
    taken: bytearray = attrs.field(factory=bytearray, repr=False)
    heard: list[tuple[int, Message]] = attrs.field(factory=list)

    async def run(self) -> None:
        while len(self.taken) < self.size:
            message = await self.stream.receive()
            if isinstance(message, PieceChunk):
                part = bytearray(message.length)
                await self.stream.receive_into(memoryview(part))
                self.taken += part
            else:
                self.heard.append((len(self.taken), message))

    def has_heard(self, message: Message) -> bool:
        return any(heard == message for _, heard in self.heard)


async def test_a_have_overtakes_a_paced_piece_and_a_new_rate_lets_the_rest_go(
    tmp_path: Path,
) -> None:
    content = make_content(3 * PIECE_LENGTH_MIN)
    gate = trio.Event()
    indices: list[int] = []

    async def one_and_then_another(peer: ScriptedPeer, stream: PeerStream) -> None:
        indices.append(await peer.hear_claim(stream))
        await peer.send_bytes(stream, indices[0], content.piece(indices[0]))
        indices.append(await peer.hear_claim(stream))
        await gate.wait()
        await peer.send_bytes(stream, indices[1], content.piece(indices[1]))
        await peer.listen(stream)

    async with (
        running_node(tmp_path / "node", config=limited("upload", AT_A_STANDSTILL)) as node,
        trio.open_nursery() as nursery,
    ):
        source = await nursery.start(ScriptedPeer(content, one_and_then_another).serve)
        finder = Finder(content.metainfo, (source,))
        download = await node.host.download(content.digest, "", finder.find)
        await until(lambda: download.partial.have.bit_count() == 1)
        taker = ScriptedPeer(content, honestly, number=2, have=0)
        stream = await taker.dial(node)
        await taker.claim(stream, indices[0])
        receiver = Receiver(stream, PIECE_LENGTH_MIN)
        nursery.start_soon(receiver.run)
        await until(lambda: len(receiver.taken) == PASSES_AT_ONCE)

        gate.set()
        await until(lambda: receiver.has_heard(Have(indices[1])))

        assert len(receiver.taken) == PASSES_AT_ONCE, "the piece is still being paced"
        node.host.rates.upload.set_rate(math.inf)
        await until(lambda: len(receiver.taken) == receiver.size)
        assert receiver.taken == content.piece(indices[0])
        nursery.cancel_scope.cancel()
        await stream.aclose()


async def test_a_host_whose_downloads_are_paced_goes_on_to_give(
    tmp_path: Path, content: Content
) -> None:
    async with (
        running_node(tmp_path / "node") as node,
        trio.open_nursery() as nursery,
    ):
        indices: list[int] = []

        async def two(peer: ScriptedPeer, stream: PeerStream) -> None:
            indices.append(await peer.hear_claim(stream))
            await peer.send_bytes(stream, indices[0], content.piece(indices[0]))
            indices.append(await peer.hear_claim(stream))
            node.host.rates.download.set_rate(AT_A_STANDSTILL)
            await peer.send_bytes(stream, indices[1], content.piece(indices[1]))
            await peer.listen(stream)

        source = await nursery.start(ScriptedPeer(content, two).serve)
        finder = Finder(content.metainfo, (source,))
        download = await node.host.download(content.digest, "", finder.find)
        await until(lambda: len(indices) == 2 and download.partial.have.bit_count() == 1)

        taker = ScriptedPeer(content, honestly, number=2, have=0)
        stream = await taker.dial(node)
        await taker.claim(stream, indices[0])
        piece = await receive_piece(stream, PIECE_LENGTH_MIN, indices[0])

        assert piece == content.piece(indices[0])
        assert download.partial.have.bit_count() == 1, "the other piece is still being paced"
        node.host.rates.download.set_rate(math.inf)
        await download.wait()
        assert await node.stored(content)
        nursery.cancel_scope.cancel()
        await stream.aclose()


@pytest.mark.parametrize("direction", ["upload", "download"])
async def test_a_lower_rate_takes_longer_and_both_hold(
    tmp_path: Path, content: Content, direction: str
) -> None:
    """The same blob at two rates at the same time; all that passes at once is the burst."""
    rates = {"slow": 4 * MIB, "fast": 32 * MIB}
    finished: list[str] = []

    async def at(name: str) -> None:
        config = limited(direction, rates[name])
        seeding, leeching = (config, None) if direction == "upload" else (None, config)
        async with (
            running_node(tmp_path / f"seeder-{name}", config=seeding) as seeder,
            running_node(tmp_path / f"leecher-{name}", config=leeching) as leecher,
        ):
            await seeder.seed(content)
            began = trio.current_time()
            await fetch(leecher, content, seeder.contact)
            took = trio.current_time() - began
            finished.append(name)
            # The debt of the last chunk is paid by the next one; a burst is 0.05 s of the rate.
            burst = max(0.05 * rates[name], BURST_BYTES_MIN)
            paced = len(content.data) - burst - CHUNK_BYTES_MAX
            assert took >= paced / rates[name]
            assert await leecher.stored(content)

    async with trio.open_nursery() as nursery:
        for name in rates:
            nursery.start_soon(at, name)

    assert finished == ["fast", "slow"]


async def test_all_peers_of_a_host_share_its_rate(tmp_path: Path, content: Content) -> None:
    rate = 8 * MIB
    async with (
        running_node(tmp_path / "seeder", config=limited("upload", rate)) as seeder,
        running_node(tmp_path / "one") as one,
        running_node(tmp_path / "two") as two,
    ):
        await seeder.seed(content)
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            # Unknown to each other, so that every byte leaves the seeder.
            nursery.start_soon(fetch, one, content, seeder.contact)
            nursery.start_soon(fetch, two, content, seeder.contact)
        took = trio.current_time() - began

        assert seeder.host.metrics.sent() == 2 * len(content.data)
        assert took >= (2 * len(content.data) - BURST_BYTES_MIN - CHUNK_BYTES_MAX) / rate


@pytest.mark.parametrize("direction", ["upload", "download"])
async def test_a_rate_set_while_running_stops_a_download_and_lets_it_go_on(
    tmp_path: Path, content: Content, direction: str
) -> None:
    async with (
        running_node(tmp_path / "seeder") as seeder,
        running_node(tmp_path / "leecher") as leecher,
    ):
        await seeder.seed(content)
        bucket = rate_of(seeder if direction == "upload" else leecher, direction)
        bucket.set_rate(AT_A_STANDSTILL)
        finder = Finder(content.metainfo, (seeder.contact,))
        download = await leecher.host.download(content.digest, "", finder.find)
        await until(lambda: bucket._tokens <= -1)

        assert download.partial.have == 0
        bucket.set_rate(64 * MIB)
        await until(lambda: download.partial.have.bit_count() > 0)
        bucket.set_rate(math.inf)
        await download.wait()

        assert await leecher.stored(content)
        assert sum(leecher.received().values()) == len(content.data)


def rate_of(node: Node, direction: str) -> TokenBucket:
    rates = node.host.rates
    return rates.upload if direction == "upload" else rates.download
