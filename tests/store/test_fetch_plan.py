"""Which pieces are asked for next, with workers that the test plays."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from swarmpull.store.fetch_plan import RUN_BYTES_MAX, FetchPlan, Run
from swarmpull.swarm import bitfield
from swarmpull.swarm.metainfo import PIECE_LENGTH_MIN as PIECE


def plan_of(pieces: int, *, workers: int = 4, have: int = 0) -> FetchPlan:
    missing = bitfield.full(pieces) & ~have
    return FetchPlan(missing, piece_length=PIECE, workers=workers)


def taken(plan: FetchPlan) -> tuple[int, int]:
    run = plan.next_run()
    assert run is not None
    return run.next, run.stop


def finish(plan: FetchPlan, run: Run) -> list[int]:
    """Fetch a run to its end; returns its pieces."""
    pieces = [run.next]
    while plan.fetched(run):
        pieces.append(run.next)
        plan.check_invariants()
    return pieces


def test_runs_begin_with_a_piece_for_each_worker_and_grow():
    plan = plan_of(100)
    lengths = []
    for _ in range(20):
        start, stop = taken(plan)
        lengths.append(stop - start)
        finish(plan, plan.runs[0])

    assert lengths[:8] == [1, 1, 1, 1, 2, 2, 2, 2]
    assert max(lengths) * PIECE == RUN_BYTES_MAX


def test_the_earliest_missing_piece_goes_first():
    plan = plan_of(10, workers=2, have=0b0000001101)
    assert taken(plan) == (1, 2)
    assert taken(plan) == (4, 5)


def test_a_run_ends_where_the_next_piece_is_there():
    plan = plan_of(10, workers=1, have=0b100)
    finish(plan, plan.next_run())
    assert taken(plan) == (1, 2), "two are allowed, but the second is there"


def test_what_is_left_of_a_run_that_was_given_up_is_fetched_next():
    plan = plan_of(20, workers=1)
    for _ in range(3):
        finish(plan, plan.next_run())
    run = plan.next_run()
    assert (run.next, run.stop) == (7, 15)
    plan.fetched(run)
    plan.give_up(run)
    assert taken(plan)[0] == 8


def test_a_worker_with_nothing_to_do_takes_the_second_half_of_the_longest_run():
    plan = plan_of(14, workers=2)
    while (run := plan.next_run()) and run.stop < 14:
        finish(plan, run)
    left = run.left
    other = plan.next_run()

    assert other is not None
    assert (run.stop, other.stop) == (other.next, 14)
    assert abs(run.left - other.left) <= 1
    assert run.left + other.left == left
    plan.check_invariants()


def test_a_single_piece_is_never_fetched_twice():
    plan = plan_of(1, workers=2)
    assert plan.next_run() is not None
    assert plan.next_run() is None


def test_an_urgent_piece_is_fetched_before_all_others():
    plan = plan_of(50, workers=4)
    plan.next_run()
    plan.urge(40)
    assert taken(plan) == (40, 42)
    assert taken(plan) == (1, 2)


def test_urgent_pieces_in_a_row_are_fetched_with_one_request():
    plan = plan_of(50, workers=4)
    plan.next_run()
    for index in (40, 41, 42, 43, 45):
        plan.urge(index)
    assert taken(plan) == (40, 44)
    assert taken(plan) == (45, 47)


def test_an_urgent_piece_takes_the_connection_of_the_run_that_has_most_left():
    plan = plan_of(100, workers=2)
    short, long = plan.next_run(), None
    for _ in range(8):
        long = plan.next_run()
        finish(plan, long)
    long = plan.next_run()
    assert long.left > 2 > short.left == 1

    plan.urge(90)

    assert (long.left, short.left) == (1, 1)
    assert not plan.fetched(long), "its worker is free after the present piece"
    assert taken(plan)[0] == 90


def test_a_piece_that_comes_next_anyway_interrupts_nothing():
    plan = plan_of(100, workers=1)
    for _ in range(4):
        finish(plan, plan.next_run())
    run = plan.next_run()
    before = run.stop
    for index in (run.next, run.next + 1, 0):
        plan.urge(index)
    assert run.stop == before


def test_an_urgent_piece_inside_a_run_is_taken_out_of_it():
    plan = plan_of(100, workers=1)
    for _ in range(4):
        finish(plan, plan.next_run())
    run = plan.next_run()
    urgent = run.next + 4
    plan.urge(urgent)
    assert not plan.fetched(run)
    assert taken(plan)[0] == urgent


def test_with_a_free_worker_a_run_goes_on_up_to_the_urgent_piece():
    plan = plan_of(100, workers=2)
    for _ in range(8):
        finish(plan, plan.next_run())
    run = plan.next_run()
    urgent = run.next + 4
    plan.urge(urgent)
    assert run.stop == urgent
    assert taken(plan)[0] == urgent


@given(
    pieces=st.integers(1, 60),
    workers=st.integers(1, 5),
    have=st.integers(0, 2**60 - 1),
    seed=st.integers(0, 2**32),
)
def test_every_missing_piece_is_fetched_once_whatever_happens(pieces, workers, have, seed):
    have &= bitfield.full(pieces)
    plan = plan_of(pieces, workers=workers, have=have)
    chance = random.Random(seed)
    busy: list[Run] = []
    fetched: list[int] = []
    steps = 0
    while not plan.is_done:
        steps += 1
        assert steps < 5000, "it comes to an end"
        event = chance.random()
        if event < 0.1:
            plan.urge(chance.randrange(pieces))
        elif event < 0.15 and busy:
            plan.give_up(busy.pop(chance.randrange(len(busy))))
        elif event < 0.5 and len(busy) < workers:
            run = plan.next_run()
            if run is not None:
                busy.append(run)
            else:
                assert busy, "somebody fetches what is missing"
        elif busy:
            run = chance.choice(busy)
            fetched.append(run.next)
            if not plan.fetched(run):
                busy.remove(run)
        plan.check_invariants()
    assert sorted(fetched) == list(bitfield.indices(bitfield.full(pieces) & ~have))
