"""A blob in one backend of an origin: what is remembered, and done once, is so for each of them."""

from __future__ import annotations

import copy
from typing import Self

import attrs

from swarmpull.digest import Digest
from swarmpull.errors import BackendUnavailable, BlobNotFound, ObjectNotFound, SwarmpullError
from swarmpull.store.backends.base import Backend, blob_key
from swarmpull.store.backends.namespaces import Namespaces


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

    def __str__(self) -> str:
        return f"{self.digest} of {self.name}"


def not_given(digest: Digest, error: ObjectNotFound | BackendUnavailable) -> SwarmpullError:
    """What to say of a blob that the backend did not give."""
    if isinstance(error, ObjectNotFound):
        return BlobNotFound(str(digest), error.backend)
    # An upstream may have said more than that it failed: of the same type, with all that is in it.
    return copy.copy(error)
