"""One request to the registry API, as its handlers see it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import attrs

from swarmpull.errors import PushRefused
from swarmpull.registry.asgi import Request, Response, Send
from swarmpull.registry.body_memory import BodyMemory
from swarmpull.registry.errors import Code, RegistryError
from swarmpull.registry.routes import Route
from swarmpull.registry.service import RegistryService
from swarmpull.store.uploads import UploadStore


@attrs.frozen
class Call:
    """A routed request.

    Attributes:
        service: the role behind.
        request: its headers, query and body.
        send: for handlers that send their response themselves.
        route: what it addresses.
        upstream: the registry that the client takes us for (the ``ns`` parameter), or that it names in the
            path with a port, or None.
        memory: what its body takes from while it is sent.
    """

    service: RegistryService
    request: Request
    send: Send
    route: Route
    upstream: str | None
    memory: BodyMemory

    @property
    def repository(self) -> str | None:
        """The repository, None for a generic blob."""
        return self.route.repository or None

    @property
    def uploads(self) -> UploadStore:
        """The upload sessions.  Raises RegistryError (405) where the role has none."""
        return _require(self.service.uploads)

    def check_takes_pushes(self) -> None:
        """Raises RegistryError (405) where the role takes no pushes, PushRefused where not of this name."""
        _require(self.service.uploads)
        if self.route.upstream:
            raise PushRefused(f"{self.route.upstream} is another registry: push to it directly")
        # What is no longer kept may still be deleted.
        if self.repository is not None and self.request.method != "DELETE":
            self.service.check_push(self.repository)


def _require(uploads: UploadStore | None) -> UploadStore:
    if uploads is None:
        raise RegistryError(
            Code.UNSUPPORTED,
            405,
            "this registry takes neither pushes nor deletions: use an origin, or set "
            "agent.registry.push = true in the configuration of this agent",
            headers=(("Allow", "GET, HEAD"),),
        )
    return uploads


# Returns the response, or None when the handler has sent it.
Handler = Callable[[Call], Awaitable[Response | None]]
