"""One blob from an origin through an agent to curl, beside curl from nginx, all on loopback.

    python -m benchmarks.pull [--size 1GiB] [--rounds 5] [--tls]

Every role is a process of its own.  A round is three downloads into a file of the same file system, in
an order that changes from round to round, so that what drifts on the machine meets all of them:

- nginx: serves the file from the page cache with sendfile;
- cold: a new agent with an empty data directory fetches the blob from the origin, verifies it and
  stores it, while curl reads it;
- warm: the same agent, once it has the blob;
- tls, with ``--tls``: the same as cold in a second cluster, whose roles speak mutual TLS.

With ``--memory`` there is one cold pull into nowhere instead, and what is reported is the memory of origin
and agent meanwhile: it should not depend on SIZE.

CPU seconds and peak memory are those of each process during the download, from ``/proc``; the CPU seconds
of curl are what the kernel reports at its end.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import attrs

from benchmarks.content import file_digest, write_random
from benchmarks.machine import machine
from benchmarks.nginx import nginx_command
from benchmarks.processes import AnonymousPeaks, Client, Server, Usage
from swarmpull.certificates import create_authority, issue
from swarmpull.units import parse_size

MIB: Final = 1 << 20
PORTS: Final = range(20_000, 32_000)
ROLES: Final = ("tracker", "index", "origin", "agent")
CONTENDERS: Final = ("nginx", "cold", "warm")


# --- processes --------------------------------------------------------------------------------


def free_ports() -> Iterator[int]:
    """Ports on which nothing listens, below those that the kernel takes for outgoing connections."""
    offset = os.getpid() * 97 % len(PORTS)
    for port in (*PORTS[offset:], *PORTS[:offset]):
        with contextlib.closing(socket.socket()) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        yield port


def get(port: int, target: str) -> tuple[int, bytes]:
    """Status and body of a small page; status 0 when nobody answers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10.0)
    with contextlib.closing(connection):
        try:
            connection.request("GET", target)
            response = connection.getresponse()
            return response.status, response.read()
        except OSError:
            return 0, b""


# --- the cluster and nginx --------------------------------------------------------------------


@attrs.frozen
class Ports:
    """Where everything listens; ``admin`` by role."""

    nginx: int
    tracker: int
    index: int
    index_api: int
    origin_rpc: int
    origin_registry: int
    origin_peer: int
    agent_registry: int
    agent_peer: int
    admin: dict[str, int]

    @classmethod
    def choose(cls, ports: Iterator[int]) -> Ports:
        return cls(
            nginx=next(ports),
            tracker=next(ports),
            index=next(ports),
            index_api=next(ports),
            origin_rpc=next(ports),
            origin_registry=next(ports),
            origin_peer=next(ports),
            agent_registry=next(ports),
            agent_peer=next(ports),
            admin={role: next(ports) for role in ROLES},
        )

    def configuration(self, security: Sequence[str] = ()) -> str:
        """The file that all roles read; ``security``: its lines about TLS."""
        listen = {
            "tracker.rpc": self.tracker,
            "index.rpc": self.index,
            "index.api": self.index_api,
            "origin.rpc": self.origin_rpc,
            "origin.registry": self.origin_registry,
            "origin.peer": self.origin_peer,
            "agent.registry": self.agent_registry,
            "agent.peer": self.agent_peer,
            **{f"{role}.admin": port for role, port in self.admin.items()},
        }
        lines = [
            "[cluster]",
            f'trackers = ["127.0.0.1:{self.tracker}"]',
            f'indexes = ["127.0.0.1:{self.index}"]',
            f'origins = ["127.0.0.1:{self.origin_rpc}"]',
            "[log]",
            'level = "warning"',
        ]
        for table, port in listen.items():
            lines += [f"[{table}]", f'listen = "127.0.0.1:{port}"']
        return "\n".join([*lines, *security, ""])


class Bench:
    """The running servers, and the downloads from them."""

    def __init__(
        self, directory: Path, size: int, ports: Iterator[int], *, tls: bool = False
    ) -> None:
        directory.mkdir(exist_ok=True)
        self._directory = directory
        self._ports = Ports.choose(ports)
        self._config = directory / "swarmpull.toml"
        security = certify(directory / "certs") if tls else ()
        self._config.write_text(self._ports.configuration(security))
        self._content = directory / "content"
        self._content.mkdir()
        self._size = size
        self._servers: dict[str, Server] = {}
        self._digest = write_random(self._content / "blob", size)

    @property
    def _target(self) -> str:
        return f"/blobs/{self._digest}"

    def start(self) -> None:
        """Start everything but the agent, and put the blob on the origin."""
        self._push()
        nginx = nginx_command(self._directory, self._content, self._ports.nginx)
        self._servers["nginx"] = Server("nginx", nginx, self._directory)
        self._servers["nginx"].wait_until(
            lambda: get(self._ports.nginx, "/absent")[0] == 404, "it answers"
        )

    def pull_into_nowhere(self) -> dict[str, Memory]:
        """Start everything, and pull once; what origin and agent had meanwhile."""
        self._push()
        (self._content / "blob").unlink()
        self._renew_agent()
        os.sync()
        servers = [self._servers[role] for role in ("origin", "agent")]
        for server in servers:
            server.begin()
        with AnonymousPeaks(servers) as anonymous:
            url = f"http://127.0.0.1:{self._ports.agent_registry}{self._target}"
            seconds, _ = run_curl(url, Path(os.devnull))
            # The digest of the whole is what the last bytes have waited for.
            self._servers["agent"].wait_until(self._agent_is_complete, "it has the whole blob")
        print(f"{self._size / 1e6 / seconds:.0f} MB/s", file=sys.stderr)
        return {
            server.name: Memory(anonymous.peaks[server.name], server.end()) for server in servers
        }

    def _push(self) -> None:
        before = [role for role in ROLES if role != "agent"]
        for role in before:
            self._start_role(role)
        for role in before:
            self._wait_until_ready(role)
        url = f"http://127.0.0.1:{self._ports.origin_registry}{self._target}"
        put = ["curl", "--silent", "--show-error", "--fail", "--upload-file"]
        subprocess.run([*put, str(self._content / "blob"), url], check=True)

    def run(self, contender: str) -> Download:
        """One download of the whole blob.  ``warm`` must follow ``cold``."""
        if contender == "nginx":
            return self._download(self._ports.nginx, "/blob", ["nginx"])
        if contender in ("cold", "tls"):
            self._renew_agent()
        else:
            self._servers["agent"].wait_until(self._agent_is_complete, "it has the whole blob")
        return self._download(self._ports.agent_registry, self._target, ["origin", "agent"])

    def stop(self) -> None:
        for server in reversed(self._servers.values()):
            server.stop()

    def _start_role(self, role: str) -> None:
        data = str(self._directory / "data" / role)
        command = [sys.executable, "-m", "swarmpull", "run", "--role", role]
        command += ["--config", str(self._config), "--data-dir", data]
        self._servers[role] = Server(role, command, self._directory)

    def _wait_until_ready(self, role: str) -> None:
        admin = self._ports.admin[role]
        self._servers[role].wait_until(lambda: get(admin, "/readiness")[0] == 200, "it is ready")

    def _renew_agent(self) -> None:
        if agent := self._servers.pop("agent", None):
            agent.stop()
        shutil.rmtree(self._directory / "data" / "agent", ignore_errors=True)
        self._start_role("agent")
        self._wait_until_ready("agent")

    def _agent_is_complete(self) -> bool:
        status, body = get(self._ports.admin["agent"], "/status")
        torrents: list[dict[str, Any]] = json.loads(body)["torrents"] if status == 200 else []
        return any(
            torrent["digest"] == self._digest and torrent["have"] == torrent["pieces"]
            for torrent in torrents
        )

    def _download(self, port: int, target: str, names: Sequence[str]) -> Download:
        servers = [self._servers[name] for name in names]
        file = self._directory / "downloaded"
        # What the rounds before left to be written must not be written during this one.
        os.sync()
        for server in servers:
            server.begin()
        try:
            seconds, curl = run_curl(f"http://127.0.0.1:{port}{target}", file)
        except subprocess.CalledProcessError as error:
            logs = "\n".join(server.said() for server in servers)
            raise RuntimeError(f"{error}; the servers say:\n{logs}") from error
        usages = {server.name: server.end() for server in servers}
        if file_digest(file) != self._digest:
            raise RuntimeError(f"{names[-1]} served something else than the blob")
        file.unlink()
        return Download(seconds, {**usages, "curl": curl})


def certify(directory: Path) -> Sequence[str]:
    """Make an authority and one certificate for all roles; returns the lines of the configuration."""
    create_authority(directory, "benchmark")
    issued = issue(directory, "host", ROLES)
    files = {"ca": directory / "ca.crt", "cert": issued.certificate, "key": issued.key}
    return ["[tls]", *(f'{key} = "{path}"' for key, path in files.items())]


@attrs.frozen
class Download:
    """One measurement: seconds as curl's caller sees them, and what each process took."""

    seconds: float
    usages: dict[str, Usage]


@attrs.frozen
class Memory:
    """The most that a process had: bytes that no file backs, and all with the CPU seconds it took."""

    anonymous: int
    usage: Usage


def run_curl(url: str, file: Path) -> tuple[float, Usage]:
    """Download into a file; returns the seconds it took and what curl itself used.

    Raises CalledProcessError.
    """
    command = ["curl", "--silent", "--show-error", "--fail", "--output", str(file), url]
    outcome = Client(command).wait()
    return outcome.seconds, outcome.usage


# --- the report -------------------------------------------------------------------------------


def report(size: int, downloads: dict[str, list[Download]]) -> Iterator[str]:
    """Two tables in Markdown: throughput, and what each process took."""
    reference = statistics.median(download.seconds for download in downloads["nginx"])
    rounds = len(downloads["nginx"])
    yield f"{size / MIB:g} MiB, median of {rounds} rounds; {machine()}"
    yield ""
    yield "| curl from | MB/s | slowest | fastest | of nginx |"
    yield "|---|---:|---:|---:|---:|"
    for name, measured in downloads.items():
        seconds = sorted(download.seconds for download in measured)
        rates = [
            size / 1e6 / each for each in (statistics.median(seconds), seconds[-1], seconds[0])
        ]
        ratio = reference / statistics.median(seconds)
        cells = [LABELS[name], *(f"{rate:.0f}" for rate in rates), f"{ratio:.2f}"]
        yield f"| {' | '.join(cells)} |"
    yield ""
    yield "| curl from | process | CPU seconds | per GB | peak RSS, MiB |"
    yield "|---|---|---:|---:|---:|"
    for name, measured in downloads.items():
        for process in measured[0].usages:
            usages = [download.usages[process] for download in measured]
            cpu = statistics.median(usage.cpu for usage in usages)
            peaks = [usage.memory / MIB for usage in usages if usage.memory is not None]
            memory = f"{max(peaks):.0f}" if peaks else ""
            cells = [LABELS[name], process, f"{cpu:.2f}", f"{cpu / (size / 1e9):.2f}", memory]
            yield f"| {' | '.join(cells)} |"


def memory_report(size: int, memories: dict[str, Memory]) -> Iterator[str]:
    """A table in Markdown."""
    yield f"{size / MIB:g} MiB; {machine()}"
    yield ""
    yield "| process | peak of anonymous memory, MiB | peak RSS, MiB | CPU seconds |"
    yield "|---|---:|---:|---:|"
    for name, memory in memories.items():
        peak = (memory.usage.memory or 0) / MIB
        cells = [
            name,
            f"{memory.anonymous / MIB:.0f}",
            f"{peak:.0f}",
            f"{memory.usage.cpu:.1f}",
        ]
        yield f"| {' | '.join(cells)} |"


LABELS: Final = {
    "nginx": "nginx",
    "cold": "agent, cold (from the origin)",
    "warm": "agent, warm (it has the blob)",
    "tls": "agent, cold, by mutual TLS",
}


def order_of(number: int) -> tuple[str, ...]:
    """The downloads of a round: warm follows cold, and nginx is first, then last, in turn."""
    return CONTENDERS if number % 2 == 0 else (*CONTENDERS[1:], CONTENDERS[0])


def measure(directory: Path, size: int, rounds: int, *, tls: bool) -> dict[str, list[Download]]:
    with contextlib.ExitStack() as stack:
        ports = free_ports()
        plain = Bench(directory, size, ports)
        stack.callback(plain.stop)
        plain.start()
        benches = dict.fromkeys(CONTENDERS, plain)
        if tls:
            benches["tls"] = Bench(directory / "tls", size, ports, tls=True)
            stack.callback(benches["tls"].stop)
            benches["tls"].start()
        downloads: dict[str, list[Download]] = {name: [] for name in benches}
        plain.run("nginx")  # once unmeasured: the first reader brings the file into the page cache
        for number in range(rounds):
            for contender in (*order_of(number), *benches.keys() - CONTENDERS):
                download = benches[contender].run(contender)
                rate = size / 1e6 / download.seconds
                print(f"round {number + 1}: {contender} {rate:.0f} MB/s", file=sys.stderr)
                downloads[contender].append(download)
    return downloads


def measure_memory(directory: Path, size: int) -> dict[str, Memory]:
    bench = Bench(directory, size, free_ports())
    try:
        return bench.pull_into_nowhere()
    finally:
        bench.stop()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pull", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--size", type=parse_size, default=parse_size("1GiB"), metavar="SIZE")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--memory", action="store_true", help="report memory of one cold pull")
    parser.add_argument(
        "--directory", type=Path, help="where to work, on a disk with room for 5 x SIZE"
    )
    parser.add_argument("--tls", action="store_true", help="also by mutual TLS")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    needed = ("curl",) if arguments.memory else ("nginx", "curl")
    missing = [name for name in needed if shutil.which(name) is None]
    if missing:
        print(f"skipped: not installed: {', '.join(missing)}", file=sys.stderr)
        return 0
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=arguments.directory) as name:
        if arguments.memory:
            lines = memory_report(arguments.size, measure_memory(Path(name), arguments.size))
        else:
            downloads = measure(Path(name), arguments.size, arguments.rounds, tls=arguments.tls)
            lines = report(arguments.size, downloads)
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
