"""Certificates that were taken back: who holds one is not let in, and cut off if it is in."""

from __future__ import annotations

import datetime as dt
import re
import ssl
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import structlog
import trio
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from swarmpull import certificates
from swarmpull.cli import main
from swarmpull.digest import Digest
from swarmpull.errors import CertificateError, RpcUnavailable
from swarmpull.roles.security import open_tls
from swarmpull.telemetry import Metrics
from swarmpull.wire import api
from swarmpull.wire.rpc import open_rpc_pool
from swarmpull.wire.tls import Tls, TlsFiles, TlsStream, _certificates

from .hosts import Authority, config_of, tls_of
from .test_tls_rpc import BLOB, Origin, serving, until


@pytest.fixture
def prod(tmp_path: Path) -> Authority:
    return Authority.create(tmp_path / "prod", "prod")


def run(*arguments: str | Path) -> int:
    return main(["certs", "revoke", *map(str, arguments)])


async def open_with_list(opened: AsyncExitStack, files: TlsFiles, listing: Path) -> Tls:
    (role,) = tls_of(files).identity.roles
    config = config_of(files, crl=str(listing))
    tls = await opened.enter_async_context(open_tls(role, config, Metrics()))
    assert tls is not None
    return tls


async def greeted(opened: AsyncExitStack, there: Tls, here: Tls) -> tuple[TlsStream, TlsStream]:
    """Both ends of a connection after its handshake: of who was called, and who called."""
    ends = [trio.SocketStream(each) for each in trio.socket.socketpair()]
    streams: list[TlsStream] = []

    async def call() -> None:
        streams.append((await here.connect(ends[0]))[0])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(call)
        streams.insert(0, (await there.accept(ends[1]))[0])
    for stream in streams:
        opened.push_async_callback(trio.aclose_forcefully, stream)
    return streams[0], streams[1]


# --- connections ----------------------------------------------------------------------------------


async def test_a_revoked_caller_is_turned_away_with_a_line_on_both_sides(prod: Authority) -> None:
    agent, thief = prod.issue("agent", "agent"), prod.issue("thief", "agent")
    origin = prod.issue("origin", "origin")
    listing = certificates.revoke(prod.directory, ["thief"])
    with structlog.testing.capture_logs() as logs:
        async with AsyncExitStack() as opened:
            there = await open_with_list(opened, origin, listing)
            address = await opened.enter_async_context(serving(there))
            async with open_rpc_pool(tls=tls_of(thief)) as pool:
                with pytest.raises(RpcUnavailable, match="agent thief of cluster prod is revoked"):
                    await pool.call(address, api.STAT_BLOB, BLOB, timeout=20.0)
            async with open_rpc_pool(tls=tls_of(agent)) as pool:
                assert (await pool.call(address, api.STAT_BLOB, BLOB, timeout=20.0)).length == 1

    warnings = [entry["reason"] for entry in logs if entry["log_level"] == "warning"]
    assert len(warnings) == 2
    assert all("certificate of agent thief of cluster prod is revoked" in each for each in warnings)


async def test_a_revoked_server_is_not_called(prod: Authority) -> None:
    agent, origin = prod.issue("agent", "agent"), prod.issue("origin", "origin")
    listing = certificates.revoke(prod.directory, ["origin"])
    async with AsyncExitStack() as opened:
        here = await open_with_list(opened, agent, listing)
        address = await opened.enter_async_context(serving(tls_of(origin)))
        pool = await opened.enter_async_context(open_rpc_pool(tls=here))
        with pytest.raises(RpcUnavailable, match="origin origin of cluster prod is revoked"):
            await pool.call(address, api.STAT_BLOB, BLOB, timeout=20.0)


async def test_who_is_revoked_while_connected_is_cut_off_and_nobody_else(
    prod: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swarmpull.watched_files.LOOK_EVERY", 0.02)
    agent, thief = prod.issue("agent", "agent"), prod.issue("thief", "agent")
    origin = prod.issue("origin", "origin")
    listing = certificates.revoke(prod.directory, serials=["1"], names=[])
    served = Origin()
    ended: list[str] = []
    with structlog.testing.capture_logs() as logs:
        async with AsyncExitStack() as opened:
            there = await open_with_list(opened, origin, listing)
            address = await opened.enter_async_context(serving(there, served))
            stays = await opened.enter_async_context(open_rpc_pool(tls=tls_of(agent)))
            goes = await opened.enter_async_context(open_rpc_pool(tls=tls_of(thief)))

            async def long_call(pool, *, fails: bool) -> None:
                try:
                    request = api.UrgeRequest(Digest.of(b"x"), (1,))
                    await pool.call(address, api.URGE, request, timeout=50.0)
                    assert not fails
                except RpcUnavailable:
                    assert fails
                    ended.append("cut off")

            async with trio.open_nursery() as nursery:
                nursery.start_soon(lambda: long_call(stays, fails=False))
                nursery.start_soon(lambda: long_call(goes, fails=True))
                await until(lambda: len(there._open) == 2)
                certificates.revoke(prod.directory, ["thief"])
                await until(lambda: bool(ended))
                served.release.set()
            with pytest.raises(RpcUnavailable, match="is revoked"):
                await goes.call(address, api.STAT_BLOB, BLOB, timeout=20.0)

    assert [e["holder"] for e in logs if e["event"] == "connection_revoked"] == [
        "agent thief of cluster prod"
    ]


async def test_a_connection_that_is_closing_when_it_is_revoked_harms_nobody(
    prod: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swarmpull.watched_files.LOOK_EVERY", 0.02)
    thief, origin = prod.issue("thief", "agent"), prod.issue("origin", "origin")
    listing = certificates.revoke(prod.directory, serials=["1"], names=[])
    async with AsyncExitStack() as opened:
        there = await open_with_list(opened, origin, listing)
        served, caller = await greeted(opened, there, tls_of(thief))
        # Of TLS it is over in both directions, and neither side has closed the connection.
        caller._say_end()
        assert await served.receive_some() == b""
        served._say_end()
        other, _ = await greeted(opened, there, tls_of(thief))

        certificates.revoke(prod.directory, ["thief"])

        with trio.fail_after(10):
            assert await other.receive_some() == b""


async def test_a_list_that_cannot_be_used_leaves_the_former_one_in_place(
    prod: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swarmpull.watched_files.LOOK_EVERY", 0.02)
    thief, origin = prod.issue("thief", "agent"), prod.issue("origin", "origin")
    listing = certificates.revoke(prod.directory, ["thief"])
    with structlog.testing.capture_logs() as logs:
        async with AsyncExitStack() as opened:
            there = await open_with_list(opened, origin, listing)
            address = await opened.enter_async_context(serving(there))
            listing.write_text("nothing")
            await until(lambda: "files_not_reloaded" in [entry["event"] for entry in logs])
            pool = await opened.enter_async_context(open_rpc_pool(tls=tls_of(thief)))
            with pytest.raises(RpcUnavailable, match="is revoked"):
                await pool.call(address, api.STAT_BLOB, BLOB, timeout=20.0)


async def test_a_list_that_is_outdated_still_counts_and_the_log_says_so(
    prod: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    thief, origin = prod.issue("thief", "agent"), prod.issue("origin", "origin")
    past = dt.datetime.now(dt.UTC) - dt.timedelta(days=1)
    sign = certificates.x509.CertificateRevocationListBuilder.next_update
    monkeypatch.setattr(
        certificates.x509.CertificateRevocationListBuilder,
        "next_update",
        lambda builder, _: sign(builder, past),
    )
    monkeypatch.setattr(certificates, "_now", lambda: past - dt.timedelta(days=1))
    listing = certificates.revoke(prod.directory, ["thief"])
    with structlog.testing.capture_logs() as logs:
        async with AsyncExitStack() as opened:
            there = await open_with_list(opened, origin, listing)
            address = await opened.enter_async_context(serving(there))
            pool = await opened.enter_async_context(open_rpc_pool(tls=tls_of(thief)))
            with pytest.raises(RpcUnavailable, match="is revoked"):
                await pool.call(address, api.STAT_BLOB, BLOB, timeout=20.0)
            await until(lambda: "list_of_revoked_outdated" in [entry["event"] for entry in logs])


def signed_by(authority: Authority, name: str | None = None) -> bytes:
    """Another certificate of the authority, with the same key, or one of a new authority below it."""
    key = load_pem_private_key((authority.directory / "ca.key").read_bytes(), None)
    (former,) = map(certificates.x509.load_der_x509_certificate, roots(authority))
    subject = former.subject if name is None else certificates._named(name)
    own = key if name is None else generate_private_key(SECP256R1())
    builder = certificates._begun(subject, former.subject, own.public_key(), 10)
    basic = certificates.x509.BasicConstraints(ca=True, path_length=None)
    signed = builder.add_extension(basic, critical=True).sign(key, SHA256())
    return signed.public_bytes(Encoding.DER)


# --- lists ----------------------------------------------------------------------------------------


def roots(*authorities: Authority) -> list[bytes]:
    return [
        der for each in authorities for der in _certificates("", str(each.directory / "ca.crt"))
    ]


def der_of(authority: Authority, name: str) -> bytes:
    (der,) = _certificates("", str(authority.directory / f"{name}.crt"))
    return der


def chain_of(authority: Authority, name: str) -> list[bytes]:
    return [der_of(authority, name), *roots(authority)]


def test_a_file_may_have_the_lists_of_several_authorities(tmp_path: Path, prod: Authority) -> None:
    west = Authority.create(tmp_path / "west", "west")
    for authority in (prod, west):
        authority.issue("host", "origin")
    both = tmp_path / "both.crl"
    lists = [certificates.revoke(each.directory, ["host"]) for each in (prod, west)]
    both.write_text("a comment\n" + "".join(path.read_text() for path in lists))

    found = certificates.read_revocations(str(both), roots(prod, west))

    assert [found.revoke(chain_of(each, "host")) for each in (prod, west)] == [True, True]
    assert not found.revoke(chain_of(prod, "ca"))
    with pytest.raises(
        CertificateError, match=r"tls\.crl: .* of CN=swarmpull CA of west, which no"
    ):
        certificates.read_revocations(str(both), roots(prod))
    # Agents do not know the authorities of other clusters, and have the same file.
    found = certificates.read_revocations(str(both), roots(prod), others=True)
    assert [found.revoke(chain_of(each, "host")) for each in (prod, west)] == [True, False]


def test_a_list_counts_for_who_signed_it_and_not_for_who_has_the_same_name(
    tmp_path: Path, prod: Authority
) -> None:
    forger = Authority.create(tmp_path / "forger", "prod")
    forger.issue("host", "agent")
    listing = certificates.revoke(forger.directory, ["host"])

    with pytest.raises(CertificateError, match="which no authority in"):
        certificates.read_revocations(str(listing), roots(prod))


def test_a_list_counts_for_all_certificates_of_an_authority_that_is_renewed(
    prod: Authority,
) -> None:
    prod.issue("host", "agent")
    prod.issue("other", "agent")
    listing = certificates.revoke(prod.directory, ["host"])
    renewed = signed_by(prod)

    # A host is trusted by either, and was by the former when it connected before that was taken out.
    for trusted in (roots(prod), [*roots(prod), renewed], [renewed]):
        found = certificates.read_revocations(str(listing), trusted)
        for authority in (*roots(prod), renewed):
            assert found.revoke([der_of(prod, "host"), authority])
            assert not found.revoke([der_of(prod, "other"), authority])


def test_who_was_certified_by_an_authority_that_is_revoked_is_out_with_it(prod: Authority) -> None:
    between = signed_by(prod, "an authority between")
    serial = certificates.x509.load_der_x509_certificate(between).serial_number
    prod.issue("host", "agent")
    listing = certificates.revoke(prod.directory, [], serials=[f"{serial:x}"])

    found = certificates.read_revocations(str(listing), roots(prod))

    assert found.revoke([der_of(prod, "host"), between, *roots(prod)])
    assert not found.revoke(chain_of(prod, "host"))
    assert found.revoke([b"unreadable", *roots(prod)])


def test_a_file_that_is_only_half_written_is_not_read(tmp_path: Path, prod: Authority) -> None:
    west = Authority.create(tmp_path / "west", "west")
    for authority in (prod, west):
        authority.issue("host", "origin")
    lists = [certificates.revoke(each.directory, ["host"]).read_text() for each in (prod, west)]
    both = tmp_path / "both.crl"
    both.write_text("".join(lists)[:-100])

    with pytest.raises(CertificateError, match="holds a list without its end"):
        certificates.read_revocations(str(both), roots(prod, west))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot be read: No such file"),
        ("", "holds no list of revoked certificates in PEM"),
        (
            "-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n",
            "holds a list that cannot be read",
        ),
    ],
)
def test_a_file_that_is_no_list_is_named_with_its_key(
    tmp_path: Path, prod: Authority, content: str | None, says: str
) -> None:
    path = tmp_path / "x.crl"
    if content is not None:
        path.write_text(content)

    with pytest.raises(CertificateError, match=f"tls.crl: {path} {says}"):
        certificates.read_revocations(str(path), roots(prod))


# --- swarmpull certs revoke -----------------------------------------------------------------------


def refused_by_openssl(files: TlsFiles, listing: Path) -> bool:
    """Whether OpenSSL, by itself, refuses a certificate for a list."""
    server, client = map(ssl.SSLContext, (ssl.PROTOCOL_TLS_SERVER, ssl.PROTOCOL_TLS_CLIENT))
    client.load_cert_chain(files.cert, files.key)
    server.load_cert_chain(files.cert, files.key)
    server.verify_mode = ssl.CERT_REQUIRED
    server.load_verify_locations(files.ca)
    server.load_verify_locations(str(listing))
    server.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    client.check_hostname = False
    client.verify_mode = ssl.CERT_NONE
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = client.wrap_bio(to_client, to_server), server.wrap_bio(to_server, to_client, True)
    for end in (ends[0], ends[1], ends[0], ends[1]):
        try:
            end.do_handshake()
        except ssl.SSLWantReadError:
            continue
        except ssl.SSLCertVerificationError as error:
            return error.verify_message == "certificate revoked"
    return False


def test_what_was_revoked_stays_revoked_and_openssl_reads_the_list(
    prod: Authority, capsys: pytest.CaptureFixture[str]
) -> None:
    hosts = {name: prod.issue(name, "agent") for name in ("a", "b", "c")}
    listing = prod.directory / "ca.crl"

    assert run("--dir", prod.directory, "a") == 0
    assert capsys.readouterr().out.strip() == str(listing)
    assert run("--dir", prod.directory, "a", hosts["b"].cert) == 0

    assert {name for name in hosts if refused_by_openssl(hosts[name], listing)} == {"a", "b"}


def test_a_certificate_whose_file_is_gone_is_revoked_by_its_number(prod: Authority) -> None:
    files = prod.issue("a", "agent")
    serial = certificates.x509.load_pem_x509_certificate(
        Path(files.cert).read_bytes()
    ).serial_number
    prod.issue("b", "agent")

    assert run("--dir", prod.directory, "--serial", f"{serial:X}") == 0

    assert refused_by_openssl(files, prod.directory / "ca.crl")


async def test_roles_begin_with_an_empty_list_and_go_by_what_is_added(
    prod: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swarmpull.watched_files.LOOK_EVERY", 0.02)
    thief, origin = prod.issue("thief", "agent"), prod.issue("origin", "origin")
    assert await trio.to_thread.run_sync(run, "--dir", prod.directory) == 0
    async with AsyncExitStack() as opened:
        there = await open_with_list(opened, origin, prod.directory / "ca.crl")
        served, _ = await greeted(opened, there, tls_of(thief))

        assert await trio.to_thread.run_sync(run, "--dir", prod.directory, "thief") == 0

        with trio.fail_after(10):
            assert await served.receive_some() == b""


def move(path: Path) -> None:
    path.rename(path.with_suffix(".away"))


@pytest.mark.parametrize(
    ("arguments", "spoil", "says"),
    [
        ((), None, "name what is to be revoked"),
        (("nobody",), None, "neither .*nobody.crt nor nobody to be read"),
        (("ca",), None, "cannot take itself back"),
        (("stranger",), None, "stranger.crt was not issued by this authority"),
        (("--serial", "x"), None, "'x' is not a serial number in hexadecimal"),
        (("--serial", "0"), None, "0 is not a serial number"),
        (("host",), lambda d: (d / "ca.crl").write_text("x"), "ca.crl is no list of revoked"),
        (("host",), lambda d: move(d / "ca.key"), "make an authority with swarmpull certs init"),
    ],
)
def test_what_cannot_be_revoked_is_named_and_the_list_stays(
    tmp_path: Path,
    prod: Authority,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    spoil: Callable[[Path], object] | None,
    says: str,
) -> None:
    prod.issue("host", "agent")
    other = Authority.create(tmp_path / "other", "other").issue("stranger", "agent")
    Path(other.cert).rename(prod.directory / "stranger.crt")
    listing = certificates.revoke(prod.directory, ["host"])
    if spoil is not None:
        spoil(prod.directory)
    before = listing.read_bytes()

    assert run("--dir", prod.directory, *arguments) == 1

    [line] = capsys.readouterr().err.splitlines()
    assert re.search(says, line), line
    assert listing.read_bytes() == before


def test_an_authority_that_has_expired_takes_nothing_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = certificates._now()
    with monkeypatch.context() as patch:
        patch.setattr(certificates, "_now", lambda: now - dt.timedelta(days=20))
        certificates.create_authority(tmp_path, "prod", days=10)
    assert run("--dir", tmp_path, "--serial", "1a") != 0
    assert "the authority expired on" in capsys.readouterr().err


def test_a_list_means_nothing_without_certificates(capsys: pytest.CaptureFixture[str]) -> None:
    cluster = [f"cluster.{name}=127.0.0.1:1" for name in ("trackers", "origins", "indexes")]
    options = [each for text in [*cluster, "tls.crl=/x.crl"] for each in ("-o", text)]

    assert main(["config", "check", "--role", "agent", *options]) == 78

    assert "tls.crl: means nothing without tls.ca" in capsys.readouterr().err


def test_config_check_reads_the_list(prod: Authority, capsys: pytest.CaptureFixture[str]) -> None:
    prod.issue("host", "agent")
    cluster = [f"cluster.{name}=127.0.0.1:1" for name in ("trackers", "origins", "indexes")]
    files = [f"tls.{key}={prod.directory}/{name}" for key, name in PARTS]
    options = [each for text in [*cluster, *files] for each in ("-o", text)]

    assert main(["config", "check", "--role", "agent", *options]) == 78

    assert "tls.crl: " in capsys.readouterr().err
    certificates.revoke(prod.directory, ["host"])
    assert main(["config", "check", "--role", "agent", *options]) == 0


PARTS = (("ca", "ca.crt"), ("cert", "host.crt"), ("key", "host.key"), ("crl", "ca.crl"))
