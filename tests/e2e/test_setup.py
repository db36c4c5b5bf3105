"""What `swarmpull setup` writes makes real runtimes pull through an agent, and undone they do not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.ports import PortAllocator

from . import web
from .clients import Containerd, Host, docker_daemon, require, run, snapshotter
from .conftest import new_directory, started
from .images import Image, ImageFactory
from .program import Cluster, Program, options, run_to_the_end
from .test_pull_through import Mirror, docker_registry

pytestmark = pytest.mark.clients
NAME: Final = "hub.example"


@pytest.fixture(scope="module")
def mirror(scratch: Path, ports: PortAllocator, request) -> Iterator[Mirror]:
    """An agent for which hub.example and docker.io are the same registry; its mirror is the latter."""
    require("skopeo", "docker-registry")
    directory = new_directory(scratch, "setup")
    upstream, mirrored = ports.run_of(2)
    listeners = ports.cluster(1)
    settings = {
        **listeners.settings(),
        "upstreams.0.name": NAME,
        "upstreams.0.url": f"registry+http://127.0.0.1:{upstream}",
        "upstreams.1.name": "docker.io",
        "upstreams.1.url": f"registry+http://127.0.0.1:{upstream}",
        "agent.mirror.registry": "docker.io",
        "agent.mirror.listen": f"127.0.0.1:{mirrored}",
    }
    arguments = ["--role", "all", "--data-dir", str(directory / "data"), *options(settings)]
    program = Program(arguments, log=directory / "setup.log", admin=listeners.admin)
    with docker_registry(Host(directory), upstream):
        for cluster in started(Cluster(directory, listeners, {"all": program}), request.config):
            yield Mirror(cluster, upstream)


def mirrored_port(mirror: Mirror) -> int:
    return mirror.upstream + 1


def agent_of(mirror: Mirror) -> str:
    return f"http://127.0.0.1:{mirror.cluster.first.registry}"


def set_up(root: Path, runtime: str, *arguments: str) -> None:
    done = run_to_the_end("setup", runtime, "--root", str(root), *arguments)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def root(host: Host) -> Path:
    path = host.directory / "root"
    path.mkdir()
    return path


def test_containerd_pulls_through_the_agent_and_from_others_as_before(
    mirror: Mirror, images: ImageFactory, host: Host, containerd: Containerd, root: Path
) -> None:
    image = images.small("setup-containerd")
    host.push(image, mirror.upstream, "team/app:v1")
    set_up(root, "containerd", "--agent", agent_of(mirror))
    certs = root / "etc/containerd/certs.d"

    def pull(name: str) -> None:
        containerd.images("pull", "--snapshotter", snapshotter(), "--hosts-dir", str(certs), name)

    pull(f"{NAME}/team/app:v1")
    assert containerd.digest(f"{NAME}/team/app:v1") == image.manifest.digest
    # A registry that the agent does not know is asked directly, also when the agent is asked first.
    other = f"127.0.0.1:{mirror.upstream}/team/app:v1"
    pull(other)
    assert containerd.digest(other) == image.manifest.digest

    set_up(root, "containerd", "--undo")
    assert not certs.exists()
    containerd.images("rm", "--sync", f"{NAME}/team/app:v1")
    with pytest.raises(AssertionError, match=NAME):
        pull(f"{NAME}/team/app:v1")


def test_docker_pulls_images_of_docker_io_through_the_agent(
    mirror: Mirror, images: ImageFactory, host: Host, root: Path
) -> None:
    require("dockerd", "docker", root=True)
    image = images.small("setup-docker")
    host.push(image, mirror.upstream, "library/setup-docker:v1")
    config = root / "etc/docker/daemon.json"
    config.parent.mkdir(parents=True)
    config.write_text('{"max-concurrent-downloads": 2}')
    set_up(root, "docker", "--agent", f"http://127.0.0.1:{mirrored_port(mirror)}")
    assert json.loads(config.read_text())["max-concurrent-downloads"] == 2

    with docker_daemon(host, config) as docker:
        docker("pull", "--quiet", "setup-docker:v1")
        assert docker.inspect("setup-docker:v1")["Id"] == image.parts[0].digest

    set_up(root, "docker", "--undo")
    assert config.read_text() == '{"max-concurrent-downloads": 2}'


def test_podman_pulls_through_the_agent(
    mirror: Mirror, images: ImageFactory, host: Host, root: Path
) -> None:
    require("podman", root=True)
    image = images.small("setup-podman")
    host.push(image, mirror.upstream, "team/setup-podman:v1")
    policy = root / "etc/containers/policy.json"
    policy.parent.mkdir(parents=True)
    policy.write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
    set_up(root, "podman", "--agent", agent_of(mirror), "--upstream", NAME)
    name = f"{NAME}/team/setup-podman:v1"
    roots = [
        "--root",
        str(host.directory / "graph"),
        "--runroot",
        str(host.directory / "graph-run"),
    ]
    pull = ["podman", *roots, "--storage-driver", "vfs", "pull", "--quiet", name]
    mounted = f"mount --bind '{policy.parent}' /etc/containers && exec \"$@\""
    command = host.isolated(["sh", "-ec", mounted, "sh", *pull])

    assert run(command, env=host.environment()).strip() == image.parts[0].digest.partition(":")[2]

    set_up(root, "podman", "--undo")
    with pytest.raises(AssertionError, match=NAME):
        run(command, env=host.environment())


def test_the_mirror_stands_for_one_registry_and_takes_nothing(
    mirror: Mirror, images: ImageFactory, host: Host
) -> None:
    """As Docker's classic store asks, which says nowhere which registry it means."""
    image = images.small("setup-mirror")
    host.push(image, mirror.upstream, "library/setup-mirror:v1")
    host.push(image, mirror.cluster.first.registry, "library/own:v1")
    port = mirrored_port(mirror)

    answer = web.request(port, "HEAD", "/v2/library/setup-mirror/manifests/v1")
    assert answer.headers["docker-content-digest"] == image.manifest.digest
    # The cluster's own repositories are not docker.io's.
    assert web.request(port, "HEAD", "/v2/library/own/manifests/v1").status == 404
    assert web.request(port, "POST", "/v2/library/own/blobs/uploads/").status == 403


@pytest.fixture(scope="module")
def recorded(mirror: Mirror, images: ImageFactory, scratch: Path) -> Image:
    image = images.small("setup-recorded")
    directory = new_directory(scratch, "h")
    Host(directory).push(image, mirror.upstream, "team/recorded:v1")
    return image


_CONTAINERD = (
    "application/vnd.docker.distribution.manifest.v2+json, "
    "application/vnd.docker.distribution.manifest.list.v2+json, "
    "application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json, */*"
)


@pytest.mark.parametrize(
    ("listener", "method", "name", "query", "headers"),
    [
        # containerd 1.7 and 2.1, with what `setup containerd` writes
        ("agent", "HEAD", "team/recorded", f"?ns={NAME}", {"Accept": _CONTAINERD}),
        # containerd 2.1 with concurrent fetches asks for manifests by range, too
        (
            "agent",
            "GET",
            "team/recorded",
            f"?ns={NAME}",
            {"Accept": _CONTAINERD, "Range": "bytes=0-"},
        ),
        # docker 26 and 28 with the containerd image store
        ("mirror", "HEAD", "team/recorded", "?ns=docker.io", {"Accept": _CONTAINERD}),
        # docker 20.10, 26 and 28 with the classic store
        ("mirror", "HEAD", "team/recorded", "", {"Accept": "application/json"}),
        # podman 5.4 and 5.8, CRI-O
        (
            "agent",
            "GET",
            f"{NAME}/team/recorded",
            "",
            {"Accept-Encoding": "gzip", "Docker-Distribution-Api-Version": "registry/2.0"},
        ),
    ],
)
def test_requests_recorded_of_other_versions_find_the_upstream(
    mirror: Mirror,
    recorded: Image,
    listener: str,
    method: str,
    name: str,
    query: str,
    headers: dict[str, str],
) -> None:
    port = mirrored_port(mirror) if listener == "mirror" else mirror.cluster.first.registry

    answer = web.request(port, method, f"/v2/{name}/manifests/v1{query}", headers=headers)

    assert answer.status == 200
    assert answer.headers["docker-content-digest"] == recorded.manifest.digest
    if method == "GET":
        assert web.digest_of(answer.body) == recorded.manifest.digest
