"""The distribution registry as Debian packages it, as a process with a directory of its own."""

from __future__ import annotations

import shutil
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from swarmpull.digest import Digest
from tests.ports import free_ports

START_SECONDS_MAX = 20.0
USER, PASSWORD = "bob", "hunter2"
# What `htpasswd -nbB bob hunter2` may print.
HTPASSWD = "bob:$2y$05$abcdefghijklmnopqrstuuoXuKqgZXLiJqzfmMXDDhSFPIvxV7t8.\n"


@contextmanager
def docker_registry(
    directory: Path, *, login: bool = False, certificate: Path | None = None
) -> Iterator[str]:
    """Yields host:port; with ``login`` it wants user and password.  Skips where it is not installed.

    With ``certificate``, a file of key and certificate, it speaks TLS.
    """
    program = shutil.which("docker-registry") or pytest.skip("docker-registry is not installed")
    directory.mkdir()
    address = f"127.0.0.1:{free_ports(1)[0]}"
    config = directory / "config.yml"
    config.write_text(configuration(directory, address, certificate, login=login))
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


def configuration(directory: Path, address: str, certificate: Path | None, *, login: bool) -> str:
    tls = f", tls: {{certificate: {certificate}, key: {certificate}}}" if certificate else ""
    lines = [
        "version: 0.1",
        "storage: {filesystem: {rootdirectory: " + str(directory / "data") + "}}",
        f"http: {{addr: '{address}'{tls}}}",
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
        # A plain request to a port with TLS gets an answer too.
        status = httpx.get(f"http://{address}/v2/", trust_env=False).status_code
    except httpx.TransportError:
        return False
    return status in {200, 400, 401}


async def push_image(
    base: str, repository: str, tag: str, manifest: bytes, media_type: str, *blobs: bytes
) -> None:
    """Push as any client does to the registry at a URL."""
    async with httpx.AsyncClient(
        base_url=base, auth=(USER, PASSWORD), timeout=30.0, verify=ssl.create_default_context()
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


def certificate_for_loopback(directory: Path) -> Path:
    """A file with a key and a certificate of 127.0.0.1 that it signs itself; skips without openssl."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    key, certificate = directory / "key.pem", directory / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += [
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=test",
        "-addext",
        "subjectAltName=IP:127.0.0.1",
    ]
    command += ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    both = directory / "both.pem"
    both.write_text(key.read_text() + certificate.read_text())
    return both
