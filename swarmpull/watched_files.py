"""What is read from files that may change while the process runs: certificates, password files.

Whoever uses it takes `WatchedFiles.current` at the moment of need and keeps it for as long as that use lasts:
a change meets what begins afterwards, and nothing that is under way.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, Generic, TypeVar

import structlog
import trio

from swarmpull.errors import CertificateError

log = structlog.get_logger()

# Seconds between looks, of three `stat` calls each.  Files are read when two looks have found them alike: one
# that is still being written is left alone.
LOOK_EVERY: Final = 1.0

T = TypeVar("T")
_Stamp = tuple[tuple[int, int, int] | None, ...]


class WatchedFiles(Generic[T]):
    """A value that is made from files, and made anew when one of them changes.

    Files that cannot be used keep the value that there is, and leave one line in the log for each change.
    They are tried again at each look: what makes them usable may be no change of theirs, but a new owner.

    Attributes:
        current: the value, from the last files that could be used.
    """

    def __init__(self, paths: Sequence[str], load: Callable[[], T]) -> None:
        """``load`` reads the files and raises CertificateError when they cannot be used; it may block.

        Raises:
            CertificateError: they cannot be used now.
        """
        self._paths = tuple(paths)
        self._load = load
        # Taken before the files are read: a change in between is seen as one.
        self._stamp = self._last_look = self._look()
        # As they were when the log said that they cannot be used.
        self._refused: _Stamp | None = None
        self._renewed = trio.Event()
        self.current = load()

    @classmethod
    async def open(cls, paths: Sequence[str], load: Callable[[], T]) -> WatchedFiles[T]:
        """The same in a thread, for whoever must not block."""
        return await trio.to_thread.run_sync(partial(cls, paths, load))

    async def run(self) -> None:
        """Look for changes until cancelled."""
        while True:
            await trio.sleep(LOOK_EVERY)
            before = self.current
            # A file system that hangs must not hold up the end of the role.
            await trio.to_thread.run_sync(self._refresh, abandon_on_cancel=True)
            if self.current is not before:
                self._renewed.set()
                self._renewed = trio.Event()

    async def renewed(self) -> None:
        """Return when `run` has found another value."""
        await self._renewed.wait()

    def _refresh(self) -> None:
        stamp, before = self._look(), self._last_look
        self._last_look = stamp
        if stamp == self._stamp or stamp != before:
            return
        try:
            self.current = self._load()
        except CertificateError as error:
            if stamp != self._refused:
                self._refused = stamp
                log.warning("files_not_reloaded", reason=str(error), remedy="the former ones stay")
        else:
            self._stamp = stamp
            log.info("files_reloaded", files=self._paths)

    def _look(self) -> _Stamp:
        return tuple(map(_stamp, self._paths))


def _stamp(path: str) -> tuple[int, int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
