"""Piece hashes (BLAKE3) and whole-blob hashes over files; blocking, call them in a thread.

Both libraries let other threads run while they hash more than a few KiB.
"""

from __future__ import annotations

import hashlib
import os
from typing import Final, Protocol

from blake3 import blake3

from swarmpull.digest import Digest
from swarmpull.store.durable import Data, end_of_file
from swarmpull.swarm.metainfo import PIECE_LENGTH_MIN, piece_length_for

# Fits the second-level cache of a core, so that the hash reads what the copy has just left there.
READ_BYTES: Final = 256 << 10


def hash_piece(data: Data) -> bytes:
    """The BLAKE3 hash of one piece: 32 bytes."""
    return blake3(data).digest()


def new_piece_hasher() -> PieceHash:
    """The BLAKE3 hash of a piece that comes in chunks."""
    return blake3()


def hash_stored_piece(descriptor: int, start: int, stop: int) -> bytes:
    """The BLAKE3 hash of the piece between two offsets of a file."""
    hasher = blake3()
    hash_range(descriptor, start, stop, hasher)
    return hasher.digest()


def hash_blob(
    descriptor: int, algorithm: str, length: int, piece_length: int
) -> tuple[Digest, bytes]:
    """The digest and the piece hashes of a whole file, read once."""
    whole = hashlib.new(algorithm)
    hashes = bytearray()
    for start in range(0, length, piece_length):
        piece = blake3()
        hash_range(descriptor, start, min(length, start + piece_length), whole, piece)
        hashes += piece.digest()
    return Digest(algorithm, whole.hexdigest()), bytes(hashes)


class PieceHasher:
    """Hashes the pieces of a blob that is written from beginning to end, whose length is not known yet.

    Piece hashes are kept for the smallest piece length.  A blob long enough for longer pieces needs
    another pass over its file, see `piece_hashes`.
    """

    PIECE_LENGTH: Final = PIECE_LENGTH_MIN

    def __init__(self) -> None:
        self._done = bytearray()
        self._current = blake3()
        self._filled = 0
        self.length = 0

    def update(self, data: Data) -> None:
        """Take the next bytes."""
        view = memoryview(data)
        self.length += len(view)
        while view:
            part = view[: self.PIECE_LENGTH - self._filled]
            self._current.update(part)
            self._filled += len(part)
            view = view[len(part) :]
            if self._filled == self.PIECE_LENGTH:
                self._next_piece()

    def piece_hashes(self) -> bytes | None:
        """All hashes, joined; None when a blob of this length has longer pieces than were hashed."""
        if piece_length_for(self.length) != self.PIECE_LENGTH:
            return None
        last = self._current.digest() if self._filled else b""
        return bytes(self._done) + last

    def _next_piece(self) -> None:
        self._done += self._current.digest()
        self._current = blake3()
        self._filled = 0


class FileHasher:
    """The whole-blob hash over a file that grows, together with where it has come to.

    Attributes:
        offset: the bytes hashed so far.
    """

    def __init__(self, algorithm: str) -> None:
        self.algorithm = algorithm
        self.offset = 0
        self._hasher = hashlib.new(algorithm)

    def update(self, data: Data) -> None:
        """Take the bytes that follow `offset`."""
        self._hasher.update(data)
        self.offset += len(data)

    def advance(self, descriptor: int, stop: int) -> None:
        """Read and hash up to ``stop``.  OSError when the file ends before."""
        hash_range(descriptor, self.offset, stop, self)

    def digest(self) -> Digest:
        """The digest of what was hashed so far."""
        return Digest(self.algorithm, self._hasher.hexdigest())


class Hasher(Protocol):
    """Whatever takes bytes in order."""

    def update(self, data: memoryview, /) -> object: ...


class PieceHash(Hasher, Protocol):
    """The hash of one piece."""

    def digest(self) -> bytes:
        """Of what was taken so far: 32 bytes."""
        ...


def hash_range(descriptor: int, start: int, stop: int, *hashers: Hasher) -> None:
    """Read once from ``start`` to ``stop`` and give the bytes to each hasher.

    Raises:
        OSError: the read failed, or the file ends before ``stop``.
    """
    buffer = memoryview(bytearray(min(READ_BYTES, max(stop - start, 0))))
    while start < stop:
        count = os.preadv(descriptor, [buffer[: stop - start]], start)
        if count == 0:
            raise end_of_file(start)
        for hasher in hashers:
            hasher.update(buffer[:count])
        start += count
