"""Plain HTTP as the tests need it: targets sent exactly as written, bodies verified while they flow."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import random
from collections.abc import Iterable, Mapping
from typing import Any, Final

import attrs

from tests.answers import Answer

READ_BYTES: Final = 1 << 20
OCI_MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX: Final = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG: Final = "application/vnd.oci.image.config.v1+json"
OCI_EMPTY: Final = "application/vnd.oci.empty.v1+json"
DOCKER_MANIFEST: Final = "application/vnd.docker.distribution.manifest.v2+json"
MANIFEST_TYPES: Final = f"{OCI_MANIFEST}, {OCI_INDEX}, {DOCKER_MANIFEST}"


def digest_of(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


@attrs.frozen
class Flow:
    """What streamed by: the body was hashed, not kept."""

    status: int
    headers: dict[str, str]
    digest: str
    length: int


@contextlib.contextmanager
def connection(port: int, *, timeout: float = 60.0) -> Iterable[http.client.HTTPConnection]:
    opened = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    with contextlib.closing(opened):
        yield opened


def request(
    port: int,
    method: str,
    target: str,
    *,
    headers: Mapping[str, str] | None = None,
    body: bytes | Iterable[bytes] | None = None,
    timeout: float = 60.0,
) -> Answer:
    with connection(port, timeout=timeout) as opened:
        opened.request(method, target, body=body, headers=dict(headers or {}))
        response = opened.getresponse()
        content = response.read()
        return Answer(response.status, lower_case(response), content)


def stream(port: int, target: str, *, headers: Mapping[str, str] | None = None) -> Flow:
    with connection(port) as opened:
        opened.request("GET", target, headers=dict(headers or {}))
        response = opened.getresponse()
        hasher, length = hashlib.sha256(), 0
        while chunk := response.read(READ_BYTES):
            hasher.update(chunk)
            length += len(chunk)
        digest = f"sha256:{hasher.hexdigest()}"
        return Flow(response.status, lower_case(response), digest, length)


def lower_case(response: http.client.HTTPResponse) -> dict[str, str]:
    return {name.lower(): value for name, value in response.getheaders()}


def path_of(location: str) -> str:
    """The target of a ``Location`` header, which may be absolute."""
    if "://" in location:
        location = "/" + location.split("/", 3)[3]
    return location


def with_digest(target: str, digest: str) -> str:
    return f"{target}{'&' if '?' in target else '?'}digest={digest}"


def random_bytes(length: int, seed: str) -> bytes:
    """Content that no compression shrinks, the same for the same seed."""
    source, block = random.Random(seed), 1 << 20
    return b"".join(source.randbytes(min(block, length - at)) for at in range(0, length, block))


def start_upload(port: int, repository: str) -> str:
    """Open an upload session; returns the target that takes its content."""
    answer = request(port, "POST", f"/v2/{repository}/blobs/uploads/")
    assert answer.status == 202, answer
    return path_of(answer.headers["location"])


def push_blob(port: int, repository: str, content: bytes, *, digest: str | None = None) -> Answer:
    """A session and one PUT, as containerd does; the answer of the PUT."""
    digest = digest_of(content) if digest is None else digest
    target = with_digest(start_upload(port, repository), digest)
    return request(
        port, "PUT", target, body=content, headers={"Content-Type": "application/octet-stream"}
    )


def put_manifest(
    port: int, repository: str, reference: str, content: bytes, media_type: str = OCI_MANIFEST
) -> Answer:
    target = f"/v2/{repository}/manifests/{reference}"
    return request(port, "PUT", target, body=content, headers={"Content-Type": media_type})


def get_manifest(port: int, repository: str, reference: str) -> Answer:
    target = f"/v2/{repository}/manifests/{reference}"
    return request(port, "GET", target, headers={"Accept": MANIFEST_TYPES})


def manifest_of(config: bytes, layers: Iterable[bytes], **more: Any) -> bytes:
    """An OCI image manifest over contents."""
    layer_type = "application/vnd.oci.image.layer.v1.tar"
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": descriptor_of(config, OCI_CONFIG),
        "layers": [descriptor_of(layer, layer_type) for layer in layers],
        **more,
    }
    return json.dumps(manifest, indent=1).encode()


def descriptor_of(content: bytes, media_type: str) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": digest_of(content), "size": len(content)}


def push_image(port: int, repository: str, tag: str, layers: Iterable[bytes]) -> str:
    """Push an image by plain HTTP; returns the digest of its manifest."""
    config = (
        b'{"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": []}}'
    )
    contents = [config, *layers]
    for content in contents:
        answer = push_blob(port, repository, content)
        assert answer.status == 201, answer
    manifest = manifest_of(config, contents[1:])
    answer = put_manifest(port, repository, tag, manifest)
    assert answer.status == 201, answer
    return digest_of(manifest)


def pull_image(port: int, repository: str, reference: str) -> str:
    """Pull an image by plain HTTP and verify all of it; returns the digest of its manifest."""
    answer = get_manifest(port, repository, reference)
    assert answer.status == 200, answer.text
    manifest = answer.json()
    for part in (manifest["config"], *manifest["layers"]):
        flow = stream(port, f"/v2/{repository}/blobs/{part['digest']}")
        assert (flow.status, flow.digest, flow.length) == (200, part["digest"], part["size"])
    return digest_of(answer.body)
