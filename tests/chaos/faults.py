"""The steps of a scenario, done to a cluster at their times."""

from __future__ import annotations

import signal
from collections.abc import Callable
from functools import partial
from typing import Final

import structlog
import trio

from .cluster import Cluster
from .limits import READY
from .load import Clients
from .records import Record
from .scenario import EVERYTHING, Scenario, Step

log = structlog.get_logger()

# Steps after which a cluster has something to recover from, or to.
WATCHED: Final = frozenset(
    {
        "kill",
        "start",
        "restart",
        "roll",
        "freeze",
        "thaw",
        "cut",
        "heal",
        "free",
        "resolve",
        "corrupt",
    }
)


class Faults:
    """Does the steps of a scenario, and notes what came of them.

    Attributes:
        corrupted: hosts, and the digests of blobs of which a bit was flipped there.
    """

    def __init__(self, cluster: Cluster, clients: Clients, record: Record) -> None:
        self._cluster = cluster
        self._clients = clients
        self._record = record
        self._cut: set[str] = set()
        self.corrupted: list[tuple[str, str]] = []
        self._verbs: dict[str, Callable[[Step], object]] = {
            "kill": self._kill,
            "start": self._start,
            "restart": self._restart,
            "roll": self._restart,
            "wipe": self._wipe,
            "freeze": self._freeze,
            "thaw": self._thaw,
            "cut": self._cut_off,
            "heal": self._heal,
            "lose": self._lose,
            "slow": self._slow,
            "fast": self._fast,
            "fill": self._fill,
            "free": self._free,
            "corrupt": self._corrupt,
            "resolve": self._resolve,
        }

    async def run(self, scenario: Scenario, watching: trio.Nursery) -> None:
        """Return when the last step is done; recoveries are watched in a nursery that outlives this."""
        async with trio.open_nursery() as nursery:
            for step in scenario.steps[:-1]:
                await trio.sleep(max(0.0, step.at - self._clients.now()))
                # A step that takes its time, such as a rolling restart, does not delay the next one.
                nursery.start_soon(self._do, step, watching)
            await trio.sleep(max(0.0, scenario.seconds - self._clients.now()))

    async def undo(self) -> None:
        """Let everything be as it was before the first step."""
        hosts = self._cluster.hosts
        await trio.to_thread.run_sync(hosts.heal)
        await trio.to_thread.run_sync(hosts.lose, 0.0)
        for name, process in self._cluster.everybody.items():
            await trio.to_thread.run_sync(hosts.fast, name)
            if process.state == "frozen":
                process.thaw()
            elif process.state == "down":
                await process.start()
        for name in self._cluster.scenario.disks:
            self._cluster.free(name)
        self._cluster.answer_truly()

    def calm(self) -> None:
        """All roles are ready again, so nobody has an excuse any more."""
        for each in self._record.disturbances:
            self._record.calm(each.host, self._clients.now())

    async def _do(self, step: Step, watching: trio.Nursery) -> None:
        log.info("step", at=round(self._clients.now(), 1), step=str(step))
        number = len(self._record.steps)
        self._record.steps.append((self._clients.now(), str(step)))
        result = self._verbs[step.verb](step)
        if result is not None:
            await result  # type: ignore[misc]
        if step.verb in WATCHED:
            watching.start_soon(self._watch, number)

    async def _watch(self, number: int) -> None:
        """Note when all that are meant to run are ready, if that comes to be."""
        with trio.move_on_after(READY):
            await self._cluster.until_ready()
            self._record.ready[number] = self._clients.now()

    # --- processes ----------------------------------------------------------------------------

    async def _kill(self, step: Step) -> None:
        number = signal.Signals[step.argument or "SIGKILL"]
        for name in step.hosts:
            self._record.disturb(name, self._clients.now(), polite=number is signal.SIGTERM)
        async with trio.open_nursery() as nursery:
            for name in step.hosts:
                nursery.start_soon(self._cluster.everybody[name].kill, number)

    async def _start(self, step: Step) -> None:
        for name in step.hosts:
            await self._cluster.everybody[name].start()
        for name in step.hosts:
            await self._until_calm(name)

    async def _restart(self, step: Step) -> None:
        """With SIGTERM, one after the other; each is ready before the next one goes."""
        for name in step.hosts:
            self._record.disturb(name, self._clients.now(), polite=True)
            role = self._cluster.roles[name]
            await role.kill(signal.SIGTERM)
            await role.start()
            await self._until_calm(name)

    async def _until_calm(self, name: str) -> None:
        if name in self._cluster.roles:
            await self._cluster.wait_until_ready(name)
        self._record.calm(name, self._clients.now())

    async def _wipe(self, step: Step) -> None:
        for name in step.hosts:
            await self._cluster.wipe(name)

    def _freeze(self, step: Step) -> None:
        for name in step.hosts:
            self._record.disturb(name, self._clients.now(), silent=True)
            self._cluster.everybody[name].freeze()

    async def _thaw(self, step: Step) -> None:
        for name in step.hosts:
            self._cluster.everybody[name].thaw()
        for name in step.hosts:
            await self._until_calm(name)

    # --- links --------------------------------------------------------------------------------

    async def _cut_off(self, step: Step) -> None:
        others = step.others
        if others == (EVERYTHING,):
            # Those on the small side can do nothing for their clients; the others must go on.
            self._cut.update(step.hosts)
            for name in step.hosts:
                self._record.disturb(name, self._clients.now())
            others = tuple(set(self._cluster.everybody) - set(step.hosts))
        await trio.to_thread.run_sync(self._cluster.hosts.cut, step.hosts, others)

    async def _heal(self, _: Step) -> None:
        await trio.to_thread.run_sync(self._cluster.hosts.heal)
        while self._cut:
            await self._until_calm(self._cut.pop())

    async def _lose(self, step: Step) -> None:
        share = float(step.argument.rstrip("%")) / 100
        await trio.to_thread.run_sync(self._cluster.hosts.lose, share)

    async def _slow(self, step: Step) -> None:
        for name in step.hosts:
            await trio.to_thread.run_sync(self._cluster.hosts.slow, name, step.argument)

    async def _fast(self, step: Step) -> None:
        for name in step.hosts:
            await trio.to_thread.run_sync(self._cluster.hosts.fast, name)

    # --- disks and names ----------------------------------------------------------------------

    async def _fill(self, step: Step) -> None:
        for name in step.hosts:
            self._record.disturb(name, self._clients.now())
            await trio.to_thread.run_sync(self._cluster.fill, name)

    async def _free(self, step: Step) -> None:
        for name in step.hosts:
            self._cluster.free(name)
            await self._until_calm(name)

    async def _corrupt(self, step: Step) -> None:
        for name in step.hosts:
            # Whoever reads the blob there finds it damaged, and is cut off.
            self._record.disturb(name, self._clients.now())
            digest = await trio.to_thread.run_sync(partial(self._cluster.corrupt, name))
            if digest:
                self.corrupted.append((name, digest))
            log.info("corrupted", host=name, digest=digest or "nothing: no blob is there")

    def _resolve(self, step: Step) -> None:
        assert self._cluster.names is not None
        addresses = [self._cluster.roles[name].address for name in step.others]
        self._cluster.names.answers[step.hosts[0]] = step.argument or addresses
