"""What tags of other registries were the last time somebody said so; survives a restart.

A cache, kept in SQLite: a file that is damaged is begun anew, one that cannot be written is done without,
and a crash may lose the last changes.
"""

from __future__ import annotations

import math
import sqlite3
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Final

import attrs
import structlog
import trio

from swarmpull.digest import Digest
from swarmpull.errors import InvalidDigest

log = structlog.get_logger()

# A few hundred bytes each, all of them in memory too.
TAGS_MAX: Final = 10_000
_SCHEMA: Final = """
    CREATE TABLE IF NOT EXISTS tags (
        repository TEXT NOT NULL, tag TEXT NOT NULL,
        digest TEXT NOT NULL, media_type TEXT NOT NULL, length INTEGER NOT NULL,
        PRIMARY KEY (repository, tag)
    ) WITHOUT ROWID
"""


@attrs.frozen
class Tagged:
    """The manifest that a tag was: its digest, media type and length in bytes.

    ``confirmed_at`` is of the clock of this process, and is not kept: after a restart everything is old.
    """

    digest: Digest
    media_type: str
    length: int
    confirmed_at: float = attrs.field(default=-math.inf, eq=False)


class TagTable:
    """Tags by repository.  Open one with `open_tags`.

    Of more than ``capacity`` tags the ones that were used longest ago are forgotten.
    """

    def __init__(self, connection: sqlite3.Connection, capacity: int) -> None:
        self._connection = connection
        self._capacity = capacity
        self._tags: OrderedDict[tuple[str, str], Tagged] = OrderedDict()
        # One statement at a time, in the order in which they were asked for.
        self._turn = trio.Lock()

    def __len__(self) -> int:
        return len(self._tags)

    def get(self, repository: str, tag: str) -> Tagged | None:
        """What a tag was; counts as use."""
        found = self._tags.get((repository, tag))
        if found is not None:
            self._tags.move_to_end((repository, tag))
        return found

    async def put(self, repository: str, tag: str, tagged: Tagged) -> None:
        """Remember what a tag is.  A disk that fails is logged, and the memory stays."""
        known = self.get(repository, tag)
        self._tags[repository, tag] = tagged
        if known == tagged:
            return
        forgotten = [self._tags.popitem(last=False)[0]] if len(self) > self._capacity else []
        row = (repository, tag, str(tagged.digest), tagged.media_type, tagged.length)
        await self._change("INSERT OR REPLACE INTO tags VALUES (?, ?, ?, ?, ?)", row)
        for key in forgotten:
            await self._change("DELETE FROM tags WHERE repository = ? AND tag = ?", key)

    async def remove(self, repository: str, tag: str) -> None:
        """Forget a tag."""
        if self._tags.pop((repository, tag), None) is not None:
            await self._change(
                "DELETE FROM tags WHERE repository = ? AND tag = ?", (repository, tag)
            )

    async def _change(self, statement: str, row: tuple[object, ...]) -> None:
        async with self._turn:
            try:
                await trio.to_thread.run_sync(self._execute, statement, row)
            except sqlite3.Error as error:
                log.warning("tag_not_written", reason=str(error))

    def _execute(self, statement: str, row: tuple[object, ...]) -> None:
        with self._connection:
            self._connection.execute(statement, row)

    def load(self) -> None:
        """Read everything; blocks.  Raises sqlite3.Error."""
        rows = self._connection.execute(
            "SELECT repository, tag, digest, media_type, length FROM tags"
        )
        for repository, tag, digest, media_type, length in rows:
            try:
                self._tags[repository, tag] = Tagged(Digest.parse(digest), media_type, length)
            except InvalidDigest:
                log.warning("tag_not_read", repository=repository, tag=tag)
        while len(self) > self._capacity:
            self._tags.popitem(last=False)


@asynccontextmanager
async def open_tags(path: Path, *, capacity: int = TAGS_MAX) -> AsyncIterator[TagTable]:
    """The table in a file, which is made if need be, for the length of the block."""
    table, connection = await trio.to_thread.run_sync(_open_somehow, path, capacity)
    with closing(connection):
        yield table


def _open_somehow(path: Path, capacity: int) -> tuple[TagTable, sqlite3.Connection]:
    try:
        return _open(str(path), capacity)
    except sqlite3.OperationalError as error:
        # No room, no right, no directory: nothing that a cache should keep an origin from starting for.
        log.warning("tags_not_kept", path=str(path), reason=str(error))
        return _open(":memory:", capacity)
    except sqlite3.DatabaseError as error:
        log.warning("tags_damaged", path=str(path), reason=str(error))
        for file in (path, path.with_name(f"{path.name}-journal")):
            file.unlink(missing_ok=True)
        return _open(str(path), capacity)


def _open(path: str, capacity: int) -> tuple[TagTable, sqlite3.Connection]:
    # Used by one thread at a time, but not always by the same.
    connection = sqlite3.connect(path, check_same_thread=False)
    try:
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute(_SCHEMA)
        table = TagTable(connection, capacity)
        table.load()
    except sqlite3.Error:
        connection.close()
        raise
    return table, connection
