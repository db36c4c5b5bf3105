"""The other indexes of the cluster, as one that changes something needs them."""

from __future__ import annotations

import math
import time
import uuid
from typing import Final, Protocol, TypeVar

import structlog
import trio

from swarmpull.digest import Digest
from swarmpull.errors import RpcUnavailable, SwarmpullError
from swarmpull.ring.membership import Membership
from swarmpull.roles.index_cache import ResolveCache
from swarmpull.roles.own_addresses import OwnAddresses
from swarmpull.wire import api
from swarmpull.wire.listen import parse_address
from swarmpull.wire.rpc import Method, RpcPool

log = structlog.get_logger()

Req = TypeVar("Req")


class _Tells(Protocol):
    """A reply that names the process of the callee."""

    @property
    def process(self) -> str: ...


Told = TypeVar("Told", bound=_Tells)

# Two clocks that both run at their own speed.
MARGIN: Final = 1.05
# For a member to drop something from its journal, in seconds.
PATIENCE: Final = 1.0
# Until a member that does not answer is tried once more, in seconds.
PAUSE: Final = 0.05
# Seconds between two lines in the log about a member that does not answer.
LOG_INTERVAL: Final = 60.0


class IndexGone(RpcUnavailable):
    """The address of an index refuses connections."""


class IndexPeers:
    """Tells the other indexes what they have to forget.

    Attributes:
        process: names this process among the indexes; made anew at each start.
        own: the members that are this process.
        members: the indexes of the cluster, with this one.
    """

    def __init__(self, pool: RpcPool, members: Membership, cache: ResolveCache) -> None:
        self.process = uuid.uuid4().hex
        self.members = members
        self._pool = pool
        self._cache = cache
        self._lease = cache.lease
        self.own = OwnAddresses()
        self._logged_at = -math.inf

    @property
    def others(self) -> list[str]:
        """The members that are not known to be this process."""
        return [each for each in self.members.members if each not in self.own]

    def forget(self, request: api.ForgetRequest) -> api.ForgetReply:
        """What another index asks for."""
        self._cache.forget(request.repository, request.references)
        return api.ForgetReply(self.process)

    async def spread(
        self, repository: str, references: tuple[str, ...] = (), *, is_direct: bool = False
    ) -> None:
        """Return when no index keeps what these references were before; see `ResolveCache.forget`.

        A member that answers has dropped it, one whose address refuses connections keeps nothing, and for one
        that is silent its lease is waited for.
        """
        self._cache.forget(repository, references)
        patience = self._lease * MARGIN
        if not patience:
            return
        if self.members.members:
            request = api.ForgetRequest(repository, references, is_direct=is_direct)
            await self._tell_all(request, patience)
        else:
            # Their names could not be resolved yet.
            await trio.sleep(patience)

    async def drop(
        self,
        repository: str,
        *,
        manifest: Digest | None = None,
        blob: Digest | None = None,
        at: int | None = None,
    ) -> None:
        """Return when no journal of an index that answers has, or is writing, what is to be deleted.

        The deletion is recorded already, so journals of those that are silent find it.  It was made ``at``,
        in ns, or now.
        """
        at = time.time_ns() if at is None else at
        request = api.ForgetRequest(repository, (), manifest, blob, at)
        await self._tell_all(request, PATIENCE)

    async def _tell_all(self, request: api.ForgetRequest, patience: float) -> None:
        others = self.others
        if len(others) == 1:
            await self._tell(others[0], request, patience)
            return
        async with trio.open_nursery() as nursery:
            for address in others:
                nursery.start_soon(self._tell, address, request, patience)

    async def call(
        self, address: str, method: Method[Req, Told], request: Req, *, timeout: float
    ) -> Told:
        """Call one of the others, and notice when it is this process.

        Raises RpcUnavailable, and the errors of the method.
        """
        reply = await self._pool.call(address, method, request, timeout=timeout)
        if reply.process == self.process:
            self.own.add(address)
        return reply

    async def insist(
        self, address: str, method: Method[Req, Told], request: Req, deadline: float
    ) -> Told:
        """Call one of the others until it answers.

        Raises:
            RpcUnavailable: it has not by ``deadline``; ``asked`` if one of the attempts may have reached it.
            IndexGone: nobody listens there: a process that ended, and what it had in memory with it.
            SwarmpullError: the errors of the method.
        """
        failure = RpcUnavailable(address, method.name, "no answer")
        asked = False
        with trio.move_on_at(deadline):
            while True:
                # Whoever is cancelled in the call cannot tell.
                was_asked, asked = asked, True
                try:
                    left = deadline - trio.current_time()
                    return await self.call(address, method, request, timeout=left)
                except RpcUnavailable as error:
                    failure = error
                    asked = was_asked or error.asked
                if await _is_refused(address):
                    raise IndexGone(address, method.name, failure.reason, asked) from failure
                await trio.sleep(PAUSE)
        raise RpcUnavailable(address, method.name, failure.reason, asked) from failure

    async def _tell(self, address: str, request: api.ForgetRequest, patience: float) -> None:
        try:
            await self.insist(address, api.FORGET, request, trio.current_time() + patience)
        except IndexGone:
            return  # and it keeps nothing
        except RpcUnavailable as error:
            self._complain(address, error.reason, patience)
        except SwarmpullError:
            return  # of a version that keeps nothing

    def _complain(self, address: str, reason: str, patience: float) -> None:
        now = trio.current_time()
        if now - self._logged_at > LOG_INTERVAL:
            self._logged_at = now
            log.warning(
                "index_silent",
                index=address,
                reason=reason,
                waited=round(patience, 2),
            )


async def _is_refused(address: str) -> bool:
    """Whether nobody listens there."""
    host, port = parse_address(address)
    try:
        targets = await trio.socket.getaddrinfo(host, port, type=trio.socket.SOCK_STREAM)
    except OSError:
        return False
    return all([await _refuses(*target) for target in targets])


async def _refuses(family: int, kind: int, protocol: int, _name: str, target: object) -> bool:
    with trio.socket.socket(family, kind, protocol) as attempt:
        try:
            await attempt.connect(target)
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return False
