import contextlib
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmpull.errors import ProtocolError
from swarmpull.wire import rpc_messages
from swarmpull.wire.frames import unpack_header
from swarmpull.wire.rpc_messages import (
    NO_TIMEOUT_MS,
    RpcBye,
    RpcByeReason,
    RpcCancel,
    RpcError,
    RpcHello,
    RpcReply,
    RpcRequest,
    pack,
    timeout_from_ms,
    timeout_to_ms,
    unpack,
)

GOLDEN = [
    (
        RpcHello(64, features=5),
        "0000001c 01 737761726d70756c6c2f727063 0001 0000000000000005 00000040",
    ),
    (
        RpcRequest(7, 1500, "a.b", b"\x80"),
        "0000000e 02 00000007 000005dc 03 612e62 80",
    ),
    (RpcReply(7, b"\x80"), "00000006 03 00000007 80"),
    (
        RpcError(8, "BlobNotFound", "gone", b"\x81"),
        "00000019 04 00000008 0c 0004 426c6f624e6f74466f756e64 676f6e65 81",
    ),
    (RpcError(8, "", "no"), "0000000a 04 00000008 00 0002 6e6f"),
    (RpcCancel(0xFFFFFFFF), "00000005 05 ffffffff"),
    (RpcBye(RpcByeReason.DRAINING), "00000002 06 01"),
    (RpcBye(RpcByeReason.BUSY, "full"), "00000006 06 02 66756c6c"),
]


def unpack_frame(data):
    frame_type, body_length = unpack_header(data)
    assert len(data) == 5 + body_length
    return unpack(frame_type, data[5:])


@pytest.mark.parametrize(("message", "data"), GOLDEN)
def test_the_bytes_of_each_message_are_fixed(message, data):
    assert pack(message) == bytes.fromhex(data)
    assert unpack_frame(bytes.fromhex(data)) == message


@pytest.mark.parametrize(("message", "data"), GOLDEN)
def test_a_message_cut_at_any_byte_is_refused_or_shorter(message, data):
    body = bytes.fromhex(data)[5:]
    for end in range(len(body)):
        with contextlib.suppress(ProtocolError):
            assert unpack(bytes.fromhex(data)[4], body[:end]) != message


def test_unknown_types_are_skipped():
    assert unpack(7, b"from the future") is None
    assert unpack(0, b"") is None


def test_another_version_is_refused_with_both_numbers():
    with pytest.raises(ProtocolError, match="speaks RPC version 2, this side 1"):
        unpack_frame(pack(RpcHello(1, version=2)))


def test_fields_that_a_newer_process_appends_to_its_hello_are_ignored():
    assert unpack(1, pack(RpcHello(3))[5:] + b"later") == RpcHello(3)


@pytest.mark.parametrize(
    ("frame_type", "body", "reason"),
    [
        (1, b"GET / HTTP/1.1", "does not speak swarmpull RPC"),
        (1, pack(RpcHello(0))[5:], "takes no requests"),
        (2, b"\x00", "cut short"),
        (2, pack(RpcRequest(1, 1, "name", b""))[5:-1], "cut short inside a text"),
        (2, pack(RpcRequest(1, 1, "n", b""))[5:-1] + b"\xff", "not UTF-8"),
        (5, b"\x00\x00\x00", "cut short"),
        (6, b"", "cut short"),
        (6, b"\x63", "unknown reason 99"),
        (6, b"\x01" + bytes(513), "513 bytes of text"),
    ],
)
def test_malformed_messages_are_refused_with_a_reason(frame_type, body, reason):
    with pytest.raises(ProtocolError, match=reason):
        unpack(frame_type, body)


def test_long_texts_are_cut_between_characters():
    assert unpack_frame(pack(RpcBye(RpcByeReason.IDLE, "ü" * 400))).text == "ü" * 256
    assert unpack_frame(pack(RpcError(1, "", "x" + "ü" * 9000))).message == "x" + "ü" * 4095


def test_a_method_name_above_255_bytes_is_a_value_error():
    with pytest.raises(ValueError):
        pack(RpcRequest(1, 1, "m" * 256, b""))


def test_timeouts_are_rounded_up_and_infinity_travels():
    assert timeout_to_ms(0.0001) == 1
    assert timeout_to_ms(1.5) == 1500
    assert timeout_to_ms(-3) == 0
    assert timeout_to_ms(math.inf) == timeout_to_ms(1e12) == NO_TIMEOUT_MS
    assert timeout_from_ms(NO_TIMEOUT_MS) == math.inf
    assert timeout_from_ms(1500) == 1.5


IDS = st.integers(0, 0xFFFFFFFF)
NAMES = st.text(st.characters(codec="utf-8"), max_size=60)
MESSAGES = st.one_of(
    st.builds(RpcHello, st.integers(1, 0xFFFFFFFF), st.integers(0, (1 << 64) - 1)),
    st.builds(RpcRequest, IDS, IDS, NAMES, st.binary()),
    st.builds(RpcReply, IDS, st.binary()),
    st.builds(RpcError, IDS, NAMES, NAMES, st.binary()),
    st.builds(RpcCancel, IDS),
    st.builds(RpcBye, st.sampled_from(RpcByeReason), NAMES),
)


@given(MESSAGES)
def test_every_message_comes_back_as_it_was(message):
    assert unpack_frame(pack(message)) == message


@given(st.integers(0, 255), st.binary(max_size=200))
def test_any_bytes_are_a_message_or_a_protocol_error(frame_type, body):
    for data in (body, rpc_messages.MAGIC + body):
        with contextlib.suppress(ProtocolError):
            unpack(frame_type, data)


def test_the_timeout_of_a_cancelled_call_is_none_left():
    assert timeout_to_ms(-math.inf) == 0
