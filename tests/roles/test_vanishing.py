"""Peers whose host is gone without a FIN, in a network namespace of their own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TREE = Path(__file__).resolve().parents[2]
SECONDS_MAX = 90

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None or shutil.which("ip") is None,
    reason="a network namespace needs root, unshare and ip",
)


def vanishing(case: str, directory: Path) -> dict[str, object]:
    """What came of it, from a process that ends when its connections have ended."""
    command = ["unshare", "--net", sys.executable, "-m", "tests.roles.vanishing", case]
    done = subprocess.run(
        [*command, str(directory)],
        cwd=TREE,
        capture_output=True,
        text=True,
        timeout=SECONDS_MAX,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    outcome: dict[str, object] = json.loads(done.stdout)
    return outcome


@pytest.mark.parametrize("case", ["inside a piece that it sends", "before it offers anything"])
def test_what_a_vanished_host_owed_is_fetched_elsewhere(tmp_path: Path, case: str) -> None:
    outcome = vanishing(case, tmp_path)

    assert outcome["stored"] is True
    assert outcome["buffered"] == 0


@pytest.mark.parametrize("case", ["inside a piece that it receives", "while nothing goes on"])
def test_the_kernel_gives_up_a_vanished_host_to_which_nothing_gets_through(
    tmp_path: Path, case: str
) -> None:
    """Long before the peer would be of no use, or too slow, for the core."""
    [reason] = vanishing(case, tmp_path)["reasons"]

    assert not any(word in reason for word in ("useless", "stalled", "store"))
