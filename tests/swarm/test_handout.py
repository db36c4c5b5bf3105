from __future__ import annotations

import math
import random
from collections import Counter

import attrs
import pytest

from swarmpull.digest import Digest
from swarmpull.swarm.handout import HandoutLimits, PeerTable
from swarmpull.swarm.peers import AnnounceState, PeerContact, PeerKind

LEECHING, COMPLETE, STOPPED = AnnounceState.LEECHING, AnnounceState.COMPLETE, AnnounceState.STOPPED
BLOB = Digest.of(b"blob")


def agent(number: int, *, life: int = 0) -> PeerContact:
    """Agent ``number``; another ``life`` is another process at the same address."""
    return PeerContact(f"{life:08x}{number:024x}", f"host-{number}", 7100, PeerKind.AGENT)


def origin(number: int) -> PeerContact:
    return PeerContact(f"f{number:031x}", f"origin-{number}", 7201, PeerKind.ORIGIN)


def make_table(seed: int = 0, **limits: float) -> PeerTable:
    return PeerTable(HandoutLimits(**limits), random.Random(seed))  # type: ignore[arg-type]


def fill(
    table: PeerTable, *, seeders: int = 0, origins: int = 0, leechers: int = 0, now: float = 0.0
) -> None:
    for number in range(seeders):
        table.announce(BLOB, agent(1000 + number), COMPLETE, now)
    for number in range(origins):
        table.announce(BLOB, origin(number), COMPLETE, now)
    for number in range(leechers):
        table.announce(BLOB, agent(2000 + number), LEECHING, now)
    table.check_invariants()


def kinds(peers: tuple[PeerContact, ...]) -> list[str]:
    def kind(peer: PeerContact) -> str:
        if peer.kind is PeerKind.ORIGIN:
            return "origin"
        return "seeder" if peer.host < "host-2" else "leecher"

    return [kind(peer) for peer in peers]


def test_the_first_peer_of_a_torrent_gets_nobody_and_asks_again_soon():
    handout = make_table().announce(BLOB, agent(1), LEECHING, 0.0)

    assert handout.peers == ()
    assert handout.interval == 3.0


def test_origins_come_before_agents_in_progress_while_no_agent_has_completed():
    table = make_table()
    fill(table, origins=2, leechers=4)

    handout = table.announce(BLOB, agent(1), LEECHING, 0.0)

    assert kinds(handout.peers) == ["origin"] * 2 + ["leecher"] * 4


@pytest.mark.parametrize(("seeders", "before"), [(1, 10), (19, 10), (20, 20), (400, 20)])
def test_origins_come_later_the_more_agents_have_completed(seeders: int, before: int):
    table = make_table()
    fill(table, seeders=seeders, origins=3, leechers=60)

    handout = table.announce(BLOB, agent(1), LEECHING, 0.0)

    origins = [place for place, kind in enumerate(kinds(handout.peers)) if kind == "origin"]
    assert origins == [before, before + 1, before + 2]


def test_a_handout_has_fifty_peers_at_most_and_as_many_as_there_are():
    table = make_table()
    fill(table, seeders=30, origins=5, leechers=100)
    assert len(set(table.announce(BLOB, agent(1), LEECHING, 0.0).peers)) == 50

    few = make_table()
    fill(few, seeders=3, origins=2, leechers=4)
    handout = few.announce(BLOB, agent(1), LEECHING, 0.0)
    assert Counter(kinds(handout.peers)) == {"seeder": 3, "origin": 2, "leecher": 4}


def test_completed_agents_and_those_in_progress_are_dialled_equally_often():
    """A leecher dials the first twenty: each agent has one uplink, whether it has completed or not."""
    table = make_table(seed=7)
    fill(table, seeders=10, leechers=190)
    rounds = 2000
    dialled = Counter(
        peer
        for _ in range(rounds)
        for peer in table.announce(BLOB, agent(2000), LEECHING, 0.0).peers[:20]
    )

    by_kind = Counter(kinds(tuple(dialled.elements())))
    each = {"seeder": by_kind["seeder"] / 10, "leecher": by_kind["leecher"] / 189}
    # A share is rounded up to whole peers: 3 of 50 are completed ones, where 2.5 would be in proportion.
    assert 1.0 <= each["seeder"] / each["leecher"] < 1.4
    assert len(dialled) == 199


def test_nobody_is_handed_out_to_himself():
    table = make_table()
    fill(table, leechers=60)

    for _ in range(20):
        handout = table.announce(BLOB, agent(2007), LEECHING, 0.0)
        assert len(handout.peers) == 50
        assert agent(2007) not in handout.peers


def test_each_peer_of_a_class_is_handed_out_equally_often():
    table = make_table(seed=7, peers_per_handout=10)
    fill(table, leechers=100)
    counts = Counter(
        peer for _ in range(2000) for peer in table.announce(BLOB, agent(1), LEECHING, 0.0).peers
    )

    # 2000 draws of 10 from 100: 200 each, with a standard deviation of 13.4.
    assert len(counts) == 100
    assert min(counts.values()) > 200 - 5 * 13.4
    assert max(counts.values()) < 200 + 5 * 13.4


def test_torrents_are_apart():
    table = make_table()
    table.announce(BLOB, agent(1), LEECHING, 0.0)

    assert table.announce(Digest.of(b"other"), agent(2), LEECHING, 0.0).peers == ()


def test_a_leecher_with_enough_peers_asks_less_often():
    table = make_table(peers_wanted=20, leech_interval=10.0)
    fill(table, leechers=19)
    assert table.announce(BLOB, agent(1), LEECHING, 0.0).interval == 3.0
    assert table.announce(BLOB, agent(2), LEECHING, 0.0).interval == 10.0


def test_a_completed_peer_waits_to_be_dialled_unless_the_leechers_are_few():
    table = make_table(leechers_for_seeder=4)
    fill(table, seeders=3, origins=1, leechers=4)
    handout = table.announce(BLOB, agent(1), COMPLETE, 0.0)
    assert sorted(peer.host for peer in handout.peers) == [f"host-{2000 + n}" for n in range(4)]

    table.announce(BLOB, agent(3000), LEECHING, 0.0)
    assert table.announce(BLOB, agent(1), COMPLETE, 0.0).peers == ()


def test_completed_peers_announce_every_minute_not_all_at_the_same_time():
    table = make_table(seed=3)
    intervals = [table.announce(BLOB, agent(n), COMPLETE, 0.0).interval for n in range(100)]

    assert min(intervals) >= 60.0
    assert max(intervals) <= 66.0
    assert len(set(intervals)) == 100


def test_a_peer_moves_to_another_class_when_it_is_complete():
    table = make_table()
    table.announce(BLOB, agent(1), LEECHING, 0.0)
    table.announce(BLOB, agent(1), COMPLETE, 1.0)

    assert (table.statistics().seeders, table.statistics().leechers) == (1, 0)
    assert table.seeders(BLOB) == 1


def test_a_silent_peer_is_forgotten_after_three_intervals():
    table = make_table()
    interval = table.announce(BLOB, agent(1), LEECHING, 100.0).interval
    assert table.next_deadline() == 100.0 + 3 * interval

    table.expire(100.0 + 3 * interval - 0.01)
    assert table.statistics().peers == 1
    table.expire(100.0 + 3 * interval)
    assert table.statistics().peers == 0
    assert table.statistics().torrents == 0
    assert table.statistics().expired == 1
    assert table.next_deadline() == math.inf


def test_a_peer_that_keeps_announcing_stays():
    table = make_table()
    for second in range(0, 300, 3):
        table.announce(BLOB, agent(1), LEECHING, float(second))
    table.check_invariants()

    assert table.statistics().peers == 1
    assert table.statistics().expired == 0


def test_a_seeder_that_begins_anew_is_forgotten_as_early_as_a_leecher():
    table = make_table()
    table.announce(BLOB, agent(1), COMPLETE, 0.0)
    table.announce(BLOB, agent(1), LEECHING, 1.0)

    assert table.next_deadline() == 10.0
    table.expire(10.0)
    assert table.statistics().peers == 0


def test_nobody_whose_time_is_up_is_handed_out_even_if_nobody_called_expire():
    table = make_table()
    table.announce(BLOB, agent(1), LEECHING, 0.0)

    assert table.announce(BLOB, agent(2), LEECHING, 9.0).peers == ()


def test_a_peer_that_stops_is_gone_at_once():
    table = make_table()
    fill(table, leechers=2)

    handout = table.announce(BLOB, agent(2000), STOPPED, 1.0)

    assert handout.peers == ()
    assert table.announce(BLOB, agent(1), LEECHING, 1.0).peers == (agent(2001),)
    assert table.statistics().left == 1
    table.check_invariants()


def test_a_peer_that_was_never_here_may_stop():
    table = make_table()
    table.announce(BLOB, agent(1), STOPPED, 0.0)

    assert table.statistics().torrents == 0
    assert table.statistics().left == 0


def test_a_restarted_process_replaces_the_one_that_listened_there_before():
    table = make_table()
    table.announce(BLOB, agent(1), LEECHING, 0.0)

    handout = table.announce(BLOB, agent(1, life=1), LEECHING, 1.0)

    assert handout.peers == (), "its former self is not a peer"
    assert table.announce(BLOB, agent(2), LEECHING, 1.0).peers == (agent(1, life=1),)
    assert table.statistics().replaced == 1
    table.check_invariants()


def test_a_peer_that_moves_to_another_address_is_handed_out_there_only():
    table = make_table()
    table.announce(BLOB, agent(1), LEECHING, 0.0)
    moved = attrs.evolve(agent(1), host="elsewhere")
    table.announce(BLOB, moved, LEECHING, 1.0)

    assert table.announce(BLOB, agent(2), LEECHING, 1.0).peers == (moved,)
    table.check_invariants()


def test_a_torrent_at_its_limit_drops_the_peer_that_announced_least_recently():
    table = make_table(peers_per_torrent=3)
    for number in (1, 2, 3):
        table.announce(BLOB, agent(number), LEECHING, float(number))
    table.announce(BLOB, agent(1), LEECHING, 4.0)
    table.announce(BLOB, agent(4), LEECHING, 5.0)

    peers = table.announce(BLOB, agent(1), LEECHING, 5.0).peers
    assert set(peers) == {agent(3), agent(4)}
    assert table.statistics().dropped == 1
    table.check_invariants()


def test_a_table_at_its_limit_drops_the_torrent_that_was_announced_least_recently():
    table = make_table(torrents=2)
    blobs = [Digest.of(bytes([n])) for n in range(3)]
    for blob in blobs:
        table.announce(blob, agent(1), LEECHING, 0.0)
        table.announce(blob, agent(2), LEECHING, 0.0)

    assert table.statistics().torrents == 2
    assert table.statistics().dropped == 2
    assert table.announce(blobs[1], agent(3), LEECHING, 0.0).peers != ()
    assert table.seeders(blobs[0]) == 0
    table.check_invariants()


def test_the_peers_of_all_torrents_together_are_limited():
    table = make_table(peers=4)
    for number in range(10):
        table.announce(Digest.of(bytes([number % 3])), agent(number), LEECHING, 0.0)
        table.check_invariants()

    assert table.statistics().peers == 4
    assert table.statistics().dropped == 6


def test_a_seeder_that_did_not_announce_itself_stays_for_its_lifetime():
    table = make_table()
    assert not table.has_origin(BLOB)
    table.add_seeder(BLOB, origin(1), 0.0, lifetime=15.0)

    assert table.has_origin(BLOB)
    assert table.announce(BLOB, agent(1), LEECHING, 14.0).peers == (origin(1),)
    table.expire(15.0)
    assert not table.has_origin(BLOB)


def test_a_seeder_that_announces_as_well_is_not_forgotten_earlier_for_that():
    table = make_table()
    table.announce(BLOB, origin(1), COMPLETE, 0.0)
    table.add_seeder(BLOB, origin(1), 1.0, lifetime=15.0)

    table.expire(179.0)
    assert table.has_origin(BLOB)


def test_void_items_of_the_expiry_queue_do_not_pile_up():
    table = make_table()
    for number in range(5000):
        table.announce(BLOB, agent(1, life=number), COMPLETE, 0.0)
    table.check_invariants()

    assert len(table._queue) < 100


def test_the_same_seed_gives_the_same_handouts():
    def run() -> list[tuple[PeerContact, ...]]:
        table = make_table(seed=11)
        fill(table, seeders=20, leechers=80)
        return [table.announce(BLOB, agent(n), LEECHING, 1.0).peers for n in range(20)]

    assert run() == run()


def test_an_announce_costs_the_same_in_a_large_swarm(monkeypatch: pytest.MonkeyPatch):
    """Counted, not timed: a sample must not walk over the whole swarm."""
    table = make_table(peers_per_torrent=50_000)
    for number in range(20_000):
        table.announce(BLOB, agent(number), COMPLETE, 0.0)
    drawn: list[int] = []
    sample = table._rng.sample
    monkeypatch.setattr(
        table._rng, "sample", lambda group, count: drawn.append(count) or sample(group, count)
    )

    table.announce(BLOB, agent(30_000), LEECHING, 0.0)

    assert sum(drawn) <= 60


@pytest.mark.parametrize(
    "limits", [{"peers_per_handout": 0}, {"short_interval": 0.0}, {"torrents": -1}]
)
def test_limits_that_make_no_sense_are_refused(limits: dict[str, float]):
    with pytest.raises(ValueError, match=next(iter(limits))):
        HandoutLimits(**limits)  # type: ignore[arg-type]
