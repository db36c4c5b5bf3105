"""A relay that makes a server on this machine as slow as one far away.

    python -m benchmarks.throttle PORT SERVER_PORT BYTES_PER_SECOND DELAY

Each connection gets so many bytes per second from the server, and what goes to the server is held back for
DELAY seconds: so a request and its answer take that long, however fast the server is.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Final

CHUNK: Final = 64 << 10
# Small, so that little is on its way when a client hangs up.
SOCKET_BUFFER: Final = 256 << 10
# A pause that is due is made up for when it was slept too long, up to so many seconds.
SLACK: Final = 0.02


def forward(source: socket.socket, target: socket.socket, delay: float) -> None:
    """Pass on requests, later."""
    with contextlib.suppress(OSError):
        while data := source.recv(CHUNK):
            time.sleep(delay)
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def throttle(source: socket.socket, target: socket.socket, rate: float) -> None:
    """Pass on answers at a rate, and close both at the end.

    The bytes stay in the kernel: the processor is for those that are measured.
    """
    free_at = 0.0
    with source, target, contextlib.suppress(OSError), _pipe() as (inlet, outlet):
        while count := os.splice(source.fileno(), inlet, CHUNK):
            now = time.monotonic()
            free_at = max(free_at, now - SLACK) + count / rate
            time.sleep(max(0.0, free_at - now))
            while count:
                count -= os.splice(outlet, target.fileno(), count)


@contextlib.contextmanager
def _pipe() -> Iterator[tuple[int, int]]:
    """Its two ends: where bytes go in, and where they come out."""
    outlet, inlet = os.pipe()
    try:
        yield inlet, outlet
    finally:
        os.close(outlet)
        os.close(inlet)


def main() -> int:
    port, server_port, rate, delay = (float(argument) for argument in sys.argv[1:])
    with socket.create_server(("127.0.0.1", int(port)), backlog=64) as listener:
        while True:
            client, _ = listener.accept()
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER)
            server = socket.create_connection(("127.0.0.1", int(server_port)))
            server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER)
            threads = (
                threading.Thread(target=forward, args=(client, server, delay), daemon=True),
                threading.Thread(target=throttle, args=(server, client, rate), daemon=True),
            )
            for thread in threads:
                thread.start()


if __name__ == "__main__":
    sys.exit(main())
