"""Certificates of two clusters, and what roles make of them."""

from __future__ import annotations

import datetime as dt
import ssl
from pathlib import Path

import attrs
import pytest

from swarmpull import certificates
from swarmpull.config import TlsConfig
from swarmpull.identity import Identity
from swarmpull.watched_files import WatchedFiles
from swarmpull.wire.tls import Contexts, Tls, TlsFiles, _context, load_contexts

ALL = ("agent", "origin", "tracker", "index")


@attrs.frozen
class Authority:
    """One authority and what it has issued."""

    directory: Path
    cluster: str

    @classmethod
    def create(cls, directory: Path, cluster: str) -> Authority:
        certificates.create_authority(directory, cluster)
        return cls(directory, cluster)

    def issue(self, name: str, *roles: str, force: bool = False, **more: object) -> TlsFiles:
        written = certificates.issue(self.directory, name, roles, force=force, **more)
        return TlsFiles(str(self.directory / "ca.crt"), str(written.certificate), str(written.key))

    def issue_expired(self, name: str, *roles: str) -> TlsFiles:
        long_ago = dt.datetime.now(dt.UTC) - dt.timedelta(days=100)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(certificates, "_now", lambda: long_ago)
            return self.issue(name, *roles, days=10)


@attrs.frozen
class Fixed:
    """Contexts that no file changes any more."""

    current: Contexts


def tls_of(files: TlsFiles) -> Tls:
    return Tls(WatchedFiles((files.ca, files.cert, files.key), lambda: load_contexts(files)))


def unchecked(files: TlsFiles, cluster: str, name: str, *roles: str) -> Tls:
    """Of files that no role would start with."""
    identity = Identity(cluster, name, frozenset(roles))
    server = _context(ssl.PROTOCOL_TLS_SERVER, files)
    server.num_tickets = 0
    client = _context(ssl.PROTOCOL_TLS_CLIENT, files)
    return Tls(Fixed(Contexts(server, client, identity, 0.0)))  # type: ignore[arg-type]


def config_of(files: TlsFiles, **more: str) -> TlsConfig:
    return TlsConfig(ca=files.ca, cert=files.cert, key=files.key, **more)
