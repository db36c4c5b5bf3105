"""What the journal of one index tells those of the others: changes, and that they are not to be written."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import partial
from typing import Final

import attrs
import structlog
import trio

from swarmpull.errors import RpcUnavailable, SwarmpullError
from swarmpull.roles.index_peers import IndexPeers
from swarmpull.wire import api
from swarmpull.wire.api import PendingChange
from swarmpull.wire.codec import encode

log = structlog.get_logger()

# Seconds for another index to have a change on its disk.
SHARE_TIMEOUT: Final = 3.0
# Of one call among indexes: changes, and bytes of them.
BATCH: Final = 200
BATCH_BYTES: Final = 1 << 20


@attrs.define(slots=False)
class NotSure(SwarmpullError):
    """Whether a tag still is what the journal says cannot be told."""

    reason: str

    def __str__(self) -> str:
        return self.reason


@attrs.define(eq=False)
class Shared:
    """What became of a change at the other indexes.

    Attributes:
        failures: why it must not be acknowledged.
        tried: those to which it was to be given.
        asked: those of them that may have got it.
    """

    failures: list[SwarmpullError] = attrs.Factory(list)
    tried: set[str] = attrs.Factory(set)
    asked: set[str] = attrs.Factory(set)


class JournalSharing:
    """Calls to the journals of the other indexes."""

    def __init__(self, peers: IndexPeers) -> None:
        self._peers = peers

    async def hand_out(self, changes: Sequence[PendingChange], *, again: bool = False) -> None:
        """Give changes to all that answer; ``again`` as in `KeepPendingRequest`."""
        async with trio.open_nursery() as nursery:
            for address in self._peers.others if changes else ():
                nursery.start_soon(partial(self._hand_out_to, address, changes, again=again))

    async def _hand_out_to(
        self, address: str, changes: Sequence[PendingChange], *, again: bool = False
    ) -> None:
        for batch in batches(changes):
            request = api.KeepPendingRequest(batch, again)
            try:
                await self._peers.call(address, api.KEEP_PENDING, request, timeout=SHARE_TIMEOUT)
            except SwarmpullError as error:
                log.info("index_journal_not_shared", index=address, reason=str(error))
                return

    async def share(self, changes: Sequence[PendingChange], judged_by: str, shared: Shared) -> None:
        """Give changes to the others, or only ask them whether they are sure."""
        request = api.KeepPendingRequest(tuple(changes), judged_by=judged_by)
        deadline = trio.current_time() + SHARE_TIMEOUT

        async def give(address: str) -> None:
            was_asked = True
            try:
                reply = await self._peers.insist(address, api.KEEP_PENDING, request, deadline)
            except RpcUnavailable as error:
                # It asks before it answers anybody again; until then it does not count as healthy.
                log.info("index_journal_not_shared", index=address, reason=error.reason)
                if judged_by:
                    shared.failures.append(NotSure(f"index {address} does not answer"))
                was_asked = error.asked
            except SwarmpullError as error:
                shared.failures.append(error)
            else:
                if judged_by and not reply.sure and reply.process != self._peers.process:
                    reason = f"index {address} has changed it meanwhile, or does not know"
                    shared.failures.append(NotSure(reason))
            if was_asked:
                shared.asked.add(address)

        others = self._peers.others
        shared.tried.update(others)
        async with trio.open_nursery() as nursery:
            for address in others:
                nursery.start_soon(give, address)

    async def drop(self, ids: Sequence[str], others: Collection[str]) -> list[str]:
        """Have changes not be written; returns the others that may have written one, or will."""
        silent: list[str] = []

        async def drop_at(address: str) -> None:
            if not await self._drop_at(address, ids):
                silent.append(address)

        async with trio.open_nursery() as nursery:
            for address in others if ids else ():
                nursery.start_soon(drop_at, address)
        return silent

    async def _drop_at(self, address: str, ids: Sequence[str]) -> bool:
        """Whether that index will not write any of them, and has not."""
        is_clear = True
        for start in range(0, len(ids), BATCH):
            request = api.DropPendingRequest(tuple(ids[start : start + BATCH]))
            deadline = trio.current_time() + SHARE_TIMEOUT
            try:
                reply = await self._peers.insist(address, api.DROP_PENDING, request, deadline)
            except SwarmpullError as error:
                log.warning("index_journal_not_dropped", index=address, reason=str(error))
                return False
            is_clear = is_clear and set(request.changes) <= set(reply.dropped)
        return is_clear


def batches(changes: Iterable[PendingChange]) -> Iterator[tuple[PendingChange, ...]]:
    """No more in each than goes into one call."""
    batch: list[PendingChange] = []
    size = 0
    for change in changes:
        size += len(encode(change))
        if batch and (len(batch) >= BATCH or size > BATCH_BYTES):
            yield tuple(batch)
            batch, size = [], len(encode(change))
        batch.append(change)
    if batch:
        yield tuple(batch)
