"""The client of an index's preheating API."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

import attrs

from swarmpull.registry.client import RequestRefused, ServerUnavailable, UnexpectedAnswer
from swarmpull.registry.http import AnswerTooLong, HttpClient, HttpFailure, error_message

# A job with 50,000 agents, each with a reason.
ANSWER_BYTES_MAX: Final = 64 << 20


@attrs.define(slots=False)
class ApiUnavailable(ServerUnavailable):
    """No index answers."""

    def __str__(self) -> str:
        return (
            f"{self.url} is not available: {self.reason}. "
            "Check that an index runs there (index.api.listen), or name another with --api"
        )


async def call_api(
    http: HttpClient, method: str, path: str, body: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """One request; returns the document that is answered.

    Raises:
        ApiUnavailable: nobody answers.
        RequestRefused: it was refused, with the words of the index.
        UnexpectedAnswer: whoever answers is no index.
    """
    content = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"} if body is not None else {}
    try:
        async with http.request(method, path, headers=headers, content=content) as answer:
            text = await answer.read(ANSWER_BYTES_MAX)
            status, is_success = answer.status, answer.is_success
    except HttpFailure as error:
        raise ApiUnavailable(http.base, error.reason) from error
    except AnswerTooLong as error:
        raise UnexpectedAnswer(http.base, str(error)) from error
    if not is_success:
        raise RequestRefused(method, f"{http.base}{path}", status, error_message(text))
    try:
        document = json.loads(text)
    except ValueError:
        document = None
    if not isinstance(document, dict):
        reason = "answers with no JSON object: name index.api.listen of an index"
        raise UnexpectedAnswer(http.base, reason)
    return document
