"""A few small scenarios with real processes; `nox -s chaos` runs all of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import pytest

from tests.e2e.program import environment
from tests.e2e.waiting import wait_until

from . import network

TREE: Final = Path(__file__).resolve().parent.parent.parent
COMMAND: Final = (sys.executable, "-m", "tests.chaos")
SECONDS_MAX: Final = 1200
# The limits of the suite, four times as long as for people who wait for it: here they only end what hangs.
PATIENCE: Final = {"SWARMPULL_CHAOS_PATIENCE": "120"}

needs_namespaces = pytest.mark.skipif(bool(network.obstacle()), reason=network.obstacle())


def chaos(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The suite, run to its end."""
    return subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        text=True,
        timeout=SECONDS_MAX,
        cwd=TREE,
        env=environment(**PATIENCE),
        check=False,
    )


def namespaces_of(process: int) -> list[str]:
    directory = Path("/run/netns")
    found = directory.iterdir() if directory.exists() else ()
    return [path.name for path in found if path.name.startswith(f"swarmpull-{process}-")]


def processes_of(directory: Path) -> list[int]:
    """Those that were told to work below a directory."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().decode(errors="replace").split("\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if "run" in command and any(word.startswith(str(directory)) for word in command):
            found.append(int(path.parent.name))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("quick-kill", ["--loopback"]),
        pytest.param("quick-partition", [], marks=needs_namespaces),
        ("quick-roll", ["--loopback", "--tls"]),
    ],
)
def test_nothing_is_lost_and_nothing_left_over(
    tmp_path: Path, name: str, more: Sequence[str]
) -> None:
    results = tmp_path / "results.json"
    work = tmp_path / "work"
    work.mkdir()

    done = chaos(name, "--quick", "--json", str(results), "--directory", str(work), *more)

    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    (result,) = json.loads(results.read_text())
    assert result["scenario"] == name
    assert (result["violations"], result["lost"]) == ([], 0)
    assert result["pushes"]["made"] > 3
    assert result["pulls"]["made"] > 3
    assert result["cold_reads"] == result["pushes"]["made"]
    assert result["pulls"]["failed"] == result["pushes"]["failed"] == 0
    assert all(each["ready"] is not None for each in result["recoveries"])
    assert list(work.iterdir()) == []
    assert processes_of(work) == []


@pytest.mark.slow
@needs_namespaces
def test_an_interrupted_run_leaves_nothing_behind(tmp_path: Path) -> None:
    with subprocess.Popen(
        [*COMMAND, "quick-partition", "--directory", str(tmp_path)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=TREE,
        env=environment(**PATIENCE),
    ) as process:
        try:
            wait_until(lambda: len(processes_of(tmp_path)) >= 2, "roles run", timeout=SECONDS_MAX)
            assert namespaces_of(process.pid)
            process.send_signal(signal.SIGTERM)
            _, said = process.communicate(timeout=SECONDS_MAX)
        finally:
            # Not killed, so that it ends what it has started, too.
            process.terminate()
    assert process.returncode == 130
    assert "interrupted" in said
    assert "Traceback" not in said
    assert namespaces_of(process.pid) == []
    assert processes_of(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_a_scenario_that_is_not_there_is_named() -> None:
    done = chaos("kill-everybody")
    assert done.returncode == 2
    assert "there is no scenario 'kill-everybody'; there are: " in done.stderr
    assert "quick-kill" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_file_with_a_mistake_is_told_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.chaos"
    path.write_text("title mine\nat 3 explode origin-1\nat 4 end\n")
    done = chaos("--file", str(path))
    assert done.returncode == 2
    assert done.stderr.startswith("chaos: mine.chaos:2: 'explode' is none of kill, ")


def test_a_made_up_scenario_can_be_kept_and_run_again(tmp_path: Path) -> None:
    first = chaos("--seed", "7", "--minutes", "2", "--print")
    assert first.returncode == 0
    path = tmp_path / "seven.chaos"
    path.write_text(first.stdout)
    again = chaos("--file", str(path), "--print")
    assert again.stdout == first.stdout


def test_what_cannot_be_done_here_is_skipped_with_a_reason() -> None:
    done = chaos("quick-partition", "--loopback")
    assert done.returncode == 0
    assert "skipped: quick-partition: " in done.stderr
    assert "links" in done.stderr or os.geteuid() != 0
