"""Cold blobs: seeded by origins while they are fetched, read through agents and origins meanwhile."""

from __future__ import annotations

import random
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import attrs
import httpx
import pytest
import trio

from swarmpull.digest import Digest
from swarmpull.errors import BackendUnavailable
from swarmpull.ring.membership import Membership
from swarmpull.roles import cold_blobs, cold_fetch, origin_backends
from swarmpull.roles.cluster import OriginClient, RingClient
from swarmpull.roles.hash_log import log_of
from swarmpull.store.backends import open_backend
from swarmpull.store.backends.base import blob_key
from swarmpull.store.backends.directory import DirectoryBackend
from swarmpull.store.backends.metainfo import metainfo_key
from swarmpull.swarm.metainfo import PIECE_LENGTH_MIN as PIECE
from swarmpull.wire.api import HashesRequest
from tests.ports import free_ports

from .peers import Content, make_content, until
from .roles import Cluster, cluster_under

PIECES = 12


@attrs.define
class Gated:
    """A backend of which the test says which pieces may be read, and what goes wrong.

    Attributes:
        allowed: pieces of blobs that may be read; None for all.
        read: bytes of blobs that were read.
        ranges: first piece of every read of a blob.
        fault: called before each chunk of a blob with its offset; may raise.
        pace: seconds that each chunk takes.
    """

    backend: DirectoryBackend
    allowed: set[int] | None = None
    read: int = 0
    ranges: list[int] = attrs.Factory(list)
    stats: int = 0
    fault: Callable[[int], object] | None = None
    pace: float = 0.0
    changed: trio.Event = attrs.Factory(trio.Event)

    def __getattr__(self, name: str):
        return getattr(self.backend, name)

    async def stat(self, key: str):
        self.stats += 1
        return await self.backend.stat(key)

    def allow(self, *pieces: int) -> None:
        """Let these pieces through, or all."""
        self.allowed = (self.allowed or set()) | set(pieces) if pieces else None
        self.changed.set()
        self.changed = trio.Event()

    @asynccontextmanager
    async def open(self, key: str, *, start: int = 0, stop: int | None = None, version: str = ""):
        async with self.backend.open(key, start=start, stop=stop, version=version) as chunks:
            self.ranges.append(start // PIECE)
            async with aclosing(self._chunks(chunks, start)) as gated:
                yield gated

    async def _chunks(self, chunks: AsyncIterator[bytes], offset: int) -> AsyncIterator[bytes]:
        async for chunk in chunks:
            while self.allowed is not None and offset // PIECE not in self.allowed:
                await self.changed.wait()
            await trio.sleep(self.pace)
            if self.fault is not None:
                self.fault(offset)
            offset += len(chunk)
            self.read += len(chunk)
            yield chunk


@pytest.fixture
async def backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gated:
    gated = Gated(await open_backend((tmp_path / "backend").as_uri()))

    async def open_gated(_url: str) -> Gated:
        return gated

    monkeypatch.setattr(origin_backends, "open_backend", open_gated)
    monkeypatch.setattr(cold_fetch, "PAUSE", 0.01)
    return gated


@pytest.fixture
async def cluster(tmp_path: Path, backend: Gated) -> AsyncIterator[Cluster]:
    async with cluster_under(tmp_path) as cluster:
        await cluster.start_index()
        await cluster.start_origin()
        await cluster.start_tracker()
        yield cluster


@pytest.fixture(scope="module")
def content() -> Content:
    return make_content((PIECES - 1) * PIECE + 1000, seed=7)


async def put(backend: Gated, content: Content, data: bytes | None = None) -> None:
    await backend.backend.put_bytes(
        blob_key(content.digest), content.data if data is None else data
    )


class Body:
    """What has come of a response, and the rest of it."""

    def __init__(self, reply: httpx.Response) -> None:
        self._parts = reply.aiter_raw()
        self._come = bytearray()

    async def read(self, length: int | None = None) -> bytes:
        """The next ``length`` bytes, or all that are left."""
        while length is None or len(self._come) < length:
            try:
                self._come += await anext(self._parts)
            except StopAsyncIteration:
                break
        taken = bytes(self._come[:length])
        del self._come[: len(taken)]
        return taken


async def until_metric(cluster: Cluster, role: str, name: str, value: float) -> None:
    """Readers have the last bytes before the disk is done; the test's own deadline bounds it."""
    while await cluster.metric(role, name) != value:  # noqa: ASYNC110 - there is no event
        await trio.sleep(0.005)


def url_of(cluster: Cluster, role: str, digest: Digest) -> str:
    return f"http://{cluster.roles[role].address('registry')}/blobs/{digest}"


@pytest.mark.parametrize("role", ["agent", "origin"])
async def test_the_first_bytes_are_there_while_the_rest_is_still_fetched(
    cluster, backend, content, role
) -> None:
    await put(backend, content)
    await cluster.start_agent()
    backend.allow(0)

    async with cluster.client.stream("GET", url_of(cluster, role, content.digest)) as reply:
        assert reply.headers["content-length"] == str(len(content.data))
        body = Body(reply)
        assert await body.read(PIECE) == content.data[:PIECE]
        assert await cluster.metric("origin", "backend_fetches") == 1
        backend.allow()
        rest = await body.read()

    assert rest == content.data[PIECE:]
    assert await cluster.metric("origin", "backend_bytes_read_total") == len(content.data)
    assert await cluster.metric("origin", "backend_pieces_published_total") == PIECES
    await until_metric(cluster, "origin", "backend_fetches", 0)


@pytest.mark.parametrize("role", ["agent", "origin"])
async def test_a_range_at_the_end_is_answered_before_the_middle_is_fetched(
    cluster, backend, content, role
) -> None:
    await put(backend, content)
    await cluster.roles["origin"].kill()
    port = int(cluster.roles["origin"].address("rpc").rpartition(":")[2])
    await cluster.start_origin(port=port, fetch_connections=2)
    await cluster.start_agent()
    last = PIECES - 2
    backend.pace = 0.1
    wanted = {"Range": f"bytes={last * PIECE + 5}-{last * PIECE + 104}"}

    reply = await cluster.client.get(url_of(cluster, role, content.digest), headers=wanted)

    assert reply.status_code == 206
    assert reply.content == content.data[last * PIECE + 5 : last * PIECE + 105]
    # Two connections: in order it would have been the ninth.
    assert backend.read < 6 * PIECE


async def test_a_question_about_the_length_fetches_nothing(cluster, backend, content) -> None:
    await put(backend, content)
    await cluster.start_agent()
    for role in ("agent", "origin"):
        reply = await cluster.client.head(url_of(cluster, role, content.digest))
        assert reply.headers["content-length"] == str(len(content.data))
    assert backend.ranges == []


async def test_many_readers_cost_one_fetch(cluster, backend, content) -> None:
    await put(backend, content)
    for number in range(3):
        await cluster.start_agent(f"agent-{number}")

    async def get(role: str) -> None:
        reply = await cluster.client.get(url_of(cluster, role, content.digest))
        assert reply.content == content.data

    async with trio.open_nursery() as nursery:
        for role in ("origin", "origin", "agent-0", "agent-0", "agent-1", "agent-2"):
            nursery.start_soon(get, role)

    assert backend.read == len(content.data)


async def test_a_pull_without_any_tracker_learns_the_hashes_from_the_origin(
    cluster, backend, content
) -> None:
    await put(backend, content)
    await cluster.roles["tracker"].kill()
    await cluster.start_agent()
    backend.allow(0, 1, 2)
    async with cluster.client.stream("GET", url_of(cluster, "agent", content.digest)) as reply:
        body = Body(reply)
        assert await body.read(2 * PIECE) == content.data[: 2 * PIECE]
        backend.allow()
        rest = await body.read()
    assert rest == content.data[2 * PIECE :]


async def test_a_restarted_origin_goes_on_where_it_was(cluster, backend, content) -> None:
    await put(backend, content)
    backend.allow(0, 1, 2, 3, 4, 5)
    with trio.move_on_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cluster.client.get, url_of(cluster, "origin", content.digest))
            await until(lambda: backend.read >= 6 * PIECE)
            nursery.cancel_scope.cancel()
    await cluster.roles["origin"].kill()
    before = backend.read
    backend.allow()

    await cluster.start_origin()
    reply = await cluster.client.get(url_of(cluster, "origin", content.digest))

    assert reply.content == content.data
    assert before <= 6 * PIECE
    # A piece that was whole is kept; of those under way at most one each is read again.
    assert backend.read <= len(content.data) + 4 * PIECE
    assert backend.read - before < len(content.data) - 2 * PIECE


async def test_an_agent_goes_on_when_the_origin_was_restarted_midway(
    cluster, backend, content
) -> None:
    await put(backend, content)
    port = int(cluster.roles["origin"].address("rpc").rpartition(":")[2])
    await cluster.start_agent()
    backend.allow(0, 1, 2, 3)
    async with cluster.client.stream("GET", url_of(cluster, "agent", content.digest)) as reply:
        body = Body(reply)
        first = await body.read(2 * PIECE)
        await cluster.roles["origin"].kill()
        backend.allow()
        await cluster.start_origin(port=port)
        rest = await body.read()
    assert first + rest == content.data


async def test_a_corrupt_object_is_quarantined_and_pulled_again_once_it_is_right(
    cluster, backend, content, logs
) -> None:
    wrong = bytearray(content.data)
    wrong[5 * PIECE] ^= 1
    await put(backend, content, bytes(wrong))
    await cluster.start_agent()

    for role in ("agent", "origin"):
        with pytest.raises(httpx.RemoteProtocolError):
            await cluster.client.get(url_of(cluster, role, content.digest))

    assert await cluster.metric("origin", "backend_quarantined_objects") == 1
    named = [entry for entry in logs if entry["event"] == "backend_object_corrupt"]
    assert {entry["digest"] for entry in named} == {str(content.digest)}
    for role in ("agent", "origin"):
        assert not list((cluster.root / role).glob("blobs/*/*/*"))

    await put(backend, content)
    reply = await cluster.client.get(url_of(cluster, "agent", content.digest))
    assert reply.content == content.data
    await until_metric(cluster, "origin", "backend_quarantined_objects", 0)


async def test_who_asks_late_how_a_corrupt_fetch_ended_is_told_and_begins_no_other(
    cluster, backend, content
) -> None:
    wrong = bytearray(content.data)
    wrong[5 * PIECE] ^= 1
    await put(backend, content, bytes(wrong))
    origins = Membership(cluster.config.cluster.origins, name="origin")
    client = OriginClient(RingClient(cluster.pool, origins))
    backend.allow(0)
    growth = (await client.get_metainfo(content.digest, growing=True)).growth
    backend.allow()
    await until_metric(cluster, "origin", "backend_fetches", 0)
    ranges = len(backend.ranges)

    late = HashesRequest(content.digest, "", growth.source, growth.position, 1.0)
    with pytest.raises(BackendUnavailable, match="the object is corrupt"):
        await client.hashes(late)
    assert len(backend.ranges) == ranges

    await put(backend, content)
    reply = await cluster.client.get(url_of(cluster, "origin", content.digest))
    assert reply.content == content.data
    assert (await client.hashes(late)).settled


async def test_a_backend_that_keeps_failing_fails_the_reader_and_the_next_pull_goes_on(
    cluster, backend, content
) -> None:
    await put(backend, content)
    await cluster.start_agent()

    def fail(offset: int) -> None:
        if offset >= 6 * PIECE:
            raise BackendUnavailable(backend.name, "key", "SlowDown")

    backend.fault = fail
    with pytest.raises(httpx.RemoteProtocolError):
        await cluster.client.get(url_of(cluster, "agent", content.digest))
    status = await cluster.client.get(f"http://{cluster.roles['origin'].address('admin')}/health")
    assert status.status_code == 200

    backend.fault = None
    reply = await cluster.client.get(url_of(cluster, "agent", content.digest))
    assert reply.content == content.data
    assert backend.read < len(content.data) + 3 * PIECE


async def test_a_range_that_fails_now_and_then_is_read_again(cluster, backend, content) -> None:
    await put(backend, content)
    chance = random.Random(3)

    def fail(_offset: int) -> None:
        if chance.random() < 0.05:
            raise BackendUnavailable(backend.name, "key", "reset")

    backend.fault = fail
    reply = await cluster.client.get(url_of(cluster, "origin", content.digest))
    assert reply.content == content.data


async def test_an_object_that_is_replaced_midway_fails_the_pull(cluster, backend, content) -> None:
    await put(backend, content)
    backend.allow(0)
    reads = []

    async def get() -> None:
        with pytest.raises(httpx.RemoteProtocolError):
            await cluster.client.get(url_of(cluster, "origin", content.digest))
        reads.append(backend.read)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(get)
        await until(lambda: backend.read >= PIECE)
        await put(backend, content)  # the same bytes, but nobody can know
        backend.allow()

    assert reads[0] < len(content.data)
    reply = await cluster.client.get(url_of(cluster, "origin", content.digest))
    assert reply.content == content.data


async def test_an_object_that_is_deleted_midway_fails_the_pull(cluster, backend, content) -> None:
    await put(backend, content)
    backend.allow(0)

    async def get() -> None:
        with pytest.raises(httpx.RemoteProtocolError):
            await cluster.client.get(url_of(cluster, "origin", content.digest))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(get)
        await until(lambda: backend.read >= PIECE)
        await backend.delete(blob_key(content.digest))
        backend.allow()
    reply = await cluster.client.get(url_of(cluster, "origin", content.digest))
    assert reply.status_code == 404


async def test_a_connection_that_stalls_is_given_up_and_its_range_read_again(
    cluster, backend, content, monkeypatch
) -> None:
    monkeypatch.setattr(cold_fetch, "CHUNK_TIMEOUT", 0.3)
    await put(backend, content)
    backend.allow(*range(PIECES))
    backend.allowed.discard(5)

    async def open_the_gate() -> None:
        await until(lambda: backend.ranges.count(5) + backend.ranges.count(4) >= 2)
        backend.allow()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(open_the_gate)
        reply = await cluster.client.get(url_of(cluster, "origin", content.digest))
    assert reply.content == content.data


async def test_absurd_urges_do_not_harm_the_origin(cluster, backend, content) -> None:
    await put(backend, content)
    backend.allow(0)
    origins = Membership(cluster.config.cluster.origins, name="origin")
    client = OriginClient(RingClient(cluster.pool, origins))
    await client.get_metainfo(content.digest, growing=True)

    await client.urge(content.digest, (-1, PIECES, 1 << 62, 5))
    await client.urge(Digest.of(b"another"), (0,))

    backend.allow()
    reply = await cluster.client.get(url_of(cluster, "origin", content.digest))
    assert reply.content == content.data


# --- metainfo beside the blob ---------------------------------------------------------------------


async def test_a_cluster_that_lost_every_disk_has_all_hashes_at_once(
    cluster, backend, content
) -> None:
    await put(backend, content)
    await cluster.client.get(url_of(cluster, "origin", content.digest))
    file = backend.backend._path(metainfo_key(content.digest))
    await until(file.exists)
    await cluster.roles["origin"].kill()
    shutil.rmtree(cluster.root / "origin")
    backend.allow(0)
    await cluster.start_origin()
    origins = Membership(cluster.config.cluster.origins, name="origin")
    client = OriginClient(RingClient(cluster.pool, origins))

    with trio.fail_after(30):
        reply = await client.get_metainfo(content.digest, growing=True)
        log = log_of(content.digest, reply.growth)
        while not log.metainfo.is_complete:
            log.add(await client.hashes(HashesRequest(content.digest, "", "", 0, 1.0)))

    assert log.metainfo.complete() == content.metainfo
    assert backend.read < 2 * len(content.data)


async def test_a_piece_that_does_not_match_what_was_known_is_found_at_once(
    cluster, backend, content, logs
) -> None:
    await put(backend, content)
    await cluster.client.get(url_of(cluster, "origin", content.digest))
    await until(backend.backend._path(metainfo_key(content.digest)).exists)
    await cluster.roles["origin"].kill()
    shutil.rmtree(cluster.root / "origin")
    wrong = bytearray(content.data)
    wrong[PIECE + 1] ^= 1
    await put(backend, content, bytes(wrong))
    backend.allow(0)
    await cluster.start_origin()

    async def get() -> None:
        with pytest.raises(httpx.RemoteProtocolError):
            await cluster.client.get(url_of(cluster, "origin", content.digest))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(get)
        await until(lambda: backend.ranges.count(0) >= 2)
        backend.allow()

    (named,) = [entry for entry in logs if entry["event"] == "backend_object_corrupt"]
    assert "piece 1 is not what it was" in named["reason"]


async def test_metainfo_that_is_damaged_is_ignored_and_written_anew(
    cluster, backend, content
) -> None:
    await put(backend, content)
    await backend.put_bytes(metainfo_key(content.digest), b"swarmpull-meta-1 and then noise")

    reply = await cluster.client.get(url_of(cluster, "origin", content.digest))

    assert reply.content == content.data
    file = backend.backend._path(metainfo_key(content.digest))
    await until(lambda: len(file.read_bytes()) > 100)


async def test_a_push_leaves_its_metainfo_in_the_backend_too(cluster, backend, content) -> None:
    await cluster.push_blob("origin", "team/app", content.data)
    await until(backend.backend._path(metainfo_key(content.digest)).exists)


# --- several origins ------------------------------------------------------------------------------


@pytest.fixture
async def origins(tmp_path: Path, backend: Gated) -> AsyncIterator[Cluster]:
    """Three origins that know one another and read two ranges at a time, and a tracker."""
    ports = free_ports(3)
    async with cluster_under(tmp_path) as cluster:
        await cluster.start_index()
        cluster._learn(origins=tuple(f"127.0.0.1:{port}" for port in ports))
        for number, port in enumerate(ports):
            await cluster.start_origin(f"origin-{number}", port=port, fetch_connections=2)
        await cluster.start_tracker()
        yield cluster


def by_preference(cluster: Cluster, digest: Digest) -> tuple[str, str]:
    """The origin that owns a blob, and the second in the order of the ring."""
    order = Membership(cluster.config.cluster.origins, name="origin").order(str(digest))
    names = {cluster.roles[f"origin-{n}"].address("rpc"): f"origin-{n}" for n in range(3)}
    return names[order[0]], names[order[1]]


async def test_one_copy_leaves_the_bucket_whoever_is_asked(origins, backend, content) -> None:
    await put(backend, content)
    roles = ["origin-0", "origin-1", "origin-2"]
    for number in range(3):
        await origins.start_agent(f"agent-{number}")
        roles.append(f"agent-{number}")

    async def get(role: str) -> None:
        reply = await origins.client.get(url_of(origins, role, content.digest))
        assert reply.content == content.data

    async with trio.open_nursery() as nursery:
        for role in roles:
            nursery.start_soon(get, role)

    assert backend.read == len(content.data)


async def test_a_reader_at_another_origin_has_its_piece_fetched_first(
    origins, backend, content
) -> None:
    await put(backend, content)
    _, other = by_preference(origins, content.digest)
    backend.pace = 0.1
    start = (PIECES - 2) * PIECE

    reply = await origins.client.get(
        url_of(origins, other, content.digest), headers={"Range": f"bytes={start}-{start + 9}"}
    )

    assert reply.content == content.data[start : start + 10]
    assert backend.read < 7 * PIECE, "in order it would have been the ninth"


async def test_an_origin_that_is_left_alone_goes_on_from_the_backend(
    origins, backend, content, monkeypatch
) -> None:
    monkeypatch.setattr(cold_blobs, "LOOK_INTERVAL", 0.1)
    await put(backend, content)
    owner, other = by_preference(origins, content.digest)
    backend.allow(0, 1, 2)

    async with origins.client.stream("GET", url_of(origins, other, content.digest)) as reply:
        body = Body(reply)
        first = await body.read(2 * PIECE)
        await origins.roles[owner].kill()
        backend.allow()
        rest = await body.read()

    assert first + rest == content.data
    assert await origins.metric(other, "backend_bytes_read_total") < len(content.data)


async def test_a_small_blob_is_copied_once_too(origins, backend) -> None:
    small = make_content(5000)
    await put(backend, small)
    for number in range(3):
        reply = await origins.client.get(url_of(origins, f"origin-{number}", small.digest))
        assert reply.content == small.data
    assert backend.read == len(small.data)
