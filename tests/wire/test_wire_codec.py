import contextlib
import tracemalloc
from pathlib import Path

import attrs
import msgpack
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from swarmpull.digest import Digest
from swarmpull.errors import (
    REMOTE_ERRORS,
    BlobNotFound,
    LengthMismatch,
    ManifestReferencesMissing,
    ProtocolError,
    RpcUnavailable,
    StoreFull,
)
from swarmpull.swarm.metainfo import PIECE_LENGTH_MIN, Metainfo, piece_count_for
from swarmpull.swarm.peers import PeerContact, PeerKind
from swarmpull.wire import api, codec
from swarmpull.wire.codec import decode, decode_error, encode, encode_error
from swarmpull.wire.rpc import Method

METHODS = {name: value for name, value in vars(api).items() if isinstance(value, Method)}
BODIES = sorted(
    {body for method in METHODS.values() for body in (method.request, method.reply)},
    key=lambda body: body.__name__,
)
DIGEST = Digest.of(b"content")


def metainfos():
    def build(digest, length):
        hashes = b"\x01" * 32 * piece_count_for(length, PIECE_LENGTH_MIN)
        return Metainfo(digest, length, PIECE_LENGTH_MIN, hashes)

    return st.builds(build, digests(), st.integers(0, 20 * PIECE_LENGTH_MIN))


def digests():
    return st.builds(Digest.of, st.binary(max_size=8), st.sampled_from(["sha256", "sha512"]))


TEXTS = st.text(st.characters(codec="utf-8"), max_size=40)
st.register_type_strategy(str, TEXTS)
st.register_type_strategy(int, st.integers(-(1 << 63), (1 << 64) - 1))
st.register_type_strategy(float, st.floats(allow_nan=False))
st.register_type_strategy(Digest, digests())
st.register_type_strategy(Metainfo, metainfos())


def test_the_api_has_methods_with_distinct_names_of_bounded_length():
    names = [method.name for method in METHODS.values()]
    assert len(names) == len(set(names)) >= 16
    assert all(len(name.encode()) <= 255 for name in names)


@pytest.mark.parametrize("body_type", BODIES, ids=lambda body: body.__name__)
@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_every_body_of_every_method_comes_back_as_it_was(body_type, data):
    # Hypothesis reads the annotations, so a field that is added to a body is covered at once.
    body = data.draw(st.builds(body_type, **_fields(body_type)))
    assert decode(encode(body), body_type) == body


def _fields(body_type):
    attrs.resolve_types(body_type)
    return {field.name: st.from_type(field.type) for field in attrs.fields(body_type)}


def test_a_body_is_a_map_by_field_name_with_plain_values():
    body = api.AnnounceRequest(
        DIGEST,
        "team/app",
        PeerContact("ab" * 16, "", 7100, PeerKind.AGENT),
        api.AnnounceState.LEECHING,
    )
    assert msgpack.unpackb(encode(body)) == {
        "digest": str(DIGEST),
        "namespace": "team/app",
        "peer": {"peer_id": "ab" * 16, "host": "", "port": 7100, "kind": "agent"},
        "state": "leeching",
        "want_metainfo": False,
        "growing": False,
    }


def test_the_bytes_of_a_body_are_fixed():
    data = "83 aa7265706f7369746f7279 a161 a56166746572 a0 a56c696d6974 cd03e8"
    assert encode(api.ListRequest("a")) == bytes.fromhex(data)


def test_fields_of_a_newer_process_are_ignored_and_missing_ones_take_their_default():
    assert decode(msgpack.packb({"length": 5, "since": 0}), api.BlobStatReply).length == 5
    assert decode(msgpack.packb({}), api.ListRequest) == api.ListRequest()


@pytest.mark.parametrize(
    ("body_type", "value", "reason"),
    [
        (api.BlobStatReply, {"length": "5"}, "expected int, got str @ body.length"),
        (api.BlobStatReply, {"length": True}, "expected int, got bool"),
        (api.BlobStatReply, {"length": 5.0}, "expected int, got float"),
        (api.BlobStatReply, {}, "required field 'length' missing"),
        (api.BlobStatReply, [], "malformed BlobStatReply"),
        (api.BlobStatReply, None, "malformed BlobStatReply"),
        (api.BlobStatReply, "length", "malformed BlobStatReply"),
        (api.Found, {"found": "false"}, "expected bool, got str"),
        (api.Found, {"found": 1}, "expected bool, got int"),
        (api.ListReply, {"names": "abc", "more": False}, "expected an array, got str"),
        (api.ListReply, {"names": {"a": 1}, "more": False}, "expected an array, got dict"),
        (api.ListReply, {"names": [1], "more": False}, "expected str, got int"),
        (api.ListReply, {"names": [b"a"], "more": False}, "expected str, got bytes"),
        (api.BlobRequest, {"digest": "sha256:zz"}, "is not a digest"),
        (api.BlobRequest, {"digest": 5}, "expected a digest, got int"),
        (
            api.BlobRequest,
            {"digest": {"algorithm": "x", "hex": "/"}},
            "expected a digest, got dict",
        ),
        (api.BlobRequest, {"digest": str(DIGEST), "namespace": None}, "expected str, got NoneType"),
        (
            api.MetainfoReply,
            {
                "metainfo": {
                    "digest": str(DIGEST),
                    "length": 1,
                    "piece_length": 3,
                    "piece_hashes": b"",
                },
                "seeder": {"peer_id": "a", "host": "h", "port": 1, "kind": "agent"},
            },
            "piece length is 3",
        ),
        (
            api.Descriptor,
            {"digest": str(DIGEST), "media_type": "m", "length": 1, "annotations": {"a": 1}},
            "expected str, got int",
        ),
        (
            api.Descriptor,
            {"digest": str(DIGEST), "media_type": "m", "length": 1, "annotations": []},
            "expected a map, got list",
        ),
    ],
)
def test_nothing_is_coerced_and_the_reason_names_the_trouble(body_type, value, reason):
    with pytest.raises(ProtocolError) as caught:
        decode(msgpack.packb(value), body_type)
    assert reason in caught.value.reason


def test_an_unknown_enum_value_is_refused():
    peer = {"peer_id": "a", "host": "h", "port": 1, "kind": "tracker"}
    with pytest.raises(ProtocolError, match="'tracker' is not a valid PeerKind"):
        decode(msgpack.packb({"peers": [peer], "interval": 1.0}), api.AnnounceReply)
    with pytest.raises(ProtocolError, match="expected PeerKind, got list"):
        decode(msgpack.packb({"peers": [{**peer, "kind": []}], "interval": 1.0}), api.AnnounceReply)


def test_a_reason_stays_short_however_much_is_wrong():
    body = msgpack.packb({"names": [1] * 1000, "more": "x" * 1000, "repository": 1})
    with pytest.raises(ProtocolError) as caught:
        decode(body, api.ListReply)
    assert len(caught.value.reason) < 2000


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\x81",
        msgpack.packb({}) + b"trailing",
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff" + bytes(100),
        b"\xc6\xff\xff\xff\xff",
        b"\x91" * 5000 + b"\x00",
        b"\x81\xa1\xff\x00",
        b"\x81\x80\x00",
        b"\xc7\x03\xff\x00\x00\x00",
    ],
    ids=repr,
)
def test_bytes_that_are_not_messagepack_are_a_protocol_error(data):
    with pytest.raises(ProtocolError):
        decode(data, api.Found)


def test_claimed_lengths_allocate_nothing():
    # Each array claims as many elements as the body has bytes, one inside the other.
    hostile = b"\xdd\x00\x00\x20\x00" * 1000
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError):
            decode(hostile, api.Found)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000


def test_a_short_body_of_nothing_but_claims_allocates_little():
    # Arrays in one another, each said to be as long as a body that is not checked for it may be.
    nested = (b"\xdc" + (codec.UNCHECKED_BYTES_MAX // 3).to_bytes(2, "big")) * 341
    assert len(nested) <= codec.UNCHECKED_BYTES_MAX
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError):
            decode(nested, api.Found)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_a_body_of_too_many_empty_containers_is_refused():
    body = msgpack.packb([{}] * (codec.CONTAINERS_MAX + 1))
    with pytest.raises(ProtocolError, match="more than 65536 maps and arrays"):
        decode(body, api.Found)


@given(st.binary(max_size=200), st.sampled_from(BODIES))
@example(b"\x80", api.Empty)
def test_any_bytes_are_a_body_or_a_protocol_error(data, body_type):
    with contextlib.suppress(ProtocolError):
        assert isinstance(decode(data, body_type), body_type)


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats()
    | st.binary()
    | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=10,
)


@given(st.data(), st.sampled_from(BODIES))
def test_any_messagepack_is_a_body_or_a_protocol_error(data, body_type):
    names = [field.name for field in attrs.fields(body_type)]
    value = data.draw(PLAIN | st.fixed_dictionaries(dict.fromkeys(names, PLAIN)))
    with contextlib.suppress(ProtocolError):
        assert isinstance(decode(msgpack.packb(value), body_type), body_type)


@pytest.mark.parametrize("error_type", REMOTE_ERRORS.values(), ids=lambda error: error.__name__)
@settings(max_examples=20)
@given(data=st.data())
def test_every_remote_error_keeps_its_type_and_attributes(error_type, data):
    error = data.draw(st.builds(error_type, **_fields(error_type)))
    name, attributes = encode_error(error)
    back = decode_error(name, attributes)
    assert type(back) is error_type
    assert attrs.asdict(back) == attrs.asdict(error)
    assert str(back) == str(error)


def test_a_subclass_of_a_remote_error_travels_as_its_base():
    class BlobExpired(BlobNotFound):
        pass

    name, attributes = encode_error(BlobExpired("sha256:x", "here"))
    assert name == "BlobNotFound"
    assert attrs.asdict(decode_error(name, attributes)) == {"digest": "sha256:x", "where": "here"}


def test_other_errors_have_no_name_on_the_wire():
    assert encode_error(RpcUnavailable("a:1", "m", "lost")) == ("", b"")


def test_errors_of_a_newer_process_are_not_known():
    assert decode_error("BlobEaten", b"\x80") is None
    assert decode_error("", b"") is None
    assert decode_error("StoreFull", msgpack.packb({"disk": 1})) is None
    assert decode_error("StoreFull", b"\xc1") is None


def test_attributes_of_errors_are_as_strict_as_bodies():
    for error in (
        StoreFull("s", 5),
        LengthMismatch("d", 1, 2),
        ManifestReferencesMissing("r", ("a",)),
    ):
        name, attributes = encode_error(error)
        assert attrs.asdict(decode_error(name, attributes)) == attrs.asdict(error)
    assert decode_error("StoreFull", msgpack.packb({"store": "s", "needed": "5"})) is None


def test_the_protocol_page_lists_every_method_with_its_bodies():
    page = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()
    for method in METHODS.values():
        row = f"| `{method.name}` | `{method.request.__name__}` | `{method.reply.__name__}` |"
        assert row in page
