"""How pieces are asked for and given: the seam between the books of a torrent and a policy.

The scheduler keeps torrents, connections and deadlines; an `Exchange` decides, for one host and over all its
torrents, what to ask of whom and whom to send what.  `swarmpull.swarm.offers` is the one that the program
uses; `swarmpull.swarm.pipeline` is the classic one, kept to compare with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import attrs

from swarmpull.swarm.actions import Action, Send, SendPiece
from swarmpull.swarm.messages import Message

if TYPE_CHECKING:
    from swarmpull.digest import Digest
    from swarmpull.swarm.torrent import Peer, Torrent


@attrs.define(eq=False)
class Outbox:
    """Where the parts of the core put their actions, in order."""

    actions: list[Action] = attrs.field(factory=list)

    def send(self, connection: int, message: Message) -> None:
        self.actions.append(Send(connection, message))

    def send_piece(self, connection: int, digest: Digest, index: int) -> None:
        self.actions.append(SendPiece(connection, digest, index))


@attrs.frozen
class Uplink:
    """What an uplink has to do: pieces being sent, claims that wait, offers out, peers that want.

    With the classic policy a peer that wants has claimed, so only the first two count anything.
    """

    sending: int
    claimed: int
    offered: int
    wanting: int


class Exchange(Protocol):
    """Decides what is claimed and what is sent.  Called by the scheduler only; never blocks, never raises."""

    def joined(self, torrent: Torrent, peer: Peer, now: float) -> None:
        """A connection is up and both bitfields are known."""
        ...

    def left(self, torrent: Torrent, peer: Peer, now: float) -> None:
        """A connection is gone; its claims are free already."""
        ...

    def gained(self, torrent: Torrent, peer: Peer, index: int, now: float) -> None:
        """A peer has one more piece (or, for ``index`` -1, everything)."""
        ...

    def received(self, torrent: Torrent, peer: Peer, message: Message, now: float) -> None:
        """A want, offer, claim, pass or cancel of this peer."""
        ...

    def arrived(self, torrent: Torrent, peer: Peer, now: float) -> None:
        """A piece is here: its claim is settled."""
        ...

    def freed(self, torrent: Torrent, now: float) -> None:
        """Claims of this torrent were taken back, or it got something to download."""
        ...

    def progressed(self, connection: int, index: int, now: float) -> None:
        """More bytes of a piece have left: its receiver is slow, but goes on taking them."""
        ...

    def sent(self, connection: int, index: int, now: float) -> None:
        """The last byte of a piece has left."""
        ...

    def tick(self, now: float) -> list[int]:
        """Time has passed; returns the connections whose peer takes too long over a piece from us.

        Called at every deadline of the scheduler: within a second while any connection is up.
        """
        ...

    def is_busy(self, connection: int) -> bool:
        """Whether anything is being sent to this peer, or promised to it."""
        ...

    def drain(self) -> None:
        """Promise nothing any more; what is being sent goes on."""
        ...

    def uplink(self) -> Uplink:
        """What the uplink has to do now, to look at."""
        ...

    def check_invariants(self) -> None: ...
