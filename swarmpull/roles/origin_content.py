"""The blobs of an origin: its disk in front, the backend behind.

The backend is the truth.  A blob counts as accepted when it is in both; one that only the backend has is
fetched to the disk when somebody asks for it, once however many ask.
"""

from __future__ import annotations

from typing import Final, Protocol

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
from swarmpull.roles.shared_work import SharedWork
from swarmpull.store.backends.base import Backend, blob_key
from swarmpull.store.blobs import BlobStore
from swarmpull.store.holds import Pin
from swarmpull.swarm.metainfo import Metainfo
from swarmpull.telemetry import Metrics

log = structlog.get_logger()

# Blobs that are fetched at once, and as many that are written; each costs a connection to the backend and
# its share of the disk, and more at once would only make each of them slower.
TRANSFERS_MAX: Final = 16


class Elsewhere(Protocol):
    """Where a blob may be that neither the disk nor the backend has: on the disks of other origins."""

    async def length(self, digest: Digest) -> int | None:
        """Its length in bytes; None when it is nowhere."""
        ...

    async def fetch(self, digest: Digest) -> bool:
        """Get it to the disk; False when it is nowhere."""
        ...


class OriginContent:
    """Blobs on the disk and in the backend of one origin.

    Attributes:
        elsewhere: is asked for what the backend cannot give, which may be queued on another origin.
    """

    def __init__(
        self, store: BlobStore, backend: Backend, nursery: trio.Nursery, metrics: Metrics
    ) -> None:
        self.store = store
        self.backend = backend
        self.elsewhere: Elsewhere | None = None
        self._fetching: SharedWork[None] = SharedWork(nursery)
        self._writing: SharedWork[None] = SharedWork(nursery)
        self._fetches = trio.CapacityLimiter(TRANSFERS_MAX)
        self._writes = trio.CapacityLimiter(TRANSFERS_MAX)
        self._corrupt: set[Digest] = set()
        self._fetched = metrics.counter(
            "backend_bytes_read_total", "Bytes of blobs read from the backend."
        )
        self._written = metrics.counter(
            "backend_bytes_written_total", "Bytes of blobs written to the backend."
        )

    async def stat(self, digest: Digest) -> int:
        """Length of a blob in bytes, without fetching it.

        Raises:
            BlobNotFound: neither on the disk nor in the backend, or corrupt there: clients push only
                what they are told is missing.
            BackendUnavailable: not on the disk, and the backend cannot say.
        """
        try:
            return self.store.stat(digest).length
        except BlobNotFound:
            if self.is_corrupt(digest):
                raise
        try:
            return (await self.backend.stat(blob_key(digest))).length
        except (ObjectNotFound, BackendUnavailable) as error:
            length = await self.elsewhere.length(digest) if self.elsewhere else None
            if length is not None:
                return length
            raise _missing(digest, error) from error

    async def ensure_local(self, digest: Digest) -> None:
        """Return when the blob is on the disk.

        Raises:
            BlobNotFound: the backend does not have it either.
            BackendUnavailable: the backend fails, or its object is not what its name says and is not used.
            StoreFull, StoreUnavailable: the disk has no room for it, or fails.
        """
        if not self.store.has(digest):
            await self._fetching.run(digest, self._fetch)

    async def metainfo(self, digest: Digest) -> Metainfo:
        """The metainfo of a blob that is then on the disk.  Raises what `ensure_local` does."""
        await self.ensure_local(digest)
        return await self.store.metainfo(digest)

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
        return digest in self._corrupt

    async def _fetch(self, digest: Digest) -> None:
        async with self._fetches:
            if self.store.has(digest):
                return
            key = blob_key(digest)
            try:
                length = await self._copy_to_disk(digest, key)
            except (ObjectNotFound, BackendUnavailable) as error:
                if self.elsewhere is not None and await self.elsewhere.fetch(digest):
                    return
                raise _missing(digest, error) from error
            except DigestMismatch as error:
                self._corrupt.add(digest)
                log.error("backend_object_corrupt", key=key, actual=error.actual)
                reason = f"the object is corrupt, it hashes to {error.actual}: push the blob again"
                raise BackendUnavailable(self.backend.name, key, reason) from error
        log.info("blob_fetched", digest=str(digest), length=length)

    async def _copy_to_disk(self, digest: Digest, key: str) -> int:
        async with self.store.create() as writer, self.backend.open(key) as chunks:
            async for chunk in chunks:
                await writer.write(chunk)
                self._fetched.inc(len(chunk))
            return (await writer.commit(digest)).length

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
        self._corrupt.discard(digest)
        self._written.inc(length)
        log.info("blob_durable", digest=str(digest), length=length)

    async def _copy_to_backend(self, digest: Digest, key: str) -> None:
        try:
            await self.backend.put_file(key, self.store.path(digest))
        except OSError as error:
            # About our own file; nobody else would catch it, and the role would end.
            raise StoreUnavailable(self.store.name, str(error)) from error

    async def _is_in_backend(self, digest: Digest, key: str, length: int) -> bool:
        if digest in self._corrupt:
            return False
        try:
            return (await self.backend.stat(key)).length == length
        except ObjectNotFound:
            return False


def _missing(digest: Digest, error: ObjectNotFound | BackendUnavailable) -> SwarmpullError:
    """What to say of a blob that the backend did not give."""
    if isinstance(error, ObjectNotFound):
        return BlobNotFound(str(digest), error.backend)
    return BackendUnavailable(error.backend, error.key, error.reason)
