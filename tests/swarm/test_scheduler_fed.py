"""A torrent whose pieces come from outside of the swarm, and pieces that nobody has yet."""

from __future__ import annotations

import attrs

from swarmpull.swarm import actions as act
from swarmpull.swarm import events as ev
from swarmpull.swarm.messages import Want
from swarmpull.swarm.scheduler import SwarmLimits
from swarmpull.swarm.torrent import URGE_AGAIN_AFTER, URGE_SPACING, URGES_MAX

from .playbook import Play, have, offers, tells, tells_all, wants


def fed(pieces: str = "....") -> Play:
    play = Play(pieces)
    play >> attrs.evolve(play.added(), fed=True)
    return play


def urges(actions: list[act.Action]) -> list[tuple[int, ...]]:
    return [action.indices for action in actions if isinstance(action, act.Urge)]


def test_peers_are_told_of_every_piece_that_was_fetched_and_are_offered_it():
    play = fed()
    play >> play.connected(1, "a", "....")
    assert play >> ev.PieceFetched(play.digest, 2) == [tells([1], 2)]
    assert list(offers(play >> play.says(1, Want()))) == [1]
    assert play.progress == "..#."


def test_nothing_is_claimed_from_peers():
    play = fed()
    actions = play >> play.connected(1, "a", "####")
    assert wants(actions) == []
    assert wants(play.wait_until(play.now + 5)) == []
    assert play >> play.found("bc") == [], "nor is anybody dialled"


def test_the_last_piece_makes_the_blob_be_checked():
    play = fed("###.")
    play >> play.connected(1, "a", "....")
    assert play >> ev.PieceFetched(play.digest, 3) == [tells_all([1]), act.Finish(play.digest)]


def test_a_piece_that_was_fetched_twice_is_told_once():
    play = fed()
    play >> play.connected(1, "a", "....")
    play >> ev.PieceFetched(play.digest, 0)
    assert play >> ev.PieceFetched(play.digest, 0) == []


def test_a_torrent_that_is_not_fed_takes_no_piece_from_outside():
    play = Play("....")
    play >> play.added()
    assert play >> ev.PieceFetched(play.digest, 0) == []
    assert play.progress == "...."


def test_a_fed_torrent_does_not_stall():
    play = fed()
    play.scheduler._limits = attrs.evolve(SwarmLimits(), stall_timeout=1.0)
    assert not any(isinstance(a, act.Fail) for a in play.wait_until(play.now + 10))


def test_what_readers_wait_for_is_urged_at_once_where_it_is_fetched():
    play = fed()
    assert urges(play >> ev.ReaderMoved(play.digest, 1, 3)) == [(3,)]


def test_a_leecher_urges_what_none_of_its_peers_has():
    play = Play("....")
    play >> play.added()
    assert urges(play >> ev.ReaderMoved(play.digest, 1, 2)) == [], "it has no peer at all"
    assert urges(play >> play.connected(1, "a", "##..")) == [(2,)]


def test_a_leecher_does_not_urge_what_a_peer_has():
    play = Play("....")
    play >> play.added()
    play >> play.connected(1, "a", "..#.")
    assert urges(play >> ev.ReaderMoved(play.digest, 1, 2)) == []


def test_the_same_piece_is_urged_again_after_a_while_only():
    play = fed()
    play >> ev.ReaderMoved(play.digest, 1, 3)
    assert urges(play.wait_until(play.now + URGE_AGAIN_AFTER - 0.1)) == []
    assert urges(play.wait_until(play.now + 0.5)) == [(3,)]


def test_many_readers_are_urged_for_in_few_actions():
    play = Play("." * 40)
    play >> attrs.evolve(play.added(), fed=True)
    first = play >> ev.ReaderMoved(play.digest, 0, 0)
    for reader in range(1, 40):
        assert urges(play >> ev.ReaderMoved(play.digest, reader, reader)) == []
    play.after(URGE_SPACING)
    second = play.wait_until(play.now + 0.3)

    assert urges(first) == [(0,)]
    assert urges(second) == [tuple(range(1, 1 + URGES_MAX))]


def test_a_reader_that_left_urges_nothing():
    play = fed()
    play >> ev.ReaderMoved(play.digest, 1, 3)
    play >> ev.ReaderClosed(play.digest, 1)
    assert urges(play.wait_until(play.now + 10)) == []


def test_a_peer_that_connects_is_brought_up_to_date():
    play = fed("#.#.")
    greeting = play >> play.connected(1, "a", "....", announced="#...")
    assert have(1, 2) in greeting
