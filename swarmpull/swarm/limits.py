"""The limits of a whole host, from the few numbers that an operator may set."""

from __future__ import annotations

import attrs

from swarmpull.swarm.connections import ConnectionLimits
from swarmpull.swarm.offers import OfferLimits
from swarmpull.swarm.peers import PeerKind
from swarmpull.swarm.scheduler import SwarmLimits


@attrs.frozen(kw_only=True)
class HostLimits:
    """Named as in the configuration, section ``swarm``, and with its defaults.

    An agent sends a few pieces at a time: its uplink is as fast as its peers' downlinks, and while one of
    those takes in a piece of somebody else, the other slots go on.  It may claim as many pieces as an
    uploader holds at a time, in its slots and promised, so that all uplinks together have just enough to
    do: with fewer they run dry, with more some hosts are sent too much while others wait (measured in the
    simulator).  An origin needs as many slots as receivers fill its uplink, and promises hardly more ahead:
    one that is no faster than its peers would bind its pieces long before they leave.
    """

    max_connections: int = 30
    dial_connections: int = 12
    origin_max_connections: int = 100
    max_total_connections: int = 1000
    upload_slots: int = 3
    origin_upload_slots: int = 8
    inbound_pieces: int = 4

    def of(self, kind: PeerKind) -> SwarmLimits:
        """What the core of an agent or an origin is to keep to."""
        origin = kind is PeerKind.ORIGIN
        slots = self.origin_upload_slots if origin else self.upload_slots
        return SwarmLimits(
            connections=ConnectionLimits(
                dialled=self.dial_connections,
                per_torrent=self.origin_max_connections if origin else self.max_connections,
                per_host=self.max_total_connections,
            ),
            exchange=OfferLimits(
                slots=slots,
                inbound=self.inbound_pieces,
                ahead_min=3 if origin else 1,
                ahead_max=max(4 * slots, 16),
            ),
        )
