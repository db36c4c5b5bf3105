"""Who we are to an upstream registry: from the configuration, or from where ``docker login`` keeps it.

A file of ``docker login`` (``config.json``) names for each registry user and password, an identity token, or
the program that has them: a credential helper (the "docker-credential-helpers" project has the protocol).
Secrets appear in no error and no log.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any, Final

import attrs
import trio

from swarmpull.errors import SwarmpullError

_FILE_BYTES_MAX: Final = 1 << 20
# Those of clouds ask a service of theirs; docker itself waits for ever.
HELPER_SECONDS: Final = 15.0
_HELPER_BYTES_MAX: Final = 64 << 10
# It becomes part of the name of a program.
_HELPER_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
# What all of them say, with status 1, of a registry that they do not know.
_UNKNOWN: Final = b"credentials not found"
# In place of a user: the secret is an identity token.
_TOKEN_USER: Final = "<token>"
# Under what name `docker login` keeps the credentials of Docker Hub.
_DOCKER_HUB: Final = "https://index.docker.io/v1/"
_DOCKER_HUB_NAMES: Final = ("docker.io", "registry-1.docker.io", "index.docker.io")


@attrs.define(slots=False)
class LoginFailed(SwarmpullError):
    """We cannot say who we are; ``transient`` when the next attempt may."""

    reason: str
    transient: bool = False

    def __str__(self) -> str:
        return self.reason


@attrs.frozen
class LoginSecret:
    """What a registry, or its token service, is told.

    Attributes:
        basic: the value of an ``Authorization`` header; empty with a token.
        token: an identity token, which a token service changes into another one; empty with `basic`.
    """

    basic: str = attrs.field(default="", repr=False)
    token: str = attrs.field(default="", repr=False)


@attrs.frozen
class Credentials:
    """Where the identity for an upstream comes from; looked for again at each login.

    Attributes:
        registry: its name, under which a file of ``docker login`` has it.
        username: empty for none, or for what `docker_config` says.
        password: of that user.
        password_file: holds it instead.
        docker_config: a file as ``docker login`` writes it.
    """

    registry: str
    username: str = ""
    password: str = attrs.field(default="", repr=False)
    password_file: str = ""
    docker_config: str = ""

    async def find(self) -> LoginSecret | None:
        """What to say; None for anonymous.  Raises LoginFailed."""
        if self.docker_config:
            return await _docker_identity(self.docker_config, self.registry)
        if not self.username:
            return None
        password = self.password
        if self.password_file:
            password = (await _read_file(self.password_file)).strip("\r\n")
        return _basic(self.username, password)


def _basic(username: str, password: str) -> LoginSecret:
    pair = base64.b64encode(f"{username}:{password}".encode()).decode()
    return LoginSecret(basic=f"Basic {pair}")


async def _read_file(name: str) -> str:
    try:
        content = await trio.to_thread.run_sync(_read_start, name)
        return content.decode("utf-8")
    except (OSError, RuntimeError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not UTF-8 text, or names no known user"
        raise LoginFailed(f"credentials cannot be read from {name}: {reason}") from error


def _read_start(name: str) -> bytes:
    with Path(name).expanduser().open("rb") as file:
        return file.read(_FILE_BYTES_MAX)


# --- docker login ---------------------------------------------------------------------------------


async def _docker_identity(file: str, registry: str) -> LoginSecret | None:
    """As docker looks: the helper of a registry, the helper of all, the file itself."""
    text = await _read_file(file)
    try:
        document = json.loads(text)
        helper = _entry_of(document.get("credHelpers", {}), registry) or document.get("credsStore")
        entry = _entry_of(document.get("auths", {}), registry)
        found = None if entry is None else _of_entry(entry)
        # A helper for all leaves entries without content behind, as a list of where one is logged in.
        is_named = isinstance(helper, str) and _HELPER_NAME.fullmatch(helper) is not None
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise LoginFailed(f"{file} is not a file of docker login") from None
    if helper and not is_named:
        raise LoginFailed(f"{file} names a credential helper that cannot be one")
    if helper:
        return await _ask_helper(f"docker-credential-{helper}", registry) or found
    if entry is not None and found is None:
        raise LoginFailed(f"{file} has no user and password for {registry}: docker login anew")
    return found


def _entry_of(entries: dict[str, Any], registry: str) -> Any:  # noqa: ANN401 - from JSON
    names = [registry, *(f"https://{registry}{path}" for path in ("", "/v1/", "/v2/"))]
    if registry in _DOCKER_HUB_NAMES:
        names = [_DOCKER_HUB, *names]
    return next((entries[name] for name in names if name in entries), None)


def _of_entry(entry: dict[str, Any]) -> LoginSecret | None:
    if token := entry.get("identitytoken"):
        return LoginSecret(token=str(token))
    if entry.get("auth"):
        username, _, password = base64.b64decode(entry["auth"]).decode("utf-8").partition(":")
    else:
        username, password = entry.get("username", ""), entry.get("password", "")
    return _basic(username, password) if username and password else None


async def _ask_helper(program: str, registry: str) -> LoginSecret | None:
    """What a credential helper has for a registry; None when it says that it has nothing."""
    # PATH may lead to file systems that hang.
    path = await trio.to_thread.run_sync(shutil.which, program, abandon_on_cancel=True)
    if path is None:
        raise LoginFailed(f"{program} is not on PATH: docker_config names it for {registry}")
    server = _DOCKER_HUB if registry in _DOCKER_HUB_NAMES else registry
    try:
        with trio.fail_after(HELPER_SECONDS):
            said = await _run_helper(path, server.encode())
    except trio.TooSlowError:
        reason = f"{program} does not answer within {HELPER_SECONDS:g} s"
        raise LoginFailed(reason, transient=True) from None
    except OSError as error:
        raise LoginFailed(f"{program} cannot be run: {error.strerror}") from error
    if said.status:
        if _UNKNOWN in said.output.lower() + said.errors.lower():
            return None
        raise LoginFailed(_failure_of(program, said), transient=True)
    try:
        answer = json.loads(said.output)
        username, secret = answer["Username"], answer["Secret"]
    except (ValueError, TypeError, LookupError, RecursionError):
        raise LoginFailed(f"{program} answers with no credentials") from None
    if not username and not secret:
        return None  # some say so instead of failing
    return LoginSecret(token=str(secret)) if username == _TOKEN_USER else _basic(username, secret)


@attrs.frozen
class _Said:
    """What a program has written, `_HELPER_BYTES_MAX` of each at most, and its status."""

    status: int
    output: bytes = attrs.field(repr=False)
    errors: bytes


async def _run_helper(path: str, asked: bytes) -> _Said:
    """Run a helper to its end; cancelled, it is killed.  Raises OSError when it cannot be run."""
    pipe = subprocess.PIPE
    process = await trio.lowlevel.open_process(
        [path, "get"], stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    output, errors = bytearray(), bytearray()
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_feed, process.stdin, asked)
            nursery.start_soon(_keep_start, process.stdout, output)
            nursery.start_soon(_keep_start, process.stderr, errors)
            status = await process.wait()
    finally:
        if process.returncode is None:
            # With all that it has started: many are scripts.
            os.killpg(process.pid, signal.SIGKILL)
            with trio.CancelScope(shield=True):
                await process.wait()
    return _Said(status, bytes(output), bytes(errors))


async def _feed(stream: trio.abc.SendStream, content: bytes) -> None:
    async with stream:
        # It need not listen to what it is asked.
        with contextlib.suppress(trio.BrokenResourceError):
            await stream.send_all(content)


async def _keep_start(stream: trio.abc.ReceiveStream, start: bytearray) -> None:
    """Read to the end, so that whoever writes can end, and keep what fits."""
    async with stream:
        while part := await stream.receive_some():
            start += part[: _HELPER_BYTES_MAX - len(start)]


def _failure_of(program: str, said: _Said) -> str:
    """With the first line of what it says: on failure that is no secret."""
    text = (said.errors.strip() or said.output.strip()).decode("utf-8", "replace")
    line = text.splitlines()[0][:200] if text else "it says nothing"
    return f"{program} fails with status {said.status}: {line}"
