"""Two whole clusters, each a process of all roles, replicate to one another, whatever is killed meanwhile.

Rules: ``team/**`` goes from east to west, ``both/**`` either way, ``slow/**`` from east to west at 8 MB/s.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import attrs
import pytest

from tests.ports import ClusterPorts, PortAllocator

from . import web
from .conftest import new_directory, started
from .program import Cluster, Program, options, run_to_the_end
from .test_artifacts import SIGNATURE, attach, referrers
from .waiting import wait_until

MIB: Final = 1 << 20
SLOW_BYTES_PER_SECOND: Final = 8_000_000
# Only ends what hangs: backoff after a failure is up to a minute.
PATIENCE: Final = 120.0


@attrs.frozen
class Side:
    """One of the clusters."""

    cluster: Cluster

    @property
    def ports(self) -> ClusterPorts:
        return self.cluster.ports

    @property
    def registry(self) -> int:
        return self.ports.origin_registry

    def push(self, repository: str, tag: str, *layers: bytes) -> str:
        return web.push_image(self.registry, repository, tag, layers)

    def digest(self, repository: str, tag: str) -> str | None:
        answer = web.get_manifest(self.registry, repository, tag)
        assert answer.status in {200, 404}, answer.text
        return web.digest_of(answer.body) if answer.status == 200 else None

    def replication(self) -> dict[str, Any]:
        answer = web.request(self.ports.index_admin, "GET", "/replication")
        assert answer.status == 200, answer.text
        return answer.json()

    def copied(self) -> float:
        metrics = self.cluster.metrics(self.ports.index_admin)
        return sum(value for name, value in metrics.items() if "replication_copied_total" in name)

    def bytes_from_others(self) -> int:
        """Bytes of pieces that the origin took from origins, of the other cluster."""
        return self.cluster.status(self.ports.origin_admin)["bytes_received"]["origin"]

    def bytes_handed_over(self) -> float:
        metrics = self.cluster.metrics(self.ports.origin_admin)
        return sum(value for name, value in metrics.items() if "handed_over_bytes_total" in name)

    def kill(self) -> None:
        assert self.cluster.kill("all") == -signal.SIGKILL

    def restart(self) -> None:
        self.cluster.restart("all")

    def wait_for(self, repository: str, tag: str, digest: str | None) -> None:
        wait_until(
            lambda: self.digest(repository, tag) == digest,
            f"{repository}:{tag} is {digest}",
            timeout=PATIENCE,
        )

    def wait_until_idle(self) -> None:
        wait_until(lambda: not self.replication()["queued"], "nothing waits", timeout=PATIENCE)


@attrs.frozen
class Pair:
    east: Side
    west: Side


def remotes(ports: ClusterPorts, rules: Mapping[str, tuple[str, ...]], **more: str) -> list[str]:
    """Options for remotes, all of them the cluster with these ports, and what goes there."""
    settings = dict(more)
    for number, name in enumerate(rules):
        settings[f"remotes.{number}.name"] = name
        settings[f"remotes.{number}.indexes"] = f"127.0.0.1:{ports.index_rpc}"
    pairs = [(pattern, name) for name, patterns in rules.items() for pattern in patterns]
    for number, (pattern, name) in enumerate(pairs):
        settings[f"replications.{number}.pattern"] = pattern
        settings[f"replications.{number}.remote"] = name
    return options(settings)


def one_process(directory: Path, name: str, ports: ClusterPorts, more: list[str]) -> Cluster:
    data = str(directory / name)
    arguments = ["--role", "all", "--data-dir", data, *options(ports.settings()), *more]
    program = Program(arguments, log=directory / f"{name}.log", admin=ports.admin)
    return Cluster(directory, ports, {"all": program})


@pytest.fixture(scope="module")
def pair(scratch: Path, ports: PortAllocator, request) -> Iterator[Pair]:
    directory = new_directory(scratch, "pair")
    at_east, at_west = ports.cluster(1), ports.cluster(1)
    rules = {"west": ("team/**", "both/**"), "slow-west": ("slow/**",)}
    to_west = remotes(at_west, rules, **{"remotes.1.rate": f"{SLOW_BYTES_PER_SECOND}"})
    to_east = remotes(at_east, {"east": ("both/**",)})
    east = one_process(directory, "east", at_east, to_west)
    west = one_process(directory, "west", at_west, to_east)
    for side in started(east, request.config):
        for other in started(west, request.config):
            yield Pair(Side(side), Side(other))


def test_an_image_arrives_with_the_same_digests_and_what_is_there_does_not_move(
    pair: Pair,
) -> None:
    layers = [web.random_bytes(5 * MIB, f"layer {number}") for number in range(3)]
    digest = pair.east.push("team/app", "v1", *layers)

    pair.west.wait_for("team/app", "v1", digest)
    assert web.pull_image(pair.west.registry, "team/app", "v1") == digest
    assert web.pull_image(pair.west.ports.agents[0].registry, "team/app", digest) == digest

    sent = pair.west.bytes_from_others()
    assert 15 * MIB <= sent < 15.1 * MIB
    # Another image that shares all layers but one, and the same layers in another repository.
    new = web.random_bytes(MIB, "new layer")
    pair.west.wait_for("team/app", "v2", pair.east.push("team/app", "v2", *layers, new))
    pair.west.wait_for("team/other", "v2", pair.east.push("team/other", "v2", *layers, new))
    assert pair.west.bytes_from_others() - sent < 1.1 * MIB


def test_an_index_of_images_arrives_whole(pair: Pair) -> None:
    children = []
    for architecture in ("amd64", "arm64"):
        layer = web.random_bytes(MIB, architecture)
        digest = pair.east.push("team/multi", architecture, layer)
        answer = web.get_manifest(pair.east.registry, "team/multi", digest)
        children.append(
            web.descriptor_of(answer.body, web.OCI_MANIFEST)
            | {"platform": {"architecture": architecture, "os": "linux"}}
        )
    # The same image below a list below a list.
    for tag in ("inner", "outer"):
        index = {"schemaVersion": 2, "mediaType": web.OCI_INDEX, "manifests": children}
        body = json.dumps(index).encode()
        answer = web.put_manifest(pair.east.registry, "team/multi", tag, body, web.OCI_INDEX)
        assert answer.status == 201, answer.text
        children = [web.descriptor_of(body, web.OCI_INDEX)]
    pair.east.wait_until_idle()

    for tag in ("amd64", "arm64", "inner", "outer"):
        here, there = (
            web.get_manifest(side.registry, "team/multi", tag)
            for side in attrs.astuple(pair, recurse=False)
        )
        assert here.body == there.body
        assert here.headers["content-type"] == there.headers["content-type"]
    for architecture in ("amd64", "arm64"):
        web.pull_image(pair.west.registry, "team/multi", architecture)


def test_deletions_arrive_and_an_older_change_does_not_undo_them(pair: Pair) -> None:
    digest = pair.east.push("both/app", "gone", b"content")
    pair.west.wait_for("both/app", "gone", digest)

    answer = web.request(pair.west.registry, "DELETE", "/v2/both/app/manifests/gone")

    assert answer.status == 202, answer.text
    pair.east.wait_for("both/app", "gone", None)
    pair.east.wait_until_idle()
    assert pair.west.digest("both/app", "gone") is None


def test_crossing_changes_end_up_the_same_and_nothing_goes_round(pair: Pair) -> None:
    sides = (pair.east, pair.west)
    for turn in range(5):
        for number, side in enumerate(sides):
            side.push("both/race", "v1", f"{turn} {number}".encode())
    for side in sides:
        side.wait_until_idle()

    assert pair.east.digest("both/race", "v1") == pair.west.digest("both/race", "v1")
    before = [side.copied() for side in sides]
    digest = pair.east.push("both/race", "v2", b"once")
    pair.west.wait_for("both/race", "v2", digest)
    for side in sides:
        side.wait_until_idle()
    assert [side.copied() for side in sides] == [before[0] + 1, before[1]]


def test_signatures_without_tags_follow_their_image_either_way_and_do_not_go_round(
    pair: Pair,
) -> None:
    sides = (pair.east, pair.west)
    digest = pair.east.push("both/signed", "v1", b"to be signed")
    pair.west.wait_for("both/signed", "v1", digest)
    image = web.get_manifest(pair.east.registry, "both/signed", "v1").body
    for side in sides:
        side.wait_until_idle()
    before = [side.copied() for side in sides]

    for number, side in enumerate(sides):
        attach(side.registry, "both/signed", image, SIGNATURE, f"signed by {number}")

    def listed(side: Side) -> list[dict[str, Any]]:
        return referrers(side.registry, "both/signed", digest).json()["manifests"]

    for side in sides:
        wait_until(lambda side=side: len(listed(side)) == 2, "both are there", timeout=PATIENCE)
        side.wait_until_idle()
    assert listed(pair.east) == listed(pair.west)
    assert [side.copied() for side in sides] == [count + 1 for count in before]


def test_a_remote_that_is_down_is_told_when_it_is_back_and_status_says_why(pair: Pair) -> None:
    pair.west.kill()
    digests = {tag: pair.east.push("team/down", tag, tag.encode()) for tag in ("a", "b", "c")}

    def is_failing() -> bool:
        return bool(pair.east.replication()["remotes"][0]["failing"])

    wait_until(is_failing, "the failure is noticed")
    admin = f"127.0.0.1:{pair.east.ports.index_admin}"
    shown = run_to_the_end("replication", "status", admin)
    assert shown.returncode == 0, shown.stderr
    assert "team/down" in shown.stdout
    document = json.loads(run_to_the_end("replication", "status", admin, "--json").stdout)[0]
    assert {entry["tag"] for entry in document["entries"]} == {"a", "b", "c"}
    assert "refused" in document["remotes"][0]["failure"].lower()
    # The queue survives us, too.
    pair.east.kill()
    pair.east.restart()
    assert pair.east.replication()["queued"] == 3

    pair.west.restart()
    retried = run_to_the_end("replication", "retry", admin)
    assert retried.returncode == 0, retried.stderr
    for tag, digest in digests.items():
        pair.west.wait_for("team/down", tag, digest)
    pair.east.wait_until_idle()


def test_config_check_names_rules_that_match_no_repository(pair: Pair) -> None:
    data = str(pair.east.cluster.directory / "east")
    rules = remotes(pair.west.ports, {"west": ("team/*", "taem/*")})
    checked = run_to_the_end("config", "check", "--role", "all", "--data-dir", data, *rules)
    assert checked.returncode == 0, checked.stderr
    assert "Replication of taem/* matches none of the " in checked.stdout
    assert "team/*" not in checked.stdout


@pytest.mark.parametrize("victim", ["east", "west"])
def test_kill_9_midway_loses_nothing_and_repeats_little(pair: Pair, victim: str) -> None:
    # A blob of 24 MiB takes three seconds at the rate of this remote.
    digest = pair.east.push("slow/app", victim, web.random_bytes(24 * MIB, victim))
    before = pair.west.bytes_from_others()
    wait_until(lambda: pair.west.bytes_from_others() - before >= 8 * MIB, "a third is there")

    side: Side = getattr(pair, victim)
    had = pair.west.bytes_from_others() - before
    side.kill()
    side.restart()
    if victim == "west":
        # It counts from nothing again, and what came after the last look was counted by nobody.
        before = pair.west.bytes_from_others() - had
    pair.west.wait_for("slow/app", victim, digest)

    moved = pair.west.bytes_from_others() - before
    assert moved <= (24 + 4 * 5) * MIB, "what was on its way, and no more"
    assert moved >= 24 * MIB or victim == "west"
    assert web.pull_image(pair.west.registry, "slow/app", victim) == digest
