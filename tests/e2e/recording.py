"""A relay between a client and a registry that keeps what the client asked for."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from collections.abc import Iterator
from typing import Final

RELAY_BYTES: Final = 1 << 16


class Recording:
    """What clients sent through the relay.

    Attributes:
        port: where the relay listens.
        cut: whether a connection was cut.
    """

    def __init__(self, port: int, cut_after: int | None) -> None:
        self.port = port
        self.cut = False
        self._cut_after = cut_after
        self._sent: list[bytes] = []

    def add(self, data: bytes) -> None:
        self._sent.append(data)

    def is_to_be_cut(self, answered: int) -> bool:
        """Whether the connection that has brought so many bytes ends here: the first that comes so far."""
        if self.cut or self._cut_after is None or answered < self._cut_after:
            return False
        self.cut = True
        return True

    def header_values(self, name: str) -> list[str]:
        """The values of a header in all requests, in the order in which they came."""
        lines = b"".join(self._sent).decode("latin-1").split("\r\n")
        pairs = (line.partition(":") for line in lines)
        return [value.strip() for key, _, value in pairs if key.lower() == name]


@contextlib.contextmanager
def recorded(port: int, *, cut_after: int | None = None) -> Iterator[Recording]:
    """Relay a port of this machine for the length of a block.

    The first connection that has brought ``cut_after`` bytes is cut, once.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener, contextlib.ExitStack() as threads:
        recording = Recording(listener.getsockname()[1], cut_after)

        def accept() -> None:
            while True:
                client, _ = listener.accept()
                if client.getpeername() == stop.getsockname():
                    client.close()
                    return
                thread = threading.Thread(target=relay, args=(client, port, recording))
                thread.start()
                threads.callback(thread.join)

        acceptor = threading.Thread(target=accept)
        acceptor.start()
        with socket.socket() as stop:
            try:
                yield recording
            finally:
                stop.connect(("127.0.0.1", recording.port))
                acceptor.join()


def relay(client: socket.socket, port: int, recording: Recording) -> None:
    """Pass bytes both ways until one side has ended."""
    with client, socket.create_connection(("127.0.0.1", port)) as server:
        other = {client: server, server: client}
        answered = 0
        while True:
            for source in select.select(list(other), [], [])[0]:
                try:
                    data = source.recv(RELAY_BYTES)
                    other[source].sendall(data)
                except OSError:
                    return
                if not data:
                    return
                if source is client:
                    recording.add(data)
                else:
                    answered += len(data)
                    if recording.is_to_be_cut(answered):
                        return
