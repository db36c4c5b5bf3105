"""What the core tells its shell to do: the outputs of `swarmpull.swarm.scheduler.Scheduler`.

Named in the imperative.  The shell performs them in order.  A `Have` is only ever sent as the reaction to
`PieceStored`, so a peer never hears of a piece that a crash could take back.
"""

from __future__ import annotations

import attrs

from swarmpull.digest import Digest
from swarmpull.swarm.messages import ByeReason, Message
from swarmpull.swarm.peers import AnnounceState, PeerContact


@attrs.frozen
class Dial:
    """Connect, exchange Hellos, report `PeerConnected` or `DialFailed`."""

    digest: Digest
    contact: PeerContact


@attrs.frozen
class Send:
    connection: int
    message: Message


@attrs.frozen
class SendAll:
    """Send one message on several connections."""

    connections: tuple[int, ...]
    message: Message


@attrs.frozen
class SendPiece:
    """Send a piece, then report `PieceSent`."""

    connection: int
    digest: Digest
    index: int


@attrs.frozen
class Close:
    """Say goodbye and close the connection; the core has forgotten it already."""

    connection: int
    reason: ByeReason
    text: str = ""


@attrs.frozen
class Announce:
    """Tell the tracker, then report `AnnounceReplied` or `AnnounceFailed` (not for ``STOPPED``)."""

    digest: Digest
    namespace: str
    state: AnnounceState


@attrs.frozen
class AnnounceHeld:
    """Tell the trackers again that this host has all of these blobs, then report of each of them
    `AnnounceReplied` or `AnnounceFailed`."""

    digests: tuple[Digest, ...]


@attrs.frozen
class Watch:
    """Wait at the tracker for peers that appear after ``position``, then report `WatchEnded`.

    One at a time for a torrent; it takes the place of one that an earlier life of the torrent began.
    """

    digest: Digest
    position: int


@attrs.frozen
class Urge:
    """Have these pieces fetched first, wherever they come from: readers wait for them and no peer has them.

    At most 16 of one torrent at a time, ten times a second, and the same piece every two seconds.
    """

    digest: Digest
    indices: tuple[int, ...]


@attrs.frozen
class Finish:
    """Every piece is stored: check the whole blob and put it into the store."""

    digest: Digest


@attrs.frozen
class Fail:
    """The download makes no progress any more: tell its readers; the torrent is gone here."""

    digest: Digest
    reason: str


Action = (
    Dial
    | Send
    | SendAll
    | SendPiece
    | Close
    | Announce
    | AnnounceHeld
    | Watch
    | Urge
    | Finish
    | Fail
)
