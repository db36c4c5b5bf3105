"""What is tried next, and when, in simulated time: blobs that are to be written to a backend."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmpull.digest import Digest
from swarmpull.store.retry_schedule import (
    BACKOFF_MAX,
    BACKOFF_MIN,
    PROBE_MAX,
    RETURN_INTERVAL,
    Schedule,
    backoff,
)
from swarmpull.store.write_back_schedule import RANK_DELAY, Key, rank_delay


def key_of(name: object) -> Key:
    return Digest.of(str(name).encode()), "team/app"


A, B, C, D = map(key_of, "abcd")


def schedule_of(*keys: Key, at_once: int = 2, rank: int = 0, due: float = 0.0) -> Schedule[Key]:
    schedule: Schedule[Key] = Schedule(random.Random(1), at_once)
    for key in keys:
        schedule.add(key, due, rank_delay(rank, 100))
    return schedule


@attrs.define
class World:
    """A backend in simulated time: an attempt takes ``seconds``, and succeeds when ``works`` says so."""

    schedule: Schedule[Key]
    works: Callable[[Key, float], bool]
    seconds: float = 0.1
    attempts: list[tuple[float, Key]] = attrs.Factory(list)
    written: dict[Key, float] = attrs.Factory(dict)

    def run(self, until: float) -> None:
        now = 0.0
        running: list[tuple[float, Key]] = []
        failures: Counter[Key] = Counter()
        while now < until:
            while (key := self.schedule.take(now)) is not None:
                self.attempts.append((now, key))
                running.append((now + self.seconds, key))
            running.sort(key=lambda attempt: attempt[0])
            done = running[0][0] if running else math.inf
            now = min(done, self.schedule.next_time(), until)
            if running and now == done:
                _, key = running.pop(0)
                if self.works(key, now):
                    self.schedule.done(key, now)
                    self.written[key] = now
                else:
                    failures[key] += 1
                    self.schedule.failed(key, failures[key], now, target=True)


@given(st.integers(min_value=1, max_value=10_000), st.integers())
def test_the_wait_doubles_up_to_its_limit_and_half_of_it_is_chance(failures, seed) -> None:
    whole = min(BACKOFF_MAX, int(BACKOFF_MIN) << (failures - 1))

    assert whole / 2 <= backoff(failures, BACKOFF_MAX, random.Random(seed)) <= whole


def test_hosts_that_fail_together_do_not_come_back_together() -> None:
    waits = {backoff(6, BACKOFF_MAX, random.Random(seed)) for seed in range(100)}

    assert len(waits) == 100


def test_blobs_are_taken_in_the_order_in_which_they_came_and_only_so_many_at_once() -> None:
    schedule = schedule_of(A, B, C)

    assert [schedule.take(0.0) for _ in range(3)] == [A, B, None]
    assert schedule.next_time() == math.inf, "only the end of one helps"
    schedule.done(A, 1.0)
    assert [schedule.take(1.0), schedule.take(1.0)] == [C, None]


def test_a_blob_is_not_taken_before_it_is_due() -> None:
    schedule = schedule_of(A, due=10.0)

    assert schedule.take(9.9) is None
    assert schedule.next_time() == 10.0
    assert schedule.take(10.0) == A


def test_a_blob_that_is_added_again_is_taken_once_and_at_the_new_time() -> None:
    schedule = schedule_of(A, B, due=50.0)
    schedule.add(A, 5.0)

    assert [schedule.take(5.0), schedule.take(5.0)] == [A, None]
    schedule.done(A, 6.0)
    assert [schedule.take(60.0), schedule.take(60.0)] == [B, None]


def test_a_failed_blob_waits_and_the_others_go_on() -> None:
    schedule = schedule_of(A, B, at_once=1)
    assert schedule.take(0.0) == A

    delay = schedule.failed(A, 1, 0.0, target=False)

    assert not schedule.target_fails
    assert schedule.take(0.0) == B
    schedule.done(B, 0.1)
    assert schedule.next_time() == delay
    assert schedule.take(delay) == A


def test_while_the_target_fails_one_blob_at_a_time_tries_it() -> None:
    schedule = schedule_of(A, B, C, D)
    assert [schedule.take(0.0), schedule.take(0.0)] == [A, B]
    schedule.failed(A, 1, 0.0, target=True)
    schedule.failed(B, 1, 0.0, target=True)

    assert schedule.target_fails
    assert schedule.take(0.0) is None
    probe_at = schedule.next_time()
    assert BACKOFF_MIN <= probe_at <= 2 * BACKOFF_MIN
    assert schedule.take(probe_at) is not None
    assert schedule.take(probe_at) is None
    assert schedule.next_time() == math.inf


def test_when_the_backend_is_back_all_go_on_at_once() -> None:
    schedule = schedule_of(A, B, C, at_once=3)
    for key in (A, B, C):
        assert schedule.take(0.0) == key
    for key in (A, B, C):
        schedule.failed(key, 10, 0.0, target=True)

    probe_at = schedule.next_time()
    assert probe_at >= BACKOFF_MAX / 2
    probe = schedule.take(probe_at)
    assert probe is not None
    assert schedule.done(probe, probe_at)

    assert {schedule.take(probe_at), schedule.take(probe_at)} == {A, B, C} - {probe}
    assert not schedule.target_fails


def test_replicas_stay_behind_those_before_them_when_the_backend_is_back() -> None:
    schedule = schedule_of(A, C, at_once=3)
    schedule.add(B, 0.0, rank_delay(2, 40_000_000))
    assert {schedule.take(0.0), schedule.take(0.0), schedule.take(0.0)} == {A, B, C}
    schedule.failed(B, 10, 0.0, target=True)
    schedule.failed(C, 10, 0.0, target=True)
    schedule.failed(A, 1, 0.0, target=True)
    back = schedule.next_time()
    assert schedule.take(back) == A
    schedule.done(A, back)

    assert rank_delay(2, 40_000_000) == 2 * (RANK_DELAY + 2)
    assert [schedule.take(back), schedule.take(back)] == [C, None]
    assert schedule.next_time() >= BACKOFF_MAX / 2


def test_an_hour_without_a_backend_costs_few_attempts_and_ends_at_once() -> None:
    keys = [key_of(number) for number in range(2000)]
    schedule = schedule_of(*keys, at_once=4)
    hour = 3600.0
    world = World(schedule, lambda _, now: now >= hour)

    world.run(hour + 120)

    during = [at for at, _ in world.attempts if at < hour - 1]
    assert len(during) < hour / (PROBE_MAX / 2) + 20
    assert set(world.written) == set(keys)
    # The next probe, and then four at a time.
    assert max(world.written.values()) <= hour + PROBE_MAX + 2000 / 4 * 0.1 + 1


def test_a_blob_that_is_always_refused_neither_stops_the_others_nor_is_tried_after_each() -> None:
    bad = key_of("bad")
    keys = [key_of(number) for number in range(5000)]
    schedule = schedule_of(bad, *keys, at_once=4)
    world = World(schedule, lambda key, _: key != bad)

    world.run(600.0)

    assert set(world.written) == set(keys)
    assert max(world.written.values()) < 5000 / 4 * 0.1 + 60
    tries = [at for at, key in world.attempts if key == bad]
    assert 600 / BACKOFF_MAX <= len(tries) <= 8 + 600 / (BACKOFF_MAX / 2) + 600 / RETURN_INTERVAL


def test_what_is_postponed_is_taken_later_and_is_no_failure() -> None:
    schedule = schedule_of(A, rank=1)
    assert schedule.take(0.0) == A

    schedule.postpone(A, 30.0, 0.0)

    assert not schedule.target_fails
    assert schedule.next_time() == 30.0
    assert schedule.take(30.0) == A


@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 3), st.floats(0, 100)), max_size=40),
    st.lists(st.tuples(st.floats(0, 400), st.floats(0, 200)), max_size=4),
)
def test_whatever_fails_for_a_time_is_written_in_the_end(blobs, outages) -> None:
    schedule: Schedule[Key] = Schedule(random.Random(2), 3)
    for number, rank, due in blobs:
        schedule.add(key_of(number), due, rank_delay(rank, 1000))

    def works(_: Key, now: float) -> bool:
        return not any(start <= now <= start + length for start, length in outages)

    world = World(schedule, works)
    world.run(2000.0)

    assert set(world.written) == {key_of(number) for number, *_ in blobs}
    assert schedule.next_time() == math.inf


@pytest.mark.parametrize("backend", [True, False])
def test_nothing_is_taken_twice_at_the_same_time(backend) -> None:
    schedule = schedule_of(A, at_once=5)
    assert schedule.take(0.0) == A
    schedule.add(A, 0.0)

    assert schedule.take(1.0) is None
    schedule.failed(A, 1, 1.0, target=backend)
    assert schedule.take(1.0) is None
    assert schedule.take(10.0) == A


def grouped(*names: str, at_once: int = 3) -> Schedule[str]:
    """Things that belong together by their first letter."""
    schedule: Schedule[str] = Schedule(random.Random(1), at_once, group=lambda name: name[0])
    for name in names:
        schedule.add(name, 0.0)
    return schedule


def test_of_those_that_belong_together_one_at_a_time_is_taken() -> None:
    schedule = grouped("a1", "a2", "a3", "b1")

    assert [schedule.take(0.0) for _ in range(3)] == ["a1", "b1", None]
    assert schedule.next_time() == math.inf, "only the end of one helps"
    schedule.done("a1", 1.0)
    assert [schedule.take(1.0), schedule.take(1.0)] == ["a2", None]
    schedule.failed("a2", 1, 2.0, target=False)
    assert schedule.take(2.0) == "a3", "one that waits does not hold up the others"


def test_what_is_forgotten_is_not_tried_and_makes_room_for_its_group() -> None:
    schedule = grouped("a1", "a2", "a3")
    assert schedule.take(0.0) == "a1"
    schedule.forget("a2")
    schedule.forget("a1")

    assert [schedule.take(0.0), schedule.take(0.0)] == ["a3", None]


def test_after_a_return_of_the_target_groups_still_go_one_by_one() -> None:
    schedule = grouped("a1", "a2", "b1")
    assert [schedule.take(0.0), schedule.take(0.0)] == ["a1", "b1"]
    schedule.failed("a1", 9, 0.0, target=True)
    assert schedule.next_time() == math.inf, "the other one will tell"
    back = 1.0
    schedule.done("b1", back)

    assert [schedule.take(back), schedule.take(back)] == ["a2", None]
    schedule.done("a2", back + 1)
    assert schedule.take(back + 1) == "a1"


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 9), st.floats(0, 50)), max_size=40),
    st.integers(1, 4),
    st.randoms(use_true_random=False),
)
def test_whatever_happens_no_group_is_busy_twice_and_all_get_their_turn(
    things, at_once, rng
) -> None:
    schedule = grouped(at_once=at_once)
    active: list[str] = []
    left = {f"{group}{number}" for group, number, _ in things}
    for group, number, due in things:
        schedule.add(f"{group}{number}", due)
    now = 0.0
    for _ in range(2000):
        while (key := schedule.take(now)) is not None:
            active.append(key)
            assert len({name[0] for name in active}) == len(active) <= at_once
        if active and (rng.random() < 0.5 or schedule.next_time() == math.inf):
            key = active.pop(rng.randrange(len(active)))
            if rng.random() < 0.6:
                schedule.done(key, now)
                left.discard(key)
            else:
                schedule.failed(key, 1, now, target=rng.random() < 0.5)
        elif schedule.next_time() < math.inf:
            now = max(now, schedule.next_time())
        else:
            break

    assert not left
