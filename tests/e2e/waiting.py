"""Waiting for a condition of another process, which can only be polled."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

POLL_INTERVAL: Final = 0.05


def wait_until(condition: Callable[[], bool], what: str, *, timeout: float = 30.0) -> None:
    """Poll until ``condition()`` holds.  Raises AssertionError that names ``what`` after ``timeout``."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"waited {timeout:g} s in vain until {what}"
        time.sleep(POLL_INTERVAL)
