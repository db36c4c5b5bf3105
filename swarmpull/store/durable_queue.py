"""A queue in a file that survives the process: one sqlite database with one table, and rows by key.

A change is on the disk when its method returns; changes that are made at the same time share one flush.
What the rows are is for whoever owns the queue to say, in a `QueueFile`.
"""

from __future__ import annotations

import copy
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

import attrs
import trio

from swarmpull.errors import (
    InvalidDigest,
    StartupError,
    StoreFull,
    StoreUnavailable,
    SwarmpullError,
)
from swarmpull.store.durable import sync_directory

T = TypeVar("T")

# Seconds that a reader outside of the process, which has the file for a moment, may take.
PATIENCE: Final = 5.0

# What sqlite takes: texts and numbers.
Row = tuple[Any, ...]


@attrs.frozen
class QueueFile(Generic[T]):
    """What is in the file of one kind of queue.

    Attributes:
        what: "the write-back queue", for messages.
        application_id: tells these files from other databases.
        upgrades: the statements that bring the table of version 1, 2... to the next one; the version of a
            file is one more than their number.
        create: the statement that makes the table as it is now.
        put: the statement that enters a row, or replaces it.
        remove: the statement that takes one out, by its key.
        all: the statement that gives all rows, the oldest first.
        pack, unpack: of a thing its row, and back; `unpack` may raise InvalidDigest.
        when_damaged: what to do then.
        newer_remedy: what to do about a file of a newer version.
    """

    what: str
    application_id: int
    create: str
    put: str
    remove: str
    all: str
    pack: Callable[[T], Row]
    unpack: Callable[[Row], T]
    when_damaged: str
    upgrades: tuple[str, ...] = ()
    newer_remedy: str = "start that version or a newer one; an older one could lose what is in it"

    @property
    def version(self) -> int:
        return len(self.upgrades) + 1


@attrs.define(eq=False)
class _Change:
    """One statement, and what has become of it."""

    statement: str
    values: Row
    done: bool = False
    error: SwarmpullError | None = None


class DurableQueue(Generic[T]):
    """The file at work; see `open_durable_queue`.

    Attributes:
        name: stamped on every error.
        loaded: what it held when it was opened, the oldest first.
    """

    def __init__(
        self,
        name: str,
        file: QueueFile[T],
        database: sqlite3.Connection,
        thread: trio.CapacityLimiter,
        loaded: list[T],
    ) -> None:
        self.name = name
        self.loaded = loaded
        self._file = file
        self._database = database
        self._thread = thread
        self._changes: list[_Change] = []
        self._writing = trio.Lock()

    async def put(self, thing: T) -> None:
        """Enter a thing, or replace what is entered under its key.  Raises StoreFull, StoreUnavailable."""
        await self.put_all([thing])

    async def put_all(self, things: Iterable[T]) -> None:
        """The same for several things, with one flush."""
        await self._make([_Change(self._file.put, self._file.pack(thing)) for thing in things])

    async def remove_row(self, key: Row) -> None:
        """Take out what is under a key; nothing there is no error.  Raises StoreFull, StoreUnavailable."""
        await self.remove_rows([key])

    async def remove_rows(self, keys: Iterable[Row]) -> None:
        """The same for several keys, with one flush."""
        await self._make([_Change(self._file.remove, key) for key in keys])

    async def _make(self, changes: Sequence[_Change]) -> None:
        self._changes += changes
        async with self._writing:
            if not all(change.done for change in changes):
                await self._write(list(self._changes))
        for change in changes:
            if change.error is not None:
                # An exception collects the traceback of whoever raises it: each caller raises its own.
                raise copy.copy(change.error)

    async def _write(self, changes: list[_Change]) -> None:
        """Make all changes that wait, in their order; a thread that has begun is waited for."""
        error: SwarmpullError | None = None
        try:
            await trio.to_thread.run_sync(_commit, self._database, changes, limiter=self._thread)
        except (sqlite3.Error, OverflowError) as failure:
            # A number beyond 64 bits is no error of sqlite's.
            error = _translated(self.name, self._file.what, failure)
        del self._changes[: len(changes)]
        for change in changes:
            change.done = True
            change.error = error


@asynccontextmanager
async def open_durable_queue(
    path: Path, name: str, file: QueueFile[T], first: Callable[[], Iterable[T]]
) -> AsyncIterator[DurableQueue[T]]:
    """Open a queue in a directory that belongs to this process alone.

    Args:
        path: of the file.
        name: for errors.
        file: what is in it.
        first: what to put into a queue that is new; runs in a thread.

    Raises:
        StartupError: it is damaged, or of a newer version, or the disk fails.
    """
    thread = trio.CapacityLimiter(1)
    database, loaded = await trio.to_thread.run_sync(_open, path, file, first, limiter=thread)
    try:
        yield DurableQueue(name, file, database, thread, loaded)
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(database.close, limiter=thread)


def read_durable_queue(path: Path, file: QueueFile[T]) -> list[T]:
    """What is in a queue, whether a process has it open or not; blocking.

    Raises:
        StartupError: it cannot be read.
    """
    with _damage_named(path, file):
        database = sqlite3.connect(
            f"{path.absolute().as_uri()}?mode=ro", timeout=PATIENCE, uri=True
        )
        try:
            _check_version(path, file, database)
            return _load(file, database)
        finally:
            database.close()


# --- in the thread --------------------------------------------------------------------------------


def _open(
    path: Path, file: QueueFile[T], first: Callable[[], Iterable[T]]
) -> tuple[sqlite3.Connection, list[T]]:
    with _damage_named(path, file):
        database = sqlite3.connect(
            path, timeout=PATIENCE, isolation_level=None, check_same_thread=False
        )
        try:
            # Every commit is flushed: an entry is what an acknowledgement stands on.
            database.execute("pragma synchronous = full")
            if _is_empty(database):
                _create(database, file, first())
            _check_version(path, file, database)
            (verdict,) = database.execute("pragma quick_check(1)").fetchone()
            if verdict != "ok":
                raise sqlite3.DatabaseError(verdict)
            _bring_up_to_date(database, file)
            database.execute("pragma journal_mode = wal")
            loaded = _load(file, database)
            sync_directory(path.parent)
        except BaseException:
            database.close()
            raise
        return database, loaded


def _is_empty(database: sqlite3.Connection) -> bool:
    """Whether it is new, or was left so by a process that died while it made it."""
    tables: int
    (tables,) = database.execute("select count(*) from sqlite_master").fetchone()
    return not tables


def _create(database: sqlite3.Connection, file: QueueFile[T], things: Iterable[T]) -> None:
    """Make the table with its first rows: all of it, or nothing."""
    database.execute("begin immediate")
    database.execute(file.create)
    database.executemany(file.put, map(file.pack, things))
    database.execute(f"pragma application_id = {file.application_id}")
    database.execute(f"pragma user_version = {file.version}")
    database.execute("commit")


def _check_version(path: Path, file: QueueFile[T], database: sqlite3.Connection) -> None:
    (application,) = database.execute("pragma application_id").fetchone()
    (version,) = database.execute("pragma user_version").fetchone()
    if application != file.application_id:
        raise StartupError(
            f"{path} is not {file.what.replace('the ', 'a ', 1)}",
            "another program has put it there: move it away",
        )
    if version > file.version:
        raise StartupError(
            f"{file.what} {path} was written by a newer version "
            f"(schema {version}, this one knows {file.version})",
            file.newer_remedy,
        )


def _bring_up_to_date(database: sqlite3.Connection, file: QueueFile[T]) -> None:
    """Change the table of an older version to that of this one: all of it, or nothing."""
    (version,) = database.execute("pragma user_version").fetchone()
    if version == file.version:
        return
    database.execute("begin immediate")
    for statement in file.upgrades[version - 1 :]:
        database.execute(statement)
    database.execute(f"pragma user_version = {file.version}")
    database.execute("commit")


def _load(file: QueueFile[T], database: sqlite3.Connection) -> list[T]:
    return [file.unpack(row) for row in database.execute(file.all)]


def _commit(database: sqlite3.Connection, changes: list[_Change]) -> None:
    try:
        database.execute("begin immediate")
        for change in changes:
            database.execute(change.statement, change.values)
        database.execute("commit")
    except (sqlite3.Error, OverflowError):
        # Some errors have ended the transaction already.
        if database.in_transaction:
            database.execute("rollback")
        raise


def _translated(name: str, what: str, error: Exception) -> SwarmpullError:
    if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
        return StoreFull(name, 0, f"the disk has no room for {what}: free disk space")
    return StoreUnavailable(name, f"{what.removeprefix('the ')}: {error}")


@contextmanager
def _damage_named(path: Path, file: QueueFile[T]) -> Iterator[None]:
    """Say what to do when the file cannot be used."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise StartupError(
            f"{file.what} {path} cannot be opened ({error})",
            "make it and its directory writable, and have room on the disk",
        ) from error
    except (sqlite3.DatabaseError, InvalidDigest) as error:
        raise StartupError(f"{file.what} {path} is damaged ({error})", file.when_damaged) from error
    except OSError as error:
        raise StartupError(
            f"{file.what} {path} cannot be opened ({error.strerror or error})",
            "make its directory one that this user can write to",
        ) from error
