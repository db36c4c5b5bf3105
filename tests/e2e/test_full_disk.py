"""Disks that are too small, or full: one pull fails and says why, the rest goes on."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import attrs
import pytest

from swarmpull.digest import Digest
from swarmpull.store.backends.base import blob_key
from tests.ports import PortAllocator

from . import web
from .conftest import new_directory
from .program import Cluster, Program, role_process, separate_processes

MIB: Final = 1 << 20
DISK_BYTES: Final = 24 * MIB
# More than the disk, and what fits beside nothing else.
TOO_LONG: Final = web.random_bytes(32 * MIB, "too long")
FITTING: Final = web.random_bytes(12 * MIB, "fitting")
SMALL: Final = web.random_bytes(MIB, "small")
BLOBS: Final = (TOO_LONG, FITTING, SMALL)


@attrs.frozen
class Place:
    """A cluster of which one role has a disk of `DISK_BYTES`.

    Attributes:
        role: which one.
        disk: where that is mounted.
    """

    cluster: Cluster
    role: str
    disk: Path

    def pull(self, content: bytes) -> web.Answer:
        return web.request(self.cluster.first.registry, "GET", f"/blobs/{web.digest_of(content)}")

    def check_alive(self) -> None:
        for program in self.cluster.programs.values():
            program.check_alive()

    def resize(self, size: int) -> None:
        command = ["mount", "-o", f"remount,size={size}", self.disk]
        subprocess.run(command, check=True)


@pytest.fixture(params=["origin", "agent-1"])
def place(request, scratch: Path, ports: PortAllocator) -> Iterator[Place]:
    directory = new_directory(scratch, "full")
    with ExitStack() as undo:
        undo.callback(shutil.rmtree, directory)
        disk = directory / request.param
        disk.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", disk]
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
        if mounted.returncode:
            pytest.skip(f"cannot mount a small tmpfs: {mounted.stderr}")
        undo.callback(subprocess.run, ["umount", disk], check=True)
        for content in BLOBS:
            put_into_backend(directory / "backend", content)
        cluster = separate_processes(directory, ports.cluster(1))
        cluster.programs[request.param] = without_watermark(cluster, request.param)
        undo.callback(cluster.stop)
        cluster.restart(*cluster.programs)
        yield Place(cluster, request.param, disk)


def put_into_backend(backend: Path, content: bytes) -> None:
    """As docs/configuration.md says where objects lie."""
    *parents, name = blob_key(Digest.of(content)).split("/")
    file = backend.joinpath(*(f"{parent}.d" for parent in parents), f"{name}.o")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


def without_watermark(cluster: Cluster, name: str) -> Program:
    """The disk itself shall be the limit."""
    directory = cluster.directory
    role = name.partition("-")[0]
    admin = cluster.first.admin if role == "agent" else cluster.ports.origin_admin
    own = {f"{role}.store.max_bytes": "1GiB", f"{role}.store.low_watermark": "1GiB"}
    return role_process(directory, directory / "swarmpull.toml", role, name, admin, own)


def check_refusal(answer: web.Answer, content: bytes, place: Place) -> str:
    assert answer.status == 507, answer.text
    (error,) = answer.json()["errors"]
    message = error["message"]
    assert f"store {place.role.partition('-')[0]}" in message
    assert "has no room for" in message
    assert web.digest_of(content) in message
    return message


def test_a_blob_that_is_longer_than_the_disk_is_refused_until_the_disk_is_larger(
    place: Place,
) -> None:
    message = check_refusal(place.pull(TOO_LONG), TOO_LONG, place)

    # Freeing space would not help.
    assert f"more than all of the disk ({DISK_BYTES} bytes): make that larger" in message
    place.check_alive()
    assert place.pull(FITTING).body == FITTING
    assert place.pull(SMALL).body == SMALL
    place.resize(4 * DISK_BYTES)
    assert place.pull(TOO_LONG).body == TOO_LONG


def test_a_disk_that_others_have_filled_refuses_what_does_not_fit_until_they_leave(
    place: Place,
) -> None:
    others = place.disk / "of somebody else"
    others.write_bytes(bytes(DISK_BYTES - 8 * MIB))

    message = check_refusal(place.pull(FITTING), FITTING, place)

    assert "free disk space" in message
    place.check_alive()
    assert place.pull(SMALL).body == SMALL
    others.unlink()
    assert place.pull(FITTING).body == FITTING
    assert place.pull(SMALL).body == SMALL
