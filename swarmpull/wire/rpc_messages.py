"""The frames of RPC, and what both ends must agree on about a method.  Pure."""

from __future__ import annotations

import enum
import math
import struct
from typing import Final, Generic, TypeVar

import attrs

from swarmpull.errors import ProtocolError
from swarmpull.wire.frames import HEADER_BYTES, pack_frame, pack_header

Req = TypeVar("Req")
Rep = TypeVar("Rep")

MAGIC: Final = b"swarmpull/rpc"
# Raised when a change breaks older processes; everything else is a feature bit or a new field.
VERSION: Final = 1
FEATURES: Final = 0
# Until a HELLO has come nothing longer is read: a HELLO has 29 bytes, a BYE at most 514.
HANDSHAKE_BODY_BYTES_MAX: Final = 1024
TEXT_BYTES_MAX: Final = 512
# Error messages quote names and digests; longer ones are cut.
MESSAGE_BYTES_MAX: Final = 8192
# What a frame has besides the body of a request or reply: ids, names, times.
ENVELOPE_BYTES_MAX: Final = HEADER_BYTES + 16 + 255
NO_TIMEOUT_MS: Final = 0xFFFFFFFF

_HELLO: Final = struct.Struct("!HQI")
_REQUEST: Final = struct.Struct("!IIB")
_ID: Final = struct.Struct("!I")
_FAILURE: Final = struct.Struct("!IBH")


@attrs.frozen
class Method(Generic[Req, Rep]):
    """One remote method: its name on the wire and the classes of its bodies.

    Attributes:
        at_once: every server answers it without waiting for anything, so that it is not one of the requests
            under way, of which a connection takes so many, and is answered while all of those hang.
    """

    name: str
    request: type[Req]
    reply: type[Rep]
    at_once: bool = False


class FrameType(enum.IntEnum):
    """The type bytes of RPC; a receiver skips those it does not know."""

    HELLO = 1
    REQUEST = 2
    REPLY = 3
    ERROR = 4
    CANCEL = 5
    BYE = 6


class RpcByeReason(enum.IntEnum):
    """Why a server ends a connection."""

    DRAINING = 1
    """It shuts down; requests that are under way are still answered."""
    BUSY = 2
    """It has as many connections as it takes."""
    IDLE = 3
    """Nothing was asked for a long time."""
    PROTOCOL_ERROR = 4
    """The other side broke the protocol."""
    UNTRUSTED = 5
    """The other side is of another cluster, or only one of the two speaks TLS."""


@attrs.frozen
class RpcHello:
    """The first frame in each direction.

    ``requests_max`` is how many requests the sender takes at a time on this connection.
    """

    requests_max: int
    features: int = FEATURES
    version: int = VERSION


@attrs.frozen
class RpcRequest:
    """A call; ``timeout_ms`` is the time left to the caller, NO_TIMEOUT_MS for no limit."""

    id: int
    timeout_ms: int
    method: str
    body: bytes = attrs.field(repr=False)


@attrs.frozen
class RpcReply:
    id: int
    body: bytes = attrs.field(repr=False)


@attrs.frozen
class RpcError:
    """The call failed.

    Attributes:
        id: of the request.
        name: class name of an error in ``errors.REMOTE_ERRORS``; empty for all others.
        message: the error as text, for callers that do not know the class.
        attributes: the encoded attributes of the error; empty when ``name`` is.
    """

    id: int
    name: str
    message: str
    attributes: bytes = b""


@attrs.frozen
class RpcCancel:
    """The caller of this request has gone away."""

    id: int


@attrs.frozen
class RpcBye:
    """The sender wants no more requests on this connection."""

    reason: RpcByeReason
    text: str = ""


RpcMessage = RpcHello | RpcRequest | RpcReply | RpcError | RpcCancel | RpcBye


def timeout_to_ms(seconds: float) -> int:
    """The wire form of a timeout, rounded up so that the server never gives up before the caller."""
    if seconds >= NO_TIMEOUT_MS / 1000:
        return NO_TIMEOUT_MS
    # A cancelled scope has the deadline -inf.
    return math.ceil(max(0.0, seconds) * 1000)


def timeout_from_ms(milliseconds: int) -> float:
    """Seconds; infinite for NO_TIMEOUT_MS."""
    return math.inf if milliseconds == NO_TIMEOUT_MS else milliseconds / 1000


def cut_text(text: str, limit: int) -> bytes:
    """UTF-8 of at most ``limit`` bytes, cut between characters."""
    data = text.encode("utf-8", "replace")
    if len(data) <= limit:
        return data
    return data[:limit].decode("utf-8", "ignore").encode()


def pack(message: RpcMessage) -> bytes:
    """The frame of a message.

    Raises:
        ValueError: a method or class name above 255 bytes.
    """
    match message:
        case RpcHello():
            head = _HELLO.pack(message.version, message.features, message.requests_max)
            return pack_frame(FrameType.HELLO, MAGIC + head)
        case RpcRequest():
            name = _name(message.method)
            head = _REQUEST.pack(message.id, message.timeout_ms, len(name))
            return pack_frame(FrameType.REQUEST, head + name + message.body)
        case RpcReply():
            return pack_reply(message.id, message.body)
        case RpcError():
            name, text = _name(message.name), cut_text(message.message, MESSAGE_BYTES_MAX)
            head = _FAILURE.pack(message.id, len(name), len(text))
            return pack_frame(FrameType.ERROR, head + name + text + message.attributes)
        case RpcCancel():
            return pack_frame(FrameType.CANCEL, _ID.pack(message.id))
        case RpcBye():
            text = cut_text(message.text, TEXT_BYTES_MAX)
            return pack_frame(FrameType.BYE, bytes([message.reason]) + text)


def pack_reply(request_id: int, body: bytes) -> bytes:
    """The frame of an `RpcReply`, of which a tracker sends thousands a second: the body is copied once."""
    header = pack_header(FrameType.REPLY, _ID.size + len(body))
    return b"".join((header, _ID.pack(request_id), body))


def unpack(frame_type: int, body: bytes) -> RpcMessage | None:
    """The message in a frame, or None when the type is not known here.

    Raises:
        ProtocolError: the body does not have the form of its type.
    """
    try:
        return _unpack(frame_type, body)
    except (struct.error, IndexError) as error:
        raise ProtocolError(f"an RPC frame of type {frame_type} is cut short") from error
    except UnicodeDecodeError as error:
        raise ProtocolError(
            f"an RPC frame of type {frame_type} has text that is not UTF-8"
        ) from error


def _unpack(frame_type: int, body: bytes) -> RpcMessage | None:
    match frame_type:
        case FrameType.HELLO:
            return _unpack_hello(body)
        case FrameType.REQUEST:
            return _unpack_request(body)
        case FrameType.REPLY:
            return RpcReply(_ID.unpack_from(body)[0], body[_ID.size :])
        case FrameType.ERROR:
            return _unpack_error(body)
        case FrameType.CANCEL:
            return RpcCancel(_ID.unpack_from(body)[0])
        case FrameType.BYE:
            return _unpack_bye(body)
        case _:
            return None


def _unpack_hello(body: bytes) -> RpcHello:
    if not body.startswith(MAGIC):
        raise ProtocolError("the other side does not speak swarmpull RPC")
    version, features, requests_max = _HELLO.unpack_from(body, len(MAGIC))
    if version != VERSION:
        raise ProtocolError(
            f"the other side speaks RPC version {version}, this side {VERSION}: "
            "run the same major release on both"
        )
    if requests_max == 0:
        raise ProtocolError("the other side takes no requests at all")
    return RpcHello(requests_max, features, version)


def _unpack_request(body: bytes) -> RpcRequest:
    request_id, timeout_ms, name_length = _REQUEST.unpack_from(body)
    name, start = _text(body, _REQUEST.size, name_length)
    return RpcRequest(request_id, timeout_ms, name, body[start:])


def _unpack_error(body: bytes) -> RpcError:
    request_id, name_length, text_length = _FAILURE.unpack_from(body)
    name, start = _text(body, _FAILURE.size, name_length)
    message, start = _text(body, start, text_length)
    return RpcError(request_id, name, message, body[start:])


def _unpack_bye(body: bytes) -> RpcBye:
    if len(body) - 1 > TEXT_BYTES_MAX:
        raise ProtocolError(f"a BYE with {len(body) - 1} bytes of text")
    try:
        return RpcBye(RpcByeReason(body[0]), body[1:].decode())
    except UnicodeDecodeError:
        raise
    except ValueError as error:
        raise ProtocolError(f"a BYE with the unknown reason {body[0]}") from error


def _name(name: str) -> bytes:
    data = name.encode()
    if len(data) > 255:
        raise ValueError(f"{name[:40]!r}... is above 255 bytes")
    return data


def _text(body: bytes, start: int, length: int) -> tuple[str, int]:
    stop = start + length
    if stop > len(body):
        raise ProtocolError("an RPC frame is cut short inside a text")
    return body[start:stop].decode(), stop
