"""A backend that is not waited for; what it does while it answers is tried with all backends."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import cast

import pytest
import trio

from swarmpull.errors import BackendUnavailable
from swarmpull.store.backends.base import Backend
from swarmpull.store.backends.impatient import ImpatientBackend


class Silent:
    """Takes every request and answers none."""

    name = "silent"

    async def stat(self, key: str) -> None:
        await trio.sleep_forever()

    async def get_bytes(self, key: str, *, limit: int) -> None:
        await trio.sleep_forever()

    async def put_bytes(self, key: str, data: bytes, *, if_version: str | None) -> None:
        await trio.sleep_forever()

    async def get_versioned(self, key: str, *, limit: int) -> None:
        await trio.sleep_forever()

    async def delete(self, key: str) -> None:
        await trio.sleep_forever()


@pytest.mark.parametrize(
    "request_of",
    [
        lambda backend: backend.stat("a"),
        lambda backend: backend.get_bytes("a"),
        lambda backend: backend.put_bytes("a", b"x"),
        lambda backend: backend.get_versioned("a"),
        lambda backend: backend.delete("a"),
    ],
    ids=["stat", "get_bytes", "put_bytes", "get_versioned", "delete"],
)
async def test_a_small_object_is_waited_for_so_long_and_no_longer(
    autojump_clock: trio.testing.MockClock, request_of: Callable[[Backend], Awaitable[object]]
) -> None:
    backend = ImpatientBackend(cast("Backend", Silent()), 8.0)
    begun_at = trio.current_time()

    with pytest.raises(BackendUnavailable, match="silent failed on a: no answer for 8 s"):
        await request_of(backend)

    assert trio.current_time() - begun_at == pytest.approx(8.0)
