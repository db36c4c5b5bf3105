"""All that an image consists of: its manifests, through lists and indexes, and their blobs."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any, Final

import attrs

from swarmpull.digest import Digest
from swarmpull.errors import ManifestInvalid
from swarmpull.registry.manifests import parse_manifest
from swarmpull.wire.preheat_api import Part

DEPTH_MAX: Final = 4
MANIFESTS_MAX: Final = 500
BLOBS_MAX: Final = 5000


@attrs.frozen
class Tree:
    """What an image consists of; nothing in it twice, children before their parents."""

    manifests: tuple[Part, ...]
    blobs: tuple[Part, ...]

    @property
    def length(self) -> int:
        """Bytes of all of it."""
        return sum(part.length for part in (*self.manifests, *self.blobs))


@attrs.frozen
class References:
    """What one manifest refers to."""

    manifests: tuple[Part, ...]
    blobs: tuple[Part, ...]


def references_of(content: bytes, platform: str = "") -> References:
    """What a manifest refers to; of a list or index only what is for ``platform`` (os/architecture), if any.

    Raises ManifestInvalid.
    """
    manifest = parse_manifest(content, "")
    children, blobs = set(manifest.manifests), set(manifest.blobs)
    document = json.loads(content)
    entries = [*document.get("manifests", []), *document.get("layers", [])]
    if "config" in document:
        entries.append(document["config"])
    wanted = [entry for entry in entries if _is_for(entry, platform)]
    parts = {Digest.parse(entry["digest"]): entry["size"] for entry in wanted}
    return References(
        tuple(Part(digest, size) for digest, size in parts.items() if digest in children),
        tuple(Part(digest, size) for digest, size in parts.items() if digest in blobs),
    )


def _is_for(entry: dict[str, Any], platform: str) -> bool:
    stated = entry.get("platform")
    if not platform or not isinstance(stated, dict):
        return True
    return platform == "/".join(str(stated.get(key, "")) for key in ("os", "architecture"))


async def read_tree(
    root: Part, content: bytes, read: Callable[[Digest], Awaitable[bytes]], platform: str = ""
) -> Tree:
    """Walk an image from its manifest down.

    Args:
        root, content: its manifest.
        read: another manifest of the same repository.
        platform: see `references_of`.

    Raises:
        ManifestInvalid: something is no manifest, or there is more than an image may have.
        SwarmpullError: what ``read`` raises.
    """
    manifests: dict[Digest, int] = {}
    blobs: dict[Digest, int] = {}

    async def visit(part: Part, content: bytes, above: tuple[Digest, ...]) -> None:
        if part.digest in above:
            raise ManifestInvalid(f"{part.digest} refers to itself")
        if len(above) >= DEPTH_MAX:
            raise ManifestInvalid(f"indexes are nested more than {DEPTH_MAX} deep")
        found = references_of(content, platform)
        blobs.update((each.digest, each.length) for each in found.blobs)
        for child in found.manifests:
            if child.digest not in manifests:
                await visit(child, await read(child.digest), (*above, part.digest))
        manifests[part.digest] = part.length
        if len(manifests) > MANIFESTS_MAX or len(blobs) > BLOBS_MAX:
            raise ManifestInvalid(
                f"the image has more than {MANIFESTS_MAX} manifests or {BLOBS_MAX} blobs"
            )

    await visit(root, content, ())
    return Tree(_parts(manifests), _parts(blobs))


def _parts(found: dict[Digest, int]) -> tuple[Part, ...]:
    return tuple(Part(digest, length) for digest, length in found.items())
