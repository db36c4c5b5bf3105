"""Sizes and durations."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmpull.units import (
    format_duration,
    format_rate,
    format_size,
    parse_duration,
    parse_rate,
    parse_size,
)

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
    for parse in (parse_size, parse_rate, parse_duration):
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


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("100MB/s", 1e8),
        (" 1.5 MiB/s ", 3 << 19),
        ("30kb", 30_000),
        ("1", 1),
        ("unlimited", math.inf),
    ],
)
def test_rates_as_people_write_them(text: str, rate: float) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize(
    "text", ["", "0", "0MB/s", "-1", "fast", "10Mbit/s", "1/s/s", "inf", "nan", "5MB/min", "1.5B/s"]
)
def test_what_is_not_a_rate_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_rate(text)
    assert "such as 500kB/s, 100MB/s" in str(caught.value)
    assert str(caught.value).endswith(repr(text))


@pytest.mark.parametrize(
    ("rate", "text"),
    [
        (1e8, "100MB/s"),
        (1.25e9, "1250MB/s"),
        (float(8 << 20), "8MiB/s"),
        (30_000.0, "30kB/s"),
        (1.0, "1B/s"),
        (1025.0, "1025B/s"),
        (math.inf, "unlimited"),
    ],
)
def test_rates_are_shown_in_the_largest_unit_that_fits(rate: float, text: str) -> None:
    assert format_rate(rate) == text


@given(st.integers(1, 10**15 - 1))
def test_a_rate_that_is_shown_reads_back(rate: int) -> None:
    assert parse_rate(format_rate(rate)) == rate
