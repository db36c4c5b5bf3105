"""The blobs of an origin: its disk in front, the backends behind.

Which backend depends on the repository, called the namespace here: `Namespaces` knows.  The disk is one for
all of them, because content is its own proof; everything else is kept for each backend by itself.

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
    DigestMismatch,
    ObjectNotFound,
    StoreUnavailable,
    SwarmpullError,
)
from swarmpull.registry.service import BlobReader
from swarmpull.roles.blob_places import BlobPlace, not_given
from swarmpull.roles.cold_blobs import ColdBlobs
from swarmpull.roles.shared_work import SharedWork
from swarmpull.roles.swarm_host import SwarmHost
from swarmpull.store.backends.metainfo import save_metainfo
from swarmpull.store.backends.namespaces import Namespaces
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
        namespaces: Namespaces,
        host: SwarmHost,
        cold: ColdBlobs,
        nursery: trio.Nursery,
        metrics: Metrics,
    ) -> None:
        self.store = store
        self.namespaces = namespaces
        self.cold = cold
        self._host = host
        self._writing: SharedWork[None] = SharedWork(nursery)
        self._writes = trio.CapacityLimiter(TRANSFERS_MAX)
        self._written = metrics.counter(
            "backend_bytes_written_total", "Bytes of blobs written to the backend."
        )

    async def stat(self, digest: Digest, namespace: str) -> int:
        """Length of a blob in bytes, at once and without fetching it.

        Raises:
            BlobNotFound: on no disk and not in the backend, or corrupt there: clients push only what they
                are told is missing.  So too when an origin that may have it cannot be asked: to push it
                again mends that.
            RepositoryUnmatched: not on the disk, and the repository has no backend.
            BackendUnavailable: not on the disk, and the backend cannot say.
        """
        try:
            return self.store.stat(digest).length
        except BlobNotFound:
            # Nobody can push to an upstream: whether it has mended the blob is for the upstream to say.
            if not self.namespaces.is_foreign(namespace) and self.is_corrupt(digest, namespace):
                raise
        download = self._host.downloading(digest)
        if download is not None:
            return download.metainfo.length
        place = self._place(digest, namespace)
        try:
            return (await place.stat()).length
        except (ObjectNotFound, BackendUnavailable) as error:
            length = await self.cold.length_elsewhere(place)
            if length is not None:
                return length
            raise not_given(digest, error) from error

    async def ensure_local(self, digest: Digest, namespace: str, *, decide: bool = False) -> None:
        """Return when the blob is on the disk.  For the arguments see `ColdBlobs.begin`.

        Raises:
            BlobNotFound: the backend does not have it either, nor do other origins.
            RepositoryUnmatched: it is not on the disk, and the repository has no backend.
            BackendUnavailable: the backend fails, or its object is not what its name says and is not used; or
                it does not have the blob, and an origin that may have it cannot be asked.
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

    async def make_durable(self, digest: Digest, namespace: str) -> None:
        """Return when a blob of the disk is in the backend too.

        Raises:
            BlobNotFound: it is not on the disk.
            PushRefused: the repository has no backend that could be written to.
            BackendUnavailable: it is not in the backend; try again.
            StoreUnavailable: the disk failed; likewise.
        """
        self.namespaces.check_push(namespace)
        await self._writing.run(self._place(digest, namespace), self._write)

    async def is_in_backend(self, digest: Digest, namespace: str, length: int) -> bool:
        """Whether the backend has a blob, in the right length.

        Raises:
            RepositoryUnmatched: the repository has no backend.
            BackendUnavailable: the backend cannot say.
        """
        return await self._is_in_backend(self._place(digest, namespace), length)

    def is_corrupt(self, digest: Digest, namespace: str) -> bool:
        """Whether the backend's object was found to be something else; the next write replaces it.

        Raises RepositoryUnmatched.
        """
        return self._place(digest, namespace) in self.cold.quarantine

    def _place(self, digest: Digest, namespace: str) -> BlobPlace:
        return BlobPlace.of(self.namespaces, digest, namespace)

    async def _write(self, place: BlobPlace) -> None:
        # Held by this task too: it goes on when the one that asked for it has given up.
        with self.store.hold(place.digest, Pin.NOT_WRITTEN_BACK):
            async with self._writes:
                await self._write_now(place)

    async def _write_now(self, place: BlobPlace) -> None:
        length = self.store.stat(place.digest).length
        if await self._is_in_backend(place, length):
            return
        await self._check_disk(place.digest)
        await self._copy_to_backend(place)
        self.cold.quarantine.release(place)
        self._written.inc(length)
        log.info("blob_durable", digest=str(place.digest), backend=place.name, length=length)
        await self._keep_metainfo(place)

    async def _check_disk(self, digest: Digest) -> None:
        """Raise BlobNotFound for a blob that was damaged on the disk since it was accepted.

        That may be hours ago, and what is written now is the truth from then on.
        """
        try:
            await self.store.verify(digest)
        except DigestMismatch as error:
            log.error("blob_damaged", digest=str(digest), actual=error.actual)
            raise BlobNotFound(str(digest), self.store.name) from error

    async def _keep_metainfo(self, place: BlobPlace) -> None:
        """Put the metainfo of a blob of several pieces beside it; the blob is durable without."""
        try:
            metainfo = await self.store.metainfo(place.digest)
            if metainfo.piece_count > 1:
                await save_metainfo(place.backend, metainfo)
        except SwarmpullError as error:
            log.info("metainfo_not_saved", digest=str(place.digest), reason=str(error))

    async def _copy_to_backend(self, place: BlobPlace) -> None:
        try:
            await place.backend.put_file(place.key, self.store.path(place.digest))
        except OSError as error:
            # About our own file; nobody else would catch it, and the role would end.
            raise StoreUnavailable(self.store.name, str(error)) from error

    async def _is_in_backend(self, place: BlobPlace, length: int) -> bool:
        if place in self.cold.quarantine:
            return False
        try:
            return (await place.stat()).length == length
        except ObjectNotFound:
            return False
