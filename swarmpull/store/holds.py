"""What must not be evicted just now, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from enum import Enum
from types import TracebackType
from typing import Self

from swarmpull.digest import Digest


class Pin(Enum):
    """Why a blob must stay."""

    READING = "reading"
    SENDING = "sending"
    DOWNLOADING = "downloading"
    NOT_WRITTEN_BACK = "not written back"


class Hold:
    """Keeps one blob from being evicted until `release`, or as a context manager."""

    def __init__(self, holds: Holds, digest: Digest, pin: Pin) -> None:
        self._holds = holds
        self._digest = digest
        self._pin = pin
        self._held = True

    def release(self) -> None:
        """Let go; releasing twice is allowed."""
        if self._held:
            self._held = False
            self._holds.release(self._digest, self._pin)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()


class Holds:
    """The holds of one store, counted by digest and pin; for the event loop's thread only.

    A digest may be held before its blob is there.
    """

    def __init__(self) -> None:
        self._counts: dict[Digest, Counter[Pin]] = {}

    def take(self, digest: Digest, pin: Pin) -> Hold:
        """Hold a blob until the returned hold is released."""
        self._counts.setdefault(digest, Counter())[pin] += 1
        return Hold(self, digest, pin)

    def release(self, digest: Digest, pin: Pin) -> None:
        """By `Hold.release`."""
        counts = self._counts[digest]
        counts[pin] -= 1
        if not counts[pin]:
            del counts[pin]
        if not counts:
            del self._counts[digest]

    def has(self, digest: Digest, pin: Pin) -> bool:
        """Whether somebody holds a blob for this reason."""
        return pin in self._counts.get(digest, ())

    def pins(self) -> Mapping[Digest, Pin]:
        """One reason for each digest that is held."""
        return {digest: next(iter(counts)) for digest, counts in self._counts.items()}
