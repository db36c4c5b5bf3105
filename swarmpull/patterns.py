"""Patterns of repositories: ``*`` is anything but ``/``, ``**`` anything; they match whole names.  Pure."""

from __future__ import annotations

import re
from typing import Final

# What may follow in a component of a name, by what came last; "alnum" may also end it.  See
# `swarmpull.registry.names`, whose grammar this is.
_GRAMMAR: Final[dict[str, dict[str, str]]] = {
    "begin": {"alnum": "alnum"},
    "alnum": {"alnum": "alnum", ".": "dot", "_": "underscore", "-": "hyphen", "/": "begin"},
    "dot": {"alnum": "alnum"},
    "underscore": {"alnum": "alnum", "_": "dot"},
    "hyphen": {"alnum": "alnum", "-": "hyphen"},
}
_WILD: Final = {"*": "[^/]*", "**": ".*"}

# Where in a pattern one may be, after what was read of a name.
_Places = frozenset[int]


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """What matches as a pattern does, with ``fullmatch``."""
    return re.compile(
        "".join(_WILD.get(part) or re.escape(part) for part in _parts(pattern)), re.ASCII
    )


def some_name_matches(*patterns: str) -> bool:
    """Whether there can be a repository that all of the patterns match."""
    parts = [_parts(pattern) for pattern in patterns]
    letters = {"a", *"._-/", *(letter for pattern in patterns for letter in pattern)} - {"*"}
    begin = ("begin", tuple(_with_skips(each, frozenset({0})) for each in parts))
    pending, seen = [begin], {begin}
    while pending:
        state, places = pending.pop()
        if state == "alnum" and all(len(p) in at for p, at in zip(parts, places, strict=True)):
            return True
        for letter in letters:
            kind = "alnum" if letter.isalnum() else letter
            follows = _GRAMMAR[state].get(kind)
            moved = tuple(_moved(p, at, letter) for p, at in zip(parts, places, strict=True))
            if follows is not None and all(moved) and (follows, moved) not in seen:
                seen.add((follows, moved))
                pending.append((follows, moved))
    return False


def _parts(pattern: str) -> list[str]:
    """Letters and wildcards."""
    return re.findall(r"\*\*|.", pattern, re.DOTALL)


def _with_skips(parts: list[str], places: _Places) -> _Places:
    """A wildcard may stand for nothing."""
    found = set(places)
    for place in range(len(parts)):
        if place in found and parts[place] in _WILD:
            found.add(place + 1)
    return frozenset(found)


def _moved(parts: list[str], places: _Places, letter: str) -> _Places:
    """Where one may be after one more letter."""
    found = set()
    for place in places:
        if place == len(parts):
            continue
        part = parts[place]
        if part == "**" or (part == "*" and letter != "/"):
            found.add(place)
        elif part == letter:
            found.add(place + 1)
    return _with_skips(parts, frozenset(found))
