"""What planning has in common: texts of files in, texts of files and things to tell out.  Pure."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Sequence
from typing import Final, Protocol
from urllib.parse import urlsplit

import attrs

from swarmpull.errors import SwarmpullError

# What surrounds our part of a file that can hold comments.
BEGIN: Final = "# swarmpull: begin; `swarmpull setup` writes this part, and removes it with --undo"
END: Final = "# swarmpull: end"

_REGISTRY: Final = re.compile(
    r"[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?(?::[0-9]{1,5})?", re.ASCII
)


@attrs.define(slots=False)
class SetupRefused(SwarmpullError):
    """A file cannot be changed as it should be; nothing was written."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}; nothing was changed"


class Files(Protocol):
    """The files of a host, with absolute paths."""

    def read(self, path: str) -> str | None:
        """The text of a file; None when there is none.  Raises SetupRefused when it is no text."""
        ...

    def names(self, directory: str) -> Sequence[str]:
        """The names in a directory, sorted; none when there is no such directory."""
        ...


@attrs.frozen
class Agent:
    """Where the registry of the agent is."""

    scheme: str
    address: str

    @classmethod
    def parse(cls, url: str) -> Agent:
        """Parse ``http://host:port``.  Raises ValueError; says what is allowed."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            parts, port = urlsplit(""), None
        if (
            parts.scheme not in ("http", "https")
            or not parts.hostname
            or parts.path not in ("", "/")
            or parts.query
            or parts.fragment
            or "@" in parts.netloc
            or (port is None and parts.netloc.endswith(":"))
        ):
            raise ValueError(
                f"must be http://host:port or https://host:port, without a path: {url!r}"
            )
        return cls(parts.scheme, parts.netloc)

    def __str__(self) -> str:
        return f"{self.scheme}://{self.address}"

    @property
    def is_plain(self) -> bool:
        return self.scheme == "http"

    @property
    def is_loopback(self) -> bool:
        host = urlsplit(str(self)).hostname or ""
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return host == "localhost"


@attrs.frozen
class Wanted:
    """What a runtime is to do.

    Attributes:
        agent: through which it is to pull.
        registries: whose images, as clients name them.
        own: those of them that are the agent's cluster itself.
    """

    agent: Agent
    registries: tuple[str, ...] = ()
    own: frozenset[str] = frozenset()


@attrs.frozen
class Plan:
    """What is to be done.

    Attributes:
        texts: by path what a file is to hold.
        notes: what to do besides, and what was left alone.
    """

    texts: dict[str, str]
    notes: tuple[str, ...] = ()


@attrs.frozen
class Runtime:
    """One kind of runtime.

    Attributes:
        name: as it is recorded.
        plan: what is to be done on a host with these files.
        without: the text of a file of ours without what we put there; None when nothing is left.  Arguments
            are its path, its text and the agent.  Raises SetupRefused.
        undone: notes for when everything is as it was.
    """

    name: str
    plan: Callable[[Files, Wanted], Plan]
    without: Callable[[str, str, str], str | None]
    undone: tuple[str, ...] = ()


def check_registry(text: str) -> str:
    """A registry as clients name it.  Raises ValueError."""
    if _REGISTRY.fullmatch(text) is None:
        raise ValueError(f"must be a registry, host or host:port, such as docker.io: {text!r}")
    return text.lower()


def marked(lines: Sequence[str]) -> str:
    """Our part of a file."""
    return "\n".join([BEGIN, *lines, END, ""])


def without_marked(path: str, text: str) -> str:
    """A text without our part of it.  Raises SetupRefused when its end is missing."""
    lines = text.splitlines(keepends=True)
    starts = [number for number, line in enumerate(lines) if line.strip() == BEGIN]
    if not starts:
        return text
    start = starts[0]
    for end in range(start, len(lines)):
        if lines[end].strip() == END:
            # the empty line that sets it off from what follows
            after = end + 2 if lines[end + 1 : end + 2] == ["\n"] else end + 1
            return "".join([*lines[:start], *lines[after:]])
    raise SetupRefused(path, f"it has the line {BEGIN!r} but not {END!r}: remove our part by hand")
