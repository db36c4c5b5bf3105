"""Two clusters, each role of them a process of its own, replicate an image while one process gets kill -9.

Whichever it is and whenever it is, the image arrives whole, and what moves a second time is no more than the
pieces that were on their way; in bytes, counted where the process lives on.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import attrs
import pytest

from tests.ports import ClusterPorts, PortAllocator

from . import web
from .conftest import new_directory, started
from .program import Cluster, Program, configuration, options, role_process
from .test_replication import PATIENCE, Side, remotes
from .waiting import wait_until

MIB: Final = 1 << 20
PIECE: Final = 4 * MIB
# Six pieces of two blobs at the same time take one and a half seconds.
LAYERS: Final = 2
LAYER: Final = 12 * MIB
RATE: Final = 16 * MIB
# Of each blob one piece is on its way at a time; the config is a few hundred bytes.
REPEATED_MAX: Final = LAYERS * PIECE + 4096
# How much has to be there when the process is killed: nothing, at the moment of the acknowledgement; half;
# all but the last piece; and all, which leaves the ends of blobs, manifest and tag.
MOMENTS: Final = (0, LAYERS * LAYER // 2, LAYERS * LAYER - PIECE, LAYERS * LAYER)


@attrs.frozen
class Pair:
    """Clusters of one index and one origin each; images go from east to west."""

    east: Side
    west: Side


def two_processes(
    directory: Path, ports: ClusterPorts, more: Mapping[str, str] | None = None
) -> Cluster:
    """An index and an origin; nobody pulls by agents here, so no tracker runs."""
    config = directory / "swarmpull.toml"
    config.write_text(configuration(directory, ports))
    admin = {"index": ports.index_admin, "origin": ports.origin_admin}
    programs: dict[str, Program] = {
        role: role_process(directory, config, role, role, port, more or {})
        for role, port in admin.items()
    }
    return Cluster(directory, ports, programs)


@pytest.fixture(scope="module")
def pair(scratch: Path, ports: PortAllocator, request) -> Iterator[Pair]:
    at_east, at_west = ports.cluster(1), ports.cluster(1)
    words = remotes(at_west, {"west": ("team/**",)}, **{"remotes.0.rate": str(RATE)})
    to_west = dict(word.split("=", 1) for word in words if word != "-o")
    assert options(to_west) == words
    east = two_processes(new_directory(scratch, "east"), at_east, to_west)
    west = two_processes(new_directory(scratch, "west"), at_west)
    for here in started(east, request.config):
        for there in started(west, request.config):
            yield Pair(Side(here), Side(there))


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("victim", ["east index", "east origin", "west index", "west origin"])
def test_kill_9_of_any_process_at_any_time_loses_nothing_and_repeats_little(
    pair: Pair, victim: str, moment: int
) -> None:
    side, role = victim.split()
    repository = f"team/{side}-{role}"
    layers = [web.random_bytes(LAYER, f"{victim} {moment} {n}") for n in range(LAYERS)]
    sent, received = pair.east.bytes_handed_over(), pair.west.bytes_from_others()
    digest = pair.east.push(repository, str(moment), *layers)
    wait_until(
        lambda: pair.west.bytes_from_others() - received >= moment, "it is time", timeout=PATIENCE
    )
    cluster = getattr(pair, side).cluster

    assert cluster.kill(role) == -signal.SIGKILL
    cluster.restart(role)

    pair.west.wait_for(repository, str(moment), digest)
    pair.east.wait_until_idle()
    assert web.pull_image(pair.west.registry, repository, str(moment)) == digest
    if victim == "east origin":
        # What it had sent died with it, and what it sends from now on is not all.
        moved: float = pair.west.bytes_from_others() - received
    else:
        moved = pair.east.bytes_handed_over() - sent
    assert LAYERS * LAYER <= moved <= LAYERS * LAYER + REPEATED_MAX
