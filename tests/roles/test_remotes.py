"""What a remote says of itself is looked at before it is used."""

from __future__ import annotations

import pytest

from swarmpull.config import RemoteConfig
from swarmpull.digest import Digest
from swarmpull.errors import RpcFailed
from swarmpull.roles.remotes import Remote
from swarmpull.wire import api

BLOB = Digest.of(b"x")
ORIGINS = ("10.0.0.1:7200", "10.0.0.2:7200")


class Index:
    """The pool through which a remote's index is called, which describes its cluster so."""

    def __init__(self, weights: tuple[str, ...]) -> None:
        self.weights = weights

    async def call(self, address: str, method, request, *, timeout: float):
        assert method is api.DESCRIBE_CLUSTER
        return api.ClusterDescription(ORIGINS, self.weights)


def remote_with(*weights: str) -> Remote:
    return Remote(RemoteConfig(name="west", indexes=("10.0.0.9:7400",)), Index(weights))


@pytest.mark.parametrize("weight", ["nan", "inf", "-inf", "0", "-1", "1e999", "", "x", "9" * 999])
async def test_weights_that_are_none_are_refused_by_name(weight: str) -> None:
    remote = remote_with("10.0.0.2:7200=2", f"10.0.0.1:7200={weight}")

    with pytest.raises(RpcFailed, match=r"cannot be used: '10\.0\.0\.1:7200=") as error:
        await remote.owners(BLOB)
    assert "a number above 0" in str(error.value)
    assert len(str(error.value)) < 500


async def test_origins_are_in_the_order_of_their_weights() -> None:
    remote = remote_with("10.0.0.2:7200=1e6")

    assert await remote.owners(BLOB) == ("10.0.0.2:7200", "10.0.0.1:7200")
