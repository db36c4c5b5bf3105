"""What an RPC server keeps for its clients, over all connections, and who has to go when it is too much.

Counted is what clients decide about: frames that have come in part, bodies of requests under way, replies
that their client does not read.  Pure.
"""

from __future__ import annotations

import heapq
from typing import Final, Generic, TypeVar

Holder = TypeVar("Holder")

# When the limit is passed so much of it is freed at once, so that the search is paid for by many frames.
FREED_SHARE: Final = 1 / 8


class RpcMemory(Generic[Holder]):
    """The bytes that each connection of one server has it keep.

    Attributes:
        bytes_max: the limit for all together.
        bytes: how many there are now.
        ended: connections that had to end for the others.
    """

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self.bytes = 0
        self.ended = 0
        self._held: dict[Holder, int] = {}

    def set(self, holder: Holder, held: int) -> None:
        """``holder`` has ``held`` bytes kept from now on; with 0 nothing is remembered of it."""
        self.bytes += held - self._held.pop(holder, 0)
        if held:
            self._held[holder] = held

    def held_by(self, holder: Holder) -> int:
        """How many bytes are kept for one."""
        return self._held.get(holder, 0)

    def too_greedy(self) -> list[Holder]:
        """Who must go: nobody within the limit, else those with the most, until an eighth of it is free."""
        if self.bytes <= self.bytes_max:
            return []
        surplus = self.bytes - self.bytes_max * (1 - FREED_SHARE)
        heap = [(-held, number, holder) for number, (holder, held) in enumerate(self._held.items())]
        heapq.heapify(heap)
        chosen = []
        while surplus > 0:
            held, _, holder = heapq.heappop(heap)
            surplus += held
            chosen.append(holder)
        self.ended += len(chosen)
        return chosen
