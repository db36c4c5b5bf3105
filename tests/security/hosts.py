"""Certificates of two clusters, and what roles make of them."""

from __future__ import annotations

import datetime as dt
import ssl
from pathlib import Path

import attrs
import pytest
from cryptography import x509
from cryptography.x509.oid import ExtensionOID

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

    def issue_unreadable(self, name: str, role: str) -> TlsFiles:
        """With one more name, a URI that is not UTF-8: authorities sign what they are given."""
        uri = f"swarmpull://{self.cluster}/{role}/{name}".encode()
        names = b"".join(bytes([0x86, len(each)]) + each for each in (uri, b"x:\xff\xfe"))
        alternative = x509.UnrecognizedExtension(
            ExtensionOID.SUBJECT_ALTERNATIVE_NAME, bytes([0x30, len(names)]) + names
        )
        add = x509.CertificateBuilder.add_extension

        def add_unreadable(builder: object, extension: object, *, critical: bool) -> object:
            is_names = isinstance(extension, x509.SubjectAlternativeName)
            return add(builder, alternative if is_names else extension, critical=critical)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(x509.CertificateBuilder, "add_extension", add_unreadable)
            return self.issue(name, role)


@attrs.frozen
class Fixed:
    """Contexts that no file changes any more."""

    current: Contexts | ssl.SSLContext


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
