"""Byte ranges: what is asked for, what is refused, and how many ranges look as one body."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmpull.registry.ranges import (
    RANGES_MAX,
    ByteRange,
    RangeNotSatisfiable,
    multipart,
    parse_content_range,
    parse_range,
)

from .raw import parse_multipart


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("bytes=0-", [(0, 100)]),
        ("bytes=0-0", [(0, 1)]),
        ("bytes=99-", [(99, 100)]),
        ("bytes=10-19", [(10, 20)]),
        ("bytes=10-1000000", [(10, 100)]),
        ("bytes=-1", [(99, 100)]),
        ("bytes=-1000", [(0, 100)]),
        ("BYTES=0-1", [(0, 2)]),
        ("bytes=0-1,5-6, -3", [(0, 2), (5, 7), (97, 100)]),
        ("bytes= 0-1 ,\t3-4", [(0, 2), (3, 5)]),
        ("bytes=,0-1,,", [(0, 2)]),
        # In the order of the request, and what touches stays apart.
        ("bytes=50-59,0-9,10-19", [(50, 60), (0, 10), (10, 20)]),
        # What lies outside is left out as long as something lies inside.
        ("bytes=0-1,200-300", [(0, 2)]),
        ("bytes=0-" + "9" * 5000, [(0, 100)]),
    ],
)
def test_a_range_is_what_the_header_says(header: str, expected: list[tuple[int, int]]) -> None:
    ranges = parse_range(header, 100)
    assert ranges is not None
    assert [(r.start, r.stop) for r in ranges] == expected


@pytest.mark.parametrize("header", [None, "lines=1-2", "items=0-"])
def test_without_a_byte_range_the_answer_is_the_whole_blob(header: str | None) -> None:
    assert parse_range(header, 100) is None


def test_of_an_empty_blob_every_range_is_the_whole() -> None:
    assert parse_range("bytes=0-", 0) is None


@pytest.mark.parametrize(
    "header",
    [
        "bytes=100-",
        "bytes=100-200",
        "bytes=-0",
        "bytes=5-4",
        "bytes=",
        "bytes=-",
        "bytes=a-b",
        "bytes=1",
        "bytes=0-1-2",
        "bytes=+1-2",
        "bytes=٣-٤",
        "bytes",
        "",
        "bytes=" + "9" * 5000 + "-",
        "bytes=0-99,0-99",
        "bytes=0-,0-,0-",
        "bytes=" + ",".join(["0-0"] * (RANGES_MAX + 1)),
    ],
)
def test_an_absurd_range_is_refused(header: str) -> None:
    with pytest.raises(RangeNotSatisfiable) as caught:
        parse_range(header, 100)
    assert "100 bytes" in str(caught.value)


@given(st.text(alphabet="0123456789-, =bytes", max_size=40), st.integers(0, 1000))
def test_any_header_yields_ranges_inside_the_blob_or_an_error(header: str, length: int) -> None:
    try:
        ranges = parse_range("bytes=" + header, length)
    except RangeNotSatisfiable:
        return
    if ranges is None:
        assert length == 0
        return
    assert ranges
    assert all(0 <= r.start < r.stop <= length for r in ranges)
    assert sum(r.length for r in ranges) <= length


@given(st.data(), st.integers(1, 10_000))
def test_one_range_selects_what_slicing_selects(data: st.DataObject, length: int) -> None:
    content = bytes(index % 251 for index in range(length))
    start = data.draw(st.integers(0, length - 1))
    end = data.draw(st.integers(start, length * 2))
    ranges = parse_range(f"bytes={start}-{end}", length)
    assert ranges is not None
    assert content[ranges[0].start : ranges[0].stop] == content[start : end + 1]


@given(st.lists(st.integers(0, 999), min_size=2, max_size=12, unique=True))
def test_a_multipart_body_has_the_length_that_it_declares_and_can_be_taken_apart(
    starts: list[int],
) -> None:
    content = bytes(index % 251 for index in range(1000))
    ranges = [ByteRange(start, start + 1) for start in starts]
    layout = multipart(ranges, 1000, part_type="application/octet-stream", boundary="=bound=")
    body = b"".join(
        preamble + content[r.start : r.stop]
        for preamble, r in zip(layout.preambles, ranges, strict=True)
    )
    body += layout.epilogue
    assert len(body) == layout.length
    assert parse_multipart(layout.content_type, body) == [
        (f"bytes {start}-{start}/1000", content[start : start + 1]) for start in starts
    ]


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("0-0", ByteRange(0, 1)),
        ("10-19", ByteRange(10, 20)),
        ("bytes 10-19/200", ByteRange(10, 20)),
        ("bytes 10-19/*", ByteRange(10, 20)),
        ("bytes=10-19", ByteRange(10, 20)),
    ],
)
def test_the_content_range_of_a_chunk_includes_both_ends(header: str, expected: ByteRange) -> None:
    assert parse_content_range(header) == expected


@pytest.mark.parametrize(
    "header", ["", "-", "5-4", "a-b", "0-", "-5", "0-" + "9" * 5000, "0-1,2-3"]
)
def test_a_malformed_content_range_is_refused(header: str) -> None:
    with pytest.raises(ValueError, match="Content-Range"):
        parse_content_range(header)
