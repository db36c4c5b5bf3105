"""Images for the tests, in memory."""

from __future__ import annotations

import json
import random
from typing import Any

import attrs

from swarmpull.digest import Digest
from swarmpull.registry.manifests import OCI_INDEX, OCI_MANIFEST

CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar+gzip"


@attrs.frozen
class Image:
    """An image: its manifest and the blobs that this refers to, the config first."""

    manifest: bytes = attrs.field(repr=False)
    blobs: tuple[bytes, ...] = attrs.field(repr=False)
    media_type: str = OCI_MANIFEST

    @property
    def digest(self) -> Digest:
        return Digest.of(self.manifest)

    @property
    def config(self) -> Digest:
        return Digest.of(self.blobs[0])

    @property
    def layers(self) -> tuple[Digest, ...]:
        return tuple(Digest.of(blob) for blob in self.blobs[1:])


def descriptor(content: bytes, media_type: str, **fields: Any) -> dict[str, Any]:
    return {
        "mediaType": media_type,
        "digest": str(Digest.of(content)),
        "size": len(content),
        **fields,
    }


def make_image(*layer_sizes: int, seed: int = 0, **fields: Any) -> Image:
    """An OCI image with random layers; ``fields`` go into the manifest, None leaves one out."""
    source = random.Random(seed)
    config = json.dumps({"architecture": "amd64", "os": "linux", "seed": seed}).encode()
    layers = tuple(source.randbytes(size) for size in layer_sizes)
    document = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": descriptor(config, CONFIG_TYPE),
        "layers": [descriptor(layer, LAYER_TYPE) for layer in layers],
        **fields,
    }
    document = {key: value for key, value in document.items() if value is not None}
    media_type = document.get("mediaType", OCI_MANIFEST)
    return Image(json.dumps(document).encode(), (config, *layers), media_type)


def make_index(*images: Image, **fields: Any) -> Image:
    entries = [descriptor(image.manifest, image.media_type) for image in images]
    document = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries, **fields}
    return Image(json.dumps(document).encode(), (), OCI_INDEX)
