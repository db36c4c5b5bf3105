"""Which members one origin asks to take copies, and for how long it waits, by a clock that jumps.

The members are a script; through real origins the same is in `test_write_back`.
"""

from __future__ import annotations

from collections import Counter

import attrs
import trio

from swarmpull.errors import BlobNotFound, RpcUnavailable
from swarmpull.ring.membership import Membership
from swarmpull.roles.replication import Replication
from swarmpull.swarm.peers import PeerContact, PeerKind
from swarmpull.telemetry import Metrics
from swarmpull.wire import api

from .peers import make_content

CONTENT = make_content(1000)
OWN, SECOND, THIRD, FOURTH = (f"127.0.0.{number}:1" for number in range(1, 5))


@attrs.define
class Origins:
    """The other origins, as the pool and the host of this one.

    Attributes:
        silent: they do not answer.
        stalled: they answer, and no piece comes.
        asked: how often each was called.
    """

    silent: set[str] = attrs.Factory(set)
    stalled: set[str] = attrs.Factory(set)
    asked: Counter[str] = attrs.Factory(Counter)
    contact: PeerContact = PeerContact("1" * 32, "127.0.0.1", 1, PeerKind.ORIGIN)

    async def call(self, address: str, method, request, *, timeout: float):
        self.asked[address] += 1
        if address in self.silent:
            await trio.sleep(timeout)
            raise RpcUnavailable(address, method.name, "no answer")
        if address in self.stalled:
            await trio.sleep(request.seconds)
            return api.ReplicateReply(stored=False)
        await trio.lowlevel.checkpoint()
        return api.ReplicateReply(stored=address != OWN, itself=address == OWN)


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
