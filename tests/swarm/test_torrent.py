from __future__ import annotations

import random

import pytest

from swarmpull.swarm.connections import ConnectionLimits, HostPlaces
from swarmpull.swarm.exchange import Outbox
from swarmpull.swarm.peers import PeerKind
from swarmpull.swarm.picker import PickerLimits
from swarmpull.swarm.pipeline import PipelineExchange, PipelineLimits
from swarmpull.swarm.timing import PieceTiming
from swarmpull.swarm.torrent import Inbound, Peer, Torrent

from .playbook import OWN, bits, contact, metainfo_of, table


def make_torrent(have: str, peers: dict[str, str]) -> Torrent:
    """A torrent with these pieces and peers; connections are numbered from 1 in the order given."""
    torrent = Torrent(
        metainfo_of(len(have)),
        "",
        bits(have),
        verified=False,
        own_peer_id=OWN * 32,
        host_places=HostPlaces(100),
        connection_limits=ConnectionLimits(),
        picker_limits=PickerLimits(),
        inbound=Inbound(),
        rng=random.Random(0),
    )
    for number, (name, has) in enumerate(peers.items(), start=1):
        torrent.connections.connected(name * 32, number)
        torrent.add_peer(Peer(number, contact(name), bits(has), 0.0))
    torrent.check_invariants()
    return torrent


def free(torrent: Torrent, connection: int) -> str:
    return table(torrent.free_pieces(torrent.peers[connection]), torrent.piece_count)


def test_a_piece_is_free_when_the_peer_has_it_and_we_neither_have_nor_expect_it():
    torrent = make_torrent("#.....", {"a": "###.##", "b": "......"})
    a = torrent.peers[1]
    torrent.claim(a, 1, 0.0)
    torrent.claim(a, 4, 0.0)
    assert torrent.received(a, 4, 1.0)
    assert free(torrent, 1) == "..#..#"
    torrent.passed(a, 2)
    assert free(torrent, 1) == ".....#"
    assert free(torrent, 2) == "......"
    torrent.check_invariants()


def test_what_a_lost_peer_owed_is_free_for_others():
    torrent = make_torrent("..", {"a": "##", "b": "##"})
    torrent.claim(torrent.peers[1], 0, 0.0)
    torrent.claim(torrent.peers[1], 1, 0.0)
    assert free(torrent, 2) == ".."
    torrent.remove_peer(1)
    assert free(torrent, 2) == "##"
    assert torrent.availability[0] == 1


def test_a_piece_that_two_owe_is_free_when_both_are_gone():
    torrent = make_torrent(".", {"a": "#", "b": "#", "c": "#"})
    torrent.claim(torrent.peers[1], 0, 0.0)
    torrent.claim(torrent.peers[2], 0, 0.0)
    torrent.remove_peer(1)
    assert free(torrent, 3) == "."
    torrent.withdraw(torrent.peers[2], 0)
    assert free(torrent, 3) == "#"


def test_pieces_are_owed_twice_only_when_nothing_is_unclaimed():
    torrent = make_torrent("#..", {"a": "###", "b": "###", "c": "###"})
    a, b, c = torrent.peers.values()
    torrent.claim(a, 1, 0.0)
    assert torrent.owed_pieces(b, 2) == 0, "piece 2 is unclaimed yet"
    torrent.claim(a, 2, 0.0)
    assert table(torrent.owed_pieces(b, 2), 3) == ".##"
    assert torrent.owed_pieces(a, 2) == 0, "it owes them already"
    torrent.claim(b, 1, 0.0)
    assert table(torrent.owed_pieces(c, 2), 3) == "..#"
    torrent.passed(c, 2)
    assert torrent.owed_pieces(c, 2) == 0


def test_a_piece_counts_once_however_often_it_comes():
    torrent = make_torrent(".", {"a": "#", "b": "#"})
    a, b = torrent.peers.values()
    torrent.claim(a, 0, 0.0)
    torrent.claim(b, 0, 0.0)
    assert torrent.expects(1, 0)
    assert torrent.received(a, 0, 1.0)
    torrent.withdraw(b, 0)
    assert torrent.was_asked(2, 0)
    assert not torrent.expects(2, 0)
    assert not torrent.received(b, 0, 1.1)
    assert not torrent.was_asked(2, 0), "it has come; a second time would be an offence"


def test_a_piece_that_was_never_asked_for_changes_nothing():
    torrent = make_torrent("..", {"a": "##"})
    torrent.claim(torrent.peers[1], 0, 0.0)
    torrent.peers[1].late_in_a_row = 1
    for index in (1, 2, -1):
        assert not torrent.received(torrent.peers[1], index, 1.0)
    assert torrent.verifying == 0
    assert torrent.peers[1].late_in_a_row == 1
    torrent.check_invariants()


def test_a_piece_that_was_claimed_taken_back_and_claimed_again_may_come_twice():
    # The first copy may have left before the peer heard of the cancel.
    torrent = make_torrent(".", {"a": "#"})
    a = torrent.peers[1]
    torrent.claim(a, 0, 0.0)
    torrent.withdraw(a, 0)
    torrent.claim(a, 0, 8.0)
    assert torrent.received(a, 0, 8.1)
    assert torrent.was_asked(1, 0)
    assert not torrent.expects(1, 0)
    assert not torrent.received(a, 0, 8.2)
    assert not torrent.was_asked(1, 0)


def test_the_report_on_a_piece_of_an_earlier_life_is_not_believed():
    torrent = make_torrent("..", {"a": "##"})
    torrent.claim(torrent.peers[1], 0, 0.0)
    assert not torrent.stored(0, 1.0)
    assert torrent.rejected(0) is None
    torrent.check_invariants()
    assert torrent.have == 0


def test_a_rejected_piece_is_missing_again_and_its_sender_known():
    torrent = make_torrent(".", {"a": "#"})
    torrent.claim(torrent.peers[1], 0, 0.0)
    torrent.received(torrent.peers[1], 0, 1.0)
    torrent.remove_peer(1)
    torrent.connections.lost("a" * 32, 1.0)
    assert torrent.rejected(0) == "a" * 32
    assert torrent.verifying == 0
    torrent.check_invariants()


def test_claims_are_late_after_the_time_that_this_peer_usually_takes():
    torrent = make_torrent("...", {"a": "###", "b": "###"})
    a, b = torrent.peers.values()
    for _ in range(50):
        a.timing.add(2.0)
    torrent.claim(a, 0, 10.0)
    torrent.claim(b, 1, 10.0)
    assert torrent.late_claims(11.9) == []
    assert torrent.late_claims(12.1) == [(a, 0)]
    assert torrent.late_claims(18.0) == [(a, 0), (b, 1)]


def test_a_claim_of_the_first_moment_is_judged_by_what_was_learnt_since():
    torrent = make_torrent("...", {"a": "###", "b": "###"})
    a, b = torrent.peers.values()
    common = a.timing._common = b.timing._common = PieceTiming()
    torrent.claim(a, 0, 0.0)
    torrent.claim(b, 1, 0.0)
    torrent.received(b, 1, 0.5)
    for _ in range(50):
        common.add(0.5)
    assert torrent.late_claims(0.9) == []
    assert torrent.late_claims(1.1) == [(a, 0)], "and not after the eight seconds of a stranger"


def test_statistics_add_up():
    torrent = make_torrent("#....", {"a": "#####", "b": "#####"})
    a = torrent.peers[1]
    torrent.peers[2].contact = contact("b", PeerKind.ORIGIN)
    torrent.claim(a, 1, 0.0)
    torrent.claim(a, 2, 0.0)
    torrent.received(a, 2, 1.0)
    statistics = torrent.statistics()
    assert (statistics.pieces, statistics.have) == (5, 1)
    assert (statistics.claimed, statistics.verifying) == (1, 1)
    assert (statistics.agents, statistics.origins, statistics.pending) == (1, 1, 0)


# --- the classic exchange -------------------------------------------------------------------------------


def claim_all(torrent: Torrent, connection: int, limits: PipelineLimits) -> list[int]:
    peer, outbox = torrent.peers[connection], Outbox()
    PipelineExchange(limits, outbox).joined(torrent, peer, 0.0)
    torrent.check_invariants()
    claimed = sorted(action.message.index for action in outbox.actions)
    assert claimed == sorted(peer.claims)
    return claimed


@pytest.mark.parametrize("per_peer", [1, 3, 10])
def test_a_peer_has_no_more_claims_outstanding_than_its_pipeline_takes(per_peer):
    torrent = make_torrent("......", {"a": "######"})
    assert len(claim_all(torrent, 1, PipelineLimits(per_peer=per_peer))) == min(per_peer, 6)


def test_different_pieces_are_claimed_at_different_peers():
    torrent = make_torrent("......", {"a": "######", "b": "######"})
    first, second = (claim_all(torrent, number, PipelineLimits()) for number in (1, 2))
    assert sorted(first + second) == [0, 1, 2, 3, 4, 5]


def test_in_the_endgame_an_idle_peer_is_asked_for_one_piece_that_another_owes():
    limits = PipelineLimits(per_peer=3, endgame_claimants=2)
    torrent = make_torrent("#..", {"a": "###", "b": "###", "c": "###", "d": "###"})
    assert claim_all(torrent, 1, limits) == [1, 2]
    owed = claim_all(torrent, 2, limits) + claim_all(torrent, 3, limits)
    assert sorted(owed) == [1, 2], "one each, and not the same"
    assert claim_all(torrent, 4, limits) == [], "two claimants each are enough"


def test_without_endgame_no_piece_is_claimed_twice():
    torrent = make_torrent("..", {"a": "##", "b": "##"})
    limits = PipelineLimits(endgame_claimants=1)
    assert claim_all(torrent, 1, limits) == [0, 1]
    assert claim_all(torrent, 2, limits) == []
