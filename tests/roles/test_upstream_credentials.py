"""Where a user of ``docker login`` has what an upstream wants: helpers, identity tokens."""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import trio

from swarmpull.errors import UpstreamRefused
from swarmpull.registry import upstream_credentials
from swarmpull.registry.upstream import Patience, open_upstream
from swarmpull.registry.upstream_credentials import Credentials, LoginFailed, LoginSecret

from .upstream_server import BASIC, IDENTITY, PASSWORD, USER, FakeUpstream, fake_upstream

REPOSITORY = "team/app"
CONTENT = b"content of a layer"


@pytest.fixture
async def server() -> AsyncIterator[FakeUpstream]:
    async with fake_upstream() as server:
        server.add_blob(REPOSITORY, CONTENT)
        yield server


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Puts a helper on PATH that runs a script; it writes down what it is asked for."""
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", str(directory), prepend=os.pathsep)
    asked = tmp_path / "asked"

    def put(script: str) -> Path:
        program = directory / "docker-credential-test"
        program.write_text(f'#!/bin/sh\n{{ echo "$@"; cat; }} > {asked}\n{script}\n')
        program.chmod(0o755)
        return asked

    return put


def says(username: str, secret: str) -> str:
    return "echo '" + json.dumps({"ServerURL": "x", "Username": username, "Secret": secret}) + "'"


def docker_config(tmp_path: Path, **content: object) -> str:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(content))
    return str(file)


async def pull(server: FakeUpstream, config: str) -> bytes:
    quick = Patience(attempts=2, backoff_min=0.001, backoff_max=0.002)
    credentials = Credentials("here", docker_config=config)
    async with open_upstream(server.url, credentials, patience=quick) as upstream:
        (digest,) = (digest for _, digest in server.blobs)
        algorithm, _, name = digest.partition(":")
        key = f"blobs/{algorithm}/{name[:2]}/{name}"
        return await upstream.backend(REPOSITORY).get_bytes(key)


@pytest.mark.parametrize("key", ["credHelpers", "credsStore"])
async def test_a_helper_is_asked_and_its_user_logs_in(server, install, tmp_path, key) -> None:
    server.login = "basic"
    asked = install(says(USER, PASSWORD))
    named: object = {"here": "test"} if key == "credHelpers" else "test"
    config = docker_config(tmp_path, auths={"here": {}}, **{key: named})

    assert await pull(server, config) == CONTENT

    assert asked.read_text() == "get\nhere"
    assert server.seen[-1].headers["authorization"] == BASIC


@pytest.mark.parametrize("source", ["helper", "file"])
async def test_an_identity_token_is_changed_into_one_for_the_repository(
    server, install, tmp_path, source
) -> None:
    server.login = "token"
    if source == "helper":
        install(says("<token>", IDENTITY))
        config = docker_config(tmp_path, credsStore="test")
    else:
        config = docker_config(tmp_path, auths={"here": {"identitytoken": IDENTITY}})

    assert await pull(server, config) == CONTENT

    (asked,) = [seen for seen in server.seen if seen.path == "/token"]
    assert asked.method == "POST"
    assert b"service=fake" in asked.body
    assert b"scope=repository%3Ateam%2Fapp%3Apull" in asked.body
    assert "authorization" not in asked.headers


async def test_an_identity_token_that_is_not_taken_says_what_to_do(server, tmp_path) -> None:
    server.login = "token"
    config = docker_config(tmp_path, auths={"here": {"identitytoken": "old-secret"}})
    with pytest.raises(UpstreamRefused, match="this identity token: log in anew") as caught:
        await pull(server, config)
    assert "old-secret" not in repr(caught.value)
    server.login = "basic"
    with pytest.raises(UpstreamRefused, match="there is an identity token only"):
        await pull(server, config)


async def test_a_helper_that_does_not_know_the_registry_means_anonymous(
    server, install, tmp_path
) -> None:
    server.login = "token"
    install("echo 'credentials not found in native keychain'; exit 1")
    assert await pull(server, docker_config(tmp_path, credsStore="test")) == CONTENT
    install(says("", ""))
    assert await pull(server, docker_config(tmp_path, credsStore="test")) == CONTENT
    # Or what the file itself has.
    server.login = "basic"
    auths = {"here": {"username": USER, "password": PASSWORD}}
    assert await pull(server, docker_config(tmp_path, credsStore="test", auths=auths)) == CONTENT


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'no session: log in' >&2; exit 3", "fails with status 3: no session: log in"),
        ("exit 1", "fails with status 1: it says nothing"),
        ("echo secret-thing", "docker-credential-test answers with no credentials"),
        ("echo '[]'", "answers with no credentials"),
        ("yes", "does not answer within 0.3 s"),
        ("sleep 600", "does not answer within 0.3 s"),
    ],
)
async def test_a_helper_that_fails_is_named(install, tmp_path, monkeypatch, script, reason) -> None:
    monkeypatch.setattr(upstream_credentials, "HELPER_SECONDS", 0.3)
    install(script)
    config = docker_config(tmp_path, credHelpers={"here": "test"})
    with trio.fail_after(30), pytest.raises(LoginFailed, match=reason) as caught:
        await Credentials("here", docker_config=config).find()
    assert "secret-thing" not in str(caught.value)


async def test_what_a_helper_has_started_ends_with_it(install, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(upstream_credentials, "HELPER_SECONDS", 0.3)
    started = tmp_path / "started"
    install(f"sleep 600 & echo $! > {started}; wait")
    config = docker_config(tmp_path, credHelpers={"here": "test"})
    with pytest.raises(LoginFailed, match="does not answer"):
        await Credentials("here", docker_config=config).find()
    with trio.fail_after(30):
        while is_running(int(started.read_text())):  # noqa: ASYNC110 - of another process
            await trio.sleep(0.01)


def is_running(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"  # ended, and not waited for yet


async def test_a_helper_that_cannot_be_run_is_named(install, tmp_path) -> None:
    program = install("").parent / "bin" / "docker-credential-test"
    program.write_text("#!/nowhere/sh\n")
    config = docker_config(tmp_path, credHelpers={"here": "test"})
    with pytest.raises(LoginFailed, match="docker-credential-test cannot be run: No such file"):
        await Credentials("here", docker_config=config).find()


async def test_a_helper_that_floods_us_fills_no_memory(install, tmp_path) -> None:
    install("head -c 50000000 /dev/zero; exit 1")
    config = docker_config(tmp_path, credHelpers={"here": "test"})
    tracemalloc.start()
    try:
        with pytest.raises(LoginFailed, match="fails with status 1"):
            await Credentials("here", docker_config=config).find()
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 10_000_000


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"credsStore": "nowhere"}, "docker-credential-nowhere is not on PATH"),
        ({"credsStore": "../../tmp/x"}, "names a credential helper that cannot be one"),
        ({"credHelpers": {"here": ["test"]}}, "names a credential helper that cannot be one"),
        ({"credHelpers": 7}, "is not a file of docker login"),
        ({"auths": {"here": {"username": "a"}}}, "no user and password for here"),
    ],
)
async def test_a_file_that_leads_nowhere_says_so(tmp_path, content, reason) -> None:
    with pytest.raises(LoginFailed, match=reason):
        await Credentials("here", docker_config=docker_config(tmp_path, **content)).find()


async def test_docker_hub_has_its_own_name_for_helpers_too(install, tmp_path) -> None:
    asked = install(says("hub", "key"))
    config = docker_config(tmp_path, credHelpers={"https://index.docker.io/v1/": "test"})
    found = await Credentials("docker.io", docker_config=config).find()
    assert found == LoginSecret(basic="Basic aHViOmtleQ==")
    assert asked.read_text() == "get\nhttps://index.docker.io/v1/"
