"""Preheating with real roles: an index, an origin, agents that wait for jobs, and webhooks."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from swarmpull.digest import Digest
from swarmpull.registry.client import put_rates
from swarmpull.roles import agent_preheat, preheat, preheat_jobs
from swarmpull.swarm.metainfo import PIECE_LENGTH_MIN

from .peers import make_content
from .roles import Cluster, manifest_of, whole_cluster
from .test_preheat_jobs import HARBOR, docker_event

REPOSITORY = "team/app"
CONFIG = b'{"architecture": "amd64"}'
LAYER = make_content(2 * PIECE_LENGTH_MIN + 5).data
MANIFEST = manifest_of(CONFIG, LAYER)
LENGTH = len(CONFIG) + len(LAYER) + len(MANIFEST)


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with whole_cluster(tmp_path) as cluster:
        # The index was there before the origin.
        cluster.changes.tell(cluster.config.cluster)
        yield cluster


JSON = {"Content-Type": "application/json"}


async def api(cluster: Cluster, method: str, path: str, **options: Any) -> httpx.Response:
    url = f"http://{cluster.roles['index'].address('api')}{path}"
    return await cluster.client.request(method, url, **options)


async def begin(cluster: Cluster, **wish: Any) -> dict[str, Any]:
    reply = await api(cluster, "POST", "/preheat", json={"image": f"{REPOSITORY}:v1", **wish})
    assert reply.status_code == 202, reply.text
    return reply.json()


async def until(check: Callable[[], Awaitable[Any]]) -> Any:
    with trio.fail_after(60.0):
        while True:
            found = await check()
            if found:
                return found
            await trio.sleep(0.05)


async def ended(cluster: Cluster, number: str) -> dict[str, Any]:
    """A job with all of its hosts, once it has ended."""

    async def look() -> dict[str, Any] | None:
        job = (await api(cluster, "GET", f"/preheat/{number}?hosts=1")).json()
        return job if job["ended_at"] else None

    return await until(look)


async def start_agents(cluster: Cluster, count: int) -> None:
    for number in range(1, count + 1):
        await cluster.start_agent(f"agent-{number}")
    await known(cluster, count)


async def known(cluster: Cluster, count: int) -> None:
    async def look() -> bool:
        return (await cluster.status("index"))["preheating"]["agents"] == count

    await until(look)


def has_blob(cluster: Cluster, role: str, content: bytes) -> bool:
    name = Digest.of(content).hex
    return any(path.name == name for path in (cluster.root / role).rglob("*") if path.is_file())


async def test_all_agents_get_all_of_an_image_before_anybody_pulls(cluster: Cluster) -> None:
    await cluster.push_image("origin", REPOSITORY, CONFIG, LAYER)
    await start_agents(cluster, 3)

    job = await begin(cluster, agents="all")
    assert (await begin(cluster, agents="all"))["id"] == job["id"]
    job = await ended(cluster, job["id"])

    assert (job["state"], job["hosts"]["done"], job["hosts"]["total"]) == ("done", 3, 3)
    assert (job["bytes_done"], job["bytes_total"]) == (3 * LENGTH, 3 * LENGTH)
    for number in range(1, 4):
        assert has_blob(cluster, f"agent-{number}", LAYER)
        assert await cluster.metric(f"agent-{number}", 'preheat_tasks_total{state="done"}') == 1.0
    assert await cluster.metric("index", 'preheat_jobs_total{state="done"}') == 1.0
    listed = (await api(cluster, "GET", "/preheat")).json()["jobs"]
    assert [each["id"] for each in listed] == [job["id"]]


async def test_a_number_of_agents_or_some_by_name_get_it_and_the_others_do_not(
    cluster: Cluster,
) -> None:
    await cluster.push_image("origin", REPOSITORY, CONFIG, LAYER)
    await start_agents(cluster, 3)

    job = await ended(cluster, (await begin(cluster, agents=1, seed=7))["id"])
    (chosen,) = job["each"]
    holders = {name for name in cluster.roles if has_blob(cluster, name, LAYER)} - {"origin"}
    (holder,) = holders
    assert chosen["host"] == cluster.roles[holder].address("peer")
    assert job["seed"] == 7

    named = cluster.roles["agent-2"].address("peer")
    job = await ended(cluster, (await begin(cluster, agents=[named, "nobody"]))["id"])
    assert job["state"] == "done"
    assert job["unknown_names"] == ["nobody"]
    assert has_blob(cluster, "agent-2", LAYER)


async def test_progress_is_what_is_on_the_disk_and_a_cancelled_job_leaves_the_agents(
    cluster: Cluster,
) -> None:
    await cluster.push_image("origin", REPOSITORY, CONFIG, LAYER)
    await start_agents(cluster, 1)
    admin = cluster.roles["origin"].address("admin")
    # The burst passes, and then nothing for hours.
    await put_rates([admin], {"upload_rate": 1})

    number = (await begin(cluster, agents="100%"))["id"]

    async def look() -> bool:
        job = (await api(cluster, "GET", f"/preheat/{number}")).json()
        return 0 < job["bytes_done"] < job["bytes_total"]

    await until(look)
    cancelled = (await api(cluster, "DELETE", f"/preheat/{number}")).json()
    assert cancelled["state"] == "cancelled"
    await cluster.counted("agent-1", 'preheat_tasks_total{state="cancelled"}', 1.0)

    await put_rates([admin], {"upload_rate": None})
    job = await ended(cluster, (await begin(cluster, agents="all"))["id"])
    assert job["state"] == "done"


async def test_an_agent_that_was_restarted_goes_on(cluster: Cluster) -> None:
    await cluster.push_image("origin", REPOSITORY, CONFIG, LAYER)
    await start_agents(cluster, 1)
    admin = cluster.roles["origin"].address("admin")
    await put_rates([admin], {"upload_rate": 1})
    number = (await begin(cluster, agents="all"))["id"]

    async def is_running() -> bool:
        return (await api(cluster, "GET", f"/preheat/{number}")).json()["hosts"]["running"] == 1

    await until(is_running)
    port = int(cluster.roles["agent-1"].address("peer").rpartition(":")[2])
    await cluster.roles["agent-1"].kill()
    await put_rates([admin], {"upload_rate": None})
    await cluster.start_agent("agent-1", peer_port=port)

    assert (await ended(cluster, number))["state"] == "done"


async def test_an_origin_that_lost_its_disk_has_the_blobs_before_they_are_asked_for(
    cluster: Cluster,
) -> None:
    await cluster.push_image("origin", REPOSITORY, CONFIG, LAYER)
    await cluster.written_back()
    port = int(cluster.roles["origin"].address("rpc").rpartition(":")[2])
    await cluster.roles["origin"].stop()
    shutil.rmtree(cluster.root / "origin")
    await cluster.start_origin(port=port)

    job = await ended(cluster, (await begin(cluster, origins=True))["id"])

    assert (job["state"], job["bytes_done"], job["hosts"]["total"]) == ("done", LENGTH, 3)
    assert has_blob(cluster, "origin", LAYER)
    assert {each["name"] for each in job["each"]} == {cluster.roles["origin"].address("peer")}


async def test_what_cannot_be_had_fails_the_job_with_its_digest(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_preheat, "PAUSE_MIN", 0.05)
    await cluster.push_image("origin", REPOSITORY, CONFIG, LAYER)
    await cluster.written_back()
    port = int(cluster.roles["origin"].address("rpc").rpartition(":")[2])
    await cluster.roles["origin"].stop()
    shutil.rmtree(cluster.root / "origin")
    cluster.backend_file(Digest.of(LAYER)).unlink()
    await cluster.start_origin(port=port)
    await start_agents(cluster, 1)

    job = await ended(cluster, (await begin(cluster, agents="all"))["id"])

    assert job["state"] == "failed"
    assert str(Digest.of(LAYER)) in job["failures"][0]["reason"]


REFUSED = [
    (b"{", 400, "no JSON object"),
    (b"[]", 400, "no JSON object"),
    (b"{}", 400, "image is needed"),
    (b'{"image": "a"}', 400, "either agents or origins"),
    (b'{"image": "a", "agents": "all", "origins": true}', 400, "either agents or origins"),
    (b'{"image": "a", "agents": true}', 400, "must not be true"),
    (b'{"image": "a", "agents": "0%"}', 400, "must be all"),
    (b'{"image": "a", "agents": ["a,b"]}', 400, "list of names"),
    (b'{"image": "a", "origins": true, "platform": "x"}', 400, "os/architecture"),
    (b'{"image": "A", "origins": true}', 400, "repository name"),
    (b'{"image": "team/none:v1", "origins": true}', 404, "team/none"),
    (b'{"image": "team/app:v1", "agents": "all"}', 409, "agent.preheat"),
]


async def test_a_wish_that_cannot_be_met_is_refused_with_the_reason(bare: Cluster) -> None:
    for body, status, said in REFUSED:
        reply = await api(bare, "POST", "/preheat", content=body, headers=JSON)

        assert reply.status_code == status, (body[:100], reply.text)
        assert said in reply.json()["errors"][0]["message"]


@pytest.fixture
async def bare(tmp_path: Path) -> AsyncIterator[Cluster]:
    """An image, and no agent."""
    async with whole_cluster(tmp_path) as cluster:
        cluster.changes.tell(cluster.config.cluster)
        await cluster.push_image("origin", REPOSITORY, CONFIG, b"layer")
        yield cluster


PAGES = [
    # A form, or fetch() without a preflight.
    ({"Content-Type": "text/plain"}, 415, "Content-Type 'text/plain' is not taken here"),
    ({}, 415, "a body without Content-Type"),
    (JSON | {"Origin": "http://evil.example"}, 403, "pages of 'http://evil.example' may not"),
    (JSON | {"Sec-Fetch-Site": "cross-site"}, 403, "pages of other sites may not"),
    # Whose name has come to mean our address.
    (JSON | {"Origin": "http://evil.example:7450", "Host": "evil.example:7450"}, 403, "may not"),
]


async def test_a_page_in_a_browser_can_begin_nothing(bare: Cluster) -> None:
    wish = json.dumps({"image": f"{REPOSITORY}:v1", "origins": True}).encode()
    for path in ("/preheat", "/registry/notifications"):
        for headers, status, said in PAGES:
            reply = await api(bare, "POST", path, content=wish, headers=headers)

            assert reply.status_code == status, (headers, reply.text)
            assert said in reply.json()["errors"][0]["message"]
    reply = await api(bare, "DELETE", "/preheat/1", headers={"Origin": "null"})
    assert reply.status_code == 403
    assert (await api(bare, "GET", "/preheat")).json()["jobs"] == []


async def test_a_page_whose_site_has_our_address_reads_nothing(bare: Cluster) -> None:
    evil = {"Host": "evil.example:7450"}
    reply = await api(bare, "GET", "/preheat", headers=evil)
    assert reply.status_code == 403
    assert "ask for it by that address or as localhost" in reply.json()["errors"][0]["message"]
    for host in ("localhost:7450", "127.0.0.1", "[::1]:7450"):
        assert (await api(bare, "GET", "/preheat", headers={"Host": host})).status_code == 200
    assert (await api(bare, "GET", "/health", headers=evil)).status_code == 200


async def test_a_job_that_is_not_known_is_said_to_be_of_another_index(bare: Cluster) -> None:
    for method in ("GET", "DELETE"):
        reply = await api(bare, method, "/preheat/0123456789abcdef")
        assert reply.status_code == 404
        assert "known to the index" in reply.json()["errors"][0]["message"]
    assert (await api(bare, "GET", "/health")).status_code == 200


async def test_notifications_begin_jobs_for_the_registries_that_are_known(bare: Cluster) -> None:
    digest = str(Digest.of(manifest_of(CONFIG, b"layer")))
    own = docker_event(url="", digest=digest)
    own["request"] = None
    foreign = json.loads(json.dumps(HARBOR))
    body = {"events": [own, docker_event(mediaType="application/octet-stream")]}

    docker = await api(
        bare,
        "POST",
        "/registry/notifications",
        content=json.dumps(body).encode(),
        headers={"Content-Type": "application/vnd.docker.distribution.events.v1+json"},
    )
    harbor = await api(bare, "POST", "/registry/notifications", json=foreign)

    assert (docker.status_code, docker.json()) == (200, {"pushed": 1, "ignored": 1})
    assert harbor.status_code == 200
    await bare.counted("index", 'preheat_notifications_total{result="unknown"}', 1.0)
    # Begun by another task, which asks an origin first.
    await bare.counted("index", 'preheat_notifications_total{result="started"}', 1.0)
    jobs = (await api(bare, "GET", "/preheat")).json()["jobs"]
    assert [(job["digest"], job["target"]) for job in jobs] == [(digest, "origins")]
    assert (await ended(bare, jobs[0]["id"]))["state"] == "done"
    assert await bare.metric("index", 'preheat_notifications_total{result="ignored"}') == 1.0


async def test_more_pushes_than_jobs_may_run_wait_for_one_another(
    bare: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preheat_jobs, "RUNNING_MAX", 1)
    monkeypatch.setattr(preheat, "ROOM_INTERVAL", 0.05)
    manifests = [
        await bare.push_image("origin", f"team/app-{number}", CONFIG, b"layer %d" % number)
        for number in range(4)
    ]
    events = [
        docker_event(url="", repository=f"team/app-{number}", digest=str(Digest.of(manifest)))
        | {"request": None}
        for number, manifest in enumerate(manifests)
    ]

    reply = await api(bare, "POST", "/registry/notifications", json={"events": events})

    assert reply.json()["pushed"] == 4
    with trio.fail_after(60.0):
        await bare.counted("index", 'preheat_jobs_total{state="done"}', 4.0)


async def test_what_there_is_not_is_answered_as_other_errors_are(bare: Cluster) -> None:
    for method, path, status in (("GET", "/nope", 404), ("PUT", "/preheat", 405)):
        reply = await api(bare, method, path)

        assert reply.status_code == status
        assert "POST /preheat" in reply.json()["errors"][0]["message"]


async def test_only_notifications_are_of_their_type(bare: Cluster) -> None:
    headers = {"Content-Type": "application/vnd.docker.distribution.events.v1+json"}
    for path, status in (("/preheat", 415), ("/registry/notifications", 400)):
        reply = await api(bare, "POST", path, content=b"{}", headers=headers)

        assert reply.status_code == status, reply.text


async def test_a_body_that_is_no_notification_is_refused(bare: Cluster) -> None:
    reply = await api(bare, "POST", "/registry/notifications", content=b"{}", headers=JSON)

    assert reply.status_code == 400
    assert "no list of events" in reply.json()["errors"][0]["message"]
