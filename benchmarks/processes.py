"""Processes under measurement: started, watched, and ended by their id.

CPU seconds and peak memory of a server are those of its process between `Server.begin` and `Server.end`,
from ``/proc``; a client's CPU seconds are what the kernel reports at its end.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Self

import attrs

START_SECONDS_MAX: Final = 240.0
STOP_SECONDS_MAX: Final = 30.0
POLL_INTERVAL: Final = 0.05
LOG_TAIL_CHARACTERS: Final = 2000
TICKS_PER_SECOND: Final = os.sysconf("SC_CLK_TCK")


@attrs.frozen
class Usage:
    """What one process took for one download: CPU seconds and peak resident bytes.

    ``memory`` is None for a client: what the kernel reports at its end is at least what this process had
    when it started the client.
    """

    cpu: float
    memory: int | None


def environment() -> dict[str, str]:
    """The caller's, without settings of the program and without a proxy in between."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("SWARMPULL_") and not name.lower().endswith("_proxy")
    }


class _Measured:
    """A process that lives through a measurement; what it logs goes to a file in ``directory``."""

    def __init__(
        self, name: str, command: Sequence[str], directory: Path, *, conversing: bool
    ) -> None:
        self.name = name
        self._log = directory / f"{name}.log"
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE if conversing else subprocess.DEVNULL,
                stdout=subprocess.PIPE if conversing else log,
                stderr=log,
                text=True,
                env=environment(),
            )
        self._cpu_before = 0.0

    def said(self) -> str:
        """The end of its log."""
        return self._log.read_text(errors="replace")[-LOG_TAIL_CHARACTERS:]

    def begin(self) -> None:
        """Start to measure: CPU from here on, the peak of memory from what is in use now."""
        Path(f"/proc/{self._process.pid}/clear_refs").write_text("5")
        self._cpu_before = self._cpu()

    def end(self) -> Usage:
        """What it took since `begin`; pages of files that are mapped or shared count as memory too."""
        for line in Path(f"/proc/{self._process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return Usage(self._cpu() - self._cpu_before, int(line.split()[1]) << 10)
        raise RuntimeError(f"{self.name} has no VmHWM in /proc:\n{self.said()}")

    def anonymous(self) -> int:
        """Bytes of memory that it has now and no file backs; 0 when it has ended."""
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{self._process.pid}/status").read_text().splitlines():
                if line.startswith("RssAnon:"):
                    return int(line.split()[1]) << 10
        return 0

    def _cpu(self) -> float:
        # The name of the program may hold spaces; the numbers follow its closing parenthesis.
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        user, system = int(fields[11]), int(fields[12])
        return (user + system) / TICKS_PER_SECOND

    def terminate(self) -> None:
        """Ask it to end."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def stop(self) -> None:
        """Return when it has ended: politely, or not."""
        _end(self._process)

    def kill(self) -> None:
        """Return when it has ended: not politely."""
        self._process.kill()
        self._process.wait()


class Server(_Measured):
    """A process that serves until it is stopped."""

    def __init__(self, name: str, command: Sequence[str], directory: Path) -> None:
        super().__init__(name, command, directory, conversing=False)

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Raises RuntimeError when the process ends first or it takes too long."""
        end = time.monotonic() + START_SECONDS_MAX
        while not condition():
            if self._process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{self.name}: waited in vain until {what}:\n{self.said()}")
            time.sleep(POLL_INTERVAL)


class Conversation(_Measured):
    """A process that takes commands as lines on its standard input and answers each with one line.

    It has to end by itself within a limited time: an answer is waited for without one.
    """

    def __init__(self, name: str, command: Sequence[str], directory: Path) -> None:
        super().__init__(name, command, directory, conversing=True)

    def tell(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()

    def hear(self) -> str:
        """The next line it says.  Raises RuntimeError when it ends instead."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended without an answer:\n{self.said()}")
        return line.rstrip("\n")

    def stop(self) -> None:
        super().stop()
        _close_pipes(self._process)


@attrs.frozen
class Outcome:
    """How a client ended: seconds from its start to its end, what it used, what it printed."""

    seconds: float
    usage: Usage
    output: str


class Client:
    """A process that ends by itself, such as curl."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command
        self.started = time.perf_counter()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )

    def wait(self) -> Outcome:
        """Wait for its end.  It prints a line or two: a pipe must hold all that it says.

        Raises:
            CalledProcessError: it failed; with what it said.
        """
        _, status, usage = os.wait4(self._process.pid, 0)
        seconds = time.perf_counter() - self.started
        self._process.returncode = os.waitstatus_to_exitcode(status)
        output, errors = self._process.communicate()
        if self._process.returncode != 0:
            raise subprocess.CalledProcessError(
                self._process.returncode, self._command, output, errors
            )
        return Outcome(seconds, Usage(usage.ru_utime + usage.ru_stime, None), output)

    def stop(self) -> None:
        """End it if it has not ended."""
        _end(self._process)
        _close_pipes(self._process)


class AnonymousPeaks:
    """Looks at the anonymous memory of servers for the length of a block; the kernel keeps no peak of it.

    Attributes:
        peaks: the most that was seen, in bytes, by name of the server.
    """

    def __init__(self, servers: Sequence[Server]) -> None:
        self.peaks = {server.name: 0 for server in servers}
        self._servers = servers
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while True:
            for server in self._servers:
                self.peaks[server.name] = max(self.peaks[server.name], server.anonymous())
            if self._over.wait(POLL_INTERVAL):
                return


def stop_all(processes: Sequence[Server | Conversation]) -> None:
    """End them side by side: each may take a while to say goodbye."""
    for process in processes:
        process.terminate()
    for process in processes:
        process.stop()


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_SECONDS_MAX)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _close_pipes(process: subprocess.Popen[str]) -> None:
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            # What was still to be written to a process that has ended is of no use to anybody.
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
