"""Any process may die and come back: what was acknowledged is there, and new work is done."""

from __future__ import annotations

import signal
import threading
from typing import Final

import pytest

from . import web
from .program import Cluster
from .waiting import wait_until

MIB: Final = 1 << 20
PROGRAMS: Final = ("tracker", "index", "origin", "agent-1", "agent-2", "agent-3")


def layer(name: str, length: int = 12 * MIB) -> bytes:
    return web.random_bytes(length, name)


def push(cluster: Cluster, repository: str, *layers: bytes) -> str:
    return web.push_image(cluster.ports.origin_registry, repository, "v1", layers)


def pulls(cluster: Cluster, port: int, repository: str, digest: str) -> None:
    """Pull until it works: a role that came back is found again within a few seconds."""

    def is_pulled() -> bool:
        answer = web.get_manifest(port, repository, "v1")
        return answer.status == 200 and web.pull_image(port, repository, "v1") == digest

    wait_until(is_pulled, f"{repository} is pulled from {port}")


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_killed_process_comes_back_to_a_system_that_works(
    separate_cluster: Cluster, name: str
) -> None:
    warm, cold = f"team/warm-{name}", f"team/cold-{name}"
    warm_digest = push(separate_cluster, warm, layer(warm))
    cold_digest = push(separate_cluster, cold, layer(cold))
    for port in separate_cluster.registries:
        assert web.pull_image(port, warm, "v1") == warm_digest

    separate_cluster.kill(name, signal.SIGKILL)
    separate_cluster.restart(name)

    new = f"team/new-{name}"
    new_digest = push(separate_cluster, new, layer(new))
    for port in separate_cluster.registries:
        pulls(separate_cluster, port, warm, warm_digest)
        pulls(separate_cluster, port, cold, cold_digest)
        pulls(separate_cluster, port, new, new_digest)


def test_all_processes_die_at_once_and_nothing_acknowledged_is_lost(
    separate_cluster: Cluster,
) -> None:
    digest = push(separate_cluster, "team/blackout", layer("blackout"))

    for name in PROGRAMS:
        separate_cluster.kill(name, signal.SIGKILL)
    separate_cluster.restart(*PROGRAMS)

    for port in separate_cluster.registries:
        pulls(separate_cluster, port, "team/blackout", digest)


def test_what_an_agent_has_is_served_while_the_others_are_down(separate_cluster: Cluster) -> None:
    content = layer("held")
    push(separate_cluster, "team/held", content)
    target = f"/blobs/{web.digest_of(content)}"
    port = separate_cluster.registries[0]
    assert web.stream(port, target).digest == web.digest_of(content)

    for name in ("tracker", "origin", "index"):
        separate_cluster.kill(name, signal.SIGKILL)
    try:
        assert web.stream(port, target).digest == web.digest_of(content)
    finally:
        separate_cluster.restart("tracker", "index", "origin")


def test_agents_serve_one_another_while_the_origin_is_down(separate_cluster: Cluster) -> None:
    content = layer("shared")
    push(separate_cluster, "team/shared", content)
    digest = web.digest_of(content)
    assert web.stream(separate_cluster.registries[0], f"/blobs/{digest}").digest == digest
    before = separate_cluster.bytes_received(2)

    separate_cluster.kill("origin", signal.SIGKILL)
    try:
        assert web.stream(separate_cluster.registries[1], f"/blobs/{digest}").digest == digest
        after = separate_cluster.bytes_received(2)
        assert after["agent"] - before["agent"] >= len(content)
        assert after["origin"] == before["origin"]
    finally:
        separate_cluster.restart("origin")


def test_agents_serve_one_another_while_the_origin_is_down_and_the_tracker_knows_nothing(
    separate_cluster: Cluster,
) -> None:
    content = layer("all-but-lost")
    push(separate_cluster, "team/all-but-lost", content)
    digest = web.digest_of(content)
    assert web.stream(separate_cluster.registries[0], f"/blobs/{digest}").digest == digest

    separate_cluster.kill("origin", signal.SIGKILL)
    try:
        separate_cluster.kill("tracker", signal.SIGKILL)
        separate_cluster.restart("tracker")

        def is_pulled() -> bool:
            with web.connection(separate_cluster.registries[1]) as opened:
                opened.request("GET", f"/blobs/{digest}")
                response = opened.getresponse()
                return response.status == 200 and response.read() == content

        # Until whoever has it has announced it again, and was asked for its piece hashes.
        wait_until(is_pulled, "it is pulled from the other agent", timeout=120.0)
    finally:
        separate_cluster.restart("origin")


def test_an_agent_that_dies_in_a_download_finishes_it_when_it_is_back(
    separate_cluster: Cluster,
) -> None:
    content = layer("interrupted", 256 * MIB)
    push(separate_cluster, "team/interrupted", content)
    target = f"/blobs/{web.digest_of(content)}"
    port = separate_cluster.registries[2]
    begun = threading.Event()
    cut = threading.Event()

    def read_until_it_is_cut() -> None:
        with web.connection(port) as opened:
            opened.request("GET", target)
            response = opened.getresponse()
            try:
                while response.read(MIB):
                    begun.set()
            except OSError:
                pass
            cut.set()

    reader = threading.Thread(target=read_until_it_is_cut)
    reader.start()
    assert begun.wait(30.0)
    separate_cluster.kill("agent-3", signal.SIGKILL)
    reader.join(30.0)
    assert cut.is_set()
    separate_cluster.restart("agent-3")

    assert web.stream(port, target).digest == web.digest_of(content)


def test_an_upload_is_resumed_after_the_origin_was_killed(separate_cluster: Cluster) -> None:
    content = layer("resumed", 6 * MIB)
    port = separate_cluster.ports.origin_registry
    target = web.start_upload(port, "team/resumed")
    half = len(content) // 2
    headers = {"Content-Type": "application/octet-stream"}
    answer = web.request(port, "PATCH", target, body=content[:half], headers=headers)
    assert answer.status == 202

    separate_cluster.kill("origin", signal.SIGKILL)
    separate_cluster.restart("origin")

    answer = web.request(port, "GET", target)
    assert answer.status == 204, answer.text
    offset = int(answer.headers["range"].partition("-")[2]) + 1
    assert offset <= half
    rest = {**headers, "Content-Range": f"{offset}-{len(content) - 1}"}
    assert web.request(port, "PATCH", target, body=content[offset:], headers=rest).status == 202
    finish = web.with_digest(target, web.digest_of(content))
    assert web.request(port, "PUT", finish, body=b"").status == 201
    flow = web.stream(separate_cluster.registries[0], f"/blobs/{web.digest_of(content)}")
    assert flow.digest == web.digest_of(content)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_process_that_is_asked_to_end_does_so_with_status_0(
    separate_cluster: Cluster, name: str
) -> None:
    try:
        assert separate_cluster.kill(name, signal.SIGTERM) == 0
    finally:
        separate_cluster.restart(name)
