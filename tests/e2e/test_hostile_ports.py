"""Garbage on the ports between roles ends one connection, with one reason in the log, and nothing else."""

from __future__ import annotations

import errno
import random
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from . import web
from .program import Cluster
from .waiting import wait_until

CLOSE_SECONDS_MAX: Final = 20.0
MEMORY_BYTES_MAX: Final = 64 << 20

GARBAGE: Final[dict[str, bytes]] = {
    "an HTTP request": b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    "a TLS client": bytes.fromhex("160301007b010000770303") + bytes(112),
    "the largest length": struct.pack(">I", 0xFFFFFFFF) + b"\x01" + bytes(1000),
    "a length of 1 GiB": struct.pack(">I", 1 << 30) + b"\x01" + bytes(1000),
    "an empty frame": struct.pack(">I", 0),
    "a frame of an unknown type first": struct.pack(">I", 5) + b"\xee" + b"what",
    "a hello of nonsense": struct.pack(">I", 65) + b"\x01" + bytes(64),
    "random bytes": random.Random("garbage").randbytes(100_000),
    "half a frame": struct.pack(">I", 100) + b"\x01half",
}
PORTS: Final[dict[str, Callable[[Cluster], int]]] = {
    "agent peer": lambda cluster: cluster.ports.agents[0].peer,
    "origin peer": lambda cluster: cluster.ports.origin_peer,
    "origin rpc": lambda cluster: cluster.ports.origin_rpc,
    "tracker rpc": lambda cluster: cluster.ports.tracker_rpc,
    "index rpc": lambda cluster: cluster.ports.index_rpc,
}


def program_at(cluster: Cluster, port: str) -> str:
    role = port.partition(" ")[0]
    return "agent-1" if role == "agent" else role


def send(port: int, data: bytes) -> None:
    """Send, end, and read until the other side has closed."""
    with socket.create_connection(("127.0.0.1", port), timeout=CLOSE_SECONDS_MAX) as stream:
        try:
            stream.sendall(data)
            stream.shutdown(socket.SHUT_WR)
            while stream.recv(65536):
                pass
        except OSError as error:
            # A reset is an end too, also one that came before the shutdown.
            if error.errno not in (errno.ECONNRESET, errno.EPIPE, errno.ENOTCONN):
                raise


def memory_of(pid: int) -> int:
    """Resident bytes of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) << 10
    raise AssertionError(f"process {pid} has no VmRSS")


def assert_everything_works(cluster: Cluster, name: str) -> None:
    content = random.Random(name).randbytes(5 << 20)
    web.push_image(cluster.ports.origin_registry, "team/after-garbage", "v1", [content])
    for port in cluster.registries:
        assert web.pull_image(port, "team/after-garbage", "v1")


@pytest.mark.parametrize("port", PORTS)
def test_garbage_ends_its_connection_and_nothing_else(separate_cluster: Cluster, port: str) -> None:
    program = separate_cluster.programs[program_at(separate_cluster, port)]
    pid, memory = program.pid, memory_of(program.pid)

    for data in GARBAGE.values():
        send(PORTS[port](separate_cluster), data)

    assert program.pid == pid
    assert memory_of(pid) - memory < MEMORY_BYTES_MAX
    assert_everything_works(separate_cluster, port)


@pytest.mark.parametrize("port", PORTS)
def test_garbage_is_logged_with_a_reason(separate_cluster: Cluster, port: str) -> None:
    log = separate_cluster.programs[program_at(separate_cluster, port)].log
    start = log.stat().st_size

    send(PORTS[port](separate_cluster), GARBAGE["an HTTP request"])

    def is_logged() -> bool:
        new = log.read_bytes()[start:].decode()
        return any("reason" in line for line in new.splitlines())

    wait_until(is_logged, "the end of the connection is logged with its reason")


@pytest.mark.parametrize("port", PORTS)
def test_connections_that_say_nothing_keep_nobody_out(separate_cluster: Cluster, port: str) -> None:
    silent = [
        socket.create_connection(("127.0.0.1", PORTS[port](separate_cluster)), timeout=10.0)
        for _ in range(50)
    ]
    try:
        assert_everything_works(separate_cluster, f"silent {port}")
    finally:
        for stream in silent:
            stream.close()
