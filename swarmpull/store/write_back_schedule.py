"""What waits in the write-back queue, and how its replicas keep out of one another's way.  Pure.

Which blob is written next, and when, is for `swarmpull.store.retry_schedule`; the backend is its target.
"""

from __future__ import annotations

from typing import Final

import attrs

from swarmpull.digest import Digest

# How far a replica is behind the one before it, in seconds, and the rate in bytes per second at which that
# one is expected to write at least: enough that usually one of them writes.
RANK_DELAY: Final = 30.0
RANK_RATE: Final = 20e6


# A blob, and the repository through which it was pushed, which says where it belongs.
Key = tuple[Digest, str]


@attrs.frozen
class QueuedBlob:
    """A blob that the backend does not have yet; times are in seconds since the epoch.

    Attributes:
        length: in bytes.
        namespace: the repository through which it was pushed; empty for a generic blob.
        enqueued_at: when it was accepted.
        rank: 0 where it was accepted, 1 and more on replicas, which write only if those before them do not.
        attempts: how often writing has failed.
        next_at: when it is tried next.
        last_error: why the last attempt failed.
        is_found: nobody pushed it just now: it was on the disk when the queue was made anew.
    """

    digest: Digest
    length: int
    namespace: str
    enqueued_at: float
    rank: int = 0
    attempts: int = 0
    next_at: float = 0.0
    last_error: str = ""
    is_found: bool = attrs.field(default=False, converter=bool)

    @property
    def key(self) -> Key:
        return self.digest, self.namespace


def rank_delay(rank: int, length: int) -> float:
    """Seconds that a replica leaves to those before it to write a blob."""
    return rank * (RANK_DELAY + length / RANK_RATE)
