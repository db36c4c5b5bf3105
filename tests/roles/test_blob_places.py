"""A backend that says nothing must not keep a client waiting for as long as it tries."""

from __future__ import annotations

import pytest
import trio

from swarmpull.digest import Digest
from swarmpull.errors import BackendUnavailable, ObjectNotFound
from swarmpull.roles.blob_places import STAT_PATIENCE, BlobPlace
from swarmpull.store.backends.base import ObjectStat

BLOB = Digest.of(b"blob")


class Backend:
    """Answers after so many seconds."""

    name = "s3://bucket"

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    async def stat(self, key: str) -> ObjectStat:
        await trio.sleep(self.seconds)
        if self.seconds == 0:
            raise ObjectNotFound(self.name, key)
        return ObjectStat(key, 4, "1")


def place(seconds: float, *, is_foreign: bool = False) -> BlobPlace:
    return BlobPlace(BLOB, Backend(seconds), is_foreign)  # type: ignore[arg-type]


async def test_an_answer_in_good_time(autojump_clock) -> None:
    assert (await place(STAT_PATIENCE - 1).stat()).length == 4
    with pytest.raises(ObjectNotFound):
        await place(0).stat()


async def test_a_backend_that_says_nothing_is_unavailable(autojump_clock) -> None:
    begun = trio.current_time()
    with pytest.raises(BackendUnavailable) as caught:
        await place(150).stat()
    assert trio.current_time() - begun == pytest.approx(STAT_PATIENCE)
    assert (caught.value.backend, caught.value.key) == ("s3://bucket", place(0).key)
    assert "no answer for 8 s" in caught.value.reason


async def test_an_upstream_is_waited_for_as_long_as_it_asks(autojump_clock) -> None:
    assert (await place(60, is_foreign=True).stat()).length == 4
