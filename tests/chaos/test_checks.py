"""That the suite sees what is wrong: on disks, in the table of connections."""

from __future__ import annotations

import hashlib
import os
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

from .checks import _left_open, _orphans_in, wrong_blobs
from .cluster import PORTS

CONTENT = b"content"
NAME = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """The data directory of an origin that is as it should be."""
    root = tmp_path / "origin"
    blobs = root / "blobs" / "sha256" / NAME[:2]
    for each in (blobs, root / "partials", root / "uploads", root / "temporary"):
        each.mkdir(parents=True)
    (blobs / NAME).write_bytes(CONTENT)
    (blobs / f"{NAME}.metainfo").touch()
    for name in ("lock", "origin", "write-back.sqlite", "write-back.sqlite-wal"):
        (root / name).touch()
    for end in (".data", ".pieces"):
        (root / "partials" / f"sha256-{NAME}{end}").touch()
    return root


def test_a_directory_that_is_as_it_should_be(directory: Path) -> None:
    assert list(_orphans_in(directory)) == []
    assert list(wrong_blobs(directory.parent)) == []


@pytest.mark.parametrize(
    ("left", "complaint"),
    [
        ("forgotten.tmp", "nobody knows"),
        ("temporary/12345", "was left behind"),
        ("partials/sha256-abc.data", "has no .pieces"),
        ("partials/sha256-abc.pieces", "has no .data"),
        ("blobs/sha256/ab/abc.metainfo", "has no blob"),
    ],
)
def test_what_nobody_will_remove(directory: Path, left: str, complaint: str) -> None:
    path = directory / left
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    (line,) = _orphans_in(directory)
    assert complaint in line


def test_a_blob_that_is_not_what_its_name_says(directory: Path) -> None:
    path = directory / "blobs" / "sha256" / NAME[:2] / NAME
    path.write_bytes(b"Content")
    assert list(wrong_blobs(directory.parent)) == [path]


def test_connections_that_were_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        monkeypatch.setitem(PORTS["agent"], "registry", address[1])
        role = SimpleNamespace(pid=os.getpid(), host=SimpleNamespace(name="agent-1"))
        assert list(_left_open(role)) == []

        client = socket.create_connection(address)
        served, _ = listener.accept()
        with served, client:
            assert any("a client that is gone" in line for line in _left_open(role))
            client.close()
            lines = list(_left_open(role))
    assert any("that its peer has closed" in line for line in lines)
