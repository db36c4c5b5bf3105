"""The entries of the queue of one index for other clusters, and how many there are of which kind.

There may be hundreds of thousands, and how many is asked for every few seconds: nothing here that is asked
for often looks at all of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, KeysView

import attrs

from swarmpull.roles.tag_copy import Progress
from swarmpull.store.remote_queue import ChangeKey, RemoteChange


@attrs.define(eq=False)
class Entry:
    """A change of the queue in memory.

    Attributes:
        change: as it is on the disk; replaced by `Entries.replace`.
        entered_at: when the last change of the tag was heard of, on trio's clock.
        progress: while it is copied.
    """

    change: RemoteChange
    entered_at: float
    progress: Progress | None = None


class Entries:
    """Entries by their keys, in the order in which they were entered."""

    def __init__(self) -> None:
        self._entries: dict[ChangeKey, Entry] = {}
        self._standby: dict[ChangeKey, None] = {}
        self._queued: Counter[str] = Counter()
        self._set_aside: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def get(self, key: ChangeKey) -> Entry | None:
        return self._entries.get(key)

    def add(self, change: RemoteChange, now: float) -> None:
        """Enter a change, of a key that is not there."""
        self._entries[change.key] = Entry(change, now)
        self._count(change, 1)

    def replace(self, entry: Entry, change: RemoteChange) -> None:
        """What is known of the same tag has changed."""
        self._count(entry.change, -1)
        entry.change = change
        self._count(change, 1)

    def remove(self, key: ChangeKey) -> None:
        self._count(self._entries.pop(key).change, -1)

    @property
    def standby(self) -> KeysView[ChangeKey]:
        """The keys of those that another index sees to."""
        return self._standby.keys()

    def queued(self, remote: str) -> int:
        """Those that this index sees to, or that are set aside."""
        return self._queued[remote]

    def set_aside(self, remote: str) -> int:
        return self._set_aside[remote]

    @property
    def set_aside_count(self) -> int:
        """The same over all remotes."""
        return self._set_aside.total()

    @property
    def remotes(self) -> frozenset[str]:
        """Those that something is queued for."""
        return frozenset(+self._queued)

    def mine(self) -> Iterator[Entry]:
        """Those that this index sees to, the one that waits for longest first."""
        if len(self._standby) < len(self._entries):
            for entry in self:
                if not entry.change.standby:
                    yield entry

    def _count(self, change: RemoteChange, by: int) -> None:
        if change.standby and by > 0:
            self._standby[change.key] = None
            return
        if change.standby:
            del self._standby[change.key]
            return
        self._queued[change.remote] += by
        if change.set_aside:
            self._set_aside[change.remote] += by
