"""The language of scenarios: what it reads, and what it says to a line that means nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from .scenario import (
    Load,
    Scenario,
    ScenarioError,
    Shape,
    Step,
    Window,
    load_all,
    parse,
)

SCENARIOS = Path(__file__).parent / "scenarios"

HEAD = """
title    an origin dies
cluster  origins=2 trackers=1 indexes=1 agents=2
backend  s3
members  dns
writes   sync
load     pushes=0.5 pulls=3 blobs=1KiB..2MiB
disk     agent-1 48MiB
excuse   2..4.5
"""


def scenario(*steps: str, head: str = HEAD) -> Scenario:
    return parse("\n".join([head, *steps, "at 90 end"]))


def test_a_scenario_is_read() -> None:
    found = scenario("at 3 kill origin-2  # without warning", "", "at 8.5 start origin-2")

    assert found == Scenario(
        name="scenario",
        title="an origin dies",
        shape=Shape(origins=2, trackers=1, indexes=1, agents=2),
        backend="s3",
        members="dns",
        writes="sync",
        load=Load(0.5, 3.0, 1 << 10, 2 << 20),
        disks={"agent-1": 48 << 20},
        excused=(Window(2.0, 4.5),),
        steps=(
            Step(3.0, "kill", ("origin-2",)),
            Step(8.5, "start", ("origin-2",)),
            Step(90.0, "end"),
        ),
    )
    assert found.seconds == 90.0


@pytest.mark.parametrize(
    ("words", "step"),
    [
        ("kill tracker-1 SIGTERM", Step(5, "kill", ("tracker-1",), "SIGTERM")),
        ("freeze s3 origins", Step(5, "freeze", ("s3", "origin-1", "origin-2"))),
        (
            "cut agent-2 from tracker-1 origins",
            Step(5, "cut", ("agent-2",), "", ("tracker-1", "origin-1", "origin-2")),
        ),
        ("cut agents from everything", Step(5, "cut", ("agent-1", "agent-2"), "", ("everything",))),
        ("heal", Step(5, "heal")),
        ("lose 2.5%", Step(5, "lose", (), "2.5%")),
        ("slow origin-1 1mbit", Step(5, "slow", ("origin-1",), "1mbit")),
        ("roll trackers indexes", Step(5, "roll", ("tracker-1", "index-1"))),
        ("fill agent-1", Step(5, "fill", ("agent-1",))),
        ("resolve origins to origin-2", Step(5, "resolve", ("origins",), "", ("origin-2",))),
        ("resolve trackers to silence", Step(5, "resolve", ("trackers",), "silence")),
    ],
)
def test_every_kind_of_step_is_read_and_written(words: str, step: Step) -> None:
    found = scenario(f"at 5 {words}")
    assert found.steps[0] == step
    assert parse(found.text()) == found


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("at three kill origin-1", "'three' is not a number of seconds"),
        ("at 5", "a step is: at SECONDS VERB"),
        ("at 5 explode origin-1", "'explode' is none of kill, start,"),
        ("at 5 kill", "kill names no host (at SECONDS kill HOST... [SIGKILL|SIGTERM])"),
        ("at 5 kill origin-3", "no host of this cluster is called 'origin-3'"),
        ("at 5 kill origin-1 origins", "names a host twice"),
        ("at 5 kill origin-1 SIGHUP", "knows the signals SIGKILL and SIGTERM, not SIGHUP"),
        ("at 5 cut agent-1", "wants HOST... from HOST..., or from everything"),
        ("at 5 lose 5", "wants a share of packets such as 5%"),
        ("at 5 slow origin-1", "wants HOST... RATE"),
        ("at 5 heal origin-1", "takes nothing more, not 'origin-1'"),
        ("at 5 wipe s3", "the backend cannot be used like that"),
        ("at 5 resolve origins", "wants trackers|indexes|origins|agents to HOST..."),
        # What cannot be done, found by playing it through:
        ("at 5 start origin-1", "start origin-1: it is up then, not down"),
        ("at 5 wipe origin-1", "wipe origin-1: it is up then, not down"),
        ("at 5 thaw origin-1", "thaw origin-1: it is up then, not frozen"),
        ("at 5 fill agent-2", "fill agent-2: it has no disk of its own: disk agent-2 SIZE"),
        ("at 91 kill origin-1\nat 4 start origin-1", "steps come in order"),
        ("at 5 end", "nothing comes after the end"),
        ("cluster agents=3", "must come before the first step"),
    ],
)
def test_a_step_that_means_nothing_is_named(line: str, complaint: str) -> None:
    with pytest.raises(ScenarioError) as caught:
        scenario("at 1 kill agent-2", *line.splitlines())
    assert complaint in str(caught.value)
    # HEAD has 10 lines, the first of them empty.
    assert str(caught.value).startswith(("scenario:11:", "scenario:12:", "scenario:13:"))


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("title", "'title' is none of"),
        ("cluster origins=0", "origins must be from 1 to 12, not '0'"),
        ("cluster masters=1", "'masters=1' is none of trackers="),
        ("cluster origins=1 origins=2", "'origins' stands here twice"),
        ("backend floppy", "'backend floppy' is none of"),
        ("load pushes=often", "pushes must be a number per second, not 'often'"),
        ("load blobs=1MiB", "blobs must be SIZE..SIZE"),
        ("load blobs=2MiB..1MiB", "the smaller one first"),
        ("disk origin-1 much", "must be a size such as"),
        ("excuse 5..3", "excuse wants SECONDS..SECONDS"),
        ("flavour vanilla", "'flavour vanilla' is none of: title TEXT"),
    ],
)
def test_a_setting_that_means_nothing_is_named(line: str, complaint: str) -> None:
    with pytest.raises(ScenarioError) as caught:
        parse(f"{line}\ntitle x\nat 3 end", source="mine.chaos")
    assert complaint in str(caught.value)
    assert str(caught.value).startswith("mine.chaos:1: ")


def test_what_a_cluster_lacks_cannot_be_broken() -> None:
    with pytest.raises(ScenarioError, match="there is no s3 in this cluster"):
        parse("title x\nat 3 freeze s3\nat 4 end")
    with pytest.raises(ScenarioError, match="no names are resolved in this cluster"):
        parse("title x\nat 3 resolve origins to nothing\nat 4 end")


@pytest.mark.parametrize("text", ["", "title x", "title x\nat 3 kill origin-1", "at 3 end"])
def test_a_scenario_has_a_title_and_an_end(text: str) -> None:
    with pytest.raises(ScenarioError):
        parse(text)


def test_what_a_scenario_needs_follows_from_its_steps() -> None:
    plain = parse("title x\nat 3 kill origin-1\nat 4 end")
    links = parse("title x\nat 3 lose 5%\nat 4 end")
    disks = parse("title x\ndisk origin-1 64MiB\nat 3 fill origin-1\nat 4 end")

    assert (plain.needs_namespaces, plain.needs_root) == (False, False)
    assert (links.needs_namespaces, links.needs_root) == (True, True)
    assert (disks.needs_namespaces, disks.needs_root) == (False, True)


def test_every_scenario_of_the_suite_can_be_played() -> None:
    scenarios = load_all(SCENARIOS)
    assert len(scenarios) >= 2
    for each in scenarios:
        assert parse(each.text(), name=each.name) == each
