"""What several tests of hosts need around them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import structlog

from .peers import assert_no_descriptor_leaked, open_descriptors


@pytest.fixture
def descriptors() -> Iterator[None]:
    """The test must close every descriptor that it opens."""
    before = open_descriptors()
    yield
    assert_no_descriptor_leaked(before)


@pytest.fixture
def logs() -> Iterator[list[dict]]:
    """The log of the test, an entry for each line."""
    with structlog.testing.capture_logs() as entries:
        yield entries
