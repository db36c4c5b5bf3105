"""How an upstream registry is told who we are: Basic, or a Bearer token of its token service.

RFC 9110 section 11 for challenges, RFC 6750 for Bearer, the distribution project's "Token Authentication
Specification" for the token service, and its "OAuth2 Token Authentication" for identity tokens.  Secrets
appear in no error and no log.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from typing import Any, Final
from urllib.parse import urlencode, urlsplit

import attrs
import trio

from swarmpull.registry.http import Answer, AnswerTooLong, HttpClient, HttpFailure, error_message
from swarmpull.registry.upstream_credentials import Credentials, LoginFailed, LoginSecret

# "Token Authentication Specification": without expires_in a token lasts 60 seconds.
TOKEN_SECONDS: Final = 60.0
# So much of its lifetime a token is used: clocks differ, and a request takes its time.
_TOKEN_SHARE: Final = 0.9
_TOKEN_BYTES_MAX: Final = 1 << 20
_CHALLENGE_CHARACTERS_MAX: Final = 8192
# One for each repository that is asked for; the oldest go.
TOKENS_MAX: Final = 10_000
# A scheme stands alone or before its parameters, and a parameter before an equals sign.
_SCHEME: Final = re.compile(r"[\s,]*([A-Za-z][A-Za-z0-9-]*)(?=\s*(?:,|$)|\s+[^\s=])", re.ASCII)
_PARAMETER: Final = re.compile(
    r'[\s,]*([A-Za-z][A-Za-z0-9_-]*)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]+))', re.ASCII
)


@attrs.frozen
class Challenge:
    """One demand of a ``WWW-Authenticate`` header; the scheme and the names are in lower case."""

    scheme: str
    parameters: dict[str, str]


def parse_challenges(header: str) -> Iterator[Challenge]:
    """The challenges of a header, as far as it can be understood."""
    position = 0
    header = header[:_CHALLENGE_CHARACTERS_MAX]
    while match := _SCHEME.match(header, position):
        parameters: dict[str, str] = {}
        scheme, position = match[1].lower(), match.end()
        while parameter := _PARAMETER.match(header, position):
            quoted = parameter[2]
            value = parameter[3] if quoted is None else re.sub(r"\\(.)", r"\1", quoted)
            parameters.setdefault(parameter[1].lower(), value)
            position = parameter.end()
        yield Challenge(scheme, parameters)


@attrs.frozen
class _Token:
    text: str = attrs.field(repr=False)
    expires_at: float


class Authorizer:
    """The ``Authorization`` header of requests to one registry.

    What the registry wants is learnt from its first refusal, and tokens are kept until they expire.
    """

    def __init__(self, http: HttpClient, credentials: Credentials) -> None:
        self._http = http
        self._credentials = credentials
        self._basic: str | None = None
        self._tokens: dict[str, _Token] = {}
        self._login = trio.Lock()

    def header(self, repository: str) -> str | None:
        """What is known to be wanted for a repository; None for nothing."""
        if self._basic is not None:
            return self._basic
        token = self._tokens.get(repository)
        if token is None or token.expires_at <= trio.current_time():
            return None
        return f"Bearer {token.text}"

    async def learn(self, header: str, repository: str, *, sent: str | None) -> None:
        """Find out what to send after a refusal.

        Args:
            header: ``WWW-Authenticate`` of the refusal.
            repository: that was asked for.
            sent: the ``Authorization`` that was refused.

        Raises:
            LoginFailed: there is nothing better to send.
        """
        challenges = {challenge.scheme: challenge for challenge in parse_challenges(header)}
        async with self._login:
            current = self.header(repository)
            if current is not None and current != sent:
                return  # somebody else has found out meanwhile
            self._basic = None
            self._tokens.pop(repository, None)
            if "bearer" in challenges:
                await self._fetch_token(challenges["bearer"].parameters, repository)
            elif "basic" in challenges:
                self._basic = await self._find_basic(sent)
            else:
                raise LoginFailed("it says 401 and not how to log in")

    async def _find_basic(self, sent: str | None) -> str:
        identity = await self._credentials.find()
        if identity is None:
            raise LoginFailed("it wants a user and a password, and there are none")
        if not identity.basic:
            raise LoginFailed("it wants a user and a password, and there is an identity token only")
        if identity.basic == sent:
            raise LoginFailed("it does not take this user and password")
        return identity.basic

    async def _fetch_token(self, parameters: dict[str, str], repository: str) -> None:
        realm = parameters.get("realm", "")
        self._check_realm(realm)
        identity = await self._credentials.find()
        query = {"scope": parameters.get("scope") or f"repository:{repository}:pull"}
        if "service" in parameters:
            query["service"] = parameters["service"]
        try:
            async with self._ask_for_token(realm, query, identity or LoginSecret()) as answer:
                body = await answer.read(_TOKEN_BYTES_MAX)
        except (HttpFailure, AnswerTooLong) as error:
            raise LoginFailed(f"its token service fails: {error}", transient=True) from error
        if answer.status in (401, 403):
            who = "anonymous users" if identity is None else "this user and password"
            if identity is not None and identity.token:
                who = "this identity token: log in anew"
            raise LoginFailed(f"its token service does not take {who}")
        if answer.status != 200:
            reason = f"its token service answers {answer.status} {error_message(body)}".rstrip()
            raise LoginFailed(reason, transient=answer.status == 429 or answer.status >= 500)
        self._keep(repository, _parse_token(body))

    def _ask_for_token(
        self, realm: str, query: dict[str, str], identity: LoginSecret
    ) -> AbstractAsyncContextManager[Answer]:
        if identity.token:
            form = query | {
                "grant_type": "refresh_token",
                "client_id": "swarmpull",
                "refresh_token": identity.token,
            }
            headers = {"Content-Type": "application/x-www-form-urlencoded"}
            return self._http.request(
                "POST", realm, headers=headers, content=urlencode(form).encode()
            )
        url = f"{realm}{'&' if urlsplit(realm).query else '?'}{urlencode(query)}"
        headers = {"Authorization": identity.basic} if identity.basic else {}
        return self._http.request("GET", url, headers=headers)

    def _check_realm(self, realm: str) -> None:
        try:
            parts = urlsplit(realm)
        except ValueError:
            parts = urlsplit("")
        allowed = ("https",) if self._http.base.startswith("https:") else ("http", "https")
        if parts.scheme not in allowed or not parts.netloc:
            raise LoginFailed(f"its token service is no {' or '.join(allowed)} URL")

    def _keep(self, repository: str, token: _Token) -> None:
        self._tokens[repository] = token
        while len(self._tokens) > TOKENS_MAX:
            del self._tokens[next(iter(self._tokens))]


def _parse_token(body: bytes) -> _Token:
    try:
        document: Any = json.loads(body)
        text = document.get("token") or document.get("access_token")
        seconds = document.get("expires_in", TOKEN_SECONDS)
    except (ValueError, AttributeError, RecursionError):
        raise LoginFailed("its token service answers with no token") from None
    if not isinstance(text, str) or not re.fullmatch(r"[!-~]+", text, re.ASCII):
        raise LoginFailed("its token service answers with no token")
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not seconds > 0:
        seconds = TOKEN_SECONDS
    return _Token(text, trio.current_time() + seconds * _TOKEN_SHARE)
