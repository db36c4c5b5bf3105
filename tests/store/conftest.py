"""Stores on a real disk, and what every test of them leaves behind."""

from __future__ import annotations

import errno
import functools
import os
import random
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import attrs
import pytest

from swarmpull.digest import Digest
from swarmpull.store.blobs import BlobStore, open_store
from swarmpull.store.hashing import hash_piece
from swarmpull.swarm.metainfo import PIECE_LENGTH_MIN, Metainfo, piece_length_for

from .s3_server import S3Server, credentials, installed_kinds, running_server

SMALL_DISK_BYTES = 24 << 20


@attrs.frozen
class Content:
    """A blob in memory, with all that is to know of it."""

    data: bytes = attrs.field(repr=False)
    digest: Digest
    metainfo: Metainfo

    def piece(self, index: int) -> bytes:
        start = self.metainfo.piece_offset(index)
        return self.data[start : start + self.metainfo.piece_size(index)]


def make_content(length: int, *, algorithm: str = "sha256", seed: int = 0) -> Content:
    data = random.Random(seed).randbytes(length)
    digest = Digest.of(data, algorithm)
    step = piece_length_for(length)
    hashes = b"".join(hash_piece(data[start : start + step]) for start in range(0, length, step))
    return Content(data, digest, Metainfo(digest, length, step, hashes))


@pytest.fixture(scope="session")
def content_of():
    return make_content


@pytest.fixture(scope="session")
def blob() -> Content:
    """Three pieces, the last one short."""
    return make_content(2 * PIECE_LENGTH_MIN + 12345)


def open_files_under(root: Path) -> list[str]:
    found = []
    for entry in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{entry}")
        except FileNotFoundError:
            continue
        if target.startswith(str(root)):
            found.append(target)
    return sorted(found)


def check_store_on_disk(root: Path) -> None:
    """What holds whenever no write is under way."""
    assert list((root / "temporary").iterdir()) == []
    for path in (root / "blobs").rglob("*"):
        if path.is_file() and path.suffix != ".metainfo":
            algorithm = path.relative_to(root / "blobs").parts[0]
            assert Digest.of(path.read_bytes(), algorithm).hex == path.name
            assert path.parent.name == path.name[:2]


@pytest.fixture
def check_disk():
    return check_store_on_disk


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[BlobStore]:
    root = tmp_path / "store"
    async with open_store(root, name="agent-1") as opened:
        yield opened
    check_store_on_disk(root)
    assert open_files_under(root) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB."""
    mount_point = tmp_path / "small"
    mount_point.mkdir()
    try:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK_BYTES}", "tmpfs", mount_point],
            check=True,
            capture_output=True,
            text=True,
        )
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"cannot mount a small tmpfs: {getattr(error, 'stderr', '') or error}")
    try:
        yield mount_point
    finally:
        subprocess.run(["umount", mount_point], check=True)


def fill(directory: Path) -> None:
    """Leave no room at all."""
    descriptor = os.open(directory / "filler", os.O_WRONLY | os.O_CREAT)
    block = bytes(1 << 20)
    try:
        while block:
            try:
                os.write(descriptor, block)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                block = block[: len(block) // 2]
    finally:
        os.close(descriptor)


@pytest.fixture(scope="session")
def s3_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], S3Server]]:
    """Starts an S3 server of a kind, once for all tests; their credentials are in the environment."""
    with credentials(), ExitStack() as running:

        @functools.cache
        def start(kind: str) -> S3Server:
            directory = tmp_path_factory.mktemp(kind or "s3")
            return running.enter_context(running_server(directory, kind))

        yield start


# Without any, one test of each kind is skipped, and says why.
@pytest.fixture(scope="session", params=installed_kinds() or [""])
def s3_server(request: pytest.FixtureRequest, s3_servers: Callable[[str], S3Server]) -> S3Server:
    """Each S3 server that is installed here, in turn."""
    return s3_servers(request.param)
