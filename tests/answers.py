"""A small response of HTTP, as the clients of the tests hand it out."""

from __future__ import annotations

import json
from typing import Any

import attrs


@attrs.frozen
class Answer:
    """A response that is kept whole; names of headers are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes = attrs.field(repr=False)

    @property
    def text(self) -> str:
        return self.body.decode(errors="replace")

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def codes(self) -> list[str]:
        """The error codes of a body in the form of the distribution specification."""
        return [error["code"] for error in self.json()["errors"]]
