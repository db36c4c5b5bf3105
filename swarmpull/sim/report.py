"""The results of simulations as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from swarmpull.sim.options import SimulationOptions
from swarmpull.sim.result import QUANTILES, SimulationResult
from swarmpull.sim.sampling import Idleness, quantile
from swarmpull.sim.scenarios import Scenario, recovery
from swarmpull.sim.targets import Outcome


def results_table(results: Sequence[SimulationResult]) -> Table:
    """One column for each policy."""
    table = Table("", *(result.policy.value for result in results), box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"

    def row(label: str, *cells: str) -> None:
        table.add_row(label, *cells)

    row("finished", *(f"{each.completed:,} of {each.expected:,}" for each in results))
    row("bound", *(f"{each.bound:.3f} s" for each in results))
    for name, share in QUANTILES.items():
        row(name, *(f"{each.quantile(share):.3f} s  {each.ratio(share):6.3f}" for each in results))
    row("last finish", *(f"{each.makespan:.3f} s" for each in results))
    if any(each.faulty_times for each in results):
        row("last faulty", *(f"{quantile(each.faulty_times, 1.0):.3f} s" for each in results))
    for name in ("p50", "p99"):
        share = QUANTILES[name]
        row(
            f"first byte {name}",
            *(f"{quantile(each.first_bytes, share):.3f} s" for each in results),
        )
    row("copies from the origins", *(f"{each.copies_from_origins:.2f}" for each in results))
    row("messages per piece", *(f"{each.messages_per_piece:.1f}" for each in results))
    row("announces", *(f"{each.announces:,}" for each in results))
    row("watches", *(f"{each.watches:,}" for each in results))
    row("connections made", *(f"{each.connections:,}" for each in results))
    row("connections dropped", *(f"{each.dropped:,}" for each in results))
    row("dials refused", *(f"{each.refused:,}" for each in results))
    for kind in ("agents", "origins"):
        for idleness in Idleness:
            shares = [getattr(each, f"{kind[:-1]}_uplinks")[idleness.value] for each in results]
            if any(shares):
                row(f"uplinks of {kind}: {idleness.value}", *(f"{s:.1%}" for s in shares))
    return table


def targets_table(outcomes: Sequence[Outcome]) -> Table:
    """One line for each limit of each case."""
    table = Table("case", "measure", "target", "reached", "", box=None, pad_edge=False)
    for column in table.columns[2:4]:
        column.justify = "right"
    before = ""
    for outcome in outcomes:
        case, limit = outcome.case, outcome.limit
        title = "" if case.title == before else case.title
        before = case.title
        verdict = "ok" if outcome.is_met else "[bold red]missed[/]"
        if limit.label == "unfinished":
            table.add_row(title, limit.label, "0", f"{outcome.value:.0f}", verdict)
        else:
            table.add_row(
                title, limit.label, f"<= {limit.most:.2f}", f"{outcome.value:.3f}", verdict
            )
    return table


def scenarios_table(rows: Sequence[tuple[Scenario, SimulationOptions, SimulationResult]]) -> Table:
    """One line for each scenario: all survivors, and those that were spared; ratios are of the bound."""
    table = Table(
        "scenario",
        "finished",
        "p50",
        "p99",
        "max",
        "max of the spared",
        "their longest wait",
        "recovery",
        box=None,
        pad_edge=False,
    )
    table.columns[0].no_wrap = True
    for column in table.columns[1:]:
        column.justify = "right"
    for scenario, options, result in rows:
        times = sorted(result.times + result.faulty_times)
        table.add_row(
            scenario.name,
            f"{result.completed:,} of {result.expected:,}",
            *(
                f"{quantile(times, QUANTILES[name]) / result.bound:.2f}"
                for name in ("p50", "p99", "max")
            ),
            f"{result.ratio(1.0):.2f}" if result.times else "-",
            _seconds(result.longest_wait if result.times else None),
            _seconds(recovery(options, result)),
        )
    return table


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} s"
