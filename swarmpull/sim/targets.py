"""The cases that the engine is measured by, and how close to the bound each has to come."""

from __future__ import annotations

from collections.abc import Callable

import attrs

from swarmpull.sim.options import SimulationOptions
from swarmpull.sim.result import SimulationResult
from swarmpull.sim.sampling import quantile

# The first case, which some of the others are compared with.
BASE = "base"


@attrs.frozen
class Limit:
    """One number that must not be exceeded.

    Attributes:
        label: what is measured, with its unit.
        most: the limit.
        measure: of the result of the case and that of the base case.
    """

    label: str
    most: float
    measure: Callable[[SimulationResult, SimulationResult], float]


@attrs.frozen
class Case:
    """One row of the table."""

    name: str
    title: str
    options: SimulationOptions
    limits: tuple[Limit, ...]

    @property
    def needs_base(self) -> bool:
        """Whether it is compared with the base case."""
        return any(limit.label.endswith("of base") for limit in self.limits)


@attrs.frozen
class Outcome:
    """What one limit came to; a value that does not exist (nobody finished) is a miss."""

    case: Case
    limit: Limit
    value: float

    @property
    def is_met(self) -> bool:
        return self.value <= self.limit.most


def cases(hosts: int = 2600, size: int = 3_000_000_000, seed: int = 1) -> list[Case]:
    """All rows, for that many hosts and an image of that many bytes.

    Everything that is a number of hosts or images keeps its proportion to the 2,600 hosts, and the unique
    images are a tenth of ``size`` each.
    """
    base = SimulationOptions(
        hosts=hosts,
        origins=5,
        size=size,
        layers=2,
        rate=300e6,
        origin_rate=1.25e9,
        rtt=0.0005,
        arrival=0.5,
        seed=seed,
    )
    many = max(hosts * 15_000 // 2600, 2)
    images = max(hosts * 1000 // 2600, 1)
    faults = "slow=5%x10,killed=2%,origin-killed=1,tracker-killed=1"
    return [
        Case(BASE, f"{hosts:,} hosts", base, _ratios(1.05, 1.10, 1.15)),
        Case(
            "large",
            f"the same, {many:,} hosts",
            attrs.evolve(base, hosts=many),
            (Limit("p50 of base", 1.03, _p50_of_base), Limit("max of base", 1.03, _max_of_base)),
        ),
        Case(
            "rtt",
            "the same, round trip 5 ms",
            attrs.evolve(base, rtt=0.005),
            _ratios(1.10, 1.15, 1.20),
        ),
        Case(
            "rollout",
            f"the same, arrivals over {30 * size / 3e9:.3g} s: three times the time of a pull",
            attrs.evolve(base, arrival=30 * size / 3e9),
            _ratios(1.05, 1.10, 1.15),
        ),
        Case(
            "images",
            f"{images:,} unique images, each for 3 hosts, in {30 * size / 3e9:.3g} s",
            attrs.evolve(base, images=images, size=size // 10, layers=1, arrival=30 * size / 3e9),
            (_FINISHED, Limit("slowest / busiest link", 1.2, _makespan)),
        ),
        Case(
            "faults",
            "5 % slow, 2 % killed, an origin and a tracker killed",
            attrs.evolve(base, faults=faults),
            (_FINISHED, Limit("healthy p99 / bound", 1.3, _ratio(0.99))),
        ),
        Case(
            "readers",
            "every host reads in order",
            attrs.evolve(base, readers=True),
            (
                Limit("first byte p99, s", 0.5, _first_byte),
                Limit("p50 of base", 1.02, _p50_of_base),
                Limit("max of base", 1.02, _max_of_base),
            ),
        ),
    ]


def judge(case: Case, result: SimulationResult, base: SimulationResult) -> list[Outcome]:
    """What each limit of a case came to; ``base`` is the result of the base case."""
    return [Outcome(case, limit, limit.measure(result, base)) for limit in case.limits]


def _ratio(share: float) -> Callable[[SimulationResult, SimulationResult], float]:
    return lambda result, _base: result.ratio(share)


def _ratios(p50: float, p99: float, most: float) -> tuple[Limit, ...]:
    return (
        _FINISHED,
        Limit("p50 / bound", p50, _ratio(0.5)),
        Limit("p99 / bound", p99, _ratio(0.99)),
        Limit("max / bound", most, _ratio(1.0)),
    )


def _unfinished(result: SimulationResult, _base: SimulationResult) -> float:
    return result.expected - result.completed


def _makespan(result: SimulationResult, _base: SimulationResult) -> float:
    return result.makespan / result.bound


def _first_byte(result: SimulationResult, _base: SimulationResult) -> float:
    return quantile(result.first_bytes, 0.99)


def _p50_of_base(result: SimulationResult, base: SimulationResult) -> float:
    return result.ratio(0.5) / base.ratio(0.5)


def _max_of_base(result: SimulationResult, base: SimulationResult) -> float:
    return result.ratio(1.0) / base.ratio(1.0)


_FINISHED = Limit("unfinished", 0, _unfinished)
