"""Which tracker knows of which blob of this host, and what has to be announced again when that changes.
Pure.

A tracker keeps its table in memory, and a blob belongs to the first healthy tracker of its ring.  So what was
announced is lost when a tracker goes, when it comes back empty, and when it stops answering; and it is at the
wrong place once a tracker that comes before in the ring is back.  All of these are told apart here, because
two hosts that announce the same blob to two trackers do not hear of each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import attrs

from swarmpull.digest import Digest

# Trackers of which is remembered which process answered last; a cluster has a few.
PROCESSES_MAX: Final = 1024


@attrs.frozen
class Place:
    """Where a blob is announced.

    Attributes:
        tracker: who answered.
        better: those that come before it in the ring, and did not.
        complete: whether this host has all of the blob.
        position: where a watch goes on there; None when there is to be none.
        is_short: whether the next announce is to go to the next tracker, which may know more peers.
    """

    tracker: str
    better: tuple[str, ...] = ()
    complete: bool = False
    position: int | None = None
    is_short: bool = False


class Announced:
    """The places of the blobs of one host; ``limit`` blobs, and the one that was announced least recently
    goes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        # The latest at the end.
        self._places: dict[Digest, Place] = {}
        self._processes: dict[str, str] = {}

    def place(self, digest: Digest) -> Place | None:
        """Where a blob was announced last."""
        return self._places.get(digest)

    def put(
        self,
        digest: Digest,
        tracker: str,
        preferred: Sequence[str],
        position: int | None,
        *,
        complete: bool,
        is_short: bool = False,
    ) -> None:
        """A tracker has taken an announce; ``preferred`` is the ring for this blob, whatever its health."""
        before = preferred[: preferred.index(tracker)] if tracker in preferred else ()
        self._places.pop(digest, None)
        self._places[digest] = Place(tracker, tuple(before), complete, position, is_short)
        if len(self._places) > self._limit:
            del self._places[next(iter(self._places))]

    def asked_elsewhere(self, digest: Digest) -> None:
        """The next tracker has been asked: the next announce goes where the blob is announced."""
        place = self._places.get(digest)
        if place is not None:
            self._places[digest] = attrs.evolve(place, is_short=False)

    def forget(self, digest: Digest) -> None:
        """The host does not take part in this swarm any more."""
        self._places.pop(digest, None)

    def gone(self, tracker: str) -> tuple[Digest, ...]:
        """What is to be announced again when a tracker has gone or hangs: all that it knew."""
        return tuple(digest for digest, place in self._places.items() if place.tracker == tracker)

    def back(self, tracker: str) -> tuple[Digest, ...]:
        """What is to be announced again when a tracker is back.

        That is what belongs to it, and what it may have lost, of the blobs that are on their way here.  There
        is no hurry about the others: their next announces find it, and until then they are known elsewhere.
        """
        return tuple(
            digest
            for digest, place in self._places.items()
            if not place.complete and (place.tracker == tracker or tracker in place.better)
        )

    def answered_by(self, digest: Digest, tracker: str, process: str) -> tuple[Digest, ...]:
        """What else is to be announced again because a tracker turns out to be another process than before.

        ``process`` names it; empty for one that does not say.
        """
        former = self._processes.pop(tracker, process)
        self._processes[tracker] = process
        if len(self._processes) > PROCESSES_MAX:
            del self._processes[next(iter(self._processes))]
        if not process or former == process:
            return ()
        return tuple(each for each in self.gone(tracker) if each != digest)
