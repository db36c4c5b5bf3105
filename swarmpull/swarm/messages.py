"""The messages between two peers of one torrent, as the core sees them.

``swarmpull.wire.peer`` gives them their bytes.  A connection belongs to one torrent: the ``Hello`` names
the digest, so no later message repeats it.
"""

from __future__ import annotations

import enum

import attrs

from swarmpull.digest import Digest
from swarmpull.swarm.peers import PeerKind


class ByeReason(enum.IntEnum):
    """Why a connection is ended; sent as the last message where there is time for one."""

    DRAINING = 1
    """The sender shuts down."""
    UNKNOWN_TORRENT = 2
    """The sender has neither the blob nor a download of it."""
    BUSY = 3
    """The sender has as many connections as it takes."""
    USELESS = 4
    """Neither side can give the other anything: both complete, or idle for too long."""
    PROTOCOL_ERROR = 5
    """The other side broke the protocol."""
    DUPLICATE = 6
    """The two are connected for this torrent already."""
    CORRUPT = 7
    """A piece from the other side did not match its hash."""
    STALLED = 8
    """The other side did not deliver in time."""
    UNTRUSTED = 9
    """The other side may not exchange pieces here, or only one of the two speaks TLS."""


@attrs.frozen
class Hello:
    """The first message in each direction; the side that dialled speaks first.

    Attributes:
        digest: the torrent.
        namespace: the repository it was asked for through; empty for a generic blob.
        peer_id: of the sender, 32 hex digits.
        kind: of the sender.
        port: where the sender listens for peers.
        piece_count: in the sender's metainfo; both sides must agree.
        have: the sender's bitfield: bit ``i % 8`` of byte ``i // 8`` is piece ``i``.
    """

    digest: Digest
    namespace: str
    peer_id: str
    kind: PeerKind
    port: int
    piece_count: int
    have: bytes = attrs.field(repr=False)


@attrs.frozen
class Have:
    """The sender has verified and stored one more piece."""

    index: int


@attrs.frozen
class HaveAll:
    """The sender has verified and stored every piece."""


@attrs.frozen
class Want:
    """The sender lacks something that the receiver has: offer it a slot when there is one."""


@attrs.frozen
class Offer:
    """The sender's uplink is about to be free: claim a piece, or pass.

    ``index`` is a piece that the sender would like to give, or -1.
    """

    index: int = -1


@attrs.frozen
class Claim:
    """The sender wants this piece from the receiver, now."""

    index: int


@attrs.frozen
class Pass:
    """No: to an offer (``index`` -1), or to the claim of this piece, which is then to be had elsewhere."""

    index: int = -1


@attrs.frozen
class Cancel:
    """The sender no longer needs the piece it claimed."""

    index: int


@attrs.frozen
class Bye:
    """The sender ends the connection."""

    reason: ByeReason
    text: str = ""


@attrs.frozen
class PieceChunk:
    """The header of a run of payload bytes of one piece; ``length`` bytes follow it on the wire.

    The chunks of a piece come in order and without gaps; other messages may stand between them.
    """

    index: int
    offset: int
    length: int


Message = Hello | Have | HaveAll | Want | Offer | Claim | Pass | Cancel | Bye
