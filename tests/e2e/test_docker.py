"""A docker daemon of its own pushes to and pulls from agents."""

from __future__ import annotations

import pytest

from . import web
from .clients import Docker, Host, require
from .images import ImageFactory
from .program import Cluster

pytestmark = pytest.mark.clients


@pytest.fixture(autouse=True)
def installed() -> None:
    require("skopeo")


def test_docker_pulls_from_each_agent_what_skopeo_pushed(
    cluster: Cluster, images: ImageFactory, host: Host, docker: Docker
) -> None:
    image = images.fresh("docker-pull")
    host.push(image, cluster.first.registry, "team/docker-pull:v1")

    for port in cluster.registries:
        name = f"127.0.0.1:{port}/team/docker-pull:v1"
        docker("pull", "--quiet", name)
        assert docker.inspect(name)["Id"] == image.parts[0].digest
        assert docker.inspect(name)["RootFS"]["Layers"] == [
            part.diff_id for part in image.parts[1:]
        ]
        docker("image", "rm", name)


def test_docker_pulls_by_digest(
    cluster: Cluster, images: ImageFactory, host: Host, docker: Docker
) -> None:
    image = images.small("docker-digest")
    host.push(image, cluster.first.registry, "team/docker-digest:v1")

    name = f"127.0.0.1:{cluster.registries[1]}/team/docker-digest@{image.manifest.digest}"
    docker("pull", "--quiet", name)

    assert docker.inspect(name)["Id"] == image.parts[0].digest


def test_docker_pushes_to_an_agent_and_every_agent_has_it(
    cluster: Cluster, images: ImageFactory, host: Host, docker: Docker
) -> None:
    image = images.small("docker-push")
    archive = host.directory / "image.tar"
    name = f"127.0.0.1:{cluster.first.registry}/team/docker-push:v1"
    host.skopeo("copy", image.reference, f"docker-archive:{archive}:{name}")
    docker("load", "--input", str(archive))
    identity = docker.inspect(name)["Id"]
    docker("push", "--quiet", name)
    docker("push", "--quiet", name)  # again: every layer is there already

    docker("image", "rm", name)
    for port in cluster.registries:
        assert web.pull_image(port, "team/docker-push", "v1")
        name = f"127.0.0.1:{port}/team/docker-push:v1"
        docker("pull", "--quiet", name)
        assert docker.inspect(name)["Id"] == identity
        docker("image", "rm", name)


def test_docker_mounts_layers_that_another_repository_has(
    cluster: Cluster, images: ImageFactory, host: Host, docker: Docker
) -> None:
    image = images.small("docker-mount")
    host.push(image, cluster.first.registry, "team/docker-mount:v1")
    name = f"127.0.0.1:{cluster.first.registry}/team/docker-mount:v1"
    other = f"127.0.0.1:{cluster.first.registry}/other/docker-mount:v1"
    docker("pull", "--quiet", name)
    docker("tag", name, other)

    shown = docker("push", other)

    assert shown.count("Mounted from team/docker-mount") == len(image.parts) - 1
    assert web.pull_image(cluster.registries[2], "other/docker-mount", "v1")


def test_docker_reports_an_unknown_image_at_once(cluster: Cluster, docker: Docker) -> None:
    name = f"127.0.0.1:{cluster.registries[1]}/team/nobody-pushed:v1"

    with pytest.raises(AssertionError, match=r"not found|manifest unknown"):
        docker("pull", "--quiet", name)
