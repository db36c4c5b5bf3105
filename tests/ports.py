"""Free ports for programs that have to be told theirs, such as all roles of a cluster.

Agents of one process listen on consecutive ports, so a cluster takes one run of them.  The runs lie
below the range from which the kernel takes ports for outgoing connections, so that none of those
lands on a port between the probe and the start of the program, or while the program is down.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from typing import Final

import attrs

PORTS: Final = range(20_000, 32_000)
BLOCK_LENGTH: Final = 400


@attrs.frozen
class AgentPorts:
    registry: int
    peer: int
    admin: int


@attrs.frozen
class ClusterPorts:
    agents: tuple[AgentPorts, ...]
    origin_registry: int
    origin_rpc: int
    origin_peer: int
    origin_admin: int
    tracker_rpc: int
    tracker_admin: int
    index_rpc: int
    index_admin: int
    index_api: int

    @property
    def admin(self) -> tuple[int, ...]:
        """The admin ports of all roles."""
        agents = tuple(agent.admin for agent in self.agents)
        return (*agents, self.origin_admin, self.tracker_admin, self.index_admin)

    def settings(self, agent: int = 1) -> dict[str, str]:
        """The listen keys, with those of agent number ``agent`` for the role agent."""
        first = self.agents[agent - 1]
        ports = {
            "agent.registry.listen": first.registry,
            "agent.peer.listen": first.peer,
            "agent.admin.listen": first.admin,
            "origin.registry.listen": self.origin_registry,
            "origin.rpc.listen": self.origin_rpc,
            "origin.peer.listen": self.origin_peer,
            "origin.admin.listen": self.origin_admin,
            "tracker.rpc.listen": self.tracker_rpc,
            "tracker.admin.listen": self.tracker_admin,
            "index.rpc.listen": self.index_rpc,
            "index.admin.listen": self.index_admin,
            "index.api.listen": self.index_api,
        }
        return {key: f"127.0.0.1:{port}" for key, port in ports.items()}


class PortAllocator:
    """Hands out runs of consecutive free ports, each port once.

    Test processes that run side by side take their ports out of different blocks.  A block belongs to
    whoever has bound the abstract Unix socket of its name, which the kernel gives back with the process.
    """

    def __init__(self) -> None:
        self._claims: list[socket.socket] = []
        self._candidates = self._ports_of_own()

    def _ports_of_own(self) -> Iterator[int]:
        for start in range(PORTS.start, PORTS.stop, BLOCK_LENGTH):
            claim = socket.socket(socket.AF_UNIX)
            try:
                claim.bind(f"\0swarmpull-tests-{start}")
            except OSError:
                claim.close()
                continue
            self._claims.append(claim)
            yield from range(start, min(start + BLOCK_LENGTH, PORTS.stop))

    def run_of(self, count: int) -> tuple[int, ...]:
        """``count`` consecutive ports on which nothing listens."""
        found: list[int] = []
        for port in self._candidates:
            if found and port != found[-1] + 1:
                found.clear()
            if not is_free(port):
                found.clear()
                continue
            found.append(port)
            if len(found) == count:
                return tuple(found)
        raise AssertionError(f"no {count} consecutive ports of {PORTS} are free")

    def cluster(self, agents: int) -> ClusterPorts:
        run: Iterator[int] = iter(self.run_of(3 * agents + 9))
        registry, peer, admin = ([next(run) for _ in range(agents)] for _ in range(3))
        each = zip(registry, peer, admin, strict=True)
        return ClusterPorts(tuple(AgentPorts(*ports) for ports in each), *run)


# All tests of a process share it: a block is held until the process ends.
PORTS_OF_THIS_PROCESS: Final = PortAllocator()


def free_ports(count: int) -> tuple[int, ...]:
    """Ports on which nothing listens, for what has to be told its port before it starts."""
    return PORTS_OF_THIS_PROCESS.run_of(count)


def is_free(port: int) -> bool:
    with contextlib.closing(socket.socket()) as probe:
        # As the program does it: connections of an earlier run in TIME_WAIT are no obstacle.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))
        except OSError:
            return False
    return True
