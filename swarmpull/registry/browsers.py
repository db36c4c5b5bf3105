"""What keeps pages in somebody's browser from using an API that is there for programs.  Pure.

A page of any site can have its browser send requests to a listener on loopback, or in the network of that
host, without being asked whether it may, as long as they look like those of a form.  It cannot leave out that
it sends them (`Origin`, `Sec-Fetch-Site`), nor say that a form is JSON.  What it gets it cannot read, unless
the name of its own site comes to mean our address (DNS rebinding): then that name stands in `Host`.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Sequence
from typing import Final

import attrs

# Of a page of the same site, or of nobody's: an address that was typed in.
_OWN_SITES: Final = frozenset({"same-origin", "none"})
_LOCAL_NAMES: Final = ("localhost", ".localhost")


@attrs.frozen(kw_only=True)
class Asked:
    """What of a request says where it comes from; headers are None where there are none.

    Attributes:
        method, host, origin, site, content_type: the method, and the headers ``Host``, ``Origin``,
            ``Sec-Fetch-Site`` and ``Content-Type``.
        address: our own, at which it came in; empty if that is not known.
    """

    method: str
    address: str
    host: str | None = None
    origin: str | None = None
    site: str | None = None
    content_type: str | None = None

    @classmethod
    def of(
        cls, method: str, header: Callable[[str], str | None], server: Sequence[object] | None
    ) -> Asked:
        """What a request is, by its method and headers; ``server`` is that of an ASGI scope."""
        return cls(
            method=method,
            address=str((server or ("",))[0]),
            host=header("Host"),
            origin=header("Origin"),
            site=header("Sec-Fetch-Site"),
            content_type=header("Content-Type"),
        )


def refuse_page(asked: Asked) -> str:
    """Why a request is not answered since a page in a browser sent it; empty when it is."""
    if asked.origin is not None:
        return f"pages of {asked.origin[:80]!r} may not use this API: it is for programs"
    if asked.site is not None and asked.site not in _OWN_SITES:
        return "pages of other sites may not use this API: it is for programs"
    is_read = asked.method in ("GET", "HEAD")
    if is_read and _is_loopback(asked.address) and not _is_local_name(asked.host):
        return (
            f"Host {(asked.host or '')[:80]!r} is no name of an address on loopback: ask for it by that "
            "address or as localhost, and let a proxy do so too"
        )
    return ""


def refuse_type(asked: Asked, types: frozenset[str]) -> str:
    """Why a body is not read, going by its type; empty when it is."""
    media_type = (asked.content_type or "").partition(";")[0].strip().lower()
    if media_type in types:
        return ""
    said = f"Content-Type {media_type[:80]!r}" if media_type else "a body without Content-Type"
    return f"{said} is not taken here: send {' or '.join(sorted(types))}"


def _is_local_name(host: str | None) -> bool:
    """Whether a ``Host`` header has an address, or a name that no DNS server decides about."""
    name = _without_port(host or "").lower().rstrip(".")
    return _is_address(name) or name == _LOCAL_NAMES[0] or name.endswith(_LOCAL_NAMES[1])


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _is_loopback(text: str) -> bool:
    return _is_address(text) and ipaddress.ip_address(text).is_loopback
