"""What happens to a data centre, at a size that no test bench has: the chaos suite's scenarios, simulated.

What a simulated host has not (disks that fill or rot, names, a bucket) is left to the suite.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

import attrs

from swarmpull.sim.options import SimulationOptions, lower_bound
from swarmpull.sim.result import QUANTILES, SimulationResult
from swarmpull.sim.sampling import quantile

ALL: Final = "all"
SIZE: Final = 128_000_000
# As in the chaos suite.
ORIGINS: Final = 3
TRACKERS: Final = 3

_TIME: Final = re.compile(r"\[([0-9.]+)(?:\+([0-9.]+)s)?\]", re.ASCII)
# 1.25 GB/s to 1 Mbit/s.
_CRAWLING: Final = 10_000


@attrs.frozen
class Scenario:
    """One line of the table.

    Attributes:
        faults: as in `swarmpull.sim.faults`, but that times are ``[0.3]`` or ``[0.3+20s]``: when all have
            arrived, so many times the bound later, and so many seconds more.
    """

    name: str
    title: str
    faults: str

    def options(self, hosts: int, size: int, seed: int) -> SimulationOptions:
        """The experiment, for that many hosts and an image of that many bytes."""
        calm = SimulationOptions(
            hosts=hosts, origins=ORIGINS, trackers=TRACKERS, size=size, seed=seed
        )
        bound = lower_bound(calm)

        def time_of(match: re.Match[str]) -> str:
            seconds = calm.arrival + float(match[1]) * bound + float(match[2] or 0)
            return f"{seconds * 1000:.0f}ms"

        return attrs.evolve(calm, faults=_TIME.sub(time_of, self.faults))


def _rolling() -> str:
    """Every origin, every tracker and a tenth of the agents after the other is down for half a second."""
    kinds = ["origin-killed=1"] * ORIGINS + ["tracker-killed=1"] * TRACKERS + ["restarted=10%"] * 10
    return ",".join(
        f"{kind}@[{0.04 * number:.2f}]-[{0.04 * number:.2f}+0.5s]"
        for number, kind in enumerate(kinds)
    )


SCENARIOS: Final = (
    Scenario("calm", "nothing happens", ""),
    Scenario(
        "kill-each-role",
        "an origin, a tracker and a tenth of the agents die in turn, each for 2 s",
        "origin-killed=1@[0.1]-[0.1+2s],tracker-killed=1@[0.3]-[0.3+2s],"
        "restarted=10%@[0.5]-[0.5+2s]",
    ),
    Scenario("rolling-restart", "every role, one after the other, for 0.5 s each", _rolling()),
    Scenario("frozen-origin", "an origin hangs for 20 s", "origin-frozen=1@[0.1]-[0.1+20s]"),
    Scenario("last-origin", "two origins of three die, and stay away", "origin-killed=2@[0.1]"),
    Scenario(
        "killed-origins",
        "all origins die before the swarm has one copy, for 5 s",
        "origin-killed=3@100ms-5100ms",
    ),
    Scenario("killed-trackers", "all trackers die, for 5 s", "tracker-killed=3@[0.1]-[0.1+5s]"),
    Scenario(
        "wiped-agents",
        "a tenth of the agents die, and come back after 5 s with nothing",
        "wiped=10%@[0.3]-[0.3+5s]",
    ),
    Scenario(
        "partition",
        "half of the agents are cut off from everything else for 5 s",
        "partition=50%@[0.1]-[0.1+5s]",
    ),
    Scenario("slow-origin", "one origin has 1 Mbit/s", f"origin-slow=1x{_CRAWLING}"),
    Scenario("lossy", "5 % of all packets are lost", "lost=5%"),
)


def choose(names: Sequence[str]) -> list[Scenario]:
    """Those of these names, in the order of the table; ``all`` is all.

    Raises:
        ValueError: there is no such scenario.
    """
    known = [scenario.name for scenario in SCENARIOS]
    unknown = [name for name in names if name not in {ALL, *known}]
    if unknown:
        raise ValueError(f"there is no scenario {unknown[0]!r}; there are {', '.join(known)}")
    return [scenario for scenario in SCENARIOS if ALL in names or scenario.name in names]


def recovery(options: SimulationOptions, result: SimulationResult) -> float | None:
    """Seconds from the last thing that happened until every survivor had everything.

    None when nothing happened at a time, or nobody finished.
    """
    times = [time for fault in options.faults for time in (fault.since, fault.until)]
    before = [time for time in times if time is not None and time <= result.last_finish]
    return result.last_finish - max(before) if before else None


def document(
    scenario: Scenario, options: SimulationOptions, result: SimulationResult
) -> dict[str, Any]:
    """Everything that came out, for JSON.  ``everybody`` is of all survivors, in seconds."""
    times = sorted(result.times + result.faulty_times)
    return {
        "scenario": scenario.name,
        "title": scenario.title,
        "everybody": {
            name: quantile(times, share) if times else None for name, share in QUANTILES.items()
        },
        "longest_wait": result.longest_wait if result.times else None,
        "recovery": recovery(options, result),
        **result.document(options),
    }
