"""Content that is no image: by plain HTTP, and with ``swarmpull push`` and ``swarmpull pull``."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from . import web
from .images import ImageFactory
from .program import Cluster, run_to_the_end

MIB = 1 << 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def url(port: int) -> str:
    return f"http://127.0.0.1:{port}"


@pytest.mark.parametrize("place", ["origin", "agent"])
def test_a_file_put_under_its_digest_comes_back_from_every_role(
    cluster: Cluster, place: str
) -> None:
    content = random.Random(place).randbytes(9 * MIB + 1)
    digest = web.digest_of(content)
    ports = {"origin": cluster.ports.origin_registry, "agent": cluster.first.registry}
    answer = web.request(ports[place], "PUT", f"/blobs/{digest}", body=content)
    assert answer.status == 201, answer.text
    assert answer.headers["docker-content-digest"] == digest

    for port in (cluster.ports.origin_registry, *cluster.registries):
        flow = web.stream(port, f"/blobs/{digest}")
        assert (flow.status, flow.digest, flow.length) == (200, digest, len(content))
        part = web.request(port, "GET", f"/blobs/{digest}", headers={"Range": "bytes=5-9"})
        assert (part.status, part.body) == (206, content[5:10])
        assert web.request(port, "HEAD", f"/blobs/{digest}").status == 200


def test_a_file_without_a_declared_length_is_taken_in_chunks(cluster: Cluster) -> None:
    parts = [random.Random(number).randbytes(MIB) for number in range(5)]
    digest = web.digest_of(b"".join(parts))
    with web.connection(cluster.ports.origin_registry) as opened:
        opened.request("PUT", f"/blobs/{digest}", body=iter(parts), encode_chunked=True)
        assert opened.getresponse().status == 201

    assert web.stream(cluster.registries[1], f"/blobs/{digest}").digest == digest


def test_a_file_under_the_digest_of_another_is_refused_and_not_visible(cluster: Cluster) -> None:
    digest = web.digest_of(b"what was announced")
    for port in (cluster.ports.origin_registry, cluster.first.registry):
        answer = web.request(port, "PUT", f"/blobs/{digest}", body=b"what was sent")
        assert answer.status == 400
        assert answer.codes == ["DIGEST_INVALID"]

    for port in (cluster.ports.origin_registry, *cluster.registries):
        assert web.request(port, "HEAD", f"/blobs/{digest}").status == 404


def test_push_prints_the_digest_and_pull_writes_the_file(cluster: Cluster, folder: Path) -> None:
    source, target = folder / "source", folder / "target"
    source.write_bytes(random.Random("cli").randbytes(11 * MIB))
    first, last = url(cluster.registries[0]), url(cluster.registries[-1])

    pushed = run_to_the_end("push", "--registry", first, str(source))
    assert pushed.returncode == 0, pushed.stderr
    digest = pushed.stdout.strip()
    assert digest == web.digest_of(source.read_bytes())
    pulled = run_to_the_end("pull", "--registry", last, digest, "-o", str(target))

    assert pulled.returncode == 0, pulled.stderr
    assert target.read_bytes() == source.read_bytes()
    assert {path.name for path in folder.iterdir()} == {"source", "target"}


def test_the_single_node_prints_commands_that_work(cluster: Cluster, folder: Path) -> None:
    said = cluster.programs["all"].log.read_text()
    commands = [
        line.split()[1:]
        for line in said.splitlines()
        if line.lstrip().startswith(("swarmpull push", "swarmpull pull", "swarmpull status"))
    ]
    assert [command[0] for command in commands] == ["push", "pull", "status"]
    source, target = folder / "source", folder / "target"
    source.write_bytes(b"as it was printed")
    words = {"DIGEST": web.digest_of(source.read_bytes())}

    for command in commands:
        words["FILE"] = str(target if command[0] == "pull" else source)
        done = run_to_the_end(*(words.get(word, word) for word in command))
        assert done.returncode == 0, done.stderr

    assert target.read_bytes() == source.read_bytes()


def test_an_image_is_pushed_from_a_layout_and_pulled_into_another(
    cluster: Cluster, images: ImageFactory, folder: Path
) -> None:
    image = images.multi_architecture("cli-image")
    first, last = url(cluster.registries[0]), url(cluster.registries[-1])

    pushed = run_to_the_end("push", "--registry", first, str(image.layout), "team/cli-image:v1")
    assert pushed.returncode == 0, pushed.stderr
    assert pushed.stdout.strip() == image.manifest.digest
    layout = folder / "layout"
    pulled = run_to_the_end("pull", "--registry", last, "team/cli-image:v1", "-o", str(layout))

    assert pulled.returncode == 0, pulled.stderr
    assert pulled.stdout.strip() == image.manifest.digest
    for part in (image.manifest, *image.parts):
        content = (layout / "blobs" / "sha256" / part.hex).read_bytes()
        assert content == image.content(part).read_bytes()
    entries = json.loads((layout / "index.json").read_text())["manifests"]
    assert [entry["digest"] for entry in entries] == [image.manifest.digest]


def test_pull_of_an_unknown_digest_says_so_and_leaves_no_file(
    cluster: Cluster, folder: Path
) -> None:
    digest = web.digest_of(b"nobody pushed this")

    pulled = run_to_the_end(
        "pull", "--registry", url(cluster.registries[1]), digest, "-o", str(folder / "x")
    )

    assert pulled.returncode == 1
    assert digest in pulled.stderr
    assert "Traceback" not in pulled.stderr
    assert list(folder.iterdir()) == []


def test_status_shows_the_roles_of_the_cluster(cluster: Cluster) -> None:
    addresses = [f"127.0.0.1:{port}" for port in cluster.ports.admin]

    shown = run_to_the_end("status", "--json", *addresses)

    assert shown.returncode == 0, shown.stderr
    documents = json.loads(shown.stdout)
    assert [each["address"] for each in documents] == addresses
    roles = [each["role"] for each in documents]
    assert roles == ["agent"] * len(cluster.ports.agents) + ["origin", "tracker", "index"]
    assert all(each["ready"] for each in documents)
