"""Who is told of peers that appear."""

from __future__ import annotations

import math
import random
from collections import Counter

import attrs
import pytest

from swarmpull.digest import Digest
from swarmpull.swarm.handout import HandoutLimits, PeerTable
from swarmpull.swarm.peers import AnnounceState, PeerContact, PeerKind
from swarmpull.swarm.watches import Watch, WatchLimits

LEECHING, COMPLETE, STOPPED = AnnounceState.LEECHING, AnnounceState.COMPLETE, AnnounceState.STOPPED
BLOB = Digest.of(b"blob")
ORIGIN = PeerContact("f" * 32, "origin", 7201, PeerKind.ORIGIN)


def agent(number: int) -> PeerContact:
    return PeerContact(f"{number:032x}", f"host-{number}", 7100, PeerKind.AGENT)


@attrs.define
class Tracker:
    """A table, and what became of the watches at it."""

    table: PeerTable
    ended: list[Watch] = attrs.Factory(list)
    positions: dict[PeerContact, int] = attrs.Factory(dict)

    def announce(
        self,
        number: int,
        state: AnnounceState = LEECHING,
        now: float = 0.0,
        *,
        digest: Digest = BLOB,
    ) -> None:
        handout = self.table.announce(digest, agent(number), state, now)
        self.positions[agent(number)] = handout.position
        self.table.check_invariants()

    def watch(
        self,
        number: int,
        now: float = 0.0,
        *,
        position: int | None = None,
        seconds: float = 30.0,
        digest: Digest = BLOB,
    ) -> Watch:
        since = self.positions.get(agent(number), 0) if position is None else position
        watch = self.table.watch(
            digest,
            agent(number).peer_id,
            since,
            seconds,
            now,
            lambda: self.ended.append(watch),
        )
        self.table.check_invariants()
        return watch


def tracker(**limits: float) -> Tracker:
    watch = WatchLimits(**limits)  # type: ignore[arg-type]
    return Tracker(PeerTable(HandoutLimits(watch=watch), random.Random(0)))


def waiting(leechers: int, **limits: float) -> tuple[Tracker, list[Watch]]:
    """So many leechers, 0 and on, that wait; the one that came first has waited for longest."""
    made = tracker(**limits)
    for number in range(leechers):
        made.announce(number)
    watches = [made.watch(n, position=made.table._watches.position) for n in range(leechers)]
    assert all(watch.is_open for watch in watches)
    return made, watches


def test_one_who_waits_is_told_of_a_seeder_that_appears():
    made, [watch] = waiting(1)
    made.announce(7, COMPLETE)

    assert made.ended == [watch]
    assert watch.peers == (agent(7),)
    assert not watch.is_open
    assert made.table.statistics().told == 1


def test_one_who_waits_is_told_of_an_origin_that_appears_but_not_of_one_that_is_still_there():
    made, [watch] = waiting(1)
    made.table.add_seeder(BLOB, ORIGIN, 0.0, lifetime=15.0)
    again = made.watch(0, position=watch.position)
    made.table.add_seeder(BLOB, ORIGIN, 5.0, lifetime=15.0)

    assert watch.peers == (ORIGIN,)
    assert again.is_open


def test_an_announce_of_one_who_is_known_tells_nobody():
    made, [first, second] = waiting(2)
    made.announce(0)
    made.announce(1, COMPLETE)

    assert first.is_open
    assert made.ended == [second], "who is complete waits for nobody"
    assert second.peers == ()


def test_a_leecher_that_dials_those_who_wait_need_not_be_told_of():
    made, watches = waiting(3, dialled=3)
    made.announce(7)

    assert all(watch.is_open for watch in watches)


def test_of_a_leecher_that_dials_others_those_who_wait_are_told():
    made, watches = waiting(3, dialled=0)
    made.announce(7)

    assert [watch.peers for watch in watches] == [(agent(7),)] * 3


def test_nobody_is_told_of_a_peer_of_another_torrent():
    made, [watch] = waiting(1)
    made.announce(7, COMPLETE, digest=Digest.of(b"other"))

    assert watch.is_open


def test_who_appeared_between_the_handout_and_the_watch_is_told_of_at_once():
    made = tracker()
    made.announce(0)
    made.announce(7, COMPLETE)
    watch = made.watch(0)

    assert not watch.is_open
    assert watch.peers == (agent(7),)
    assert made.ended == [], "the answer is there already"
    assert made.watch(0, position=watch.position).is_open, "once"


def test_who_appeared_before_the_handout_is_not_told_of():
    made = tracker()
    made.announce(7, COMPLETE)
    made.announce(0)

    assert made.watch(0).is_open


def test_who_has_left_since_is_not_told_of():
    made = tracker()
    made.announce(0)
    made.announce(7, COMPLETE)
    made.announce(7, STOPPED)

    assert made.watch(0).is_open


def test_of_those_who_appeared_meanwhile_the_last_few_are_told_the_last_one_first():
    made = tracker(batch=3)
    made.announce(0)
    for number in range(10, 20):
        made.announce(number, COMPLETE)

    assert made.watch(0).peers == (agent(19), agent(18), agent(17))


def test_few_are_told_of_a_newcomer_those_who_have_waited_for_longest():
    made, watches = waiting(10, told=3)
    made.announce(70, COMPLETE)
    assert made.ended == watches[:3]

    again = made.watch(0, position=watches[0].position)
    made.announce(71, COMPLETE)
    made.announce(72, COMPLETE)
    assert again.is_open, "it stands at the end of the line"
    assert made.ended == watches[:9]


def test_who_comes_late_counts_among_the_few():
    made = tracker(told=3)
    for number in range(5):
        made.announce(number)
    made.announce(70, COMPLETE)

    assert [made.watch(number).is_open for number in range(5)] == [False] * 3 + [True] * 2


def test_a_burst_of_newcomers_costs_each_of_them_few_words():
    made, watches = waiting(60, told=4, batch=5)
    position = {watch.peer_id: watch.position for watch in watches}
    told: Counter[PeerContact] = Counter()
    rng = random.Random(1)
    for number in range(1000, 1500):
        made.announce(number, COMPLETE)
        for watch in made.ended:
            position[watch.peer_id] = watch.position
            told.update(watch.peers)
        made.ended.clear()
        # Those who were told dial, and find after a while that they are short all the same.
        for leecher in rng.sample(range(60), 3):
            again = made.watch(leecher, position=position[agent(leecher).peer_id] or 0)
            made.ended.clear()
            assert len(again.peers) <= 5
            if not again.is_open:
                position[again.peer_id] = again.position
                told.update(again.peers)

    assert max(told.values()) <= 4
    assert len(told) > 400


def test_a_leecher_has_one_watch_of_a_torrent():
    made, [former] = waiting(1)
    latter = made.watch(0, position=1)
    other = Digest.of(b"other")
    made.announce(0, digest=other)
    elsewhere = made.watch(0, position=2, digest=other)

    assert made.ended == [former]
    assert (former.peers, former.position) == ((), None)
    assert latter.is_open
    assert elsewhere.is_open
    assert made.table.statistics().watching == 2


@pytest.mark.parametrize("limits", [{"per_torrent": 3}, {"watches": 3}])
def test_a_watch_above_the_limit_ends_at_once_and_is_not_to_be_tried_again(limits):
    made, watches = waiting(3, **limits)
    made.announce(9)
    refused = made.watch(9)

    assert not refused.is_open
    assert (refused.peers, refused.position) == ((), None)
    assert made.table.statistics().watches_refused == 1
    made.table.close_watch(watches[0])
    assert made.watch(9).is_open


def test_who_is_not_in_the_table_or_has_everything_does_not_wait():
    made = tracker()
    made.announce(1, COMPLETE)

    for number in (1, 2):
        watch = made.watch(number)
        assert not watch.is_open
        assert (watch.peers, watch.position) == ((), None)


@pytest.mark.parametrize("state", [COMPLETE, STOPPED])
def test_the_watch_of_one_who_completes_or_leaves_ends(state):
    made, [watch] = waiting(1)
    made.announce(0, state)

    assert made.ended == [watch]
    assert (watch.peers, watch.position) == ((), None)
    assert made.table.statistics().watching == 0


def test_the_watch_of_one_who_fell_silent_ends():
    made, [watch] = waiting(1)
    made.table.expire(100.0)

    assert made.ended == [watch]


def test_a_watch_whose_time_is_up_goes_on_where_it_was():
    made, [watch] = waiting(1, seconds=20.0)
    assert watch.until == 20.0
    made.table.close_watch(watch)
    made.announce(0, LEECHING, 20.0)
    made.announce(7, COMPLETE, 20.0)
    again = made.watch(0, 20.0, position=watch.position)

    assert made.ended == [], "who closes it knows"
    assert watch.position is not None
    assert again.peers == (agent(7),)
    made.table.close_watch(again)
    assert again.peers == (agent(7),), "no matter if it has ended"


@pytest.mark.parametrize(
    ("seconds", "until"), [(5.0, 5.0), (0.0, 0.0), (1e9, 30.0), (-1.0, 30.0), (math.nan, 30.0)]
)
def test_a_caller_may_wait_for_less_than_the_limit_only(seconds, until):
    made = tracker()
    made.announce(0)

    assert made.watch(0, seconds=seconds).until == until


def test_the_position_of_a_tracker_that_was_here_before_is_taken_for_none():
    made = tracker()
    made.announce(7, COMPLETE)
    made.announce(0)

    assert made.watch(0, position=1_000_000).peers == (agent(7),)


def test_a_tracker_that_shuts_down_ends_every_watch_and_takes_no_more():
    made, watches = waiting(3)
    made.table.end_watches()
    made.table.check_invariants()

    assert made.ended == watches
    assert all((watch.peers, watch.position) == ((), None) for watch in watches)
    assert not made.watch(0, position=3).is_open


def test_nothing_is_kept_of_a_torrent_that_is_gone():
    made, _ = waiting(5)
    for number in range(5):
        made.announce(number, STOPPED)

    assert made.table._watches._swarms == {}


@pytest.mark.parametrize("limits", [{"told": 0}, {"batch": 0}, {"seconds": 0.0}, {"watches": -1}])
def test_limits_that_make_no_sense_are_refused(limits):
    with pytest.raises(ValueError, match=next(iter(limits))):
        WatchLimits(**limits)
