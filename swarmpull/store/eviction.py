"""Which blobs a store removes, and why: a pure function of what it holds, its limits and the time.

What is pinned is never removed.  What has expired goes first; then, once the files of the store pass the
high watermark, or what comes next does not fit on the disk, the least recently used until they are below
the low one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from enum import Enum
from typing import Final

import attrs

from swarmpull.digest import Digest

NEVER: Final = math.inf
UNLIMITED: Final = math.inf


class Kind(Enum):
    """What the files of a store are.  The values are those of metrics and of ``swarmpull store ls``."""

    BLOB = "blob"
    PARTIAL = "partial"


class Reason(Enum):
    """Why something is removed.  The values are those of logs and metrics."""

    TTL = "ttl"
    IDLE = "idle"
    ABANDONED = "abandoned"
    ROOM = "room"


@attrs.frozen
class Limits:
    """The limits of one store; without arguments there are none.

    Attributes:
        ttl: seconds since a blob was set after which it expires.
        idle_timeout: the same since it was last used.
        partial_ttl: the same for a partial since its last piece.
        high: bytes of the store's own files that it may have; above, blobs are evicted.
        low: bytes until which they are then evicted; never above ``high``.
        key: the configuration key of ``high``, for those who run into it; empty if there is none.
    """

    ttl: float = NEVER
    idle_timeout: float = NEVER
    partial_ttl: float = NEVER
    high: float = UNLIMITED
    low: float = UNLIMITED
    key: str = ""


@attrs.frozen
class Entry:
    """A blob or partial as the policy sees it; times are in seconds since the epoch.

    Attributes:
        size: bytes that its removal frees.
        set_at: when it got into the store.
        used_at: when it was last read; of a partial, when its last piece was stored.
        pinned: why it must stay; empty when it may go.
    """

    digest: Digest
    kind: Kind
    size: int
    set_at: float
    used_at: float
    pinned: str = ""

    def age(self, now: float) -> float:
        """Seconds since it was set.  A clock that went back makes nothing older: at least 0."""
        return max(0.0, now - self.set_at)

    def idle(self, now: float) -> float:
        """Seconds since it was used; at least 0."""
        return max(0.0, now - self.used_at)


@attrs.frozen
class Removal:
    """What is to be removed, and why."""

    entry: Entry
    reason: Reason


def plan(
    entries: Iterable[Entry],
    limits: Limits,
    now: float,
    *,
    others: int = 0,
    needed: int = 0,
    free: float = UNLIMITED,
) -> list[Removal]:
    """What to remove, in this order.

    Args:
        others: bytes of the store that are not among the entries and stay.
        needed: bytes that somebody waits to add.  When removing everything that may go would not make room
            for them, nothing is removed on their account.
        free: bytes that are free on the disk.
    """
    expired: list[Removal] = []
    left: list[Entry] = []
    total, freed, evictable = others + needed, 0, 0
    for entry in entries:
        reason = None if entry.pinned else _expiry(entry, limits, now)
        if reason is not None:
            expired.append(Removal(entry, reason))
            freed += entry.size
            continue
        total += entry.size
        if not entry.pinned:
            left.append(entry)
            evictable += entry.size
    expired.sort(key=lambda removal: removal.entry.used_at)
    goal = _goal(total, limits, evictable, needed, free + freed)
    # The order of thousands is for those rounds only in which it matters.
    if goal > 0:
        left.sort(key=lambda entry: (-entry.idle(now), -entry.age(now)))
    return [*expired, *(Removal(entry, Reason.ROOM) for entry in _until(left, goal))]


def _expiry(entry: Entry, limits: Limits, now: float) -> Reason | None:
    if entry.kind is Kind.PARTIAL:
        return Reason.ABANDONED if entry.idle(now) > limits.partial_ttl else None
    if entry.age(now) > limits.ttl:
        return Reason.TTL
    return Reason.IDLE if entry.idle(now) > limits.idle_timeout else None


def _goal(total: int, limits: Limits, evictable: int, needed: int, free: float) -> float:
    """How many bytes to evict: to the low watermark if that can be reached, else what must be."""
    required = max(total - limits.high, needed - free if needed else 0)
    if required <= 0:
        return 0
    wanted = max(required, total - limits.low if total > limits.high else 0)
    if wanted <= evictable:
        return wanted
    if required <= evictable:
        return required
    return 0 if needed else evictable


def _until(entries: Iterable[Entry], goal: float) -> Iterator[Entry]:
    for entry in entries:
        if goal <= 0:
            return
        if entry.size:
            goal -= entry.size
            yield entry
