"""One scenario from its first process to its last: the load, the steps, the checks."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import attrs
import trio

from .checks import damaged, endings, leaks, lost_pushes, orphans, tasks_of, wait_for_queues
from .cluster import Cluster, open_cluster
from .faults import Faults
from .limits import OVERTIME, POLL
from .load import Clients
from .network import open_hosts
from .records import (
    PULL,
    PUSH,
    Attempt,
    Counts,
    Record,
    Recovery,
    count,
    recoveries,
    slowest,
    stretched,
    violations,
)
from .scenario import Scenario
from .tls import Certificates


@attrs.frozen
class Options:
    """How scenarios are run.

    Attributes:
        namespaces: with links that can be cut; else on loopback.
        tls: with mutual TLS between roles.
        quick: without waiting until the backend has everything.
        seed: of what clients ask for.
        directory: where to work; None for that of temporary files.
        keep: leave logs and data there.
    """

    namespaces: bool
    tls: bool = False
    quick: bool = False
    seed: int = 1
    directory: Path | None = None
    keep: bool = False


@attrs.frozen
class Result:
    """What came of a scenario.

    Attributes:
        violations: what must not happen and did; empty if all is well.
        health: seconds from the end of the faults until all roles were ready; None if they never were.
        backend: seconds until the backend had everything, too; None if that was not waited for.
        lost: acknowledged pushes that could not be read.
        damaged: blobs of which a bit was flipped on a disk, and that were read again at the end.
        slowest: the attempts that waited for longest without an excuse.
    """

    scenario: str
    title: str
    namespaces: bool
    tls: bool
    seed: int
    seconds: float
    pushes: Counts
    pulls: Counts
    lost: int
    cold_reads: int
    damaged: int
    health: float | None
    backend: float | None
    recoveries: Sequence[Recovery]
    slowest: Sequence[Attempt]
    violations: Sequence[str]


@contextmanager
def _scratch(options: Options) -> Iterator[Path]:
    """A directory that is gone afterwards, unless it is to be kept."""
    directory = Path(tempfile.mkdtemp(prefix="chaos-", dir=options.directory))
    try:
        yield directory
    finally:
        if not options.keep:
            shutil.rmtree(directory)


async def run_scenario(scenario: Scenario, options: Options) -> Result:
    """Run it.

    Raises:
        ClusterError, RuntimeError: the cluster did not come up, or the machine cannot do this.
        trio.TooSlowError: it took far longer than it may.
    """
    with _scratch(options) as directory, open_hosts(namespaces=options.namespaces) as hosts:
        certificates = Certificates.create(directory / "tls") if options.tls else None
        with trio.fail_after(scenario.seconds + OVERTIME):
            async with open_cluster(scenario, hosts, directory, certificates) as cluster:
                return await _play(cluster, scenario, options)


async def _watch_endings(cluster: Cluster, record: Record) -> None:
    """Note processes that end by themselves, once each."""
    seen: set[str] = set()
    while True:
        for name, role in cluster.roles.items():
            status = role.ended_by_itself()
            if status is not None and name not in seen:
                seen.add(name)
                record.violations.append(f"{name} ended with {status} by itself:\n{role.said()}")
        await trio.sleep(POLL)


async def _play(cluster: Cluster, scenario: Scenario, options: Options) -> Result:
    record = Record()
    tasks_before = await tasks_of(cluster)
    clients = Clients(cluster, scenario.load, record, options.seed)
    faults = Faults(cluster, clients, record)
    stop = trio.Event()
    async with trio.open_nursery() as watching:
        watching.start_soon(_watch_endings, cluster, record)
        async with trio.open_nursery() as load:
            load.start_soon(clients.run, stop)
            await faults.run(scenario, watching)
            stop.set()
            over_at = clients.now()
            await faults.undo()
            await cluster.wait_until_ready(*cluster.roles)
            health = clients.now() - over_at
            faults.calm()
            clients.expect_success()
        lost = await lost_pushes(cluster, clients, record)
        record.violations += await damaged(cluster, faults.corrupted)
        backend = None
        if not options.quick:
            record.violations += filter(None, [await wait_for_queues(cluster)])
            backend = clients.now() - over_at
        record.violations += await leaks(cluster, tasks_before)
        watching.cancel_scope.cancel()
    await cluster.stop()
    record.violations += [f"{image} was acknowledged and is lost" for image in lost]
    record.violations += [*endings(cluster), *orphans(cluster)]
    excused = stretched(record, scenario.excused)
    return Result(
        scenario=scenario.name,
        title=scenario.title,
        namespaces=options.namespaces,
        tls=options.tls,
        seed=options.seed,
        seconds=clients.now(),
        pushes=count(record, PUSH, excused),
        pulls=count(record, PULL, excused),
        lost=len(lost),
        cold_reads=len(record.pushed),
        damaged=len(faults.corrupted),
        health=health,
        backend=backend,
        recoveries=recoveries(record),
        slowest=slowest(record, excused),
        violations=violations(record, excused),
    )
