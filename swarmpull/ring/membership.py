"""The members of a ring: a fixed list, or what a DNS name resolves to just now."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import attrs
import structlog
import trio

from swarmpull.ring import rendezvous
from swarmpull.ring.health import HealthLimits, HealthTable

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


class Membership:
    """The members of one ring, ordered for a key by rendezvous hashing and by health.

    Entries are ``host:port``, which are members as they stand, or ``dns+name:port``, of which every
    address is a member.  The latter need `run` in some nursery; until a name has resolved it has no
    members, and when it no longer resolves its last members stay.
    """

    def __init__(
        self,
        entries: Iterable[str],
        *,
        name: str,
        weights: Mapping[str, float] | None = None,
        health: HealthLimits | None = None,
        interval: float = RESOLVE_INTERVAL,
    ) -> None:
        """``name`` says in logs and errors which ring this is; ``interval`` is in seconds.

        Raises:
            ValueError: for a ``dns+`` entry without a name or a port.
        """
        entries = tuple(entries)
        self.name = name
        self._static = tuple(entry for entry in entries if not entry.startswith(DNS_PREFIX))
        self._names = tuple(_Name.parse(entry) for entry in entries if entry.startswith(DNS_PREFIX))
        self._weights = weights
        self._interval = interval
        self._resolved: dict[_Name, tuple[str, ...]] = {}
        self._members = tuple(sorted(set(self._static)))
        self._health = HealthTable(health if health is not None else HealthLimits())

    @property
    def members(self) -> tuple[str, ...]:
        """All members as ``host:port``, sorted, whatever their health."""
        return self._members

    @property
    def entries(self) -> tuple[str, ...]:
        """What was configured."""
        return (*self._static, *map(str, self._names))

    def order(self, key: str) -> list[str]:
        """All members, to be tried in this order: by preference for the key, the unhealthy last."""
        preferred = rendezvous.order(key, self.members, weights=self._weights)
        return self._health.arrange(preferred, trio.current_time())

    def unhealthy(self) -> tuple[str, ...]:
        """The members that are tried last for the time being."""
        now = trio.current_time()
        return tuple(member for member in self.members if not self._health.is_healthy(member, now))

    def record_failure(self, member: str, reason: str) -> None:
        """A call to this member got no answer."""
        if self._health.record_failure(member, trio.current_time()):
            log.warning("ring_member_unhealthy", ring=self.name, member=member, reason=reason)

    def record_success(self, member: str) -> None:
        """This member answered a call, be it with an error."""
        if self._health.record_success(member, trio.current_time()):
            log.info("ring_member_healthy", ring=self.name, member=member)

    async def run(
        self, *, task_status: trio.TaskStatus[tuple[str, ...]] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Resolve names until cancelled; started with the members once each was tried.

        Returns at once when no entry is a name.
        """
        await self._resolve_all()
        task_status.started(self.members)
        while self._names:
            missing = any(name not in self._resolved for name in self._names)
            await trio.sleep(min(RETRY_INTERVAL, self._interval) if missing else self._interval)
            await self._resolve_all()

    async def _resolve_all(self) -> None:
        async with trio.open_nursery() as nursery:
            for name in self._names:
                nursery.start_soon(self._resolve, name)
        resolved = (member for members in self._resolved.values() for member in members)
        members = tuple(sorted({*self._static, *resolved}))
        if members != self._members:
            self._members = members
            self._health.retain(members)
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


def _members_of(addresses: Iterable[Sequence[object]]) -> tuple[str, ...]:
    """``host:port`` of socket addresses, IPv6 hosts in brackets, each once, sorted."""
    texts = set()
    for host, port, *_ in addresses:
        texts.add(f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}")
    return tuple(sorted(texts))
