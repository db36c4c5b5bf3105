"""Bytes of files through one TCP connection over loopback, into a file: what other copies are compared with.

    python -m benchmarks.plain_copy receive PORT FILE
    python -m benchmarks.plain_copy send PORT FILE...

The sender uses ``sendfile``, the receiver reads into a buffer of 1 MiB and writes that; nothing is verified.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Sequence

BUFFER_BYTES = 1 << 20
CONNECT_SECONDS_MAX = 30.0


def receive(port: int, file: str) -> None:
    """Take one connection, and write what comes until it ends; the file is on the disk then."""
    buffer = memoryview(bytearray(BUFFER_BYTES))
    with socket.create_server(("127.0.0.1", port)) as listener:
        connection, _ = listener.accept()
    with connection, open(file, "wb", buffering=0) as output:
        while count := connection.recv_into(buffer):
            output.write(buffer[:count])
        os.fsync(output.fileno())
        # The sender ends only now.
        connection.sendall(b"!")


def connect(port: int) -> socket.socket:
    """To the other side, as soon as it listens."""
    end = time.monotonic() + CONNECT_SECONDS_MAX
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port))
        except ConnectionRefusedError:
            if time.monotonic() > end:
                raise
            time.sleep(0.01)


def send(port: int, files: Sequence[str]) -> None:
    """Send files one after the other; return when the other side has them."""
    with connect(port) as connection:
        for file in files:
            with open(file, "rb") as content:
                connection.sendfile(content)
        connection.shutdown(socket.SHUT_WR)
        if connection.recv(1) != b"!":
            raise SystemExit("the other side has ended")


if __name__ == "__main__":
    if sys.argv[1] == "receive":
        receive(int(sys.argv[2]), sys.argv[3])
    else:
        send(int(sys.argv[2]), sys.argv[3:])
