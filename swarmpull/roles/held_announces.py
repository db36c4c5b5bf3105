"""Announces of many blobs in one message: how they are told to the trackers, and what comes of each blob.

The blobs of a host belong to a few trackers, and a host has hundreds of them: one message to each tracker
takes the place of one for each blob.  A tracker that does not know the message gets an announce for each.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Final

import structlog
import trio

from swarmpull.digest import Digest
from swarmpull.errors import RpcFailed, RpcUnavailable, SwarmpullError
from swarmpull.ring.announced import Announced
from swarmpull.roles.ring_client import RingClient
from swarmpull.swarm.metainfo import Metainfo
from swarmpull.swarm.peers import AnnounceState, PeerContact
from swarmpull.wire import api
from swarmpull.wire.api import AnnounceReply, AnnounceRequest

log = structlog.get_logger()

# Announces of single blobs to one tracker that does not know the message, at the same time.
SINGLE_MAX: Final = 16

# Takes the answer about one blob; None when no tracker answered.
Told = Callable[[Digest, AnnounceReply | None], None]


class HeldAnnounces:
    """Tells the trackers of all blobs that a host has.

    Args:
        ring: the trackers.
        announced: where what was announced.
        announce: announces a single blob.
        timeout: for each tracker, in seconds.
        on_anew: is called with a tracker and the other blobs that have to be announced there anew, when it
            turns out to have been restarted.

    Attributes:
        metainfo_of: gives the metainfo of a blob that this host has, for trackers that no origin gives it to;
            None to give nothing.
    """

    def __init__(
        self,
        ring: RingClient,
        announced: Announced,
        announce: Callable[[AnnounceRequest], Awaitable[AnnounceReply]],
        timeout: float,
        on_anew: Callable[[str, tuple[Digest, ...]], None],
    ) -> None:
        self.metainfo_of: Callable[[Digest], Awaitable[Metainfo]] | None = None
        self._ring = ring
        self._announced = announced
        self._announce = announce
        self._timeout = timeout
        self._on_anew = on_anew
        # Those that do not know the message, until they are lost.
        self._old: set[str] = set()
        ring.when_lost(self._old.discard)

    async def announce(self, contact: PeerContact, digests: Sequence[Digest], told: Told) -> None:
        """Announce blobs that this host has, each to its tracker, or to the next one while that is down.

        ``told`` is called once for each blob, as soon as it is known what came of it.
        """
        async with trio.open_nursery() as nursery:
            for address, group in self._groups(digests, ()):
                nursery.start_soon(self._tell, address, contact, group, told, (address,))

    def _groups(
        self, digests: Iterable[Digest], tried: Sequence[str]
    ) -> Iterator[tuple[str | None, tuple[Digest, ...]]]:
        """Blobs that go to the same tracker, not too many at a time; None for those that have none left."""
        groups: dict[str | None, list[Digest]] = {}
        for digest in digests:
            order = self._ring.members.order(str(digest))
            address = next((each for each in order if each not in tried), None)
            groups.setdefault(address, []).append(digest)
        for address, group in groups.items():
            for begin in range(0, len(group), api.HELD_BLOBS_MAX):
                yield address, tuple(group[begin : begin + api.HELD_BLOBS_MAX])

    async def _tell(
        self,
        address: str | None,
        contact: PeerContact,
        digests: tuple[Digest, ...],
        told: Told,
        tried: tuple[str | None, ...],
    ) -> None:
        if address is None:
            for digest in digests:
                told(digest, None)
            return
        if address in self._old:
            await self._tell_singly(contact, digests, told)
            return
        request = api.AnnounceHeldRequest(contact, digests)
        try:
            _, reply = await self._ring.call_member(
                str(digests[0]),
                api.ANNOUNCE_HELD,
                request,
                timeout=self._timeout,
                order=[address],
            )
        except RpcUnavailable:
            addresses = tuple(each for each in tried if each is not None)
            for other, group in self._groups(digests, addresses):
                await self._tell(other, contact, group, told, (*tried, other))
        except RpcFailed as error:
            log.info("tracker_takes_single_announces", tracker=address, reason=str(error))
            self._old.add(address)
            await self._tell_singly(contact, digests, told)
        else:
            self._taken(address, digests, reply, told)
            for digest in {*reply.wanted} & {*digests}:
                await self.give_metainfo(address, digest)

    def _taken(
        self,
        address: str,
        digests: tuple[Digest, ...],
        reply: api.AnnounceHeldReply,
        told: Told,
    ) -> None:
        anew = self._announced.answered_by(digests[0], address, reply.process)
        leechers = {each.digest: each.peers for each in reply.leechers}
        for digest in digests:
            preferred = self._ring.members.preference(str(digest))
            self._announced.put(digest, address, preferred, None, complete=True)
            peers = leechers.get(digest, ())
            told(digest, AnnounceReply(peers, reply.interval, process=reply.process))
        if others := tuple(each for each in anew if each not in set(digests)):
            self._on_anew(address, others)

    async def give_metainfo(self, address: str, digest: Digest) -> None:
        """Give a tracker the metainfo of a blob that it wants, if this host has it."""
        if self.metainfo_of is None:
            return
        try:
            request = api.GiveMetainfoRequest(await self.metainfo_of(digest))
            await self._ring.call_member(
                str(digest), api.GIVE_METAINFO, request, timeout=self._timeout, order=[address]
            )
        except SwarmpullError as error:
            log.info("metainfo_not_given", digest=str(digest), tracker=address, reason=str(error))

    async def _tell_singly(
        self, contact: PeerContact, digests: tuple[Digest, ...], told: Told
    ) -> None:
        limiter = trio.CapacityLimiter(SINGLE_MAX)
        async with trio.open_nursery() as nursery:
            for digest in digests:
                nursery.start_soon(partial(self._tell_one, limiter, contact, digest, told))

    async def _tell_one(
        self, limiter: trio.CapacityLimiter, contact: PeerContact, digest: Digest, told: Told
    ) -> None:
        # Who is complete is told of leechers whatever the repository.
        request = AnnounceRequest(digest, "", contact, AnnounceState.COMPLETE)
        try:
            async with limiter:
                reply = await self._announce(request)
        except SwarmpullError as error:
            log.info("announce_failed", digest=str(digest), reason=str(error))
            told(digest, None)
        else:
            told(digest, reply)
