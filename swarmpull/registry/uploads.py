"""Blobs in: upload sessions, cross-repository mounts, and generic blobs.

Bodies go into the store as they arrive.  A client that hangs up leaves its session where it is, to be resumed
from the offset that the session reports.
"""

from __future__ import annotations

from typing import Final

from swarmpull.digest import Digest
from swarmpull.errors import BlobNotFound, PushRefused, SwarmpullError, UploadNotFound
from swarmpull.registry.asgi import Headers, Request, Response
from swarmpull.registry.calls import Call
from swarmpull.registry.errors import Code, RegistryError, shorten
from swarmpull.registry.names import check_repository, parse_digest
from swarmpull.registry.ranges import parse_content_range
from swarmpull.store.uploads import Upload

# The algorithms that swarmpull.digest knows.
_ALGORITHMS: Final = ("sha256", "sha512")
# What is read of the body of a generic blob that is here already, for clients that cannot read an answer
# before they have sent everything.
_EXISTING_BYTES: Final = 16 << 30


async def start_upload(call: Call) -> Response:
    """POST: mount a blob, take one whole (``digest=``), or open a session.

    Raises:
        RegistryError: NAME_INVALID for ``from=``, DIGEST_INVALID for ``digest-algorithm=``,
            TOOMANYREQUESTS when no further session can be opened.
        InvalidDigest, DigestMismatch, StoreFull, StoreUnavailable, PushRefused: as they say.
    """
    request = call.request
    mount, digest_text = request.query("mount"), request.query("digest")
    if mount is not None and await _mount(call, Digest.parse(mount)):
        return _created(call, Digest.parse(mount))
    _check_algorithm(request.query("digest-algorithm"))
    digest = None if digest_text is None else Digest.parse(digest_text)
    upload = await _open_session(call)
    if digest is None:
        return Response(202, _session_headers(upload))
    await _receive_whole(call, upload, digest)
    return _created(call, digest)


async def _mount(call: Call, digest: Digest) -> bool:
    source = call.request.query("from")
    if source is not None:
        check_repository(source)
    return await call.service.mount_blob(call.route.repository, digest, source)


def _check_algorithm(algorithm: str | None) -> None:
    if algorithm is not None and algorithm not in _ALGORITHMS:
        raise RegistryError(
            Code.DIGEST_INVALID,
            400,
            f"digest algorithm {shorten(algorithm)!r} is not supported: "
            f"use {' or '.join(_ALGORITHMS)}",
        )


async def _open_session(call: Call) -> Upload:
    try:
        return await call.uploads.create(call.route.repository)
    except PushRefused as error:
        raise RegistryError(
            Code.TOOMANYREQUESTS, 429, str(error), headers=(("Retry-After", "10"),)
        ) from error


async def upload_status(call: Call) -> Response:
    """GET of a session: how much has arrived.  Raises UploadNotFound."""
    upload = call.uploads.get(call.route.repository, call.route.argument)
    return Response(204, _session_headers(upload))


async def append_chunk(call: Call) -> Response:
    """PATCH: the next bytes, with or without ``Content-Range``.

    Raises:
        RegistryError: 416 for a range that does not begin where the session ends.
        UploadNotFound, UploadBusy, StoreFull, StoreUnavailable: as they say.
        ClientGone: what arrived before is kept.
    """
    upload = call.uploads.get(call.route.repository, call.route.argument)
    async with upload.writing():
        await _append_body(call.request, upload)
    return Response(202, _session_headers(upload))


async def finish_upload(call: Call) -> Response:
    """PUT: close a session, with or without a last chunk in the body.

    Raises:
        InvalidDigest: no digest, or a malformed one; the session stays.
        DigestMismatch: the content is another; the session is gone.
        RegistryError, UploadNotFound, UploadBusy, StoreFull, StoreUnavailable, ClientGone: as in
            `append_chunk`.
    """
    upload = call.uploads.get(call.route.repository, call.route.argument)
    digest = parse_digest(call.request.query("digest"))
    async with upload.writing():
        await _append_body(call.request, upload)
        await upload.finish(digest)
    await call.service.accept_blob(call.repository, digest)
    return _created(call, digest)


async def cancel_upload(call: Call) -> Response:
    """DELETE of a session.  Raises UploadNotFound, UploadBusy."""
    upload = call.uploads.get(call.route.repository, call.route.argument)
    async with upload.writing():
        await upload.cancel()
    return Response(204)


async def put_generic_blob(call: Call) -> Response:
    """PUT of a blob under its digest, outside any repository.

    A blob that is there already is not written again, but accepted again: the request that has brought it
    may have failed before it was durable.

    Raises:
        InvalidDigest, DigestMismatch, StoreFull, StoreUnavailable, PushRefused: nothing is visible.
        ClientGone: likewise.
    """
    digest = Digest.parse(call.route.argument)
    try:
        await call.service.accept_blob(None, digest)
    except BlobNotFound:
        await _receive_whole(call, await _open_session(call), digest)
        return _created(call, digest)
    await call.request.discard(_EXISTING_BYTES)
    return Response(200, _blob_headers(call, digest))


async def _receive_whole(call: Call, upload: Upload, digest: Digest) -> None:
    """Fill a session from the body of this one request; nobody could resume it, so it never stays."""
    try:
        async with upload.writing():
            await _append_body(call.request, upload)
            await upload.finish(digest)
    except SwarmpullError:
        await _forget(upload)
        raise
    await call.service.accept_blob(call.repository, digest)


async def _forget(upload: Upload) -> None:
    try:
        await upload.cancel()
    except UploadNotFound:
        return


async def _append_body(request: Request, upload: Upload) -> None:
    expected = _expected_bytes(request, upload)
    received = 0
    while chunk := await request.read():
        received += len(chunk)
        if expected is not None and received > expected:
            break
        await upload.append(chunk)
    if expected is not None and received != expected:
        raise _size_invalid(expected, received, upload)


def _expected_bytes(request: Request, upload: Upload) -> int | None:
    """The length of the chunk as its Content-Range says; None when there is none."""
    header = request.header("content-range")
    if header is None or request.body_read:
        return None
    try:
        chunk = parse_content_range(header)
    except ValueError as error:
        raise RegistryError(
            Code.BLOB_UPLOAD_INVALID, 400, f"{error}, got {shorten(header)!r}"
        ) from error
    if chunk.start != upload.offset:
        raise RegistryError(
            Code.BLOB_UPLOAD_INVALID,
            416,
            f"the chunk begins at byte {chunk.start}, the next byte of this upload is {upload.offset}",
            headers=_session_headers(upload),
        )
    if request.content_length not in (None, chunk.length):
        raise _size_invalid(chunk.length, request.content_length or 0, upload)
    return chunk.length


def _size_invalid(expected: int, received: int, upload: Upload) -> RegistryError:
    return RegistryError(
        Code.SIZE_INVALID,
        400,
        f"Content-Range declares {expected} bytes, the body has {received}",
        headers=_session_headers(upload),
    )


def _session_headers(upload: Upload) -> Headers:
    # Clients read "0-0" as empty too: the format has no other word for it.
    return (
        ("Location", f"/v2/{upload.repository}/blobs/uploads/{upload.id}"),
        ("Range", f"0-{max(upload.offset - 1, 0)}"),
        ("Docker-Upload-UUID", upload.id),
    )


def _blob_headers(call: Call, digest: Digest) -> Headers:
    repository = call.route.repository
    path = f"/v2/{repository}/blobs/{digest}" if repository else f"/blobs/{digest}"
    return (("Location", path), ("Docker-Content-Digest", str(digest)))


def _created(call: Call, digest: Digest) -> Response:
    return Response(201, _blob_headers(call, digest))
