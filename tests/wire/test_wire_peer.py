import attrs
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from swarmpull.digest import Digest
from swarmpull.errors import ProtocolError
from swarmpull.swarm import bitfield
from swarmpull.swarm.messages import (
    Bye,
    ByeReason,
    Cancel,
    Claim,
    Have,
    HaveAll,
    Hello,
    Offer,
    Pass,
    PieceChunk,
    Want,
)
from swarmpull.swarm.metainfo import PIECE_LENGTH_MAX, PIECES_MAX
from swarmpull.swarm.peers import PeerKind
from swarmpull.wire import peer
from swarmpull.wire.frames import unpack_header

HELLO = Hello(
    digest=Digest("sha256", "ab" * 32),
    namespace="team/app",
    peer_id="000102030405060708090a0b0c0d0e0f",
    kind=PeerKind.ORIGIN,
    port=7201,
    piece_count=11,
    have=b"\xff\x05",
)
# What is on the wire must not change without a new version or a feature bit.
GOLDEN = [
    (
        HELLO,
        "0000005c 01"
        "737761726d70756c6c2f70656572"  # swarmpull/peer
        "0001 0000000000000000"  # version, features
        "1c21 02 000102030405060708090a0b0c0d0e0f"  # port, origin, peer id
        "01 08 0000000b"  # sha256, length of the namespace, pieces
        + "ab"
        * 32
        + "7465616d2f617070"  # team/app
        "ff05",
    ),
    (
        Hello(Digest("sha512", "cd" * 64), "", "f" * 32, PeerKind.AGENT, 0, 0, b""),
        "00000072 01"
        "737761726d70756c6c2f70656572"
        "0001 0000000000000000"
        "0000 01 ffffffffffffffffffffffffffffffff"
        "02 00 00000000" + "cd" * 64,
    ),
    (Have(0), "00000005 02 00000000"),
    (HaveAll(), "00000001 0a"),
    (Want(), "00000001 03"),
    (Offer(), "00000005 04 ffffffff"),
    (Offer(258), "00000005 04 00000102"),
    (Claim(258), "00000005 05 00000102"),
    (Pass(PIECES_MAX - 1), "00000005 06 0001ffff"),
    (Pass(), "00000005 06 ffffffff"),
    (Cancel(1), "00000005 08 00000001"),
    (Bye(ByeReason.DRAINING), "00000002 09 01"),
    (Bye(ByeReason.CORRUPT, "piece 7"), "00000009 09 07 70696563652037"),
]


def unpack_frame(data):
    frame_type, body_length = unpack_header(data)
    assert len(data) == 5 + body_length
    return peer.unpack(frame_type, data[5:])


@pytest.mark.parametrize(("message", "data"), GOLDEN)
def test_the_bytes_of_each_message_are_fixed(message, data):
    assert peer.pack(message) == bytes.fromhex(data)
    assert unpack_frame(bytes.fromhex(data)) == message


def test_the_bytes_of_a_chunk_header_are_fixed():
    chunk = PieceChunk(3, 1 << 19, 4096)
    assert peer.pack_chunk_header(chunk) == bytes.fromhex("00001009 07 00000003 00080000")
    assert peer.unpack_chunk_head(4096 + 8, bytes.fromhex("00000003 00080000")) == chunk


def test_messages_of_a_newer_peer_are_skipped():
    assert peer.unpack(11, b"anything") is None
    assert peer.unpack(200, bytes(1000)) is None


def test_a_want_or_have_all_has_no_body():
    for number in (3, 10):
        with pytest.raises(ProtocolError, match="with a body of 1 bytes"):
            peer.unpack(number, b"x")


def test_every_bye_reason_travels():
    for reason in ByeReason:
        assert unpack_frame(peer.pack(Bye(reason, "ü"))) == Bye(reason, "ü")


def test_a_long_text_is_cut_between_characters():
    message = unpack_frame(peer.pack(Bye(ByeReason.BUSY, "ü" * 300 + "x")))
    assert message == Bye(ByeReason.BUSY, "ü" * 256)


def test_fields_that_a_newer_peer_appends_to_its_hello_are_ignored():
    assert peer.unpack(1, peer.pack(HELLO)[5:] + b"later") == HELLO


def test_a_hello_cut_at_any_byte_is_refused():
    body = peer.pack(HELLO)[5:]
    for end in range(len(body)):
        with pytest.raises(ProtocolError):
            peer.unpack(1, body[:end])


def test_another_version_is_refused_with_both_numbers():
    body = bytearray(peer.pack(HELLO)[5:])
    body[15] = 9
    with pytest.raises(ProtocolError, match="version 9 of the peer protocol, this side 1"):
        peer.unpack(1, bytes(body))


def test_a_hello_of_another_protocol_is_named_as_such():
    with pytest.raises(ProtocolError, match="does not speak the swarmpull peer protocol"):
        peer.unpack(1, b"swarmpull/rpc" + bytes(100))


@pytest.mark.parametrize(
    ("frame_type", "body", "reason"),
    [
        (2, b"\x00\x00\x00", "HAVE with a body of 3 bytes"),
        (5, bytes(5), "CLAIM with a body of 5 bytes"),
        (6, b"\x00\x02\x00\x00", "PASS of impossible piece 131072"),
        (9, b"", "BYE with a body of 0 bytes"),
        (9, b"\x63", "unknown reason 99"),
        (9, b"\x01\xff", "not UTF-8"),
        (9, b"\x01" + bytes(513), "BYE with a body of 514 bytes"),
    ],
)
def test_malformed_messages_are_refused_with_a_reason(frame_type, body, reason):
    with pytest.raises(ProtocolError, match=reason):
        peer.unpack(frame_type, body)


def test_a_bitfield_with_bits_beyond_the_last_piece_is_refused():
    with pytest.raises(ProtocolError, match="beyond the last"):
        unpack_frame(peer.pack(attrs.evolve(HELLO, have=b"\xff\xff")))


def test_a_hello_with_too_many_pieces_is_refused():
    count = PIECES_MAX + 1
    hello = attrs.evolve(HELLO, piece_count=count, have=bytes((count + 7) // 8))
    with pytest.raises(ProtocolError, match="the limit is 131072"):
        unpack_frame(peer.pack(hello))


@pytest.mark.parametrize(
    "change",
    [{"peer_id": "abcd"}, {"peer_id": "x"}, {"namespace": "a" * 256}, {"have": b""}],
)
def test_a_hello_that_cannot_be_sent_is_a_value_error(change):
    with pytest.raises(ValueError):
        peer.pack(attrs.evolve(HELLO, **change))


@pytest.mark.parametrize("length", [0, -1, peer.CHUNK_BYTES_MAX + 1])
def test_chunks_are_neither_empty_nor_too_long(length):
    with pytest.raises(ValueError):
        peer.pack_chunk_header(PieceChunk(0, 0, length))
    with pytest.raises(ProtocolError):
        peer.unpack_chunk_head(length + 8, bytes(8))


@pytest.mark.parametrize(("index", "offset"), [(PIECES_MAX, 0), (0, PIECE_LENGTH_MAX)])
def test_a_chunk_outside_of_any_piece_is_refused(index, offset):
    head = index.to_bytes(4, "big") + offset.to_bytes(4, "big")
    with pytest.raises(ProtocolError, match="impossible place"):
        peer.unpack_chunk_head(9, head)


@st.composite
def hellos(draw):
    algorithm, length = draw(st.sampled_from([("sha256", 64), ("sha512", 128)]))
    hexadecimal = st.text("0123456789abcdef", min_size=length, max_size=length)
    count = draw(st.integers(0, 200))
    bits = draw(st.integers(0, (1 << count) - 1))
    return Hello(
        Digest(algorithm, draw(hexadecimal)),
        draw(st.text(st.characters(codec="utf-8"), max_size=60)),
        draw(st.binary(min_size=16, max_size=16)).hex(),
        draw(st.sampled_from(PeerKind)),
        draw(st.integers(0, 65535)),
        count,
        bitfield.to_bytes(bits, count),
    )


INDICES = st.integers(0, PIECES_MAX - 1)
TEXTS = st.text(st.characters(codec="utf-8"), max_size=100)
MESSAGES = st.one_of(
    hellos(),
    *(st.builds(kind, INDICES) for kind in (Have, Claim, Pass, Cancel)),
    st.builds(Bye, st.sampled_from(ByeReason), TEXTS),
)


@given(MESSAGES)
def test_every_message_comes_back_as_it_was(message):
    assert unpack_frame(peer.pack(message)) == message


@given(st.integers(0, 255), st.binary(max_size=300))
@example(1, peer.MAGIC + bytes(36))
def test_any_bytes_are_a_message_or_a_protocol_error(frame_type, body):
    for data in (body, peer.MAGIC + b"\x00\x01" + body):
        try:
            message = peer.unpack(frame_type, data)
        except ProtocolError:
            continue
        assert message is None or unpack_frame(peer.pack(message)) == message


@given(st.integers(0, 1 << 32), st.binary(min_size=8, max_size=8))
def test_any_chunk_head_is_a_chunk_or_a_protocol_error(body_length, head):
    try:
        chunk = peer.unpack_chunk_head(body_length, head)
    except ProtocolError:
        return
    assert 0 < chunk.length <= peer.CHUNK_BYTES_MAX
    assert peer.pack_chunk_header(chunk)[5:] == head
