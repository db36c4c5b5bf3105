"""Agents fetch by piece from the origin and from one another, and only when somebody reads."""

from __future__ import annotations

import hashlib
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from . import web
from .program import Cluster
from .waiting import wait_until

MIB: Final = 1 << 20
SWARM_BYTES: Final = 160 * MIB
SENDERS: Final = ("origin", "agent")


def push(cluster: Cluster, repository: str, content: bytes) -> str:
    """Push one layer to the origin, so that no agent has it; returns its digest."""
    web.push_image(cluster.ports.origin_registry, repository, "v1", [content])
    return web.digest_of(content)


def received(cluster: Cluster) -> list[dict[str, int]]:
    return [cluster.bytes_received(number) for number in range(1, len(cluster.ports.agents) + 1)]


def files_of(directory: Path) -> set[str]:
    """Every file below a directory with its length."""
    return {
        f"{path.relative_to(directory)} {path.stat().st_size}"
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_agents_get_pieces_from_the_origin_and_from_other_agents(separate_cluster: Cluster) -> None:
    content = web.random_bytes(SWARM_BYTES, "swarm")
    digest = push(separate_cluster, "team/swarm", content)
    before = received(separate_cluster)
    ready = threading.Barrier(len(separate_cluster.registries))

    def pull(port: int) -> web.Flow:
        ready.wait()
        return web.stream(port, f"/v2/team/swarm/blobs/{digest}")

    with ThreadPoolExecutor() as threads:
        flows = list(threads.map(pull, separate_cluster.registries))

    assert [flow.digest for flow in flows] == [digest] * len(flows)
    gained = [
        {sender: after[sender] - start[sender] for sender in SENDERS}
        for start, after in zip(before, received(separate_cluster), strict=True)
    ]
    for agent in gained:
        # Pieces that were claimed twice in the endgame may have come twice, but not many.
        assert SWARM_BYTES <= agent["origin"] + agent["agent"] <= 1.25 * SWARM_BYTES, gained
    # Whoever is first may have all of it from the origin, the others have not.
    assert sum(agent["agent"] > 0 for agent in gained) >= len(gained) - 1, gained
    # The origin gave out less than one copy for each agent: they shared.
    assert sum(agent["origin"] for agent in gained) < len(gained) * SWARM_BYTES, gained


def test_every_agent_keeps_a_copy_of_its_own(separate_cluster: Cluster) -> None:
    content = web.random_bytes(8 * MIB, "copies")
    digest = push(separate_cluster, "team/copies", content)
    for port in separate_cluster.registries:
        assert web.stream(port, f"/v2/team/copies/blobs/{digest}").digest == digest

    copies = [
        path.stat()
        for name in separate_cluster.programs
        if name.startswith("agent")
        for path in (separate_cluster.directory / name).rglob("*")
        if path.is_file() and path.stat().st_size == len(content)
    ]

    assert len(copies) == len(separate_cluster.registries)
    assert len({copy.st_ino for copy in copies}) == len(copies)


def test_head_of_a_blob_starts_no_download(separate_cluster: Cluster) -> None:
    content = web.random_bytes(8 * MIB, "head")
    digest = push(separate_cluster, "team/head", content)
    agents = {
        name: separate_cluster.directory / name
        for name in separate_cluster.programs
        if name.startswith("agent")
    }
    before = received(separate_cluster), {name: files_of(at) for name, at in agents.items()}

    for port in separate_cluster.registries:
        for target in (f"/v2/team/head/blobs/{digest}", f"/blobs/{digest}"):
            answer = web.request(port, "HEAD", target)
            assert answer.status == 200
            assert answer.headers["content-length"] == str(len(content))

    assert before == (received(separate_cluster), {n: files_of(at) for n, at in agents.items()})
    for agent in separate_cluster.ports.agents:
        known = {torrent["digest"] for torrent in separate_cluster.status(agent.admin)["torrents"]}
        assert digest not in known


def test_the_counters_of_status_are_in_the_metrics_too(separate_cluster: Cluster) -> None:
    digest = push(separate_cluster, "team/metrics", web.random_bytes(MIB, "metrics"))
    agent = separate_cluster.ports.agents[1]
    assert web.stream(agent.registry, f"/v2/team/metrics/blobs/{digest}").digest == digest

    counted = separate_cluster.bytes_received(2)
    samples = separate_cluster.metrics(agent.admin)
    for sender in SENDERS:
        labels = json.dumps({"source": sender})
        assert samples[f"swarmpull_piece_bytes_received_total{labels}"] == counted[sender]


def test_ranges_of_a_blob_are_exact_while_it_downloads(cluster: Cluster) -> None:
    content = web.random_bytes(48 * MIB, "ranges")
    digest = push(cluster, "team/ranges", content)
    total = len(content)
    cases = {
        f"bytes={total - 7}-": content[-7:],
        "bytes=0-0": content[:1],
        f"bytes={4 * MIB - 3}-{4 * MIB + 3}": content[4 * MIB - 3 : 4 * MIB + 4],
        "bytes=-5": content[-5:],
        f"bytes=10-{10 * total}": content[10:],
    }

    for header, expected in cases.items():
        target = f"/v2/team/ranges/blobs/{digest}"
        answer = web.request(cluster.registries[1], "GET", target, headers={"Range": header})
        assert answer.status == 206
        assert web.digest_of(answer.body) == web.digest_of(expected), header


def test_a_client_that_hangs_up_does_not_end_the_download_of_others(cluster: Cluster) -> None:
    content = web.random_bytes(64 * MIB, "hang-up")
    digest = push(cluster, "team/hang-up", content)
    port = cluster.registries[2]
    target = f"/v2/team/hang-up/blobs/{digest}"
    with web.connection(port) as impatient:
        impatient.request("GET", target)
        first = impatient.getresponse().read(MIB)
        assert first == content[:MIB]

    assert web.stream(port, target).digest == digest


def test_many_small_blobs_are_pulled_at_once(cluster: Cluster) -> None:
    layers = [web.random_bytes(1000 + number, f"small {number}") for number in range(60)]
    web.push_image(cluster.ports.origin_registry, "team/many-small", "v1", layers)

    def pull(layer: bytes) -> bytes:
        target = f"/v2/team/many-small/blobs/{web.digest_of(layer)}"
        return web.request(cluster.registries[1], "GET", target).body

    with ThreadPoolExecutor(20) as threads:
        assert list(threads.map(pull, layers)) == layers


def test_an_empty_blob_and_one_of_a_single_byte_are_content_like_any_other(
    cluster: Cluster,
) -> None:
    for content in (b"", b"x"):
        digest = push(cluster, "team/tiny", content)
        for port in cluster.registries:
            answer = web.request(port, "GET", f"/v2/team/tiny/blobs/{digest}")
            assert (answer.status, answer.body) == (200, content)


def test_the_complete_blob_is_reported_by_status(cluster: Cluster) -> None:
    content = web.random_bytes(5 * MIB, "status")
    digest = push(cluster, "team/status", content)
    agent = cluster.ports.agents[1]
    assert web.stream(agent.registry, f"/v2/team/status/blobs/{digest}").digest == digest

    def seeds() -> bool:
        torrents = cluster.status(agent.admin)["torrents"]
        return any(each["digest"] == digest and each["have"] == each["pieces"] for each in torrents)

    wait_until(seeds, "the agent seeds what it pulled")
    assert hashlib.sha256(content).hexdigest() == digest.partition(":")[2]
