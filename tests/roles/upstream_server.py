"""A registry to pull from that does as it is told: logins, redirects, patience, cut bodies, wrong content."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any
from urllib.parse import parse_qs

import attrs
import trio

from swarmpull.digest import Digest
from swarmpull.registry.server import serve_http

from .roles import MANIFEST_TYPE, manifest_of

USER, PASSWORD = "bob", "hunter2"
IDENTITY = "identity-token"
BASIC = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()


@attrs.frozen
class Seen:
    """A request that came in."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes = b""

    @property
    def line(self) -> str:
        return f"{self.method} {self.path}"


@attrs.frozen
class Reply:
    """An answer; ``cut`` ends its body after so many bytes, and the connection with it."""

    status: int = 200
    headers: dict[str, str] = attrs.Factory(dict)
    body: bytes = b""
    cut: int | None = None


@attrs.define(eq=False)
class FakeUpstream:
    """What the registry has, what it was asked, and what it is to do wrong.

    Attributes:
        blobs: by repository and digest.
        manifests: by repository and tag or digest: the content.
        seen: every request, in order.
        sent: bytes of blobs that left.
        rules: asked one after the other before anything else; the first reply is sent.
        login: "", "basic" or "token".
        tokens: those that were given out and are still taken.
        expires_in: seconds that a token is said to last.
        hanging: answer nothing any more.
    """

    port: int = 0
    blobs: dict[tuple[str, str], bytes] = attrs.Factory(dict)
    manifests: dict[tuple[str, str], bytes] = attrs.Factory(dict)
    seen: list[Seen] = attrs.Factory(list)
    sent: int = 0
    rules: list[Callable[[Seen], Reply | None]] = attrs.Factory(list)
    login: str = ""
    tokens: set[str] = attrs.Factory(set)
    expires_in: float = 300.0
    hanging: bool = False

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"registry+http://{self.address}"

    @property
    def lines(self) -> list[str]:
        return [seen.line for seen in self.seen]

    def add_blob(self, repository: str, content: bytes) -> Digest:
        digest = Digest.of(content)
        self.blobs[repository, str(digest)] = content
        return digest

    def add_image(self, repository: str, tag: str, config: bytes, *layers: bytes) -> bytes:
        for blob in (config, *layers):
            self.add_blob(repository, blob)
        manifest = manifest_of(config, *layers)
        self.manifests[repository, tag] = manifest
        self.manifests[repository, str(Digest.of(manifest))] = manifest
        return manifest

    def fail(self, times: int, pattern: str, reply: Reply) -> None:
        """Answer the next ``times`` requests whose line matches so."""
        left = [times]

        def rule(seen: Seen) -> Reply | None:
            if left[0] > 0 and re.search(pattern, seen.line):
                left[0] -= 1
                return reply
            return None

        self.rules.append(rule)

    # --- the server -------------------------------------------------------------------------------

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            while (await receive())["type"] != "lifespan.shutdown":
                await send({"type": "lifespan.startup.complete"})
            await send({"type": "lifespan.shutdown.complete"})
            return
        headers = {name.decode().lower(): value.decode() for name, value in scope["headers"]}
        query = parse_qs(scope["query_string"].decode())
        body, more = b"", scope["method"] == "POST"
        while more:
            part = await receive()
            body, more = body + part.get("body", b""), part.get("more_body", False)
        seen = Seen(scope["method"], scope["path"], query, headers, body)
        self.seen.append(seen)
        if self.hanging:
            await trio.sleep_forever()
        await self._send(seen, self._answer(seen), send)

    def _answer(self, seen: Seen) -> Reply:
        for rule in self.rules:
            reply = rule(seen)
            if reply is not None:
                return reply
        if seen.path == "/token":
            return self._give_token(seen)
        refusal = self._check_login(seen)
        return refusal or self._find(seen)

    def _give_token(self, seen: Seen) -> Reply:
        if seen.headers.get("authorization") not in {None, BASIC}:
            return Reply(401)
        form = seen.query
        if seen.method == "POST":
            form = parse_qs(seen.body.decode())
            if (form["grant_type"], form["refresh_token"]) != (["refresh_token"], [IDENTITY]):
                return Reply(401)
        token = f"token-{len(self.tokens)}-{form['scope'][0]}"
        self.tokens.add(token)
        return Reply(
            body=json.dumps({"token": token, "expires_in": self.expires_in}).encode(),
            headers={"Content-Type": "application/json"},
        )

    def _check_login(self, seen: Seen) -> Reply | None:
        sent = seen.headers.get("authorization")
        if self.login == "basic" and sent != BASIC:
            return Reply(401, {"WWW-Authenticate": 'Basic realm="here"'})
        if self.login == "token" and (sent or "").removeprefix("Bearer ") not in self.tokens:
            repository = re.sub(r"^/v2/|/(blobs|manifests)/.*$", "", seen.path)
            challenge = (
                f'Bearer realm="http://{self.address}/token",service="fake",'
                f'scope="repository:{repository}:pull"'
            )
            return Reply(401, {"WWW-Authenticate": challenge})
        return None

    def _find(self, seen: Seen) -> Reply:
        match = re.fullmatch(r"/v2/(.+)/(blobs|manifests)/([^/]+)", seen.path)
        if match is None:
            return Reply(404)
        repository, kind, reference = match.groups()
        if kind == "blobs":
            return self._blob(self.blobs.get((repository, reference)), seen)
        content = self.manifests.get((repository, reference))
        if content is None:
            return Reply(404)
        digest = str(Digest.of(content))
        headers = {"Content-Type": MANIFEST_TYPE, "Docker-Content-Digest": digest}
        if seen.headers.get("if-none-match") == f'"{digest}"':
            return Reply(304, headers)
        return Reply(200, headers, content)

    def _blob(self, content: bytes | None, seen: Seen) -> Reply:
        if content is None:
            return Reply(404)
        match = re.fullmatch(r"bytes=([0-9]+)-([0-9]*)", seen.headers.get("range", ""))
        if match is None:
            return Reply(200, {}, content)
        start, stop = int(match[1]), min(int(match[2] or len(content)) + 1, len(content))
        if start >= len(content):
            return Reply(416)
        extent = f"bytes {start}-{stop - 1}/{len(content)}"
        return Reply(206, {"Content-Range": extent}, content[start:stop])

    async def _send(self, seen: Seen, reply: Reply, send: Any) -> None:
        headers = {"Content-Length": str(len(reply.body)), **reply.headers}
        if reply.status == 304:
            del headers["Content-Length"]
        head = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": reply.status, "headers": head})
        body = b"" if seen.method == "HEAD" or reply.status == 304 else reply.body
        part = body[: reply.cut]
        if "/blobs/" in seen.path:
            self.sent += len(part)
        # Without its end the server closes the connection.
        more = reply.cut is not None
        await send({"type": "http.response.body", "body": part, "more_body": more})


@asynccontextmanager
async def fake_upstream(**options: Any) -> AsyncIterator[FakeUpstream]:
    """A running one, on a port of its own; ``options`` are those of `serve_http`."""
    upstream = FakeUpstream()
    drain = trio.Event()
    async with trio.open_nursery() as nursery:
        serve = partial(serve_http, upstream, "127.0.0.1", 0, drain=drain, grace=1.0, **options)
        _, upstream.port = await nursery.start(serve)
        try:
            yield upstream
        finally:
            drain.set()
