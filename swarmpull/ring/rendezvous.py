"""Rendezvous hashing (highest random weight): every host orders the members of a ring alike.

Each member gets a score from a hash of key and member; the order of the scores is the order of
preference for this key.  The first members of the order own the key.  A member that comes or goes
moves only the keys that it owns itself, and its share is spread evenly over the others.

The hash is part of the protocol between hosts: 64 bits of BLAKE2b (RFC 7693) of the key, itself keyed
with the BLAKE2b of the member, so that members of any length can be told apart.  Weights enter by the
logarithmic method of Schindelhauer and Schomaker ("Weighted distributed hash tables", SPAA 2005): with
h uniform in (0, 1), the smallest -ln(h) / weight belongs to each member as often as its weight says.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterable, Mapping
from typing import Final

_HASH_BYTES: Final = 8
_HASH_VALUES: Final = 1 << 64
# BLAKE2b takes keys of up to 64 bytes; 32 keep members apart as well.
_MEMBER_KEY_BYTES: Final = 32
# More members than a ring has, in all rings of a process together.
_MEMBERS_CACHED: Final = 4096


@functools.lru_cache(maxsize=_MEMBERS_CACHED)
def _member_key(member: str) -> bytes:
    return hashlib.blake2b(member.encode(), digest_size=_MEMBER_KEY_BYTES).digest()


def hash_of(key: str, member: str) -> int:
    """The 64-bit hash from which the score of ``member`` for ``key`` comes; the same everywhere."""
    digest = hashlib.blake2b(key.encode(), digest_size=_HASH_BYTES, key=_member_key(member))
    return int.from_bytes(digest.digest(), "big")


def order(
    key: str, members: Iterable[str], *, weights: Mapping[str, float] | None = None
) -> list[str]:
    """All members, the one that is preferred for ``key`` first.

    ``key`` is the text of a digest or the name of a repository.  A member that is named twice counts
    once.  ``weights`` are relative, and 1 for a member that is not in them.

    Raises:
        ValueError: for a weight that is not a positive number.
    """
    scores = []
    for member in set(members):
        weight = 1.0 if weights is None else weights.get(member, 1.0)
        if not 0.0 < weight < math.inf:
            raise ValueError(f"weight of ring member {member} must be a positive number: {weight}")
        # The half keeps the logarithm finite; above 2**53 neighbouring hashes may share a float, and
        # then the name decides.
        uniform = (hash_of(key, member) + 0.5) / _HASH_VALUES
        scores.append((-math.log(uniform) / weight, member))
    return [member for _, member in sorted(scores)]
