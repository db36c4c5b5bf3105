"""Hosts and trackers on loopback: who is short of peers hears of those that appear."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path

import attrs
import pytest
import trio

from swarmpull.config import Address, ClusterConfig, Config, ListenerConfig, TrackerConfig
from swarmpull.digest import Digest
from swarmpull.errors import RpcFailed, RpcUnavailable, SwarmpullError
from swarmpull.roles import swarm_host
from swarmpull.roles.addresses import RoleAddresses
from swarmpull.roles.cluster import Cluster, TrackerClient
from swarmpull.roles.tracker import run_tracker
from swarmpull.swarm import events as ev
from swarmpull.swarm.metainfo import PIECE_LENGTH_MIN
from swarmpull.swarm.peers import AnnounceState, PeerContact, PeerKind
from swarmpull.wire import api
from swarmpull.wire.api import AnnounceReply, AnnounceRequest, WatchReply, WatchRequest
from swarmpull.wire.rpc import RpcContext, RpcService, open_rpc_pool, serve_rpc

from .peers import Content, Node, make_content, running_node, until

LOOPBACK = ListenerConfig(listen=Address("127.0.0.1", 0))


@pytest.fixture(scope="module")
def content() -> Content:
    """Three pieces, the last one short."""
    return make_content(2 * PIECE_LENGTH_MIN + 12345)


@attrs.define
class Watching:
    """A tracker that answers an announce with nobody, and watches when a test says so."""

    position: int | None = 1
    error: SwarmpullError | None = None
    peers: tuple[PeerContact, ...] = ()
    appeared: trio.Event = attrs.Factory(trio.Event)
    announces: int = 0
    requests: list[WatchRequest] = attrs.Factory(list)
    open: int = 0

    async def announce(self, _: AnnounceRequest) -> AnnounceReply:
        await trio.lowlevel.checkpoint()
        self.announces += 1
        return AnnounceReply((), 600.0, position=self.position)

    async def watch(self, request: WatchRequest) -> WatchReply:
        self.requests.append(request)
        self.open += 1
        try:
            if self.error is not None:
                raise self.error
            await self.appeared.wait()
        finally:
            self.open -= 1
        return WatchReply(self.peers, 2)


def leecher_of(tracker: Watching | TrackerClient, root: Path) -> AbstractAsyncContextManager[Node]:
    return running_node(root / "leecher", announce=tracker.announce, watch=tracker.watch)


def finder(tracker: Watching | TrackerClient, content: Content) -> swarm_host.FindPeers:
    """The metainfo is known; so are the peers, to the tracker.  The next announce is far away."""

    async def find(request: AnnounceRequest) -> AnnounceReply:
        reply = await tracker.announce(attrs.evolve(request, want_metainfo=False))
        return attrs.evolve(reply, metainfo=content.metainfo, interval=600.0)

    return find


async def test_a_leecher_without_peers_dials_the_seeder_that_appears(
    tmp_path: Path, content: Content
) -> None:
    tracker = Watching()
    async with (
        running_node(tmp_path / "seeder") as seeder,
        leecher_of(tracker, tmp_path) as leecher,
    ):
        download = await leecher.host.download(content.digest, "", finder(tracker, content))
        await until(lambda: tracker.open == 1)
        await seeder.seed(content)
        tracker.peers = (seeder.contact,)
        tracker.appeared.set()
        await download.wait()

        assert await leecher.stored(content)
    first = tracker.requests[0]
    assert (first.digest, first.peer_id) == (content.digest, leecher.contact.peer_id)
    assert first.position == 1
    assert tracker.announces == 2, "the first, and that it is complete"


async def test_no_tracker_is_asked_that_offers_no_watches(tmp_path: Path, content: Content) -> None:
    """An older one: its replies have no position."""
    tracker = Watching(position=None)
    async with leecher_of(tracker, tmp_path) as leecher:
        await leecher.host.download(content.digest, "", finder(tracker, content))
        await ticks(leecher, content)

    assert tracker.requests == []


@pytest.mark.parametrize(
    "error",
    [
        RpcUnavailable("tracker:1", "tracker.watch", "connection lost"),
        RpcFailed("tracker:1", "tracker.watch", "'tracker.watch' is not a method of this role"),
    ],
)
async def test_a_watch_that_fails_is_not_tried_again_before_the_next_announce(
    tmp_path: Path, content: Content, error: SwarmpullError
) -> None:
    tracker = Watching(error=error)
    async with leecher_of(tracker, tmp_path) as leecher:
        download = await leecher.host.download(content.digest, "", finder(tracker, content))
        await ticks(leecher, content)

        assert len(tracker.requests) == 1
        assert not download.failed
        leecher.host.dispatch(ev.AnnounceReplied(content.digest, 600.0, (), 5))
        await until(lambda: len(tracker.requests) == 2)


async def test_watches_are_limited_and_those_above_the_limit_wait_for_their_announces(
    tmp_path: Path,
) -> None:
    tracker = Watching()
    contents = [make_content(10, seed=n) for n in range(swarm_host.WATCHES_MAX + 3)]
    async with leecher_of(tracker, tmp_path) as leecher:
        for content in contents:
            await leecher.host.download(content.digest, "", finder(tracker, content))
        await ticks(leecher, contents[-1])

        assert tracker.open == len(tracker.requests) == swarm_host.WATCHES_MAX
    assert tracker.open == 0


async def test_a_download_that_begins_anew_gives_up_the_watch_of_the_former(
    tmp_path: Path, content: Content
) -> None:
    tracker = Watching()
    async with leecher_of(tracker, tmp_path) as leecher:
        for _ in range(3):
            await leecher.host.download(content.digest, "", finder(tracker, content))
            await until(lambda: tracker.open == 1)
            leecher.host.forget(content.digest)
        await leecher.host.download(content.digest, "", finder(tracker, content))
        await until(lambda: len(tracker.requests) == 4 and tracker.open == 1)


async def test_a_drain_does_not_wait_for_watches(tmp_path: Path, content: Content) -> None:
    tracker = Watching()
    async with leecher_of(tracker, tmp_path) as leecher:
        await leecher.host.download(content.digest, "", finder(tracker, content))
        await until(lambda: tracker.open == 1)
        with trio.fail_after(30):
            await leecher.host.drain()


# --- with trackers of their own -------------------------------------------------------------------


@asynccontextmanager
async def cluster_of(*trackers: str) -> AsyncIterator[Cluster]:
    async with open_rpc_pool() as pool, trio.open_nursery() as nursery:
        cluster = Cluster(pool, ClusterConfig(trackers=trackers))
        await nursery.start(cluster.run)
        yield cluster
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def running_tracker(
    drain: trio.Event | None = None, life: trio.CancelScope | None = None
) -> AsyncIterator[str]:
    """A tracker that drains when ``drain`` is set, and dies when ``life`` is cancelled."""
    settings = TrackerConfig(rpc=LOOPBACK, admin=LOOPBACK)
    scope = trio.CancelScope() if life is None else life

    async def run(*, task_status: trio.TaskStatus[RoleAddresses]) -> None:
        with scope:
            event = trio.Event() if drain is None else drain
            await run_tracker(Config(), settings, drain=event, task_status=task_status)

    async with trio.open_nursery() as nursery:
        addresses = await nursery.start(run)
        yield addresses.listeners["rpc"]
        nursery.cancel_scope.cancel()


async def test_a_download_without_peers_ends_soon_after_a_seeder_appears(
    tmp_path: Path, content: Content
) -> None:
    async with (
        running_tracker() as address,
        cluster_of(address) as cluster,
        running_node(tmp_path / "seeder", announce=cluster.tracker.announce) as seeder,
        leecher_of(cluster.tracker, tmp_path) as leecher,
    ):
        find = finder(cluster.tracker, content)
        download = await leecher.host.download(content.digest, "", find)
        await ticks(leecher, content)
        await seeder.seed(content)
        # Its announce is due after ten minutes.
        with trio.fail_after(30):
            await download.wait()

        assert await leecher.stored(content)


async def test_a_download_outlives_the_drain_of_the_tracker_at_which_it_waits(
    tmp_path: Path, content: Content
) -> None:
    drain = trio.Event()
    async with (
        running_tracker(drain) as address,
        cluster_of(address) as cluster,
        running_node(tmp_path / "seeder") as seeder,
        leecher_of(cluster.tracker, tmp_path) as leecher,
    ):
        find = finder(cluster.tracker, content)
        download = await leecher.host.download(content.digest, "", find)
        await until(lambda: len(leecher.host._watches) == 1)
        drain.set()
        await until(lambda: len(leecher.host._watches) == 0)
        assert cluster.trackers.members.unhealthy() == ()

        await seeder.seed(content)
        leecher.host.dispatch(ev.PeersFound(content.digest, (seeder.contact,)))
        await download.wait()


@pytest.mark.parametrize("end", ["dies", "drains"])
async def test_hosts_whose_tracker_goes_away_announce_to_its_successor_at_once(
    tmp_path: Path, end: str
) -> None:
    """The next announce of either is due after ten minutes."""
    drain, life = trio.Event(), trio.CancelScope()
    async with (
        running_tracker() as second,
        running_tracker(drain, life) as first,
        cluster_of(first, second) as cluster,
        running_node(tmp_path / "node", announce=cluster.tracker.announce) as node,
    ):
        cluster.tracker.on_lost = node.host.tracker_lost
        contents = [make_content(10, seed=n) for n in range(20)]
        for each in contents:
            await node.host.download(each.digest, "", finder(cluster.tracker, each))

        def told() -> list[str]:
            places = [cluster.tracker._announced.place(each.digest) for each in contents]
            return [place.tracker for place in places if place is not None]

        assert set(told()) == {first, second}
        assert len(told()) == len(contents)

        if end == "drains":
            drain.set()
        else:
            life.cancel()
        with trio.fail_after(30):
            await until(lambda: told() == [second] * len(contents))


async def test_what_is_no_longer_announced_is_forgotten(content: Content) -> None:
    async with running_tracker() as address, cluster_of(address) as cluster:
        peer = PeerContact("a" * 32, "127.0.0.1", 7100, PeerKind.AGENT)
        lost: list[tuple[Digest, ...]] = []
        cluster.tracker.on_lost = lost.append
        for state in (AnnounceState.LEECHING, AnnounceState.COMPLETE, AnnounceState.STOPPED):
            await cluster.tracker.announce(AnnounceRequest(content.digest, "", peer, state))
            cluster.tracker._lost(address)
        cluster.tracker._lost("another:1")

    assert lost == [(content.digest,), (content.digest,)]


async def test_an_agent_of_today_gets_along_with_a_tracker_of_yesterday(
    tmp_path: Path, content: Content
) -> None:
    """That one does not know the method; the tracker that was there before it did."""
    announces: list[AnnounceRequest] = []

    async def announce(request: AnnounceRequest, _: RpcContext) -> AnnounceReply:
        announces.append(request)
        return AnnounceReply((), 600.0, position=7)

    service = RpcService()
    service.register(api.ANNOUNCE, announce)
    async with trio.open_nursery() as nursery:
        host, port = await nursery.start(partial(serve_rpc, service, "127.0.0.1", 0))
        async with (
            cluster_of(f"{host}:{port}") as cluster,
            leecher_of(cluster.tracker, tmp_path) as leecher,
        ):
            request = WatchRequest(content.digest, leecher.contact.peer_id, 0, 1.0)
            with pytest.raises(RpcFailed, match="not a method"):
                await cluster.tracker.watch(request)
            find = finder(cluster.tracker, content)
            download = await leecher.host.download(content.digest, "", find)
            await ticks(leecher, content)

            assert not download.failed
            assert leecher.host._watches == {}
            assert cluster.trackers.members.unhealthy() == ()
        nursery.cancel_scope.cancel()


async def test_without_a_tracker_a_watch_says_so() -> None:
    async with cluster_of() as cluster:
        with pytest.raises(RpcUnavailable, match="no tracker is known"):
            await cluster.tracker.watch(WatchRequest(make_content(1).digest, "a" * 32, 0, 1.0))


async def ticks(node: Node, content: Content, count: int = 3) -> None:
    """Let the core look after a torrent so many times."""
    torrent = node.host._scheduler.torrent(content.digest)
    assert torrent is not None
    for _ in range(count):
        before = torrent.ticked_at
        await until(lambda before=before: torrent.ticked_at > before)
