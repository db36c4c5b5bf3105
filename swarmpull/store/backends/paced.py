"""A backend at a limited rate."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, Final

import trio

from swarmpull.errors import BackendUnavailable
from swarmpull.store.backends.base import SMALL_OBJECT_BYTES, Backend, ObjectPage, ObjectStat
from swarmpull.store.token_bucket import TokenBucket

# Seconds without a chunk after which a read is given up.  Whoever reads cannot tell that from waiting for
# the bucket.
SILENCE_MAX: Final = 30.0


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
        self, key: str, *, start: int = 0, stop: int | None = None, version: str = ""
    ) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        return self._open(key, start, stop, version)

    @asynccontextmanager
    async def _open(
        self, key: str, start: int, stop: int | None, version: str
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        pin: dict[str, Any] = {"version": version} if version else {}
        async with (
            self._backend.open(key, start=start, stop=stop, **pin) as chunks,
            aclosing(self._paced(key, chunks)) as paced,
        ):
            yield paced

    async def _paced(self, key: str, chunks: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
        while True:
            with trio.move_on_after(SILENCE_MAX) as silence:
                chunk = await anext(chunks, None)
            if silence.cancelled_caught:
                raise BackendUnavailable(self.name, key, f"no bytes for {SILENCE_MAX:g} s")
            if chunk is None:
                return
            await self._bucket.take(len(chunk))
            yield chunk

    async def put_file(self, key: str, path: Path) -> None:
        await self._bucket.take((await trio.Path(path).stat()).st_size)
        await self._backend.put_file(key, path)

    async def put_bytes(self, key: str, data: bytes, *, if_version: str | None = None) -> None:
        await self._bucket.take(len(data))
        condition: dict[str, Any] = {} if if_version is None else {"if_version": if_version}
        await self._backend.put_bytes(key, data, **condition)

    async def get_versioned(
        self, key: str, *, limit: int = SMALL_OBJECT_BYTES
    ) -> tuple[bytes, str]:
        data, version = await self._backend.get_versioned(key, limit=limit)
        await self._bucket.take(len(data))
        return data, version

    async def get_bytes(self, key: str, *, limit: int = SMALL_OBJECT_BYTES) -> bytes:
        data = await self._backend.get_bytes(key, limit=limit)
        await self._bucket.take(len(data))
        return data

    async def delete(self, key: str) -> None:
        await self._backend.delete(key)

    async def list(self, prefix: str = "", *, after: str = "", limit: int = 1000) -> ObjectPage:
        return await self._backend.list(prefix, after=after, limit=limit)
