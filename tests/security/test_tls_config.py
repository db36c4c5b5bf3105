"""What the configuration says about certificates and passwords, and what is wrong with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import structlog
import trio
import trio.testing

from swarmpull.cli import main
from swarmpull.identity import Identity
from swarmpull.wire.tls import COMPLAIN_EVERY, COMPLAINTS_MAX, Complaints

from .hosts import Authority


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    authority = Authority.create(tmp_path_factory.mktemp("authority"), "prod")
    authority.issue("host", "agent")
    authority.issue("head", "index")
    authority.issue("web", dns=["example.com"])
    return authority


def check(authority: Authority, *settings: str, role: str = "agent") -> int:
    directory = str(authority.directory)
    options = [each for text in settings for each in ("-o", text.replace("DIR", directory))]
    cluster = [f"cluster.{name}=127.0.0.1:1" for name in ("trackers", "origins", "indexes")]
    options += [each for text in cluster for each in ("-o", text)]
    return main(["config", "check", "--role", role, *options])


HOST = ("tls.ca=DIR/ca.crt", "tls.cert=DIR/host.crt", "tls.key=DIR/host.key")
WEB = ("agent.registry.tls_cert=DIR/web.crt", "agent.registry.tls_key=DIR/web.key")


def test_files_that_fit_are_valid(authority: Authority, capsys) -> None:
    assert check(authority) == 0
    assert check(authority, *HOST, *WEB) == 0


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (HOST[:2], ["tls.key: must name a file too: tls.ca and tls.cert is set"]),
        (HOST[1:2], ["tls.ca: must name", "tls.key: must name"]),
        ((*HOST[:2], "tls.key=/nowhere"), ["tls.key: /nowhere cannot be read: No such file"]),
        ((*HOST[:2], "tls.key=DIR/web.key"), ["tls.key: DIR/web.key is not the key of"]),
        (
            (HOST[0], "tls.cert=DIR/web.crt", "tls.key=DIR/web.key"),
            ["tls.cert: DIR/web.crt names no role of a cluster"],
        ),
        ((*HOST, "tls.peer=maybe"), ["tls.peer: must be one of on, off"]),
        (WEB[:1], ["agent.registry.tls_key: must name a file too: agent.registry.tls_cert is set"]),
        ((WEB[0], "agent.registry.tls_key=DIR/host.key"), ["agent.registry.tls_key: DIR/host.key"]),
        (("agent.registry.htpasswd=DIR/ca.crt",), ["agent.registry.htpasswd: DIR/ca.crt:1 is not"]),
        (("agent.registry.htpasswd_for=x",), ["htpasswd_for: must be one of pushes, all"]),
    ],
)
def test_what_does_not_fit_is_named_with_its_key(
    authority: Authority, capsys, settings: tuple[str, ...], says: list[str]
) -> None:
    assert check(authority, *settings) == 78

    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(says)
    for line, expected in zip(lines, says, strict=True):
        assert expected.replace("DIR", str(authority.directory)) in line


HEAD = ("tls.ca=DIR/ca.crt", "tls.cert=DIR/head.crt", "tls.key=DIR/head.key")
REMOTE = ("remotes.0.name=west", "remotes.0.indexes=127.0.0.1:2")


def test_a_remote_that_will_not_be_believed_is_named(authority: Authority, capsys) -> None:
    assert check(authority, *REMOTE, role="index") == 0
    assert check(authority, *HEAD, *REMOTE, "tls.trusted.0.cluster=west", role="index") == 0
    assert check(authority, *HEAD, "remotes.0.name=prod", *REMOTE[1:], role="index") == 0
    capsys.readouterr()

    assert check(authority, *HEAD, *REMOTE, "tls.trusted.0.cluster=wset", role="index") == 78
    (line,) = capsys.readouterr().err.splitlines()
    assert "remotes.0.name: must be the cluster that its certificates name" in line
    assert line.endswith("(-o)")


def test_an_entry_for_the_own_cluster_is_named(authority: Authority, capsys) -> None:
    entries = ("tls.trusted.0.cluster=west", "tls.trusted.1.cluster=prod")
    assert check(authority, *HEAD, *entries, role="index") == 78
    (line,) = capsys.readouterr().err.splitlines()
    assert "tls.trusted.1.cluster: prod is the cluster of tls.cert itself" in line


def test_a_role_without_its_certificate_does_not_start(
    authority: Authority, capsys, tmp_path: Path
) -> None:
    directory = str(authority.directory)
    options = [each for text in HOST for each in ("-o", text.replace("DIR", directory))]

    assert main(["run", "--role", "index", "--data-dir", str(tmp_path), *options]) == 78

    [line] = capsys.readouterr().err.splitlines()
    assert "is of agent host of cluster prod, which is no index: issue one with" in line


def test_an_identity_survives_its_uris() -> None:
    identity = Identity("prod", "host-1", frozenset({"agent", "origin"}))
    assert Identity.from_uris(["https://x", *identity.uris()]) == identity


@pytest.mark.parametrize(
    "uris",
    [
        [],
        ["https://prod/agent/x"],
        ["swarmpull://prod/agent"],
        ["swarmpull://prod/agent/a", "swarmpull://test/agent/a"],
        ["swarmpull://PROD/agent/a"],
        ["swarmpull://prod/agent/a b"],
    ],
)
def test_uris_that_are_no_identity(uris: list[str]) -> None:
    with pytest.raises(ValueError, match=r"names|named"):
        Identity.from_uris(uris)


async def test_a_host_is_complained_of_once_a_minute(
    autojump_clock: trio.testing.MockClock,
) -> None:
    complaints = Complaints()
    with structlog.testing.capture_logs() as logs:
        for _ in range(3):
            for host in ("192.0.2.1", "192.0.2.2"):
                for _ in range(10):
                    complaints.warn(host, "why")
            await trio.sleep(COMPLAIN_EVERY)
        for number in range(2 * COMPLAINTS_MAX):
            complaints.warn(f"host-{number}", "why")

    assert len(logs) == 3 * 2 + 2 * COMPLAINTS_MAX
    assert len(complaints._said) <= COMPLAINTS_MAX
