"""Which pieces of a cold blob to ask the backend for next.  Pure: no clock, no sockets.

A few workers share one blob, each with a connection to the backend.  A worker takes a `Run` of contiguous
missing pieces and asks for it with one request; the request costs a round trip, so runs are long, but the
first ones are short, so that somebody who reads from the beginning is fed by all workers at once.  The
earliest missing piece goes first, except that pieces which readers wait for go before all others.

A run may get shorter while its worker reads: its end is taken over by a worker that has nothing else to do,
so that all of them finish together, or it is cut after the present piece because an urgent one needs the
connection.  The worker looks at `Run.stop` after every piece.
"""

from __future__ import annotations

from typing import Final

import attrs

from swarmpull.swarm import bitfield

# At 50 MB/s and a round trip of 20 ms, 32 MiB lose 3 % to the round trip.
RUN_BYTES_MAX: Final = 32 << 20
# An urgent piece is most often followed by the one after it.
URGENT_RUN: Final = 2
# Pieces that readers wait for, at most; those that were asked for first are forgotten first.
URGENT_MAX: Final = 256


@attrs.define(eq=False)
class Run:
    """Contiguous pieces that one worker fetches with one request.

    Attributes:
        next: the piece that is being fetched.
        stop: where the run ends, excluded; gets smaller when others take over its end.
        urgent: whether a reader waits for its beginning.
    """

    next: int
    stop: int
    urgent: bool = False

    @property
    def left(self) -> int:
        """Pieces still to be fetched, the present one included."""
        return self.stop - self.next

    def holds(self, index: int) -> bool:
        return self.next <= index < self.stop


class FetchPlan:
    """The pieces of one blob that are missing, and who fetches which.

    Attributes:
        missing: the pieces that nobody has fetched yet, as a bitfield; those under way included.
    """

    def __init__(self, missing: int, *, piece_length: int, workers: int) -> None:
        self.missing = missing
        self._workers = workers
        self._run_max = max(1, RUN_BYTES_MAX // piece_length)
        self._runs: list[Run] = []
        self._urgent: dict[int, None] = {}
        self._begun = 0

    @property
    def is_done(self) -> bool:
        """Whether every piece has been fetched."""
        return not self.missing

    @property
    def runs(self) -> tuple[Run, ...]:
        """What is being fetched."""
        return tuple(self._runs)

    def next_run(self) -> Run | None:
        """Work for a worker that has none; None when the others fetch all that is missing."""
        run = self._urgent_run() or self._earliest_run() or self._second_half()
        if run is not None:
            self._runs.append(run)
        return run

    def fetched(self, run: Run) -> bool:
        """The present piece of a run is stored; whether the worker is to go on to the next one.

        A run that has come to its end is over.
        """
        self.missing &= ~(1 << run.next)
        self._urgent.pop(run.next, None)
        run.next += 1
        if run.left > 0:
            return True
        self.give_up(run)
        return False

    def give_up(self, run: Run) -> None:
        """Nobody fetches this run any more: what is left of it is free for others."""
        if run in self._runs:
            self._runs.remove(run)

    def urge(self, index: int) -> None:
        """Somebody waits for a piece: it is fetched next, by a worker that is free or is made so.

        Nothing changes when it is fetched already, just now, or right after that.
        """
        if not self.missing >> index & 1:
            return
        holder = next((run for run in self._runs if run.holds(index)), None)
        if holder is not None and index <= holder.next + 1:
            return
        self._urgent[index] = None
        if len(self._urgent) > URGENT_MAX:
            del self._urgent[next(iter(self._urgent))]
        is_free = len(self._runs) < self._workers
        if holder is not None:
            holder.stop = index if is_free else holder.next + 1
        elif not is_free and (victim := self._least_needed()) is not None:
            victim.stop = victim.next + 1

    def _taken(self) -> int:
        taken = 0
        for run in self._runs:
            taken |= bitfield.full(run.left) << run.next
        return taken

    def _urgent_run(self) -> Run | None:
        free = self.missing & ~self._taken()
        for index in self._urgent:
            if free >> index & 1:
                longest = URGENT_RUN
                while longest < self._run_max and index + longest in self._urgent:
                    longest += 1
                return Run(index, index + _length(free, index, longest), urgent=True)
        return None

    def _earliest_run(self) -> Run | None:
        free = self.missing & ~self._taken()
        if not free:
            return None
        # One piece for each worker, then two, four, and so on.
        longest = min(self._run_max, 1 << min(self._begun // self._workers, 16))
        self._begun += 1
        start = bitfield.lowest(free)
        return Run(start, start + _length(free, start, longest))

    def _second_half(self) -> Run | None:
        """The end of the run that has most left; its worker goes on with the first half."""
        longest = max(self._runs, key=lambda run: run.left, default=None)
        if longest is None or longest.left < 2:
            return None
        middle = longest.next + (longest.left + 1) // 2
        run = Run(middle, longest.stop)
        longest.stop = middle
        return run

    def _least_needed(self) -> Run | None:
        """The run that can best do without its worker."""
        idle = [run for run in self._runs if not run.urgent]
        return max(idle, key=lambda run: run.left, default=None)

    def check_invariants(self) -> None:
        """For tests."""
        assert len(self._runs) <= self._workers
        taken = 0
        for run in self._runs:
            assert run.left > 0
            pieces = bitfield.full(run.left) << run.next
            assert not pieces & taken, "two workers fetch the same piece"
            assert not pieces & ~self.missing, "what is fetched already is fetched again"
            taken |= pieces
        assert all(self.missing >> index & 1 for index in self._urgent)


def _length(free: int, start: int, longest: int) -> int:
    """How many pieces from ``start`` on are free without a gap, at most ``longest``."""
    ahead = (free >> start) & bitfield.full(longest)
    return ((~ahead) & (ahead + 1)).bit_length() - 1
