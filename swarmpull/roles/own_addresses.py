"""Which members of a ring are this very process.

No process has to be told that: it calls all members alike, and finds itself in the answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import trio

# Seconds for which an address that was found to be this process counts as such: it may move to another host.
BELIEVED: Final = 60.0


class OwnAddresses:
    """The members that turned out to be this process; each is forgotten after a while."""

    def __init__(self) -> None:
        self._found_at: dict[str, float] = {}

    def add(self, address: str) -> None:
        """A call to an address was answered by this process."""
        self._found_at[address] = trio.current_time()

    def __contains__(self, address: object) -> bool:
        return address in set(self)

    def __iter__(self) -> Iterator[str]:
        oldest = trio.current_time() - BELIEVED
        self._found_at = {each: at for each, at in self._found_at.items() if at > oldest}
        return iter(self._found_at)
