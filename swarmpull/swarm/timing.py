"""How long a piece should take: an estimate that follows what was measured."""

from __future__ import annotations

from typing import Final

# Weights of a new sample and the four deviations are those of TCP's retransmission timer (RFC 6298,
# section 2), which solves the same problem: late means later than this path usually is.
MEAN_GAIN: Final = 1 / 8
DEVIATION_GAIN: Final = 1 / 4
DEVIATIONS: Final = 4.0
# Before the first sample: 4 MiB at 1 MB/s.
TIMEOUT_INITIAL: Final = 4.0
# Below this a hiccup of the host (a busy disk, a paused process) would look like a dead peer.
TIMEOUT_MIN: Final = 0.5
TIMEOUT_MAX: Final = 60.0
# A piece whose bytes keep arriving is given this long from one report of progress to the next at the least:
# the shell reports once a second or, on a link where 16 KiB take longer, each time so many have come.
PROGRESS_TIMEOUT_MIN: Final = 10.0


# Arrivals are counted over so many seconds at the least: long enough for a score of pieces on a fast link.
ARRIVALS_WINDOW: Final = 0.25


class PathTiming:
    """How many pieces come in the time of a round trip: the bandwidth-delay product of a host's paths."""

    __slots__ = ("_arrived", "_rate", "_round_trip", "_since")

    def __init__(self) -> None:
        self._round_trip: float | None = None
        self._rate = 0.0
        self._since = float("-inf")
        self._arrived = 0

    def answered(self, seconds: float) -> None:
        """A peer answered at once, and that many seconds later the answer was here."""
        if self._round_trip is None:
            self._round_trip = seconds
        else:
            self._round_trip += MEAN_GAIN * (seconds - self._round_trip)

    def arrived(self, now: float) -> bool:
        """A piece has come; whether that made a new estimate."""
        self._arrived += 1
        elapsed = now - self._since
        if elapsed < ARRIVALS_WINDOW:
            return False
        self._rate = self._arrived / elapsed
        self._since, self._arrived = now, 0
        return True

    def pieces(self) -> int:
        """So many claims, or their pieces, are only on their way; 0 as long as nothing is known."""
        return 0 if self._round_trip is None else round(self._round_trip * self._rate)


class PieceTiming:
    """Mean and deviation of the time from a claim to its piece, in seconds."""

    __slots__ = ("_common", "_deviation", "_lateness", "_mean", "_scale")

    def __init__(self, common: PieceTiming | None = None, scale: float = 1.0) -> None:
        """``common`` is what is expected of a peer that has not given a piece yet.

        It is about pieces of the smallest length; these are ``scale`` times as long.
        """
        self._common = common
        self._scale = scale
        self._mean: float | None = None
        self._deviation = 0.0
        self._lateness = 1.0

    def add(self, seconds: float, *, is_short: bool = False) -> None:
        """A piece arrived that many seconds after its claim; a short one tells nothing of others."""
        self._lateness = 1.0
        if self._common is not None and not is_short:
            self._common.add(seconds / self._scale)
        if self._mean is None:
            self._mean, self._deviation = seconds, seconds / 2
            return
        error = seconds - self._mean
        self._mean += MEAN_GAIN * error
        self._deviation += DEVIATION_GAIN * (abs(error) - self._deviation)

    def back_off(self) -> None:
        """A claim was late: allow twice the time until a piece arrives, as on a link that got slower."""
        self._lateness = min(self._lateness * 2, TIMEOUT_MAX)

    @property
    def is_measured(self) -> bool:
        """Whether there was a sample."""
        return self._mean is not None

    def usual(self) -> float:
        """Seconds within which nearly all pieces arrive, with no lower bound.

        For what costs little when it is wrong: to go on with something else meanwhile.
        """
        expected = TIMEOUT_INITIAL
        if self._mean is not None:
            expected = self._mean + DEVIATIONS * self._deviation
        return min(expected * self._lateness, TIMEOUT_MAX)

    def timeout(self) -> float:
        """Seconds after which a claim is late."""
        if self._mean is None:
            common = TIMEOUT_INITIAL if self._common is None else 2 * self._common.timeout()
            expected = common * self._scale
        else:
            expected = max(self._mean + DEVIATIONS * self._deviation, TIMEOUT_MIN)
        return min(expected * self._lateness, TIMEOUT_MAX)

    def progress_timeout(self) -> float:
        """Seconds without another byte after which a claim is late of which some have arrived."""
        return max(self.timeout(), PROGRESS_TIMEOUT_MIN)
