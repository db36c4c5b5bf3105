"""What happened in a run, and what follows from it.  Nothing here waits: it is what tests try with data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Final

import attrs

from .limits import FAIL_FAST, SETTLING
from .scenario import Window

PUSH: Final = "push"
PULL: Final = "pull"
OK: Final = "ok"
# Outcomes of an attempt that never reached anybody: the host is not there.
REFUSED: Final = "refused"
WRONG: Final = "wrong"
# Attempts that are shown because they waited for longest.
SLOWEST_SHOWN: Final = 3


@attrs.frozen
class Image:
    """What was pushed: one layer and a config, under a tag."""

    repository: str
    tag: str
    manifest: str
    config: tuple[str, int]
    layer: tuple[str, int]

    @property
    def blobs(self) -> tuple[tuple[str, int], ...]:
        """Digests with their lengths."""
        return (self.config, self.layer)

    def __str__(self) -> str:
        return f"{self.repository}:{self.tag}"


@attrs.frozen
class Attempt:
    """One try of a push or a pull; times are seconds since the load began.

    Attributes:
        kind: push or pull.
        host: whose registry was asked.
        image: its name.
        outcome: ok, or how it failed (`tests.chaos.client.RequestFailed`).
        wait: the longest time without a byte, in seconds.
        detail: of a failure.
        request: in which the longest wait was.
    """

    kind: str
    host: str
    image: str
    started: float
    ended: float
    outcome: str
    wait: float
    detail: str = ""
    request: str = ""


@attrs.define
class Disturbance:
    """From when to when a host was killed, frozen, cut off or filled, until it was ready again.

    Attributes:
        silent: it could not say a word.
        polite: it was asked to end, and must finish what it has begun: it may only refuse.
    """

    host: str
    since: float
    silent: bool = False
    polite: bool = False
    until: float = math.inf


@attrs.frozen
class Recovery:
    """What came after a step: seconds until there was what is named, None if that did not come."""

    at: float
    step: str
    ready: float | None
    pull: float | None
    push: float | None


@attrs.define
class Record:
    """All that is known of a run.

    Attributes:
        pushed: what was acknowledged, with the time.
        attempts: in the order in which they ended.
        disturbances: of hosts.
        steps: what was done, and when it was begun.
        ready: for each step the time at which all that were meant to run were ready.
        violations: what must not happen and did, as far as found while running.
    """

    pushed: list[tuple[float, Image]] = attrs.field(factory=list)
    attempts: list[Attempt] = attrs.field(factory=list)
    disturbances: list[Disturbance] = attrs.field(factory=list)
    steps: list[tuple[float, str]] = attrs.field(factory=list)
    ready: dict[int, float] = attrs.field(factory=dict)
    violations: list[str] = attrs.field(factory=list)

    def disturb(self, host: str, now: float, *, silent: bool = False, polite: bool = False) -> None:
        """From now on requests to this host may fail."""
        if not any(each.host == host and each.until == math.inf for each in self.disturbances):
            self.disturbances.append(Disturbance(host, now, silent, polite))

    def calm(self, host: str, now: float) -> None:
        """This host is as it was."""
        for each in self.disturbances:
            if each.host == host and each.until == math.inf:
                each.until = now


@attrs.frozen
class Counts:
    """Of one kind of request.

    Attributes:
        made: those that succeeded in the end.
        attempts: all tries.
        refused: tries that found nobody at a host that was down.
        excused: failures of tries at a host that something was done to, or while nobody could answer.
        failed: failures of tries that could have succeeded.
        stall: the longest wait for a byte at hosts to which nothing was done, in seconds.
        stall_excused: the same at the others.
    """

    made: int
    attempts: int
    refused: int
    excused: int
    failed: int
    stall: float
    stall_excused: float


def is_excused(
    attempt: Attempt, disturbances: Iterable[Disturbance], windows: Iterable[Window]
) -> bool:
    """Whether an attempt may fail: something was done to the host that was asked, or to everybody."""
    return any(
        each.host == attempt.host
        and attempt.started <= each.until
        and each.since <= attempt.ended
        and (not each.polite or attempt.outcome in {OK, REFUSED})
        for each in disturbances
    ) or any(attempt.started <= each.end and each.start <= attempt.ended for each in windows)


def stretched(record: Record, windows: Iterable[Window]) -> list[Window]:
    """Windows that last until all were ready after the steps within them, and a moment longer.

    How long it takes to start six processes is up to the machine, and others learn of it some seconds later.
    """
    return [
        attrs.evolve(
            window,
            end=max(
                window.end,
                *(
                    record.ready[number] + SETTLING
                    for number, (at, _) in enumerate(record.steps)
                    if number in record.ready and window.start <= at <= window.end
                ),
                0.0,
            ),
        )
        for window in windows
    ]


def count(record: Record, kind: str, windows: Sequence[Window]) -> Counts:
    attempts = [each for each in record.attempts if each.kind == kind]
    excused, others = [], []
    for each in attempts:
        is_one = is_excused(each, record.disturbances, windows)
        (excused if is_one else others).append(each)
    failures = [each for each in excused if each.outcome != OK]
    refused = sum(each.outcome == REFUSED for each in failures)
    return Counts(
        made=sum(each.outcome == OK for each in attempts),
        attempts=len(attempts),
        refused=refused,
        excused=len(failures) - refused,
        failed=sum(each.outcome != OK for each in others),
        stall=max((each.wait for each in others), default=0.0),
        stall_excused=max((each.wait for each in excused), default=0.0),
    )


def slowest(record: Record, windows: Sequence[Window]) -> list[Attempt]:
    """The attempts with the longest waits at hosts to which nothing was done, the longest first."""
    spared = [
        each for each in record.attempts if not is_excused(each, record.disturbances, windows)
    ]
    return sorted(spared, key=lambda each: -each.wait)[:SLOWEST_SHOWN]


def violations(record: Record, windows: Sequence[Window]) -> list[str]:
    """What must not happen, one line for each."""
    found = list(record.violations)
    for each in record.attempts:
        if each.outcome == OK:
            continue
        what = (
            f"{each.kind} of {each.image} at {each.host}, {each.started:.1f} to {each.ended:.1f} s"
        )
        excused = is_excused(each, record.disturbances, windows)
        if each.outcome == WRONG:
            found.append(f"{what}: got wrong bytes: {each.detail}")
        elif not excused:
            found.append(
                f"{what}: failed although it could have succeeded: {each.outcome}, {each.detail}"
            )
        elif each.wait > FAIL_FAST and not _is_silenced(each, record.disturbances):
            found.append(f"{what}: waited {each.wait:.1f} s before it failed: {each.detail}")
    return found


def _is_silenced(attempt: Attempt, disturbances: Iterable[Disturbance]) -> bool:
    """Whether the host was frozen: then failing fast is up to the client."""
    return any(
        each.silent
        and each.host == attempt.host
        and attempt.started <= each.until
        and each.since <= attempt.ended
        for each in disturbances
    )


def recoveries(record: Record) -> list[Recovery]:
    """For each step: how long until all were ready, and a pull and a push that began after it were done."""
    found = []
    for number, (at, step) in enumerate(record.steps):
        ready = record.ready.get(number)
        found.append(
            Recovery(
                at,
                step,
                None if ready is None else ready - at,
                _first_after(record.attempts, PULL, at),
                _first_after(record.attempts, PUSH, at),
            )
        )
    return found


def _first_after(attempts: Iterable[Attempt], kind: str, at: float) -> float | None:
    ends = [
        each.ended
        for each in attempts
        if each.kind == kind and each.outcome == OK and each.started >= at
    ]
    return min(ends) - at if ends else None
