from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmpull.swarm import bitfield
from swarmpull.swarm.picker import SAMPLE_MAX, Availability, Picker, PickerLimits

from .playbook import bits, table


def make_picker(
    peers: dict[str, str],
    *,
    pieces: int | None = None,
    readers: tuple[int, ...] = (),
    window: int = 4,
    share: float = 1.0,
    seed: int = 0,
) -> Picker:
    """A picker that knows these peers; with readers it prefers their windows ``share`` of the time."""
    availability = Availability(pieces or len(next(iter(peers.values()))))
    for has in peers.values():
        availability.add(bits(has))
    limits = PickerLimits(window=window, window_share=share)
    picker = Picker(availability, limits, random.Random(seed))
    for number, position in enumerate(readers):
        picker.move_reader(number, position)
    return picker


def picked(picker: Picker, candidates: str, times: int = 200) -> Counter[int | None]:
    return Counter(picker.pick(bits(candidates)) for _ in range(times))


@pytest.mark.parametrize(
    ("peers", "candidates", "picks"),
    [
        # the rarest wins
        ({"a": "####", "b": "##.#", "c": "#..#"}, "####", {2}),
        # but only of what this peer could give
        ({"a": "####", "b": "##.#", "c": "#..#"}, "##.#", {1}),
        ({"a": "####", "b": "##.#", "c": "#..#"}, "#..#", {0, 3}),
        # ties are broken at random
        ({"a": "####"}, "####", {0, 1, 2, 3}),
        ({"a": "####", "b": "####", "c": ".#.#"}, "####", {0, 2}),
        # complete peers count for every piece alike
        ({"a": "####", "b": "####", "c": "###."}, "####", {3}),
        # one candidate, none
        ({"a": "#...", "b": "#..."}, "#...", {0}),
        ({"a": "####"}, "....", {None}),
    ],
)
def test_the_rarest_piece_is_picked(peers, candidates, picks):
    assert set(picked(make_picker(peers), candidates)) == picks


@pytest.mark.parametrize(
    ("readers", "candidates", "picks"),
    [
        # the piece that a reader needs next, however common it is
        ((2,), "########", {2}),
        # else the nearest one in the window
        ((2,), "##...#..", {5}),
        # nothing in the window: rarest first as ever
        ((2,), "#.....#.", {6}),
        ((7,), "######..", {4}),
        # the reader who waits the least far from what there is comes first
        ((0, 4), ".#..#...", {4}),
        # two readers at the same distance: they take turns
        ((0, 4), "..#...##", {2, 6}),
        ((1, 5), ".#...#..", {1, 5}),
        # a window that reaches beyond the end of the blob
        ((6,), "#......#", {7}),
    ],
)
def test_with_a_reader_the_pieces_just_ahead_of_it_come_first(readers, candidates, picks):
    peers = {"a": "########", "b": "####.###", "c": "#.##.#.#"}
    assert set(picked(make_picker(peers, readers=readers), candidates)) == picks


def test_a_reader_gets_its_share_of_the_choices_and_the_swarm_the_rest():
    picker = make_picker({"a": "####", "b": "###."}, readers=(0,), share=0.5)
    counts = picked(picker, "####", times=2000)
    assert set(counts) == {0, 3}
    assert 850 < counts[0] < 1150


def test_readers_that_are_equally_near_take_turns_wherever_they_are():
    picker = make_picker({"a": "#" * 40}, readers=(0, 10, 30), share=1.0)
    left, turns = bits("#" * 40), []
    for _ in range(9):
        index = picker.pick(left)
        turns.append(index)
        left &= ~(1 << index)
        # Each piece comes at once, and its reader moves on: the one at the front must not have all of them.
        picker.move_reader((0, 10, 30).index(index - index % 10), index + 1)

    assert turns == [0, 10, 30, 1, 11, 31, 2, 12, 32]


def test_a_window_of_no_pieces_or_no_share_leaves_rarest_first_alone():
    peers = {"a": "####", "b": "###."}
    assert set(picked(make_picker(peers, readers=(0,), window=0), "####")) == {3}
    assert set(picked(make_picker(peers, readers=(0,), share=0.0), "####")) == {3}


def test_a_reader_that_moved_on_or_closed_is_not_served_at_its_old_place():
    picker = make_picker({"a": "####", "b": "###."}, readers=(0,))
    picker.move_reader(0, 1)
    assert set(picked(picker, "####")) == {1}
    picker.close_reader(0)
    assert set(picked(picker, "####")) == {3}
    picker.close_reader(0)  # twice is harmless


def test_in_a_large_blob_every_piece_has_its_chance_and_only_candidates_are_picked():
    pieces = 2 * SAMPLE_MAX
    picker = make_picker({"a": "#" * pieces})
    candidates = bitfield.full(pieces) & ~bits(".#" * 10)
    counts = Counter(picker.pick(candidates) for _ in range(6_000))
    assert set(counts) == set(bitfield.indices(candidates))


def test_in_a_large_blob_the_pick_is_the_rarest_of_a_large_sample():
    pieces = 4 * SAMPLE_MAX
    rare = pieces // 3
    picker = make_picker({"a": "#" * pieces, "b": "#" * rare + "." + "#" * (pieces - rare - 1)})
    counts = Counter(picker.pick(bitfield.full(pieces)) for _ in range(400))
    # A sample of a quarter of the pieces holds the rare one every fourth time.
    assert 60 < counts[rare] < 140


@given(
    st.integers(1, 12).flatmap(
        lambda n: st.tuples(st.just(n), st.lists(st.integers(0, (1 << n) - 1), max_size=6))
    ),
    st.randoms(use_true_random=False),
)
def test_availability_is_what_counting_gives(
    case: tuple[int, list[int]], rng: random.Random
) -> None:
    pieces, haves = case
    availability = Availability(pieces)
    for have in haves:
        availability.add(have)
    for _ in range(20):
        if haves and rng.random() < 0.2:
            availability.remove(haves.pop(rng.randrange(len(haves))))
        elif haves:
            peer, index = rng.randrange(len(haves)), rng.randrange(pieces)
            haves[peer] = availability.gain(haves[peer], index)
        for index in range(pieces):
            assert availability[index] == sum((have >> index) & 1 for have in haves)


def test_tables_read_as_they_are_written():
    assert table(bits("#.##"), 4) == "#.##"
