"""The file form of metainfo: what lies beside a blob, on the disk and in the backend.

``magic | length of digest text (1) | digest text | length (8) | piece length (4) | piece hashes |
BLAKE3 of all before (32)``, integers big-endian.  The hash at the end tells a torn or damaged file from
a good one, so these files need not be flushed: a damaged one is computed again.
"""

from __future__ import annotations

import struct
from typing import Final

from swarmpull.digest import Digest
from swarmpull.errors import InvalidDigest, InvalidMetainfo
from swarmpull.store.hashing import hash_piece
from swarmpull.swarm.metainfo import PIECE_HASH_BYTES, BlobShape, Metainfo

MAGIC: Final = b"swarmpull-meta-1"
CHECK_BYTES: Final = 32
_NUMBERS: Final = struct.Struct(">QI")


class DamagedSidecar(Exception):
    """The bytes are not metainfo as `encode` wrote it."""


def encode(metainfo: Metainfo) -> bytes:
    """The file form of metainfo."""
    body = encode_shape(MAGIC, metainfo) + metainfo.piece_hashes
    return body + hash_piece(body)


def decode(data: bytes) -> tuple[Metainfo, int]:
    """Read metainfo from the beginning of ``data``; also returns how many bytes it took.

    Raises:
        DamagedSidecar: cut short, changed, or of another format.
    """
    shape, hashes_start = decode_shape(MAGIC, data)
    hashes_stop = hashes_start + shape.piece_count * PIECE_HASH_BYTES
    stop = hashes_stop + CHECK_BYTES
    if len(data) < stop or hash_piece(data[:hashes_stop]) != data[hashes_stop:stop]:
        raise DamagedSidecar("the content does not match its checksum")
    hashes = data[hashes_start:hashes_stop]
    return Metainfo(shape.digest, shape.length, shape.piece_length, hashes), stop


def encode_shape(magic: bytes, shape: BlobShape) -> bytes:
    """What such a file begins with."""
    name = str(shape.digest).encode("ascii")
    numbers = _NUMBERS.pack(shape.length, shape.piece_length)
    return b"".join((magic, bytes((len(name),)), name, numbers))


def decode_shape(magic: bytes, data: bytes) -> tuple[BlobShape, int]:
    """Read what such a file begins with; also returns how many bytes it took.

    Raises:
        DamagedSidecar: another magic, cut short, or no shape that a blob can have.
    """
    if not data.startswith(magic):
        raise DamagedSidecar("not a file of this format")
    try:
        name_start = len(magic) + 1
        name_stop = name_start + data[len(magic)]
        length, piece_length = _NUMBERS.unpack_from(data, name_stop)
        digest = Digest.parse(data[name_start:name_stop].decode("ascii"))
        return BlobShape(digest, length, piece_length), name_stop + _NUMBERS.size
    except (IndexError, UnicodeDecodeError, struct.error, InvalidDigest, InvalidMetainfo) as error:
        raise DamagedSidecar(str(error)) from error
