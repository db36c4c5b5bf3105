"""Manifests, tags, repositories and referrers."""

from __future__ import annotations

import json
import re
from typing import Any, Final
from urllib.parse import urlencode

import trio

from swarmpull.digest import Digest
from swarmpull.errors import ManifestNotFound
from swarmpull.registry.asgi import Headers, Request, Response
from swarmpull.registry.calls import Call
from swarmpull.registry.errors import Code, RegistryError, shorten
from swarmpull.registry.manifests import (
    MANIFEST_BYTES_MAX,
    OCI_INDEX,
    parse_manifest,
    under_digest,
)
from swarmpull.registry.names import is_tag, parse_reference
from swarmpull.registry.service import Terms
from swarmpull.wire.api import Descriptor, ListReply, TagChange

# Names in one answer: 1 MiB of the longest tags.  More come by the Link header.
PAGE_MAX: Final = 8192
_COUNT: Final = re.compile(r"[0-9]{1,9}", re.ASCII)
# A digest in quotes, or anything.
_ONE_ETAG: Final = re.compile(r'\s*(?:"([a-z0-9]+:[0-9a-f]+)"|\*)\s*', re.ASCII)
_JSON: Final = ("Content-Type", "application/json")
# RFC 7234, section 5.5.1; its successor has no other header to say so.
_STALE: Final = ("Warning", '110 swarmpull "Response is Stale"')


async def answer_base(_: Call) -> Response:
    """GET /v2/: yes, this is a registry."""
    return Response(200, (_JSON,), b"{}")


# --- manifests --------------------------------------------------------------------------------


async def get_manifest(call: Call) -> Response:
    """The manifest exactly as it was pushed, whatever the client accepts.

    Raises ManifestNotFound, InvalidDigest.
    """
    repository, reference = call.route.repository, _existing_reference(call)
    stored = await call.service.get_manifest(repository, reference, upstream=call.upstream)
    headers = _manifest_headers(stored.descriptor)
    if _is_known(call.request, stored.descriptor):
        return Response(304, headers)
    return Response(200, headers, stored.content)


async def head_manifest(call: Call) -> Response:
    """What GET would answer, without fetching content.  Raises ManifestNotFound, InvalidDigest."""
    repository, reference = call.route.repository, _existing_reference(call)
    descriptor = await call.service.resolve(repository, reference, upstream=call.upstream)
    headers = _manifest_headers(descriptor)
    if _is_known(call.request, descriptor):
        return Response(304, headers)
    return Response(200, (*headers, ("Content-Length", str(descriptor.length))))


async def put_manifest(call: Call) -> Response:
    """Push a manifest under a tag or its digest, and under each ``tag=`` of the query besides.

    ``If-Match: "DIGEST"`` (or ``*``): only if the tag is that manifest (or is there); ``If-None-Match: *``:
    only if it is not there.  What the tag is already it may be put to again: the answer may have been lost.

    Raises:
        TagChanged: it is not so.
        TagImmutable: the repository does not let it move.
        RegistryError: 413 for more than MANIFEST_BYTES_MAX, MANIFEST_INVALID for a tag outside the grammar,
            400 for another condition.
        InvalidDigest, DigestMismatch, ManifestInvalid, ManifestReferencesMissing, PushRefused: as they say.
    """
    repository, reference = call.route.repository, _new_reference(call.route.argument)
    tags = [_check_tag(tag) for tag in call.request.queries("tag")]
    terms = _terms(call, is_one_tag=isinstance(reference, str) and not tags)
    content = await _read_manifest(call.request)
    content_type = call.request.header("content-type") or ""
    # 4 MiB take half a second.
    manifest = await trio.to_thread.run_sync(parse_manifest, content, content_type)
    if isinstance(reference, Digest):
        manifest = under_digest(manifest, reference)
    await call.service.put_manifest(repository, str(reference), manifest, terms)
    for tag in tags:
        await call.service.put_manifest(repository, tag, manifest, terms)
    location = ("Location", f"/v2/{repository}/manifests/{manifest.digest}")
    digest = ("Docker-Content-Digest", str(manifest.digest))
    subject = () if manifest.subject is None else (("OCI-Subject", str(manifest.subject)),)
    return Response(201, (location, digest, *subject, *(("OCI-Tag", tag) for tag in tags)))


async def delete_manifest(call: Call) -> Response:
    """Remove a tag, or a manifest with its tags; a tag also on a condition, as it is put.

    Raises ManifestNotFound, InvalidDigest, TagChanged, TagImmutable, RegistryError.
    """
    repository, reference = call.route.repository, _existing_reference(call)
    terms = _terms(call, is_one_tag=":" not in reference)
    if ":" in reference:
        await call.service.delete_manifest(repository, Digest.parse(reference))
    else:
        await call.service.delete_tag(repository, reference, terms)
    return Response(202)


def _terms(call: Call, *, is_one_tag: bool) -> Terms:
    """Who asks, and the condition on which the one tag is changed.  Raises RegistryError for another one."""
    match, none_match = (call.request.header(name) for name in ("if-match", "if-none-match"))
    if match is None and none_match is None:
        return Terms(call.request.sender)
    if not is_one_tag:
        raise RegistryError(
            Code.UNSUPPORTED, 400, "If-Match and If-None-Match are for the change of one tag"
        )
    expect = _ONE_ETAG.fullmatch(match or "")
    if match is None and (none_match or "").strip() == "*":
        return Terms(call.request.sender, "")
    if none_match is not None or expect is None:
        raise RegistryError(
            Code.UNSUPPORTED,
            400,
            'a tag is changed on the condition If-Match: "DIGEST", If-Match: * or If-None-Match: *, '
            "and no other",
        )
    return Terms(call.request.sender, expect[1] or "*")


def _existing_reference(call: Call) -> str:
    """The reference of a request that only looks up: what is no tag cannot be there."""
    try:
        return str(parse_reference(call.route.argument))
    except ValueError as error:
        raise ManifestNotFound(call.route.repository, shorten(call.route.argument)) from error


def _new_reference(text: str) -> Digest | str:
    try:
        return parse_reference(text)
    except ValueError as error:
        raise _tag_invalid(text) from error


def _check_tag(text: str) -> str:
    if not is_tag(text):
        raise _tag_invalid(text)
    return text


def _tag_invalid(text: str) -> RegistryError:
    return RegistryError(
        Code.MANIFEST_INVALID,
        400,
        f"{shorten(text)!r} is not a tag: expected 1 to 128 letters, digits, '_', '.' or '-', "
        "not beginning with '.' or '-'",
    )


async def _read_manifest(request: Request) -> bytes:
    content = bytearray()
    if (request.content_length or 0) > MANIFEST_BYTES_MAX:
        raise _too_large()
    while chunk := await request.read():
        content += chunk
        if len(content) > MANIFEST_BYTES_MAX:
            raise _too_large()
    return bytes(content)


def _too_large() -> RegistryError:
    return RegistryError(
        Code.MANIFEST_INVALID, 413, f"manifests have {MANIFEST_BYTES_MAX} bytes at most"
    )


def _manifest_headers(descriptor: Descriptor) -> Headers:
    return (
        *((_STALE,) if descriptor.stale else ()),
        ("Content-Type", descriptor.media_type),
        ("Docker-Content-Digest", str(descriptor.digest)),
        ("ETag", f'"{descriptor.digest}"'),
    )


def _is_known(request: Request, descriptor: Descriptor) -> bool:
    return request.header("if-none-match") == f'"{descriptor.digest}"'


# --- listings ---------------------------------------------------------------------------------


async def list_tags(call: Call) -> Response:
    """One page of the tags of a repository.  Raises RepositoryNotFound."""
    repository = call.route.repository
    count, after = _page(call.request)
    # Asking for one even where none is wanted tells whether the repository exists.
    reply = await call.service.list_tags(repository, after=after, limit=max(count, 1))
    return _listing(f"/v2/{repository}/tags/list", {"name": repository}, "tags", reply, count)


async def tag_log(call: Call) -> Response:
    """The last changes of a tag, the latest first.  Raises ManifestNotFound, RepositoryNotFound."""
    repository, tag = call.route.repository, call.route.argument
    if not is_tag(tag):
        raise ManifestNotFound(repository, shorten(tag))
    changes = await call.service.tag_log(repository, tag)
    document = {
        "name": repository,
        "tag": tag,
        "changes": [_change(each) for each in changes[::-1]],
    }
    return Response(200, (_JSON,), json.dumps(document).encode())


def _change(change: TagChange) -> dict[str, Any]:
    """``time`` is in ns since 1970: the stamp by which changes are put in order."""
    return {
        "time": change.stamp.time,
        "source": change.stamp.source,
        "digest": None if change.digest is None else str(change.digest),
        "by": change.by,
    }


async def list_repositories(call: Call) -> Response:
    """One page of the repositories."""
    count, after = _page(call.request)
    reply = await call.service.list_repositories(after=after, limit=max(count, 1))
    return _listing("/v2/_catalog", {}, "repositories", reply, count)


def _page(request: Request) -> tuple[int, str]:
    text = request.query("n")
    if text is None:
        return PAGE_MAX, request.query("last") or ""
    if _COUNT.fullmatch(text) is None:
        raise RegistryError(
            Code.UNSUPPORTED, 400, f"n={shorten(text)!r} is not a number of results"
        )
    return min(int(text), PAGE_MAX), request.query("last") or ""


def _listing(
    path: str, document: dict[str, Any], key: str, reply: ListReply, count: int
) -> Response:
    names = reply.names[:count]
    headers: Headers = (_JSON,)
    if names and (reply.more or len(names) < len(reply.names)):
        query = urlencode({"n": count, "last": names[-1]})
        headers = (*headers, ("Link", f'<{path}?{query}>; rel="next"'))
    return Response(200, headers, json.dumps(document | {key: names}).encode())


async def list_referrers(call: Call) -> Response:
    """The manifests whose subject is this digest, as an index; empty when there are none.

    Raises InvalidDigest.
    """
    digest = Digest.parse(call.route.argument)
    referrers = await call.service.list_referrers(call.route.repository, digest)
    headers: Headers = (("Content-Type", OCI_INDEX),)
    wanted = call.request.query("artifactType")
    if wanted:
        # No media type has a blank; a client that did not escape the plus of "+json" meant a plus.
        wanted = wanted.replace(" ", "+")
        referrers = tuple(entry for entry in referrers if entry.artifact_type == wanted)
        headers = (*headers, ("OCI-Filters-Applied", "artifactType"))
    index = {
        "schemaVersion": 2,
        "mediaType": OCI_INDEX,
        "manifests": [_descriptor(entry) for entry in referrers],
    }
    return Response(200, headers, json.dumps(index).encode())


def _descriptor(entry: Descriptor) -> dict[str, Any]:
    document: dict[str, Any] = {
        "mediaType": entry.media_type,
        "digest": str(entry.digest),
        "size": entry.length,
    }
    if entry.artifact_type:
        document["artifactType"] = entry.artifact_type
    if entry.annotations:
        document["annotations"] = entry.annotations
    return document
