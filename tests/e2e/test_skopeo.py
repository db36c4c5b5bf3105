"""skopeo: the lightest real client; it copies bytes as they are, so that they can be compared."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from . import web
from .clients import Host, require
from .images import Image, ImageFactory
from .program import Cluster

pytestmark = pytest.mark.clients
OVER_HTTP = "--src-tls-verify=false"


@pytest.fixture(autouse=True)
def installed() -> None:
    require("skopeo")


def pull_to_directory(host: Host, port: int, name: str) -> Path:
    """The image in skopeo's flat form: ``manifest.json`` and each blob under its hex digest."""
    target = host.directory / f"pulled-{port}"
    host.skopeo("copy", OVER_HTTP, f"docker://127.0.0.1:{port}/{name}", f"dir:{target}")
    return target


def assert_same_bytes(image: Image, pulled: Path) -> None:
    manifest = (pulled / "manifest.json").read_bytes()
    assert manifest == image.content(image.manifest).read_bytes()
    names = {path.name for path in pulled.iterdir()} - {"manifest.json", "version"}
    assert names == {part.hex for part in image.parts}
    for part in image.parts:
        assert (pulled / part.hex).read_bytes() == image.content(part).read_bytes(), part


def test_an_image_pushed_to_one_agent_is_the_same_bytes_on_every_agent(
    cluster: Cluster, images: ImageFactory, host: Host
) -> None:
    image = images.large("large")
    host.push(image, cluster.first.registry, "team/app:v1")

    for port in cluster.registries:
        assert_same_bytes(image, pull_to_directory(host, port, "team/app:v1"))


def test_the_origin_takes_pushes_and_serves_pulls_itself(
    cluster: Cluster, images: ImageFactory, host: Host
) -> None:
    image = images.small("through-origin")
    host.push(image, cluster.ports.origin_registry, "team/through-origin:v1")

    for port in (cluster.ports.origin_registry, *cluster.registries):
        assert_same_bytes(image, pull_to_directory(host, port, "team/through-origin:v1"))


def test_two_hosts_pull_a_new_image_at_the_same_time(
    cluster: Cluster, images: ImageFactory, host: Host, other_host: Host
) -> None:
    image = images.fresh("at-once")
    host.push(image, cluster.first.registry, "team/at-once:v1")

    with ThreadPoolExecutor() as threads:
        pulls = [
            threads.submit(pull_to_directory, puller, port, "team/at-once:v1")
            for puller, port in zip((host, other_host), cluster.registries[1:], strict=True)
        ]
        for pull in pulls:
            assert_same_bytes(image, pull.result())


def test_an_image_is_pulled_by_the_digest_of_its_manifest(
    cluster: Cluster, images: ImageFactory, host: Host
) -> None:
    image = images.small("by-digest")
    host.push(image, cluster.first.registry, "team/by-digest:v1")

    for port in cluster.registries:
        name = f"team/by-digest@{image.manifest.digest}"
        assert_same_bytes(image, pull_to_directory(host, port, name))


def test_a_multi_architecture_index_is_copied_with_all_its_images(
    cluster: Cluster, images: ImageFactory, host: Host
) -> None:
    image = images.multi_architecture("many")
    host.push(image, cluster.first.registry, "team/many:v1", "--all")

    for port in cluster.registries:
        layout = host.directory / f"layout-{port}"
        source = f"docker://127.0.0.1:{port}/team/many:v1"
        host.skopeo("copy", OVER_HTTP, "--all", "--preserve-digests", source, f"oci:{layout}:v1")

        pulled = {path.name: path for path in (layout / "blobs" / "sha256").iterdir()}
        assert pulled.keys() == {part.hex for part in (image.manifest, *image.parts)}
        for part in (image.manifest, *image.parts):
            assert pulled[part.hex].read_bytes() == image.content(part).read_bytes(), part


def test_one_platform_of_an_index_is_pulled_alone(
    cluster: Cluster, images: ImageFactory, host: Host
) -> None:
    image = images.multi_architecture("one-of-many")
    host.push(image, cluster.first.registry, "team/one-of-many:v1", "--all")

    port = cluster.registries[1]
    source = f"docker://127.0.0.1:{port}/team/one-of-many:v1"
    raw = host.skopeo("inspect", "--tls-verify=false", "--override-arch=arm64", "--config", source)
    assert json.loads(raw)["architecture"] == "arm64"


def test_tags_are_listed_and_an_image_is_inspected_on_every_agent(
    cluster: Cluster, images: ImageFactory, host: Host
) -> None:
    image = images.small("listed")
    for tag in ("v2", "v10", "latest"):
        host.push(image, cluster.first.registry, f"team/listed:{tag}")

    for port in cluster.registries:
        name = f"docker://127.0.0.1:{port}/team/listed"
        listed = json.loads(host.skopeo("list-tags", "--tls-verify=false", name))
        assert sorted(listed["Tags"]) == ["latest", "v10", "v2"]
        seen = json.loads(host.skopeo("inspect", "--tls-verify=false", f"{name}:v2"))
        assert seen["Digest"] == image.manifest.digest
        layers = [part.digest for part in image.parts[1:]]
        assert seen["Layers"] == layers


def test_a_deleted_image_is_gone_from_every_agent(
    cluster: Cluster, images: ImageFactory, host: Host
) -> None:
    image = images.small("deleted")
    host.push(image, cluster.first.registry, "team/deleted:v1")
    assert_same_bytes(image, pull_to_directory(host, cluster.registries[1], "team/deleted:v1"))

    target = f"docker://127.0.0.1:{cluster.first.registry}/team/deleted:v1"
    host.skopeo("delete", "--tls-verify=false", target)

    for port in (cluster.ports.origin_registry, *cluster.registries):
        assert web.get_manifest(port, "team/deleted", "v1").status == 404
        assert web.get_manifest(port, "team/deleted", image.manifest.digest).status == 404


def test_a_tag_moves_to_what_was_pushed_last(
    cluster: Cluster, images: ImageFactory, host: Host
) -> None:
    for name in ("moves-from", "moves-to"):
        image = images.small(name)
        host.push(image, cluster.first.registry, "team/moves:latest")

        for port in cluster.registries:
            answer = web.get_manifest(port, "team/moves", "latest")
            assert answer.headers["docker-content-digest"] == image.manifest.digest
            assert web.digest_of(answer.body) == image.manifest.digest
