from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmpull.digest import Digest
from swarmpull.errors import InvalidMetainfo
from swarmpull.swarm.metainfo import (
    MIB,
    PIECE_HASH_BYTES,
    PIECE_LENGTH_MAX,
    PIECE_LENGTH_MIN,
    PIECES_MAX,
    PIECES_TARGET,
    BlobShape,
    GrowingMetainfo,
    Metainfo,
    piece_count_for,
    piece_length_for,
)

BLOB = Digest.of(b"blob")


def make(length: int, piece_length: int | None = None) -> Metainfo:
    piece_length = piece_length or piece_length_for(length)
    hashes = bytes(PIECE_HASH_BYTES * piece_count_for(length, piece_length))
    return Metainfo(BLOB, length, piece_length, hashes)


@pytest.mark.parametrize(
    ("length", "piece_length"),
    [
        (0, 4 * MIB),
        (1, 4 * MIB),
        (PIECES_TARGET * 4 * MIB, 4 * MIB),
        (PIECES_TARGET * 4 * MIB + 1, 8 * MIB),
        (PIECES_TARGET * 64 * MIB, 64 * MIB),
        (1 << 42, 64 * MIB),
    ],
)
def test_the_piece_length_is_a_step_function_of_the_blob_length(length, piece_length):
    assert piece_length_for(length) == piece_length


@given(st.integers(0, PIECES_TARGET * PIECE_LENGTH_MAX))
def test_the_metainfo_of_any_blob_up_to_256_gib_fits_a_message(length: int) -> None:
    assert piece_count_for(length, piece_length_for(length)) <= PIECES_TARGET


@given(st.integers(0, 40 * PIECE_LENGTH_MIN))
def test_the_pieces_cover_the_blob_without_gaps(length: int) -> None:
    metainfo = make(length)
    position = 0
    for index in range(metainfo.piece_count):
        assert metainfo.piece_offset(index) == position
        assert metainfo.piece_size(index) > 0
        position += metainfo.piece_size(index)
    assert position == length


@given(st.integers(1, 9 * PIECE_LENGTH_MIN), st.data())
def test_pieces_of_a_range_are_those_that_hold_its_bytes(length: int, data: st.DataObject) -> None:
    metainfo = make(length)
    start = data.draw(st.integers(0, length - 1))
    stop = data.draw(st.integers(start, length))
    touched = [
        index
        for index in range(metainfo.piece_count)
        if max(start, metainfo.piece_offset(index))
        < min(stop, metainfo.piece_offset(index) + metainfo.piece_size(index))
    ]
    assert list(metainfo.pieces_of(start, stop)) == touched


def test_an_empty_blob_has_no_pieces():
    assert make(0).piece_count == 0


@pytest.mark.parametrize("index", [-1, 2, 3])
def test_there_is_no_size_of_a_piece_that_is_not_there(index):
    with pytest.raises(IndexError):
        make(PIECE_LENGTH_MIN + 1).piece_size(index)


def test_piece_hashes_are_found_by_index():
    hashes = b"a" * 32 + b"b" * 32
    metainfo = Metainfo(BLOB, PIECE_LENGTH_MIN + 1, PIECE_LENGTH_MIN, hashes)
    assert metainfo.piece_hash(0) == b"a" * 32
    assert metainfo.piece_hash(1) == b"b" * 32


@pytest.mark.parametrize(
    ("length", "piece_length", "hashes", "complaint"),
    [
        (-1, 4 * MIB, b"", "length is -1"),
        (1, 0, bytes(32), "piece length is 0"),
        (1, 1 * MIB, bytes(32), "powers of two"),
        (1, 5 * MIB, bytes(32), "powers of two"),
        (1, 128 * MIB, bytes(32), "powers of two"),
        (1, 4 * MIB, b"", "0 bytes of hashes for 1 pieces"),
        (1, 4 * MIB, bytes(64), "64 bytes of hashes for 1 pieces"),
        (0, 4 * MIB, bytes(32), "32 bytes of hashes for 0 pieces"),
        (4 * MIB * PIECES_MAX + 1, 4 * MIB, b"", "too many"),
    ],
)
def test_metainfo_that_contradicts_itself_is_refused(length, piece_length, hashes, complaint):
    with pytest.raises(InvalidMetainfo, match=complaint) as caught:
        Metainfo(BLOB, length, piece_length, hashes)
    assert str(BLOB) in str(caught.value)


# --- metainfo that grows ----------------------------------------------------------------------


def hash_of(index: int) -> bytes:
    return bytes([index]) * PIECE_HASH_BYTES


@given(order=st.permutations(range(6)), cut=st.integers(0, 6))
def test_hashes_may_become_known_in_any_order(order, cut):
    growing = GrowingMetainfo(BLOB, 5 * PIECE_LENGTH_MIN + 1, PIECE_LENGTH_MIN)
    for index in order[:cut]:
        assert growing.add(index, hash_of(index))
        assert not growing.add(index, hash_of(index)), "once is enough"
    assert growing.position == cut
    assert growing.is_complete == (cut == 6)
    for index in order[cut:]:
        assert growing.piece_hash(index) is None
        growing.add(index, hash_of(index))

    assert [index for index, _ in growing.entries_since(cut, 100)] == list(order[cut:])
    assert growing.entries_since(1, 2) == [(i, hash_of(i)) for i in order[1:3]]
    joined = b"".join(map(hash_of, range(6)))
    assert growing.complete() == Metainfo(BLOB, growing.length, PIECE_LENGTH_MIN, joined)


def test_growing_metainfo_believes_whoever_came_first():
    growing = GrowingMetainfo(BLOB, 2 * PIECE_LENGTH_MIN, PIECE_LENGTH_MIN)
    growing.add(1, hash_of(1))
    for index, piece_hash in ((1, hash_of(2)), (2, hash_of(2)), (-1, hash_of(0)), (0, b"short")):
        with pytest.raises(InvalidMetainfo, match=f"piece {index}"):
            growing.add(index, piece_hash)
    assert growing.piece_hash(1) == hash_of(1)
    assert growing.complete() is None


def test_metainfo_that_contradicts_is_not_taken_over_in_part():
    growing = GrowingMetainfo(BLOB, 2 * PIECE_LENGTH_MIN, PIECE_LENGTH_MIN)
    growing.add(1, hash_of(1))
    other = Metainfo(BLOB, growing.length, PIECE_LENGTH_MIN, hash_of(0) + hash_of(9))
    with pytest.raises(InvalidMetainfo):
        growing.add_all(other)
    assert growing.piece_hash(0) is None

    same = Metainfo(BLOB, growing.length, PIECE_LENGTH_MIN, hash_of(0) + hash_of(1))
    growing.add_all(same)
    assert growing.complete() == same


def test_growing_metainfo_of_complete_metainfo_is_complete():
    metainfo = Metainfo(BLOB, 2 * PIECE_LENGTH_MIN, PIECE_LENGTH_MIN, hash_of(0) + hash_of(1))
    assert GrowingMetainfo.from_shape(metainfo).complete() == metainfo
    shape = BlobShape.of(BLOB, 2 * PIECE_LENGTH_MIN)
    assert GrowingMetainfo.from_shape(shape).position == 0
