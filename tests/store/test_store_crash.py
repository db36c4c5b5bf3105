"""What is left after kill -9, from real processes that are killed at work."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from swarmpull.store import piece_records, sidecars
from swarmpull.store.blobs import open_store
from swarmpull.store.hashing import hash_piece
from swarmpull.swarm import bitfield

PRELUDE = """
import sys, trio
from pathlib import Path
from swarmpull.digest import Digest
from swarmpull.store.blobs import open_store
from swarmpull.store import sidecars

root = Path(sys.argv[1])

def say(text):
    print(text, flush=True)
"""


def run_and_kill(body: str, *arguments: object, lines: int) -> list[str]:
    """Run a program, kill it when it has written so many lines; returns these."""
    program = PRELUDE + textwrap.dedent(body)
    command = [sys.executable, "-c", program, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        written = [process.stdout.readline() for _ in range(lines)]
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL, "it ended before it was killed"
    assert all(written), "it ended before it was killed"
    return [line.strip() for line in written]


STORE_PIECES = """
metainfo, _ = sidecars.decode((root / "metainfo").read_bytes())
data = (root / "data").read_bytes()

async def main():
    async with open_store(root / "store", name="one") as store:
        partial = await store.open_partial(metainfo)
        async def fetch(indices):
            for index in indices:
                start = metainfo.piece_offset(index)
                piece = memoryview(data)[start : start + metainfo.piece_size(index)]
                assert await partial.store_piece(index, piece)
                say(index)
        async with trio.open_nursery() as nursery:
            for first in range(3):
                nursery.start_soon(fetch, range(first, metainfo.piece_count, 3))
        await trio.sleep_forever()

trio.run(main)
"""


@pytest.mark.parametrize("pieces", [1, 2, 5])
async def test_a_killed_download_keeps_its_pieces_and_claims_no_other(
    tmp_path: Path, content_of, check_disk, pieces
) -> None:
    content = content_of(6 * (4 << 20) + 99)
    (tmp_path / "metainfo").write_bytes(sidecars.encode(content.metainfo))
    (tmp_path / "data").write_bytes(content.data)

    stored = {int(line) for line in run_and_kill(STORE_PIECES, tmp_path, lines=pieces)}

    root = tmp_path / "store"
    (record,) = (root / "partials").glob("*.pieces")
    records = piece_records.decode(record.read_bytes())
    claimed = set(bitfield.indices(records.have))
    on_disk = record.with_suffix(".data").read_bytes()
    for index in claimed:
        start = records.shape.piece_offset(index)
        piece = on_disk[start : start + records.shape.piece_size(index)]
        assert hash_piece(piece) == records.piece_hash(index)

    async with (
        open_store(root, name="one") as store,
        await store.open_partial(content.metainfo) as partial,
    ):
        assert {index for index in range(7) if partial.have >> index & 1} == claimed
        assert stored <= claimed
        for index in range(7):
            assert await partial.store_piece(index, content.piece(index))
        await partial.commit()
    check_disk(root)


APPEND = """
async def main():
    data = (root / "data").read_bytes()
    async with open_store(root / "store", name="one") as store:
        upload = await store.uploads.create("team/app")
        say(upload.id)
        for start in range(0, len(data), 300_000):
            async with upload.writing():
                await upload.append(data[start : start + 300_000])
            say(upload.offset)
        await trio.sleep_forever()

trio.run(main)
"""


@pytest.mark.parametrize("requests", [0, 1, 9])
async def test_a_killed_upload_goes_on_where_its_file_ends(
    tmp_path: Path, blob, check_disk, requests
) -> None:
    (tmp_path / "data").write_bytes(blob.data)

    upload_id, *offsets = run_and_kill(APPEND, tmp_path, lines=1 + requests)

    root = tmp_path / "store"
    acknowledged = int(offsets[-1]) if offsets else 0
    size = (root / "uploads" / f"{upload_id}.data").stat().st_size
    async with open_store(root, name="one") as store:
        upload = store.uploads.get("team/app", upload_id)
        assert upload.offset == size >= acknowledged
        await upload.append(blob.data[upload.offset :])
        assert (await upload.finish(blob.digest)).length == len(blob.data)
    check_disk(root)


WRITE_BLOBS = """
async def write(store, worker):
    for number in range(1000):
        data = f"{worker} {number} ".encode() * 100_000
        async with store.create() as writer:
            await writer.write(data)
            stat = await writer.commit(Digest.of(data))
        say(stat.digest)

async def main():
    async with open_store(root, name="one") as store:
        async with trio.open_nursery() as nursery:
            for worker in range(4):
                nursery.start_soon(write, store, worker)

trio.run(main)
"""


@pytest.mark.parametrize("lines", [1, 2, 4, 7])
async def test_a_killed_writer_leaves_whole_blobs_and_nothing_else(
    tmp_path: Path, check_disk, lines
) -> None:
    acknowledged = set(run_and_kill(WRITE_BLOBS, tmp_path, lines=lines))

    async with open_store(tmp_path, name="one") as store:
        listed = list(store.list())
        assert acknowledged <= {str(stat.digest) for stat in listed}
        for stat in listed:
            assert (await store.metainfo(stat.digest)).length == stat.length
    check_disk(tmp_path)
    assert os.listdir(tmp_path / "partials") == []


async def test_the_lock_goes_with_the_process(tmp_path: Path) -> None:
    body = """
    async def main():
        async with open_store(root, name="one"):
            say("open")
            await trio.sleep_forever()

    trio.run(main)
    """
    run_and_kill(body, tmp_path, lines=1)

    async with open_store(tmp_path, name="one"):
        pass
