"""A blob in one backend of an origin: what is remembered, and done once, is so for each of them."""

from __future__ import annotations

import copy
from typing import Final, Self

import attrs
import trio

from swarmpull.digest import Digest
from swarmpull.errors import BackendUnavailable, BlobNotFound, ObjectNotFound, SwarmpullError
from swarmpull.store.backends.base import Backend, ObjectStat, blob_key
from swarmpull.store.backends.namespaces import Namespaces

# How long our own backend may take to say whether it has a blob, in seconds.  It tries again by itself, for
# minutes when it gets no answer at all; a client waits, and other origins may have the blob queued.
STAT_PATIENCE: Final = 8.0


@attrs.frozen
class BlobPlace:
    """A blob in one backend; what goes wrong there says nothing about the others.

    Attributes:
        is_foreign: the backend is an upstream: nothing is written to it, and what it does not have nobody
            has pushed here.
    """

    digest: Digest
    backend: Backend = attrs.field(eq=False)
    is_foreign: bool = attrs.field(eq=False)
    name: str = attrs.field(init=False)

    @name.default
    def _name(self) -> str:
        return self.backend.name

    @classmethod
    def of(cls, namespaces: Namespaces, digest: Digest, namespace: str) -> Self:
        """Where the blobs of a repository are.  Raises RepositoryUnmatched: it has no backend."""
        return cls(digest, namespaces.backend_for(namespace), namespaces.is_foreign(namespace))

    @property
    def key(self) -> str:
        return blob_key(self.digest)

    async def stat(self) -> ObjectStat:
        """What the backend says of the blob; an upstream has its own patience.

        Raises:
            ObjectNotFound: it does not have it.
            BackendUnavailable: it cannot say, or not in good time.
        """
        with trio.move_on_after(float("inf") if self.is_foreign else STAT_PATIENCE):
            return await self.backend.stat(self.key)
        reason = f"no answer for {STAT_PATIENCE:g} s"
        raise BackendUnavailable(self.name, self.key, reason)

    def __str__(self) -> str:
        return f"{self.digest} of {self.name}"


def not_given(digest: Digest, error: ObjectNotFound | BackendUnavailable) -> SwarmpullError:
    """What to say of a blob that the backend did not give."""
    if isinstance(error, ObjectNotFound):
        return BlobNotFound(str(digest), error.backend)
    # An upstream may have said more than that it failed: of the same type, with all that is in it.
    return copy.copy(error)
