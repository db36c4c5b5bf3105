"""What a registry must know of a manifest before it keeps it.  Pure: bytes in, `Manifest` out.

Four document types have a meaning here: image manifests and lists of them, each in the Docker form
("schema 2") and in the OCI form.  A document with another ``mediaType`` is kept as an artifact when it has
the shape of one of them.  The bytes are never changed.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final, NoReturn

import attrs

from swarmpull.digest import Digest
from swarmpull.errors import DigestMismatch, InvalidDigest, ManifestInvalid

# "Registries SHOULD limit manifests to 4 megabytes" (OCI distribution specification, "Pushing Manifests").
MANIFEST_BYTES_MAX: Final = 4 << 20

OCI_MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX: Final = "application/vnd.oci.image.index.v1+json"
DOCKER_MANIFEST: Final = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST: Final = "application/vnd.docker.distribution.manifest.list.v2+json"
_DOCKER_SCHEMA_1: Final = (
    "application/vnd.docker.distribution.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v1+prettyjws",
)
_SHAPES: Final = {
    OCI_MANIFEST: "layers",
    DOCKER_MANIFEST: "layers",
    OCI_INDEX: "manifests",
    DOCKER_LIST: "manifests",
}
# Content types that say nothing about the kind of manifest, so they contradict none.
_GENERIC_TYPES: Final = ("", "application/json")
# Layers that a client may leave where their `urls` point (Windows base images).
_FOREIGN_LAYERS: Final = (
    "application/vnd.docker.image.rootfs.foreign.diff.tar",
    "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
    "application/vnd.oci.image.layer.nondistributable.v1.tar",
    "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
    "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd",
)
# The build caches of BuildKit are indexes whose entries are layers and a config, not manifests.
_BLOB_TYPE_MARKS: Final = (".layer.", ".rootfs.", "config", "octet-stream")
_LENGTH_MAX: Final = (1 << 63) - 1
# It becomes a header of every answer.  Two restricted names and a slash (RFC 6838, section 4.2), and no
# less liberal than that: visible characters.
_MEDIA_TYPE: Final = re.compile(r"[!-~]{1,255}", re.ASCII)


@attrs.frozen
class Manifest:
    """A manifest that may be kept.

    Attributes:
        digest: of the content; SHA-256 unless it was pushed under another, see `under_digest`.
        media_type: what it is served as.
        content: exactly as pushed.
        blobs: config and layers that must be in the repository.
        manifests: entries of a list or index that must be in the repository.
        subject: the manifest that this one is attached to; need not exist.
        artifact_type: as referrers list it.
        annotations: as referrers list them.
    """

    digest: Digest
    media_type: str
    content: bytes = attrs.field(repr=False)
    blobs: tuple[Digest, ...] = ()
    manifests: tuple[Digest, ...] = ()
    subject: Digest | None = None
    artifact_type: str | None = None
    annotations: dict[str, str] = attrs.field(factory=dict)


@attrs.frozen
class _Entry:
    digest: Digest
    media_type: str
    elsewhere: bool


def parse_manifest(content: bytes, content_type: str) -> Manifest:
    """Check a manifest and find what it refers to.

    Args:
        content: the document.
        content_type: of the request, or empty when it had none.

    Raises:
        ManifestInvalid: the reason says which field is wrong.
    """
    document = _load(content)
    media_type = _media_type(document, content_type)
    if _shape(document, media_type) == "manifests":
        entries = _entries(document, "manifests")
        blobs = tuple(e.digest for e in entries if _is_blob(e.media_type))
        manifests = tuple(e.digest for e in entries if not _is_blob(e.media_type))
        artifact_type = _text(document, "artifactType")
    else:
        config = _entry(document.get("config"), "config")
        layers = _entries(document, "layers")
        blobs = tuple(e.digest for e in (config, *layers) if not e.elsewhere)
        manifests = ()
        # Referrers show the type of the config where a manifest has no type of its own.
        artifact_type = _text(document, "artifactType") or config.media_type
    return Manifest(
        digest=Digest.of(content),
        media_type=media_type,
        content=content,
        blobs=tuple(dict.fromkeys(blobs)),
        manifests=tuple(dict.fromkeys(manifests)),
        subject=_subject(document),
        artifact_type=artifact_type or None,
        annotations=_annotations(document),
    )


def under_digest(manifest: Manifest, digest: Digest) -> Manifest:
    """The same manifest under the digest by which it was pushed, of whatever algorithm.

    Raises:
        DigestMismatch: it is another manifest.
    """
    actual = Digest.of(manifest.content, digest.algorithm)
    if actual != digest:
        raise DigestMismatch(str(digest), str(actual))
    return attrs.evolve(manifest, digest=digest)


def _load(content: bytes) -> dict[str, Any]:
    if len(content) > MANIFEST_BYTES_MAX:
        raise ManifestInvalid(f"it has {len(content)} bytes, {MANIFEST_BYTES_MAX} are allowed")
    try:
        text = content.decode("utf-8")
        document = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
        # JSON escapes can spell half a surrogate pair, which no later message could carry.
        json.dumps(document, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ManifestInvalid("it is nested too deeply") from None
    except UnicodeError:
        raise ManifestInvalid("it is not UTF-8 text") from None
    except ValueError as error:
        raise ManifestInvalid(f"it is not JSON: {error}") from None
    if type(document) is not dict:
        raise ManifestInvalid("it is not a JSON object")
    return document


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Two readers may take different values of a repeated key: what was checked must be what is used.
    document: dict[str, Any] = {}
    for key, value in pairs:
        if key in document:
            raise ManifestInvalid(f"key {key!r:.80} appears twice in one object")
        document[key] = value
    return document


def _no_constant(text: str) -> NoReturn:
    raise ManifestInvalid(f"{text} is not JSON")


def _media_type(document: dict[str, Any], content_type: str) -> str:
    declared = content_type.partition(";")[0].strip().lower()
    own = _text(document, "mediaType")
    version = document.get("schemaVersion")
    if version == 1 or own in _DOCKER_SCHEMA_1 or declared in _DOCKER_SCHEMA_1:
        raise ManifestInvalid(
            "Docker image manifests of schema 1 are not supported: push with a client that writes "
            "schema 2 or OCI manifests"
        )
    if type(version) is not int or version != 2:
        raise ManifestInvalid("schemaVersion must be 2")
    media_type = own or (OCI_INDEX if "manifests" in document else OCI_MANIFEST)
    if _MEDIA_TYPE.fullmatch(media_type) is None:
        raise ManifestInvalid(f"mediaType {media_type!r:.80} cannot be sent as a Content-Type")
    if declared not in _GENERIC_TYPES and declared != media_type.lower():
        raise ManifestInvalid(
            f"Content-Type is {declared:.120} but the manifest is {media_type:.120}"
        )
    return media_type


def _shape(document: dict[str, Any], media_type: str) -> str:
    shapes = {shape for shape, mark in _MARKS.items() if any(key in document for key in mark)}
    if len(shapes) > 1:
        # Readers disagree on what such a document is (CVE-2021-41190).
        raise ManifestInvalid("it has both layers and manifests")
    if not shapes:
        raise ManifestInvalid(
            "it has neither config and layers (an image manifest) nor manifests (an index)"
        )
    shape = shapes.pop()
    if _SHAPES.get(media_type, shape) != shape:
        raise ManifestInvalid(f"it has {shape}, which does not fit its type {media_type}")
    return shape


_MARKS: Final = {"layers": ("config", "layers"), "manifests": ("manifests",)}


def _entries(document: dict[str, Any], key: str) -> tuple[_Entry, ...]:
    values = document.get(key, [])
    if type(values) is not list:
        raise ManifestInvalid(f"{key} is not a list")
    return tuple(_entry(value, f"{key}[{index}]") for index, value in enumerate(values))


def _entry(value: object, place: str) -> _Entry:
    if type(value) is not dict:
        raise ManifestInvalid(f"{place} is not a descriptor")
    size = value.get("size")
    if type(size) is not int or not 0 <= size <= _LENGTH_MAX:
        raise ManifestInvalid(f"{place}.size is not a number of bytes")
    digest = value.get("digest")
    try:
        parsed = Digest.parse(digest if type(digest) is str else "")
    except InvalidDigest as error:
        raise ManifestInvalid(f"{place}.digest: {error}") from error
    media_type = _text(value, "mediaType", place)
    urls = value.get("urls", [])
    if type(urls) is not list or not all(type(url) is str for url in urls):
        raise ManifestInvalid(f"{place}.urls is not a list of texts")
    return _Entry(parsed, media_type, bool(urls) and media_type in _FOREIGN_LAYERS)


def _is_blob(media_type: str) -> bool:
    return media_type not in _SHAPES and any(mark in media_type for mark in _BLOB_TYPE_MARKS)


def _subject(document: dict[str, Any]) -> Digest | None:
    subject = document.get("subject")
    return None if subject is None else _entry(subject, "subject").digest


def _text(document: dict[str, Any], key: str, place: str = "") -> str:
    value = document.get(key, "")
    if type(value) is not str:
        raise ManifestInvalid(f"{place + '.' if place else ''}{key} is not a text")
    return value


def _annotations(document: dict[str, Any]) -> dict[str, str]:
    annotations = document.get("annotations")
    if annotations is None:
        return {}
    if type(annotations) is not dict or any(type(v) is not str for v in annotations.values()):
        raise ManifestInvalid("annotations is not a map of texts")
    return annotations
