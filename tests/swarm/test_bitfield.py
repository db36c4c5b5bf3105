from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmpull.errors import ProtocolError
from swarmpull.swarm import bitfield

bitfields = st.integers(0, 300).flatmap(
    lambda count: st.tuples(st.just(count), st.integers(0, (1 << count) - 1))
)


@given(bitfields)
def test_the_wire_form_comes_back_as_it_was(case: tuple[int, int]) -> None:
    count, bits = case
    data = bitfield.to_bytes(bits, count)
    assert len(data) == (count + 7) // 8
    assert bitfield.from_bytes(data, count) == bits


@given(bitfields)
def test_indices_are_the_set_bits_lowest_first(case: tuple[int, int]) -> None:
    count, bits = case
    assert list(bitfield.indices(bits)) == [i for i in range(count) if (bits >> i) & 1]


def test_a_hundred_thousand_pieces_take_no_quadratic_time():
    # Bit by bit off an integer this is most of a second; by its digits it is 30 ms.
    assert sum(1 for _ in bitfield.indices(bitfield.full(1 << 17))) == 1 << 17


def test_piece_i_is_bit_i_mod_8_of_byte_i_div_8():
    assert bitfield.to_bytes(1 << 0 | 1 << 9, 10) == bytes([0b1, 0b10])


@pytest.mark.parametrize(
    ("data", "count"),
    [(b"", 1), (b"\0\0", 8), (b"\0", 9), (b"\0", 0), (b"\x02", 1), (b"\xff\x04", 10)],
)
def test_a_bitfield_of_the_wrong_length_or_with_spare_bits_set_is_refused(data, count):
    with pytest.raises(ProtocolError):
        bitfield.from_bytes(data, count)


def test_nothing_is_full_when_there_are_no_pieces():
    assert bitfield.full(0) == 0
    assert bitfield.to_bytes(0, 0) == b""
    assert bitfield.from_bytes(b"", 0) == 0
