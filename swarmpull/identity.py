"""Who a role is to the others: the cluster, the roles and the name that its certificate carries.

They stand in the certificate as URIs, ``swarmpull://CLUSTER/ROLE/NAME``, one for each role.  Pure: texts in,
`Identity` out; who vouches for the certificate is checked elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

import attrs

SCHEME: Final = "swarmpull"
# `client` is for people and tools: it may only look.
CERTIFICATE_ROLES: Final = ("agent", "origin", "tracker", "index", "client")

_CLUSTER: Final = re.compile(r"[a-z0-9](?:[a-z0-9.-]{0,61}[a-z0-9])?", re.ASCII)
_NAME: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,126}[A-Za-z0-9])?", re.ASCII)
_URI: Final = re.compile(rf"{SCHEME}://([^/]+)/([^/]+)/([^/]+)", re.ASCII)


@attrs.frozen
class Identity:
    """What a certificate of this cluster says about its holder.

    Attributes:
        cluster: to which it belongs.
        name: most often that of the host; for people only, nothing depends on it.
        roles: what the holder may be; at least one.
    """

    cluster: str
    name: str
    roles: frozenset[str]

    @classmethod
    def from_uris(cls, uris: Iterable[str]) -> Identity:
        """From the URIs of a certificate; those of other schemes mean nothing here.

        Raises:
            ValueError: none names a role, or they contradict one another; says what is wrong.
        """
        found = [match.groups() for uri in uris if (match := _URI.fullmatch(uri))]
        if not found:
            raise ValueError("names no role of a cluster")
        clusters = {cluster for cluster, _, _ in found}
        if len(clusters) > 1:
            raise ValueError(f"names several clusters: {', '.join(sorted(clusters))}")
        cluster, _, name = found[0]
        check_cluster(cluster)
        check_name(name)
        # Roles of a newer version mean nothing here, and do no harm.
        roles = frozenset(role for _, role, _ in found) & frozenset(CERTIFICATE_ROLES)
        return cls(cluster, name, roles)

    def uris(self) -> tuple[str, ...]:
        """As they stand in a certificate."""
        return tuple(f"{SCHEME}://{self.cluster}/{role}/{self.name}" for role in self._in_order())

    def _in_order(self) -> tuple[str, ...]:
        return tuple(role for role in CERTIFICATE_ROLES if role in self.roles)

    def __str__(self) -> str:
        return f"{'+'.join(self._in_order()) or 'nobody'} {self.name} of cluster {self.cluster}"


def check_cluster(text: str) -> str:
    """A name of a cluster, as it is.  Raises ValueError."""
    if _CLUSTER.fullmatch(text) is None:
        raise ValueError(
            f"a cluster is named by up to 63 of a-z, 0-9, '.' and '-', such as prod: {text!r}"
        )
    return text


def check_name(text: str) -> str:
    """A name of a holder, as it is.  Raises ValueError."""
    if _NAME.fullmatch(text) is None:
        raise ValueError(
            "a holder is named by up to 128 letters, digits, '.', '_' and '-', "
            f"such as host-1.example.com: {text!r}"
        )
    return text
