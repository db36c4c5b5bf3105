import contextlib
import os
import socket

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmpull.digest import Digest
from swarmpull.errors import ProtocolError, StoreUnavailable
from swarmpull.swarm.messages import Bye, ByeReason, Cancel, Claim, Have, Hello, Pass, PieceChunk
from swarmpull.swarm.peers import PeerKind
from swarmpull.wire import peer
from swarmpull.wire.frames import pack_frame, pack_header
from swarmpull.wire.streams import CHUNK_BYTES_MAX, NOTSENT_BYTES_MAX, NOTSENT_BYTES_MIN, PeerStream

MIB = 1 << 20
HELLO = Hello(Digest.of(b"x"), "a/b", "0" * 32, PeerKind.AGENT, 7100, 3, b"\x05")
MESSAGES = [HELLO, Have(1), Claim(2), Pass(2), Cancel(1), Bye(ByeReason.USELESS, "both complete")]


class Wrapped(trio.abc.Stream):
    """A stream that is not a plain socket, as one with TLS would be."""

    def __init__(self, inner):
        self.inner = inner

    async def send_all(self, data):
        await self.inner.send_all(data)

    async def wait_send_all_might_not_block(self):
        await self.inner.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes=None):
        return await self.inner.receive_some(max_bytes)

    async def aclose(self):
        await self.inner.aclose()


async def socket_pair():
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        left = await trio.open_tcp_stream(*listener.socket.getsockname())
        return left, await listener.accept()


@pytest.fixture(params=["tcp", "wrapped"])
async def pair(request):
    left, right = await socket_pair()
    wrap = Wrapped if request.param == "wrapped" else lambda stream: stream
    async with left, right:
        yield PeerStream(wrap(left)), PeerStream(wrap(right))


@pytest.fixture
async def tcp_pair():
    left, right = await socket_pair()
    async with left, right:
        yield PeerStream(left), PeerStream(right)


@pytest.fixture
async def raw_pair():
    left, right = await socket_pair()
    async with left, right:
        yield left, PeerStream(right)


@pytest.fixture
def blob(tmp_path):
    content = os.urandom(3 * MIB + 17)
    path = tmp_path / "blob"
    path.write_bytes(content)
    descriptor = os.open(path, os.O_RDONLY)
    yield content, descriptor
    os.close(descriptor)


async def receive_chunk(stream):
    chunk = await stream.receive()
    assert isinstance(chunk, PieceChunk)
    payload = bytearray(chunk.length)
    await stream.receive_into(memoryview(payload))
    return chunk, payload


async def test_messages_arrive_in_order_in_both_directions(pair):
    left, right = pair
    await left.send(*MESSAGES)
    await right.send(Have(9))
    assert [await right.receive() for _ in MESSAGES] == MESSAGES
    assert await left.receive() == Have(9)


async def test_chunks_and_messages_mix_and_payloads_come_whole(pair, blob):
    left, right = pair
    content, file = blob
    sizes = [1, 5000, CHUNK_BYTES_MAX, CHUNK_BYTES_MAX, 12_345]

    async def send():
        offset = 0
        for size in sizes:
            await left.send_chunk(PieceChunk(0, offset, size), file, offset)
            await left.send(Have(size % 1000), Claim(1))
            offset += size

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        offset = 0
        for size in sizes:
            chunk, payload = await receive_chunk(right)
            assert chunk == PieceChunk(0, offset, size)
            assert payload == content[offset : offset + size]
            assert await right.receive() == Have(size % 1000)
            assert await right.receive() == Claim(1)
            offset += size


async def test_a_payload_may_be_taken_as_it_comes(pair, blob):
    left, right = pair
    content, file = blob
    told = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(left.send_chunk, PieceChunk(0, 0, CHUNK_BYTES_MAX), file, 0, told.append)
        chunk = await right.receive()
        payload = bytearray()
        while len(payload) < chunk.length:
            part = bytearray(chunk.length - len(payload))
            count = await right.receive_some_into(memoryview(part))
            assert count > 0
            payload += part[:count]
    assert payload == content[:CHUNK_BYTES_MAX]
    assert sum(told) == CHUNK_BYTES_MAX
    await left.send(Have(1))
    assert await right.receive() == Have(1)


async def test_waiting_for_some_of_a_payload_can_be_cancelled_and_loses_nothing(pair, blob):
    left, right = pair
    content, _ = blob
    await left._stream.send_all(peer.pack_chunk_header(PieceChunk(0, 0, 1000)) + content[:300])
    await right.receive()
    part = memoryview(bytearray(1000))
    filled = 0
    with trio.move_on_after(0.1) as scope:
        while True:
            filled += await right.receive_some_into(part[filled:])
    assert scope.cancelled_caught
    assert filled == 300
    await left._stream.send_all(content[300:1000])
    while filled < 1000:
        filled += await right.receive_some_into(part[filled:])
    assert part == content[:1000]


async def test_no_more_of_a_payload_can_be_taken_than_there_is(pair, blob):
    left, right = pair
    content, _ = blob
    await left._stream.send_all(peer.pack_chunk_header(PieceChunk(0, 0, 10)) + content[:10])
    await right.receive()
    for size in (0, 11):
        with pytest.raises(ValueError, match="10 are left"):
            await right.receive_some_into(memoryview(bytearray(size)))


async def test_a_chunk_larger_than_every_buffer_passes_a_slow_receiver(pair, blob):
    left, right = pair
    content, file = blob
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def send():
            for offset in range(0, 3 * MIB, CHUNK_BYTES_MAX):
                await left.send_chunk(PieceChunk(0, offset, CHUNK_BYTES_MAX), file, offset)

        await trio.testing.wait_all_tasks_blocked()
        got = b"".join([(await receive_chunk(right))[1] for _ in range(6)])
    assert got == content[: 3 * MIB]


async def test_a_payload_may_be_taken_in_parts_or_thrown_away(pair, blob):
    left, right = pair
    content, file = blob
    await left.send_chunk(PieceChunk(4, 0, 10_000), file, 100)
    await left.send_chunk(PieceChunk(5, 0, 10_000), file, 0)
    await left.send(Have(1))
    assert await right.receive() == PieceChunk(4, 0, 10_000)
    part = bytearray(3000)
    await right.receive_into(memoryview(part))
    assert part == content[100:3100]
    await right.discard()
    assert await right.receive() == PieceChunk(5, 0, 10_000)
    await right.discard()
    assert await right.receive() == Have(1)


async def test_a_payload_that_is_not_taken_is_a_bug(tcp_pair, blob):
    left, right = tcp_pair
    await left.send_chunk(PieceChunk(0, 0, 10), blob[1], 0)
    await right.receive()
    with pytest.raises(RuntimeError, match="10 bytes of payload"):
        await right.receive()
    with pytest.raises(ValueError, match="11 bytes wanted, 10 are left"):
        await right.receive_into(memoryview(bytearray(11)))


async def test_frames_of_several_senders_never_mix(pair, blob):
    left, right = pair
    content, file = blob

    async def send_piece(index):
        for offset in range(0, 2 * MIB, CHUNK_BYTES_MAX):
            await left.send_chunk(PieceChunk(index, offset, CHUNK_BYTES_MAX), file, offset)
            await left.send(Have(index))

    pieces = {index: bytearray() for index in range(3)}
    haves = 0
    async with trio.open_nursery() as nursery:
        for index in pieces:
            nursery.start_soon(send_piece, index)
        while haves < 12:
            message = await right.receive()
            if isinstance(message, Have):
                haves += 1
                continue
            payload = bytearray(message.length)
            await right.receive_into(memoryview(payload))
            assert message.offset == len(pieces[message.index])
            pieces[message.index] += payload
    assert all(piece == content[: 2 * MIB] for piece in pieces.values())


async def test_every_split_of_the_stream_gives_the_same_messages(autojump_clock):
    wire = b"".join(map(peer.pack, MESSAGES))
    wire += peer.pack_chunk_header(PieceChunk(1, 2, 5)) + b"hello" + peer.pack(Have(7))
    for cut in range(len(wire) + 1):
        ours, theirs = trio.testing.memory_stream_pair()
        stream = PeerStream(theirs)
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def send(ours=ours, cut=cut):
                await ours.send_all(wire[:cut])
                await trio.sleep(1)
                await ours.send_all(wire[cut:])
                await ours.aclose()

            got = [await stream.receive() for _ in MESSAGES]
            chunk, payload = await receive_chunk(stream)
            assert got == MESSAGES
            assert (chunk, payload) == (PieceChunk(1, 2, 5), b"hello")
            assert await stream.receive() == Have(7)
            with pytest.raises(trio.EndOfChannel):
                await stream.receive()


async def test_cancelling_receive_loses_nothing_wherever_it_strikes(autojump_clock):
    wire = b"".join(map(peer.pack, MESSAGES))
    for cut in range(len(wire)):
        ours, theirs = trio.testing.memory_stream_pair()
        stream = PeerStream(theirs)
        await ours.send_all(wire[:cut])
        got = []
        with trio.move_on_after(1):
            while True:
                got.append(await stream.receive())
        await ours.send_all(wire[cut:])
        got += [await stream.receive() for _ in range(len(MESSAGES) - len(got))]
        assert got == MESSAGES


async def test_the_end_of_the_connection_inside_anything_is_a_protocol_error():
    wire = peer.pack(HELLO) + peer.pack_chunk_header(PieceChunk(1, 2, 5)) + b"hello"
    boundary = len(peer.pack(HELLO))
    for cut in range(1, len(wire)):
        ours, theirs = trio.testing.memory_stream_pair()
        await ours.send_all(wire[:cut])
        await ours.aclose()
        stream = PeerStream(theirs)
        expected = trio.EndOfChannel if cut == boundary else ProtocolError
        with pytest.raises(expected):
            await receive_hello_and_chunk(stream)


async def receive_hello_and_chunk(stream):
    assert await stream.receive() == HELLO
    await receive_chunk(stream)


async def test_unknown_messages_are_skipped(raw_pair):
    raw, stream = raw_pair
    await raw.send_all(
        pack_frame(77, b"\0\0\0\1") + pack_frame(200, bytes(30_000)) + peer.pack(Have(1))
    )
    assert await stream.receive() == Have(1)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "GET "),
        (bytes.fromhex("1603010200 0100"), "only one side speaks TLS: set tls.ca"),
        (bytes(5), "length 0"),
        (pack_header(1, peer.BODY_BYTES_MAX + 1), "the limit is 32768"),
        (pack_header(200, 1 << 31), "the limit is 32768"),
        (pack_header(peer.FrameType.PIECE, CHUNK_BYTES_MAX + 9), "PIECE of 524289 bytes"),
        (pack_header(peer.FrameType.PIECE, 8), "PIECE of 0 bytes"),
        (pack_frame(2, b"abc"), "HAVE with a body of 3 bytes"),
    ],
)
async def test_garbage_is_refused_from_its_first_bytes(raw_pair, data, reason):
    raw, stream = raw_pair
    await raw.send_all(data)
    with pytest.raises(ProtocolError, match=reason):
        await stream.receive()
    assert len(stream._buffer) <= 4096


async def test_the_first_message_must_be_a_hello(raw_pair):
    raw, stream = raw_pair
    await raw.send_all(peer.pack(Have(1)))
    with pytest.raises(ProtocolError, match="began with Have instead of HELLO"):
        await stream.receive_hello()


async def test_a_hello_or_a_bye_may_come_first_and_silence_is_an_error(raw_pair):
    raw, stream = raw_pair
    await raw.send_all(peer.pack(HELLO) + peer.pack(Bye(ByeReason.BUSY)))
    assert await stream.receive_hello() == HELLO
    assert await stream.receive_hello() == Bye(ByeReason.BUSY)
    await raw.aclose()
    with pytest.raises(ProtocolError, match="closed before its HELLO"):
        await stream.receive_hello()


async def test_a_file_that_became_shorter_ends_the_connection_and_nothing_more_can_be_sent(
    pair, tmp_path
):
    left, _right = pair
    path = tmp_path / "blob"
    path.write_bytes(b"x" * 100)
    with path.open("rb") as file, pytest.raises(StoreUnavailable, match="ended inside piece 2"):
        await left.send_chunk(PieceChunk(2, 0, 101), file.fileno(), 0)
    if left._socket is not None:
        with pytest.raises(trio.BrokenResourceError, match="inside a frame"):
            await left.send(Have(1))


async def test_an_unreadable_file_is_an_error_of_the_store(tcp_pair, tmp_path):
    left, _ = tcp_pair
    descriptor = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(StoreUnavailable):
            await left.send_chunk(PieceChunk(2, 0, 101), descriptor, 0)
    finally:
        os.close(descriptor)


async def test_cancelling_a_send_inside_a_frame_breaks_the_sending_direction(pair, blob):
    left, right = pair
    file = blob[1]
    with trio.move_on_after(0.2) as scope:
        while True:
            await left.send_chunk(PieceChunk(0, 0, CHUNK_BYTES_MAX), file, 0)
    assert scope.cancelled_caught
    for send in (left.send(Have(1)), left.send_chunk(PieceChunk(0, 0, 1), file, 0)):
        with pytest.raises(trio.BrokenResourceError, match="interrupted inside a frame"):
            await send
    # The other direction goes on.
    await right.send(Have(5))
    assert await left.receive() == Have(5)


async def test_cancelling_before_a_frame_begins_breaks_nothing(pair, blob):
    left, right = pair
    with trio.CancelScope() as scope:
        scope.cancel()
        await left.send(Have(1))
    with trio.CancelScope() as scope:
        scope.cancel()
        await left.send_chunk(PieceChunk(0, 0, 10), blob[1], 0)
    await left.send(Have(2))
    assert await right.receive() == Have(2)


async def test_cancelling_receive_into_breaks_the_receiving_direction(raw_pair):
    raw, stream = raw_pair
    await raw.send_all(peer.pack_chunk_header(PieceChunk(0, 0, 100)) + b"half")
    assert await stream.receive() == PieceChunk(0, 0, 100)
    with trio.move_on_after(0.05) as scope:
        await stream.receive_into(memoryview(bytearray(100)))
    assert scope.cancelled_caught
    with pytest.raises(trio.BrokenResourceError, match="interrupted"):
        await stream.receive_into(memoryview(bytearray(1)))
    with pytest.raises(trio.BrokenResourceError, match="interrupted"):
        await stream.discard()
    await stream.send(Have(1))


async def forever(use):
    while True:
        await use()


async def test_closing_wakes_a_blocked_sender_and_receiver(pair, blob):
    left, _ = pair
    ended = []

    async def expect_closed(use):
        with pytest.raises((trio.ClosedResourceError, trio.BrokenResourceError)):
            await forever(use)
        ended.append(use)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(
            expect_closed,
            lambda: left.send_chunk(PieceChunk(0, 0, CHUNK_BYTES_MAX), blob[1], 0),
        )
        nursery.start_soon(expect_closed, left.receive)
        # Long enough for the sender to fill the buffers of the kernel, which no event announces.
        with trio.move_on_after(0.2):
            await trio.sleep_forever()
        await left.aclose()
    assert len(ended) == 2


async def test_leaving_delivers_the_bye_even_with_unread_bytes_and_when_cancelled(pair, blob):
    left, right = pair
    await right.send_chunk(PieceChunk(0, 0, 100_000), blob[1], 0)

    async def leave():
        with trio.CancelScope() as scope:
            scope.cancel()
            await left.leave(Bye(ByeReason.DRAINING))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(leave)
        assert await right.receive() == Bye(ByeReason.DRAINING)
        if right._socket is not None:
            with pytest.raises(trio.EndOfChannel):
                await right.receive()
        await right.aclose()
    with pytest.raises(trio.ClosedResourceError):
        await left.send(Have(1))


async def test_leaving_a_connection_that_is_gone_is_no_error(pair):
    left, right = pair
    await right.aclose()
    await left.leave(Bye(ByeReason.DRAINING))
    await left.leave(Bye(ByeReason.DRAINING))


async def test_a_reset_connection_is_a_broken_resource(tcp_pair, blob):
    left, right = tcp_pair
    right._stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    await right.aclose()
    with pytest.raises(trio.BrokenResourceError):
        await left.receive()
    with pytest.raises(trio.BrokenResourceError):
        await forever(lambda: left.send_chunk(PieceChunk(0, 0, 1000), blob[1], 0))


async def test_small_messages_are_not_held_back_behind_megabytes(tcp_pair, blob):
    left, right = tcp_pair

    def unsent_max() -> int:
        return left._stream.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT)

    assert left._stream.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert unsent_max() == NOTSENT_BYTES_MIN
    # No more than fits into the buffers of the two sockets, so that it is taken at once.
    for length, seconds in ((30_000, 1e-6), (30_000, 1e-6), (30_000, 1e-6), (30_000, 1.0)):
        before = unsent_max()
        left._fit_notsent(left._socket, length, seconds)
        assert unsent_max() == (before * 2 if seconds < 1 else before // 2)
    for _ in range(10):
        left._fit_notsent(left._socket, CHUNK_BYTES_MAX, 1e-6)
    assert unsent_max() == NOTSENT_BYTES_MAX
    await left.send_chunk(PieceChunk(0, 0, 1000), blob[1], 0)
    assert (await receive_chunk(right))[1] == blob[0][:1000]


async def receive_at_speed(left: PeerStream, right: PeerStream, content: bytes) -> None:
    """Make ``right`` think that it has a fast connection: a chunk that was all there at once."""
    await left._stream.send_all(peer.pack_chunk_header(PieceChunk(0, 0, 20_000)) + content[:20_000])
    await receive_chunk(right)
    assert right._gather > 1000


async def receive_the_beginning(
    left: PeerStream, right: PeerStream, content: bytes
) -> tuple[bytearray, int]:
    """On such a connection: room for a chunk of 20,000 bytes, and how many of the 100 sent are there."""
    await receive_at_speed(left, right, content)
    await left._stream.send_all(peer.pack_chunk_header(PieceChunk(0, 0, 20_000)) + content[:100])
    await right.receive()
    payload = bytearray(20_000)
    return payload, await right.receive_some_into(memoryview(payload))


def low_water(stream: PeerStream) -> int:
    return stream._stream.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT)


async def test_payload_of_a_fast_connection_is_gathered_and_messages_are_not(tcp_pair, blob):
    left, right = tcp_pair
    content, _ = blob
    payload, filled = await receive_the_beginning(left, right, content)
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def trickle():
            for start in range(100, 20_000, 100):
                await left._stream.send_all(content[start : start + 100])
            await left.send(Have(1))

        reads = 0
        while filled < len(payload):
            filled += await right.receive_some_into(memoryview(payload)[filled:])
            reads += 1
    assert payload == content[:20_000]
    assert reads < 20  # of 199 that a read for each arrival would be
    assert await right.receive() == Have(1)
    # Nothing that is shorter than what was gathered waits for more.
    await left.send(Have(2))
    assert await right.receive() == Have(2)
    assert low_water(right) == 1


async def test_what_stops_to_come_is_read_all_the_same(tcp_pair, blob):
    left, right = tcp_pair
    content, _ = blob
    payload, filled = await receive_the_beginning(left, right, content)
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def take_some():
            nonlocal filled
            filled += await right.receive_some_into(memoryview(payload)[filled:])

        await trio.testing.wait_all_tasks_blocked(0.01)
        assert low_water(right) > 1
        await left._stream.send_all(content[100:150])
    assert filled == 150
    await left._stream.send_all(content[150:20_000])
    await right.receive_into(memoryview(payload)[150:])
    assert payload == content[:20_000]


async def test_the_end_of_a_connection_is_noticed_while_payload_is_gathered(tcp_pair, blob):
    left, right = tcp_pair
    content, _ = blob
    payload, filled = await receive_the_beginning(left, right, content)
    await left._stream.send_eof()
    with pytest.raises(ProtocolError, match="inside a PIECE"):
        await right.receive_into(memoryview(payload)[filled:])


async def test_pages_that_are_not_in_memory_are_read_in_a_thread(tcp_pair, blob, monkeypatch):
    left, right = tcp_pair
    content, file = blob
    read = []

    def cold(descriptor, buffers, offset, flags):
        raise BlockingIOError

    real_pread = os.pread

    def pread(descriptor, size, offset):
        read.append((size, offset))
        return real_pread(descriptor, size, offset)

    monkeypatch.setattr(os, "preadv", cold)
    monkeypatch.setattr(os, "pread", pread)
    await left.send_chunk(PieceChunk(0, 0, 1000), file, 50)
    assert read == [(1000, 50)]
    assert (await receive_chunk(right))[1] == content[50:1050]


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300), st.booleans())
def test_any_bytes_end_in_a_protocol_error_or_the_end_of_the_connection(data, framed):
    async def main():
        ours, theirs = trio.testing.memory_stream_pair()
        await ours.send_all(pack_frame(data[0] if data else 1, data[1:]) if framed else data)
        await ours.aclose()
        stream = PeerStream(theirs)
        with contextlib.suppress(ProtocolError, trio.EndOfChannel):
            while True:
                if isinstance(await stream.receive(), PieceChunk):
                    await stream.discard()
        assert len(stream._buffer) <= peer.BODY_BYTES_MAX

    trio.run(main)
