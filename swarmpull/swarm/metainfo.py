"""Metainfo: what a peer must know of a blob before it can ask for a piece of it."""

from __future__ import annotations

from typing import Final

import attrs

from swarmpull.digest import Digest
from swarmpull.errors import InvalidMetainfo

MIB: Final = 1 << 20

# BLAKE3 digests are 32 bytes (BLAKE3 specification, section 2.6).
PIECE_HASH_BYTES: Final = 32
# 4 MiB pieces cost 13 ms of a 300 MB/s link and keep metainfo at 8 bytes per MiB; above 4096 pieces the
# piece doubles instead, so that the metainfo of any blob fits a message (128 KiB of hashes).
PIECE_LENGTH_MIN: Final = 4 * MIB
PIECE_LENGTH_MAX: Final = 64 * MIB
PIECES_TARGET: Final = 4096
# 64 MiB pieces up to this many: 8 TiB, more than any registry takes.
PIECES_MAX: Final = 1 << 17


def piece_length_for(length: int) -> int:
    """The piece length in bytes for a blob of ``length`` bytes: a step function of the length alone.

    Every host computes the same value, so metainfo of one blob is the same wherever it is made.
    """
    piece_length = PIECE_LENGTH_MIN
    while piece_length < PIECE_LENGTH_MAX and piece_length * PIECES_TARGET < length:
        piece_length *= 2
    return piece_length


def piece_count_for(length: int, piece_length: int) -> int:
    """How many pieces a blob has; an empty blob has none."""
    return -(-length // piece_length)


@attrs.frozen
class Metainfo:
    """Length, piece length and piece hashes of one blob.

    Attributes:
        digest: the blob.
        length: of the blob, in bytes.
        piece_length: of every piece but the last, in bytes; a power of two.
        piece_hashes: the BLAKE3 hashes of all pieces, in order, 32 bytes each, joined.
    """

    digest: Digest
    length: int
    piece_length: int
    piece_hashes: bytes = attrs.field(repr=False)

    def __attrs_post_init__(self) -> None:
        if self.length < 0:
            raise InvalidMetainfo(str(self.digest), f"length is {self.length}")
        if not PIECE_LENGTH_MIN <= self.piece_length <= PIECE_LENGTH_MAX or (
            self.piece_length & (self.piece_length - 1)
        ):
            raise InvalidMetainfo(
                str(self.digest),
                f"piece length is {self.piece_length}, allowed are powers of two "
                f"from {PIECE_LENGTH_MIN} to {PIECE_LENGTH_MAX}",
            )
        if self.piece_count > PIECES_MAX:
            raise InvalidMetainfo(str(self.digest), f"{self.piece_count} pieces are too many")
        if len(self.piece_hashes) != self.piece_count * PIECE_HASH_BYTES:
            raise InvalidMetainfo(
                str(self.digest),
                f"{len(self.piece_hashes)} bytes of hashes for {self.piece_count} pieces",
            )

    @property
    def piece_count(self) -> int:
        return piece_count_for(self.length, self.piece_length)

    def piece_offset(self, index: int) -> int:
        """Where piece ``index`` begins in the blob, in bytes."""
        return index * self.piece_length

    def piece_size(self, index: int) -> int:
        """Length of piece ``index`` in bytes: the last one may be short."""
        if not 0 <= index < self.piece_count:
            raise IndexError(index)
        return min(self.piece_length, self.length - index * self.piece_length)

    def piece_hash(self, index: int) -> bytes:
        """The BLAKE3 hash of piece ``index``."""
        return self.piece_hashes[index * PIECE_HASH_BYTES : (index + 1) * PIECE_HASH_BYTES]

    def pieces_of(self, start: int, stop: int) -> range:
        """The pieces that hold the bytes ``start`` (included) to ``stop`` (excluded)."""
        if stop <= start:
            return range(0)
        return range(start // self.piece_length, (stop - 1) // self.piece_length + 1)
