"""The lab of the benchmarks, small: that it measures, and that it leaves nothing behind."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from .program import environment
from .waiting import wait_until

TREE: Final = Path(__file__).resolve().parent.parent.parent
COMMAND: Final = (sys.executable, "-m", "benchmarks.lab")
SECONDS_MAX: Final = 240
MIB: Final = 1 << 20

needs_namespaces = pytest.mark.skipif(
    os.geteuid() != 0 or any(shutil.which(name) is None for name in ("ip", "tc", "curl")),
    reason="network namespaces need root, ip and tc, and the pulls need curl",
)


def run(*arguments: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    """The lab, run to its end."""
    return subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        text=True,
        timeout=SECONDS_MAX,
        cwd=TREE,
        env=environment(**({} if path is None else {"PATH": path})),
        check=False,
    )


@contextmanager
def running(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=TREE,
        env=environment(),
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            # Not killed, so that it ends what it has started, too.
            process.terminate()
            process.communicate(timeout=SECONDS_MAX)


def namespaces_of(process: int) -> list[str]:
    directory = Path("/run/netns")
    prefix = f"swarmpull-{process}-"
    found = directory.iterdir() if directory.exists() else ()
    return [path.name for path in found if path.name.startswith(prefix)]


def pids_in(namespaces: list[str]) -> list[int]:
    listed = [
        subprocess.run(
            ["ip", "netns", "pids", name], capture_output=True, text=True, check=False
        ).stdout.split()
        for name in namespaces
    ]
    return [int(pid) for pids in listed for pid in pids]


def test_the_lab_says_why_it_is_skipped(tmp_path: Path) -> None:
    done = run(path=str(tmp_path))
    assert done.returncode == 0
    assert done.stderr.startswith("skipped: ")
    assert "root" in done.stderr or "not installed: ip, tc, curl" in done.stderr


@pytest.mark.parametrize(
    ("option", "value", "complaint"),
    [
        ("--rate", "200", "--rate"),
        ("--rate", "0mbit", "--rate"),
        ("--agents", "0", "from 1 to 200"),
        ("--agents", "10000", "from 1 to 200"),
        ("--size", "0", "--size"),
        ("--size", "many", "--size"),
    ],
)
def test_an_option_that_cannot_be_is_named(option: str, value: str, complaint: str) -> None:
    done = run(option, value)
    assert done.returncode == 2
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr


@needs_namespaces
@pytest.mark.slow
def test_a_small_burst_is_measured_and_leaves_nothing_behind(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    agents, size, rate = 2, 8 * MIB, 100e6
    result = tmp_path / "result.json"
    arguments = ["--only", "swarm", "--agents", str(agents), "--size", "8MiB", "--rate", "100mbit"]
    arguments += ["--rounds", "1", "--compare", "libtorrent"]
    with running(*arguments, "--json", str(result), "--directory", str(work)) as lab:
        _, said = lab.communicate(timeout=SECONDS_MAX)
    assert lab.returncode == 0, said
    swarm = json.loads(result.read_text())["swarm"]
    (burst,) = swarm["bursts"]["swarmpull"]
    assert len(burst["seconds"]) == agents
    # Not faster than the links: they are shaped.  A bucket lets 256 KiB through at once.
    assert burst["seconds"][0] > 0.9 * (size - MIB / 4) * 8 / rate
    assert sum(burst["received"].values()) == agents * size
    assert burst["received"]["origin"] >= size
    assert burst["usages"]["agent"]["processes"] == agents
    assert burst["usages"]["agent"]["cpu"] > 0
    assert burst["usages"]["agent"]["memory"] > 10 * MIB
    prediction = swarm["prediction"]
    assert 0 < prediction["bound"] <= prediction["slowest"]
    assert 0 < prediction["median"] <= prediction["slowest"]
    if importlib.util.find_spec("libtorrent") is None:
        assert "comparison skipped" in said
    else:
        (other,) = swarm["bursts"]["libtorrent"]
        assert sum(other["received"].values()) >= agents * size
    assert list(work.iterdir()) == []
    assert namespaces_of(lab.pid) == []


@needs_namespaces
@pytest.mark.slow
def test_an_interrupted_lab_leaves_nothing_behind(tmp_path: Path) -> None:
    arguments = ("--only", "swarm", "--agents", "2", "--rate", "1mbit", "--size", "8MiB")
    with running(*arguments, "--directory", str(tmp_path)) as lab:
        # A tracker, an index, an origin and two agents run, in their namespaces.
        wait_until(lambda: len(pids_in(namespaces_of(lab.pid))) >= 5, "the roles run")
        started = pids_in(namespaces_of(lab.pid))
        lab.send_signal(signal.SIGTERM)
        _, said = lab.communicate(timeout=SECONDS_MAX)
    assert lab.returncode == 130
    assert "interrupted" in said
    assert "Traceback" not in said
    assert namespaces_of(lab.pid) == []
    assert [pid for pid in started if Path(f"/proc/{pid}").exists()] == []
    assert list(tmp_path.iterdir()) == []
