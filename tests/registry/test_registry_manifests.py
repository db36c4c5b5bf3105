"""Which documents are manifests, and what a registry reads in them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmpull.digest import Digest
from swarmpull.errors import ManifestInvalid
from swarmpull.registry.manifests import (
    DOCKER_LIST,
    DOCKER_MANIFEST,
    MANIFEST_BYTES_MAX,
    OCI_INDEX,
    OCI_MANIFEST,
    parse_manifest,
)

from .images import CONFIG_TYPE, LAYER_TYPE, descriptor, make_image, make_index

CONFIG = descriptor(b"config", CONFIG_TYPE)
LAYER = descriptor(b"layer", LAYER_TYPE)
CHILD = descriptor(b"child", OCI_MANIFEST)
FOREIGN_TYPE = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"


def document(**fields: Any) -> bytes:
    image = {"schemaVersion": 2, "config": CONFIG, "layers": [LAYER], **fields}
    return json.dumps({key: value for key, value in image.items() if value is not None}).encode()


def index(*entries: Any, **fields: Any) -> bytes:
    return json.dumps({"schemaVersion": 2, "manifests": list(entries), **fields}).encode()


def digest_of(entry: dict[str, Any]) -> Digest:
    return Digest.parse(entry["digest"])


def test_an_image_manifest_refers_to_its_config_and_layers() -> None:
    image = make_image(10, 20, annotations={"a": "b"})
    manifest = parse_manifest(image.manifest, OCI_MANIFEST)
    assert manifest.digest == image.digest
    assert manifest.content == image.manifest
    assert manifest.blobs == (image.config, *image.layers)
    assert manifest.manifests == ()
    assert manifest.subject is None
    assert manifest.artifact_type == CONFIG_TYPE
    assert manifest.annotations == {"a": "b"}


def test_an_index_refers_to_its_children() -> None:
    children = make_image(1, seed=1), make_image(1, seed=2)
    manifest = parse_manifest(make_index(*children).manifest, OCI_INDEX)
    assert manifest.media_type == OCI_INDEX
    assert manifest.manifests == tuple(child.digest for child in children)
    assert manifest.blobs == ()
    assert manifest.artifact_type is None


@pytest.mark.parametrize(
    ("content", "content_type", "media_type"),
    [
        (document(mediaType=OCI_MANIFEST), OCI_MANIFEST, OCI_MANIFEST),
        (document(mediaType=OCI_MANIFEST), OCI_MANIFEST + "; charset=utf-8", OCI_MANIFEST),
        (document(mediaType=DOCKER_MANIFEST), DOCKER_MANIFEST, DOCKER_MANIFEST),
        (document(mediaType=DOCKER_MANIFEST), "", DOCKER_MANIFEST),
        (document(mediaType=DOCKER_MANIFEST), "application/json", DOCKER_MANIFEST),
        (document(), OCI_MANIFEST, OCI_MANIFEST),
        (document(), "", OCI_MANIFEST),
        (document(layers=None), "", OCI_MANIFEST),
        (index(CHILD), "", OCI_INDEX),
        (index(), "", OCI_INDEX),
        (index(CHILD, mediaType=DOCKER_LIST), DOCKER_LIST, DOCKER_LIST),
        (document(mediaType="application/vnd.example+json"), "", "application/vnd.example+json"),
    ],
)
def test_the_media_type_is_the_documents_own_or_that_of_its_shape(
    content: bytes, content_type: str, media_type: str
) -> None:
    assert parse_manifest(content, content_type).media_type == media_type


@pytest.mark.parametrize(
    ("content", "content_type", "reason"),
    [
        (document(mediaType=OCI_MANIFEST), DOCKER_MANIFEST, "Content-Type is"),
        (document(mediaType=OCI_MANIFEST), OCI_INDEX, "Content-Type is"),
        (document(), DOCKER_MANIFEST, "Content-Type is"),
        (document(), "text/plain", "Content-Type is"),
        (document(mediaType=OCI_INDEX), "", "does not fit its type"),
        (index(CHILD, mediaType=OCI_MANIFEST), "", "does not fit its type"),
        (document(manifests=[]), "", "both layers and manifests"),
        (document(config=None, manifests=[], mediaType=OCI_INDEX), "", "both layers"),
        (b'{"schemaVersion": 2}', "", "neither"),
        (b'{"schemaVersion": 2, "blobs": []}', "", "neither"),
        (document(schemaVersion=None), "", "schemaVersion"),
        (document(schemaVersion=True), "", "schema"),
        (document(schemaVersion="2"), "", "schemaVersion"),
        (document(schemaVersion=3), "", "schemaVersion"),
        (b"", "", "not JSON"),
        (b"{", "", "not JSON"),
        (b"[]", "", "not a JSON object"),
        (b"null", "", "not a JSON object"),
        (b"\xff\xfe", "", "UTF-8"),
        (b'\xef\xbb\xbf{"schemaVersion": 2}', "", "not JSON"),
        ('{"schemaVersion": 2}'.encode("utf-16"), "", "UTF-8"),
        (document(annotations={"a": "\ud800"}), "", "UTF-8"),
        (b'{"schemaVersion": NaN}', "", "NaN"),
        (b"[" * 100_000, "", "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "", "not JSON"),
        (document().replace(b'"layers"', b'"config": {}, "layers"'), "", "appears twice"),
        (
            document(annotations=1).replace(b'ns": 1', b'ns": {"x": "1", "x": "2"}'),
            "",
            "'x' appears twice",
        ),
        (document(config=None), "", "config is not a descriptor"),
        (document(config=[]), "", "config is not a descriptor"),
        (document(layers={}), "", "layers is not a list"),
        (document(layers=[None]), "", "layers[0] is not a descriptor"),
        (document(layers=[LAYER, {**LAYER, "size": None}]), "", "layers[1].size"),
        (document(layers=[{**LAYER, "size": -1}]), "", "layers[0].size"),
        (document(layers=[{**LAYER, "size": 1.5}]), "", "layers[0].size"),
        (document(layers=[{**LAYER, "size": True}]), "", "layers[0].size"),
        (document(layers=[{**LAYER, "size": 1 << 63}]), "", "layers[0].size"),
        (document(layers=[{**LAYER, "digest": "sha256:abc"}]), "", "layers[0].digest"),
        (document(layers=[{**LAYER, "digest": 1}]), "", "layers[0].digest"),
        (document(layers=[{**LAYER, "digest": "../../etc/passwd"}]), "", "layers[0].digest"),
        (document(layers=[{**LAYER, "mediaType": 1}]), "", "layers[0].mediaType"),
        (document(layers=[{**LAYER, "urls": "http://x"}]), "", "layers[0].urls"),
        (document(layers=[{**LAYER, "urls": [1]}]), "", "layers[0].urls"),
        (document(subject={"digest": "x"}), "", "subject"),
        (document(subject=[]), "", "subject"),
        (document(annotations=[]), "", "annotations"),
        (document(annotations={"a": 1}), "", "annotations"),
        (document(artifactType=1), "", "artifactType"),
        (document(mediaType=1), "", "mediaType"),
        (document(mediaType="a/b\r\nX-Injected: yes"), "application/json", "Content-Type"),
        (document(mediaType="a/b\x00"), "", "Content-Type"),
        (document(mediaType=" a/b"), "", "Content-Type"),
        (document(mediaType="é/b"), "", "Content-Type"),
        (document(mediaType="a/" + "b" * 300), "", "Content-Type"),
        (index({**CHILD, "size": -1}), "", "manifests[0].size"),
        (b" " * (MANIFEST_BYTES_MAX + 1), "", "bytes"),
    ],
)
def test_what_is_no_manifest_is_refused_with_the_reason(
    content: bytes, content_type: str, reason: str
) -> None:
    with pytest.raises(ManifestInvalid) as caught:
        parse_manifest(content, content_type)
    assert reason in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("content", "content_type"),
    [
        (b'{"schemaVersion": 1, "fsLayers": []}', ""),
        (document(), "application/vnd.docker.distribution.manifest.v1+prettyjws"),
        (document(mediaType="application/vnd.docker.distribution.manifest.v1+json"), ""),
    ],
)
def test_docker_schema_1_is_refused_with_what_to_do(content: bytes, content_type: str) -> None:
    with pytest.raises(ManifestInvalid, match="schema 1 are not supported: push with a client"):
        parse_manifest(content, content_type)


def test_a_foreign_layer_may_stay_where_its_urls_point() -> None:
    foreign = descriptor(b"base", FOREIGN_TYPE, urls=["https://example.org/base"])
    manifest = parse_manifest(document(layers=[foreign, LAYER]), "")
    assert manifest.blobs == (digest_of(CONFIG), digest_of(LAYER))


@pytest.mark.parametrize(
    "layer",
    [
        descriptor(b"base", FOREIGN_TYPE),
        descriptor(b"base", FOREIGN_TYPE, urls=[]),
        descriptor(b"base", LAYER_TYPE, urls=["https://example.org/base"]),
    ],
)
def test_any_other_layer_must_be_in_the_registry(layer: dict[str, Any]) -> None:
    assert digest_of(layer) in parse_manifest(document(layers=[layer]), "").blobs


def test_a_blob_that_is_named_twice_is_required_once() -> None:
    manifest = parse_manifest(document(layers=[LAYER, LAYER, LAYER]), "")
    assert manifest.blobs == (digest_of(CONFIG), digest_of(LAYER))


def test_a_build_cache_index_refers_to_blobs() -> None:
    cache = descriptor(b"cache", "application/vnd.buildkit.cacheconfig.v0")
    manifest = parse_manifest(index(LAYER, cache, CHILD), OCI_INDEX)
    assert manifest.blobs == (digest_of(LAYER), digest_of(cache))
    assert manifest.manifests == (digest_of(CHILD),)


def test_an_artifact_has_its_own_type_and_its_subject() -> None:
    subject = descriptor(b"image", OCI_MANIFEST)
    content = document(artifactType="application/vnd.example.sbom", subject=subject)
    manifest = parse_manifest(content, OCI_MANIFEST)
    assert manifest.artifact_type == "application/vnd.example.sbom"
    assert manifest.subject == digest_of(subject)
    assert manifest.subject not in manifest.manifests


def test_an_index_may_be_an_artifact_too() -> None:
    subject = descriptor(b"image", OCI_MANIFEST)
    manifest = parse_manifest(index(artifactType="application/x", subject=subject), OCI_INDEX)
    assert (manifest.artifact_type, manifest.subject) == ("application/x", digest_of(subject))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)
FIELDS = st.sampled_from(
    ["schemaVersion", "mediaType", "config", "layers", "manifests", "subject", "annotations"]
)


@given(st.dictionaries(FIELDS, JSON))
def test_any_json_is_a_manifest_or_refused(fields: dict[str, Any]) -> None:
    content = json.dumps({"schemaVersion": 2, "config": CONFIG, "layers": [LAYER], **fields})
    try:
        manifest = parse_manifest(content.encode(), "")
    except ManifestInvalid:
        return
    assert manifest.media_type
    assert manifest.content == content.encode()


@given(st.binary(max_size=200), st.text(max_size=20))
def test_any_bytes_are_refused_and_nothing_else_happens(content: bytes, content_type: str) -> None:
    with pytest.raises(ManifestInvalid):
        parse_manifest(content, content_type)


@given(st.lists(st.binary(max_size=20), max_size=6), st.binary(max_size=20))
def test_a_manifest_refers_to_exactly_what_it_names(layers: list[bytes], config: bytes) -> None:
    content = document(
        config=descriptor(config, CONFIG_TYPE),
        layers=[descriptor(layer, LAYER_TYPE) for layer in layers],
    )
    manifest = parse_manifest(content, OCI_MANIFEST)
    assert set(manifest.blobs) == {Digest.of(blob) for blob in (config, *layers)}
    assert len(set(manifest.blobs)) == len(manifest.blobs)
