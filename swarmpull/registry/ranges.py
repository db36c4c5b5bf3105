"""Byte ranges of a blob (RFC 9110, section 14) and of an upload (OCI distribution specification).

Pure: a header value and a length go in, offsets come out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

import attrs

from swarmpull.errors import SwarmpullError

# podman asks for 8 ranges at once (zstd:chunked) and stargz for some hundreds of 50 kB each; every range
# costs a part header and a read, so there is an end.
RANGES_MAX: Final = 4096
# 10^18 bytes is beyond any blob; longer numbers are not worth converting.
_DIGITS_MAX: Final = 18
_SPEC: Final = re.compile(r"([0-9]*)-([0-9]*)", re.ASCII)
_CONTENT_RANGE: Final = re.compile(
    rf"(?:bytes[ =])?([0-9]{{1,{_DIGITS_MAX}}})-([0-9]{{1,{_DIGITS_MAX}}})(?:/(?:[0-9]+|\*))?",
    re.ASCII,
)


@attrs.define(slots=False)
class RangeNotSatisfiable(SwarmpullError):
    """A range request that is malformed, or that no byte of the blob answers."""

    length: int
    reason: str

    def __str__(self) -> str:
        return f"range not satisfiable: {self.reason} (the blob has {self.length} bytes)"


@attrs.frozen
class ByteRange:
    """The bytes from ``start`` (included) to ``stop`` (excluded); never empty.

    ``is_rest`` tells that the request named no end: it is for all that is left, as when a pull resumes.
    """

    start: int
    stop: int
    is_rest: bool = attrs.field(default=False, eq=False)

    @property
    def length(self) -> int:
        return self.stop - self.start

    def content_range(self, length: int) -> str:
        """The value of ``Content-Range`` for this part of ``length`` bytes."""
        return f"bytes {self.start}-{self.stop - 1}/{length}"


def parse_range(header: str | None, length: int) -> tuple[ByteRange, ...] | None:
    """What a ``Range`` header asks for, in the order in which it asks.

    Args:
        header: the value of the header, or None.
        length: of the blob, in bytes.

    Returns:
        None for the whole blob: no header, a unit other than bytes, or an empty blob (some clients put
        ``bytes=0-`` on every request).  Otherwise at least one range; overlong ends are clipped.

    Raises:
        RangeNotSatisfiable: malformed, more ranges than RANGES_MAX, more bytes than the blob has
            (overlapping ranges, which no honest client sends), or nothing inside the blob.
    """
    if header is None or length == 0:
        return None
    unit, separator, specs = header.partition("=")
    if not separator:
        raise RangeNotSatisfiable(length, "the Range header has no unit")
    if unit.strip().lower() != "bytes":
        return None
    texts = [text.strip(" \t") for text in specs.split(",")]
    texts = [text for text in texts if text]
    if not texts or len(texts) > RANGES_MAX:
        raise RangeNotSatisfiable(length, f"1 to {RANGES_MAX} ranges are allowed, got {len(texts)}")
    found = [_parse_spec(text, length) for text in texts]
    ranges = tuple(byte_range for byte_range in found if byte_range is not None)
    if not ranges:
        raise RangeNotSatisfiable(length, "it lies beyond the end")
    if sum(byte_range.length for byte_range in ranges) > length:
        raise RangeNotSatisfiable(length, "the ranges overlap")
    return ranges


def _parse_spec(text: str, length: int) -> ByteRange | None:
    match = _SPEC.fullmatch(text)
    if match is None or text == "-":
        raise RangeNotSatisfiable(length, "the Range header is malformed")
    first, last = match.groups()
    if not first:
        suffix = min(_number(last), length)
        return ByteRange(length - suffix, length) if suffix else None
    start = _number(first)
    end = _number(last) if last else length - 1
    if last and end < start:
        raise RangeNotSatisfiable(length, "it ends before it begins")
    if start >= length:
        return None
    return ByteRange(start, min(end + 1, length), is_rest=not last)


def _number(digits: str) -> int:
    return int(digits) if len(digits) <= _DIGITS_MAX else 10**_DIGITS_MAX


def parse_content_range(header: str) -> ByteRange:
    """The part of an upload that a chunk is, from ``<start>-<end>`` with both ends included.

    ``bytes <start>-<end>/<length>`` (RFC 9110) is understood as well.

    Raises:
        ValueError: the header is anything else.
    """
    match = _CONTENT_RANGE.fullmatch(header.strip())
    if match is None or int(match[2]) < int(match[1]):
        raise ValueError("expected Content-Range: <first byte>-<last byte>")
    return ByteRange(int(match[1]), int(match[2]) + 1)


@attrs.frozen
class Multipart:
    """The layout of a ``multipart/byteranges`` body.

    Attributes:
        content_type: the value of the header, with the boundary.
        preambles: what to send before the bytes of each range.
        epilogue: what to send after the last.
        length: of the whole body, in bytes.
    """

    content_type: str
    preambles: tuple[bytes, ...]
    epilogue: bytes
    length: int


def multipart(
    ranges: Sequence[ByteRange], length: int, *, part_type: str, boundary: str
) -> Multipart:
    """Lay out a multipart body: one part for each range, in their order, never merged.

    containers/image counts the parts, so ranges that touch must stay apart.

    Args:
        ranges: what to send.
        length: of the blob, in bytes.
        part_type: media type of each part.
        boundary: a text that does not occur in the content (random, fresh for each response).
    """
    preambles = tuple(
        (
            f"{'' if index == 0 else chr(13) + chr(10)}--{boundary}\r\n"
            f"Content-Type: {part_type}\r\n"
            f"Content-Range: {byte_range.content_range(length)}\r\n\r\n"
        ).encode()
        for index, byte_range in enumerate(ranges)
    )
    epilogue = f"\r\n--{boundary}--\r\n".encode()
    total = sum(map(len, preambles)) + sum(r.length for r in ranges) + len(epilogue)
    content_type = f"multipart/byteranges; boundary={boundary}"
    return Multipart(content_type, preambles, epilogue, total)
