"""`swarmpull store`, on data directories as a role leaves them and on one that is in use."""

from __future__ import annotations

import errno
import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest
import trio

from swarmpull.cli import main
from swarmpull.digest import Digest
from swarmpull.store.blobs import BlobStore, open_store
from swarmpull.store.hashing import hash_piece
from swarmpull.store.write_back_queue import open_write_back_queue
from swarmpull.store.write_back_schedule import QueuedBlob
from swarmpull.swarm.metainfo import PIECE_LENGTH_MIN as PIECE
from swarmpull.swarm.metainfo import Metainfo

DATA = random.Random(1).randbytes(3000)
PARTIAL = random.Random(2).randbytes(2 * PIECE + 5)
BLOB, PARTIAL_DIGEST = Digest.of(DATA), Digest.of(PARTIAL)
HASHES = b"".join(hash_piece(PARTIAL[at : at + PIECE]) for at in range(0, len(PARTIAL), PIECE))


@pytest.fixture(autouse=True)
def no_environment(monkeypatch) -> None:
    for name in [name for name in os.environ if name.startswith("SWARMPULL")]:
        monkeypatch.delenv(name)


async def fill(store: BlobStore) -> None:
    async with store.create() as writer:
        await writer.write(DATA)
        await writer.commit(BLOB)
    metainfo = Metainfo(PARTIAL_DIGEST, len(PARTIAL), PIECE, HASHES)
    async with await store.open_partial(metainfo) as partial:
        assert await partial.store_piece(1, PARTIAL[PIECE : 2 * PIECE])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A blob, and a partial with one of three pieces."""

    async def make() -> None:
        async with open_store(tmp_path / "agent", name="agent") as store:
            await fill(store)

    trio.run(make)
    return tmp_path / "agent"


@attrs.define
class Outcome:
    status: int
    out: str
    err: str

    @property
    def document(self) -> list[dict[str, object]]:
        return json.loads(self.out)


@pytest.fixture
def run(root: Path, capsys) -> Callable[..., Outcome]:
    def run(*arguments: object, directory: Path = root) -> Outcome:
        status = main(["store", *map(str, arguments), "--data-dir", str(directory)])
        captured = capsys.readouterr()
        return Outcome(status, captured.out, captured.err)

    return run


def blob_path(root: Path) -> Path:
    return root / "blobs" / "sha256" / BLOB.hex[:2] / BLOB.hex


def spoil(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes((byte[0] ^ 1,)))


def age(root: Path, seconds: float) -> None:
    then = time.time() - seconds
    for path in root.rglob("*"):
        if path.is_file():
            os.utime(path, (then, then))


def test_ls_lists_blobs_and_partials_with_their_pieces(run, root) -> None:
    age(root, 7200)

    blob, partial = run("ls", "--json").document

    assert (blob["digest"], blob["state"], blob["length"]) == (str(BLOB), "blob", 3000)
    assert blob["set_at"] == blob["used_at"]
    assert (partial["digest"], partial["state"]) == (str(PARTIAL_DIGEST), "partial")
    assert (partial["have"], partial["pieces"]) == (1, 3)
    lines = run("ls").out.splitlines()
    assert lines[0].split() == ["DIGEST", "LENGTH", "SET", "USED", "STATE"]
    assert lines[1].split() == [str(BLOB), "2.93", "KiB", "2h", "ago", "2h", "ago", "blob"]
    assert lines[2].split()[-2:] == ["partial", "1/3"]


def test_the_directory_above_will_do_when_there_is_one_store(run, root) -> None:
    assert len(run("ls", "--json", directory=root.parent).document) == 2
    (root.parent / "origin" / "blobs").mkdir(parents=True)
    (root.parent / "origin" / "lock").touch()
    outcome = run("ls", directory=root.parent)
    assert outcome.status == 1
    assert f"name one of {root}, {root.parent / 'origin'}" in outcome.err
    outcome = run("ls", directory=root / "temporary")
    assert outcome.status == 1
    assert "is not the data directory of an agent or origin" in outcome.err


@pytest.mark.parametrize("digest", [BLOB, PARTIAL_DIGEST])
def test_rm_removes_a_blob_or_a_partial(run, root, digest) -> None:
    assert run("rm", digest).status == 0

    assert str(digest) not in [each["digest"] for each in run("ls", "--json").document]
    assert [path for path in root.rglob("*") if digest.hex in path.name] == []
    outcome = run("rm", digest)
    assert outcome.status == 1
    assert "not found" in outcome.err


def test_gc_does_what_the_limits_say_and_a_dry_run_only_says_it(run, root) -> None:
    age(root, 7200)
    limits = ("-o", "agent.store.ttl=1h", "-o", "agent.store.partial_ttl=3h")

    dry = run("gc", "--dry-run", "--json", *limits).document
    assert [(each["digest"], each["reason"]) for each in dry] == [(str(BLOB), "ttl")]
    assert blob_path(root).exists()
    assert run("gc", "-o", "origin.store.ttl=1h").out == "Nothing is to be removed.\n"

    assert "ttl" in run("gc", *limits).out
    (left,) = run("ls", "--json").document
    assert left["state"] == "partial"
    assert not blob_path(root).with_suffix(".metainfo").exists()


@pytest.fixture
def queued(root) -> None:
    """The blob waits for the backend."""

    async def put() -> None:
        async with open_write_back_queue(root, "origin", lambda: ()) as queue:
            await queue.put(QueuedBlob(BLOB, 3000, "", time.time()))

    trio.run(put)


def test_gc_and_rm_keep_what_the_backend_does_not_have_yet(run, root, queued) -> None:
    age(root, 7200)

    assert run("gc", "-o", "origin.store.ttl=1h").out == "Nothing is to be removed.\n"
    outcome = run("rm", BLOB)

    assert outcome.status == 1
    assert "the backend does not have it yet" in outcome.err
    assert blob_path(root).exists()


def test_gc_takes_the_limits_of_the_role_whose_directory_it_is(run, root) -> None:
    async def be_an_origins() -> None:
        async with open_write_back_queue(root, "origin", lambda: ()):
            pass

    age(root, 7200)
    agents, origins = ("-o", "agent.store.ttl=1h"), ("-o", "origin.store.ttl=1h")
    for role, others, own, wrong in (
        ("agent", origins, agents, "origin"),
        ("origin", agents, origins, "agent"),
    ):
        assert run("gc", "--dry-run", *others).out == "Nothing is to be removed.\n"
        assert len(run("gc", "--dry-run", "--json", *own).document) == 1
        assert len(run("gc", "--dry-run", "--json", *own, "--role", role).document) == 1
        outcome = run("gc", "--role", wrong, *own)
        assert outcome.status == 2
        assert f"is the data directory of an {role}, not of an {wrong}" in outcome.err
        assert blob_path(root).exists()
        trio.run(be_an_origins)


def test_gc_touches_nothing_when_it_cannot_read_the_queue(run, root) -> None:
    age(root, 7200)
    (root / "write-back.sqlite").write_bytes(b"not a database" * 100)

    for command in (("gc", "-o", "origin.store.ttl=1h"), ("rm", BLOB)):
        outcome = run(*command)
        assert outcome.status == 1
        assert "is damaged" in outcome.err
    assert blob_path(root).exists()


def test_nothing_is_removed_from_an_origins_directory_without_a_queue(run, root, queued) -> None:
    age(root, 7200)
    for path in root.glob("write-back.sqlite*"):
        path.unlink()
    spoil(blob_path(root), 10)

    limit = ("-o", "origin.store.ttl=1h")
    for command in (
        ("gc", *limit),
        ("gc", "--dry-run", *limit),
        ("rm", BLOB),
        ("verify", "--delete"),
    ):
        outcome = run(*command)
        assert outcome.status == 1
        assert "write-back.sqlite is missing: the backend may lack any blob" in outcome.err
        assert "start the origin" in outcome.err
    assert blob_path(root).exists()
    assert len(run("ls", "--json").document) == 2


def test_verify_keeps_a_damaged_blob_that_the_backend_does_not_have_yet(run, root, queued) -> None:
    spoil(blob_path(root), 10)
    (data,) = (root / "partials").glob("*.data")
    spoil(data, PIECE + 3)

    blob, partial = run("verify", "--delete", "--json").document
    assert blob["kept"] == "it was pushed here and the backend does not have it yet"
    assert (partial["kept"], partial["wrong_pieces"]) == (None, [1])
    outcome = run("verify", "--delete")

    assert outcome.status == 1
    assert f"blob {BLOB}: hashes to sha256:" in outcome.out
    assert "(kept: it was pushed here and the backend does not have it yet)" in outcome.out
    assert outcome.out.endswith("1 right, 1 wrong: 0 removed, 1 kept.\n")
    assert blob_path(root).exists()


@pytest.mark.parametrize("place", ["hash_blob", "os.open"])
def test_verify_keeps_a_blob_that_the_disk_does_not_give(run, root, monkeypatch, place) -> None:
    open_file = os.open

    def fail(path: object, *arguments: object) -> int:
        if place == "os.open" and path != blob_path(root):
            return open_file(path, *arguments)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(f"swarmpull.store.offline.{place}", fail)

    outcome = run("verify", "--delete")

    assert outcome.status == 1
    line = f"blob {BLOB}: cannot be read: Input/output error (kept: its bytes may be right)"
    assert line in outcome.out
    assert blob_path(root).exists()


def test_gc_refuses_a_wrong_limit_as_every_command_does(run) -> None:
    outcome = run("gc", "-o", "agent.store.ttl=soon")
    assert outcome.status == 78
    assert "agent.store.ttl: must be a duration" in outcome.err


def test_verify_finds_nothing_wrong_with_what_is_right(run) -> None:
    outcome = run("verify")
    assert (outcome.status, outcome.out) == (0, "2 right, 0 wrong.\n")


def test_verify_names_a_wrong_blob_and_a_wrong_piece_and_removes_them_when_told(run, root) -> None:
    spoil(blob_path(root), 10)
    (data,) = (root / "partials").glob("*.data")
    spoil(data, PIECE + 3)

    outcome = run("verify")
    assert outcome.status == 1
    assert f"blob {BLOB}: hashes to sha256:" in outcome.out
    assert f"partial {PARTIAL_DIGEST}: 1 of 1 stored pieces are wrong" in outcome.out
    assert blob_path(root).exists()

    _, partial = run("verify", "--delete", "--json").document
    assert partial["wrong_pieces"] == [1]
    assert not blob_path(root).exists()
    (left,) = run("ls", "--json").document
    assert (left["have"], left["pieces"]) == (0, 3)
    assert run("verify").status == 0


def test_verify_finds_metainfo_that_does_not_match_a_right_blob(run, root) -> None:
    from swarmpull.store import sidecars

    path = blob_path(root).with_name(f"{BLOB.hex}.metainfo")
    path.write_bytes(sidecars.encode(Metainfo(BLOB, 3000, PIECE, bytes(32))))

    outcome = run("verify", "--delete")

    assert outcome.status == 1
    assert "the metainfo beside it has other piece hashes" in outcome.out
    assert blob_path(root).exists()
    assert not path.exists()
    assert run("verify").status == 0


def test_a_store_in_use_can_be_looked_at_and_not_changed(swarmpull, tmp_path) -> None:
    root = tmp_path / "agent"

    async def main() -> None:
        async with open_store(root, name="agent") as store:
            await fill(store)

            async def ask(*arguments: object):
                return await trio.to_thread.run_sync(
                    lambda: swarmpull("store", *arguments, "--data-dir", root)
                )

            assert len(json.loads((await ask("ls", "--json")).stdout)) == 2
            assert (await ask("verify")).returncode == 0
            assert (await ask("gc", "--dry-run")).returncode == 0
            for command in (("rm", BLOB), ("gc",), ("verify", "--delete")):
                refused = await ask(*command)
                assert refused.returncode == 1
                assert f"in use by another process (pid {os.getpid()})" in refused.stderr
                assert "stop it first" in refused.stderr
            assert store.has(BLOB)

    trio.run(main)
