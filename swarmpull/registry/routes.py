"""From a request line to an endpoint.  Pure.

The path is split before it is decoded, so that an encoded slash cannot pose as a separator, and names are
checked here, so that no handler sees a repository that is none.
"""

from __future__ import annotations

import enum
from typing import Final
from urllib.parse import unquote

import attrs

from swarmpull.registry.errors import method_not_allowed, name_invalid, not_found
from swarmpull.registry.names import check_repository, check_upstream, registry_component


class Endpoint(enum.Enum):
    """What a request addresses."""

    BASE = "base"
    CATALOG = "catalog"
    MANIFEST = "manifest"
    BLOB = "blob"
    UPLOADS = "uploads"
    UPLOAD = "upload"
    TAGS = "tags"
    TAG_LOG = "tag log"
    REFERRERS = "referrers"
    GENERIC_BLOB = "generic blob"


_METHODS: Final[dict[Endpoint, tuple[str, ...]]] = {
    Endpoint.BASE: ("GET", "HEAD"),
    Endpoint.CATALOG: ("GET", "HEAD"),
    Endpoint.MANIFEST: ("GET", "HEAD", "PUT", "DELETE"),
    Endpoint.BLOB: ("GET", "HEAD", "DELETE"),
    Endpoint.UPLOADS: ("POST",),
    Endpoint.UPLOAD: ("GET", "PATCH", "PUT", "DELETE"),
    Endpoint.TAGS: ("GET", "HEAD"),
    Endpoint.TAG_LOG: ("GET", "HEAD"),
    Endpoint.REFERRERS: ("GET", "HEAD"),
    Endpoint.GENERIC_BLOB: ("GET", "HEAD", "PUT"),
}
# The parts of a path after the repository name; None stands for one part of any content.
_TAILS: Final[tuple[tuple[tuple[str | None, ...], Endpoint], ...]] = (
    (("blobs", "uploads", ""), Endpoint.UPLOADS),
    (("blobs", "uploads"), Endpoint.UPLOADS),
    (("blobs", "uploads", None), Endpoint.UPLOAD),
    (("blobs", None), Endpoint.BLOB),
    (("manifests", None), Endpoint.MANIFEST),
    (("tags", "list"), Endpoint.TAGS),
    # No component of a repository begins with "_": that is for extensions.
    (("_swarmpull", "history", None), Endpoint.TAG_LOG),
    (("referrers", None), Endpoint.REFERRERS),
)


@attrs.frozen
class Route:
    """Where a request goes.

    Attributes:
        endpoint: what it addresses.
        repository: a valid name; empty where the endpoint has none.
        argument: the last part of the path, decoded and not checked: a reference, digest or upload id.
        upstream: host:port when the path began with one; empty otherwise.
    """

    endpoint: Endpoint
    repository: str = ""
    argument: str = ""
    upstream: str = ""


def find_route(method: str, raw_path: bytes) -> Route:
    """The endpoint of a request.

    Args:
        method: of the request.
        raw_path: the path as sent, without the query.

    Raises:
        RegistryError: NAME_INVALID for a repository name outside the grammar, 404 for a path that is no
            endpoint, 405 for a method that the endpoint does not have.
    """
    path = raw_path.decode("latin-1")
    route = _match([unquote(part) for part in path.split("/")])
    if route is None:
        raise not_found(path)
    if method not in _METHODS[route.endpoint]:
        raise method_not_allowed(method, _METHODS[route.endpoint])
    return route


def _match(parts: list[str]) -> Route | None:
    match parts:
        case ["", "v2"] | ["", "v2", ""]:
            return Route(Endpoint.BASE)
        case ["", "v2", "_catalog"]:
            return Route(Endpoint.CATALOG)
        case ["", "blobs", argument] if argument:
            return Route(Endpoint.GENERIC_BLOB, argument=argument)
        case ["", "v2", *rest]:
            return _match_repository(rest)
    return None


def _match_repository(parts: list[str]) -> Route | None:
    for tail, endpoint in _TAILS:
        end = parts[-len(tail) :]
        if len(end) == len(tail) and all(w in (None, p) for w, p in zip(tail, end, strict=True)):
            argument = end[-1] if tail[-1] is None else ""
            name = parts[: -len(tail)]
            if any("/" in part for part in name):
                raise name_invalid("/".join(name))
            if len(name) > 1 and ":" in name[0]:
                # No repository has a colon: it is a registry with its port.
                upstream = check_upstream(name[0]) or ""
                rest = "/".join([registry_component(upstream), *name[1:]])
                return Route(endpoint, check_repository(rest), argument, upstream)
            return Route(endpoint, check_repository("/".join(name)), argument)
    return None
