"""The text that says what goes wrong in a simulated swarm."""

from __future__ import annotations

import pytest

from swarmpull.sim.faults import Fault, FaultKind, parse_faults


def test_every_form_of_a_fault_is_read() -> None:
    text = (
        "slow=5%x10, killed=2%, vanished=3@2s, late=2%@5s, origin-killed=1@3s,"
        "partition=10%@2s-4s, delayed=1x20, corrupt=1%"
    )

    assert parse_faults(text) == (
        Fault(FaultKind.SLOW, 0.05, True, 10.0),
        Fault(FaultKind.KILLED, 0.02, True),
        Fault(FaultKind.VANISHED, 3, False, 1.0, 2.0),
        Fault(FaultKind.LATE, 0.02, True, 1.0, 5.0),
        Fault(FaultKind.ORIGIN_KILLED, 1, False, 1.0, 3.0),
        Fault(FaultKind.PARTITION, 0.1, True, 1.0, 2.0, 4.0),
        Fault(FaultKind.DELAYED, 1, False, 20.0),
        Fault(FaultKind.CORRUPT, 0.01, True),
    )


@pytest.mark.parametrize(
    "text",
    [
        "slow=5%x10",
        "late=2%@5s",
        "partition=10%@2s-4500ms",
        "origin-killed=1",
        "origin-killed=1@1s-6s",
        "origin-slow=1x10000",
        "wiped=10%@1s-6s",
        "lost=5%",
        "greedy=3",
        "",
    ],
)
def test_faults_are_shown_as_they_were_written(text: str) -> None:
    assert ",".join(map(str, parse_faults(text))) == text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("slow", "is not KIND=NUMBER"),
        ("slow=5%", "needs a factor"),
        ("slow=5%x0.5", "at least 1"),
        ("broken=5%", "no such fault; there are slow, delayed"),
        ("killed=2%x3", "takes no factor"),
        ("killed=101%", "no more than 100 %"),
        ("killed=1.5", "whole"),
        ("killed=1@2", "a duration with its unit"),
        ("killed=1@2s-3s", "takes no end"),
        ("late=1", "needs a time"),
        ("corrupt=1@2s", "takes no time"),
        ("partition=10%@2s", "begin and end"),
        ("partition=10%@4s-2s", "begin and end"),
        ("origin-killed=20%", "say how many"),
        ("origin-killed=1@5s-3s", "begin and end"),
        ("origin-slow=1", "needs a factor"),
        ("origin-frozen=1@5s", "begin and end"),
        ("restarted=10%", "begin and end"),
        ("lost=5", "say which share"),
        ("lost=60%", "up to 50 %"),
        ("lost=5%@2s", "takes no time"),
    ],
)
def test_a_fault_that_makes_no_sense_is_refused_with_the_reason(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_faults(f"corrupt=1%,{text}")


def test_a_share_is_at_least_one_host() -> None:
    assert Fault(FaultKind.KILLED, 0.01, True).count(30) == 1
    assert Fault(FaultKind.KILLED, 0.05, True).count(2600) == 130
    assert Fault(FaultKind.KILLED, 0.0, True).count(30) == 0
    assert Fault(FaultKind.KILLED, 7).count(30) == 7
