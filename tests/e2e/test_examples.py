"""The example cluster starts as its README line says, works, and ends on Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from tests.ports import is_free

from . import web
from .program import environment
from .waiting import wait_until

EXAMPLES: Final = Path(__file__).parents[2] / "examples"
# The example has the default ports, as somebody who reads the documentation expects them.
PORTS: Final = (
    5000,
    5001,
    5100,
    7100,
    7101,
    7200,
    7201,
    7300,
    7400,
    7450,
    7500,
    7501,
    7520,
    7530,
    7540,
)


@pytest.fixture(autouse=True)
def possible() -> None:
    if not EXAMPLES.is_dir():
        pytest.skip("the examples are in the source tree only")
    taken = [str(port) for port in PORTS if not is_free(port)]
    if taken:
        pytest.skip(f"the example needs ports that are in use here: {', '.join(taken)}")


def command_path(directory: Path) -> str:
    """A PATH on which ``swarmpull`` is the program under test."""
    directory.mkdir()
    command = directory / "swarmpull"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m swarmpull "$@"\n')
    command.chmod(0o755)
    return f"{directory}:{os.environ['PATH']}"


def test_the_example_cluster_takes_a_push_and_gives_it_out(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("wb") as output:
        script = subprocess.Popen(
            [str(EXAMPLES / "start-cluster.sh"), str(tmp_path / "data")],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment(PATH=command_path(tmp_path / "bin")),
        )
    try:

        def is_up() -> bool:
            assert script.poll() is None, log.read_text()
            return "Ctrl-C" in log.read_text()

        wait_until(is_up, "the example cluster is up", timeout=60.0)
        digest = web.push_image(5000, "team/example", "v1", [b"a layer of the example"])
        assert web.pull_image(5001, "team/example", "v1") == digest
    finally:
        # Not SIGINT: a shell cannot catch what it was started with as ignored, as all in the background are.
        script.send_signal(signal.SIGTERM)
        status = script.wait(60.0)
    assert status == 0, log.read_text()
    assert all(is_free(port) for port in PORTS)


def test_the_example_cluster_is_stopped_while_it_starts(tmp_path: Path) -> None:
    log, data = tmp_path / "log", tmp_path / "data"
    with log.open("wb") as output:
        script = subprocess.Popen(
            [str(EXAMPLES / "start-cluster.sh"), str(data)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment(PATH=command_path(tmp_path / "bin")),
        )
    try:
        # Of the first process there is a log, and it does not serve yet.
        wait_until((data / "tracker.log").exists, "the tracker is started", timeout=60.0)
    finally:
        script.send_signal(signal.SIGTERM)
        status = script.wait(60.0)
    assert status == 0, log.read_text()
    assert "ended with status" not in log.read_text()
    assert all(is_free(port) for port in PORTS)
