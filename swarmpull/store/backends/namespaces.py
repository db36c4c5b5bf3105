"""Which backend keeps the blobs of which repositories."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import attrs

from swarmpull.errors import PushRefused, RepositoryUnmatched
from swarmpull.patterns import compile_pattern
from swarmpull.store.backends.base import Backend


@attrs.frozen
class Namespace:
    """The repositories that a pattern matches, and their backend."""

    pattern: str
    backend: Backend
    _matcher: re.Pattern[str] = attrs.field(init=False, repr=False, eq=False)

    @_matcher.default
    def _compile(self) -> re.Pattern[str]:
        return compile_pattern(self.pattern)

    def matches(self, repository: str) -> bool:
        return self._matcher.fullmatch(repository) is not None


class Namespaces:
    """The backends of one origin.

    Which one a repository has, in this order:

    1. the empty name, of generic blobs: the default backend;
    2. a first component that names an upstream registry: that registry, for reading only;
    3. without any namespace: the default backend;
    4. the first namespace whose pattern matches; none has to.
    """

    def __init__(
        self,
        default: Backend,
        namespaces: Sequence[Namespace] = (),
        upstreams: Mapping[str, Callable[[str], Backend]] | None = None,
    ) -> None:
        """``upstreams``: first component -> what gives the backend of a repository that follows it."""
        self._default = default
        self._namespaces = tuple(namespaces)
        self._upstreams = dict(upstreams or {})

    def backend_for(self, repository: str) -> Backend:
        """The backend of a repository; of generic blobs for the empty name.

        Raises:
            RepositoryUnmatched: there are namespaces, and no pattern of theirs matches.
        """
        if self.is_foreign(repository):
            component, _, rest = repository.partition("/")
            return self._upstreams[component](rest)
        if not repository or not self._namespaces:
            return self._default
        for namespace in self._namespaces:
            if namespace.matches(repository):
                return namespace.backend
        patterns = tuple(namespace.pattern for namespace in self._namespaces)
        raise RepositoryUnmatched(repository, patterns)

    def own(self) -> Sequence[Backend]:
        """The backends that are written to, each once."""
        backends = (self._default, *(namespace.backend for namespace in self._namespaces))
        return tuple({backend.name: backend for backend in backends}.values())

    def is_foreign(self, repository: str) -> bool:
        """Whether a repository is one of an upstream, where nothing can be written."""
        component, _, rest = repository.partition("/")
        return bool(rest) and component in self._upstreams

    def share_backend(self, one: str, other: str) -> bool:
        """Whether what is durable in one repository is so in the other.  Raises RepositoryUnmatched."""
        return self.backend_for(one).name == self.backend_for(other).name

    def check_push(self, repository: str) -> None:
        """Return when content of a repository can be kept.

        Raises:
            PushRefused: it belongs to an upstream, or no pattern matches it.
        """
        if self.is_foreign(repository):
            component = repository.partition("/")[0]
            raise PushRefused(
                f"repository {repository} is one of upstream {component}, which is only pulled from"
            )
        try:
            self.backend_for(repository)
        except RepositoryUnmatched as error:
            raise PushRefused(f"{error}: push to a repository that one matches") from error
