"""What a role reports once it serves: the addresses that it really bound."""

from __future__ import annotations

import attrs


@attrs.frozen
class RoleAddresses:
    """The listeners of one running role.

    Attributes:
        role: agent, origin, tracker or index.
        listeners: name of the listener (registry, rpc, peer, admin) -> ``host:port`` as bound: a
            listener that was configured with port 0 has its real port here.
    """

    role: str
    listeners: dict[str, str]
