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
class BlobShape:
    """Into which pieces one blob is cut: all that the swarm needs to know of it.

    Attributes:
        digest: the blob.
        length: of the blob, in bytes.
        piece_length: of every piece but the last, in bytes; a power of two.
    """

    digest: Digest
    length: int
    piece_length: int

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

    @classmethod
    def of(cls, digest: Digest, length: int) -> BlobShape:
        """The shape that every host gives to a blob of this length."""
        return BlobShape(digest, length, piece_length_for(length))

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

    def pieces_of(self, start: int, stop: int) -> range:
        """The pieces that hold the bytes ``start`` (included) to ``stop`` (excluded)."""
        if stop <= start:
            return range(0)
        return range(start // self.piece_length, (stop - 1) // self.piece_length + 1)


@attrs.frozen
class Metainfo(BlobShape):
    """Length, piece length and piece hashes of one blob.

    Attributes:
        piece_hashes: the BLAKE3 hashes of all pieces, in order, 32 bytes each, joined.
    """

    piece_hashes: bytes = attrs.field(repr=False)

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        if len(self.piece_hashes) != self.piece_count * PIECE_HASH_BYTES:
            raise InvalidMetainfo(
                str(self.digest),
                f"{len(self.piece_hashes)} bytes of hashes for {self.piece_count} pieces",
            )

    def piece_hash(self, index: int) -> bytes:
        """The BLAKE3 hash of piece ``index``."""
        return self.piece_hashes[index * PIECE_HASH_BYTES : (index + 1) * PIECE_HASH_BYTES]


@attrs.frozen(eq=False)
class GrowingMetainfo(BlobShape):
    """The shape of a blob and those of its piece hashes that are known; more become known, in any order.

    What became known when is an append-only log.  A position in it is how many entries came before, so
    whoever keeps one can ask for what is new.
    """

    _hashes: dict[int, bytes] = attrs.field(factory=dict, repr=False)
    _log: list[int] = attrs.field(factory=list, repr=False)

    @classmethod
    def from_shape(cls, shape: BlobShape) -> GrowingMetainfo:
        """With every hash that ``shape`` has: none, or all if it is a `Metainfo`."""
        growing = cls(shape.digest, shape.length, shape.piece_length)
        if isinstance(shape, Metainfo):
            growing.add_all(shape)
        return growing

    @property
    def position(self) -> int:
        """How many hashes are known: the position after the last entry of the log."""
        return len(self._log)

    @property
    def is_complete(self) -> bool:
        return len(self._log) == self.piece_count

    def piece_hash(self, index: int) -> bytes | None:
        """The BLAKE3 hash of piece ``index``; None as long as it is not known."""
        return self._hashes.get(index)

    def add(self, index: int, piece_hash: bytes) -> bool:
        """One more hash is known; False when it was known before.

        Raises:
            InvalidMetainfo: there is no such piece, this is no hash, or another one is known.
        """
        if not 0 <= index < self.piece_count or len(piece_hash) != PIECE_HASH_BYTES:
            raise InvalidMetainfo(
                str(self.digest), f"{len(piece_hash)} bytes as the hash of piece {index}"
            )
        known = self._hashes.get(index)
        if known is None:
            self._hashes[index] = bytes(piece_hash)
            self._log.append(index)
            return True
        if known != piece_hash:
            raise InvalidMetainfo(str(self.digest), f"two hashes of piece {index} differ")
        return False

    def add_all(self, metainfo: Metainfo) -> None:
        """All hashes are known.  Raises InvalidMetainfo, and nothing changes, when the two contradict."""
        self.check_shape(metainfo)
        if not self.agrees_with(metainfo):
            raise InvalidMetainfo(str(self.digest), "hashes that are known differ from these")
        for index in range(self.piece_count):
            self.add(index, metainfo.piece_hash(index))

    def agrees_with(self, metainfo: Metainfo) -> bool:
        """Whether all hashes that are known are the same there, for a blob of the same shape."""
        return all(metainfo.piece_hash(index) == known for index, known in self._hashes.items())

    def check_shape(self, other: BlobShape) -> None:
        """Raise InvalidMetainfo unless the other one is about the same pieces of the same blob."""
        own = (self.digest, self.length, self.piece_length)
        if own != (other.digest, other.length, other.piece_length):
            raise InvalidMetainfo(
                str(self.digest),
                f"{self.length} bytes in pieces of {self.piece_length} became "
                f"{other.length} bytes of {other.digest} in pieces of {other.piece_length}",
            )

    def entries_since(self, position: int, limit: int) -> list[tuple[int, bytes]]:
        """At most ``limit`` entries of the log after ``position``: index and hash of each."""
        return [(index, self._hashes[index]) for index in self._log[position : position + limit]]

    def complete(self) -> Metainfo | None:
        """All of it; None as long as a hash is missing."""
        if not self.is_complete:
            return None
        joined = b"".join(self._hashes[index] for index in range(self.piece_count))
        return Metainfo(self.digest, self.length, self.piece_length, joined)
