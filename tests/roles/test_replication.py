"""Which members one origin asks to take copies, and for how long it waits, by a clock that jumps.

The members are a script; through real origins the same is in `test_write_back`.
"""

from __future__ import annotations

from collections import Counter

import attrs
import pytest
import trio

from swarmpull.errors import BlobNotFound, DownloadFailed, RpcUnavailable, StoreUnavailable
from swarmpull.ring.membership import Membership
from swarmpull.roles import replication
from swarmpull.roles.replication import Replication
from swarmpull.swarm.peers import PeerContact, PeerKind
from swarmpull.telemetry import Metrics
from swarmpull.wire import api

from .peers import make_content

CONTENT = make_content(1000)
CONTACT = PeerContact("1" * 32, "127.0.0.1", 1, PeerKind.ORIGIN)
OWN, SECOND, THIRD = (f"127.0.0.{number}:1" for number in range(1, 4))


@attrs.define
class Origins:
    """The other origins, as the pool and the host of this one.

    Attributes:
        silent: they do not answer.
        stalled: they answer, and no piece comes.
        holders: they have the blob on their disks.
        failing: their disks fail.
        gives_nothing: nothing can be downloaded from any of them.
        asked: how often each was called.
    """

    silent: set[str] = attrs.Factory(set)
    stalled: set[str] = attrs.Factory(set)
    holders: set[str] = attrs.Factory(set)
    failing: set[str] = attrs.Factory(set)
    gives_nothing: bool = False
    asked: Counter[str] = attrs.Factory(Counter)
    contact: PeerContact = CONTACT

    async def call(self, address: str, method, request, *, timeout: float):
        self.asked[address] += 1
        if address in self.silent:
            await trio.sleep(timeout)
            raise RpcUnavailable(address, method.name, "no answer")
        if method is api.HELD_BLOB:
            return self._held(address)
        if address in self.stalled:
            await trio.sleep(request.seconds)
            return api.ReplicateReply(stored=False)
        await trio.lowlevel.checkpoint()
        return api.ReplicateReply(stored=address != OWN, itself=address == OWN)

    def _held(self, address: str) -> api.HeldReply:
        if address in self.failing:
            raise StoreUnavailable("origin", "Input/output error")
        if address not in self.holders and address != OWN:
            raise BlobNotFound(str(CONTENT.digest), "origin")
        seeder = attrs.evolve(CONTACT, peer_id=CONTACT.peer_id if address == OWN else "2" * 32)
        return api.HeldReply(CONTENT.metainfo, seeder)

    async def adopt(self, *_: object) -> None:
        await trio.lowlevel.checkpoint()
        if self.gives_nothing:
            raise DownloadFailed(str(CONTENT.digest), "no peer has it")


@attrs.define
class Play:
    others: Origins
    metrics: Metrics
    replication: Replication

    async def push(self) -> float:
        """Replicate a blob; returns the seconds that its push waited."""
        begun = trio.current_time()
        await self.replication.spread(CONTENT.metainfo, "")
        return trio.current_time() - begun

    def missing(self) -> float:
        text = self.metrics.render()[0].decode()
        (line,) = [
            line
            for line in text.splitlines()
            if line.startswith("swarmpull_write_back_replicas_missing_total")
        ]
        return float(line.split()[1])


def play_of(*members: str, copies: int = 3) -> Play:
    others, metrics = Origins(), Metrics()
    ring = Membership(members, name="origin")
    return Play(others, metrics, Replication(others, ring, others, copies, metrics))


async def test_pushes_do_not_wait_for_a_dead_member_one_after_the_other(autojump_clock) -> None:
    play = play_of(OWN, SECOND, THIRD)
    play.others.silent = {THIRD}
    waits = [await play.push() for _ in range(20)]

    # Three failures make it count as dead; from then on nobody waits.
    assert waits == [5.0] * 3 + [0.0] * 17
    assert play.missing() == 20
    await trio.sleep(10)
    assert [await play.push() for _ in range(3)] == [5.0, 0.0, 0.0], (
        "one finds out whether it is back"
    )

    play.others.silent = set()
    await trio.sleep(10)
    asked = play.others.asked[THIRD]
    assert await play.push() == 0
    assert play.others.asked[THIRD] == asked + 1
    assert play.missing() == 23


async def many_pushes(play: Play, count: int) -> list[float]:
    """How long each of ``count`` pushes at once waited."""
    waits: list[float] = []

    async def push() -> None:
        waits.append(await play.push())

    async with trio.open_nursery() as nursery:
        for _ in range(count):
            nursery.start_soon(push)
    return waits


async def test_a_member_that_gets_no_piece_holds_up_only_the_first_pushes(autojump_clock) -> None:
    play = play_of(OWN, SECOND, THIRD)
    await play.push()
    play.others.stalled = {THIRD}

    waits = await many_pushes(play, 200)

    # Those that were under way when it was given up, and those that waited for them.
    assert max(waits) == 12
    assert play.missing() == 200
    asked = play.others.asked[THIRD]
    assert await play.push() == 0
    assert play.others.asked[THIRD] == asked

    play.others.stalled = set()
    await trio.sleep(30)
    assert await play.push() == 0
    assert play.others.asked[THIRD] == asked + 1
    assert play.missing() == 201


async def test_waiting_for_others_to_be_replicated_has_a_bound(
    autojump_clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A copy takes as long as a push may wait, and nobody is given up: the limiter is never free.
    monkeypatch.setattr(replication, "STALLED", 1000.0)
    play = play_of(OWN, SECOND)
    await play.push()
    play.others.stalled = {SECOND}

    waits = await many_pushes(play, 100)

    assert max(waits) == pytest.approx(replication.PATIENCE, abs=0.01)
    assert play.missing() == 100, "of two copies, this origin has its own"


# --- reading --------------------------------------------------------------------------------------


async def test_a_blob_is_nowhere_when_all_members_say_so(autojump_clock) -> None:
    replication = play_of(OWN, SECOND, THIRD).replication

    assert await replication.length(CONTENT.digest) is None
    assert await replication.fetch(CONTENT.digest) is False


async def test_a_member_that_does_not_say_may_have_the_blob(autojump_clock) -> None:
    play = play_of(OWN, SECOND, THIRD)
    for play.others.silent, play.others.failing in (({THIRD}, set()), (set(), {THIRD})):
        for ask in (play.replication.length, play.replication.fetch):
            with pytest.raises(RpcUnavailable) as caught:
                await ask(CONTENT.digest)
            assert caught.value.address == THIRD
            assert caught.value.reason in {"no answer", "store origin failed: Input/output error"}

    play.others.holders = {SECOND}
    assert await play.replication.length(CONTENT.digest) == 1000
    assert await play.replication.fetch(CONTENT.digest) is True


async def test_a_member_that_is_not_asked_because_it_was_silent_may_have_the_blob(
    autojump_clock,
) -> None:
    play = play_of(OWN, SECOND, THIRD)
    play.others.silent = {THIRD}
    for _ in range(3):
        await play.push()
    asked = play.others.asked[THIRD]

    with pytest.raises(RpcUnavailable, match="did not answer of late"):
        await play.replication.fetch(CONTENT.digest)
    assert play.others.asked[THIRD] == asked


async def test_a_blob_that_its_holder_did_not_give_is_not_nowhere(autojump_clock) -> None:
    play = play_of(OWN, SECOND)
    play.others.holders, play.others.gives_nothing = {SECOND}, True

    with pytest.raises(RpcUnavailable, match="no peer has it"):
        await play.replication.fetch(CONTENT.digest)
