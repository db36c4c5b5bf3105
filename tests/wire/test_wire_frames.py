import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmpull.errors import ProtocolError
from swarmpull.wire.frames import Frame, FrameBuffer, pack_frame, pack_header, unpack_header

FRAMES = [Frame(1, b""), Frame(7, b"abc"), Frame(255, bytes(300)), Frame(0, b"\x00")]
STREAM = b"".join(pack_frame(frame.type, frame.body) for frame in FRAMES)


def take_all(buffer: FrameBuffer) -> list[Frame]:
    return list(iter(buffer.take, None))


def test_a_frame_is_a_length_that_counts_the_type_then_the_type_then_the_body():
    assert pack_frame(7, b"abc") == bytes.fromhex("00000004 07 616263")
    assert pack_header(7, 3) == bytes.fromhex("00000004 07")
    assert unpack_header(bytes.fromhex("00000004 07 616263")) == (7, 3)


def test_every_split_of_the_stream_gives_the_same_frames():
    for cut in range(len(STREAM) + 1):
        buffer = FrameBuffer(body_bytes_max=1000)
        taken = []
        for part in (STREAM[:cut], STREAM[cut:]):
            buffer.feed(part)
            taken += take_all(buffer)
        assert taken == FRAMES, cut


def test_byte_by_byte_gives_the_same_frames():
    buffer = FrameBuffer(body_bytes_max=1000)
    taken = []
    for i in range(len(STREAM)):
        buffer.feed(STREAM[i : i + 1])
        taken += take_all(buffer)
    assert taken == FRAMES
    assert len(buffer) == 0


def test_it_is_known_what_a_begun_frame_lacks():
    buffer = FrameBuffer(body_bytes_max=1000)
    frame = pack_frame(7, b"abc")
    buffer.feed(frame[:4])
    assert (buffer.take(), buffer.lacking()) == (None, 0)
    buffer.feed(frame[4:6])
    assert (buffer.take(), buffer.lacking()) == (None, 2)


def test_a_body_of_exactly_the_limit_passes_and_one_byte_more_does_not():
    buffer = FrameBuffer(body_bytes_max=4)
    buffer.feed(pack_frame(1, b"1234"))
    assert buffer.take() == Frame(1, b"1234")
    buffer.feed(pack_header(1, 5))
    with pytest.raises(ProtocolError, match="body of 5 bytes, the limit is 4"):
        buffer.take()


def test_an_oversized_frame_is_refused_from_its_header_alone_and_shows_who_called():
    buffer = FrameBuffer(body_bytes_max=1 << 20)
    buffer.feed(b"GET /v2/ HTTP/1.1\r\n")
    with pytest.raises(ProtocolError, match="GET "):
        buffer.take()


def test_a_frame_of_length_zero_is_refused():
    buffer = FrameBuffer(body_bytes_max=10)
    buffer.feed(bytes(5))
    with pytest.raises(ProtocolError, match="length 0"):
        buffer.take()


@given(st.lists(st.tuples(st.integers(0, 255), st.binary(max_size=50))), st.data())
def test_any_frames_in_any_parts_come_out_as_they_went_in(frames, data):
    stream = b"".join(pack_frame(*frame) for frame in frames)
    buffer = FrameBuffer(body_bytes_max=50)
    taken = []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        buffer.feed(stream[:size])
        stream = stream[size:]
        taken += take_all(buffer)
    assert taken == [Frame(*frame) for frame in frames]


@given(st.binary(max_size=200))
def test_any_bytes_give_frames_within_the_limit_or_a_protocol_error(data):
    buffer = FrameBuffer(body_bytes_max=64)
    buffer.feed(data)
    with contextlib.suppress(ProtocolError):
        assert all(len(frame.body) <= 64 for frame in take_all(buffer))
