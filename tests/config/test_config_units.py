"""Sizes and durations."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmpull.units import format_duration, format_size, parse_duration, parse_size

UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
DECIMAL_UNITS = {"kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@given(st.integers(0, 10**15 - 1), st.sampled_from(sorted((UNITS | DECIMAL_UNITS).items())))
def test_a_whole_number_and_a_unit_multiply(number: int, unit: tuple[str, int]) -> None:
    name, factor = unit
    assert parse_size(f"{number}{name}") == number * factor
    assert parse_size(f" {number} {name.lower()} ") == number * factor


@given(st.integers(0, 10**15 - 1))
def test_a_number_alone_is_bytes(number: int) -> None:
    assert parse_size(str(number)) == number


@pytest.mark.parametrize(
    ("text", "size"),
    [("4MiB", 4 << 20), ("1.5GiB", 3 << 29), ("0.5KiB", 512), ("1kb", 1000), ("0", 0)],
)
def test_sizes_as_people_write_them(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "MiB", "-1", "1e3", "4 M i B", "4Mi", "4MiB/s", "0x10", "1,5MB", "nan", "٣MB", "1" * 16],
)
def test_what_is_not_a_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_size(text)
    assert "such as 512KiB, 4MiB" in str(caught.value)


def test_a_fraction_of_a_byte_is_refused() -> None:
    with pytest.raises(ValueError) as caught:
        parse_size("1.5B")
    assert str(caught.value) == "must be a whole number of bytes: '1.5B'"


@given(st.text())
def test_any_text_is_parsed_or_refused_with_a_value_error(text: str) -> None:
    for parse in (parse_size, parse_duration):
        try:
            parsed = parse(text)
        except ValueError:
            continue
        assert parsed >= 0


@given(st.integers(0, 1 << 45))
def test_a_formatted_size_is_close_to_the_size(size: int) -> None:
    shown = parse_size_roughly(format_size(size))
    assert abs(shown - size) <= max(size * 0.006, 0)


def parse_size_roughly(text: str) -> float:
    number, unit = text.split()
    return float(number) * UNITS[unit]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30s", 30.0), ("500ms", 0.5), ("5m", 300.0), ("2h", 7200.0), ("1d", 86400.0), ("0", 0.0)],
)
def test_durations_as_people_write_them(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "30", "s", "-1s", "1w", "inf", "1.5"])
def test_what_is_not_a_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_duration(text)
    assert "a duration with its unit" in str(caught.value)


@given(st.integers(0, 10**12))
def test_a_formatted_duration_parses_to_the_same_milliseconds(milliseconds: int) -> None:
    seconds = milliseconds / 1000
    assert parse_duration(format_duration(seconds)) == seconds
