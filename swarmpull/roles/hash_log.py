"""Metainfo that grows, shared by the tasks that make it grow and those that wait for it."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import trio

from swarmpull.digest import Digest
from swarmpull.errors import InvalidMetainfo, SwarmpullError
from swarmpull.swarm.metainfo import PIECE_HASH_BYTES, BlobShape, GrowingMetainfo
from swarmpull.wire.api import Growth

# Of one reply: 128 KiB of hashes.
ENTRIES_MAX: Final = 4096
# Replies that tell of new hashes, in a second, over all who wait for those of one blob.  With more waiting
# each hears less often, and of more pieces at a time.
REPLIES_PER_SECOND: Final = 4000
_random: Final = random.SystemRandom()


class HashLog:
    """The log of one `GrowingMetainfo` under a name of its own.

    Attributes:
        metainfo: what is known.
        source: names this log; positions in another one mean nothing here.
        waiting: how many wait for more.
    """

    def __init__(self, metainfo: GrowingMetainfo) -> None:
        self.metainfo = metainfo
        self.source = f"{_random.getrandbits(64):016x}"
        self.waiting = 0
        self._error: SwarmpullError | None = None
        self._grown = trio.Event()

    def grew(self) -> None:
        """The metainfo has grown: wake those who wait."""
        self._grown.set()
        self._grown = trio.Event()

    def add(self, growth: Growth) -> None:
        """Take in what another log says.  Raises InvalidMetainfo when the two contradict one another."""
        own = self.metainfo
        own.check_shape(BlobShape(own.digest, growth.length, growth.piece_length))
        if len(growth.hashes) != len(growth.indices) * PIECE_HASH_BYTES:
            reason = f"{len(growth.hashes)} bytes for {len(growth.indices)} hashes"
            raise InvalidMetainfo(str(own.digest), reason)
        for number, index in enumerate(growth.indices):
            start = number * PIECE_HASH_BYTES
            own.add(index, growth.hashes[start : start + PIECE_HASH_BYTES])
        self.grew()

    def fail(self, error: SwarmpullError) -> None:
        """There will be no more; the first reason counts."""
        if self._error is None:
            self._error = error
            self.grew()

    def since(self, source: str, position: int) -> Growth:
        """What is known after a position; from the beginning when it is one of another log."""
        shape = self.metainfo
        if source != self.source or not 0 <= position <= shape.position:
            position = 0
        entries = shape.entries_since(position, ENTRIES_MAX)
        return Growth(
            shape.length,
            shape.piece_length,
            self.source,
            position + len(entries),
            tuple(index for index, _ in entries),
            b"".join(piece_hash for _, piece_hash in entries),
        )

    async def wait_since(self, source: str, position: int, seconds: float) -> Growth:
        """The same as `since`, once there is something; without any when ``seconds`` are over.

        Raises:
            SwarmpullError: why there will be no more.
        """
        with self._counted(), trio.move_on_after(seconds):
            await self._until_after(source, position)
            # So that one reply tells of several pieces when many wait.
            await trio.sleep(self.waiting / REPLIES_PER_SECOND)
        self._raise_if_failed()
        return self.since(source, position)

    async def wait_hash(self, index: int, seconds: float) -> bool:
        """Return when the hash of a piece is known; False when it is not within ``seconds``.

        Raises:
            SwarmpullError: why it will not be.
        """
        with trio.move_on_after(seconds):
            while self.metainfo.piece_hash(index) is None:
                self._raise_if_failed()
                await self._grown.wait()
        return self.metainfo.piece_hash(index) is not None

    async def wait_complete(self) -> None:
        """Return when every hash is known.  Raises SwarmpullError: why they will not be."""
        while not self.metainfo.is_complete:
            self._raise_if_failed()
            await self._grown.wait()

    async def _until_after(self, source: str, position: int) -> None:
        while source == self.source and self.metainfo.position <= position and not self._error:
            if self.metainfo.is_complete:
                return
            await self._grown.wait()

    @contextmanager
    def _counted(self) -> Iterator[None]:
        self.waiting += 1
        try:
            yield
        finally:
            self.waiting -= 1

    def _raise_if_failed(self) -> None:
        if self._error is not None and not self.metainfo.is_complete:
            # An exception collects the traceback of whoever raises it: each raises its own.
            raise copy.copy(self._error)


def log_of(digest: Digest, growth: Growth) -> HashLog:
    """A log that begins with what another one says.  Raises InvalidMetainfo: that cannot be."""
    log = HashLog(GrowingMetainfo(digest, growth.length, growth.piece_length))
    log.add(growth)
    return log
