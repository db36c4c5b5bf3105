"""Manifests in the store of a role: blobs like any other, and what they are follows from their bytes."""

from __future__ import annotations

import trio

from swarmpull.digest import Digest
from swarmpull.errors import BlobNotFound, ManifestInvalid
from swarmpull.registry.manifests import MANIFEST_BYTES_MAX, parse_manifest
from swarmpull.registry.service import StoredManifest
from swarmpull.store.blobs import BlobStore
from swarmpull.wire.api import Descriptor


async def stored_manifest(store: BlobStore, digest: Digest) -> StoredManifest | None:
    """The manifest of a digest; None when the store has none, or what it has is no manifest."""
    try:
        with store.open(digest) as handle:
            if handle.length > MANIFEST_BYTES_MAX:
                return None
            content = await handle.read_at(0, handle.length)
        manifest = await trio.to_thread.run_sync(parse_manifest, content, "")
    except (BlobNotFound, ManifestInvalid):
        return None
    return StoredManifest(Descriptor(digest, manifest.media_type, len(content)), content)


async def stored_descriptor(store: BlobStore, digest: Digest) -> Descriptor | None:
    """What `stored_manifest` finds, without its content."""
    found = await stored_manifest(store, digest)
    return None if found is None else found.descriptor


async def store_manifest(store: BlobStore, digest: Digest, content: bytes) -> None:
    """Keep a manifest.  Raises DigestMismatch, StoreFull, StoreUnavailable."""
    async with store.create() as writer:
        await writer.write(content)
        await writer.commit(digest)
