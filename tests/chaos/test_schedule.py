"""Scenarios made up from a seed."""

from __future__ import annotations

import pytest

from .scenario import parse
from .schedule import MINUTES_MAX, random_scenario


def test_the_same_seed_gives_the_same_scenario() -> None:
    assert random_scenario(7, 3.0) == random_scenario(7, 3.0)
    assert random_scenario(7, 3.0).steps != random_scenario(8, 3.0).steps


@pytest.mark.parametrize("seed", range(50))
def test_a_made_up_scenario_can_be_played_and_printed(seed: int) -> None:
    scenario = random_scenario(seed, 4.0)
    # Parsing plays it through: nothing is started twice or wiped while it runs.
    assert parse(scenario.text(), name=scenario.name) == scenario
    assert 240 <= scenario.seconds < 300
    assert len(scenario.steps) > 20


def test_all_kinds_of_faults_come_up() -> None:
    verbs = {step.verb for seed in range(20) for step in random_scenario(seed, 4.0).steps}
    assert verbs >= {
        "kill",
        "start",
        "restart",
        "freeze",
        "thaw",
        "wipe",
        "cut",
        "heal",
        "lose",
        "slow",
    }


@pytest.mark.parametrize("seed", range(50))
def test_somebody_of_each_role_is_always_left(seed: int) -> None:
    scenario = random_scenario(seed, 4.0)
    gone: set[str] = set()
    for step in scenario.steps:
        if step.verb in {"kill", "freeze"}:
            gone.update(step.hosts)
        elif step.verb in {"start", "thaw"}:
            gone.difference_update(step.hosts)
        for role in ("tracker", "index", "origin", "agent"):
            of_role = {host for host in scenario.shape.hosts() if host.startswith(f"{role}-")}
            assert of_role - gone, f"{scenario.text()}\nnobody is left of {role} at {step.at:g}"
    assert not gone


def test_faults_end_before_the_scenario_does() -> None:
    for seed in range(20):
        *_, last, end = random_scenario(seed, 2.0).steps
        assert end.at > last.at


@pytest.mark.parametrize("minutes", [0.0, -1.0, MINUTES_MAX + 1])
def test_a_length_that_cannot_be_is_refused(minutes: float) -> None:
    with pytest.raises(ValueError, match="--minutes"):
        random_scenario(1, minutes)
