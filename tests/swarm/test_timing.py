from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmpull.swarm.timing import (
    TIMEOUT_INITIAL,
    TIMEOUT_MAX,
    TIMEOUT_MIN,
    PathTiming,
    PieceTiming,
)


def timing_of(*samples: float) -> PieceTiming:
    timing = PieceTiming()
    for sample in samples:
        timing.add(sample)
    return timing


def test_before_the_first_piece_the_timeout_is_generous():
    assert timing_of().timeout() == TIMEOUT_INITIAL


def test_the_first_sample_counts_as_in_the_retransmission_timer_of_tcp():
    # RFC 6298 (2.2): mean R, deviation R/2, timeout mean + 4 deviations.
    assert timing_of(2.0).timeout() == 2.0 + 4 * 1.0


def test_further_samples_are_weighted_as_in_the_retransmission_timer_of_tcp():
    # RFC 6298 (2.3): an eighth for the mean, a quarter for the deviation, which is taken first.
    mean, deviation = 2.0 + (4.0 - 2.0) / 8, 1.0 + (2.0 - 1.0) / 4
    assert timing_of(2.0, 4.0).timeout() == pytest.approx(mean + 4 * deviation)


def test_a_steady_peer_is_held_to_its_pace():
    assert timing_of(*[0.5] * 100).timeout() == pytest.approx(TIMEOUT_MIN)
    assert timing_of(*[3.0] * 100).timeout() == pytest.approx(3.0, rel=0.01)


def test_a_fast_peer_may_hiccup():
    assert timing_of(*[0.01] * 50).timeout() == TIMEOUT_MIN


def test_each_late_claim_doubles_the_time_until_a_piece_arrives():
    timing = timing_of(*[1.0] * 200)
    usual = timing.timeout()
    timing.back_off()
    assert timing.timeout() == pytest.approx(2 * usual)
    timing.back_off()
    assert timing.timeout() == pytest.approx(4 * usual)
    timing.add(1.0)
    assert timing.timeout() == pytest.approx(usual, rel=0.01)


@given(st.lists(st.one_of(st.floats(0, 1e4), st.none()), max_size=60))
def test_the_timeout_is_always_within_its_bounds(history: list[float | None]) -> None:
    timing = PieceTiming()
    for seconds in history:
        if seconds is None:
            timing.back_off()
        else:
            timing.add(seconds)
    assert TIMEOUT_MIN <= timing.timeout() <= TIMEOUT_MAX


def test_a_peer_that_gave_nothing_yet_gets_twice_the_time_that_the_others_take():
    common = PieceTiming()
    for _ in range(100):
        PieceTiming(common).add(2.0)
    assert PieceTiming(common).timeout() == pytest.approx(2 * 2.0, rel=0.01)


def test_longer_pieces_get_longer_in_proportion():
    common = PieceTiming()
    assert PieceTiming(common, 4.0).timeout() == 4 * PieceTiming(common).timeout()
    for _ in range(100):
        PieceTiming(common, 4.0).add(8.0)
    assert common.timeout() == pytest.approx(2.0, rel=0.01)
    assert PieceTiming(common, 2.0).timeout() == pytest.approx(2 * 2 * 2.0, rel=0.01)


def test_a_short_piece_tells_nothing_of_what_others_take():
    common = PieceTiming()
    timing = PieceTiming(common)
    timing.add(0.001, is_short=True)
    assert common.timeout() == TIMEOUT_INITIAL
    assert timing.timeout() == TIMEOUT_MIN


# --- the path -----------------------------------------------------------------------------------


def path_of(round_trip: float | None, rate: float, *, seconds: float = 3.0) -> PathTiming:
    """A path on which answers take so long, after pieces have come at that rate."""
    path = PathTiming()
    if round_trip is not None:
        path.answered(round_trip)
    for count in range(int(seconds * rate)):
        path.arrived(100.0 + count / rate)
    return path


@pytest.mark.parametrize(
    ("round_trip", "rate", "pieces"),
    [(0.0005, 71.5, 0), (0.005, 71.5, 0), (0.05, 71.5, 4), (0.05, 7.0, 0), (1.0, 0.007, 0)],
)
def test_as_many_pieces_are_on_a_path_as_come_in_a_round_trip(round_trip, rate, pieces):
    assert path_of(round_trip, rate, seconds=max(3.0, 3 / rate)).pieces() == pieces


def test_nothing_is_on_a_path_of_which_nothing_is_known():
    assert PathTiming().pieces() == 0
    assert path_of(None, 100.0).pieces() == 0
    assert path_of(1.0, 0.5).pieces() == 0, "the first piece tells nothing of the rate"


def test_a_path_that_was_idle_is_measured_anew():
    path = path_of(0.05, 100.0)
    assert path.pieces() == 5
    assert path.arrived(1000.0)
    assert path.pieces() == 0


def test_one_slow_answer_counts_little():
    path = path_of(0.001, 100.0)
    path.answered(0.05)
    assert path.pieces() == 1
    assert path_of(0.001, 100.0).pieces() == 0
