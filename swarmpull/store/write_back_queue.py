"""What an origin has accepted and the backend does not have yet, in a file that survives the process.

One sqlite database in the data directory of the origin, ``write-back.sqlite``, with a row for each blob and
each repository through which it was pushed, because that says where it belongs.  A change is on the disk when
its method returns; changes that are made at the same time share one flush.

A directory without the file gets one with a row for every blob that it holds, as far as the role knows where
they belong.  So the file may be moved away when it is damaged: every such blob is then looked for in the
backend, and written if it is missing.

Beside it is an empty file, ``origin``, for whoever finds the directory without a queue: in that of an agent
nothing waits, in that of an origin nobody knows what does.
"""

from __future__ import annotations

import copy
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Final

import attrs
import trio

from swarmpull.digest import Digest
from swarmpull.errors import (
    InvalidDigest,
    StartupError,
    StoreFull,
    StoreUnavailable,
    SwarmpullError,
)
from swarmpull.store.durable import sync_directory
from swarmpull.store.write_back_schedule import Key, QueuedBlob

FILE_NAME: Final = "write-back.sqlite"
# Not named like the queue: it stays when that is moved away.
MARK_NAME: Final = "origin"
# Raised by one with every change of the tables; an older file is then brought up to date when it is opened.
SCHEMA: Final = 2
# "swpb": tells our files from other databases.
APPLICATION_ID: Final = 0x73777062
# Seconds that a reader outside of the process, which has the file for a moment, may take.
PATIENCE: Final = 5.0

_TABLE: Final = """
create table blobs (
    digest text not null,
    length integer not null,
    namespace text not null,
    enqueued_at real not null,
    rank integer not null,
    attempts integer not null,
    next_at real not null,
    last_error text not null,
    is_found integer not null default 0,
    primary key (digest, namespace)
) strict
"""
_PUT: Final = "insert or replace into blobs values (?, ?, ?, ?, ?, ?, ?, ?, ?)"
_REMOVE: Final = "delete from blobs where digest = ? and namespace = ?"
_ALL: Final = "select * from blobs order by enqueued_at, digest, namespace"


@attrs.define(eq=False)
class _Change:
    """One statement, and what has become of it."""

    statement: str
    values: tuple[object, ...]
    done: bool = False
    error: SwarmpullError | None = None


class WriteBackQueue:
    """The file; see `open_write_back_queue`.

    Attributes:
        name: stamped on every error.
        loaded: what it held when it was opened, the oldest first.
    """

    def __init__(
        self,
        name: str,
        database: sqlite3.Connection,
        thread: trio.CapacityLimiter,
        loaded: list[QueuedBlob],
    ) -> None:
        self.name = name
        self.loaded = loaded
        self._database = database
        self._thread = thread
        self._changes: list[_Change] = []
        self._writing = trio.Lock()

    async def put(self, blob: QueuedBlob) -> None:
        """Enter a blob, or replace what is entered of it.  Raises StoreFull, StoreUnavailable."""
        await self._make(_Change(_PUT, _row(blob)))

    async def remove(self, key: Key) -> None:
        """Take a blob out; one that is not in it is no error.  Raises StoreFull, StoreUnavailable."""
        digest, namespace = key
        await self._make(_Change(_REMOVE, (str(digest), namespace)))

    async def _make(self, change: _Change) -> None:
        self._changes.append(change)
        async with self._writing:
            if not change.done:
                await self._write(list(self._changes))
        if change.error is not None:
            # An exception collects the traceback of whoever raises it: each caller raises its own.
            raise copy.copy(change.error)

    async def _write(self, changes: list[_Change]) -> None:
        """Make all changes that wait, in their order; a thread that has begun is waited for."""
        error: SwarmpullError | None = None
        try:
            await trio.to_thread.run_sync(_commit, self._database, changes, limiter=self._thread)
        except sqlite3.Error as failure:
            error = _translated(self.name, failure)
        del self._changes[: len(changes)]
        for change in changes:
            change.done = True
            change.error = error


@asynccontextmanager
async def open_write_back_queue(
    directory: Path, name: str, on_disk: Callable[[], Iterable[QueuedBlob]]
) -> AsyncIterator[WriteBackQueue]:
    """Open the queue in a data directory, whose lock is held.

    Args:
        directory: of the store.
        name: for errors.
        on_disk: what to put into a queue that is new; runs in a thread.

    Raises:
        StartupError: it is damaged, or of a newer version, or the disk fails.
    """
    thread = trio.CapacityLimiter(1)
    path = directory / FILE_NAME
    database, loaded = await trio.to_thread.run_sync(_open, path, on_disk, limiter=thread)
    try:
        yield WriteBackQueue(name, database, thread, loaded)
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(database.close, limiter=thread)


def belongs_to_origin(directory: Path) -> bool:
    """Whether an origin has ever had its queue in a data directory."""
    return any((directory / name).exists() for name in (MARK_NAME, FILE_NAME))


def queued_digests(directory: Path) -> frozenset[Digest]:
    """What is queued in a data directory, whether a process has it open or not; blocking.

    Raises:
        StartupError: the queue cannot be read, or an origin's is missing: anything may be in it.
    """
    path = directory / FILE_NAME
    if not path.exists():
        if (directory / MARK_NAME).exists():
            raise StartupError(
                f"the write-back queue {path} is missing: the backend may lack any blob of this origin",
                "put it back, or start the origin, which makes a new one",
            )
        return frozenset()
    with _damage_named(path):
        database = sqlite3.connect(
            f"{path.absolute().as_uri()}?mode=ro", timeout=PATIENCE, uri=True
        )
        try:
            _check_version(path, database)
            return frozenset(blob.digest for blob in _load(database))
        finally:
            database.close()


# --- in the thread --------------------------------------------------------------------------------


def _open(
    path: Path, on_disk: Callable[[], Iterable[QueuedBlob]]
) -> tuple[sqlite3.Connection, list[QueuedBlob]]:
    with _damage_named(path):
        database = sqlite3.connect(
            path, timeout=PATIENCE, isolation_level=None, check_same_thread=False
        )
        try:
            # Every commit is flushed: an entry is what an acknowledgement stands on.
            database.execute("pragma synchronous = full")
            if _is_empty(database):
                _create(database, on_disk())
            _check_version(path, database)
            (verdict,) = database.execute("pragma quick_check(1)").fetchone()
            if verdict != "ok":
                raise sqlite3.DatabaseError(verdict)
            _bring_up_to_date(database)
            database.execute("pragma journal_mode = wal")
            loaded = _load(database)
            (path.parent / MARK_NAME).touch()
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


def _create(database: sqlite3.Connection, blobs: Iterable[QueuedBlob]) -> None:
    """Make the table with its first rows: all of it, or nothing."""
    database.execute("begin immediate")
    database.execute(_TABLE)
    database.executemany(_PUT, map(_row, blobs))
    database.execute(f"pragma application_id = {APPLICATION_ID}")
    database.execute(f"pragma user_version = {SCHEMA}")
    database.execute("commit")


def _check_version(path: Path, database: sqlite3.Connection) -> None:
    (application,) = database.execute("pragma application_id").fetchone()
    (version,) = database.execute("pragma user_version").fetchone()
    if application != APPLICATION_ID:
        raise StartupError(
            f"{path} is not a write-back queue",
            "another program has put it there: move it away",
        )
    if version > SCHEMA:
        raise StartupError(
            f"the write-back queue {path} was written by a newer version "
            f"(schema {version}, this one knows {SCHEMA})",
            "start that version or a newer one; an older one could lose what is in it",
        )


def _bring_up_to_date(database: sqlite3.Connection) -> None:
    """Change the table of an older version to that of this one: all of it, or nothing."""
    (version,) = database.execute("pragma user_version").fetchone()
    if version == SCHEMA:
        return
    database.execute("begin immediate")
    database.execute("alter table blobs add column is_found integer not null default 0")
    database.execute(f"pragma user_version = {SCHEMA}")
    database.execute("commit")


def _load(database: sqlite3.Connection) -> list[QueuedBlob]:
    return [QueuedBlob(Digest.parse(digest), *values) for digest, *values in database.execute(_ALL)]


def _commit(database: sqlite3.Connection, changes: list[_Change]) -> None:
    try:
        database.execute("begin immediate")
        for change in changes:
            database.execute(change.statement, change.values)
        database.execute("commit")
    except sqlite3.Error:
        # Some errors have ended the transaction already.
        if database.in_transaction:
            database.execute("rollback")
        raise


def _row(blob: QueuedBlob) -> tuple[Any, ...]:
    return (str(blob.digest), *attrs.astuple(blob, recurse=False)[1:])


def _translated(name: str, error: sqlite3.Error) -> SwarmpullError:
    if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
        return StoreFull(name, 0, "the disk has no room for the write-back queue: free disk space")
    return StoreUnavailable(name, f"write-back queue: {error}")


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Say what to do when the file cannot be used."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise StartupError(
            f"the write-back queue {path} cannot be opened ({error})",
            "make it and its directory writable, and have room on the disk",
        ) from error
    except (sqlite3.DatabaseError, InvalidDigest) as error:
        raise StartupError(
            f"the write-back queue {path} is damaged ({error})",
            "move it and what is named like it away: a new one is made, with every blob of this disk, so "
            "that all that the backend lacks is written; with origin.namespaces it is made empty, and what "
            "waited in it is written by its replicas, or has to be pushed again",
        ) from error
    except OSError as error:
        raise StartupError(
            f"the write-back queue {path} cannot be opened ({error.strerror or error})",
            "make its directory one that this user can write to",
        ) from error
