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
    """

    def __init__(self, port: int) -> None:
        self.port = port
        self._sent: list[bytes] = []

    def add(self, data: bytes) -> None:
        self._sent.append(data)

    def header_values(self, name: str) -> list[str]:
        """The values of a header in all requests, in the order in which they came."""
        lines = b"".join(self._sent).decode("latin-1").split("\r\n")
        pairs = (line.partition(":") for line in lines)
        return [value.strip() for key, _, value in pairs if key.lower() == name]


@contextlib.contextmanager
def recorded(port: int) -> Iterator[Recording]:
    """Relay a port of this machine for the length of a block."""
    with socket.create_server(("127.0.0.1", 0)) as listener, contextlib.ExitStack() as threads:
        recording = Recording(listener.getsockname()[1])

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
