"""A burst: all agents pull one blob at the same time over links of a given rate."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from subprocess import CalledProcessError
from typing import Final

import attrs

from benchmarks.content import file_digest
from benchmarks.lab_cluster import (
    AGENT_REGISTRY,
    CURL,
    Blob,
    Hosts,
    open_cluster,
    open_torrent_swarm,
)
from benchmarks.lab_network import Network, payload_rate
from benchmarks.machine import load_average
from benchmarks.processes import Client, Conversation, Server, Usage
from swarmpull.sim.simulation import Simulation, SimulationOptions, lower_bound

PREDICTION_SEEDS: Final = range(1, 6)
# A simulation that takes so many times the bound is given up.
SIMULATED_BOUNDS: Final = 20
# What curl reports of a pull: bytes, seconds to the first of them, seconds to the last.
WRITE_OUT: Final = "%{size_download} %{time_starttransfer} %{time_total}"


@attrs.frozen(kw_only=True)
class SwarmOptions:
    """The topology; rates in bits per second, of each direction, size in bytes, times in seconds."""

    agents: int
    origins: int
    rate: int
    origin_rate: int
    size: int
    rtt: float
    read_all: bool


@attrs.frozen
class GroupUsage:
    """What the processes of one kind took together: CPU seconds; and the most memory of any, if known."""

    processes: int
    cpu: float
    memory: int | None

    @classmethod
    def of(cls, usages: Iterable[Usage]) -> GroupUsage:
        found = list(usages)
        peaks = [usage.memory for usage in found if usage.memory is not None]
        return cls(len(found), sum(usage.cpu for usage in found), max(peaks, default=None))


@attrs.frozen(kw_only=True)
class Burst:
    """One burst as it came out.

    Attributes:
        seconds: of each pull, from its own start until the agent had verified the whole blob; sorted.
        first_bytes: until each reader had its first byte; sorted, empty when nobody read in order.
        spread: seconds between the first start and the last.
        usages: by kind of process.
        received: bytes that the agents got, by kind of sender.
        load: load average before it.
    """

    seconds: tuple[float, ...]
    first_bytes: tuple[float, ...]
    spread: float
    usages: dict[str, GroupUsage]
    received: dict[str, int]
    load: float

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def slowest(self) -> float:
        return self.seconds[-1]


@attrs.frozen
class Prediction:
    """What the simulator says: medians over several seeds, in seconds.

    ``median`` and ``slowest`` are None when somebody does not finish in `SIMULATED_BOUNDS` times the bound.
    """

    bound: float
    median: float | None
    slowest: float | None


def build(network: Network, options: SwarmOptions) -> Hosts:
    """The hosts of the topology: everybody on a link of his own."""
    rate, origin_rate = options.rate, options.origin_rate
    return Hosts(
        network.add("tracker", rate),
        network.add("index", rate),
        tuple(network.add(f"origin-{n + 1}", origin_rate) for n in range(options.origins)),
        tuple(network.add(f"agent-{n + 1}", rate) for n in range(options.agents)),
    )


def burst_of_swarmpull(hosts: Hosts, blob: Blob, directory: Path, *, read_all: bool) -> Burst:
    """Fresh roles, one curl per agent.

    Each curl reads the whole blob, or only its last byte, which the agent holds back until the whole
    of the blob has matched its digest.
    """
    with open_cluster(hosts, directory) as cluster:
        cluster.push(blob)
        servers, load = cluster.servers(), load_average()
        begin(servers)
        pulls: list[Client] = []
        try:
            pulls.extend(
                Client(host.command(_pull(blob, read_all=read_all))) for host in hosts.agents
            )
            outcomes = [pull.wait() for pull in pulls]
        except CalledProcessError as error:
            logs = "\n".join(server.said() for group in servers.values() for server in group)
            raise RuntimeError(f"{error}: {error.stderr}\nthe servers say:\n{logs}") from error
        finally:
            for pull in pulls:
                pull.stop()
        usages = end(servers)
        usages["curl"] = GroupUsage.of(outcome.usage for outcome in outcomes)
        received = cluster.received(blob)
    told = [tuple(map(float, outcome.output.split())) for outcome in outcomes]
    expected = blob.size if read_all else 1
    if any(size != expected for size, _, _ in told):
        raise RuntimeError(f"a reader got {[size for size, _, _ in told]} bytes, not {expected}")
    starts = [pull.started for pull in pulls]
    return Burst(
        seconds=tuple(sorted(total for _, _, total in told)),
        first_bytes=tuple(sorted(first for _, first, _ in told)) if read_all else (),
        spread=max(starts) - min(starts),
        usages=usages,
        received=received,
        load=load,
    )


def burst_of_libtorrent(hosts: Hosts, blob: Blob, directory: Path) -> Burst:
    """Seeders and leechers, all of whom know all the others."""
    with open_torrent_swarm(hosts, blob, directory) as swarm:
        groups = {"seeder": swarm.seeders, "leecher": swarm.leechers}
        load = load_average()
        begin(groups)
        seconds = swarm.pull()
        usages = end(groups)
        received = swarm.received()
        files = swarm.files
    for file in files:
        if file_digest(file) != blob.digest:
            raise RuntimeError(f"libtorrent finished {file.parent.name} with something else")
    return Burst(
        seconds=tuple(sorted(seconds)),
        first_bytes=(),
        spread=0.0,
        usages=usages,
        received=received,
        load=load,
    )


def bound_of(options: SwarmOptions) -> float:
    """The least time in which the last agent can have the blob, in seconds."""
    return lower_bound(_simulated(options))


def predict(options: SwarmOptions, arrival: float) -> Prediction:
    """What the simulator says about the same topology, with pulls that start within ``arrival``."""
    bound = bound_of(options)
    medians, slowest = [], []
    for seed in PREDICTION_SEEDS:
        simulated = attrs.evolve(
            _simulated(options), arrival=arrival, seed=seed, until=SIMULATED_BOUNDS * bound
        )
        result = Simulation(simulated).run()
        if result.completed != result.expected:
            return Prediction(bound, None, None)
        medians.append(result.quantile(0.5))
        slowest.append(result.times[-1])
    return Prediction(bound, statistics.median(medians), statistics.median(slowest))


def _simulated(options: SwarmOptions) -> SimulationOptions:
    return SimulationOptions(
        hosts=options.agents,
        origins=options.origins,
        size=options.size,
        layers=1,
        rate=payload_rate(options.rate),
        origin_rate=payload_rate(options.origin_rate),
        rtt=options.rtt,
    )


def begin(groups: Mapping[str, Sequence[Server | Conversation]]) -> None:
    """Start to measure every process."""
    for group in groups.values():
        for process in group:
            process.begin()


def end(groups: Mapping[str, Sequence[Server | Conversation]]) -> dict[str, GroupUsage]:
    """What the processes of each kind took since `begin`."""
    return {
        kind: GroupUsage.of(process.end() for process in group) for kind, group in groups.items()
    }


def _pull(blob: Blob, *, read_all: bool) -> list[str]:
    part = [] if read_all else ["--range", f"{blob.size - 1}-"]
    return [
        *(*CURL, "--max-time", str(blob.seconds_max), "--output", "/dev/null", *part),
        *("--write-out", WRITE_OUT, f"http://{AGENT_REGISTRY}/blobs/{blob.digest}"),
    ]
