"""The peer table against a plain model, under arbitrary sequences of what may happen to it."""

from __future__ import annotations

import math
import random
from collections import Counter

import attrs
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from swarmpull.digest import Digest
from swarmpull.swarm.handout import HandoutLimits, PeerTable
from swarmpull.swarm.peers import AnnounceState, PeerContact, PeerKind
from swarmpull.swarm.watches import Watch, WatchLimits

DIGESTS = [Digest.of(bytes([n])) for n in range(3)]
KINDS = [PeerKind.AGENT, PeerKind.AGENT, PeerKind.AGENT, PeerKind.ORIGIN]
# No limit of peers is reached here: what a limit drops has tests of its own.
WATCHES = WatchLimits(told=2, dialled=1, batch=2, per_torrent=3, watches=5)
LIMITS = HandoutLimits(peers_per_handout=5, peers_wanted=3, leechers_for_seeder=1, watch=WATCHES)


@attrs.define
class Known:
    contact: PeerContact
    state: AnnounceState
    expires_at: float


class PeerTableMachine(RuleBasedStateMachine):
    @initialize(seed=st.integers(0, 2**16))
    def start(self, seed: int) -> None:
        self.table = PeerTable(LIMITS, random.Random(seed))
        self.now = 1000.0
        self.model: dict[Digest, dict[str, Known]] = {digest: {} for digest in DIGESTS}
        self.open: list[Watch] = []  # in the order of waiting
        self.told: Counter[tuple[Digest, str]] = Counter()

    @rule(
        digest=st.sampled_from(DIGESTS),
        host=st.integers(0, 11),
        life=st.integers(0, 2),
        state=st.sampled_from(AnnounceState),
    )
    def announce(self, digest: Digest, host: int, life: int, state: AnnounceState) -> None:
        contact = PeerContact(f"{host:016x}{life:016x}", f"h{host}", 7100, KINDS[host % 4])
        is_new = self._appears(digest, contact) and state is not AnnounceState.STOPPED
        before = list(self.open)
        handout = self.table.announce(digest, contact, state, self.now)
        self._forget_the_late()
        known = self.model[digest]
        others = [peer for peer in known.values() if peer.contact.host != contact.host]
        self._check(handout.peers, others, state)
        known_before = known.pop(contact.peer_id, None)
        if state is AnnounceState.STOPPED:
            del self.told[digest, contact.peer_id]
            return
        if known_before is None:
            for peer_id in [k for k, v in known.items() if v.contact.host == contact.host]:
                self._forget(digest, peer_id)
        known[contact.peer_id] = Known(contact, state, self.now + 3 * handout.interval)
        assert handout.interval >= 3.0
        if is_new:
            dialled = handout.peers[:1] if state is AnnounceState.LEECHING else ()
            self._check_told(digest, contact, dialled, before)

    @rule(
        digests=st.sets(st.sampled_from(DIGESTS), min_size=1),
        host=st.integers(0, 11),
        life=st.integers(0, 2),
    )
    def announce_held(self, digests: set[Digest], host: int, life: int) -> None:
        contact = PeerContact(f"{host:016x}{life:016x}", f"h{host}", 7100, KINDS[host % 4])
        new = {digest for digest in digests if self._appears(digest, contact)}
        before = list(self.open)
        handout = self.table.announce_held(sorted(digests), contact, self.now)
        assert 60.0 <= handout.interval <= 66.0
        assert digests.issuperset(handout.leechers)
        self._forget_the_late()
        for digest in sorted(digests):
            known = self.model[digest]
            others = [peer for peer in known.values() if peer.contact.host != contact.host]
            self._check(handout.leechers.get(digest, ()), others, AnnounceState.COMPLETE)
            if known.pop(contact.peer_id, None) is None:
                for peer_id in [k for k, v in known.items() if v.contact.host == contact.host]:
                    self._forget(digest, peer_id)
            expires_at = self.now + 3 * handout.interval
            known[contact.peer_id] = Known(contact, AnnounceState.COMPLETE, expires_at)
            if digest in new:
                of_this = [watch for watch in before if watch.digest == digest]
                self._check_told(digest, contact, (), of_this)

    @rule(digest=st.sampled_from(DIGESTS), lifetime=st.floats(1, 50))
    def add_seeder(self, digest: Digest, lifetime: float) -> None:
        contact = PeerContact(f"{7:032x}", "dedicated", 7201, PeerKind.ORIGIN)
        is_new = self._appears(digest, contact)
        waited = list(self.open)
        self.table.add_seeder(digest, contact, self.now, lifetime=lifetime)
        self._forget_the_late()
        before = self.model[digest].get(contact.peer_id)
        expires_at = max(self.now + lifetime, before.expires_at if before else 0.0)
        self.model[digest][contact.peer_id] = Known(contact, AnnounceState.COMPLETE, expires_at)
        if is_new:
            self._check_told(digest, contact, (), waited)

    @rule(digest=st.sampled_from(DIGESTS), hosts=st.sets(st.integers(0, 11), min_size=1))
    def leechers_wait(self, digest: Digest, hosts: set[int]) -> None:
        for host in hosts:
            self.announce(digest, host, 0, AnnounceState.LEECHING)
            self.watch(digest, f"{host:016x}{0:016x}", 0)

    @rule(
        digest=st.sampled_from(DIGESTS),
        peer_id=st.builds("{:016x}{:016x}".format, st.integers(0, 11), st.integers(0, 2)),
        back=st.integers(-1, 4),
    )
    def watch(self, digest: Digest, peer_id: str, back: int) -> None:
        self.table.expire(self.now)
        self._forget_the_late()
        known = self.model[digest]
        leeches = peer_id in known and known[peer_id].state is AnnounceState.LEECHING
        position = self.table._watches.position - back
        watch = self.table.watch(
            digest, peer_id, position, 30.0, self.now, lambda: self._ended(watch)
        )
        if watch.is_open:
            assert leeches
            self.open.append(watch)
        elif watch.peers:
            self._count_told(watch)
            assert watch.position == self.table._watches.position
        else:
            full = len(self.open) >= 5 or sum(w.digest == digest for w in self.open) >= 3
            assert full or not leeches
            assert watch.position is None

    @rule(data=st.data())
    @precondition(lambda self: self.open)
    def nobody_waits_any_more(self, data: st.DataObject) -> None:
        watch = data.draw(st.sampled_from(self.open))
        self.open.remove(watch)
        self.table.close_watch(watch)
        assert not watch.is_open

    @rule(seconds=st.floats(0.0, 80.0))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    @precondition(lambda self: self.table.next_deadline() < math.inf)
    def the_deadline_comes(self) -> None:
        self.now = max(self.now, self.table.next_deadline())
        self.table.expire(self.now)
        self._forget_the_late()
        assert self.table.next_deadline() > self.now

    @rule()
    def expire(self) -> None:
        self.table.expire(self.now)
        self._forget_the_late()
        statistics = self.table.statistics()
        assert statistics.peers == sum(map(len, self.model.values()))
        assert statistics.torrents == sum(1 for known in self.model.values() if known)
        for digest, known in self.model.items():
            complete = [v for v in known.values() if v.state is AnnounceState.COMPLETE]
            assert self.table.seeders(digest) == len(complete)

    @invariant()
    def the_table_agrees_with_itself(self) -> None:
        if hasattr(self, "table"):
            self.table.check_invariants()
            assert all(watch.is_open for watch in self.open)
            assert self.table.statistics().watching == len(self.open)
            assert max(self.told.values(), default=0) <= 2
            expiries = [peer.expires_at for known in self.model.values() for peer in known.values()]
            assert self.table.next_deadline() <= min(expiries, default=math.inf)

    def _appears(self, digest: Digest, contact: PeerContact) -> bool:
        known = self.model[digest].get(contact.peer_id)
        return known is None or known.expires_at <= self.now

    def _ended(self, watch: Watch) -> None:
        """Called by the table, once, for each watch that was open."""
        assert not watch.is_open
        self.open.remove(watch)
        if watch.peers:
            self._count_told(watch)

    def _count_told(self, watch: Watch) -> None:
        assert len(set(watch.peers)) == len(watch.peers) <= 2
        for contact in watch.peers:
            assert contact.peer_id != watch.peer_id
            self.told[watch.digest, contact.peer_id] += 1

    def _check_told(
        self,
        digest: Digest,
        contact: PeerContact,
        dialled: tuple[PeerContact, ...],
        before: list[Watch],
    ) -> None:
        """Of those who waited the first two are told, but not those that the newcomer dials."""
        dials = {peer.peer_id for peer in dialled}
        there = self.model[digest]
        # The newcomer itself may have waited until its time was up.
        others = there.keys() - {contact.peer_id}
        could = [w for w in before if w.digest == digest and w.peer_id in others]
        should = [watch for watch in could if watch.peer_id not in dials][:2]
        assert [watch for watch in could if watch.peers] == should
        assert all(watch.peers == (contact,) for watch in should)

    def _forget_the_late(self) -> None:
        for digest, known in self.model.items():
            for peer_id in [k for k, v in known.items() if v.expires_at <= self.now]:
                self._forget(digest, peer_id)

    def _forget(self, digest: Digest, peer_id: str) -> None:
        # Who comes back is news again.
        del self.model[digest][peer_id]
        del self.told[digest, peer_id]

    def _check(
        self, peers: tuple[PeerContact, ...], others: list[Known], state: AnnounceState
    ) -> None:
        assert len(set(peers)) == len(peers) <= 5
        groups = {known.contact: _group(known) for known in others}
        got = [groups[peer] for peer in peers]  # KeyError: nobody that we know of
        seeders, origins, leechers = (list(groups.values()).count(n) for n in range(3))
        if state is AnnounceState.LEECHING:
            assert len(got) == min(seeders + origins + leechers, 5)
            agents = min(seeders + leechers, 5 - min(origins, 2))
            assert len(got) - got.count(1) == agents
            before = min(3, agents) if seeders else 0
            assert got[before : before + got.count(1)] == [1] * got.count(1)
            assert 0 in got or not seeders, "of few completed ones there is always one"
        elif state is AnnounceState.COMPLETE and leechers <= 1:
            assert got == [2] * leechers
        else:
            assert got == []


def _group(known: Known) -> int:
    if known.contact.kind is PeerKind.ORIGIN:
        return 1
    return 0 if known.state is AnnounceState.COMPLETE else 2


TestPeerTable = PeerTableMachine.TestCase
TestPeerTable.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
