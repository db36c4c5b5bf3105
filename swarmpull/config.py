"""The configuration as frozen attrs classes: every key, its default, its meaning, its bounds.

`swarmpull.layers` fills these classes from defaults, file, environment and command line; they know
nothing of layers, and roles get them ready made.  Help texts are the source of
``docs/configuration.md``; metadata ``default`` is how the documentation shows a default that
depends on another key.
"""

from __future__ import annotations

import ipaddress
import math
import re
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, NewType
from urllib.parse import urlsplit

import attrs

from swarmpull.units import resolve_capacity

ROLES: Final = ("tracker", "index", "origin", "agent")
AGENTS_MAX: Final = 100

# How a value is written where it is configured; in the classes they are plain seconds and bytes.
Duration = NewType("Duration", float)
Size = NewType("Size", int)
Rate = NewType("Rate", float)
UNLIMITED: Final = Rate(math.inf)
Lifetime = NewType("Lifetime", float)
NEVER: Final = Lifetime(math.inf)
# As `swarmpull.units.parse_capacity` gives it: what it comes to depends on the disk.
Capacity = NewType("Capacity", str)
# Never shown again: not in messages, not by `swarmpull config show`.
Secret = NewType("Secret", str)

LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["console", "json"]
WriteBackMode = Literal["queue", "sync"]
Switch = Literal["on", "off"]
Protected = Literal["pushes", "all"]

_HOST: Final = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?\.?", re.ASCII)
_HOST_PORT: Final = re.compile(r"(?:\[([^\[\]]+)\]|([^\[\]:]+)):([0-9]{1,5})", re.ASCII)
_WILDCARDS: Final = ("0.0.0.0", "::")
# The sections of a role that listen for HTTP.
HTTP_SECTIONS: Final = ("registry", "mirror", "api", "admin")


@attrs.frozen(order=True)
class Address:
    """A host and a TCP port; ``str()`` gives ``host:port``, IPv6 hosts in brackets."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """Parse ``host:port``.

        Raises:
            ValueError: for anything else; the message says what is allowed.
        """
        match = _HOST_PORT.fullmatch(text)
        if match is None:
            raise ValueError(f"must be host:port, such as 127.0.0.1:7300 or [::1]:7300: {text!r}")
        host = match[1] or match[2]
        if not (_is_ipv6(host) if match[1] else _HOST.fullmatch(host)):
            raise ValueError(f"must name a host or an IP address before the port: {text!r}")
        port = int(match[3])
        if port > 65535:
            raise ValueError(f"must have a port from 0 to 65535: {text!r}")
        return cls(host, port)

    @property
    def is_wildcard(self) -> bool:
        """Bound to every address of the host."""
        return self.host in _WILDCARDS

    def local(self) -> Address:
        """The address at which the same host reaches a listener that is bound here."""
        loopback = {"0.0.0.0": "127.0.0.1", "::": "::1"}
        return Address(loopback.get(self.host, self.host), self.port)

    def shifted(self, offset: int) -> Address:
        """``offset`` ports further on; port 0, "any free port", stays 0."""
        return self if self.port == 0 else Address(self.host, self.port + offset)

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def _is_ipv6(host: str) -> bool:
    try:
        ipaddress.IPv6Address(host)
    except ValueError:
        return False
    return True


# --- validators: each message begins with the quoted name of the field, as in attrs.validators ----


def _cluster_list(_: object, attribute: attrs.Attribute[Any], value: tuple[str, ...]) -> None:
    for entry in value:
        try:
            address = Address.parse(entry.removeprefix("dns+"))
        except ValueError as exc:
            raise ValueError(f"'{attribute.name}' each entry {exc}") from exc
        if address.port == 0 or address.is_wildcard:
            raise ValueError(
                f"'{attribute.name}' must hold addresses that others can dial: {entry!r}"
            )
    if len(set(value)) < len(value):
        raise ValueError(f"'{attribute.name}' must not name a member twice: {', '.join(value)}")


def _weights(_: object, attribute: attrs.Attribute[Any], value: tuple[str, ...]) -> None:
    for entry in value:
        member, _, weight = entry.rpartition("=")
        try:
            Address.parse(member)
            if not 0.0 < float(weight) < math.inf:
                raise ValueError
        except ValueError as exc:
            raise ValueError(
                f"'{attribute.name}' each entry must be host:port=weight with a weight above 0, such as "
                f"origin-1:7200=2: {entry!r}"
            ) from exc


def _host(_: object, attribute: attrs.Attribute[Any], value: str) -> None:
    if value and not (_HOST.fullmatch(value) or _is_ipv6(value)):
        raise ValueError(
            f"'{attribute.name}' must be a host name or an IP address without a port: {value!r}"
        )
    if value in _WILDCARDS:
        raise ValueError(f"'{attribute.name}' must be an address that others can dial: {value!r}")


def _backend_url(_: object, attribute: attrs.Attribute[Any], value: str) -> None:
    example = "such as file:///var/lib/swarmpull/backend"
    try:
        parts = urlsplit(value)
    except ValueError as exc:
        raise ValueError(f"'{attribute.name}' must be a URL, {example}: {value!r}") from exc
    if not parts.scheme or not value.startswith(f"{parts.scheme}://"):
        raise ValueError(f"'{attribute.name}' must be a URL, {example}: {value!r}")
    if "@" in parts.netloc:
        raise ValueError(f"'{attribute.name}' must not hold credentials: see docs/configuration.md")
    if parts.scheme == "file" and (parts.netloc or not parts.path.startswith("/")):
        raise ValueError(
            f"'{attribute.name}' must be an absolute directory after file://, {example}: {value!r}"
        )


def _content_url(instance: object, attribute: attrs.Attribute[Any], value: str) -> None:
    if value.startswith("registry+"):
        raise ValueError(
            f"'{attribute.name}' must not be a registry, which nothing can be pushed to: "
            "name it under [[upstreams]]"
        )
    _backend_url(instance, attribute, value)


_UPSTREAM_NAME: Final = re.compile(r"[a-z0-9]+(?:[.-][a-z0-9]+)*(?::[0-9]{1,5})?", re.ASCII)
_PATTERN: Final = re.compile(r"[a-z0-9._*-]+(?:/[a-z0-9._*-]+)*", re.ASCII)


def _patterns(_: object, attribute: attrs.Attribute[Any], value: tuple[str, ...]) -> None:
    for entry in value:
        _pattern(_, attribute, entry)


def _lease(_: object, attribute: attrs.Attribute[Any], value: Duration) -> None:
    if value > 60.0:
        raise ValueError(f"'{attribute.name}' must be at most 60s: every change may wait for it")


def _upstream_name(_: object, attribute: attrs.Attribute[Any], value: str) -> None:
    if _UPSTREAM_NAME.fullmatch(value) is None:
        raise ValueError(
            f"'{attribute.name}' must be a registry as clients name it, host or host:port in lower "
            f"case, such as docker.io: {value!r}"
        )


def _registry_names(_: object, attribute: attrs.Attribute[Any], value: tuple[str, ...]) -> None:
    for entry in value:
        if _UPSTREAM_NAME.fullmatch(entry) is None:
            raise ValueError(
                f"'{attribute.name}' each entry must be host or host:port in lower case: {entry!r}"
            )


def _registry_or_none(_: object, attribute: attrs.Attribute[Any], value: str) -> None:
    if value:
        _upstream_name(_, attribute, value)


def _upstream_url(_: object, attribute: attrs.Attribute[Any], value: str) -> None:
    example = "such as registry+https://registry-1.docker.io"
    match = re.fullmatch(r"registry\+https?://([^/?#]+)/?", value)
    # Not the value: what stands before an "@" is a secret.
    if match is None or "@" in match[1]:
        raise ValueError(
            f"'{attribute.name}' must be registry+https://host or registry+http://host, {example}, "
            "without credentials, path or query"
        )
    if not _HOST.fullmatch(match[1]):
        try:
            Address.parse(match[1])
        except ValueError as exc:
            raise ValueError(f"'{attribute.name}' must name a host, {example}: {value!r}") from exc


def _proxy_url(_: object, attribute: attrs.Attribute[Any], value: str) -> None:
    # Not the value: what stands before an "@" is a secret.
    if value not in ("", "environment") and not re.fullmatch(r"https?://[^/?#@]+:[0-9]+/?", value):
        raise ValueError(
            f"'{attribute.name}' must be http://host:port, environment, or empty; a proxy that wants a "
            "password is named in the environment"
        )


_REMOTE_NAME: Final = re.compile(r"[a-z0-9](?:[a-z0-9.-]{0,61}[a-z0-9])?", re.ASCII)


def _remote_name(_: object, attribute: attrs.Attribute[Any], value: str) -> None:
    if _REMOTE_NAME.fullmatch(value) is None:
        raise ValueError(
            f"'{attribute.name}' must be up to 63 of a-z, 0-9, '.' and '-', such as west: {value!r}"
        )


def _remote_members(instance: object, attribute: attrs.Attribute[Any], value: Any) -> None:  # noqa: ANN401
    if not value:
        raise ValueError(
            f"'{attribute.name}' must name at least one, such as [\"west-index:7400\"]"
        )
    _cluster_list(instance, attribute, value)


def _notified(_: object, attribute: attrs.Attribute[Any], value: str) -> None:
    if re.fullmatch(r"origins|all|[1-9][0-9]{0,8}|[1-9][0-9]?%|100%", value, re.ASCII) is None:
        raise ValueError(
            f"'{attribute.name}' must be origins, all, a number or a percentage of agents: {value!r}"
        )


def _pattern(_: object, attribute: attrs.Attribute[Any], value: str) -> None:
    if _PATTERN.fullmatch(value) is None:
        raise ValueError(
            f"'{attribute.name}' must be a repository name in which * stands for anything but '/' and "
            f"** for anything, such as team/* or team/**: {value!r}"
        )


def _at_least_one(_: object, attribute: attrs.Attribute[Any], value: int) -> None:
    if value < 1:
        raise ValueError(f"'{attribute.name}' must be at least 1: {value}")


def _meaning(text: str, *, default: str | None = None) -> dict[str, str]:
    """Field metadata: the help line, and how to show a default that depends on another key."""
    return {"help": text} if default is None else {"help": text, "default": default}


def _default_backend() -> BackendConfig:
    return BackendConfig(url=Path("swarmpull-data/backend").absolute().as_uri())


# --- listeners ------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class ListenerConfig:
    """A TCP listener."""

    listen: Address = attrs.field(
        metadata=_meaning("Address and port to bind; port 0 takes any free one.")
    )


@attrs.frozen(kw_only=True)
class HttpListenerConfig(ListenerConfig):
    """A listener for HTTP, or with a certificate for HTTPS."""

    tls_cert: str = attrs.field(
        default="",
        metadata=_meaning(
            "File with the certificate that clients see, and what leads to its authority; "
            "empty: plain HTTP."
        ),
    )
    tls_key: str = attrs.field(default="", metadata=_meaning("File with its key."))


@attrs.frozen(kw_only=True)
class RegistryConfig(HttpListenerConfig):
    """A registry, and who may push there."""

    htpasswd: str = attrs.field(
        default="",
        metadata=_meaning(
            "File with names and passwords as htpasswd -B writes it; empty: nobody is asked for one."
        ),
    )
    htpasswd_for: Protected = attrs.field(
        default="pushes",
        metadata=_meaning("What a password is needed for: pushes and deletions, or all."),
    )


@attrs.frozen(kw_only=True)
class AgentRegistryConfig(RegistryConfig):
    """The registry of an agent, and whether it takes pushes."""

    push: bool = attrs.field(
        default=False,
        metadata=_meaning(
            "Take pushes too and forward them to an origin.",
            default="false; true in --role all",
        ),
    )


@attrs.frozen(kw_only=True)
class MirrorConfig(RegistryConfig):
    """A registry that stands for another one, for clients that do not say which one they mean."""

    registry: str = attrs.field(
        default="",
        validator=_registry_or_none,
        metadata=_meaning(
            "The registry for which the agent is taken there, one of the upstreams, such as docker.io; "
            "empty: there is no such listener."
        ),
    )

    @property
    def is_on(self) -> bool:
        """Whether it is bound at all."""
        return bool(self.registry)


@attrs.frozen(kw_only=True)
class PeerListenerConfig(ListenerConfig):
    """The peer protocol listener, and the host name under which others find it."""

    advertise: str = attrs.field(
        default="",
        validator=_host,
        metadata=_meaning(
            "Host name or IP address that other peers dial, without a port; "
            "empty: the address at which the tracker sees this host.",
        ),
    )


@attrs.frozen(kw_only=True)
class ApiConfig(RegistryConfig):
    """The HTTP API of an index."""

    notified: str = attrs.field(
        default="origins",
        validator=_notified,
        metadata=_meaning(
            "Where images go that registries say were pushed (POST /registry/notifications): origins, or to "
            "agents: all, a number, or a share such as 5%."
        ),
    )


@attrs.frozen(kw_only=True)
class BackendConfig:
    """Where blobs or tags are kept for good."""

    url: str = attrs.field(
        validator=_backend_url,
        metadata=_meaning(
            "The backend: file:///absolute/directory or s3://bucket/prefix?endpoint=host:port.",
            default="file://<data_dir>/backend",
        ),
    )


@attrs.frozen(kw_only=True)
class OriginBackendConfig(BackendConfig):
    """Where an origin keeps blobs for good, and how fast."""

    url: str = attrs.field(
        validator=_content_url,
        metadata=_meaning(
            "The backend: file:///absolute/directory or s3://bucket/prefix?endpoint=host:port. "
            "With origin.namespaces it holds generic blobs only.",
            default="file://<data_dir>/backend",
        ),
    )
    rate: Rate = attrs.field(
        default=UNLIMITED,
        metadata=_meaning(
            "Bytes per second that this origin reads from and writes to it, or unlimited."
        ),
    )


@attrs.frozen(kw_only=True)
class NamespaceConfig:
    """Repositories that have a backend of their own."""

    pattern: str = attrs.field(
        validator=_pattern,
        metadata=_meaning(
            "Which repositories: a name in which * stands for anything but '/' and ** for anything. "
            "The first entry that matches wins.",
            default="none; needed",
        ),
    )
    url: str = attrs.field(
        validator=_content_url,
        metadata=_meaning("Their backend, as in origin.backend.url.", default="none; needed"),
    )
    rate: Rate = attrs.field(
        default=UNLIMITED,
        metadata=_meaning(
            "Bytes per second that an origin reads from and writes to it, or unlimited."
        ),
    )


@attrs.frozen(kw_only=True)
class UpstreamConfig:
    """Another registry that is pulled through."""

    name: str = attrs.field(
        validator=_upstream_name,
        metadata=_meaning(
            "As clients name it, in ns= or before the repository: host or host:port.",
            default="none; needed",
        ),
    )
    url: str = attrs.field(
        validator=_upstream_url,
        metadata=_meaning(
            "Where it is: registry+https://host, or registry+http://host without TLS.",
            default="none; needed",
        ),
    )
    freshness: Duration = attrs.field(
        default=Duration(60.0),
        metadata=_meaning(
            "How long a tag is believed before the upstream is asked again; may be 0s."
        ),
    )
    rate: Rate = attrs.field(
        default=UNLIMITED,
        metadata=_meaning("Bytes of blobs per second that an origin reads from it, or unlimited."),
    )
    username: str = attrs.field(
        default="", metadata=_meaning("User there; empty: anonymous, or as docker_config says.")
    )
    password: Secret = attrs.field(
        default=Secret(""),
        repr=False,
        metadata=_meaning("Password or token of that user; better in the environment or a file."),
    )
    password_file: str = attrs.field(
        default="",
        metadata=_meaning("File that holds the password; read again for each login."),
    )
    docker_config: str = attrs.field(
        default="",
        metadata=_meaning(
            "File as docker login writes it (config.json); its users, identity tokens and credential helpers "
            "are used, looked for again at each login."
        ),
    )
    proxy: str = attrs.field(
        default="",
        validator=_proxy_url,
        metadata=_meaning(
            "HTTP proxy that it is reached through, such as http://proxy:3128; environment: as HTTPS_PROXY, "
            "HTTP_PROXY and NO_PROXY of the origin say; empty: none."
        ),
    )


@attrs.frozen(kw_only=True)
class RemoteConfig:
    """Another cluster that images are replicated to."""

    name: str = attrs.field(
        validator=_remote_name,
        metadata=_meaning(
            "What it is called here; with TLS, the cluster that its certificates name.",
            default="none; needed",
        ),
    )
    indexes: tuple[str, ...] = attrs.field(
        validator=_remote_members,
        metadata=_meaning(
            "Its indexes (index.rpc): a list of host:port, or dns+name:port for every address of a name.",
            default="none; needed",
        ),
    )
    origins: tuple[str, ...] = attrs.field(
        default=(),
        validator=_cluster_list,
        metadata=_meaning(
            "Its origins (origin.rpc) as this cluster reaches them; empty: as its indexes say, whose "
            "cluster.origins must be set then.",
            default="none",
        ),
    )
    rate: Rate = attrs.field(
        default=UNLIMITED,
        metadata=_meaning("Bytes per second that each origin sends there, or unlimited."),
    )


@attrs.frozen(kw_only=True)
class ReplicationConfig:
    """Repositories whose tags are replicated to another cluster."""

    pattern: str = attrs.field(
        validator=_pattern,
        metadata=_meaning(
            "Which repositories: a name in which * stands for anything but '/' and ** for anything.",
            default="none; needed",
        ),
    )
    remote: str = attrs.field(
        validator=_remote_name,
        metadata=_meaning("To which of the remotes, by its name.", default="none; needed"),
    )


@attrs.frozen(kw_only=True)
class TrustedClusterConfig:
    """Another cluster whose indexes and origins may replicate to this one, or are replicated to."""

    cluster: str = attrs.field(
        validator=_remote_name,
        metadata=_meaning("The cluster that its certificates name.", default="none; needed"),
    )
    ca: str = attrs.field(
        default="",
        metadata=_meaning(
            "File with the certificates of its authorities, which vouch for that cluster only; "
            "empty: they are those of tls.ca."
        ),
    )
    repositories: tuple[str, ...] = attrs.field(
        default=(),
        validator=_patterns,
        metadata=_meaning(
            "Which repositories it may replicate to: a list of patterns as in replications; empty: all."
        ),
    )


def _listener(host: str, port: int) -> ListenerConfig:
    return ListenerConfig(listen=Address(host, port))


def _admin_listener(port: int) -> HttpListenerConfig:
    return HttpListenerConfig(listen=Address("127.0.0.1", port))


def _peer_listener(port: int) -> PeerListenerConfig:
    return PeerListenerConfig(listen=Address("0.0.0.0", port))


@attrs.frozen(kw_only=True)
class StoreConfig:
    """How long and how much a role keeps on its disk."""

    max_bytes: Capacity = attrs.field(
        default=Capacity("85%"),
        metadata=_meaning(
            "High watermark: what the store's own files may take up, as a size or a percentage of the "
            "file system. Above it, or when the disk is full, the least recently used blobs are removed."
        ),
    )
    low_watermark: Capacity = attrs.field(
        default=Capacity("80%"),
        metadata=_meaning(
            "Down to what the store is then cleaned, as a size or a percentage of max_bytes."
        ),
    )
    ttl: Lifetime = attrs.field(
        default=NEVER,
        metadata=_meaning("How long a blob is kept, however much it is used; or never: no end."),
    )
    idle_timeout: Lifetime = attrs.field(
        default=Lifetime(7 * 86400.0),
        metadata=_meaning("How long a blob is kept that nobody reads; or never: no end."),
    )
    partial_ttl: Lifetime = attrs.field(
        default=Lifetime(86400.0),
        metadata=_meaning(
            "How long an abandoned download is kept after its last piece; or never: no end."
        ),
    )

    def watermarks(self, whole: float) -> tuple[float, float]:
        """The high and the low watermark in bytes on a file system of ``whole`` bytes."""
        high = resolve_capacity(self.max_bytes, whole)
        return high, min(high, resolve_capacity(self.low_watermark, high))


# --- roles ----------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class RuntimeConfig:
    """Which container runtimes pull what was preheated."""

    docker: str = attrs.field(
        default="",
        metadata=_meaning(
            "Socket of a Docker daemon, such as /var/run/docker.sock, that pulls each preheated image; "
            "whoever may use it is root on this host. Empty: none."
        ),
    )
    containerd: str = attrs.field(
        default="",
        metadata=_meaning(
            "Socket of a containerd, such as /run/containerd/containerd.sock, that pulls each preheated "
            "image by means of ctr. Empty: none."
        ),
    )
    containerd_namespace: str = attrs.field(
        default="k8s.io",
        metadata=_meaning("The namespace in containerd: k8s.io is that of Kubernetes."),
    )
    containerd_hosts: str = attrs.field(
        default="/etc/containerd/certs.d",
        metadata=_meaning(
            "The directory with its hosts.toml files, as swarmpull setup writes them."
        ),
    )
    registry: str = attrs.field(
        default="",
        metadata=_meaning(
            "The registry by which containerd calls the cluster's own images, one of cluster.names; "
            "empty: the agent's own address."
        ),
    )
    timeout: Duration = attrs.field(
        default=Duration(1800.0), metadata=_meaning("How long one pull may take.")
    )


@attrs.frozen(kw_only=True)
class AgentConfig:
    """One agent."""

    registry: AgentRegistryConfig = attrs.field(
        factory=lambda: AgentRegistryConfig(listen=Address("127.0.0.1", 5000)),
        metadata=_meaning("The registry for this host's container runtime."),
    )
    mirror: MirrorConfig = attrs.field(
        factory=lambda: MirrorConfig(listen=Address("127.0.0.1", 5050)),
        metadata=_meaning(
            "A second registry that stands for an upstream, for Docker's registry-mirrors; pulls only."
        ),
    )
    peer: PeerListenerConfig = attrs.field(
        factory=partial(_peer_listener, 7100), metadata=_meaning("The peer protocol of the agent.")
    )
    admin: HttpListenerConfig = attrs.field(
        factory=partial(_admin_listener, 7500),
        metadata=_meaning("Health, readiness, metrics and status of the agent."),
    )
    data_dir: Path = attrs.field(
        default=Path("swarmpull-data/agent"),
        metadata=_meaning("Directory of the agent's cache.", default="<data_dir>/agent"),
    )
    preheat: bool = attrs.field(
        default=True,
        metadata=_meaning(
            "Get images ahead of pulls when an index says so; the agent keeps a call open at each index."
        ),
    )
    runtime: RuntimeConfig = attrs.field(
        factory=RuntimeConfig,
        metadata=_meaning("Runtimes of this host that pull what was preheated; none by default."),
    )
    tag_freshness: Duration = attrs.field(
        default=Duration(1.0),
        metadata=_meaning(
            "How long a tag is believed before an index is asked again; 0s: it is asked every time. While no "
            "index answers the agent goes on from what it knows.",
            default="1s; 0s in --role all",
        ),
    )
    unread_timeout: Lifetime = attrs.field(
        default=NEVER,
        metadata=_meaning(
            "How long a download goes on that nobody reads any more, 1s at least; its pieces are kept, "
            "and the next request resumes it. Clients that lost their connection may take 10 s to come back. "
            "never: every download is finished."
        ),
    )
    store: StoreConfig = attrs.field(
        factory=StoreConfig,
        metadata=_meaning("How long and how much the agent keeps on its disk."),
    )


@attrs.frozen(kw_only=True)
class OriginConfig:
    """One origin."""

    registry: RegistryConfig = attrs.field(
        factory=lambda: RegistryConfig(listen=Address("127.0.0.1", 5100)),
        metadata=_meaning("The registry of the origin; it takes pushes."),
    )
    rpc: ListenerConfig = attrs.field(
        factory=partial(_listener, "0.0.0.0", 7200),
        metadata=_meaning("Calls from other roles to the origin."),
    )
    peer: PeerListenerConfig = attrs.field(
        factory=partial(_peer_listener, 7201), metadata=_meaning("The peer protocol of the origin.")
    )
    admin: HttpListenerConfig = attrs.field(
        factory=partial(_admin_listener, 7520),
        metadata=_meaning("Health, readiness, metrics and status of the origin."),
    )
    backend: OriginBackendConfig = attrs.field(
        factory=lambda: OriginBackendConfig(url=_default_backend().url),
        metadata=_meaning("Where the origin keeps blobs for good."),
    )
    namespaces: tuple[NamespaceConfig, ...] = attrs.field(
        default=(),
        metadata=_meaning(
            "Repositories that have a backend of their own, one section for each pattern. "
            "When there are any, pushes to all others are refused."
        ),
    )
    fetch_connections: int = attrs.field(
        default=4,
        validator=_at_least_one,
        metadata=_meaning(
            "Ranges of one blob that are read from the backend at the same time; "
            "all blobs together have at most 12."
        ),
    )
    data_dir: Path = attrs.field(
        default=Path("swarmpull-data/origin"),
        metadata=_meaning("Directory of the origin's cache.", default="<data_dir>/origin"),
    )
    store: StoreConfig = attrs.field(
        factory=StoreConfig,
        metadata=_meaning("How long and how much the origin keeps on its disk."),
    )
    write_back: WriteBackMode = attrs.field(
        default="queue",
        metadata=_meaning(
            "When a push is acknowledged: queue, when it is on the disks of the replicas and queued for the "
            "backend, or sync, when the backend has it."
        ),
    )
    replicas: int = attrs.field(
        default=3,
        validator=_at_least_one,
        metadata=_meaning(
            "Origins that have a pushed blob on their disks before it is acknowledged, or all if there are "
            "fewer; 1: only the one that takes the push."
        ),
    )
    repair_rate: Rate = attrs.field(
        default=Rate(50e6),
        metadata=_meaning(
            "Bytes per second at which an origin has others make up for copies that they lack, or unlimited."
        ),
    )


@attrs.frozen(kw_only=True)
class TrackerConfig:
    """One tracker; it keeps everything in memory."""

    rpc: ListenerConfig = attrs.field(
        factory=partial(_listener, "0.0.0.0", 7300),
        metadata=_meaning("Calls from other roles to the tracker."),
    )
    admin: HttpListenerConfig = attrs.field(
        factory=partial(_admin_listener, 7530),
        metadata=_meaning("Health, readiness, metrics and status of the tracker."),
    )


@attrs.frozen(kw_only=True)
class IndexConfig:
    """One index."""

    rpc: ListenerConfig = attrs.field(
        factory=partial(_listener, "0.0.0.0", 7400),
        metadata=_meaning("Calls from other roles to the index."),
    )
    admin: HttpListenerConfig = attrs.field(
        factory=partial(_admin_listener, 7540),
        metadata=_meaning("Health, readiness, metrics and status of the index."),
    )
    api: ApiConfig = attrs.field(
        factory=lambda: ApiConfig(listen=Address("127.0.0.1", 7450)),
        metadata=_meaning("Preheating over HTTP, and what registries tell of pushes."),
    )
    backend: BackendConfig = attrs.field(
        factory=_default_backend,
        metadata=_meaning("Where the index keeps tags and repositories for good."),
    )
    name: str = attrs.field(
        default="",
        metadata=_meaning(
            "What names this index in the history of tags and in the order of changes; every index of "
            "every cluster has another one.",
            default="host name and port of index.rpc.listen",
        ),
    )
    lease: Duration = attrs.field(
        default=Duration(1.0),
        validator=_lease,
        metadata=_meaning(
            "How long an index may keep what it has read of a tag, and so how long a change waits for an "
            "index that does not answer; 0s to ask the backend every time. The same at every index, and "
            "only kept where cluster.indexes is set."
        ),
    )
    immutable: tuple[str, ...] = attrs.field(
        default=(),
        validator=_patterns,
        metadata=_meaning(
            "Repositories whose tags are neither moved nor deleted once they are there: a list of names in "
            "which * stands for anything but '/' and ** for anything. The same at every index.",
            default="none",
        ),
    )
    data_dir: Path = attrs.field(
        default=Path("swarmpull-data/index"),
        metadata=_meaning(
            "Directory for what the index has to remember and its backend does not have: changes while that "
            "is down, and what remotes were not told of yet. Each index has its own.",
            default="<data_dir>/index",
        ),
    )


# --- what all roles share -------------------------------------------------------------------------


def _members(role: str, by: str) -> dict[str, str]:
    return _meaning(
        f"The {role} of the cluster: a list of host:port, or dns+name:port for every address "
        f"of a name. Needed by {by}.",
        default="none; the local one in --role all",
    )


@attrs.frozen(kw_only=True)
class ClusterConfig:
    """Where the other roles are."""

    trackers: tuple[str, ...] = attrs.field(
        default=(), validator=_cluster_list, metadata=_members("trackers", "agent and origin")
    )
    origins: tuple[str, ...] = attrs.field(
        default=(),
        validator=_cluster_list,
        metadata=_members("origins (origin.rpc)", "agent, origin and tracker"),
    )
    indexes: tuple[str, ...] = attrs.field(
        default=(), validator=_cluster_list, metadata=_members("indexes", "agent and origin")
    )
    weights: tuple[str, ...] = attrs.field(
        default=(),
        validator=_weights,
        metadata=_meaning(
            "How much of the work some members take, as a list of host:port=weight; all others have 1. "
            "The same in every process.",
            default="none",
        ),
    )
    names: tuple[str, ...] = attrs.field(
        default=(),
        validator=_registry_names,
        metadata=_meaning(
            "Registries in ns= that mean this cluster itself; only needed where there are upstreams.",
            default="none",
        ),
    )

    def weights_by_member(self) -> dict[str, float]:
        """The weights by ``host:port``."""
        parts = (entry.rpartition("=") for entry in self.weights)
        return {member: float(weight) for member, _, weight in parts}


@attrs.frozen(kw_only=True)
class SwarmConfig:
    """Limits of the peer protocol, for agents and origins."""

    max_connections: int = attrs.field(
        default=30,
        validator=_at_least_one,
        metadata=_meaning("Peer connections per torrent that an agent takes."),
    )
    dial_connections: int = attrs.field(
        default=12,
        validator=_at_least_one,
        metadata=_meaning(
            "Peer connections per torrent up to which a host dials; "
            "the rest of max_connections is room for those who come later."
        ),
    )
    origin_max_connections: int = attrs.field(
        default=100,
        validator=_at_least_one,
        metadata=_meaning("Peer connections per torrent that an origin takes."),
    )
    max_total_connections: int = attrs.field(
        default=1000,
        validator=_at_least_one,
        metadata=_meaning("Peer connections of all torrents together."),
    )
    upload_slots: int = attrs.field(
        default=3,
        validator=_at_least_one,
        metadata=_meaning(
            "Pieces that an agent sends at the same time; "
            "few, because a piece that arrives sooner is passed on sooner."
        ),
    )
    origin_upload_slots: int = attrs.field(
        default=8,
        validator=_at_least_one,
        metadata=_meaning(
            "Pieces that an origin sends at the same time: "
            "as many as it takes agents to fill its uplink."
        ),
    )
    inbound_pieces: int = attrs.field(
        default=4,
        validator=_at_least_one,
        metadata=_meaning(
            "Pieces claimed and not yet received, over all torrents; "
            "up to twice as many where a round trip takes longer than a piece."
        ),
    )
    upload_rate: Rate = attrs.field(
        default=UNLIMITED,
        metadata=_meaning(
            "Bytes per second that a host sends to peers, such as 100MB/s, or unlimited; "
            "swarmpull rates changes it while the host runs."
        ),
    )
    download_rate: Rate = attrs.field(
        default=UNLIMITED,
        metadata=_meaning(
            "Bytes per second that a host takes from peers, such as 100MB/s, or unlimited; "
            "swarmpull rates changes it while the host runs."
        ),
    )


@attrs.frozen(kw_only=True)
class TlsConfig:
    """Mutual TLS between roles; all three files, or none of them for plain connections."""

    ca: str = attrs.field(
        default="",
        metadata=_meaning("File with the certificates of the authorities that are trusted."),
    )
    cert: str = attrs.field(
        default="",
        metadata=_meaning("File with the certificate of this host, which says what roles it has."),
    )
    key: str = attrs.field(
        default="", metadata=_meaning("File with its key, readable for this user only.")
    )
    peer: Switch = attrs.field(
        default="on",
        metadata=_meaning(
            "Whether pieces travel by TLS too; off: calls do, pieces are sent in plain. "
            "Must be the same on all hosts."
        ),
    )
    crl: str = attrs.field(
        default="",
        metadata=_meaning(
            "File with lists of revoked certificates (CRLs in PEM) of the authorities in tls.ca and "
            "tls.trusted: their holders are shut out, and cut off at once when a list changes."
        ),
    )
    trusted: tuple[TrustedClusterConfig, ...] = attrs.field(
        default=(),
        metadata=_meaning(
            "Other clusters that indexes and origins talk to, to replicate in either direction, one section "
            "for each."
        ),
    )

    @property
    def is_on(self) -> bool:
        return bool(self.ca)


@attrs.frozen(kw_only=True)
class LogConfig:
    """What is logged, and how it looks."""

    level: LogLevel = attrs.field(
        default="info", metadata=_meaning("The least important level that is logged.")
    )
    format: LogFormat = attrs.field(
        default="console",
        metadata=_meaning("Lines for people (console) or one JSON object per line (json)."),
    )


@attrs.frozen(kw_only=True)
class Config:
    """The whole configuration; ``Config()`` has every default."""

    data_dir: Path = attrs.field(
        default=Path("swarmpull-data"),
        metadata=_meaning(
            "Directory under which roles keep their data; --data-dir sets it too.",
            default="./swarmpull-data",
        ),
    )
    drain_timeout: Duration = attrs.field(
        default=Duration(10.0),
        metadata=_meaning(
            "How long ending may take after SIGTERM; requests have four fifths of it."
        ),
    )
    cluster: ClusterConfig = attrs.field(
        factory=ClusterConfig, metadata=_meaning("Where the other roles are.")
    )
    agent: AgentConfig = attrs.field(factory=AgentConfig, metadata=_meaning("The agent."))
    origin: OriginConfig = attrs.field(factory=OriginConfig, metadata=_meaning("The origin."))
    tracker: TrackerConfig = attrs.field(factory=TrackerConfig, metadata=_meaning("The tracker."))
    index: IndexConfig = attrs.field(factory=IndexConfig, metadata=_meaning("The index."))
    upstreams: tuple[UpstreamConfig, ...] = attrs.field(
        default=(),
        metadata=_meaning(
            "Other registries that are pulled through, one section for each. "
            "Agents need the names, origins everything."
        ),
    )
    remotes: tuple[RemoteConfig, ...] = attrs.field(
        default=(),
        metadata=_meaning("Other clusters that images are replicated to, one section for each."),
    )
    replications: tuple[ReplicationConfig, ...] = attrs.field(
        default=(),
        metadata=_meaning(
            "What is replicated to them, one section for each pattern; a repository goes to each remote of "
            "which a pattern matches. Indexes need both."
        ),
    )
    swarm: SwarmConfig = attrs.field(
        factory=SwarmConfig,
        metadata=_meaning("Limits of the peer protocol, for agents and origins."),
    )
    tls: TlsConfig = attrs.field(
        factory=TlsConfig,
        metadata=_meaning(
            "Mutual TLS between roles: ca, cert and key, or none of them; see security.md."
        ),
    )
    log: LogConfig = attrs.field(factory=LogConfig, metadata=_meaning("Logs, on standard error."))

    @property
    def names_security_files(self) -> bool:
        """Whether there are certificates or passwords to be looked at."""
        listeners = [
            getattr(getattr(self, role), name, None) for role in ROLES for name in HTTP_SECTIONS
        ]
        keys = ("tls_cert", "htpasswd")
        return self.tls.is_on or any(getattr(each, key, "") for each in listeners for key in keys)
