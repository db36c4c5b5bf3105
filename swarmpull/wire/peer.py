"""The bytes of the peer protocol.  Pure.

The messages are those of ``swarmpull.swarm.messages``; ``docs/protocol.md`` has the table.  Packed by hand:
a seeder sends HAVE and PIECE headers thousands of times a second.
"""

from __future__ import annotations

import enum
import struct
from typing import Final

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
    Message,
    Offer,
    Pass,
    PieceChunk,
    Want,
)
from swarmpull.swarm.metainfo import PIECE_LENGTH_MAX, PIECES_MAX
from swarmpull.swarm.peers import PeerKind
from swarmpull.wire.frames import HEADER_BYTES, pack_frame, pack_header

MAGIC: Final = b"swarmpull/peer"
# Raised when a change breaks older peers; everything else is a feature bit or a new message type.
VERSION: Final = 1
FEATURES: Final = 0

# Other messages wait behind a chunk: at 300 MB/s for 1.7 ms.
CHUNK_BYTES_MAX: Final = 512 * 1024
# A HELLO with the largest bitfield has 16.8 KB.
BODY_BYTES_MAX: Final = 32 * 1024
# The OCI distribution specification suggests 255 characters for host and repository together.
NAMESPACE_BYTES_MAX: Final = 255
TEXT_BYTES_MAX: Final = 512


class FrameType(enum.IntEnum):
    """The type bytes of the peer protocol; a receiver skips those it does not know."""

    HELLO = 1
    HAVE = 2
    WANT = 3
    OFFER = 4
    CLAIM = 5
    PASS = 6
    PIECE = 7
    CANCEL = 8
    BYE = 9
    HAVE_ALL = 10


_INDEX: Final = struct.Struct("!I")
_CHUNK: Final = struct.Struct("!II")
# version, features, port, kind, peer id, algorithm of the digest, length of the namespace, pieces
_HELLO: Final = struct.Struct("!HQHB16sBBI")
CHUNK_HEAD_BYTES: Final = _CHUNK.size

_KINDS: Final = {PeerKind.AGENT: 1, PeerKind.ORIGIN: 2}
_KINDS_BY_NUMBER: Final = {number: kind for kind, number in _KINDS.items()}
_ALGORITHMS: Final = {"sha256": 1, "sha512": 2}
# number: (name, bytes of the hash)
_ALGORITHMS_BY_NUMBER: Final = {1: ("sha256", 32), 2: ("sha512", 64)}
# On the wire the index of an OFFER without a suggestion, and of a PASS that answers an OFFER.
_NO_INDEX: Final = 0xFFFFFFFF
_WITHOUT_BODY: Final[dict[int, type[Want | HaveAll]]] = {
    FrameType.WANT: Want,
    FrameType.HAVE_ALL: HaveAll,
}
_WITH_INDEX: Final[dict[int, type[Have | Offer | Claim | Pass | Cancel]]] = {
    FrameType.HAVE: Have,
    FrameType.OFFER: Offer,
    FrameType.CLAIM: Claim,
    FrameType.PASS: Pass,
    FrameType.CANCEL: Cancel,
}
_TYPES: Final[dict[type, FrameType]] = {
    message: FrameType(number) for number, message in (_WITH_INDEX | _WITHOUT_BODY).items()
}


def pack(message: Message) -> bytes:
    """The frame of a message.

    Raises:
        ValueError: a HELLO whose fields cannot be sent (a peer id that is not 32 hex digits, a bitfield
            of the wrong length, a namespace above 255 bytes).
    """
    match message:
        case Hello():
            return pack_frame(FrameType.HELLO, _pack_hello(message))
        case Bye():
            return pack_frame(FrameType.BYE, bytes([message.reason]) + _cut(message.text))
        case Want() | HaveAll():
            return pack_frame(_TYPES[type(message)], b"")
        case _:
            index = _NO_INDEX if message.index < 0 else message.index
            return pack_frame(_TYPES[type(message)], _INDEX.pack(index))


def pack_chunk_header(chunk: PieceChunk) -> bytes:
    """What goes before the payload of a chunk.

    Raises:
        ValueError: the chunk is empty or above CHUNK_BYTES_MAX.
    """
    if not 0 < chunk.length <= CHUNK_BYTES_MAX:
        raise ValueError(f"a chunk of {chunk.length} bytes, allowed are 1 to {CHUNK_BYTES_MAX}")
    header = pack_header(FrameType.PIECE, CHUNK_HEAD_BYTES + chunk.length)
    return header + _CHUNK.pack(chunk.index, chunk.offset)


def unpack(frame_type: int, body: bytes) -> Message | None:
    """The message in a frame other than PIECE, or None when the type is not known here.

    Raises:
        ProtocolError: the body does not have the form of its type.
    """
    if (message_type := _WITH_INDEX.get(frame_type)) is not None:
        return message_type(_unpack_index(frame_type, body))
    if (bare_type := _WITHOUT_BODY.get(frame_type)) is not None:
        if body:
            raise ProtocolError(f"a {FrameType(frame_type).name} with a body of {len(body)} bytes")
        return bare_type()
    if frame_type == FrameType.HELLO:
        return _unpack_hello(body)
    if frame_type == FrameType.BYE:
        return _unpack_bye(body)
    return None


def unpack_chunk_head(body_length: int, head: bytes | bytearray | memoryview) -> PieceChunk:
    """The chunk whose frame has a body of ``body_length`` bytes that begins with ``head``.

    Raises:
        ProtocolError: no payload, more than CHUNK_BYTES_MAX, or beyond the end of any piece.
    """
    check_chunk_length(body_length)
    index, offset = _CHUNK.unpack_from(head)
    length = body_length - CHUNK_HEAD_BYTES
    if index >= PIECES_MAX or offset + length > PIECE_LENGTH_MAX:
        raise ProtocolError(f"a PIECE of impossible place: piece {index}, offset {offset}")
    return PieceChunk(index, offset, length)


def check_chunk_length(body_length: int) -> None:
    """Refuse a PIECE by the length of its body alone.

    Raises:
        ProtocolError: no payload, or more than CHUNK_BYTES_MAX.
    """
    length = body_length - CHUNK_HEAD_BYTES
    if not 0 < length <= CHUNK_BYTES_MAX:
        raise ProtocolError(f"a PIECE of {length} bytes, allowed are 1 to {CHUNK_BYTES_MAX}")


def _pack_hello(hello: Hello) -> bytes:
    peer_id, namespace = bytes.fromhex(hello.peer_id), hello.namespace.encode()
    if len(peer_id) != 16:
        raise ValueError(f"{hello.peer_id!r} is not a peer id: expected 32 hex digits")
    if len(namespace) > NAMESPACE_BYTES_MAX:
        raise ValueError(
            f"namespace {hello.namespace[:40]!r}... is above {NAMESPACE_BYTES_MAX} bytes"
        )
    if len(hello.have) != (hello.piece_count + 7) // 8:
        raise ValueError(f"a bitfield of {len(hello.have)} bytes for {hello.piece_count} pieces")
    head = _HELLO.pack(
        VERSION,
        FEATURES,
        hello.port,
        _KINDS[hello.kind],
        peer_id,
        _ALGORITHMS[hello.digest.algorithm],
        len(namespace),
        hello.piece_count,
    )
    return b"".join((MAGIC, head, bytes.fromhex(hello.digest.hex), namespace, hello.have))


def _unpack_hello(body: bytes) -> Hello:
    if not body.startswith(MAGIC):
        raise ProtocolError("the other side does not speak the swarmpull peer protocol")
    if len(body) < len(MAGIC) + _HELLO.size:
        raise ProtocolError("a HELLO that is cut short")
    version, _, port, kind, peer_id, algorithm, namespace_length, piece_count = _HELLO.unpack_from(
        body, len(MAGIC)
    )
    if version != VERSION:
        raise ProtocolError(
            f"the other side speaks version {version} of the peer protocol, this side {VERSION}: "
            "run the same major release on both"
        )
    if kind not in _KINDS_BY_NUMBER or algorithm not in _ALGORITHMS_BY_NUMBER:
        raise ProtocolError(f"a HELLO with kind {kind} and digest algorithm {algorithm}")
    if piece_count > PIECES_MAX:
        raise ProtocolError(f"a HELLO for {piece_count} pieces, the limit is {PIECES_MAX}")
    name, hash_length = _ALGORITHMS_BY_NUMBER[algorithm]
    digest_at = len(MAGIC) + _HELLO.size
    namespace_at = digest_at + hash_length
    have_at = namespace_at + namespace_length
    end = have_at + (piece_count + 7) // 8
    # Newer peers may append fields after the bitfield.
    if len(body) < end:
        raise ProtocolError("a HELLO that is cut short")
    have = body[have_at:end]
    bitfield.from_bytes(have, piece_count)
    return Hello(
        digest=Digest(name, body[digest_at:namespace_at].hex()),
        namespace=_text("HELLO", body[namespace_at:have_at]),
        peer_id=peer_id.hex(),
        kind=_KINDS_BY_NUMBER[kind],
        port=port,
        piece_count=piece_count,
        have=have,
    )


def _unpack_index(frame_type: int, body: bytes) -> int:
    if len(body) != _INDEX.size:
        raise ProtocolError(f"a {FrameType(frame_type).name} with a body of {len(body)} bytes")
    index: int = _INDEX.unpack(body)[0]
    if index == _NO_INDEX and frame_type in (FrameType.OFFER, FrameType.PASS):
        return -1
    if index >= PIECES_MAX:
        raise ProtocolError(f"a {FrameType(frame_type).name} of impossible piece {index}")
    return index


def _unpack_bye(body: bytes) -> Bye:
    if not 1 <= len(body) <= 1 + TEXT_BYTES_MAX:
        raise ProtocolError(f"a BYE with a body of {len(body)} bytes")
    try:
        reason = ByeReason(body[0])
    except ValueError as error:
        raise ProtocolError(f"a BYE with the unknown reason {body[0]}") from error
    return Bye(reason, _text("BYE", body[1:]))


def _text(message: str, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ProtocolError(f"a {message} with text that is not UTF-8") from error


def _cut(text: str) -> bytes:
    return text.encode("utf-8", "replace")[:TEXT_BYTES_MAX].decode("utf-8", "ignore").encode()


# The first frame of a connection must fit; a change of the limits above that breaks it fails here.
assert len(MAGIC) + _HELLO.size + 64 + NAMESPACE_BYTES_MAX + PIECES_MAX // 8 <= BODY_BYTES_MAX
assert HEADER_BYTES + CHUNK_HEAD_BYTES == 13
