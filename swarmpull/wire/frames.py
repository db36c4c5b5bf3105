"""Frames: the envelope of everything that swarmpull sends over TCP.

A frame is a 4-byte big-endian length, one type byte and a body; the length counts the type byte and the
body.  Pure: bytes in, frames out.  The length is checked against a limit before anything of that size
is allocated.
"""

from __future__ import annotations

import struct
from typing import Final

import attrs

from swarmpull.errors import ProtocolError, TlsError

_HEADER: Final = struct.Struct("!IB")
HEADER_BYTES: Final = _HEADER.size
NOT_BOTH: Final = (
    "only one side speaks TLS: set tls.ca, tls.cert and tls.key on both, and tls.peer alike"
)


@attrs.frozen
class Frame:
    """One whole frame."""

    type: int
    body: bytes


def pack_header(frame_type: int, body_length: int) -> bytes:
    """The five bytes before a body of ``body_length`` bytes."""
    return _HEADER.pack(body_length + 1, frame_type)


def pack_frame(frame_type: int, body: bytes) -> bytes:
    """A whole frame."""
    return _HEADER.pack(len(body) + 1, frame_type) + body


def unpack_header(data: bytes | bytearray) -> tuple[int, int]:
    """The type and the length of the body, from the first five bytes of ``data``.

    Raises:
        ProtocolError: the frame has not even a type byte.
    """
    length, frame_type = _HEADER.unpack_from(data)
    if length == 0:
        raise ProtocolError("a frame of length 0 has no type")
    return frame_type, length - 1


# A record of TLS begins with its kind, 20 to 23, and the version, of which the first byte is 3.
_TLS_OPENINGS: Final = tuple(bytes((kind, 3)) for kind in range(20, 24))


def oversized(body_length: int, limit: int) -> ProtocolError:
    """The error for a frame above its limit; names its first bytes, which often tell who is calling."""
    opening = (body_length + 1).to_bytes(4, "big")
    if opening.startswith(_TLS_OPENINGS):
        return TlsError(NOT_BOTH)
    return ProtocolError(
        f"a frame with a body of {body_length} bytes, the limit is {limit} (length bytes {opening!r})"
    )


class FrameBuffer:
    """Cuts a stream of bytes into frames; holds at most one frame and what arrived with its end.

    Attributes:
        body_bytes_max: bodies above this end the connection; may be changed between frames.
    """

    __slots__ = ("_data", "body_bytes_max")

    def __init__(self, *, body_bytes_max: int) -> None:
        self.body_bytes_max = body_bytes_max
        self._data = bytearray()

    def __len__(self) -> int:
        """Bytes that are fed but not yet taken."""
        return len(self._data)

    def lacking(self) -> int:
        """Bytes that the begun frame lacks, after a `take` without a frame; 0 while its length is unknown."""
        if len(self._data) < HEADER_BYTES:
            return 0
        return HEADER_BYTES + unpack_header(self._data)[1] - len(self._data)

    def feed(self, data: bytes | bytearray) -> None:
        """Add bytes as they came from the network."""
        self._data += data

    def take(self) -> Frame | None:
        """The next frame, or None until more bytes are fed.

        Raises:
            ProtocolError: the frame is empty or its body is above the limit.
        """
        if len(self._data) < HEADER_BYTES:
            return None
        frame_type, body_length = unpack_header(self._data)
        if body_length > self.body_bytes_max:
            raise oversized(body_length, self.body_bytes_max)
        end = HEADER_BYTES + body_length
        if len(self._data) < end:
            return None
        with memoryview(self._data) as view:
            body = bytes(view[HEADER_BYTES:end])
        del self._data[:end]
        return Frame(frame_type, body)
