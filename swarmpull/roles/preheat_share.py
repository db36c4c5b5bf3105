"""Which agents of those that an index knows: all, a number, a share, or some by name.  Pure."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from typing import Final

import attrs

_NUMBER: Final = re.compile(r"[0-9]{1,9}", re.ASCII)
_PERCENTAGE: Final = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,3})?)%", re.ASCII)
# A number is no name: with a letter, or a whole address.
_NAME: Final = re.compile(
    r"(?=[^,]*[A-Za-z:]|[0-9]+\.[0-9]+\.[0-9]+\.[0-9]+$)[A-Za-z0-9._:\[\]-]{1,300}", re.ASCII
)
NAMES_MAX: Final = 10_000
FORMS: Final = (
    "all, a number such as 10, a share such as 5%, or names or addresses with commas between"
)


@attrs.frozen
class KnownAgent:
    """An agent as an index knows it.

    Attributes:
        address: ``host:port`` of its peer protocol, which tells it from others over restarts.
        name: of its host.
    """

    address: str
    name: str

    @property
    def names(self) -> frozenset[str]:
        """What it is called: its address, with and without the port, and its host's name."""
        return frozenset((self.address, self.name, self.address.rpartition(":")[0]))


@attrs.frozen
class Share:
    """Some agents.

    Attributes:
        text: as it was given.
        number: how many at most; None for no such limit.
        fraction: of those that are known; rounded up.
        names: those and no others; empty for any.
    """

    text: str
    number: int | None = None
    fraction: float = 1.0
    names: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Share:
        """Parse one of `FORMS`.  Raises ValueError."""
        text = text.strip()
        if text == "all":
            return cls(text)
        if _NUMBER.fullmatch(text) and int(text) > 0:
            return cls(text, int(text))
        percentage = _PERCENTAGE.fullmatch(text)
        if percentage and 0 < float(percentage[1]) <= 100:
            return cls(text, fraction=float(percentage[1]) / 100)
        names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
        if not all(map(_NAME.fullmatch, names)) or len(names) > NAMES_MAX:
            raise ValueError(f"must be {FORMS}: {text[:80]!r}")
        return cls(text, names=names)

    def choose(
        self, agents: Sequence[KnownAgent], seed: int
    ) -> tuple[tuple[KnownAgent, ...], tuple[str, ...]]:
        """Those that are meant, always the same for the same seed, and the names that nobody has."""
        if self.names:
            # Sets: thousands of names are looked for among thousands of agents, in one go.
            wanted = frozenset(self.names)
            chosen = tuple(agent for agent in agents if not wanted.isdisjoint(agent.names))
            called = {name for agent in chosen for name in agent.names}
            return chosen, tuple(name for name in self.names if name not in called)
        count = math.ceil(round(len(agents) * self.fraction, 6))
        if self.number is not None:
            count = min(count, self.number)
        ordered = sorted(agents, key=lambda agent: agent.address)
        return tuple(random.Random(seed).sample(ordered, count)), ()
