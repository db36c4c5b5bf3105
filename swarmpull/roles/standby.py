"""The other indexes of a cluster as one that replicates needs them: one of them stands by for each change."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Final

import structlog
import trio

from swarmpull.errors import RpcUnavailable, SwarmpullError
from swarmpull.roles.index_peers import IndexPeers
from swarmpull.roles.ring_client import ask_member
from swarmpull.telemetry import Metrics
from swarmpull.wire import api
from swarmpull.wire.rpc import RpcPool

log = structlog.get_logger()

# For an index to have changes on its disk, in seconds; whoever made them waits for it.
KEEP_PATIENCE: Final = 3.0
# To say which changes it sees to, from memory.
ASK_PATIENCE: Final = 10.0
# Changes of one call.
BATCH: Final = 1000
# Seconds between two lines in the log about changes that nobody stands by for.
LOG_INTERVAL: Final = 60.0


class Standby:
    """Calls of the other indexes."""

    def __init__(self, pool: RpcPool, peers: IndexPeers, metrics: Metrics) -> None:
        self._process = peers.process
        self._own = peers.own
        self._pool = pool
        self._members = peers.members
        self._logged_at = -math.inf
        self._alone = metrics.counter(
            "replication_without_standby_total",
            "Changes of tags that no other index had queued when they were acknowledged, although others "
            "are configured.",
        )

    def is_own(self, process: str) -> bool:
        """Whether a call came from this process."""
        return process == self._process

    async def keep(self, repository: str, changes: tuple[api.ChangeForRemote, ...]) -> None:
        """Have one other index keep changes; without any that can, go on and count that."""
        failures: dict[str, str] = {}
        for address in self._others(repository):
            request = api.KeepChangesRequest(self._process, changes)
            try:
                reply = await ask_member(
                    self._members,
                    self._pool,
                    address,
                    api.KEEP_CHANGES,
                    request,
                    timeout=KEEP_PATIENCE,
                    patience=0.0,
                )
            except SwarmpullError as error:
                failures[address] = str(error)
                continue
            if not reply.itself:
                return
            self._own.add(address)
        if failures:
            self._alone.inc(len(changes))
            if trio.current_time() - self._logged_at >= LOG_INTERVAL:
                self._logged_at = trio.current_time()
                log.warning("replication_without_standby", failures=failures)

    async def seen_to(self, changes: Sequence[api.ChangeForRemote]) -> set[api.ChangeForRemote]:
        """Which of these another index sees to."""
        found: set[api.ChangeForRemote] = set()
        for address in self._others(""):
            for batch in _batches(changes):
                request = api.ChangesKeptRequest(self._process, batch)
                try:
                    reply = await ask_member(
                        self._members,
                        self._pool,
                        address,
                        api.CHANGES_KEPT,
                        request,
                        timeout=ASK_PATIENCE,
                        patience=0.0,
                    )
                except SwarmpullError as error:
                    level = log.info if isinstance(error, RpcUnavailable) else log.warning
                    level("standby_not_answered", index=address, reason=str(error))
                    break
                if reply.itself:
                    self._own.add(address)
                    break
                found.update(
                    change for change, kept in zip(batch, reply.kept, strict=False) if kept
                )
        return found

    def _others(self, key: str) -> list[str]:
        """The members that may be other processes, in the order of the ring, those that are ill last."""
        return [each for each in self._members.order(key) if each not in self._own]


def _batches(
    changes: Sequence[api.ChangeForRemote],
) -> Iterator[tuple[api.ChangeForRemote, ...]]:
    """``changes`` in tuples of at most `BATCH`."""
    rest = iter(changes)
    while batch := tuple(itertools.islice(rest, BATCH)):
        yield batch
