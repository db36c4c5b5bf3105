"""What a link asks of its host before it sends: each chunk of a piece is paid for once."""

from __future__ import annotations

import os

import pytest
import trio
from trio.testing import memory_stream_pair, wait_all_tasks_blocked

from swarmpull.digest import Digest
from swarmpull.roles.peer_link import CHUNK_BYTES_FIRST, PeerLink
from swarmpull.swarm.messages import Have, PieceChunk
from swarmpull.swarm.metainfo import PIECE_LENGTH_MIN, Metainfo
from swarmpull.swarm.peers import PeerContact, PeerKind
from swarmpull.wire.streams import PeerStream

SIZE = 2 * CHUNK_BYTES_FIRST + 1000
CONTENT = os.urandom(SIZE)
METAINFO = Metainfo(Digest.of(CONTENT), SIZE, PIECE_LENGTH_MIN, bytes(32))


class Host:
    """Has turns on its uplink to give, at once or after a wait."""

    def __init__(self) -> None:
        self.is_free = False
        self.asked: list[int] = []
        self.paid = trio.Event()
        self.sent: list[int] = []

    def may_send_now(self, connection: int) -> bool:
        return self.is_free

    async def may_send(self, connection: int, size: int) -> int:
        self.asked.append(size)
        await self.paid.wait()
        return size

    def chunk_sent(self, connection: int, size: int) -> None:
        self.sent.append(size)

    def send_progress(self, connection: int, index: int) -> None:
        pass

    def piece_sent(self, connection: int, index: int, size: int) -> None:
        pass


@pytest.fixture
def file(tmp_path) -> int:
    """A descriptor that the link closes."""
    path = tmp_path / "piece"
    path.write_bytes(CONTENT)
    return os.open(path, os.O_RDONLY)


async def receive(stream: PeerStream) -> PieceChunk | Have:
    message = await stream.receive()
    if isinstance(message, PieceChunk):
        payload = bytearray(message.length)
        await stream.receive_into(memoryview(payload))
        assert payload == CONTENT[message.offset : message.offset + message.length]
    return message


async def test_a_chunk_that_waits_for_its_turn_is_not_sent_before_it(file) -> None:
    ours, theirs = memory_stream_pair()
    other = PeerStream(theirs)
    host = Host()
    contact = PeerContact("0" * 32, "127.0.0.1", 1, PeerKind.AGENT)
    link = PeerLink(1, METAINFO.digest, contact, PeerStream(ours), host)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(link.run, METAINFO)
        link.send_piece(0, file, 0, SIZE)
        await wait_all_tasks_blocked()
        assert host.asked == [CHUNK_BYTES_FIRST]
        # The turn comes another way while the link waits for it: this chunk has been asked for.
        host.is_free = True
        link.send(Have(0))
        assert await receive(other) == Have(0)
        await wait_all_tasks_blocked()
        assert host.sent == []

        host.paid.set()
        filled = 0
        while filled < SIZE:
            chunk = await receive(other)
            assert isinstance(chunk, PieceChunk)
            assert chunk.offset == filled
            filled += chunk.length
        await wait_all_tasks_blocked()
        assert sum(host.sent) == SIZE
        assert host.asked == [CHUNK_BYTES_FIRST]  # the others had their turn at once
        nursery.cancel_scope.cancel()
