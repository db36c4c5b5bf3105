"""The program under test as processes: started from the command line, watched through its admin port."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import attrs
from prometheus_client.parser import text_string_to_metric_families

import swarmpull
from tests.ports import AgentPorts, ClusterPorts

from . import web
from .waiting import wait_until

READY_SECONDS_MAX: Final = 30.0
STOP_SECONDS_MAX: Final = 20.0
CONFIG_STATUS: Final = 78
LOG_TAIL_CHARACTERS: Final = 8000
# The tests try the same package that they import, wherever it is installed.
PACKAGE_PARENT: Final = str(Path(swarmpull.__file__).parent.parent)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "swarmpull", *arguments]


def environment(**more: str) -> dict[str, str]:
    """Without settings of the caller's own, and without a proxy between loopback and loopback."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("SWARMPULL_") and not name.lower().endswith("_proxy")
    }
    return {**kept, "PYTHONPATH": PACKAGE_PARENT, **more}


def options(settings: Mapping[str, str]) -> list[str]:
    """Settings as ``-o KEY=VALUE`` arguments."""
    return [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]


def run_to_the_end(
    *arguments: str, timeout: float = 60.0, within: Iterable[str] = ()
) -> subprocess.CompletedProcess[str]:
    """Run ``swarmpull ARGUMENTS`` until it exits by itself.  Raises TimeoutExpired.

    Args:
        arguments: of the command line.
        timeout: in seconds.
        within: a command that runs it, such as ``unshare``.
    """
    return subprocess.run(
        [*within, *command(*arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment(),
        cwd=tempfile.gettempdir(),
        check=False,
    )


class Program:
    """One ``swarmpull run`` process.  Its output is appended to ``log``, over restarts too.

    Attributes:
        admin: the ports whose ``/readiness`` tells that the process serves.
    """

    def __init__(self, arguments: Iterable[str], *, log: Path, admin: Iterable[int]) -> None:
        self._command = command("run", *arguments)
        # None as long as it is not meant to run
        self._process: subprocess.Popen[bytes] | None = None
        self.log = log
        self.admin = tuple(admin)

    @property
    def pid(self) -> int:
        assert self._process is not None, f"{self.log.stem} was not started"
        return self._process.pid

    def start(self) -> None:
        assert self._process is None, f"{self.log.stem} runs already"
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment(PYTHONUNBUFFERED="1"),
                cwd=self.log.parent,
            )

    def wait_until_ready(self) -> None:
        """Raises AssertionError when the process ends instead, or takes too long."""
        wait_until(self._is_ready, f"{self.log.stem} is ready", timeout=READY_SECONDS_MAX)

    def kill(self, number: signal.Signals) -> int:
        """Send a signal and wait for the end; returns the exit status, negative for a signal."""
        assert self._process is not None, f"{self.log.stem} was not started"
        process, self._process = self._process, None
        process.send_signal(number)
        try:
            return process.wait(STOP_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise

    def stop(self) -> int | None:
        """End it if it runs; the exit status, None if it did not run."""
        return None if self._process is None else self.kill(signal.SIGTERM)

    def check_alive(self) -> None:
        """Raises AssertionError when the process ended by itself, with the end of its log."""
        status = None if self._process is None else self._process.poll()
        if status is not None:
            said = self.log.read_text()[-LOG_TAIL_CHARACTERS:]
            raise AssertionError(f"{self.log.stem} ended with status {status}:\n{said}")

    def _is_ready(self) -> bool:
        self.check_alive()
        return all(answers_ready(port) for port in self.admin)


def answers_ready(port: int) -> bool:
    try:
        return web.request(port, "GET", "/readiness", timeout=5.0).status == 200
    except (OSError, http.client.HTTPException):
        return False


@attrs.frozen
class Cluster:
    """A running system: some processes and where they listen.

    Attributes:
        directory: parent of every data directory.
        programs: by name: ``all``, or ``tracker``, ``index``, ``origin``, ``agent-1``...
    """

    directory: Path
    ports: ClusterPorts
    programs: dict[str, Program]

    @property
    def registries(self) -> tuple[int, ...]:
        """The registry ports of the agents."""
        return tuple(agent.registry for agent in self.ports.agents)

    @property
    def first(self) -> AgentPorts:
        return self.ports.agents[0]

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> int:
        return self.programs[name].kill(number)

    def restart(self, *names: str) -> None:
        """Start processes that do not run, all before waiting until each of them serves."""
        for name in names:
            self.programs[name].start()
        for name in names:
            self.programs[name].wait_until_ready()

    def status(self, admin: int) -> dict[str, Any]:
        """The ``/status`` document of a role."""
        answer = web.request(admin, "GET", "/status")
        assert answer.status == 200, answer
        return answer.json()

    def bytes_received(self, agent: int) -> dict[str, int]:
        """Payload bytes that agent number ``agent`` got so far, by kind of sender."""
        return self.status(self.ports.agents[agent - 1].admin)["bytes_received"]

    def metrics(self, admin: int) -> dict[str, float]:
        """Every sample of ``/metrics`` by its name and labels, as in the text format."""
        answer = web.request(admin, "GET", "/metrics")
        assert answer.status == 200, answer
        return {
            f"{sample.name}{json.dumps(sample.labels, sort_keys=True)}": sample.value
            for family in text_string_to_metric_families(answer.text)
            for sample in family.samples
        }

    def stop(self) -> None:
        """End every process that still runs.  Raises AssertionError for an unclean exit."""
        statuses = {name: program.stop() for name, program in reversed(self.programs.items())}
        unclean = {name: status for name, status in statuses.items() if status not in {0, None}}
        logs = "\n".join(
            self.programs[name].log.read_text()[-LOG_TAIL_CHARACTERS:] for name in unclean
        )
        assert not unclean, f"SIGTERM should end a role with status 0: {unclean}\n{logs}"


def single_node(directory: Path, ports: ClusterPorts) -> Cluster:
    """``--role all``: every role in one process."""
    settings = options(ports.settings())
    count = str(len(ports.agents))
    data = str(directory / "data")
    arguments = ["--role", "all", "--agents", count, "--data-dir", data, *settings]
    program = Program(arguments, log=directory / "all.log", admin=ports.admin)
    return Cluster(directory, ports, {"all": program})


def separate_processes(directory: Path, ports: ClusterPorts) -> Cluster:
    """One process for each role and agent, all from one configuration file."""
    config = directory / "swarmpull.toml"
    config.write_text(configuration(directory, ports))
    admin = {
        "tracker": ports.tracker_admin,
        "index": ports.index_admin,
        "origin": ports.origin_admin,
    }
    programs = {
        role: role_process(directory, config, role, role, port) for role, port in admin.items()
    }
    for number, agent in enumerate(ports.agents, start=1):
        name = f"agent-{number}"
        own = {key: at for key, at in ports.settings(number).items() if key.startswith("agent.")}
        programs[name] = role_process(directory, config, "agent", name, agent.admin, own)
    return Cluster(directory, ports, programs)


def role_process(
    directory: Path,
    config: Path,
    role: str,
    name: str,
    admin: int,
    settings: Mapping[str, str] | None = None,
) -> Program:
    data = str(directory / name)
    arguments = ["--role", role, "--config", str(config), "--data-dir", data]
    arguments += options(settings or {})
    return Program(arguments, log=directory / f"{name}.log", admin=[admin])


def configuration(directory: Path, ports: ClusterPorts) -> str:
    """The file that all processes of a cluster read."""
    lines = [
        "[cluster]",
        f'trackers = ["127.0.0.1:{ports.tracker_rpc}"]',
        f'origins = ["127.0.0.1:{ports.origin_rpc}"]',
        f'indexes = ["127.0.0.1:{ports.index_rpc}"]',
        "",
        "[origin.backend]",
        f'url = "file://{directory / "backend"}"',
        "",
        "[index.backend]",
        f'url = "file://{directory / "backend"}"',
    ]
    for key, value in ports.settings().items():
        table, _, name = key.rpartition(".")
        lines += ["", f"[{table}]", f'{name} = "{value}"']
    return "\n".join(lines) + "\n"
