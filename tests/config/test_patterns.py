"""Patterns of repositories: what they match, and whether there is anything that they can match."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmpull.patterns import compile_pattern, some_name_matches
from swarmpull.registry.names import is_repository


@pytest.mark.parametrize(
    ("patterns", "possible"),
    [
        (["**"], True),
        (["team/**"], True),
        (["team/*"], True),
        (["-a/*"], False),
        (["a..b"], False),
        (["a__b"], True),
        (["a___b"], False),
        (["a---b"], True),
        (["_*"], False),
        (["a."], False),
        (["team/*", "team/x/*"], False),
        (["team/**", "team/x/*"], True),
        (["a*", "b*"], False),
        (["a*", "*b"], True),
        (["*/*", "a"], False),
    ],
)
def test_whether_there_can_be_a_name(patterns: list[str], possible: bool) -> None:
    assert some_name_matches(*patterns) is possible


@given(
    st.from_regex(r"[a-c]([._-]?[a-c]){0,3}(/[a-c]([._-]?[a-c]){0,2}){0,2}", fullmatch=True),
    st.lists(st.text("abc/._-*", min_size=1, max_size=8), min_size=1, max_size=2),
)
def test_patterns_that_match_a_name_are_known_to_match_something(
    name: str, patterns: list[str]
) -> None:
    if is_repository(name) and all(compile_pattern(each).fullmatch(name) for each in patterns):
        assert some_name_matches(*patterns)


@given(st.lists(st.tuples(st.integers(0, 20), st.sampled_from(["*", "**"])), max_size=3))
def test_a_name_with_parts_replaced_by_wildcards_can_still_be_met(cuts) -> None:
    name = "team/some-app/part_1.2"
    pattern = name
    for at, wildcard in cuts:
        pattern = pattern[:at] + wildcard + pattern[at + 1 :]
    if compile_pattern(pattern).fullmatch(name):
        assert some_name_matches(pattern, name)
