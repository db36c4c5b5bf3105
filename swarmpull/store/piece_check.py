"""Compares what is read from a blob with its piece hashes, so that a disk that rots does not go unnoticed.

A blob was verified when it came.  What happens to its file afterwards, nobody sees but those who read it.
BLAKE3 costs a fifth of a second per GB, and the bytes are in the cache of the processor when they are hashed.
"""

from __future__ import annotations

from collections.abc import Callable

from swarmpull.store.durable import Data, drop_cached
from swarmpull.store.hashing import hash_stored_piece, new_piece_hasher
from swarmpull.swarm.metainfo import Metainfo


class PieceCheck:
    """Follows one reader of a blob; for one thread at a time.

    A piece is compared when it is read from its beginning to its end, in however many parts; of a range that
    begins inside a piece the rest of that piece is taken as it is.
    """

    def __init__(self, load: Callable[[], Metainfo | None], length: int) -> None:
        """``load`` gets the metainfo, which is asked for once; without it nothing is compared.

        ``length`` is that of the file, in bytes.
        """
        self._load = load
        self._length = length
        self._metainfo: Metainfo | None = None
        self._is_loaded = False
        self._hasher = new_piece_hasher()
        # Where the piece goes on that is being hashed; -1 when none is.
        self._next = -1

    def agrees(self, offset: int, data: Data) -> bool:
        """Take what was read at ``offset``; False when a piece that ends in it is not what it was.

        So too when the file has another length than the blob: its end would pass for that of the blob.
        """
        if not self._is_loaded:
            self._metainfo, self._is_loaded = self._load(), True
        if self._metainfo is None:
            return True
        if self._metainfo.length != self._length:
            return False
        metainfo, view = self._metainfo, memoryview(data)
        while view:
            index, start = divmod(offset, metainfo.piece_length)
            size = metainfo.piece_size(index)
            part = view[: size - start]
            view, offset = view[len(part) :], offset + len(part)
            if start == 0:
                self._hasher = new_piece_hasher()
            elif offset - len(part) != self._next:
                self._next = -1
                continue
            self._hasher.update(part)
            self._next = offset
            is_whole = start + len(part) == size
            if is_whole and self._hasher.digest() != metainfo.piece_hash(index):
                return False
        return True

    def is_damaged(self, descriptor: int, offset: int, size: int) -> bool:
        """Whether a piece in a range that did not agree is wrong on the disk, too, and not only in memory.

        Raises OSError when it cannot be read.
        """
        metainfo = self._metainfo
        if metainfo is None or metainfo.length != self._length:
            return True
        drop_cached(descriptor)
        for index in range(offset // metainfo.piece_length, metainfo.piece_count):
            start = metainfo.piece_offset(index)
            if start >= offset + size:
                break
            stop = start + metainfo.piece_size(index)
            if hash_stored_piece(descriptor, start, stop) != metainfo.piece_hash(index):
                return True
        return False
