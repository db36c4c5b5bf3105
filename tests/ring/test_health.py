from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmpull.ring.health import HealthLimits, HealthTable

MEMBERS = ["a", "b", "c"]


def make_table(**limits: float) -> HealthTable:
    return HealthTable(HealthLimits(**limits))  # type: ignore[arg-type]


def test_a_member_that_nothing_is_known_of_is_healthy():
    assert make_table().is_healthy("a", 0.0)


def test_it_takes_as_many_failures_as_the_threshold_says():
    table = make_table(fall=3)

    assert [table.record_failure("a", 0.0) for _ in range(4)] == [False, False, True, False]
    assert not table.is_healthy("a", 0.0)
    assert table.is_healthy("b", 0.0)


def test_a_success_between_failures_starts_the_count_anew():
    table = make_table(fall=3)
    for _ in range(5):
        table.record_failure("a", 0.0)
        table.record_failure("a", 0.0)
        table.record_success("a", 0.0)

    assert table.is_healthy("a", 0.0)


def test_it_takes_as_many_successes_to_rise_as_the_threshold_says():
    table = make_table(fall=1, rise=2)
    table.record_failure("a", 0.0)

    assert not table.record_success("a", 1.0)
    assert not table.is_healthy("a", 1.0)
    assert table.record_success("a", 2.0)
    assert table.is_healthy("a", 2.0)


def test_a_failure_between_successes_starts_the_rise_anew():
    table = make_table(fall=1, rise=2)
    table.record_failure("a", 0.0)
    table.record_success("a", 1.0)
    table.record_failure("a", 2.0)
    table.record_success("a", 3.0)

    assert not table.is_healthy("a", 3.0)


def test_failures_expire_so_that_the_member_is_tried_again():
    table = make_table(fall=2, expiry=10.0)
    table.record_failure("a", 0.0)
    table.record_failure("a", 5.0)

    assert not table.is_healthy("a", 14.9)
    assert table.is_healthy("a", 15.0)


def test_a_member_on_probation_falls_with_its_next_failure():
    table = make_table(fall=3, expiry=10.0)
    for _ in range(3):
        table.record_failure("a", 0.0)
    assert table.is_healthy("a", 10.0)

    assert table.record_failure("a", 10.0)
    assert not table.is_healthy("a", 10.0)


def test_a_member_on_probation_is_trusted_after_a_success():
    table = make_table(fall=3, rise=2, expiry=10.0)
    for _ in range(3):
        table.record_failure("a", 0.0)
    table.record_success("a", 11.0)
    table.record_failure("a", 12.0)

    assert table.is_healthy("a", 12.0)


def test_unhealthy_members_are_tried_last_in_their_own_order():
    table = make_table(fall=1)
    table.record_failure("a", 0.0)
    table.record_failure("b", 0.0)

    assert table.arrange(["a", "b", "c"], 0.0) == ["c", "a", "b"]


def test_members_who_left_are_forgotten():
    table = make_table(fall=1)
    table.record_failure("a", 0.0)
    table.retain(["b"])

    assert table.is_healthy("a", 0.0)


@given(
    events=st.lists(st.tuples(st.sampled_from(MEMBERS), st.booleans(), st.floats(0.0, 8.0))),
    members=st.permutations(MEMBERS),
)
def test_whatever_happened_every_member_is_still_tried(events, members):
    table = make_table(fall=2, rise=2, expiry=10.0)
    now = 0.0
    for member, answered, seconds in events:
        now += seconds
        (table.record_success if answered else table.record_failure)(member, now)
        arranged = table.arrange(members, now)
        assert sorted(arranged) == MEMBERS
        states = [table.is_healthy(m, now) for m in arranged]
        assert states == sorted(states, reverse=True)

    assert all(table.is_healthy(member, now + 10.1) for member in members)


@pytest.mark.parametrize("limits", [{"fall": 0}, {"rise": 0}, {"expiry": 0.0}])
def test_limits_that_make_no_sense_are_refused(limits: dict[str, float]):
    with pytest.raises(ValueError, match=next(iter(limits))):
        HealthLimits(**limits)  # type: ignore[arg-type]
