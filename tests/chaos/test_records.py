"""What follows from what happened."""

from __future__ import annotations

import math

from .limits import FAIL_FAST, SETTLING
from .records import (
    PULL,
    PUSH,
    Attempt,
    Record,
    count,
    recoveries,
    slowest,
    stretched,
    violations,
)
from .scenario import Window


def attempt(kind=PULL, host="agent-1", started=1.0, ended=2.0, outcome="ok", wait=0.1) -> Attempt:
    return Attempt(kind, host, "chaos/app:v1", started, ended, outcome, wait, "what it said")


def test_a_failure_at_a_host_that_was_well_is_a_violation() -> None:
    record = Record(attempts=[attempt(outcome="cut"), attempt()])

    (line,) = violations(record, [])
    assert line == (
        "pull of chaos/app:v1 at agent-1, 1.0 to 2.0 s: failed although it could have succeeded: "
        "cut, what it said"
    )
    counts = count(record, PULL, [])
    assert (counts.made, counts.attempts, counts.failed, counts.excused) == (1, 2, 1, 0)


def test_a_failure_at_a_host_that_was_killed_is_none() -> None:
    record = Record(
        attempts=[attempt(outcome="cut"), attempt(started=3, ended=3, outcome="refused")]
    )
    record.disturb("agent-1", 1.5)
    record.calm("agent-1", 4.0)
    record.disturb("agent-2", 0.0)

    assert violations(record, []) == []
    counts = count(record, PULL, [])
    assert (counts.made, counts.refused, counts.excused, counts.failed) == (0, 1, 1, 0)


def test_a_failure_before_or_after_the_trouble_has_no_excuse() -> None:
    before = attempt(started=0.0, ended=1.0, outcome="cut")
    after = attempt(started=5.0, ended=6.0, outcome="answered")
    record = Record(attempts=[before, after])
    record.disturb("agent-1", 2.0)
    record.calm("agent-1", 4.0)

    assert len(violations(record, [])) == 2


def test_a_host_that_is_still_in_trouble_is_excused_without_an_end() -> None:
    record = Record(attempts=[attempt(started=900.0, ended=901.0, outcome="refused")])
    record.disturb("agent-1", 2.0)
    assert record.disturbances[0].until == math.inf
    assert violations(record, []) == []


def test_while_nobody_can_answer_requests_may_fail_but_fast() -> None:
    quick = attempt(started=10.0, ended=11.0, outcome="answered")
    slow = attempt(started=10.0, ended=90.0, outcome="answered", wait=FAIL_FAST + 1)
    window = [Window(9.0, 20.0)]

    assert violations(Record(attempts=[quick]), window) == []
    (line,) = violations(Record(attempts=[slow]), window)
    assert f"waited {FAIL_FAST + 1:.1f} s before it failed" in line


def test_the_excuse_lasts_until_those_are_ready_that_were_started_within_it() -> None:
    windows = [Window(15.0, 45.0)]
    steps = [(15.0, "kill origins"), (20.0, "start origins"), (50.0, "kill agent-1")]

    quick = Record(steps=steps, ready={0: 25.0, 1: 25.0, 2: 99.0})
    assert stretched(quick, windows) == windows
    slow = Record(steps=steps, ready={0: 52.0, 1: 52.0, 2: 99.0})
    assert stretched(slow, windows) == [Window(15.0, 52.0 + SETTLING)]
    assert stretched(Record(), windows) == windows


def test_a_frozen_host_cannot_fail_fast() -> None:
    record = Record(attempts=[attempt(ended=90.0, outcome="stalled", wait=FAIL_FAST + 1)])
    record.disturb("agent-1", 2.0, silent=True)
    assert violations(record, []) == []


def test_a_host_that_is_asked_to_end_may_refuse_but_finishes_what_it_has_begun() -> None:
    refused, cut = attempt(outcome="refused"), attempt(outcome="cut")
    record = Record(attempts=[refused, cut])
    record.disturb("agent-1", 0.0, polite=True)
    (line,) = violations(record, [])
    assert "failed although it could have succeeded: cut" in line


def test_wrong_bytes_have_no_excuse() -> None:
    record = Record(attempts=[attempt(outcome="wrong")])
    record.disturb("agent-1", 0.0)
    (line,) = violations(record, [Window(0.0, 100.0)])
    assert "got wrong bytes" in line


def test_the_longest_wait_is_that_at_hosts_that_were_well() -> None:
    record = Record(attempts=[attempt(wait=0.5), attempt(host="agent-2", wait=7.0)])
    record.disturb("agent-2", 0.0)
    counts = count(record, PULL, [])
    assert (counts.stall, counts.stall_excused) == (0.5, 7.0)


def test_a_recovery_is_counted_by_requests_that_began_after_the_step() -> None:
    record = Record(
        attempts=[
            attempt(started=4.0, ended=9.0),
            attempt(started=6.0, ended=8.0, outcome="cut"),
            attempt(started=6.5, ended=8.5),
            attempt(PUSH, started=5.5, ended=7.0),
        ],
        steps=[(5.0, "kill agent-1"), (60.0, "start agent-1")],
        ready={0: 5.2},
    )
    first, second = recoveries(record)
    assert (round(first.ready or 0, 6), first.pull, first.push) == (0.2, 3.5, 2.0)
    assert (second.ready, second.pull, second.push) == (None, None, None)


def test_the_longest_waits_are_those_without_an_excuse() -> None:
    record = Record(attempts=[attempt(wait=each) for each in (1.0, 5.0, 2.0, 4.0)])
    record.attempts.append(attempt(host="agent-2", wait=9.0))
    record.disturb("agent-2", 0.0)

    assert [each.wait for each in slowest(record, [])] == [5.0, 4.0, 2.0]
