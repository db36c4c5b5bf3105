"""Clients that push and pull all the while, verify every digest, and try again what failed."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import trio

from tests.answers import Answer

from .client import Http, RequestFailed
from .cluster import PUSHING_AGENTS, Cluster
from .limits import RETRIED, RETRY_PAUSE
from .records import OK, PULL, PUSH, Attempt, Image, Record
from .scenario import Load

MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
CONFIG: Final = "application/vnd.oci.image.config.v1+json"
LAYER: Final = "application/vnd.oci.image.layer.v1.tar"
REPOSITORIES: Final = 4
# Pushes, and pulls, at the same time; what comes beyond is not begun.
CONCURRENT_MAX: Final = 8
# Of the pulls, those of something that this agent has not pulled before, as long as there is any.
COLD_SHARE: Final = 0.8


class Clients:
    """The load of a scenario, from `run` to `finish`."""

    def __init__(self, cluster: Cluster, load: Load, record: Record, seed: int) -> None:
        self._cluster = cluster
        self._load = load
        self._record = record
        self._random = random.Random(seed)
        self._began = trio.current_time()
        self._entrances = [
            name for name in cluster.roles if name.startswith("origin-") or name in PUSHING_AGENTS
        ]
        self._agents = [name for name in cluster.roles if name.startswith("agent-")]
        self._pulled: set[tuple[str, str]] = set()
        self._pushes = 0
        self._under_way = {PUSH: 0, PULL: 0}
        self._deadline = math.inf

    def now(self) -> float:
        """Seconds since the load began."""
        return trio.current_time() - self._began

    async def run(self, stop: trio.Event) -> None:
        """Begin requests until ``stop``; return when each has succeeded, or was tried for long enough."""
        async with trio.open_nursery() as nursery:
            push, pull = partial(self._push_one, nursery), partial(self._pull_one, nursery)
            nursery.start_soon(self._tick, PUSH, self._load.pushes, stop, push)
            nursery.start_soon(self._tick, PULL, self._load.pulls, stop, pull)

    def expect_success(self) -> None:
        """The last fault is over: from now on every request must succeed within `RETRIED`."""
        self._deadline = trio.current_time() + RETRIED

    async def _tick(
        self, kind: str, rate: float, stop: trio.Event, begin: Callable[[], None]
    ) -> None:
        """Call ``begin`` at the rate, a little unevenly."""
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_cancel_when, stop, scope)
                while rate > 0:
                    await trio.sleep(self._random.uniform(0.5, 1.5) / rate)
                    if self._under_way[kind] < CONCURRENT_MAX:
                        begin()
                nursery.cancel_scope.cancel()

    # --- pushes -------------------------------------------------------------------------------

    def _push_one(self, nursery: trio.Nursery) -> None:
        self._pushes += 1
        nursery.start_soon(self._push, self._pushes, self._size(), self._random.getrandbits(64))

    def _size(self) -> int:
        """Most layers are small, some are as large as they get."""
        low, high = math.log(self._load.smallest), math.log(self._load.largest)
        return round(math.exp(self._random.uniform(low, high)))

    async def _push(self, number: int, size: int, seed: int) -> None:
        layer = random.Random(seed).randbytes(size)
        config = json.dumps({"architecture": "amd64", "os": "linux", "number": number}).encode()
        repository = f"chaos/app-{number % REPOSITORIES}"
        content = manifest_of(config, layer)
        image = Image(
            repository, f"v{number}", digest_of(content), described(config), described(layer)
        )
        entrances = self._entrances[number % len(self._entrances) :] + self._entrances
        put = partial(push_image, image=image, contents=(config, layer), manifest=content)
        if await self._until_done(PUSH, entrances, image, put):
            self._record.pushed.append((self.now(), image))

    # --- pulls --------------------------------------------------------------------------------

    def _pull_one(self, nursery: trio.Nursery) -> None:
        if not self._record.pushed:
            return
        agent = self._random.choice(self._agents)
        images = [image for _, image in self._record.pushed]
        fresh = [image for image in images if (agent, str(image)) not in self._pulled]
        if fresh and self._random.random() < COLD_SHARE:
            images = fresh
        image = self._random.choice(images)
        self._pulled.add((agent, str(image)))
        nursery.start_soon(self._until_done, PULL, [agent], image, partial(pull_image, image=image))

    # --- both ---------------------------------------------------------------------------------

    async def _until_done(
        self, kind: str, hosts: Sequence[str], image: Image, attempt: Callable[[Http, str], object]
    ) -> bool:
        """Try until it succeeds, at one host after the other."""
        self._under_way[kind] += 1
        try:
            tries = 0
            while True:
                if await self.try_once(kind, hosts[tries % len(hosts)], image, attempt):
                    return True
                tries += 1
                if trio.current_time() > self._deadline:
                    self._record.violations.append(
                        f"{kind} of {image} never succeeded, not even {RETRIED:g} s after all was well"
                    )
                    return False
                await trio.sleep(RETRY_PAUSE)
        finally:
            self._under_way[kind] -= 1

    async def try_once(
        self, kind: str, host: str, image: Image, attempt: Callable[[Http, str], object]
    ) -> bool:
        """One try, noted."""
        started, outcome, detail = self.now(), OK, ""
        async with self._cluster.client(host) as client:
            try:
                await attempt(client, self._cluster.registry(host))
            except RequestFailed as error:
                outcome, detail = error.how, error.detail
            wait, request = client.waits.longest, client.waits.request
        self._record.attempts.append(
            Attempt(kind, host, str(image), started, self.now(), outcome, wait, detail, request)
        )
        return outcome == OK


async def _cancel_when(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel()


async def push_image(
    client: Http, address: str, *, image: Image, contents: Sequence[bytes], manifest: bytes
) -> None:
    """Push as containerd does: an upload for each blob, then the manifest.  Raises RequestFailed."""
    base = f"/v2/{image.repository}"
    for content in contents:
        digest, _ = described(content)
        if (await client.request("HEAD", address, f"{base}/blobs/{digest}")).status == 200:
            continue
        opened = await _expect(202, client, "POST", address, f"{base}/blobs/uploads/")
        target = path_of(opened.headers["location"])
        target += f"{'&' if '?' in target else '?'}digest={digest}"
        kind = {"Content-Type": "application/octet-stream"}
        await _expect(201, client, "PUT", address, target, kind, content)
    kind = {"Content-Type": MANIFEST}
    await _expect(201, client, "PUT", address, f"{base}/manifests/{image.tag}", kind, manifest)


async def pull_image(client: Http, address: str, *, image: Image) -> None:
    """Pull by tag, and compare everything with its digest.  Raises RequestFailed."""
    base = f"/v2/{image.repository}"
    target = f"{base}/manifests/{image.tag}"
    answer = await _expect(200, client, "GET", address, target, {"Accept": MANIFEST})
    if digest_of(answer.body) != image.manifest:
        raise RequestFailed("wrong", f"GET {target}: a manifest of {digest_of(answer.body)}")
    for digest, length in image.blobs:
        await client.verified(address, f"{base}/blobs/{digest}", digest, length)


async def _expect(
    status: int,
    client: Http,
    method: str,
    address: str,
    target: str,
    headers: dict[str, str] | None = None,
    body: bytes | None = None,
) -> Answer:
    answer = await client.request(method, address, target, headers=headers, body=body)
    if answer.status != status:
        raise RequestFailed("answered", f"{method} {target}: {answer.status} {answer.text[:300]}")
    return answer


def digest_of(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def described(content: bytes) -> tuple[str, int]:
    return digest_of(content), len(content)


def manifest_of(config: bytes, layer: bytes) -> bytes:
    """An OCI image manifest."""
    parts = [
        {"mediaType": kind, "digest": digest_of(content), "size": len(content)}
        for kind, content in ((CONFIG, config), (LAYER, layer))
    ]
    document = {"schemaVersion": 2, "mediaType": MANIFEST, "config": parts[0], "layers": parts[1:]}
    return json.dumps(document).encode()


def path_of(location: str) -> str:
    """The target of a ``Location`` header, which may be absolute."""
    return "/" + location.split("/", 3)[3] if "://" in location else location
