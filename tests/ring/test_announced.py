from __future__ import annotations

from swarmpull.digest import Digest
from swarmpull.ring.announced import Announced, Place

ONE, TWO, THREE = (Digest.of(bytes([number])) for number in range(3))
RING = ["a", "b", "c"]


def test_what_a_tracker_knew_is_announced_anew_when_it_has_gone():
    announced = Announced(10)
    announced.put(ONE, "a", RING, 7, complete=False)
    announced.put(TWO, "b", ["b", "a", "c"], 7, complete=False)
    announced.put(THREE, "a", RING, 7, complete=False)

    assert announced.gone("a") == (ONE, THREE)
    announced.forget(ONE)
    assert announced.gone("a") == (THREE,)
    assert announced.gone("c") == ()


def test_what_belongs_to_a_tracker_is_announced_anew_when_it_is_back():
    announced = Announced(10)
    announced.put(ONE, "b", RING, None, complete=False)
    announced.put(TWO, "c", RING, None, complete=False)
    announced.put(THREE, "c", ["c", "a", "b"], None, complete=False)

    assert announced.place(TWO) == Place("c", ("a", "b"))
    assert announced.back("a") == (ONE, TWO)
    # It may have been restarted: what it knew, too.
    assert announced.back("b") == (ONE, TWO)
    assert announced.back("c") == (TWO, THREE)
    announced.put(ONE, "a", RING, None, complete=False)
    assert announced.back("b") == (TWO,)


def test_what_is_complete_is_in_no_hurry_when_a_tracker_is_back():
    announced = Announced(10)
    announced.put(ONE, "b", RING, None, complete=True)
    announced.put(TWO, "b", RING, None, complete=False)

    assert announced.back("a") == (TWO,)
    assert announced.gone("b") == (ONE, TWO)


def test_a_tracker_that_is_another_process_has_lost_what_the_former_knew():
    announced = Announced(10)
    for digest in (ONE, TWO):
        announced.put(digest, "a", RING, None, complete=False)
    assert announced.answered_by(ONE, "a", "1") == (), "nothing is known of it yet"
    assert announced.answered_by(ONE, "a", "1") == ()
    assert announced.answered_by(ONE, "a", "2") == (TWO,)
    assert announced.answered_by(TWO, "a", "2") == ()


def test_a_tracker_that_does_not_say_who_it_is_is_taken_for_the_same():
    announced = Announced(10)
    announced.put(ONE, "a", RING, None, complete=False)
    announced.answered_by(TWO, "a", "1")

    assert announced.answered_by(TWO, "a", "") == ()


def test_no_more_is_remembered_than_the_limit():
    announced = Announced(2)
    for digest in (ONE, TWO, ONE, THREE):
        announced.put(digest, "a", RING, None, complete=False)

    assert announced.gone("a") == (ONE, THREE)


def test_a_tracker_that_has_left_the_ring_has_none_before_it():
    announced = Announced(2)
    announced.put(ONE, "gone", RING, None, complete=False)

    assert announced.place(ONE) == Place("gone")


def test_who_is_short_of_peers_asks_the_next_tracker_in_turn():
    announced = Announced(2)
    announced.put(ONE, "a", RING, 7, complete=False, is_short=True)
    assert announced.place(ONE) == Place("a", (), position=7, is_short=True)

    announced.asked_elsewhere(ONE)
    announced.asked_elsewhere(TWO)

    assert announced.place(ONE) == Place("a", (), position=7)
    assert announced.place(TWO) is None
    # Nothing is kept of a blob beyond its place.
    announced.put(ONE, "a", RING, 7, complete=False, is_short=True)
    for digest in (TWO, THREE):
        announced.put(digest, "a", RING, 7, complete=False)
    assert announced.place(ONE) is None
