"""Metainfo that grows, shared by the tasks that make it grow and those that wait for it."""

from __future__ import annotations

import copy
import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Final

import structlog
import trio

from swarmpull.digest import Digest
from swarmpull.errors import InvalidMetainfo, RpcFailed, RpcUnavailable, SwarmpullError
from swarmpull.swarm.metainfo import PIECE_HASH_BYTES, BlobShape, GrowingMetainfo, Metainfo
from swarmpull.wire.api import Growth, HashesRequest

log = structlog.get_logger()

# Of one reply: 128 KiB of hashes.
ENTRIES_MAX: Final = 4096
# Replies that tell of new hashes, in a second, over all who wait for those of one blob.  With more waiting
# each hears less often, and of more pieces at a time.
REPLIES_PER_SECOND: Final = 4000
# For which one call waits, in seconds.
POLL_SECONDS: Final = 30.0
# Until the next call after one that brought nothing or failed, in seconds: as many wait there as may, or
# nobody answers.
POLL_PAUSE: Final = 1.0
# For which nobody needs to answer until there is no more hope, in seconds.
POLL_PATIENCE: Final = 60.0
# The source of complete metainfo, whose log is in the order of the pieces everywhere.
COMPLETE: Final = "complete"

AskForHashes = Callable[[HashesRequest], Awaitable[Growth]]

_random: Final = random.SystemRandom()


class HashLog:
    """The log of one `GrowingMetainfo` under a name of its own.

    Attributes:
        metainfo: what is known.
        source: names this log; positions in another one mean nothing here.
        waiting: how many wait for more.
        is_settled: whether the whole blob has matched its digest, so that all hashes are right.
    """

    def __init__(self, metainfo: GrowingMetainfo, source: str = "") -> None:
        self.metainfo = metainfo
        self.source = source or f"{_random.getrandbits(64):016x}"
        self.waiting = 0
        self.is_settled = False
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

    def settle(self) -> None:
        """The whole blob has matched its digest."""
        self.is_settled = True
        self.grew()

    def fail(self, error: SwarmpullError) -> None:
        """There will be no more, or what there was is wrong; the first end counts."""
        if self._error is None and not self.is_settled:
            self._error = error
            self.grew()

    def since(self, source: str, position: int) -> Growth:
        """What is known after a position; from the beginning when it is one of another log."""
        known = self.metainfo
        if source != self.source or not 0 <= position <= known.position:
            position = 0
        entries = known.entries_since(position, ENTRIES_MAX)
        position += len(entries)
        return Growth(
            known.length,
            known.piece_length,
            self.source,
            position,
            tuple(index for index, _ in entries),
            b"".join(piece_hash for _, piece_hash in entries),
            self.is_settled and position == known.piece_count,
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

    async def wait_complete(self) -> Metainfo:
        """The metainfo once all hashes are known, which may be long before it is settled.

        Raises SwarmpullError: why they will not be.
        """
        while (metainfo := self.metainfo.complete()) is None:
            self._raise_if_failed()
            await self._grown.wait()
        return metainfo

    async def wait_settled(self) -> Metainfo:
        """The metainfo once the blob has matched its digest.  Raises SwarmpullError: why it does not."""
        while True:
            self._raise_if_failed()
            metainfo = self.metainfo.complete()
            if metainfo is not None and self.is_settled:
                return metainfo
            await self._grown.wait()

    async def _until_after(self, source: str, position: int) -> None:
        while (
            source == self.source
            and self.metainfo.position <= position
            and not self.is_settled
            and self._error is None
        ):
            await self._grown.wait()

    @contextmanager
    def _counted(self) -> Iterator[None]:
        self.waiting += 1
        try:
            yield
        finally:
            self.waiting -= 1

    def _raise_if_failed(self) -> None:
        if self._error is not None:
            # An exception collects the traceback of whoever raises it: each raises its own.
            raise copy.copy(self._error)


def log_of(digest: Digest, growth: Growth) -> HashLog:
    """A log that begins with what another one says.  Raises InvalidMetainfo: that cannot be."""
    log = HashLog(GrowingMetainfo(digest, growth.length, growth.piece_length))
    log.add(growth)
    return log


def complete_growth(metainfo: Metainfo, request: HashesRequest) -> Growth:
    """The answer of somebody who has complete metainfo."""
    log = HashLog(GrowingMetainfo.from_shape(metainfo), COMPLETE)
    log.settle()
    return log.since(request.source, request.position)


class HashPolls:
    """The calls that wait for hashes at one role.

    At the limit, and while the role drains, a call is answered at once with what is known.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._scopes: set[trio.CancelScope] = set()
        self._ended = False

    def __len__(self) -> int:
        return len(self._scopes)

    async def answer(self, log: HashLog, request: HashesRequest) -> Growth:
        """Wait as the caller asks.  Raises SwarmpullError: why there will be no more."""
        # Written so that NaN becomes the usual time.
        seconds = request.seconds if 0.0 <= request.seconds < POLL_SECONDS else POLL_SECONDS
        if self._ended or len(self._scopes) >= self._limit:
            seconds = 0.0
        with trio.CancelScope() as scope:
            self._scopes.add(scope)
            try:
                return await log.wait_since(request.source, request.position, seconds)
            finally:
                self._scopes.discard(scope)
        return log.since(request.source, request.position)

    def end(self) -> None:
        """Answer all who wait, and let nobody wait from now on."""
        self._ended = True
        for scope in self._scopes:
            scope.cancel()


async def follow_growth(
    known: HashLog, namespace: str, ask: AskForHashes, growth: Growth | None = None
) -> None:
    """Ask for hashes until they are settled; ``growth`` is what was asked for before and is known.

    Raises:
        InvalidMetainfo: what was said contradicts what was known.
        RpcUnavailable, RpcFailed: nobody has answered for a minute.
        SwarmpullError: there will be no more, and why.
    """
    digest = known.metainfo.digest
    source, position = (growth.source, growth.position) if growth else ("", 0)
    hope_until = trio.current_time() + POLL_PATIENCE
    while not known.is_settled:
        try:
            growth = await ask(HashesRequest(digest, namespace, source, position, POLL_SECONDS))
        except (RpcUnavailable, RpcFailed) as error:
            if trio.current_time() >= hope_until:
                raise
            log.info("hashes_not_told", digest=str(digest), reason=str(error))
            await trio.sleep(POLL_PAUSE)
            continue
        known.add(growth)
        if growth.settled:
            if not known.metainfo.is_complete:
                raise InvalidMetainfo(str(digest), "the log is said to end, and hashes are missing")
            known.settle()
            return
        hope_until = trio.current_time() + POLL_PATIENCE
        if (source, position) == (growth.source, growth.position):
            await trio.sleep(POLL_PAUSE)
        source, position = growth.source, growth.position
