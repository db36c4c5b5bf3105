from __future__ import annotations

import pytest

from swarmpull.registry.browsers import Asked, refuse_page, refuse_type

TYPES = frozenset({"application/json"})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"site": "none"}, ""),
        ({"site": "same-origin"}, ""),
        ({"site": "same-site"}, "pages of other sites"),
        ({"site": "cross-site"}, "pages of other sites"),
        ({"origin": "null"}, "pages of 'null'"),
        ({"origin": "http://127.0.0.1:7450"}, "pages of 'http://127.0.0.1:7450'"),
        ({"host": "evil.example"}, "no name of an address on loopback"),
        ({"host": None}, "no name of an address on loopback"),
        ({"host": "127.0.0.1.evil.example:7450"}, "no name of an address on loopback"),
        ({"host": "LOCALHOST.:1"}, ""),
        ({"host": "index.localhost"}, ""),
        ({"host": "[::1]:7450"}, ""),
        # Registries send webhooks under any name; a page that does has an origin, or is no JSON.
        ({"host": "index.example", "method": "POST"}, ""),
        # In a network every name is right.
        ({"host": "index.example", "address": "10.0.0.7"}, ""),
        ({"host": "index.example", "address": "::1"}, "no name of an address on loopback"),
        ({"host": "index.example", "address": ""}, ""),
    ],
)
def test_what_a_page_sends_is_refused_and_what_programs_send_is_not(
    changes: dict[str, str], reason: str
) -> None:
    given = {"method": "GET", "address": "127.0.0.1", "host": "127.0.0.1:7450"} | changes
    refusal = refuse_page(Asked(**given))

    assert reason in refusal
    assert bool(refusal) == bool(reason)


@pytest.mark.parametrize(
    ("content_type", "is_taken"),
    [
        ("application/json", True),
        ("Application/JSON; charset=utf-8", True),
        ("text/plain;application/json", False),
        ("application/x-www-form-urlencoded", False),
        ("", False),
        (None, False),
    ],
)
def test_a_body_is_taken_by_its_type(content_type: str | None, is_taken: bool) -> None:
    asked = Asked(method="POST", address="127.0.0.1", content_type=content_type)

    assert (refuse_type(asked, TYPES) == "") == is_taken
