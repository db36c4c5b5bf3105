"""Pushes while the backend is away, a kill of the index before it is back, and pulls without any index."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ports import PortAllocator

from . import web
from .conftest import new_directory, started
from .program import Cluster, separate_processes
from .waiting import wait_until


@pytest.fixture(scope="module")
def cluster(scratch: Path, ports: PortAllocator, request) -> Iterator[Cluster]:
    """One process for each role and one agent."""
    directory = new_directory(scratch, "down")
    yield from started(separate_processes(directory, ports.cluster(1)), request.config)


def test_an_image_that_was_pushed_while_the_backend_was_away_is_there_for_good(
    cluster: Cluster,
) -> None:
    origin, agent = cluster.ports.origin_registry, cluster.first.registry
    index = cluster.ports.index_admin
    web.push_image(origin, "team/down", "v1", [b"a layer"])
    backend, away = cluster.directory / "backend", cluster.directory / "away"
    backend.rename(away)
    wait_until(
        lambda: not cluster.status(index)["backend"]["available"], "the index knows", timeout=30
    )

    # A layer that is there already, and a new one.
    pushed = web.push_image(origin, "team/down", "v1", [b"a layer", b"another layer"])
    assert web.pull_image(agent, "team/down", "v1") == pushed
    head = web.request(origin, "HEAD", f"/v2/team/down/blobs/{web.digest_of(b'a layer')}")
    assert head.status == 200
    held = cluster.status(index)["journal"]
    assert held["changes"] >= 3

    cluster.kill("index")
    away.rename(backend)
    cluster.restart("index")
    assert web.pull_image(agent, "team/down", "v1") == pushed
    wait_until(lambda: not cluster.status(index)["journal"]["changes"], "it is written", timeout=30)
    answer = web.request(origin, "GET", "/v2/team/down/_swarmpull/history/v1")
    latest, _first = answer.json()["changes"]
    assert latest["digest"] == pushed
    assert web.pull_image(origin, "team/down", "v1") == pushed


def test_a_host_pulls_what_it_knows_while_no_index_answers(cluster: Cluster) -> None:
    agent = cluster.first.registry
    pushed = web.push_image(cluster.ports.origin_registry, "team/known", "v1", [b"known"])
    assert web.pull_image(agent, "team/known", "v1") == pushed
    # It answers from memory, and has it on its disk a moment later.
    names = [web.digest_of(b"known").partition(":")[2], pushed.partition(":")[2]]
    store = cluster.directory / "agent-1"
    wait_until(lambda: all(any(store.rglob(name)) for name in names), "it is on the disk")

    cluster.kill("index")
    try:
        cluster.kill("agent-1")
        cluster.programs["agent-1"].start()
        wait_until(lambda: _serves(agent), "the agent serves", timeout=30)
        answer = web.get_manifest(agent, "team/known", "v1")
        assert (answer.status, web.digest_of(answer.body)) == (200, pushed)
        assert answer.headers["warning"].startswith("110 ")
        assert web.pull_image(agent, "team/known", "v1") == pushed
        assert web.pull_image(agent, "team/known", pushed) == pushed
        assert web.get_manifest(agent, "team/known", "v2").status == 503
    finally:
        cluster.restart("index")
    wait_until(
        lambda: "warning" not in web.get_manifest(agent, "team/known", "v1").headers,
        "the index confirms the tag",
        timeout=30,
    )


def _serves(port: int) -> bool:
    try:
        return web.request(port, "GET", "/v2/").status == 200
    except OSError:
        return False
