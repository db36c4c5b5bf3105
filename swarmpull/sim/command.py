"""The command ``swarmpull simulate``: runs experiments, shows progress, prints or draws what came out."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import attrs
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from swarmpull.sim import scenarios
from swarmpull.sim.options import Policy, SimulationOptions
from swarmpull.sim.plot import draw
from swarmpull.sim.report import results_table, scenarios_table, targets_table
from swarmpull.sim.result import SimulationResult
from swarmpull.sim.simulation import Simulation
from swarmpull.sim.targets import BASE, Case, Outcome, cases, judge

ProgressOf = Callable[[str], Callable[[float], None]]


# What may be said beside these; everything else a case or a scenario says itself.
_TABLE_OPTIONS: Final = frozenset({"table", "names", "jobs", "hosts", "size", "seed", "as_json"})
_SCENARIO_OPTIONS: Final = frozenset({"scenarios", "jobs", "hosts", "size", "seed", "as_json"})


def run(given: Mapping[str, Any], explicit: AbstractSet[str]) -> bool:
    """Do what the command line says.

    Args:
        given: the value of every option; ``explicit`` names those that were typed.

    Returns:
        whether every surviving agent finished, and every target of a table is met.

    Raises:
        ValueError: options that do not go together, or are out of range.
    """
    if given["scenarios"]:
        _check_alone("scenario", explicit - _SCENARIO_OPTIONS)
        return run_scenarios(
            given["scenarios"],
            given["hosts"],
            given["size"] if "size" in explicit else scenarios.SIZE,
            given["seed"],
            jobs=max(given["jobs"], 1),
            as_json=given["as_json"],
        )
    if given["table"]:
        _check_alone("table", explicit - _TABLE_OPTIONS)
        return run_table(
            given["hosts"],
            given["size"],
            given["seed"],
            names=given["names"],
            jobs=max(given["jobs"], 1),
            as_json=given["as_json"],
        )
    for name in ("names", "jobs"):
        if name in explicit:
            others = "--table" if name == "names" else "--table or --scenario"
            raise ValueError(f"--{name.replace('names', 'case')} goes with {others}")
    plot = given["plot"]
    if plot is not None and plot.suffix.lower() != ".svg":
        raise ValueError(f"{plot}: pictures are SVG, name the file so")
    if plot is not None and not plot.parent.is_dir():
        raise ValueError(f"{plot}: there is no directory {plot.parent}")
    policies = list(Policy) if given["policy"] == "both" else [Policy(given["policy"])]
    fields = attrs.fields_dict(SimulationOptions).keys() - {"policy"}
    chosen = {name: value for name, value in given.items() if name in fields and value is not None}
    return simulate(SimulationOptions(**chosen), policies, as_json=given["as_json"], plot=plot)


def _check_alone(option: str, odd: AbstractSet[str]) -> None:
    if odd:
        raise ValueError(f"--{option} sets --{min(odd).replace('_', '-')} itself")


def simulate(
    options: SimulationOptions,
    policies: Sequence[Policy],
    *,
    as_json: bool = False,
    plot: Path | None = None,
) -> bool:
    """Run one experiment with each policy and print what came out.

    Returns whether every surviving agent finished.
    """
    results = []
    with _progress_bars() as progress:
        for policy in policies:
            simulation = Simulation(attrs.evolve(options, policy=policy))
            results.append(simulation.run(progress(policy.value)))
    documents = [result.document(attrs.evolve(options, policy=result.policy)) for result in results]
    if as_json:
        _print_json(documents[0] if len(documents) == 1 else documents)
    else:
        Console().print(results_table(results))
    if plot is not None:
        plot.write_text(draw(options, results), encoding="utf-8")
    return all(result.completed == result.expected for result in results)


def run_table(
    hosts: int, size: int, seed: int, *, names: Sequence[str] = (), jobs: int = 1, as_json: bool
) -> bool:
    """Run the cases of those names, or all, and print target and outcome of each.

    Returns whether every target is met.

    Raises:
        ValueError: there is no such case.
    """
    chosen = _choose(cases(hosts, size, seed), names)
    with _progress_bars() as progress:
        results = _run_all({case.name: case.options for case in chosen}, jobs, progress)
    base = results.get(BASE)
    outcomes = [
        outcome
        for case in chosen
        if not names or case.name in names
        for outcome in judge(case, results[case.name], base or results[case.name])
    ]
    if as_json:
        _print_json([_case_document(case, results[case.name], outcomes) for case in chosen])
    else:
        Console().print(targets_table(outcomes))
    return all(outcome.is_met for outcome in outcomes)


def run_scenarios(
    names: Sequence[str], hosts: int, size: int, seed: int, *, jobs: int = 1, as_json: bool
) -> bool:
    """Run the scenarios of those names and print what came of each.

    Returns whether every survivor of every one has everything.

    Raises:
        ValueError: there is no such scenario.
    """
    chosen = scenarios.choose(names)
    options = {each.name: each.options(hosts, size, seed) for each in chosen}
    with _progress_bars() as progress:
        results = _run_all(options, jobs, progress)
    rows = [(each, options[each.name], results[each.name]) for each in chosen]
    if as_json:
        _print_json([scenarios.document(*row) for row in rows])
    else:
        Console().print(scenarios_table(rows))
    return all(result.completed == result.expected for result in results.values())


def _choose(every: list[Case], names: Sequence[str]) -> list[Case]:
    unknown = [name for name in names if name not in {case.name for case in every}]
    if unknown:
        known = ", ".join(case.name for case in every)
        raise ValueError(f"there is no case {unknown[0]!r}; there are {known}")
    wanted = [case for case in every if not names or case.name in names]
    needs_base = any(case.needs_base for case in wanted)
    return [case for case in every if case in wanted or (needs_base and case.name == BASE)]


def _run_all(
    experiments: Mapping[str, SimulationOptions], jobs: int, progress: ProgressOf
) -> dict[str, SimulationResult]:
    """Run experiments, so many at a time; the results by their names."""
    if jobs == 1:
        return {
            name: Simulation(options).run(progress(name)) for name, options in experiments.items()
        }
    show = progress("cases")
    results = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        runs = {name: pool.submit(_run, options) for name, options in experiments.items()}
        for number, (name, run) in enumerate(runs.items(), 1):
            results[name] = run.result()
            show(number / len(experiments))
    return results


def _run(options: SimulationOptions) -> SimulationResult:
    return Simulation(options).run()


def _case_document(
    case: Case, result: SimulationResult, outcomes: Sequence[Outcome]
) -> dict[str, Any]:
    judged = [
        {
            "measure": outcome.limit.label,
            "target": outcome.limit.most,
            "reached": outcome.value if outcome.value == outcome.value else None,
            "met": outcome.is_met,
        }
        for outcome in outcomes
        if outcome.case is case
    ]
    return {"case": case.name, "targets": judged, **result.document(case.options)}


def _print_json(document: object) -> None:
    print(json.dumps(document, indent=2, allow_nan=False))  # noqa: T201 - the output of a command


@contextmanager
def _progress_bars() -> Iterator[ProgressOf]:
    """Progress on standard error, if that is a terminal."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:

        def progress_of(name: str) -> Callable[[float], None]:
            task = bars.add_task(name, total=1.0)
            return lambda share: bars.update(task, completed=share)

        yield progress_of
