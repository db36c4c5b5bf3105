"""Every error that crosses a module boundary, as types with attributes.

The attributes say what happened and to which digest or key; ``str()`` says it to a person together
with what to do.  Errors that a remote role may raise (``REMOTE_ERRORS``) travel over RPC by their
class name and attributes, so their attributes are plain values.

Each boundary translates once: backends turn what their library raises into `BackendUnavailable`,
connections turn socket errors into `RpcUnavailable`, the registry turns all of these into the error
bodies of the OCI distribution specification.
"""

from __future__ import annotations

from typing import Final

import attrs


class SwarmpullError(Exception):
    """The base of everything that swarmpull raises on purpose."""


# --- configuration and start-up ---------------------------------------------------------------


@attrs.frozen
class Problem:
    """One thing wrong with the configuration: which key, where it was set, and what is allowed."""

    key: str
    where: str
    message: str

    def __str__(self) -> str:
        place = f"  ({self.where})" if self.where else ""
        return f"{self.key}: {self.message}{place}"


@attrs.define(slots=False)
class ConfigError(SwarmpullError):
    """The configuration cannot be used; carries every problem that was found, not only the first."""

    problems: tuple[Problem, ...]

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)


@attrs.define(slots=False)
class StartupError(SwarmpullError):
    """A role cannot start for a reason that its operator must remove: a port, a directory, a lock."""

    reason: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.reason}: {self.remedy}"


@attrs.define(slots=False)
class CertificateError(SwarmpullError):
    """A certificate, key or password file cannot be made or used; ``key`` of the configuration names it."""

    reason: str
    key: str = ""

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}" if self.key else self.reason


# --- content ----------------------------------------------------------------------------------


@attrs.define(slots=False)
class InvalidDigest(SwarmpullError):
    """A text that should name content is not a digest."""

    text: str

    def __str__(self) -> str:
        shown = self.text if len(self.text) <= 160 else self.text[:160] + "..."
        return f"{shown!r} is not a digest: expected sha256:<64 hex digits> or sha512:<128>"


@attrs.define(slots=False)
class InvalidMetainfo(SwarmpullError):
    """Metainfo that contradicts itself: wrong number of hashes, a piece length out of bounds."""

    digest: str
    reason: str

    def __str__(self) -> str:
        return f"metainfo of {self.digest} is unusable: {self.reason}"


@attrs.define(slots=False)
class BlobNotFound(SwarmpullError):
    """Nobody who was asked has this blob."""

    digest: str
    where: str

    def __str__(self) -> str:
        return f"blob {self.digest} not found in {self.where}"


@attrs.define(slots=False)
class DigestMismatch(SwarmpullError):
    """Content does not hash to the digest it was given under; it was not stored."""

    expected: str
    actual: str

    def __str__(self) -> str:
        return f"content hashes to {self.actual}, not to {self.expected}: nothing was stored"


@attrs.define(slots=False)
class LengthMismatch(SwarmpullError):
    """Content is longer or shorter than was declared; it was not stored."""

    digest: str
    expected: int
    actual: int

    def __str__(self) -> str:
        return f"content of {self.digest} has {self.actual} bytes, {self.expected} were declared"


# --- repositories -----------------------------------------------------------------------------


@attrs.define(slots=False)
class RepositoryNotFound(SwarmpullError):
    """No image or blob was ever pushed under this repository name."""

    repository: str

    def __str__(self) -> str:
        return f"repository {self.repository} is not known"


@attrs.define(slots=False)
class ManifestNotFound(SwarmpullError):
    """The repository has no such tag, or no manifest of that digest."""

    repository: str
    reference: str

    def __str__(self) -> str:
        return f"manifest {self.reference} not found in repository {self.repository}"


@attrs.define(slots=False)
class ManifestReferencesMissing(SwarmpullError):
    """A manifest refers to content that the repository does not have."""

    repository: str
    missing: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"repository {self.repository} lacks {', '.join(self.missing)}: "
            "push what the manifest refers to first"
        )


@attrs.define(slots=False)
class ManifestInvalid(SwarmpullError):
    """The bytes are not a manifest that a registry can keep."""

    reason: str

    def __str__(self) -> str:
        return f"manifest is invalid: {self.reason}"


@attrs.define(slots=False)
class TagChanged(SwarmpullError):
    """A tag is not what it has to be for a change that was asked for on that condition.

    Attributes:
        expected: the digest; ``*`` for any, empty when the tag must not be there.
        actual: the digest that it has; empty when it is not there.
    """

    repository: str
    tag: str
    expected: str
    actual: str

    def __str__(self) -> str:
        actual = self.actual or "not there"
        expected = {"": "absent", "*": "there"}.get(self.expected, self.expected)
        return (
            f"tag {self.tag} of repository {self.repository} is {actual}, and was to be {expected}: "
            "nothing was changed; look at it again and decide anew"
        )


@attrs.define(slots=False)
class TagImmutable(SwarmpullError):
    """The tags of a repository are neither moved nor deleted."""

    repository: str
    tag: str
    digest: str

    def __str__(self) -> str:
        return (
            f"tag {self.tag} of repository {self.repository} is {self.digest} and stays that: the repository "
            "is immutable (index.immutable); use another tag"
        )


@attrs.define(slots=False)
class UploadNotFound(SwarmpullError):
    """No upload session of that id is open in this repository."""

    upload_id: str

    def __str__(self) -> str:
        return f"upload {self.upload_id} is not known here: it was finished, cancelled or expired"


@attrs.define(slots=False)
class UploadBusy(SwarmpullError):
    """Another request is writing to this upload session."""

    upload_id: str

    def __str__(self) -> str:
        return f"upload {self.upload_id} is being written by another request: retry when it ends"


@attrs.define(slots=False)
class PushRefused(SwarmpullError):
    """This role, or the cluster in its present state, does not take content."""

    reason: str

    def __str__(self) -> str:
        return self.reason


# --- storage ----------------------------------------------------------------------------------


@attrs.define(slots=False)
class StoreFull(SwarmpullError):
    """The local disk, or what a store may use of it, has no room for this one request.

    Everything else goes on.

    Attributes:
        blob: the digest that the room is for; empty when it is not known yet.
    """

    store: str
    needed: int
    remedy: str = "free disk space"
    blob: str = ""

    def __str__(self) -> str:
        what = f" of {self.blob}" if self.blob else ""
        return f"store {self.store} has no room for {self.needed} bytes{what}: {self.remedy}"

    def of(self, blob: str) -> StoreFull:
        """The same, for a blob."""
        return attrs.evolve(self, blob=blob)


@attrs.define(slots=False)
class StoreUnavailable(SwarmpullError):
    """The local disk failed this request."""

    store: str
    reason: str

    def __str__(self) -> str:
        return f"store {self.store} failed: {self.reason}"


@attrs.define(slots=False)
class ObjectNotFound(SwarmpullError):
    """The backend has no object under this key."""

    backend: str
    key: str

    def __str__(self) -> str:
        return f"backend {self.backend} has no object {self.key}"


@attrs.define(slots=False)
class InvalidRange(SwarmpullError):
    """A byte range that lies outside the object or the blob."""

    key: str
    length: int
    start: int
    stop: int | None

    def __str__(self) -> str:
        stop = "" if self.stop is None else self.stop
        return f"range {self.start}:{stop} lies outside {self.key} of {self.length} bytes"


@attrs.define(slots=False)
class BackendUnavailable(SwarmpullError):
    """The backend cannot be used just now, or refuses us; the reason is the backend's own."""

    backend: str
    key: str
    reason: str

    def __str__(self) -> str:
        return f"backend {self.backend} failed on {self.key}: {self.reason}"


@attrs.define(slots=False)
class ObjectCorrupt(BackendUnavailable):
    """The object is not what its name says: what came of it is of no use to anybody."""


@attrs.define(slots=False)
class ObjectReplaced(BackendUnavailable):
    """The object is not the one any more that was found first."""


@attrs.define(slots=False)
class RepositoryUnmatched(SwarmpullError):
    """Namespaces are configured, and no pattern of theirs matches a repository."""

    repository: str
    patterns: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"repository {self.repository} has no backend: none of the patterns of origin.namespaces "
            f"matches it ({', '.join(self.patterns)})"
        )


# --- upstream registries ----------------------------------------------------------------------


@attrs.define(slots=False)
class UpstreamUnknown(SwarmpullError):
    """A request names a registry that this cluster does not pull from."""

    registry: str
    known: tuple[str, ...]

    def __str__(self) -> str:
        known = ", ".join(self.known) or "none"
        return f"registry {self.registry} is not among the upstreams of this cluster ({known})"


@attrs.define(slots=False)
class UpstreamRefused(BackendUnavailable):
    """An upstream registry does not let us have something: credentials are missing, or wrong."""

    def __str__(self) -> str:
        return f"upstream {self.backend} refuses {self.key}: {self.reason}"


@attrs.define(slots=False)
class UpstreamBusy(BackendUnavailable):
    """An upstream registry limits our requests; ``retry_after`` is in seconds."""

    retry_after: float

    def __str__(self) -> str:
        return (
            f"upstream {self.backend} limits requests ({self.reason}): "
            f"retry {self.key} in {self.retry_after:.0f} seconds"
        )


# --- the network ------------------------------------------------------------------------------


@attrs.define(slots=False)
class ProtocolError(SwarmpullError):
    """The other side broke the protocol; the connection ends with this reason, nothing else does."""

    reason: str

    def __str__(self) -> str:
        return f"protocol error: {self.reason}"


@attrs.define(slots=False)
class TlsError(ProtocolError):
    """The two sides do not trust each other: certificates, clusters, roles, or one of them speaks no TLS."""

    def __str__(self) -> str:
        return self.reason


@attrs.define(slots=False)
class RpcUnavailable(SwarmpullError):
    """A role did not answer: not reachable, connection lost, or no reply within the deadline.

    ``asked``: it may have got the request, and done what was asked.
    """

    address: str
    method: str
    reason: str
    asked: bool = True

    def __str__(self) -> str:
        return f"{self.method} at {self.address}: {self.reason}"


@attrs.define(slots=False)
class RpcFailed(SwarmpullError):
    """A role answered with an error that has no type of its own here."""

    address: str
    method: str
    message: str

    def __str__(self) -> str:
        return f"{self.method} at {self.address} failed: {self.message}"


@attrs.define(slots=False)
class DownloadFailed(SwarmpullError):
    """A download through the swarm ended without the blob."""

    digest: str
    reason: str

    def __str__(self) -> str:
        return f"download of {self.digest} failed: {self.reason}"


# What a handler of one role may raise for a caller in another role, by class name.
REMOTE_ERRORS: Final[dict[str, type[SwarmpullError]]] = {
    error.__name__: error
    for error in (
        InvalidDigest,
        InvalidMetainfo,
        BlobNotFound,
        DigestMismatch,
        LengthMismatch,
        RepositoryNotFound,
        ManifestNotFound,
        ManifestReferencesMissing,
        ManifestInvalid,
        TagChanged,
        TagImmutable,
        PushRefused,
        StoreFull,
        StoreUnavailable,
        ObjectNotFound,
        BackendUnavailable,
        ObjectCorrupt,
        RepositoryUnmatched,
        UpstreamUnknown,
        UpstreamRefused,
        UpstreamBusy,
        DownloadFailed,
    )
}
