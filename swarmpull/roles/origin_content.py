"""The blobs of an origin: its disk in front, the backend behind.

The backend is the truth.  A blob counts as accepted when it is in both; one that only the backend has is
brought to the disk by `swarmpull.roles.cold_blobs` when somebody asks for it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import structlog
import trio

from swarmpull.digest import Digest
from swarmpull.errors import (
    BackendUnavailable,
    BlobNotFound,
    ObjectNotFound,
    StoreUnavailable,
    SwarmpullError,
)
from swarmpull.registry.service import BlobReader
from swarmpull.roles.cold_blobs import ColdBlobs, not_given
from swarmpull.roles.shared_work import SharedWork
from swarmpull.roles.swarm_host import SwarmHost
from swarmpull.store.backends.base import Backend, blob_key
from swarmpull.store.backends.metainfo import save_metainfo
from swarmpull.store.blobs import BlobStore
from swarmpull.store.holds import Pin
from swarmpull.telemetry import Metrics

log = structlog.get_logger()

# Blobs that are written at once; each costs a connection to the backend and its share of the disk, and more
# at once would only make each of them slower.
TRANSFERS_MAX: Final = 16


class OriginContent:
    """Blobs on the disk and in the backend of one origin."""

    def __init__(
        self,
        store: BlobStore,
        backend: Backend,
        host: SwarmHost,
        cold: ColdBlobs,
        nursery: trio.Nursery,
        metrics: Metrics,
    ) -> None:
        self.store = store
        self.backend = backend
        self.cold = cold
        self._host = host
        self._writing: SharedWork[None] = SharedWork(nursery)
        self._writes = trio.CapacityLimiter(TRANSFERS_MAX)
        self._written = metrics.counter(
            "backend_bytes_written_total", "Bytes of blobs written to the backend."
        )

    async def stat(self, digest: Digest) -> int:
        """Length of a blob in bytes, at once and without fetching it.

        Raises:
            BlobNotFound: on no disk and not in the backend, or corrupt there: clients push only
                what they are told is missing.
            BackendUnavailable: not on the disk, and the backend cannot say.
        """
        try:
            return self.store.stat(digest).length
        except BlobNotFound:
            if self.is_corrupt(digest):
                raise
        download = self._host.downloading(digest)
        if download is not None:
            return download.metainfo.length
        try:
            return (await self.backend.stat(blob_key(digest))).length
        except (ObjectNotFound, BackendUnavailable) as error:
            length = await self.cold.length_elsewhere(digest)
            if length is not None:
                return length
            raise not_given(digest, error) from error

    async def ensure_local(
        self, digest: Digest, namespace: str = "", *, decide: bool = False
    ) -> None:
        """Return when the blob is on the disk.  For the arguments see `ColdBlobs.begin`.

        Raises:
            BlobNotFound: the backend does not have it either.
            BackendUnavailable: the backend fails, or its object is not what its name says and is not used.
            StoreFull, StoreUnavailable: the disk has no room for it, or fails.
        """
        while not self.store.has(digest):
            download = await self.cold.begin(digest, namespace, decide=decide)
            if download is not None:
                await download.wait()

    @asynccontextmanager
    async def open(self, digest: Digest, namespace: str) -> AsyncIterator[BlobReader]:
        """Read a blob of the disk, or one on its way there, for the block.

        Entering waits for the length only.  Raises what `ensure_local` does.
        """
        # Held from before it comes, so that it cannot go before it is opened.
        with self.store.hold(digest, Pin.READING):
            while not self.store.has(digest):
                download = await self.cold.begin(digest, namespace, decide=False)
                reader = download.reader() if download is not None else None
                if reader is not None:
                    try:
                        yield reader
                    finally:
                        reader.close()
                    return
                if download is not None:
                    await download.wait()
            with self.store.open(digest) as handle:
                yield handle

    async def make_durable(self, digest: Digest) -> None:
        """Return when a blob of the disk is in the backend too.

        Raises:
            BlobNotFound: it is not on the disk.
            BackendUnavailable: it is not in the backend; try again.
            StoreUnavailable: the disk failed; likewise.
        """
        await self._writing.run(digest, self._write)

    async def is_in_backend(self, digest: Digest, length: int) -> bool:
        """Whether the backend has a blob, in the right length.  Raises BackendUnavailable."""
        return await self._is_in_backend(digest, blob_key(digest), length)

    def is_corrupt(self, digest: Digest) -> bool:
        """Whether the backend's object was found to be something else; the next write replaces it."""
        return digest in self.cold.quarantine

    async def _write(self, digest: Digest) -> None:
        # Held by this task too: it goes on when the one that asked for it has given up.
        with self.store.hold(digest, Pin.NOT_WRITTEN_BACK):
            async with self._writes:
                await self._write_now(digest)

    async def _write_now(self, digest: Digest) -> None:
        key = blob_key(digest)
        length = self.store.stat(digest).length
        if await self._is_in_backend(digest, key, length):
            return
        await self._copy_to_backend(digest, key)
        self.cold.quarantine.release(digest)
        self._written.inc(length)
        log.info("blob_durable", digest=str(digest), length=length)
        await self._keep_metainfo(digest)

    async def _keep_metainfo(self, digest: Digest) -> None:
        """Put the metainfo of a blob of several pieces beside it; the blob is durable without."""
        try:
            metainfo = await self.store.metainfo(digest)
            if metainfo.piece_count > 1:
                await save_metainfo(self.backend, metainfo)
        except SwarmpullError as error:
            log.info("metainfo_not_saved", digest=str(digest), reason=str(error))

    async def _copy_to_backend(self, digest: Digest, key: str) -> None:
        try:
            await self.backend.put_file(key, self.store.path(digest))
        except OSError as error:
            # About our own file; nobody else would catch it, and the role would end.
            raise StoreUnavailable(self.store.name, str(error)) from error

    async def _is_in_backend(self, digest: Digest, key: str, length: int) -> bool:
        if self.is_corrupt(digest):
            return False
        try:
            return (await self.backend.stat(key)).length == length
        except ObjectNotFound:
            return False
