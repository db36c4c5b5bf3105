"""`swarmpull certs`: an authority and what it issues."""

from __future__ import annotations

import datetime as dt
import os
import ssl
import stat
from pathlib import Path

import pytest
from cryptography import x509

from swarmpull import certificates
from swarmpull.cli import main


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def names(path: Path) -> x509.SubjectAlternativeName:
    return certificate(path).extensions.get_extension_for_class(x509.SubjectAlternativeName).value


def run(*arguments: str | Path) -> int:
    return main(["certs", *map(str, arguments)])


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    assert run("init", "--dir", tmp_path / "certs", "--cluster", "prod") == 0
    return tmp_path / "certs"


def test_a_certificate_says_cluster_role_and_name_and_is_signed(authority: Path, capsys) -> None:
    issued = ["issue", "--dir", authority, "--role", "agent", "--role", "client", "host-1"]
    assert run(*issued, "--dns", "host-1.example.com", "--ip", "::1", "--days", "30") == 0

    assert str(authority / "host-1.crt") in capsys.readouterr().out
    found = names(authority / "host-1.crt")
    assert found.get_values_for_type(x509.UniformResourceIdentifier) == [
        "swarmpull://prod/agent/host-1",
        "swarmpull://prod/client/host-1",
    ]
    assert found.get_values_for_type(x509.DNSName) == ["host-1.example.com"]
    assert list(map(str, found.get_values_for_type(x509.IPAddress))) == ["::1"]
    host = certificate(authority / "host-1.crt")
    host.verify_directly_issued_by(certificate(authority / "ca.crt"))
    left = host.not_valid_after_utc - dt.datetime.now(dt.UTC)
    assert dt.timedelta(days=29) < left <= dt.timedelta(days=30)
    # Raises unless the key fits.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority / "host-1.crt", authority / "host-1.key")


def test_a_certificate_ends_with_its_authority_at_the_latest(tmp_path: Path, capsys) -> None:
    assert run("init", "--dir", tmp_path, "--days", "30") == 0
    assert run("issue", "--dir", tmp_path, "--role", "agent", "--days", "31", "host-1") == 0
    ends = certificate(tmp_path / "ca.crt").not_valid_after_utc
    assert certificate(tmp_path / "host-1.crt").not_valid_after_utc == ends

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certificates, "_now", lambda: ends + dt.timedelta(days=1))
        assert run("issue", "--dir", tmp_path, "--role", "agent", "host-2") == 1
    assert f"the authority expired on {ends:%Y-%m-%d}" in capsys.readouterr().err


def test_all_are_the_four_roles(authority: Path) -> None:
    assert run("issue", "--dir", authority, "--role", "all", "box") == 0

    uris = names(authority / "box.crt").get_values_for_type(x509.UniformResourceIdentifier)
    assert {uri.split("/")[3] for uri in uris} == {"agent", "origin", "tracker", "index"}


def test_keys_are_for_their_owner_only_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        assert run("init", "--dir", tmp_path) == 0
        assert run("issue", "--dir", tmp_path, "--role", "agent", "host-1") == 0
    finally:
        os.umask(before)

    for key in ("ca.key", "host-1.key"):
        assert stat.S_IMODE((tmp_path / key).stat().st_mode) == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "ca.crt",
        "ca.key",
        "host-1.crt",
        "host-1.key",
    ]


def test_nothing_is_replaced_unless_forced(authority: Path, capsys) -> None:
    issue = ("issue", "--dir", authority, "--role", "agent", "host-1")
    assert run(*issue) == 0
    before = {path.name: path.read_bytes() for path in authority.iterdir()}

    assert run(*issue) == 1
    assert run("init", "--dir", authority) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all("--force replaces it" in line for line in lines)
    assert {path.name: path.read_bytes() for path in authority.iterdir()} == before

    assert run(*issue, "--force") == 0
    assert (authority / "host-1.key").read_bytes() != before["host-1.key"]
    assert stat.S_IMODE((authority / "host-1.key").stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["init", "--cluster", "Not a name"], "a cluster is named by"),
        (["issue", "host-1"], "needs --role, or --dns or --ip"),
        (["issue", "--role", "agent", "a/b"], "a holder is named by"),
        (["issue", "--role", "agent", "ca"], "the authority itself"),
        (["issue", "--role", "agent", "--ip", "one", "host-1"], "'one' does not appear to be"),
        (["issue", "--role", "agent", "--days", "0", "host-1"], "at least one day"),
        (["issue", "--role", "agent", "--days", "99999999", "host-1"], "99999999 days"),
    ],
)
def test_what_cannot_be_made_is_said_in_one_line(
    authority: Path, capsys, arguments: list[str], says: str
) -> None:
    before = sorted(authority.iterdir())

    assert run(*arguments[:1], "--dir", authority, *arguments[1:]) == 1

    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert says in lines[0]
    assert sorted(authority.iterdir()) == before


def test_without_an_authority_the_error_says_how_to_make_one(tmp_path: Path, capsys) -> None:
    assert run("issue", "--dir", tmp_path, "--role", "agent", "host-1") == 1

    assert "make an authority with swarmpull certs init" in capsys.readouterr().err
