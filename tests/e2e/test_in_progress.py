"""Real clients pull an image while the agent is still downloading it.

The agent takes its pieces at a limited rate, so that readers are always ahead of the download.  Each test
has an agent that never had the image: what it counts at the end is one download of each layer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import pytest

from . import web
from .clients import Containerd, Docker, Host, require, snapshotter, storage_driver
from .images import Image, ImageFactory
from .program import Cluster
from .recording import Recording, recorded
from .waiting import wait_until

pytestmark = pytest.mark.clients

MIB: Final = 1 << 20
# The image of 20 MB takes ten seconds: docker comes back five seconds after a cut.
DOWNLOAD_RATE: Final = 2 * MIB
# Within the largest layer.
CUT_AFTER: Final = 3 * MIB


@pytest.fixture(autouse=True)
def installed() -> None:
    require("skopeo")


@pytest.fixture
def slow_agent(separate_cluster: Cluster) -> Iterator[int]:
    """The number of an agent that downloads slowly."""
    yield from slowed(separate_cluster, 2)


def slowed(cluster: Cluster, number: int) -> Iterator[int]:
    set_rate(cluster, number, DOWNLOAD_RATE)
    yield number
    set_rate(cluster, number, None)


def set_rate(cluster: Cluster, number: int, rate: int | None) -> None:
    body = json.dumps({"download_rate": rate}).encode()
    answer = web.request(cluster.ports.agents[number - 1].admin, "PUT", "/rates", body=body)
    assert answer.status == 200, answer.text


class Count:
    """What an agent has received since the beginning of a test."""

    def __init__(self, cluster: Cluster, number: int) -> None:
        self._cluster = cluster
        self._number = number
        self._before = self._now()

    def check_one_download_of(self, image: Image) -> None:
        """Of every part, whoever pulled: small ones come with their metainfo, the others by piece."""
        parts = (image.manifest, *image.parts)
        expected = sum(part.length for part in parts)
        wait_until(lambda: self._now() - self._before >= expected, "every part has come")
        assert self._now() - self._before == expected

    def _now(self) -> float:
        samples = self._cluster.metrics(self._cluster.ports.agents[self._number - 1].admin)
        names = ("piece_bytes_received_total", "small_blob_bytes_received_total")
        return sum(value for key, value in samples.items() if key.partition("{")[0][10:] in names)


def push(cluster: Cluster, host: Host, images: ImageFactory, name: str) -> Image:
    image = images.fresh(name)
    host.push(image, cluster.ports.origin_registry, f"team/{name}:v1")
    return image


def resumed(recording: Recording) -> list[str]:
    return [value for value in recording.header_values("range") if not value.startswith("bytes=0-")]


def at_once(*pulls: Callable[[], None]) -> None:
    with ThreadPoolExecutor(len(pulls)) as threads:
        for pulled in [threads.submit(pull) for pull in pulls]:
            pulled.result()


def ctr_pull(containerd: Containerd, name: str) -> None:
    containerd.images("pull", "--snapshotter", snapshotter(), "--plain-http", name)


def test_two_clients_share_the_download(
    separate_cluster: Cluster,
    slow_agent: int,
    images: ImageFactory,
    host: Host,
    other_host: Host,
    containerd: Containerd,
) -> None:
    require("podman", root=True)
    image = push(separate_cluster, host, images, "both-at-once")
    count = Count(separate_cluster, slow_agent)
    name = f"127.0.0.1:{separate_cluster.registries[slow_agent - 1]}/team/both-at-once:v1"

    at_once(
        lambda: ctr_pull(containerd, name),
        lambda: other_host.podman("pull", "--quiet", "--tls-verify=false", name),
    )

    assert containerd.digest(name) == image.manifest.digest
    [found] = json.loads(other_host.podman("image", "inspect", name))
    assert f"sha256:{found['Id']}" == image.parts[0].digest
    count.check_one_download_of(image)


def test_containerd_resumes_after_a_cut(
    separate_cluster: Cluster,
    slow_agent: int,
    images: ImageFactory,
    host: Host,
    containerd: Containerd,
) -> None:
    image = push(separate_cluster, host, images, "ctr-cut")
    count = Count(separate_cluster, slow_agent)
    port = separate_cluster.registries[slow_agent - 1]

    with recorded(port, cut_after=CUT_AFTER) as recording:
        name = f"127.0.0.1:{recording.port}/team/ctr-cut:v1"
        ctr_pull(containerd, name)

    assert recording.cut
    assert containerd.digest(name) == image.manifest.digest
    assert resumed(recording), "it went on where it was cut"
    count.check_one_download_of(image)


def test_docker_resumes_after_a_cut(
    separate_cluster: Cluster, slow_agent: int, images: ImageFactory, host: Host, docker: Docker
) -> None:
    image = push(separate_cluster, host, images, "docker-cut")
    count = Count(separate_cluster, slow_agent)
    port = separate_cluster.registries[slow_agent - 1]

    with recorded(port, cut_after=CUT_AFTER) as recording:
        name = f"127.0.0.1:{recording.port}/team/docker-cut:v1"
        docker("pull", "--quiet", name)

    assert recording.cut
    assert docker.inspect(name)["Id"] == image.parts[0].digest
    assert resumed(recording), "it went on where it was cut"
    count.check_one_download_of(image)


def test_podman_pulls_zstd_chunked_by_ranges(
    separate_cluster: Cluster,
    slow_agent: int,
    images: ImageFactory,
    host: Host,
    other_host: Host,
) -> None:
    require("podman", root=True)
    host.podman("pull", "--quiet", images.text("chunked-slow").reference)
    source = host.podman("image", "list", "--quiet", "--no-trunc").split()[0]
    name = f"127.0.0.1:{separate_cluster.ports.origin_registry}/team/chunked-slow:v1"
    pushing = ("push", "--quiet", "--tls-verify=false", "--compression-format", "zstd:chunked")
    host.podman(*pushing, source, name)
    port = separate_cluster.registries[slow_agent - 1]

    with recorded(port) as recording:
        name = f"127.0.0.1:{recording.port}/team/chunked-slow:v1"
        other_host.podman("pull", "--quiet", "--tls-verify=false", name)

    [found] = json.loads(other_host.podman("image", "inspect", name))
    assert f"sha256:{found['Id']}".endswith(source.removeprefix("sha256:"))
    if storage_driver() == "overlay":  # podman reads in parts with this one only
        assert resumed(recording), "it read the table of contents, and then what it lacked"
