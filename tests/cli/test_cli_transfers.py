"""Push and pull against a server on a real socket that misbehaves on demand."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from swarmpull.cli import main, options
from swarmpull.digest import Digest
from swarmpull.errors import DigestMismatch, LengthMismatch
from swarmpull.registry.client import (
    RequestRefused,
    Retries,
    ServerUnavailable,
    UnexpectedAnswer,
    file_at,
    hash_file,
    open_client,
    registry_url,
)
from swarmpull.registry.http import HTTPS_ONLY
from swarmpull.registry.layouts import ImageName, InvalidImageName

QUICK = Retries(attempts=3, backoff=0.001)
CONTENT = random.Random(1).randbytes(3_500_000)
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"


async def download(registry, path: Path, digest: str, **options) -> None:
    parsed = Digest.parse(digest)
    async with open_client(registry.url, retries=QUICK) as client:
        with file_at(path, parsed) as sink:
            await client.get_blob(f"/blobs/{digest}", sink, **options)


# --- blobs ----------------------------------------------------------------------------------------


async def test_a_blob_is_written_to_its_name_and_progress_is_told(registry, tmp_path) -> None:
    digest = registry.add_blob(CONTENT)
    told: list[tuple[int, int | None]] = []
    await download(registry, tmp_path / "x", digest, progress=lambda *done: told.append(done))
    assert (tmp_path / "x").read_bytes() == CONTENT
    assert told[0] == (0, len(CONTENT))
    assert told[-1] == (len(CONTENT), len(CONTENT))
    assert told == sorted(told)
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("content", [b"", b"x"])
async def test_the_smallest_blobs_work(registry, tmp_path, content: bytes) -> None:
    await download(registry, tmp_path / "x", registry.add_blob(content))
    assert (tmp_path / "x").read_bytes() == content


async def test_a_download_goes_on_where_the_connection_was_cut(registry, tmp_path) -> None:
    digest = registry.add_blob(CONTENT)
    registry.cuts = [1_500_000, 1_100_000]
    await download(registry, tmp_path / "x", digest)
    assert (tmp_path / "x").read_bytes() == CONTENT
    ranges = [asked for _, _, asked in registry.requests]
    # Everything that had arrived counts, not only whole chunks.
    assert ranges == [None, "bytes=1500000-", "bytes=2600000-"]


async def test_a_server_that_ignores_ranges_is_read_again_from_the_start(
    registry, tmp_path
) -> None:
    digest = registry.add_blob(CONTENT)
    registry.cuts = [2_500_000]
    registry.ranges = False
    await download(registry, tmp_path / "x", digest)
    assert (tmp_path / "x").read_bytes() == CONTENT
    assert [asked for _, _, asked in registry.requests] == [None, "bytes=2500000-"]


async def test_a_download_that_gets_nowhere_is_given_up_and_leaves_nothing(
    registry, tmp_path
) -> None:
    digest = registry.add_blob(CONTENT)
    registry.cuts = [0] * 10
    with pytest.raises(ServerUnavailable) as caught:
        await download(registry, tmp_path / "x", digest)
    assert caught.value.url == registry.url
    assert len(registry.requests) == QUICK.attempts
    assert os.listdir(tmp_path) == []


async def test_progress_between_cuts_makes_every_attempt_the_first_again(
    registry, tmp_path
) -> None:
    digest = registry.add_blob(CONTENT)
    registry.cuts = [0, 0, 1_100_000, 0, 1_100_000, 0]
    await download(registry, tmp_path / "x", digest)
    assert (tmp_path / "x").read_bytes() == CONTENT
    assert len(registry.requests) == 7


async def test_a_busy_server_is_asked_again(registry, tmp_path) -> None:
    digest = registry.add_blob(b"content")
    registry.refusals = [(503, b"starting"), (429, b"")]
    await download(registry, tmp_path / "x", digest)
    assert (tmp_path / "x").read_bytes() == b"content"


async def test_a_server_that_stays_busy_is_said_to_be_there(registry, tmp_path) -> None:
    digest = registry.add_blob(b"content")
    registry.refusals = [(503, b"no index answers")] * QUICK.attempts
    with pytest.raises(ServerUnavailable, match=r"cannot do it just now: .*Try again later"):
        await download(registry, tmp_path / "x", digest)


async def test_content_that_does_not_match_its_digest_is_not_visible(registry, tmp_path) -> None:
    digest = registry.add_blob(CONTENT)
    registry.blobs[digest] = CONTENT[:-1] + b"\0"
    (tmp_path / "x").write_bytes(b"what was there before")
    with pytest.raises(DigestMismatch) as caught:
        await download(registry, tmp_path / "x", digest)
    assert caught.value.expected == digest
    assert (tmp_path / "x").read_bytes() == b"what was there before"
    assert os.listdir(tmp_path) == ["x"]


async def test_a_declared_length_is_held_against_the_server(registry, tmp_path) -> None:
    digest = registry.add_blob(b"content")
    with pytest.raises(UnexpectedAnswer):
        await download(registry, tmp_path / "x", digest, length=6)


def test_a_download_of_the_wrong_length_is_a_mismatch(tmp_path) -> None:
    with (
        pytest.raises(LengthMismatch),
        file_at(tmp_path / "x", Digest.of(b"content")) as sink,
    ):
        sink.verify(7)
    assert os.listdir(tmp_path) == []


async def test_a_refusal_carries_the_words_of_the_server(registry, tmp_path) -> None:
    digest = str(Digest.of(b"absent"))
    with pytest.raises(RequestRefused) as caught:
        await download(registry, tmp_path / "x", digest)
    assert caught.value.status == 404
    assert caught.value.reason == "BLOB_UNKNOWN: nobody has it"


async def test_nobody_listening_is_known_at_once(unused_port, tmp_path) -> None:
    async with open_client(f"127.0.0.1:{unused_port}") as client:
        with pytest.raises(ServerUnavailable) as caught:
            await client.exists("/blobs/x")
    assert caught.value.reason == "Connection refused"


def test_a_named_pipe_is_written_to_and_not_replaced(registry, tmp_path) -> None:
    digest = registry.add_blob(b"content")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE) as reader:
        assert main(["pull", digest, "-o", str(pipe), "--registry", registry.url]) == 0
        assert reader.communicate(timeout=10)[0] == b"content"
    assert stat.S_ISFIFO(pipe.stat().st_mode)


async def test_files_are_hashed_by_any_algorithm(tmp_path) -> None:
    (tmp_path / "x").write_bytes(CONTENT)
    found = await hash_file(tmp_path / "x", algorithm="sha512")
    assert found.hex == hashlib.sha512(CONTENT).hexdigest()


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("127.0.0.1:5000", "http://127.0.0.1:5000"),
        ("http://[::1]:5000/", "http://[::1]:5000"),
        ("https://registry.example", "https://registry.example"),
    ],
)
def test_a_registry_is_a_url_or_an_address(text: str, url: str) -> None:
    assert registry_url(text) == url


@pytest.mark.parametrize("text", ["", "http://", "ftp://h", "h:port", "http://h/v2/x"])
def test_what_is_no_registry_is_refused(text: str) -> None:
    with pytest.raises(UnexpectedAnswer):
        registry_url(text)


# --- the commands ---------------------------------------------------------------------------------


def test_a_file_comes_back_as_it_was_pushed(registry, swarmpull, tmp_path) -> None:
    (tmp_path / "file").write_bytes(CONTENT)
    pushed = swarmpull("push", "file", "--registry", registry.url)
    digest = pushed.stdout.strip()
    assert (pushed.returncode, pushed.stderr) == (0, "")
    assert digest == f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"
    assert registry.blobs[digest] == CONTENT
    pulled = swarmpull("pull", digest, "-o", "copy", "--registry", registry.url)
    assert (pulled.returncode, pulled.stdout, pulled.stderr) == (0, "", "")
    assert (tmp_path / "copy").read_bytes() == CONTENT


def test_a_file_that_is_there_already_is_not_sent_again(registry, capsys, tmp_path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    registry.add_blob(b"content")
    assert main(["push", str(tmp_path / "file"), "--registry", registry.url]) == 0
    assert [method for method, _, _ in registry.requests] == ["HEAD"]


def test_a_push_is_sent_again_when_the_server_was_busy(registry, capsys, tmp_path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    registry.refusals = [(404, b""), (503, b"draining")]
    assert main(["push", str(tmp_path / "file"), "--registry", registry.url]) == 0
    assert [method for method, _, _ in registry.requests] == ["HEAD", "PUT", "PUT"]


def test_a_server_that_cannot_say_what_it_has_is_sent_the_file(registry, capsys, tmp_path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    registry.refusals = [(503, b"the backend is down")]
    assert main(["push", str(tmp_path / "file"), "--registry", registry.url]) == 0
    assert [method for method, _, _ in registry.requests] == ["HEAD", "PUT"]


def test_a_push_that_is_refused_says_why(registry, capsys, tmp_path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    body = json.dumps({"errors": [{"code": "UNSUPPORTED", "message": "push is off"}]})
    registry.refusals = [(404, b""), (405, body.encode())]
    assert main(["push", str(tmp_path / "file"), "--registry", registry.url]) == 1
    said = capsys.readouterr().err
    assert said == (
        f"swarmpull: PUT {registry.url}/blobs/{Digest.of(b'content')}: "
        "UNSUPPORTED: push is off (HTTP 405)\n"
    )


def test_standard_output_gets_the_content_and_nothing_else(registry, environment) -> None:
    digest = registry.add_blob(CONTENT)
    registry.cuts = [2_000_000]
    result = subprocess.run(
        [sys.executable, "-m", "swarmpull", "pull", digest, "-o", "-", "--registry", registry.url],
        env=environment,
        capture_output=True,
        timeout=60,
    )
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout == CONTENT


def test_a_wrong_digest_on_standard_output_is_told_by_the_exit_status(registry, swarmpull) -> None:
    digest = registry.add_blob(b"content")
    registry.blobs[digest] = b"other content"
    result = swarmpull("pull", digest, "-o", "-", "--registry", registry.url)
    assert result.returncode == 1
    assert result.stderr.startswith("swarmpull: content hashes to sha256:")
    assert len(result.stderr.splitlines()) == 1


def test_a_reader_that_goes_away_ends_the_command_quietly(registry, environment) -> None:
    digest = registry.add_blob(CONTENT)
    arguments = ["pull", digest, "-o", "-", "--registry", registry.url]
    with subprocess.Popen(
        [sys.executable, "-m", "swarmpull", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        said = process.stderr.read()
        assert process.wait(30) == 1
    assert said == b""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_pull_leaves_nothing_behind(
    environment, tmp_path, number: int, status: int
) -> None:
    # a server that accepts and never answers
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        subprocess.Popen(
            [
                *(sys.executable, "-m", "swarmpull", "pull", str(Digest.of(b"x")), "-o", "x"),
                *("--registry", f"127.0.0.1:{server.getsockname()[1]}"),
            ],
            env=environment,
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            text=True,
        ) as process,
    ):
        connection, _ = server.accept()
        with connection:
            process.send_signal(number)
            assert process.wait(30) == status
            assert process.stderr is not None
            said = process.stderr.read()
    name = signal.Signals(number).name
    assert said == f"swarmpull: interrupted by {name}, nothing was left behind\n"
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("output", "line"),
    [
        (".", "swarmpull: {0}: is a directory, name a file in it\n"),
        ("no/such/file", "swarmpull: {0}/no/such: is not a directory, create it\n"),
    ],
)
def test_a_path_that_cannot_be_written_is_named(
    registry, swarmpull, tmp_path, output: str, line: str
) -> None:
    digest = registry.add_blob(b"content")
    result = swarmpull("pull", digest, "-o", output, "--registry", registry.url)
    assert result.returncode == 1
    assert result.stderr == line.format(tmp_path)


# --- images ---------------------------------------------------------------------------------------


def descriptor(media_type: str, content: bytes) -> dict[str, object]:
    return {
        "mediaType": media_type,
        "digest": str(Digest.of(content)),
        "size": len(content),
    }


def image(registry, reference: str, *layers: bytes, media_type: str = OCI_MANIFEST) -> str:
    """Put an image into the registry; returns its digest."""
    config = json.dumps({"architecture": reference}).encode()
    for content in (config, *layers):
        registry.add_blob(content)
    document = {
        "schemaVersion": 2,
        "mediaType": media_type,
        "config": descriptor("application/vnd.oci.image.config.v1+json", config),
        "layers": [descriptor("application/vnd.oci.image.layer.v1.tar", layer) for layer in layers],
    }
    return str(registry.add_manifest(reference, media_type, document))


def index(registry, reference: str, *manifests: str) -> str:
    entries = [
        descriptor(registry.manifests[digest][0], registry.manifests[digest][1])
        for digest in manifests
    ]
    document = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}
    return str(registry.add_manifest(reference, OCI_INDEX, document))


def files_of(layout: Path) -> dict[str, bytes]:
    blobs = layout / "blobs" / "sha256"
    return {f"sha256:{path.name}": path.read_bytes() for path in blobs.iterdir()}


@pytest.mark.parametrize("media_type", [OCI_MANIFEST, DOCKER_MANIFEST])
def test_an_image_becomes_a_layout_with_everything_verified(
    registry, capsys, tmp_path, media_type: str
) -> None:
    digest = image(registry, "v1", CONTENT, b"layer 2", media_type=media_type)
    registry.cuts = [10, 20, 30]
    out = tmp_path / "app"
    assert main(["pull", "team/app:v1", "-o", str(out), "--registry", registry.url]) == 0
    assert capsys.readouterr().out == f"{digest}\n"
    assert files_of(out) == registry.blobs | {digest: registry.manifests[digest][1]}
    assert json.loads((out / "oci-layout").read_bytes()) == {"imageLayoutVersion": "1.0.0"}
    entries = json.loads((out / "index.json").read_bytes())["manifests"]
    assert entries == [
        {
            "mediaType": media_type,
            "digest": digest,
            "size": len(registry.manifests[digest][1]),
            "annotations": {"org.opencontainers.image.ref.name": "v1"},
        }
    ]


def test_an_index_is_pulled_with_all_its_platforms_each_blob_once(registry, tmp_path) -> None:
    one = image(registry, "one", b"shared", b"only in one")
    two = image(registry, "two", b"shared", b"only in two")
    inner = index(registry, "inner", two)
    top = index(registry, "latest", one, inner, one)
    out = tmp_path / "app"
    name = registry.url.removeprefix("http://") + "/app"
    assert main(["pull", name, "-o", str(out)]) == 0
    manifests = {digest: registry.manifests[digest][1] for digest in (one, two, inner, top)}
    assert files_of(out) == registry.blobs | manifests
    assert len(registry.gets()) == len(set(registry.gets())) == 4 + len(registry.blobs)


def test_pulling_again_fetches_only_what_is_missing_or_damaged(registry, tmp_path) -> None:
    image(registry, "v1", b"layer 1", b"layer 2", b"layer 3")
    out = tmp_path / "app"
    arguments = ["pull", "app:v1", "-o", str(out), "--registry", registry.url]
    assert main(arguments) == 0
    complete = files_of(out)
    (out / "blobs/sha256" / Digest.of(b"layer 1").hex).unlink()
    (out / "blobs/sha256" / Digest.of(b"layer 2").hex).write_bytes(b"damaged")
    registry.requests.clear()
    assert main(arguments) == 0
    assert files_of(out) == complete
    assert sorted(path for path in registry.gets() if "/blobs/" in path) == sorted(
        f"/v2/app/blobs/{Digest.of(content)}" for content in (b"layer 1", b"layer 2")
    )


def test_a_layout_holds_several_images_and_a_tag_once(registry, tmp_path) -> None:
    out = tmp_path / "app"
    first = image(registry, "v1", b"one")
    for tag in ("v1", "v2", "v1"):
        second = image(registry, tag, tag.encode() * 2)
        assert main(["pull", f"app:{tag}", "-o", str(out), "--registry", registry.url]) == 0
    assert main(["pull", f"app@{first}", "-o", str(out), "--registry", registry.url]) == 0
    entries = json.loads((out / "index.json").read_bytes())["manifests"]
    assert len(entries) == 3
    assert [entry["digest"] for entry in entries][1:] == [second, first]


def test_an_image_with_a_wrong_blob_is_not_listed(registry, capsys, tmp_path) -> None:
    image(registry, "v1", b"layer")
    registry.blobs[str(Digest.of(b"layer"))] = b"other"
    out = tmp_path / "app"
    assert main(["pull", "app:v1", "-o", str(out), "--registry", registry.url]) == 1
    assert "content hashes to" in capsys.readouterr().err
    assert not (out / "index.json").exists()
    assert str(Digest.of(b"layer")) not in files_of(out)


def test_a_wrong_manifest_is_refused(registry, capsys, tmp_path) -> None:
    digest = image(registry, "v1", b"layer")
    registry.manifests[digest] = (OCI_MANIFEST, registry.manifests[digest][1] + b" ")
    arguments = ["pull", f"app@{digest}", "-o", str(tmp_path / "app"), "--registry", registry.url]
    assert main(arguments) == 1
    assert "content hashes to" in capsys.readouterr().err


def test_a_directory_with_other_things_is_left_alone(registry, capsys, tmp_path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    image(registry, "v1", b"layer")
    arguments = ["pull", "app:v1", "-o", str(tmp_path), "--registry", registry.url]
    assert main(arguments) == 1
    assert "neither empty nor an image layout" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["thesis.txt"]


def test_an_image_comes_back_as_it_was_pushed_from_a_layout(registry, capsys, tmp_path) -> None:
    one = image(registry, "one", CONTENT)
    top = index(registry, "v1", one, image(registry, "two", b"layer"))
    out = str(tmp_path / "app")
    assert main(["pull", "app:v1", "-o", out, "--registry", registry.url]) == 0
    blobs, manifests = registry.blobs.copy(), registry.manifests.copy()
    registry.blobs.clear()
    registry.manifests.clear()
    registry.requests.clear()
    assert main(["push", out, "other/name:v2", "--registry", registry.url]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == top
    assert registry.blobs == blobs
    assert registry.manifests["v2"] == manifests[top]
    assert {digest: registry.manifests[digest] for digest in (one, top)} == {
        digest: manifests[digest] for digest in (one, top)
    }
    assert registry.requests[-1][:2] == ("PUT", "/v2/other/name/manifests/v2")


def test_which_of_several_images_of_a_layout_is_pushed_is_told_by_its_name(
    registry, capsys, tmp_path
) -> None:
    out = str(tmp_path / "app")
    digests = {tag: image(registry, tag, tag.encode()) for tag in ("v1", "v2")}
    for tag in digests:
        assert main(["pull", f"app:{tag}", "-o", out, "--registry", registry.url]) == 0
    capsys.readouterr()
    assert main(["push", out, "copy:v2", "--registry", registry.url]) == 0
    assert capsys.readouterr().out == f"{digests['v2']}\n"
    assert main(["push", out, "copy:v3", "--registry", registry.url]) == 1
    assert capsys.readouterr().err == (
        f"swarmpull: {out}: cannot tell which image is meant: it holds v1, v2\n"
    )


def test_a_layout_that_lacks_a_blob_is_not_pushed(registry, capsys, tmp_path) -> None:
    image(registry, "v1", b"layer")
    out = tmp_path / "app"
    assert main(["pull", "app:v1", "-o", str(out), "--registry", registry.url]) == 0
    (out / "blobs/sha256" / Digest.of(b"layer").hex).unlink()
    registry.blobs.clear()
    assert main(["push", str(out), "copy:v1", "--registry", registry.url]) == 1
    assert capsys.readouterr().err == f"swarmpull: {out}: lacks the blob {Digest.of(b'layer')}\n"
    assert not [path for method, path, _ in registry.requests if "manifests/v1" in path][1:]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("app", (None, "app", "latest")),
        ("team/app:v1", (None, "team/app", "v1")),
        ("127.0.0.1:5000/team/app:v1", ("127.0.0.1:5000", "team/app", "v1")),
        ("docker.io/library/app", (None, "docker.io/library/app", "latest")),
        (f"app:v1@{Digest.of(b'')}", (None, "app", str(Digest.of(b"")))),
    ],
)
def test_image_names(text: str, expected: tuple[str | None, str, str]) -> None:
    name = ImageName.parse(text)
    assert (name.registry, name.repository, name.reference) == expected


@pytest.mark.parametrize("text", ["", "App", "a:b:c", "../x", "a//b", "app:", "app:-v", "a b"])
def test_what_is_no_image_name_is_refused(text: str) -> None:
    with pytest.raises(InvalidImageName):
        ImageName.parse(text)


# --- status ---------------------------------------------------------------------------------------

STATUS = {
    "role": "agent",
    "ready": False,
    "reasons": ["no tracker answers"],
    "pieces_received": {"origin": 1, "agent": 3},
    "bytes_received": {"origin": 4 << 20, "agent": 12 << 20},
    "bytes_sent": 8 << 20,
    "torrents": [
        {
            "digest": str(Digest.of(b"x")),
            "length": 16 << 20,
            "have": 3,
            "pieces": 4,
            "state": "leeching",
            "peers": 2,
        }
    ],
}


def test_status_shows_what_a_role_says(registry, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    registry.documents["/status"] = json.dumps(STATUS).encode()
    address = registry.url.removeprefix("http://")
    assert main(["status", address]) == 0
    roles, torrents = capsys.readouterr().out.split("ADDRESS")[1:]
    for shown in (address, "agent", "no: no tracker answers", "agent 12.0 MiB, origin 4.00 MiB"):
        assert shown in roles
    for shown in (str(Digest.of(b"x"))[:19], "16.0 MiB", "3/4", "leeching"):
        assert shown in torrents


def test_status_shows_what_the_backend_does_not_have_yet(registry, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    queue = {"queued": 12, "bytes": 3 << 30, "oldest_seconds": 40.4, "failure": "S3 is down"}
    document = {**STATUS, "role": "origin", "write_back": queue}
    registry.documents["/status"] = json.dumps(document).encode()
    assert main(["status", registry.url.removeprefix("http://")]) == 0
    assert "12 (3.00 GiB), 40 s, failing" in capsys.readouterr().out


def test_an_address_is_in_one_piece_however_narrow_the_terminal(
    registry, capsys, monkeypatch
) -> None:
    monkeypatch.setenv("COLUMNS", "50")
    registry.documents["/status"] = json.dumps(STATUS).encode()
    address = registry.url.removeprefix("http://")
    assert main(["status", address]) == 0
    assert capsys.readouterr().out.count(address) == 2


def test_a_silent_role_is_told_of_although_nobody_named_it(registry, capsys, monkeypatch) -> None:
    registry.documents["/status"] = json.dumps(STATUS).encode()
    answering = int(registry.url.rpartition(":")[2])
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        monkeypatch.setattr(options, "ADMIN_PORTS", (answering, port))
        assert main(["status", "--json"]) == 69
    captured = capsys.readouterr()
    assert len(json.loads(captured.out)) == 1
    assert captured.err == f"swarmpull: 127.0.0.1:{port}: no answer within 3 seconds\n"


def test_status_as_json_is_the_document_with_its_address(registry, capsys) -> None:
    registry.documents["/status"] = json.dumps(STATUS).encode()
    address = registry.url.removeprefix("http://")
    assert main(["status", "--json", address]) == 0
    assert json.loads(capsys.readouterr().out) == [{"address": address, **STATUS}]


@pytest.mark.parametrize(
    ("body", "line"),
    [
        (b"<html>", "the answer is not JSON: not an admin listener"),
        (b"[]", "the answer names no role: not an admin listener"),
    ],
)
def test_what_is_no_admin_listener_is_said_to_be_none(registry, capsys, body, line) -> None:
    registry.documents["/status"] = body
    address = registry.url.removeprefix("http://")
    assert main(["status", address]) == 69
    assert capsys.readouterr().err == f"swarmpull: {address}: {line}\n"


def test_one_role_that_does_not_answer_does_not_hide_the_others(
    registry, unused_port, capsys
) -> None:
    registry.documents["/status"] = json.dumps(STATUS).encode()
    address = registry.url.removeprefix("http://")
    assert main(["status", "--json", address, f"127.0.0.1:{unused_port}"]) == 69
    captured = capsys.readouterr()
    assert [each["address"] for each in json.loads(captured.out)] == [address]
    assert captured.err == f"swarmpull: 127.0.0.1:{unused_port}: Connection refused\n"


def test_the_slowest_role_delays_status_by_seconds_only(capsys) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        began = time.monotonic()
        assert main(["status", f"127.0.0.1:{port}"]) == 69
        assert time.monotonic() - began < 10
    assert capsys.readouterr().err == f"swarmpull: 127.0.0.1:{port}: no answer within 3 seconds\n"


# --- rates ----------------------------------------------------------------------------------------

RATES = {"upload_rate": 100_000_000, "download_rate": None}


def test_rates_are_shown_as_people_write_them(registry, capsys) -> None:
    registry.documents["/rates"] = json.dumps(RATES).encode()
    assert main(["rates", "--admin", registry.url]) == 0
    head, row = capsys.readouterr().out.splitlines()
    assert head.split() == ["ADDRESS", "UPLOAD", "DOWNLOAD"]
    assert row.split() == [registry.url, "100MB/s", "unlimited"]
    assert [method for method, _, _ in registry.requests] == ["GET"], "nothing was changed"


def test_rates_are_changed_and_what_holds_then_is_shown(registry, capsys) -> None:
    registry.documents["/rates"] = json.dumps(RATES).encode()
    address = registry.url.removeprefix("http://")
    command = ["rates", "--upload", "unlimited", "--download", "1MiB/s", "--admin", address]
    assert main([*command, "--json"]) == 0
    holds = {"upload_rate": None, "download_rate": float(1 << 20)}
    assert json.loads(capsys.readouterr().out) == [{"address": address, **holds}]
    assert json.loads(registry.documents["/rates"]) == holds


def test_one_rate_is_changed_without_the_other(registry, capsys) -> None:
    registry.documents["/rates"] = json.dumps({**RATES, "download_rate": 5}).encode()
    assert main(["rates", "--upload", "30kB/s", "--admin", registry.url]) == 0
    assert capsys.readouterr().out.split()[-2:] == ["30kB/s", "5B/s"]


def test_a_role_without_rates_is_said_to_have_none_and_does_not_hide_the_others(
    registry, unused_port, capsys
) -> None:
    registry.documents["/status"] = json.dumps(STATUS).encode()
    address = registry.url.removeprefix("http://")
    arguments = ["--admin", address, "--admin", f"127.0.0.1:{unused_port}"]
    assert main(["rates", "--upload", "1MB/s", *arguments]) == 69
    assert capsys.readouterr().err.splitlines() == [
        f"swarmpull: {address}: has no rates: name the admin listener of an agent or origin",
        f"swarmpull: 127.0.0.1:{unused_port}: Connection refused",
    ]
    assert [method for method, _, _ in registry.requests] == ["GET"], "nothing is put elsewhere"


def test_what_a_role_refuses_is_said(registry, capsys) -> None:
    registry.documents["/rates"] = b'{"upload_rate": null, "download_rate": "?"}'
    registry.refusals += [(400, b'{"errors": [{"message": "upload_rate is too much"}]}')]
    assert main(["rates", "--admin", registry.url]) == 69
    assert "upload_rate is too much (HTTP 400)" in capsys.readouterr().err


def test_without_addresses_the_usual_ports_are_asked(registry, capsys, monkeypatch) -> None:
    port = int(registry.url.rpartition(":")[2])
    monkeypatch.setattr("swarmpull.cli.options.ADMIN_PORTS", range(port, port + 1))
    assert main(["rates", "--upload", "1MB/s"]) == 69
    assert "no agent or origin answers on 127.0.0.1" in capsys.readouterr().err
    registry.documents["/rates"] = json.dumps(RATES).encode()
    assert main(["rates", "--upload", "1MB/s"]) == 0
    assert capsys.readouterr().out.split()[-2:] == ["1MB/s", "unlimited"]


@pytest.fixture
def https(registry, another_registry, monkeypatch) -> str:
    """Beside the registry, at the usual ports, somebody who takes HTTPS only; what is said of it."""
    refusal = json.dumps({"errors": [{"message": HTTPS_ONLY}]}).encode()
    another_registry.refusals += [(400, refusal)]
    ports = [int(each.url.rpartition(":")[2]) for each in (registry, another_registry)]
    monkeypatch.setattr(options, "ADMIN_PORTS", ports)
    address = f"127.0.0.1:{ports[1]}"
    return f"swarmpull: {address}: {HTTPS_ONLY}: name it as https://{address}\n"


@pytest.mark.parametrize(
    ("command", "path", "document"),
    [
        ("status", "/status", STATUS),
        ("rates", "/rates", RATES),
        ("rates --upload 1MB/s", "/rates", RATES),
        ("replication status", "/replication", {"remotes": []}),
        ("replication retry", "/replication", {"remotes": []}),
    ],
)
def test_a_listener_for_https_is_named_and_the_others_are_gone_on_with(
    registry, https, capsys, command, path, document
) -> None:
    registry.documents[path] = json.dumps(document).encode()
    assert main([*command.split(), "--json"]) == 0
    captured = capsys.readouterr()
    assert len(json.loads(captured.out)) == 1
    assert captured.err == https
    asked = {method for method, _, _ in registry.requests}
    assert ("PUT" in asked) == (len(command.split()) > 2 or "retry" in command)


def test_a_listener_for_https_alone_is_not_enough(registry, https, capsys) -> None:
    assert main(["rates"]) == 69
    assert capsys.readouterr().err == https
