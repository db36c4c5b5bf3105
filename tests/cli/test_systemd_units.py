"""The units in examples/: that systemd takes them, and that they fit the program."""

from __future__ import annotations

import configparser
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from swarmpull.config import ROLES, Config
from swarmpull.runtime import EXIT_CONFIG
from swarmpull.units import parse_duration

UNITS: Final = Path(__file__).resolve().parent.parent.parent / "examples" / "systemd"
TEMPLATE: Final = UNITS / "swarmpull@.service"
PROGRAM: Final = "/usr/local/bin/swarmpull"


def unit() -> configparser.ConfigParser:
    parsed = configparser.ConfigParser(interpolation=None, delimiters=("=",))
    parsed.optionxform = str  # type: ignore[assignment]
    parsed.read(TEMPLATE)
    return parsed


def test_the_service_is_ready_when_the_program_says_so_and_is_watched() -> None:
    service = unit()["Service"]
    assert service["Type"] == "notify"
    assert service["NotifyAccess"] == "main"
    assert parse_duration(service["WatchdogSec"]) >= 10
    assert service["RestartPreventExitStatus"] == str(EXIT_CONFIG)


def test_a_drain_that_cannot_ask_for_time_has_enough_by_default() -> None:
    assert parse_duration(unit()["Service"]["TimeoutStopSec"]) > Config().drain_timeout + 5


def test_the_command_line_is_one(tmp_path: Path) -> None:
    words = unit()["Service"]["ExecStart"].split()
    assert words[:3] == [PROGRAM, "run", "--role"]
    # %i is the name of a role; the rest are options that `config check` knows, too.
    assert words[3] == "%i"
    config = tmp_path / "swarmpull.toml"
    config.write_text((UNITS.parent / "cluster.toml").read_text())
    rest = ["--config", str(config), "--data-dir", str(tmp_path)]
    assert [word for word in words[4:] if word.startswith("--")] == rest[::2]
    done = subprocess.run(
        [sys.executable, "-m", "swarmpull", "config", "check", *rest],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_limits_are_for_roles_that_there_are() -> None:
    found = sorted(path.name for path in UNITS.glob("*.service.d"))
    assert found
    assert set(found) <= {f"swarmpull@{role}.service.d" for role in ROLES}


@pytest.mark.parametrize("role", ROLES)
def test_systemd_takes_the_unit(tmp_path: Path, role: str) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    for path in UNITS.iterdir():
        if path.is_dir():
            shutil.copytree(path, tmp_path / path.name)
    # It looks for the program, and for the instance as a file.
    text = TEMPLATE.read_text().replace(PROGRAM, shutil.which("true") or sys.executable)
    target = tmp_path / f"swarmpull@{role}.service"
    target.write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(target)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    said = [line for line in done.stderr.splitlines() if "swarmpull" in line]
    assert said == [], done.stderr
    assert done.returncode == 0, done.stderr
