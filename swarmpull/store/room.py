"""What one growing file takes up in the books of its store."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from swarmpull.store.ledger import Ledger

# Makes room for so many bytes and then, before anybody else can take it, calls the second argument.
Admit = Callable[[int, Callable[[], object]], Awaitable[None]]


class Room:
    """The bytes of one file; `leave` when it is removed, or becomes a blob.

    Args:
        kind: one of `swarmpull.store.ledger.KINDS`.
        size: bytes that it has already.
    """

    def __init__(self, admit: Admit, ledger: Ledger, kind: str, size: int = 0) -> None:
        self._admit = admit
        self._ledger = ledger
        self._kind = kind
        self._size = 0
        self._set(size)

    async def grow(self, size: int) -> None:
        """Have room for ``size`` bytes in all.  Raises StoreFull."""
        if size > self._size:
            await self._admit(size - self._size, lambda: self._set(size))

    def shrink(self, size: int) -> None:
        """Give back what is above ``size`` bytes."""
        self._set(min(size, self._size))

    def give_back(self, size: int) -> None:
        """Give back ``size`` bytes, as when one of several files leaves; any thread may."""
        self._set(self._size - size)

    def leave(self) -> None:
        """Give back everything; leaving twice is allowed, and any thread may."""
        self._set(0)

    def _set(self, size: int) -> None:
        self._ledger.add(self._kind, size - self._size)
        self._size = size
