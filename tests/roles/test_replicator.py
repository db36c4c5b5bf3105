"""What two clusters of real roles do when an index dies, a remote refuses, or a rule is new."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
import trio.testing

from swarmpull.config import (
    Address,
    BackendConfig,
    IndexConfig,
    ListenerConfig,
    NamespaceConfig,
    RemoteConfig,
    ReplicationConfig,
    TlsConfig,
    TrustedClusterConfig,
)
from swarmpull.digest import Digest
from swarmpull.errors import BackendUnavailable, BlobNotFound, RpcFailed, RpcUnavailable
from swarmpull.roles import replicator
from swarmpull.roles.index import run_index
from swarmpull.roles.remotes import Rules
from swarmpull.roles.replicator import Replicator
from swarmpull.roles.tag_log import TagLog
from swarmpull.store import durable_queue
from swarmpull.store.remote_queue import ChangeKey, RemoteChange, open_remote_queue
from swarmpull.swarm.messages import Bye, ByeReason, Hello
from swarmpull.swarm.peers import PeerKind
from swarmpull.telemetry import Metrics
from swarmpull.watched_files import WatchedFiles
from swarmpull.wire.api import (
    HAND_OVER,
    RESOLVE,
    HandOverRequest,
    ListReply,
    ReferenceRequest,
    Stamp,
    TagChange,
)
from swarmpull.wire.streams import PeerStream
from swarmpull.wire.tls import Contexts, Tls, TlsFiles, load_contexts
from tests.ports import free_ports
from tests.security.hosts import ALL, Authority, config_of

from .roles import API, LISTEN, Cluster, cluster_under, whole_cluster

CONFIG, LAYER = b"{}", b"layer" * 10_000


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes seconds takes a moment."""
    monkeypatch.setattr(replicator, "STANDBY_INTERVAL", 0.2)
    monkeypatch.setattr(replicator, "BACKOFF_MAX", 0.5)
    monkeypatch.setattr("swarmpull.store.retry_schedule.PROBE_MAX", 0.3)


@attrs.define
class East:
    """A cluster with an origin and two indexes, that replicates to another one."""

    cluster: Cluster
    ports: tuple[int, ...]

    async def start_index(self, number: int) -> None:
        settings = IndexConfig(
            rpc=ListenerConfig(listen=Address("127.0.0.1", self.ports[number])),
            admin=LISTEN,
            api=API,
            backend=BackendConfig(url=(self.cluster.root / "index-backend").as_uri()),
            name=f"index-{number}",
            data_dir=self.cluster.root / f"index-{number}",
        )
        await self.cluster.start(f"index-{number}", run_index, settings)

    def replicate(self, remote_index: str, pattern: str = "team/**") -> None:
        """The rule of every index that is started from now on."""
        self.cluster.config = attrs.evolve(
            self.cluster.config,
            remotes=(RemoteConfig(name="west", indexes=(remote_index,)),),
            replications=(ReplicationConfig(pattern=pattern, remote="west"),),
        )

    async def replication(self, number: int) -> dict[str, Any]:
        address = self.cluster.roles[f"index-{number}"].address("admin")
        return (await self.cluster.client.get(f"http://{address}/replication")).json()

    async def change(self, number: int, document: object) -> Any:
        address = self.cluster.roles[f"index-{number}"].address("admin")
        reply = await self.cluster.client.put(f"http://{address}/replication", json=document)
        return reply.json()

    async def push(self) -> Digest:
        return Digest.of(await self.cluster.push_image("origin", "team/app", CONFIG, LAYER))


@asynccontextmanager
async def east_under(
    root: Path, *, remote_index: str = "", indexes: int = 2, tls: TlsConfig | None = None
) -> AsyncIterator[East]:
    async with cluster_under(root) as cluster:
        cluster.config = attrs.evolve(cluster.config, tls=tls or TlsConfig())
        ports = free_ports(indexes)
        addresses = tuple(f"127.0.0.1:{port}" for port in ports)
        cluster._learn(indexes=addresses)
        east = East(cluster, ports)
        origin_port = free_ports(1)[0]
        cluster._learn(origins=(f"127.0.0.1:{origin_port}",))
        if remote_index:
            east.replicate(remote_index)
        for number in range(indexes):
            await east.start_index(number)
        await cluster.start_origin(port=origin_port)
        await cluster.start_tracker()
        yield east


async def until(condition: Callable[[], Any]) -> None:
    """Return when ``condition`` holds; it may be a coroutine function."""
    while not await condition():  # noqa: ASYNC110 - of other roles
        await trio.sleep(0.02)


async def digest_at(west: Cluster, reference: str = "v1") -> Digest:
    request = ReferenceRequest("team/app", reference)
    address = west.roles["index"].address("rpc")
    return (await west.pool.call(address, RESOLVE, request, timeout=10.0)).digest


async def test_a_standby_takes_over_from_an_index_that_has_died(tmp_path: Path) -> None:
    (west_port,) = free_ports(1)
    async with east_under(tmp_path / "east", remote_index=f"127.0.0.1:{west_port}") as east:
        digest = await east.push()
        documents = [await east.replication(number) for number in range(2)]
        assert sorted((each["queued"], each["standby"]) for each in documents) == [(0, 1), (1, 0)]

        async def has_failed() -> bool:
            return (await east.replication(owner))["entries"][0]["attempts"] > 0

        owner = 0 if documents[0]["queued"] else 1
        await until(has_failed)
        await east.cluster.roles[f"index-{owner}"].kill()
        async with cluster_under(tmp_path / "west") as west:
            settings = IndexConfig(
                rpc=ListenerConfig(listen=Address("127.0.0.1", west_port)),
                admin=LISTEN,
                api=API,
                backend=BackendConfig(url=(tmp_path / "west-index").as_uri()),
                data_dir=tmp_path / "west-index-data",
            )
            west._learn(indexes=(f"127.0.0.1:{west_port}",))
            origin = await west.start_origin()
            west._learn(origins=(origin.address("rpc"),))
            await west.start("index", run_index, settings)
            await west.start_tracker()

            async def is_idle() -> bool:
                document = await east.replication(1 - owner)
                return not document["queued"] and not document["standby"]

            await until(is_idle)
            assert await digest_at(west) == digest
            # The one that died does no harm when it is back: the tag is there.
            await east.start_index(owner)

            async def has_drained() -> bool:
                return not (await east.replication(owner))["queued"]

            await until(has_drained)
            assert await digest_at(west) == digest


async def test_what_a_remote_refuses_is_set_aside_until_somebody_says_so(tmp_path: Path) -> None:
    async with cluster_under(tmp_path / "west") as west:
        await west.start_index()
        west.namespaces = (
            NamespaceConfig(pattern="other/*", url=(tmp_path / "west" / "other").as_uri()),
        )
        origin = await west.start_origin()
        await west.start_tracker()
        # The index of west does not know its origins yet.
        await west.roles["index"].stop()
        await west.start_index()
        origin_port = int(origin.address("rpc").rpartition(":")[2])
        remote = west.roles["index"].address("rpc")
        async with east_under(tmp_path / "east", remote_index=remote, indexes=1) as east:
            digest = await east.push()

            async def is_set_aside() -> bool:
                return bool((await east.replication(0))["set_aside"])

            await until(is_set_aside)
            (entry,) = (await east.replication(0))["entries"]
            assert "none of the patterns" in entry["failure"]
            assert entry["state"] == "set aside"
            (lane,) = (await east.replication(0))["remotes"]
            # It answers: what is wrong is wrong with that tag.
            assert (lane["failure"], lane["set_aside"]) == ("", 1)

            await origin.stop()
            west.namespaces = ()
            await west.start_origin(port=origin_port)
            assert await east.change(0, {"retry": {"tag": "other"}}) == {"retried": 0}
            assert "errors" in await east.change(0, {"retry": {"digest": "x"}})
            (error,) = (await east.change(0, {"retry": {"remote": "wset"}}))["errors"]
            assert error["message"] == "no remote is called 'wset': west"
            (error,) = (await east.change(0, {"sync": "taem/**"}))["errors"]
            assert "no rule of replications sends what 'taem/**' matches" in error["message"]
            assert await east.change(0, {"retry": {"repository": "team/app"}}) == {"retried": 1}

            async def is_idle() -> bool:
                return not (await east.replication(0))["queued"]

            await until(is_idle)
            assert await digest_at(west) == digest


async def test_a_remote_without_room_is_tried_until_it_has_some(tmp_path: Path) -> None:
    async with cluster_under(tmp_path / "west") as west:
        origin = await west.start_origin(max_bytes="10000", low_watermark="9000")
        index = await west.start_index()
        async with east_under(
            tmp_path / "east", remote_index=index.address("rpc"), indexes=1
        ) as east:
            digest = await east.push()

            async def is_short_of_room() -> bool:
                entries = (await east.replication(0))["entries"]
                return bool(entries) and "no room" in entries[0]["failure"]

            await until(is_short_of_room)
            document = await east.replication(0)
            assert not document["set_aside"]
            assert not document["remotes"][0]["failing"], "others may go on"
            port = int(origin.address("rpc").rpartition(":")[2])
            await origin.stop()
            await west.start_origin(port=port)

            await east.cluster.counted("index-0", 'replication_copied_total{remote="west"}', 1)
            assert await digest_at(west) == digest


async def test_a_circle_of_three_clusters_ends_where_it_began(tmp_path: Path) -> None:
    names = ("a", "b", "c")
    ports = dict(zip(names, free_ports(3), strict=True))
    async with AsyncExitStack() as stack:
        clusters = {}
        for name, following in zip(names, ("b", "c", "a"), strict=True):
            cluster = await stack.enter_async_context(cluster_under(tmp_path / name))
            address = f"127.0.0.1:{ports[name]}"
            cluster._learn(indexes=(address,), origins=(f"127.0.0.1:{free_ports(1)[0]}",))
            cluster.config = attrs.evolve(
                cluster.config,
                remotes=(RemoteConfig(name=following, indexes=(f"127.0.0.1:{ports[following]}",)),),
                replications=(ReplicationConfig(pattern="**", remote=following),),
            )
            settings = IndexConfig(
                rpc=ListenerConfig(listen=Address("127.0.0.1", ports[name])),
                admin=LISTEN,
                api=API,
                backend=BackendConfig(url=(tmp_path / name / "index-backend").as_uri()),
                name=name,
                data_dir=tmp_path / name / "index",
            )
            await cluster.start("index", run_index, settings)
            await cluster.start_origin(
                port=int(cluster.config.cluster.origins[0].rpartition(":")[2])
            )
            clusters[name] = cluster
        manifest = await clusters["a"].push_image("origin", "team/app", CONFIG, LAYER)

        async def all_are_idle() -> bool:
            documents = [await replication_of(cluster) for cluster in clusters.values()]
            return not any(document["queued"] for document in documents)

        await clusters["b"].counted("index", 'replication_copied_total{remote="c"}', 1)
        await until(all_are_idle)
        for cluster in clusters.values():
            assert await digest_at(cluster) == Digest.of(manifest)
        # From c it would have gone to where it came from.
        assert await clusters["a"].metric("index", 'replication_copied_total{remote="b"}') == 1
        assert await clusters["c"].metric("index", 'replication_copied_total{remote="a"}') == 0


async def test_a_hand_over_to_nowhere_fails_alone(tmp_path: Path) -> None:
    async with whole_cluster(tmp_path) as cluster:
        await cluster.push_image("origin", "team/app", CONFIG, LAYER)
        address = cluster.roles["origin"].address("rpc")
        for owners, rate, failure in (
            ((), 0.0, "none of its origins is known"),
            (("nowhere",), math.nan, "nowhere"),
            (("127.0.0.1:1",), -1.0, "127.0.0.1:1: .*refused"),
        ):
            request = HandOverRequest(Digest.of(LAYER), "team/app", "west", owners, rate, 5.0)
            with pytest.raises(RpcFailed, match=failure):
                await cluster.pool.call(address, HAND_OVER, request, timeout=20.0)
        missing = HandOverRequest(
            Digest.of(b"nothing"), "team/app", "west", ("127.0.0.1:1",), None, 5.0
        )
        with pytest.raises(BlobNotFound):
            await cluster.pool.call(address, HAND_OVER, missing, timeout=20.0)


async def replication_of(cluster: Cluster) -> dict[str, Any]:
    address = cluster.roles["index"].address("admin")
    return (await cluster.client.get(f"http://{address}/replication")).json()


async def test_a_rule_that_is_new_sends_what_is_there_when_it_is_asked_to(tmp_path: Path) -> None:
    async with (
        whole_cluster(tmp_path / "west") as west,
        east_under(tmp_path / "east", indexes=1) as east,
    ):
        # Started before there was an origin, so it describes none: the remote says which it has.
        digest = await east.push()
        await east.cluster.roles["index-0"].stop()
        east.cluster.config = attrs.evolve(
            east.cluster.config,
            remotes=(
                RemoteConfig(
                    name="west",
                    indexes=(west.roles["index"].address("rpc"),),
                    origins=(west.roles["origin"].address("rpc"),),
                ),
            ),
            replications=(ReplicationConfig(pattern="team/*", remote="west"),),
        )
        await east.start_index(0)
        assert not (await east.replication(0))["queued"]

        assert await east.change(0, {"sync": "**"}) == {"syncing": "**"}

        await east.cluster.counted("index-0", 'replication_copied_total{remote="west"}', 1)
        assert await digest_at(west) == digest
        rules = (await east.replication(0))["rules"]
        assert rules == [{"pattern": "team/*", "remote": "west", "matched": 0}]


async def test_clusters_with_authorities_of_their_own_replicate_by_tls(tmp_path: Path) -> None:
    directories = {name: tmp_path / f"{name}-ca" for name in ("east", "west")}
    issued = {}
    for name, directory in directories.items():
        issued[name] = Authority.create(directory, name).issue("host", *ALL)

    def tls(name: str, other: str, *, trusts: bool = True) -> TlsConfig:
        trusted = TrustedClusterConfig(cluster=other, ca=str(directories[other] / "ca.crt"))
        config = config_of(issued[name])
        return attrs.evolve(config, trusted=(trusted,) if trusts else ())

    async with cluster_under(tmp_path / "west") as west:
        west.config = attrs.evolve(west.config, tls=tls("west", "east", trusts=False))
        origin = await west.start_origin()
        index = await west.start_index()
        remote = index.address("rpc")
        async with east_under(
            tmp_path / "east", remote_index=remote, indexes=1, tls=tls("east", "west")
        ) as east:
            await east.push()

            async def is_refused() -> bool:
                return bool((await east.replication(0))["remotes"][0]["failure"])

            await until(is_refused)
            failure = (await east.replication(0))["remotes"][0]["failure"]
            assert "refuses our certificate" in failure, failure

            # Now west trusts east.
            west.config = attrs.evolve(west.config, tls=tls("west", "east"))
            index_port, origin_port = (
                int(role.address("rpc").rpartition(":")[2]) for role in (index, origin)
            )
            await index.stop()
            await origin.stop()
            west._learn(indexes=(remote,))
            await west.start_origin(port=origin_port)
            settings = IndexConfig(
                rpc=ListenerConfig(listen=Address("127.0.0.1", index_port)),
                admin=LISTEN,
                api=API,
                backend=BackendConfig(url=(tmp_path / "west" / "index-backend").as_uri()),
            )
            await west.start("index", run_index, settings)

            await east.cluster.counted("index-0", 'replication_copied_total{remote="west"}', 1)
            for path in ("manifests/v1", f"blobs/{Digest.of(LAYER)}"):
                reply = await west.get("origin", f"/v2/team/app/{path}")
                assert reply.status_code == 200, reply.text
            assert (await west.status("origin"))["bytes_received"]["origin"] >= len(LAYER)

            # What is not just being handed over is not given to the other cluster, known digest or not.
            here = Tls(await open_files(issued["west"], east=str(directories["east"] / "ca.crt")))
            bye = await greet_origin(east.cluster, here, Digest.of(LAYER))
            assert bye.reason is ByeReason.UNKNOWN_TORRENT
            assert bye.text == f"{Digest.of(LAYER)} is not being handed over to cluster west"


async def open_files(files: TlsFiles, **trusted: str) -> WatchedFiles[Contexts]:
    paths = (files.ca, files.cert, files.key)
    return await WatchedFiles.open(paths, partial(load_contexts, files, trusted))


async def greet_origin(cluster: Cluster, tls: Tls, digest: Digest) -> Bye:
    """What an origin says to one of another cluster that would like to have a blob."""
    host, _, port = cluster.roles["origin"].address("peer").rpartition(":")
    stream = PeerStream((await tls.connect(await trio.open_tcp_stream(host, int(port))))[0])
    try:
        await stream.send(Hello(digest, "team/app", "a" * 32, PeerKind.ORIGIN, 1, 1, b"\0"))
        return await stream.receive_hello()
    finally:
        await stream.aclose()


def tls_of_two(root: Path) -> Callable[..., TlsConfig]:
    """The configuration of either of two clusters that trust one another, with authorities of their own."""
    issued, files = {}, {}
    for name in ("east", "west"):
        authority = Authority.create(root / f"{name}-ca", name)
        issued[name], files[name] = authority.issue("host", *ALL), authority.directory / "ca.crt"

    def tls(name: str, other: str, *repositories: str, peer: str = "on") -> TlsConfig:
        trusted = TrustedClusterConfig(
            cluster=other, ca=str(files[other]), repositories=repositories
        )
        return attrs.evolve(config_of(issued[name]), trusted=(trusted,), peer=peer)

    return tls


async def test_what_the_other_cluster_may_not_send_here_is_set_aside_there(tmp_path: Path) -> None:
    tls = tls_of_two(tmp_path)
    async with cluster_under(tmp_path / "west") as west:
        west.config = attrs.evolve(west.config, tls=tls("west", "east", "shared/**"))
        await west.start_origin()
        index = await west.start_index()
        async with east_under(
            tmp_path / "east",
            remote_index=index.address("rpc"),
            indexes=1,
            tls=tls("east", "west", "nothing/*"),
        ) as east:
            await east.push()

            async def is_set_aside() -> bool:
                return (await east.replication(0))["set_aside"] == 1

            await until(is_set_aside)
            (entry,) = (await east.replication(0))["entries"]
            assert "cluster east may not replicate to team/app" in entry["failure"]


@pytest.mark.parametrize(("here", "there"), [("on", "off"), ("off", "on")])
async def test_clusters_whose_pieces_go_by_different_ways_say_so(
    tmp_path: Path, here: str, there: str
) -> None:
    tls = tls_of_two(tmp_path)
    async with cluster_under(tmp_path / "west") as west:
        west.config = attrs.evolve(west.config, tls=tls("west", "east", peer=there))
        await west.start_origin()
        index = await west.start_index()
        remote = index.address("rpc")
        async with east_under(
            tmp_path / "east", remote_index=remote, indexes=1, tls=tls("east", "west", peer=here)
        ) as east:
            await east.push()

            async def says_why() -> bool:
                document = str(await east.replication(0))
                return "set tls.peer alike in both" in document

            await until(says_why)


async def test_one_backend_for_both_needs_no_bytes(tmp_path: Path) -> None:
    """Clusters that share what keeps blobs: only names are made."""
    async with whole_cluster(tmp_path / "west") as west:
        remote = west.roles["index"].address("rpc")
        async with east_under(tmp_path / "east", indexes=1) as east:
            await east.cluster.roles["index-0"].stop()
            await east.cluster.roles["origin"].stop()
            # The same directory behind the origins of both.
            (tmp_path / "east" / "backend").rename(tmp_path / "unused")
            (tmp_path / "east" / "backend").symlink_to(tmp_path / "west" / "backend")
            east.replicate(remote)
            east.cluster.config = attrs.evolve(
                east.cluster.config,
                remotes=(
                    RemoteConfig(
                        name="west",
                        indexes=(remote,),
                        origins=(west.roles["origin"].address("rpc"),),
                    ),
                ),
            )
            await east.start_index(0)
            port = int(east.cluster.config.cluster.origins[0].rpartition(":")[2])
            await east.cluster.start_origin(port=port)
            for blob in (CONFIG, LAYER):
                assert (await east.cluster.push_blob("origin", "team/app", blob)).status_code == 201
            await east.cluster.written_back()
            digest = await east.push()
            await east.cluster.counted("index-0", 'replication_copied_total{remote="west"}', 1)

            assert await digest_at(west) == digest
            assert (await west.status("origin"))["bytes_received"]["origin"] == 0


class _GatedQueue:
    """A queue in memory; whoever takes something out waits at a gate first."""

    name = "the queue"
    loaded: tuple[RemoteChange, ...] = ()

    def __init__(self) -> None:
        self.rows: dict[ChangeKey, RemoteChange] = {}
        self.at_gate = trio.Event()
        self.gate = trio.Event()

    async def put(self, change: RemoteChange) -> None:
        await trio.lowlevel.checkpoint()
        self.rows[change.key] = change

    async def put_all(self, changes: Iterable[RemoteChange]) -> None:
        for change in changes:
            await self.put(change)

    async def remove(self, key: ChangeKey) -> None:
        self.at_gate.set()
        await self.gate.wait()
        self.rows.pop(key, None)


class _Watched:
    """What a `Replicator` asks a remote, a catalog, a copier and its standby: all is well, and quickly."""

    name, process, tags = "west", "me", property(lambda self: self)

    def __init__(self) -> None:
        self.now = TagLog()

    async def run(self) -> None:
        await trio.sleep_forever()

    async def log(self, *_: object) -> TagLog:
        await trio.lowlevel.checkpoint()
        return self.now

    async def copy(self, *_: object) -> bool:
        await trio.lowlevel.checkpoint()
        return True

    async def keep(self, *_: object) -> None:
        await trio.lowlevel.checkpoint()


async def test_a_change_that_comes_while_the_former_one_is_taken_out_stays_in_the_queue(
    autojump_clock: trio.testing.MockClock,
) -> None:
    queue, world = _GatedQueue(), _Watched()
    rules = Rules([ReplicationConfig(pattern="team/**", remote="west")])
    parts: Any = (queue, rules, [world], world, world, world)
    replicating = Replicator(*parts, Metrics())
    digest = Digest.of(CONFIG)
    first, second = (TagChange(Stamp(time, "index"), digest) for time in (1, 2))

    async def make(change: TagChange) -> None:
        await replicating.changing("team/app", "v1", change)
        world.now = world.now.with_change(change)
        await replicating.changed("team/app", "v1", change)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(replicating.run)
        await make(first)
        await queue.at_gate.wait()
        nursery.start_soon(replicating.changing, "team/app", "v1", second)
        await trio.testing.wait_all_tasks_blocked()
        queue.gate.set()
        await trio.testing.wait_all_tasks_blocked()

        # On the disk, so that it is not lost when the process dies now.
        assert [change.stamp for change in queue.rows.values()] == [(2, "index")]
        nursery.cancel_scope.cancel()


async def test_what_an_earlier_process_was_making_is_looked_at_at_once(
    autojump_clock: trio.testing.MockClock,
) -> None:
    queue, world = _GatedQueue(), _Watched()
    queue.gate.set()
    key = ("west", "team/app", "v1")
    now = time.time()
    queue.loaded = (RemoteChange(*key, 1, "index", now, next_at=now + replicator.WRITING),)
    queue.rows = {change.key: change for change in queue.loaded}
    world.now = world.now.with_change(TagChange(Stamp(1, "index"), Digest.of(CONFIG)))
    rules = Rules([ReplicationConfig(pattern="team/**", remote="west")])
    parts: Any = (queue, rules, [world], world, world, world)
    async with trio.open_nursery() as nursery:
        began = trio.current_time()
        nursery.start_soon(Replicator(*parts, Metrics()).run)
        await queue.at_gate.wait()
        assert trio.current_time() - began < 1.0
        nursery.cancel_scope.cancel()


class _BackSoon(_Watched):
    """A remote that is down at first; what is copied to it then takes long."""

    def __init__(self) -> None:
        super().__init__()
        self.attempts = 0
        self.is_back = trio.Event()

    async def copy(self, *arguments: Any) -> bool:
        await trio.lowlevel.checkpoint()
        self.attempts += 1
        if self.attempts == 1:
            raise RpcUnavailable("west", "index.tag_log", "cannot connect: Connection refused")
        arguments[-1].step = "handing blobs over"
        self.is_back.set()
        await trio.sleep_forever()
        raise AssertionError


async def test_a_remote_that_answers_again_is_not_said_to_be_down_while_it_is_sent_to(
    autojump_clock: trio.testing.MockClock,
) -> None:
    queue, world = _GatedQueue(), _BackSoon()
    rules = Rules([ReplicationConfig(pattern="team/**", remote="west")])
    parts: Any = (queue, rules, [world], world, world, world)
    replicating = Replicator(*parts, Metrics())
    change = TagChange(Stamp(1, "index"), Digest.of(CONFIG))

    def failure() -> str:
        remotes: Any = replicating.document()["remotes"]
        return str(remotes[0]["failure"])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(replicating.run)
        await replicating.changing("team/app", "v1", change)
        world.now = world.now.with_change(change)
        await replicating.changed("team/app", "v1", change)
        await trio.testing.wait_all_tasks_blocked()
        assert "Connection refused" in failure()
        await world.is_back.wait()
        assert failure() == ""
        nursery.cancel_scope.cancel()


def replicating_over(queue: object, world: object) -> Replicator:
    rules = Rules([ReplicationConfig(pattern="team/**", remote="west")])
    parts: Any = (queue, rules, [world], world, world, world)
    return Replicator(*parts, Metrics())


async def test_many_entries_are_retried_with_a_few_flushes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    changes = [
        RemoteChange("west", "team/app", f"v{number}", 1, "index", now, set_aside=True)
        for number in range(2500)
    ]
    async with open_remote_queue(tmp_path, "index") as queue:
        await queue.put_all(changes)
    commit, flushes = durable_queue._commit, 0

    def count(*arguments: Any) -> None:
        nonlocal flushes
        flushes += 1
        commit(*arguments)

    async with open_remote_queue(tmp_path, "index") as queue:
        replicating = replicating_over(queue, _Watched())
        assert replicating.set_aside() == 2500
        monkeypatch.setattr(durable_queue, "_commit", count)
        assert await replicating.change({"retry": {"remote": "west"}}) == {"retried": 2500}
        assert flushes == 3
        assert replicating.set_aside() == 0
    async with open_remote_queue(tmp_path, "index") as queue:
        assert not any(each.set_aside for each in queue.loaded)


@pytest.mark.parametrize("wanted", [{"remote": []}, {"tag": 1}, {"repository": None}])
async def test_what_is_no_text_is_refused(wanted: dict[str, object]) -> None:
    replicating = replicating_over(_GatedQueue(), _Watched())
    with pytest.raises(ValueError, match="must be a text"):
        await replicating.change({"retry": wanted})


class _Listed(_Watched):
    """Its repositories are listed when the gate is open."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.listings = trio.Event(), 0

    async def list_repositories(self, *_: object) -> ListReply:
        self.listings += 1
        await self.gate.wait()
        raise BackendUnavailable("the bucket", "catalog/", "it burns")


async def test_patterns_are_gone_through_one_after_the_other_and_a_bounded_number_waits(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicator, "SYNCS_MAX", 2)
    world = _Listed()
    replicating = replicating_over(_GatedQueue(), world)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(replicating.run)
        for pattern in ("team/a", "team/a", "team/a", "team/b", "team/b"):
            await replicating.change({"sync": pattern})
            await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(ValueError, match="2 patterns wait already"):
            await replicating.change({"sync": "team/c"})
        # Once more what is under way: it may be past what the remote has lost since.
        assert replicating.document()["syncs"] == ["team/a", "team/a", "team/b"]
        assert world.listings == 1

        world.gate.set()
        await trio.testing.wait_all_tasks_blocked()
        assert replicating.document()["syncs"] == []
        assert "team/b: " in str(replicating.document()["sync_failure"])
        assert "it burns" in str(replicating.document()["sync_failure"])
        assert world.listings == 3
        nursery.cancel_scope.cancel()
