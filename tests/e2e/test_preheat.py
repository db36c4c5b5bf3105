"""`swarmpull preheat`, and a real registry whose notifications bring images onto agents by themselves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from tests.ports import PortAllocator

from . import web
from .clients import Host, daemon, require
from .conftest import new_directory, started
from .images import ImageFactory
from .program import Cluster, Program, options, run_to_the_end
from .test_pull_through import Mirror
from .waiting import wait_until

pytestmark = pytest.mark.clients
NAME: Final = "hub.example"


@pytest.fixture(scope="module")
def mirror(scratch: Path, ports: PortAllocator, request) -> Iterator[Mirror]:
    """A cluster with two agents, and docker-registry as its upstream, which tells the index of pushes."""
    require("skopeo", "docker-registry")
    directory = new_directory(scratch, "preheat")
    (upstream,) = ports.run_of(1)
    listeners = ports.cluster(2)
    settings = {
        **listeners.settings(),
        "upstreams.0.name": NAME,
        "upstreams.0.url": f"registry+http://127.0.0.1:{upstream}",
        "index.api.notified": "all",
    }
    arguments = ["--role", "all", "--agents", "2", "--data-dir", str(directory / "data")]
    program = Program(
        [*arguments, *options(settings)], log=directory / "preheat.log", admin=listeners.admin
    )
    config = directory / "registry.yml"
    config.write_text(
        "version: 0.1\n"
        f"storage: {{filesystem: {{rootdirectory: {directory / 'registry'}}}}}\n"
        f"http: {{addr: '127.0.0.1:{upstream}'}}\n"
        "notifications: {endpoints: [{name: index, timeout: 5s, threshold: 5, backoff: 1s, "
        f"url: 'http://127.0.0.1:{listeners.index_api}/registry/notifications'}}]}}\n"
    )

    def answers() -> bool:
        try:
            return web.request(upstream, "GET", "/v2/").status == 200
        except OSError:
            return False

    command = ["docker-registry", "serve", str(config)]
    log = directory / "docker-registry.log"
    with daemon(command, log=log, env=Host(directory).environment(), answers=answers):
        whole = Cluster(directory, listeners, {"all": program})
        for cluster in started(whole, request.config):
            wait_until(
                lambda: whole.status(listeners.index_admin)["preheating"]["agents"] == 2,
                "both agents wait at the index",
            )
            yield Mirror(cluster, upstream)
    shutil.rmtree(directory)


def preheat(mirror: Mirror, *arguments: str) -> tuple[int, dict[str, Any], str]:
    """Exit status, the document that was printed, and what was said on standard error."""
    api = f"http://127.0.0.1:{mirror.cluster.ports.index_api}"
    done = run_to_the_end("preheat", "--api", api, "--json", *arguments)
    return done.returncode, json.loads(done.stdout or "{}"), done.stderr


def held(mirror: Mirror, agent: int) -> set[str]:
    directory = mirror.cluster.directory / "data" / f"agent-{agent}"
    return {path.name for path in directory.rglob("*") if path.is_file()}


def test_a_push_to_the_registry_brings_the_image_onto_all_agents(
    mirror: Mirror, images: ImageFactory, host: Host
) -> None:
    image = images.small("preheat-notified")
    host.push(image, mirror.upstream, "team/notified:v1")

    names = {part.hex for part in (image.manifest, *image.parts)}
    wait_until(
        lambda: names <= held(mirror, 1) and names <= held(mirror, 2), "both agents have the image"
    )
    (job,) = [
        job
        for job in preheat(mirror, "--list")[1]["jobs"]
        if job["digest"] == image.manifest.digest
    ]
    wait_until(
        lambda: preheat(mirror, "--job", job["id"], "--no-wait")[1]["state"] == "done", "it is done"
    )


def test_an_image_comes_onto_the_agents_that_are_named_and_is_waited_for(
    mirror: Mirror, images: ImageFactory, host: Host
) -> None:
    image = images.fresh("preheat-own")
    host.push(image, mirror.cluster.first.registry, "team/own:v1")
    agent = f"127.0.0.1:{mirror.cluster.ports.agents[1].peer}"

    status, job, _ = preheat(mirror, "team/own:v1", "--agents", agent)

    assert (status, job["state"]) == (0, "done")
    # The layers, each once; and the manifest.
    assert job["bytes_done"] == job["bytes_total"] > image.length
    assert {part.hex for part in image.parts} <= held(mirror, 2)


def test_what_cannot_be_done_is_said_with_its_exit_status(mirror: Mirror) -> None:
    status, _, said = preheat(mirror, f"{NAME}/team/nothing:v1", "--origins")
    assert status == 1
    assert "team/nothing" in said
    status, _, said = preheat(mirror, "team/x:v1", "--agents", "0%")
    assert status == 2
    done = run_to_the_end("preheat", "--api", "http://127.0.0.1:1", "team/x:v1", "--origins")
    assert done.returncode == 69
    assert "--api" in done.stderr
    port = mirror.cluster.ports.index_api
    headers = {"Content-Type": "application/json"}
    large = b"x" * (3 << 20)
    assert web.request(port, "POST", "/preheat", headers=headers, body=large).status == 413
