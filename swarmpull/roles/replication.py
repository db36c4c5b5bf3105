"""The other origins as one origin needs them: they take copies of what it accepts, and it reads from theirs.

An origin does not have to be told which member of the ring it is: it calls all alike, and finds its own peer
id in the answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import attrs
import structlog
import trio

from swarmpull.digest import Digest
from swarmpull.errors import BlobNotFound, RpcUnavailable, SwarmpullError
from swarmpull.ring.membership import Membership
from swarmpull.roles.own_addresses import OwnAddresses
from swarmpull.roles.ring_client import ask_member
from swarmpull.roles.swarm_host import SwarmHost
from swarmpull.store.write_back_schedule import Key
from swarmpull.swarm.metainfo import Metainfo
from swarmpull.telemetry import Metrics
from swarmpull.wire import api
from swarmpull.wire.listen import parse_address
from swarmpull.wire.rpc import RpcPool

log = structlog.get_logger()

# How long one call to a replica waits for it to have the blob, in seconds; then it is asked again.
POLL: Final = 2.0
# How much longer its answer may take before it counts as gone.
ANSWER_PATIENCE: Final = 3.0
# A replica that gets no piece for so long is given up.
STALLED: Final = 10.0
# For so many seconds nobody waits for it then: it answers, so it does not count as unhealthy.
STALLED_BELIEVED: Final = 30.0
# The bound of all replication before an acknowledgement: seconds, and the slowest rate in bytes per second
# that is still waited for.
PATIENCE: Final = 30.0
SLOWEST_RATE: Final = 10e6
# Blobs that are replicated at the same time; fewer than a connection takes calls, so that none of them waits
# behind others until it seems that nobody answers.
SPREADING_MAX: Final = 16
# Seconds between two lines in the log about missing copies: every push lacks some while a member is down.
LOG_INTERVAL: Final = 60.0
# For an origin to say whether its disk has a blob, in seconds.
HELD_PATIENCE: Final = 2.0
# To say what it has of a thousand blobs, from memory.
QUEUED_PATIENCE: Final = 10.0
# Origins that are asked for one blob; a cluster has a few.
ASKED_MAX: Final = 16


@attrs.frozen
class _Asked:
    """What the other origins say of a blob.

    Attributes:
        found: those whose disks have it, in the order of the ring.
        silent: those that may have it as well, and why they did not say.
    """

    found: list[tuple[str, api.HeldReply]]
    silent: dict[str, str]

    def check_silent(self) -> None:
        """Raise RpcUnavailable for one that may have the blob and did not say."""
        if self.silent:
            address, reason = next(iter(self.silent.items()))
            raise RpcUnavailable(address, api.HELD_BLOB.name, reason)


class Replication:
    """Copies to and from the other members of the ring of origins."""

    def __init__(
        self,
        pool: RpcPool,
        members: Membership,
        host: SwarmHost,
        copies: int,
        metrics: Metrics,
    ) -> None:
        self._pool = pool
        self._members = members
        self._host = host
        self._copies = copies
        self._logged_at = -math.inf
        self._spreading = trio.CapacityLimiter(SPREADING_MAX)
        self._own = OwnAddresses()
        # Members that were given up because no piece came to them, and when.
        self._stalled: dict[str, float] = {}
        self._missing = metrics.counter(
            "write_back_replicas_missing_total",
            "Copies that a blob lacked on other origins when it was acknowledged.",
        )
        self._alone = metrics.counter(
            "write_back_unreplicated_total",
            "Blobs that no other origin had when they were acknowledged, although others are configured.",
        )

    # --- writing ------------------------------------------------------------------------------

    async def spread(self, metainfo: Metainfo, namespace: str) -> None:
        """Have the owners of a blob of this disk take copies of it; with fewer, go on and count that."""
        order = self._members.order(str(metainfo.digest))
        wanted = min(self._copies, len(order))
        if self._copies == 1 or all(each in self._own for each in order):
            return
        holders: list[str] = []
        failures: dict[str, str] = {}
        candidates = enumerate(order, start=1)

        async def fill_one_place() -> None:
            for rank, address in candidates:
                failure = self._passed_over(address) or await self.copy_to(
                    address, metainfo, namespace, rank
                )
                if not failure:
                    holders.append(address)
                    return
                failures[address] = failure

        # Waiting for others to be replicated is waiting too: a push is not held up by them without a bound.
        with trio.move_on_after(PATIENCE + metainfo.length / SLOWEST_RATE):
            async with self._spreading, trio.open_nursery() as nursery:
                for _ in range(wanted):
                    nursery.start_soon(fill_one_place)
        self._count(metainfo.digest, wanted, holders, failures)

    def _count(
        self, digest: Digest, wanted: int, holders: list[str], failures: dict[str, str]
    ) -> None:
        members = self._members.members
        others = [each for each in members if each not in self._own]
        # This origin has the blob, even if the time was over before its turn came.
        holders = [each for each in members if each in holders or each in self._own]
        if len(holders) < wanted:
            self._missing.inc(wanted - len(holders))
            if trio.current_time() - self._logged_at >= LOG_INTERVAL:
                self._logged_at = trio.current_time()
                log.warning(
                    "replicas_missing",
                    digest=str(digest),
                    wanted=wanted,
                    holders=holders,
                    failures=failures,
                )
        if others and all(each in self._own for each in holders):
            self._alone.inc()

    def _passed_over(self, address: str) -> str:
        """Why a member is not asked to take copies for the time being; empty when it is.

        Every push would wait for it anew: one whose time is over finds out whether it is back.
        """
        if address in self._members.unhealthy() and address not in self._own:
            return "did not answer of late"
        stalled_at = self._stalled.get(address, -math.inf)
        if trio.current_time() - stalled_at < STALLED_BELIEVED:
            return "got no piece of late"
        return ""

    async def copy_to(self, address: str, metainfo: Metainfo, namespace: str, rank: int) -> str:
        """Wait until a member has a blob; returns why it does not, or nothing."""
        if address in self._own:
            return ""
        request = api.ReplicateRequest(metainfo, namespace, self._host.contact, rank, POLL)
        received, heard_at = 0, trio.current_time()
        while True:
            reply = await self._replicate(address, request)
            if isinstance(reply, str):
                return reply
            if reply.itself:
                self._own.add(address)
            if reply.itself or reply.stored:
                return ""
            if reply.received > received:
                received, heard_at = reply.received, trio.current_time()
            elif trio.current_time() - heard_at > STALLED:
                self._stalled[address] = trio.current_time()
                return f"no piece for {STALLED:g} s, after {received} bytes"

    async def _replicate(
        self, address: str, request: api.ReplicateRequest
    ) -> api.ReplicateReply | str:
        """How far a member is, or why it takes no copy."""
        with self._members.calling(address, patience=0.0):
            try:
                reply = await self._pool.call(
                    address, api.REPLICATE_BLOB, request, timeout=POLL + ANSWER_PATIENCE
                )
            except RpcUnavailable as error:
                self._members.record_failure(address, error.reason)
                return error.reason
            except SwarmpullError as error:
                self._members.record_success(address)
                return str(error)
            self._members.record_success(address)
            return reply
        return "answers nothing any more"

    # --- repairing ----------------------------------------------------------------------------

    async def ranks(self, address: str, keys: Sequence[Key]) -> dict[Key, int]:
        """What a member has of these blobs: see `swarmpull.ring.repair`; of itself, nothing.

        Raises SwarmpullError when it does not say.
        """
        blobs = tuple(api.BlobOfRepository(digest, namespace) for digest, namespace in keys)
        request = api.QueuedRequest(self._host.contact.peer_id, blobs)
        reply = await ask_member(
            self._members,
            self._pool,
            address,
            api.QUEUED,
            request,
            timeout=QUEUED_PATIENCE,
            patience=0.0,
        )
        if reply.itself:
            self._own.add(address)
            return {}
        return dict(zip(keys, reply.ranks, strict=False))

    def own(self) -> frozenset[str]:
        """The members that turned out to be this process."""
        return frozenset(self._own)

    # --- reading ------------------------------------------------------------------------------

    async def length(self, digest: Digest) -> int | None:
        """The length in bytes of a blob on another origin's disk; None when none has it.

        Raises:
            RpcUnavailable: one of them may have it, and could not be asked.
        """
        asked = await self._ask_all(digest)
        if asked.found:
            return asked.found[0][1].metainfo.length
        asked.check_silent()
        return None

    async def is_ahead(self, key: Key, rank: int) -> bool:
        """Whether an origin that answers is to write a blob to the backend before ``rank``."""
        asked = await self._ask_all(*key)
        ranks = [held.write_back_rank for _, held in asked.found]
        return any(other is not None and other < rank for other in ranks)

    async def fetch(self, digest: Digest) -> bool:
        """Get a blob from another origin's disk, through the swarm; False when none has it.

        Raises:
            RpcUnavailable: one of them has it and did not give it, or may have it and could not be asked.
        """
        asked = await self._ask_all(digest)
        for address, held in asked.found:
            try:
                await self._host.adopt(
                    held.metainfo, "", held.seeder.seen_at(parse_address(address)[0])
                )
            except SwarmpullError as error:
                log.info("replica_not_read", digest=str(digest), origin=address, reason=str(error))
                asked.silent[address] = str(error)
            else:
                log.info("replica_read", digest=str(digest), origin=address)
                return True
        asked.check_silent()
        return False

    async def _ask_all(self, digest: Digest, namespace: str = "") -> _Asked:
        """Which of the other origins have a blob on their disks.

        Those that did not answer of late are not called: a client waits, and most blobs that are asked for
        here are nowhere.
        """
        order = [each for each in self._members.order(str(digest)) if each not in self._own]
        unhealthy = set(self._members.unhealthy())
        silent = {each: "did not answer of late" for each in order if each in unhealthy}
        found: dict[str, api.HeldReply] = {}

        async def ask(address: str) -> None:
            try:
                held = await self._ask(address, api.HeldRequest(digest, namespace))
            except RpcUnavailable as error:
                silent[address] = error.reason
            except SwarmpullError as error:
                silent[address] = str(error)
            else:
                if held is not None:
                    found[address] = held

        async with trio.open_nursery() as nursery:
            for address in [each for each in order if each not in unhealthy][:ASKED_MAX]:
                nursery.start_soon(ask, address)
        return _Asked([(each, found[each]) for each in order if each in found], silent)

    async def _ask(self, address: str, request: api.HeldRequest) -> api.HeldReply | None:
        """What a member says of a blob; None when it does not have it, or is this origin.

        Raises SwarmpullError when it does not say.
        """
        try:
            held = await self._pool.call(address, api.HELD_BLOB, request, timeout=HELD_PATIENCE)
        except RpcUnavailable as error:
            self._members.record_failure(address, error.reason)
            raise
        except BlobNotFound:
            self._members.record_success(address)
            return None
        except SwarmpullError:
            self._members.record_success(address)
            raise
        self._members.record_success(address)
        if held.seeder.peer_id == self._host.contact.peer_id:
            self._own.add(address)
            return None
        return held
