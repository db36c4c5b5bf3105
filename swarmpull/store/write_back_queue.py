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

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import attrs
import trio

from swarmpull.digest import Digest
from swarmpull.errors import StartupError
from swarmpull.store.durable import sync_directory
from swarmpull.store.durable_queue import (
    DurableQueue,
    QueueFile,
    Row,
    open_durable_queue,
    read_durable_queue,
)
from swarmpull.store.write_back_schedule import Key, QueuedBlob

FILE_NAME: Final = "write-back.sqlite"
# Not named like the queue: it stays when that is moved away.
MARK_NAME: Final = "origin"


def _row(blob: QueuedBlob) -> Row:
    return (str(blob.digest), *attrs.astuple(blob, recurse=False)[1:])


def _blob(row: Row) -> QueuedBlob:
    digest, *values = row
    return QueuedBlob(Digest.parse(digest), *values)


_FILE: Final = QueueFile(
    what="the write-back queue",
    # "swpb"
    application_id=0x73777062,
    create="""
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
    """,
    put="insert or replace into blobs values (?, ?, ?, ?, ?, ?, ?, ?, ?)",
    remove="delete from blobs where digest = ? and namespace = ?",
    all="select * from blobs order by enqueued_at, digest, namespace",
    pack=_row,
    unpack=_blob,
    when_damaged=(
        "move it and what is named like it away: a new one is made, with every blob of this disk, so that "
        "all that the backend lacks is written; with origin.namespaces it is made empty, and what waited in "
        "it is written by its replicas, or has to be pushed again"
    ),
    upgrades=("alter table blobs add column is_found integer not null default 0",),
)


class WriteBackQueue:
    """The file; see `open_write_back_queue`.

    Attributes:
        name: stamped on every error.
        loaded: what it held when it was opened, the oldest first.
    """

    def __init__(self, rows: DurableQueue[QueuedBlob]) -> None:
        self.name = rows.name
        self.loaded = rows.loaded
        self._rows = rows

    async def put(self, blob: QueuedBlob) -> None:
        """Enter a blob, or replace what is entered of it.  Raises StoreFull, StoreUnavailable."""
        await self._rows.put(blob)

    async def remove(self, key: Key) -> None:
        """Take a blob out; one that is not in it is no error.  Raises StoreFull, StoreUnavailable."""
        digest, namespace = key
        await self._rows.remove_row((str(digest), namespace))


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
    async with open_durable_queue(directory / FILE_NAME, name, _FILE, on_disk) as rows:
        await trio.to_thread.run_sync(_mark, directory)
        yield WriteBackQueue(rows)


def _mark(directory: Path) -> None:
    try:
        (directory / MARK_NAME).touch()
        sync_directory(directory)
    except OSError as error:
        raise StartupError(
            f"{directory / MARK_NAME} cannot be made ({error.strerror or error})",
            "make its directory one that this user can write to",
        ) from error


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
    return frozenset(blob.digest for blob in read_durable_queue(path, _FILE))
