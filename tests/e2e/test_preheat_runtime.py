"""A real dockerd and a real containerd have what an agent has preheated, before anybody asks them for it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.ports import PortAllocator

from . import web
from .clients import (
    Containerd,
    Docker,
    Host,
    containerd_daemon,
    docker_daemon,
    require,
    snapshotter,
)
from .conftest import new_directory, started
from .images import ImageFactory
from .program import Cluster, Program, options, run_to_the_end
from .waiting import wait_until

pytestmark = pytest.mark.clients


@pytest.fixture(scope="module")
def runtimes(scratch: Path) -> Iterator[tuple[Docker, Containerd]]:
    require("dockerd", "docker", "containerd", "ctr", root=True)
    if snapshotter() != "overlayfs":
        pytest.skip("ctr unpacks for overlayfs, which this file system does not have")
    hosts = [Host(new_directory(scratch, "r")) for _ in range(2)]
    try:
        with docker_daemon(hosts[0]) as docker, containerd_daemon(hosts[1]) as containerd:
            yield docker, containerd
    finally:
        for host in hosts:
            shutil.rmtree(host.directory)


@pytest.fixture(scope="module")
def cluster(
    scratch: Path, ports: PortAllocator, runtimes: tuple[Docker, Containerd], request
) -> Iterator[Cluster]:
    require("skopeo")
    directory = new_directory(scratch, "runtime")
    listeners = ports.cluster(1)
    docker, containerd = runtimes
    settings = {
        **listeners.settings(),
        "index.api.notified": "all",
        "agent.runtime.docker": str(docker.socket),
        "agent.runtime.containerd": str(containerd.socket),
        "agent.runtime.containerd_hosts": str(directory / "certs.d"),
    }
    arguments = ["--role", "all", "--data-dir", str(directory / "data"), *options(settings)]
    program = Program(arguments, log=directory / "runtime.log", admin=listeners.admin)
    whole = Cluster(directory, listeners, {"all": program})
    for cluster in started(whole, request.config):
        wait_until(
            lambda: whole.status(listeners.index_admin)["preheating"]["agents"] == 1,
            "the agent waits at the index",
        )
        yield cluster
    shutil.rmtree(directory)


def preheat(cluster: Cluster, image: str) -> tuple[int, dict[str, object]]:
    api = f"http://127.0.0.1:{cluster.ports.index_api}"
    done = run_to_the_end("preheat", "--api", api, "--json", image, "--agents", "all")
    return done.returncode, json.loads(done.stdout)


def test_runtimes_have_pulled_what_was_preheated(
    cluster: Cluster, runtimes: tuple[Docker, Containerd], images: ImageFactory, host: Host
) -> None:
    docker, containerd = runtimes
    image = images.small("preheat-runtime")
    host.push(image, cluster.first.registry, "team/runtime:v1")

    status, job = preheat(cluster, "team/runtime:v1")

    assert (status, job["state"]) == (0, "done"), job
    name = f"127.0.0.1:{cluster.first.registry}/team/runtime:v1"
    assert docker.inspect(name)["Id"] == image.parts[0].digest
    rows = containerd("--namespace", "k8s.io", "images", "list", "--quiet").split()
    assert name in rows


def test_what_a_webhook_told_of_is_called_by_its_tag(
    cluster: Cluster, runtimes: tuple[Docker, Containerd], images: ImageFactory, host: Host
) -> None:
    docker, containerd = runtimes
    image = images.small("preheat-webhook")
    host.push(image, cluster.first.registry, "team/hook:v7")
    manifest = web.get_manifest(cluster.first.registry, "team/hook", "v7")
    target = {
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "repository": "team/hook",
        "digest": web.digest_of(manifest.body),
        "tag": "v7",
    }
    event = {"action": "push", "target": target}
    url = f"http://127.0.0.1:{cluster.ports.index_api}/registry/notifications"
    reply = httpx.post(url, json={"events": [event]})
    assert reply.json()["pushed"] == 1
    name = f"127.0.0.1:{cluster.first.registry}/team/hook:v7"

    def rows() -> list[str]:
        return containerd("--namespace", "k8s.io", "images", "list", "--quiet").split()

    wait_until(lambda: name in rows(), "containerd, which comes last, calls it so")
    assert docker.inspect(name)["Id"] == image.parts[0].digest


def test_a_runtime_that_cannot_pull_says_why_in_the_job(cluster: Cluster) -> None:
    # Docker takes no layer that is no archive.
    digest = web.push_image(cluster.first.registry, "team/broken", "v1", [b"no archive"])

    status, job = preheat(cluster, "team/broken:v1")

    assert (status, job["state"], job["digest"]) == (1, "failed", digest)
    assert "docker did not pull" in job["failures"][0]["reason"]  # type: ignore[index]
