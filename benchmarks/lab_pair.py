"""One seeder, one leecher, over loopback and unshaped, beside curl from nginx into a file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from subprocess import CalledProcessError
from typing import Final

import attrs

from benchmarks.content import file_digest
from benchmarks.lab_cluster import CURL, Blob, Hosts
from benchmarks.lab_network import Namespace
from benchmarks.lab_swarm import GroupUsage, burst_of_libtorrent, burst_of_swarmpull
from benchmarks.machine import load_average
from benchmarks.nginx import nginx_command
from benchmarks.processes import Client, Server

NGINX_PORT: Final = 8080
# Neither side of a transfer: they only say who wants what.
BYSTANDERS: Final = frozenset({"tracker", "index"})


@attrs.frozen
class Transfer:
    """One transfer: seconds until the receiver had all of it, and what both sides took."""

    seconds: float
    usages: dict[str, GroupUsage]
    load: float

    @property
    def cpu(self) -> float:
        """CPU seconds of all processes that took part."""
        return sum(usage.cpu for usage in self.usages.values())


def transfer_by_nginx(host: Namespace, blob: Blob, directory: Path) -> Transfer:
    """curl into a file, from the page cache; nobody verifies anything."""
    target = directory / "downloaded"
    command = nginx_command(directory, blob.file.parent, NGINX_PORT)
    url = f"http://127.0.0.1:{NGINX_PORT}/{blob.file.name}"
    server = Server("nginx", host.command(command), directory)
    try:
        probe = [*CURL, "--head", "--output", "/dev/null", url]
        server.wait_until(lambda: _succeeds(host.command(probe)), "it answers")
        load = load_average()
        server.begin()
        limit = ["--max-time", str(blob.seconds_max)]
        outcome = Client(host.command([*CURL, *limit, "--output", str(target), url])).wait()
        usages = {"nginx": GroupUsage.of([server.end()]), "curl": GroupUsage.of([outcome.usage])}
    finally:
        server.stop()
    if file_digest(target) != blob.digest:
        raise RuntimeError("nginx served something else than the blob")
    return Transfer(outcome.seconds, usages, load)


def transfer_by_swarmpull(host: Namespace, blob: Blob, directory: Path) -> Transfer:
    """An origin and an agent, until the agent has verified and stored the blob."""
    burst = burst_of_swarmpull(Hosts.on_one(host), blob, directory, read_all=False)
    sides = {kind: usage for kind, usage in burst.usages.items() if kind not in BYSTANDERS}
    return Transfer(burst.slowest, sides, burst.load)


def transfer_by_libtorrent(host: Namespace, blob: Blob, directory: Path) -> Transfer:
    """A seeder and a leecher, until each piece has matched its hash."""
    burst = burst_of_libtorrent(Hosts.on_one(host), blob, directory)
    return Transfer(burst.slowest, burst.usages, burst.load)


TRANSFERS: Final[dict[str, Callable[[Namespace, Blob, Path], Transfer]]] = {
    "nginx": transfer_by_nginx,
    "swarmpull": transfer_by_swarmpull,
    "libtorrent": transfer_by_libtorrent,
}


def transfer(contender: str, host: Namespace, blob: Blob, directory: Path) -> Transfer:
    """One transfer by the contender of that name, not while others' pages are written to the disk."""
    os.sync()
    return TRANSFERS[contender](host, blob, directory)


def _succeeds(command: list[str]) -> bool:
    try:
        Client(command).wait()
    except CalledProcessError:
        return False
    return True
