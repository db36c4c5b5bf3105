"""The table of targets, in small: 400 hosts instead of 2,600, and 64 pieces instead of 716.

The limits are those of the full table (`swarmpull simulate --table`).  What a swarm loses at its begin
and end is the same number of piece times however many pieces there are, so the few pieces make this the
harder test.
"""

from __future__ import annotations

import math

import pytest

from swarmpull.sim.result import SimulationResult
from swarmpull.sim.simulation import Simulation
from swarmpull.sim.targets import BASE, Limit, Outcome, cases, judge

HOSTS = 400
SIZE = 64 << 22  # 64 pieces of 4 MiB

CASES = {case.name: case for case in cases(HOSTS, SIZE)}


@pytest.fixture(scope="module")
def base() -> SimulationResult:
    return Simulation(CASES[BASE].options).run()


# The large swarm has 15,000 hosts in the full table and would be 2,307 here, which takes too long.
@pytest.mark.sim
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name != "large"])
def test_the_targets_of_a_case_are_met(name: str, base: SimulationResult) -> None:
    case = CASES[name]
    result = base if name == BASE else Simulation(case.options).run()

    missed = [
        f"{outcome.limit.label}: {outcome.value:.3f}, at most {outcome.limit.most}"
        for outcome in judge(case, result, base)
        if not outcome.is_met
    ]

    assert not missed, f"{case.title}: {'; '.join(missed)}"


def test_a_value_that_does_not_exist_is_a_miss() -> None:
    case = CASES[BASE]
    limit = Limit("p50 / bound", 1.05, lambda result, base: math.nan)

    assert not Outcome(case, limit, math.nan).is_met
    assert Outcome(case, limit, 1.05).is_met


def test_the_full_table_has_the_published_case() -> None:
    every = {case.name: case for case in cases()}

    assert every[BASE].options.hosts == 2600
    assert every[BASE].options.pieces == 716
    assert every["large"].options.hosts == 15_000
    assert every["images"].options.images == 1000
    assert every["images"].options.size == 300_000_000
    assert every["images"].options.arrival == 30.0
