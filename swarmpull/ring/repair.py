"""Which copies of queued blobs are missing on which origins, and who is to make them.  Pure.

What is known of a blob is asked anew each time and not remembered: a member that had a copy may have lost its
disk since.  Of those that have a blob queued one repairs, the one that is to write it first; when it is gone,
the next.  Should two think that they are it, the second copy is found to be there and costs a call.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Final, Generic, TypeVar

import attrs

K = TypeVar("K")

# What a member says of a blob that it does not have queued: not on its disk; on its disk, as after somebody
# read it there, so that it may be evicted and nobody would write it; or it has written it to the backend.
ABSENT: Final = -1
NOT_QUEUED: Final = -2
WRITTEN: Final = -3


@attrs.frozen
class Queued(Generic[K]):
    """A blob in the queue of this origin.

    Attributes:
        key: names it.
        digest: as text; what the ring is asked about.
        rank: 0 where it was accepted, 1 and more on replicas.
    """

    key: K
    digest: str
    rank: int


@attrs.frozen
class Copy(Generic[K]):
    """A copy to be made: of what, by which member, and its rank there."""

    key: K
    member: str
    rank: int


def missing_copies(
    blobs: Iterable[Queued[K]],
    order: Callable[[str], Sequence[str]],
    answers: Mapping[str, Mapping[K, int]],
    *,
    own: Collection[str],
    gone: Collection[str],
    copies: int,
) -> list[Copy[K]]:
    """What this origin is to repair.

    Args:
        blobs: what it has queued.
        order: the members by preference for a digest, whatever their health.
        answers: what each member that answered says of each blob: its rank there, ABSENT, NOT_QUEUED or
            WRITTEN.
        own: the addresses of this origin.
        gone: members that do not answer for so long that others take their place.
        copies: how many origins are to have each blob.
    """
    return [
        copy
        for blob in blobs
        for copy in _copies_of(blob, order(blob.digest), answers, own, gone, copies)
    ]


def _copies_of(
    blob: Queued[K],
    members: Sequence[str],
    answers: Mapping[str, Mapping[K, int]],
    own: Collection[str],
    gone: Collection[str],
    copies: int,
) -> Iterable[Copy[K]]:
    said = {each: answers[each][blob.key] for each in members if blob.key in answers.get(each, ())}
    if WRITTEN in said.values():
        # This origin will find that, too, before long.
        return
    places = {member: place for place, member in enumerate(members)}
    here = min((places[each] for each in own if each in places), default=len(members))
    others = [(rank, places[each]) for each, rank in said.items() if rank >= 0 and each not in own]
    if others and min(others) < (blob.rank, here):
        return
    owners = [each for each in members if each not in gone or each in own][:copies]
    for member in owners:
        if member not in own and said.get(member) in (ABSENT, NOT_QUEUED):
            yield Copy(blob.key, member, places[member] + 1)
