"""Calls of a ring: the members that own a key are tried in order, and one that hangs is not waited for long.

An answer is also an error that says something about what was asked for (`BlobNotFound`); only a member that
does not answer at all is passed over, and remembered as failing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, Generic, TypeVar

import attrs
import structlog
import trio

from swarmpull.errors import RpcUnavailable, SwarmpullError
from swarmpull.ring.health import HealthLimits
from swarmpull.ring.hedging import HedgeLimits, Hedging, Race
from swarmpull.ring.membership import Membership
from swarmpull.wire import api
from swarmpull.wire.rpc import Method, RpcPool

log = structlog.get_logger()

Req = TypeVar("Req")
Rep = TypeVar("Rep")

# A call that changes something goes on for so many seconds after its member fell: done twice does no
# harm, but is better avoided when a process was only stopped for a moment.
WRITE_PATIENCE: Final = 5.0
# How long the failures of a member count that is probed, in seconds: longer than it takes from probe to
# probe.
PROBED_HEALTH: Final = HealthLimits(expiry=30.0)


def open_ring(
    pool: RpcPool, entries: tuple[str, ...], name: str, weights: dict[str, float] | None = None
) -> Membership:
    """The members of a ring, probed through the pool while `Membership.run` is at work."""
    return Membership(
        entries, name=name, weights=weights, health=PROBED_HEALTH, probe=partial(_ping, pool)
    )


async def _ping(pool: RpcPool, address: str, timeout: float) -> None:
    try:
        await pool.call(address, api.PING, api.Empty(), timeout=timeout)
    except RpcUnavailable:
        raise
    except SwarmpullError:
        # An answer, of a role that does not know the method.
        return


class RingClient:
    """Calls the members of one ring.

    ``name`` says in errors which ring it is: tracker, origin, index; that of ``members`` by default.

    Attributes:
        on_lookup: is called for each `look_up`.
        on_hedge: is told one of `HEDGES` for a second member that a lookup is asked of: it is sent, has won,
            or is refused because there were too many.
    """

    HEDGES: Final = ("sent", "won", "refused")

    def __init__(self, pool: RpcPool, members: Membership, name: str | None = None) -> None:
        self._pool = pool
        self.members = members
        self.name = name or members.name
        self._hedging = Hedging(HedgeLimits())
        self.on_lookup: Callable[[], None] = _nothing
        self.on_hedge: Callable[[str], None] = _nothing

    def when_lost(self, tell: Callable[[str], None]) -> None:
        """Call ``tell(address)`` whenever a member that we are connected to went away; see `RpcPool`."""
        self._pool.when_lost(tell)

    async def call(
        self,
        key: str,
        method: Method[Req, Rep],
        request: Req,
        *,
        timeout: float,
        patience: float = WRITE_PATIENCE,
        unable: tuple[type[SwarmpullError], ...] = (),
    ) -> Rep:
        """Call the first member that answers, in the order that the ring has for ``key``.

        ``timeout`` is in seconds and for each member: a call of a ring whose hosts are all silent takes
        as often that.  A member that is found to hang is given up sooner, ``patience`` seconds later.  One
        that did not answer may have done what was asked.

        ``unable`` are errors that say something about the member, such as a full disk, and not about what was
        asked for: the next one is tried, and the first of them is raised when nobody could do it.

        Raises:
            RpcUnavailable: no member answered; the reason has what each of them failed with.
            RpcFailed: a member failed in a way that has no type.
            SwarmpullError: the errors of the method.
        """
        _, reply = await self.call_member(
            key, method, request, timeout=timeout, patience=patience, unable=unable
        )
        return reply

    async def call_member(
        self,
        key: str,
        method: Method[Req, Rep],
        request: Req,
        *,
        timeout: float,
        patience: float = 0.0,
        order: Sequence[str] | None = None,
        unable: tuple[type[SwarmpullError], ...] = (),
    ) -> tuple[str, Rep]:
        """The same as `call`, with the address of the member that answered before its reply.

        ``order``: those to be tried, when it is not that of the ring.
        """
        failures: dict[str, str] = {}
        refusal: SwarmpullError | None = None
        for address in self.members.order(key) if order is None else order:
            try:
                reply = await self._ask(address, method, request, timeout, patience)
            except RpcUnavailable as exc:
                log.info("rpc_member_passed_over", method=method.name, key=key, error=str(exc))
                failures[address] = exc.reason
            except unable as exc:
                log.info("rpc_member_unable", method=method.name, member=address, error=str(exc))
                refusal = refusal or exc
            else:
                return address, reply
        if refusal is not None:
            raise refusal
        raise self._nobody_answered(method.name, failures)

    async def look_up(
        self,
        key: str,
        method: Method[Req, Rep],
        request: Req,
        *,
        timeout: float,
    ) -> tuple[str, Rep]:
        """Like `call_member`, for what changes nothing and each member can answer.

        When the first member takes longer than usual the next one is asked too, and the first reply wins; the
        other calls are cancelled.  An error counts only when no member before that one is still being asked.
        """
        order = self.members.order(key, pass_suspects=True)
        lookup = _Lookup[Rep](Race(order, self._hedging.delay(method.name)))
        self._hedging.begun()
        self.on_lookup()
        hedged: set[str] = set()

        async def ask(address: str) -> None:
            begun_at = trio.current_time()
            try:
                reply = await self._ask(address, method, request, timeout, 0.0)
            except RpcUnavailable as exc:
                log.info("rpc_member_passed_over", method=method.name, key=key, error=str(exc))
                lookup.failed(address, exc)
            except SwarmpullError as exc:
                lookup.refused(address, exc)
            else:
                self._hedging.answered(method.name, trio.current_time() - begun_at)
                lookup.replied(address, reply)

        async with trio.open_nursery() as nursery:
            while not lookup.race.is_over:
                address = lookup.race.next(trio.current_time(), self._may_hedge)
                if address is not None:
                    for late in lookup.race.waited_for(address):
                        hedged.add(address)
                        self.members.suspect(late)
                    nursery.start_soon(ask, address)
                await lookup.wait()
            nursery.cancel_scope.cancel()
        if lookup.race.winner is None:
            raise self._nobody_answered(method.name, lookup.failures)
        if lookup.race.winner in hedged:
            self.on_hedge("won")
        return lookup.outcome(lookup.race.winner)

    def _may_hedge(self) -> bool:
        allowed = self._hedging.may_hedge()
        self.on_hedge("sent" if allowed else "refused")
        return allowed

    async def call_first(
        self,
        key: str,
        method: Method[Req, Rep],
        request: Req,
        *,
        timeout: float,
        at: str | None = None,
    ) -> Rep:
        """Call only the member that is asked first for ``key``, or the one ``at`` an address.

        For calls that wait for long: many of them end at once when their connection does, which says no more
        about the member than one failure, and that the next ordinary call will find out.  When the member is
        found to hang they end too.

        Raises:
            RpcUnavailable: it did not answer within ``timeout`` seconds, or does not answer of late.
            RpcFailed: it failed in a way that has no type, or does not know the method.
            SwarmpullError: the errors of the method.
        """
        order = self.members.order(key)
        if not order:
            raise self._nobody_answered(method.name, {})
        ill = self.members.unhealthy()
        address = at if at in order and at not in ill else order[0]
        if address in ill:
            raise _hung(address, method)
        with self.members.calling(address, suspect=False, patience=0.0):
            return await self._pool.call(address, method, request, timeout=timeout)
        raise _hung(address, method)

    async def _ask(
        self,
        address: str,
        method: Method[Req, Rep],
        request: Req,
        timeout: float,
        patience: float,
    ) -> Rep:
        return await ask_member(
            self.members, self._pool, address, method, request, timeout=timeout, patience=patience
        )

    def _nobody_answered(self, method: str, failures: dict[str, str]) -> RpcUnavailable:
        where = f"{self.name} ring ({', '.join(failures or self.members.entries)})"
        if not failures:
            return RpcUnavailable(
                where, method, f"no {self.name} is known: configure or resolve one"
            )
        tried = "; ".join(f"{address}: {reason}" for address, reason in failures.items())
        return RpcUnavailable(where, method, f"no member answered: {tried}")


async def ask_member(
    members: Membership,
    pool: RpcPool,
    address: str,
    method: Method[Req, Rep],
    request: Req,
    *,
    timeout: float,
    patience: float,
) -> Rep:
    """Call one member, and let the ring know what came of it.

    Raises:
        RpcUnavailable: it did not answer within ``timeout`` seconds, or others found out that it hangs.
        SwarmpullError: the errors of the method.
    """
    with members.calling(address, patience=patience):
        try:
            reply = await pool.call(address, method, request, timeout=timeout)
        except RpcUnavailable as exc:
            members.record_failure(address, exc.reason)
            raise
        except SwarmpullError:
            members.record_success(address)
            raise
        members.record_success(address)
        return reply
    # Others have found out, and recorded it.
    raise _hung(address, method)


def _nothing(*_: object) -> None:
    """Nobody counts."""


def _hung(address: str, method: Method[Req, Rep]) -> RpcUnavailable:
    return RpcUnavailable(address, method.name, "it answers nothing any more")


@attrs.define(eq=False)
class _Lookup(Generic[Rep]):
    """A race, and what its runners have brought."""

    race: Race
    failures: dict[str, str] = attrs.Factory(dict)
    _replies: dict[str, Rep] = attrs.Factory(dict)
    _errors: dict[str, SwarmpullError] = attrs.Factory(dict)
    _happened: trio.Event = attrs.Factory(trio.Event)

    def replied(self, address: str, reply: Rep) -> None:
        self._replies[address] = reply
        self.race.answered(address)
        self._happened.set()

    def refused(self, address: str, error: SwarmpullError) -> None:
        self._errors[address] = error
        self.race.refused(address)
        self._happened.set()

    def failed(self, address: str, error: RpcUnavailable) -> None:
        self.failures[address] = error.reason
        self.race.failed(address)
        self._happened.set()

    async def wait(self) -> None:
        """Return when something has happened, or one more member may be asked."""
        with trio.move_on_at(self.race.next_time()):
            await self._happened.wait()
        self._happened = trio.Event()

    def outcome(self, address: str) -> tuple[str, Rep]:
        """The reply of a member.  Raises what it raised."""
        if address in self._errors:
            raise self._errors[address]
        return address, self._replies[address]
