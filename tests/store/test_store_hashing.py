"""Piece hashes and the file form of metainfo."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmpull.digest import Digest
from swarmpull.store import sidecars
from swarmpull.store.hashing import FileHasher, PieceHasher, hash_piece, hash_range
from swarmpull.swarm.metainfo import PIECE_LENGTH_MIN as PIECE
from swarmpull.swarm.metainfo import Metainfo, piece_count_for


def test_the_piece_hash_is_that_of_the_blake3_specification() -> None:
    # From the test vectors of the BLAKE3 repository: the empty input.
    expected = "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"

    assert hash_piece(b"").hex() == expected


@pytest.mark.parametrize("length", [0, 1, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE])
@pytest.mark.parametrize("chunk", [1 << 20, PIECE, PIECE + 7, 10 * PIECE])
def test_pieces_hashed_on_the_way_in_are_those_of_the_whole(content_of, length, chunk) -> None:
    content = content_of(length)
    hasher = PieceHasher()

    for start in range(0, length, chunk):
        hasher.update(content.data[start : start + chunk])

    assert hasher.piece_hashes() == content.metainfo.piece_hashes


def test_a_blob_with_longer_pieces_has_to_be_read_again() -> None:
    hasher = PieceHasher()
    hasher.length = PIECE * 4096 + 1

    assert hasher.piece_hashes() is None


def test_hashing_stops_where_the_file_ends(tmp_path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    hasher = FileHasher("sha256")

    with (tmp_path / "file").open("rb") as file:
        hasher.advance(file.fileno(), 3)
        assert hasher.offset == 3
        with pytest.raises(OSError, match="truncated"):
            hash_range(file.fileno(), 3, 9, hasher)

    assert hasher.digest() == Digest.of(b"12345")


@st.composite
def metainfos(draw) -> Metainfo:
    algorithm = draw(st.sampled_from(["sha256", "sha512"]))
    digest = Digest.of(draw(st.binary(max_size=8)), algorithm)
    piece_length = draw(st.sampled_from([PIECE, 2 * PIECE, 16 * PIECE]))
    length = draw(st.integers(0, 5 * piece_length))
    count = piece_count_for(length, piece_length)
    return Metainfo(digest, length, piece_length, os.urandom(32 * count))


@given(metainfos(), st.binary(max_size=20))
def test_a_sidecar_comes_back_as_it_was_written(metainfo, rest) -> None:
    data = sidecars.encode(metainfo)

    assert sidecars.decode(data + rest) == (metainfo, len(data))


@given(metainfos(), st.data())
def test_no_damage_to_a_sidecar_goes_unseen(metainfo, data) -> None:
    good = sidecars.encode(metainfo)
    position = data.draw(st.integers(0, len(good) - 1))
    flip = data.draw(st.integers(1, 255))
    flipped = good[:position] + bytes([good[position] ^ flip]) + good[position + 1 :]

    for damaged in (flipped, good[:position]):
        with pytest.raises(sidecars.DamagedSidecar):
            sidecars.decode(damaged)


@given(st.binary(max_size=300))
def test_any_bytes_are_either_a_sidecar_or_damaged(data) -> None:
    for candidate in (data, sidecars.MAGIC + data):
        with pytest.raises(sidecars.DamagedSidecar):
            sidecars.decode(candidate)


def test_a_sidecar_with_a_good_checksum_and_nonsense_inside_is_damaged() -> None:
    name = b"md5:00"
    body = sidecars.MAGIC + bytes([len(name)]) + name + bytes(12)

    with pytest.raises(sidecars.DamagedSidecar):
        sidecars.decode(body + hash_piece(body))


def test_the_file_form_does_not_change_unseen() -> None:
    metainfo = Metainfo(Digest.of(b""), 1, PIECE, bytes(range(32)))

    assert sidecars.encode(metainfo).hex() == (
        "737761726d70756c6c2d6d6574612d31"
        "47" + str(Digest.of(b"")).encode().hex() + "0000000000000001"
        "00400000"
        "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"
        "7d6d1d90e6371f9dcf4e8102d5f3473af20b02ccf5b61de6538b9e8750629ef1"
    )
