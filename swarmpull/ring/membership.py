"""The members of a ring: a fixed list, or what a DNS name resolves to just now; and how they are.

Whoever calls a member says so (`Membership.calling`), and what came of it.  Out of that, and of probes of
those that seem to be ill, comes the order in which members are tried.
"""

from __future__ import annotations

import math
import random
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Final

import attrs
import structlog
import trio

from swarmpull.errors import RpcUnavailable
from swarmpull.ring import rendezvous
from swarmpull.ring.health import HealthLimits, HealthTable
from swarmpull.ring.probing import ProbeLimits, Probing

log = structlog.get_logger()

DNS_PREFIX: Final = "dns+"
# What a name resolves to changes when hosts are added or replaced; half a minute is soon enough for
# that, and a resolver does not feel it.
RESOLVE_INTERVAL: Final = 30.0
# While a name has never resolved the ring is without these members: ask again soon.
RETRY_INTERVAL: Final = 2.0
# resolv.conf(5): two attempts of 5 s each at one server.
RESOLVE_TIMEOUT: Final = 10.0
# More addresses than a name of a ring has; the others are ignored, with a line in the log.
MEMBERS_PER_NAME_MAX: Final = 256
# How often calls under way are looked at, in seconds: a member that hangs is suspected so much later.
LOOK_INTERVAL: Final = 0.25
# A probe that ends so many seconds after its time says more about this process than about the member.
STANDSTILL: Final = 0.1

# Asks a member for any answer; raises RpcUnavailable when there is none within so many seconds.
Probe = Callable[[str, float], Awaitable[None]]


@attrs.frozen
class _Name:
    """``dns+host:port`` of the configuration."""

    host: str
    port: int

    @classmethod
    def parse(cls, entry: str) -> _Name:
        host, _, port = entry.removeprefix(DNS_PREFIX).rpartition(":")
        if not host or not port.isascii() or not port.isdecimal() or int(port) > 65535:
            raise ValueError(f"ring member {entry!r} must be {DNS_PREFIX}name:port")
        return cls(host.removeprefix("[").removesuffix("]"), int(port))

    def __str__(self) -> str:
        return f"{DNS_PREFIX}{self.host}:{self.port}"


@attrs.define(eq=False)
class _Call:
    """A call under way, for the length of a block: when its member becomes a suspect, and what it
    outlasts."""

    member: str
    suspect_at: float
    patience: float
    calls: set[_Call]
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)

    def __enter__(self) -> trio.CancelScope:
        self.calls.add(self)
        return self.scope.__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        self.calls.discard(self)
        return self.scope.__exit__(kind, error, traceback)


class Membership:
    """The members of one ring, ordered for a key by rendezvous hashing and by health.

    Entries are ``host:port``, which are members as they stand, or ``dns+name:port``, of which every
    address is a member.  The latter need `run` in some nursery, and so do probes; until a name has
    resolved it has no members, and when it no longer resolves its last members stay.
    """

    STATES: Final = ("healthy", "suspect", "unhealthy")

    def __init__(
        self,
        entries: Iterable[str],
        *,
        name: str,
        weights: Mapping[str, float] | None = None,
        health: HealthLimits | None = None,
        interval: float = RESOLVE_INTERVAL,
        probe: Probe | None = None,
        probes: ProbeLimits | None = None,
    ) -> None:
        """``name`` says in logs and errors which ring this is; ``interval`` is in seconds.

        Raises:
            ValueError: for a ``dns+`` entry without a name or a port, or a weight that is not positive.
        """
        self.name = name
        self._static, self._names = _parsed(entries)
        self._weights = _checked(weights)
        self._interval = interval
        self._resolved: dict[_Name, tuple[str, ...]] = {}
        self._members = tuple(sorted(set(self._static)))
        self._replaced = trio.Event()
        self._health = HealthTable(health if health is not None else HealthLimits())
        self._probe = probe
        self._probing = Probing(probes or ProbeLimits(), random.Random())
        self._calls: set[_Call] = set()
        self._is_looking = False
        self._wake = trio.Event()
        self._on_change: list[Callable[[str, bool], None]] = []

    @property
    def members(self) -> tuple[str, ...]:
        """All members as ``host:port``, sorted, whatever their health."""
        return self._members

    @property
    def is_complete(self) -> bool:
        """Whether every name has resolved, now or before."""
        return all(name in self._resolved for name in self._names)

    @property
    def entries(self) -> tuple[str, ...]:
        """What was configured."""
        return (*self._static, *map(str, self._names))

    def replace(self, entries: Iterable[str], weights: Mapping[str, float] | None = None) -> None:
        """From now on the ring is of these; what calls are under way goes on.

        With names that have not been resolved before it changes when they are.

        Raises ValueError as the constructor does, and changes nothing then.
        """
        (static, names), weights = _parsed(entries), _checked(weights)
        self._static, self._names, self._weights = static, names, weights
        self._resolved = {name: self._resolved[name] for name in names if name in self._resolved}
        if len(self._resolved) == len(names):
            self._settle()
        self._replaced.set()

    # --- for those who call -------------------------------------------------------------------

    def order(self, key: str, *, pass_suspects: bool = False) -> list[str]:
        """All members, to be tried in this order: by preference for the key, the unhealthy last.

        ``pass_suspects``: those of which it is just being found out come after the healthy ones.
        """
        preferred = self.preference(key)
        now = trio.current_time()
        arranged = self._health.arrange(preferred, now)
        if arranged != preferred:
            self._note_wanted(preferred, arranged[0], now)
        if pass_suspects:
            healthy = [each for each in arranged if self._health.is_healthy(each, now)]
            healthy.sort(key=self._probing.is_patient)
            return healthy + arranged[len(healthy) :]
        return arranged

    def preference(self, key: str) -> list[str]:
        """All members by preference for the key, whatever their health."""
        return rendezvous.order(key, self.members, weights=self._weights)

    def unhealthy(self) -> tuple[str, ...]:
        """The members that are tried last for the time being."""
        now = trio.current_time()
        return tuple(member for member in self.members if not self._health.is_healthy(member, now))

    def states(self) -> dict[str, int]:
        """How many members are in which of `STATES`; a suspect is still called in its turn."""
        now = trio.current_time()
        counts = dict.fromkeys(self.STATES, 0)
        for member in self.members:
            if not self._health.is_healthy(member, now):
                counts["unhealthy"] += 1
            elif self._probing.is_patient(member):
                counts["suspect"] += 1
            else:
                counts["healthy"] += 1
        return counts

    def unhealthy_for(self, member: str) -> float:
        """Seconds since a member became unhealthy; 0 for a healthy one."""
        return self._health.unhealthy_for(member, trio.current_time())

    def when_changed(self, tell: Callable[[str, bool], None]) -> None:
        """Call ``tell(member, healthy)`` whenever a member falls or rises; it must not block."""
        self._on_change.append(tell)

    def calling(
        self, member: str, *, suspect: bool = True, patience: float = math.inf
    ) -> AbstractContextManager[trio.CancelScope, bool]:
        """The block calls a member and waits.

        Args:
            member: which one.
            suspect: whether it is suspected when the block takes long.
            patience: the block is cancelled when the member fell so many seconds ago, by what others saw
                of it; one that was unhealthy before has what time its caller gives it.
        """
        after = self._probing.limits.suspect_after if suspect else math.inf
        if not self._is_looking:
            self._is_looking = True
            self._wake.set()
        return _Call(member, trio.current_time() + after, patience, self._calls)

    def want(self, member: str) -> None:
        """This member would be called were it healthy: it is worth a probe from time to time."""
        now = trio.current_time()
        is_ill = member in self._members and not self._health.is_healthy(member, now)
        if is_ill and self._probing.wanted(member, now):
            self._wake.set()

    def suspect(self, member: str) -> None:
        """A call to this member takes longer than usual."""
        if member in self._members and self._probing.suspect(member, trio.current_time()):
            self._wake.set()

    def record_failure(self, member: str, reason: str) -> None:
        """A call to this member got no answer; of one that has left the ring nothing is kept."""
        if member not in self._members:
            return
        self._failed(member, reason)
        if self._probing.suspect(member, trio.current_time(), failed=True):
            self._wake.set()

    def record_success(self, member: str) -> None:
        """This member answered a call, be it with an error."""
        if self._health.record_success(member, trio.current_time()):
            log.info("ring_member_healthy", ring=self.name, member=member)
            self._changed(member, healthy=True)

    def _failed(self, member: str, reason: str) -> None:
        if self._health.record_failure(member, trio.current_time()):
            log.warning("ring_member_unhealthy", ring=self.name, member=member, reason=reason)
            self._changed(member, healthy=False)

    def _changed(self, member: str, *, healthy: bool) -> None:
        now = trio.current_time()
        for call in self._calls:
            if call.member == member:
                call.scope.deadline = math.inf if healthy else now + call.patience
        for tell in self._on_change:
            tell(member, healthy)

    def _note_wanted(self, preferred: Sequence[str], first: str, now: float) -> None:
        """Those that would have been tried before the first one are worth a probe."""
        for member in preferred:
            if self._health.is_healthy(member, now):
                break
            self.want(member)
            if member == first:
                break

    # --- the work in the background -----------------------------------------------------------

    async def run(
        self, *, task_status: trio.TaskStatus[tuple[str, ...]] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Resolve names and probe members until cancelled; started once each name was tried.

        Returns at once when no entry is a name and nothing is probed.
        """
        await self._resolve_all()
        task_status.started(self.members)
        if self._probe is None and not self._names:
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_resolved)
            if self._probe is not None:
                nursery.start_soon(self._keep_probing, self._probe, nursery)

    async def _keep_probing(self, probe: Probe, nursery: trio.Nursery) -> None:
        while True:
            self._wake = trio.Event()
            now = trio.current_time()
            for call in self._calls:
                if call.suspect_at <= now:
                    self.suspect(call.member)
                    # Again after a while, if it is still not answered.
                    call.suspect_at = now + self._probing.limits.calm_min
            for member in self._probing.take(now):
                nursery.start_soon(self._probe_one, probe, member)
            # Once more after the last call: a wake for each of many short ones would cost more.
            look_at = now + LOOK_INTERVAL if self._calls or self._is_looking else math.inf
            self._is_looking = bool(self._calls)
            with trio.move_on_at(min(self._probing.next_time(), look_at)):
                await self._wake.wait()

    async def _probe_one(self, probe: Probe, member: str) -> None:
        timeout = self._probing.limits.timeout
        begun_at = trio.current_time()
        try:
            await probe(member, timeout)
        except RpcUnavailable as error:
            # Had this process stood still, the answer may have come without being read.
            stood_still = trio.current_time() > begun_at + timeout + STANDSTILL
            if member in self._members and not stood_still:
                self._failed(member, f"probe: {error.reason}")
            end = self._probing.ill
        else:
            self.record_success(member)
            end = self._probing.well
        now = trio.current_time()
        end(member, now, healthy=self._health.is_healthy(member, now))
        self._wake.set()

    async def _keep_resolved(self) -> None:
        while True:
            replaced = self._replaced
            with trio.move_on_after(self._pause()):
                await replaced.wait()
            if replaced.is_set():
                self._replaced = trio.Event()
            await self._resolve_all()

    def _pause(self) -> float:
        if not self._names:
            return math.inf
        return self._interval if self.is_complete else min(RETRY_INTERVAL, self._interval)

    async def _resolve_all(self) -> None:
        async with trio.open_nursery() as nursery:
            for name in self._names:
                nursery.start_soon(self._resolve, name)
        self._settle()

    def _settle(self) -> None:
        resolved = (member for name in self._names for member in self._resolved.get(name, ()))
        members = tuple(sorted({*self._static, *resolved}))
        if members != self._members:
            self._members = members
            self._health.retain(members)
            self._probing.retain(frozenset(members))
            log.info("ring_changed", ring=self.name, members=members)

    async def _resolve(self, name: _Name) -> None:
        try:
            with trio.fail_after(RESOLVE_TIMEOUT):
                answers = await trio.socket.getaddrinfo(
                    name.host, name.port, type=trio.socket.SOCK_STREAM
                )
        except (OSError, UnicodeError, trio.TooSlowError) as exc:
            reason = str(exc) or type(exc).__name__
            log.warning("ring_name_not_resolved", ring=self.name, name=str(name), reason=reason)
            return
        members = _members_of(answer[4] for answer in answers)
        if len(members) > MEMBERS_PER_NAME_MAX:
            log.warning("ring_name_has_too_many_addresses", ring=self.name, name=str(name))
        if members:
            self._resolved[name] = members[:MEMBERS_PER_NAME_MAX]


def _parsed(entries: Iterable[str]) -> tuple[tuple[str, ...], tuple[_Name, ...]]:
    """Members as they stand, and names."""
    entries = tuple(entries)
    static = tuple(entry for entry in entries if not entry.startswith(DNS_PREFIX))
    return static, tuple(_Name.parse(entry) for entry in entries if entry.startswith(DNS_PREFIX))


def _checked(weights: Mapping[str, float] | None) -> Mapping[str, float] | None:
    rendezvous.order("", weights or (), weights=weights)
    return weights or None


def _members_of(addresses: Iterable[Sequence[object]]) -> tuple[str, ...]:
    """``host:port`` of socket addresses, IPv6 hosts in brackets, each once, sorted."""
    texts = set()
    for host, port, *_ in addresses:
        texts.add(f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}")
    return tuple(sorted(texts))
