"""Pushes to rings of origins whose backend is there, or not: what is acknowledged, kept and written."""

from __future__ import annotations

import shutil
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import httpx
import pytest
import trio

from swarmpull.config import (
    Address,
    Capacity,
    Lifetime,
    ListenerConfig,
    OriginBackendConfig,
    StoreConfig,
)
from swarmpull.digest import Digest
from swarmpull.errors import BackendUnavailable, RpcFailed
from swarmpull.roles import origin, replication, write_back
from swarmpull.store import janitor
from swarmpull.store.backends.base import blob_key
from swarmpull.store.backends.directory import DirectoryBackend
from swarmpull.store.write_back_queue import FILE_NAME, queued_digests
from swarmpull.swarm.metainfo import PIECE_LENGTH_MIN
from swarmpull.swarm.peers import PeerContact, PeerKind
from swarmpull.wire.api import REPLICATE_BLOB, ReplicateReply, ReplicateRequest
from tests.ports import free_ports

from .peers import Content, make_content, running_node
from .roles import Cluster, cluster_under, manifest_of
from .test_origin import client_of

REPOSITORY = "team/app"


def free_addresses(count: int) -> list[Address]:
    return [Address("127.0.0.1", port) for port in free_ports(count)]


@attrs.define
class Ring:
    """Origins ``origin-1`` and on, which know of one another.

    Attributes:
        backend: a directory; as long as it is a file, every operation of the backend fails.
    """

    cluster: Cluster
    addresses: list[Address]

    @property
    def backend(self) -> Path:
        return self.cluster.root / "backend"

    @property
    def names(self) -> list[str]:
        return [f"origin-{number}" for number in range(1, len(self.addresses) + 1)]

    async def start(self, name: str, **settings: object) -> None:
        listen = ListenerConfig(listen=self.addresses[int(name[-1]) - 1])
        await self.cluster.start_one_origin(name, rpc=listen, **settings)

    async def kill(self, name: str) -> None:
        await self.cluster.roles[name].kill()

    def break_backend(self) -> None:
        """Readers and writers get errors until `mend_backend`."""
        self.backend.rename(self.backend.with_name("away"))
        self.backend.write_bytes(b"not a directory")

    def mend_backend(self) -> None:
        self.backend.unlink()
        self.backend.with_name("away").rename(self.backend)

    async def put(self, name: str, content: bytes) -> httpx.Response:
        return await self.cluster.request(
            "PUT", name, f"/blobs/{Digest.of(content)}", content=content
        )

    async def get(self, name: str, digest: Digest) -> httpx.Response:
        return await self.cluster.get(name, f"/blobs/{digest}")

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():  # noqa: ASYNC110 - of a disk that nobody watches
            await trio.sleep(0.01)

    def on_disk(self, name: str, digest: Digest) -> bool:
        path = self.cluster.root / name / "blobs" / digest.algorithm / digest.hex[:2] / digest.hex
        return path.exists()

    def holders(self, digest: Digest) -> list[str]:
        return [name for name in self.names if self.on_disk(name, digest)]

    def backend_bytes(self, digest: Digest) -> bytes:
        return self.cluster.backend_file(digest).read_bytes()


@asynccontextmanager
async def ring_of(tmp_path: Path, count: int, **settings: object) -> AsyncIterator[Ring]:
    async with cluster_under(tmp_path) as cluster:
        ring = Ring(cluster, free_addresses(count))
        cluster._learn(origins=tuple(map(str, ring.addresses)))
        for name in ring.names:
            await ring.start(name, **settings)
        yield ring


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes minutes takes a moment."""
    for name, value in {"POLL": 0.2, "ANSWER_PATIENCE": 0.3, "STALLED": 0.5}.items():
        monkeypatch.setattr(replication, name, value)
    monkeypatch.setattr(write_back, "rank_delay", lambda rank, _: rank * 0.5)
    monkeypatch.setattr("swarmpull.store.retry_schedule.BACKOFF_MAX", 0.5)
    monkeypatch.setattr("swarmpull.store.retry_schedule.PROBE_MAX", 0.3)


# --- replication ----------------------------------------------------------------------------------


async def test_a_push_is_on_as_many_disks_as_configured_when_it_is_acknowledged(
    tmp_path: Path,
) -> None:
    async with ring_of(tmp_path, 4, replicas=3) as ring:
        ring.break_backend()
        for number in range(8):
            content = make_content(PIECE_LENGTH_MIN + number, seed=number)
            reply = await ring.put("origin-1", content.data)

            assert reply.status_code == 201, reply.text
            holders = ring.holders(content.digest)
            # Origin 1 has what it took, be it among the three owners or not.
            assert "origin-1" in holders
            assert len(holders) in {3, 4}
            for name in holders:
                assert content.digest in queued_digests(tmp_path / name)
        ring.mend_backend()


async def test_each_blob_is_written_by_one_origin_and_leaves_all_queues(
    tmp_path: Path, quick
) -> None:
    blobs = [make_content(1000 + number, seed=number) for number in range(10)]
    async with ring_of(tmp_path, 3) as ring:
        for content in blobs:
            assert (await ring.put("origin-2", content.data)).status_code == 201

        for name in ring.names:
            await ring.cluster.written_back(name)

        written = [
            await ring.cluster.metric(name, "backend_bytes_written_total") for name in ring.names
        ]
        assert written == [0, sum(len(content.data) for content in blobs), 0]
        for content in blobs:
            assert ring.backend_bytes(content.digest) == content.data
            assert ring.holders(content.digest) == ring.names
        assert not any(queued_digests(tmp_path / name) for name in ring.names)


async def test_a_replica_leaves_writing_to_the_acceptor_until_that_is_dead(
    tmp_path: Path, quick
) -> None:
    content = make_content(1000)
    async with ring_of(tmp_path, 2) as ring:
        # The acceptor lives and cannot write; the other one could.
        await ring.kill("origin-1")
        lost = tmp_path / "lost"
        await ring.start("origin-1", backend=OriginBackendConfig(url=lost.as_uri()))
        lost.rename(tmp_path / "lost-away")
        assert (await ring.put("origin-1", content.data)).status_code == 201
        await ring.cluster.counted("origin-2", "write_back_attempts_total", 3)
        assert not ring.cluster.backend_file(content.digest).exists()
        assert await ring.cluster.metric("origin-2", "write_back_failures_total") == 0

        await ring.kill("origin-1")
        await ring.cluster.written_back("origin-2")

        assert ring.backend_bytes(content.digest) == content.data


async def test_a_replica_does_not_wait_for_an_acceptor_for_ever(
    tmp_path: Path, quick, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write_back, "POSTPONED_MAX", 2)
    content = make_content(1000)
    async with ring_of(tmp_path, 2) as ring:
        await ring.kill("origin-1")
        lost = tmp_path / "lost"
        await ring.start("origin-1", backend=OriginBackendConfig(url=lost.as_uri()))
        lost.rename(tmp_path / "lost-away")
        assert (await ring.put("origin-1", content.data)).status_code == 201

        await ring.cluster.written_back("origin-2")

        assert ring.backend_bytes(content.digest) == content.data


async def test_the_death_of_the_acceptor_and_its_disk_loses_nothing(tmp_path: Path, quick) -> None:
    content = make_content(2 * PIECE_LENGTH_MIN + 5)
    async with ring_of(tmp_path, 4, replicas=2) as ring:
        ring.break_backend()
        assert (await ring.put("origin-1", content.data)).status_code == 201
        await ring.kill("origin-1")
        shutil.rmtree(tmp_path / "origin-1")

        # Whoever is asked, those that never had it too.
        assert len(ring.holders(content.digest)) < 3
        for name in ring.names[1:]:
            path = f"/blobs/{content.digest}"
            head = await ring.cluster.request("HEAD", name, path)
            assert head.headers["content-length"] == str(len(content.data))
            reply = await ring.get(name, content.digest)
            assert (reply.status_code, reply.content) == (200, content.data)

        ring.mend_backend()
        for name in ring.names[1:]:
            await ring.cluster.written_back(name)
        assert ring.backend_bytes(content.digest) == content.data


async def test_an_agent_reads_what_is_only_in_a_queue(tmp_path: Path) -> None:
    content = make_content(PIECE_LENGTH_MIN + 5)
    async with ring_of(tmp_path, 3, replicas=1) as ring:
        await ring.cluster.start_tracker()
        await ring.cluster.start_agent()
        ring.break_backend()
        for name in ring.names:
            assert (await ring.put(name, content.data[: -ord(name[-1])])).status_code == 201

        for name in ring.names:
            data = content.data[: -ord(name[-1])]
            reply = await ring.get("agent", Digest.of(data))
            assert (reply.status_code, reply.content) == (200, data)
        ring.mend_backend()


async def test_what_no_origin_has_is_not_found(tmp_path: Path) -> None:
    async with ring_of(tmp_path, 3) as ring:
        reply = await ring.get("origin-1", Digest.of(b"nowhere"))

    assert reply.status_code == 404


async def test_what_a_dead_origin_may_have_is_not_there_now_and_can_be_pushed(
    tmp_path: Path,
) -> None:
    async with ring_of(tmp_path, 3, replicas=1) as ring:
        ring.break_backend()
        assert (await ring.put("origin-3", b"data")).status_code == 201
        await ring.kill("origin-3")
        ring.mend_backend()
        path = f"/blobs/{Digest.of(b'data')}"

        # Asked, and then not asked any more.
        for _ in range(5):
            reply = await ring.cluster.get("origin-1", path)
            (error,) = reply.json()["errors"]
            assert (reply.status_code, error["code"]) == (503, "UNAVAILABLE")
            assert (
                f"may wait on another origin (origin.held_blob at {ring.addresses[2]}"
                in error["message"]
            )
        # Clients push what they are told is missing.
        assert (await ring.cluster.request("HEAD", "origin-1", path)).status_code == 404
        assert (await ring.put("origin-1", b"data")).status_code == 201
        assert (await ring.get("origin-2", Digest.of(b"data"))).content == b"data"


async def test_with_no_replica_in_reach_a_push_is_acknowledged_and_counted(
    tmp_path: Path,
) -> None:
    content = make_content(1000)
    async with ring_of(tmp_path, 3) as ring:
        await ring.kill("origin-2")
        await ring.kill("origin-3")

        assert (await ring.put("origin-1", content.data)).status_code == 201

        assert await ring.cluster.metric("origin-1", "write_back_unreplicated_total") == 1
        assert await ring.cluster.metric("origin-1", "write_back_replicas_missing_total") == 2


async def test_a_dead_owner_is_replaced_by_the_next_of_the_ring(tmp_path: Path) -> None:
    async with ring_of(tmp_path, 3, replicas=2) as ring:
        await ring.kill("origin-3")
        for number in range(6):
            content = make_content(1000, seed=number)
            assert (await ring.put("origin-1", content.data)).status_code == 201
            assert ring.holders(content.digest) == ["origin-1", "origin-2"]

        assert await ring.cluster.metric("origin-1", "write_back_replicas_missing_total") == 0


async def test_a_replica_that_hangs_is_waited_for_only_so_long(tmp_path: Path, quick) -> None:
    content = make_content(1000)
    async with cluster_under(tmp_path) as cluster:
        # It accepts connections, and says nothing.
        silent = await trio.open_tcp_listeners(0, host="127.0.0.1")
        address = f"127.0.0.1:{silent[0].socket.getsockname()[1]}"
        cluster._learn(origins=(address,))
        await cluster.start_one_origin("origin")

        path = f"/blobs/{content.digest}"
        reply = await cluster.request("PUT", "origin", path, content=content.data)

        assert reply.status_code == 201
        assert await cluster.metric("origin", "write_back_unreplicated_total") == 1
        await silent[0].aclose()


async def test_many_pushes_at_once_are_all_replicated(tmp_path: Path) -> None:
    contents = [make_content(1000 + number, seed=number) for number in range(100)]
    async with ring_of(tmp_path, 3) as ring:
        ring.break_backend()

        async def push(content: Content) -> None:
            assert (await ring.put("origin-1", content.data)).status_code == 201

        async with trio.open_nursery() as nursery:
            for content in contents:
                nursery.start_soon(push, content)

        for content in contents:
            assert ring.holders(content.digest) == ring.names
        for name in ring.names:
            assert await ring.cluster.metric(name, "write_back_queue_blobs") == 100
        assert await ring.cluster.metric("origin-1", "write_back_replicas_missing_total") == 0


async def slow_down(ring: Ring, name: str, rate: str) -> None:
    """Let an origin take pieces at no more than a rate."""
    url = f"http://{ring.cluster.roles[name].address('admin')}/rates"
    assert (await ring.cluster.client.put(url, json={"download_rate": rate})).status_code == 200


async def test_a_slow_replica_is_waited_for_as_long_as_pieces_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replication, "POLL", 0.1)
    content = make_content(4 * PIECE_LENGTH_MIN)
    async with ring_of(tmp_path, 2) as ring:
        await slow_down(ring, "origin-2", "8MB/s")

        assert (await ring.put("origin-1", content.data)).status_code == 201

        assert ring.holders(content.digest) == ring.names
        assert await ring.cluster.metric("origin-1", "write_back_replicas_missing_total") == 0


async def test_a_replica_that_gets_nothing_is_given_up(tmp_path: Path, quick) -> None:
    content = make_content(2 * PIECE_LENGTH_MIN)
    async with ring_of(tmp_path, 2) as ring:
        await slow_down(ring, "origin-2", "1kB/s")

        assert (await ring.put("origin-1", content.data)).status_code == 201

        assert ring.holders(content.digest) == ["origin-1"]
        assert await ring.cluster.metric("origin-1", "write_back_replicas_missing_total") == 1


async def test_an_origin_alone_in_its_ring_misses_no_replica(tmp_path: Path) -> None:
    async with ring_of(tmp_path, 1) as ring:
        for content in (b"one", b"two"):
            assert (await ring.put("origin-1", content)).status_code == 201

        assert await ring.cluster.metric("origin-1", "write_back_unreplicated_total") == 0
        assert await ring.cluster.metric("origin-1", "write_back_replicas_missing_total") == 0


async def test_a_push_through_an_agent_is_replicated_too(tmp_path: Path) -> None:
    content = make_content(PIECE_LENGTH_MIN + 5)
    async with ring_of(tmp_path, 3, replicas=2) as ring:
        ring.break_backend()
        async with running_node(tmp_path / "agent") as agent:
            await agent.seed(content)
            await client_of(ring.cluster).adopt_blob(content.metainfo, "", agent.contact)

        assert len(ring.holders(content.digest)) == 2
        ring.mend_backend()


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), float("inf"), 1e300])
@pytest.mark.parametrize("rank", [-(2**40), 0, 2**40])
async def test_absurd_requests_for_copies_do_not_harm_the_origin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, rank: int
) -> None:
    monkeypatch.setattr(origin, "REPLICATION_WAIT_MAX", 0.05)
    content = make_content(1000)
    nobody = PeerContact("e" * 32, "127.0.0.1", 1, PeerKind.ORIGIN)
    async with ring_of(tmp_path, 1) as ring:
        address, call = str(ring.addresses[0]), ring.cluster.pool.call
        request = ReplicateRequest(content.metainfo, "", nobody, rank, seconds)
        reply = await call(address, REPLICATE_BLOB, request, timeout=5.0)
        assert reply == ReplicateReply(stored=False, received=0)
        odd = attrs.evolve(request, namespace="../up")
        with pytest.raises(RpcFailed, match="is not a repository name"):
            await call(address, REPLICATE_BLOB, odd, timeout=5.0)

        assert (await ring.put("origin-1", b"data")).status_code == 201


# --- the queue ------------------------------------------------------------------------------------


async def test_an_image_can_be_pushed_to_a_ring_and_pulled_from_each_member(
    tmp_path: Path,
) -> None:
    config, layer = b"{}", b"layer " * 1000
    async with cluster_under(tmp_path) as cluster:
        await cluster.start_index()
        ring = Ring(cluster, free_addresses(2))
        cluster._learn(origins=tuple(map(str, ring.addresses)))
        for name in ring.names:
            await ring.start(name)

        manifest = await cluster.push_image("origin-1", REPOSITORY, config, layer)

        assert manifest == manifest_of(config, layer)
        for data in (config, layer, manifest):
            assert ring.holders(Digest.of(data)) == ring.names
        for name in ring.names:
            pulled = await cluster.get(name, f"/v2/{REPOSITORY}/manifests/v1")
            assert (pulled.status_code, pulled.content) == (200, manifest)


async def test_a_full_origin_refuses_pushes_rather_than_losing_what_is_queued(
    tmp_path: Path,
) -> None:
    contents = [make_content(PIECE_LENGTH_MIN, seed=number) for number in range(6)]
    store = StoreConfig(max_bytes=Capacity(str(4 * PIECE_LENGTH_MIN)))
    async with ring_of(tmp_path, 1, store=store) as ring:
        ring.break_backend()
        replies = {c.digest: await ring.put("origin-1", c.data) for c in contents}

        refused = [reply for reply in replies.values() if reply.status_code != 201]
        assert len(refused) == 2
        for reply in refused:
            (error,) = reply.json()["errors"]
            assert (reply.status_code, error["code"]) == (507, "UNAVAILABLE")
            assert "has no room" in error["message"]
            assert f"{4 * PIECE_LENGTH_MIN} bytes of it not written back" in error["message"]
        ring.mend_backend()
        await ring.cluster.written_back("origin-1")
        for content in contents[4:]:
            assert (await ring.put("origin-1", content.data)).status_code == 201

        await ring.cluster.written_back("origin-1")
        for content in contents:
            assert ring.backend_bytes(content.digest) == content.data


async def test_a_queue_at_its_limit_refuses_what_is_new_and_takes_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write_back, "QUEUED_MAX", 2)
    async with ring_of(tmp_path, 1) as ring:
        ring.break_backend()
        replies = [await ring.put("origin-1", each) for each in (b"one", b"two", b"three", b"one")]

        assert [reply.status_code for reply in replies] == [201, 201, 507, 200]
        (error,) = replies[2].json()["errors"]
        assert "2 blobs wait to be written to the backend" in error["message"]
        ring.mend_backend()
        await ring.cluster.written_back("origin-1")
        assert (await ring.put("origin-1", b"three")).status_code == 200


async def test_what_is_queued_is_pinned_from_the_start_and_then_it_may_go(tmp_path: Path) -> None:
    written, queued = make_content(1000, seed=1), make_content(1000, seed=2)
    async with ring_of(tmp_path, 1) as ring:
        assert (await ring.put("origin-1", written.data)).status_code == 201
        await ring.cluster.written_back("origin-1")
        ring.break_backend()
        assert (await ring.put("origin-1", queued.data)).status_code == 201
        await ring.kill("origin-1")
        ring.mend_backend()
        lost = tmp_path / "lost"
        expired = StoreConfig(idle_timeout=Lifetime(0.001))

        # The janitor's first round removes everything that it may.
        lost_backend = OriginBackendConfig(url=lost.as_uri())
        (lost / "temporary").mkdir(parents=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(janitor, "INTERVAL", 0.02)
            patch.setattr(DirectoryBackend, "put_file", fail)
            await ring.start("origin-1", store=expired, backend=lost_backend)
            await ring.until(lambda: not ring.on_disk("origin-1", written.digest))
            await ring.cluster.counted("origin-1", "write_back_failures_total", 2)
            assert ring.on_disk("origin-1", queued.digest)

            patch.undo()
            patch.setattr(janitor, "INTERVAL", 0.02)
            await ring.until(lambda: not ring.on_disk("origin-1", queued.digest))
        assert DirectoryBackend(lost)._path(blob_key(queued.digest)).exists()


async def fail(_: DirectoryBackend, key: str, path: Path) -> None:
    raise BackendUnavailable("lost", key, f"no room for {path}")


async def test_a_restart_goes_on_with_the_queue(tmp_path: Path) -> None:
    content = make_content(1000)
    async with ring_of(tmp_path, 1) as ring:
        ring.break_backend()
        assert (await ring.put("origin-1", content.data)).status_code == 201
        status = (await ring.cluster.status("origin-1"))["write_back"]
        assert (status["queued"], status["bytes"]) == (1, 1000)
        await ring.kill("origin-1")
        ring.mend_backend()

        await ring.start("origin-1")
        await ring.cluster.written_back("origin-1")

        assert ring.backend_bytes(content.digest) == content.data
        assert (await ring.cluster.status("origin-1"))["write_back"] == {
            "queued": 0,
            "bytes": 0,
            "oldest_seconds": 0.0,
            "failure": None,
        }


async def test_a_clock_that_went_back_delays_nothing_that_is_queued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = make_content(1000)
    year = 365 * 86400.0
    now = time.time
    async with ring_of(tmp_path, 1) as ring:
        monkeypatch.setattr(time, "time", lambda: now() + year)
        ring.break_backend()
        assert (await ring.put("origin-1", content.data)).status_code == 201
        await ring.cluster.counted("origin-1", "write_back_failures_total", 1)
        await ring.kill("origin-1")
        ring.mend_backend()
        monkeypatch.setattr(time, "time", now)

        await ring.start("origin-1")

        await ring.cluster.written_back("origin-1")
        assert ring.backend_bytes(content.digest) == content.data


async def test_a_lost_queue_is_made_anew_from_the_disk(tmp_path: Path) -> None:
    contents = [make_content(1000, seed=number) for number in range(3)]
    async with ring_of(tmp_path, 1) as ring:
        assert (await ring.put("origin-1", contents[0].data)).status_code == 201
        await ring.cluster.written_back("origin-1")
        ring.break_backend()
        for content in contents[1:]:
            assert (await ring.put("origin-1", content.data)).status_code == 201
        await ring.kill("origin-1")
        ring.mend_backend()
        for path in (tmp_path / "origin-1").glob(f"{FILE_NAME}*"):
            path.unlink()

        await ring.start("origin-1")
        await ring.cluster.written_back("origin-1")

        for content in contents:
            assert ring.backend_bytes(content.digest) == content.data


async def test_what_a_queue_made_anew_finds_on_the_disk_refuses_no_push(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = [make_content(1000, seed=number) for number in range(4)]
    async with ring_of(tmp_path, 1) as ring:
        for content in contents:
            assert (await ring.put("origin-1", content.data)).status_code == 201
        await ring.cluster.written_back("origin-1")
        await ring.kill("origin-1")
        for path in (tmp_path / "origin-1").glob(f"{FILE_NAME}*"):
            path.unlink()
        monkeypatch.setattr(write_back, "QUEUED_MAX", 2)
        monkeypatch.setattr(DirectoryBackend, "stat", fail_stat)

        pushed = []
        for data in (b"one", b"two", b"three"):
            # A restart does not make accepted ones of them.
            await ring.start("origin-1")
            pushed.append((await ring.put("origin-1", data)).status_code)
            await ring.kill("origin-1")
        assert pushed == [201, 201, 507]

        monkeypatch.undo()
        await ring.start("origin-1")
        await ring.cluster.written_back("origin-1")
        monkeypatch.setattr(write_back, "QUEUED_MAX", 1)
        monkeypatch.setattr(DirectoryBackend, "stat", fail_stat)
        last = [(await ring.put("origin-1", data)).status_code for data in (b"four", b"five")]
        assert last == [201, 507], "what was found and is written counts for nothing"


async def fail_stat(_: DirectoryBackend, key: str) -> None:
    raise BackendUnavailable("lost", key, "no answer")


async def test_in_mode_sync_a_push_is_acknowledged_when_the_backend_has_it(
    tmp_path: Path,
) -> None:
    content = make_content(1000)
    async with ring_of(tmp_path, 2, write_back="sync") as ring:
        ring.break_backend()
        assert (await ring.put("origin-1", content.data)).status_code == 503
        ring.mend_backend()
        assert (await ring.put("origin-1", content.data)).status_code == 200

        assert ring.backend_bytes(content.digest) == content.data
        assert ring.holders(content.digest) == ["origin-1"]


async def test_a_blob_that_has_left_the_disk_is_fetched_from_a_replica_and_written(
    tmp_path: Path, quick, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write_back, "rank_delay", lambda rank, _: rank * 600.0)
    content = make_content(1000)
    async with ring_of(tmp_path, 2) as ring:
        ring.break_backend()
        assert (await ring.put("origin-1", content.data)).status_code == 201
        shutil.rmtree(tmp_path / "origin-1" / "blobs" / "sha256" / content.digest.hex[:2])
        ring.mend_backend()

        await ring.cluster.written_back("origin-1")

        assert ring.backend_bytes(content.digest) == content.data


async def test_an_outage_is_one_line_in_the_log_and_its_end_another(
    tmp_path: Path, quick, logs: list[dict]
) -> None:
    async with ring_of(tmp_path, 1) as ring:
        ring.break_backend()
        for number in range(5):
            content = make_content(1000, seed=number)
            assert (await ring.put("origin-1", content.data)).status_code == 201
        await ring.cluster.counted("origin-1", "write_back_failures_total", 6)
        assert "not" in (await ring.cluster.status("origin-1"))["write_back"]["failure"].lower()
        ring.mend_backend()
        await ring.cluster.written_back("origin-1")

    events = [entry["event"] for entry in logs]
    assert events.count("write_back_failing") == 1
    assert events.count("write_back_goes_on") == 1


async def test_an_origin_whose_backend_was_silent_from_the_start_is_not_ready_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    async with cluster_under(tmp_path) as cluster:
        nowhere = OriginBackendConfig(
            url="s3://bucket?endpoint=127.0.0.1:9&secure=false&attempts=1"
        )
        await cluster.start_one_origin("origin", backend=nowhere)
        status = await cluster.status("origin")
        reasons = [reason for reason in status["reasons"] if "127.0.0.1:9" in reason]
        assert not status["ready"]
        assert reasons

        path = f"/blobs/{Digest.of(b'data')}"
        reply = await cluster.request("PUT", "origin", path, content=b"data")
        assert reply.status_code == 201, "it serves nevertheless"
        assert (await cluster.get("origin", path)).content == b"data"
