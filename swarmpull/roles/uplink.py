"""Whose turn it is on a host's uplink: the piece that began first goes first.

Several pieces are on their way at once, each on a connection of its own, so that the uplink is not idle
while one receiver is busy with somebody else.  If all of them were sent as fast as TCP lets them, they
would share the uplink and all be through at the end; one after the other they are through sooner by half,
and what a peer has early it passes on early.  So the first one sends as it can, and the others send only
when the uplink carries less than it could: its receiver does not keep up.

What the uplink can carry is not known beforehand, and the first piece alone does not show it: its receiver
may be slow.  It is what the uplink carries over `WINDOW_CHUNKS` chunks in which nobody was held back.  So at
the beginning, and now and then, all send as they can for so long.  In between it is raised to what was
carried, but not lowered: while some wait, that little is carried says nothing.  An uplink that has become
slower holds nobody back, and is measured anew thereby.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Final

import attrs
import trio

# Two pieces, where a chunk has 512 KiB, of which the event loop's hiccups are a small part.
WINDOW_CHUNKS: Final = 16
WINDOW_CHUNKS_MIN: Final = 4
# The others wait while the uplink carries at least this share of what it can.
FULL_SHARE: Final = 0.8
# All send as they can after so many chunks since it was last known what that comes to.
OPEN_EVERY_CHUNKS: Final = 128
# Whoever waits sends a chunk all the same after as long as the uplink needs for so many bytes of each piece
# that is on its way: the receiver is to see that something comes.
PATIENCE_BYTES: Final = 4 << 20
# So much of a piece may lie in the buffer of an idle socket: it was taken, but not carried yet.
SOCKET_BYTES: Final = 256 << 10


@attrs.define
class _Chunk:
    """``sent_at``: when the last byte was given to the connection, in seconds of trio's clock."""

    sent_at: float
    size: int


class Uplink:
    """The order of the pieces that one host is sending."""

    def __init__(self) -> None:
        # By connection, in the order in which they began; bytes of the piece that have been given to it.
        self._sending: dict[int, int] = {}
        self._waiting: set[int] = set()
        self._window: deque[_Chunk] = deque(maxlen=WINDOW_CHUNKS)
        # Chunks that were measured since somebody had to wait or was alone, and until all may send again.
        self._unheld = 0
        self._open_in = 0
        self._capacity = 0.0
        self._changed = trio.Event()

    @property
    def capacity(self) -> float:
        """What the uplink can carry, in bytes per second; 0 as long as that is not known."""
        return self._capacity

    def begin(self, connection: int) -> None:
        """A piece is to be sent on this connection."""
        if not self._sending:
            # The pause was nobody's fault, and does not count as time in which little was carried.
            self._window.clear()
        self._sending[connection] = 0

    def end(self, connection: int) -> None:
        """It is through, or will not be sent; the next one is the first."""
        if connection in self._sending:
            del self._sending[connection]
            self._wake()

    def sent(self, connection: int, size: int) -> None:
        """A chunk of ``size`` bytes has been given to a connection."""
        now = trio.current_time()
        given = self._sending.get(connection)
        if given is not None:
            self._sending[connection] = given + size
            if given >= SOCKET_BYTES:
                self._measure(_Chunk(now, size))
        self._wake()

    def has_turn(self, connection: int) -> bool:
        """Whether the next chunk of this connection's piece may be sent whatever the others do."""
        return connection not in self._sending or connection == next(iter(self._sending))

    async def turn(self, connection: int) -> None:
        """Return when the next chunk of this connection's piece may be sent."""
        await trio.lowlevel.checkpoint()
        if self.has_turn(connection):
            return
        came_at = trio.current_time()
        self._waiting.add(connection)
        try:
            while not self.has_turn(connection):
                deadline = self._may_send_at(came_at)
                if connection != self._first_waiting():
                    deadline = math.inf
                elif deadline <= trio.current_time():
                    return
                else:
                    self._unheld = 0
                with trio.move_on_at(deadline):
                    await self._changed.wait()
        finally:
            self._waiting.remove(connection)
            self._wake()

    def _first_waiting(self) -> int:
        """Whoever of those that wait began first."""
        return next(connection for connection in self._sending if connection in self._waiting)

    def _measure(self, chunk: _Chunk) -> None:
        window = self._window
        window.append(chunk)
        self._unheld = self._unheld + 1 if len(self._sending) > 1 else 0
        self._open_in = max(self._open_in - 1, 0)
        if len(window) < WINDOW_CHUNKS or chunk.sent_at <= window[0].sent_at:
            return
        rate = self._carried() / (chunk.sent_at - window[0].sent_at)
        if self._unheld >= WINDOW_CHUNKS:
            self._capacity = rate
            self._open_in = OPEN_EVERY_CHUNKS
        else:
            self._capacity = max(self._capacity, rate)

    def _carried(self) -> int:
        """Bytes since the first chunk of the window was sent."""
        return sum(chunk.size for chunk in self._window) - self._window[0].size

    def _may_send_at(self, came_at: float) -> float:
        """When the uplink carries less than it could if nothing more is sent; the past while all may send."""
        if not self._open_in or not self._capacity:
            return -math.inf
        patient_until = came_at + PATIENCE_BYTES * len(self._sending) / self._capacity
        if len(self._window) < WINDOW_CHUNKS_MIN:
            return patient_until
        idle_at = self._window[0].sent_at + self._carried() / (FULL_SHARE * self._capacity)
        return min(idle_at, patient_until)

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()
