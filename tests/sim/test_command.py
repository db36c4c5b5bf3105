"""The command line of the simulator."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from swarmpull.cli import main

SMALL = ["simulate", "--hosts", "12", "--origins", "2", "--size", "64MiB"]


def test_the_result_is_printed_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--faults", "slow=10%x4", "--rtt", "2ms", "--json"]) == 0

    document = json.loads(capsys.readouterr().out)
    assert document["completed"] == document["expected"] == 12
    assert document["options"]["rtt"] == 0.002
    assert document["options"]["faults"] == "slow=10%x4"
    assert document["ratio"]["p50"] == pytest.approx(document["seconds"]["p50"] / document["bound"])


def test_both_policies_run_on_the_same_swarm(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--policy", "both", "--json"]) == 0

    documents = json.loads(capsys.readouterr().out)
    assert [document["policy"] for document in documents] == ["offers", "pipeline"]
    assert documents[0]["bound"] == documents[1]["bound"]


def test_a_table_is_printed_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--readers"]) == 0

    printed = capsys.readouterr()
    for label in ("bound", "p99.9", "first byte p99", "copies from the origins", "uplinks of"):
        assert label in printed.out
    assert printed.err == "", "no progress bar where there is no terminal"


def test_the_picture_is_well_formed_svg(tmp_path: Path) -> None:
    file = tmp_path / "swarm.svg"

    assert main([*SMALL, "--policy", "both", "--faults", "late=1@1s", "--plot", str(file)]) == 0

    root = ET.parse(file).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    texts = [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "0.0671 GB to 12 hosts" in texts
    assert any(text.startswith("p99  ") for text in texts)
    assert any("late=1@1s" in text for text in texts)
    assert "nan" not in file.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--size", "5q"], "must be a size"),
        (["--rtt", "5"], "a duration with its unit"),
        (["--hosts", "0"], "hosts"),
        (["--faults", "slow=5%"], "needs a factor"),
        (["--plot", "swarm.png"], "SVG"),
        (["--plot", "nowhere/swarm.svg"], "no directory"),
        (["--piece", "5MiB"], "powers of two"),
        (["--table", "--rtt", "5ms"], "--table sets --rtt itself"),
        (["--table", "--case", "fast"], "no case 'fast'"),
        (["--jobs", "2"], "goes with --table or --scenario"),
        (["--scenario", "flood"], "no scenario 'flood'; there are calm, kill-each-role"),
        (["--scenario", "all", "--faults", "killed=1"], "--scenario sets --faults itself"),
    ],
)
def test_bad_options_are_one_line_that_says_what_is_wrong(
    arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", *arguments]) == 2

    [line] = capsys.readouterr().err.splitlines()
    assert reason in line


def test_a_run_that_is_given_up_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--until", "100ms", "--json"]) == 1

    document = json.loads(capsys.readouterr().out)
    assert document["completed"] < document["expected"]


@pytest.mark.sim
def test_a_seed_gives_the_same_digits_under_any_hash_seed() -> None:
    command = [sys.executable, "-m", "swarmpull", *SMALL, "--policy", "both", "--json"]
    command += ["--jitter", "1ms", "--readers", "--faults", "killed=1,greedy=1,chatty=1,slow=2x3"]

    printed = [
        subprocess.run(
            command,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        for seed in ("1", "4711")
    ]

    assert printed[0] == printed[1]
    assert json.loads(printed[0])


@pytest.mark.sim
def test_a_table_of_chosen_cases_says_which_targets_are_met(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["simulate", "--table", "--hosts", "12", "--size", "128MiB", "--case", "readers"]

    status = main([*arguments, "--json"])

    base, readers = json.loads(capsys.readouterr().out)
    assert (base["case"], readers["case"]) == ("base", "readers")
    assert base["targets"] == []
    assert next(target["measure"] for target in readers["targets"]) == "first byte p99, s"
    assert status == (0 if all(target["met"] for target in readers["targets"]) else 1)


@pytest.mark.sim
def test_chosen_scenarios_are_shown_with_those_who_finished(
    capsys: pytest.CaptureFixture[str],
) -> None:
    chosen = ["--scenario", "partition", "--scenario", "calm"]

    assert main(["simulate", *chosen, "--hosts", "12", "--size", "64MB"]) == 0

    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:4] for line in lines[-2:]] == [
        ["calm", "12", "of", "12"],
        ["partition", "12", "of", "12"],
    ]
