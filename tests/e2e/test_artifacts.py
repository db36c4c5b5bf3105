"""Artifacts that refer to an image: found through the referrers API of every role."""

from __future__ import annotations

import json

from . import web
from .program import Cluster

SIGNATURE = "application/vnd.example.signature.v1+json"
DOCUMENT = "application/vnd.example.document.v1+json"


def attach(port: int, repository: str, subject: bytes, kind: str, text: str) -> bytes:
    """Push an artifact about a manifest; returns its own manifest."""
    empty = b"{}"
    for content in (empty, text.encode()):
        assert web.push_blob(port, repository, content).status == 201
    manifest = {
        "schemaVersion": 2,
        "mediaType": web.OCI_MANIFEST,
        "artifactType": kind,
        "config": web.descriptor_of(empty, web.OCI_EMPTY),
        "layers": [web.descriptor_of(text.encode(), "text/plain")],
        "subject": web.descriptor_of(subject, web.OCI_MANIFEST),
        "annotations": {"org.example.text": text},
    }
    content = json.dumps(manifest).encode()
    answer = web.put_manifest(port, repository, web.digest_of(content), content)
    assert answer.status == 201, answer.text
    assert answer.headers["oci-subject"] == web.digest_of(subject)
    return content


def referrers(port: int, repository: str, digest: str, query: str = "") -> web.Answer:
    answer = web.request(port, "GET", f"/v2/{repository}/referrers/{digest}{query}")
    assert answer.status == 200, answer.text
    assert answer.headers["content-type"] == web.OCI_INDEX
    return answer


def test_what_refers_to_an_image_is_listed_with_its_type_and_annotations(cluster: Cluster) -> None:
    port, repository = cluster.first.registry, "team/referred"
    web.push_image(port, repository, "v1", [b"a layer"])
    subject = web.get_manifest(port, repository, "v1").body
    signature = attach(port, repository, subject, SIGNATURE, "signed")
    document = attach(port, repository, subject, DOCUMENT, "described")

    for place in (cluster.ports.origin_registry, *cluster.registries):
        listed = referrers(place, repository, web.digest_of(subject)).json()["manifests"]
        found = {entry["digest"]: entry for entry in listed}
        assert found.keys() == {web.digest_of(signature), web.digest_of(document)}
        entry = found[web.digest_of(signature)]
        assert entry["artifactType"] == SIGNATURE
        assert entry["size"] == len(signature)
        assert entry["annotations"] == {"org.example.text": "signed"}


def test_referrers_are_filtered_by_the_type_of_the_artifact(cluster: Cluster) -> None:
    port, repository = cluster.first.registry, "team/filtered"
    web.push_image(port, repository, "v1", [b"a layer"])
    subject = web.get_manifest(port, repository, "v1").body
    signature = attach(port, repository, subject, SIGNATURE, "signed")
    attach(port, repository, subject, DOCUMENT, "described")

    digest = web.digest_of(subject)
    answer = referrers(cluster.registries[1], repository, digest, f"?artifactType={SIGNATURE}")

    assert answer.headers["oci-filters-applied"] == "artifactType"
    assert [entry["digest"] for entry in answer.json()["manifests"]] == [web.digest_of(signature)]


def test_a_manifest_that_nothing_refers_to_has_an_empty_list(cluster: Cluster) -> None:
    digest = web.digest_of(b"a manifest that does not exist")

    for port in cluster.registries:
        assert referrers(port, "team/referred", digest).json()["manifests"] == []


def test_an_artifact_may_come_before_what_it_refers_to(cluster: Cluster) -> None:
    port, repository = cluster.first.registry, "team/early"
    subject = web.manifest_of(b"{}", [])
    early = attach(port, repository, subject, SIGNATURE, "signed before it was pushed")

    listed = referrers(port, repository, web.digest_of(subject)).json()["manifests"]

    assert [entry["digest"] for entry in listed] == [web.digest_of(early)]


def test_a_deleted_artifact_refers_to_nothing(cluster: Cluster) -> None:
    port, repository = cluster.first.registry, "team/withdrawn"
    web.push_image(port, repository, "v1", [b"a layer"])
    subject = web.get_manifest(port, repository, "v1").body
    signature = attach(port, repository, subject, SIGNATURE, "signed")

    target = f"/v2/{repository}/manifests/{web.digest_of(signature)}"
    assert web.request(port, "DELETE", target).status == 202

    for place in (cluster.ports.origin_registry, *cluster.registries):
        assert referrers(place, repository, web.digest_of(subject)).json()["manifests"] == []
