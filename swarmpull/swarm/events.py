"""What happens to a host: the inputs of `swarmpull.swarm.scheduler.Scheduler`.

Named in the past tense.  ``connection`` is a number that the shell gives to each peer connection and never
uses again.  An event about a connection or torrent that is gone already is legal: the shell and the core
race by nature, and the core ignores what came too late.
"""

from __future__ import annotations

import attrs

from swarmpull.digest import Digest
from swarmpull.swarm.messages import Hello, Message
from swarmpull.swarm.metainfo import BlobShape
from swarmpull.swarm.peers import PeerContact


@attrs.frozen
class TorrentAdded:
    """A blob is to be downloaded, or is complete and to be seeded.

    Attributes:
        shape: of the blob; its piece hashes are the shell's business.
        namespace: the repository it was asked for through; empty for a generic blob.
        have: the pieces that are verified and stored already, as a bitfield.
        verified: whether the whole blob is in the store; with every piece there but this false, the
            core asks for the check (`Finish`) at once.
        announce: whether trackers are to know; an origin is found through the ring instead.
        fed: its missing pieces come from outside of the swarm, as `PieceFetched` tells: nothing is claimed
            from peers, and whoever fetches decides when that has failed.
    """

    shape: BlobShape
    namespace: str
    have: int
    verified: bool
    announce: bool
    fed: bool = False


@attrs.frozen
class BlobVerified:
    """The whole blob has matched its digest and is in the store: this host is a seeder now."""

    digest: Digest


@attrs.frozen
class TorrentRemoved:
    """The blob is no longer wanted here, or gone from the store."""

    digest: Digest


@attrs.frozen
class PeersFound:
    """Peers of a torrent became known other than by an announce."""

    digest: Digest
    peers: tuple[PeerContact, ...]


@attrs.frozen
class AnnounceReplied:
    """A tracker acknowledged the last announce of this torrent and handed out peers.

    ``interval`` is in seconds; ``position`` is where a watch would go on from there, None when that tracker
    does not offer any.
    """

    digest: Digest
    interval: float
    peers: tuple[PeerContact, ...]
    position: int | None = None


@attrs.frozen
class AnnounceFailed:
    """No tracker answered the last announce of this torrent."""

    digest: Digest


@attrs.frozen
class TrackerLost:
    """The tracker that answered the last announce of these torrents is gone, and what it knew with it."""

    digests: tuple[Digest, ...]


@attrs.frozen
class WatchEnded:
    """A watch has brought peers, or its time is up, or it failed.

    ``position`` is where the next one goes on, None when there is to be none before the next announce.
    """

    digest: Digest
    peers: tuple[PeerContact, ...] = ()
    position: int | None = None


@attrs.frozen
class PeerConnected:
    """The handshake of a connection has come as far as the other side's Hello.

    Attributes:
        connection: its number.
        hello: what the other side said.
        contact: where to find that peer again.
        announced: the bitfield in the Hello that we sent, for a connection that we dialled;
            None for one that the peer dialled, whose Hello is still to be answered.
    """

    connection: int
    hello: Hello
    contact: PeerContact
    announced: int | None


@attrs.frozen
class DialFailed:
    """A peer could not be reached, or ended the connection before its Hello.

    ``is_gone``: another peer answered there, so the process was restarted and this one is no more.
    """

    digest: Digest
    peer_id: str
    is_gone: bool = False


@attrs.frozen
class PeerDisconnected:
    """A connection is closed, by whichever side."""

    connection: int


@attrs.frozen
class MessageReceived:
    connection: int
    message: Message


@attrs.frozen
class PieceProgress:
    """More bytes of a piece have arrived, and it goes on.

    Reported about once a second for a piece that takes that long, and only when enough came to matter; of a
    piece that arrives sooner never.
    """

    connection: int
    index: int


@attrs.frozen
class PieceReceived:
    """The last byte of a piece has arrived; its hash is being checked."""

    connection: int
    index: int


@attrs.frozen
class PieceStored:
    """A piece has matched its hash and is on disk."""

    connection: int
    digest: Digest
    index: int


@attrs.frozen
class PieceFetched:
    """A piece of a torrent that is fed has come from outside of the swarm, is verified and on disk."""

    digest: Digest
    index: int


@attrs.frozen
class PieceRejected:
    """A piece did not match its hash; nothing was written."""

    connection: int
    digest: Digest
    index: int


@attrs.frozen
class PieceLost:
    """A piece arrived, but could not be stored for a reason of our own: a full disk."""

    digest: Digest
    index: int


@attrs.frozen
class SendProgress:
    """More bytes of a piece have left, and it goes on; as rare as `PieceProgress`."""

    connection: int
    index: int


@attrs.frozen
class PieceSent:
    """The last byte of a piece has left, or was found to be no longer needed."""

    connection: int
    index: int


@attrs.frozen
class ReaderMoved:
    """A reader of a blob in progress needs this piece next."""

    digest: Digest
    reader: int
    index: int


@attrs.frozen
class ReaderClosed:
    digest: Digest
    reader: int


@attrs.frozen
class DeadlinePassed:
    """The time that ``next_deadline()`` named has come."""


@attrs.frozen
class DrainStarted:
    """The process shuts down: no new dials, no new uploads, say goodbye."""


Event = (
    TorrentAdded
    | BlobVerified
    | TorrentRemoved
    | PeersFound
    | AnnounceReplied
    | AnnounceFailed
    | TrackerLost
    | WatchEnded
    | PeerConnected
    | DialFailed
    | PeerDisconnected
    | MessageReceived
    | PieceProgress
    | PieceReceived
    | PieceStored
    | PieceFetched
    | PieceRejected
    | PieceLost
    | SendProgress
    | PieceSent
    | ReaderMoved
    | ReaderClosed
    | DeadlinePassed
    | DrainStarted
)
