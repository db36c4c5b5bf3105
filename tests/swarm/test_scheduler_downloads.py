"""What a leecher does: claims, pieces, lateness, corruption, the end."""

from __future__ import annotations

import math

import attrs
import pytest

from swarmpull.swarm import actions as act
from swarmpull.swarm import events as ev
from swarmpull.swarm.connections import ConnectionLimits
from swarmpull.swarm.messages import ByeReason, Cancel, Claim, Have, Hello, Offer, Pass
from swarmpull.swarm.peers import AnnounceState
from swarmpull.swarm.pipeline import PipelineLimits
from swarmpull.swarm.scheduler import SwarmLimits
from swarmpull.swarm.timing import TIMEOUT_INITIAL

from .playbook import (
    Play,
    cancel,
    claim,
    claims,
    claims_in_order,
    close,
    hello,
    is_due,
    passes,
    tells,
    tells_all,
)

# Peers stay, however idle: these tests are about claims.
PATIENT = SwarmLimits(
    connections=ConnectionLimits(idle_timeout=1e6), exchange=PipelineLimits(per_peer=3)
)
# Of a peer that has given nothing yet, while nobody else has either.
FIRST_TIMEOUT = 2 * TIMEOUT_INITIAL


def leecher(have: str, *, limits: SwarmLimits = PATIENT, **pipeline: int) -> Play:
    play = Play(have, limits=attrs.evolve(limits, exchange=PipelineLimits(**pipeline)))
    play >> play.added()
    return play


def one_at_a_time(have: str, *, limits: SwarmLimits = PATIENT, **pipeline: int) -> Play:
    """A leecher that claims one piece of a peer at a time."""
    return leecher(have, limits=limits, per_peer=1, **pipeline)


def test_a_download_from_the_first_announce_to_the_last():
    play = Play("..", limits=PATIENT)
    assert play >> play.added(announce=True) == []
    assert play.wait() == [play.announce(AnnounceState.LEECHING)]
    assert play >> play.replied("a") == [play.dial("a")]
    actions = play >> play.connected(1, "a", "##", announced="..")
    assert claims(actions) == {1: [0, 1]}
    assert play >> ev.PieceReceived(1, 0) == []
    assert play >> play.stored(1, 0) == [], "who has it need not be told"
    assert play >> ev.PieceReceived(1, 1) == []
    assert play >> play.stored(1, 1) == [tells_all([1]), act.Finish(play.digest)]
    assert play >> ev.BlobVerified(play.digest) == [
        close(1, ByeReason.USELESS),
        play.announce(AnnounceState.COMPLETE),
    ]
    assert play >> play.replied(interval=60.0) == []
    assert play.scheduler.next_deadline() == play.now + 60.0


def test_a_blob_without_bytes_is_complete_at_once():
    play = Play("")
    assert play >> play.added(verified=False) == [act.Finish(play.digest)]
    assert play >> ev.BlobVerified(play.digest) == []


def test_a_download_that_has_every_piece_after_a_restart_asks_for_the_check():
    play = Play("##")
    assert play >> play.added(verified=False) == [act.Finish(play.digest)]


def test_adding_a_torrent_twice_changes_nothing():
    play = one_at_a_time("..")
    play >> play.connected(1, "a", "##")
    assert play >> play.added() == []
    assert play >> play.added(verified=True) == []


def test_only_what_is_missing_is_claimed():
    play = leecher("#.#.")
    assert claims(play >> play.connected(1, "a", "##..")) == {1: [1]}


def test_a_piece_that_a_peer_gains_is_claimed_there():
    play = leecher("..")
    play >> play.connected(1, "a", "..")
    assert play >> play.says(1, Have(1)) == [claim(1, 1)]
    assert play >> play.says(1, Have(1)) == [], "telling it again changes nothing"


def test_a_stored_piece_is_told_to_every_peer_that_lacks_it_and_only_then():
    play = one_at_a_time("..")
    play >> play.connected(1, "a", "#.")
    play >> play.connected(2, "b", "..")
    assert play >> ev.PieceReceived(1, 0) == []
    assert play >> play.stored(1, 0) == [tells([2], 0)]


def test_a_piece_that_came_from_one_peer_is_taken_back_at_the_other():
    play = one_at_a_time(".")
    play >> play.connected(1, "a", "#")
    assert play >> play.connected(2, "b", "#") == [
        act.Send(2, play.scheduler.hello(play.digest)),
        claim(2, 0),
    ]
    assert play >> ev.PieceReceived(2, 0) == [cancel(1, 0)]


def test_the_loser_of_an_endgame_may_deliver_without_harm():
    play = one_at_a_time(".")
    play >> play.connected(1, "a", "#")
    play >> play.connected(2, "b", "#")
    play >> ev.PieceReceived(2, 0)
    assert play.scheduler.was_asked(1, 0)
    assert not play.scheduler.expects(1, 0)
    assert play >> ev.PieceReceived(1, 0) == []
    assert play >> play.stored(2, 0) == [tells_all([1, 2]), act.Finish(play.digest)]


# --- passes -----------------------------------------------------------------------------------


def test_a_passed_piece_is_claimed_elsewhere():
    play = one_at_a_time(".")
    play >> play.connected(1, "a", "#")
    play >> play.connected(2, "b", ".")
    assert play >> play.says(1, Pass(0)) == []
    assert play >> play.says(2, Have(0)) == [claim(2, 0)]


def test_a_peer_that_passed_for_want_of_room_is_claimed_from_again_when_it_delivers():
    play = leecher("....", per_peer=3)
    first, second, third = claims(play >> play.connected(1, "a", "####"))[1]
    assert play >> play.says(1, Pass(third)) == [], "it would pass the next one too"
    play >> play.says(1, Pass(second))
    play.piece(1, first)
    play.wait_until(play.now + 1.0)
    outstanding = play.scheduler.torrent(play.digest).peers[1].claims
    assert {second, third} & outstanding.keys(), "a pass does not hold for ever"


def test_a_seeder_that_takes_few_claims_is_not_asked_for_everything_in_turn():
    play = leecher("." * 50, per_peer=3)
    asked = claims(play >> play.connected(1, "a", "#" * 50))[1]
    assert len(asked) == 3
    messages = sum(len(play >> play.says(1, Pass(index))) for index in asked[1:])
    assert messages == 0


def test_a_piece_that_comes_after_it_was_passed_is_taken():
    # A peer may pass a first claim, while the second for the same piece is on its way to it.
    play = one_at_a_time("..")
    [index] = claims(play >> play.connected(1, "a", "##"))[1]
    play >> play.says(1, Pass(index))
    assert play.scheduler.was_asked(1, index)
    assert play.scheduler.expects(1, index)
    play.piece(1, index)
    assert play.scheduler.torrent(play.digest).have == 1 << index


# --- what was not asked for -------------------------------------------------------------------


@pytest.mark.parametrize("index", [1, 99, -1])
def test_a_piece_that_was_not_asked_for_is_not_waited_for(index):
    # Nothing would ever tell what became of it.
    play = one_at_a_time("..")
    play >> play.connected(1, "a", "#.")
    assert not play.scheduler.was_asked(1, index)
    assert play >> ev.PieceReceived(1, index) == []
    assert play.scheduler.torrent(play.digest).verifying == 0
    assert play >> play.stored(1, index) == []
    assert play.progress == ".."


# --- lateness ---------------------------------------------------------------------------------


def test_a_late_claim_is_taken_back_and_the_piece_claimed_elsewhere():
    play = one_at_a_time(".", endgame_claimants=1)
    assert claims(play >> play.connected(1, "a", "#")) == {1: [0]}
    assert claims(play >> play.connected(2, "b", "#")) == {}
    assert play.wait() == [cancel(1, 0), claim(2, 0)]
    assert is_due(play.now, 100.0 + FIRST_TIMEOUT)


def test_a_peer_that_is_late_twice_in_a_row_is_dropped():
    play = one_at_a_time("..")
    play >> play.connected(1, "a", "##")
    assert claims(play.wait()), "it gets a second chance"
    assert is_due(play.now, 100.0 + FIRST_TIMEOUT)
    late = play.now
    actions = play.wait()
    assert is_due(play.now, late + 2 * FIRST_TIMEOUT), "with twice the time"
    assert actions[-1] == close(1, ByeReason.STALLED)


def test_several_claims_that_are_late_together_count_once():
    play = leecher("...", per_peer=3)
    play >> play.connected(1, "a", "###")
    actions = play.wait()
    assert sum(isinstance(a, act.Send) and isinstance(a.message, Cancel) for a in actions) == 3
    assert 1 in play.scheduler.torrent(play.digest).peers


def test_a_piece_in_between_forgives_a_late_claim():
    play = one_at_a_time("...")
    play >> play.connected(1, "a", "###")
    for _ in range(2):
        [index] = claims(play.wait())[1]
        play.after(0.1).piece(1, index)
        assert 1 in play.scheduler.torrent(play.digest).peers
    play.wait()
    assert 1 in play.scheduler.torrent(play.digest).peers


def test_a_piece_that_comes_after_its_claim_was_taken_back_is_kept():
    play = one_at_a_time(".")
    play >> play.connected(1, "a", "#")
    play.wait()
    play >> play.connected(2, "b", "#")
    assert play.scheduler.expects(1, 0)
    assert cancel(2, 0) in play >> ev.PieceReceived(1, 0)
    assert play >> play.stored(1, 0) == [tells_all([1, 2]), act.Finish(play.digest)]


# --- wrong bytes ------------------------------------------------------------------------------


def test_a_peer_that_sent_a_wrong_piece_is_dropped_and_the_piece_claimed_elsewhere():
    play = one_at_a_time(".")
    play >> play.connected(1, "a", "#")
    play >> ev.PieceReceived(1, 0)
    play >> play.connected(2, "b", "#")
    assert play >> play.rejected(1, 0) == [
        close(1, ByeReason.CORRUPT, "piece 0"),
        claim(2, 0),
    ]


@pytest.mark.parametrize("has", ["..", "##"], ids=["leecher", "seeder"])
def test_a_peer_that_sent_a_wrong_piece_is_banned(has):
    play = one_at_a_time("..")
    [index] = claims(play >> play.connected(1, "a", "##"))[1]
    play >> ev.PieceReceived(1, index)
    play >> play.rejected(1, index)

    assert play.after(10.0) >> play.connected(2, "a", has) == [
        close(2, ByeReason.CORRUPT, "it sent a wrong piece before")
    ]
    assert play >> play.found("a") == [], "nor is it dialled"
    assert play.after(290.0) >> play.found("a") == [play.dial("a")]


def test_a_peer_that_left_before_its_wrong_piece_was_found_out_is_banned_all_the_same():
    play = one_at_a_time("..")
    [index] = claims(play >> play.connected(1, "a", "##"))[1]
    play >> ev.PieceReceived(1, index)
    play >> ev.PeerDisconnected(1)
    play >> play.rejected(1, index)
    [refusal] = play.after(10.0) >> play.connected(2, "a", "##")
    assert refusal.reason is ByeReason.CORRUPT


def test_a_peer_that_came_back_before_its_wrong_piece_was_found_out_is_dropped():
    play = one_at_a_time("..")
    [index] = claims(play >> play.connected(1, "a", "##"))[1]
    play >> ev.PieceReceived(1, index)
    play >> ev.PeerDisconnected(1)
    play.after(2.0) >> play.connected(2, "a", "##")
    assert close(2, ByeReason.CORRUPT, f"piece {index}") in play >> play.rejected(1, index)


def test_a_piece_that_could_not_be_stored_is_claimed_again_and_nobody_is_blamed():
    play = one_at_a_time(".")
    play >> play.connected(1, "a", "#")
    play >> ev.PieceReceived(1, 0)
    assert play >> ev.PieceLost(play.digest, 0) == [claim(1, 0)]


# --- broken protocol --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "message",
    [
        Have(2),
        Have(-1),
        Pass(2),
        Pass(-2),
        Claim(2),
        Claim(-1),
        Offer(2),
        Offer(-2),
        Cancel(2),
        Cancel(-1),
        Cancel(1 << 40),
    ],
)
def test_a_piece_that_does_not_exist_ends_the_connection(message):
    play = one_at_a_time("..")
    play >> play.connected(1, "a", "##")
    [action] = play >> play.says(1, message)
    said = f"have {message.index}" if isinstance(message, Have) else repr(message)
    assert action == close(1, ByeReason.PROTOCOL_ERROR, said)
    assert play >> play.says(1, Have(0)) == [], "it is gone"


def test_a_second_hello_ends_the_connection():
    play = one_at_a_time("..")
    play >> play.connected(1, "a", "##")
    [action] = play >> play.says(1, hello(play.metainfo, "a", "##"))
    assert action.reason is ByeReason.PROTOCOL_ERROR


@pytest.mark.parametrize(
    "changes",
    [{"piece_count": 3}, {"piece_count": 0, "have": b""}, {"have": b"\xff"}, {"have": b""}],
)
@pytest.mark.parametrize("announced", [None, ".."], ids=["accepted", "dialled"])
def test_a_hello_that_does_not_fit_the_metainfo_is_refused(changes, announced):
    play = one_at_a_time("..")
    play >> play.found("a")
    event = play.connected(1, "a", "##", announced=announced)
    broken: Hello = attrs.evolve(event.hello, **changes)
    [action] = play >> attrs.evolve(event, hello=broken)
    assert action.reason is ByeReason.PROTOCOL_ERROR


# --- no progress ------------------------------------------------------------------------------


def test_a_download_without_progress_fails_and_says_why():
    play = Play("#...", limits=SwarmLimits(stall_timeout=120.0))
    play >> play.added(announce=True)
    play.wait()
    play >> play.replied(interval=1e6)
    failed, stopped = play.wait()
    assert is_due(play.now, 100.0 + 120.0)
    assert failed == act.Fail(play.digest, "no piece for 120 s, 3 of 4 pieces missing")
    assert stopped == play.announce(AnnounceState.STOPPED)
    assert play.scheduler.torrent(play.digest) is None
    assert play.scheduler.next_deadline() == math.inf


def test_every_stored_piece_gives_a_download_more_time():
    limits = attrs.evolve(PATIENT, stall_timeout=10.0)
    play = one_at_a_time("...", limits=limits)
    play >> play.connected(1, "a", "###")
    for _ in range(2):
        play.now += 6.0
        [index] = play.scheduler.torrent(play.digest).peers[1].claims
        play.piece(1, index)
    assert not any(isinstance(action, act.Fail) for action in play.wait_until(play.now + 9.9))
    actions = play.wait_until(play.now + 0.5)
    assert actions[-2:] == [
        close(1, ByeReason.USELESS),
        act.Fail(play.digest, "no piece for 10 s, 1 of 3 pieces missing"),
    ]
    assert play.scheduler.torrent(play.digest) is None


def test_a_complete_blob_never_fails():
    play = Play("##")
    play >> play.added(verified=True)
    assert play.scheduler.next_deadline() == math.inf


# --- readers ----------------------------------------------------------------------------------


def test_the_piece_that_a_reader_waits_for_is_claimed_first():
    first = []
    for seed in range(100):
        play = Play("." * 40, limits=PATIENT, seed=seed)
        play >> play.added()
        for reader, index in enumerate((17, 30)):
            play >> ev.ReaderMoved(play.digest, reader, index)
        play >> ev.ReaderClosed(play.digest, 0)
        first.append(claims_in_order(play >> play.connected(1, "a", "#" * 40))[0])
    assert 35 <= first.count(30) <= 65, "half of the claims, and the next piece first"
    assert first.count(17) < 10, "that reader is gone"


# --- claims that are not for us ---------------------------------------------------------------


def test_a_claim_for_a_piece_that_is_not_stored_yet_is_passed():
    play = one_at_a_time("..")
    play >> play.connected(1, "a", "#.")
    play >> ev.PieceReceived(1, 0)
    assert play >> play.says(1, Claim(0)) == [passes(1, 0)]
    assert play >> play.says(1, Claim(1)) == [passes(1, 1)]
