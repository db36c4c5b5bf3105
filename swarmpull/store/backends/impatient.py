"""A backend whose small objects come soon, or not at all."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from pathlib import Path

import trio

from swarmpull.errors import BackendUnavailable
from swarmpull.store.backends.base import SMALL_OBJECT_BYTES, Backend, ObjectPage, ObjectStat


class ImpatientBackend:
    """A `Backend` that waits ``patience`` seconds for a small object, all attempts together.

    A request that is given up raises BackendUnavailable; it has then either happened whole or not at all.
    Files and listings may be long, and take what they take.
    """

    def __init__(self, backend: Backend, patience: float, trouble: Callable[[], str] = str) -> None:
        """``trouble``: why the backend does not answer just now: then nobody waits; empty when it does."""
        self._backend = backend
        self._patience = patience
        self._trouble = trouble

    @property
    def name(self) -> str:
        return self._backend.name

    @property
    def conditional(self) -> bool | None:
        """Whether there are conditional puts; None as long as nobody knows."""
        found: bool | None = getattr(self._backend, "conditional", None)
        return found

    async def stat(self, key: str) -> ObjectStat:
        with self._limit(key):
            return await self._backend.stat(key)

    def open(
        self, key: str, *, start: int = 0, stop: int | None = None, version: str = ""
    ) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        return self._backend.open(key, start=start, stop=stop, version=version)

    async def put_file(self, key: str, path: Path) -> None:
        await self._backend.put_file(key, path)

    async def put_bytes(self, key: str, data: bytes, *, if_version: str | None = None) -> None:
        with self._limit(key):
            await self._backend.put_bytes(key, data, if_version=if_version)

    async def get_versioned(
        self, key: str, *, limit: int = SMALL_OBJECT_BYTES
    ) -> tuple[bytes, str]:
        with self._limit(key):
            return await self._backend.get_versioned(key, limit=limit)

    async def get_bytes(self, key: str, *, limit: int = SMALL_OBJECT_BYTES) -> bytes:
        with self._limit(key):
            return await self._backend.get_bytes(key, limit=limit)

    async def delete(self, key: str) -> None:
        with self._limit(key):
            await self._backend.delete(key)

    async def list(self, prefix: str = "", *, after: str = "", limit: int = 1000) -> ObjectPage:
        return await self._backend.list(prefix, after=after, limit=limit)

    @contextmanager
    def _limit(self, key: str) -> Iterator[None]:
        if trouble := self._trouble():
            raise BackendUnavailable(self.name, key, trouble)
        try:
            with trio.fail_after(self._patience):
                yield
        except trio.TooSlowError:
            reason = f"no answer for {self._patience:g} s"
            raise BackendUnavailable(self.name, key, reason) from None
