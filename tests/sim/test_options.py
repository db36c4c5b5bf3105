"""What an experiment may be, and the least time that it takes."""

from __future__ import annotations

from typing import Any

import attrs
import pytest

from swarmpull.sim.options import SimulationOptions, busiest_link, lower_bound

KRAKEN = SimulationOptions(hosts=2600, origins=5, size=3_000_000_000, layers=2)


def test_the_bound_of_the_published_case_is_ten_seconds() -> None:
    assert KRAKEN.pieces == 2 * 358
    assert lower_bound(KRAKEN) == pytest.approx(10.14, abs=0.01)


def test_slow_origins_alone_are_bound_by_the_bandwidth() -> None:
    alone = attrs.evolve(KRAKEN, hosts=1, origins=1, origin_rate=1e6)

    assert lower_bound(alone) == pytest.approx(10.0, rel=0.02)
    assert lower_bound(attrs.evolve(alone, hosts=2, rate=1e6)) == pytest.approx(3000, rel=0.01)


def test_the_busiest_link_is_that_of_a_host_or_of_the_origins() -> None:
    options = SimulationOptions(
        hosts=9, origins=2, size=100, rate=10, origin_rate=50, images=3, pullers=1
    )

    assert busiest_link(options, [(0.0, 1, 0), (0.0, 1, 1), (0.0, 2, 2)]) == 20.0
    assert busiest_link(options, [(0.0, 1, 0), (30.0, 1, 1)]) == 40.0
    slow = attrs.evolve(options, origin_rate=2)
    assert busiest_link(slow, [(0.0, 1, 0), (0.0, 2, 0), (1.0, 3, 1)]) == 50.0


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"hosts": 0}, "hosts"),
        ({"rate": 0.0}, "rate"),
        ({"piece": 5 << 20}, "powers of two"),
        ({"piece": 1 << 10}, "powers of two"),
        ({"size": 1, "layers": 2}, "do not make 2 layers"),
        ({"hosts": 2, "images": 1}, "3 of 2 hosts"),
        ({"hosts": 10, "faults": "killed=6,corrupt=5"}, "11 agents"),
        ({"origins": 2, "faults": "origin-killed=3"}, "only 2"),
        ({"origins": 2, "faults": "origin-slow=3x2"}, "only 2"),
        ({"trackers": 2, "faults": "tracker-killed=3"}, "only 2"),
        ({"faults": "nonsense"}, "KIND=NUMBER"),
    ],
)
def test_an_impossible_experiment_is_refused(wrong: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        SimulationOptions(**wrong)
