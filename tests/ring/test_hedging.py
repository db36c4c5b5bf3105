from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmpull.ring.hedging import HedgeLimits, Hedging, Race

MEMBERS = ["a", "b", "c"]


def always() -> bool:
    return True


def never() -> bool:
    return False


# --- the delay ------------------------------------------------------------------------------------


def test_the_delay_follows_how_long_answers_take():
    hedging = Hedging(HedgeLimits())
    assert hedging.delay("stat") == HedgeLimits().initial

    for _ in range(100):
        hedging.answered("stat", 0.1)
    assert hedging.delay("stat") == pytest.approx(0.1, rel=0.01)
    assert hedging.delay("other") == HedgeLimits().initial

    # One answer that took a second is no reason to wait a second for the next.
    hedging.answered("stat", 1.0)
    assert 0.1 < hedging.delay("stat") <= 1.0


def test_the_delay_has_a_least_and_a_most():
    hedging = Hedging(HedgeLimits(least=0.05, most=1.0))
    for _ in range(100):
        hedging.answered("fast", 0.0001)
        hedging.answered("slow", 30.0)

    assert hedging.delay("fast") == 0.05
    assert hedging.delay("slow") == 1.0


def test_only_a_share_of_all_lookups_is_asked_twice():
    hedging = Hedging(HedgeLimits(share=0.1, burst=5.0))
    assert [hedging.may_hedge() for _ in range(6)] == [True] * 5 + [False]

    hedged = 0
    for _ in range(1000):
        hedging.begun()
        hedged += hedging.may_hedge()
    assert hedged == pytest.approx(100, abs=2)


# --- the race -------------------------------------------------------------------------------------


def test_the_next_one_is_asked_when_the_first_takes_long():
    race = Race(MEMBERS, 0.2)

    assert race.next(0.0, always) == "a"
    assert race.next_time() == 0.2
    assert race.next(0.1, always) is None
    assert race.next(0.2, always) == "b"
    assert race.next(0.3, always) is None
    assert race.next(0.4, always) == "c"
    assert race.next_time() == math.inf
    race.answered("b")
    race.answered("a")
    assert (race.is_over, race.winner) == (True, "b")


def test_one_that_fails_is_replaced_at_once_and_even_without_a_budget():
    race = Race(MEMBERS, 0.2)
    race.next(0.0, never)
    race.failed("a")

    assert race.next(0.01, never) == "b"
    assert race.next(5.0, never) is None
    assert race.next_time() == 5.2, "the budget is asked again, and not without a pause"


def test_that_there_is_nothing_is_believed_of_the_first_only():
    race = Race(MEMBERS, 0.2)
    race.next(0.0, always)
    race.next(0.2, always)
    race.refused("b")

    assert not race.is_over
    assert race.next(9.0, always) is None, (
        "the first one has the word; others would not know better"
    )
    race.refused("a")
    assert race.winner == "a"


def test_that_there_is_nothing_is_believed_of_the_second_when_the_first_is_gone():
    race = Race(MEMBERS, 0.2)
    race.next(0.0, always)
    race.next(0.2, always)
    race.refused("b")
    race.failed("a")

    assert race.winner == "b"


def test_an_answer_of_the_first_counts_although_the_second_had_nothing():
    race = Race(MEMBERS, 0.2)
    race.next(0.0, always)
    race.next(0.2, always)
    race.refused("b")
    race.answered("a")

    assert race.winner == "a"


def test_without_members_a_race_is_over_and_has_no_winner():
    race = Race([], 0.2)
    assert (race.is_over, race.winner, race.next(0.0, always)) == (True, None, None)


@given(
    fates=st.lists(
        st.tuples(st.sampled_from(["answers", "refuses", "fails"]), st.floats(0.0, 3.0)), max_size=6
    ),
    budget=st.booleans(),
)
def test_every_race_ends_as_soon_as_it_can(fates, budget):
    """Whatever members do, a race ends, with an answer if any of those asked has one in time."""
    members = [str(number) for number in range(len(fates))]
    race = Race(members, 0.5)
    now, ends, asked = 0.0, {}, []
    for _ in range(100):
        if race.is_over:
            break
        member = race.next(now, always if budget else never)
        if member is not None:
            asked.append(member)
            fate, seconds = fates[int(member)]
            ends[member] = (now + seconds, fate)
            continue
        now, happens = min(
            [(race.next_time(), ""), *((at, each) for each, (at, _) in ends.items())],
        )
        assert now < math.inf, "nothing is under way and nobody will be asked"
        if happens:
            fate = ends.pop(happens)[1]
            {"answers": race.answered, "refuses": race.refused, "fails": race.failed}[fate](happens)

    assert race.is_over
    assert asked == members[: len(asked)], "in the order of the ring, each once"
    if race.winner is None:
        assert all(fate == "fails" for fate, _ in fates)
