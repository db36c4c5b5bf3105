"""Has the container runtime of this host pull what was preheated, so that it is unpacked there, too.

Docker is asked over its socket, containerd by its ``ctr``.  Both then pull as they always do: from this
agent, where they are set up for that (docs/setup.md).
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Awaitable, Callable, Mapping
from typing import Final
from urllib.parse import quote, urlencode

import attrs
import structlog
import trio

from swarmpull.config import Config, RuntimeConfig
from swarmpull.errors import SwarmpullError
from swarmpull.registry.http import Answer, ClientLimits, HttpFailure, open_http
from swarmpull.registry.names import registry_component

log = structlog.get_logger()

# Pulls of one runtime at the same time.
PULLS_MAX: Final = 2
# Of a line of Docker's progress, and of what is told of ctr's output.
LINE_BYTES_MAX: Final = 1 << 16
OUTPUT_SHOWN: Final = 500
# Docker says something whenever a layer moves on; unpacking a large one takes its time.
SILENCE_MAX: Final = 300.0

_Pull = Callable[["_Image"], Awaitable[None]]


@attrs.define(slots=False)
class RuntimeFailed(SwarmpullError):
    """A container runtime did not pull an image."""

    runtime: str
    image: str
    reason: str

    def __str__(self) -> str:
        return f"{self.runtime} did not pull {self.image}: {self.reason}"


@attrs.frozen
class RuntimeNames:
    """How runtimes call a repository of the cluster.

    Attributes:
        agent: ``host:port`` of the agent's registry as the runtime reaches it.
        own: what the cluster's own repositories are called with instead; may be empty.
        upstreams: names of registries by the first component of their repositories.
    """

    agent: str
    own: str
    upstreams: Mapping[str, str]

    def for_docker(self, repository: str) -> str:
        """Docker has a mirror for docker.io alone; everything else is pulled by the agent's name."""
        component, _, rest = repository.partition("/")
        if self.upstreams.get(component) == "docker.io":
            return f"docker.io/{rest}"
        return f"{self.agent}/{repository}"

    def for_containerd(self, repository: str) -> str:
        """containerd has mirrors for all registries."""
        component, _, rest = repository.partition("/")
        if rest and component in self.upstreams:
            return f"{self.upstreams[component]}/{rest}"
        return f"{self.own or self.agent}/{repository}"


@attrs.frozen
class _Image:
    """What a runtime pulls.

    Attributes:
        name: of the repository, as the runtime calls it.
        reference: the tag or digest by which it is pulled.
        tag: that it gets then; empty for none.
    """

    name: str
    reference: str
    tag: str

    def __str__(self) -> str:
        return f"{self.name}{'@' if ':' in self.reference else ':'}{self.reference}"


class AgentRuntime:
    """The runtimes of this host that are to pull; implements `swarmpull.roles.agent_preheat.RuntimePull`."""

    def __init__(self, settings: RuntimeConfig, names: RuntimeNames) -> None:
        self._settings = settings
        self._names = names
        self._pulls = trio.CapacityLimiter(PULLS_MAX)

    async def __call__(self, repository: str, reference: str, tag: str) -> None:
        """Return when each of them has the image, and calls it so.  Raises RuntimeFailed."""
        if self._settings.docker:
            name = self._names.for_docker(repository)
            await self._pull("docker", _Image(name, reference, tag), self._docker)
        if self._settings.containerd:
            name = self._names.for_containerd(repository)
            await self._pull("containerd", _Image(name, reference, tag), self._containerd)

    async def _pull(self, runtime: str, image: _Image, pull: _Pull) -> None:
        try:
            async with self._pulls:
                with trio.fail_after(float(self._settings.timeout)):
                    await pull(image)
        except trio.TooSlowError as error:
            reason = (
                f"it has taken more than {self._settings.timeout:.0f} s (agent.runtime.timeout)"
            )
            raise RuntimeFailed(runtime, str(image), reason) from error
        log.info("runtime_pulled", runtime=runtime, image=str(image), tag=image.tag)

    async def _docker(self, image: _Image) -> None:
        query = urlencode({"fromImage": image.name, "tag": image.reference})
        requests = [f"/images/create?{query}"]
        if image.tag:
            query = urlencode({"repo": image.name, "tag": image.tag})
            requests.append(f"/images/{quote(str(image), safe='/:@')}/tag?{query}")
        limits, reason = ClientLimits(silence=SILENCE_MAX), ""
        try:
            async with open_http("http://docker", limits, socket=self._settings.docker) as http:
                for path in requests:
                    async with http.request("POST", path) as answer:
                        if reason := await _docker_failure(answer):
                            break
        except HttpFailure as error:
            reason = f"{self._settings.docker}: {error}"
        if reason:
            raise RuntimeFailed("docker", str(image), reason)

    async def _containerd(self, image: _Image) -> None:
        hosts = self._settings.containerd_hosts
        await self._ctr(image, "pull", "--hosts-dir", hosts, str(image))
        if image.tag:
            await self._ctr(image, "tag", "--force", str(image), f"{image.name}:{image.tag}")

    async def _ctr(self, image: _Image, *command: str) -> None:
        settings = self._settings
        address = ["--address", settings.containerd, "--namespace", settings.containerd_namespace]
        try:
            # Cancelled, it is ended.
            done = await trio.run_process(
                ["ctr", *address, "images", *command],
                capture_stdout=True,
                capture_stderr=True,
                check=False,
            )
        except OSError as error:
            reason = f"ctr: {error.strerror or error}"
            raise RuntimeFailed("containerd", str(image), reason) from error
        if done.returncode:
            raise RuntimeFailed("containerd", str(image), _said_by(done))


async def _docker_failure(answer: Answer) -> str:
    """Read Docker's progress to its end; what it says was wrong, empty if nothing was."""
    if not answer.is_success:
        text = await answer.read(LINE_BYTES_MAX)
        return _message(text) or f"HTTP {answer.status}"
    line = bytearray()
    async for chunk in answer.chunks():
        *whole, rest = (bytes(line) + chunk).split(b"\n")
        for each in whole:
            if reason := _message(each):
                return reason
        line = bytearray(rest[-LINE_BYTES_MAX:])
    return _message(bytes(line))


def _message(line: bytes) -> str:
    try:
        document = json.loads(line)
    except ValueError:
        return ""
    found = document.get("error") or document.get("message") if isinstance(document, dict) else ""
    return str(found or "")[:OUTPUT_SHOWN]


def _said_by(done: subprocess.CompletedProcess[bytes]) -> str:
    lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
    return (lines[-1] if lines else f"ctr ended with status {done.returncode}")[-OUTPUT_SHOWN:]


def open_runtime(config: Config, settings: RuntimeConfig, agent: str) -> AgentRuntime | None:
    """The runtimes of the configuration; None when there is none.

    ``agent`` is ``host:port`` of its registry, as the runtime reaches it.
    """
    if not (settings.docker or settings.containerd):
        return None
    upstreams = {registry_component(each.name): each.name for each in config.upstreams}
    return AgentRuntime(settings, RuntimeNames(agent, settings.registry, upstreams))
