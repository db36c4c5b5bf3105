"""What is queued stays on as many origins as configured, whoever dies, is wiped, joins or comes back."""

from __future__ import annotations

import math
import shutil
import sqlite3
from collections.abc import Awaitable, Callable, Sequence
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import attrs
import pytest
import trio

from swarmpull.config import OriginBackendConfig
from swarmpull.digest import Digest
from swarmpull.errors import RpcUnavailable
from swarmpull.ring.membership import Membership
from swarmpull.ring.repair import ABSENT
from swarmpull.roles import repair
from swarmpull.roles.repair import Repair
from swarmpull.store.write_back_queue import FILE_NAME, queued_digests
from swarmpull.store.write_back_schedule import Key, QueuedBlob
from swarmpull.swarm.metainfo import PIECE_LENGTH_MIN, Metainfo
from swarmpull.swarm.peers import PeerContact, PeerKind
from swarmpull.telemetry import Metrics
from swarmpull.wire.api import REPLICATE_BLOB, ReplicateRequest
from tests.ports import free_ports

from .peers import Content, make_content
from .test_write_back import Ring, free_addresses, ring_of

CONTENTS = [make_content(PIECE_LENGTH_MIN + number, seed=number) for number in range(3)]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds follow one another, and a member that is dead for a second is replaced."""
    monkeypatch.setattr(repair, "INTERVAL", 0.3)
    monkeypatch.setattr(repair, "GONE_AFTER", 1.0)


async def push(ring: Ring, name: str, contents: list[Content]) -> None:
    for content in contents:
        reply = await ring.put(name, content.data)
        assert reply.status_code == 201, reply.text


def is_queued(ring: Ring, name: str, contents: list[Content]) -> bool:
    queued = queued_digests(ring.cluster.root / name)
    return all(
        content.digest in queued and ring.on_disk(name, content.digest) for content in contents
    )


async def start_again(ring: Ring, name: str, **settings: object) -> None:
    """Start an origin while the backend of the others is broken, with which it would not start."""
    backend = OriginBackendConfig(url=(ring.cluster.root / "elsewhere").as_uri())
    await ring.start(name, backend=backend, **settings)


async def until(condition: Callable[[], bool | Awaitable[bool]]) -> None:
    while True:
        met = condition()
        if met if isinstance(met, bool) else await met:
            return
        await trio.sleep(0.05)


async def test_a_member_that_was_down_learns_what_it_missed(tmp_path: Path) -> None:
    async with ring_of(tmp_path, 3) as ring:
        ring.break_backend()
        await ring.kill("origin-3")
        await push(ring, "origin-1", CONTENTS)
        assert not any(ring.on_disk("origin-3", content.digest) for content in CONTENTS)

        await start_again(ring, "origin-3")
        await until(lambda: is_queued(ring, "origin-3", CONTENTS))

        # The two that had them are gone, with their disks: the third has everything.
        await ring.kill("origin-1")
        await ring.kill("origin-2")
        for content in CONTENTS:
            reply = await ring.get("origin-3", content.digest)
            assert reply.content == content.data


async def test_a_member_that_lost_its_disk_gets_its_copies_again(tmp_path: Path) -> None:
    async with ring_of(tmp_path, 3) as ring:
        ring.break_backend()
        await push(ring, "origin-1", CONTENTS)
        assert is_queued(ring, "origin-2", CONTENTS)
        await ring.kill("origin-2")
        shutil.rmtree(tmp_path / "origin-2")

        await start_again(ring, "origin-2")

        await until(lambda: is_queued(ring, "origin-2", CONTENTS))
        made = [
            await ring.cluster.metric(name, "origin_repair_copies_total")
            for name in ("origin-1", "origin-3")
        ]
        assert made == [len(CONTENTS), 0], "one repairs, the one that is to write"


async def test_a_member_that_has_a_blob_without_an_entry_gets_the_entry(tmp_path: Path) -> None:
    """As when somebody read the blob there: it might be evicted, and would never be written."""
    async with ring_of(tmp_path, 3) as ring:
        ring.break_backend()
        await push(ring, "origin-1", CONTENTS)
        await ring.kill("origin-2")
        with closing(sqlite3.connect(tmp_path / "origin-2" / FILE_NAME)) as queue:
            queue.execute("delete from blobs")
            queue.commit()

        await start_again(ring, "origin-2")

        await until(lambda: is_queued(ring, "origin-2", CONTENTS))


async def test_the_acceptor_that_lost_its_disk_gets_back_what_it_had_accepted(
    tmp_path: Path,
) -> None:
    async with ring_of(tmp_path, 3) as ring:
        ring.break_backend()
        await push(ring, "origin-1", CONTENTS)
        await ring.kill("origin-1")
        shutil.rmtree(tmp_path / "origin-1")

        await start_again(ring, "origin-1")

        await until(lambda: is_queued(ring, "origin-1", CONTENTS))


async def test_an_owner_that_stays_away_is_replaced_and_what_is_left_is_shown(
    tmp_path: Path,
) -> None:
    async with ring_of(tmp_path, 4, replicas=3) as ring:
        ring.break_backend()
        await push(ring, "origin-1", CONTENTS)
        holders = {content.digest: set(ring.holders(content.digest)) for content in CONTENTS}
        victim = next(
            name for name in ("origin-2", "origin-3") if ring.on_disk(name, CONTENTS[0].digest)
        )
        lacking = [content for content in CONTENTS if victim in holders[content.digest]]

        await ring.kill(victim)

        def alive(digest: Digest) -> int:
            return len(set(ring.holders(digest)) - {victim})

        await until(lambda: all(alive(content.digest) >= 3 for content in lacking))
        await until(lambda: no_more_left(ring, "origin-1"))


async def no_more_left(ring: Ring, name: str) -> bool:
    copies = await ring.cluster.metric(name, "origin_repair_copies_left")
    return copies == await ring.cluster.metric(name, "origin_repair_bytes_left") == 0


async def test_a_member_that_joins_gets_what_it_owns_from_then_on(tmp_path: Path) -> None:
    async with ring_of(tmp_path, 2, replicas=3) as ring:
        ring.break_backend()
        await push(ring, "origin-1", CONTENTS)
        (address,) = free_addresses(1)
        ring.addresses.append(address)
        ring.cluster._learn(origins=tuple(map(str, ring.addresses)))
        await start_again(ring, "origin-3", replicas=3)
        # As SIGHUP does.
        ring.cluster.changes.tell(ring.cluster.config.cluster)

        await until(lambda: is_queued(ring, "origin-3", CONTENTS))


async def test_copies_are_made_at_the_configured_rate(tmp_path: Path) -> None:
    async with ring_of(tmp_path, 2, repair_rate=1.0) as ring:
        ring.break_backend()
        await ring.kill("origin-2")
        await push(ring, "origin-1", CONTENTS)
        await start_again(ring, "origin-2")

        # The first one goes into debt for weeks.
        await ring.cluster.counted("origin-1", "origin_repair_copies_total", 1)
        assert await ring.cluster.metric("origin-1", "origin_repair_copies_left") == 2
        left = await ring.cluster.metric("origin-1", "origin_repair_bytes_left")
        assert left == pytest.approx(2 * PIECE_LENGTH_MIN, abs=10)


async def test_what_is_written_leaves_no_repair_behind(tmp_path: Path) -> None:
    async with ring_of(tmp_path, 3) as ring:
        ring.break_backend()
        await ring.kill("origin-3")
        await push(ring, "origin-1", CONTENTS)
        ring.mend_backend()
        await ring.cluster.written_back("origin-1")
        await ring.start("origin-3")
        for content in CONTENTS:
            assert ring.backend_bytes(content.digest) == content.data

        # The replica still has entries: its turn comes later.
        assert await ring.cluster.metric("origin-2", "write_back_queue_blobs") == len(CONTENTS)
        await trio.sleep(1)
        assert not any(ring.on_disk("origin-3", content.digest) for content in CONTENTS)


HEALTHY, HANGING = "127.0.0.1:1", "127.0.0.1:2"


@attrs.define
class Others:
    """The other origins as a script, and the disk of this one.

    Attributes:
        events: ``ask`` for each round, and the members that get copies.
        happened: somebody waits there for the next event.
    """

    lacking: bool
    events: list[str] = attrs.Factory(list)
    happened: trio.lowlevel.ParkingLot = attrs.Factory(trio.lowlevel.ParkingLot)

    def own(self) -> frozenset[str]:
        return frozenset()

    async def ranks(self, address: str, keys: Sequence[Key]) -> dict[Key, int]:
        if address == HANGING:
            await trio.sleep(1.0)
            raise RpcUnavailable(address, "origin.queued", "no reply")
        self._note("ask")
        return dict.fromkeys(keys, ABSENT) if self.lacking else {}

    async def metainfo(self, digest: Digest) -> Metainfo:
        return next(content.metainfo for content in CONTENTS if content.digest == digest)

    async def copy_to(self, address: str, *_: object) -> str:
        self._note(address)
        return ""

    def _note(self, event: str) -> None:
        self.events.append(event)
        self.happened.unpark_all()


class Queue:
    """What this origin has queued."""

    def settled(self) -> list[QueuedBlob]:
        return [QueuedBlob(content.digest, 1, "", 0.0) for content in CONTENTS]

    def rank(self, _: Key) -> int:
        return 0


def repair_with(others: Others, *members: str) -> Repair:
    settings = SimpleNamespace(replicas=2, repair_rate=math.inf)
    ring = Membership(members, name="origin")
    return Repair(Queue(), others, others, ring, Metrics(), settings)  # type: ignore[arg-type]


async def test_one_that_hangs_does_not_make_the_rounds_rare() -> None:
    """It would be replaced by the next minutes after it has gone."""
    others = Others(lacking=False)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(repair_with(others, HEALTHY, HANGING).run)
        # Three rounds, each of which ended a second after that; the share of the waiting would be a minute.
        with trio.fail_after(40):
            while len(others.events) < 4:
                await others.happened.park()
        nursery.cancel_scope.cancel()


async def test_a_repair_that_takes_long_asks_again_in_between(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(repair, "MAKING", 0.0)
    monkeypatch.setattr(repair, "INTERVAL", 0.0)
    others = Others(lacking=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(repair_with(others, HEALTHY).run)
        with trio.fail_after(30):
            while others.events.count(HEALTHY) < 3:
                await others.happened.park()
        nursery.cancel_scope.cancel()
    assert others.events[:6] == ["ask", HEALTHY] * 3


# --- scenarios ------------------------------------------------------------------------------------


async def test_a_pull_works_when_two_of_the_three_that_have_a_blob_are_dead(
    tmp_path: Path,
) -> None:
    async with ring_of(tmp_path, 3) as ring:
        ring.break_backend()
        await ring.cluster.start_index()
        await ring.cluster.start_tracker()
        await ring.cluster.start_agent()
        (content, *_) = CONTENTS
        await push(ring, "origin-1", [content])
        await until(lambda: ring.on_disk("origin-3", content.digest))
        await ring.kill("origin-1")
        await ring.kill("origin-2")

        reply = await ring.get("agent", content.digest)

        assert (reply.status_code, reply.content) == (200, content.data)


async def test_a_copy_whose_source_is_dead_is_read_from_another_origin(tmp_path: Path) -> None:
    """As when the origin that took a push dies before its replicas have the blob."""
    async with ring_of(tmp_path, 2, replicas=1) as ring:
        ring.break_backend()
        (content, *_) = CONTENTS
        await push(ring, "origin-1", [content])
        (port,) = free_ports(1)
        dead = PeerContact("d" * 32, "127.0.0.1", port, PeerKind.ORIGIN)
        request = ReplicateRequest(content.metainfo, "", dead, rank=1, seconds=0.1)
        address = str(ring.addresses[1])
        reply = await ring.cluster.pool.call(address, REPLICATE_BLOB, request, timeout=30.0)
        assert not reply.stored

        found = await ring.get("origin-2", content.digest)

        assert (found.status_code, found.content) == (200, content.data)


async def test_everything_that_was_written_is_there_after_all_origins_lost_their_disks(
    tmp_path: Path,
) -> None:
    async with ring_of(tmp_path, 3) as ring:
        await ring.cluster.start_index()
        await ring.cluster.start_tracker()
        await ring.cluster.start_agent()
        await push(ring, "origin-1", CONTENTS)
        await ring.cluster.written_back("origin-1")
        for name in ring.names:
            await ring.kill(name)
            shutil.rmtree(tmp_path / name)
        for name in ring.names:
            await ring.start(name)

        for content in CONTENTS:
            reply = await ring.get("agent", content.digest)
            assert (reply.status_code, reply.content) == (200, content.data)
