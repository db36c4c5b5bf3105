"""What the end-to-end tests start, and how they show its logs.

Directories are short (``/tmp/sp-...``): the sockets of daemons lie in them, and the name of a Unix
socket has 108 bytes at most.
"""

from __future__ import annotations

import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.ports import PORTS_OF_THIS_PROCESS, PortAllocator

from .clients import Containerd, Docker, Host, containerd_daemon, docker_daemon, require
from .images import ImageFactory
from .program import Cluster, Program, separate_processes, single_node

AGENTS: Final = 3
LOG_TAIL_BYTES: Final = 16 << 10
# The processes of the running clusters, each with the length of its log when the test began.
RUNNING: Final = pytest.StashKey[dict[Program, int]]()


@pytest.fixture(scope="session")
def scratch() -> Iterator[Path]:
    """A directory that is gone after the tests."""
    directory = new_directory(Path(tempfile.gettempdir()), "sp")
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


@pytest.fixture(scope="session")
def ports() -> PortAllocator:
    return PORTS_OF_THIS_PROCESS


@pytest.fixture(scope="session")
def images(scratch: Path) -> ImageFactory:
    return ImageFactory(scratch / "images")


def started(cluster: Cluster, config: pytest.Config) -> Iterator[Cluster]:
    running = config.stash.setdefault(RUNNING, {})
    running.update(dict.fromkeys(cluster.programs.values(), 0))
    try:
        cluster.restart(*cluster.programs)
        yield cluster
    finally:
        for program in cluster.programs.values():
            running.pop(program)
        cluster.stop()


@pytest.fixture(scope="session")
def cluster(scratch: Path, ports: PortAllocator, request) -> Iterator[Cluster]:
    """All roles and three agents in one process, for all tests that leave it as it was."""
    directory = scratch / "single"
    directory.mkdir()
    yield from started(single_node(directory, ports.cluster(AGENTS)), request.config)


@pytest.fixture(scope="module")
def separate_cluster(scratch: Path, ports: PortAllocator, request) -> Iterator[Cluster]:
    """One process for each role and for each of three agents."""
    directory = new_directory(scratch, "separate")
    yield from started(separate_processes(directory, ports.cluster(AGENTS)), request.config)
    shutil.rmtree(directory)


@pytest.fixture
def host(scratch: Path) -> Iterator[Host]:
    """A machine with container tools that have never pulled anything."""
    yield from new_host(scratch)


@pytest.fixture
def other_host(scratch: Path) -> Iterator[Host]:
    yield from new_host(scratch)


def new_directory(parent: Path, prefix: str) -> Path:
    """A directory of its own, private, with no underscore in its name.

    `tempfile.mkdtemp` may end in one, and podman and buildah take the path of an image layout for the name
    of an image, where that is not allowed.
    """
    directory = parent / f"{prefix}-{secrets.token_hex(4)}"
    directory.mkdir(mode=0o700)
    return directory


def new_host(scratch: Path) -> Iterator[Host]:
    directory = new_directory(scratch, "h")
    try:
        yield Host(directory)
    finally:
        shutil.rmtree(directory)


@pytest.fixture
def docker(host: Host) -> Iterator[Docker]:
    require("dockerd", "docker", root=True)
    with docker_daemon(host) as daemon:
        yield daemon


@pytest.fixture
def containerd(host: Host) -> Iterator[Containerd]:
    require("containerd", "ctr", root=True)
    with containerd_daemon(host) as daemon:
        yield daemon


@pytest.fixture(autouse=True)
def nothing_unforeseen(request) -> Iterator[None]:
    """Whatever a test sends: every process goes on, and logs no error that it did not foresee."""
    running = request.config.stash.setdefault(RUNNING, {})
    for program in running:
        program.check_alive()
        running[program] = size_of(program.log)
    yield
    for program, start in running.items():
        program.check_alive()
        text = text_from(program.log, start)
        assert "Traceback (most recent call last)" not in text, program.log.stem


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    """Show with a failure what each process of the cluster logged during the test."""
    report = yield
    if report.failed:
        for program, start in item.config.stash.get(RUNNING, {}).items():
            log = program.log
            if text := text_from(log, max(start, size_of(log) - LOG_TAIL_BYTES)):
                report.sections.append((f"log of {log.stem}", text))
    return report


def size_of(log: Path) -> int:
    return log.stat().st_size if log.exists() else 0


def text_from(log: Path, start: int) -> str:
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(start)
        return file.read().decode(errors="replace")
