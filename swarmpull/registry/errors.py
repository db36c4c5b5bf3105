"""Error answers of the registry API: codes, statuses and bodies.

``errors-1`` to ``errors-14`` of the OCI distribution specification are in `Code`.  A domain error of
`swarmpull.errors` becomes a `RegistryError` at one place, `translate`.
"""

from __future__ import annotations

import enum
import json
import math
from typing import Final

import attrs

from swarmpull import errors
from swarmpull.errors import SwarmpullError


class Code(enum.Enum):
    """The ``code`` field of an error body."""

    BLOB_UNKNOWN = "BLOB_UNKNOWN"
    BLOB_UPLOAD_INVALID = "BLOB_UPLOAD_INVALID"
    BLOB_UPLOAD_UNKNOWN = "BLOB_UPLOAD_UNKNOWN"
    DIGEST_INVALID = "DIGEST_INVALID"
    MANIFEST_BLOB_UNKNOWN = "MANIFEST_BLOB_UNKNOWN"
    MANIFEST_INVALID = "MANIFEST_INVALID"
    MANIFEST_UNKNOWN = "MANIFEST_UNKNOWN"
    NAME_INVALID = "NAME_INVALID"
    NAME_UNKNOWN = "NAME_UNKNOWN"
    SIZE_INVALID = "SIZE_INVALID"
    UNAUTHORIZED = "UNAUTHORIZED"
    DENIED = "DENIED"
    UNSUPPORTED = "UNSUPPORTED"
    TOOMANYREQUESTS = "TOOMANYREQUESTS"
    # Not in the specification, which has no word for a fault of the registry itself; clients know
    # these two from the distribution registry.
    UNAVAILABLE = "UNAVAILABLE"
    UNKNOWN = "UNKNOWN"


@attrs.define(slots=False)
class RegistryError(SwarmpullError):
    """An error answer.

    Attributes:
        code: what clients act on.
        status: the HTTP status.
        message: what happened and what to do, for a person.
        details: the ``detail`` field of each entry of the body; an empty tuple makes one entry
            without a detail.
        headers: further headers of the answer.
    """

    code: Code
    status: int
    message: str
    details: tuple[dict[str, str], ...] = ()
    headers: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return f"{self.status} {self.code.value}: {self.message}"

    def body(self) -> bytes:
        """The JSON document ``{"errors": [{"code", "message", "detail"}]}``."""
        entry: dict[str, object] = {"code": self.code.value, "message": self.message}
        entries = [entry | {"detail": detail} for detail in self.details] or [entry]
        return json.dumps({"errors": entries}).encode()


_TRANSLATIONS: Final[dict[type[SwarmpullError], tuple[Code, int]]] = {
    errors.InvalidDigest: (Code.DIGEST_INVALID, 400),
    errors.DigestMismatch: (Code.DIGEST_INVALID, 400),
    errors.LengthMismatch: (Code.SIZE_INVALID, 400),
    errors.BlobNotFound: (Code.BLOB_UNKNOWN, 404),
    errors.RepositoryNotFound: (Code.NAME_UNKNOWN, 404),
    errors.ManifestNotFound: (Code.MANIFEST_UNKNOWN, 404),
    errors.ManifestInvalid: (Code.MANIFEST_INVALID, 400),
    errors.UploadNotFound: (Code.BLOB_UPLOAD_UNKNOWN, 404),
    errors.UploadBusy: (Code.BLOB_UPLOAD_INVALID, 409),
    errors.PushRefused: (Code.DENIED, 403),
    errors.RepositoryUnmatched: (Code.NAME_UNKNOWN, 404),
    errors.UpstreamUnknown: (Code.DENIED, 403),
    errors.UpstreamRefused: (Code.DENIED, 403),
    errors.StoreFull: (Code.UNAVAILABLE, 507),
    # 503 sends container runtimes to their next mirror, and to a retry when there is none.
    errors.StoreUnavailable: (Code.UNAVAILABLE, 503),
    errors.BackendUnavailable: (Code.UNAVAILABLE, 503),
    errors.ObjectCorrupt: (Code.UNAVAILABLE, 503),
    errors.ObjectReplaced: (Code.UNAVAILABLE, 503),
    errors.InvalidMetainfo: (Code.UNAVAILABLE, 503),
    errors.RpcUnavailable: (Code.UNAVAILABLE, 503),
    errors.RpcFailed: (Code.UNAVAILABLE, 503),
    errors.ProtocolError: (Code.UNAVAILABLE, 503),
    errors.DownloadFailed: (Code.UNAVAILABLE, 503),
}


def translate(error: SwarmpullError) -> RegistryError:
    """The answer for a domain error; an error without an entry of its own is a fault of ours."""
    if isinstance(error, RegistryError):
        return error
    if isinstance(error, errors.ManifestReferencesMissing):
        details = tuple({"digest": digest} for digest in error.missing)
        return RegistryError(Code.MANIFEST_BLOB_UNKNOWN, 400, str(error), details)
    if isinstance(error, errors.TagChanged):
        # The specification has no word for it; the status says it.
        return RegistryError(
            Code.DENIED, 412, str(error), ({"tag": error.tag, "digest": error.actual},)
        )
    if isinstance(error, errors.TagImmutable):
        return RegistryError(
            Code.DENIED, 409, str(error), ({"tag": error.tag, "digest": error.digest},)
        )
    if isinstance(error, errors.UpstreamBusy):
        headers = (("Retry-After", str(math.ceil(error.retry_after))),)
        return RegistryError(Code.TOOMANYREQUESTS, 429, str(error), headers=headers)
    code, status = _TRANSLATIONS.get(type(error), (Code.UNKNOWN, 500))
    return RegistryError(code, status, str(error))


def name_invalid(name: str) -> RegistryError:
    """The answer for a repository name outside the grammar."""
    return RegistryError(
        Code.NAME_INVALID,
        400,
        f"{shorten(name)!r} is not a repository name: expected lower-case path components of letters, "
        "digits and single '.', '_', '__' or '-' between them, 255 characters at most",
        ({"name": shorten(name)},),
    )


def not_found(path: str) -> RegistryError:
    """The answer for a path that is no endpoint of the API."""
    return RegistryError(Code.UNSUPPORTED, 404, f"{shorten(path)!r} is not an endpoint of this API")


def method_not_allowed(method: str, allowed: tuple[str, ...]) -> RegistryError:
    """The answer for an endpoint that has other methods only."""
    names = ", ".join(allowed)
    return RegistryError(
        Code.UNSUPPORTED,
        405,
        f"{shorten(method)} is not supported here: use {names}",
        headers=(("Allow", names),),
    )


def shorten(text: str) -> str:
    """Foreign text, short enough for a message."""
    return text if len(text) <= 160 else text[:160] + "..."
