"""Listeners with a server certificate, and registries that ask for a password."""

from __future__ import annotations

import base64
import random
import ssl
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

import attrs
import bcrypt
import httpx
import pytest
import structlog
import trio

from swarmpull.config import HttpListenerConfig, RegistryConfig
from swarmpull.digest import Digest
from swarmpull.errors import CertificateError
from swarmpull.registry import htpasswd
from swarmpull.registry.client import get_statuses
from swarmpull.registry.htpasswd import Passwords, load_htpasswd, parse_basic
from swarmpull.registry.server import HttpLimits, serve_http
from swarmpull.watched_files import WatchedFiles
from swarmpull.wire.tls import load_server_context
from tests.registry.test_registry_server import answer_ok
from tests.roles.roles import ANY, Cluster, cluster_under

from .hosts import Authority, Fixed

NAME, PASSWORD = "alice", "pass:word ü"


def line(name: str, password: str, *, prefix: bytes = b"2b") -> str:
    hashed = bcrypt.hashpw(password.encode(), bcrypt.gensalt(4, prefix=prefix))
    return f"{name}:{hashed.decode()}\n"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.create(tmp_path_factory.mktemp("authority"), "prod")


@pytest.fixture
def passwords(tmp_path: Path) -> Path:
    path = tmp_path / "htpasswd"
    path.write_text(f"# who may push\n{line(NAME, PASSWORD)}\n{line('bob', 'b')}")
    return path


@attrs.frozen
class Secured:
    """An origin by HTTPS, and a client that trusts its authority only."""

    cluster: Cluster
    client: httpx.AsyncClient
    url: str
    admin: str

    async def push(self, content: bytes, **options: object) -> httpx.Response:
        return await self.client.put(
            f"{self.url}/blobs/{Digest.of(content)}", content=content, **options
        )


@asynccontextmanager
async def secured_origin(
    root: Path, authority: Authority, **settings: str
) -> AsyncIterator[Secured]:
    files = authority.issue("web", ips=["127.0.0.1"], force=True)
    certificate = {"tls_cert": files.cert, "tls_key": files.key}
    context = ssl.create_default_context(cafile=files.ca)
    async with cluster_under(root) as cluster, httpx.AsyncClient(verify=context) as client:
        await cluster.start_index()
        role = await cluster.start_one_origin(
            "origin",
            registry=RegistryConfig(listen=ANY, **certificate, **settings),
            admin=HttpListenerConfig(listen=ANY, **certificate),
        )
        cluster._learn(origins=(role.address("rpc"),))
        urls = (f"https://{role.address(name)}" for name in ("registry", "admin"))
        yield Secured(cluster, client, *urls)


async def test_a_registry_and_an_admin_listener_by_https(
    tmp_path: Path, authority: Authority
) -> None:
    content = random.randbytes(3 << 20)
    async with secured_origin(tmp_path, authority) as origin:
        assert (await origin.push(content)).status_code == 201
        reply = await origin.client.get(f"{origin.url}/blobs/{Digest.of(content)}")
        assert reply.content == content
        assert (await origin.client.get(f"{origin.admin}/health")).json() == {"status": "ok"}


async def test_plain_http_on_an_https_port_is_told_so(tmp_path: Path, authority: Authority) -> None:
    with structlog.testing.capture_logs() as logs:
        async with secured_origin(tmp_path, authority) as origin:
            for _ in range(2):
                reply = await origin.client.get(origin.url.replace("https", "http") + "/v2/")
                assert reply.status_code == 400
                assert "HTTPS only" in reply.text
            plain = origin.url.replace("https", "http")
            assert "HTTPS only" in (await origin.client.head(f"{plain}/v2/")).reason_phrase
            address = origin.admin.removeprefix("https://")
            (answer,) = await get_statuses([address])
            # Also where nobody has named it: it is a role, and would be missed in the list.
            assert answer.is_unheard
            assert answer.failure.endswith(f"name it as https://{address}")
            with pytest.raises(httpx.ConnectError):
                async with httpx.AsyncClient() as mistrusting:
                    await mistrusting.get(f"{origin.url}/v2/")
            assert (await origin.client.get(f"{origin.url}/v2/")).status_code == 200

    reasons = [entry["reason"] for entry in logs if entry["event"] == "connection_not_trusted"]
    # Once for each of the two listeners.
    assert reasons == ["plain HTTP on a port for HTTPS: use https:// there"] * 2


async def test_a_connection_by_https_counts_once(authority: Authority) -> None:
    files = authority.issue("counted", ips=["127.0.0.1"])
    context = load_server_context(("tls_cert", files.cert), ("tls_key", files.key))
    assert context.options & ssl.OP_NO_RENEGOTIATION
    serve = partial(serve_http, drain=trio.Event(), grace=0.0, limits=HttpLimits(connections=2))
    trusted = ssl.create_default_context(cafile=files.ca)
    async with trio.open_nursery() as nursery, AsyncExitStack() as clients:
        host, port = await nursery.start(
            partial(serve, answer_ok, "127.0.0.1", 0, https=Fixed(context))
        )
        first, second, third = [
            await clients.enter_async_context(httpx.AsyncClient(verify=trusted)) for _ in range(3)
        ]
        url = f"https://{host}:{port}/"
        assert (await first.get(url)).status_code == 200
        assert (await second.get(url)).status_code == 200
        with pytest.raises(httpx.TransportError):
            await third.get(url)
        nursery.cancel_scope.cancel()


async def test_a_new_certificate_meets_new_connections_only(
    tmp_path: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swarmpull.watched_files.LOOK_EVERY", 0.02)
    content = random.randbytes(8 << 20)
    async with secured_origin(tmp_path, authority) as origin:
        await origin.push(content)
        first = await trio.to_thread.run_sync(serial, origin.url)
        url = f"{origin.url}/blobs/{Digest.of(content)}"
        received = bytearray()
        async with origin.client.stream("GET", url) as reply:
            chunks = reply.aiter_raw(65536)
            received += await anext(chunks)
            authority.issue("web", ips=["127.0.0.1"], force=True)
            await until(lambda: is_changed(origin.url, first))
            async for chunk in chunks:
                received += chunk
        assert received == content


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    while not await condition():  # noqa: ASYNC110 - of sockets and files
        await trio.sleep(0.02)


async def is_changed(url: str, certificate: str) -> bool:
    return await trio.to_thread.run_sync(serial, url) != certificate


async def is_among(event: str, logs: list) -> bool:
    await trio.lowlevel.checkpoint()
    return any(entry["event"] == event for entry in logs)


async def is_accepted(client: httpx.AsyncClient, url: str, login: httpx.BasicAuth) -> bool:
    return (await client.get(url, auth=login)).status_code == 200


def serial(url: str) -> str:
    """What a new connection is shown."""
    host, port = url.removeprefix("https://").split(":")
    return ssl.get_server_certificate((host, int(port)), timeout=20.0)


# --- passwords ------------------------------------------------------------------------------------


async def test_pushes_need_a_password_and_pulls_do_not(
    tmp_path: Path, authority: Authority, passwords: Path
) -> None:
    content = b"some content"
    login = httpx.BasicAuth(NAME, PASSWORD)
    async with secured_origin(tmp_path, authority, htpasswd=str(passwords)) as origin:
        refused = await origin.push(content)
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"].startswith('Basic realm="swarmpull"')
        assert refused.json()["errors"][0]["code"] == "UNAUTHORIZED"
        wrong = await origin.push(content, auth=httpx.BasicAuth(NAME, "guess"))
        assert (wrong.status_code, "is wrong" in wrong.text) == (401, True)
        begun = await origin.client.post(f"{origin.url}/v2/team/app/blobs/uploads/")
        assert begun.status_code == 401

        assert (await origin.push(content, auth=login)).status_code == 201
        reply = await origin.client.get(f"{origin.url}/blobs/{Digest.of(content)}")
        assert reply.content == content

        # Where clients find out, and log in.
        ping = await origin.client.get(f"{origin.url}/v2/")
        assert ping.status_code == 401
        assert ping.headers["docker-distribution-api-version"] == "registry/2.0"
        assert (await origin.client.get(f"{origin.url}/v2/", auth=login)).status_code == 200
        assert (await origin.client.get(f"{origin.admin}/health")).status_code == 200


async def test_the_push_command_logs_in(
    tmp_path: Path, authority: Authority, passwords: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await trio.Path(tmp_path / "file").write_bytes(b"some content")
    await trio.Path(tmp_path / "password").write_text(f"{PASSWORD}\n")
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.directory / "ca.crt"))
    async with secured_origin(tmp_path, authority, htpasswd=str(passwords)) as origin:
        push = [sys.executable, "-m", "swarmpull", "push", "--registry", origin.url]
        login = ["--user", NAME, "--password-file", str(tmp_path / "password")]
        file = str(tmp_path / "file")
        refused = await trio.run_process([*push, file], check=False, capture_stderr=True)
        assert refused.returncode == 1
        assert b"a name and a password are needed" in refused.stderr
        assert b"--user and --password-file" in refused.stderr
        done = await trio.run_process([*push, *login, file], capture_stdout=True)
        assert done.stdout.decode().strip() == str(Digest.of(b"some content"))


async def test_a_password_may_be_needed_for_everything(
    tmp_path: Path, authority: Authority, passwords: Path
) -> None:
    login = httpx.BasicAuth(NAME, PASSWORD)
    settings = {"htpasswd": str(passwords), "htpasswd_for": "all"}
    async with secured_origin(tmp_path, authority, **settings) as origin:
        await origin.push(b"x", auth=login)
        url = f"{origin.url}/blobs/{Digest.of(b'x')}"
        assert (await origin.client.get(url)).status_code == 401
        assert (await origin.client.get(url, auth=login)).content == b"x"


async def test_the_file_is_read_again_and_a_broken_one_is_not(
    tmp_path: Path, authority: Authority, passwords: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swarmpull.watched_files.LOOK_EVERY", 0.02)
    old, new = httpx.BasicAuth(NAME, PASSWORD), httpx.BasicAuth(NAME, "another")
    with structlog.testing.capture_logs() as logs:
        async with secured_origin(tmp_path, authority, htpasswd=str(passwords)) as origin:
            ping = f"{origin.url}/v2/"
            assert (await origin.client.get(ping, auth=old)).status_code == 200

            await trio.Path(passwords).write_text("alice:{SHA}0DPiKuNIrrVmD8IUCuw1hQxNqZc=\n")
            await until(lambda: is_among("files_not_reloaded", logs))
            assert (await origin.client.get(ping, auth=old)).status_code == 200

            await trio.Path(passwords).write_text(line(NAME, "another"))
            await until(lambda: is_accepted(origin.client, ping, new))
            assert (await origin.client.get(ping, auth=old)).status_code == 401
    broken = next(entry for entry in logs if entry["event"] == "files_not_reloaded")
    assert "origin.registry.htpasswd" in broken["reason"]
    assert "htpasswd -B" in broken["reason"]


async def test_what_was_right_is_not_checked_again(
    passwords: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[bytes] = []
    real = htpasswd._matches
    monkeypatch.setattr(
        htpasswd, "_matches", lambda word, hashed: checked.append(word) or real(word, hashed)
    )
    known = Passwords(WatchedFiles((str(passwords),), lambda: load_htpasswd(str(passwords), "k")))

    for _ in range(3):
        assert await known.accept(NAME, PASSWORD.encode())
    assert len(checked) == 1
    for name, password in ((NAME, b"wrong"), (NAME, b"wrong"), ("nobody", b"b"), ("bob", b"b\0")):
        assert not await known.accept(name, password)
    # Wrong ones cost the same each time, and an unknown name as much as a known one.
    assert len(checked) == 5
    assert PASSWORD.encode() not in b"".join(known._right)


async def test_an_unknown_name_costs_as_much_as_the_passwords_of_the_file(
    passwords: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[bytes] = []
    monkeypatch.setattr(htpasswd, "_matches", lambda _, hashed: checked.append(hashed) or True)
    known = Passwords(WatchedFiles((str(passwords),), lambda: load_htpasswd(str(passwords), "k")))

    assert await known.accept(NAME, b"x")
    for _ in range(2):
        # Not even what bcrypt takes for right.
        assert not await known.accept("nobody", b"x")

    assert [hashed[:7] for hashed in checked] == [b"$2b$04$"] * 3


def test_hashes_of_other_makers_and_long_passwords(tmp_path: Path) -> None:
    file = tmp_path / "htpasswd"
    long = "p" * 100
    hashed = bcrypt.hashpw(long.encode()[:72], bcrypt.gensalt(4)).decode()
    file.write_text(f"apache:{hashed.replace('$2b$', '$2y$')}\n")

    users = load_htpasswd(str(file), "k")

    assert htpasswd._matches(long.encode(), users["apache"])


TOO_STRONG = f"alice:$2y$18${'.' * 53}"


@pytest.mark.parametrize(
    "text", ["alice", "alice:", ":x", "alice:plain", "alice:$2y$05$short", TOO_STRONG]
)
def test_a_line_that_is_none_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "htpasswd"
    file.write_text(f"\n{text}\n")
    with pytest.raises(CertificateError, match=r"^k: .*htpasswd:2 is not NAME:HASH"):
        load_htpasswd(str(file), "k")


def test_a_file_that_names_nobody_is_of_no_use(tmp_path: Path) -> None:
    file = tmp_path / "htpasswd"
    file.write_text("# nobody yet\n\n")
    with pytest.raises(CertificateError, match=r"^k: .* names nobody"):
        load_htpasswd(str(file), "k")


@pytest.mark.parametrize(
    ("header", "meant"),
    [
        (f"Basic {base64.b64encode(b'a:b:c').decode()}", ("a", b"b:c")),
        (f"basic {base64.b64encode(b'a:').decode()}", ("a", b"")),
        ("Basic Og==", ("", b"")),
        ("Basic !", ("", b"")),
        ("Bearer abc", ("", b"")),
        ("", ("", b"")),
        (None, ("", b"")),
    ],
)
def test_authorization_headers(header: str | None, meant: tuple[str, bytes]) -> None:
    assert parse_basic(header) == meant
