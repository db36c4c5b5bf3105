"""The blobs of an origin: its disk in front, the backend behind.

The backend is the truth.  A blob counts as accepted when it is in both; one that only the backend has is
fetched to the disk when somebody asks for it, once however many ask.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import attrs
import structlog
import trio

from swarmpull.digest import Digest
from swarmpull.errors import BlobNotFound, DigestMismatch, ObjectNotFound, SwarmpullError
from swarmpull.store.backends.base import Backend, blob_key
from swarmpull.store.blobs import BlobStore
from swarmpull.swarm.metainfo import Metainfo
from swarmpull.telemetry import Metrics

log = structlog.get_logger()


@attrs.define(eq=False)
class _Work:
    """One piece of work that several callers wait for."""

    done: trio.Event = attrs.field(factory=trio.Event)
    error: SwarmpullError | None = None


class SharedWork:
    """Runs a job once for all who ask for it at the same time, and to its end if they leave."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._works: dict[Digest, _Work] = {}

    async def run(self, digest: Digest, job: Callable[[Digest], Awaitable[None]]) -> None:
        """Join the job under way for this digest, or begin one.  Raises what the job raises."""
        work = self._works.get(digest)
        if work is None:
            work = self._works[digest] = _Work()
            self._nursery.start_soon(self._run, digest, job, work)
        await work.done.wait()
        if work.error is not None:
            raise work.error.with_traceback(None)

    async def _run(
        self, digest: Digest, job: Callable[[Digest], Awaitable[None]], work: _Work
    ) -> None:
        try:
            await job(digest)
        except SwarmpullError as error:
            work.error = error
        finally:
            del self._works[digest]
            work.done.set()


class OriginContent:
    """Blobs on the disk and in the backend of one origin."""

    def __init__(
        self, store: BlobStore, backend: Backend, nursery: trio.Nursery, metrics: Metrics
    ) -> None:
        self.store = store
        self.backend = backend
        self._fetching = SharedWork(nursery)
        self._writing = SharedWork(nursery)
        self._fetched = metrics.counter(
            "backend_bytes_read_total", "Bytes of blobs read from the backend."
        )
        self._written = metrics.counter(
            "backend_bytes_written_total", "Bytes of blobs written to the backend."
        )

    async def stat(self, digest: Digest) -> int:
        """Length of a blob in bytes, without fetching it.

        Raises:
            BlobNotFound: neither on the disk nor in the backend.
            BackendUnavailable: not on the disk, and the backend cannot say.
        """
        try:
            return self.store.stat(digest).length
        except BlobNotFound:
            pass
        try:
            return (await self.backend.stat(blob_key(digest))).length
        except ObjectNotFound as error:
            raise BlobNotFound(str(digest), self.backend.name) from error

    async def ensure_local(self, digest: Digest) -> None:
        """Return when the blob is on the disk.

        Raises:
            BlobNotFound: the backend does not have it either.
            DigestMismatch: the object in the backend is not what its name says; it is not used.
            BackendUnavailable, StoreFull, StoreUnavailable: the blob cannot be fetched now.
        """
        if not self._is_local(digest):
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
        """
        await self._writing.run(digest, self._write)

    def _is_local(self, digest: Digest) -> bool:
        try:
            self.store.stat(digest)
        except BlobNotFound:
            return False
        return True

    async def _fetch(self, digest: Digest) -> None:
        if self._is_local(digest):
            return
        try:
            async with (
                self.store.create() as writer,
                self.backend.open(blob_key(digest)) as chunks,
            ):
                async for chunk in chunks:
                    await writer.write(chunk)
                    self._fetched.inc(len(chunk))
                stat = await writer.commit(digest)
        except ObjectNotFound as error:
            raise BlobNotFound(str(digest), self.backend.name) from error
        except DigestMismatch as error:
            log.error("backend_object_corrupt", digest=str(digest), reason=str(error))
            raise
        log.info("blob_fetched", digest=str(digest), length=stat.length)

    async def _write(self, digest: Digest) -> None:
        key = blob_key(digest)
        length = self.store.stat(digest).length
        try:
            if (await self.backend.stat(key)).length == length:
                return
        except ObjectNotFound:
            pass
        await self.backend.put_file(key, self.store.path(digest))
        self._written.inc(length)
        log.info("blob_durable", digest=str(digest), length=length)
