"""The jobs of preheating, and the agents that an index knows.  Pure: time comes in as an argument."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping
from typing import Final

import attrs

from swarmpull.digest import Digest
from swarmpull.roles.preheat_share import KnownAgent
from swarmpull.roles.preheat_tree import Tree
from swarmpull.wire.preheat_api import PreheatTask, TaskProgress

# Jobs under way, and jobs that have ended, of which the oldest is forgotten.
RUNNING_MAX: Final = 50
ENDED_MAX: Final = 200
# An agent calls every half a minute; after so many seconds without a call it is not there.
SILENCE_MAX: Final = 75.0
# After which a job is ended whatever its hosts say, in seconds.
AGE_MAX: Final = 24 * 3600.0
AGENTS_MAX: Final = 50_000
# In what is shown of a job, unless every host is asked for.
FAILURES_SHOWN: Final = 20
# Reports of all hosts of a job per second.
REPORTS_PER_SECOND: Final = 500.0
REASON_LENGTH_MAX: Final = 500
# Jobs that one agent is to have at a time; the others wait for these.
TASKS_MAX: Final = 20

WAITING, RUNNING, DONE, FAILED, LOST, CANCELLED = (
    "waiting",
    "running",
    "done",
    "failed",
    "lost",
    "cancelled",
)


@attrs.define
class HostProgress:
    """How far one host is.

    Attributes:
        name: of an agent's host; of an origin's blob the digest.
        state: waiting, running, done, failed or lost.
        received: bytes on the disk.
        reason: why it failed or is lost.
    """

    name: str
    state: str = WAITING
    received: int = 0
    reason: str = ""

    @property
    def has_ended(self) -> bool:
        return self.state in (DONE, FAILED)


@attrs.define(eq=False)
class Job:
    """One image onto some hosts.

    Attributes:
        number: its id, the same for the same image and target.
        image: as it was asked for.
        repository, reference, digest: what that is.
        tag: the tag, where ``reference`` is the digest and there was a tag as well.
        target: origins, or agents and which.
        seed: of the choice of agents.
        started_at: Unix time.
        tree: what the image consists of; None until that is known.
        hosts: by address; for origins one for each blob.
        unknown: names that no agent had.
        wanted: how many agents were asked for, if that is a number.
        state: waiting until the tree is known, running, done, failed or cancelled.
        reason: why it failed as a whole.
        ended_at: Unix time; 0 until then.
        is_noted: how it has ended was logged.
    """

    number: str
    image: str
    repository: str
    reference: str
    digest: Digest
    target: str
    seed: int
    started_at: float
    hosts: dict[str, HostProgress]
    unknown: tuple[str, ...] = ()
    wanted: int | None = None
    tree: Tree | None = None
    state: str = WAITING
    reason: str = ""
    ended_at: float = 0.0
    is_noted: bool = False
    tag: str = ""

    @property
    def has_ended(self) -> bool:
        return self.state in (DONE, FAILED, CANCELLED)

    @property
    def is_for_origins(self) -> bool:
        return self.target == "origins"

    @property
    def bytes_total(self) -> int:
        """What all hosts together are to have."""
        length = self.tree.length if self.tree else 0
        return length if self.is_for_origins else length * len(self.hosts)

    @property
    def bytes_done(self) -> int:
        return sum(host.received for host in self.hosts.values())

    def counts(self) -> dict[str, int]:
        """How many hosts are in which state."""
        counts = dict.fromkeys((WAITING, RUNNING, DONE, FAILED, LOST), 0)
        for host in self.hosts.values():
            counts[host.state] += 1
        return counts

    def is_open_for(self, address: str) -> bool:
        """Whether an agent has something to do for it."""
        host = self.hosts.get(address)
        is_begun = self.tree is not None and not self.has_ended and not self.is_for_origins
        return is_begun and host is not None and not host.has_ended

    def end(self, state: str, now: float, reason: str = "") -> None:
        """The first end counts."""
        if not self.has_ended:
            self.state, self.ended_at, self.reason = state, now, reason

    def task(self) -> PreheatTask:
        """For an agent; only once the tree is known."""
        assert self.tree is not None
        return PreheatTask(
            self.number,
            self.repository,
            self.reference,
            self.digest,
            self.tree.manifests,
            self.tree.blobs,
            self.tag,
        )

    def document(self, *, hosts: bool = False) -> dict[str, object]:
        """As the API shows it."""
        failures = [
            {"host": address, "name": host.name, "state": host.state, "reason": host.reason}
            for address, host in self.hosts.items()
            if host.state in (FAILED, LOST)
        ]
        document: dict[str, object] = {
            "id": self.number,
            "image": self.image,
            "repository": self.repository,
            "digest": str(self.digest),
            "target": self.target,
            "state": self.state,
            "reason": self.reason,
            "seed": self.seed,
            "started_at": self.started_at,
            "ended_at": self.ended_at or None,
            "manifests": len(self.tree.manifests) if self.tree else None,
            "blobs": len(self.tree.blobs) if self.tree else None,
            "image_bytes": self.tree.length if self.tree else None,
            "bytes_done": self.bytes_done,
            "bytes_total": self.bytes_total,
            "hosts": {"total": len(self.hosts), "wanted": self.wanted, **self.counts()},
            "unknown_names": list(self.unknown),
            "failures": failures if hosts else failures[:FAILURES_SHOWN],
        }
        if hosts:
            document["each"] = [
                {"host": address, **attrs.asdict(host)} for address, host in self.hosts.items()
            ]
        return document


def job_number(repository: str, digest: Digest, target: str) -> str:
    """The id of the job for an image and a target."""
    text = "\0".join((repository, str(digest), target))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class JobTable:
    """The jobs that an index keeps."""

    def __init__(self) -> None:
        self._jobs: dict[str, Job] = {}

    def __iter__(self) -> Iterator[Job]:
        """The jobs, the newest first."""
        return reversed(self._jobs.values())

    def get(self, number: str) -> Job | None:
        return self._jobs.get(number)

    @property
    def running(self) -> list[Job]:
        return [job for job in self._jobs.values() if not job.has_ended]

    @property
    def is_full(self) -> bool:
        """Whether no other job may begin."""
        return len(self.running) >= RUNNING_MAX

    def add(self, job: Job) -> None:
        """Keep a job; one of the same id that has ended is replaced, and old ones are forgotten."""
        self._jobs.pop(job.number, None)
        self._jobs[job.number] = job
        ended = [job.number for job in self._jobs.values() if job.has_ended]
        for number in ended[: max(0, len(ended) - ENDED_MAX)]:
            del self._jobs[number]

    def report(self, address: str, progress: TaskProgress, now: float) -> None:
        """Take in what an agent says of a job; what is not of one under way means nothing."""
        job = self._jobs.get(progress.job)
        host = job.hosts.get(address) if job else None
        if job is None or host is None or job.has_ended or host.has_ended or job.tree is None:
            return
        host.state = progress.state if progress.state in (RUNNING, DONE, FAILED) else RUNNING
        host.received = job.tree.length if host.state == DONE else max(0, progress.received)
        host.received = min(host.received, job.tree.length)
        host.reason = progress.reason[:REASON_LENGTH_MAX]
        if progress.state in (DONE, FAILED):
            # Else nothing is settled by it, and settling looks at every host.
            self.settle(job, now)

    def settle(self, job: Job, now: float) -> None:
        """End a job of which no host has anything left to do."""
        counts = job.counts()
        if job.has_ended or job.tree is None or counts[WAITING] or counts[RUNNING]:
            return
        missing = counts[FAILED] + counts[LOST]
        what = "blobs" if job.is_for_origins else "agents"
        job.end(
            FAILED if missing else DONE,
            now,
            f"{missing} of {len(job.hosts)} {what} do not have it" if missing else "",
        )

    def look(self, silent: Mapping[str, float], now: float) -> None:
        """Give up hosts that have been silent for long, by seconds, and jobs that take too long."""
        for job in self.running:
            if not job.is_for_origins:
                for address, host in job.hosts.items():
                    self._look_at(host, silent.get(address))
                self.settle(job, now)
            if now - job.started_at > AGE_MAX:
                job.end(FAILED, now, f"it has taken more than {AGE_MAX / 3600:.0f} hours")

    def _look_at(self, host: HostProgress, silence: float | None) -> None:
        if host.has_ended:
            return
        if silence is None or silence > SILENCE_MAX:
            host.state = LOST
            host.reason = f"it has not called for {SILENCE_MAX:.0f} s"
        elif host.state == LOST:
            host.state, host.reason = WAITING, ""

    def tasks_of(self, address: str) -> list[Job]:
        """The jobs that an agent has something to do for, the oldest first."""
        open_jobs = (job for job in self._jobs.values() if job.is_open_for(address))
        return list(itertools.islice(open_jobs, TASKS_MAX))


def report_interval(hosts: int) -> float:
    """Seconds between two reports of one host, so that an index is not busy with them."""
    return max(1.0, hosts / REPORTS_PER_SECOND)


@attrs.define(eq=False)
class _Agent:
    name: str
    heard_at: float
    waiting: bool = False


class AgentTable:
    """The agents that call this index."""

    def __init__(self) -> None:
        self._agents: dict[str, _Agent] = {}

    def heard(self, address: str, name: str, now: float) -> bool:
        """An agent has called; False when there are too many to know it."""
        agent = self._agents.get(address)
        if agent is None:
            if len(self._agents) >= AGENTS_MAX:
                return False
            agent = self._agents[address] = _Agent(name, now)
        agent.name, agent.heard_at = name, now
        return True

    def begin_wait(self, address: str) -> None:
        """From now on the agent waits for an answer, and is there as long as it does."""
        if address in self._agents:
            self._agents[address].waiting = True

    def end_wait(self, address: str, now: float) -> None:
        agent = self._agents.get(address)
        if agent is not None:
            agent.waiting, agent.heard_at = False, now

    def silence(self, now: float) -> dict[str, float]:
        """For how many seconds each agent has not been there."""
        return {
            address: 0.0 if agent.waiting else now - agent.heard_at
            for address, agent in self._agents.items()
        }

    def forget_silent(self, now: float) -> None:
        for address, seconds in self.silence(now).items():
            if seconds > SILENCE_MAX:
                del self._agents[address]

    def known(self, now: float) -> list[KnownAgent]:
        """Those that are there."""
        silence = self.silence(now)
        return [
            KnownAgent(address, agent.name)
            for address, agent in self._agents.items()
            if silence[address] <= SILENCE_MAX
        ]

    def __len__(self) -> int:
        return len(self._agents)
