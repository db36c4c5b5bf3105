from __future__ import annotations

import math
import random

import pytest

from swarmpull.ring.probing import ProbeLimits, Probing

LIMITS = ProbeLimits(jitter=0.0)


def probing(**limits: float) -> Probing:
    return Probing(ProbeLimits(**{"jitter": 0.0, **limits}), random.Random(1))


def due(probing: Probing, now: float = 0.0) -> tuple[float, list[str]]:
    """When somebody is to be probed next, and who."""
    at = max(probing.next_time(), now)
    return at, probing.take(at) if at < math.inf else []


def test_a_member_that_nobody_complains_of_is_not_probed():
    assert due(probing()) == (math.inf, [])


def test_a_suspect_is_probed_until_it_is_known_how_it_is():
    plan = probing(pause=0.1)
    assert plan.suspect("a", 0.0)
    assert not plan.suspect("a", 0.01), "once is enough"
    at, members = due(plan)
    assert (at <= 0.1, members) == (True, ["a"])
    assert due(plan) == (math.inf, []), "one probe at a time"

    plan.ill("a", 0.5, healthy=True)
    assert due(plan) == (pytest.approx(0.6), ["a"])
    plan.ill("a", 1.1, healthy=True)
    assert due(plan) == (pytest.approx(1.2), ["a"])
    plan.well("a", 1.3, healthy=True)
    assert due(plan) == (math.inf, [])


def test_an_unhealthy_member_is_probed_ever_more_seldom_while_somebody_wants_it():
    plan = probing(interval_min=1.0, interval_max=8.0, used_within=60.0)
    plan.suspect("a", 0.0)
    now, _ = due(plan)
    pauses = []
    for _ in range(6):
        plan.wanted("a", now)
        plan.ill("a", now, healthy=False)
        at, members = due(plan)
        assert members == ["a"]
        pauses.append(round(at - now, 6))
        now = at

    assert pauses == [1.0, 2.0, 4.0, 8.0, 8.0, 8.0]
    plan.ill("a", now + 61.0, healthy=False)
    assert due(plan) == (math.inf, []), "nobody has wanted it for a minute"
    assert plan.wanted("a", now + 90.0)
    assert due(plan) == (now + 91.0, ["a"])


def test_one_that_is_back_is_probed_quickly_until_it_counts_as_healthy():
    plan = probing(pause=0.1)
    plan.suspect("a", 0.0)
    due(plan)
    plan.ill("a", 1.0, healthy=False)
    now, _ = due(plan)
    plan.well("a", now, healthy=False)

    assert due(plan) == (now + 0.1, ["a"])


def test_one_that_is_slow_and_answers_is_left_alone_ever_longer():
    plan = probing(calm_min=2.0, calm_max=5.0)
    now, calms = 0.0, []
    assert plan.suspect("a", now)
    for _ in range(4):
        now, _ = due(plan, now)
        plan.well("a", now, healthy=True)
        calm = 0.0
        while not plan.suspect("a", now + calm):
            calm += 0.1
        calms.append(calm)
        now += calm

    assert calms == pytest.approx([2.0, 4.0, 5.0, 5.0], abs=0.11)


def test_a_call_that_failed_is_a_reason_to_probe_whatever_it_said_before():
    plan = probing()
    plan.suspect("a", 0.0)
    now, _ = due(plan)
    plan.well("a", now, healthy=True)

    assert not plan.suspect("a", now + 0.1)
    assert plan.suspect("a", now + 0.1, failed=True)


def test_no_more_probes_at_once_than_the_limit():
    plan = probing(at_once=2)
    for member in "abcde":
        plan.suspect(member, 0.0)

    first = plan.take(1.0)
    assert len(first) == 2
    assert (plan.take(1.0), plan.next_time()) == ([], math.inf)
    plan.well(first[0], 1.1, healthy=True)
    assert len(plan.take(1.1)) == 1


def test_one_that_left_the_ring_while_it_was_probed_takes_no_place():
    plan = probing(at_once=1)
    plan.suspect("a", 0.0)
    plan.suspect("b", 0.0)
    (taken,) = plan.take(1.0)
    (other,) = {"a", "b"} - {taken}
    plan.retain(frozenset({other}))
    plan.ill(taken, 1.5, healthy=True)

    assert plan.take(2.0) == [other]


def test_hosts_that_miss_the_same_member_do_not_probe_it_together():
    times = []
    for seed in range(1000):
        plan = Probing(ProbeLimits(), random.Random(seed))
        plan.suspect("a", 0.0)
        now, _ = due(plan)
        for _ in range(5):
            plan.ill("a", now, healthy=False)
            now, _ = due(plan)
        times.append(now)

    busiest = max(sum(start <= at < start + 0.1 for at in times) for start in range(12, 40))
    assert busiest < 50, "of 1000 hosts, so many probe within one tenth of a second"


@pytest.mark.parametrize("field", ["timeout", "pause", "interval_min", "at_once"])
def test_limits_that_make_no_sense_are_refused(field: str):
    with pytest.raises(ValueError, match=field):
        ProbeLimits(**{field: 0})
