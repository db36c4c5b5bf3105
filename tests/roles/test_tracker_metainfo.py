"""Where a tracker gets metainfo from, on a clock of the test's own."""

from __future__ import annotations

import itertools
import random

import attrs
import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from swarmpull.digest import Digest
from swarmpull.errors import (
    BackendUnavailable,
    BlobNotFound,
    ObjectCorrupt,
    RpcUnavailable,
    SwarmpullError,
)
from swarmpull.roles.blob_finder import TRACKER_PATIENCE
from swarmpull.roles.hash_log import HashLog
from swarmpull.roles.tracker import Tracker
from swarmpull.roles.tracker_metainfo import MetainfoLimits, MetainfoSource, TtlCache
from swarmpull.swarm.claims import Claims
from swarmpull.swarm.handout import HandoutLimits, PeerTable
from swarmpull.swarm.metainfo import PIECE_LENGTH_MIN, BlobShape, GrowingMetainfo, Metainfo
from swarmpull.swarm.peers import AnnounceState, PeerContact, PeerKind
from swarmpull.telemetry import Metrics
from swarmpull.wire import api
from swarmpull.wire.rpc import RpcContext

BLOB = Digest.of(b"blob")
ORIGIN = PeerContact("f" * 32, "origin", 7201, PeerKind.ORIGIN)
HERE = RpcContext("127.0.0.1")


@attrs.define
class Origins:
    """Stands for the ring of origins; every answer takes ``delay`` seconds."""

    delay: float = 0.1
    outcomes: dict[str, SwarmpullError] = attrs.Factory(dict)
    calls: list[tuple[Digest, str, float]] = attrs.Factory(list)

    async def get_metainfo(
        self, digest: Digest, namespace: str, *, growing: bool = False
    ) -> api.MetainfoReply:
        self.calls.append((digest, namespace, trio.current_time()))
        await trio.sleep(self.delay)
        if namespace in self.outcomes:
            raise self.outcomes[namespace]
        return api.MetainfoReply(Metainfo(digest, 5, PIECE_LENGTH_MIN, bytes(32)), ORIGIN)


@pytest.fixture
def origins() -> Origins:
    return Origins()


@pytest.fixture
def seeders() -> list[Digest]:
    return []


def make_source(
    origins: Origins, nursery: trio.Nursery, seeders: list[Digest], **limits: float
) -> MetainfoSource:
    return MetainfoSource(
        origins,  # type: ignore[arg-type]
        nursery,
        on_seeder=lambda digest, _: seeders.append(digest),
        limits=MetainfoLimits(**limits),  # type: ignore[arg-type]
        metrics=Metrics(),
    )


@pytest.fixture
async def source(origins, nursery, seeders) -> MetainfoSource:
    return make_source(origins, nursery, seeders)


async def test_metainfo_is_kept_for_its_time(autojump_clock, source, origins, seeders):
    await source.get(BLOB, "a", use_cache=True)
    await trio.sleep(299.0)
    await source.get(BLOB, "a", use_cache=True)
    assert len(origins.calls) == 1
    await trio.sleep(2.0)
    await source.get(BLOB, "a", use_cache=True)

    assert len(origins.calls) == 2
    assert seeders == [BLOB, BLOB]


async def test_metainfo_is_asked_for_anew_when_nobody_has_the_blob(autojump_clock, source, origins):
    await source.get(BLOB, "a", use_cache=True)
    await source.get(BLOB, "a", use_cache=False)

    assert len(origins.calls) == 2


@pytest.mark.parametrize(
    "silence",
    [RpcUnavailable("origin ring", "", "nobody answers"), BackendUnavailable("s3", "", "away")],
)
async def test_old_metainfo_serves_while_no_origin_can_say_anything(
    autojump_clock, source, origins, silence
):
    found = await source.get(BLOB, "a", use_cache=True)
    await trio.sleep(1000.0)
    origins.outcomes["a"] = silence

    assert await source.get(BLOB, "a", use_cache=True) == found
    assert await source.get_settled(BLOB, "a", use_cache=True) == found
    # Nobody is known to have the blob: metainfo alone would be a promise that nobody keeps.
    with pytest.raises(BackendUnavailable):
        await source.get(BLOB, "a", use_cache=False)
    # An origin that answers has the last word.
    origins.outcomes["a"] = BlobNotFound(str(BLOB), "backend")
    with pytest.raises(BlobNotFound):
        await source.get(BLOB, "a", use_cache=True)


SILENCE = RpcUnavailable("origin ring", "", "nobody answers")


async def test_metainfo_that_an_agent_gives_serves_until_an_origin_answers(
    autojump_clock, source, origins
):
    origins.outcomes["a"] = SILENCE
    given = Metainfo(BLOB, 7, PIECE_LENGTH_MIN, bytes(32))
    assert not source.hear(given), "nobody has asked"
    # Nobody is known to have it, but whoever says so soon is asked.
    with pytest.raises(BackendUnavailable):
        await source.get(BLOB, "a", use_cache=False)
    other = Digest.of(b"other")
    assert source.wanted([other, BLOB]) == (BLOB,)

    assert source.hear(given)

    assert source.wanted([BLOB]) == ()
    assert await source.get(BLOB, "a", use_cache=True) == given
    with pytest.raises(BackendUnavailable):
        await source.get(BLOB, "a", use_cache=False)
    del origins.outcomes["a"]
    assert (await source.get(BLOB, "a", use_cache=True)).length == 5
    origins.outcomes["a"] = SILENCE
    assert (await source.get(BLOB, "a", use_cache=True)).length == 5


async def test_a_request_waits_a_little_for_an_agent_that_gives_it(
    autojump_clock, source, origins, nursery
):
    origins.outcomes["a"] = SILENCE
    given = Metainfo(BLOB, 7, PIECE_LENGTH_MIN, bytes(32))
    found = []

    async def get() -> None:
        found.append(await source.get(BLOB, "a", use_cache=True))

    for _ in range(3):
        nursery.start_soon(get)
    await trio.sleep(0.5)
    assert source.hear(given)
    await trio.testing.wait_all_tasks_blocked()
    assert found == [given] * 3
    # Whoever gave it may have been wrong: it is asked for anew some time later.
    await trio.sleep(301.0)
    begun = trio.current_time()
    with pytest.raises(BackendUnavailable):
        await source.get(BLOB, "a", use_cache=True)
    # Long enough for one that announces it just now, and there is time for another tracker.
    assert 0.5 < trio.current_time() - begun < TRACKER_PATIENCE / 2
    await trio.sleep(121.0)
    assert source.wanted([BLOB]) == ()


async def test_one_agent_is_asked_for_a_few_blobs_only(autojump_clock, source, origins):
    origins.outcomes["a"] = SILENCE
    digests = [Digest.of(bytes([number])) for number in range(20)]
    for digest in digests:
        with pytest.raises(BackendUnavailable):
            await source.get(digest, "a", use_cache=False)

    assert source.wanted(digests) == tuple(digests[:8])


async def test_an_absent_blob_is_asked_for_once_a_second(autojump_clock, source, origins):
    origins.outcomes["a"] = BlobNotFound(str(BLOB), "backend")
    for _ in range(30):
        with pytest.raises(BlobNotFound):
            await source.get(BLOB, "a", use_cache=True)
        await trio.sleep(0.1)

    times = [at for _, _, at in origins.calls]
    assert 2 <= len(times) <= 4
    assert all(later - earlier >= 1.0 for earlier, later in itertools.pairwise(times))


async def test_a_blob_that_is_pushed_after_it_was_absent_is_found_soon(
    autojump_clock, source, origins
):
    origins.outcomes["a"] = BlobNotFound(str(BLOB), "backend")
    with pytest.raises(BlobNotFound):
        await source.get(BLOB, "a", use_cache=True)
    del origins.outcomes["a"]
    await trio.sleep(1.0)

    assert (await source.get(BLOB, "a", use_cache=True)).digest == BLOB


async def test_a_blob_absent_from_one_repository_is_looked_for_in_the_other(
    autojump_clock, source, origins
):
    """They may have different backends."""
    origins.outcomes["a"] = BlobNotFound(str(BLOB), "backend of a")
    absent: list[str] = []

    async def get(namespace: str) -> None:
        try:
            await source.get(BLOB, namespace, use_cache=True)
        except BlobNotFound as exc:
            absent.append(exc.where)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(get, "a")
        await trio.testing.wait_all_tasks_blocked()
        for namespace in ("a", "b", "b", "b"):
            nursery.start_soon(get, namespace)

    assert absent == ["backend of a", "backend of a"]
    assert [namespace for _, namespace, _ in origins.calls] == ["a", "b"]


async def test_origins_that_do_not_answer_are_asked_again_at_once(autojump_clock, source, origins):
    origins.outcomes["a"] = RpcUnavailable("ring", "origin.get_metainfo", "refused")
    for _ in range(2):
        with pytest.raises(BackendUnavailable, match="refused"):
            await source.get(BLOB, "a", use_cache=True)

    assert len(origins.calls) == 2


async def test_each_waiter_gets_an_error_of_its_own(autojump_clock, source, origins):
    origins.outcomes["a"] = BlobNotFound(str(BLOB), "backend")
    caught: list[BlobNotFound] = []

    async def get() -> None:
        try:
            await source.get(BLOB, "a", use_cache=True)
        except BlobNotFound as exc:
            caught.append(exc)

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(get)

    assert len({id(exc) for exc in caught}) == 5
    assert {(exc.digest, exc.where) for exc in caught} == {(str(BLOB), "backend")}
    assert len(origins.calls) == 1


async def test_blobs_that_are_asked_for_at_the_same_time_are_bounded(
    autojump_clock, origins, nursery, seeders
):
    source = make_source(origins, nursery, seeders, fetches_max=3)
    refused: list[str] = []

    async def get(number: int) -> None:
        try:
            await source.get(Digest.of(bytes([number])), "a", use_cache=True)
        except BackendUnavailable as exc:
            refused.append(exc.reason)

    async with trio.open_nursery() as gets:
        for number in range(5):
            gets.start_soon(get, number)

    assert len(origins.calls) == 3
    assert len(refused) == 2
    assert (await source.get(BLOB, "a", use_cache=True)).digest == BLOB


async def test_an_origin_is_sought_again_every_few_seconds_at_most(autojump_clock, source, origins):
    origins.outcomes["a"] = BlobNotFound(str(BLOB), "backend")
    for _ in range(200):
        source.seek_origin(BLOB, "a")
        await trio.sleep(0.1)

    assert len(origins.calls) == 4


# --- while an origin is still fetching --------------------------------------------------------


SHAPE = BlobShape(BLOB, 3 * PIECE_LENGTH_MIN, PIECE_LENGTH_MIN)


@attrs.define
class Growing(Origins):
    """Origins of which one is fetching the blob."""

    log: HashLog = attrs.Factory(lambda: HashLog(GrowingMetainfo.from_shape(SHAPE)))
    polls: int = 0

    async def get_metainfo(
        self, digest: Digest, namespace: str, *, growing: bool = False
    ) -> api.MetainfoReply:
        assert growing
        self.calls.append((digest, namespace, trio.current_time()))
        return api.MetainfoReply(None, ORIGIN, growth=self.log.since("", 0))

    async def hashes(self, request: api.HashesRequest) -> api.Growth:
        self.polls += 1
        return await self.log.wait_since(request.source, request.position, request.seconds)

    def learn(self, *indices: int) -> None:
        for index in indices:
            self.log.metainfo.add(index, bytes([index]) * 32)
        self.log.grew()


async def test_one_call_follows_an_origin_for_all_agents(autojump_clock, nursery, seeders):
    origins = Growing()
    source = make_source(origins, nursery, seeders)
    known = await source.get(BLOB, "a", use_cache=False)
    assert isinstance(known, HashLog)
    assert known.source != origins.log.source
    for _ in range(10):
        assert await source.get(BLOB, "b", use_cache=False) is known
    await trio.sleep(1.0)
    for index in range(3):
        origins.learn(index)
        await trio.sleep(1.0)

    assert known.metainfo.is_complete
    assert len(origins.calls) == 1
    assert origins.polls == 4, "one for each piece, and one that waits for the end"


async def test_metainfo_is_cached_once_the_blob_has_matched_its_digest(
    autojump_clock, nursery, seeders
):
    origins = Growing()
    source = make_source(origins, nursery, seeders)
    known = await source.get(BLOB, "a", use_cache=True)
    origins.learn(0, 1, 2)
    await trio.sleep(1.0)
    assert await source.get(BLOB, "a", use_cache=True) is known, "it may still be wrong"
    origins.log.settle()
    await trio.sleep(1.0)

    assert await source.get(BLOB, "a", use_cache=True) == origins.log.metainfo.complete()
    assert len(origins.calls) == 1


async def test_who_does_not_take_metainfo_that_grows_waits_for_its_end(
    autojump_clock, nursery, seeders
):
    origins = Growing()
    source = make_source(origins, nursery, seeders)

    async def finish() -> None:
        await trio.sleep(20.0)
        origins.learn(0, 1, 2)
        await trio.sleep(1.0)
        origins.log.settle()

    nursery.start_soon(finish)
    metainfo = await source.get_settled(BLOB, "a", use_cache=True)
    assert metainfo == origins.log.metainfo.complete()
    assert trio.current_time() >= 21.0


async def test_a_fetch_that_fails_is_told_to_all_who_wait_and_the_next_one_is_another(
    autojump_clock, nursery, seeders
):
    origins = Growing()
    source = make_source(origins, nursery, seeders)
    known = await source.get(BLOB, "a", use_cache=True)
    origins.learn(0, 1, 2)
    await trio.sleep(1.0)
    origins.log.fail(ObjectCorrupt("s3://b", "key", "it hashes to something else"))
    with pytest.raises(ObjectCorrupt):
        await known.wait_since(known.source, 3, 30.0)
    await trio.sleep(1.0)

    origins.log = HashLog(GrowingMetainfo.from_shape(SHAPE))
    assert await source.get(BLOB, "a", use_cache=True) is not known


# --- together with the peer table -------------------------------------------------------------


@pytest.fixture
async def tracker(origins, nursery) -> Tracker:
    table = PeerTable(HandoutLimits(), random.Random(1))
    metrics = Metrics()
    source = MetainfoSource(
        origins,
        nursery,
        on_seeder=lambda digest, seeder: table.add_seeder(
            digest, seeder, trio.current_time(), lifetime=15.0
        ),
        limits=MetainfoLimits(),
        metrics=metrics,
    )
    return Tracker(table, Claims(100), source, metrics)


def leeching(number: int, *, want_metainfo: bool = False) -> api.AnnounceRequest:
    contact = PeerContact(f"{number:032x}", f"host-{number}", 7100, PeerKind.AGENT)
    return api.AnnounceRequest(BLOB, "a", contact, AnnounceState.LEECHING, want_metainfo)


async def test_an_origin_is_found_again_while_somebody_downloads(autojump_clock, tracker, origins):
    """As after the restart of a tracker: an agent announces that has its metainfo already."""
    reply = await tracker.announce(leeching(1), HERE)
    assert reply.peers == ()
    await trio.sleep(reply.interval)
    assert (await tracker.announce(leeching(1), HERE)).peers == (ORIGIN,)

    handed_out = 0
    for _ in range(100):
        await trio.sleep(3.0)
        handed_out += (await tracker.announce(leeching(1), HERE)).peers == (ORIGIN,)
    assert handed_out >= 80
    assert len(origins.calls) <= 22, "once in its lifetime of 15 s"


async def test_a_dead_origin_is_handed_out_for_its_lifetime_only(autojump_clock, tracker, origins):
    await tracker.announce(leeching(1, want_metainfo=True), HERE)
    origins.outcomes["a"] = RpcUnavailable("ring", "origin.get_metainfo", "refused")
    await trio.sleep(15.0)

    assert (await tracker.announce(leeching(1), HERE)).peers == ()


async def test_an_announce_does_not_wait_for_an_origin_when_it_has_its_metainfo(
    autojump_clock, tracker, origins
):
    origins.delay = 100.0
    before = trio.current_time()
    await tracker.announce(leeching(1), HERE)

    assert trio.current_time() == before


# --- the cache --------------------------------------------------------------------------------


def test_the_least_recently_used_goes_first():
    cache: TtlCache[str, int] = TtlCache(ttl=10.0, capacity=3)
    for number, key in enumerate("abc"):
        cache.put(key, number, 0.0)
    cache.get("a", 0.0)
    cache.put("d", 3, 0.0)

    assert [cache.get(key, 0.0) for key in "abcd"] == [0, None, 2, 3]


def test_what_is_larger_than_the_cache_is_not_kept():
    cache: TtlCache[str, int] = TtlCache(ttl=10.0, capacity=3)
    cache.put("a", 1, 0.0, cost=4)

    assert cache.get("a", 0.0) is None
    assert cache.size == 0


@given(
    st.lists(
        st.tuples(st.booleans(), st.sampled_from("abcdef"), st.integers(0, 5), st.floats(0, 4))
    )
)
def test_a_cache_keeps_its_bounds(steps):
    cache: TtlCache[str, tuple[str, float]] = TtlCache(ttl=10.0, capacity=10)
    now = 0.0
    for is_put, key, cost, seconds in steps:
        now += seconds
        if is_put:
            cache.put(key, (key, now), now, cost=cost)
        elif (value := cache.get(key, now)) is not None:
            assert value[0] == key
            assert now - value[1] < 10.0
        assert cache.size <= 10
        assert len(cache) <= 6
