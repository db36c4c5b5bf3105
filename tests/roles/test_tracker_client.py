"""Announces to trackers that go, hang, come back and are restarted; the trackers are real tables."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import attrs
import pytest
import trio

from swarmpull.digest import Digest
from swarmpull.errors import BackendUnavailable, BlobNotFound, RpcFailed, RpcUnavailable
from swarmpull.roles import cluster
from swarmpull.roles.cluster import ORIGIN_RING, TrackerClient
from swarmpull.roles.ring_client import RingClient, open_ring
from swarmpull.swarm.handout import HandoutLimits, PeerTable
from swarmpull.swarm.metainfo import PIECE_LENGTH_MIN, Metainfo
from swarmpull.swarm.peers import AnnounceState, PeerContact, PeerKind
from swarmpull.wire import api

BLOB = Digest.of(b"blob")
OTHER = Digest.of(b"other")
ADDRESSES = ("127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3")


@attrs.define
class Process:
    """One life of a tracker."""

    name: str
    begun_at: float = attrs.Factory(trio.current_time)
    table: PeerTable = attrs.Factory(lambda: PeerTable(HandoutLimits(), random.Random(1)))


@attrs.define
class Trackers:
    """The trackers of a cluster, as the pool of any host.

    Attributes:
        hanging, dead: those that answer nothing, refuse.
        without_origins: those that reach no origin.
        old: those that know no announces of many blobs.
        wanted: blobs whose metainfo they want.
        given: what they got of that.
        batches: such announces that were answered.
    """

    processes: dict[str, Process] = attrs.Factory(dict)
    hanging: set[str] = attrs.Factory(set)
    dead: set[str] = attrs.Factory(set)
    without_origins: set[str] = attrs.Factory(set)
    old: set[str] = attrs.Factory(set)
    batches: list[tuple[str, tuple[Digest, ...]]] = attrs.Factory(list)
    announces: Counter[str] = attrs.Factory(Counter)
    wanted: tuple[Digest, ...] = ()
    given: list[Metainfo] = attrs.Factory(list)
    watched: list[tuple[str, int]] = attrs.Factory(list)
    lives: int = 0

    def restart(self, address: str) -> None:
        self.lives += 1
        self.processes[address] = Process(f"life {self.lives}")

    def age_all(self) -> None:
        """As if they had been running for long."""
        for process in self.processes.values():
            process.begun_at -= 1000

    async def call(self, address: str, method, request, *, timeout: float):
        await trio.sleep(0.001)
        if address in self.dead:
            raise RpcUnavailable(address, method.name, "refused")
        if address in self.hanging:
            await trio.sleep(timeout)
            raise RpcUnavailable(address, method.name, "no reply")
        if method is api.PING:
            return api.Empty()
        if method is api.WATCH:
            self.watched.append((address, request.position))
            return api.WatchReply(())
        if method is api.ANNOUNCE_HELD:
            return self._held(address, request)
        if method is api.GIVE_METAINFO:
            self.given.append(request.metainfo)
            return api.Empty()
        return self._announced(address, request)

    def _announced(self, address: str, request: api.AnnounceRequest) -> api.AnnounceReply:
        self.announces[address] += 1
        if request.want_metainfo and address in self.without_origins:
            raise BackendUnavailable(ORIGIN_RING, str(request.digest), "no origin answers")
        process, now = self.processes[address], trio.current_time()
        handout = process.table.announce(request.digest, request.peer, request.state, now)
        return api.AnnounceReply(
            handout.peers,
            handout.interval,
            position=handout.position,
            process=process.name,
            age=now - process.begun_at,
            wanted=request.state is AnnounceState.COMPLETE and request.digest in self.wanted,
        )

    def _held(self, address: str, request: api.AnnounceHeldRequest) -> api.AnnounceHeldReply:
        if address in self.old:
            raise RpcFailed(address, api.ANNOUNCE_HELD.name, "is not a method of this role")
        assert len(request.digests) <= api.HELD_BLOBS_MAX
        self.batches.append((address, request.digests))
        process, now = self.processes[address], trio.current_time()
        handout = process.table.announce_held(request.digests, request.peer, now)
        leechers = tuple(api.BlobLeechers(*each) for each in handout.leechers.items())
        return api.AnnounceHeldReply(handout.interval, leechers, process.name, wanted=self.wanted)

    def when_lost(self, tell: Callable[[str], None]) -> None:
        pass

    def seeders(self, address: str, digest: Digest = BLOB) -> int:
        return self.processes[address].table.seeders(digest)


@attrs.define
class Host:
    """A host of the swarm; what its client says is lost, it announces again at once."""

    number: int
    client: TrackerClient
    order: list[str]
    lost: list[Digest] = attrs.Factory(list)

    async def announce(
        self, state=AnnounceState.LEECHING, digest: Digest = BLOB, **wants: bool
    ) -> api.AnnounceReply:
        contact = PeerContact(f"{self.number:032x}", "host", 1000 + self.number, PeerKind.AGENT)
        request = api.AnnounceRequest(digest, "", contact, state, **wants)
        return await self.client.announce(request)

    async def announce_held(self, digests) -> dict[Digest, api.AnnounceReply | None]:
        contact = PeerContact(f"{self.number:032x}", "host", 1000 + self.number, PeerKind.AGENT)
        told: dict[Digest, api.AnnounceReply | None] = {}

        def tell(digest: Digest, reply: api.AnnounceReply | None) -> None:
            assert digest not in told, "once"
            told[digest] = reply

        await self.client.announce_held(contact, digests, tell)
        assert set(told) == set(digests)
        return told

    def note_lost(self, digests: tuple[Digest, ...]) -> None:
        self.lost += digests


@attrs.define
class Play:
    trackers: Trackers
    nursery: trio.Nursery
    addresses: tuple[str, ...]
    hosts: int = 0

    async def host(self) -> Host:
        """Another host, whose knowledge of the ring is its own."""
        self.hosts += 1
        ring = open_ring(self.trackers, self.addresses, "tracker")  # type: ignore[arg-type]
        await self.nursery.start(ring.run)
        client = TrackerClient(RingClient(self.trackers, ring))  # type: ignore[arg-type]
        host = Host(self.hosts, client, ring.preference(str(BLOB)))
        client.on_lost = host.note_lost
        return host


@asynccontextmanager
async def play(*addresses: str) -> AsyncIterator[Play]:
    trackers = Trackers()
    for address in addresses or ADDRESSES:
        trackers.restart(address)
    trackers.age_all()
    async with trio.open_nursery() as nursery:
        yield Play(trackers, nursery, addresses or ADDRESSES)
        nursery.cancel_scope.cancel()


async def test_a_tracker_is_given_the_metainfo_that_it_wants(autojump_clock) -> None:
    async def metainfo_of(digest: Digest) -> Metainfo:
        if digest != BLOB:
            raise BlobNotFound(str(digest), "store")
        return Metainfo(digest, 5, PIECE_LENGTH_MIN, bytes(32))

    async with play() as scene:
        host = await scene.host()
        scene.trackers.wanted = (BLOB, OTHER, Digest.of(b"never announced"))
        await host.announce_held([BLOB, OTHER])
        assert scene.trackers.given == []

        host.client.give_metainfo(metainfo_of)
        # What this host does not have any more is passed over.
        await host.announce_held([OTHER, BLOB])
        assert [each.digest for each in scene.trackers.given] == [BLOB]
        await host.announce(AnnounceState.COMPLETE)
        await host.announce(AnnounceState.LEECHING, OTHER)
        assert [each.digest for each in scene.trackers.given] == [BLOB, BLOB]


async def test_a_blob_lives_on_its_first_tracker_only(autojump_clock) -> None:
    async with play() as swarm:
        host = await swarm.host()
        for _ in range(5):
            await host.announce()

        assert swarm.trackers.announces == {host.order[0]: 5}


async def test_a_tracker_that_hangs_loses_its_blobs_within_seconds(autojump_clock) -> None:
    async with play() as swarm:
        host = await swarm.host()
        await host.announce()
        await host.announce(digest=OTHER)
        first, second, _ = host.order
        swarm.trackers.hanging = {first}
        begun = trio.current_time()

        await host.announce()

        assert trio.current_time() - begun < 3.0
        assert BLOB in host.lost
        assert swarm.trackers.announces[second] >= 1
        begun = trio.current_time()
        await host.announce()
        assert trio.current_time() - begun < 0.01, "it is remembered"


async def test_when_a_tracker_is_back_its_blobs_return_to_it(autojump_clock) -> None:
    async with play() as swarm:
        host = await swarm.host()
        first, second, _ = host.order
        swarm.trackers.dead = {first}
        await host.announce()
        await trio.sleep(5)
        await host.announce()
        await host.announce(AnnounceState.COMPLETE, OTHER)
        assert swarm.trackers.announces[second] >= 2

        host.lost.clear()
        swarm.trackers.dead = set()
        swarm.trackers.restart(first)
        with trio.fail_after(11):
            while BLOB not in host.lost:  # noqa: ASYNC110 - a clock that jumps
                await trio.sleep(0.1)
        assert host.lost == [BLOB], "what is complete returns with its next announce"
        await host.announce()
        assert swarm.trackers.announces[first] == 1


async def test_the_only_tracker_that_is_back_hears_of_all_it_has_lost(autojump_clock) -> None:
    async with play(ADDRESSES[0]) as swarm:
        host = await swarm.host()
        await host.announce()
        await host.announce(digest=OTHER)
        swarm.trackers.dead = {ADDRESSES[0]}
        with pytest.raises(RpcUnavailable):
            await host.announce()
        await trio.sleep(5)
        host.lost.clear()
        swarm.trackers.dead = set()
        swarm.trackers.restart(ADDRESSES[0])
        await trio.sleep(11)

        assert set(host.lost) == {BLOB, OTHER}


async def test_a_tracker_that_was_restarted_unseen_is_told_of_everything_at_once(
    autojump_clock,
) -> None:
    async with play(ADDRESSES[0]) as swarm:
        host = await swarm.host()
        await host.announce()
        await host.announce(digest=OTHER)
        swarm.trackers.restart(ADDRESSES[0])
        assert host.lost == []

        await host.announce()

        assert host.lost == [OTHER]


async def test_one_who_arrives_while_others_have_not_noticed_that_a_tracker_is_back_meets_them(
    autojump_clock,
) -> None:
    async with play() as swarm:
        early, late = await swarm.host(), await swarm.host()
        first, second, _ = early.order
        swarm.trackers.dead = {first}
        await early.announce(AnnounceState.COMPLETE)
        assert swarm.trackers.seeders(second) == 1
        swarm.trackers.dead = set()
        swarm.trackers.restart(first)

        reply = await late.announce()
        assert reply.peers == ()
        assert swarm.trackers.announces[second] == 1
        position = reply.position
        # In turn, at no more than the usual rate.
        reply = await late.announce()
        assert [peer.peer_id for peer in reply.peers] == [f"{early.number:032x}"]
        assert reply.position == position, "it is watched where it belongs"
        await late.client.watch(api.WatchRequest(BLOB, "", 0, 1.0))
        assert swarm.trackers.watched == [(first, 0)]
        await late.announce()
        assert swarm.trackers.announces[first] == 2

        await trio.sleep(cluster.YOUNG)
        await late.announce()
        announces = swarm.trackers.announces[second]
        for _ in range(5):
            await late.announce()
        assert swarm.trackers.announces[second] <= announces + 1, "it is not young any more"


async def test_who_completes_a_blob_says_so_where_it_belongs(autojump_clock) -> None:
    async with play() as swarm:
        host = await swarm.host()
        first, second, _ = host.order
        swarm.trackers.restart(first)
        await host.announce()
        # It would ask the second one for more peers now, were it still looking for some.
        await host.announce(AnnounceState.COMPLETE)

        assert (swarm.trackers.seeders(first), swarm.trackers.seeders(second)) == (1, 0)


async def test_a_watch_goes_to_the_tracker_that_took_the_announce(autojump_clock) -> None:
    async with play() as swarm:
        host = await swarm.host()
        swarm.trackers.dead = {host.order[0]}
        await host.announce()
        await host.client.watch(api.WatchRequest(BLOB, "", 5, 1.0))

        assert swarm.trackers.watched == [(host.order[1], 5)]


async def test_a_tracker_that_reaches_no_origin_is_not_the_last_that_is_asked(
    autojump_clock,
) -> None:
    async with play() as swarm:
        host = await swarm.host()
        swarm.trackers.without_origins = set(host.order[:2])
        await host.announce(want_metainfo=True)
        assert swarm.trackers.announces[host.order[2]] == 1

        swarm.trackers.without_origins = set(host.order)
        with pytest.raises(BackendUnavailable, match="no origin answers"):
            await host.announce(want_metainfo=True)


async def test_a_reader_does_not_wait_for_trackers_that_all_hang(autojump_clock) -> None:
    async with play() as swarm:
        host = await swarm.host()
        swarm.trackers.hanging = set(host.order)
        with pytest.raises(RpcUnavailable):
            await host.announce()
        begun = trio.current_time()
        with pytest.raises(RpcUnavailable, match="no tracker answered of late"):
            await host.announce(want_metainfo=True)
        assert trio.current_time() == begun

        swarm.trackers.hanging = set()
        await trio.sleep(11)
        await host.announce(want_metainfo=True)


# --- many blobs at once ---------------------------------------------------------------------------

MANY = [Digest.of(b"blob %d" % number) for number in range(600)]


async def test_many_blobs_take_one_message_to_each_tracker(autojump_clock) -> None:
    async with play() as swarm:
        host = await swarm.host()
        told = await host.announce_held(MANY[:200])

        assert len(swarm.trackers.batches) == 3
        for address, digests in swarm.trackers.batches:
            for digest in digests:
                assert host.client._ring.members.preference(str(digest))[0] == address
                assert swarm.trackers.seeders(address, digest) == 1
        assert all(60.0 <= reply.interval <= 66.0 for reply in told.values())
        assert not swarm.trackers.announces


async def test_a_message_has_so_many_blobs_and_no_more(autojump_clock) -> None:
    async with play(ADDRESSES[0]) as swarm:
        host = await swarm.host()
        await host.announce_held(MANY)

        sizes = [len(digests) for _, digests in swarm.trackers.batches]
        assert sorted(sizes) == [600 - 2 * api.HELD_BLOBS_MAX, *[api.HELD_BLOBS_MAX] * 2]


async def test_who_has_a_blob_hears_of_its_few_leechers(autojump_clock) -> None:
    async with play() as swarm:
        seeder, leecher = await swarm.host(), await swarm.host()
        await leecher.announce(digest=MANY[3])
        told = await seeder.announce_held(MANY[:10])

        found = {digest: reply.peers for digest, reply in told.items() if reply.peers}
        assert [peer.peer_id for peer in found.pop(MANY[3])] == [f"{leecher.number:032x}"]
        assert not found


async def test_a_tracker_that_does_not_know_the_message_gets_single_announces(
    autojump_clock,
) -> None:
    async with play() as swarm:
        host = await swarm.host()
        swarm.trackers.old = {ADDRESSES[1]}
        for _ in range(2):
            told = await host.announce_held(MANY[:90])
            assert None not in told.values()

        theirs = [
            d for d in MANY[:90] if host.client._ring.members.preference(str(d))[0] == ADDRESSES[1]
        ]
        assert swarm.trackers.announces == {ADDRESSES[1]: 2 * len(theirs)}
        assert {address for address, _ in swarm.trackers.batches} == {ADDRESSES[0], ADDRESSES[2]}
        assert all(swarm.trackers.seeders(ADDRESSES[1], digest) for digest in theirs)


@pytest.mark.parametrize("how", ["dead", "hanging"])
async def test_blobs_of_a_tracker_that_is_down_go_to_the_next_one_of_each(
    autojump_clock, how
) -> None:
    async with play() as swarm:
        host = await swarm.host()
        setattr(swarm.trackers, how, {ADDRESSES[0]})
        told = await host.announce_held(MANY[:90])

        assert None not in told.values()
        for digest in MANY[:90]:
            order = host.client._ring.members.preference(str(digest))
            heir = next(each for each in order if each != ADDRESSES[0])
            assert swarm.trackers.seeders(heir, digest) == 1


async def test_without_any_tracker_each_blob_is_told_so(autojump_clock) -> None:
    async with play() as swarm:
        host = await swarm.host()
        swarm.trackers.dead = set(ADDRESSES)

        assert set((await host.announce_held(MANY[:20])).values()) == {None}


async def test_a_tracker_that_was_restarted_hears_of_the_other_blobs_too(autojump_clock) -> None:
    async with play(ADDRESSES[0]) as swarm:
        host = await swarm.host()
        await host.announce()
        await host.announce_held(MANY[:3])
        swarm.trackers.restart(ADDRESSES[0])
        await host.announce_held(MANY[1:3])

        assert set(host.lost) == {BLOB, MANY[0]}
