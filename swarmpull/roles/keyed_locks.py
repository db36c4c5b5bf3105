"""Locks by name: whoever changes one thing does so alone, and all others go on."""

from __future__ import annotations

from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager
from typing import Generic, TypeVar

import attrs
import trio

K = TypeVar("K", bound=Hashable)


@attrs.define(eq=False)
class _Shared:
    lock: trio.Lock = attrs.Factory(trio.Lock)
    users: int = 0


class KeyedLocks(Generic[K]):
    """One lock for each key, which lives as long as somebody wants it."""

    def __init__(self) -> None:
        self._locks: dict[K, _Shared] = {}

    def __len__(self) -> int:
        return len(self._locks)

    @asynccontextmanager
    async def hold(self, key: K) -> AsyncIterator[None]:
        """Alone with a key for the block, in the order of asking."""
        shared = self._locks.setdefault(key, _Shared())
        shared.users += 1
        try:
            async with shared.lock:
                yield
        finally:
            shared.users -= 1
            if not shared.users:
                del self._locks[key]
