"""Puts while the backend is down: acknowledged, seen at every index, and in the backend when it is back."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import httpx
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
from swarmpull.errors import (
    BackendUnavailable,
    ManifestNotFound,
    ManifestReferencesMissing,
    RpcUnavailable,
    StoreFull,
    StoreUnavailable,
    SwarmpullError,
    TagChanged,
)
from swarmpull.roles import catalog as catalog_module
from swarmpull.roles import (
    direct_changes,
    index_contact,
    index_journal,
    index_peers,
    journal_sharing,
)
from swarmpull.roles import index as index_module
from swarmpull.roles.catalog import Catalog
from swarmpull.roles.catalog_objects import changes_key
from swarmpull.roles.catalog_replay import Replay
from swarmpull.roles.cluster import Cluster, IndexClient
from swarmpull.roles.direct_changes import DirectChanges
from swarmpull.roles.index import run_index
from swarmpull.roles.index_cache import ResolveCache
from swarmpull.roles.index_contact import Contact
from swarmpull.roles.index_journal import Journal, open_journal
from swarmpull.roles.index_peers import IndexGone, IndexPeers
from swarmpull.roles.journal_file import Kept
from swarmpull.roles.journal_sharing import JournalSharing, NotSure
from swarmpull.roles.pending_changes import PendingChanges, id_of
from swarmpull.roles.ring_client import open_ring
from swarmpull.store import durable_queue
from swarmpull.store.backends import Backend, open_backend
from swarmpull.store.durable_queue import DurableQueue
from swarmpull.telemetry import Metrics
from swarmpull.wire import api
from swarmpull.wire.codec import encode
from swarmpull.wire.rpc import RpcPool, open_rpc_pool
from tests.ports import free_ports

LAYER = Digest.of(b"layer")
# In ns.
HOUR = 3600 * 10**9


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    monkeypatch.setattr(index_module, "CHECK_INTERVAL", 0.02)
    monkeypatch.setattr(index_journal, "LOOK_INTERVAL", 0.02)
    monkeypatch.setattr(index_journal, "COURTESY", 0.1)


def describe(number: int) -> api.Descriptor:
    return api.Descriptor(Digest.of(f"manifest {number}".encode()), "type", number)


def put(number: int, tag: str | None = "v1", **fields: object) -> api.RecordManifestRequest:
    return api.RecordManifestRequest("app", describe(number), tag, **fields)  # type: ignore[arg-type]


@attrs.define
class Indexes:
    """Indexes in this process over one backend, which can be taken away."""

    root: Path
    nursery: trio.Nursery
    pool: RpcPool
    ports: list[int]
    immutable: tuple[str, ...] = ()
    lease: float = 0.2
    scopes: dict[int, trio.CancelScope] = attrs.field(factory=dict)
    admin: dict[int, str] = attrs.field(factory=dict)

    @property
    def backend(self) -> Path:
        return self.root / "backend"

    def path_of(self, number: int) -> Path:
        """How an index reaches the backend; what `cut_off` has taken from it."""
        path = self.root / f"backend-of-{number}"
        if not path.is_symlink():
            path.symlink_to(self.backend)
        return path

    async def cut_off(self, number: int) -> None:
        """Take the backend from one index alone."""
        path = self.path_of(number)
        path.unlink()
        path.symlink_to(self.root / "nowhere")
        await self.wait(down=True, numbers=(number,))

    def reconnect(self, number: int) -> None:
        path = self.root / f"backend-of-{number}"
        path.unlink()
        path.symlink_to(self.backend)

    def client(self, number: int) -> IndexClient:
        address = f"127.0.0.1:{self.ports[number]}"
        return Cluster(self.pool, ClusterConfig(indexes=(address,))).index

    async def start(self, number: int) -> None:
        config = Config(
            cluster=ClusterConfig(indexes=tuple(f"127.0.0.1:{port}" for port in self.ports))
        )
        settings = IndexConfig(
            name=f"index{number}",
            rpc=ListenerConfig(listen=Address("127.0.0.1", self.ports[number])),
            admin=ListenerConfig(listen=Address("127.0.0.1", 0)),
            api=ApiConfig(listen=Address("127.0.0.1", 0)),
            backend=BackendConfig(url=self.path_of(number).as_uri()),
            data_dir=self.root / f"index-{number}",
            lease=Duration(self.lease),
            immutable=self.immutable,
        )
        scope = self.scopes[number] = trio.CancelScope()

        async def run(*, task_status: trio.TaskStatus[str]) -> None:
            with scope:
                async with trio.open_nursery() as nursery:
                    addresses = await nursery.start(self._run, config, settings)
                    task_status.started(addresses.listeners["admin"])

        self.admin[number] = await self.nursery.start(run)

    async def _run(
        self, config: Config, settings: IndexConfig, *, task_status: trio.TaskStatus[object]
    ) -> None:
        await run_index(config, settings, drain=trio.Event(), task_status=task_status)

    def kill(self, number: int) -> None:
        """Without a word to anybody."""
        self.scopes[number].cancel()

    async def status(self, number: int) -> dict[str, object]:
        async with httpx.AsyncClient() as client:
            answer = await client.get(f"http://{self.admin[number]}/status")
        return json.loads(answer.text)

    async def wait(self, *, down: bool, numbers: tuple[int, ...] = (0, 1)) -> None:
        for number in numbers:
            while (await self.status(number))["backend"]["available"] is down:
                pass

    async def written(self, number: int) -> None:
        while (await self.status(number))["journal"]["changes"]:
            pass

    async def take_away(self) -> None:
        self.backend.rename(self.root / "away")
        await self.wait(down=True)

    def bring_back(self) -> None:
        (self.root / "away").rename(self.backend)

    async def catalog(self) -> Catalog:
        return Catalog(await open_backend(self.backend.as_uri()), "test")


@asynccontextmanager
async def indexes_in(
    root: Path, immutable: tuple[str, ...] = (), lease: float = 0.2
) -> AsyncIterator[Indexes]:
    (root / "backend").mkdir(exist_ok=True)
    with trio.fail_after(60):
        async with open_rpc_pool() as pool, trio.open_nursery() as nursery:
            indexes = Indexes(root, nursery, pool, free_ports(2), immutable, lease)
            for number in range(2):
                await indexes.start(number)
            yield indexes
            nursery.cancel_scope.cancel()


async def test_a_put_is_seen_at_every_index_and_reaches_the_backend(tmp_path):
    async with indexes_in(tmp_path) as indexes:
        first, second = indexes.client(0), indexes.client(1)
        await first.record_manifest(put(1))
        await indexes.take_away()

        await first.link_blob("app", LAYER)
        await second.check_references("app", blobs=(LAYER,))
        await second.record_manifest(put(2, blobs=(LAYER,)))
        for client in (first, second):
            assert await client.resolve("app", "v1") == describe(2)
            assert await client.resolve("app", str(describe(2).digest)) == describe(2)
            assert await client.has_blob("app", LAYER)
        await first.record_manifest(put(3, "v2"))
        await second.delete_tag("app", "v2")
        for client in (first, second):
            with pytest.raises((ManifestNotFound, BackendUnavailable)):
                await client.resolve("app", "v2")
        journal = (await indexes.status(1))["journal"]
        assert journal["changes"] == 4
        assert journal["age"] >= 0

        indexes.bring_back()
        for number in range(2):
            await indexes.written(number)
        catalog = await indexes.catalog()
        assert await catalog.resolve("app", "v1") == describe(2)
        history = [change.digest for change in (await catalog.tag_log("app", "v1")).changes]
        assert history == [describe(1).digest, describe(2).digest]
        history = [change.digest for change in (await catalog.tag_log("app", "v2")).changes]
        assert history == [describe(3).digest, None]
        assert (await catalog.list_tags("app", "", 10)).names == ("v1",)


async def test_what_was_acknowledged_survives_the_death_of_either_index(tmp_path):
    async with indexes_in(tmp_path) as indexes:
        await indexes.client(0).record_manifest(put(0, "old"))
        await indexes.take_away()
        await indexes.client(0).record_manifest(put(1))
        indexes.kill(0)
        assert await indexes.client(1).resolve("app", "v1") == describe(1)
        await indexes.client(1).record_manifest(put(2))
        # It has the first from its own disk, and the second from the other.
        (tmp_path / "backend").symlink_to(tmp_path / "away")
        await indexes.written(1)
        (tmp_path / "backend").unlink()
        indexes.bring_back()
        catalog = await indexes.catalog()
        assert await catalog.resolve("app", "v1") == describe(2)
        history = [change.digest for change in (await catalog.tag_log("app", "v1")).changes]
        assert history == [describe(1).digest, describe(2).digest]


async def test_an_index_that_starts_again_writes_what_its_journal_has(tmp_path):
    async with indexes_in(tmp_path) as indexes:
        indexes.kill(1)
        await indexes.client(0).record_manifest(put(0, "old"))
        indexes.backend.rename(tmp_path / "away")
        await indexes.wait(down=True, numbers=(0,))
        await indexes.client(0).record_manifest(put(1))
        indexes.kill(0)

        indexes.bring_back()
        await indexes.start(0)
        assert await indexes.client(0).resolve("app", "v1") == describe(1)
        await indexes.written(0)
        assert await (await indexes.catalog()).resolve("app", "v1") == describe(1)


async def test_an_index_that_comes_late_knows_what_the_others_keep(tmp_path, monkeypatch):
    async with indexes_in(tmp_path) as indexes:
        indexes.kill(1)
        indexes.backend.rename(tmp_path / "away")
        await indexes.wait(down=True, numbers=(0,))
        for number in range(5):
            await indexes.client(0).record_manifest(put(number, f"v{number}"))
        monkeypatch.setattr(index_journal, "BATCH", 2)

        # Its own backend is another directory that is empty: what it knows is from the other index.
        indexes.backend.mkdir()
        await indexes.start(1)
        for number in range(5):
            assert await indexes.client(1).resolve("app", f"v{number}") == describe(number)


async def test_what_only_the_backend_knows_is_not_guessed(tmp_path):
    async with indexes_in(tmp_path, immutable=("fixed",)) as indexes:
        client = indexes.client(0)
        await indexes.take_away()

        with pytest.raises(BackendUnavailable, match=str(LAYER)):
            await client.record_manifest(put(1, blobs=(LAYER,)))
        with pytest.raises(BackendUnavailable):
            await client.record_manifest(put(1, expect=""))
        with pytest.raises(BackendUnavailable):
            await client.record_manifest(api.RecordManifestRequest("fixed", describe(1), "v1"))
        with pytest.raises(BackendUnavailable):
            await client.delete_tag("app", "v1")
        with pytest.raises(BackendUnavailable):
            await client.resolve("app", "v1")
        with pytest.raises(BackendUnavailable):
            await client.has_blob("app", LAYER)
        assert (await indexes.status(0))["journal"]["changes"] == 0

        await client.record_manifest(put(1))
        await client.record_manifest(put(2, expect=str(describe(1).digest)))
        with pytest.raises(TagChanged):
            await client.record_manifest(put(3, expect=str(describe(1).digest)))
        indexes.bring_back()


async def test_of_changes_on_the_same_condition_at_once_one_is_made(tmp_path):
    async with indexes_in(tmp_path, immutable=("fixed",)) as indexes:
        await indexes.take_away()
        client = indexes.client(0)
        await client.record_manifest(put(1))
        made: list[int] = []

        async def attempt(number: int) -> None:
            with suppress(TagChanged):
                if number:
                    await client.record_manifest(put(number, expect=str(describe(1).digest)))
                else:
                    await client.delete_tag("app", "v1", expect=str(describe(1).digest))
                made.append(number)

        async with trio.open_nursery() as nursery:
            for number in (2, 3, 0, 4):
                nursery.start_soon(attempt, number)
        assert len(made) == 1
        indexes.bring_back()
        await indexes.written(0)
        history = (await (await indexes.catalog()).tag_log("app", "v1")).changes
        digest = describe(made[0]).digest if made[0] else None
        assert [change.digest for change in history] == [describe(1).digest, digest]


async def test_the_later_stamp_decides_when_the_backend_is_back(tmp_path):
    async with indexes_in(tmp_path) as indexes:
        await indexes.client(0).record_manifest(
            put(1, stamp=api.Stamp(time.time_ns() + HOUR, "far"))
        )
        await indexes.take_away()
        await indexes.client(0).record_manifest(put(2))
        assert await indexes.client(1).resolve("app", "v1") == describe(2)
        indexes.bring_back()
        await indexes.written(0)
        catalog = await indexes.catalog()
        history = [change.digest for change in (await catalog.tag_log("app", "v1")).changes]
        # A clock that was ahead: neither is lost, and every index agrees.
        assert history == [describe(2).digest, describe(1).digest]


async def test_a_journal_that_is_full_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(index_journal, "CHANGES_MAX", 2)
    async with indexes_in(tmp_path) as indexes:
        await indexes.take_away()
        for number in range(2):
            await indexes.client(0).record_manifest(put(number, f"v{number}"))
        with pytest.raises(StoreFull, match="journal of the index holds 2 changes"):
            await indexes.client(0).record_manifest(put(3))
        indexes.bring_back()
        await indexes.written(0)
        await indexes.client(0).record_manifest(put(3))


async def test_a_disk_that_fails_when_the_journal_is_emptied_does_not_end_the_index(
    tmp_path, monkeypatch
):
    failed = 0
    remove_rows = DurableQueue.remove_rows

    async def remove_once_it_works(self, keys):
        nonlocal failed
        if failed < 2:
            failed += 1
            raise StoreFull("index", 0, "the disk has no room: free disk space")
        await remove_rows(self, keys)

    monkeypatch.setattr(DurableQueue, "remove_rows", remove_once_it_works)
    async with indexes_in(tmp_path) as indexes:
        await indexes.take_away()
        await indexes.client(0).record_manifest(put(1))
        indexes.bring_back()
        for number in range(2):
            await indexes.written(number)
        assert failed == 2
        assert await indexes.client(0).resolve("app", "v1") == describe(1)


@asynccontextmanager
async def journal_in(root: Path, indexes: tuple[str, ...] = ()) -> AsyncIterator[Journal]:
    """A journal of an index that is alone, or does not know the others yet."""
    catalog = Catalog(await open_backend(root.as_uri()), "test")
    cache, pending = ResolveCache(0.0), PendingChanges()
    async with open_rpc_pool() as pool:
        peers = IndexPeers(pool, open_ring(pool, indexes, "index"), cache)
        opened = open_journal(root / "data", pending, catalog, cache, peers, Metrics())
        async with opened as journal:
            yield journal


def link(name: bytes) -> api.PendingChange:
    return api.PendingChange(link=api.DigestInRepository("app", Digest.of(name)), at=1)


@attrs.define
class Looked:
    """How many changes of a journal were looked at."""

    count: int = 0


async def test_what_a_change_costs_does_not_depend_on_how_many_there_are(tmp_path, monkeypatch):
    looked = Looked()

    class Changes(dict[str, object]):
        def values(self) -> Iterator[object]:  # type: ignore[override]
            for each in super().values():
                looked.count += 1
                yield each

    async with journal_in(tmp_path) as journal:
        monkeypatch.setattr(time, "time", lambda: 1000.0)
        await journal.add(link(b"oldest"))
        monkeypatch.setattr(time, "time", lambda: 1060.0)
        monkeypatch.setattr(journal, "_changes", Changes(journal._changes))
        await journal.take([link(b"%d" % number) for number in range(200)])
        assert looked.count <= 400
        assert journal.age == 60.0


async def test_what_is_done_with_is_not_taken_back_from_others(tmp_path, monkeypatch):
    monkeypatch.setattr(index_journal, "DONE_MAX", 2)
    async with journal_in(tmp_path) as journal:
        # The first one again when others have taken its place among those that are remembered.
        for name in (b"1", b"2", b"3", b"1"):
            await journal.take([link(name)])
            assert journal.status()["changes"] == 1
            await journal.drop(api.ForgetRequest("app", blob=Digest.of(name), at=2))
            # Another index has it still, and is asked for what it keeps.
            await journal.take([link(name)])
            assert journal.status()["changes"] == 0


async def test_what_was_cut_off_is_known_if_it_is_on_the_disk(tmp_path, monkeypatch):
    gate = threading.Event()
    commit = durable_queue._commit

    def commit_later(*args: object) -> None:
        assert gate.wait(30)
        commit(*args)

    monkeypatch.setattr(durable_queue, "_commit", commit_later)
    with trio.fail_after(30):
        async with journal_in(tmp_path) as kept, trio.open_nursery() as nursery:
            nursery.start_soon(kept.add, link(b"1"))
            await trio.testing.wait_all_tasks_blocked()
            with trio.CancelScope() as scope:
                # It waits for the first to be on the disk.
                async with trio.open_nursery() as inner:
                    inner.start_soon(kept.add, link(b"2"))
                    await trio.testing.wait_all_tasks_blocked()
                    scope.cancel()
                    gate.set()
            await kept.add(link(b"3"))
            known = kept.status()["changes"]
        async with journal_in(tmp_path) as kept:
            assert kept.status()["changes"] == known


async def test_what_is_still_to_be_written_is_not_deleted_in_vain(tmp_path, monkeypatch):
    gate = trio.Event()
    remove_rows = DurableQueue.remove_rows

    async def remove_later(self, keys):
        await gate.wait()
        await remove_rows(self, keys)

    monkeypatch.setattr(DurableQueue, "remove_rows", remove_later)
    async with indexes_in(tmp_path) as indexes:
        await indexes.take_away()
        client = indexes.client(0)
        await client.link_blob("app", LAYER)
        await client.record_manifest(put(1))
        indexes.bring_back()
        await indexes.wait(down=False)

        with pytest.raises(BackendUnavailable, match="still to be written"):
            await client.delete_manifest("app", describe(1).digest)
        with pytest.raises(BackendUnavailable, match="still to be written"):
            await client.unlink_blob("app", LAYER)

        gate.set()
        for number in range(2):
            await indexes.written(number)
        await client.delete_manifest("app", describe(1).digest)
        await client.unlink_blob("app", LAYER)
        assert not await client.has_blob("app", LAYER)
        with pytest.raises(ManifestNotFound):
            await client.resolve("app", "v1")


async def test_a_referrer_of_another_cluster_keeps_its_stamp_over_an_outage(tmp_path):
    subject, put_at = Digest.of(b"an image"), time.time_ns() - HOUR
    signature = put(1, None, subject=subject, stamp=api.Stamp(put_at, "west"))
    async with indexes_in(tmp_path) as indexes:
        client = indexes.client(0)
        await indexes.take_away()
        await client.record_manifest(signature)
        indexes.bring_back()
        await indexes.wait(down=False)
        for number in range(2):
            await indexes.written(number)
        assert [each.digest for each in await client.list_referrers("app", subject)] == [
            describe(1).digest
        ]

        # Deleted there right after it was put, which was long before it was acknowledged here.
        deleted = api.Stamp(put_at + 1, "west")
        await client.delete_tag("app", str(describe(1).digest), stamp=deleted)
        assert await client.list_referrers("app", subject) == ()


# --- an index that has missed a change --------------------------------------------------------


@pytest.fixture
def deaf(monkeypatch) -> None:
    """No index takes over what another one keeps, and none is given it."""

    async def nothing(*_: object) -> None:
        return

    monkeypatch.setattr(Journal, "take", nothing)


async def test_what_is_written_later_is_told_to_an_index_that_has_missed_it(tmp_path, deaf):
    async with indexes_in(tmp_path, lease=20.0) as indexes:
        await indexes.client(0).record_manifest(put(1))
        await indexes.cut_off(0)
        await indexes.client(0).record_manifest(put(2))
        assert await indexes.client(1).resolve("app", "v1") == describe(1), "it has missed that"

        indexes.reconnect(0)
        await indexes.written(0)
        # It would keep what it has read for the rest of the lease.
        assert await indexes.client(1).resolve("app", "v1") == describe(2)


async def test_an_index_that_starts_gives_the_others_what_they_have_missed(tmp_path, monkeypatch):
    async def run(*_: object) -> None:
        """Nothing gets into the backend."""

    monkeypatch.setattr(Journal, "run", run)
    # They would ask for it, but later than it is asked for here.
    monkeypatch.setattr(index_contact, "ASK_INTERVAL", 60.0)
    monkeypatch.setattr(index_contact, "CONTACT", 60.0)
    async with indexes_in(tmp_path) as indexes:
        await indexes.client(0).record_manifest(put(1))
        indexes.kill(1)
        await indexes.cut_off(0)
        await indexes.client(0).record_manifest(put(2))
        indexes.kill(0)
        await indexes.start(1)
        assert await indexes.client(1).resolve("app", "v1") == describe(1), "nobody tells it"
        indexes.reconnect(0)

        await indexes.start(0)
        assert await indexes.client(1).resolve("app", "v1") == describe(2)


async def test_what_is_acknowledged_before_an_index_listens_is_asked_for(tmp_path, monkeypatch):
    # Nothing but a request makes it ask again.
    monkeypatch.setattr(index_contact, "ASK_INTERVAL", 60.0)
    monkeypatch.setattr(index_contact, "CONTACT", 60.0)
    hand_out = Journal.hand_out
    async with indexes_in(tmp_path) as indexes:
        await indexes.client(0).record_manifest(put(1))
        await indexes.cut_off(0)
        indexes.kill(1)

        async def hand_out_slowly(self: Journal) -> None:
            await hand_out(self)
            await indexes.client(0).record_manifest(put(2))

        monkeypatch.setattr(Journal, "hand_out", hand_out_slowly)
        await indexes.start(1)
        assert await indexes.client(1).resolve("app", "v1") == describe(2)
        indexes.reconnect(0)


async def test_an_index_that_was_not_given_a_change_asks_for_it(tmp_path, monkeypatch):
    async def nothing(*_: object) -> None:
        return

    monkeypatch.setattr(JournalSharing, "share", nothing)
    async with indexes_in(tmp_path) as indexes:
        await indexes.client(0).record_manifest(put(1))
        await indexes.cut_off(0)
        for number in range(2, 5):
            await indexes.client(0).record_manifest(put(number))
            while await indexes.client(1).resolve("app", "v1") != describe(number):
                pass
        indexes.reconnect(0)


@attrs.define
class Peers:
    """What a `Contact` asks, without a network."""

    others: tuple[str, ...] = ("other:1",)
    own: tuple[str, ...] = ()
    changes: list[api.PendingChange] = attrs.field(factory=list)
    asked: list[api.PendingRequest] = attrs.field(factory=list)
    failure: SwarmpullError | None = None

    async def insist(self, _address, _method, request, _deadline) -> api.PendingReply:
        self.asked.append(request)
        await trio.lowlevel.checkpoint()
        if self.failure is not None:
            raise self.failure
        found = tuple(self.changes[request.after :][:1])
        last = request.after + len(found)
        return api.PendingReply("process", found, more=last < len(self.changes), last=last)


@attrs.define
class Taken:
    """A journal that remembers what it took over."""

    changes: list[api.PendingChange] = attrs.field(factory=list)

    async def take(self, changes: tuple[api.PendingChange, ...]) -> None:
        self.changes += changes


async def test_an_index_that_stood_still_asks_before_it_answers(autojump_clock):
    peers, journal = Peers(), Taken()
    contact = Contact(journal, peers)
    assert not contact.holds
    await contact.ask_all()
    assert not contact.holds, "others may have found nobody here since"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(contact.run)
        await contact.renew()
        nursery.cancel_scope.cancel()
    assert contact.holds

    # Nobody asks for it while the process stands still.
    await trio.sleep(index_contact.CONTACT)
    assert not contact.holds
    links = [
        api.PendingChange(link=api.DigestInRepository("app", Digest.of(name)))
        for name in (b"1", b"2")
    ]
    peers.changes += links
    async with trio.open_nursery() as nursery:
        nursery.start_soon(contact.run)
        await contact.renew()
        nursery.cancel_scope.cancel()
    assert contact.holds
    assert journal.changes == links

    await contact.ask_all()
    assert journal.changes == links, "what it has is not asked for again"
    assert peers.asked[-1] == api.PendingRequest("process", 2)


@pytest.mark.parametrize("failure", [RpcUnavailable, IndexGone])
async def test_an_index_that_does_not_answer_is_done_without(autojump_clock, failure):
    contact = Contact(Taken(), Peers(failure=failure("other:1", "index.pending", "silence")))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(contact.run)
        await contact.renew()
        nursery.cancel_scope.cancel()
    assert contact.holds


async def test_one_that_is_silent_holds_up_no_request(autojump_clock):
    class Silent(Peers):
        async def insist(self, _address, _method, _request, deadline) -> api.PendingReply:
            await trio.sleep_until(deadline)
            raise RpcUnavailable("other:1", "index.pending", "silence")

    contact = Contact(Taken(), Silent())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(contact.run)
        await contact.renew()
        for _ in range(200):
            await trio.sleep(0.05)
            assert contact.holds
        nursery.cancel_scope.cancel()


# --- deletions --------------------------------------------------------------------------------


async def test_a_journal_that_was_away_does_not_bring_back_what_was_deleted(tmp_path):
    again = Digest.of(b"pushed again")
    async with indexes_in(tmp_path) as indexes:
        await indexes.take_away()
        client = indexes.client(0)
        for digest in (LAYER, again):
            await client.link_blob("app", digest)
        await client.record_manifest(put(1, blobs=(LAYER,)))
        await client.record_manifest(put(2, "v2", blobs=(LAYER,)))
        indexes.kill(1)
        indexes.bring_back()
        await indexes.written(0)
        await client.delete_manifest("app", describe(1).digest)
        for digest in (LAYER, again):
            await client.unlink_blob("app", digest)
        await client.link_blob("app", again)

        await indexes.start(1)
        assert (await indexes.status(1))["journal"]["changes"] > 0
        await indexes.written(1)
        for number in range(2):
            with pytest.raises(ManifestNotFound):
                await indexes.client(number).resolve("app", str(describe(1).digest))
            with pytest.raises(ManifestNotFound):
                await indexes.client(number).resolve("app", "v1")
            assert not await indexes.client(number).has_blob("app", LAYER)
            assert await indexes.client(number).has_blob("app", again)
            assert await indexes.client(number).resolve("app", "v2") == describe(2)
        assert (await (await indexes.catalog()).list_tags("app", "", 10)).names == ("v2",)


@pytest.mark.parametrize("is_pushed", [True, False])
async def test_what_is_pushed_again_is_not_lost_with_what_was_deleted(
    tmp_path, monkeypatch, is_pushed
):
    async with indexes_in(tmp_path) as indexes:
        await indexes.take_away()
        client = indexes.client(0)
        await client.link_blob("app", LAYER)
        await client.record_manifest(put(1, None))
        indexes.kill(1)
        indexes.bring_back()
        await indexes.written(0)
        await client.unlink_blob("app", LAYER)
        await client.delete_manifest("app", describe(1).digest)

        # The journal of the second index still has what was deleted, and gives it to the first one, which
        # does not know any more that it has written it.
        indexes.kill(0)
        await indexes.start(0)
        await indexes.cut_off(0)
        monkeypatch.setattr(index_journal, "COURTESY", 60.0)
        await indexes.start(1)
        if is_pushed:
            await client.link_blob("app", LAYER)
        else:
            assert await client.has_blob("app", LAYER), "so who pushes need not send it"
        await client.record_manifest(put(1, None))
        await client.record_manifest(put(2, blobs=(LAYER,)))
        indexes.kill(1)
        monkeypatch.setattr(index_journal, "COURTESY", 0.1)
        indexes.reconnect(0)
        await indexes.written(0)
        await indexes.start(1)
        await indexes.written(1)
        for number in range(2):
            assert await indexes.client(number).has_blob("app", LAYER)
            for descriptor in (describe(1), describe(2)):
                digest = str(descriptor.digest)
                assert await indexes.client(number).resolve("app", digest) == descriptor


async def test_a_journal_drops_what_is_deleted_at_another_index(tmp_path, monkeypatch):
    # The second index would write these in a minute, and until then lookups there see them.
    # A disk that takes longer than a second, as on a busy machine, counts as an index that is silent.
    monkeypatch.setattr(index_peers, "PATIENCE", 30.0)
    async with indexes_in(tmp_path) as indexes:
        await indexes.take_away()
        monkeypatch.setattr(index_journal, "COURTESY", 60.0)
        client = indexes.client(0)
        await client.link_blob("app", LAYER)
        await client.record_manifest(put(1))
        indexes.bring_back()
        await indexes.written(0)
        assert (await indexes.status(1))["journal"]["changes"] == 2

        await client.delete_manifest("app", describe(1).digest)
        await client.unlink_blob("app", LAYER)
        assert (await indexes.status(1))["journal"]["changes"] == 0
        assert not await indexes.client(1).has_blob("app", LAYER)
        with pytest.raises(ManifestNotFound):
            await indexes.client(1).resolve("app", "v1")


async def test_an_index_whose_disk_is_slow_does_not_hold_up_a_deletion_and_shows_nothing(
    tmp_path, monkeypatch
):
    gate = trio.Event()
    remove_rows = DurableQueue.remove_rows

    async def remove_later(self, keys):
        await gate.wait()
        await remove_rows(self, keys)

    async with indexes_in(tmp_path) as indexes:
        await indexes.take_away()
        monkeypatch.setattr(index_journal, "COURTESY", 60.0)
        await indexes.client(0).link_blob("app", LAYER)
        indexes.bring_back()
        await indexes.written(0)
        monkeypatch.setattr(DurableQueue, "remove_rows", remove_later)
        monkeypatch.setattr(index_peers, "PATIENCE", 0.1)
        await indexes.client(0).unlink_blob("app", LAYER)
        assert (await indexes.status(1))["journal"]["changes"] == 1
        assert not await indexes.client(1).has_blob("app", LAYER)
        # It drops it all the same, although nobody waits for it any more.
        gate.set()
        await indexes.written(1)


async def test_what_a_journal_is_writing_is_deleted_after_that(tmp_path, monkeypatch):
    writing, gate = trio.Event(), trio.Event()
    record_manifest, link_blob, drop = Catalog.record_manifest, Catalog.link_blob, Journal.drop

    async def wait_at_the_second(catalog: Catalog) -> None:
        if catalog.tags.source == "index1":
            writing.set()
            await gate.wait()

    async def record_later(self, request, **kwargs):
        await wait_at_the_second(self)
        await record_manifest(self, request, **kwargs)

    async def link_later(self, *args, **kwargs):
        await wait_at_the_second(self)
        await link_blob(self, *args, **kwargs)

    async def write_at_last(self, deleted):
        gate.set()
        await drop(self, deleted)

    monkeypatch.setattr(Catalog, "record_manifest", record_later)
    monkeypatch.setattr(Catalog, "link_blob", link_later)
    monkeypatch.setattr(Journal, "drop", write_at_last)
    async with indexes_in(tmp_path) as indexes:
        for change, delete in (
            (partial(IndexClient.record_manifest, request=put(1)), "delete_manifest"),
            (partial(IndexClient.link_blob, repository="app", digest=LAYER), "unlink_blob"),
        ):
            await indexes.take_away()
            await change(indexes.client(0))
            indexes.bring_back()
            await indexes.written(0)
            await writing.wait()
            digest = describe(1).digest if delete == "delete_manifest" else LAYER
            await getattr(indexes.client(0), delete)("app", digest)
            await indexes.written(1)
            writing, gate = trio.Event(), trio.Event()
        for number in range(2):
            client = indexes.client(number)
            assert not await client.has_blob("app", LAYER)
            for reference in ("v1", str(describe(1).digest)):
                with pytest.raises(ManifestNotFound):
                    await client.resolve("app", reference)


async def test_a_manifest_of_a_journal_is_entered_although_its_blob_was_deleted_after_it(tmp_path):
    backend = await open_backend((tmp_path / "backend").as_uri())
    catalog = Catalog(backend, "test", records_deletions=True)
    before = time.time_ns()
    await catalog.link_blob("app", LAYER)
    await catalog.unlink_blob("app", LAYER)
    change = api.PendingChange(manifest=put(1, blobs=(LAYER,), stamp=api.Stamp(before, "test")))
    # One that was acknowledged without the blob would be a fault.
    with pytest.raises(ManifestReferencesMissing):
        await Replay(catalog).write(change, time.time_ns())
    await Replay(catalog).write(change, before)
    assert await catalog.resolve("app", "v1") == describe(1)


async def test_an_index_that_returns_shows_nothing_that_was_deleted_meanwhile(
    tmp_path, monkeypatch
):
    async with indexes_in(tmp_path) as indexes:
        await indexes.client(0).record_manifest(put(5, "moved"))
        await indexes.take_away()
        client = indexes.client(0)
        await client.link_blob("app", LAYER)
        await client.record_manifest(put(1, None))
        # Only the one that goes away has these.
        monkeypatch.setattr(Journal, "take", nothing)
        await indexes.client(1).record_manifest(put(1))
        await indexes.client(1).record_manifest(put(1, "moved"))
        indexes.kill(1)
        indexes.bring_back()
        await indexes.written(0)
        await client.delete_manifest("app", describe(1).digest)
        await client.unlink_blob("app", LAYER)

        # It would write them, and find out, in a minute.
        monkeypatch.setattr(index_journal, "COURTESY", 60.0)
        monkeypatch.setattr(Journal, "_with_references", lambda _: [])
        await indexes.start(1)
        client = indexes.client(1)
        assert (await indexes.status(1))["journal"]["changes"] == 4
        assert not await client.has_blob("app", LAYER)
        for reference in ("v1", str(describe(1).digest)):
            with pytest.raises(ManifestNotFound):
                await client.resolve("app", reference)
        assert await client.resolve("app", "moved") == describe(5)
        with pytest.raises(ManifestReferencesMissing) as missing:
            await client.check_references("app", blobs=(LAYER,), manifests=(describe(1).digest,))
        assert len(missing.value.missing) == 2


async def nothing(*_: object) -> None:
    """Nobody takes a change of another index."""


@attrs.define
class Stopping:
    """A backend that stands still before it writes an object of some kind, as a process that was stopped."""

    backend: Backend
    kind: str
    reached: trio.Event = attrs.field(factory=trio.Event)
    gate: trio.Event = attrs.field(factory=trio.Event)

    def __getattr__(self, name: str) -> object:
        return getattr(self.backend, name)

    async def put_bytes(self, key: str, data: bytes, *, if_version: str | None = None) -> None:
        if self.kind in key:
            self.reached.set()
            await self.gate.wait()
        await self.backend.put_bytes(key, data, if_version=if_version)


@pytest.mark.parametrize("is_pushed_again", [False, True])
@pytest.mark.parametrize("kind", ["_blobs", "_manifests", "_changes"])
async def test_a_replay_that_stood_still_brings_nothing_back(tmp_path, kind, is_pushed_again):
    backend = await open_backend((tmp_path / "backend").as_uri())
    here = Catalog(backend, "here", records_deletions=True)
    stopping = Stopping(backend, kind)
    at = time.time_ns()
    request = put(1, stamp=api.Stamp(at, "there"))
    change = api.PendingChange(link=link(b"layer").link, at=at)
    if kind != "_blobs":
        change = api.PendingChange(manifest=request, at=at)
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            there = Replay(Catalog(stopping, "there", records_deletions=True))
            nursery.start_soon(there.write, change, at)
            await stopping.reached.wait()
            # Others who have it write it, and it is deleted.
            await here.link_blob("app", LAYER)
            await here.record_manifest(put(1, None))
            await here.unlink_blob("app", LAYER)
            await here.delete_manifest("app", describe(1).digest)
            if is_pushed_again:
                await here.link_blob("app", LAYER)
                await here.record_manifest(put(1))
            stopping.gate.set()
    assert await here.has_blob("app", LAYER) is is_pushed_again
    for reference in ("v1", str(describe(1).digest)):
        if is_pushed_again:
            assert await here.resolve("app", reference) == describe(1)
        else:
            with pytest.raises(ManifestNotFound):
                await here.resolve("app", reference)


async def test_a_tag_that_was_written_too_late_is_taken_back_at_the_next_start(tmp_path):
    catalog = Catalog(
        await open_backend((tmp_path / "backend").as_uri()), "here", records_deletions=True
    )
    at = time.time_ns()
    stamp = api.Stamp(at, "there")
    await catalog.record_manifest(put(2))
    await catalog.record_manifest(put(1, None))
    await catalog.delete_manifest("app", describe(1).digest)
    # By a process that was killed right after that.
    late = attrs.evolve(stamp, time=time.time_ns())
    for tag, of in (("v1", late), ("v2", stamp)):
        await catalog.tags.put("app", tag, describe(1), stamp=of, from_journal=True)
    for tag, of in (("v1", late), ("v2", stamp)):
        change = api.PendingChange(manifest=put(1, tag, stamp=of), at=at)
        await Replay(catalog).write(change, at)
        with pytest.raises(ManifestNotFound):
            await catalog.resolve("app", tag)
    # Once more, after it was pushed again.
    await catalog.record_manifest(put(1, "v2"))
    await Replay(catalog).write(change, at)
    assert await catalog.resolve("app", "v2") == describe(1)


# --- what can never be written ----------------------------------------------------------------

SUBJECT = Digest.of(b"subject")


async def too_many_referrers(indexes: Indexes) -> None:
    """Two of one subject in the journals, and the backend back that takes one."""
    await indexes.client(0).record_manifest(put(9, "old"))
    await indexes.take_away()
    for number in (1, 2):
        await indexes.client(0).record_manifest(put(number, f"v{number}", subject=SUBJECT))
    indexes.bring_back()
    for number in range(2):
        await indexes.written(number)


async def ask_journal(address: str, change: dict[str, object] | None = None) -> dict[str, Any]:
    async with httpx.AsyncClient() as client:
        url = f"http://{address}/journal"
        answer = await client.get(url) if change is None else await client.put(url, json=change)
    document: dict[str, Any] = json.loads(answer.text)
    return document


async def test_what_can_never_be_written_is_set_aside(tmp_path, monkeypatch):
    monkeypatch.setattr(catalog_module, "REFERRERS_MAX", 1)
    async with indexes_in(tmp_path) as indexes:
        await too_many_referrers(indexes)
        for number in range(2):
            client = indexes.client(number)
            assert await client.resolve("app", "v1") == describe(1)
            with pytest.raises(ManifestNotFound):
                await client.resolve("app", "v2")
            (entry,) = (await ask_journal(indexes.admin[number]))["entries"]
            assert (entry["change"], entry["repository"], entry["reference"]) == (
                "put",
                "app",
                "v2",
            )
            assert entry["digest"] == str(describe(2).digest)
            assert "the most that is kept" in entry["reason"]
            assert "swarmpull journal retry" in entry["remedy"]
            status = (await indexes.status(number))["journal"]
            assert status["set_aside"] == 1
            assert status["set_aside_changes"][0].startswith("put of app:v2: manifest ")
            async with httpx.AsyncClient() as http:
                metrics = (await http.get(f"http://{indexes.admin[number]}/metrics")).text
            assert "swarmpull_index_journal_set_aside_changes 1.0" in metrics
        # It is not in the way of deletions, of what it names either.
        await indexes.client(1).record_manifest(put(2, "other"))
        await indexes.client(1).delete_manifest("app", describe(2).digest)
        await indexes.client(0).delete_manifest("app", describe(9).digest)


async def test_what_was_set_aside_is_tried_again_at_every_index(tmp_path, monkeypatch):
    monkeypatch.setattr(catalog_module, "REFERRERS_MAX", 1)
    async with indexes_in(tmp_path) as indexes:
        await too_many_referrers(indexes)
        indexes.kill(1)
        await indexes.start(1)
        assert (await indexes.status(1))["journal"]["set_aside"] == 1, "it is on the disk"

        await indexes.client(0).delete_manifest("app", describe(1).digest)
        done = await ask_journal(indexes.admin[1], {"retry": {"repository": "other"}})
        assert done == {"retried": 0}
        done = await ask_journal(indexes.admin[1], {"retry": {"reference": "v2"}})
        assert done == {"retried": 1}
        for number in range(2):
            await indexes.written(number)
            assert (await indexes.status(number))["journal"]["set_aside"] == 0
            assert await indexes.client(number).resolve("app", "v2") == describe(2)


async def test_what_was_set_aside_is_dropped_by_the_operator_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(catalog_module, "REFERRERS_MAX", 1)
    async with indexes_in(tmp_path) as indexes:
        await too_many_referrers(indexes)
        for wrong in ({"drop": {}}, {"drop": {"tag": "v2"}}, {"retry": []}, {"forget": {}}, {}):
            assert "errors" in await ask_journal(indexes.admin[0], wrong)
        reference = {"reference": str(describe(2).digest)}
        assert await ask_journal(indexes.admin[0], {"drop": reference}) == {"dropped": 1}
        for number in range(2):
            assert (await ask_journal(indexes.admin[number]))["entries"] == []
            assert (await indexes.status(number))["journal"]["bytes"] == 0
        indexes.kill(0)
        await indexes.start(0)
        assert (await indexes.status(0))["journal"]["set_aside"] == 0


async def run_command(*arguments: str) -> str:
    command = [sys.executable, "-m", "swarmpull", "journal", *arguments]
    done = await trio.run_process(
        command, capture_stdout=True, env={**os.environ, "COLUMNS": "200"}
    )
    return done.stdout.decode()


async def test_the_operator_sees_what_was_set_aside_and_settles_it(tmp_path, monkeypatch):
    monkeypatch.setattr(catalog_module, "REFERRERS_MAX", 1)
    async with indexes_in(tmp_path) as indexes:
        await too_many_referrers(indexes)
        addresses = list(indexes.admin.values())
        shown = await run_command("status", *addresses)
        assert shown.count("app:v2") == 1, "both have it, and it is one"
        assert "the most that is kept" in shown
        (entry, *_) = json.loads(await run_command("status", addresses[0], "--json"))[0]["entries"]
        assert "retried 0" in await run_command("retry", addresses[0], "--repository", "other")
        assert "dropped 1" in await run_command("drop", addresses[1], "--id", entry["id"])
        assert "app:v2" not in await run_command("status", *addresses)
        with pytest.raises(subprocess.CalledProcessError):
            await run_command("drop", addresses[0])


async def test_a_list_of_which_a_manifest_was_set_aside_is_set_aside_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr(catalog_module, "REFERRERS_MAX", 1)
    async with indexes_in(tmp_path) as indexes:
        await indexes.client(0).record_manifest(put(3, None, subject=SUBJECT))
        await indexes.take_away()
        # Asked for at different indexes: each begins with what it was asked for itself.
        await indexes.client(1).record_manifest(put(1, None, subject=SUBJECT))
        await indexes.client(0).record_manifest(put(2, manifests=(describe(1).digest,)))
        indexes.bring_back()
        for number in range(2):
            await indexes.written(number)
            reasons = [e["reason"] for e in (await ask_journal(indexes.admin[number]))["entries"]]
            assert len(reasons) == 2
            assert f"lacks {describe(1).digest}" in reasons[1]
        with pytest.raises(ManifestNotFound):
            await (await indexes.catalog()).resolve("app", "v1")


async def test_a_tag_of_a_repository_that_is_immutable_by_now_is_set_aside(tmp_path):
    async with indexes_in(tmp_path) as indexes:
        await indexes.client(0).record_manifest(put(1))
        await indexes.client(0).record_manifest(put(3, "v2"))
        await indexes.take_away()
        await indexes.client(0).record_manifest(put(2))
        await indexes.client(0).record_manifest(put(3, "v2"))
        await indexes.client(0).delete_tag("app", "v2")
        for number in range(2):
            indexes.kill(number)
        indexes.immutable = ("app",)
        indexes.bring_back()
        for number in range(2):
            await indexes.start(number)
        for number in range(2):
            await indexes.written(number)
            assert await indexes.client(number).resolve("app", "v1") == describe(1)
            assert await indexes.client(number).resolve("app", "v2") == describe(3)
            entries = (await ask_journal(indexes.admin[number]))["entries"]
            assert [(e["change"], e["reference"]) for e in entries] == [
                ("put", "v1"),
                ("deletion", "v2"),
            ]
            assert all("stays that" in e["reason"] for e in entries)


async def test_what_fails_for_a_while_is_not_set_aside(tmp_path, monkeypatch):
    failed = 0
    record_manifest = Catalog.record_manifest

    async def fail_at_first(self, *args, **kwargs):
        nonlocal failed
        if failed < 2:
            failed += 1
            raise StoreUnavailable("replication", "no disk")
        await record_manifest(self, *args, **kwargs)

    async with indexes_in(tmp_path) as indexes:
        await indexes.take_away()
        await indexes.client(0).record_manifest(put(1))
        monkeypatch.setattr(Catalog, "record_manifest", fail_at_first)
        indexes.bring_back()
        for number in range(2):
            await indexes.written(number)
            assert (await indexes.status(number))["journal"]["set_aside"] == 0
        assert failed == 2
        assert await indexes.client(0).resolve("app", "v1") == describe(1)


async def test_a_journal_of_a_former_version_is_taken_over(tmp_path):
    (tmp_path / "data").mkdir()
    database = sqlite3.connect(tmp_path / "data" / "index-journal.sqlite")
    database.execute(
        "create table changes (id text not null primary key, mine integer not null, "
        "kept_at real not null, body blob not null) strict"
    )
    database.execute(
        "insert into changes values (?, 1, 1.0, ?)", (id_of(link(b"1")), encode(link(b"1")))
    )
    database.execute(f"pragma application_id = {0x7377706A}")
    database.execute("pragma user_version = 1")
    database.commit()
    database.close()
    async with journal_in(tmp_path) as journal:
        assert journal.status()["changes"] == 1
        assert journal.status()["set_aside"] == 0


async def test_a_journal_is_full_also_of_what_was_set_aside(tmp_path, monkeypatch):
    monkeypatch.setattr(catalog_module, "REFERRERS_MAX", 1)
    async with indexes_in(tmp_path) as indexes:
        await too_many_referrers(indexes)
        monkeypatch.setattr(index_journal, "CHANGES_MAX", 1)
        await indexes.take_away()
        with pytest.raises(StoreFull, match="1 are set aside"):
            await indexes.client(0).record_manifest(put(3))
        indexes.bring_back()


# --- changes that are refused -----------------------------------------------------------------


async def full_at_the_second(indexes: Indexes, monkeypatch: pytest.MonkeyPatch) -> None:
    """An outage in which the second index takes no more changes."""
    await indexes.client(0).record_manifest(put(1))
    await indexes.take_away()
    check_room = Journal._check_room

    def check(self: Journal, added: Sequence[Kept]) -> None:
        if not any(kept.mine for kept in added):
            raise StoreFull("index", 1, "the journal holds as many as it may")
        check_room(self, added)

    monkeypatch.setattr(Journal, "_check_room", check)


async def test_a_change_that_is_refused_does_not_come_true_later(tmp_path, monkeypatch):
    async with indexes_in(tmp_path) as indexes:
        await full_at_the_second(indexes, monkeypatch)
        with pytest.raises(StoreFull):
            await indexes.client(0).record_manifest(put(2))
        assert (await indexes.status(0))["journal"]["changes"] == 0
        indexes.kill(0)
        indexes.bring_back()
        await indexes.start(0)
        history = await (await indexes.catalog()).tag_log("app", "v1")
        assert [change.digest for change in history.changes] == [describe(1).digest]
        assert await indexes.client(0).resolve("app", "v1") == describe(1)


async def test_a_change_that_cannot_be_withdrawn_is_said_to_be_unknown(tmp_path, monkeypatch):
    # It has the change, its answer is lost, and so is that to the withdrawal.
    async with indexes_in(tmp_path) as indexes:
        await full_at_the_second(indexes, monkeypatch)
        monkeypatch.setattr(journal_sharing, "SHARE_TIMEOUT", 0.5)

        async def never(*_: object) -> api.PendingDropped:
            await trio.sleep_forever()
            raise AssertionError

        monkeypatch.setattr(Journal, "drop_pending", never)
        with pytest.raises(StoreUnavailable, match="whether it comes true is known when"):
            await indexes.client(0).record_manifest(put(2))
        indexes.bring_back()


async def test_a_change_that_got_into_the_backend_meanwhile_is_made(tmp_path, monkeypatch):
    async with journal_in(tmp_path) as journal:
        shared = journal_sharing.Shared([StoreFull("index", 0, "full")])
        change = link(b"1")
        await journal.take([change])
        await journal._write(mine_only=False)
        await journal._withdraw([change], shared)
        await journal.take([link(b"2")])
        with pytest.raises(StoreFull):
            await journal._withdraw([link(b"2")], shared)

        async def fail(*_: object) -> None:
            raise BackendUnavailable("backend", "key", "no answer")

        monkeypatch.setattr(Replay, "write", fail)
        await journal.take([link(b"3")])
        await journal._write(mine_only=False)
        with pytest.raises(StoreUnavailable, match="which was writing it"):
            await journal._withdraw([link(b"3")], shared)
        assert journal.status()["changes"] == 0


# --- conditions -------------------------------------------------------------------------------


async def test_a_condition_is_not_judged_by_what_may_have_changed_since(tmp_path, monkeypatch):
    async with indexes_in(tmp_path, immutable=("fixed",)) as indexes:
        first, second = indexes.client(0), indexes.client(1)
        await indexes.take_away()
        await first.record_manifest(put(1))
        await first.record_manifest(put(1, "other"))
        await first.record_manifest(put(1, "gone"))
        await first.delete_tag("app", "gone")
        # The backend is back for a moment, and nobody writes the journals in it.
        gate = trio.Event()
        write = Journal._write

        async def write_later(self: Journal, *, mine_only: bool) -> None:
            await gate.wait()
            await write(self, mine_only=mine_only)

        monkeypatch.setattr(Journal, "_write", write_later)
        indexes.bring_back()
        await indexes.wait(down=False)
        await second.record_manifest(put(2))
        await second.record_manifest(put(2, "gone"))
        await indexes.take_away()

        for client in (first, second):
            # Gets and deletions do not go by it either.
            with pytest.raises(BackendUnavailable):
                await client.resolve("app", "v1")
            with pytest.raises(BackendUnavailable):
                await client.delete_tag("app", "gone")
            assert await client.resolve("app", "other") == describe(1)
            with pytest.raises(BackendUnavailable, match=r"cannot be told, because .* changed it"):
                await client.record_manifest(put(3, expect=str(describe(1).digest)))
            with pytest.raises(BackendUnavailable, match="cannot be told"):
                await client.delete_tag("app", "v1", expect=str(describe(1).digest))
        for number in range(2):
            assert (await indexes.status(number))["journal"]["changes"] == 4, (
                "nothing is left of it"
            )
        # What was put since is what it is; and another tag was left alone.
        await second.record_manifest(put(4))
        await first.record_manifest(put(5, expect=str(describe(4).digest)))
        await second.record_manifest(put(6, "other", expect=str(describe(1).digest)))
        indexes.bring_back()
        gate.set()
        for number in range(2):
            await indexes.written(number)
        history = (await (await indexes.catalog()).tag_log("app", "v1")).changes
        digests = [change.digest for change in history]
        assert digests == [describe(number).digest for number in (1, 2, 4, 5)]


async def test_a_change_on_a_condition_whose_caller_leaves_is_withdrawn_or_made(
    tmp_path, monkeypatch
):
    keeping, gate = trio.Event(), trio.Event()
    keep = Journal.keep
    async with indexes_in(tmp_path) as indexes:
        await indexes.take_away()
        await indexes.client(0).record_manifest(put(1))

        async def keep_and_doubt(self: Journal, request: api.KeepPendingRequest) -> api.PendingKept:
            reply = await keep(self, request)
            if not request.changes:
                return reply
            keeping.set()
            await gate.wait()
            return attrs.evolve(reply, sure=False)

        monkeypatch.setattr(Journal, "keep", keep_and_doubt)
        async with trio.open_nursery() as nursery:
            wanted = put(2, expect=str(describe(1).digest))
            nursery.start_soon(indexes.client(0).record_manifest, wanted)
            await keeping.wait()
            nursery.cancel_scope.cancel()
        gate.set()
        for number in range(2):
            while (await indexes.status(number))["journal"]["changes"] != 1:
                pass
            assert await indexes.client(number).resolve("app", "v1") == describe(1)
        indexes.bring_back()


async def test_a_condition_needs_the_answer_of_every_index(tmp_path):
    async with indexes_in(tmp_path) as indexes:
        await indexes.take_away()
        await indexes.client(0).record_manifest(put(1))
        indexes.kill(1)
        with pytest.raises(BackendUnavailable, match="does not answer"):
            await indexes.client(0).record_manifest(put(2, expect=str(describe(1).digest)))
        assert await indexes.client(0).resolve("app", "v1") == describe(1)
        assert (await indexes.status(0))["journal"]["changes"] == 1
        indexes.bring_back()


async def test_a_condition_is_not_judged_before_the_other_indexes_are_known(tmp_path):
    now = time.time_ns()
    first, second = (
        api.PendingChange(
            manifest=put(number, stamp=api.Stamp(now + number, "test")), at=now + HOUR
        )
        for number in (1, 2)
    )
    async with journal_in(tmp_path, indexes=("dns+nobody.invalid:7400",)) as journal:
        await journal.add(first)
        with pytest.raises(NotSure, match="could not be resolved"):
            await journal.add(second, judged_by=id_of(first))
        assert journal.status()["changes"] == 1


async def test_a_condition_is_not_judged_while_a_change_goes_to_the_backend(tmp_path):
    now = time.time_ns()
    change = api.PendingChange(manifest=put(1, stamp=api.Stamp(now, "test")), at=now + HOUR)
    async with journal_in(tmp_path) as journal:
        await journal.add(change)
        assert journal.is_sure(id_of(change))
        with journal._direct.under_way("app"):
            assert not journal.is_sure(id_of(change))
        assert journal.is_sure(id_of(change)), "it came to nothing"
        journal._direct.ended("app", "v2")
        assert journal.is_sure(id_of(change))
        journal._direct.ended("app", "v1")
        assert not journal.is_sure(id_of(change)), "whatever clocks say"
    async with journal_in(tmp_path) as journal:
        assert not journal.is_sure(id_of(change)), "a former process may have changed it"


def test_what_was_changed_long_ago_is_forgotten_on_the_safe_side(monkeypatch):
    monkeypatch.setattr(direct_changes, "TAGS_MAX", 2)
    now = 1000
    monkeypatch.setattr(time, "time_ns", lambda: now)
    direct = DirectChanges()
    assert direct.last("app", "v1") == 1000
    for now in (2000, 3000, 4000):
        direct.ended("app", f"v{now}")
    assert direct.last("app", "v4000") == 4000
    assert direct.last("app", "never") == direct.last("app", "v2000") == 2000


async def test_one_object_that_cannot_be_read_does_not_hold_up_the_rest(tmp_path):
    async with indexes_in(tmp_path) as indexes:
        await indexes.client(0).record_manifest(put(1, "damaged"))
        backend = await open_backend(indexes.backend.as_uri())
        key = changes_key("app", "damaged")
        whole = await backend.get_bytes(key)
        await backend.put_bytes(key, b"no log")
        await indexes.take_away()
        for number in range(2, 6):
            await indexes.client(0).record_manifest(put(number, "damaged"))
        await indexes.client(0).record_manifest(put(6, "v1"))
        indexes.bring_back()
        for number in range(2):
            while (await indexes.status(number))["journal"]["changes"] != 4:
                pass
        assert await (await indexes.catalog()).resolve("app", "v1") == describe(6)
        journal = (await indexes.status(0))["journal"]
        assert "is damaged" in journal["trouble"]
        assert journal["set_aside"] == 0, "it may be mended"
        await backend.put_bytes(key, whole)
        for number in range(2):
            await indexes.written(number)
        assert await indexes.client(0).resolve("app", "damaged") == describe(5)
