"""Which agents a job is for, what its image consists of, and when it has ended: all without a network."""

from __future__ import annotations

import json
import random
from typing import Any, cast

import pytest
import trio
import trio.testing

from swarmpull.config import Config
from swarmpull.digest import Digest
from swarmpull.errors import ManifestInvalid, SwarmpullError, UpstreamUnknown
from swarmpull.registry.errors import RegistryError
from swarmpull.registry.names import UpstreamNames
from swarmpull.registry.notifications import EVENTS_MAX, parse_notifications
from swarmpull.registry.preheat_app import Wish
from swarmpull.roles.preheat import NamedImage, Preheating, parse_image
from swarmpull.roles.preheat_jobs import (
    DONE,
    ENDED_MAX,
    FAILED,
    LOST,
    RUNNING,
    SILENCE_MAX,
    TASKS_MAX,
    WAITING,
    AgentTable,
    HostProgress,
    Job,
    JobTable,
    job_number,
    report_interval,
)
from swarmpull.roles.preheat_share import KnownAgent, Share
from swarmpull.roles.preheat_tree import DEPTH_MAX, Tree, read_tree
from swarmpull.telemetry import Metrics
from swarmpull.wire.api import Descriptor, UpstreamManifestReply
from swarmpull.wire.preheat_api import Part, TaskProgress

AGENTS = [KnownAgent(f"10.0.0.{number}:7100", f"host-{number}") for number in range(1, 11)]
DIGEST = Digest.of(b"manifest")


# --- shares ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "count"), [("all", 10), ("3", 3), ("99", 10), ("25%", 3), ("1%", 1), ("100%", 10)]
)
def test_a_share_is_so_many_agents_and_the_same_ones_for_the_same_seed(
    text: str, count: int
) -> None:
    share = Share.parse(text)
    shuffled = random.Random(7).sample(AGENTS, len(AGENTS))

    chosen, unknown = share.choose(AGENTS, 1)

    assert len(set(chosen)) == count
    assert not unknown
    assert share.choose(shuffled, 1)[0] == chosen
    if count < len(AGENTS):
        assert any(share.choose(AGENTS, seed)[0] != chosen for seed in range(2, 20))


def test_agents_are_named_by_host_address_or_both() -> None:
    chosen, unknown = Share.parse("host-3, 10.0.0.5,10.0.0.7:7100,other").choose(AGENTS, 1)

    assert [agent.name for agent in chosen] == ["host-3", "host-5", "host-7"]
    assert unknown == ("other",)


@pytest.mark.parametrize("text", ["", "0", "0%", "101%", "-1", "1.5", "a b", "a,,b", "%", "5%,a"])
def test_what_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be all"):
        Share.parse(text)


# --- images ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "image"),
    [
        ("team/app:v1", ("team/app", "v1")),
        ("app", ("app", "latest")),
        (f"app:v1@{DIGEST}", ("app", str(DIGEST), "v1")),
        (f"app@{DIGEST}", ("app", str(DIGEST))),
        ("docker.io/alpine:3", ("docker.io/library/alpine", "3")),
        ("r.example:5000/team/app:v1", ("r.example_5000/team/app", "v1")),
        ("swarm.example/team/app:v1", ("team/app", "v1")),
        ("swarm.example:5000/app", ("app", "latest")),
    ],
)
def test_an_image_is_read_as_people_write_it(text: str, image: tuple[str, ...]) -> None:
    names = UpstreamNames(["docker.io", "r.example:5000"], ["swarm.example", "swarm.example:5000"])

    found = parse_image(text, names, ("swarm.example", "swarm.example:5000"))

    assert found == NamedImage(*image)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", RegistryError),
        ("App", RegistryError),
        ("app:", RegistryError),
        ("app@sha256:1", RegistryError),
        ("other.example:5000/app", UpstreamUnknown),
    ],
)
def test_what_is_no_image_is_refused(text: str, error: type[SwarmpullError]) -> None:
    with pytest.raises(error):
        parse_image(text, UpstreamNames(["docker.io"]))


def image(*layers: bytes, **more: object) -> bytes:
    return json.dumps(
        {
            "schemaVersion": 2,
            "config": entry(b"config", "application/vnd.oci.image.config.v1+json"),
            "layers": [entry(layer, "application/vnd.oci.image.layer.v1.tar") for layer in layers],
            **more,
        }
    ).encode()


def entry(content: bytes, media_type: str, platform: str = "") -> dict[str, object]:
    described = {"digest": str(Digest.of(content)), "size": len(content), "mediaType": media_type}
    system, _, architecture = platform.partition("/")
    stated = {"platform": {"os": system, "architecture": architecture}} if platform else {}
    return described | stated


def index(*children: bytes, platforms: tuple[str, ...] = ()) -> bytes:
    kind = "application/vnd.oci.image.manifest.v1+json"
    stated = platforms or ("",) * len(children)
    entries = [entry(child, kind, each) for child, each in zip(children, stated, strict=True)]
    return json.dumps({"schemaVersion": 2, "manifests": entries}).encode()


async def tree_of(root: bytes, *others: bytes, platform: str = "") -> Tree:
    known = {Digest.of(content): content for content in others}

    async def read(digest: Digest) -> bytes:
        return known[digest]

    return await read_tree(Part(Digest.of(root), len(root)), root, read, platform)


async def test_all_of_an_image_is_found_once_and_children_come_first() -> None:
    one, two = image(b"shared", b"one"), image(b"shared", b"two!")
    root = index(one, two)

    tree = await tree_of(root, one, two)

    assert [part.digest for part in tree.manifests] == [
        Digest.of(each) for each in (one, two, root)
    ]
    assert {part.digest for part in tree.blobs} == {
        Digest.of(each) for each in (b"config", b"shared", b"one", b"two!")
    }
    assert tree.length == sum(map(len, (one, two, root, b"config", b"shared", b"one", b"two!")))


async def test_one_platform_of_several_may_be_meant() -> None:
    one, two = image(b"one"), image(b"two")
    root = index(one, two, platforms=("linux/amd64", "linux/arm64"))

    tree = await tree_of(root, one, two, platform="linux/arm64")

    assert Digest.of(b"two") in {part.digest for part in tree.blobs}
    assert Digest.of(b"one") not in {part.digest for part in tree.blobs}


async def test_indexes_in_indexes_are_read_so_deep_and_no_deeper() -> None:
    levels = [image(b"layer")]
    while len(levels) < DEPTH_MAX:
        levels.append(index(levels[-1]))
    assert len((await tree_of(levels[-1], *levels)).manifests) == DEPTH_MAX

    levels.append(index(levels[-1]))
    with pytest.raises(ManifestInvalid, match="nested"):
        await tree_of(levels[-1], *levels)


# --- jobs -----------------------------------------------------------------------------------------

TREE = Tree((Part(DIGEST, 10),), (Part(Digest.of(b"layer"), 90),))


def job_for(*addresses: str, name: str = "app", begun: bool = True) -> Job:
    hosts = {address: HostProgress("") for address in addresses}
    number = job_number(name, DIGEST, "agents all")
    job = Job(number, name, name, "v1", DIGEST, "agents all", 1, 0.0, hosts)
    if begun:
        job.tree, job.state = TREE, RUNNING
    return job


def test_a_job_is_done_when_all_hosts_are() -> None:
    table, job = JobTable(), job_for("a", "b")
    table.add(job)

    table.report("a", TaskProgress(job.number, 40, "running"), 1.0)
    table.report("b", TaskProgress(job.number, 5, "done"), 2.0)
    assert (job.state, job.bytes_done, job.bytes_total) == (RUNNING, 140, 200)
    table.report("a", TaskProgress(job.number, 100, "done"), 3.0)

    assert (job.state, job.ended_at, job.bytes_done) == (DONE, 3.0, 200)
    assert not table.tasks_of("a")


def test_what_a_host_says_is_bounded_and_the_end_of_it_counts() -> None:
    table, job = JobTable(), job_for("a")
    table.add(job)

    table.report("a", TaskProgress(job.number, 10**15, "nonsense"), 1.0)
    assert (job.hosts["a"].state, job.bytes_done) == (RUNNING, 100)
    table.report("a", TaskProgress(job.number, 7, "failed", "x" * 10_000), 2.0)
    table.report("a", TaskProgress(job.number, 100, "done"), 3.0)
    table.report("other", TaskProgress(job.number, 100, "done"), 3.0)

    assert job.state == FAILED
    assert len(job.hosts["a"].reason) < 1000
    assert job.document()["failures"][0]["state"] == FAILED  # type: ignore[index]


def test_a_silent_agent_is_given_up_and_comes_back() -> None:
    table, job = JobTable(), job_for("a", "b")
    table.add(job)
    table.report("b", TaskProgress(job.number, 1, "running"), 1.0)

    table.look({"b": 0.0}, 10.0)
    assert (job.hosts["a"].state, job.state) == (LOST, RUNNING)
    table.look({"a": 0.0, "b": 0.0}, 20.0)
    assert job.hosts["a"].state == WAITING

    table.look({"a": SILENCE_MAX + 1}, 30.0)
    assert job.state == FAILED
    assert "2 of 2 agents" in job.reason


def test_no_agent_gets_more_than_some_jobs_at_a_time_and_old_ones_are_forgotten() -> None:
    table = JobTable()
    jobs = [job_for("a", name=f"app-{number}") for number in range(TASKS_MAX + 5)]
    for job in jobs:
        table.add(job)

    assert table.tasks_of("a") == jobs[:TASKS_MAX]
    table.report("a", TaskProgress(jobs[0].number, 100, "done"), 1.0)
    assert table.tasks_of("a") == jobs[1 : TASKS_MAX + 1]

    for number in range(ENDED_MAX + 20):
        ended = job_for(name=f"ended-{number}")
        ended.end(DONE, 1.0)
        table.add(ended)
    table.add(job_for("a", name="last"))
    assert sum(job.has_ended for job in table) == ENDED_MAX


def test_reports_of_many_hosts_are_rare() -> None:
    assert report_interval(10) == 1.0
    assert report_interval(10_000) == 20.0


def test_an_agent_that_waits_is_there() -> None:
    table = AgentTable()
    table.heard("a", "host-a", 0.0)
    table.heard("b", "host-b", 0.0)
    table.begin_wait("a")

    assert [agent.address for agent in table.known(SILENCE_MAX + 1)] == ["a"]
    table.forget_silent(SILENCE_MAX + 1)
    assert len(table) == 1
    table.end_wait("a", 100.0)
    assert table.silence(110.0) == {"a": 10.0}


# --- notifications --------------------------------------------------------------------------------


def docker_event(**more: object) -> dict[str, object]:
    """As docker-registry 2.8 sends it."""
    target = {
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "size": 708,
        "digest": str(DIGEST),
        "length": 708,
        "repository": "team/app",
        "url": f"http://127.0.0.1:5000/v2/team/app/manifests/{DIGEST}",
        "tag": "v1",
    }
    return {
        "id": "320678d8-ca14-430f-8bb6-4ca139cd83f7",
        "timestamp": "2016-03-09T14:44:26.402973972-08:00",
        "action": "push",
        "target": target | more,
        "request": {"id": "6df24a34", "host": "127.0.0.1:5000", "method": "PUT"},
        "actor": {},
        "source": {"addr": "host:5000", "instanceID": "a53db899"},
    }


# As Harbor's driver for Kraken sends it: the names of fields are those of Go.
HARBOR = {
    "Events": [
        {
            "Id": "YSnFhJWCpNoVynYgHQuyz2xdoyXMI7BD",
            "TimeStamp": "2024-01-18T14:37:42.194082639Z",
            "Action": "push",
            "Target": {
                "MediaType": "application/vnd.docker.distribution.manifest.v2+json",
                "Digest": str(DIGEST),
                "Repository": "library/app",
                "Url": "https://harbor.example/v2/library/app/manifests/v1",
                "Tag": "v1",
            },
            "Request": None,
            "Actor": None,
        }
    ]
}


def test_both_forms_of_notifications_are_read() -> None:
    (docker,) = parse_notifications(json.dumps({"events": [docker_event()]}).encode()).pushed
    (harbor,) = parse_notifications(json.dumps(HARBOR).encode()).pushed

    assert (docker.host, docker.repository, docker.digest, docker.tag) == (
        "127.0.0.1:5000",
        "team/app",
        DIGEST,
        "v1",
    )
    assert (harbor.host, harbor.repository, harbor.tag) == ("harbor.example", "library/app", "v1")


def test_only_pushes_of_manifests_count() -> None:
    events = [
        docker_event(),
        docker_event(mediaType="application/octet-stream"),
        docker_event() | {"action": "pull"},
        docker_event() | {"action": "delete", "target": {"repository": "a", "tag": "b"}},
    ]

    found = parse_notifications(json.dumps({"events": events}).encode())

    assert (len(found.pushed), found.ignored) == (1, 3)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b'{"events": {}}',
        b'{"events": [1]}',
        b"[" * 100_000,
        json.dumps({"events": [docker_event(repository="../x")]}).encode(),
        json.dumps({"events": [docker_event(digest="sha256:1")]}).encode(),
        json.dumps({"events": [{}] * (EVENTS_MAX + 1)}).encode(),
    ],
)
def test_what_is_no_notification_is_refused(body: bytes) -> None:
    with pytest.raises(ValueError, match=r"it |events"):
        parse_notifications(body)


async def test_a_job_begun_again_before_its_cancelled_one_has_ended_can_be_cancelled() -> None:
    child = json.dumps(
        {
            "schemaVersion": 2,
            "config": entry(b"c", "application/vnd.oci.image.config.v1+json"),
            "layers": [],
        }
    )
    root = index(child.encode())
    unwound: list[str] = []

    class Origins:
        """Of the manifest in the index nothing comes, and leaving it takes some turns."""

        async def get_manifest(self, _: str, reference: str) -> UpstreamManifestReply:
            if reference == "v1":
                return UpstreamManifestReply(Descriptor(Digest.of(root), "", len(root)), root)
            try:
                await trio.sleep_forever()
            finally:
                with trio.CancelScope(shield=True):
                    await trio.sleep(0.01)
                unwound.append(reference)
            raise AssertionError

    async with trio.open_nursery() as nursery:
        config = Config()
        preheating = Preheating(cast("Any", Origins()), config, config.index, nursery, Metrics())
        for _ in range(2):
            job = await preheating.start(Wish("team/app:v1"))
            await trio.testing.wait_all_tasks_blocked(0.001)
            cancelled = preheating.cancel(str(job["id"]))
            assert cancelled is not None
            assert cancelled["state"] == "cancelled"

    assert len(unwound) == 2
