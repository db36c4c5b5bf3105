"""What an operator must put right ends the program at once: one line, status 78, no traceback."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

import pytest

from tests.ports import PortAllocator

from . import web
from .clients import can_mount
from .program import CONFIG_STATUS, Cluster, options, run_to_the_end


@pytest.fixture
def settings(ports: PortAllocator) -> dict[str, str]:
    """Listeners for a single node with one agent, all free."""
    return ports.cluster(1).settings()


def run_all(
    data: Path, settings: dict[str, str], within: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    arguments = ("run", "--role", "all", "--data-dir", str(data), *options(settings))
    return run_to_the_end(*arguments, within=within)


def messages(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What the program says to a person; the log of what had started before is on stderr too."""
    return [line for line in done.stderr.splitlines() if line.startswith("swarmpull: ")]


def assert_refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == CONFIG_STATUS, done.stderr
    assert "Traceback" not in done.stderr
    assert len(messages(done)) == 1, done.stderr
    assert done.stderr.splitlines()[-1] == messages(done)[0]
    for word in words:
        assert word in messages(done)[0]


@pytest.mark.parametrize(
    "key",
    [
        "agent.registry.listen",
        "agent.peer.listen",
        "agent.admin.listen",
        "origin.registry.listen",
        "origin.rpc.listen",
        "origin.peer.listen",
        "tracker.rpc.listen",
        "index.rpc.listen",
        "index.admin.listen",
        "index.api.listen",
    ],
)
def test_a_port_in_use_is_named(tmp_path: Path, settings: dict[str, str], key: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run_all(tmp_path / "data", {**settings, key: f"127.0.0.1:{port}"})

    assert_refused(done, str(port))


def test_a_data_directory_that_cannot_be_made_is_named(
    tmp_path: Path, settings: dict[str, str]
) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("not a directory")

    assert_refused(run_all(blocker / "data", settings), str(blocker))


def test_a_data_directory_that_may_not_be_written_is_named(
    tmp_path: Path, settings: dict[str, str]
) -> None:
    data = tmp_path / "read-only"
    data.mkdir(mode=0o555)

    assert_refused(run_all(data, settings, within=read_only(data)), str(data))


def read_only(directory: Path) -> tuple[str, ...]:
    """A command that runs another to which ``directory`` is read-only, for root too."""
    if os.geteuid() != 0:
        return ()
    if not can_mount():
        pytest.skip("root without the right to mount may write to any directory")
    script = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'
    return ("unshare", "--mount", "sh", "-ec", script, str(directory))


def test_a_second_process_on_the_same_data_is_refused(
    cluster: Cluster, settings: dict[str, str]
) -> None:
    done = run_all(cluster.directory / "data", settings)

    assert_refused(done, str(cluster.directory / "data"))
    web.push_image(cluster.first.registry, "team/still-there", "v1", [b"a layer"])
    assert web.pull_image(cluster.registries[1], "team/still-there", "v1")


@pytest.mark.parametrize(
    ("role", "missing"),
    [
        ("agent", "cluster.trackers"),
        ("agent", "cluster.indexes"),
        ("origin", "cluster.trackers"),
        ("agent", "cluster.origins"),
        ("tracker", "cluster.origins"),
    ],
)
def test_a_key_that_a_role_needs_is_named(
    tmp_path: Path, settings: dict[str, str], role: str, missing: str
) -> None:
    members = {
        "cluster.trackers": settings["tracker.rpc.listen"],
        "cluster.origins": settings["origin.rpc.listen"],
        "cluster.indexes": settings["index.rpc.listen"],
    }
    del members[missing]
    own = {key: value for key, value in settings.items() if key.startswith(f"{role}.")}

    done = run_to_the_end(
        "run", "--role", role, "--data-dir", str(tmp_path), *options({**own, **members})
    )

    assert_refused(done, missing)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("agent.registry.lissten=127.0.0.1:0", ["agent.registry.lissten", "listen"]),
        ("agent.registry.listen=nonsense", ["agent.registry.listen", "nonsense"]),
        ("origin.backend.url=gopher://x", ["gopher"]),
        ("agent.registry.listen", ["agent.registry.listen"]),
    ],
)
def test_a_bad_setting_is_named_with_its_place(
    tmp_path: Path, settings: dict[str, str], setting: str, words: list[str]
) -> None:
    arguments = ["--role", "all", "--data-dir", str(tmp_path / "data"), *options(settings)]

    done = run_to_the_end("run", *arguments, "-o", setting)

    assert_refused(done, *words)


def test_a_configuration_file_that_does_not_exist_is_named(tmp_path: Path) -> None:
    file = tmp_path / "absent.toml"

    assert_refused(run_to_the_end("run", "--role", "all", "--config", str(file)), str(file))


def test_every_problem_of_a_configuration_is_reported_at_once(tmp_path: Path) -> None:
    file = tmp_path / "wrong.toml"
    file.write_text('[agent.registry]\nlisten = 5\nlissten = "x"\n[tracker.rpc]\nlisten = "y"\n')

    done = run_to_the_end("run", "--role", "all", "--config", str(file))

    assert done.returncode == CONFIG_STATUS
    assert len(messages(done)) == 3
    assert "Traceback" not in done.stderr
    for word in ("agent.registry.listen", "lissten", "tracker.rpc.listen", f"{file.name}:2"):
        assert word in done.stderr
