"""Which certificate a peer id, and the address that goes with it, was announced by.

Whoever announces somebody else's id or address would have him forgotten, or others sent elsewhere: a peer id
is known to everybody that it was handed out to.  So both belong to who announced them first, for as long as
he goes on announcing them, and a little longer than a peer is remembered.  An address is given up sooner to
whoever calls from that very host, for hosts and containers take over addresses of others that have gone.

Of an origin that a tracker asked itself there is no certificate at hand: what it is known by is every
origin's, and no agent's.
"""

from __future__ import annotations

from typing import Final

import attrs

from swarmpull.swarm.peers import PeerContact, PeerKind

# Seconds since an announce; a seeder is remembered for three of its intervals of 66 s at most.
FRESH: Final = 200.0
# Who is not known by name: any origin.
_SOME_ORIGIN: Final = ""


@attrs.define(eq=False)
class _Claim:
    contact: PeerContact
    owner: str
    until: float


class Claims:
    """The owners of peer ids and addresses; some 600 bytes for each peer, whatever it has.

    ``now`` is any clock that does not go backwards, in seconds.
    """

    def __init__(self, limit: int) -> None:
        """At more than ``limit`` peers the stalest one is forgotten of the owner that announced just now.

        If that is its only one, the stalest one of whoever has most.
        """
        self._limit = limit
        self._by_id: dict[str, _Claim] = {}
        self._by_address: dict[tuple[str, int], _Claim] = {}
        # Those of each owner, the stalest first.
        self._by_owner: dict[str, dict[str, _Claim]] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def claim(self, contact: PeerContact, owner: str, called_from: str, now: float) -> str:
        """``owner`` announces ``contact``, calling from that host.

        Returns why it may not, and what to do; empty when it may.
        """
        kind, claim = contact.kind, self._by_id.get(contact.peer_id)
        if claim is not None and _is_held(claim, owner, kind, now):
            return _refusal(claim, owner, f"peer id {contact.peer_id}", now)
        other = self._by_address.get((contact.host, contact.port))
        if other is not None and called_from != contact.host and _is_held(other, owner, kind, now):
            return _refusal(other, owner, f"address {contact.host}:{contact.port}", now)
        self._enter(contact, owner, now)
        return ""

    def vouch(self, contact: PeerContact, now: float) -> None:
        """An origin has said itself that ``contact`` is its own: whoever else announced that has lied."""
        claim = self._by_id.get(contact.peer_id)
        known = claim is not None and claim.contact == contact
        self._enter(contact, claim.owner if known and claim is not None else _SOME_ORIGIN, now)

    def refuse_id(self, peer_id: str, owner: str, now: float) -> str:
        """Why ``owner`` may not speak for a peer; empty when it may."""
        claim = self._by_id.get(peer_id)
        if claim is None or not _is_held(claim, owner, claim.contact.kind, now):
            return ""
        return _refusal(claim, owner, f"peer id {peer_id}", now)

    def _enter(self, contact: PeerContact, owner: str, now: float) -> None:
        claim = self._by_id.get(contact.peer_id)
        if claim is None or claim.owner != owner or claim.contact != contact:
            self._forget(claim)
            self._forget(self._by_address.get((contact.host, contact.port)))
            claim = _Claim(contact, owner, now)
            self._by_id[contact.peer_id] = claim
            self._by_address[contact.host, contact.port] = claim
        claim.until = now + FRESH
        claims = self._by_owner.setdefault(owner, {})
        claims.pop(contact.peer_id, None)
        claims[contact.peer_id] = claim
        if len(self._by_id) > self._limit:
            if len(claims) == 1:
                claims = max(self._by_owner.values(), key=len)
            self._forget(next(iter(claims.values())))

    def _forget(self, claim: _Claim | None) -> None:
        if claim is None:
            return
        peer_id = claim.contact.peer_id
        del self._by_id[peer_id]
        del self._by_address[claim.contact.host, claim.contact.port]
        claims = self._by_owner[claim.owner]
        del claims[peer_id]
        if not claims:
            del self._by_owner[claim.owner]

    def check_invariants(self) -> None:
        """Raise AssertionError when the books contradict one another; for tests."""
        assert len(self._by_id) <= self._limit
        assert len(self._by_id) == len(self._by_address)
        for peer_id, claim in self._by_id.items():
            contact = claim.contact
            assert contact.peer_id == peer_id
            assert self._by_address[contact.host, contact.port] is claim
            assert self._by_owner[claim.owner][peer_id] is claim
        assert sum(map(len, self._by_owner.values())) == len(self._by_id)
        assert all(self._by_owner.values())


def _is_held(claim: _Claim, owner: str, kind: PeerKind, now: float) -> bool:
    """Whether the claim keeps ``owner`` from the same."""
    if claim.owner == owner or claim.until <= now:
        return False
    return claim.owner != _SOME_ORIGIN or kind is not PeerKind.ORIGIN


def _refusal(claim: _Claim, owner: str, what: str, now: float) -> str:
    whose = f"the certificate of {claim.owner}" if claim.owner else "an origin"
    seconds = now + FRESH - claim.until
    return (
        f"{what} was announced by {whose} {seconds:.0f} s ago, not by that of {owner}: use a port and a "
        f"process of its own for each, or wait until it has been silent for {FRESH:.0f} s"
    )
