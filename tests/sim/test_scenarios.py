"""Every scenario of the table, with few hosts and a small image."""

from __future__ import annotations

import attrs
import pytest

from swarmpull.sim.options import lower_bound
from swarmpull.sim.scenarios import SCENARIOS, Scenario, choose, document, recovery
from swarmpull.sim.simulation import Simulation

pytestmark = pytest.mark.sim

HOSTS = 24
SIZE = 64_000_000


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_every_survivor_has_everything_and_comes_to_it_soon(scenario: Scenario) -> None:
    options = attrs.evolve(scenario.options(HOSTS, SIZE, 3), check_every=2000)

    result = Simulation(options).run()

    assert result.completed == result.expected == HOSTS
    assert result.gave_up == 0
    told = document(scenario, options, result)
    assert told["scenario"] == scenario.name
    assert told["completed"] == HOSTS
    assert 0 < told["everybody"]["p50"] <= told["everybody"]["max"]
    # The longest: hosts find origins that are back when they dial them again, each at a time of its own.
    if (after := recovery(options, result)) is not None:
        assert after < 3.0


def test_times_follow_from_the_bound() -> None:
    calm = choose(["calm"])[0].options(HOSTS, SIZE, 1)
    frozen = choose(["frozen-origin"])[0].options(HOSTS, SIZE, 1)

    [fault] = frozen.faults
    assert fault.since == pytest.approx(calm.arrival + 0.1 * lower_bound(calm), abs=0.001)
    assert fault.until == pytest.approx(fault.since + 20, abs=0.001)


def test_a_scenario_that_is_not_there_is_refused() -> None:
    assert choose(["all"]) == list(SCENARIOS)
    with pytest.raises(ValueError, match="no scenario 'flood'"):
        choose(["calm", "flood"])
