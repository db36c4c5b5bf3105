"""Which claimed piece to send next: the uplink of this host, shared by all torrents.

Claims wait in one short queue per connection, and connections take turns, so no peer and no torrent can
starve another by claiming more.  Few pieces are on their way at once: a piece that is sent at full speed
can be passed on by its receiver sooner than two that are sent at half of it.
"""

from __future__ import annotations

from collections import deque

import attrs


@attrs.frozen(kw_only=True)
class UploadLimits:
    """Bounds on what this host sends.

    Attributes:
        slots: pieces that are being sent at once, over all connections.
        claims_per_connection: claims that one peer may have waiting; more are passed.
        send_timeout: seconds after which a piece of which no more bytes leave marks its receiver as stalled.
    """

    slots: int = attrs.field(default=4, validator=attrs.validators.ge(1))
    claims_per_connection: int = attrs.field(default=16, validator=attrs.validators.ge(1))
    send_timeout: float = attrs.field(default=60.0, validator=attrs.validators.gt(0))


@attrs.define
class _Sending:
    index: int
    until: float


class Uploads:
    """The claims that wait and the pieces that are being sent."""

    def __init__(self, limits: UploadLimits) -> None:
        self._limits = limits
        self._waiting: dict[int, deque[int]] = {}
        self._turns: dict[int, None] = {}  # in order; a set would have none
        self._sending: dict[int, _Sending] = {}

    def claim(self, connection: int, index: int) -> bool:
        """Queue a claim; False when that peer has too many waiting, or this one twice."""
        sending = self._sending.get(connection)
        if sending is not None and sending.index == index:
            return True  # taken back and claimed again while it was under way
        queue = self._waiting.setdefault(connection, deque())
        if len(queue) >= self._limits.claims_per_connection or index in queue:
            return False
        queue.append(index)
        if connection not in self._sending:
            self._turns.setdefault(connection)
        return True

    def cancel(self, connection: int, index: int) -> None:
        """Drop a waiting claim; a piece that is on its way is not called back."""
        queue = self._waiting.get(connection)
        if queue is not None and index in queue:
            queue.remove(index)

    def start_next(self, now: float) -> tuple[int, int] | None:
        """Take the next claim, as (connection, piece index), if a slot is free."""
        while self._turns and len(self._sending) < self._limits.slots:
            connection = next(iter(self._turns))
            del self._turns[connection]
            queue = self._waiting.get(connection)
            if queue:
                index = queue.popleft()
                self._sending[connection] = _Sending(index, now + self._limits.send_timeout)
                return connection, index
        return None

    def progressed(self, connection: int, index: int, now: float) -> None:
        """More bytes of a piece have left: it has as long again for the rest."""
        sending = self._sending.get(connection)
        if sending is not None and sending.index == index:
            sending.until = now + self._limits.send_timeout

    def sent(self, connection: int, index: int) -> None:
        """A piece has left; its connection goes to the end of the line."""
        sending = self._sending.get(connection)
        if sending is None or sending.index != index:
            return
        del self._sending[connection]
        if self._waiting.get(connection):
            self._turns[connection] = None

    def drop_connection(self, connection: int) -> None:
        self._waiting.pop(connection, None)
        self._sending.pop(connection, None)
        self._turns.pop(connection, None)

    def drop_waiting(self) -> None:
        self._waiting.clear()
        self._turns.clear()

    def is_busy(self, connection: int) -> bool:
        """Whether anything is being sent to, or waits for, this connection."""
        return connection in self._sending or bool(self._waiting.get(connection))

    def stalled(self, now: float) -> list[int]:
        """Connections whose receiver takes too long over one piece."""
        return [c for c, sending in self._sending.items() if sending.until <= now]

    @property
    def sending_count(self) -> int:
        return len(self._sending)

    @property
    def waiting_count(self) -> int:
        return sum(map(len, self._waiting.values()))

    def check_invariants(self) -> None:
        assert len(self._sending) <= self._limits.slots
        assert not self._turns.keys() & self._sending.keys(), "a busy connection has no turn"
        for connection, queue in self._waiting.items():
            assert len(queue) <= self._limits.claims_per_connection
            if queue and connection not in self._sending:
                assert connection in self._turns, "a waiting claim must get its turn"
