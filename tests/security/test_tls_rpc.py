"""Calls by mutual TLS: who may call what, and how each mistake ends on both sides."""

from __future__ import annotations

import socket
import ssl
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import attrs
import pytest
import structlog
import trio
import trio.testing

from swarmpull.digest import Digest
from swarmpull.errors import CertificateError, RpcFailed, RpcUnavailable
from swarmpull.watched_files import WatchedFiles
from swarmpull.wire import access, api, preheat_api
from swarmpull.wire.codec import encode
from swarmpull.wire.frames import FrameBuffer
from swarmpull.wire.listen import parse_address
from swarmpull.wire.rpc import (
    Method,
    RpcContext,
    RpcLimits,
    RpcService,
    open_rpc_pool,
    serve_rpc,
)
from swarmpull.wire.rpc_connections import RECEIVE_BYTES
from swarmpull.wire.rpc_messages import RpcError, RpcHello, RpcReply, RpcRequest, pack, unpack
from swarmpull.wire.tls import Tls, TlsFiles, load_contexts

from .hosts import ALL, Authority, tls_of, unchecked
from .key_update import half_key_update

BLOB = api.BlobRequest(Digest.of(b"x"))
HELD = api.HeldRequest(Digest.of(b"x"))
DEADLINE = 60.0


@attrs.define
class Origin:
    """Serves two methods; remembers who called."""

    callers: list[object] = attrs.Factory(list)
    release: trio.Event = attrs.Factory(trio.Event)
    urged: bool = False

    async def stat(self, _: api.BlobRequest, context: RpcContext) -> api.BlobStatReply:
        self.callers.append(context.caller)
        return api.BlobStatReply(1)

    async def urge(self, _: api.UrgeRequest, __: RpcContext) -> api.Empty:
        self.urged = True
        await self.release.wait()
        return api.Empty()

    async def held(self, _: api.HeldRequest, __: RpcContext) -> api.HeldReply:
        raise AssertionError("was called by somebody who may not")

    def service(self) -> RpcService:
        service = RpcService()
        service.register(api.STAT_BLOB, self.stat)
        service.register(api.HELD_BLOB, self.held)
        service.register(api.URGE, self.urge)
        return service


@asynccontextmanager
async def serving(
    tls: Tls | None, origin: Origin | None = None, limits: RpcLimits | None = None
) -> AsyncIterator[str]:
    service = (origin or Origin()).service()
    with trio.fail_after(DEADLINE):
        async with trio.open_nursery() as nursery:
            serve = partial(serve_rpc, service, "127.0.0.1", 0, tls=tls, limits=limits)
            host, port = await nursery.start(serve)
            yield f"{host}:{port}"
            nursery.cancel_scope.cancel()


@pytest.fixture(scope="module")
def prod(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.create(tmp_path_factory.mktemp("prod"), "prod")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.create(tmp_path_factory.mktemp("other"), "other")


@pytest.fixture(scope="module")
def agent(prod: Authority) -> TlsFiles:
    return prod.issue("agent", "agent")


@pytest.fixture(scope="module")
def origin(prod: Authority) -> TlsFiles:
    return prod.issue("origin", "origin")


async def test_a_caller_is_known_to_the_handler(agent: TlsFiles, origin: TlsFiles) -> None:
    served = Origin()
    async with serving(tls_of(origin), served) as address, open_rpc_pool(tls=tls_of(agent)) as pool:
        reply = await pool.call(address, api.STAT_BLOB, BLOB, timeout=20.0)

    assert reply.length == 1
    assert [str(caller) for caller in served.callers] == ["agent agent of cluster prod"]


async def test_an_agent_may_not_call_what_only_origins_may(
    agent: TlsFiles, origin: TlsFiles
) -> None:
    with structlog.testing.capture_logs() as logs:
        async with serving(tls_of(origin)) as address, open_rpc_pool(tls=tls_of(agent)) as pool:
            for _ in range(3):
                with pytest.raises(RpcFailed, match="refused: the certificate of agent agent") as e:
                    await pool.call(address, api.HELD_BLOB, HELD, timeout=20.0)
            assert "issue one with that --role" in str(e.value)
            # The connection goes on.
            await pool.call(address, api.STAT_BLOB, BLOB, timeout=20.0)

    warnings = [entry for entry in logs if entry["log_level"] == "warning"]
    assert len(warnings) == 1
    assert "which is for origin" in warnings[0]["reason"]


async def test_requests_that_come_together_are_all_answered_though_they_rest_in_between(
    agent: TlsFiles, origin: TlsFiles
) -> None:
    """Of what OpenSSL holds meanwhile the kernel says nothing."""
    count = 3000
    requests = b"".join(pack(RpcRequest(n, 60_000, "no.such", b"")) for n in range(count))
    ids: list[int] = []
    async with serving(tls_of(origin)) as address, trio.open_nursery() as nursery:
        stream, _ = await tls_of(agent).connect(await trio.open_tcp_stream(*parse_address(address)))
        async with stream:
            nursery.start_soon(stream.send_all, pack(RpcHello(1)) + requests)
            buffer = FrameBuffer(body_bytes_max=1 << 16)
            while len(ids) < count:
                buffer.feed(await stream.receive_some())
                while (frame := buffer.take()) is not None:
                    message = unpack(frame.type, frame.body)
                    if isinstance(message, RpcError):
                        ids.append(message.id)

    assert ids == list(range(count))


def test_every_method_says_who_may_call_it() -> None:
    values = [*vars(api).values(), *vars(preheat_api).values()]
    methods = {each.name for each in values if isinstance(each, Method)}

    assert methods == access.CALLERS.keys()
    assert all(access.CALLERS[name] for name in methods)


Maker = Callable[[], Tls | None]


@pytest.fixture(scope="module")
def mistakes(
    prod: Authority,
    other: Authority,
    agent: TlsFiles,
    origin: TlsFiles,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, tuple[Maker, Maker, str, str]]:
    """Name -> how server and client are made, what the client's error says, what the server logs."""
    both = tmp_path_factory.mktemp("both") / "both.crt"
    both.write_text(Path(agent.ca).read_text() + (other.directory / "ca.crt").read_text())
    strange = other.issue("strange", *ALL)
    old_agent = prod.issue_expired("old-agent", "agent")
    old_origin = prod.issue_expired("old-origin", "origin")
    return {
        "client expired": (
            partial(tls_of, origin),
            partial(unchecked, old_agent, "prod", "old-agent", "agent"),
            "the other side refuses our certificate: it has expired",
            "certificate has expired: issue a new one",
        ),
        "server expired": (
            partial(unchecked, old_origin, "prod", "old-origin", "origin"),
            partial(tls_of, agent),
            "certificate has expired: issue a new one",
            "the other side refuses our certificate: it has expired",
        ),
        "another authority": (
            partial(tls_of, origin),
            partial(tls_of, strange),
            "tls.ca must be the same everywhere",
            "tls.ca must be the same everywhere",
        ),
        "another cluster": (
            partial(tls_of, attrs.evolve(origin, ca=str(both))),
            partial(tls_of, attrs.evolve(strange, ca=str(both))),
            "of another cluster than other",
            "of another cluster than prod",
        ),
        "plain client": (partial(tls_of, origin), none, "only one side", "only one side"),
        "plain server": (none, partial(tls_of, agent), "only one side", "only one side"),
    }


def none() -> None:
    return None


@pytest.mark.parametrize(
    "mistake",
    [
        "client expired",
        "server expired",
        "another authority",
        "another cluster",
        "plain client",
        "plain server",
    ],
)
async def test_a_mistake_ends_with_one_line_on_both_sides(mistakes, mistake: str) -> None:
    server, client, error, logged = mistakes[mistake]
    with structlog.testing.capture_logs() as logs:
        async with serving(server()) as address, open_rpc_pool(tls=client()) as pool:
            for _ in range(3):
                with pytest.raises(RpcUnavailable) as caught:
                    await pool.call(address, api.STAT_BLOB, BLOB, timeout=20.0)
                assert error in caught.value.reason
            await until(lambda: any("listener" in entry for entry in logs))

    lines = [entry for entry in logs if entry["log_level"] in ("warning", "error")]
    here = [entry["reason"] for entry in lines if "address" in entry]
    there = [entry["reason"] for entry in lines if "listener" in entry]
    assert len(here) == len(there) == 1, lines
    assert error in here[0]
    assert logged in there[0]
    assert "\n" not in here[0] + there[0]


@pytest.mark.parametrize("names", ["are no text", "are for HTTPS"])
async def test_a_certificate_that_no_role_would_start_with_is_turned_away(
    prod: Authority, agent: TlsFiles, origin: TlsFiles, names: str
) -> None:
    if names == "are no text":
        files, says = prod.issue_unreadable("odd", "agent"), "has names that are no text"
    else:
        files, says = prod.issue("shop", dns=["example.com"]), "names no role of a cluster"
    with structlog.testing.capture_logs() as logs:
        async with serving(tls_of(origin)) as address:
            async with open_rpc_pool(tls=unchecked(files, "prod", "odd", "agent")) as pool:
                with pytest.raises(RpcUnavailable):
                    await pool.call(address, api.STAT_BLOB, BLOB, timeout=20.0)
            async with open_rpc_pool(tls=tls_of(agent)) as pool:
                assert (await pool.call(address, api.STAT_BLOB, BLOB, timeout=20.0)).length == 1

    [reason] = [entry["reason"] for entry in logs if entry["log_level"] == "warning"]
    assert f"the certificate of the other side {says}" in reason


async def test_a_server_of_another_role_is_not_called(prod: Authority, agent: TlsFiles) -> None:
    index = tls_of(prod.issue("index", "index", force=True))
    with structlog.testing.capture_logs() as logs:
        async with serving(index) as address, open_rpc_pool(tls=tls_of(agent)) as pool:
            for _ in range(2):
                with pytest.raises(RpcUnavailable, match="which is no origin: issue one with"):
                    await pool.call(address, api.STAT_BLOB, BLOB, timeout=20.0)

    assert len([entry for entry in logs if entry["log_level"] == "warning"]) == 1


async def test_a_client_without_a_certificate_is_turned_away(origin: TlsFiles) -> None:
    context = ssl.create_default_context(cafile=origin.ca)
    context.check_hostname = False
    with structlog.testing.capture_logs() as logs:
        async with serving(tls_of(origin)) as address:
            host, port = address.split(":")
            stream = trio.SSLStream(await trio.open_tcp_stream(host, int(port)), context)
            async with stream:
                with pytest.raises(trio.BrokenResourceError):
                    await stream.receive_some(1)
            await until(lambda: any(entry["log_level"] == "warning" for entry in logs))

    reasons = [entry["reason"] for entry in logs if entry["log_level"] == "warning"]
    assert reasons == ["the other side shows no certificate: set tls.cert and tls.key there"]


async def test_noise_on_a_tls_port_leaves_the_others_alone(
    agent: TlsFiles, origin: TlsFiles
) -> None:
    async with serving(tls_of(origin)) as address, open_rpc_pool(tls=tls_of(agent)) as pool:
        host, port = address.split(":")
        for noise in (b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x00\x05hello", b"\x16", b""):
            async with await trio.open_tcp_stream(host, int(port)) as stream:
                if noise:
                    await stream.send_all(noise)
                await stream.send_eof()
                while await stream.receive_some():
                    pass
        assert (await pool.call(address, api.STAT_BLOB, BLOB, timeout=20.0)).length == 1


async def test_a_caller_that_stops_inside_a_key_update_ends_its_own_connection_only(
    agent: TlsFiles, origin: TlsFiles, tmp_path: Path
) -> None:
    strange, served = tls_of(agent), Origin()
    strange._files.current.client.keylog_filename = str(tmp_path / "secrets")
    with structlog.testing.capture_logs() as logs:
        async with serving(tls_of(origin), served) as address:
            secured, _ = await strange.connect(await trio.open_tcp_stream(*parse_address(address)))
            async with secured:
                await secured.send_all(pack(RpcHello(1)))
                await secured.receive_some()
                urge = encode(api.UrgeRequest(Digest.of(b"x"), (1,)))
                await secured.send_all(pack(RpcRequest(1, 20_000, api.URGE.name, urge)))
                half = half_key_update(tmp_path / "secrets", 2)
                assert socket.socket.send(secured.socket, half) == len(half)
                # The server has read it, and waits for the other half, when it is to answer.
                await until(lambda: served.urged)
                await trio.testing.wait_all_tasks_blocked(0.1)
                served.release.set()
                with suppress(trio.BrokenResourceError):
                    assert await secured.receive_some() == b""
            async with open_rpc_pool(tls=tls_of(agent)) as pool:
                assert (await pool.call(address, api.STAT_BLOB, BLOB, timeout=20.0)).length == 1

    reasons = [entry["reason"] for entry in logs if entry["event"] == "rpc_connection_closed"]
    assert "connection lost: the other side stopped inside a message of TLS itself" in reasons


async def test_requests_that_openssl_has_received_are_read_when_there_is_room_again(
    agent: TlsFiles, origin: TlsFiles
) -> None:
    served, limits = Origin(), RpcLimits(requests_max=1)
    async with serving(tls_of(origin), served, limits) as address:
        stream = await trio.open_tcp_stream(*parse_address(address))
        secured, _ = await tls_of(agent).connect(stream)
        async with secured:
            urge = encode(api.UrgeRequest(Digest.of(b"x"), (1,)))
            requests = [pack(RpcRequest(n, 20_000, api.URGE.name, urge)) for n in range(100)]
            # One record, longer than what is read at once.
            sent = pack(RpcHello(1)) + b"".join(requests)
            assert RECEIVE_BYTES < len(sent) < 1 << 14
            await secured.send_all(sent)
            await until(lambda: served.urged)
            served.release.set()
            replies = FrameBuffer(body_bytes_max=1 << 20)
            answered: set[int] = set()
            while len(answered) < len(requests):
                replies.feed(await secured.receive_some())
                while (frame := replies.take()) is not None:
                    message = unpack(frame.type, frame.body)
                    if isinstance(message, RpcReply):
                        answered.add(message.id)


async def test_new_connections_use_new_files_and_old_ones_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swarmpull.watched_files.LOOK_EVERY", 0.02)
    authority = Authority.create(tmp_path / "certs", "prod")
    watched = []
    for name in ("agent", "origin"):
        files = authority.issue(name, name)
        load = partial(load_contexts, files)
        watched.append(await WatchedFiles.open((files.ca, files.cert, files.key), load))
    before = [each.current for each in watched]
    agent, origin = map(Tls, watched)
    served = Origin()
    with structlog.testing.capture_logs() as logs:
        async with serving(origin, served) as address, trio.open_nursery() as nursery:
            for each in watched:
                nursery.start_soon(each.run)
            async with open_rpc_pool(tls=agent) as old, open_rpc_pool(tls=agent) as new:
                answered = trio.Event()

                async def long_call() -> None:
                    request = api.UrgeRequest(Digest.of(b"x"), (1,))
                    await old.call(address, api.URGE, request, timeout=30.0)
                    answered.set()

                nursery.start_soon(long_call)
                await old.call(address, api.STAT_BLOB, BLOB, timeout=20.0)

                # A key that does not fit is not used.
                key = tmp_path / "certs" / "agent.key"
                good = key.read_bytes()
                key.write_text("nothing")
                await until(lambda: "files_not_reloaded" in [entry["event"] for entry in logs])
                assert watched[0].current is before[0]
                key.write_bytes(good)

                # Another authority: nothing of the old one would be trusted by the new.
                certificates = tmp_path / "certs"
                Authority.create(tmp_path / "next", "prod")
                for name in ("ca.crt", "ca.key"):
                    (tmp_path / "next" / name).replace(certificates / name)
                for name in ("agent", "origin"):
                    authority.issue(name, name, force=True)
                old_authority = before[0].client.get_ca_certs()
                await until(
                    lambda: all(e.current.client.get_ca_certs() != old_authority for e in watched)
                )
                assert (await new.call(address, api.STAT_BLOB, BLOB, timeout=20.0)).length == 1
                served.release.set()
                await answered.wait()
            nursery.cancel_scope.cancel()


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - of a log
        await trio.sleep(0.01)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda f: attrs.evolve(f, ca="/nowhere/ca.crt"), "tls.ca: /nowhere/ca.crt cannot be read"),
        (lambda f: attrs.evolve(f, ca=sys.executable), "tls.ca: .* holds no certificate in PEM"),
        (lambda f: attrs.evolve(f, ca=f.key), "tls.ca: .* holds no certificate in PEM"),
        (lambda f: attrs.evolve(f, key=f.cert), "tls.cert: .* are not a certificate and its key"),
        (
            lambda f: attrs.evolve(f, key=f.key.replace("agent.key", "ca.key")),
            "tls.key: .* is not the key of",
        ),
    ],
)
def test_files_that_cannot_be_used_are_named_with_their_key(
    agent: TlsFiles, spoil: Callable[[TlsFiles], TlsFiles], says: str
) -> None:
    with pytest.raises(CertificateError, match=says):
        load_contexts(spoil(agent))


def test_comments_between_certificates_are_in_any_language(agent: TlsFiles, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle.crt"
    bundle.write_text(f"# Főtanúsítvány\n{Path(agent.ca).read_text()}")
    load_contexts(attrs.evolve(agent, ca=str(bundle)))


def test_a_certificate_that_others_would_refuse_is_of_no_use(
    prod: Authority, other: Authority, agent: TlsFiles
) -> None:
    with pytest.raises(CertificateError, match=r"tls\.cert: .* is refused by"):
        load_contexts(attrs.evolve(agent, ca=str(other.directory / "ca.crt")))
    with pytest.raises(CertificateError, match="certificate has expired"):
        load_contexts(prod.issue_expired("late", "agent"))
    with pytest.raises(CertificateError, match="names no role of a cluster"):
        load_contexts(prod.issue("web", dns=["web.example.com"]))
    with pytest.raises(CertificateError, match=r"noise\.crt has names that are no text"):
        load_contexts(prod.issue_unreadable("noise", "agent"))
