"""The hosts of a cluster: network namespaces whose links can be cut, or addresses on loopback."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final, Protocol

import attrs

from benchmarks.lab_network import Network, parse_rate, run

LINK_BITS: Final = 1_000_000_000
PROGRAMS: Final = ("ip", "tc", "iptables")


@attrs.frozen
class Host:
    """A machine that is not there.

    Attributes:
        name: as in scenarios.
        address: at which the others reach it; only it has that address, so all ports are its own.
        namespace: where its processes live; None on loopback.
    """

    name: str
    address: str
    namespace: str | None = None

    def command(self, command: Sequence[str]) -> list[str]:
        """What runs ``command`` there, with the id of the process that is started."""
        if self.namespace is None:
            return list(command)
        return ["ip", "netns", "exec", self.namespace, *command]


class Hosts(Protocol):
    """Machines, and what may happen between them.  All calls block for some milliseconds."""

    def add(self, name: str) -> Host: ...

    def cut(self, some: Sequence[str], others: Sequence[str]) -> None:
        """Nothing gets through between two groups any more, in both directions."""

    def heal(self) -> None:
        """Everything gets through again."""

    def lose(self, share: float) -> None:
        """Lose that share of all packets that arrive anywhere."""

    def slow(self, name: str, rate: str) -> None:
        """Give a link another rate."""

    def fast(self, name: str) -> None:
        """Give a link its own rate again."""


class LoopbackHosts:
    """One address of 127.0.0.0/8 for each host, which any process may use."""

    def __init__(self) -> None:
        # Two runs at the same time shall not meet.
        number = os.getpid()
        self._prefix = f"127.{64 + number % 128}.{number // 128 % 256}"
        self._count = 0

    def add(self, name: str) -> Host:
        self._count += 1
        return Host(name, f"{self._prefix}.{self._count}")

    def cut(self, some: Sequence[str], others: Sequence[str]) -> None:
        raise RuntimeError("loopback has no links to cut")

    def heal(self) -> None:
        """Nothing can have been done."""

    def lose(self, share: float) -> None:
        if share:
            raise RuntimeError("loopback has no links that lose packets")

    def slow(self, name: str, rate: str) -> None:
        raise RuntimeError("loopback has no links to make slow")

    def fast(self, name: str) -> None:
        """Nothing can have been done."""


class NamespaceHosts:
    """Network namespaces on a bridge; packets are lost where they arrive, by iptables."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._hosts: dict[str, Host] = {}
        # What was added, as arguments to take it away again.
        self._cuts: list[tuple[Host, list[str]]] = []
        self._losses: list[tuple[Host, list[str]]] = []

    def add(self, name: str) -> Host:
        made = self._network.add(name, LINK_BITS)
        self._hosts[name] = Host(name, made.address, made.namespace)
        return self._hosts[name]

    def cut(self, some: Sequence[str], others: Sequence[str]) -> None:
        for here, there in ((some, others), (others, some)):
            sources = ",".join(self._hosts[name].address for name in there)
            for name in here:
                self._drop(self._cuts, self._hosts[name], ["-s", sources])

    def heal(self) -> None:
        self._undo(self._cuts)

    def lose(self, share: float) -> None:
        self._undo(self._losses)
        if not share:
            return
        match = ["-m", "statistic", "--mode", "random", "--probability", f"{share:g}"]
        for host in self._hosts.values():
            self._drop(self._losses, host, match)

    def slow(self, name: str, rate: str) -> None:
        self._network.set_rate(name, parse_rate(rate))

    def fast(self, name: str) -> None:
        self._network.set_rate(name, LINK_BITS)

    def _drop(self, noted: list[tuple[Host, list[str]]], host: Host, match: list[str]) -> None:
        rule = ["INPUT", "-i", "eth0", *match, "-j", "DROP"]
        run(*host.command(["iptables", "-w", "-A", *rule]))
        noted.append((host, rule))

    def _undo(self, noted: list[tuple[Host, list[str]]]) -> None:
        while noted:
            host, rule = noted.pop()
            run(*host.command(["iptables", "-w", "-D", *rule]))


def obstacle() -> str:
    """Why there are no namespaces here; empty if there are."""
    if sys.platform != "linux":
        return "network namespaces need Linux"
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    return f"not installed: {', '.join(missing)}" if missing else ""


@contextmanager
def open_hosts(*, namespaces: bool) -> Iterator[Hosts]:
    """Hosts that are gone afterwards."""
    if not namespaces:
        yield LoopbackHosts()
        return
    network = Network()
    try:
        yield NamespaceHosts(network)
    finally:
        network.close()
