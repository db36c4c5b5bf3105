"""Passes over whole files, in steps short enough that the caller can be cancelled between two.

The caller keeps the descriptor open.
"""

from __future__ import annotations

from typing import Final

from swarmpull.digest import Digest
from swarmpull.store.disk import Disk
from swarmpull.store.hashing import FileHasher, hash_stored_piece
from swarmpull.swarm.metainfo import Metainfo, piece_length_for

# About 10 ms of SHA-256: the longest that a cancelled caller waits, and worth a thread hop.
STEP_BYTES: Final = 8 << 20


async def compute_digest(disk: Disk, descriptor: int, algorithm: str, length: int) -> Digest:
    """Hash the first ``length`` bytes of a file.  Raises StoreUnavailable."""
    hasher = FileHasher(algorithm)
    while hasher.offset < length:
        stop = min(length, hasher.offset + STEP_BYTES)
        await disk.run(hasher.advance, descriptor, stop)
    return hasher.digest()


async def compute_metainfo(disk: Disk, descriptor: int, digest: Digest, length: int) -> Metainfo:
    """Hash the pieces of a file that holds the blob ``digest``.  Raises StoreUnavailable."""
    piece_length = piece_length_for(length)
    hashes = bytearray()
    for start in range(0, length, piece_length):
        stop = min(length, start + piece_length)
        hashes += await disk.run(hash_stored_piece, descriptor, start, stop)
    return Metainfo(digest, length, piece_length, bytes(hashes))


async def matches_pieces(disk: Disk, descriptor: int, metainfo: Metainfo) -> bool:
    """Whether every piece of a file is what it has to hash to; a file that ends early is not.

    As good as hashing the whole for the digest, where the piece hashes are of a blob that had it, at a
    quarter of the processor time.  Raises StoreUnavailable.
    """
    for index in range(metainfo.piece_count):
        start = metainfo.piece_offset(index)
        stop = start + metainfo.piece_size(index)
        actual = await disk.run(hash_stored_piece, descriptor, start, stop)
        if actual != metainfo.piece_hash(index):
            return False
    return True
