"""One peer connection over loopback, plain and by mutual TLS, both ends in this process.

    python -m benchmarks.connection [--size 256MiB] [--rounds 3]

Chunks of a file in the page cache go into a buffer, and nothing is hashed or stored: what is left is what it
takes to move bytes.  CPU seconds are user and system time of the process, so of both ends.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import trio

from benchmarks.content import write_random
from benchmarks.machine import machine
from swarmpull.certificates import create_authority, issue
from swarmpull.swarm.messages import PieceChunk
from swarmpull.units import parse_size
from swarmpull.watched_files import WatchedFiles
from swarmpull.wire.streams import CHUNK_BYTES_MAX, PeerStream
from swarmpull.wire.tls import Tls, TlsFiles, load_contexts

HANDSHAKES = 200


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def certify(directory: Path) -> Tls:
    create_authority(directory, "benchmark")
    issued = issue(directory, "host", ("agent",))
    files = TlsFiles(str(directory / "ca.crt"), str(issued.certificate), str(issued.key))
    return Tls(WatchedFiles((), partial(load_contexts, files)))


@asynccontextmanager
async def connection(tls: Tls | None) -> AsyncIterator[tuple[PeerStream, PeerStream]]:
    """Both ends, greeted if need be."""
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    accepted: list[PeerStream] = []

    async def accept() -> None:
        stream = await listener.accept()
        accepted.append(PeerStream(stream if tls is None else (await tls.accept(stream))[0]))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(accept)
        stream = await trio.open_tcp_stream(*listener.socket.getsockname())
        dialled = PeerStream(stream if tls is None else (await tls.connect(stream))[0])
    await listener.aclose()
    try:
        yield dialled, accepted[0]
    finally:
        await dialled.aclose()
        await accepted[0].aclose()


async def transfer(tls: Tls | None, file: int, size: int) -> tuple[float, float]:
    """Seconds, and CPU seconds of both ends."""
    chunks = size // CHUNK_BYTES_MAX
    buffer = memoryview(bytearray(CHUNK_BYTES_MAX))
    async with connection(tls) as (sender, receiver):

        async def send() -> None:
            for number in range(chunks):
                chunk = PieceChunk(0, 0, CHUNK_BYTES_MAX)
                await sender.send_chunk(chunk, file, number * CHUNK_BYTES_MAX)

        cpu, began = cpu_seconds(), time.monotonic()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            for _ in range(chunks):
                await receiver.receive()
                await receiver.receive_into(buffer)
        return time.monotonic() - began, cpu_seconds() - cpu


async def greet(tls: Tls) -> float:
    """CPU seconds of both ends for one handshake."""
    cpu = cpu_seconds()
    for _ in range(HANDSHAKES):
        async with connection(tls):
            pass
    return (cpu_seconds() - cpu) / HANDSHAKES


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.connection", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--size", type=parse_size, default=parse_size("256MiB"), metavar="SIZE")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    arguments = parser.parse_args()
    size = max(arguments.size - arguments.size % CHUNK_BYTES_MAX, CHUNK_BYTES_MAX)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        tls = certify(Path(name))
        write_random(Path(name) / "blob", size)
        file = os.open(Path(name) / "blob", os.O_RDONLY)
        measured: dict[str, list[tuple[float, float]]] = {"plain": [], "mutual TLS": []}
        for _ in range(arguments.rounds):
            for kind, runs in measured.items():
                runs.append(trio.run(transfer, None if kind == "plain" else tls, file, size))
        os.close(file)
        handshake = trio.run(greet, tls)
    print(f"{size / (1 << 20):g} MiB, median of {arguments.rounds} rounds; {machine()}\n")
    print("| connection | MB/s | CPU seconds per GB, both ends |\n|---|---:|---:|")
    for kind, runs in measured.items():
        seconds, cpu = (statistics.median(run[column] for run in runs) for column in (0, 1))
        print(f"| {kind} | {size / 1e6 / seconds:.0f} | {cpu / (size / 1e9):.2f} |")
    print(f"\nA handshake: {handshake * 1000:.1f} ms of CPU time, both ends together.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
