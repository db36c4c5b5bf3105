"""podman and buildah: layers compressed on the fly, docker schema 2, and lazily pulled images."""

from __future__ import annotations

import json

import pytest

from . import web
from .clients import Host, require, storage_driver
from .images import ImageFactory
from .program import Cluster
from .recording import recorded

pytestmark = pytest.mark.clients


@pytest.fixture(autouse=True)
def installed() -> None:
    # Without root they need ranges of user ids, which few machines are set up for.
    require("podman", "buildah", "skopeo", root=True)


def image_id(host: Host, name: str) -> str:
    """The digest of the config: what every client agrees on whatever it does with the layers."""
    return json.loads(host.podman("image", "inspect", name))[0]["Id"]


def test_podman_pushes_to_an_agent_and_other_hosts_pull_the_same_image(
    cluster: Cluster, images: ImageFactory, host: Host, other_host: Host
) -> None:
    image = images.small("podman")
    host.podman("pull", "--quiet", image.reference)
    name = f"127.0.0.1:{cluster.first.registry}/team/podman:v1"
    source = host.podman("image", "list", "--quiet", "--no-trunc").split()[0]
    host.podman("push", "--quiet", "--tls-verify=false", source, name)

    for port in cluster.registries[1:]:
        name = f"127.0.0.1:{port}/team/podman:v1"
        other_host.podman("pull", "--quiet", "--tls-verify=false", name)
        assert f"sha256:{image_id(other_host, name)}" == image.parts[0].digest


def test_buildah_pulls_what_skopeo_pushed_and_pushes_it_under_another_name(
    cluster: Cluster, images: ImageFactory, host: Host, other_host: Host
) -> None:
    image = images.small("buildah")
    host.push(image, cluster.first.registry, "team/buildah:v1")

    name = f"127.0.0.1:{cluster.registries[1]}/team/buildah:v1"
    copy = f"127.0.0.1:{cluster.first.registry}/other/buildah:v2"
    host.buildah("pull", "--quiet", "--tls-verify=false", name)
    host.buildah("push", "--quiet", "--tls-verify=false", name, f"docker://{copy}")

    name = f"127.0.0.1:{cluster.registries[2]}/other/buildah:v2"
    other_host.buildah("pull", "--quiet", "--tls-verify=false", name)
    assert f"sha256:{image_id(other_host, name)}" == image.parts[0].digest


def test_an_image_in_docker_schema_2_keeps_its_media_types(
    cluster: Cluster, images: ImageFactory, host: Host, other_host: Host
) -> None:
    host.buildah("pull", "--quiet", images.small("schema-2").reference)
    source = host.buildah("images", "--quiet", "--no-trunc").split()[0]
    target = f"docker://127.0.0.1:{cluster.first.registry}/team/schema-2:v1"
    pushing = ("push", "--quiet", "--tls-verify=false", "--format", "v2s2")
    host.buildah(*pushing, source, target)

    manifests = [web.get_manifest(port, "team/schema-2", "v1") for port in cluster.registries]
    assert {manifest.headers["content-type"] for manifest in manifests} == {web.DOCKER_MANIFEST}
    assert len({manifest.body for manifest in manifests}) == 1
    config = manifests[0].json()["config"]
    assert config["mediaType"] == "application/vnd.docker.container.image.v1+json"

    name = f"127.0.0.1:{cluster.registries[2]}/team/schema-2:v1"
    other_host.podman("pull", "--quiet", "--tls-verify=false", name)
    assert f"sha256:{image_id(other_host, name)}" == config["digest"]


def test_podman_pulls_a_zstd_chunked_image_by_ranges(
    cluster: Cluster, images: ImageFactory, host: Host, other_host: Host
) -> None:
    # podman 4.3 cannot write its zstd:chunked form of every content: the small images break it.
    host.podman("pull", "--quiet", images.text("chunked").reference)
    source = host.podman("image", "list", "--quiet", "--no-trunc").split()[0]
    name = f"127.0.0.1:{cluster.first.registry}/team/chunked:v1"
    pushing = ("push", "--quiet", "--tls-verify=false", "--compression-format", "zstd:chunked")
    host.podman(*pushing, source, name)
    layers = web.get_manifest(cluster.first.registry, "team/chunked", "v1").json()["layers"]
    assert {layer["mediaType"].rpartition("+")[2] for layer in layers} == {"zstd"}

    for port in cluster.registries[1:]:
        with recorded(port) as recording:
            name = f"127.0.0.1:{recording.port}/team/chunked:v1"
            other_host.podman("pull", "--quiet", "--tls-verify=false", name)
            assert image_id(other_host, name) == image_id(host, source)
        if storage_driver() == "overlay":  # podman reads in parts with this one only
            assert any(value.startswith("bytes=") for value in recording.header_values("range"))
        other_host.podman("image", "rm", name)
