"""One process: start the roles in order, drain them on a signal, say how it ended.

SIGHUP reads the configuration again; what can change while roles run does, the rest is named in the log.

Roles start tracker, index, origin, agents, each when the one before it serves, and drain in the
opposite order, so that an agent can still tell the tracker that it leaves.  The first SIGTERM or SIGINT
drains within ``drain_timeout``, the second cancels, the third exits without more ado.  A service manager
(`swarmpull.systemd`) hears when everything serves, when the end begins, and that the event loop is alive.
"""

from __future__ import annotations

import functools
import gc
import os
import signal
import sys
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Final, Protocol, TypeVar

import attrs
import structlog
import trio

from swarmpull.config import ROLES, Config
from swarmpull.errors import ConfigError, StartupError, SwarmpullError
from swarmpull.layers import Loaded, toml_values
from swarmpull.roles.addresses import RoleAddresses
from swarmpull.roles.config_changes import ConfigChanges
from swarmpull.systemd import ServiceManager

# sysexits.h
EXIT_OK: Final = 0
EXIT_SOFTWARE: Final = 70
EXIT_CUT_OFF: Final = 75  # EX_TEMPFAIL
EXIT_CONFIG: Final = 78
# as shells report the death by SIGINT
EXIT_INTERRUPTED: Final = 130

# Seconds after a cancellation before the process exits regardless: a send to a client that stopped
# reading, or a thread in a hung file system, cannot be cancelled.
_HARD_EXIT_AFTER: Final = 5.0

# What SIGHUP changes; everything else needs a restart.
RELOADED: Final = frozenset(
    {"cluster.trackers", "cluster.origins", "cluster.indexes", "cluster.weights"}
)

_T = TypeVar("_T")

_log = structlog.get_logger(__name__)


@attrs.define(slots=False)
class Interrupted(SwarmpullError):
    """A signal ended a command before it was done."""

    signal_number: int

    def __str__(self) -> str:
        return f"interrupted by {signal.Signals(self.signal_number).name}, nothing was left behind"


class RoleMain(Protocol):
    """The entry point of a role: it serves until ``drain`` is set and all it began has ended."""

    async def __call__(
        self,
        config: Config,
        settings: Any,  # noqa: ANN401 - each role has its own class
        /,
        *,
        drain: trio.Event,
        changes: ConfigChanges | None,
        task_status: trio.TaskStatus[RoleAddresses],
    ) -> None: ...


def role_main(role: str) -> RoleMain:
    """The entry point of a role.  Imported here, so that a process loads only what it runs."""
    if role == "tracker":
        from swarmpull.roles.tracker import run_tracker

        return run_tracker
    if role == "index":
        from swarmpull.roles.index import run_index

        return run_index
    if role == "origin":
        from swarmpull.roles.origin import run_origin

        return run_origin
    from swarmpull.roles.agent import run_agent

    return run_agent


@attrs.define(eq=False)
class _Stage:
    """All instances of one role: they start one after the other and drain together.

    Attributes:
        role: its name.
        main: its entry point.
        settings: one for each instance.
        changes: tells them of another configuration.
        drain: set to make the instances end.
        done: set when the last instance has ended.
        running: instances that have not ended.
    """

    role: str
    main: RoleMain
    settings: Sequence[Any]
    changes: ConfigChanges | None = None
    drain: trio.Event = attrs.field(factory=trio.Event)
    done: trio.Event = attrs.field(factory=trio.Event)
    running: int = 0

    async def run_instance(
        self,
        config: Config,
        settings: Any,  # noqa: ANN401
        *,
        task_status: trio.TaskStatus[RoleAddresses] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        self.running += 1
        await self.main(
            config, settings, drain=self.drain, changes=self.changes, task_status=task_status
        )
        if not self.drain.is_set():
            raise RuntimeError(f"role {self.role} ended although nobody asked it to")
        self.running -= 1
        if not self.running:
            self.done.set()


@attrs.define(eq=False)
class _Process:
    """The stages of this process and how they end."""

    config: Config
    stages: Sequence[_Stage]
    manager: ServiceManager
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    started: bool = False
    status: int = EXIT_OK

    async def run(self, announce: Callable[[Sequence[RoleAddresses]], None]) -> None:
        """Start every stage, then wait until all have ended or are cancelled."""
        with self.scope:
            async with trio.open_nursery() as nursery:
                addresses = []
                for stage in self.stages:
                    for settings in stage.settings:
                        start = functools.partial(stage.run_instance, self.config, settings)
                        addresses.append(await nursery.start(start))
                        _log.info("role started", role=stage.role, **addresses[-1].listeners)
                self.started = True
                # What is here now stays: the collector need not walk through it again and again, which takes
                # tens of milliseconds in which no peer is answered.
                gc.collect()
                gc.freeze()
                announce(addresses)
                self.manager.ready(self._status("serving"))

    async def handle_signals(
        self,
        signals: AsyncIterator[int],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        task_status.started()
        received = 0
        async with trio.open_nursery() as nursery:
            async for number in signals:
                received += 1
                name = signal.Signals(number).name
                if received == 1 and self.started:
                    _log.info("draining", signal=name, timeout=self.config.drain_timeout)
                    seconds = self.config.drain_timeout + _HARD_EXIT_AFTER
                    self.manager.stopping(self._status("draining"), seconds)
                    nursery.start_soon(self._drain)
                elif received == 1:
                    _log.info("stopped before all roles had started", signal=name)
                    self.manager.stopping("stopping before all roles had started", _HARD_EXIT_AFTER)
                    self.scope.cancel(name)
                    nursery.start_soon(self._exit_if_stuck)
                elif received == 2:
                    self._cut_off(f"second signal, {name}")
                    nursery.start_soon(self._exit_if_stuck)
                else:
                    os._exit(EXIT_CUT_OFF)

    def _status(self, what: str) -> str:
        return (
            f"{what}: {', '.join(stage.role for stage in self.stages if not stage.done.is_set())}"
        )

    async def _drain(self) -> None:
        """Drain agents first and trackers last; each stage gets its share of the time left."""
        deadline = trio.current_time() + self.config.drain_timeout
        for index, stage in enumerate(reversed(self.stages)):
            stage.drain.set()
            if index:
                self.manager.status(self._status("draining"))
            share = max(deadline - trio.current_time(), 0) / (len(self.stages) - index)
            with trio.move_on_after(share):
                await stage.done.wait()
        with trio.move_on_at(deadline):
            for stage in self.stages:
                await stage.done.wait()
            return
        self._cut_off("drain timeout")
        await self._exit_if_stuck()

    def _cut_off(self, reason: str) -> None:
        unfinished = [stage.role for stage in self.stages if not stage.done.is_set()]
        _log.warning("work was cut off", reason=reason, roles=unfinished)
        self.status = EXIT_CUT_OFF
        self.scope.cancel(reason)

    async def _exit_if_stuck(self) -> None:
        await trio.sleep(_HARD_EXIT_AFTER)
        _log.error("exiting although some work cannot be cancelled")
        os._exit(EXIT_CUT_OFF)


def _stages(loaded: Loaded, roles: frozenset[str], changes: ConfigChanges) -> tuple[_Stage, ...]:
    return tuple(
        _Stage(
            role,
            role_main(role),
            loaded.agents if role == "agent" else (getattr(loaded.config, role),),
            changes,
        )
        for role in ROLES
        if role in roles
    )


async def serve(
    loaded: Loaded,
    roles: frozenset[str],
    announce: Callable[[Sequence[RoleAddresses]], None],
    reload: Callable[[], Loaded] | None = None,
) -> int:
    """Run ``roles`` until a signal ends them; returns the exit status.

    ``announce`` is called once, when all of them serve; ``reload`` reads the configuration again.
    """
    from swarmpull.telemetry import watch_event_loop

    changes = ConfigChanges()
    manager = ServiceManager.of(os.environ)
    process = _Process(loaded.config, _stages(loaded, roles, changes), manager)
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:
            await nursery.start(process.handle_signals, signals)
            if reload is not None:
                await nursery.start(_reload_on_signal, loaded.config, reload, changes)
            nursery.start_soon(watch_event_loop)
            nursery.start_soon(manager.feed_watchdog)
            await process.run(announce)
            nursery.cancel_scope.cancel("all roles have ended")
    return process.status


async def _reload_on_signal(
    config: Config,
    reload: Callable[[], Loaded],
    changes: ConfigChanges,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Read the configuration again on each SIGHUP, and change what can be changed."""
    has_terminal = os.isatty(0)
    with trio.open_signal_receiver(signal.SIGHUP) as signals:
        task_status.started()
        async for _ in signals:
            if has_terminal and not os.isatty(0):
                # Nobody asks for anything: the terminal was closed.
                signal.raise_signal(signal.SIGTERM)
                return
            config = await _reload(config, reload, changes)


async def _reload(config: Config, reload: Callable[[], Loaded], changes: ConfigChanges) -> Config:
    """Returns the configuration as far as it is in force now."""
    try:
        new = (await trio.to_thread.run_sync(reload)).config
    except ConfigError as error:
        problems = [str(problem) for problem in error.problems]
        _log.error("configuration not reloaded, the old one stays", problems=problems)
        return config
    before, after = toml_values(config), toml_values(new)
    changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    taken = sorted(changed & RELOADED)
    if taken:
        changes.tell(new.cluster)
    _log.info("configuration reloaded", changed=taken, need_restart=sorted(changed - RELOADED))
    names = [key.removeprefix("cluster.") for key in RELOADED]
    in_force = {name: getattr(new.cluster, name) for name in names}
    return attrs.evolve(config, cluster=attrs.evolve(config.cluster, **in_force))


def run(
    loaded: Loaded,
    roles: frozenset[str],
    announce: Callable[[Sequence[RoleAddresses]], None],
    reload: Callable[[], Loaded] | None = None,
) -> int:
    """Run ``roles`` in this process; returns its exit status, after saying on stderr what was wrong."""
    from swarmpull.telemetry import setup_logging

    setup_logging(loaded.config.log)
    try:
        return trio.run(serve, loaded, roles, announce, reload)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except Exception as exc:
        return _report(exc)


def _report(failure: Exception) -> int:
    """One line for each thing that the operator can mend; a traceback for everything else."""
    group = failure if isinstance(failure, ExceptionGroup) else ExceptionGroup("", [failure])
    expected, unexpected = group.split((ConfigError, StartupError))
    for error in _leaves(expected):
        for line in str(error).splitlines():
            sys.stderr.write(f"swarmpull: {line}\n")
    if unexpected is None:
        return EXIT_CONFIG
    for error in _leaves(unexpected):
        traceback.print_exception(error)
    return EXIT_SOFTWARE


def run_command(command: Callable[[], Awaitable[_T]]) -> _T:
    """Run one client command; returns its result or raises its first error, never a group.

    Raises:
        Interrupted: SIGINT or SIGTERM ended it, after it had cleaned up.
    """
    try:
        return trio.run(_run_interruptible, command)
    except ExceptionGroup as group:
        raise _leaves(group)[0] from None


async def _run_interruptible(command: Callable[[], Awaitable[_T]]) -> _T:
    outcome: list[_T] = []
    received: list[int] = []

    async def cancel_on_signal(
        *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            task_status.started()
            async for number in signals:
                received.append(number)
                nursery.cancel_scope.cancel(signal.Signals(number).name)
                return

    async with trio.open_nursery() as nursery:
        await nursery.start(cancel_on_signal)
        outcome.append(await command())
        nursery.cancel_scope.cancel("the command has ended")
    if not outcome:
        raise Interrupted(received[0])
    return outcome[0]


def _leaves(error: Exception | None) -> list[Exception]:
    if error is None:
        return []
    if isinstance(error, ExceptionGroup):
        return [leaf for part in error.exceptions for leaf in _leaves(part)]
    return [error]
