"""Complete metainfo beside the blobs of a backend: ``metainfo/<algorithm>/ab/<hex>``.

A cluster that lost every disk has all piece hashes at once, and verifies every range that it reads.  Nothing
depends on it: an object that is missing, damaged or of another blob is as good as none.
"""

from __future__ import annotations

from swarmpull.digest import Digest
from swarmpull.errors import BackendUnavailable, ObjectNotFound
from swarmpull.store import sidecars
from swarmpull.store.backends.base import Backend
from swarmpull.swarm.metainfo import BlobShape, Metainfo


def metainfo_key(digest: Digest) -> str:
    """Where the metainfo of a blob is."""
    return f"metainfo/{digest.algorithm}/{digest.hex[:2]}/{digest.hex}"


async def save_metainfo(backend: Backend, metainfo: Metainfo) -> None:
    """Store metainfo.  Raises BackendUnavailable."""
    await backend.put_bytes(metainfo_key(metainfo.digest), sidecars.encode(metainfo))


async def load_metainfo(backend: Backend, shape: BlobShape) -> Metainfo | None:
    """The metainfo of a blob of this shape; None when there is none that can be used."""
    try:
        content = await backend.get_bytes(metainfo_key(shape.digest))
        metainfo, _ = sidecars.decode(content)
    except (ObjectNotFound, BackendUnavailable, sidecars.DamagedSidecar):
        return None
    found = (metainfo.digest, metainfo.length, metainfo.piece_length)
    return metainfo if found == (shape.digest, shape.length, shape.piece_length) else None
