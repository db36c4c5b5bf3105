"""Whom a host is connected to: dials, admissions, duplicates, evictions, useless connections."""

from __future__ import annotations

import math

import attrs
import pytest

from swarmpull.swarm import actions as act
from swarmpull.swarm import events as ev
from swarmpull.swarm.connections import DIAL_TIMEOUT, ConnectionLimits
from swarmpull.swarm.messages import Bye, ByeReason, Cancel, Claim, Have, Pass
from swarmpull.swarm.peers import PeerKind
from swarmpull.swarm.pipeline import PipelineLimits
from swarmpull.swarm.scheduler import (
    EVICTABLE_AFTER,
    EVICTION_SPACING,
    LEECHING_TICK,
    NEIGHBOURS_TOLD,
    SEEDING_TICK,
    SwarmLimits,
)
from swarmpull.swarm.torrent import STARVED_AFTER
from swarmpull.swarm.uploads import UploadLimits

from .playbook import Play, cancel, claim, claims, close, contact, have, is_due, metainfo_of


def leecher(have: str = "....", **limits: float) -> Play:
    connections = ConnectionLimits(**limits)
    play = Play(have, limits=SwarmLimits(connections=connections, exchange=PipelineLimits()))
    play >> play.added()
    return play


def seeder(have: str = "####", **limits: float) -> Play:
    return leecher(have, **limits)


def greeting(play: Play, connection: int) -> act.Send:
    return act.Send(connection, play.scheduler.hello(play.digest))


# --- dials ------------------------------------------------------------------------------------


def test_peers_of_a_handout_are_dialled():
    play = leecher()
    assert play >> play.replied("ab1") == [play.dial("a"), play.dial("b"), play.dial("1")]
    assert play >> play.replied("ab1") == [], "they are pending"


def test_a_blob_of_one_piece_takes_two_connections():
    play = leecher(".")
    assert play >> play.found("abcd") == [play.dial("a"), play.dial("b")]


def test_a_dial_that_failed_makes_room_for_the_next():
    play = leecher(".", per_torrent=1)
    assert play >> play.found("ab") == [play.dial("a")]
    assert play >> ev.DialFailed(play.digest, "a" * 32) == [play.dial("b")]


def test_a_peer_that_failed_is_dialled_again_when_its_back_off_is_over():
    play = leecher(backoff_initial=1.0)
    play >> play.found("a")
    play >> ev.DialFailed(play.digest, "a" * 32)
    assert play.wait() == [play.dial("a")]
    assert is_due(play.now, 100.0 + 1.0)


def test_a_dial_that_is_never_reported_on_is_given_up():
    play = leecher()
    play >> play.found("a")
    play.wait_until(100.0 + DIAL_TIMEOUT)
    assert play.scheduler.torrent(play.digest).connections.pending_count == 0


def test_a_dial_that_comes_up_after_it_was_given_up_takes_a_place_only_if_there_is_one():
    play = leecher(per_torrent=1)
    play >> play.found("a")
    play.wait_until(100.0 + DIAL_TIMEOUT)
    play >> play.connected(1, "b", "....")
    [refusal] = play >> play.connected(2, "a", "####", announced="....")
    assert refusal == close(2, ByeReason.BUSY, "no room")


def test_a_seeder_dials_nobody():
    play = seeder()
    assert play >> play.found("abc") == []


def test_peers_are_dialled_for_a_torrent_and_not_for_one_that_is_gone():
    play = leecher()
    play >> play.found("a")
    assert play >> ev.TorrentRemoved(play.digest) == []
    assert play.scheduler.hello(play.digest) is None
    [refusal] = play >> play.connected(1, "a", "####", announced="....")
    assert refusal == close(1, ByeReason.UNKNOWN_TORRENT)


# --- hellos -----------------------------------------------------------------------------------


def test_a_peer_that_dials_us_gets_our_hello_first():
    play = leecher("#...")
    actions = play >> play.connected(1, "a", "##..")
    assert actions == [greeting(play, 1), claim(1, 1)]
    assert play.scheduler.hello(play.digest).have == b"\x01"


def test_a_peer_that_we_dialled_hears_what_came_in_since_our_hello():
    play = leecher("....")
    play >> play.connected(1, "b", "#.#.")
    play >> play.found("a")
    play.piece(1, 0)
    play.piece(1, 2)
    actions = play >> play.connected(2, "a", "....", announced="....")
    assert actions == [have(2, 0), have(2, 2)]


def test_a_peer_of_an_unknown_torrent_is_sent_away():
    play = leecher()
    event = play.connected(1, "a", "####")
    stranger = attrs.evolve(event.hello, digest=metainfo_of(4, "another").digest)
    assert play >> attrs.evolve(event, hello=stranger) == [close(1, ByeReason.UNKNOWN_TORRENT)]


# --- duplicates -------------------------------------------------------------------------------


def test_a_second_connection_of_a_peer_is_refused_and_the_first_stands():
    play = leecher()
    play >> play.connected(1, "a", "....")
    assert play >> play.connected(2, "a", "....") == [close(2, ByeReason.DUPLICATE)]
    assert play >> ev.PeerDisconnected(2) == []
    assert claims(play >> play.says(1, Have(0))) == {1: [0]}


def test_of_two_dials_at_once_ours_stands_if_our_id_is_the_smaller():
    play = leecher()
    play >> play.found("a")
    assert play >> play.connected(1, "a", "....") == [close(1, ByeReason.DUPLICATE)]
    assert play >> play.connected(2, "a", "....", announced="....") == []
    assert list(play.scheduler.torrent(play.digest).peers) == [2]


def test_of_two_dials_at_once_theirs_stands_if_their_id_is_the_smaller():
    play = leecher()
    play >> play.found("1")
    assert play >> play.connected(1, "1", "....") == [greeting(play, 1)]
    assert play >> ev.DialFailed(play.digest, "1" * 32) == []
    assert list(play.scheduler.torrent(play.digest).peers) == [1]


def test_of_two_dials_at_once_theirs_stands_even_if_ours_was_refused_before_theirs_arrived():
    play = leecher()
    play >> play.found("1")
    play >> ev.DialFailed(play.digest, "1" * 32)
    assert play >> play.connected(1, "1", "....") == [greeting(play, 1)]


def test_a_dial_that_succeeded_beside_a_standing_connection_is_closed():
    play = leecher()
    play >> play.found("1")
    play >> play.connected(1, "1", "....")
    assert play >> play.connected(2, "1", "....", announced="....") == [
        close(2, ByeReason.DUPLICATE)
    ]


def test_a_peer_that_was_lost_must_wait_before_it_comes_back():
    play = leecher(backoff_initial=1.0)
    play >> play.connected(1, "a", "....")
    play >> ev.PeerDisconnected(1)
    assert play >> play.connected(2, "a", "....") == [close(2, ByeReason.BUSY, "backed off")]
    assert play.after(1.0) >> play.connected(3, "a", "....") == [greeting(play, 3)]


# --- a full house -----------------------------------------------------------------------------


def test_a_full_house_refuses():
    play = leecher(per_torrent=2)
    play >> play.connected(1, "a", "....")
    play >> play.connected(2, "b", "....")
    assert play >> play.connected(3, "c", "####") == [close(3, ByeReason.BUSY, "no room")]


def test_a_full_house_lets_go_of_the_peer_that_was_of_no_use_for_longest():
    play = leecher(per_torrent=2)
    play >> play.connected(1, "a", "....")
    play.after(1.0) >> play.connected(2, "b", "....")
    play.after(EVICTABLE_AFTER - 0.5)
    assert play >> play.connected(3, "c", "....") == [
        close(1, ByeReason.USELESS),
        greeting(play, 3),
    ]
    assert play >> play.connected(4, "d", "....") == [close(4, ByeReason.BUSY, "no room")]


def test_a_late_joiner_takes_the_place_of_the_peer_that_has_most():
    play = leecher("####", per_torrent=3)
    play >> play.connected(1, "a", "#...")
    play >> play.connected(2, "b", "##..")
    play >> play.connected(3, "c", "....")
    assert play >> play.connected(4, "d", "....") == [
        close(2, ByeReason.USELESS),
        greeting(play, 4),
    ]
    assert play >> play.connected(5, "e", "....") == [close(5, ByeReason.BUSY, "no room")]
    play.after(2 * EVICTION_SPACING)
    assert play >> play.connected(6, "e", "....") == [close(6, ByeReason.BUSY, "no room")], (
        "one piece of four is no lead"
    )


def test_a_burst_of_late_joiners_is_let_in_slowly():
    play = leecher("####", per_torrent=2)
    play >> play.connected(1, "a", "###.")
    play >> play.connected(2, "b", "###.")
    assert close(1, ByeReason.USELESS) in (play >> play.connected(3, "c", "...."))
    assert play >> play.connected(4, "d", "....") == [close(4, ByeReason.BUSY, "no room")]
    play.after(2 * EVICTION_SPACING)
    assert close(2, ByeReason.USELESS) in (play >> play.connected(5, "e", "...."))


def test_a_peer_that_owes_us_a_piece_does_not_go_for_a_late_joiner():
    play = leecher("#...", per_torrent=1)
    assert claims(play >> play.connected(1, "a", "####"))
    play.after(1.0)
    assert play >> play.connected(2, "b", "....") == [close(2, ByeReason.BUSY, "no room")]


def test_a_peer_that_is_being_sent_a_piece_is_not_let_go():
    play = leecher("#...", per_torrent=1)
    play >> play.connected(1, "a", "....")
    play >> play.says(1, Claim(0))
    play.after(10.0)
    assert play >> play.connected(2, "b", "....") == [close(2, ByeReason.BUSY, "no room")]


def test_what_a_peer_owed_that_was_let_go_is_claimed_at_those_who_stay():
    exchange = PipelineLimits(per_peer=2, endgame_claimants=1)
    limits = SwarmLimits(connections=ConnectionLimits(per_torrent=2), exchange=exchange)
    play = Play("..", limits=limits)
    play >> play.added()
    play >> play.connected(1, "a", "##")
    assert claims(play.after(1.0) >> play.connected(2, "b", "##")) == {}
    actions = play.after(5.0) >> play.connected(3, "c", "..")
    assert actions[0] == close(1, ByeReason.USELESS)
    assert claims(actions) == {2: [0, 1]}


# --- useless connections ----------------------------------------------------------------------


def test_two_complete_peers_do_not_connect():
    play = seeder()
    assert play >> play.connected(1, "a", "####") == [close(1, ByeReason.USELESS, "both complete")]


def test_a_peer_that_becomes_complete_is_let_go_by_a_seeder():
    play = seeder("##")
    play >> play.connected(1, "a", "#.")
    assert play >> play.says(1, Have(1)) == [close(1, ByeReason.USELESS)]


def test_a_peer_that_claims_to_be_complete_while_it_is_served_is_let_go_when_that_is_over():
    play = seeder("##")
    play >> play.connected(1, "a", ".#")
    play >> play.says(1, Claim(0))
    play >> play.says(1, Claim(1))
    assert play >> play.says(1, Have(0)) == []
    assert play >> play.says(1, Cancel(1)) == []
    assert play >> ev.PieceSent(1, 0) == [close(1, ByeReason.USELESS)]


def test_a_peer_that_is_complete_and_took_its_last_waiting_claim_back_is_let_go():
    exchange = PipelineLimits(uploads=UploadLimits(slots=1))
    play = Play("##", limits=SwarmLimits(exchange=exchange))
    play >> play.added()
    play >> play.connected(1, "a", "..")
    play >> play.connected(2, "b", ".#")
    play >> play.says(1, Claim(0))
    assert play >> play.says(2, Claim(0)) == []
    play >> play.says(2, Have(0))
    assert play >> play.says(2, Cancel(0)) == [close(2, ByeReason.USELESS)]


def test_a_leecher_keeps_a_complete_peer():
    play = leecher("#.")
    play >> play.connected(1, "a", "#.")
    assert claims(play >> play.says(1, Have(1))) == {1: [1]}


@pytest.mark.parametrize("make", [leecher, seeder])
def test_a_connection_on_which_nothing_moves_is_closed_in_the_end(make):
    play = make(idle_timeout=30.0)
    play >> play.connected(1, "a", "....")
    assert close(1, ByeReason.USELESS) in play.wait()
    assert is_due(play.now, 100.0 + 30.0, LEECHING_TICK if make is leecher else SEEDING_TICK)


@pytest.mark.parametrize("begin", [0.1, 1 / 3, 1e6 + 0.7, 123456.789])
def test_the_idle_deadline_does_not_come_for_ever_whatever_the_clock_shows(begin):
    # (useful_at + timeout) - timeout may be less than useful_at.
    play = seeder(idle_timeout=30.1)
    for step in range(50):
        play.now = begin + 200 * step + step / 7
        play >> play.connected(step, f"{step % 5 + 10:x}", "....")
        assert close(step, ByeReason.USELESS) in play.wait()


def test_a_piece_in_either_direction_keeps_a_connection():
    play = leecher("#...", idle_timeout=30.0)
    play >> play.connected(1, "a", ".#..")
    play.after(20.0).piece(1, 1)
    play >> play.says(1, Claim(0))
    play.after(20.0) >> ev.PieceSent(1, 0)
    actions = play.wait()
    assert actions[0] == close(1, ByeReason.USELESS)
    assert is_due(play.now, 140.0 + 30.0)


def test_a_goodbye_alone_changes_nothing_until_the_connection_is_down():
    play = leecher(".")
    play >> play.connected(1, "a", "#")
    assert play >> play.says(1, Bye(ByeReason.DRAINING)) == []
    assert play.scheduler.connection_count == 1
    assert play >> ev.PeerDisconnected(1) == []
    assert play.scheduler.connection_count == 0


# --- what comes too late ----------------------------------------------------------------------


def test_events_about_connections_and_torrents_that_are_gone_are_ignored():
    play = leecher("..")
    play >> play.connected(1, "a", "##")
    play >> ev.TorrentRemoved(play.digest)
    events = [
        ev.TorrentRemoved(play.digest),
        ev.BlobVerified(play.digest),
        play.found("a"),
        play.replied("a"),
        ev.AnnounceFailed(play.digest),
        ev.DialFailed(play.digest, "a" * 32),
        ev.PeerDisconnected(1),
        *(play.says(1, message) for message in (Have(0), Claim(0), Pass(0), Cancel(0))),
        play.says(1, Bye(ByeReason.BUSY)),
        play.says(1, greeting(leecher(), 1).message),
        ev.PieceReceived(1, 0),
        play.stored(1, 0),
        play.rejected(1, 0),
        ev.PieceLost(play.digest, 0),
        ev.PieceSent(1, 0),
        ev.ReaderMoved(play.digest, 1, 0),
        ev.ReaderClosed(play.digest, 1),
        ev.DeadlinePassed(),
    ]
    for event in events:
        assert play >> event == [], event
    assert not play.scheduler.expects(1, 0)
    assert not play.scheduler.was_asked(1, 0)
    assert play.scheduler.next_deadline() == math.inf


def test_a_torrent_that_is_removed_lets_its_peers_go():
    play = leecher()
    play >> play.found("b")
    play >> play.connected(1, "a", "####")
    assert play >> ev.TorrentRemoved(play.digest) == [close(1, ByeReason.UNKNOWN_TORRENT)]
    assert play.scheduler.connection_count == 0
    assert play.scheduler.statistics() == []


def test_what_was_stored_for_an_earlier_life_of_a_torrent_is_not_taken_over():
    play = leecher("..")
    play >> play.connected(1, "a", "#.")
    play >> ev.PieceReceived(1, 0)
    play >> ev.TorrentRemoved(play.digest)
    play >> play.added()
    play >> play.connected(2, "b", "#.")
    assert play >> play.stored(1, 0) == []
    assert play.progress == ".."
    play.piece(2, 0)
    assert play.progress == "#."


def test_a_late_piece_report_blames_nobody_in_the_next_life_of_a_torrent():
    play = leecher("..")
    play >> play.connected(1, "a", "#.")
    play >> ev.PieceReceived(1, 0)
    play >> ev.TorrentRemoved(play.digest)
    play >> play.added()
    play >> play.connected(2, "a", "#.")
    assert play >> play.rejected(1, 0) == []
    assert cancel(2, 0) not in play >> ev.PieceLost(play.digest, 0)


def test_a_peer_that_is_no_more_is_not_dialled_again():
    """Its process was restarted: another peer answers there."""
    play = Play("....")
    play >> play.added()
    assert play >> play.found("a") == [play.dial("a")]
    assert play >> ev.DialFailed(play.digest, "a" * 32, is_gone=True) == []
    assert not any(isinstance(a, act.Dial) for a in play.wait_until(play.now + 100))
    assert play >> play.found("b") == [play.dial("b")]


# --- hosts that know only each other --------------------------------------------------------------


def full_of_leechers(have: str = "....") -> Play:
    """A host that dials two, has two that dialled it, with pieces ``have``, and knows a busy origin."""
    limits = SwarmLimits(connections=ConnectionLimits(dialled=2, per_torrent=3), stall_timeout=1e6)
    play = Play("....", limits=limits)
    play >> play.added()
    origin = contact("0", PeerKind.ORIGIN)
    assert play >> ev.PeersFound(play.digest, (origin,)) == [act.Dial(play.digest, origin)]
    play >> ev.DialFailed(play.digest, origin.peer_id)
    play >> play.connected(1, "a", have)
    play >> play.connected(2, "b", have)
    return play


def dialled(actions: list[act.Action]) -> list[str]:
    return [action.contact.peer_id[0] for action in actions if isinstance(action, act.Dial)]


def test_a_host_full_of_peers_that_have_nothing_asks_the_origins_again():
    play = full_of_leechers()
    assert dialled(play.wait_until(100.0 + STARVED_AFTER - 0.01)) == []

    assert dialled(play.wait_until(100.0 + STARVED_AFTER + LEECHING_TICK)) == ["0"]
    play >> ev.DialFailed(play.digest, "0" * 32)
    assert dialled(play.wait_until(play.now + 1.9)) == [], "it is backed off, for longer each time"
    assert dialled(play.wait_until(play.now + 0.5)) == ["0"]


def test_origins_are_not_asked_again_while_a_peer_has_something_or_there_is_no_place():
    assert dialled(full_of_leechers("#...").wait_until(110.0)) == []

    play = full_of_leechers()
    play >> play.connected(3, "c", "....")
    assert dialled(play.wait_until(110.0)) == []


def test_a_host_that_drains_asks_no_origin():
    play = full_of_leechers()
    play >> ev.DrainStarted()
    assert dialled(play.wait_until(110.0)) == []


# --- told to others ---------------------------------------------------------------------------


def test_the_agents_that_are_connected_are_named_and_nobody_else():
    play = seeder()
    play >> play.connected(1, "a", "....")
    play >> play.connected(2, "b", "....")
    origin = contact("1", PeerKind.ORIGIN)
    play >> attrs.evolve(play.connected(3, "1", "...."), contact=origin)
    play >> play.found("c")
    assert {c.peer_id[0] for c in play.scheduler.neighbours(play.digest)} == {"a", "b"}
    play >> ev.PeerDisconnected(1)
    assert play.scheduler.neighbours(play.digest) == (contact("b"),)
    assert play.scheduler.neighbours(metainfo_of(4, "another").digest) == ()


def test_no_more_are_named_than_a_tracker_would():
    names = [f"{n:02x}" for n in range(NEIGHBOURS_TOLD + 20)]
    play = seeder(per_torrent=100)
    for number, name in enumerate(names):
        play >> play.connected(number, name, "....")
    named = play.scheduler.neighbours(play.digest)
    assert len({c.peer_id for c in named}) == len(named) == NEIGHBOURS_TOLD
