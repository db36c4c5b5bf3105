"""A file of content whose digest is not known yet: written from beginning to end, hashed as it grows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import trio

from swarmpull.digest import Digest
from swarmpull.errors import DigestMismatch, LengthMismatch, StoreFull, StoreUnavailable
from swarmpull.store.disk import Disk
from swarmpull.store.durable import Data, remove, write_all
from swarmpull.store.hashing import FileHasher, PieceHasher, hash_range
from swarmpull.store.room import Room
from swarmpull.store.scanning import STEP_BYTES, compute_digest, compute_metainfo
from swarmpull.swarm.metainfo import Metainfo

# A thread hop costs about as much as hashing 100 KiB; with 1 MiB it does not count.
BUFFER_BYTES: Final = 1 << 20
# What nearly every digest uses; a sha512 digest costs one more pass over the file.
ALGORITHM: Final = "sha256"


class Spool:
    """One growing file.  Not for two tasks at once; the owner sees to it.

    No descriptor is held between two steps, so any number of spools may lie idle.

    Attributes:
        path: of the file, which exists.
        room: what it takes up; left by whoever removes or moves the file.
        written: bytes in the file.
    """

    def __init__(self, disk: Disk, path: Path, room: Room, *, written: int = 0) -> None:
        self._disk = disk
        self.path = path
        self.room = room
        self.written = written
        self._buffer = bytearray()
        self._whole = FileHasher(ALGORITHM)
        self._pieces = PieceHasher()

    @property
    def offset(self) -> int:
        """Bytes taken, those still in memory included."""
        return self.written + len(self._buffer)

    async def write(self, data: Data) -> None:
        """Take the next bytes; they reach the file when 1 MiB has gathered, or with `flush`.

        Raises:
            StoreFull: no room; `offset` is back at what the file holds.
            StoreUnavailable: likewise.
        """
        self._buffer += data
        if len(self._buffer) >= BUFFER_BYTES:
            await self.flush()
        else:
            await trio.lowlevel.checkpoint()

    async def flush(self) -> None:
        """Write what is still in memory.  Raises as `write` does."""
        await self._hash_what_was_here()
        if not self._buffer:
            return
        needed = len(self._buffer)
        try:
            await self.room.grow(self.written + needed)
            # A cancelled wait for a thread keeps the buffer, for a flush on the way out.
            self.written = await self._disk.run(self._append, self._buffer, needed=needed)
        except (StoreFull, StoreUnavailable):
            self._buffer = bytearray()
            self.room.shrink(self.written)
            raise
        self._buffer = bytearray()

    async def verify(self, digest: Digest, *, length: int | None = None) -> Metainfo:
        """Flush, and compute the metainfo of the file, which must be the blob ``digest``.

        Raises:
            LengthMismatch: the file is not ``length`` bytes long.
            DigestMismatch: the content is another.
            StoreFull, StoreUnavailable: as `write` does.
        """
        await self.flush()
        if length is not None and length != self.written:
            raise LengthMismatch(str(digest), length, self.written)
        descriptor = await self._disk.run(os.open, self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            actual = await self._digest(descriptor, digest.algorithm)
            if actual != digest:
                raise DigestMismatch(str(digest), str(actual))
            return await self._metainfo(descriptor, digest)
        finally:
            os.close(descriptor)

    async def remove(self) -> None:
        """Remove the file, also when the caller is being cancelled."""
        self._buffer.clear()
        with trio.CancelScope(shield=True):
            await self._disk.run(remove, self.path)
        self.room.leave()

    async def _digest(self, descriptor: int, algorithm: str) -> Digest:
        if algorithm == ALGORITHM:
            return self._whole.digest()
        return await compute_digest(self._disk, descriptor, algorithm, self.written)

    async def _metainfo(self, descriptor: int, digest: Digest) -> Metainfo:
        hashes = self._pieces.piece_hashes()
        if hashes is None:
            return await compute_metainfo(self._disk, descriptor, digest, self.written)
        return Metainfo(digest, self.written, PieceHasher.PIECE_LENGTH, hashes)

    async def _hash_what_was_here(self) -> None:
        """Catch up with a file that an earlier process has begun."""
        while self._whole.offset < self.written:
            await self._disk.run(self._hash_step)

    def _hash_step(self) -> None:
        start = self._whole.offset
        stop = min(self.written, start + STEP_BYTES)
        descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            hash_range(descriptor, start, stop, self._whole, self._pieces)
        finally:
            os.close(descriptor)

    def _append(self, data: Data) -> int:
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            write_all(descriptor, data, self.written)
        except OSError:
            # Gives the room back to others, and keeps the size equal to what was hashed.
            os.ftruncate(descriptor, self.written)
            raise
        finally:
            os.close(descriptor)
        self._whole.update(data)
        self._pieces.update(data)
        return self.written + len(data)
