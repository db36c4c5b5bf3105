"""Results as tables for people, and as plain values for programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs

from .records import Counts
from .run import Result

_COLUMNS = (
    "scenario",
    "pushes",
    "failed",
    "pulls",
    "failed",
    "lost",
    "longest wait",
    "ready after",
    "in backend",
    "verdict",
)


def document(results: Sequence[Result]) -> list[dict[str, Any]]:
    """For ``--json``."""
    return [attrs.asdict(result) for result in results]


def table(results: Sequence[Result]) -> list[str]:
    """One line for each scenario, as Markdown."""
    rows = [_COLUMNS, tuple("---" for _ in _COLUMNS), *map(_row, results)]
    return [f"| {' | '.join(row)} |" for row in rows]


def _row(result: Result) -> tuple[str, ...]:
    pushes, pulls = result.pushes, result.pulls
    return (
        result.scenario + (" (TLS)" if result.tls else ""),
        str(pushes.made),
        _failures(pushes),
        str(pulls.made),
        _failures(pulls),
        str(result.lost),
        f"{max(pushes.stall, pulls.stall):.1f} s",
        _seconds(result.health),
        _seconds(result.backend),
        "ok" if not result.violations else f"{len(result.violations)} violations",
    )


def _failures(counts: Counts) -> str:
    """Those that could have succeeded, and those that could not."""
    return f"{counts.failed} (+{counts.refused + counts.excused})"


def _summary(counts: Counts) -> str:
    return (
        f"{counts.made} made in {counts.attempts} attempts: {counts.failed} failed, {counts.refused} were "
        f"refused and {counts.excused} failed with an excuse; longest wait {counts.stall:.1f} s, "
        f"{counts.stall_excused:.1f} s with an excuse"
    )


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} s"


def details(result: Result) -> list[str]:
    """What came after each step, what took longest, and every violation."""
    lines = [
        f"{result.scenario}: {result.title}",
        f"  pushes {_summary(result.pushes)}",
        f"  pulls  {_summary(result.pulls)}",
        f"  ready {_seconds(result.health)} after the end, in the backend {_seconds(result.backend)}",
    ]
    if result.damaged:
        lines.append(f"  {result.damaged} blobs were damaged on disks, and read again at the end")
    lines += [
        f"  {each.at:6.1f} s  {each.step:42} ready {_seconds(each.ready):>7}, "
        f"first pull {_seconds(each.pull):>7}, first push {_seconds(each.push):>7}"
        for each in result.recoveries
    ]
    lines += [
        f"  {each.wait:6.1f} s  waited by a {each.kind} at {each.host} that began at {each.started:.1f} s: "
        f"{each.request}"
        for each in result.slowest
    ]
    return [*lines, *(f"  VIOLATION {line}" for line in result.violations)]
