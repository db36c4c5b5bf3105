"""The tracker as its callers see it: real RPC on loopback, with an origin that the test plays."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import attrs
import httpx
import pytest
import trio
import trio.testing

from swarmpull.config import Address, ClusterConfig, Config, ListenerConfig, TrackerConfig
from swarmpull.digest import Digest
from swarmpull.errors import (
    BackendUnavailable,
    BlobNotFound,
    RpcFailed,
    RpcUnavailable,
    StartupError,
    SwarmpullError,
)
from swarmpull.roles.addresses import RoleAddresses
from swarmpull.roles.tracker import run_tracker
from swarmpull.swarm.metainfo import PIECE_LENGTH_MIN, Metainfo
from swarmpull.swarm.peers import AnnounceState, PeerContact, PeerKind
from swarmpull.wire import api
from swarmpull.wire.rpc import RpcContext, RpcPool, RpcService, open_rpc_pool, serve_rpc

LEECHING, COMPLETE, STOPPED = AnnounceState.LEECHING, AnnounceState.COMPLETE, AnnounceState.STOPPED
BLOB = Digest.of(b"blob")
ORIGIN = PeerContact("f" * 32, "", 7201, PeerKind.ORIGIN)
LOOPBACK = ListenerConfig(listen=Address("127.0.0.1", 0))
SETTINGS = TrackerConfig(rpc=LOOPBACK, admin=LOOPBACK)


def metainfo_of(digest: Digest) -> Metainfo:
    return Metainfo(digest, 5, PIECE_LENGTH_MIN, bytes(32))


def agent(number: int, host: str = "") -> PeerContact:
    return PeerContact(f"{number:032x}", host, 7100 + number, PeerKind.AGENT)


@attrs.define
class Origin:
    """An origin that the test plays: it answers what it is told to, when the gate is open."""

    seeder: PeerContact = ORIGIN
    error: SwarmpullError | None = None
    calls: list[api.BlobRequest] = attrs.Factory(list)
    asked: trio.Event = attrs.Factory(trio.Event)
    gate: trio.Event = attrs.Factory(trio.Event)
    address: str = ""

    async def get_metainfo(self, request: api.BlobRequest, _: RpcContext) -> api.MetainfoReply:
        self.calls.append(request)
        self.asked.set()
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        return api.MetainfoReply(metainfo_of(request.digest), self.seeder)

    async def serve(self, *, task_status: trio.TaskStatus[None]) -> None:
        service = RpcService()
        service.register(api.GET_METAINFO, self.get_metainfo)
        async with trio.open_nursery() as nursery:
            host, port = await nursery.start(partial(serve_rpc, service, "127.0.0.1", 0))
            self.address = f"{host}:{port}"
            task_status.started()


@attrs.define
class Running:
    """A running tracker, and a way to call it."""

    addresses: RoleAddresses
    drain: trio.Event
    pool: RpcPool
    ended: trio.Event

    async def announce(
        self,
        peer: PeerContact,
        state: AnnounceState = LEECHING,
        *,
        digest: Digest = BLOB,
        namespace: str = "team/app",
        want_metainfo: bool = False,
    ) -> api.AnnounceReply:
        request = api.AnnounceRequest(digest, namespace, peer, state, want_metainfo)
        rpc = self.addresses.listeners["rpc"]
        return await self.pool.call(rpc, api.ANNOUNCE, request, timeout=60.0)

    async def announce_held(
        self, peer: PeerContact, digests: tuple[Digest, ...]
    ) -> api.AnnounceHeldReply:
        request = api.AnnounceHeldRequest(peer, digests)
        rpc = self.addresses.listeners["rpc"]
        return await self.pool.call(rpc, api.ANNOUNCE_HELD, request, timeout=60.0)

    async def watch(
        self, peer: PeerContact, position: int, *, seconds: float = 60.0
    ) -> api.WatchReply:
        request = api.WatchRequest(BLOB, peer.peer_id, position, seconds)
        rpc = self.addresses.listeners["rpc"]
        return await self.pool.call(rpc, api.WATCH, request, timeout=90.0)

    async def value(self, metric: str) -> float:
        lines = (await self.get("/metrics")).text.splitlines()
        [value] = [line.split()[1] for line in lines if line.startswith(f"swarmpull_{metric} ")]
        return float(value)

    async def until(self, metric: str, value: float) -> None:
        while await self.value(metric) != value:  # noqa: ASYNC110
            await trio.sleep(0.01)

    async def get(self, path: str) -> httpx.Response:
        async with httpx.AsyncClient() as client:
            return await client.get(f"http://{self.addresses.listeners['admin']}{path}")


@asynccontextmanager
async def running_tracker(*origins: str, drain_timeout: float = 5.0) -> AsyncIterator[Running]:
    config = Config(
        cluster=ClusterConfig(origins=origins),
        drain_timeout=drain_timeout,  # type: ignore[arg-type]
    )
    drain, ended = trio.Event(), trio.Event()

    async def run(*, task_status: trio.TaskStatus[RoleAddresses]) -> None:
        await run_tracker(config, SETTINGS, drain=drain, task_status=task_status)
        ended.set()

    with trio.fail_after(30):
        async with open_rpc_pool() as pool, trio.open_nursery() as nursery:
            addresses = await nursery.start(run)
            yield Running(addresses, drain, pool, ended)
            nursery.cancel_scope.cancel()


@pytest.fixture
async def origin(nursery: trio.Nursery) -> Origin:
    """An origin whose gate is open."""
    origin = Origin()
    origin.gate.set()
    await nursery.start(origin.serve)
    return origin


async def test_agents_find_each_other():
    async with running_tracker("127.0.0.1:9") as tracker:
        assert (await tracker.announce(agent(1, "host-1"))).peers == ()
        reply = await tracker.announce(agent(2, "host-2"))
        again = await tracker.announce(agent(2, "host-2"))

    assert attrs.evolve(reply, process="", age=None) == api.AnnounceReply(
        (agent(1, "host-1"),), 3.0, None, position=2
    )
    assert reply.process == again.process != ""
    assert 0 <= reply.age <= again.age < 60


async def test_a_peer_without_a_host_is_dialled_where_it_called_from():
    async with running_tracker("127.0.0.1:9") as tracker:
        await tracker.announce(agent(1, ""))
        reply = await tracker.announce(agent(2))

    assert reply.peers == (agent(1, "127.0.0.1"),)


async def test_a_peer_that_stops_is_handed_out_no_more():
    async with running_tracker("127.0.0.1:9") as tracker:
        await tracker.announce(agent(1))
        stopped = await tracker.announce(agent(1), STOPPED, want_metainfo=True)
        reply = await tracker.announce(agent(2))

    assert stopped.metainfo is None
    assert reply.peers == ()


async def test_many_blobs_can_be_announced_at_once():
    digests = tuple(Digest.of(b"%d" % number) for number in range(api.HELD_BLOBS_MAX))
    async with running_tracker("127.0.0.1:9") as tracker:
        await tracker.announce(agent(1), digest=digests[7])
        held = await tracker.announce_held(agent(2, ""), digests)
        reply = await tracker.announce(agent(3), digest=digests[0])
        announces = (await tracker.get("/metrics")).text
        held_count = await tracker.value("tracker_held_announces_total")

    assert held.leechers == (api.BlobLeechers(digests[7], (agent(1, "127.0.0.1"),)),)
    assert held.process == reply.process
    assert 60.0 <= held.interval <= 66.0
    assert reply.peers == (agent(2, "127.0.0.1"),)
    assert held_count == 1
    assert 'announces_total{state="complete"} 256.0' in announces, "each blob counts"


@pytest.mark.parametrize(
    ("peer", "count", "message"),
    [
        (agent(1), api.HELD_BLOBS_MAX + 1, "257 blobs in one announce, the limit is 256"),
        (attrs.evolve(agent(1), port=0), 1, "peer port"),
    ],
)
async def test_an_announce_of_many_blobs_is_checked_like_any_other(peer, count, message):
    digests = tuple(Digest.of(b"%d" % number) for number in range(count))
    async with running_tracker("127.0.0.1:9") as tracker:
        with pytest.raises(RpcFailed, match=message):
            await tracker.announce_held(peer, digests)
        assert await tracker.value("tracker_torrents") == 0


async def test_metainfo_comes_from_an_origin_which_is_then_a_peer(origin):
    async with running_tracker(origin.address) as tracker:
        reply = await tracker.announce(agent(1), want_metainfo=True)

    assert reply.metainfo == metainfo_of(BLOB)
    # The origin did not say its host: it is where the tracker reached it.
    assert reply.peers == (attrs.evolve(origin.seeder, host="127.0.0.1"),)
    assert origin.calls == [api.BlobRequest(BLOB, "team/app", growing=True)]


async def test_an_origin_that_says_its_host_is_dialled_there(origin):
    origin.seeder = attrs.evolve(origin.seeder, host="origin-1")
    async with running_tracker(origin.address) as tracker:
        reply = await tracker.announce(agent(1), want_metainfo=True)

    assert reply.peers == (origin.seeder,)


async def test_an_origin_is_asked_once_however_many_agents_want_metainfo(nursery):
    origin = Origin()
    await nursery.start(origin.serve)
    replies: list[api.AnnounceReply] = []

    async def announce(number: int, namespace: str) -> None:
        replies.append(
            await tracker.announce(agent(number), namespace=namespace, want_metainfo=True)
        )

    async with running_tracker(origin.address) as tracker, trio.open_nursery() as agents:
        for number in range(50):
            agents.start_soon(announce, number, f"repository-{number % 3}")
        await origin.asked.wait()
        await tracker.announce(agent(60), digest=Digest.of(b"other"))
        origin.gate.set()

    assert len(replies) == 50
    assert all(reply.metainfo == metainfo_of(BLOB) for reply in replies)
    assert len([call for call in origin.calls if call.digest == BLOB]) == 1


async def test_metainfo_that_is_known_is_not_asked_for_again(origin):
    async with running_tracker(origin.address) as tracker:
        await tracker.announce(agent(1), want_metainfo=True)
        reply = await tracker.announce(agent(2), want_metainfo=True)

    assert reply.metainfo == metainfo_of(BLOB)
    assert len(origin.calls) == 1


async def test_a_blob_that_nobody_has_is_said_to_be_absent(origin):
    origin.error = BlobNotFound(str(BLOB), "backend file:///x")
    async with running_tracker(origin.address) as tracker:
        for number in range(5):
            with pytest.raises(BlobNotFound) as caught:
                await tracker.announce(agent(number), want_metainfo=True)
        reply = await tracker.announce(agent(9))

    assert caught.value.digest == str(BLOB)
    assert caught.value.where == "backend file:///x"
    assert len(origin.calls) < 5, "asked once a second at most"
    assert reply.peers == (), "who cannot download is no peer"


async def test_an_agent_that_hangs_up_does_not_take_the_metainfo_from_the_others(nursery):
    origin = Origin()
    await nursery.start(origin.serve)
    async with running_tracker(origin.address) as tracker:
        async with trio.open_nursery() as agents:
            impatient = trio.CancelScope()

            async def hang_up() -> None:
                with impatient:
                    await tracker.announce(agent(1), want_metainfo=True)

            agents.start_soon(hang_up)
            await origin.asked.wait()
            impatient.cancel()
        async with trio.open_nursery() as agents:
            agents.start_soon(partial(tracker.announce, agent(2), want_metainfo=True))
            await trio.testing.wait_all_tasks_blocked(0.05)
            origin.gate.set()

    assert len(origin.calls) == 1


async def test_without_origins_the_error_says_so():
    async with running_tracker() as tracker:
        with pytest.raises(BackendUnavailable, match="no origin is known"):
            await tracker.announce(agent(1), want_metainfo=True)


async def test_origins_that_do_not_answer_are_named():
    async with running_tracker("127.0.0.1:9", "127.0.0.1:11") as tracker:
        with pytest.raises(BackendUnavailable) as caught:
            await tracker.announce(agent(1), want_metainfo=True)

    assert "127.0.0.1:9" in str(caught.value)
    assert "127.0.0.1:11" in str(caught.value)


async def test_another_origin_answers_for_one_that_is_down(origin):
    async with running_tracker(*(f"127.0.0.1:{port}" for port in (9, 11, 13)), origin.address) as (
        tracker
    ):
        for number in range(10):
            digest = Digest.of(bytes([number]))
            reply = await tracker.announce(agent(1), digest=digest, want_metainfo=True)
            assert reply.metainfo == metainfo_of(digest)


async def test_an_origin_that_answers_for_another_blob_is_not_believed(origin, monkeypatch):
    async def lie(request: api.BlobRequest, _: RpcContext) -> api.MetainfoReply:
        return api.MetainfoReply(metainfo_of(Digest.of(b"other")), origin.seeder)

    liar = Origin()
    monkeypatch.setattr(Origin, "get_metainfo", lambda self, *args: lie(*args))
    async with trio.open_nursery() as nursery:
        await nursery.start(liar.serve)
        async with running_tracker(liar.address) as tracker:
            with pytest.raises(RpcFailed, match="metainfo of"):
                await tracker.announce(agent(1), want_metainfo=True)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peer_id": "xyz"}, "peer id"),
        ({"peer_id": "F" * 32}, "peer id"),
        ({"host": "a b"}, "peer host"),
        ({"host": "x" * 300}, "peer host"),
        ({"port": 0}, "peer port"),
        ({"port": 65536}, "peer port"),
        ({"port": -1}, "peer port"),
    ],
)
async def test_a_contact_that_nobody_could_dial_is_refused(change, message):
    async with running_tracker("127.0.0.1:9") as tracker:
        with pytest.raises(RpcFailed, match=message):
            await tracker.announce(attrs.evolve(agent(1), **change))
        assert (await tracker.announce(agent(2))).peers == ()


async def test_the_admin_pages_tell_what_goes_on(origin):
    async with running_tracker(origin.address) as tracker:
        await tracker.announce(agent(1), want_metainfo=True)
        await tracker.announce(agent(2), COMPLETE)
        assert (await tracker.get("/readiness")).status_code == 200
        status = json.loads((await tracker.get("/status")).text)
        metrics = (await tracker.get("/metrics")).text

    assert status["swarms"]["peers"] == 3
    assert status["origins"] == {"members": [origin.address], "unhealthy": []}
    assert 'swarmpull_tracker_announces_total{state="leeching"} 1.0' in metrics
    assert "swarmpull_tracker_seeders 1.0" in metrics
    assert "swarmpull_tracker_origins 1.0" in metrics
    assert 'swarmpull_tracker_metainfo_requests_total{source="fetch"} 1.0' in metrics
    assert 'swarmpull_ring_members{ring="origin",state="healthy"} 1.0' in metrics


# --- watches ----------------------------------------------------------------------------------


@attrs.define
class Waiting:
    """A watch that is open, and its reply once it has ended."""

    replies: list[api.WatchReply] = attrs.Factory(list)
    ended: trio.Event = attrs.Factory(trio.Event)

    async def run(self, tracker: Running, peer: PeerContact, position: int) -> None:
        self.replies.append(await tracker.watch(peer, position))
        self.ended.set()


@asynccontextmanager
async def waiting_at(tracker: Running) -> AsyncIterator[Waiting]:
    """Agent 1 has announced itself and waits for others."""
    reply = await tracker.announce(agent(1))
    assert reply.position is not None
    waiting = Waiting()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(waiting.run, tracker, agent(1), reply.position)
        await tracker.until("tracker_watches", 1.0)
        yield waiting
        nursery.cancel_scope.cancel()


async def test_one_who_waits_is_told_of_a_seeder_at_once():
    async with running_tracker("127.0.0.1:9") as tracker, waiting_at(tracker) as waiting:
        announced = await tracker.announce(agent(2), COMPLETE)
        with trio.fail_after(30):
            await waiting.ended.wait()

        assert waiting.replies == [
            api.WatchReply((agent(2, "127.0.0.1"),), announced.position),
        ]
        assert await tracker.value("tracker_watches") == 0.0
        assert await tracker.value("tracker_newcomers_told") == 1.0


async def test_one_who_waits_is_told_of_the_origin_that_another_agent_asked_for(origin):
    async with running_tracker(origin.address) as tracker:
        origin.gate = trio.Event()
        async with waiting_at(tracker) as waiting:
            origin.gate.set()
            await tracker.announce(agent(2), want_metainfo=True)
            with trio.fail_after(30):
                await waiting.ended.wait()

    [reply] = waiting.replies
    assert reply.peers == (attrs.evolve(origin.seeder, host="127.0.0.1"),)


async def test_who_came_between_the_handout_and_the_watch_is_not_missed():
    async with running_tracker("127.0.0.1:9") as tracker:
        handout = await tracker.announce(agent(1))
        await tracker.announce(agent(2), COMPLETE)
        with trio.fail_after(30):
            reply = await tracker.watch(agent(1), handout.position)

    assert reply.peers == (agent(2, "127.0.0.1"),)


async def test_a_watch_ends_when_its_time_is_up_and_may_go_on():
    async with running_tracker("127.0.0.1:9") as tracker:
        handout = await tracker.announce(agent(1))
        reply = await tracker.watch(agent(1), handout.position, seconds=0.05)

    assert reply == api.WatchReply((), handout.position)


async def test_a_watch_of_one_who_never_announced_itself_ends_at_once():
    async with running_tracker("127.0.0.1:9") as tracker:
        with trio.fail_after(30):
            assert await tracker.watch(agent(1), 0) == api.WatchReply((), None)


async def test_a_watch_of_one_who_completes_ends():
    async with running_tracker("127.0.0.1:9") as tracker, waiting_at(tracker) as waiting:
        await tracker.announce(agent(1), COMPLETE)
        with trio.fail_after(30):
            await waiting.ended.wait()

    assert waiting.replies == [api.WatchReply((), None)]


async def test_one_who_hangs_up_waits_no_more():
    async with running_tracker("127.0.0.1:9") as tracker:
        async with waiting_at(tracker):
            pass
        await tracker.until("tracker_watches", 0.0)
        # Nobody is told, and nothing comes of it.
        await tracker.announce(agent(2), COMPLETE)
        assert await tracker.value("tracker_newcomers_told") == 0.0


async def test_a_drain_ends_watches_at_once():
    async with (
        running_tracker("127.0.0.1:9", drain_timeout=600.0) as tracker,
        waiting_at(tracker) as waiting,
    ):
        tracker.drain.set()
        with trio.fail_after(30):
            await waiting.ended.wait()
            await tracker.ended.wait()

    assert waiting.replies == [api.WatchReply((), None)]


async def test_a_tracker_that_knows_no_origin_is_not_ready():
    async with running_tracker() as tracker:
        answer = await tracker.get("/readiness")

    assert answer.status_code == 503
    assert "cluster.origins" in answer.text


async def test_a_drain_lets_the_announce_under_way_finish(nursery):
    origin = Origin()
    await nursery.start(origin.serve)
    replies: list[api.AnnounceReply] = []

    async def announce() -> None:
        replies.append(await tracker.announce(agent(1), want_metainfo=True))

    async with running_tracker(origin.address) as tracker, trio.open_nursery() as agents:
        agents.start_soon(announce)
        await origin.asked.wait()
        tracker.drain.set()
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert not tracker.ended.is_set()
        with pytest.raises(RpcUnavailable):
            await tracker.announce(agent(2))
        origin.gate.set()
        await tracker.ended.wait()

    assert replies[0].metainfo == metainfo_of(BLOB)


async def test_a_drain_does_not_wait_for_ever(nursery):
    origin = Origin()
    await nursery.start(origin.serve)

    async def announce() -> None:
        with pytest.raises(RpcUnavailable):
            await tracker.announce(agent(1), want_metainfo=True)

    async with (
        running_tracker(origin.address, drain_timeout=0.2) as tracker,
        trio.open_nursery() as agents,
    ):
        agents.start_soon(announce)
        await origin.asked.wait()
        tracker.drain.set()
        await tracker.ended.wait()


async def test_a_port_in_use_is_an_error_for_the_operator():
    async with running_tracker("127.0.0.1:9") as tracker:
        port = int(tracker.addresses.listeners["rpc"].rpartition(":")[2])
        settings = attrs.evolve(SETTINGS, rpc=ListenerConfig(listen=Address("127.0.0.1", port)))
        with pytest.raises(ExceptionGroup) as caught:
            await run_tracker(Config(), settings, drain=trio.Event())

    assert caught.group_contains(StartupError, match=str(port))
