"""Blobs out: GET and HEAD of a blob, whole or in ranges, perhaps while it is still downloading."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Final

import structlog

from swarmpull.digest import Digest
from swarmpull.errors import SwarmpullError
from swarmpull.registry.asgi import (
    Headers,
    Response,
    send_chunk,
    send_response,
    start_response,
    until_disconnect,
)
from swarmpull.registry.calls import Call
from swarmpull.registry.errors import Code, RegistryError
from swarmpull.registry.ranges import ByteRange, RangeNotSatisfiable, multipart, parse_range
from swarmpull.registry.service import BlobReader

BLOB_TYPE: Final = "application/octet-stream"

log = structlog.get_logger()


def _headers(digest: Digest) -> Headers:
    return (
        ("Content-Type", BLOB_TYPE),
        ("Docker-Content-Digest", str(digest)),
        ("ETag", f'"{digest}"'),
        ("Accept-Ranges", "bytes"),
    )


async def head_blob(call: Call) -> Response:
    """Answer HEAD of a blob; never starts a download.  Raises BlobNotFound, InvalidDigest."""
    digest = Digest.parse(call.route.argument)
    length = await call.service.stat_blob(call.repository, digest, upstream=call.upstream)
    return Response(200, (*_headers(digest), ("Content-Length", str(length))))


async def get_blob(call: Call) -> None:
    """Answer GET of a blob, for as long as the client stays.

    Raises:
        SwarmpullError: the head of the answer was not sent.  A failure after it cuts the body short.
    """
    digest = Digest.parse(call.route.argument)
    failures: list[SwarmpullError] = []

    async def respond() -> None:
        try:
            await _respond(call, digest)
        except SwarmpullError as error:
            # Raised again outside: the nursery would hand it on inside a group.
            failures.append(error)

    await until_disconnect(call.request, respond)
    if failures:
        raise failures[0]


async def _respond(call: Call, digest: Digest) -> None:
    request, send, headers = call.request, call.send, _headers(digest)
    etag = f'"{digest}"'
    async with call.service.open_blob(call.repository, digest, upstream=call.upstream) as reader:
        if _names(request.header("if-none-match"), etag):
            await send_response(request, send, Response(304, headers))
            return
        # Content never changes under a digest, so another validator in If-Range names other content.
        asked = request.header("range") if request.header("if-range") in (None, etag) else None
        try:
            ranges = parse_range(asked, reader.length)
        except RangeNotSatisfiable as error:
            raise _unsatisfiable(error) from error
        if ranges is None:
            await start_response(send, 200, (*headers, ("Content-Length", str(reader.length))))
            whole = ByteRange(0, reader.length, is_rest=True)
            await _send_body(call, reader, digest, [(b"", whole)])
        elif len(ranges) == 1:
            await start_response(send, 206, (*headers, *_single(ranges[0], reader.length)))
            await _send_body(call, reader, digest, [(b"", ranges[0])])
        else:
            await _send_multipart(call, reader, digest, ranges)


def _names(header: str | None, etag: str) -> bool:
    """Whether an ``If-None-Match`` names this content; the comparison is the weak one (RFC 9110, 13.1.2)."""
    texts = [] if header is None else [text.strip(" \t") for text in header.split(",")]
    return any(text == "*" or text.removeprefix("W/") == etag for text in texts)


def _single(byte_range: ByteRange, length: int) -> Headers:
    return (
        ("Content-Range", byte_range.content_range(length)),
        ("Content-Length", str(byte_range.length)),
    )


def _unsatisfiable(error: RangeNotSatisfiable) -> RegistryError:
    return RegistryError(
        Code.SIZE_INVALID,
        416,
        str(error),
        headers=(("Content-Range", f"bytes */{error.length}"),),
    )


async def _send_multipart(
    call: Call, reader: BlobReader, digest: Digest, ranges: Sequence[ByteRange]
) -> None:
    boundary = secrets.token_hex(16)
    layout = multipart(ranges, reader.length, part_type=BLOB_TYPE, boundary=boundary)
    headers = dict(_headers(digest)) | {
        "Content-Type": layout.content_type,
        "Content-Length": str(layout.length),
    }
    await start_response(call.send, 206, tuple(headers.items()))
    parts = list(zip(layout.preambles, ranges, strict=True))
    await _send_body(call, reader, digest, parts, layout.epilogue)


async def _send_body(
    call: Call,
    reader: BlobReader,
    digest: Digest,
    parts: Sequence[tuple[bytes, ByteRange]],
    epilogue: bytes = b"",
) -> None:
    """Send what follows the head: preambles and ranges, to the end, or cut short and never padded.

    A range with an end is a part for somebody who knows what it must be (the footer of a layer that is read
    lazily, say): it does not wait for the rest of the blob.  What goes on to the end completes a pull.
    """
    try:
        for preamble, byte_range in parts:
            head, offset = preamble, byte_range.start
            early = not byte_range.is_rest and byte_range.length < reader.length
            while offset < byte_range.stop:
                with call.memory.chunk(byte_range.stop - offset) as size:
                    chunk = await reader.read_at(offset, size, early=early)
                    # One send for a small part: a client may ask for thousands of them.
                    await send_chunk(call.send, head + chunk if head else chunk)
                head = b""
                offset += len(chunk)
                del chunk  # the budget counts it no longer
    except SwarmpullError as error:
        # With no last chunk the server closes the connection, so the client sees that bytes are missing.
        log.warning("response_cut_short", digest=str(digest), reason=str(error))
        return
    await send_chunk(call.send, epilogue, last=True)


async def delete_blob(call: Call) -> Response:
    """Take a blob out of a repository.  Raises BlobNotFound, InvalidDigest."""
    digest = Digest.parse(call.route.argument)
    await call.service.delete_blob(call.route.repository, digest)
    return Response(202)
