"""A backend at a limited rate."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import trio

from swarmpull.store.backends.base import SMALL_OBJECT_BYTES, Backend, ObjectPage, ObjectStat
from swarmpull.store.token_bucket import TokenBucket


class PacedBackend:
    """A `Backend` whose bytes pass a token bucket, in both directions together.

    What is read is counted chunk by chunk.  What is written is counted as a whole when it begins: it
    goes out as fast as it can, and everything after it waits for what it was too much.
    """

    def __init__(self, backend: Backend, bucket: TokenBucket) -> None:
        self._backend = backend
        self._bucket = bucket

    @property
    def name(self) -> str:
        return self._backend.name

    async def stat(self, key: str) -> ObjectStat:
        return await self._backend.stat(key)

    def open(
        self, key: str, *, start: int = 0, stop: int | None = None
    ) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        return self._open(key, start, stop)

    @asynccontextmanager
    async def _open(
        self, key: str, start: int, stop: int | None
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        async with self._backend.open(key, start=start, stop=stop) as chunks:
            yield self._paced(chunks)

    async def _paced(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        async for chunk in chunks:
            await self._bucket.take(len(chunk))
            yield chunk

    async def put_file(self, key: str, path: Path) -> None:
        await self._bucket.take((await trio.Path(path).stat()).st_size)
        await self._backend.put_file(key, path)

    async def put_bytes(self, key: str, data: bytes) -> None:
        await self._bucket.take(len(data))
        await self._backend.put_bytes(key, data)

    async def get_bytes(self, key: str, *, limit: int = SMALL_OBJECT_BYTES) -> bytes:
        data = await self._backend.get_bytes(key, limit=limit)
        await self._bucket.take(len(data))
        return data

    async def delete(self, key: str) -> None:
        await self._backend.delete(key)

    async def list(self, prefix: str = "", *, after: str = "", limit: int = 1000) -> ObjectPage:
        return await self._backend.list(prefix, after=after, limit=limit)
