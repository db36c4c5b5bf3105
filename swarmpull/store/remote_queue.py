"""What other clusters have not been told of yet, in a file that survives the process.

One sqlite database in the data directory of an index, ``remote-changes.sqlite``, with a row for each tag that
has changed and each remote cluster that is to know.  A row says that something is to be done, not what: what
a tag is, is read when its turn comes, so a later change of the same tag needs no row of its own.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import attrs
import trio

from swarmpull.store.data_directory import lock_directory
from swarmpull.store.durable_queue import DurableQueue, QueueFile, Row, open_durable_queue

FILE_NAME: Final = "remote-changes.sqlite"

# A remote, a repository and a tag.
ChangeKey = tuple[str, str, str]


@attrs.frozen
class RemoteChange:
    """A tag of which a remote is to be told; times are in seconds since the epoch.

    Attributes:
        remote: the other cluster, by the name that the configuration gives it.
        repository, tag: what has changed; the digest of a manifest that refers to another one, if it has
            no tag.
        time, source: the stamp of the last change that it is known of, time in ns.
        enqueued_at: when the first change that the remote does not have was made.
        standby: another index has it, too, and sees to it as long as it is there.
        attempts: how often it has failed.
        next_at: when it is tried next.
        last_error: why the last attempt failed.
        set_aside: it cannot succeed as it is, and is not tried again until somebody says so.
    """

    remote: str
    repository: str
    tag: str
    time: int
    source: str
    enqueued_at: float
    standby: bool = attrs.field(default=False, converter=bool)
    attempts: int = 0
    next_at: float = 0.0
    last_error: str = ""
    set_aside: bool = attrs.field(default=False, converter=bool)

    @property
    def key(self) -> ChangeKey:
        return self.remote, self.repository, self.tag

    @property
    def stamp(self) -> tuple[int, str]:
        """They sort in the order of the changes."""
        return self.time, self.source


def _row(change: RemoteChange) -> Row:
    return attrs.astuple(change)


def _change(row: Row) -> RemoteChange:
    return RemoteChange(*row)


_FILE: Final = QueueFile(
    what="the queue of changes for remote clusters",
    # "swpr"
    application_id=0x73777072,
    create="""
        create table changes (
            remote text not null,
            repository text not null,
            tag text not null,
            time integer not null,
            source text not null,
            enqueued_at real not null,
            standby integer not null,
            attempts integer not null,
            next_at real not null,
            last_error text not null,
            set_aside integer not null,
            primary key (remote, repository, tag)
        ) strict
    """,
    put="insert or replace into changes values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
    remove="delete from changes where remote = ? and repository = ? and tag = ?",
    all="select * from changes order by enqueued_at, remote, repository, tag",
    pack=_row,
    unpack=_change,
    when_damaged=(
        "move it and what is named like it away: another index of this cluster, if there is one, knows what "
        "waited in it; else send all of it again with swarmpull replication sync"
    ),
)


class RemoteQueue:
    """The file; see `open_remote_queue`.

    Attributes:
        name: stamped on every error.
        loaded: what it held when it was opened, the oldest first.
    """

    def __init__(self, rows: DurableQueue[RemoteChange]) -> None:
        self.name = rows.name
        self.loaded = rows.loaded
        self._rows = rows

    async def put(self, change: RemoteChange) -> None:
        """Enter a change, or replace what is entered of its tag.  Raises StoreFull, StoreUnavailable."""
        await self._rows.put(change)

    async def put_all(self, changes: Iterable[RemoteChange]) -> None:
        """The same for several changes, with one flush."""
        await self._rows.put_all(changes)

    async def remove(self, key: ChangeKey) -> None:
        """Take a change out; one that is not in it is no error.  Raises StoreFull, StoreUnavailable."""
        await self._rows.remove_row(key)


@asynccontextmanager
async def open_remote_queue(directory: Path, name: str) -> AsyncIterator[RemoteQueue]:
    """Open the queue in a data directory, which is made if it is missing, and belongs to nobody else then.

    Raises:
        StartupError: another process has the directory; the file is damaged, or of a newer version; or the
            disk fails.
    """
    lock = await trio.to_thread.run_sync(lock_directory, directory)
    try:
        async with open_durable_queue(directory / FILE_NAME, name, _FILE, tuple) as rows:
            yield RemoteQueue(rows)
    finally:
        os.close(lock)
