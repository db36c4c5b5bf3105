"""The registries of agents and origins, beside nginx and docker-registry, all on loopback.

    python -m benchmarks.registry [--only warm|small|push] [--size 1GB] [--rounds 3]

Every role is a process of its own.  What is compared alternates within a round, and who is first changes
from round to round:

- warm: curl gets a blob that is complete on the agent's disk, into a file and into /dev/null; nginx serves
  the same file from the page cache with sendfile.
- small: 4 agents that have none of 2,000 blobs of 50 kB get all of them at the same time, each for one curl
  that asks for one blob after the other over one connection; nginx serves the same files to 4 such curls.
- push: curl pushes a blob as skopeo does (POST, one PATCH, PUT) until it is acknowledged: by the origin when
  it is on its disk and in the backend, a directory of the same disk; by docker-registry when on its own.

CPU seconds and peak memory are those of each process meanwhile, from ``/proc``.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, Final

import attrs

from benchmarks.content import file_digest, write_random
from benchmarks.machine import load_average, machine
from benchmarks.nginx import nginx_command
from benchmarks.processes import Client, Server, Usage
from benchmarks.pull import MIB, free_ports, get
from swarmpull.units import parse_size

AGENTS: Final = 4
SMALL_COUNT: Final = 2000
SMALL_BYTES: Final = 50_000
CASES: Final = ("warm", "small", "push")
USAGES: Final = "CPU s, server | CPU s, curl | peak RSS, MiB"
CURL: Final = ("curl", "--silent", "--show-error", "--fail")


@attrs.frozen
class Measured:
    """Seconds as the caller sees them, and what each process took meanwhile."""

    seconds: float
    usages: dict[str, Usage]


# --- the processes ----------------------------------------------------------------------------


class Bench:
    """Tracker, index, origin, nginx and docker-registry, and agents that come and go."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.content = directory / "content"
        self.content.mkdir()
        ports = free_ports()
        roles = ("tracker.rpc", "index.rpc", "origin.rpc", "origin.registry", "origin.peer")
        admins = ("tracker.admin", "index.admin", "index.api", "origin.admin")
        self.ports = {name: next(ports) for name in (*roles, *admins, "nginx", "docker-registry")}
        for number in range(AGENTS):
            for part in ("registry", "peer", "admin"):
                self.ports[f"agent-{number}.{part}"] = next(ports)
        self.config = directory / "swarmpull.toml"
        self.config.write_text(self._configuration())
        self.servers: dict[str, Server] = {}

    def start(self) -> None:
        for role in ("tracker", "index", "origin"):
            self._start_role(role, role, [])
        for role in ("tracker", "index", "origin"):
            self._wait_until_ready(role)

    def start_nginx(self) -> None:
        command = nginx_command(self.directory, self.content, self.ports["nginx"])
        self._start_other("nginx", command, "/absent", 404)

    def start_docker_registry(self) -> None:
        """Debian's docker-registry, on its own disk, without a cache and without logs of requests."""
        config = self.directory / "registry.yml"
        config.write_text(
            "version: 0.1\nlog:\n  level: error\n  accesslog:\n    disabled: true\n"
            f"storage:\n  filesystem:\n    rootdirectory: {self.directory / 'docker-registry'}\n"
            f"http:\n  addr: 127.0.0.1:{self.ports['docker-registry']}\n"
        )
        command = ["docker-registry", "serve", str(config)]
        self._start_other("docker-registry", command, "/v2/", 200)

    def renew_agents(self, count: int) -> list[str]:
        """Agents with empty data directories; returns their names."""
        names = [f"agent-{number}" for number in range(count)]
        for name in names:
            if server := self.servers.pop(name, None):
                server.stop()
            shutil.rmtree(self.directory / name, ignore_errors=True)
            listen = ("registry", "peer", "admin")
            options = [
                word
                for part in listen
                for word in (
                    "-o",
                    f"agent.{part}.listen=127.0.0.1:{self.ports[f'{name}.{part}']}",
                )
            ]
            self._start_role(name, "agent", options)
        for name in names:
            self._wait_until_ready(name)
        return names

    def measure(self, names: Sequence[str], run: Callable[[], float]) -> Measured:
        """Run something that returns CPU seconds of its clients, and watch these servers meanwhile."""
        # What was left to be written before must not be written during this.
        os.sync()
        for name in names:
            self.servers[name].begin()
        began = time.perf_counter()
        clients = run()
        seconds = time.perf_counter() - began
        usages = {name: self.servers[name].end() for name in names}
        return Measured(seconds, usages | {"curl": Usage(clients, None)})

    def metric(self, name: str, metric: str) -> float:
        """A sample of ``/metrics`` by name and labels; 0 as long as there is none."""
        _, body = get(self.ports[f"{name}.admin"], "/metrics")
        lines = (line.rpartition(" ") for line in body.decode().splitlines())
        found = (float(value) for key, _, value in lines if key == f"swarmpull_{metric}")
        return next(found, 0.0)

    def wait_until_complete(self, name: str, digest: str) -> None:
        def complete() -> bool:
            status, body = get(self.ports[f"{name}.admin"], "/status")
            torrents: list[dict[str, Any]] = json.loads(body)["torrents"] if status == 200 else []
            return any(t["digest"] == digest and t["have"] == t["pieces"] for t in torrents)

        self.servers[name].wait_until(complete, "it has the whole blob")

    def stop(self) -> None:
        for server in reversed(self.servers.values()):
            server.stop()

    def _configuration(self) -> str:
        lines = ["[log]", 'level = "warning"', "[cluster]"]
        for ring, role in (("trackers", "tracker"), ("indexes", "index"), ("origins", "origin")):
            lines.append(f'{ring} = ["127.0.0.1:{self.ports[f"{role}.rpc"]}"]')
        for name, port in self.ports.items():
            if name.partition(".")[0] in ("tracker", "index", "origin"):
                lines += [f"[{name}]", f'listen = "127.0.0.1:{port}"']
        return "\n".join([*lines, ""])

    def _start_role(self, name: str, role: str, options: Sequence[str]) -> None:
        command = [sys.executable, "-m", "swarmpull", "run", "--role", role, *options]
        command += ["--config", str(self.config), "--data-dir", str(self.directory / name)]
        self.servers[name] = Server(name, command, self.directory)

    def _wait_until_ready(self, name: str) -> None:
        admin = self.ports[f"{name}.admin"]
        self.servers[name].wait_until(lambda: get(admin, "/readiness")[0] == 200, "it is ready")

    def _start_other(self, name: str, command: Sequence[str], target: str, status: int) -> None:
        self.servers[name] = Server(name, command, self.directory)
        port = self.ports[name]
        self.servers[name].wait_until(lambda: get(port, target)[0] == status, "it answers")


def in_turn(names: Sequence[str], number: int) -> list[str]:
    """Who goes when in a round: the first of one round is the last of the next."""
    shift = number % len(names)
    return [*names[shift:], *names[:shift]]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- warm -------------------------------------------------------------------------------------


def measure_warm(bench: Bench, size: int, rounds: int) -> Iterator[str]:
    digest = write_random(bench.content / "blob", size)
    bench.start_nginx()
    put(bench.ports["origin.registry"], digest, bench.content / "blob")
    [agent] = bench.renew_agents(1)
    urls = {
        "nginx": f"http://127.0.0.1:{bench.ports['nginx']}/blob",
        agent: f"http://127.0.0.1:{bench.ports[f'{agent}.registry']}/blobs/{digest}",
    }
    downloaded = bench.directory / "downloaded"
    for name, url in urls.items():  # unmeasured: the agent gets the blob, the page cache both files
        download(url, Path("/dev/null"))
        if name == agent:
            bench.wait_until_complete(agent, digest)
    found: dict[tuple[str, str], list[Measured]] = {}
    for number in range(rounds):
        for into in ("file", "/dev/null"):
            target = downloaded if into == "file" else Path(into)
            for name in in_turn(list(urls), number):
                measured = bench.measure([name], partial(download, urls[name], target))
                if into == "file":
                    assert file_digest(downloaded) == digest, f"{name} served something else"
                    downloaded.unlink()
                found.setdefault((into, name), []).append(measured)
                say(f"round {number + 1}: {into} {name} {size / 1e6 / measured.seconds:.0f} MB/s")
    yield f"Warm pull, {size / 1e6:g} MB, median of {rounds} rounds; {machine()}; load {load_average():.1f}"
    yield ""
    yield f"| curl into | from | MB/s | slowest | fastest | of nginx | {USAGES} |"
    yield "|---|---|---:|---:|---:|---:|---:|---:|---:|"
    for (into, name), all_of_them in found.items():
        reference = median_seconds(found[into, "nginx"])
        yield row([into, name], size / 1e6, all_of_them, reference, name)


def put(port: int, digest: str, file: Path) -> None:
    run_client([*CURL, "--upload-file", str(file), f"http://127.0.0.1:{port}/blobs/{digest}"])


def download(url: str, file: Path) -> float:
    return run_client([*CURL, "--output", str(file), url])


def run_client(command: Sequence[str]) -> float:
    """The CPU seconds of a client that must succeed."""
    return Client(command).wait().usage.cpu


def median_seconds(measured: Sequence[Measured]) -> float:
    return statistics.median(each.seconds for each in measured)


def row(
    cells: list[str], work: float, measured: Sequence[Measured], reference: float, server: str
) -> str:
    seconds = sorted(each.seconds for each in measured)
    median = statistics.median(seconds)
    cells += [f"{work / each:.0f}" for each in (median, seconds[-1], seconds[0])]
    cells.append(f"{reference / median:.2f}")
    for process in (server, "curl"):
        cells.append(f"{statistics.median(each.usages[process].cpu for each in measured):.2f}")
    cells.append(f"{max(each.usages[server].memory or 0 for each in measured) / MIB:.0f}")
    return f"| {' | '.join(cells)} |"


# --- small blobs ------------------------------------------------------------------------------


@attrs.frozen
class Small:
    """The small blobs by digest, as files that nginx serves."""

    digests: list[str]

    @classmethod
    def make(cls, bench: Bench) -> Small:
        source, digests = random.Random(50), []
        with closing(http.client.HTTPConnection("127.0.0.1", bench.ports["origin.registry"])) as to:
            for _ in range(SMALL_COUNT):
                data = source.randbytes(SMALL_BYTES)
                digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
                (bench.content / digest).write_bytes(data)
                to.request("PUT", f"/blobs/{digest}", body=data)
                answer = to.getresponse()
                assert answer.status in (200, 201), answer.read()
                answer.read()
                digests.append(digest)
        return cls(digests)

    def get_all(self, directory: Path, base: str) -> float:
        """Get all of them with one curl over one connection, check each; the CPU seconds of curl."""
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        config = directory.with_suffix(".curl")
        lines = [
            f'url = "{base}{digest}"\noutput = "{directory / digest}"\n' for digest in self.digests
        ]
        config.write_text("".join(lines))
        return run_client([*CURL, "--config", str(config)])

    def check(self, directory: Path) -> None:
        for digest in self.digests:
            assert file_digest(directory / digest) == digest, f"{directory.name}: {digest}"


def measure_small(bench: Bench, rounds: int) -> Iterator[str]:
    small = Small.make(bench)
    bench.start_nginx()
    nginx = f"http://127.0.0.1:{bench.ports['nginx']}/"
    found: dict[str, list[Measured]] = {"nginx": [], "agents": []}
    calls: dict[str, float] = {}
    for number in range(rounds):
        for name in in_turn(list(found), number):
            before: dict[str, float] = {}
            if name == "nginx":
                bases, servers = [nginx] * AGENTS, ["nginx"]
            else:
                servers = bench.renew_agents(AGENTS)
                bases = [
                    f"http://127.0.0.1:{bench.ports[f'{agent}.registry']}/blobs/"
                    for agent in servers
                ]
                servers += ["tracker", "origin"]
                before = tracker_calls(bench)
            measured = bench.measure(servers, partial(get_by_all, bench, small, bases))
            if name == "agents":
                calls = {k: v - before[k] for k, v in tracker_calls(bench).items()}
            for client in range(AGENTS):
                small.check(bench.directory / f"client-{client}")
            found[name].append(measured)
            say(f"round {number + 1}: {name} {per_blob(measured):.2f} ms for each blob")
    yield from report_small(found, calls, rounds)


def get_by_all(bench: Bench, small: Small, bases: Sequence[str]) -> float:
    with ThreadPoolExecutor(AGENTS) as threads:
        return sum(
            threads.map(
                lambda item: small.get_all(bench.directory / f"client-{item[0]}", item[1]),
                enumerate(bases),
            )
        )


def tracker_calls(bench: Bench) -> dict[str, float]:
    return {
        "announces, leeching": bench.metric("tracker", 'tracker_announces_total{state="leeching"}'),
        "announces, complete": bench.metric("tracker", 'tracker_announces_total{state="complete"}'),
        "announces for which the tracker had to ask an origin": bench.metric(
            "tracker", "tracker_metainfo_fetch_seconds_count"
        ),
    }


def per_blob(measured: Measured) -> float:
    """Milliseconds in which each client has one more blob."""
    return measured.seconds * 1000 / SMALL_COUNT


def report_small(
    found: dict[str, list[Measured]], calls: dict[str, float], rounds: int
) -> Iterator[str]:
    reference = statistics.median(map(per_blob, found["nginx"]))
    yield (
        f"{SMALL_COUNT} blobs of {SMALL_BYTES} bytes by {AGENTS} clients, median of {rounds} rounds; "
        f"{machine()}; load {load_average():.1f}"
    )
    yield ""
    yield "| from | ms for each blob | of nginx | CPU ms for each pull, all servers | peak RSS, MiB |"
    yield "|---|---:|---:|---:|---:|"
    for name, measured in found.items():
        median = statistics.median(map(per_blob, measured))
        servers = [
            sum(usage.cpu for process, usage in each.usages.items() if process != "curl")
            for each in measured
        ]
        cpu = statistics.median(servers) * 1000 / (SMALL_COUNT * AGENTS)
        peak = max(u.memory or 0 for each in measured for u in each.usages.values()) / MIB
        yield f"| {name} | {median:.2f} | {median / reference:.1f} | {cpu:.2f} | {peak:.0f} |"
    yield ""
    yield "| calls to the tracker meanwhile | for each pull |"
    yield "|---|---:|"
    for name, count in calls.items():
        yield f"| {name} | {count / (SMALL_COUNT * AGENTS):.2f} |"


# --- push -------------------------------------------------------------------------------------


def measure_push(bench: Bench, size: int, rounds: int) -> Iterator[str]:
    bench.start_docker_registry()
    ports = {
        "origin": bench.ports["origin.registry"],
        "docker-registry": bench.ports["docker-registry"],
    }
    found: dict[str, list[Measured]] = {name: [] for name in ports}
    file = bench.content / "pushed"
    for number in range(rounds):
        digest = write_random(file, size)
        for name in in_turn(list(ports), number):
            measured = bench.measure([name], partial(push, ports[name], digest, file))
            url = f"http://127.0.0.1:{ports[name]}/v2/team/app/blobs/{digest}"
            download(url, bench.directory / "downloaded")
            assert file_digest(bench.directory / "downloaded") == digest, name
            found[name].append(measured)
            say(f"round {number + 1}: {name} {size / 1e6 / measured.seconds:.0f} MB/s")
    yield f"Push, {size / 1e6:g} MB, median of {rounds} rounds; {machine()}; load {load_average():.1f}"
    yield ""
    yield f"| curl to | MB/s | slowest | fastest | of docker-registry | {USAGES} |"
    yield "|---|---:|---:|---:|---:|---:|---:|---:|"
    reference = median_seconds(found["docker-registry"])
    for name, measured_all in found.items():
        yield row([name], size / 1e6, measured_all, reference, name)


def push(port: int, digest: str, file: Path) -> float:
    """POST, one PATCH with everything, PUT; the CPU seconds of curl for the PATCH."""
    base = f"http://127.0.0.1:{port}"
    location = call(port, "POST", "/v2/team/app/blobs/uploads/", 202)
    url = location if location.startswith("http") else base + location
    headers = ["--header", "Content-Type: application/octet-stream", "--header", "Expect:"]
    dump = file.with_suffix(".head")
    patch = [*CURL, "--request", "PATCH", *headers, "--dump-header", str(dump)]
    cpu = run_client([*patch, "--output", "/dev/null", "--upload-file", str(file), url])
    lines = (line.partition(": ") for line in dump.read_text().splitlines())
    location = next(value for name, _, value in lines if name.lower() == "location")
    target = location.removeprefix(base)
    call(port, "PUT", f"{target}{'&' if '?' in target else '?'}digest={digest}", 201)
    return cpu


def call(port: int, method: str, target: str, status: int) -> str:
    """A request without a body; returns the Location of its answer."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=600.0)) as connection:
        connection.request(method, target, headers={"Content-Length": "0"})
        answer = connection.getresponse()
        assert answer.status == status, (answer.status, answer.read())
        return answer.getheader("Location") or ""


# --- the command ------------------------------------------------------------------------------

NEEDS: Final = {
    "warm": ("curl", "nginx"),
    "small": ("curl", "nginx"),
    "push": ("curl", "docker-registry"),
}


def run_case(case: str, directory: Path, size: int, rounds: int) -> Iterator[str]:
    bench = Bench(directory)
    try:
        bench.start()
        if case == "warm":
            yield from measure_warm(bench, size, rounds)
        elif case == "small":
            yield from measure_small(bench, rounds)
        else:
            yield from measure_push(bench, size, rounds)
    finally:
        bench.stop()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.registry", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--only", choices=CASES)
    parser.add_argument("--size", type=parse_size, default=parse_size("1GB"), metavar="SIZE")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument(
        "--directory", type=Path, help="where to work, on a disk with room for 6 x SIZE x rounds"
    )
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    for case in (arguments.only,) if arguments.only else CASES:
        missing = [name for name in NEEDS[case] if shutil.which(name) is None]
        if missing:
            say(f"{case}: skipped, not installed: {', '.join(missing)}")
            continue
        with tempfile.TemporaryDirectory(prefix="benchmark-", dir=arguments.directory) as name:
            lines = run_case(case, Path(name), arguments.size, arguments.rounds)
            print("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
