"""Upstreams that are reached through an HTTP proxy only."""

from __future__ import annotations

import re
import traceback
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import attrs
import pytest
import trio

from swarmpull import certificates
from swarmpull.config import UpstreamConfig
from swarmpull.digest import Digest
from swarmpull.errors import BackendUnavailable, StartupError
from swarmpull.registry.upstream import Patience, open_upstream
from swarmpull.registry.upstream_credentials import Credentials
from swarmpull.store.backends.base import blob_key
from swarmpull.watched_files import WatchedFiles
from swarmpull.wire.tls import load_server_context

from .upstream_server import FakeUpstream, fake_upstream

REPOSITORY = "team/app"
CONTENT = b"content of a layer"
KEY = blob_key(Digest.of(CONTENT))


@attrs.define
class Proxy:
    """Passes on what it is asked for, or refuses.

    Attributes:
        requests: the first lines and ``Proxy-Authorization`` of what came in.
        refuses: answers 403.
    """

    port: int = 0
    requests: list[str] = attrs.Factory(list)
    authorizations: list[str] = attrs.Factory(list)
    refuses: bool = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def handle(self, client: trio.abc.Stream) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            part = await client.receive_some()
            if not part:
                return
            head += part
        line, _, rest = head.partition(b"\r\n")
        method, target, _ = line.decode().split()
        self.requests.append(f"{method} {target}")
        self.authorizations += re.findall(r"(?i)proxy-authorization: (\S+ \S+)", head.decode())
        if self.refuses:
            await client.send_all(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
            return
        host, port, path = re.fullmatch(r"(?:http://)?([^:/]+):([0-9]+)(.*)", target).groups()
        async with await trio.open_tcp_stream(host, int(port)) as server:
            if method == "CONNECT":
                await client.send_all(b"HTTP/1.1 200 Connected\r\n\r\n")
            else:
                rest = rest.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1)
                await server.send_all(f"{method} {path} HTTP/1.1\r\n".encode() + rest)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pump, client, server, nursery.cancel_scope)
                nursery.start_soon(pump, server, client, nursery.cancel_scope)


async def pump(source: trio.abc.Stream, target: trio.abc.Stream, scope: trio.CancelScope) -> None:
    try:
        async for data in source:
            await target.send_all(data)
    except trio.BrokenResourceError:
        pass  # one of them has hung up
    scope.cancel()


@pytest.fixture
async def proxy() -> AsyncIterator[Proxy]:
    proxy = Proxy()
    async with trio.open_nursery() as nursery:
        serve = partial(trio.serve_tcp, proxy.handle, 0, host="127.0.0.1")
        (listener,) = await nursery.start(serve)
        proxy.port = listener.socket.getsockname()[1]
        yield proxy
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def upstream_with_content(**options: object) -> AsyncIterator[FakeUpstream]:
    async with fake_upstream(**options) as server:
        server.add_blob(REPOSITORY, CONTENT)
        yield server


async def pull(url: str, proxy: str) -> bytes:
    quick = Patience(attempts=2, backoff_min=0.001, backoff_max=0.002)
    async with open_upstream(url, Credentials("here"), patience=quick, proxy=proxy) as upstream:
        return await upstream.backend(REPOSITORY).get_bytes(KEY)


async def test_everything_goes_through_the_proxy(proxy: Proxy) -> None:
    async with upstream_with_content() as server:
        server.login = "token"

        assert await pull(server.url, proxy.url) == CONTENT

        targets = [target.partition("?")[0] for target in proxy.requests]
        assert f"GET http://{server.address}/token" in targets
        assert len(proxy.requests) == len(server.seen)


async def test_https_goes_through_a_tunnel_and_the_certificate_is_that_of_the_upstream(
    proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificates.create_authority(tmp_path, "upstream")
    files = certificates.issue(tmp_path, "registry", (), ips=["127.0.0.1"])
    cert, key = ("cert", str(files.certificate)), ("key", str(files.key))
    context = WatchedFiles((cert[1], key[1]), partial(load_server_context, cert, key))
    async with upstream_with_content(https=context) as server:
        url = server.url.replace("http:", "https:")
        with pytest.raises(BackendUnavailable, match="its certificate is not trusted"):
            await pull(url, proxy.url)
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.crt"))

        assert await pull(url, proxy.url) == CONTENT

    assert set(proxy.requests) == {f"CONNECT {server.address}"}


async def test_a_proxy_that_speaks_tls_is_believed_as_any_server(
    proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificates.create_authority(tmp_path, "proxies")
    files = certificates.issue(tmp_path, "proxy", (), ips=["127.0.0.1"])
    context = load_server_context(("", str(files.certificate)), ("", str(files.key)))

    async def handle(client: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError):  # who does not believe it hangs up
            await proxy.handle(trio.SSLStream(client, context, server_side=True))

    async with upstream_with_content() as server, trio.open_nursery() as nursery:
        serve = partial(trio.serve_tcp, handle, 0, host="127.0.0.1")
        (listener,) = await nursery.start(serve)
        url = f"https://127.0.0.1:{listener.socket.getsockname()[1]}"
        with pytest.raises(BackendUnavailable, match="its certificate is not trusted"):
            await pull(server.url, url)
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.crt"))
        assert await pull(server.url, url) == CONTENT
        nursery.cancel_scope.cancel()
    assert proxy.requests


async def test_the_environment_names_proxy_password_and_exceptions(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", proxy.url.replace("//", "//me:secret@"))
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    async with upstream_with_content() as server:
        # Not unasked.
        assert await pull(server.url, "") == CONTENT
        assert proxy.requests == []

        assert await pull(server.url, "environment") == CONTENT
        asked = len(proxy.requests)
        assert proxy.authorizations == asked * ["Basic bWU6c2VjcmV0"] != []

        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        assert await pull(server.url, "environment") == CONTENT
        assert len(proxy.requests) == asked


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ALL_PROXY", "socks5://me:secret@proxy:1080"),
        ("HTTPS_PROXY", "ftp://me:secret@proxy:3128"),
        ("HTTPS_PROXY", "http://me:secret/@proxy:3128"),
    ],
)
async def test_an_environment_that_names_no_usable_proxy_is_said_without_its_password(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(StartupError, match="through the proxies of the environment") as caught:
        await pull("https://registry.example", "environment")
    assert "secret" not in "".join(traceback.format_exception(caught.value))


async def test_a_proxy_that_refuses_or_is_not_there_is_said(proxy: Proxy) -> None:
    proxy.refuses = True
    async with upstream_with_content() as server:
        with pytest.raises(BackendUnavailable, match="403"):
            await pull(server.url.replace("http:", "https:"), proxy.url)
        with pytest.raises(BackendUnavailable, match="refused"):
            await pull(server.url, "http://127.0.0.1:1")
        assert server.seen == []


@pytest.mark.parametrize("proxy", ["http://proxy:3128", "https://proxy:3128/", "environment", ""])
def test_what_is_a_proxy(proxy: str) -> None:
    UpstreamConfig(name="docker.io", url="registry+https://registry-1.docker.io", proxy=proxy)


@pytest.mark.parametrize(
    "proxy",
    ["proxy:3128", "http://proxy", "http://a:b@proxy:3128", "socks5://proxy:1", "Environment"],
)
def test_what_is_none(proxy: str) -> None:
    with pytest.raises(
        ValueError, match="must be http://host:port, environment, or empty"
    ) as caught:
        UpstreamConfig(name="docker.io", url="registry+https://registry-1.docker.io", proxy=proxy)
    assert "a:b" not in str(caught.value)
