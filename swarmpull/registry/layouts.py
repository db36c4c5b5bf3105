"""Whole images between a registry and an OCI image layout directory.

The layout is that of the OCI image specification ("OCI Image Layout Specification"):
``oci-layout``, ``index.json`` and ``blobs/<algorithm>/<hex>``.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import attrs
import trio

from swarmpull.digest import Digest
from swarmpull.errors import DigestMismatch, InvalidDigest, ManifestInvalid, SwarmpullError
from swarmpull.registry.client import Progress, RegistryClient, file_at, hash_file
from swarmpull.registry.manifests import (
    DOCKER_LIST,
    DOCKER_MANIFEST,
    MANIFEST_BYTES_MAX,
    OCI_INDEX,
    OCI_MANIFEST,
    Manifest,
    parse_manifest,
)
from swarmpull.registry.names import is_repository, is_tag

_MANIFEST_TYPES: Final = (OCI_MANIFEST, OCI_INDEX, DOCKER_MANIFEST, DOCKER_LIST)
_REF_NAME: Final = "org.opencontainers.image.ref.name"
_LAYOUT: Final = b'{"imageLayoutVersion":"1.0.0"}'
# An index in an index is legal; this deep it is an attack or a mistake.
_DEPTH_MAX: Final = 8
# As many blobs under way at the same time as container runtimes have by default.
_PARALLEL: Final = 3

# Makes the progress of one blob from its name.
ProgressOf = Callable[[str], Progress]


@attrs.define(slots=False)
class InvalidImageName(SwarmpullError):
    """The text names no image."""

    text: str

    def __str__(self) -> str:
        return (
            f"{self.text!r} is not an image: expected NAME[:TAG], NAME@DIGEST or "
            "HOST:PORT/NAME[:TAG], with the name in lower case"
        )


@attrs.define(slots=False)
class LayoutInvalid(SwarmpullError):
    """A directory is not the image layout that is needed."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@attrs.frozen
class ImageName:
    """An image as people write it.

    Attributes:
        registry: ``host:port`` when the text began with one, else None.
        repository: its name.
        reference: tag or digest; ``latest`` when there was none.
    """

    registry: str | None
    repository: str
    reference: str

    @classmethod
    def parse(cls, text: str) -> ImageName:
        """Parse ``[host:port/]name[:tag][@digest]``; a digest makes the tag irrelevant.

        Raises:
            InvalidImageName, InvalidDigest.
        """
        name, at, digest = text.partition("@")
        host, slash, path = name.partition("/")
        # A repository name holds no colon, so one before the first slash belongs to an address.
        registry = host if slash and ":" in host else None
        repository, colon, tag = (path if registry else name).partition(":")
        if at:
            Digest.parse(digest)
        if not is_repository(repository) or (colon and not is_tag(tag)):
            raise InvalidImageName(text)
        return cls(registry, repository, digest or tag or "latest")

    @property
    def path(self) -> str:
        """Of the manifest, in the registry API."""
        return f"/v2/{self.repository}/manifests/{self.reference}"


# --- layouts --------------------------------------------------------------------------------------


@attrs.frozen
class Layout:
    """An OCI image layout directory."""

    root: Path

    def blob(self, digest: Digest) -> Path:
        """Where a blob is, or goes."""
        return self.root / "blobs" / digest.algorithm / digest.hex

    def check(self) -> None:
        """Raise LayoutInvalid when the directory holds something other than an image layout."""
        if self.root.exists() and not self.root.is_dir():
            raise LayoutInvalid(str(self.root), "is a file, name a directory for the image")
        if self._marker.exists() or not self.root.exists():
            return
        if any(self.root.iterdir()):
            raise LayoutInvalid(
                str(self.root), "is neither empty nor an image layout, name another directory"
            )

    def create(self) -> None:
        """Make an empty layout, or take an existing one.  Raises LayoutInvalid."""
        self.check()
        if not self._marker.exists():
            self.root.mkdir(parents=True, exist_ok=True)
            _write(self._marker, _LAYOUT)

    @property
    def _marker(self) -> Path:
        return self.root / "oci-layout"

    def entries(self) -> list[dict[str, Any]]:
        """The manifests that ``index.json`` lists; none when there is no such file.

        Raises:
            LayoutInvalid.
        """
        path = self.root / "index.json"
        try:
            entries = json.loads(path.read_bytes())["manifests"]
        except FileNotFoundError:
            return []
        except (ValueError, KeyError, TypeError) as exc:
            raise LayoutInvalid(str(path), "is not the index of an image layout") from exc
        if not isinstance(entries, list) or not all(isinstance(each, dict) for each in entries):
            raise LayoutInvalid(str(path), "is not the index of an image layout")
        return entries

    def add(self, manifest: Manifest, tag: str | None) -> None:
        """List a manifest in ``index.json``; an earlier one of the same tag is replaced."""
        entry: dict[str, Any] = {
            "mediaType": manifest.media_type,
            "digest": str(manifest.digest),
            "size": len(manifest.content),
        }
        if tag is not None:
            entry["annotations"] = {_REF_NAME: tag}
        kept = [other for other in self.entries() if _name(other) != _name(entry)]
        index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [*kept, entry]}
        _write(self.root / "index.json", json.dumps(index, indent=2).encode())

    def write(self, manifest: Manifest) -> None:
        """Store the bytes of a manifest."""
        path = self.blob(manifest.digest)
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, manifest.content)

    def read(self, digest: Digest, media_type: str) -> Manifest:
        """A manifest of the layout, verified.

        Raises:
            LayoutInvalid, DigestMismatch, ManifestInvalid.
        """
        try:
            content = self.blob(digest).read_bytes()
        except FileNotFoundError as exc:
            raise LayoutInvalid(str(self.root), f"lacks the manifest {digest}") from exc
        return _verified(content, media_type, digest)

    def select(self, tag: str) -> tuple[Digest, str]:
        """(digest, media type) of the only image, or of the one that is named ``tag``.

        Raises:
            LayoutInvalid: there is none, or it is not clear which.
        """
        entries = self.entries()
        if len(entries) > 1:
            entries = [entry for entry in entries if _name(entry) == tag]
        if len(entries) != 1:
            names = sorted(_name(entry) for entry in self.entries())
            found = f"it holds {', '.join(names)}" if names else "it lists no image"
            raise LayoutInvalid(str(self.root), f"cannot tell which image is meant: {found}")
        try:
            return Digest.parse(str(entries[0].get("digest"))), str(entries[0].get("mediaType", ""))
        except InvalidDigest as exc:
            raise LayoutInvalid(str(self.root / "index.json"), str(exc)) from exc


def _name(entry: dict[str, Any]) -> str:
    """The name of an entry of ``index.json``: what it is annotated with, else its digest."""
    annotations = entry.get("annotations")
    name = annotations.get(_REF_NAME) if isinstance(annotations, dict) else None
    return name if isinstance(name, str) else str(entry.get("digest"))


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _verified(content: bytes, media_type: str, digest: Digest | None) -> Manifest:
    """Raises DigestMismatch, ManifestInvalid."""
    if digest is not None:
        actual = Digest.of(content, digest.algorithm)
        if actual != digest:
            raise DigestMismatch(str(digest), str(actual))
    manifest = parse_manifest(content, media_type)
    # A sha512 name stays the name under which the rest of the image refers to it.
    return attrs.evolve(manifest, digest=digest) if digest is not None else manifest


def _child_types(manifest: Manifest) -> dict[str, str]:
    """digest -> media type of the entries of an index."""
    entries = json.loads(manifest.content).get("manifests", [])
    return {entry["digest"]: entry.get("mediaType", "") for entry in entries}


# --- pull -----------------------------------------------------------------------------------------


async def pull_image(
    client: RegistryClient, image: ImageName, directory: Path, progress: ProgressOf
) -> Manifest:
    """Write an image with everything it refers to into the layout at ``directory``.

    Blobs that the layout has already are verified and kept.  ``index.json`` lists the image last,
    when all of it is there.

    Raises:
        LayoutInvalid, ServerUnavailable, RequestRefused, UnexpectedAnswer, DigestMismatch,
        LengthMismatch, ManifestInvalid.
    """
    layout = Layout(directory)
    layout.check()
    manifests: list[Manifest] = []
    await _collect(client, image, manifests, depth=0)
    layout.create()
    blobs = dict.fromkeys(blob for manifest in manifests for blob in manifest.blobs)
    pull = partial(_pull_blob, client, layout, image.repository, progress)
    await _in_parallel(pull, tuple(blobs))
    for manifest in manifests:
        layout.write(manifest)
    top = manifests[0]
    layout.add(top, None if ":" in image.reference else image.reference)
    return top


async def _collect(
    client: RegistryClient, image: ImageName, manifests: list[Manifest], *, depth: int
) -> None:
    """Fetch a manifest and all manifests below it, parents first, each once."""
    if depth > _DEPTH_MAX:
        raise ManifestInvalid(f"indexes are nested more than {_DEPTH_MAX} deep in {image.path}")
    digest = Digest.parse(image.reference) if ":" in image.reference else None
    if digest is not None and any(known.digest == digest for known in manifests):
        return
    document = await client.get_document(
        image.path, accept=_MANIFEST_TYPES, limit=MANIFEST_BYTES_MAX
    )
    if digest is None and (claimed := document.headers.get("Docker-Content-Digest")):
        digest = Digest.parse(claimed)
    manifest = _verified(document.content, document.content_type, digest)
    manifests.append(manifest)
    for child in manifest.manifests:
        name = attrs.evolve(image, reference=str(child))
        await _collect(client, name, manifests, depth=depth + 1)


async def _pull_blob(
    client: RegistryClient, layout: Layout, repository: str, progress: ProgressOf, digest: Digest
) -> None:
    path = layout.blob(digest)
    path.parent.mkdir(parents=True, exist_ok=True)
    watch = progress(str(digest))
    if path.exists():
        known = await hash_file(path, algorithm=digest.algorithm, progress=watch)
        if known == digest:
            return
    with file_at(path, digest) as sink:
        await client.get_blob(f"/v2/{repository}/blobs/{digest}", sink, progress=watch)


async def _in_parallel(
    work: Callable[[Digest], Awaitable[None]], digests: tuple[Digest, ...]
) -> None:
    limiter = trio.CapacityLimiter(_PARALLEL)

    async def one(digest: Digest) -> None:
        async with limiter:
            await work(digest)

    async with trio.open_nursery() as nursery:
        for digest in digests:
            nursery.start_soon(one, digest)


# --- push -----------------------------------------------------------------------------------------


async def push_image(
    client: RegistryClient, directory: Path, image: ImageName, progress: ProgressOf
) -> Manifest:
    """Push an image of the layout at ``directory``; blobs before manifests before the tag.

    Raises:
        LayoutInvalid, ServerUnavailable, RequestRefused, UnexpectedAnswer, DigestMismatch,
        ManifestInvalid.
    """
    layout = Layout(directory)
    if not (layout.root / "oci-layout").exists():
        raise LayoutInvalid(str(directory), "is not an OCI image layout: it has no file oci-layout")
    digest, media_type = layout.select(image.reference)
    top = layout.read(digest, media_type)
    await _push_tree(client, layout, image, top, progress, depth=0)
    return top


async def _push_tree(
    client: RegistryClient,
    layout: Layout,
    image: ImageName,
    manifest: Manifest,
    progress: ProgressOf,
    *,
    depth: int,
) -> None:
    if depth > _DEPTH_MAX:
        raise ManifestInvalid(f"indexes are nested more than {_DEPTH_MAX} deep in {layout.root}")
    types = _child_types(manifest)
    for digest in manifest.manifests:
        child = layout.read(digest, types.get(str(digest), ""))
        name = attrs.evolve(image, reference=str(digest))
        await _push_tree(client, layout, name, child, progress, depth=depth + 1)
    push = partial(_push_blob, client, layout, image.repository, progress)
    await _in_parallel(push, manifest.blobs)
    await client.put_manifest(image.path, manifest.content, manifest.media_type)


async def _push_blob(
    client: RegistryClient, layout: Layout, repository: str, progress: ProgressOf, digest: Digest
) -> None:
    if await client.exists(f"/v2/{repository}/blobs/{digest}"):
        return
    path = layout.blob(digest)
    if not path.is_file():
        raise LayoutInvalid(str(layout.root), f"lacks the blob {digest}")
    await client.upload_blob(repository, digest, path, progress=progress(str(digest)))
