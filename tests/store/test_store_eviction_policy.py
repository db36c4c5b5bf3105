"""What goes, what stays and in which order, decided without a disk."""

from __future__ import annotations

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmpull.digest import Digest
from swarmpull.store.eviction import (
    NEVER,
    UNLIMITED,
    Entry,
    Kind,
    Limits,
    Reason,
    Removal,
    plan,
)

NOW = 1_000_000.0


def digest(number: int) -> Digest:
    return Digest.parse(f"sha256:{number:064x}")


def entry(number: int, size: int = 10, **changes: object) -> Entry:
    made = Entry(digest(number), Kind.BLOB, size, NOW - 100.0, NOW - 100.0)
    return attrs.evolve(made, **changes)


times = st.floats(NOW - 1000, NOW + 100)
entries = st.lists(
    st.builds(
        Entry,
        digest=st.integers(0, 1 << 64).map(digest),
        kind=st.sampled_from(Kind),
        size=st.integers(0, 100),
        set_at=times,
        used_at=times,
        pinned=st.sampled_from(["", "", "reading"]),
    ),
    max_size=20,
    unique_by=lambda made: (made.digest, made.kind),
)
lifetimes = st.one_of(st.just(NEVER), st.floats(1, 1000))
limits = st.builds(
    lambda ttl, idle, partial, high, share: Limits(ttl, idle, partial, high, high * share),
    lifetimes,
    lifetimes,
    lifetimes,
    st.one_of(st.just(UNLIMITED), st.floats(1, 2000)),
    st.floats(0.01, 1),
)
others = st.integers(0, 500)
needs = st.integers(0, 500)
frees = st.one_of(st.just(UNLIMITED), st.floats(0, 500))


def size_of(found: list[Entry]) -> int:
    return sum(each.size for each in found)


def room(removals: list[Removal]) -> list[Entry]:
    return [removal.entry for removal in removals if removal.reason is Reason.ROOM]


@given(entries, limits, others, needs, frees)
def test_what_is_pinned_stays_and_nothing_goes_twice(found, limit, other, needed, free) -> None:
    removals = plan(found, limit, NOW, others=other, needed=needed, free=free)

    assert not any(removal.entry.pinned for removal in removals)
    assert len({(r.entry.digest, r.entry.kind) for r in removals}) == len(removals)


@given(entries, limits, others)
def test_above_the_high_watermark_it_ends_below_the_low_one_if_it_can(found, limit, other) -> None:
    removals = plan(found, limit, NOW, others=other)

    gone = [removal.entry for removal in removals]
    left = other + size_of(found) - size_of(gone)
    fixed = other + size_of([each for each in found if each.pinned])
    if room(removals) and fixed <= limit.low:
        assert left <= limit.low
    if fixed <= limit.high:
        assert left <= limit.high
    else:
        assert left == fixed


@given(entries, limits, others)
def test_below_the_high_watermark_only_what_has_expired_goes(found, limit, other) -> None:
    if other + size_of(found) > limit.high:
        limit = attrs.evolve(limit, high=UNLIMITED, low=UNLIMITED)

    for removal in plan(found, limit, NOW, others=other):
        gone = removal.entry
        if gone.kind is Kind.PARTIAL:
            assert removal.reason is Reason.ABANDONED
            assert NOW - gone.used_at > limit.partial_ttl
        else:
            assert removal.reason in (Reason.TTL, Reason.IDLE)
            assert NOW - gone.set_at > limit.ttl or NOW - gone.used_at > limit.idle_timeout


@given(entries, limits)
def test_whatever_has_expired_and_is_not_pinned_goes_first(found, limit) -> None:
    reasons = [removal.reason for removal in plan(found, limit, NOW)]
    expired = {removal.entry for removal in plan(found, attrs.evolve(limit, high=UNLIMITED), NOW)}

    assert reasons == sorted(reasons, key=lambda reason: reason is Reason.ROOM)
    for each in found:
        too_old = each.age(NOW) > limit.ttl or each.idle(NOW) > limit.idle_timeout
        if each.kind is Kind.BLOB and not each.pinned and too_old:
            assert each in expired


@given(entries, limits, needs, frees)
def test_what_was_used_last_stays_longest(found, limit, needed, free) -> None:
    removals = plan(found, limit, NOW, needed=needed, free=free)

    gone = room(removals)
    assert gone == sorted(gone, key=lambda each: -each.idle(NOW))
    removed = {removal.entry for removal in removals}
    for each in found:
        if gone and not each.pinned and each.size and each not in removed:
            assert each.idle(NOW) <= gone[-1].idle(NOW)


@given(entries, limits, others, needs, frees)
def test_room_is_made_whole_or_not_at_all(found, limit, other, needed, free) -> None:
    removals = plan(found, limit, NOW, others=other, needed=needed, free=free)

    freed = size_of([removal.entry for removal in removals])
    fits = (
        other + needed + size_of(found) - freed <= limit.high + 1e-6
        and needed <= free + freed + 1e-6
    )
    assert fits or not needed or not room(removals)


def test_no_more_goes_than_is_needed() -> None:
    found = [entry(number, used_at=NOW - number) for number in range(10)]

    removals = plan(found, Limits(high=95, low=60), NOW)

    assert room(removals) == [found[9], found[8], found[7], found[6]]
    assert plan(found, Limits(high=100, low=60), NOW) == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"set_at": NOW - 51}, Reason.TTL),
        ({"set_at": NOW - 49, "used_at": NOW - 21}, Reason.IDLE),
        ({"set_at": NOW - 49, "used_at": NOW - 19}, None),
        ({"set_at": NOW - 999, "used_at": NOW - 999, "pinned": "reading"}, None),
        ({"kind": Kind.PARTIAL, "set_at": NOW - 999, "used_at": NOW - 9}, None),
        ({"kind": Kind.PARTIAL, "used_at": NOW - 11}, Reason.ABANDONED),
        ({"set_at": NOW + 999, "used_at": NOW + 999}, None),
    ],
)
def test_each_lifetime_counts_from_its_own_moment(changes, reason) -> None:
    limit = Limits(ttl=50, idle_timeout=20, partial_ttl=10)

    removals = plan([entry(1, **changes)], limit, NOW)

    assert [removal.reason for removal in removals] == ([reason] if reason else [])


def test_a_full_disk_evicts_although_the_store_is_small() -> None:
    found = [entry(1, used_at=NOW - 2), entry(2, used_at=NOW - 1)]

    assert room(plan(found, Limits(), NOW, needed=15, free=8)) == [found[0]]
    assert plan(found, Limits(), NOW, needed=30, free=8) == []
    assert plan(found, Limits(), NOW, needed=8, free=8) == []
