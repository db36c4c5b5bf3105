"""The blobs of an origin: its disk in front, the backends behind.

Which backend depends on the repository, called the namespace here: `Namespaces` knows.  The disk is one for
all of them, because content is its own proof; everything else is kept for each backend by itself.

The backend is the truth.  A blob counts as accepted when it is in both; one that only the backend has is
fetched to the disk when somebody asks for it, once however many ask.
"""

from __future__ import annotations

import copy
from typing import Final, Protocol

import attrs
import structlog
import trio

from swarmpull.digest import Digest
from swarmpull.errors import (
    BackendUnavailable,
    BlobNotFound,
    DigestMismatch,
    ObjectNotFound,
    RpcUnavailable,
    StoreUnavailable,
    SwarmpullError,
)
from swarmpull.roles.shared_work import SharedWork
from swarmpull.store.backends.base import Backend, blob_key
from swarmpull.store.backends.namespaces import Namespaces
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
        """Its length in bytes; None when it is nowhere.  Raises RpcUnavailable when that is not known."""
        ...

    async def fetch(self, digest: Digest) -> bool:
        """Get it to the disk; False when it is nowhere.  Raises RpcUnavailable when that is not known."""
        ...


@attrs.frozen
class _Place:
    """A blob in one backend; what goes wrong there says nothing about the others.

    Attributes:
        is_foreign: the backend is an upstream: what it does not have nobody has pushed here.
    """

    digest: Digest
    backend: Backend = attrs.field(eq=False)
    is_foreign: bool = attrs.field(eq=False)
    name: str = attrs.field(init=False)

    @name.default
    def _name(self) -> str:
        return self.backend.name

    @property
    def key(self) -> str:
        return blob_key(self.digest)

    def __str__(self) -> str:
        return f"{self.digest} of {self.name}"


class OriginContent:
    """Blobs on the disk and in the backend of one origin.

    Attributes:
        elsewhere: is asked for what the backend cannot give, which may be queued on another origin.
    """

    def __init__(
        self, store: BlobStore, namespaces: Namespaces, nursery: trio.Nursery, metrics: Metrics
    ) -> None:
        self.store = store
        self.namespaces = namespaces
        self.elsewhere: Elsewhere | None = None
        self._fetching: SharedWork[None] = SharedWork(nursery)
        self._writing: SharedWork[None] = SharedWork(nursery)
        self._fetches = trio.CapacityLimiter(TRANSFERS_MAX)
        self._writes = trio.CapacityLimiter(TRANSFERS_MAX)
        self._corrupt: set[_Place] = set()
        self._fetched = metrics.counter(
            "backend_bytes_read_total", "Bytes of blobs read from the backend."
        )
        self._written = metrics.counter(
            "backend_bytes_written_total", "Bytes of blobs written to the backend."
        )

    async def stat(self, digest: Digest, namespace: str) -> int:
        """Length of a blob in bytes, without fetching it.

        Raises:
            BlobNotFound: neither on the disk nor in the backend, or corrupt there: clients push only
                what they are told is missing.  So too when an origin that may have it cannot be asked: to
                push it again mends that.
            RepositoryUnmatched: not on the disk, and the repository has no backend.
            BackendUnavailable: not on the disk, and the backend cannot say.
        """
        try:
            return self.store.stat(digest).length
        except BlobNotFound:
            # Nobody can push to an upstream: whether it has mended the blob is for the upstream to say.
            if not self.namespaces.is_foreign(namespace) and self.is_corrupt(digest, namespace):
                raise
        place = self._place(digest, namespace)
        try:
            return (await place.backend.stat(place.key)).length
        except (ObjectNotFound, BackendUnavailable) as error:
            length = await self._length_elsewhere(place)
            if length is None:
                raise _missing(digest, error) from error
            return length

    async def ensure_local(self, digest: Digest, namespace: str) -> None:
        """Return when the blob is on the disk.

        Raises:
            BlobNotFound: the backend does not have it either, nor do other origins.
            RepositoryUnmatched: it is not on the disk, and the repository has no backend.
            BackendUnavailable: the backend fails, or its object is not what its name says and is not used; or
                it does not have the blob, and an origin that may have it cannot be asked.
            StoreFull, StoreUnavailable: the disk has no room for it, or fails.
        """
        if not self.store.has(digest):
            await self._fetching.run(self._place(digest, namespace), self._fetch)

    async def metainfo(self, digest: Digest, namespace: str) -> Metainfo:
        """The metainfo of a blob that is then on the disk.  Raises what `ensure_local` does."""
        await self.ensure_local(digest, namespace)
        return await self.store.metainfo(digest)

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
        return self._place(digest, namespace) in self._corrupt

    def _place(self, digest: Digest, namespace: str) -> _Place:
        return _Place(
            digest, self.namespaces.backend_for(namespace), self.namespaces.is_foreign(namespace)
        )

    def _others(self, place: _Place) -> Elsewhere | None:
        return None if place.is_foreign else self.elsewhere

    async def _length_elsewhere(self, place: _Place) -> int | None:
        others = self._others(place)
        try:
            return await others.length(place.digest) if others else None
        except RpcUnavailable:
            return None

    async def _is_fetched_elsewhere(
        self, place: _Place, error: ObjectNotFound | BackendUnavailable
    ) -> bool:
        """Whether another origin gave what the backend did not.

        Raises BackendUnavailable when the backend does not have it, and an origin did not say whether it has.
        """
        others = self._others(place)
        try:
            return others is not None and await others.fetch(place.digest)
        except RpcUnavailable as silent:
            if isinstance(error, BackendUnavailable):
                return False
            reason = f"it is not there, and may wait on another origin ({silent}): try again"
            raise BackendUnavailable(place.name, place.key, reason) from silent

    async def _fetch(self, place: _Place) -> None:
        digest = place.digest
        async with self._fetches:
            if self.store.has(digest):
                return
            try:
                length = await self._copy_to_disk(place)
            except (ObjectNotFound, BackendUnavailable) as error:
                if await self._is_fetched_elsewhere(place, error):
                    return
                raise _missing(digest, error) from error
            except DigestMismatch as error:
                self._corrupt.add(place)
                log.error(
                    "backend_object_corrupt",
                    backend=place.name,
                    key=place.key,
                    actual=error.actual,
                )
                reason = (
                    f"the object is corrupt, it hashes to {error.actual}: a push replaces it, and the "
                    "next pull tries it again"
                )
                raise BackendUnavailable(place.name, place.key, reason) from error
        self._corrupt.discard(place)
        log.info("blob_fetched", digest=str(digest), backend=place.name, length=length)

    async def _copy_to_disk(self, place: _Place) -> int:
        async with self.store.create() as writer, place.backend.open(place.key) as chunks:
            async for chunk in chunks:
                await writer.write(chunk)
                self._fetched.inc(len(chunk))
            return (await writer.commit(place.digest)).length

    async def _write(self, place: _Place) -> None:
        # Held by this task too: it goes on when the one that asked for it has given up.
        with self.store.hold(place.digest, Pin.NOT_WRITTEN_BACK):
            async with self._writes:
                await self._write_now(place)

    async def _write_now(self, place: _Place) -> None:
        length = self.store.stat(place.digest).length
        if await self._is_in_backend(place, length):
            return
        await self._copy_to_backend(place)
        self._corrupt.discard(place)
        self._written.inc(length)
        log.info("blob_durable", digest=str(place.digest), backend=place.name, length=length)

    async def _copy_to_backend(self, place: _Place) -> None:
        try:
            await place.backend.put_file(place.key, self.store.path(place.digest))
        except OSError as error:
            # About our own file; nobody else would catch it, and the role would end.
            raise StoreUnavailable(self.store.name, str(error)) from error

    async def _is_in_backend(self, place: _Place, length: int) -> bool:
        if place in self._corrupt:
            return False
        try:
            return (await place.backend.stat(place.key)).length == length
        except ObjectNotFound:
            return False


def _missing(digest: Digest, error: ObjectNotFound | BackendUnavailable) -> SwarmpullError:
    """What to say of a blob that the backend did not give."""
    if isinstance(error, ObjectNotFound):
        return BlobNotFound(str(digest), error.backend)
    # An upstream may have said more than that it failed: of the same type, with all that is in it.
    return copy.copy(error)
