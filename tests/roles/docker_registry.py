"""The distribution registry as Debian packages it, as a process with a directory of its own."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from swarmpull.digest import Digest

START_SECONDS_MAX = 20.0
USER, PASSWORD = "bob", "hunter2"
# What `htpasswd -nbB bob hunter2` may print.
HTPASSWD = "bob:$2y$05$abcdefghijklmnopqrstuuoXuKqgZXLiJqzfmMXDDhSFPIvxV7t8.\n"


@contextmanager
def docker_registry(directory: Path, *, login: bool = False) -> Iterator[str]:
    """Yields host:port; with ``login`` it wants user and password.  Skips where it is not installed."""
    program = shutil.which("docker-registry") or pytest.skip("docker-registry is not installed")
    directory.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    config = directory / "config.yml"
    config.write_text(configuration(directory, address, login=login))
    log = directory / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [program, "serve", str(config)], stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    try:
        wait_until_it_serves(address, process, log)
        yield address
    finally:
        process.kill()
        process.wait()


def configuration(directory: Path, address: str, *, login: bool) -> str:
    lines = [
        "version: 0.1",
        "storage: {filesystem: {rootdirectory: " + str(directory / "data") + "}}",
        f"http: {{addr: '{address}'}}",
    ]
    if login:
        passwords = directory / "htpasswd"
        passwords.write_text(HTPASSWD)
        lines.append(f"auth: {{htpasswd: {{realm: here, path: {passwords}}}}}")
    return "\n".join(lines) + "\n"


def wait_until_it_serves(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_SECONDS_MAX
    while not it_serves(address):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.05)


def it_serves(address: str) -> bool:
    try:
        return httpx.get(f"http://{address}/v2/", trust_env=False).status_code in {200, 401}
    except httpx.TransportError:
        return False


async def push_image(
    address: str, repository: str, tag: str, manifest: bytes, media_type: str, *blobs: bytes
) -> None:
    """Push as any client does."""
    async with httpx.AsyncClient(
        base_url=f"http://{address}", auth=(USER, PASSWORD), timeout=30.0
    ) as client:
        for blob in blobs:
            begun = await client.post(f"/v2/{repository}/blobs/uploads/")
            assert begun.status_code == 202, begun.text
            url = httpx.URL(begun.headers["location"]).copy_merge_params(
                {"digest": str(Digest.of(blob))}
            )
            done = await client.put(url, content=blob)
            assert done.status_code == 201, done.text
        put = await client.put(
            f"/v2/{repository}/manifests/{tag}",
            content=manifest,
            headers={"Content-Type": media_type},
        )
        assert put.status_code == 201, put.text
