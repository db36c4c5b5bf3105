"""What a host sends: turns, slots, stalled receivers."""

from __future__ import annotations

import attrs

from swarmpull.swarm import actions as act
from swarmpull.swarm import events as ev
from swarmpull.swarm.messages import ByeReason, Cancel, Claim
from swarmpull.swarm.pipeline import PipelineLimits
from swarmpull.swarm.scheduler import SEEDING_TICK, SwarmLimits
from swarmpull.swarm.uploads import UploadLimits

from .playbook import Play, close, hello, is_due, metainfo_of, passes


def seeder(have: str = "####", **limits: float) -> Play:
    exchange = PipelineLimits(uploads=UploadLimits(**limits))
    play = Play(have, limits=SwarmLimits(exchange=exchange))
    play >> play.added()
    return play


def send(play: Play, connection: int, index: int) -> act.SendPiece:
    return act.SendPiece(connection, play.digest, index)


def test_a_claim_is_served_at_once_when_a_slot_is_free():
    play = seeder(slots=1)
    play >> play.connected(1, "a", "....")
    assert play >> play.says(1, Claim(2)) == [send(play, 1, 2)]


def test_connections_take_turns():
    play = seeder(slots=1)
    for connection, name in enumerate("abc", start=1):
        play >> play.connected(connection, name, "....")
    for connection, index in [(1, 0), (1, 1), (1, 2), (2, 0), (3, 0), (3, 1)]:
        play >> play.says(connection, Claim(index))
    order = [(1, 0)]
    while True:
        started = play >> ev.PieceSent(*order[-1])
        if not started:
            break
        [upload] = started
        order.append((upload.connection, upload.index))
    assert order == [(1, 0), (2, 0), (3, 0), (1, 1), (3, 1), (1, 2)]


def test_turns_go_over_all_torrents_of_the_host():
    play = seeder(slots=1)
    other = metainfo_of(4, "another blob")
    play >> ev.TorrentAdded(other, "", 0b1111, verified=True, announce=False)
    play >> play.connected(1, "a", "....")
    event = play.connected(2, "a", "....")
    play >> attrs.evolve(event, hello=hello(other, "a", "...."))
    for index in (0, 1):
        play >> play.says(1, Claim(index))
    play >> play.says(2, Claim(3))
    assert play >> ev.PieceSent(1, 0) == [act.SendPiece(2, other.digest, 3)]
    assert play >> ev.PieceSent(2, 3) == [send(play, 1, 1)]


def test_claims_beyond_what_may_wait_are_passed():
    play = seeder(slots=1, claims_per_connection=1)
    play >> play.connected(1, "a", "....")
    assert play >> play.says(1, Claim(0)) == [send(play, 1, 0)]
    assert play >> play.says(1, Claim(1)) == []
    assert play >> play.says(1, Claim(2)) == [passes(1, 2)]
    assert play >> play.says(1, Claim(1)) == [passes(1, 1)], "twice"


def test_a_claim_that_was_taken_back_is_not_served():
    play = seeder(slots=1)
    play >> play.connected(1, "a", "....")
    for index in (0, 1, 2):
        play >> play.says(1, Claim(index))
    assert play >> play.says(1, Cancel(1)) == []
    assert play >> ev.PieceSent(1, 0) == [send(play, 1, 2)]


def test_a_peer_that_leaves_frees_its_slot():
    play = seeder(slots=1)
    play >> play.connected(1, "a", "....")
    play >> play.connected(2, "b", "....")
    play >> play.says(1, Claim(0))
    play >> play.says(2, Claim(0))
    assert play >> ev.PeerDisconnected(1) == [send(play, 2, 0)]
    assert play >> ev.PieceSent(1, 0) == [], "that one is gone"


def test_a_receiver_that_does_not_take_its_piece_is_dropped_and_the_next_one_served():
    play = seeder(slots=1, send_timeout=20.0)
    play >> play.connected(1, "a", "....")
    play >> play.connected(2, "b", "....")
    play >> play.says(1, Claim(0))
    play >> play.says(2, Claim(3))
    assert play.wait() == [send(play, 2, 3), close(1, ByeReason.STALLED)]
    assert is_due(play.now, 100.0 + 20.0, SEEDING_TICK)
    began = play.now
    assert play.wait() == [close(2, ByeReason.STALLED)]
    assert is_due(play.now, began + 20.0, SEEDING_TICK)


def test_two_receivers_that_stall_at_the_same_moment_are_both_dropped():
    play = seeder(slots=2, send_timeout=20.0)
    for connection, name in ((1, "a"), (2, "b")):
        play >> play.connected(connection, name, "....")
        play >> play.says(connection, Claim(0))
    assert set(play.wait()) == {close(1, ByeReason.STALLED), close(2, ByeReason.STALLED)}
