"""Bitfields as plain integers: bit ``i`` says whether piece ``i`` is there.

CPython's integers do ``&``, ``|``, ``~`` and ``bit_count`` over thousands of bits in C, which no class of
ours would match; these functions are what integers lack.
"""

from __future__ import annotations

from collections.abc import Iterator

from swarmpull.errors import ProtocolError


def full(count: int) -> int:
    """The bitfield of ``count`` pieces that are all there."""
    return (1 << count) - 1


def indices(bits: int) -> Iterator[int]:
    """The set bits, lowest first.

    Through the binary digits: taking bit after bit off an integer is quadratic, and a peer may have 100,000
    pieces.
    """
    digits = bin(bits)[:1:-1]
    index = digits.find("1")
    while index >= 0:
        yield index
        index = digits.find("1", index + 1)


def lowest(bits: int) -> int:
    """The lowest set bit of a bitfield that is not empty."""
    return (bits & -bits).bit_length() - 1


def to_bytes(bits: int, count: int) -> bytes:
    """The wire form: bit ``i % 8`` of byte ``i // 8`` is piece ``i``."""
    return bits.to_bytes((count + 7) // 8, "little")


def from_bytes(data: bytes, count: int) -> int:
    """Parse the wire form.

    Raises:
        ProtocolError: wrong length, or a bit set beyond the last piece.
    """
    if len(data) != (count + 7) // 8:
        raise ProtocolError(f"a bitfield of {len(data)} bytes for {count} pieces")
    bits = int.from_bytes(data, "little")
    if bits >> count:
        raise ProtocolError(f"the bitfield claims pieces beyond the last of {count}")
    return bits
