"""When tags were last changed past the journals, as far as this index has done it.

A pending change is surely the last one of its tag only if no index has changed the tag in the backend since.
"""

from __future__ import annotations

import math
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

# Tags that are remembered one by one; of older ones it is known that they were not changed later than these.
TAGS_MAX: Final = 10_000


class DirectChanges:
    """Changes of tags that this process makes in the backend."""

    def __init__(self) -> None:
        # What a former process did is not known: it may have been at it up to now.
        self._floor = time.time_ns()
        self._ended: OrderedDict[tuple[str, str], int] = OrderedDict()
        self._under_way: Counter[str] = Counter()

    @contextmanager
    def under_way(self, repository: str) -> Iterator[None]:
        """A tag of the repository is looked at in the block, and changed by what is found."""
        self._under_way[repository] += 1
        try:
            yield
        finally:
            self._under_way[repository] -= 1
            if not self._under_way[repository]:
                del self._under_way[repository]

    def ended(self, repository: str, tag: str) -> None:
        """A change was made, or has failed, and may have happened."""
        self._ended[repository, tag] = time.time_ns()
        self._ended.move_to_end((repository, tag))
        if len(self._ended) > TAGS_MAX:
            _, self._floor = self._ended.popitem(last=False)

    def last(self, repository: str, tag: str) -> float:
        """When the last one that can have been of this tag ended, in ns; infinite while one is under way."""
        if repository in self._under_way:
            return math.inf
        return max(self._floor, self._ended.get((repository, tag), 0))
