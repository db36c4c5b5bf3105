"""The record of a partial blob: which pieces are stored, and what they hash to.

``magic | length of digest text (1) | digest text | length (8) | piece length (4) |
BLAKE3 of all before (32) | hashes (32 each) | marks (1 each)``, integers big-endian.

The mark of a piece is 1 when it is stored; a byte, not a bit, so that two threads that store neighbouring
pieces never write the same byte.  The hash of a piece is written with the piece and before its mark: most
partials begin before all hashes are known.  Only hashes of marked pieces mean anything, and those pieces are
verified at every opening.
"""

from __future__ import annotations

from typing import Final

import attrs

from swarmpull.store.hashing import hash_piece
from swarmpull.store.sidecars import CHECK_BYTES, DamagedSidecar, decode_shape, encode_shape
from swarmpull.swarm.metainfo import PIECE_HASH_BYTES, BlobShape

MAGIC: Final = b"swarmpull-part-1"
STORED: Final = b"\x01"
MISSING: Final = b"\x00"


@attrs.frozen
class PieceRecords:
    """The content of such a file.

    Attributes:
        shape: of the blob.
        hashes_offset, marks_offset: where in the file those of piece 0 are.
        hashes: 32 bytes for each piece.
        have: the pieces that are marked, as a bitfield.
    """

    shape: BlobShape
    hashes_offset: int
    marks_offset: int
    hashes: bytes = attrs.field(repr=False)
    have: int

    def piece_hash(self, index: int) -> bytes:
        """Of a piece that is marked."""
        return self.hashes[index * PIECE_HASH_BYTES : (index + 1) * PIECE_HASH_BYTES]


def encode(shape: BlobShape, hashes: dict[int, bytes]) -> bytes:
    """The file when these pieces are stored, with their hashes."""
    header = encode_shape(MAGIC, shape)
    unknown = bytes(PIECE_HASH_BYTES)
    pieces = range(shape.piece_count)
    marks = b"".join(STORED if index in hashes else MISSING for index in pieces)
    joined = b"".join(hashes.get(index, unknown) for index in pieces)
    return header + hash_piece(header) + joined + marks


def decode(data: bytes) -> PieceRecords:
    """Read the file.

    Raises:
        DamagedSidecar: cut short, changed, or of another format.
    """
    shape, stop = decode_shape(MAGIC, data)
    hashes_offset = stop + CHECK_BYTES
    if hash_piece(data[:stop]) != data[stop:hashes_offset]:
        raise DamagedSidecar("the header does not match its checksum")
    marks_offset = hashes_offset + shape.piece_count * PIECE_HASH_BYTES
    marks = data[marks_offset : marks_offset + shape.piece_count]
    have = sum(1 << index for index, mark in enumerate(marks) if mark == STORED[0])
    return PieceRecords(shape, hashes_offset, marks_offset, data[hashes_offset:marks_offset], have)
