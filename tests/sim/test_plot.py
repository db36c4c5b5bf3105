"""Pictures of swarms."""

from __future__ import annotations

from xml.etree import ElementTree as ET

import attrs

from swarmpull.sim.plot import draw
from swarmpull.sim.simulation import Simulation, SimulationOptions

SMALL = SimulationOptions(hosts=8, size=32 << 20, arrival=0.1)


def test_every_point_lies_within_the_picture() -> None:
    picture = draw(SMALL, [Simulation(SMALL).run()])

    root = ET.fromstring(picture)
    width, height = float(root.get("width", 0)), float(root.get("height", 0))
    for path in root.iter("{http://www.w3.org/2000/svg}path"):
        for point in (path.get("d") or "").strip("MZ").split("L"):
            if "," in point:
                x, y = map(float, point.split(","))
                assert 0 <= x <= width
                assert 0 <= y <= height


def test_a_swarm_in_which_nobody_finished_can_be_drawn() -> None:
    result = Simulation(attrs.evolve(SMALL, until=0.05)).run()

    assert not result.times
    assert "bound" in draw(SMALL, [result])


def test_a_picture_of_many_hosts_is_small() -> None:
    result = Simulation(SMALL).run()
    many = attrs.evolve(result, times=tuple(number / 1e4 for number in range(15_000)))

    assert len(draw(SMALL, [many])) < 60_000
