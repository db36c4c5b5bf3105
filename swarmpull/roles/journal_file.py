"""The file of the journal of an index: a row for each change that the backend does not have yet."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import attrs
import trio

from swarmpull.errors import ProtocolError, StartupError
from swarmpull.roles.pending_changes import id_of
from swarmpull.store.durable import make_directory
from swarmpull.store.durable_queue import DurableQueue, QueueFile, Row, open_durable_queue
from swarmpull.wire.api import PendingChange
from swarmpull.wire.codec import decode, encode

FILE_NAME: Final = "index-journal.sqlite"


@attrs.frozen
class Kept:
    """A change as the journal has it; times are in seconds since the epoch.

    Attributes:
        mine: it was asked for here, not at another index.
        kept_at: when it came here.
        size: bytes of its row.
        number: says in which order changes came to this process.
        refusal: why it can never be written, if that is so: then it is set aside.
        refused_at: since when.
    """

    change: PendingChange
    mine: bool
    kept_at: float
    size: int
    number: int = 0
    refusal: str = ""
    refused_at: float = 0.0

    @property
    def id(self) -> str:
        return id_of(self.change)

    @property
    def acknowledged_at(self) -> int:
        """In ns; entries of former versions do not say when that was."""
        return self.change.at or int(self.kept_at * 1e9)


def keep(change: PendingChange, mine: bool, now: float) -> Kept:
    """A change that has just come."""
    return Kept(change, mine, now, len(encode(change)))


def _row(kept: Kept) -> Row:
    body = encode(kept.change)
    return kept.id, kept.mine, kept.kept_at, body, kept.refusal, kept.refused_at


def _kept(row: Row) -> Kept:
    _, mine, kept_at, body, refusal, refused_at = row
    change = decode(body, PendingChange)
    return Kept(change, bool(mine), kept_at, len(body), refusal=refusal, refused_at=refused_at)


_FILE: Final = QueueFile(
    what="the journal of the index",
    # "swpj"
    application_id=0x7377706A,
    create="""
        create table changes (
            id text not null primary key,
            mine integer not null,
            kept_at real not null,
            body blob not null,
            refusal text not null default '',
            refused_at real not null default 0
        ) strict
    """,
    put="insert or replace into changes values (?, ?, ?, ?, ?, ?)",
    remove="delete from changes where id = ?",
    all="select * from changes order by kept_at, id",
    pack=_row,
    unpack=_kept,
    upgrades=(
        "alter table changes add column refusal text not null default ''",
        "alter table changes add column refused_at real not null default 0",
    ),
    when_damaged=(
        "move it and what is named like it away: the other indexes have what was in it; what only this one "
        "had has to be pushed again"
    ),
)


@asynccontextmanager
async def open_journal_file(directory: Path) -> AsyncIterator[DurableQueue[Kept]]:
    """The file in the data directory of an index, which is made if it is missing.

    Raises:
        StartupError: it is damaged, or of a newer version, or the disk fails.
    """
    await trio.to_thread.run_sync(_prepare, directory)
    path = directory / FILE_NAME
    try:
        async with open_durable_queue(path, "index", _FILE, tuple) as rows:
            yield rows
    except ProtocolError as error:
        raise StartupError(f"{path} is damaged ({error})", _FILE.when_damaged) from error


def _prepare(directory: Path) -> None:
    try:
        make_directory(directory)
    except OSError as error:
        raise StartupError(
            f"the data directory {directory} cannot be made ({error.strerror or error})",
            "make its parent one that this user can write to, or set index.data_dir",
        ) from error
