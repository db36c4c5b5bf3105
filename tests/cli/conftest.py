"""A registry small enough to misbehave on demand, on a real socket, and the program as a process."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import attrs
import pytest


def digest_of(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


@attrs.define(eq=False)
class FakeRegistry:
    """What the server holds, what it was asked, and how it is to misbehave.

    ``cuts``: how many body bytes the next GETs of blobs send before the connection is cut.
    ``refusals``: (status, body) of the next requests.
    """

    blobs: dict[str, bytes] = attrs.field(factory=dict)
    manifests: dict[str, tuple[str, bytes]] = attrs.field(factory=dict)
    requests: list[tuple[str, str, str | None]] = attrs.field(factory=list)
    cuts: list[int] = attrs.field(factory=list)
    refusals: list[tuple[int, bytes]] = attrs.field(factory=list)
    documents: dict[str, bytes] = attrs.field(factory=dict)
    ranges: bool = True
    url: str = ""

    def add_blob(self, content: bytes) -> str:
        self.blobs[digest_of(content)] = content
        return digest_of(content)

    def add_manifest(self, reference: str, media_type: str, document: object) -> str:
        content = json.dumps(document).encode()
        self.manifests[reference] = self.manifests[digest_of(content)] = (media_type, content)
        return digest_of(content)

    def gets(self) -> list[str]:
        """Paths of all GETs."""
        return [path for method, path, _ in self.requests if method == "GET"]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    registry: FakeRegistry

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name is inherited
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def begin(self) -> bytes | None:
        """The request body; None when the request has been refused."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.registry.requests.append((self.command, self.path, self.headers.get("Range")))
        if self.registry.refusals:
            status, text = self.registry.refusals.pop(0)
            self.answer(status, text)
            return None
        return body

    def do_GET(self) -> None:
        if self.begin() is None:
            return
        reference = self.path.rpartition("/")[2]
        if self.path in self.registry.documents:
            self.answer(200, self.registry.documents[self.path])
        elif "/manifests/" in self.path and reference in self.registry.manifests:
            media_type, content = self.registry.manifests[reference]
            digest = digest_of(content)
            self.answer(200, content, Content_Type=media_type, Docker_Content_Digest=digest)
        elif "/blobs/" in self.path and reference in self.registry.blobs:
            self.send_blob(self.registry.blobs[reference])
        else:
            error = {"errors": [{"code": "BLOB_UNKNOWN", "message": "nobody has it"}]}
            self.answer(404, json.dumps(error).encode())

    do_HEAD = do_GET

    def send_blob(self, content: bytes) -> None:
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(match[1]) if match and self.registry.ranges else 0
        body = content[start:]
        if not self.registry.cuts or self.command == "HEAD":
            extra = {"Content_Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
            self.answer(206 if start else 200, body, **(extra if start else {}))
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        self.wfile.write(body[: self.registry.cuts.pop(0)])
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def do_POST(self) -> None:
        if self.begin() is not None:
            self.answer(202, Location="/uploads/1?_state=x")

    def do_PUT(self) -> None:
        body = self.begin()
        if body is None:
            return
        reference = self.path.rpartition("/")[2]
        if self.path in self.registry.documents:
            document = json.loads(self.registry.documents[self.path]) | json.loads(body)
            self.registry.documents[self.path] = json.dumps(document).encode()
            self.answer(200, self.registry.documents[self.path])
            return
        if "/manifests/" in self.path:
            stored = (self.headers["Content-Type"], body)
            self.registry.manifests[reference] = self.registry.manifests[digest_of(body)] = stored
        else:
            self.registry.blobs[digest_of(body)] = body
        self.answer(201)


class Server(ThreadingHTTPServer):
    daemon_threads = False

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


@pytest.fixture
def registry():
    """A running `FakeRegistry`."""
    with running_registry() as state:
        yield state


@pytest.fixture
def another_registry():
    """A second one."""
    with running_registry() as state:
        yield state


@contextmanager
def running_registry():
    state = FakeRegistry()
    server = Server(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"registry": state}))
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def unused_port() -> Iterator[int]:
    """A port on which nobody listens, and which nobody else is given meanwhile."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield int(taken.getsockname()[1])


@pytest.fixture
def environment() -> dict[str, str]:
    """The environment for a subprocess, without the configuration of whoever runs the tests."""
    root = str(Path(__file__).parents[2])
    kept = {name: text for name, text in os.environ.items() if not name.startswith("SWARMPULL")}
    return kept | {"PYTHONPATH": root}


@pytest.fixture
def swarmpull(environment: dict[str, str], tmp_path: Path):
    """Run the program to its end as a process of its own."""

    def swarmpull(*arguments: object, **extra: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "swarmpull", *map(str, arguments)],
            env=environment | extra,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )

    return swarmpull
