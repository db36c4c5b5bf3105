"""What an origin has acknowledged reaches S3, whoever is killed and whatever S3 does meanwhile."""

from __future__ import annotations

import http.client
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import attrs
import pytest

from swarmpull.digest import Digest
from swarmpull.store.backends.base import blob_key
from tests.ports import PortAllocator
from tests.store.s3_proxy import Fault, FaultyProxy, Relay
from tests.store.s3_server import BUCKET, S3Server, credentials, running_server

from . import web
from .conftest import new_directory
from .program import Program, options
from .waiting import wait_until

MIB: Final = 1 << 20
# Only ends what hangs.
PUSHES_SECONDS_MAX: Final = 120.0
SMALL_DISK_BYTES: Final = 24 * MIB
# Nobody listens there: generic blobs need no index and no tracker.
NOBODY: Final = "127.0.0.1:9"


@pytest.fixture(scope="module")
def s3(scratch: Path) -> Iterator[S3Server]:
    with credentials(), running_server(new_directory(scratch, "s3")) as server:
        yield server


@pytest.fixture
def relay(s3: S3Server) -> Iterator[Relay]:
    """The way to S3, which can be cut."""
    with Relay(s3.port) as relay:
        yield relay


@pytest.fixture
def proxy(s3: S3Server) -> Iterator[FaultyProxy]:
    """The way to S3, on which answers can be spoiled."""
    with FaultyProxy(s3.port) as proxy:
        yield proxy


@attrs.frozen
class Origin:
    """An origin as a process.

    Attributes:
        data: its data directory.
    """

    program: Program
    registry: int
    data: Path

    def start(self) -> None:
        """Until it serves; it may not be ready, as long as S3 is away."""
        self.program.start()
        wait_until(self._serves, f"{self.program.log.stem} serves")

    def kill(self) -> None:
        assert self.program.kill(signal.SIGKILL) == -signal.SIGKILL

    def put(self, content: bytes) -> web.Answer:
        return web.request(self.registry, "PUT", f"/blobs/{web.digest_of(content)}", body=content)

    def get(self, content: bytes) -> web.Answer:
        return web.request(self.registry, "GET", f"/blobs/{web.digest_of(content)}")

    def metric(self, name: str) -> float:
        answer = web.request(self.program.admin[0], "GET", "/metrics")
        (line,) = (
            each for each in answer.text.splitlines() if each.startswith(f"swarmpull_{name} ")
        )
        return float(line.split()[1])

    def wait_until_written(self) -> None:
        # A replica waits for half a minute first, and a failed attempt for up to a minute.
        wait_until(
            lambda: self.metric("write_back_queue_blobs") == 0, "S3 has everything", timeout=120.0
        )

    def _serves(self) -> bool:
        self.program.check_alive()
        try:
            return web.request(self.program.admin[0], "GET", "/health", timeout=5.0).status == 200
        except (OSError, http.client.HTTPException):
            return False


@attrs.define
class Place:
    """Where origins are made; all of them end with it."""

    directory: Path
    ports: PortAllocator
    made: ExitStack

    def origins(
        self, s3_port: int, count: int = 1, *, data: Path | None = None, **more: str
    ) -> list[Origin]:
        """Origins that know of one another; ``more`` are settings of each, with ``__`` for dots."""
        ports = self.ports.run_of(4 * count)
        peers = [f"127.0.0.1:{port}" for port in ports[1::4]]
        settings = {
            "cluster.origins": ",".join(peers),
            "cluster.indexes": NOBODY,
            "cluster.trackers": NOBODY,
            "origin.backend.url": (
                f"s3://{BUCKET}/{self.directory.name}?endpoint=127.0.0.1:{s3_port}&secure=false"
                "&region=us-east-1&part_size=5MiB&attempts=2&connect_timeout=1s"
            ),
            **{key.replace("__", "."): value for key, value in more.items()},
        }
        return [
            self._origin(number, ports[4 * number : 4 * number + 4], settings, data)
            for number in range(count)
        ]

    def _origin(
        self, number: int, ports: tuple[int, ...], settings: Mapping[str, str], data: Path | None
    ) -> Origin:
        name = f"origin-{number}"
        data = (data or self.directory) / name
        listen = {
            f"origin.{what}.listen": f"127.0.0.1:{port}"
            for what, port in zip(("registry", "rpc", "peer", "admin"), ports, strict=True)
        }
        own = {**settings, **listen, "origin.data_dir": str(data)}
        program = Program(
            ["--role", "origin", *options(own)],
            log=self.directory / f"{name}.log",
            admin=[ports[3]],
        )
        self.made.callback(program.stop)
        return Origin(program, ports[0], data)


@pytest.fixture
def place(scratch: Path, ports: PortAllocator, s3: S3Server) -> Iterator[Place]:
    directory = new_directory(scratch, "wb")
    with ExitStack() as made:
        yield Place(directory, ports, made)
    shutil.rmtree(directory)


def object_of(s3: S3Server, place: Place, content: bytes) -> bytes:
    """The object that S3 has of a blob."""
    key = f"{place.directory.name}/{blob_key(Digest.of(content))}"
    response = s3.admin.get_object(BUCKET, key)
    try:
        return response.read()
    finally:
        response.close()
        response.release_conn()


def test_a_push_while_s3_is_down_survives_kill_9_and_arrives_when_s3_is_back(
    place: Place, s3: S3Server, relay: Relay
) -> None:
    (origin,) = place.origins(relay.port)
    content = web.random_bytes(12 * MIB + 7, "down")
    origin.start()
    relay.cut()

    assert origin.put(content).status == 201
    origin.kill()
    origin.start()
    answer = web.request(origin.program.admin[0], "GET", "/readiness")
    assert answer.status == 503
    assert str(relay.port) in answer.text
    assert origin.get(content).body == content
    relay.refusing = False
    origin.wait_until_written()

    assert object_of(s3, place, content) == content
    origin.program.wait_until_ready()


def test_an_origin_starts_without_s3_says_why_it_is_not_ready_and_becomes_so(
    place: Place, s3: S3Server, relay: Relay
) -> None:
    (origin,) = place.origins(relay.port)
    content = web.random_bytes(MIB, "unreachable")
    relay.cut()

    origin.start()
    pid = origin.program.pid
    answer = web.request(origin.program.admin[0], "GET", "/readiness")
    assert answer.status == 503
    assert f"s3://{BUCKET}" in answer.text
    assert str(relay.port) in answer.text
    assert "cannot be reached yet" in origin.program.log.read_text()
    # It is of use all the same: what is pushed waits, and what only S3 could have is not said to be missing.
    assert origin.put(content).status == 201
    assert origin.get(content).body == content
    assert origin.get(b"who knows").status == 503

    relay.refusing = False
    origin.program.wait_until_ready()
    origin.wait_until_written()
    assert object_of(s3, place, content) == content
    assert origin.get(b"who knows").status == 404
    assert origin.program.pid == pid


@pytest.mark.slow
def test_an_origin_whose_acceptor_and_its_disk_are_gone_has_the_blob_and_writes_it(
    place: Place, s3: S3Server, relay: Relay
) -> None:
    first, second = place.origins(relay.port, 2)
    content = web.random_bytes(9 * MIB, "replica")
    for origin in (first, second):
        origin.start()
    relay.cut()

    assert first.put(content).status == 201
    first.kill()
    shutil.rmtree(first.data)

    assert second.get(content).body == content
    first.start()
    assert first.get(content).body == content, "it asks the other one"
    relay.refusing = False
    # It leaves it to the acceptor for half a minute.
    second.wait_until_written()
    assert object_of(s3, place, content) == content


@pytest.mark.slow
def test_refusals_and_half_answers_of_s3_delay_what_is_acknowledged_and_no_more(
    place: Place, s3: S3Server, proxy: FaultyProxy
) -> None:
    (origin,) = place.origins(proxy.port)
    origin.start()
    contents = [web.random_bytes(length, str(length)) for length in (1000, 11 * MIB, 6 * MIB)]
    proxy.spoil(
        "PUT", *[Fault("answer")] * 5, Fault("reset"), Fault("close"), Fault("close", after=0)
    )
    proxy.spoil("HEAD", *[Fault("answer", status=500, code="InternalError")] * 3, Fault("reset"))
    proxy.spoil("POST", Fault("close", after=20), Fault("reset", after=5), Fault("answer"))

    for content in contents:
        assert origin.put(content).status == 201
    origin.wait_until_written()

    assert origin.metric("write_back_failures_total") >= 1
    for content in contents:
        assert object_of(s3, place, content) == content


@attrs.define
class Pusher:
    """Pushes blobs one after the other until it is told to stop, over restarts of the origin."""

    origin: Origin
    rng: random.Random
    acknowledged: list[bytes] = attrs.Factory(list)
    stop: threading.Event = attrs.Factory(threading.Event)

    def run(self) -> None:
        while not self.stop.is_set():
            content = self.rng.randbytes(self.rng.choice([1, 100, 70_000, 3 * MIB]))
            try:
                if self.origin.put(content).status == 201:
                    self.acknowledged.append(content)
            except (OSError, http.client.HTTPException):
                self.stop.wait(0.05)


def wait_for_pushes(pushers: list[Pusher], rng: random.Random, count: int) -> None:
    """Return at a random instant after ``count`` more pushes were acknowledged."""
    wanted = sum(len(pusher.acknowledged) for pusher in pushers) + count
    end = time.monotonic() + PUSHES_SECONDS_MAX
    while sum(len(pusher.acknowledged) for pusher in pushers) < wanted:
        assert time.monotonic() < end, f"fewer than {count} pushes in {PUSHES_SECONDS_MAX} s"
        time.sleep(0.01)
    time.sleep(rng.uniform(0.0, 0.3))


@pytest.mark.slow
def test_kill_9_at_any_instant_loses_nothing_that_was_acknowledged(
    place: Place, s3: S3Server, relay: Relay
) -> None:
    (origin,) = place.origins(relay.port)
    origin.start()
    rng = random.Random(20261126)
    pushers = [Pusher(origin, random.Random(number)) for number in range(4)]
    threads = [threading.Thread(target=pusher.run) for pusher in pushers]
    for thread in threads:
        thread.start()
    try:
        for kill in range(8):
            # S3 comes and goes, each for two kills.
            if kill % 4 == 2:
                relay.cut()
            elif kill % 4 == 0:
                relay.refusing = False
            # Some die before they have acknowledged anything.
            wait_for_pushes(pushers, rng, 6 if kill % 2 else 0)
            origin.kill()
            origin.start()
    finally:
        for pusher, thread in zip(pushers, threads, strict=True):
            pusher.stop.set()
            thread.join()
    relay.refusing = False
    origin.wait_until_written()

    acknowledged = [content for pusher in pushers for content in pusher.acknowledged]
    assert len(acknowledged) > 20
    for content in acknowledged:
        assert object_of(s3, place, content) == content


@pytest.mark.slow
def test_the_loss_of_the_accepting_origin_at_any_instant_loses_nothing(
    place: Place, s3: S3Server, relay: Relay
) -> None:
    first, second = place.origins(relay.port, 2)
    first.start()
    second.start()
    relay.cut()
    rng = random.Random(4)
    pushers = [Pusher(first, random.Random(100 + number)) for number in range(3)]
    threads = [threading.Thread(target=pusher.run) for pusher in pushers]
    for thread in threads:
        thread.start()
    try:
        for _ in range(3):
            wait_for_pushes(pushers, rng, 7)
            first.kill()
            shutil.rmtree(first.data)
            first.start()
    finally:
        for pusher, thread in zip(pushers, threads, strict=True):
            pusher.stop.set()
            thread.join()
    first.kill()
    shutil.rmtree(first.data)

    acknowledged = [content for pusher in pushers for content in pusher.acknowledged]
    assert len(acknowledged) > 20
    for content in acknowledged:
        assert second.get(content).body == content
    relay.refusing = False
    second.wait_until_written()
    for content in acknowledged:
        assert object_of(s3, place, content) == content


@pytest.fixture
def small_disk(place: Place) -> Iterator[Path]:
    mount_point = place.directory / "small"
    mount_point.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK_BYTES}", "tmpfs", mount_point]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small tmpfs: {mounted.stderr}")
    yield mount_point
    # A process may still be about to end.
    place.made.close()
    subprocess.run(["umount", mount_point], check=True)


def test_a_full_disk_refuses_pushes_and_loses_none_that_it_has_acknowledged(
    place: Place, s3: S3Server, relay: Relay, small_disk: Path
) -> None:
    (origin,) = place.origins(relay.port, data=small_disk, origin__store__max_bytes="100%")
    origin.start()
    relay.cut()
    contents = [web.random_bytes(4 * MIB, f"full {number}") for number in range(8)]

    answers = [origin.put(content) for content in contents]

    accepted = [
        each for each, answer in zip(contents, answers, strict=True) if answer.status == 201
    ]
    refused = [answer for answer in answers if answer.status != 201]
    assert 3 <= len(accepted) <= 5
    for answer in refused:
        assert answer.status == 507
        (error,) = answer.json()["errors"]
        assert "has no room for" in error["message"]
        assert "not written back" in error["message"]
    origin.kill()
    origin.start()
    for content in accepted:
        assert origin.get(content).body == content
    relay.refusing = False
    origin.wait_until_written()
    for content in accepted:
        assert object_of(s3, place, content) == content
    assert origin.put(contents[-1]).status == 201, "there is room again"
