"""The trackers of a simulated swarm: each has its share of the torrents, and may be gone for a while."""

from __future__ import annotations

from collections.abc import Callable

from swarmpull.swarm.handout import PeerTable


class Trackers:
    """One peer table for each tracker's share of the torrents, wherever those live just now.

    While a tracker is gone its torrents live on the next one, which knows nobody; when all are, nowhere.
    """

    def __init__(self, count: int, new_table: Callable[[], PeerTable]) -> None:
        self._new_table = new_table
        self._tables = [new_table() for _ in range(count)]
        self._gone: set[int] = set()

    def of(self, blob: int) -> PeerTable:
        """The table in which a blob is, by the index of the blob."""
        return self._tables[blob % len(self._tables)]

    def is_of(self, number: int, blob: int) -> bool:
        """Whether a blob is one of this tracker's share."""
        return blob % len(self._tables) == number

    @property
    def are_gone(self) -> bool:
        """Whether nobody answers."""
        return len(self._gone) == len(self._tables)

    def replace(self, number: int) -> PeerTable:
        """Let another tracker, or this one after its return, begin with nothing; returns the former table."""
        former, self._tables[number] = self._tables[number], self._new_table()
        return former

    def leave(self, number: int) -> None:
        """A tracker has died, and is to come back."""
        self._gone.add(number)

    def come_back(self, number: int) -> None:
        self._gone.discard(number)
