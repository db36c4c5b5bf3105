"""What trackers hear from a host, and how a host leaves."""

from __future__ import annotations

import math

import attrs
import pytest

from swarmpull.digest import Digest
from swarmpull.swarm import actions as act
from swarmpull.swarm import events as ev
from swarmpull.swarm.connections import ConnectionLimits
from swarmpull.swarm.messages import ByeReason, Cancel, Claim, Have
from swarmpull.swarm.peers import AnnounceState
from swarmpull.swarm.pipeline import PipelineLimits
from swarmpull.swarm.scheduler import (
    ANNOUNCE_RETRY_MAX,
    HELD_AHEAD,
    HELD_AHEAD_UNKNOWN,
    LEECHING_TICK,
    LOST_LEECHING_SPREAD,
    LOST_SEEDING_SPACING,
    LOST_SEEDING_SPREAD_MIN,
    LOST_SHORT_SPREAD,
    REANNOUNCE_SPACING,
    REANNOUNCE_SPREAD_MAX,
    SEEDING_TICK,
    SwarmLimits,
)
from swarmpull.swarm.uploads import UploadLimits

from .playbook import Play, claims, close, is_due, metainfo_of, passes

LEECHING, COMPLETE, STOPPED = AnnounceState.LEECHING, AnnounceState.COMPLETE, AnnounceState.STOPPED


CLASSIC = SwarmLimits(stall_timeout=1e6, exchange=PipelineLimits())


def announcing(have: str = "..", **limits: float) -> Play:
    """A host whose first announce is out."""
    exchange = PipelineLimits(uploads=UploadLimits(**limits))
    play = Play(have, limits=attrs.evolve(CLASSIC, exchange=exchange))
    play >> play.added(announce=True)
    assert len(play.wait()) == 1
    return play


def complete(play: Play) -> list[act.Action]:
    play >> play.connected(1, "a", "##")
    for index in (0, 1):
        play.piece(1, index)
    return play >> ev.BlobVerified(play.digest)


def test_a_leecher_announces_at_once_and_then_at_the_interval():
    play = Play("..")
    play >> play.added(announce=True)
    assert play.wait() == [play.announce(LEECHING)]
    assert play.now == 100.0
    play >> play.replied(interval=7.0)
    assert play.wait() == [play.announce(LEECHING)]
    assert play.now == 107.0


def test_no_tracker_hears_of_a_torrent_that_is_not_announced():
    play = Play("..", limits=CLASSIC)
    play >> play.added(announce=False)
    play >> play.replied("c", interval=7.0)
    assert play.wait_until(115.0) == []
    assert complete(play)[-1] == close(1, ByeReason.USELESS)
    assert play >> ev.AnnounceFailed(play.digest) == []
    assert play.wait_until(400.0) == []
    assert play >> ev.TorrentRemoved(play.digest) == []


def test_a_failed_announce_is_repeated_after_a_pause_that_grows():
    play = announcing()
    pauses = []
    for _ in range(12):
        play >> ev.AnnounceFailed(play.digest)
        before = play.now
        assert play.wait() == [play.announce(LEECHING)]
        pauses.append(play.now - before)
    for count, pause in enumerate(pauses, start=1):
        longest = min(0.5 * 2**count, ANNOUNCE_RETRY_MAX)
        assert longest / 2 <= pause <= longest


def test_completion_is_announced_at_once():
    play = announcing()
    play >> play.replied(interval=60.0)
    assert complete(play)[-1] == play.announce(COMPLETE)


def test_completion_is_announced_until_it_is_acknowledged():
    play = announcing()
    play >> play.replied(interval=60.0)
    complete(play)
    for _ in range(5):
        play >> ev.AnnounceFailed(play.digest)
        assert play.wait() == [play.announce(COMPLETE)]
    play >> play.replied(interval=60.0)
    assert play.scheduler.next_deadline() == play.now + 60.0


@pytest.mark.parametrize("answer", ["replied", "failed"])
def test_completion_that_comes_while_an_announce_is_out_is_announced_after_it(answer):
    play = announcing()
    actions = complete(play)
    assert not any(isinstance(action, act.Announce) for action in actions)
    assert play.scheduler.next_deadline() == math.inf, "waiting for the tracker must not spin"
    play >> (play.replied(interval=60.0) if answer == "replied" else ev.AnnounceFailed(play.digest))
    assert play.wait() == [play.announce(COMPLETE)]
    assert play.now < 102.0


def test_after_a_restart_the_cached_blobs_are_announced_spread_over_time():
    play = Play("##")
    play >> play.added(announce=True)
    for number in range(199):
        metainfo = metainfo_of(2, f"blob {number}")
        play >> ev.TorrentAdded(metainfo, "", 0b11, verified=True, announce=True)
    announced = []
    while len(announced) < 200:
        announced += [(play.now, d) for batch in batches(play.wait()) for d in batch]
    assert len({digest for _, digest in announced}) == 200
    assert announced[0][0] < 101.0
    # Those of the last second go along with the first of them.
    assert 200 * REANNOUNCE_SPACING * 0.5 < announced[-1][0] - 100.0 <= 200 * REANNOUNCE_SPACING


def test_a_torrent_that_is_removed_is_stopped_at_the_trackers():
    play = announcing()
    assert play >> ev.TorrentRemoved(play.digest) == [play.announce(STOPPED)]


# --- watches ----------------------------------------------------------------------------------

LONG = attrs.evolve(CLASSIC, connections=ConnectionLimits(dialled=3))


def short(names: str = "", *, have: str = "....", position: int | None = 7) -> Play:
    """A leecher that would have three connections, after its first announce; those dials are pending."""
    play = Play(have, limits=LONG)
    play >> play.added(announce=True)
    play.wait()
    play.actions = play >> play.replied(names, 600.0, position)
    return play


def watches(actions: list[act.Action]) -> list[int]:
    return [action.position for action in actions if isinstance(action, act.Watch)]


def test_a_leecher_without_any_peer_watches_at_once():
    play = short()

    assert play.actions == [play.watch(7)]


def test_a_leecher_with_too_few_peers_watches_soon():
    play = short("ab")
    assert play.actions == [play.dial("a"), play.dial("b")]

    assert play.wait() == [play.watch(7)]
    assert play.now <= 100.0 + 2 * LEECHING_TICK


def test_a_leecher_with_enough_peers_does_not_watch():
    play = short("abc")

    assert watches(play.wait_until(play.now + 5.0)) == []


def test_a_leecher_watches_for_no_more_peers_than_it_lacks_pieces():
    play = short("a", have="##.#")

    assert watches(play.wait_until(play.now + 5.0)) == []


def test_a_leecher_that_loses_its_peers_watches_from_its_last_announce_on():
    play = short("abc")
    for name in "abc":
        play >> ev.DialFailed(play.digest, name * 32)

    assert watches(play.wait_until(play.now + LEECHING_TICK)) == [7]


def test_peers_that_appear_are_dialled_at_once():
    play = short()
    play.now += 20.0

    assert play >> play.watched("b", 9) == [play.dial("b")]
    assert play.wait() == [play.watch(9)], "one is not enough"


def test_one_watch_is_open_at_a_time():
    play = short()
    assert play >> play.replied("", 600.0, 8) == []
    assert play.wait_until(play.now + 5.0) == []


def test_a_watch_that_failed_is_not_tried_again_before_the_next_announce():
    play = short()
    play >> play.watched()
    assert watches(play.wait_until(play.now + 500.0)) == []

    assert play >> play.replied("", 600.0, 12) == [play.watch(12)]


def test_watches_that_end_at_once_come_no_more_often_than_ticks():
    play = short()
    seen = 0
    until = play.now + 10.0
    while play.now < until:
        play >> play.watched("", 7)
        seen += len(watches(play.wait_until(play.now + 0.01)))

    assert 10 < seen <= 10.0 / LEECHING_TICK + 1


def test_no_tracker_is_watched_that_does_not_offer_it():
    play = short(position=None)

    assert play.actions == []
    assert watches(play.wait_until(play.now + 5.0)) == []


def test_who_has_everything_watches_no_more():
    play = short()
    play >> play.connected(1, "a", "####")
    for index in range(4):
        play.piece(1, index)
    play >> play.watched("b", 9)
    assert watches(play.wait_until(play.now + 5.0)) == []
    play >> ev.BlobVerified(play.digest)
    play >> play.replied("", 600.0, 12)
    assert watches(play.wait_until(play.now + 5.0)) == []


def test_a_draining_host_does_not_watch():
    play = short()
    play >> ev.DrainStarted()

    assert play >> play.watched("b", 9) == []
    assert play.scheduler.next_deadline() == math.inf


def test_the_end_of_a_watch_of_a_torrent_that_is_gone_means_nothing():
    play = short()
    play >> ev.TorrentRemoved(play.digest)

    assert play >> play.watched("b", 9) == []


# --- many blobs at once -----------------------------------------------------------------------


def holding(count: int, *, seed: int = 0) -> tuple[Play, list[Digest]]:
    """A host that was restarted with so many blobs."""
    play = Play("##", limits=CLASSIC, seed=seed)
    digests = []
    for number in range(count):
        metainfo = metainfo_of(1, f"blob {number}")
        digests.append(metainfo.digest)
        play >> ev.TorrentAdded(metainfo, "", 1, verified=True, announce=True)
    return play, digests


def batches(actions: list[act.Action]) -> list[tuple[Digest, ...]]:
    """Which blobs were announced together; those that were alone are a batch of one."""
    found = []
    for action in actions:
        match action:
            case act.AnnounceHeld(digests):
                found.append(digests)
            case act.Announce(digest, _, AnnounceState.COMPLETE):
                found.append((digest,))
    return found


def settled(count: int, interval: float = 60.0) -> tuple[Play, list[Digest]]:
    """A host whose blobs have all been announced, over some seconds, and acknowledged."""
    play, digests = holding(count)
    while play.scheduler.next_deadline() < math.inf:
        for batch in batches(play.wait()):
            for digest in batch:
                play >> ev.AnnounceReplied(digest, interval, ())
        if play.now > 100.0 + REANNOUNCE_SPREAD_MAX / 2:
            break
        if all(play.scheduler.torrent(digest).announce.is_known for digest in digests):
            break
    return play, digests


def test_the_blobs_of_a_restarted_host_are_announced_over_some_time_in_few_messages():
    play, digests = holding(1000)

    together = batches(play.wait_until(100.0 + 1000 * REANNOUNCE_SPACING))

    assert sorted(d for batch in together for d in batch) == sorted(digests), "each of them once"
    assert 10 <= len(together) <= 1000 * REANNOUNCE_SPACING / HELD_AHEAD_UNKNOWN + 2
    assert max(map(len, together)) < 250, "not all at once"


def test_blobs_that_the_tracker_knows_are_announced_together():
    play, digests = settled(20)
    play.now = max(play.scheduler.torrent(d).announce.due_at for d in digests) - 59.0
    for number, digest in enumerate(digests):
        play.scheduler.torrent(digest).announce.due_at = play.now + 10.0 + number
        play.scheduler._reschedule(play.scheduler.torrent(digest))

    assert batches(play.wait()) == [tuple(digests)]
    assert play.scheduler.next_deadline() == math.inf, "waiting for the tracker must not spin"
    for digest in digests:
        play >> ev.AnnounceReplied(digest, 60.0, ())
    assert batches(play.wait()) == [tuple(digests)]


def test_a_blob_that_is_due_much_later_does_not_go_along():
    play, digests = settled(3)
    for digest, due_in in zip(digests, (1.0, HELD_AHEAD, HELD_AHEAD + 2.0), strict=True):
        play.scheduler.torrent(digest).announce.due_at = play.now + due_in
        play.scheduler._reschedule(play.scheduler.torrent(digest))

    assert batches(play.wait()) == [tuple(digests[:2])]


def test_leechers_and_what_is_not_announced_do_not_go_along():
    play, digests = settled(2)
    play >> play.added(verified=False, announce=True)
    play.scheduler.torrent(play.digest).announce.due_at = math.inf
    other = metainfo_of(1, "an origin's")
    play >> ev.TorrentAdded(other, "", 1, verified=True, announce=False)

    assert batches(play.wait()) == [tuple(digests)]


def test_that_a_blob_is_complete_is_news_and_goes_alone_until_it_is_heard():
    play, digests = settled(5)
    play >> play.added(verified=False, announce=True)
    actions = play >> ev.BlobVerified(play.digest)
    assert batches(actions) == [(play.digest,)]
    play >> ev.AnnounceFailed(play.digest)
    assert batches(play.wait()) == [(play.digest,)]
    play >> play.replied(interval=60.0)

    assert set(batches(play.wait())[0]) == {*digests, play.digest}


def test_each_blob_that_no_tracker_took_is_tried_again():
    play, digests = settled(5)
    assert batches(play.wait()) == [tuple(digests)]
    play >> ev.AnnounceReplied(digests[0], 60.0, ())
    for digest in digests[1:]:
        play >> ev.AnnounceFailed(digest)

    again = [d for batch in batches(play.wait_until(play.now + 2.0)) for d in batch]
    assert sorted(again) == sorted(digests[1:])


def test_the_blobs_of_a_tracker_that_is_gone_are_still_spread():
    """All its hosts come to the successor, which must not get all their blobs in one moment."""
    play, digests = settled(300)
    lost_at = play.now
    play >> ev.TrackerLost(tuple(digests))
    sizes = []
    while sum(sizes) < len(digests):
        sizes += map(len, batches(play.wait()))

    assert play.now - lost_at > 300 * LOST_SEEDING_SPACING / 2
    assert max(sizes) < 60


def test_a_drain_takes_leave_of_each_blob():
    play, digests = settled(3)
    left = play >> ev.DrainStarted()

    assert [action.digest for action in left] == digests
    assert play.scheduler.next_deadline() == math.inf


# --- a tracker that goes away -----------------------------------------------------------------


def lost_after(play: Play) -> float:
    """Seconds from the loss of the tracker to the announce to its successor."""
    lost_at = play.now
    play >> ev.TrackerLost((play.digest,))
    while not any(isinstance(action, act.Announce) for action in play.wait()):
        pass
    return play.now - lost_at


def test_a_leecher_whose_tracker_is_gone_announces_at_once_and_not_at_the_interval():
    pauses = [lost_after(answered("abc", seed=seed)) for seed in range(100)]

    assert max(pauses) <= LOST_LEECHING_SPREAD
    assert min(pauses) < LOST_LEECHING_SPREAD / 10 < LOST_LEECHING_SPREAD / 2 < max(pauses)


def test_a_leecher_that_is_short_of_peers_comes_before_the_others():
    pauses = [lost_after(answered("a", seed=seed)) for seed in range(100)]

    assert LOST_SHORT_SPREAD / 2 < max(pauses) <= LOST_SHORT_SPREAD


def test_the_blobs_of_a_seeder_are_spread_wider_the_more_there_are():
    for count, most in ((1, LOST_SEEDING_SPREAD_MIN), (10_000, REANNOUNCE_SPREAD_MAX)):
        play = Play("##", limits=CLASSIC)
        digests = []
        for number in range(count):
            metainfo = metainfo_of(1, f"blob {number}")
            digests.append(metainfo.digest)
            play.scheduler.handle(
                ev.TorrentAdded(metainfo, "", 1, verified=True, announce=True), 100.0
            )
            clock = play.scheduler.torrent(metainfo.digest).announce
            clock.due_at = 10_000.0
        play.scheduler.handle(ev.TrackerLost(tuple(digests)), 100.0)
        due = [play.scheduler.torrent(digest).announce.due_at - 100.0 for digest in digests]

        assert 0.0 <= min(due) <= max(due) <= most
        assert count == 1 or max(due) - min(due) > 0.9 * most


def test_an_announce_that_is_out_or_due_sooner_is_left_alone_by_the_loss_of_a_tracker():
    play = announcing()
    play >> ev.TrackerLost((play.digest,))
    assert play.wait_until(play.now + 5.0) == [], "the one that is out goes to the successor"

    for seed in range(20):
        assert lost_after(answered("abc", seed=seed, interval=0.1)) <= 0.1


def test_nobody_watches_a_tracker_that_is_gone():
    play = short("ab")
    play >> ev.TrackerLost((play.digest,))

    assert watches(play.wait_until(play.now + 5.0)) == []


def test_the_loss_of_a_tracker_means_nothing_to_what_is_not_announced():
    play = Play("....", limits=CLASSIC)
    play >> play.added(announce=False)
    play >> ev.TrackerLost((play.digest, metainfo_of(1, "gone").digest))

    assert play.wait_until(play.now + 5.0) == []


def answered(names: str, *, seed: int, interval: float = 600.0) -> Play:
    """A leecher that would have three connections, after the answer to its first announce."""
    play = Play("....", limits=LONG, seed=seed)
    play >> play.added(announce=True)
    play.wait()
    play >> play.replied(names, interval)
    return play


# --- draining ---------------------------------------------------------------------------------


def test_a_drain_says_goodbye_to_those_who_wait_for_nothing():
    play = announcing()
    play >> play.connected(1, "a", "##")
    play >> play.connected(2, "b", "..")
    assert play >> ev.DrainStarted() == [
        close(1, ByeReason.DRAINING),
        close(2, ByeReason.DRAINING),
        play.announce(STOPPED),
    ]
    assert play.scheduler.next_deadline() == math.inf


def test_a_drain_lets_the_pieces_end_that_are_being_sent():
    play = announcing("##", slots=1)
    for connection, name in ((1, "a"), (2, "b")):
        play >> play.connected(connection, name, "..")
        play >> play.says(connection, Claim(0))
    play >> play.says(1, Claim(1))

    assert play >> ev.DrainStarted() == [
        close(2, ByeReason.DRAINING),
        play.announce(STOPPED),
    ], "what only waits is to be had elsewhere"
    assert play >> play.says(1, Claim(1)) == [passes(1, 1)], "nothing new"
    assert play >> ev.PieceSent(1, 0) == [close(1, ByeReason.DRAINING)]


def test_a_drain_lets_all_slots_finish():
    play = announcing("##", slots=2)
    for connection, name in ((1, "a"), (2, "b")):
        play >> play.connected(connection, name, "..")
        play >> play.says(connection, Claim(0))
    assert play >> ev.DrainStarted() == [play.announce(STOPPED)]
    assert play >> ev.PieceSent(2, 0) == [close(2, ByeReason.DRAINING)]
    assert play >> ev.PieceSent(1, 0) == [close(1, ByeReason.DRAINING)]


def test_a_claim_that_is_taken_back_during_a_drain_does_not_end_the_piece_being_sent():
    play = announcing("##", slots=1)
    play >> play.connected(1, "a", "..")
    play >> play.says(1, Claim(0))
    play >> ev.DrainStarted()
    assert play >> play.says(1, Cancel(0)) == []
    assert play >> ev.PieceSent(1, 0) == [close(1, ByeReason.DRAINING)]


def test_a_drain_does_not_wait_for_a_receiver_that_stalls():
    play = announcing("##", send_timeout=20.0)
    play >> play.connected(1, "a", "..")
    play >> play.says(1, Claim(0))
    play >> ev.DrainStarted()
    assert play.wait() == [close(1, ByeReason.STALLED)]
    assert is_due(play.now, 100.0 + 20.0, SEEDING_TICK)
    assert play.scheduler.next_deadline() == math.inf


def test_stopped_is_announced_once_however_a_host_ends():
    play = announcing()
    assert play >> ev.DrainStarted() == [play.announce(STOPPED)]
    assert play >> ev.DrainStarted() == []
    assert play >> play.replied("ab") == [], "the answer to the announce that was out"
    assert play >> ev.TorrentRemoved(play.digest) == []


def test_a_draining_host_takes_nobody_in_and_claims_nothing():
    play = announcing(".#")
    play >> play.connected(1, "a", "..")
    play >> play.says(1, Claim(1))
    play >> play.found("c")
    play >> ev.DrainStarted()
    assert play >> play.connected(2, "b", "##") == [close(2, ByeReason.DRAINING)]
    assert play >> play.connected(3, "c", "##", announced=".#") == [close(3, ByeReason.DRAINING)]
    assert play >> play.found("d") == []
    assert claims(play >> play.says(1, Have(0))) == {}
