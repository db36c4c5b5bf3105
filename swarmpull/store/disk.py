"""The threads in which a store works on its disk, and the one translation of what the disk raises."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, TypeVar, TypeVarTuple

import attrs
import trio

from swarmpull.errors import StoreFull, StoreUnavailable

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
# A file has bytes that the disk cannot give back: a bad sector, or a checksum of the file system that is
# wrong (EIO of btrfs, EBADMSG of ext4, EUCLEAN of XFS).
UNREADABLE: Final = frozenset({errno.EIO, errno.EBADMSG, errno.EUCLEAN})


@attrs.frozen
class Disk:
    """One store's threads: work that somebody waits for, and hashing that runs ahead of need.

    The two have limits of their own, so that hashing ahead never makes a piece or a reader wait for a
    thread.  Every step that is handed over is bounded, because a thread cannot be cancelled.

    Attributes:
        name: the store's name; stamped on every error.
        foreground: the limit of threads for reads and writes; further ones wait their turn.
        background: the limit of threads for hashing ahead.
    """

    name: str
    foreground: trio.CapacityLimiter
    background: trio.CapacityLimiter

    async def run(
        self, function: Callable[[*Ts], T], *args: *Ts, needed: int = 0, ahead: bool = False
    ) -> T:
        """Run one blocking step in a thread.

        Args:
            needed: the bytes that the step wants to add, for the message of `StoreFull`.
            ahead: nobody waits for this step.

        Raises:
            StoreFull: the disk or the quota has no room.
            StoreUnavailable: the disk failed otherwise.
        """
        limiter = self.background if ahead else self.foreground
        with self.translating(needed):
            return await trio.to_thread.run_sync(function, *args, limiter=limiter)

    @contextmanager
    def translating(self, needed: int = 0) -> Iterator[None]:
        """Turn `OSError` into `StoreFull` or `StoreUnavailable`."""
        try:
            yield
        except OSError as error:
            if error.errno in FULL:
                raise StoreFull(self.name, needed) from error
            raise StoreUnavailable(self.name, str(error)) from error


def is_unreadable(error: StoreUnavailable) -> bool:
    """Whether a read failed for the sake of the file: the same read will fail again."""
    return isinstance(error.__cause__, OSError) and error.__cause__.errno in UNREADABLE


class OpenFile:
    """A file descriptor that is closed when its last user is done.

    A thread may be reading while another task closes the file; if the descriptor were closed at once, its
    number could be given to another file and the thread would read or write that one.  Only the event
    loop's thread touches the count.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._users = 0
        self._closing = False

    @property
    def closed(self) -> bool:
        return self._closing

    def fileno(self) -> int:
        """The descriptor.

        Raises:
            ValueError: the file is closed.
        """
        if self._closing:
            raise ValueError("the file is closed")
        return self._descriptor

    @contextmanager
    def use(self) -> Iterator[int]:
        """Keep the descriptor open for the block.

        Raises:
            ValueError: the file is closed.
        """
        descriptor = self.fileno()
        self._users += 1
        try:
            yield descriptor
        finally:
            self._users -= 1
            self._close_if_unused()

    def close(self) -> None:
        """Close now, or when the last user is done; closing twice is allowed."""
        if not self._closing:
            self._closing = True
            self._close_if_unused()

    def _close_if_unused(self) -> None:
        if self._closing and self._users == 0 and self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
