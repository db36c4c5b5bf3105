"""Passwords for a registry, from a file as ``htpasswd -B`` writes it: the only module that knows bcrypt.

A check costs a tenth of a second of a core on purpose, if the file is made so, and a push has hundreds of
requests: what was right once is remembered under a keyed hash, which says nothing about the password to
whoever sees it without the key, and is forgotten with the process or when its line of the file changes.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
import secrets
from collections import Counter, OrderedDict
from collections.abc import Mapping
from typing import Final

import bcrypt
import structlog
import trio

from swarmpull.errors import CertificateError
from swarmpull.registry.asgi import (
    USER,
    AsgiApp,
    Receive,
    Request,
    Response,
    Scope,
    Send,
    send_response,
)
from swarmpull.registry.errors import Code, RegistryError
from swarmpull.watched_files import WatchedFiles

log = structlog.get_logger()

# Threads that check passwords, and requests that wait for one: more are told to come again.
CHECKS_AT_ONCE: Final = 2
CHECKS_WAITING_MAX: Final = 64
# Names and passwords that were right, with a hash of 32 bytes each.
REMEMBERED_MAX: Final = 1024
# bcrypt looks at no more of a password; htpasswd cuts it, and so do we.
PASSWORD_BYTES_MAX: Final = 72
# Of the strengths that htpasswd makes: a check of 17 takes 8 s, of 31 a day, and anybody can ask for some.
_BCRYPT: Final = re.compile(rb"\$2[aby]\$(0[4-9]|1[0-7])\$[./A-Za-z0-9]{53}")
_WRITING: Final = ("POST", "PUT", "PATCH", "DELETE")
_CHALLENGE: Final = (
    ("WWW-Authenticate", 'Basic realm="swarmpull", charset="UTF-8"'),
    ("Docker-Distribution-Api-Version", "registry/2.0"),
)

Users = Mapping[str, bytes]


def load_htpasswd(path: str, key: str) -> Users:
    """Read a password file; blocking.  ``key`` is that of the configuration which names it.

    Raises:
        CertificateError: it cannot be read, names nobody, or a line is not NAME:HASH with a hash of bcrypt.
    """
    try:
        with open(path, "rb") as file:
            lines = file.read().splitlines()
    except OSError as error:
        raise CertificateError(f"{path} cannot be read: {error.strerror}", key) from error
    users: dict[str, bytes] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith(b"#"):
            continue
        name, _, hashed = line.strip().partition(b":")
        if not name or _BCRYPT.fullmatch(hashed) is None:
            raise CertificateError(
                f"{path}:{number} is not NAME:HASH with a hash of bcrypt, of strength 4 to 17: "
                "make it with htpasswd -B",
                key,
            )
        users[name.decode("utf-8", "replace")] = hashed
    if not users:
        # Most likely somebody is just writing it.
        raise CertificateError(f"{path} names nobody: add a line with htpasswd -B", key)
    return users


class Passwords:
    """Who may in."""

    def __init__(self, files: WatchedFiles[Users]) -> None:
        self._files = files
        self._key = secrets.token_bytes(32)
        self._right: OrderedDict[bytes, None] = OrderedDict()
        self._checks = trio.CapacityLimiter(CHECKS_AT_ONCE)

    async def accept(self, name: str, password: bytes) -> bool:
        """Whether this is the password of that name.

        Raises:
            RegistryError: too many are being checked.
        """
        users = self._files.current
        hashed = users.get(name) or _of_nobody(users)
        seen = self._seen(name, password, hashed)
        if seen in self._right:
            self._right.move_to_end(seen)
            return True
        if self._checks.statistics().tasks_waiting >= CHECKS_WAITING_MAX:
            raise RegistryError(
                Code.TOOMANYREQUESTS,
                429,
                "too many passwords are being checked: retry in a moment",
                headers=(("Retry-After", "1"),),
            )
        right = await trio.to_thread.run_sync(
            _matches, password, hashed, limiter=self._checks, abandon_on_cancel=True
        )
        if right and name in users:
            self._right[seen] = None
            if len(self._right) > REMEMBERED_MAX:
                self._right.popitem(last=False)
            return True
        return False

    def _seen(self, name: str, password: bytes, hashed: bytes) -> bytes:
        # The lengths keep two triples from running into one another.
        parts = (name.encode(), password, hashed)
        message = b"".join(len(part).to_bytes(8, "big") + part for part in parts)
        return hmac.digest(self._key, message, hashlib.sha256)


def _of_nobody(users: Users) -> bytes:
    """A hash of no password, of the strength that is the most usual among ``users``.

    An unknown name takes as long as a wrong password, so that nobody can ask which names there are.
    """
    [(strength, _)] = Counter(hashed[4:6] for hashed in users.values()).most_common(1)
    return b"$2b$" + strength + b"$" + b"." * 53


def _matches(password: bytes, hashed: bytes) -> bool:
    try:
        return bcrypt.checkpw(password[:PASSWORD_BYTES_MAX], hashed)
    except ValueError:
        # Of the password: one with a NUL is none that htpasswd could have made.
        return False


def protect(app: AsgiApp, passwords: Passwords, *, everything: bool) -> AsgiApp:
    """Ask for a password before requests that change something, or before all.

    ``/v2/`` always asks: clients find out there whether to send one, and log in by it.
    """

    async def gate(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or await _admitted(scope, receive, send):
            await app(scope, receive, send)

    async def _admitted(scope: Scope, receive: Receive, send: Send) -> bool:
        asks = scope["raw_path"] in (b"/v2/", b"/v2") or scope["method"] in _WRITING
        if not (asks or everything):
            return True
        request = Request(scope, receive)
        try:
            await _check(passwords, request.header("authorization"), scope)
        except RegistryError as error:
            headers = (("Content-Type", "application/json"), *error.headers)
            await send_response(request, send, Response(error.status, headers, error.body()))
            return False
        return True

    return gate


async def _check(passwords: Passwords, header: str | None, scope: Scope) -> None:
    """Raise RegistryError unless the credentials of a request are right."""
    name, password = parse_basic(header)
    # Some clients send an empty name and password when they have none.
    if not name:
        raise _unauthorized(
            "a name and a password are needed: log in, with docker login or the like"
        )
    if not await passwords.accept(name, password):
        client = scope.get("client") or ("unknown",)
        log.warning("password_wrong", name=name[:80], remote=client[0], path=scope["path"][:200])
        raise _unauthorized("the name or the password is wrong")
    scope[USER] = name[:80]


def parse_basic(header: str | None) -> tuple[str, bytes]:
    """Name and password of an ``Authorization`` header; empty when there are none."""
    scheme, _, encoded = (header or "").partition(" ")
    if scheme.lower() != "basic":
        return "", b""
    try:
        name, _, password = base64.b64decode(encoded.strip(), validate=True).partition(b":")
    except (binascii.Error, ValueError):
        return "", b""
    return name.decode("utf-8", "replace"), password


def _unauthorized(message: str) -> RegistryError:
    return RegistryError(Code.UNAUTHORIZED, 401, message, headers=_CHALLENGE)
