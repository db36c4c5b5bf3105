"""The language of scenarios: what a cluster looks like, and what happens to it at which second.

    # Anything after a hash is for the reader.
    title    an origin dies and comes back
    cluster  origins=3 trackers=3 indexes=2 agents=6
    backend  directory
    load     pushes=1 pulls=3 blobs=4KiB..6MiB

    at 3   kill origin-2
    at 5   cut agent-4 from tracker-1
    at 8   heal
    at 9   start origin-2
    at 20  end

Steps come in the order of their times, which are seconds since the load began; the last one is ``end``.
A host is named by its role and number (``origin-2``, and ``s3`` for the backend), all of a role by its
plural (``origins``).  `parse` also plays the steps through, so that a scenario which wants to wipe the disk
of a process that runs is refused before anything is started.  `Scenario.text` writes the language.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import attrs

from swarmpull.units import parse_size

ROLES: Final = ("tracker", "index", "origin", "agent")
PLURALS: Final = {"trackers": "tracker", "indexes": "index", "origins": "origin", "agents": "agent"}
BACKENDS: Final = ("directory", "s3")
MEMBERS: Final = ("static", "dns")
WRITES: Final = ("queue", "sync")
# One of each is the least that can pull; 2 cores carry no more than this in bearable time.
COUNT_MAX: Final = 12
SECONDS_MAX: Final = 3600.0
S3: Final = "s3"
EVERYTHING: Final = "everything"
SIGNALS: Final = ("SIGKILL", "SIGTERM")
# What `resolve` may say instead of hosts: no address, an error of the server, no answer at all.
NO_ANSWERS: Final = ("nothing", "failure", "silence")

_RATE: Final = re.compile(r"([1-9][0-9]*)(kbit|mbit|gbit)", re.ASCII)
_PERCENT: Final = re.compile(r"([0-9]{1,2}(?:\.[0-9])?)%", re.ASCII)
_SECONDS: Final = re.compile(r"[0-9]{1,5}(?:\.[0-9]{1,3})?", re.ASCII)
_NUMBER: Final = re.compile(r"[0-9]{1,3}(?:\.[0-9]{1,2})?", re.ASCII)


@attrs.define(slots=False)
class ScenarioError(Exception):
    """A line that means nothing, or cannot be done.

    Attributes:
        source: the name of the file.
        line: counted from 1.
        reason: what is wrong, and what is allowed.
    """

    source: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.source}:{self.line}: {self.reason}"


@attrs.frozen
class Shape:
    """How many processes of each role there are."""

    trackers: int = 3
    indexes: int = 2
    origins: int = 3
    agents: int = 6

    def hosts(self) -> tuple[str, ...]:
        """Their names, in the order in which they are started."""
        counts = {
            "tracker": self.trackers,
            "index": self.indexes,
            "origin": self.origins,
            "agent": self.agents,
        }
        return tuple(f"{role}-{n}" for role, count in counts.items() for n in range(1, count + 1))


@attrs.frozen
class Load:
    """What clients do all the while.

    Attributes:
        pushes: images per second.
        pulls: images per second.
        smallest: bytes of a layer, at least.
        largest: bytes of a layer, at most.
    """

    pushes: float = 0.5
    pulls: float = 1.5
    smallest: int = 4 << 10
    largest: int = 6 << 20


@attrs.frozen
class Step:
    """Something that happens.

    Attributes:
        at: seconds since the load began.
        verb: what.
        hosts: to whom.
        argument: the signal, the rate, the share of lost packets, or no answer.
        others: what the hosts are cut off from, or what a name resolves to.
        line: of the file.
    """

    at: float
    verb: str
    hosts: tuple[str, ...] = ()
    argument: str = ""
    others: tuple[str, ...] = ()
    line: int = attrs.field(default=0, eq=False)

    def __str__(self) -> str:
        join = {"cut": "from", "resolve": "to"}.get(self.verb, "")
        rest = [join, *self.others] if self.others or (join and self.argument) else []
        return " ".join(
            [self.verb, *self.hosts, *rest, *([self.argument] if self.argument else [])]
        )


@attrs.frozen
class Window:
    """Seconds in which requests may fail, because nobody could answer them."""

    start: float
    end: float


@attrs.frozen(kw_only=True)
class Scenario:
    """What happens to which cluster under which load.

    Attributes:
        name: of the file.
        title: what is tried, in a few words.
        steps: in order of time; the last one is ``end``.
        writes: when a push is acknowledged, `origin.write_back`.
        excused: when requests may fail although nothing was done to the host that was asked.
        disks: bytes of the file systems of hosts that have a small one.
    """

    name: str
    title: str
    steps: tuple[Step, ...]
    shape: Shape = Shape()
    load: Load = Load()
    backend: str = "directory"
    members: str = "static"
    writes: str = "queue"
    excused: tuple[Window, ...] = ()
    disks: dict[str, int] = attrs.field(factory=dict)

    @property
    def seconds(self) -> float:
        return self.steps[-1].at

    @property
    def needs_namespaces(self) -> bool:
        """Whether it does something to links, which loopback has not."""
        return self.members == "dns" or any(VERBS[step.verb].on_links for step in self.steps)

    @property
    def needs_root(self) -> bool:
        return self.needs_namespaces or bool(self.disks)

    def text(self) -> str:
        """The scenario as `parse` reads it."""
        shape, load = attrs.asdict(self.shape), self.load
        blobs = f"{_size(load.smallest)}..{_size(load.largest)}"
        lines = [
            f"title    {self.title}",
            f"cluster  {' '.join(f'{role}={count}' for role, count in shape.items())}",
            f"backend  {self.backend}",
            f"members  {self.members}",
            f"writes   {self.writes}",
            f"load     pushes={load.pushes:g} pulls={load.pulls:g} blobs={blobs}",
            *(f"disk     {host} {_size(size)}" for host, size in self.disks.items()),
            *(f"excuse   {window.start:g}..{window.end:g}" for window in self.excused),
            "",
            *(f"at {step.at:<6g} {step}" for step in self.steps),
        ]
        return "\n".join([*lines, ""])


def _size(size: int) -> str:
    """Bytes in the largest unit that keeps them whole."""
    power = max(power for power in range(4) if size % (1 << 10 * power) == 0)
    return f"{size >> 10 * power}{('', 'KiB', 'MiB', 'GiB')[power]}"


@attrs.frozen
class Verb:
    """How a step is written and what it does to a host.

    Attributes:
        arguments: the form, for error messages.
        read: splits the words after the verb into hosts, argument and others.
        before: the states in which a host must be: up, down, frozen; empty when it does not matter.
        after: the state in which it is then; empty when it stays.
        on_links: needs network namespaces.
    """

    arguments: str
    read: Callable[[list[str], Shape], tuple[tuple[str, ...], str, tuple[str, ...]]]
    before: tuple[str, ...] = ()
    after: str = ""
    on_links: bool = False


# --- words ----------------------------------------------------------------------------------------


def _hosts(words: list[str], shape: Shape, *, at_least: int = 1) -> tuple[str, ...]:
    """Names of hosts, plurals spelled out, each once."""
    if len(words) < at_least:
        raise ValueError("names no host")
    everybody, found = (*shape.hosts(), S3), []
    for word in words:
        if word in PLURALS:
            found += [host for host in everybody if host.startswith(f"{PLURALS[word]}-")]
        elif word in everybody:
            found.append(word)
        else:
            raise ValueError(f"no host of this cluster is called {word!r}")
    if len(set(found)) < len(found):
        raise ValueError("names a host twice")
    return tuple(found)


def _roles_only(words: list[str], shape: Shape) -> tuple[str, ...]:
    hosts = _hosts(words, shape)
    if S3 in hosts:
        raise ValueError("the backend cannot be used like that: cut it off, freeze or kill it")
    return hosts


def _read_hosts(words: list[str], shape: Shape) -> tuple[tuple[str, ...], str, tuple[str, ...]]:
    return _hosts(words, shape), "", ()


def _read_roles(words: list[str], shape: Shape) -> tuple[tuple[str, ...], str, tuple[str, ...]]:
    return _roles_only(words, shape), "", ()


def _read_kill(words: list[str], shape: Shape) -> tuple[tuple[str, ...], str, tuple[str, ...]]:
    number = ""
    if words and words[-1].startswith("SIG"):
        words, number = words[:-1], words[-1]
        if number not in SIGNALS:
            raise ValueError(f"knows the signals {' and '.join(SIGNALS)}, not {number}")
    return _hosts(words, shape), number, ()


def _read_cut(words: list[str], shape: Shape) -> tuple[tuple[str, ...], str, tuple[str, ...]]:
    if words.count("from") != 1:
        raise ValueError("wants HOST... from HOST..., or from everything")
    middle = words.index("from")
    hosts, others = _hosts(words[:middle], shape), words[middle + 1 :]
    if others == [EVERYTHING]:
        return hosts, "", (EVERYTHING,)
    return hosts, "", _hosts(others, shape)


def _read_nothing(words: list[str], _: Shape) -> tuple[tuple[str, ...], str, tuple[str, ...]]:
    if words:
        raise ValueError(f"takes nothing more, not {' '.join(words)!r}")
    return (), "", ()


def _read_share(words: list[str], _: Shape) -> tuple[tuple[str, ...], str, tuple[str, ...]]:
    if len(words) != 1 or _PERCENT.fullmatch(words[0]) is None:
        raise ValueError(f"wants a share of packets such as 5%, not {' '.join(words)!r}")
    return (), words[0], ()


def _read_rate(words: list[str], shape: Shape) -> tuple[tuple[str, ...], str, tuple[str, ...]]:
    if len(words) < 2 or _RATE.fullmatch(words[-1]) is None:
        raise ValueError("wants HOST... RATE with a rate such as 1mbit")
    return _hosts(words[:-1], shape), words[-1], ()


def _read_resolve(words: list[str], shape: Shape) -> tuple[tuple[str, ...], str, tuple[str, ...]]:
    if len(words) < 3 or words[1] != "to" or words[0] not in PLURALS:
        raise ValueError(
            f"wants {'|'.join(PLURALS)} to HOST..., or to {', '.join(NO_ANSWERS[:-1])} or {NO_ANSWERS[-1]}"
        )
    name, answers = words[0], words[2:]
    if len(answers) == 1 and answers[0] in NO_ANSWERS:
        return (name,), answers[0], ()
    return (name,), "", _roles_only(answers, shape)


VERBS: Final[dict[str, Verb]] = {
    "kill": Verb("HOST... [SIGKILL|SIGTERM]", _read_kill, ("up", "frozen"), "down"),
    "start": Verb("HOST...", _read_hosts, ("down",), "up"),
    "restart": Verb("HOST...", _read_roles, ("up",)),
    "roll": Verb("HOST...", _read_roles, ("up",)),
    "wipe": Verb("HOST...", _read_roles, ("down",)),
    "freeze": Verb("HOST...", _read_hosts, ("up",), "frozen"),
    "thaw": Verb("HOST...", _read_hosts, ("frozen",), "up"),
    "cut": Verb("HOST... from HOST...|everything", _read_cut, on_links=True),
    "heal": Verb("", _read_nothing, on_links=True),
    "lose": Verb("PERCENT", _read_share, on_links=True),
    "slow": Verb("HOST... RATE", _read_rate, on_links=True),
    "fast": Verb("HOST...", _read_hosts, on_links=True),
    "fill": Verb("HOST...", _read_roles),
    "free": Verb("HOST...", _read_roles),
    "corrupt": Verb("HOST...", _read_roles),
    "resolve": Verb("ROLES to HOST...|nothing|failure|silence", _read_resolve, on_links=True),
    "end": Verb("", _read_nothing),
}


# --- files ----------------------------------------------------------------------------------------


def load(path: Path) -> Scenario:
    """Read a file.  Raises ScenarioError."""
    return parse(path.read_text(), name=path.stem, source=path.name)


def load_all(directory: Path) -> list[Scenario]:
    """Every ``*.chaos`` file of a directory, by name.  Raises ScenarioError."""
    return [load(path) for path in sorted(directory.glob("*.chaos"))]


def parse(text: str, *, name: str = "scenario", source: str = "scenario") -> Scenario:
    """Read a scenario and play it through.

    Raises:
        ScenarioError: for the first line that is wrong.
    """
    settings: dict[str, object] = {"excused": (), "disks": {}}
    steps: list[Step] = []
    number = 0
    for number, words in _lines(text):
        try:
            if words[0] == "at":
                steps.append(_step(words[1:], settings.get("shape", Shape()), number))  # type: ignore[arg-type]
            elif steps:
                raise ValueError(f"{words[0]!r} must come before the first step")
            else:
                _setting(words, settings)
        except ValueError as error:
            raise ScenarioError(source, number, str(error)) from None
    if "title" not in settings:
        raise ScenarioError(source, 1, "has no title")
    if not steps or steps[-1].verb != "end":
        raise ScenarioError(source, max(number, 1), "the last step must be: at SECONDS end")
    scenario = Scenario(name=name, steps=tuple(steps), **settings)  # type: ignore[arg-type]
    _play(scenario, source)
    return scenario


def _lines(text: str) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.partition("#")[0].split()
        if words:
            yield number, words


def _setting(words: list[str], settings: dict[str, object]) -> None:
    key, rest = words[0], words[1:]
    if key in settings and key not in {"excused", "disks"}:
        raise ValueError(f"{key!r} stands here twice")
    match key:
        case "title" if rest:
            settings["title"] = " ".join(rest)
        case "cluster":
            if "shape" in settings:
                raise ValueError("'cluster' stands here twice")
            settings["shape"] = _shape(rest)
        case "backend" if len(rest) == 1 and rest[0] in BACKENDS:
            settings["backend"] = rest[0]
        case "members" if len(rest) == 1 and rest[0] in MEMBERS:
            settings["members"] = rest[0]
        case "writes" if len(rest) == 1 and rest[0] in WRITES:
            settings["writes"] = rest[0]
        case "load":
            settings["load"] = _load(rest)
        case "excuse" if len(rest) == 1:
            settings["excused"] = (*settings["excused"], _window(rest[0]))  # type: ignore[misc]
        case "disk" if len(rest) == 2:
            (host,) = _roles_only(rest[:1], settings.get("shape", Shape()))  # type: ignore[arg-type]
            settings["disks"][host] = parse_size(rest[1])  # type: ignore[index]
        case _:
            raise ValueError(
                f"{' '.join(words)!r} is none of: title TEXT, cluster ROLES=N..., "
                f"backend {'|'.join(BACKENDS)}, members {'|'.join(MEMBERS)}, writes {'|'.join(WRITES)}, "
                "load pushes=N pulls=N blobs=SIZE..SIZE, disk HOST SIZE, "
                "excuse SECONDS..SECONDS, at SECONDS VERB ..."
            )


def _pairs(words: list[str], allowed: tuple[str, ...]) -> dict[str, str]:
    pairs = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key not in allowed:
            raise ValueError(f"{word!r} is none of {', '.join(f'{each}=' for each in allowed)}")
        if key in pairs:
            raise ValueError(f"{key!r} stands here twice")
        pairs[key] = value
    return pairs


def _shape(words: list[str]) -> Shape:
    pairs = _pairs(words, tuple(PLURALS))
    for key, value in pairs.items():
        if not value.isascii() or not value.isdecimal() or not 1 <= int(value) <= COUNT_MAX:
            raise ValueError(f"{key} must be from 1 to {COUNT_MAX}, not {value!r}")
    return Shape(**{key: int(value) for key, value in pairs.items()})


def _load(words: list[str]) -> Load:
    pairs = _pairs(words, ("pushes", "pulls", "blobs"))
    load = Load()
    for key in ("pushes", "pulls"):
        if key in pairs:
            if _NUMBER.fullmatch(pairs[key]) is None:
                raise ValueError(f"{key} must be a number per second, not {pairs[key]!r}")
            load = attrs.evolve(load, **{key: float(pairs[key])})
    if "blobs" in pairs:
        smallest, dots, largest = pairs["blobs"].partition("..")
        if not dots:
            raise ValueError(f"blobs must be SIZE..SIZE, not {pairs['blobs']!r}")
        load = attrs.evolve(load, smallest=parse_size(smallest), largest=parse_size(largest))
        if not 1 <= load.smallest <= load.largest:
            raise ValueError("blobs must be SIZE..SIZE, the smaller one first")
    return load


def _seconds(text: str) -> float:
    if _SECONDS.fullmatch(text) is None or float(text) > SECONDS_MAX:
        raise ValueError(f"{text!r} is not a number of seconds up to {SECONDS_MAX:g}")
    return float(text)


def _window(text: str) -> Window:
    start, dots, end = text.partition("..")
    if not dots or not _seconds(start) < _seconds(end):
        raise ValueError(f"excuse wants SECONDS..SECONDS, the earlier first, not {text!r}")
    return Window(_seconds(start), _seconds(end))


def _step(words: list[str], shape: Shape, line: int) -> Step:
    if len(words) < 2:
        raise ValueError("a step is: at SECONDS VERB ...")
    at, name = _seconds(words[0]), words[1]
    verb = VERBS.get(name)
    if verb is None:
        raise ValueError(f"{name!r} is none of {', '.join(VERBS)}")
    try:
        hosts, argument, others = verb.read(words[2:], shape)
    except ValueError as error:
        form = f" (at SECONDS {name} {verb.arguments})".replace(" )", ")")
        raise ValueError(f"{name} {error}{form}") from None
    return Step(at, name, hosts, argument, others, line)


# --- the play -------------------------------------------------------------------------------------


def _play(scenario: Scenario, source: str) -> None:
    """Follow what the steps do to the hosts.  Raises ScenarioError for one that cannot be done."""
    states = dict.fromkeys((*scenario.shape.hosts(), S3), "up")
    clock = 0.0
    for step in scenario.steps:
        complaint = _obstacle(scenario, step, states, clock)
        if complaint:
            raise ScenarioError(source, step.line, complaint)
        clock = step.at
        after = VERBS[step.verb].after
        if after:
            states.update(dict.fromkeys(step.hosts, after))


def _obstacle(scenario: Scenario, step: Step, states: dict[str, str], clock: float) -> str:
    """Why a step cannot be done; empty when it can."""
    if step.at < clock:
        return f"is at {step.at:g}, after a step at {clock:g}: steps come in order"
    if step.verb == "end" and step is not scenario.steps[-1]:
        return "nothing comes after the end"
    if S3 in (*step.hosts, *step.others) and scenario.backend != "s3":
        return "there is no s3 in this cluster: backend s3"
    if step.verb == "resolve" and scenario.members != "dns":
        return "no names are resolved in this cluster: members dns"
    before = VERBS[step.verb].before
    for host in step.hosts:
        if before and states.get(host) not in before:
            return f"{step.verb} {host}: it is {states[host]} then, not {' or '.join(before)}"
        if step.verb in {"fill", "free"} and host not in scenario.disks:
            return f"{step.verb} {host}: it has no disk of its own: disk {host} SIZE"
    return ""
