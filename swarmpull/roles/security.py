"""The certificates of a role as its configuration names them."""

from __future__ import annotations

import ipaddress
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Final

import attrs
import structlog
import trio

from swarmpull.config import (
    HTTP_SECTIONS,
    ROLES,
    Config,
    HttpListenerConfig,
    ListenerConfig,
    RegistryConfig,
    TlsConfig,
)
from swarmpull.errors import CertificateError, Problem, StartupError
from swarmpull.patterns import compile_pattern
from swarmpull.registry.asgi import AsgiApp
from swarmpull.registry.htpasswd import Passwords, load_htpasswd, protect
from swarmpull.telemetry import Metrics
from swarmpull.watched_files import WatchedFiles
from swarmpull.wire.access import ForeignRules
from swarmpull.wire.tls import Contexts, Tls, TlsFiles, load_contexts, load_server_context

log = structlog.get_logger()

DAY: Final = 86400.0
# The roles that replicate between clusters; the empty one stands for all, when configurations are checked.
TALK_TO_OTHERS: Final = frozenset({"index", "origin", ""})
# From so many days before a certificate expires the log says so, once a day.
EXPIRY_WARNING_DAYS: Final = 14


@asynccontextmanager
async def open_tls(role: str, config: TlsConfig, metrics: Metrics) -> AsyncIterator[Tls | None]:
    """The certificates of ``role`` for the length of the block, renewed as the files are; None without any.

    Raises:
        StartupError: the files cannot be used, or the certificate is not for this role.
    """
    if not config.is_on:
        yield None
        return
    load = partial(_load, role, config)
    named = (config.ca, config.cert, config.key, config.crl, *_trusted(role, config).values())
    paths = tuple(filter(None, named))
    try:
        files = await WatchedFiles.open(paths, load)
    except CertificateError as error:
        raise StartupError(
            str(error), "swarmpull certs makes certificates, see docs/security.md"
        ) from error
    metrics.gauge(
        "tls_certificate_expires_timestamp_seconds",
        "When the certificate of this role expires, in seconds since 1970.",
    ).set_function(lambda: files.current.expires_at)
    tls = Tls(files, foreign=_foreign_rules(config))
    async with _beside(files.run, tls.run, partial(_warn_of_expiry, config, files)):
        yield tls


@attrs.frozen
class ListenerSecurity:
    """What one listener for HTTP has: a certificate, where it is HTTPS, and passwords."""

    certificate: WatchedFiles[ssl.SSLContext] | None = None
    passwords: Passwords | None = None
    everything: bool = False

    def protect(self, app: AsgiApp) -> AsgiApp:
        """The application behind what asks for passwords, if anything does."""
        if self.passwords is None:
            return app
        return protect(app, self.passwords, everything=self.everything)


@asynccontextmanager
async def open_listener_security(
    key: str, listener: ListenerConfig
) -> AsyncIterator[ListenerSecurity]:
    """Certificate and passwords of the listener with this key, for the length of the block.

    Raises:
        StartupError: a file cannot be used.
    """
    certificate = passwords = None
    watched: list[Callable[[], Awaitable[None]]] = []
    try:
        for paths, load in _listener_files(key, listener):
            files = await WatchedFiles.open(paths, load)
            watched.append(files.run)
            if isinstance(files.current, ssl.SSLContext):
                certificate = files
            else:
                passwords = Passwords(files)
    except CertificateError as error:
        raise StartupError(str(error), "docs/security.md says how it is made") from error
    everything = isinstance(listener, RegistryConfig) and listener.htpasswd_for == "all"
    if passwords is not None and certificate is None and not _is_loopback(listener.listen.host):
        log.warning("passwords_in_plain_text", listener=key, remedy=f"set {key}.tls_cert")
    async with _beside(*watched):
        yield ListenerSecurity(certificate, passwords, everything)


def _listener_files(
    key: str, listener: ListenerConfig
) -> Iterator[tuple[tuple[str, ...], Callable[[], Any]]]:
    """The files of a listener, and what reads them."""
    if isinstance(listener, HttpListenerConfig) and listener.tls_cert:
        cert, private = (f"{key}.tls_cert", listener.tls_cert), (f"{key}.tls_key", listener.tls_key)
        yield (cert[1], private[1]), partial(load_server_context, cert, private)
    if isinstance(listener, RegistryConfig) and listener.htpasswd:
        load = partial(load_htpasswd, listener.htpasswd, f"{key}.htpasswd")
        yield (listener.htpasswd,), load


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@asynccontextmanager
async def _beside(*tasks: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
    """Run tasks for the length of the block."""
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        for task in tasks:
            nursery.start_soon(task)
        try:
            yield
        except Exception as error:
            # Raised again outside: out of the nursery it would come wrapped in a group.
            failure = error
        finally:
            nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


def peer_tls(tls: Tls | None, config: TlsConfig) -> Tls | None:
    """What pieces travel with."""
    return tls if config.peer == "on" else None


def _foreign_rules(config: TlsConfig) -> ForeignRules:
    """What the clusters that are trusted may replicate to."""
    return ForeignRules(
        {
            each.cluster: tuple(map(compile_pattern, each.repositories))
            for each in config.trusted
            if each.repositories
        }
    )


def _trusted(role: str, config: TlsConfig) -> dict[str, str]:
    """The other clusters that a role talks to, and the files with their authorities."""
    if role in TALK_TO_OTHERS:
        return {each.cluster: each.ca for each in config.trusted}
    return {}


def _load(role: str, config: TlsConfig) -> Contexts:
    """``role`` may be empty: any that the certificate has."""
    files = TlsFiles(config.ca, config.cert, config.key)
    contexts = load_contexts(files, _trusted(role, config))
    if config.crl:
        # 8 MiB of memory, which a role without lists need not have.
        from swarmpull.certificates import read_revocations

        # One file serves all roles, and those that do not talk to other clusters need not know them.
        others = bool(config.trusted) and role not in TALK_TO_OTHERS
        lists = read_revocations(config.crl, contexts.roots, others=others)
        contexts = attrs.evolve(contexts, revokes=lists.revoke, revoked_due_at=lists.due_at)
    if role and role not in contexts.identity.roles:
        raise CertificateError(
            f"{files.cert} is of {contexts.identity}, which is no {role}: "
            f"issue one with swarmpull certs issue --role {role}",
            "tls.cert",
        )
    return contexts


async def _warn_of_expiry(config: TlsConfig, files: WatchedFiles[Contexts]) -> None:
    while True:
        now = time.time()
        days = (files.current.expires_at - now) / DAY
        if days < EXPIRY_WARNING_DAYS:
            log.warning("certificate_expires", file=config.cert, days=round(days, 1))
        if files.current.revoked_due_at < now:
            # It still counts: to let nobody in would be an outage by calendar.
            log.warning(
                "list_of_revoked_outdated", file=config.crl, remedy="put the next one there"
            )
        await trio.sleep(DAY)


def problems_with_files(
    config: Config, roles: frozenset[str], provenance: Mapping[str, str]
) -> Iterator[Problem]:
    """What is wrong with the files that the configuration names, for a process with these roles; blocking."""
    if config.tls.is_on:
        for role in sorted(roles) or [""]:
            try:
                contexts = _load(role, config.tls)
            except CertificateError as error:
                yield Problem(error.key, provenance.get(error.key, ""), error.reason)
                break
            if role in TALK_TO_OTHERS:
                yield from _problems_of_remotes(config, contexts, provenance)
                break
    for role in ROLES:
        if roles and role not in roles:
            continue
        for name in HTTP_SECTIONS:
            listener = getattr(getattr(config, role), name, None)
            if listener is not None:
                yield from _problems_of_listener(f"{role}.{name}", listener, provenance)


def _problems_of_remotes(
    config: Config, contexts: Contexts, provenance: Mapping[str, str]
) -> Iterator[Problem]:
    """Remotes whose certificates will not be believed, and what is trusted in any case."""
    for number, trusted in enumerate(config.tls.trusted):
        if trusted.cluster == contexts.identity.cluster:
            key = f"tls.trusted.{number}.cluster"
            reason = (
                f"{trusted.cluster} is the cluster of tls.cert itself: its roles trust one another, and "
                "nothing of this entry holds for them"
            )
            yield Problem(key, provenance.get(key, ""), reason)
    known = {contexts.identity.cluster, *(each.cluster for each in config.tls.trusted)}
    for number, remote in enumerate(config.remotes):
        if remote.name not in known:
            key = f"remotes.{number}.name"
            reason = (
                "must be the cluster that its certificates name, and tls.trusted has none that is called "
                f"{remote.name}: add an entry for it, or call the remote as its cluster"
            )
            yield Problem(key, provenance.get(key, ""), reason)


def _problems_of_listener(
    key: str, listener: ListenerConfig, provenance: Mapping[str, str]
) -> Iterator[Problem]:
    for _, load in _listener_files(key, listener):
        try:
            load()
        except CertificateError as error:
            yield Problem(error.key, provenance.get(error.key, ""), error.reason)
