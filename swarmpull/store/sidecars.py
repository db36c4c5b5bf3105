"""The file form of metainfo: what lies beside a blob, and what a partial begins with.

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
from swarmpull.swarm.metainfo import PIECE_HASH_BYTES, PIECE_LENGTH_MIN, Metainfo, piece_count_for

MAGIC: Final = b"swarmpull-meta-1"
CHECK_BYTES: Final = 32
_NUMBERS: Final = struct.Struct(">QI")


class DamagedSidecar(Exception):
    """The bytes are not metainfo as `encode` wrote it."""


def encode(metainfo: Metainfo) -> bytes:
    """The file form of metainfo."""
    name = str(metainfo.digest).encode("ascii")
    numbers = _NUMBERS.pack(metainfo.length, metainfo.piece_length)
    body = b"".join((MAGIC, bytes((len(name),)), name, numbers, metainfo.piece_hashes))
    return body + hash_piece(body)


def decode(data: bytes) -> tuple[Metainfo, int]:
    """Read metainfo from the beginning of ``data``; also returns how many bytes it took.

    Raises:
        DamagedSidecar: cut short, changed, or of another format.
    """
    if not data.startswith(MAGIC):
        raise DamagedSidecar("not a metainfo file")
    try:
        return _decode_body(data)
    except (IndexError, UnicodeDecodeError, struct.error, InvalidDigest, InvalidMetainfo) as error:
        raise DamagedSidecar(str(error)) from error


def _decode_body(data: bytes) -> tuple[Metainfo, int]:
    name_start = len(MAGIC) + 1
    name_stop = name_start + data[len(MAGIC)]
    length, piece_length = _NUMBERS.unpack_from(data, name_stop)
    hashes_start = name_stop + _NUMBERS.size
    # A damaged piece length may be 0; the shortest allowed one bounds the slice below all the same.
    pieces = piece_count_for(length, max(piece_length, PIECE_LENGTH_MIN))
    hashes_stop = hashes_start + pieces * PIECE_HASH_BYTES
    stop = hashes_stop + CHECK_BYTES
    if len(data) < stop or hash_piece(data[:hashes_stop]) != data[hashes_stop:stop]:
        raise DamagedSidecar("the content does not match its checksum")
    digest = Digest.parse(data[name_start:name_stop].decode("ascii"))
    return Metainfo(digest, length, piece_length, data[hashes_start:hashes_stop]), stop
