"""The grammar of repository names, tags and references (OCI distribution specification, "Pull")."""

from __future__ import annotations

import re
from typing import Final

from swarmpull.digest import Digest
from swarmpull.errors import InvalidDigest
from swarmpull.registry.errors import Code, RegistryError, name_invalid, shorten

# Clients limit host and name together to 255 characters, says the specification.
REPOSITORY_LENGTH_MAX: Final = 255
_COMPONENT: Final = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REPOSITORY: Final = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*", re.ASCII)
_TAG: Final = re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}", re.ASCII)
# What an upstream registry may be called: a host name or address and a port.
_UPSTREAM: Final = re.compile(r"[A-Za-z0-9._:\[\]-]{1,255}", re.ASCII)


def is_repository(text: str) -> bool:
    """Whether the text is a repository name."""
    return len(text) <= REPOSITORY_LENGTH_MAX and _REPOSITORY.fullmatch(text) is not None


def check_repository(text: str) -> str:
    """The text itself when it is a repository name.

    Raises:
        RegistryError: NAME_INVALID when it is not.
    """
    if not is_repository(text):
        raise name_invalid(text)
    return text


def is_tag(text: str) -> bool:
    """Whether the text is a tag; a digest never is one."""
    return _TAG.fullmatch(text) is not None


def parse_reference(text: str) -> Digest | str:
    """A digest when the text looks like one (it has a colon), else the tag.

    Raises:
        InvalidDigest: the text has a colon but is not a digest.
        ValueError: the text is neither.
    """
    if ":" in text:
        return Digest.parse(text)
    if not is_tag(text):
        raise ValueError(f"{shorten(text)!r} is neither a tag nor a digest")
    return text


def check_upstream(text: str | None) -> str | None:
    """The value of the ``ns`` query parameter; None when there is none.

    Raises:
        RegistryError: NAME_INVALID when it is no host name with an optional port.
    """
    if not text:
        return None
    if _UPSTREAM.fullmatch(text) is None:
        raise RegistryError(
            Code.NAME_INVALID,
            400,
            f"ns={shorten(text)!r} is not a registry: expected host or host:port",
        )
    return text


def parse_digest(text: str | None) -> Digest:
    """A digest that a request must carry.

    Raises:
        InvalidDigest: it is absent or malformed.
    """
    if text is None:
        raise InvalidDigest("")
    return Digest.parse(text)
