"""Real container clients, each with its own storage, so that a new one is a host with cold caches.

The tools keep state in fixed places for root (``/var/lib/containers/cache`` at least); each command
runs in a mount namespace of its own where such a place is a directory of the test.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import attrs
import pytest

from .images import Image
from .waiting import wait_until

COMMAND_SECONDS_MAX: Final = 180.0
# What the tools would share between hosts: mounted over for every command.
STATE: Final = ("/var/lib", "/run", "/opt", "/etc/docker")


def require(*binaries: str, root: bool = False) -> None:
    """Skip the test, with the reason, if a client is not installed or cannot run here."""
    missing = [binary for binary in binaries if shutil.which(binary) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    if root and not can_mount():
        pytest.skip(f"{binaries[0]} needs root with the right to mount")


@functools.cache
def can_mount() -> bool:
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        return False
    probe = subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False)
    return probe.returncode == 0


@functools.cache
def storage_driver() -> str:
    """overlay where the kernel mounts it over the file system of the temporary directory, else vfs."""
    if not can_mount():
        return "vfs"
    with tempfile.TemporaryDirectory() as name:
        for folder in ("lower", "upper", "work", "merged"):
            Path(name, folder).mkdir()
        layers = f"lowerdir={name}/lower,upperdir={name}/upper,workdir={name}/work"
        mount = ["mount", "-t", "overlay", "overlay", "-o", layers, f"{name}/merged"]
        probe = subprocess.run(["unshare", "--mount", *mount], capture_output=True, check=False)
    return "overlay" if probe.returncode == 0 else "vfs"


def run(command: list[str], *, env: Mapping[str, str] | None = None) -> str:
    """Standard output of a command that must succeed; its whole output is in the AssertionError."""
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=COMMAND_SECONDS_MAX,
        env=None if env is None else dict(env),
        check=False,
    )
    shown = f"{' '.join(command)}\nstatus {done.returncode}\n{done.stdout}{done.stderr}"
    assert done.returncode == 0, shown
    return done.stdout


def holds_programs(place: str) -> bool:
    return any(Path(entry).is_relative_to(place) for entry in os.environ["PATH"].split(":"))


@attrs.frozen
class Host:
    """One machine as the container tools see it: everything they keep is under ``directory``."""

    directory: Path

    def environment(self, **more: str) -> dict[str, str]:
        home = self.directory / "home"
        scratch = self.directory / "tmp"
        runtime = self.directory / "run"
        for folder in (home, scratch, runtime):
            folder.mkdir(mode=0o700, exist_ok=True)
        docker = home / ".docker"
        docker.mkdir(exist_ok=True)
        config = docker / "config.json"
        if not config.exists():  # a login of this host stays
            config.write_text("{}")
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "TMPDIR": str(scratch),
            "XDG_RUNTIME_DIR": str(runtime),
            "CONTAINERS_CONF": str(self._containers_conf()),
            "CONTAINERS_STORAGE_CONF": str(self._storage_conf()),
            "DOCKER_CONFIG": str(docker),
            **more,
        }

    def isolated(self, command: list[str]) -> list[str]:
        """The command with the machine's shared state replaced by directories of this host."""
        if not can_mount():
            return command
        mounts = []
        for number, place in enumerate(STATE):
            if Path(place).is_dir() and not holds_programs(place):
                own = self.directory / f"state-{number}"
                own.mkdir(exist_ok=True)
                mounts.append(f"mount --bind '{own}' '{place}'")
        script = " && ".join([*mounts, 'exec "$@"'])
        return [
            "unshare",
            "--mount",
            "--propagation",
            "private",
            "sh",
            "-ec",
            script,
            "sh",
            *command,
        ]

    def run(self, *command: str) -> str:
        return run(self.isolated(list(command)), env=self.environment())

    def skopeo(self, action: str, *arguments: str) -> str:
        return self.run("skopeo", "--insecure-policy", action, *arguments)

    def push(self, image: Image, port: int, name: str, *options: str) -> None:
        """Push with skopeo, every byte as it is in the layout: plain layers stay plain."""
        target = f"docker://127.0.0.1:{port}/{name}"
        options = ("--preserve-digests", "--dest-tls-verify=false", *options)
        self.skopeo("copy", *options, image.reference, target)

    def podman(self, *arguments: str) -> str:
        return self.run("podman", *self._roots(), *arguments)

    def buildah(self, *arguments: str) -> str:
        return self.run("buildah", *self._roots(), *arguments)

    def _roots(self) -> tuple[str, ...]:
        graph, runs = str(self.directory / "graph"), str(self.directory / "graph-run")
        return ("--root", graph, "--runroot", runs, "--storage-driver", storage_driver())

    def _containers_conf(self) -> Path:
        path = self.directory / "containers.conf"
        places = {
            "static_dir": str(self.directory / "libpod"),
            "tmp_dir": str(self.directory / "run" / "libpod"),
            "volume_path": str(self.directory / "volumes"),
        }
        lines = ["[engine]", *(f'{key} = "{place}"' for key, place in places.items())]
        path.write_text("\n".join([*lines, 'events_logger = "none"', 'runtime = "runc"', ""]))
        return path

    def _storage_conf(self) -> Path:
        """Partial pulls are on: with a zstd:chunked image podman then asks for many ranges at once."""
        path = self.directory / "storage.conf"
        graph, runs = self.directory / "graph", self.directory / "graph-run"
        path.write_text(
            f'[storage]\ndriver = "{storage_driver()}"\ngraphroot = "{graph}"\nrunroot = "{runs}"\n'
            '[storage.options]\npull_options = {enable_partial_images = "true"}\n'
        )
        return path


@contextlib.contextmanager
def daemon(
    command: list[str], *, log: Path, env: Mapping[str, str], answers: Callable[[], bool]
) -> Iterator[None]:
    """A daemon for the length of a block, entered once it answers; in the end it is waited for."""

    def is_up() -> bool:
        assert process.poll() is None, f"{log.stem} ended early:\n{log.read_text()}"
        return answers()

    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=dict(env)
        )
    try:
        wait_until(is_up, f"{log.stem} answers")
        yield
    finally:
        process.terminate()
        try:
            process.wait(30.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@attrs.frozen
class Docker:
    """The command line of one docker daemon."""

    host: Host
    socket: Path

    def __call__(self, *arguments: str) -> str:
        environment = self.host.environment(DOCKER_HOST=f"unix://{self.socket}")
        return run(["docker", *arguments], env=environment)

    def inspect(self, image: str) -> dict[str, Any]:
        return json.loads(self("image", "inspect", image))[0]

    def answers(self) -> bool:
        environment = self.host.environment(DOCKER_HOST=f"unix://{self.socket}")
        probe = ["docker", "version"]
        return (
            subprocess.run(probe, env=environment, capture_output=True, check=False).returncode == 0
        )


@contextlib.contextmanager
def docker_daemon(host: Host, config: Path | None = None) -> Iterator[Docker]:
    """A dockerd of its own: no bridge, no firewall rules, storage under the host's directory."""
    own = host.directory
    if config is None:
        config = own / "daemon.json"
        config.write_text(json.dumps({"insecure-registries": ["127.0.0.0/8"]}))
    docker = Docker(host, own / "docker.sock")
    driver = {"overlay": "overlay2", "vfs": "vfs"}[storage_driver()]
    command = [
        "dockerd",
        f"--config-file={config}",
        f"--data-root={own / 'docker'}",
        f"--exec-root={own / 'exec'}",
        f"--pidfile={own / 'docker.pid'}",
        f"--host=unix://{docker.socket}",
        f"--storage-driver={driver}",
        "--bridge=none",
        "--iptables=false",
        "--ip6tables=false",
        "--ip-forward=false",
        "--containerd-namespace=tests",
    ]
    log = own / "dockerd.log"
    command = host.isolated(command)
    with daemon(command, log=log, env=host.environment(), answers=docker.answers):
        yield docker


@attrs.frozen
class Containerd:
    """The command line of one containerd."""

    host: Host
    socket: Path

    def __call__(self, *arguments: str) -> str:
        return run(["ctr", "--address", str(self.socket), *arguments], env=self.host.environment())

    def images(self, action: str, *arguments: str) -> str:
        return self("images", action, *arguments)

    def digest(self, name: str) -> str:
        """The digest of the manifest that an image name points to."""
        rows = [line.split() for line in self.images("list", f"name=={name}").splitlines()]
        found = [row[2] for row in rows if row[0] == name]
        assert len(found) == 1, rows
        return found[0]

    def answers(self) -> bool:
        probe = ["ctr", "--address", str(self.socket), "version"]
        return subprocess.run(probe, capture_output=True, check=False).returncode == 0


@contextlib.contextmanager
def containerd_daemon(host: Host) -> Iterator[Containerd]:
    own = host.directory
    containerd = Containerd(host, own / "containerd.sock")
    config = own / "containerd.toml"
    config.write_text(
        "version = 2\n"
        f'root = "{own / "containerd"}"\n'
        f'state = "{own / "state"}"\n'
        'disabled_plugins = ["io.containerd.grpc.v1.cri"]\n'
        f'[grpc]\naddress = "{containerd.socket}"\n'
        f'[plugins."io.containerd.internal.v1.opt"]\npath = "{own / "opt"}"\n'
    )
    command = host.isolated(["containerd", "--config", str(config)])
    log = own / "containerd.log"
    with daemon(command, log=log, env=host.environment(), answers=containerd.answers):
        yield containerd


def snapshotter() -> str:
    return {"overlay": "overlayfs", "vfs": "native"}[storage_driver()]
