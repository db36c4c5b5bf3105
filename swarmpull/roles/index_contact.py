"""Whether an index knows what the others have acknowledged while their backend was down.

Such a change is in their journals (`index_journal`), and given to this index before it is acknowledged; but
an index that was not there, was cut off or stood still has missed it, and reads from the backend what was
before.  So each asks all others again and again, and answers only while that was done lately.  Whoever takes
a change waits for one that is silent until it must have noticed that.
"""

from __future__ import annotations

import math
from typing import Final

import structlog
import trio

from swarmpull.errors import SwarmpullError
from swarmpull.roles.index_journal import Journal
from swarmpull.roles.index_peers import MARGIN, IndexGone, IndexPeers
from swarmpull.roles.journal_sharing import SHARE_TIMEOUT
from swarmpull.wire import api

log = structlog.get_logger()

# Seconds from the beginning of one round of questions to that of the next.
ASK_INTERVAL: Final = 0.5
# For one answer; whoever is silent for longer is done without.
ASK_TIMEOUT: Final = 0.8
# Seconds from the beginning of a round for which it holds: less than others try to give a change to us.
CONTACT: Final = 2.0
assert CONTACT * MARGIN < SHARE_TIMEOUT
# Or one silent index would hold up the requests of all others: a round holds until the next one has ended.
assert 2 * max(ASK_TIMEOUT, ASK_INTERVAL) < CONTACT
# An answer that is later than its time by so much was not late: this process stood still.
STANDSTILL: Final = 0.1


class Contact:
    """Asks the other indexes for their journals."""

    def __init__(self, journal: Journal, peers: IndexPeers) -> None:
        self._journal = journal
        self._peers = peers
        self._until = -math.inf
        # Nobody has reached this index yet: others may find nobody there, and acknowledge changes without it.
        self._is_reached = False
        self._wanted = trio.Event()
        self._asked = trio.Event()
        # Up to where the journal of each was taken over: the process, and the number of its last change.
        self._places: dict[str, tuple[str, int]] = {}
        self._silent: set[str] = set()

    @property
    def holds(self) -> bool:
        """Whether all others were asked lately; those that did not answer count as ill."""
        return trio.current_time() < self._until

    async def renew(self) -> None:
        """Return when it holds: at once, but for an index that starts, or stood still."""
        self._is_reached = True
        while not self.holds:
            self._wanted.set()
            await self._asked.wait()

    async def ask_all(self) -> None:
        """Take over what the others keep; those that do not answer are done without.

        It holds from then on, unless nobody had come to `renew` when it began.
        """
        begun_at, is_reached = trio.current_time(), self._is_reached
        others = self._peers.others
        async with trio.open_nursery() as nursery:
            for address in others:
                nursery.start_soon(self._ask, address)
        self._places = {each: place for each, place in self._places.items() if each in others}
        self._silent.intersection_update(others)
        if is_reached:
            self._until = begun_at + CONTACT
        self._asked.set()
        self._asked = trio.Event()

    async def run(self) -> None:
        """Ask again and again, until cancelled."""
        asked_at = trio.current_time()
        while True:
            self._wanted = trio.Event()
            with trio.move_on_at(asked_at + ASK_INTERVAL):
                await self._wanted.wait()
            asked_at = trio.current_time()
            await self.ask_all()

    async def _ask(self, address: str) -> None:
        stood_still = True
        while stood_still:
            begun_at = trio.current_time()
            try:
                more = await self._take_over(address)
                stood_still = False
                while more:
                    more = await self._take_over(address)
            except IndexGone:
                return  # it gives what it has when it starts again
            except SwarmpullError as error:
                stood_still = trio.current_time() > begun_at + ASK_TIMEOUT + STANDSTILL
                if not stood_still:
                    self._complain(address, error)
            else:
                self._silent.discard(address)

    async def _take_over(self, address: str) -> bool:
        """Some of what it keeps; returns whether there is more."""
        process, last = self._places.get(address, ("", 0))
        request = api.PendingRequest(process, last)
        deadline = trio.current_time() + ASK_TIMEOUT
        reply = await self._peers.insist(address, api.PENDING, request, deadline)
        if address not in self._peers.own:
            await self._journal.take(reply.changes)
        self._places[address] = reply.process, reply.last
        return reply.more

    def _complain(self, address: str, error: SwarmpullError) -> None:
        if address not in self._silent:
            self._silent.add(address)
            log.warning("index_journal_not_loaded", index=address, reason=str(error))
