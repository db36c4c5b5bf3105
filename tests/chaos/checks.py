"""What must hold of a cluster after everything: nothing lost, nothing left over, everybody well."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import trio
from prometheus_client.parser import text_string_to_metric_families

from .client import RequestFailed
from .cluster import COLD, PORTS, S3_PORT_FIRST, Cluster, RoleProcess, blobs_of, role_of
from .limits import POLL, QUIET, RETRY_PAUSE, poll
from .load import Clients, pull_image
from .records import OK, PULL, WRONG, Image, Record

READERS: Final = 4
READS_OF_DAMAGED: Final = 5
# How many more tasks a role may have when all is quiet again than when it had just started: a few for each
# connection to other roles, which had not been made then.  A leak grows with the number of requests.
TASKS_MORE: Final = 80
# proc(5), net/tcp
_ESTABLISHED: Final = "01"
_CLOSE_WAIT: Final = "08"
_COLUMNS: Final = 4
# What the directory of a role may hold; docs/store.md.
KNOWN: Final = frozenset(
    {
        "lock",
        "blobs",
        "partials",
        "uploads",
        "temporary",
        "origin",
        *(
            f"{name}.sqlite{end}"
            for name in ("write-back", "upstream-tags", "tags", "index-journal")
            for end in ("", "-wal", "-shm")
        ),
    }
)


async def lost_pushes(cluster: Cluster, clients: Clients, record: Record) -> list[Image]:
    """What was acknowledged and cannot be read from an agent that has never pulled anything."""
    await cluster.cold.start()
    await cluster.wait_until_ready(COLD)
    lost: list[Image] = []
    images = iter([image for _, image in record.pushed])

    async def read_on() -> None:
        for image in images:
            pull = partial(pull_image, image=image)
            if not await clients.try_once(f"cold {PULL}", COLD, image, pull):
                lost.append(image)

    async with trio.open_nursery() as nursery:
        for _ in range(READERS):
            nursery.start_soon(read_on)
    return lost


async def samples(cluster: Cluster, name: str) -> dict[str, float]:
    """The metrics of a role without labels; nothing if it does not answer."""
    page = await cluster.get(name, "/metrics")
    families = text_string_to_metric_families(page or "")
    return {s.name: s.value for family in families for s in family.samples if not s.labels}


async def queues_are_empty(cluster: Cluster) -> bool:
    """Whether the backend has everything."""
    for name in cluster.roles:
        if role_of(name) == "origin":
            found = await samples(cluster, name)
            if found.get("swarmpull_write_back_queue_blobs", 1.0) > 0:
                return False
    return True


async def wait_for_queues(cluster: Cluster) -> str:
    """Wait until the backend has everything; returns what is wrong if it does not come to that."""
    if await poll(partial(queues_are_empty, cluster), within=QUIET, every=5 * POLL):
        return ""
    return f"queues for the backend are not empty {QUIET:g} s after all was well"


async def damaged(cluster: Cluster, corrupted: Sequence[tuple[str, str]]) -> list[str]:
    """Blobs that their hosts hand out although a bit was flipped, or cannot replace when that is noticed."""
    found = []
    for name, digest in corrupted:
        outcomes = []
        # Whoever reads it first is cut off, and the next one gets it anew.
        while len(outcomes) < READS_OF_DAMAGED and OK not in outcomes:
            async with cluster.client(name) as client:
                try:
                    await client.verified(cluster.registry(name), f"/blobs/{digest}", digest)
                    outcomes.append(OK)
                except RequestFailed as error:
                    outcomes.append(error.how)
                    await trio.sleep(RETRY_PAUSE)
        if WRONG in outcomes or OK not in outcomes:
            found.append(f"{digest} was damaged on {name}; reading it again: {', '.join(outcomes)}")
    return found


# --- leaks ----------------------------------------------------------------------------------------


async def tasks_of(cluster: Cluster) -> dict[str, float]:
    """How many tasks each role has."""
    found = {name: await samples(cluster, name) for name in cluster.roles}
    return {name: each.get("swarmpull_tasks", 0.0) for name, each in found.items()}


async def leaks(cluster: Cluster, tasks_before: dict[str, float]) -> list[str]:
    """Connections and tasks that should have ended long ago, given some time to end."""
    found: list[str] = ["never looked"]
    with trio.move_on_after(QUIET):
        while found:
            found = [line for role in cluster.roles.values() for line in _left_open(role)]
            for name, tasks in (await tasks_of(cluster)).items():
                if tasks > tasks_before[name] + TASKS_MORE:
                    found.append(f"{name} has {tasks:g} tasks, {tasks_before[name]:g} at the start")
            if found:
                await trio.sleep(POLL * 5)
    return found


def _left_open(role: RoleProcess) -> Iterator[str]:
    """What the table of connections of a role's host shows."""
    if role.pid is None:
        return
    own = PORTS[role_of(role.host.name)].get("registry")
    inodes = _sockets_of(role.pid)
    for line in Path(f"/proc/{role.pid}/net/tcp").read_text().splitlines()[1:]:
        _, local, remote, state, *rest = line.split()
        if rest[5] not in inodes:
            continue
        # Those to the bucket wait in a bounded pool for their next use, which is when it is seen.
        if state == _CLOSE_WAIT and _port(remote) != S3_PORT_FIRST:
            ends = f"{_text(local)} {_text(remote)}"
            yield f"{role.host.name} keeps a connection that its peer has closed: {ends}"
        if state == _ESTABLISHED and _port(local) == own:
            yield f"{role.host.name} keeps the connection of a client that is gone: {_text(remote)}"


def _sockets_of(pid: int) -> set[str]:
    found = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = str(link.readlink())
        except FileNotFoundError:
            continue
        if target.startswith("socket:["):
            found.add(target[len("socket:[") : -1])
    return found


def _port(text: str) -> int:
    return int(text.rpartition(":")[2], 16)


def _text(text: str) -> str:
    """An address of /proc as people write it."""
    address = bytes.fromhex(text.partition(":")[0])[::-1]
    return f"{'.'.join(map(str, address))}:{_port(text)}"


# --- after the end --------------------------------------------------------------------------------


def endings(cluster: Cluster) -> list[str]:
    """Unclean ends, and defects that are in the logs."""
    found = []
    for name, role in {**cluster.roles, COLD: cluster.cold}.items():
        unclean = [status for status in role.endings if status != 0]
        if unclean:
            found.append(f"{name} ended with {unclean} after SIGTERM; it said:\n{role.said()}")
        text = role.log.read_text(errors="replace") if role.log.exists() else ""
        if "Traceback (most recent call last)" in text:
            start = text.index("Traceback (most recent call last)")
            found.append(f"{name} logged a defect:\n{text[start : start + 3000]}")
    return found


def orphans(cluster: Cluster) -> list[str]:
    """Files that nobody will remove, and blobs that are not what their name says, of roles that ended."""
    found = []
    for name, role in {**cluster.roles, COLD: cluster.cold}.items():
        for directory in role.directory.iterdir():
            if directory.is_dir():
                found += [f"{name}: {line}" for line in _orphans_in(directory)]
        found += [f"{name}: {path.name} has other content" for path in wrong_blobs(role.directory)]
    return found


def _orphans_in(directory: Path) -> Iterator[str]:
    for path in directory.iterdir():
        if path.name not in KNOWN:
            yield f"nobody knows {path}"
    for path in (directory / "temporary").glob("*"):
        yield f"{path} was left behind"
    partials = {path.name for path in (directory / "partials").glob("*")}
    for end, other in ((".data", ".pieces"), (".pieces", ".data")):
        for partial_name in partials:
            if (
                partial_name.endswith(end)
                and partial_name.removesuffix(end) + other not in partials
            ):
                yield f"partial {partial_name} has no {other}"
    blobs = {str(path) for path in (directory / "blobs").rglob("*") if path.is_file()}
    for path in blobs:
        if path.endswith(".metainfo") and path.removesuffix(".metainfo") not in blobs:
            yield f"{path} has no blob"


def wrong_blobs(directory: Path) -> Iterator[Path]:
    for path in blobs_of(directory):
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != path.name:
                yield path
