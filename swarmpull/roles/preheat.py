"""Preheating at an index: jobs, the agents that wait for them, and origins that are asked to fetch.

Every agent keeps one call open at every index, so each index knows all agents, and a job is a matter of the
index that began it.  Nothing is kept on disk: a job ends with its index, and is begun again at another one;
what was fetched by then is there.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Final, cast
from urllib.parse import urlsplit

import attrs
import structlog
import trio

from swarmpull.config import Config, IndexConfig
from swarmpull.digest import Digest
from swarmpull.errors import InvalidDigest, SwarmpullError
from swarmpull.registry.asgi import AsgiApp
from swarmpull.registry.errors import Code, RegistryError, name_invalid
from swarmpull.registry.names import UpstreamNames, is_repository, is_tag, registry_component
from swarmpull.registry.notifications import Notifications, PushedManifest
from swarmpull.registry.preheat_app import Wish, create_preheat_app
from swarmpull.ring.membership import Membership
from swarmpull.roles.cluster import OriginClient
from swarmpull.roles.preheat_jobs import (
    CANCELLED,
    DONE,
    FAILED,
    RUNNING,
    RUNNING_MAX,
    AgentTable,
    HostProgress,
    Job,
    JobTable,
    job_number,
    report_interval,
)
from swarmpull.roles.preheat_share import KnownAgent, Share
from swarmpull.roles.preheat_tree import Tree, read_tree
from swarmpull.roles.repositories import upstream_names
from swarmpull.roles.ring_client import RingClient
from swarmpull.telemetry import Metrics
from swarmpull.wire.api import HashesRequest, UpstreamManifestReply
from swarmpull.wire.listen import format_address
from swarmpull.wire.preheat_api import (
    AWAIT_JOBS,
    AwaitJobsReply,
    AwaitJobsRequest,
    Part,
    TaskProgress,
)
from swarmpull.wire.rpc import RpcContext, RpcPool, RpcService

log = structlog.get_logger()

# For which a call of an agent may stay open, in seconds.
WAIT_MAX: Final = 30.0
# Agents that wait; further ones are told to come back later.
WAITING_MAX: Final = 20_000
RETRY_AFTER: Final = 30.0
# For which agents leave alone an index that shuts down, in seconds: another one may have its address soon.
RETRY_AFTER_DRAIN: Final = 5.0
LOOK_INTERVAL: Final = 5.0
# Blobs of one job that are brought to origins at the same time.
ORIGIN_BLOBS: Final = 8
# Attempts for one blob, and seconds between them.
ATTEMPTS: Final = 3
PAUSE: Final = 2.0
# Pushes that registries have told of and that have not begun.
NOTIFIED_MAX: Final = 1000
# How many of them are looked at at a time, so that an upstream that hangs does not hold up the others; and
# seconds between two looks for room while as many jobs as there may be are under way.
NOTIFIED_WORKERS: Final = 4
ROOM_INTERVAL: Final = 0.5
_PLATFORM: Final = re.compile(r"(?:[a-z0-9]{1,30}/[a-z0-9]{1,30})?", re.ASCII)
_NAME_LENGTH_MAX: Final = 255


class Preheating:
    """Implements `swarmpull.registry.preheat_app.Preheater`, and ``index.await_jobs``."""

    def __init__(
        self,
        origins: OriginClient,
        config: Config,
        settings: IndexConfig,
        nursery: trio.Nursery,
        metrics: Metrics,
    ) -> None:
        self._origins = origins
        self._config = config
        self._notified_target = settings.api.notified
        self._nursery = nursery
        self._names = upstream_names(config)
        self._jobs = JobTable()
        self._agents = AgentTable()
        self._scopes: dict[str, trio.CancelScope] = {}
        # One for each agent that waits: set when there may be something to tell it.
        self._wakes: dict[str, trio.Event] = {}
        self._draining = False
        self._to_notified, self._from_notified = trio.open_memory_channel[PushedManifest](
            NOTIFIED_MAX
        )
        self._ended = metrics.counter(
            "preheat_jobs_total", "Jobs of preheating that have ended, by how.", ["state"]
        )
        self._events = metrics.counter(
            "preheat_notifications_total",
            "Events that registries sent: started, ignored, of an unknown registry, or failed.",
            ["result"],
        )
        for state in (DONE, FAILED, CANCELLED):
            self._ended.labels(state)
        for result in ("started", "ignored", "unknown", "failed"):
            self._events.labels(result)
        metrics.gauge("preheat_agents", "Agents that wait for jobs here.").set_function(
            lambda: len(self._agents)
        )
        metrics.gauge("preheat_jobs_running", "Jobs under way.").set_function(
            lambda: len(self._jobs.running)
        )

    # --- for the API --------------------------------------------------------------------------

    async def start(self, wish: Wish) -> Mapping[str, object]:
        """Begin a job, or find the one under way.

        Raises:
            RegistryError: it is nothing that could be done.
            SwarmpullError: the image cannot be found.
        """
        share = _share(wish.agents)
        if _PLATFORM.fullmatch(wish.platform) is None:
            raise _refused(400, f"platform has to be os/architecture: {wish.platform[:80]!r}")
        image = parse_image(wish.image, self._names, self._config.cluster.names)
        found = await self._origins.get_manifest(image.repository, image.reference)
        return self._begin(wish, share, image, found).document()

    def jobs(self) -> Sequence[Mapping[str, object]]:
        return [job.document() for job in self._jobs]

    def job(self, number: str, *, hosts: bool) -> Mapping[str, object] | None:
        job = self._jobs.get(number)
        return None if job is None else job.document(hosts=hosts)

    def cancel(self, number: str) -> Mapping[str, object] | None:
        job = self._jobs.get(number)
        if job is None:
            return None
        self._end(job, CANCELLED)
        return job.document()

    def notified(self, notifications: Notifications) -> bool:
        """Queue what was pushed.  Nothing of it when there is not room for all: it is sent again."""
        waiting = self._to_notified.statistics().current_buffer_used
        if waiting + len(notifications.pushed) > NOTIFIED_MAX:
            return False
        self._events.labels("ignored").inc(notifications.ignored)
        for pushed in notifications.pushed:
            self._to_notified.send_nowait(pushed)
        return True

    def app(self) -> AsgiApp:
        """The API over this."""
        return cast("AsgiApp", create_preheat_app(self))

    def register(self, service: RpcService) -> None:
        """Serve what agents call."""
        service.register(AWAIT_JOBS, self.await_jobs)

    def status(self) -> dict[str, object]:
        """For the admin listener."""
        running = self._jobs.running
        return {
            "agents": len(self._agents),
            "running": len(running),
            "bytes_done": sum(job.bytes_done for job in running),
            "bytes_total": sum(job.bytes_total for job in running),
        }

    # --- jobs ---------------------------------------------------------------------------------

    def _begin(
        self,
        wish: Wish,
        share: Share | None,
        image: NamedImage,
        found: UpstreamManifestReply,
    ) -> Job:
        digest = found.descriptor.digest
        target = "origins" if share is None else f"agents {share.text}"
        if wish.platform:
            target = f"{target}, {wish.platform}"
        # A tag is for runtimes; on the way onto disks it makes no difference.
        tag = "" if share is None else image.tag
        number = job_number(image.repository, digest, f"{target} as {tag}" if tag else target)
        former = self._jobs.get(number)
        if former is not None and not former.has_ended:
            return former
        if self._jobs.is_full:
            raise _refused(429, f"{RUNNING_MAX} jobs are under way: wait, or cancel one")
        seed = random.getrandbits(31) if wish.seed is None else wish.seed
        agents, unknown = ((), ()) if share is None else self._choose(share, seed)
        hosts = {agent.address: HostProgress(agent.name) for agent in agents}
        job = Job(
            number,
            wish.image,
            image.repository,
            image.reference,
            digest,
            target,
            seed,
            time.time(),
            hosts,
            unknown,
            share.number if share else None,
            tag=tag,
        )
        self._jobs.add(job)
        log.info(
            "preheat_started",
            job=number,
            image=wish.image,
            digest=str(digest),
            target=target,
            seed=seed,
            hosts=len(hosts),
            unknown=list(unknown),
        )
        self._nursery.start_soon(self._run, job, found.content, wish.platform, share is None)
        return job

    def _choose(self, share: Share, seed: int) -> tuple[tuple[KnownAgent, ...], tuple[str, ...]]:
        known = self._agents.known(trio.current_time())
        chosen, unknown = share.choose(known, seed)
        if not chosen:
            raise _refused(
                409,
                f"none of {len(known)} agents that are known here is meant by {share.text[:200]!r}: "
                "agents are known once they have called this index, which those with agent.preheat = true "
                "do within seconds of its start",
            )
        return chosen, unknown

    async def _run(self, job: Job, content: bytes, platform: str, for_origins: bool) -> None:
        with trio.CancelScope() as scope:
            self._scopes[job.number] = scope
            try:
                job_tree = await read_tree(
                    Part(job.digest, len(content)),
                    content,
                    partial(self._read_manifest, job.repository),
                    platform,
                )
                job.tree, job.state = job_tree, RUNNING
                if for_origins:
                    await self._to_origins(job, job_tree)
                else:
                    self._wake(job)
            except SwarmpullError as error:
                self._end(job, FAILED, str(error))
            finally:
                # The same job may have been begun again before this one has been cancelled to its end.
                if self._scopes.get(job.number) is scope:
                    del self._scopes[job.number]
        self._note_end(job)

    async def _read_manifest(self, repository: str, digest: Digest) -> bytes:
        return (await self._origins.get_manifest(repository, str(digest))).content

    def _end(self, job: Job, state: str, reason: str = "") -> None:
        if job.has_ended:
            return
        job.end(state, time.time(), reason)
        self._note_end(job)
        self._wake(job)

    def _note_end(self, job: Job) -> None:
        """Say once how a job has ended, and leave what is under way for it."""
        if not job.has_ended or job.is_noted:
            return
        job.is_noted = True
        scope = self._scopes.get(job.number)
        if scope is not None:
            scope.cancel()
        self._ended.labels(job.state).inc()
        log.info(
            "preheat_ended",
            job=job.number,
            image=job.image,
            digest=str(job.digest),
            state=job.state,
            reason=job.reason,
            seconds=round(job.ended_at - job.started_at, 1),
            **job.counts(),
        )

    # --- origins ------------------------------------------------------------------------------

    async def _to_origins(self, job: Job, tree: Tree) -> None:
        """Have the owner of each blob get it to its disk."""
        parts = (*tree.manifests, *tree.blobs)
        job.hosts.update({str(part.digest): HostProgress("") for part in parts})
        limiter = trio.CapacityLimiter(ORIGIN_BLOBS)
        async with trio.open_nursery() as nursery:
            for part in parts:
                nursery.start_soon(self._to_origin, job, part, limiter)
        self._jobs.settle(job, time.time())

    async def _to_origin(self, job: Job, part: Part, limiter: trio.CapacityLimiter) -> None:
        progress = job.hosts[str(part.digest)]
        async with limiter:
            progress.state = RUNNING
            for attempt in range(1, ATTEMPTS + 1):
                try:
                    await self._fetch(job.repository, part, progress)
                except SwarmpullError as error:
                    progress.reason = str(error)
                    log.info(
                        "preheat_blob_failed", job=job.number, attempt=attempt, reason=str(error)
                    )
                    await trio.sleep(PAUSE if attempt < ATTEMPTS else 0)
                else:
                    progress.state, progress.received, progress.reason = DONE, part.length, ""
                    return
            progress.state = FAILED

    async def _fetch(self, namespace: str, part: Part, progress: HostProgress) -> None:
        """Return when the origin that owns a blob has all of it."""
        reply = await self._origins.get_metainfo(part.digest, namespace, growing=True)
        growth = reply.growth
        host = reply.seeder
        progress.name = format_address(host.host, host.port)
        while growth is not None and not growth.settled:
            progress.received = min(part.length, growth.position * growth.piece_length)
            request = HashesRequest(
                part.digest, namespace, growth.source, growth.position, WAIT_MAX
            )
            growth = await self._origins.hashes(request)
        if reply.growth is not None:
            # It has matched its digest; this answers when it is also on the disk for good.
            await self._origins.get_metainfo(part.digest, namespace)

    # --- agents -------------------------------------------------------------------------------

    async def await_jobs(self, request: AwaitJobsRequest, context: RpcContext) -> AwaitJobsReply:
        """Take in what an agent reports, and answer when there is something for it."""
        contact = request.contact.seen_at(context.remote_host)
        address = format_address(contact.host, contact.port)
        name = request.name[:_NAME_LENGTH_MAX]
        now = trio.current_time()
        is_known = self._agents.heard(address, name, now)
        for progress in request.progress:
            self._report(address, progress)
        former = self._wakes.pop(address, None)
        if former is not None:
            former.set()
        if self._draining:
            return AwaitJobsReply(retry_after=RETRY_AFTER_DRAIN)
        if not is_known or len(self._wakes) >= WAITING_MAX:
            return AwaitJobsReply(retry_after=RETRY_AFTER)
        # Written so that NaN becomes the most.
        seconds = request.seconds if 0 <= request.seconds <= WAIT_MAX else WAIT_MAX
        return await self._wait_for_news(address, frozenset(request.known), seconds)

    async def _wait_for_news(
        self, address: str, known: frozenset[str], seconds: float
    ) -> AwaitJobsReply:
        wake = self._wakes[address] = trio.Event()
        self._agents.begin_wait(address)
        try:
            with trio.move_on_after(seconds):
                while not self._is_news(address, known) and not self._draining:
                    await wake.wait()
                    if self._wakes.get(address) is not wake:
                        # The same agent has called again.
                        break
                    wake = self._wakes[address] = trio.Event()
        finally:
            if self._wakes.get(address) is wake:
                del self._wakes[address]
                self._agents.end_wait(address, trio.current_time())
        return self._news(address, known)

    def _is_news(self, address: str, known: frozenset[str]) -> bool:
        return {job.number for job in self._jobs.tasks_of(address)} != known

    def _news(self, address: str, known: frozenset[str]) -> AwaitJobsReply:
        jobs = {job.number: job for job in self._jobs.tasks_of(address)}
        new = [job for number, job in jobs.items() if number not in known]
        hosts = max((len(job.hosts) for job in jobs.values()), default=1)
        return AwaitJobsReply(
            # One at a time: each may be long, and the next call gets the next.
            tuple(job.task() for job in new[:1]),
            tuple(sorted(known - jobs.keys())),
            report_interval(hosts),
            RETRY_AFTER_DRAIN if self._draining else 0.0,
        )

    def _report(self, address: str, progress: TaskProgress) -> None:
        self._jobs.report(address, progress, time.time())
        job = self._jobs.get(progress.job)
        if job is not None:
            self._note_end(job)

    def _wake(self, job: Job) -> None:
        for address in job.hosts:
            if address in self._wakes:
                self._wakes[address].set()

    # --- background ---------------------------------------------------------------------------

    async def watch_agents(self) -> None:
        """Give up agents that are silent, until cancelled."""
        while True:
            await trio.sleep(LOOK_INTERVAL)
            now = trio.current_time()
            self._jobs.look(self._agents.silence(now), time.time())
            self._agents.forget_silent(now)
            for job in self._jobs:
                self._note_end(job)

    async def take_notified(self) -> None:
        """Begin jobs for what registries told of, until cancelled."""
        async for pushed in self._from_notified:
            repository = self._repository_of(pushed)
            if repository is None:
                self._events.labels("unknown").inc()
                log.info(
                    "notification_of_unknown_registry",
                    registry=pushed.host,
                    repository=pushed.repository,
                    remedy="name it in upstreams or cluster.names",
                )
                continue
            tag = f":{pushed.tag}" if pushed.tag else ""
            wish = Wish(f"{repository}{tag}@{pushed.digest}", self._notified_agents())
            try:
                await self._start_in_turn(wish)
            except SwarmpullError as error:
                self._events.labels("failed").inc()
                log.warning("notification_failed", image=wish.image, reason=str(error))
            else:
                self._events.labels("started").inc()

    async def _start_in_turn(self, wish: Wish) -> None:
        """Begin a job as soon as there is room for one.  Raises what `start` does."""
        while True:
            try:
                await self.start(wish)
            except RegistryError as error:
                if error.code is not Code.TOOMANYREQUESTS:
                    raise
                await trio.sleep(ROOM_INTERVAL)
            else:
                return

    def _notified_agents(self) -> str:
        return "" if self._notified_target == "origins" else self._notified_target

    def _repository_of(self, pushed: PushedManifest) -> str | None:
        """The cluster's name of a repository of another registry; None when that is not known here."""
        for upstream in self._config.upstreams:
            if pushed.host in (
                upstream.name,
                urlsplit(upstream.url.removeprefix("registry+")).netloc,
            ):
                return f"{registry_component(upstream.name)}/{pushed.repository}"
        if not pushed.host or pushed.host in self._config.cluster.names:
            return pushed.repository
        return None

    async def end_waits(self, drain: trio.Event) -> None:
        """Answer all agents once ``drain`` is set: their calls would hold it up."""
        await drain.wait()
        self._draining = True
        for wake in self._wakes.values():
            wake.set()


@attrs.frozen
class NamedImage:
    """An image of a repository.

    Attributes:
        repository: by the cluster's name of it.
        reference: the tag or digest by which it is got.
        tag: the tag, if it is got by its digest and there was one as well; else empty.
    """

    repository: str
    reference: str
    tag: str = ""


def parse_image(text: str, names: UpstreamNames, own: Sequence[str] = ()) -> NamedImage:
    """An image as people write it: ``[registry/]repository[:tag][@digest]``.

    Raises:
        RegistryError: it is none.
        UpstreamUnknown: it is of a registry that is not pulled through.
    """
    name, at, digest = text.partition("@")
    head, slash, last = name.rpartition("/")
    last, colon, tag = last.partition(":")
    if (colon and not is_tag(tag)) or not last:
        raise name_invalid(text)
    if at:
        try:
            Digest.parse(digest)
        except InvalidDigest as error:
            raise _refused(400, str(error)) from error
    repository = f"{head}{slash}{last}"
    registry, _, rest = repository.partition("/")
    if rest and registry in own:
        registry, repository = "", rest
    named = registry if rest and ":" in registry else None
    if named:
        repository = rest
    if not is_repository(repository):
        raise name_invalid(repository)
    repository = names.select(repository, named) or repository
    return NamedImage(repository, digest or tag or "latest", tag if digest else "")


def _share(text: str) -> Share | None:
    if not text:
        return None
    try:
        return Share.parse(text)
    except ValueError as error:
        raise _refused(400, f"agents {error}") from error


def _refused(status: int, reason: str) -> RegistryError:
    code = Code.TOOMANYREQUESTS if status == 429 else Code.UNSUPPORTED
    return RegistryError(code, status, reason)


def start_preheating(
    config: Config,
    settings: IndexConfig,
    origins: Membership,
    pool: RpcPool,
    drain: trio.Event,
    metrics: Metrics,
    nursery: trio.Nursery,
) -> Preheating:
    """What preheats, with its tasks in ``nursery``; from ``drain`` on no agent waits any more."""
    client = OriginClient(RingClient(pool, origins))
    preheating = Preheating(client, config, settings, nursery, metrics)
    nursery.start_soon(preheating.watch_agents)
    for _ in range(NOTIFIED_WORKERS):
        nursery.start_soon(preheating.take_notified)
    nursery.start_soon(preheating.end_waits, drain)
    return preheating
