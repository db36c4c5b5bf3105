"""What an index keeps of its backend, and how a change reaches the others before it is acknowledged."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import pytest
import trio
import trio.testing

from swarmpull.config import (
    Address,
    ApiConfig,
    BackendConfig,
    ClusterConfig,
    Config,
    Duration,
    IndexConfig,
    ListenerConfig,
)
from swarmpull.digest import Digest
from swarmpull.errors import BackendUnavailable, ManifestNotFound
from swarmpull.roles import index_cache
from swarmpull.roles.cluster import Cluster, IndexClient
from swarmpull.roles.index import run_index
from swarmpull.roles.index_cache import ResolveCache
from swarmpull.wire import api
from swarmpull.wire.codec import decode
from swarmpull.wire.rpc import open_rpc_pool
from tests.ports import free_ports

LOOPBACK = ListenerConfig(listen=Address("127.0.0.1", 0))


def describe(number: int, **fields: object) -> api.Descriptor:
    digest = Digest.of(f"manifest {number}".encode())
    return api.Descriptor(digest, "type", number, **fields)  # type: ignore[arg-type]


@attrs.define
class Source:
    """What there is to read, and how often it was."""

    current: api.Descriptor = attrs.field(factory=lambda: describe(1))
    reads: int = 0
    delay: float = 0.0

    async def __call__(self, _repository: str, _reference: str) -> api.Descriptor:
        self.reads += 1
        found = self.current
        await trio.sleep(self.delay)
        return found


@pytest.fixture
def source() -> Source:
    return Source()


# --- the cache --------------------------------------------------------------------------------


async def test_an_answer_is_kept_for_the_lease_from_when_it_began_to_be_read(
    autojump_clock, source
):
    cache = ResolveCache(1.0)
    source.delay = 0.4
    assert await cache.resolve("a", "v1", source) == describe(1)
    source.current = describe(2)

    await trio.sleep(0.5)
    assert await cache.resolve("a", "v1", source) == describe(1)
    packed = cache.get("a", "v1")
    assert packed is not None
    assert decode(packed, api.Descriptor) == describe(1)
    await trio.sleep(0.2)
    assert cache.get("a", "v1") is None
    assert await cache.resolve("a", "v1", source) == describe(2)
    assert source.reads == 2


@asynccontextmanager
async def renewing(cache: ResolveCache, read: index_cache.ReadDescriptor) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(cache.run, read)
        yield
        nursery.cancel_scope.cancel()


async def test_what_is_asked_for_is_read_ahead_of_the_end_of_its_lease(autojump_clock, source):
    cache = ResolveCache(1.0)
    source.delay = 0.1
    await cache.resolve("a", "v1", source)
    async with renewing(cache, source):
        for number in range(2, 20):
            source.current = describe(number)
            for _ in range(10):
                await trio.sleep(0.1)
                # Whoever asks never waits, and is not given what it was more than a lease ago.
                packed = cache.get("a", "v1")
                assert packed is not None
            assert decode(packed, api.Descriptor) == describe(number)


async def test_what_nobody_asks_for_is_not_read_any_more(autojump_clock, source):
    cache = ResolveCache(1.0)
    await cache.resolve("a", "v1", source)
    async with renewing(cache, source):
        await trio.sleep(100)
    assert source.reads == 1 + index_cache.IDLE_MAX
    assert cache.get("a", "v1") is None


async def test_what_is_forgotten_while_it_is_read_again_is_not_kept(autojump_clock, source):
    cache = ResolveCache(1.0)
    await cache.resolve("a", "v1", source)
    source.delay = 0.4
    async with renewing(cache, source):
        await trio.sleep(0.9)
        assert source.reads == 2, "it is being read"
        cache.forget("a", ("v1",))
        await trio.sleep(0.5)
        assert cache.get("a", "v1") is None


async def test_a_read_ahead_that_comes_late_does_not_hide_the_read_of_a_caller(
    autojump_clock, source
):
    cache = ResolveCache(1.0)
    await cache.resolve("a", "v1", source)
    (answer,) = cache._answers.values()
    cache.forget("a", ("v1",))
    source.delay = 0.4
    async with trio.open_nursery() as nursery:
        nursery.start_soon(cache.resolve, "a", "v1", source)
        await trio.testing.wait_all_tasks_blocked()
        await cache._renew(source, ("a", "v1"), answer, trio.Semaphore(0))
        assert source.reads == 2
        cache.forget("a", ("v1",))

    assert cache.get("a", "v1") is None


async def test_a_backend_that_fails_ahead_of_the_end_of_the_lease_changes_nothing(
    autojump_clock, source
):
    cache = ResolveCache(1.0)
    await cache.resolve("a", "v1", source)

    async def fail(_repository: str, _reference: str) -> api.Descriptor:
        raise BackendUnavailable("backend", "key", "down")

    async with renewing(cache, fail):
        await trio.sleep(0.95)
        assert await cache.resolve("a", "v1", fail) == describe(1)
        await trio.sleep(0.1)
        with pytest.raises(BackendUnavailable):
            await cache.resolve("a", "v1", fail)


async def test_reads_ahead_are_bounded_and_the_rest_is_left_to_whoever_asks(autojump_clock, source):
    cache = ResolveCache(1.0)
    for number in range(10 * index_cache.RENEWALS):
        await cache.resolve("a", f"v{number}", source)
    at_once = most = 0

    async def slow(_repository: str, _reference: str) -> api.Descriptor:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        await trio.sleep(0.9)
        at_once -= 1
        return describe(1)

    async with renewing(cache, slow):
        await trio.sleep(5)
    assert most == index_cache.RENEWALS
    assert len(cache._renewals) <= index_cache.RENEWALS


async def test_what_took_longer_than_the_lease_to_read_is_not_kept(autojump_clock, source):
    cache = ResolveCache(1.0)
    source.delay = 1.0
    await cache.resolve("a", "v1", source)

    assert len(cache) == 0


async def test_without_a_lease_nothing_is_kept_or_shared(autojump_clock, source):
    cache = ResolveCache(0.0)
    source.delay = 0.1
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(cache.resolve, "a", "v1", source)

    assert (source.reads, len(cache)) == (3, 0)


async def test_a_reply_that_was_under_way_when_a_change_came_in_is_not_kept(autojump_clock, source):
    cache = ResolveCache(1.0)
    source.delay = 0.2
    found: list[api.Descriptor] = []

    async def look() -> None:
        found.append(await cache.resolve("a", "v1", source))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(look)
        await trio.sleep(0.1)
        source.current = describe(2)
        cache.forget("a", ("v1",))
        # Whoever asks now must not be given what began to be read before.
        nursery.start_soon(look)
    assert found == [describe(1), describe(2)]
    assert await cache.resolve("a", "v1", source) == describe(2)
    assert source.reads == 2


async def test_a_change_of_all_of_a_repository_leaves_the_others(source):
    cache = ResolveCache(60.0)
    for key in (("a", "v1"), ("a", "v2"), ("a/b", "v1")):
        await cache.resolve(*key, source)

    cache.forget("a")

    assert cache.get("a", "v1") is None
    assert cache.get("a", "v2") is None
    assert cache.get("a/b", "v1") is not None


async def test_many_who_ask_at_once_share_one_read_and_its_error(autojump_clock, source):
    cache = ResolveCache(1.0)
    source.delay = 0.1
    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(cache.resolve, "a", "v1", source)
    assert source.reads == 1

    async def fail(repository: str, reference: str) -> api.Descriptor:
        await trio.sleep(0.1)
        raise ManifestNotFound(repository, reference)

    errors: list[ManifestNotFound] = []

    async def look() -> None:
        with pytest.raises(ManifestNotFound) as caught:
            await cache.resolve("a", "v2", fail)
        errors.append(caught.value)

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(look)
    assert len(set(map(id, errors))) == 3
    assert cache.get("a", "v2") is None


async def test_who_waits_for_a_reader_that_leaves_reads_itself(autojump_clock, source):
    cache = ResolveCache(10.0)
    source.delay = 1.0
    async with trio.open_nursery() as nursery:
        with trio.move_on_after(0.5):
            async with trio.open_nursery() as leaving:
                leaving.start_soon(cache.resolve, "a", "v1", source)
                await trio.sleep(0.1)
                nursery.start_soon(cache.resolve, "a", "v1", source)
    assert source.reads == 2
    assert cache.get("a", "v1") is not None


async def test_the_cache_is_bounded_and_forgets_what_was_used_longest_ago(source):
    cache = ResolveCache(60.0, capacity=5 * index_cache.OVERHEAD + 1000)
    for number in range(5):
        await cache.resolve("a", f"v{number}", source)
    assert cache.get("a", "v0") is not None
    await cache.resolve("a", "v5", source)
    await cache.resolve("a", "v6", source)

    assert cache.size <= 5 * index_cache.OVERHEAD + 1000
    assert cache.get("a", "v0") is not None
    assert cache.get("a", "v1") is None

    source.current = describe(3, annotations={"a": "x" * index_cache.ANNOTATION_BYTES_MAX})
    await cache.resolve("a", "long", source)
    assert cache.get("a", "long") is None
    for number in range(7):
        cache.forget("a", (f"v{number}",))
    assert (cache.size, len(cache), cache._references) == (0, 0, {})


# --- several indexes --------------------------------------------------------------------------


@attrs.define
class Indexes:
    """Two indexes over one backend that know one another and a third member, and a client of each."""

    clients: list[IndexClient]
    third: int
    lease: float

    async def put(self, number: int, *, at: int) -> float:
        """Move the tag; how long it took."""
        begun_at = trio.current_time()
        request = api.RecordManifestRequest("app", describe(number), "v1")
        await self.clients[at].record_manifest(request)
        return trio.current_time() - begun_at


@asynccontextmanager
async def two_indexes(directory: Path, lease: float = 5.0) -> AsyncIterator[Indexes]:
    ports = free_ports(3)
    addresses = tuple(f"127.0.0.1:{port}" for port in ports)
    config = Config(cluster=ClusterConfig(indexes=addresses))

    async def run(port: int, *, task_status: trio.TaskStatus[object]) -> None:
        settings = IndexConfig(
            rpc=ListenerConfig(listen=Address("127.0.0.1", port)),
            admin=LOOPBACK,
            api=ApiConfig(listen=Address("127.0.0.1", 0)),
            backend=BackendConfig(url=directory.as_uri()),
            lease=Duration(lease),
            data_dir=directory.parent / f"index-{port}",
        )
        await run_index(config, settings, drain=trio.Event(), task_status=task_status)

    with trio.fail_after(30):
        async with open_rpc_pool() as pool, trio.open_nursery() as nursery:
            for port in ports[:2]:
                await nursery.start(run, port)
            rings = [Cluster(pool, ClusterConfig(indexes=(each,))) for each in addresses[:2]]
            yield Indexes([ring.index for ring in rings], ports[2], lease)
            nursery.cancel_scope.cancel()


@contextlib.contextmanager
def silent(port: int) -> Iterator[None]:
    """Somebody who takes connections and answers nothing, as a process that was stopped."""
    with socket.create_server(("127.0.0.1", port)):
        yield


async def test_a_change_is_seen_at_once_at_an_index_that_keeps_what_it_read(tmp_path):
    async with two_indexes(tmp_path / "backend") as indexes:
        for number in range(10):
            took = await indexes.put(number, at=number % 2)
            # The third member refuses connections: it is not waited for.
            assert took < indexes.lease
            for client in indexes.clients:
                assert await client.resolve("app", "v1") == describe(number)
        await indexes.clients[0].delete_tag("app", "v1")
        for client in indexes.clients:
            with pytest.raises(ManifestNotFound):
                await client.resolve("app", "v1")
            assert await client.resolve("app", str(describe(9).digest)) == describe(9)
        await indexes.clients[0].delete_manifest("app", describe(9).digest)
        with pytest.raises(ManifestNotFound):
            await indexes.clients[1].resolve("app", str(describe(9).digest))


async def test_what_is_kept_is_not_read_again(tmp_path):
    directory = tmp_path / "backend"
    async with two_indexes(directory) as indexes:
        await indexes.put(1, at=0)
        await indexes.clients[1].resolve("app", "v1")
        directory.rename(tmp_path / "away")
        assert await indexes.clients[1].resolve("app", "v1") == describe(1)
        with pytest.raises(BackendUnavailable):
            await indexes.clients[1].resolve("app", "v2")
        (tmp_path / "away").rename(directory)


async def test_a_change_waits_for_the_lease_of_an_index_that_is_silent(tmp_path):
    async with two_indexes(tmp_path / "backend", lease=0.4) as indexes:
        with silent(indexes.third):
            assert await indexes.put(1, at=0) >= indexes.lease
            assert await indexes.clients[1].resolve("app", "v1") == describe(1)


async def test_a_put_that_changes_nothing_tells_the_others_too(tmp_path):
    """Whoever made the change may have died before it did."""
    async with two_indexes(tmp_path / "backend", lease=0.4) as indexes:
        await indexes.put(1, at=0)
        with silent(indexes.third):
            assert await indexes.put(1, at=0) >= indexes.lease
