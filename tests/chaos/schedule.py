"""Scenarios made up from a seed: a pure function, so a run that found something can be run again."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final

from .scenario import Load, Scenario, Shape, Step, parse

MINUTES_MAX: Final = 50.0
# The first fault, the pause between two, how long one lasts, and the peace before the end, in seconds.
FIRST: Final = 4.0
PAUSES: Final = (1.0, 9.0)
LASTS: Final = (2.0, 15.0)
PEACE: Final = 8.0
# Of each role, so many hosts may be in trouble at the same time that somebody is left who can answer.
LEFT: Final = 1
# Of all hosts: two cores cannot start everything at once.
TROUBLED_MAX: Final = 3


def random_scenario(seed: int, minutes: float, shape: Shape | None = None) -> Scenario:
    """Faults of every kind for so many minutes, of which no push may be lost and no pull fail.

    Raises:
        ValueError: the length is not positive, or more than `MINUTES_MAX`.
    """
    if not 0 < minutes <= MINUTES_MAX:
        raise ValueError(f"--minutes must be more than 0 and at most {MINUTES_MAX:g}: {minutes:g}")
    return _Author(random.Random(seed), shape or Shape(), minutes * 60).write(seed)


class _Author:
    """Makes up one scenario."""

    def __init__(self, rng: random.Random, shape: Shape, seconds: float) -> None:
        self._random = rng
        self._shape = shape
        self._seconds = seconds
        self._steps: list[Step] = []
        # Until when a host is in trouble; the network as a whole under "".
        self._busy: dict[str, float] = {}
        self._kinds: tuple[tuple[int, Callable[[float], None]], ...] = (
            (6, self._kill),
            (3, self._restart),
            (3, self._freeze),
            (2, self._wipe),
            (2, self._cut),
            (1, self._lose),
            (1, self._slow),
        )

    def write(self, seed: int) -> Scenario:
        at = FIRST
        while at + LASTS[1] + PEACE < self._seconds or not self._steps:
            weights = [weight for weight, _ in self._kinds]
            _, kind = self._random.choices(self._kinds, weights)[0]
            kind(at)
            at = round(at + self._random.uniform(*PAUSES), 1)
        end = max(self._seconds, max(step.at for step in self._steps) + PEACE)
        steps = sorted(self._steps, key=lambda step: step.at)
        scenario = Scenario(
            name=f"random-{seed}",
            title=f"made up from seed {seed}",
            steps=(*steps, Step(round(end, 1), "end")),
            shape=self._shape,
            load=Load(),
        )
        # Played through as one that was written by hand.
        return parse(scenario.text(), name=scenario.name, source=scenario.name)

    def _victim(self, at: float, until: float, *, roles: tuple[str, ...] = ()) -> str | None:
        """A host that may be in trouble for a while."""
        troubled = [host for host, end in self._busy.items() if host and end >= at]
        if len(troubled) >= TROUBLED_MAX:
            return None
        hosts = self._shape.hosts()
        candidates = []
        for host in hosts:
            role = host.rpartition("-")[0]
            if roles and role not in roles:
                continue
            others = [each for each in hosts if each.startswith(f"{role}-") and each != host]
            well = [each for each in others if self._busy.get(each, 0.0) < at]
            if self._busy.get(host, 0.0) < at and len(well) >= LEFT:
                candidates.append(host)
        if not candidates:
            return None
        host = self._random.choice(candidates)
        # Some time to recover before the next one of its role has its turn.
        self._busy[host] = until + LASTS[1]
        return host

    def _lasting(self, at: float) -> float:
        return round(at + self._random.uniform(*LASTS), 1)

    def _kill(self, at: float) -> None:
        until = self._lasting(at)
        if host := self._victim(at, until):
            self._steps += [Step(at, "kill", (host,), "SIGKILL"), Step(until, "start", (host,))]

    def _restart(self, at: float) -> None:
        if host := self._victim(at, at + LASTS[1]):
            self._steps.append(Step(at, "restart", (host,)))

    def _freeze(self, at: float) -> None:
        until = self._lasting(at)
        if host := self._victim(at, until):
            self._steps += [Step(at, "freeze", (host,)), Step(until, "thaw", (host,))]

    def _wipe(self, at: float) -> None:
        """A disk is lost: of one origin at a time, since the others hold what is not in the backend yet."""
        if any(host.startswith("origin-") and end >= at for host, end in self._busy.items()):
            return
        until = self._lasting(at)
        if host := self._victim(at, until, roles=("origin", "agent")):
            self._steps += [
                Step(at, "kill", (host,), "SIGKILL"),
                Step(at, "wipe", (host,)),
                Step(until, "start", (host,)),
            ]

    def _cut(self, at: float) -> None:
        """One host loses everybody; `heal` mends all cuts, so there is one at a time."""
        if self._busy.get("", 0.0) >= at:
            return
        until = self._lasting(at)
        if host := self._victim(at, until):
            self._busy[""] = until
            self._steps += [Step(at, "cut", (host,), "", ("everything",)), Step(until, "heal")]

    def _lose(self, at: float) -> None:
        if self._busy.get("loss", 0.0) >= at:
            return
        until = self._busy["loss"] = self._lasting(at)
        self._steps += [Step(at, "lose", (), "3%"), Step(until, "lose", (), "0%")]

    def _slow(self, at: float) -> None:
        until = self._lasting(at)
        if host := self._victim(at, until):
            self._steps += [Step(at, "slow", (host,), "2mbit"), Step(until, "fast", (host,))]
