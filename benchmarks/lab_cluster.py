"""Everything that the lab runs on its hosts: roles of swarmpull, libtorrent, curl."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from subprocess import CalledProcessError
from typing import Any, Final

import attrs

from benchmarks.lab_network import Namespace
from benchmarks.processes import Client, Conversation, Server, stop_all

# Where roles listen unless told otherwise: each host has all ports for itself.
ADMIN_PORTS: Final = {"tracker": 7530, "index": 7540, "origin": 7520, "agent": 7500}
AGENT_REGISTRY: Final = "127.0.0.1:5000"
ORIGIN_REGISTRY: Final = "127.0.0.1:5100"
TRACKER_PORT: Final = 7300
INDEX_PORT: Final = 7400
ORIGIN_PORT: Final = 7200
TORRENT_PORT: Final = 6881
SMALL_PAGE_SECONDS_MAX: Final = 10
CURL: Final = ("curl", "--silent", "--show-error", "--fail")


@attrs.frozen
class Blob:
    """What is moved, and how long anybody may take over it.

    Attributes:
        file: with its bytes.
        digest: of the blob.
        size: in bytes.
        torrent: its torrent; does not exist when nobody wants it.
        seconds_max: after which a download is given up.
    """

    file: Path
    digest: str
    size: int
    torrent: Path
    seconds_max: int


@attrs.frozen
class Hosts:
    """Who is where."""

    tracker: Namespace
    index: Namespace
    origins: tuple[Namespace, ...]
    agents: tuple[Namespace, ...]

    @classmethod
    def on_one(cls, host: Namespace) -> Hosts:
        """All of them on one host, one of each."""
        return cls(host, host, (host,), (host,))


class Cluster:
    """The roles of swarmpull, each a process, on their hosts."""

    def __init__(self, hosts: Hosts, directory: Path) -> None:
        self._hosts = hosts
        self._directory = directory
        self._config = directory / "swarmpull.toml"
        self._config.write_text(_configuration(hosts))
        self._servers: dict[str, list[Server]] = {}

    def start(self) -> None:
        """Return when every role is ready."""
        hosts = self._hosts
        groups = {"tracker": [hosts.tracker], "index": [hosts.index]}
        groups |= {"origin": list(hosts.origins), "agent": list(hosts.agents)}
        for role, members in groups.items():
            self._servers[role] = []
            for number, host in enumerate(members, start=1):
                self._servers[role].append(self._start_role(role, number, host))
        for role, members in groups.items():
            for server, host in zip(self._servers[role], members, strict=True):
                address = f"127.0.0.1:{ADMIN_PORTS[role]}"
                server.wait_until(
                    lambda host=host, address=address: (
                        get(host, f"{address}/readiness") is not None
                    ),  # type: ignore[misc]
                    "it is ready",
                )

    def push(self, blob: Blob) -> None:
        """Put the blob on every origin."""
        for host in self._hosts.origins:
            upload = [*CURL, "--max-time", str(blob.seconds_max), "--upload-file", str(blob.file)]
            url = f"http://{ORIGIN_REGISTRY}/blobs/{blob.digest}"
            Client(host.command([*upload, url])).wait()

    def servers(self) -> dict[str, list[Server]]:
        """The processes by role."""
        return self._servers

    def received(self, blob: Blob) -> dict[str, int]:
        """What all agents together got of the blob, in bytes by kind of sender.

        Raises:
            RuntimeError: an agent does not have the whole blob, although its reader had the last byte.
        """
        totals: dict[str, int] = {}
        for host, server in zip(self._hosts.agents, self._servers["agent"], strict=True):
            page = get(host, f"127.0.0.1:{ADMIN_PORTS['agent']}/status")
            document: dict[str, Any] = json.loads(page or "{}")
            if not _has(document, blob.digest):
                raise RuntimeError(f"{server.name} lacks the blob; it says:\n{server.said()}")
            for kind, count in document["bytes_received"].items():
                totals[kind] = totals.get(kind, 0) + count
        return totals

    def stop(self) -> None:
        # Agents first: what they are told about the end of the others would only fill their logs.
        for role in reversed(ADMIN_PORTS):
            stop_all(self._servers.pop(role, []))

    def _start_role(self, role: str, number: int, host: Namespace) -> Server:
        name = f"{role}-{number}"
        command = [sys.executable, "-m", "swarmpull", "run", "--role", role]
        command += ["--config", str(self._config), "--data-dir", str(self._directory / name)]
        return Server(name, host.command(command), self._directory)


@contextmanager
def open_cluster(hosts: Hosts, directory: Path) -> Iterator[Cluster]:
    """A cluster that is ready, and whose processes have ended afterwards."""
    cluster = Cluster(hosts, directory)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


class TorrentSwarm:
    """libtorrent on the same hosts: seeders where the origins are, leechers where the agents are."""

    def __init__(self, hosts: Hosts, blob: Blob, directory: Path) -> None:
        self._hosts = hosts
        self._blob = blob
        self._directory = directory
        # One host has one port of each number for all that runs on it.
        everybody = [*hosts.origins, *hosts.agents]
        self._listen = [
            f"{host.address}:{TORRENT_PORT + number}" for number, host in enumerate(everybody)
        ]
        self.seeders: list[Conversation] = []
        self.leechers: list[Conversation] = []

    @property
    def files(self) -> list[Path]:
        """What the leechers write."""
        return [self._of_leecher(n) / self._blob.file.name for n in range(len(self.leechers))]

    def start(self) -> None:
        """Return when everybody listens."""
        for number in range(len(self._hosts.origins)):
            arguments = ["seed", str(self._blob.torrent), str(self._blob.file.parent)]
            host, listen = self._hosts.origins[number], self._listen[number]
            self.seeders.append(self._start(f"seeder-{number + 1}", host, listen, arguments))
        for number in range(len(self._hosts.agents)):
            directory = self._of_leecher(number)
            directory.mkdir()
            listen = self._listen[len(self.seeders) + number]
            arguments = ["leech", str(self._blob.torrent), str(directory), "--peers"]
            arguments.append(",".join(peer for peer in self._listen if peer != listen))
            host = self._hosts.agents[number]
            self.leechers.append(self._start(f"leecher-{number + 1}", host, listen, arguments))
        for process in (*self.seeders, *self.leechers):
            process.hear()

    def pull(self) -> list[float]:
        """Let all leechers begin; returns what each took, in seconds."""
        for leecher in self.leechers:
            leecher.tell("begin")
        return [float(json.loads(leecher.hear())["seconds"]) for leecher in self.leechers]

    def received(self) -> dict[str, int]:
        """What all leechers together got, in bytes by kind of sender."""
        sent = sum(self._ask(seeder)["sent"] for seeder in self.seeders)
        received = sum(self._ask(leecher)["received"] for leecher in self.leechers)
        return {"origin": sent, "agent": received - sent}

    def stop(self) -> None:
        stop_all([*self.seeders, *self.leechers])

    def _ask(self, process: Conversation) -> dict[str, int]:
        process.tell("report")
        counts: dict[str, int] = json.loads(process.hear())
        return counts

    def _start(
        self, name: str, host: Namespace, listen: str, arguments: Sequence[str]
    ) -> Conversation:
        command = [sys.executable, "-m", "benchmarks.lab_torrent", *arguments]
        command += ["--listen", listen, "--seconds", str(2 * self._blob.seconds_max)]
        return Conversation(name, host.command(command), self._directory)

    def _of_leecher(self, number: int) -> Path:
        return self._directory / f"leecher-{number + 1}"


@contextmanager
def open_torrent_swarm(hosts: Hosts, blob: Blob, directory: Path) -> Iterator[TorrentSwarm]:
    """A swarm that is ready to begin, and whose processes have ended afterwards."""
    swarm = TorrentSwarm(hosts, blob, directory)
    try:
        swarm.start()
        yield swarm
    finally:
        swarm.stop()


def make_torrent(host: Namespace, blob: Blob) -> None:
    module = [sys.executable, "-m", "benchmarks.lab_torrent"]
    arguments = ["make", str(blob.file), str(blob.torrent)]
    Client(host.command([*module, *arguments])).wait()


def get(host: Namespace, url: str) -> str | None:
    """A small page as a process on that host sees it; None when nobody serves it."""
    done = Client(host.command([*CURL, "--max-time", str(SMALL_PAGE_SECONDS_MAX), url]))
    try:
        return done.wait().output
    except CalledProcessError:
        return None


def _configuration(hosts: Hosts) -> str:
    """What all roles read: where the others are."""
    origins = ", ".join(f'"{host.address}:{ORIGIN_PORT}"' for host in hosts.origins)
    lines = [
        "[cluster]",
        f'trackers = ["{hosts.tracker.address}:{TRACKER_PORT}"]',
        f'indexes = ["{hosts.index.address}:{INDEX_PORT}"]',
        f"origins = [{origins}]",
        # Nothing is to be written to the backend while pulls are measured.
        "[origin]",
        'write_back = "sync"',
        "[log]",
        'level = "warning"',
    ]
    return "\n".join([*lines, ""])


def _has(document: dict[str, Any], digest: str) -> bool:
    return any(
        torrent["digest"] == digest and torrent["have"] == torrent["pieces"]
        for torrent in document.get("torrents", [])
    )
