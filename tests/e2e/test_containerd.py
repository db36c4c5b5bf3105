"""containerd through ctr: monolithic uploads, and an agent as the mirror of another registry."""

from __future__ import annotations

from pathlib import Path

import pytest

from . import web
from .clients import Containerd, Host, require, snapshotter
from .images import ImageFactory
from .program import Cluster

pytestmark = pytest.mark.clients


@pytest.fixture(autouse=True)
def installed() -> None:
    require("skopeo")


def pull(containerd: Containerd, name: str, *options: str) -> None:
    containerd.images("pull", "--snapshotter", snapshotter(), *options, name)


def test_ctr_pulls_from_each_agent_what_skopeo_pushed(
    cluster: Cluster, images: ImageFactory, host: Host, containerd: Containerd
) -> None:
    image = images.fresh("ctr-pull")
    host.push(image, cluster.first.registry, "team/ctr-pull:v1")

    for port in cluster.registries:
        name = f"127.0.0.1:{port}/team/ctr-pull:v1"
        pull(containerd, name, "--plain-http")
        assert containerd.digest(name) == image.manifest.digest
        containerd.images("rm", "--sync", name)


def test_ctr_pushes_to_an_agent_and_every_agent_has_it(
    cluster: Cluster, images: ImageFactory, host: Host, containerd: Containerd
) -> None:
    image = images.small("ctr-push")
    archive = host.directory / "image.tar"
    host.skopeo("copy", "--preserve-digests", image.reference, f"oci-archive:{archive}:v1")
    containerd.images("import", "--no-unpack", "--base-name", "local/ctr-push", str(archive))
    name = f"127.0.0.1:{cluster.first.registry}/team/ctr-push:v1"
    containerd.images("push", "--plain-http", name, "local/ctr-push:v1")

    for port in cluster.registries:
        assert web.pull_image(port, "team/ctr-push", "v1") == image.manifest.digest


def test_ctr_pulls_all_platforms_of_an_index(
    cluster: Cluster, images: ImageFactory, host: Host, containerd: Containerd
) -> None:
    image = images.multi_architecture("ctr-many")
    host.push(image, cluster.first.registry, "team/ctr-many:v1", "--all")

    name = f"127.0.0.1:{cluster.registries[2]}/team/ctr-many:v1"
    containerd("content", "fetch", "--plain-http", "--all-platforms", name)

    assert containerd.digest(name) == image.manifest.digest
    held = containerd("content", "list", "--quiet").split()
    assert {part.digest for part in (image.manifest, *image.parts)} <= set(held)


def test_an_agent_is_the_mirror_that_hosts_toml_names(
    cluster: Cluster, images: ImageFactory, host: Host, containerd: Containerd
) -> None:
    """containerd then names the registry that it stands for: ``?ns=registry.example``."""
    image = images.small("mirrored")
    host.push(image, cluster.first.registry, "team/mirrored:v1")
    agent = f"http://127.0.0.1:{cluster.registries[1]}"
    hosts = write_hosts(host.directory / "certs.d", "registry.example", agent)

    name = "registry.example/team/mirrored:v1"
    pull(containerd, name, "--hosts-dir", str(hosts))

    assert containerd.digest(name) == image.manifest.digest


def write_hosts(directory: Path, registry: str, mirror: str) -> Path:
    """A ``certs.d`` whose only way to ``registry`` is the mirror."""
    folder = directory / registry
    folder.mkdir(parents=True)
    (folder / "hosts.toml").write_text(
        f'server = "{mirror}"\n[host."{mirror}"]\ncapabilities = ["pull", "resolve"]\n'
    )
    return directory
