"""A certificate authority in a directory, for one cluster: the only module that knows cryptography.

Running roles need it for lists of revoked certificates only, which Python's ``ssl`` hands to OpenSSL and
shows to nobody: they read certificates with OpenSSL.  Keys are ECDSA over P-256, which every
OpenSSL knows and which signs some ten times faster than RSA: peers connect often.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import ipaddress
import math
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Final

import attrs
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from swarmpull.errors import CertificateError
from swarmpull.identity import SCHEME, Identity, check_cluster, check_name

CA_DAYS: Final = 3650
CERTIFICATE_DAYS: Final = 365
# Certificates count from a little before they were made: the clocks of hosts differ.
BACKDATED: Final = dt.timedelta(minutes=10)
_LIST_BEGIN: Final = b"-----BEGIN X509 CRL-----"
_LIST: Final = re.compile(_LIST_BEGIN + b".+?-----END X509 CRL-----", re.DOTALL)


@attrs.frozen
class Written:
    """The two files of a certificate that was made."""

    certificate: Path
    key: Path


# An authority, by its name and its public key: while it is renewed it has several certificates.
AuthorityKey = tuple[bytes, bytes]


@attrs.frozen
class Revocations:
    """What lists of revoked certificates say.

    Attributes:
        serials: of the certificates that do not count any more, by the authority that issued them.
        due_at: when the first of the lists should have been replaced, in seconds since 1970.
    """

    serials: Mapping[AuthorityKey, frozenset[int]]
    due_at: float

    def revoke(self, chain: Sequence[bytes]) -> bool:
        """Whether one of some certificates, in DER and each before its issuer's, is in that one's list.

        So it is said of one that cannot be read: nobody knows that it is in none.
        """
        try:
            loaded = list(map(x509.load_der_x509_certificate, chain))
            return any(
                certificate.serial_number in self.serials.get(_key_of(issuer), ())
                for certificate, issuer in pairwise(loaded)
            )
        except ValueError:
            return True


@attrs.frozen
class _Authority:
    cluster: str
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def create_authority(
    directory: Path, cluster: str, *, days: int = CA_DAYS, force: bool = False
) -> Written:
    """Make ``ca.crt`` and ``ca.key`` of a new cluster in ``directory``, which is made if need be.

    Raises:
        CertificateError: they are there already, and ``force`` is not set; or the name is none.
        OSError: they cannot be written.
    """
    _checked(check_cluster, cluster)
    directory.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    name = _named(f"swarmpull CA of {cluster}")
    builder = (
        _begun(name, name, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"{SCHEME}://{cluster}/")]),
            critical=False,
        )
    )
    return _write(directory, "ca", builder.sign(key, hashes.SHA256()), key, force=force)


def issue(
    directory: Path,
    name: str,
    roles: Iterable[str],
    *,
    dns: Sequence[str] = (),
    ips: Sequence[str] = (),
    days: int = CERTIFICATE_DAYS,
    force: bool = False,
) -> Written:
    """Make ``NAME.crt`` and ``NAME.key``, signed by the authority of ``directory``.

    Args:
        directory: with ca.crt and ca.key.
        name: of the holder.
        roles: what it may be; none for a certificate that only HTTPS listeners can use.
        dns: names under which clients reach HTTPS listeners that use the certificate.
        ips: addresses likewise.
        days: for which it counts, unless its authority ends before.
        force: replace the files if they are there.

    Raises:
        CertificateError: there is no authority, or it has expired; a name is none; the files are there.
        OSError: they cannot be written.
    """
    _checked(check_name, name)
    if name == "ca":
        raise CertificateError("ca is the name of the authority itself: choose another")
    authority = _authority_of(directory)
    authority_ends = authority.certificate.not_valid_after_utc
    uris = Identity(authority.cluster, name, frozenset(roles)).uris()
    names = [
        *map(x509.UniformResourceIdentifier, uris),
        *(_dns_name(each) for each in dns),
        *(_ip_address(each) for each in ips),
    ]
    if not names:
        raise CertificateError("a certificate needs --role, or --dns or --ip for HTTPS listeners")
    key = ec.generate_private_key(ec.SECP256R1())
    builder = (
        # What outlived its authority would end with it, and its own date would warn nobody.
        _begun(_named(name), authority.certificate.subject, key.public_key(), days, authority_ends)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        # Every role is called and calls: whoever dials is the client.
        .add_extension(
            x509.ExtendedKeyUsage(
                [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
            ),
            critical=False,
        )
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()),
            critical=False,
        )
    )
    return _write(directory, name, builder.sign(authority.key, hashes.SHA256()), key, force=force)


# --- revocation -----------------------------------------------------------------------------------


def revoke(directory: Path, names: Iterable[str], serials: Iterable[str] = ()) -> Path:
    """Add certificates to ``ca.crl``, the list of what the authority of ``directory`` takes back.

    Without any, where there is no list yet, make one with nothing in it: for roles to be started with.

    Args:
        directory: with ca.crt and ca.key.
        names: of holders, whose NAME.crt is in the directory, or paths of certificates.
        serials: serial numbers, in hexadecimal, of certificates whose files are gone.

    Raises:
        CertificateError: there is no authority, or it has expired; or what is named is no certificate of it.
        OSError: the list cannot be written.
    """
    authority = _authority_of(directory)
    revoked = [_serial_of(authority, directory, name) for name in names]
    revoked += map(_serial_number, serials)
    path = directory / "ca.crl"
    if not revoked and path.exists():
        raise CertificateError("name what is to be revoked, or its --serial")
    now = _now()
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(authority.certificate.subject)
        .last_update(now - BACKDATED)
        # Nobody makes it anew on schedule; it counts for as long as what it takes back could.
        .next_update(authority.certificate.not_valid_after_utc)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()),
            critical=False,
        )
    )
    before = list(_revoked_before(authority, path))
    listed = {entry.serial_number for entry in before}
    new = [
        x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now).build()
        for serial in dict.fromkeys(revoked)
        if serial not in listed
    ]
    for entry in (*before, *new):
        builder = builder.add_revoked_certificate(entry)
    signed = builder.sign(authority.key, hashes.SHA256())
    _put(path, signed.public_bytes(serialization.Encoding.PEM), 0o644, replace=True)
    return path


def _revoked_before(authority: _Authority, path: Path) -> Iterator[x509.RevokedCertificate]:
    """The entries of the list that is there.  Raises CertificateError."""
    try:
        there = x509.load_pem_x509_crl(path.read_bytes())
    except FileNotFoundError:
        return
    except ValueError as error:
        raise CertificateError(f"{path} is no list of revoked certificates: {error}") from error
    if not there.is_signature_valid(authority.key.public_key()):
        raise CertificateError(f"{path} was not signed by this authority: move it away")
    yield from there


def _serial_of(authority: _Authority, directory: Path, name: str) -> int:
    path = directory / f"{name}.crt"
    if not path.exists():
        path = Path(name)
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
        certificate.verify_directly_issued_by(authority.certificate)
    except OSError as error:
        raise CertificateError(
            f"there is neither {directory / name}.crt nor {path} to be read ({error.strerror}): "
            "name a certificate, or its number with --serial"
        ) from error
    except (ValueError, TypeError, InvalidSignature) as error:
        raise CertificateError(f"{path} was not issued by this authority") from error
    if certificate == authority.certificate:
        raise CertificateError("an authority cannot take itself back: take it out of tls.ca")
    return certificate.serial_number


def _serial_number(text: str) -> int:
    """Of hexadecimal as openssl shows it, with colons or without."""
    try:
        number = int(text.replace(":", ""), 16)
    except ValueError as error:
        raise CertificateError(f"{text!r} is not a serial number in hexadecimal") from error
    # RFC 5280, section 4.1.2.2.
    if not 0 < number < 1 << 160:
        raise CertificateError(f"{text} is not a serial number: they have up to 20 bytes")
    return number


def read_revocations(
    path: str, authorities: Iterable[bytes], *, others: bool = False
) -> Revocations:
    """Read lists of revoked certificates; blocking.

    Args:
        path: a file with one list or more, in PEM.
        authorities: the certificates, in DER, of those whose lists count.
        others: pass over the lists of other ones, instead of refusing them.

    Raises:
        CertificateError: the file holds something else, or a list of somebody else.
    """
    try:
        content = Path(path).read_bytes()
        texts = _LIST.findall(content)
        lists = [x509.load_pem_x509_crl(text) for text in texts]
    except OSError as error:
        raise CertificateError(f"{path} cannot be read: {error.strerror}", "tls.crl") from error
    except ValueError as error:
        raise CertificateError(
            f"{path} holds a list that cannot be read: {error}", "tls.crl"
        ) from error
    if content.count(_LIST_BEGIN) != len(lists):
        # Somebody may be writing it just now, and who is in the other list must not come in meanwhile.
        raise CertificateError(f"{path} holds a list without its end", "tls.crl")
    if not lists:
        raise CertificateError(f"{path} holds no list of revoked certificates in PEM", "tls.crl")
    known = []
    for each in authorities:
        with contextlib.suppress(ValueError):  # OpenSSL takes some that this does not
            known.append(x509.load_der_x509_certificate(each))
    serials: dict[AuthorityKey, frozenset[int]] = {}
    for listing in lists:
        issuer = _issuer_of(listing, known)
        if issuer is None and others:
            continue
        if issuer is None:
            raise CertificateError(
                f"{path} holds a list of {listing.issuer.rfc4514_string()}, which no authority in tls.ca or "
                "tls.trusted has signed",
                "tls.crl",
            )
        found = frozenset(entry.serial_number for entry in listing)
        key = _key_of(issuer)
        serials[key] = serials.get(key, frozenset()) | found
    due = [each.next_update_utc.timestamp() for each in lists if each.next_update_utc is not None]
    return Revocations(serials, min(due, default=math.inf))


def _key_of(certificate: x509.Certificate) -> AuthorityKey:
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    try:
        public = certificate.public_key().public_bytes(serialization.Encoding.DER, form)
    except UnsupportedAlgorithm:
        public = b""  # no list of it can be compared with its key either
    return certificate.subject.public_bytes(), public


def _issuer_of(
    listing: x509.CertificateRevocationList, known: Iterable[x509.Certificate]
) -> x509.Certificate | None:
    """Who has signed a list, which a name alone does not say."""
    for certificate in known:
        if certificate.subject == listing.issuer:
            with contextlib.suppress(TypeError, ValueError, UnsupportedAlgorithm):
                if listing.is_signature_valid(certificate.public_key()):  # type: ignore[arg-type]
                    return certificate
    return None


# --- certificates ---------------------------------------------------------------------------------


def _begun(
    subject: x509.Name,
    issuer: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    days: int,
    end_max: dt.datetime | None = None,
) -> x509.CertificateBuilder:
    if days < 1:
        raise CertificateError(f"a certificate counts for at least one day: {days}")
    now = _now()
    try:
        end = now + dt.timedelta(days=days)
    except OverflowError:
        raise CertificateError(f"no calendar goes that far: {days} days") from None
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(end if end_max is None else min(end, end_max))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


def _named(name: str) -> x509.Name:
    # A common name has 64 characters at most; the whole name stands in the URIs.
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _authority_of(directory: Path) -> _Authority:
    """Raises CertificateError when there is none, or it counts no more."""
    certificate, key = directory / "ca.crt", directory / "ca.key"
    try:
        loaded = x509.load_pem_x509_certificate(certificate.read_bytes())
        loaded_key = serialization.load_pem_private_key(key.read_bytes(), None)
        names = loaded.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except FileNotFoundError as error:
        raise CertificateError(
            f"{error.filename} is not there: make an authority with swarmpull certs init, "
            "or name its directory with --dir"
        ) from error
    except (ValueError, TypeError, x509.ExtensionNotFound) as error:
        raise CertificateError(f"{directory} has no usable authority: {error}") from error
    clusters = [
        uri.removeprefix(f"{SCHEME}://").removesuffix("/")
        for uri in names.get_values_for_type(x509.UniformResourceIdentifier)
        if uri.startswith(f"{SCHEME}://")
    ]
    if len(clusters) != 1 or not isinstance(loaded_key, ec.EllipticCurvePrivateKey):
        raise CertificateError(f"{certificate} was not made by swarmpull certs init")
    if loaded_key.public_key() != loaded.public_key():
        raise CertificateError(f"{key} is not the key of {certificate}")
    if loaded.not_valid_after_utc <= _now():
        ended = loaded.not_valid_after_utc
        raise CertificateError(f"the authority expired on {ended:%F}: make another one")
    return _Authority(_checked(check_cluster, clusters[0]), loaded, loaded_key)


def _dns_name(text: str) -> x509.DNSName:
    try:
        return x509.DNSName(text.encode("idna").decode())
    except ValueError as error:
        raise CertificateError(f"{text!r} is not a host name: {error}") from error


def _ip_address(text: str) -> x509.IPAddress:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError as error:
        raise CertificateError(str(error)) from error


def _checked(check: Callable[[str], str], text: str) -> str:
    try:
        return check(text)
    except ValueError as error:
        raise CertificateError(str(error)) from error


# --- files ----------------------------------------------------------------------------------------


def _write(
    directory: Path,
    name: str,
    certificate: x509.Certificate,
    key: ec.EllipticCurvePrivateKey,
    *,
    force: bool,
) -> Written:
    written = Written(directory / f"{name}.crt", directory / f"{name}.key")
    for path in (written.key, written.certificate):
        if path.exists() and not force:
            raise CertificateError(f"{path} is there already: --force replaces it")
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    # A role that looks in between finds a key that does not fit, and keeps what it had.
    _put(written.key, private, 0o600, replace=force)
    _put(
        written.certificate,
        certificate.public_bytes(serialization.Encoding.PEM),
        0o644,
        replace=force,
    )
    return written


def _put(path: Path, content: bytes, mode: int, *, replace: bool) -> None:
    """Make a file that is whole from its first moment, and never readable for more than ``mode`` says."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            temporary.replace(path)
        else:
            # Unlike a rename it fails when somebody else has made the file meanwhile.
            path.hardlink_to(temporary)
    except FileExistsError as error:
        raise CertificateError(f"{path} is there already: --force replaces it") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
