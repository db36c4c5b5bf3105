"""Real clients pull through agents from a real registry that is none of ours."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import attrs
import pytest

from tests.ports import PortAllocator

from . import web
from .clients import Containerd, Host, daemon, require, snapshotter
from .conftest import new_directory, started
from .images import Image, ImageFactory
from .program import Cluster, Program, options

pytestmark = pytest.mark.clients
NAME: Final = "hub.example"


@attrs.frozen
class Mirror:
    """A cluster, and the registry behind it."""

    cluster: Cluster
    upstream: int

    def bytes_read(self) -> float:
        """What the origin has read from the registry so far."""
        samples = self.cluster.metrics(self.cluster.ports.origin_admin)
        return samples["swarmpull_backend_bytes_read_total{}"]


@contextlib.contextmanager
def docker_registry(host: Host, port: int) -> Iterator[None]:
    config = host.directory / "registry.yml"
    config.write_text(
        "version: 0.1\n"
        f"storage: {{filesystem: {{rootdirectory: {host.directory / 'registry'}}}}}\n"
        f"http: {{addr: '127.0.0.1:{port}'}}\n"
    )
    log = host.directory / "docker-registry.log"

    def answers() -> bool:
        try:
            return web.request(port, "GET", "/v2/").status == 200
        except OSError:
            return False

    command = ["docker-registry", "serve", str(config)]
    with daemon(command, log=log, env=host.environment(), answers=answers):
        yield


@pytest.fixture(scope="module")
def mirror(scratch: Path, ports: PortAllocator, request) -> Iterator[Mirror]:
    require("skopeo", "docker-registry")
    directory = new_directory(scratch, "mirror")
    (port,) = ports.run_of(1)
    listeners = ports.cluster(2)
    settings = {
        **listeners.settings(),
        "upstreams.0.name": NAME,
        "upstreams.0.url": f"registry+http://127.0.0.1:{port}",
        "upstreams.0.freshness": "0s",
    }
    arguments = ["--role", "all", "--agents", "2", "--data-dir", str(directory / "data")]
    program = Program(
        [*arguments, *options(settings)], log=directory / "mirror.log", admin=listeners.admin
    )
    with docker_registry(Host(directory), port):
        for cluster in started(Cluster(directory, listeners, {"all": program}), request.config):
            yield Mirror(cluster, port)
    shutil.rmtree(directory)


def test_skopeo_pulls_through_two_agents_what_one_origin_fetched_once(
    mirror: Mirror, images: ImageFactory, host: Host
) -> None:
    image = images.fresh("pull-through")
    host.push(image, mirror.upstream, "team/app:v1")

    before = mirror.bytes_read()
    for port in mirror.cluster.registries:
        target = host.directory / f"pulled-{port}"
        source = f"docker://127.0.0.1:{port}/{NAME}/team/app:v1"
        host.skopeo("copy", "--src-tls-verify=false", source, f"dir:{target}")
        assert_same_bytes(image, target)

    # Not twice, for two agents: of a run that is split, a connection may have begun the other one's part.
    assert image.length <= mirror.bytes_read() - before < 1.5 * image.length


def assert_same_bytes(image: Image, pulled: Path) -> None:
    manifest = (pulled / "manifest.json").read_bytes()
    assert manifest == image.content(image.manifest).read_bytes()
    for part in image.parts:
        assert (pulled / part.hex).read_bytes() == image.content(part).read_bytes(), part


def test_containerd_takes_an_agent_for_the_mirror_of_another_registry(
    mirror: Mirror, images: ImageFactory, host: Host, containerd: Containerd
) -> None:
    image = images.small("pull-through-mirror")
    host.push(image, mirror.upstream, "team/mirrored:v1")
    certs = host.directory / "certs.d" / NAME
    certs.mkdir(parents=True)
    agent = mirror.cluster.registries[0]
    # What containerd sends then has ns=hub.example, and no such host exists.
    certs.joinpath("hosts.toml").write_text(
        f'server = "https://{NAME}"\n'
        f'[host."http://127.0.0.1:{agent}"]\ncapabilities = ["pull", "resolve"]\n'
    )
    name = f"{NAME}/team/mirrored:v1"
    containerd.images(
        "pull", "--snapshotter", snapshotter(), "--hosts-dir", str(certs.parent), name
    )
    assert containerd.digest(name) == image.manifest.digest


def test_ns_selects_the_upstream_as_containerd_sends_it(
    mirror: Mirror, images: ImageFactory, host: Host
) -> None:
    image = images.small("pull-through-ns")
    host.push(image, mirror.upstream, "team/ns:v1")
    port = mirror.cluster.registries[1]

    answer = web.request(port, "HEAD", f"/v2/team/ns/manifests/v1?ns={NAME}")
    assert answer.headers["docker-content-digest"] == image.manifest.digest
    assert answer.headers["oci-namespace"] == NAME
    part = image.parts[0]
    answer = web.request(port, "GET", f"/v2/team/ns/blobs/{part.digest}?ns={NAME}")
    assert web.digest_of(answer.body) == part.digest

    refused = web.request(port, "GET", "/v2/team/ns/manifests/v1?ns=other.example")
    assert refused.status == 403
    assert refused.json()["errors"][0]["code"] == "DENIED"
    assert web.request(port, "GET", "/v2/team/ns/manifests/v1").status == 404
