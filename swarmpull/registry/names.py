"""The grammar of repository names, tags and references (OCI distribution specification, "Pull")."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from swarmpull.digest import Digest
from swarmpull.errors import InvalidDigest, UpstreamUnknown
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
            f"{shorten(text)!r} is not a registry: expected host or host:port",
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


# --- repositories of other registries -------------------------------------------------------------

# Docker Hub keeps its own images under a name that clients leave out.
_DOCKER_HUB: Final = "docker.io"
_DOCKER_HUB_LIBRARY: Final = "library"


def registry_component(registry: str) -> str:
    """A registry as the first component of a repository name, where a port cannot be written with a colon.

    ``docker.io`` is itself, ``localhost:5000`` is ``localhost_5000``.
    """
    return registry.lower().replace(":", "_")


def foreign_repository(registry: str, repository: str) -> str:
    """The one name in this cluster of a repository of another registry.

    ``alpine`` of ``docker.io`` is ``docker.io/library/alpine``.

    Raises:
        RegistryError: NAME_INVALID when that is no name.
    """
    if registry == _DOCKER_HUB and "/" not in repository:
        repository = f"{_DOCKER_HUB_LIBRARY}/{repository}"
    return check_repository(f"{registry_component(registry)}/{repository}")


class UpstreamNames:
    """Which requests are for which upstream registry.

    There are two forms: the runtime names the registry it takes us for (``ns=docker.io``), or it is the first
    component of the path (``/v2/docker.io/library/alpine/...``), as a mirror's location with a prefix has it.
    """

    def __init__(self, upstreams: Iterable[str], own: Iterable[str] = ()) -> None:
        """``upstreams``: registries that are pulled through; ``own``: names of this cluster in ``ns=``."""
        self._by_component = {registry_component(name): name for name in upstreams}
        self._own = frozenset(registry_component(name) for name in own)

    def select(self, repository: str | None, upstream: str | None) -> str | None:
        """The name in this cluster of a repository of an upstream; None for one of the cluster itself.

        Args:
            repository: of the path; None for a generic blob, which belongs to no registry.
            upstream: the registry that the client names.

        Raises:
            UpstreamUnknown: the registry is none of the upstreams.
        """
        if repository is None:
            return None
        component, _, rest = repository.partition("/")
        if upstream is not None:
            named = registry_component(upstream)
            in_path = rest and component == named
            if named in self._by_component:
                return foreign_repository(
                    self._by_component[named], rest if in_path else repository
                )
            # Without any upstream the cluster is whatever its clients take it for.
            if in_path or (self._by_component and named not in self._own):
                raise UpstreamUnknown(upstream, tuple(self._by_component.values()))
        if rest and component in self._by_component:
            return foreign_repository(self._by_component[component], rest)
        return None
