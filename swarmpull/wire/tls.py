"""Mutual TLS between roles: contexts made from three files, handshakes, and what went wrong in words.

Both sides show a certificate, and both check that it is signed by the cluster's authority, counts now, and
is of the same cluster (`swarmpull.identity`), or of one that is trusted, for which other authorities may
vouch than for ours; the name of the host is not looked at, because roles are
dialled by whatever address the tracker or DNS gave.  What the other side may do is for its roles to say
(`swarmpull.wire.access`).  Only TLS 1.3 is spoken.

Bytes go through OpenSSL straight from and to the socket: no copy in memory in between, see `TlsStream`.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import socket
import ssl
import weakref
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final, TypeVar

import attrs
import structlog
import trio

from swarmpull.errors import CertificateError, TlsError
from swarmpull.identity import Identity
from swarmpull.watched_files import WatchedFiles
from swarmpull.wire.access import ForeignRules
from swarmpull.wire.frames import NOT_BOTH

log = structlog.get_logger()

_Read = TypeVar("_Read", bytes, int)

HANDSHAKE_TIMEOUT: Final = 10.0
# How long a side that was refused has to read why.
LINGER: Final = 2.0
# One complaint for each remote host in so many seconds, of so many hosts.
COMPLAIN_EVERY: Final = 60.0
COMPLAINTS_MAX: Final = 1024
# What a record adds to 16 KiB of payload, and those; TLS 1.3 allows no longer ones (RFC 8446, section 5.2).
RECORD_BYTES_MAX: Final = 16384 + 256 + 5
_RECORD_PAYLOAD: Final = 16384
_RECEIVE_BYTES: Final = 64 * 1024
_HANDSHAKE_RECORD: Final = b"\x16"
_PEM: Final = re.compile(
    "-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL | re.ASCII
)
# Of `ssl`'s own certificates, which have no public name before 3.13.
_ENCODING_DER: Final = 2


# --- contexts -------------------------------------------------------------------------------------


@attrs.frozen
class TlsFiles:
    """Paths of PEM files: the authorities, this host's certificate, its key."""

    ca: str
    cert: str
    key: str


@attrs.frozen
class Contexts:
    """What connections are made with, for both ends, and what they say about us.

    Attributes:
        server, client: of connections that come in, and that we dial.
        identity: who we are.
        expires_at: when our certificate ceases to count, in seconds since 1970.
        authorities: the certificates, in DER, of those who may vouch for each cluster that is known; empty
            where there is only our own, and all whom the contexts trust may.
        roots: the certificates, in DER, of all authorities, each of which may have a list of what it revoked.
        revokes: whether one of the certificates from the other side's to the authority's, in DER, is in such
            a list; None without any list.
        revoked_due_at: when the first of the lists should have been replaced, in seconds since 1970.
    """

    server: ssl.SSLContext
    client: ssl.SSLContext
    identity: Identity
    expires_at: float
    authorities: Mapping[str, frozenset[bytes]] = attrs.Factory(dict)
    roots: frozenset[bytes] = frozenset()
    revokes: Callable[[Sequence[bytes]], bool] | None = None
    revoked_due_at: float = math.inf


def load_contexts(files: TlsFiles, trusted: Mapping[str, str] | None = None) -> Contexts:
    """Read and try the files; blocking.

    ``trusted`` are other clusters, and for each the file with its authorities, or nothing if they are ours.

    The two ends shake hands with each other in memory, which finds what the others would: a key of another
    certificate, a wrong authority, a certificate that has expired.

    Raises:
        CertificateError: they cannot be used; names key and file.
    """
    extra = {cluster: file for cluster, file in (trusted or {}).items() if file}
    server = _context(ssl.PROTOCOL_TLS_SERVER, files, extra)
    client = _context(ssl.PROTOCOL_TLS_CLIENT, files, extra)
    # Nobody resumes sessions, and tickets that are not read turn a close into a reset.
    server.num_tickets = 0
    try:
        shown, authority = _own_certificate(server, client)
        identity = identity_of(shown)
    except ssl.SSLCertVerificationError as error:
        reason = f"{files.cert} is refused by {files.ca}: {error.verify_message}"
        raise CertificateError(reason, "tls.cert") from error
    except ssl.SSLError as error:
        raise CertificateError(f"{files.cert} is of no use: {error.reason}", "tls.cert") from error
    except TlsError as error:
        raise CertificateError(f"{files.cert} {error.reason}", "tls.cert") from error
    expires_at = ssl.cert_time_to_seconds(str(shown["notAfter"]))
    authorities: dict[str, frozenset[bytes]] = {}
    own = _certificates("tls.ca", files.ca)
    if trusted:
        for cluster in trusted:
            file = extra.get(cluster)
            authorities[cluster] = own if file is None else _certificates("tls.trusted", file)
        authorities[identity.cluster] = own
        if authority not in own:
            reason = f"{files.cert} is signed by an authority of another cluster, not by one of {files.ca}"
            raise CertificateError(reason, "tls.cert")
    roots = own.union(*authorities.values())
    return Contexts(server, client, identity, expires_at, authorities, roots)


def _certificates(name: str, path: str) -> frozenset[bytes]:
    """Those of a file, in DER.  Raises CertificateError."""
    try:
        return frozenset(ssl.PEM_cert_to_DER_cert(pem) for pem in _PEM.findall(_read(name, path)))
    except ValueError as error:
        raise CertificateError(f"{path} holds no certificate in PEM", name) from error


def _context(
    protocol: int, files: TlsFiles, trusted: Mapping[str, str] | None = None
) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_verify_locations(cadata=_read("tls.ca", files.ca))
    except (ssl.SSLError, ValueError) as error:
        raise CertificateError(f"{files.ca} holds no certificate in PEM", "tls.ca") from error
    for cluster, file in (trusted or {}).items():
        try:
            context.load_verify_locations(cadata=_read("tls.trusted", file))
        except (ssl.SSLError, ValueError) as error:
            reason = f"{file}, of cluster {cluster}, holds no certificate in PEM"
            raise CertificateError(reason, "tls.trusted") from error
    load_certificate(context, ("tls.cert", files.cert), ("tls.key", files.key))
    return context


def load_server_context(cert: tuple[str, str], key: tuple[str, str]) -> ssl.SSLContext:
    """The context of a listener for HTTPS; both are (key of the configuration, path); blocking.

    Raises:
        CertificateError: a file cannot be used; names key and file.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # Of TLS 1.2: clients could have us sign for ever.  OpenSSL 3 forbids it by itself, 1.1.1 does not.
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    load_certificate(context, cert, key)
    return context


def load_certificate(context: ssl.SSLContext, cert: tuple[str, str], key: tuple[str, str]) -> None:
    """Give a context its certificate; both are (key of the configuration, path).

    Raises:
        CertificateError: a file cannot be used.
    """
    for name, path in (cert, key):
        _read(name, path)
    try:
        # Without a password OpenSSL would ask for it on the terminal.
        context.load_cert_chain(cert[1], key[1], password="")
    except (ssl.SSLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or str(error)
        if reason == "KEY_VALUES_MISMATCH":
            raise CertificateError(f"{key[1]} is not the key of {cert[1]}", key[0]) from error
        raise CertificateError(
            f"{cert[1]} and {key[1]} are not a certificate and its key, in PEM and without a password",
            cert[0],
        ) from error


def _read(name: str, path: str) -> str:
    try:
        # Comments may be in any language; what they become has to be ASCII, which is all that `ssl` takes.
        with open(path, encoding="ascii", errors="backslashreplace") as file:
            return file.read()
    except OSError as error:
        raise CertificateError(f"{path} cannot be read: {error.strerror}", name) from error


def _own_certificate(
    server: ssl.SSLContext, client: ssl.SSLContext
) -> tuple[dict[str, object], bytes]:
    """Our certificate as others see it, and the one that vouches for it in the end, in DER."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (
        client.wrap_bio(to_client, to_server),
        server.wrap_bio(to_server, to_client, server_side=True),
    )
    # Two flights of the client and one of the server in between.
    for _ in range(2):
        for end in ends:
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
    return _shown_by(ends[1]), _authority_of(ends[1])


def _authority_of(connection: ssl.SSLSocket | ssl.SSLObject) -> bytes:
    """The certificate, in DER, on which the trust in the other side's rests."""
    return _chain_of(connection)[-1]


def _chain_of(connection: ssl.SSLSocket | ssl.SSLObject) -> list[bytes]:
    """The certificates, in DER, from the other side's to that of the authority."""
    # Public since 3.13; in 3.11 and 3.12 the same of the object inside.
    public = getattr(connection, "get_verified_chain", None)
    if public is not None:
        return list(map(bytes, public()))
    inside: Any = connection._sslobj  # type: ignore[union-attr]  # noqa: SLF001 - see above
    return [bytes(each.public_bytes(_ENCODING_DER)) for each in inside.get_verified_chain()]


def _is_revoked(connection: ssl.SSLSocket, contexts: Contexts) -> bool:
    """Whether the certificate of the other side, or who issued it, is in a list."""
    return contexts.revokes is not None and contexts.revokes(_chain_of(connection))


def _shown_by(connection: ssl.SSLSocket | ssl.SSLObject) -> dict[str, object]:
    """The certificate of the other side.  Raises TlsError."""
    try:
        return dict(connection.getpeercert() or {})
    except UnicodeDecodeError as error:
        # Authorities sign what they are given.
        raise TlsError("has names that are no text: issue another") from error


def identity_of(certificate: dict[str, object] | None) -> Identity:
    """Of a certificate as `ssl` shows it.  Raises TlsError."""
    names = (certificate or {}).get("subjectAltName", ())
    assert isinstance(names, tuple)
    try:
        return Identity.from_uris(value for kind, value in names if kind == "URI")
    except ValueError as error:
        raise TlsError(f"{error}: issue one with swarmpull certs issue --role") from error


def _identity_there(stream: TlsStream) -> Identity:
    try:
        return identity_of(_shown_by(stream.socket))
    except TlsError as error:
        raise TlsError(f"the certificate of the other side {error.reason}") from error


# --- a connection ---------------------------------------------------------------------------------


class TlsStream(trio.abc.Stream):
    """A connection after its handshake, on a socket of which OpenSSL itself reads and writes.

    One task may send while another receives.  A send that was cancelled leaves a record half written: the
    stream must not be sent on any more.  Cancelling a receive loses nothing.

    Methods raise trio.BrokenResourceError when the connection is lost, trio.ClosedResourceError after
    `aclose`, and `TlsError` when the other side says while we receive that it does not trust us: in TLS 1.3 a
    client hears of that only then.  A connection that ends without close_notify has ended all the same: every
    protocol here says by itself how long a message is, so one that was cut off is noticed.

    Attributes:
        socket: below; its address and its options are those of the connection.
    """

    def __init__(self, sock: ssl.SSLSocket) -> None:
        self.socket = sock
        self._failure: Exception | None = None

    def descriptor(self) -> int:
        """To wait for.  Raises trio.ClosedResourceError."""
        descriptor = self.socket.fileno()
        if descriptor < 0:
            raise trio.ClosedResourceError("this stream was closed meanwhile")
        return descriptor

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        with memoryview(data) as view:
            sent = 0
            while sent < len(view):
                sent += await self._send_some(view[sent:])

    async def _send_some(self, view: memoryview) -> int:
        """One record at the most."""
        while not (sent := self.send_now(view)):
            await trio.lowlevel.wait_writable(self.descriptor())
        return sent

    def send_now(self, data: bytes | memoryview) -> int:
        """Send one record at the most, if that need not wait; returns how many bytes of ``data`` it took.

        What comes after 0 bytes has to be the same data again.
        """
        self.descriptor()
        try:
            return self.socket.send(data)
        except ssl.SSLWantWriteError:
            return 0
        except ssl.SSLWantReadError:
            pass
        except (OSError, ValueError) as error:
            raise trio.BrokenResourceError(_reason(error)) from error
        # Not to be waited for: somebody receives, and nobody who means well ends a record there.
        raise trio.BrokenResourceError("the other side stopped inside a message of TLS itself")

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.wait_writable(self.descriptor())

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        size = _RECEIVE_BYTES if max_bytes is None else max_bytes
        while (data := self.receive_now(size)) is None:
            await trio.lowlevel.wait_readable(self.descriptor())
        return data

    def receive_now(self, size: int) -> bytes | None:
        """What is there, ``size`` bytes at the most; empty at the end, None when there is nothing now."""
        try:
            return self._read_records(size)
        except ssl.SSLWantReadError:
            return None

    @property
    def held(self) -> int:
        """How many bytes are left to receive of which the kernel does not know; 1 for an error."""
        return 1 if self._failure is not None else self.socket.pending()

    def _read_records(self, size: int) -> bytes:
        """What is there; OpenSSL gives one record at a time, and each turn of the event loop costs more."""
        if self._failure is not None:
            raise self._failure
        data = self._read(partial(self.socket.recv, min(size, _RECORD_PAYLOAD)))
        parts, left = [data], size - len(data)
        while data and left > 0:
            try:
                data = self._read(partial(self.socket.recv, min(left, _RECORD_PAYLOAD)))
            except ssl.SSLWantReadError:
                break
            except (TlsError, trio.BrokenResourceError) as error:
                # For the next call: what came before it counts.
                self._failure = error
                break
            parts.append(data)
            left -= len(data)
        return b"".join(parts)

    def read_into(self, view: memoryview) -> int:
        """Fill ``view`` from one record at the most; 0 when the other side has closed.

        Raises:
            ssl.SSLWantReadError: a whole record is not there yet.
        """
        return self._read(partial(self.socket.recv_into, view))

    def _read(self, read: Callable[[], _Read]) -> _Read:
        self.descriptor()
        try:
            return read()
        except ssl.SSLWantReadError:
            raise
        except ssl.SSLError as error:
            raise TlsError(explain(error)) from error
        except (OSError, ValueError) as error:
            raise trio.BrokenResourceError(_reason(error)) from error

    async def shake_hands(self) -> None:
        """Raises TlsError, with the reason in words, or what all methods do."""
        while True:
            descriptor = self.descriptor()
            try:
                self.socket.do_handshake()
            except ssl.SSLWantReadError:
                await trio.lowlevel.wait_readable(descriptor)
            except ssl.SSLWantWriteError:
                await trio.lowlevel.wait_writable(descriptor)
            except ssl.SSLEOFError as error:
                raise trio.BrokenResourceError("closed during the TLS handshake") from error
            except ssl.SSLError as error:
                raise TlsError(explain(error)) from error
            except (OSError, ValueError) as error:
                raise trio.BrokenResourceError(_reason(error)) from error
            else:
                return

    async def send_eof(self) -> None:
        """Nothing more will be sent; nothing must be received any more either: see `linger`."""
        await trio.lowlevel.checkpoint()
        self.descriptor()
        self._say_end()
        try:
            # SSLSocket's own would go on in plain text.
            socket.socket.shutdown(self.socket, socket.SHUT_WR)
        except OSError as error:
            raise trio.BrokenResourceError(_reason(error)) from error

    def cut(self) -> None:
        """End the connection; whoever uses the stream finds that out as if the other side had done it."""
        with contextlib.suppress(OSError, ValueError):
            socket.socket.shutdown(self.socket, socket.SHUT_RDWR)

    async def aclose(self) -> None:
        self.close_now()
        await trio.lowlevel.checkpoint()

    def close_now(self) -> None:
        """Close, as `aclose` does."""
        if self.socket.fileno() >= 0:
            self._say_end()
            trio.lowlevel.notify_closing(self.socket)
            self.socket.close()

    def _say_end(self) -> None:
        """Send close_notify, and do not wait for that of the other side.

        Without it the other side would take the end for an attack, and answer with an alert.
        """
        with contextlib.suppress(OSError, ValueError):
            self.socket.unwrap()

    async def linger(self) -> None:
        """Close when the other side has read what was sent, or `LINGER` seconds later.

        Closing with unread bytes resets the connection, and the other side may lose our last words.  What it
        still sends is thrown away as it comes.
        """
        try:
            with (
                trio.move_on_after(LINGER),
                contextlib.suppress(OSError, trio.BrokenResourceError, trio.ClosedResourceError),
            ):
                await self.send_eof()
                while await self._receive_raw():
                    # Whoever sends faster than we read must not have the event loop for itself.
                    await trio.lowlevel.checkpoint()
        finally:
            await trio.aclose_forcefully(self)

    async def _receive_raw(self) -> bytes:
        while True:
            try:
                return socket.socket.recv(self.socket, _RECEIVE_BYTES)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self.descriptor())


AnyStream = trio.SocketStream | TlsStream


def take_socket(
    stream: trio.SocketStream, context: ssl.SSLContext, *, server_side: bool
) -> ssl.SSLSocket:
    """Take the socket out of ``stream``, which is closed then; the handshake is still to be made.

    Raises:
        trio.BrokenResourceError: the connection is gone already.
    """
    try:
        raw = socket.socket(fileno=stream.socket.detach())
        raw.setblocking(False)
        return context.wrap_socket(raw, server_side=server_side, do_handshake_on_connect=False)
    except OSError as error:
        raise trio.BrokenResourceError(_reason(error)) from error


async def speaks_tls(stream: trio.SocketStream) -> bool:
    """Whether what arrives first is the beginning of TLS; nothing is taken.  Raises OSError.

    True when the other side closes without a word: that is for the handshake to find.
    """
    return await stream.socket.recv(1, socket.MSG_PEEK) in (b"", _HANDSHAKE_RECORD)


class Tls:
    """The certificates of one role; new connections use those that the files hold just now."""

    def __init__(
        self,
        files: WatchedFiles[Contexts],
        partner: str = "",
        foreign: ForeignRules | None = None,
    ) -> None:
        """``partner``: the cluster that is dialled, if it is another one than our own.

        ``foreign``: what others may do that are trusted.
        """
        self._files = files
        self._partner = partner
        self.foreign = foreign or ForeignRules()
        # Those whose handshake was good; who closes a stream need not say so here.
        self._open: weakref.WeakKeyDictionary[TlsStream, Identity] = weakref.WeakKeyDictionary()

    def towards(self, cluster: str) -> Tls:
        """The same certificates, to dial the roles of another cluster with."""
        other = Tls(self._files, cluster, self.foreign)
        other._open = self._open
        return other

    async def run(self) -> None:
        """Cut off whoever is revoked while connected, until cancelled."""
        while True:
            await self._files.renewed()
            self._cut_revoked(self._files.current)

    def _cut_revoked(self, contexts: Contexts) -> None:
        for stream, other in list(self._open.items()):
            sock = stream.socket
            # Without a version TLS has ended on both sides: there is nobody to ask, and nothing to cut.
            is_open = sock.fileno() >= 0 and sock.version() is not None
            if is_open and _is_revoked(sock, contexts):
                log.warning("connection_revoked", holder=str(other), reason=_revoked(other))
                stream.cut()

    @property
    def identity(self) -> Identity:
        return self._files.current.identity

    async def accept(self, stream: trio.SocketStream) -> tuple[TlsStream, Identity]:
        """Make the handshake of a connection that came in, which is closed if it fails.

        Raises:
            TlsError: the other side is not to be trusted, or does not trust us.
            trio.BrokenResourceError: the connection is lost.
        """
        return await self._greet(stream, self._files.current, server_side=True)

    async def connect(self, stream: trio.SocketStream) -> tuple[TlsStream, Identity]:
        """The same for a connection that we dialled."""
        return await self._greet(stream, self._files.current, server_side=False)

    async def _greet(
        self, stream: trio.SocketStream, contexts: Contexts, *, server_side: bool
    ) -> tuple[TlsStream, Identity]:
        context = contexts.server if server_side else contexts.client
        secured = TlsStream(take_socket(stream, context, server_side=server_side))
        try:
            await secured.shake_hands()
            other = _identity_there(secured)
            self._open[secured] = other
            return secured, other
        except TlsError:
            await secured.linger()
            raise
        except BaseException:
            await trio.aclose_forcefully(secured)
            raise

    def refuse(self, other: Identity, stream: TlsStream) -> str:
        """Why whoever is there, at the other end of ``stream``, is not whom we dial; empty when it is."""
        wanted = self._partner or self.identity.cluster
        if other.cluster == wanted:
            return self._refuse_certificate(other, stream)
        return (
            f"the certificate of {other} is of another cluster than {wanted}: "
            "name addresses of one cluster only"
        )

    def _refuse_certificate(self, other: Identity, stream: TlsStream) -> str:
        """Why the certificate of a cluster that we know is not believed; empty when it is."""
        if _is_revoked(stream.socket, self._files.current):
            return _revoked(other)
        authorities = self._files.current.authorities
        if not authorities or _authority_of(stream.socket) in authorities.get(other.cluster, ()):
            return ""
        return (
            f"the certificate of {other} is signed by an authority that may not vouch for that cluster: "
            "tls.ca and the ca of tls.trusted say which may"
        )

    def refuse_visitor(self, other: Identity, stream: TlsStream) -> str:
        """Why whoever is there, with a valid certificate, is still a stranger; empty when it is none.

        Those of other clusters that are trusted are none; what they may do is for their roles to say.
        """
        contexts = self._files.current
        if other.cluster == contexts.identity.cluster or other.cluster in contexts.authorities:
            return self._refuse_certificate(other, stream)
        return (
            f"the certificate of {other} is of another cluster than {contexts.identity.cluster}, and "
            "tls.trusted does not name it"
        )


# --- those who come in ----------------------------------------------------------------------------


class Complaints:
    """Warnings about hosts that cannot be talked to: one line for each, not one for each attempt."""

    def __init__(self) -> None:
        self._said: dict[str, float] = {}

    def warn(self, remote: str, reason: str, **about: str) -> None:
        """Say what is wrong with ``remote``, the address of a host without its port."""
        now = trio.current_time()
        if now < self._said.get(remote, now):
            return
        self._said.pop(remote, None)
        if len(self._said) >= COMPLAINTS_MAX:
            del self._said[next(iter(self._said))]
        self._said[remote] = now + COMPLAIN_EVERY
        log.warning("connection_not_trusted", remote=remote, reason=reason, **about)


class Entrance:
    """Where connections come in: TLS if the role has it, and a word for those who are turned away.

    Args:
        tls: None where connections are plain.
        tell: send last words in the protocol of the listener.
        refuse: why a known caller is not wanted here; empty when it is.
    """

    def __init__(
        self,
        tls: Tls | None,
        tell: Callable[[trio.abc.SendStream, str], Awaitable[None]],
        refuse: Callable[[Identity], str] = lambda _: "",
        **about: str,
    ) -> None:
        self._tls = tls
        self._tell = tell
        self._refuse = refuse
        self._about = about
        self._complaints = Complaints()

    @property
    def cluster(self) -> str:
        """Our own, by our certificate; empty without any."""
        return "" if self._tls is None else self._tls.identity.cluster

    @property
    def foreign(self) -> ForeignRules:
        """What callers of other clusters may ask for."""
        return ForeignRules() if self._tls is None else self._tls.foreign

    async def admit(self, stream: trio.SocketStream) -> tuple[AnyStream, Identity | None] | None:
        """The stream to be served, and who is there if that is known; None if nobody is to be served.

        Whoever is turned away is told why, as far as that is possible, and the log has a line.
        """
        if self._tls is None:
            return stream, None
        remote = "unknown"
        try:
            remote = stream.socket.getpeername()[0]
            with trio.fail_after(HANDSHAKE_TIMEOUT):
                return await self._secure(self._tls, stream)
        except TlsError as error:
            self.complain(remote, error.reason)
        except trio.TooSlowError:
            self.complain(remote, f"no TLS handshake within {HANDSHAKE_TIMEOUT:g} s")
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            log.info("handshake_broke_off", remote=remote, reason=str(error), **self._about)
        return None

    async def dismiss(self, stream: trio.SocketStream, words: bytes) -> None:
        """Tell somebody who may come in that there is no room; a plain ``stream`` stays open."""
        admitted = await self.admit(stream)
        if admitted is None:
            return
        if not isinstance(admitted[0], TlsStream):
            await stream.send_all(words)
            return
        try:
            await admitted[0].send_all(words)
            await admitted[0].linger()
        finally:
            await trio.aclose_forcefully(admitted[0])

    def complain(self, remote: str, reason: str) -> None:
        """Leave a line about a host, unless it has one already."""
        self._complaints.warn(remote, reason, **self._about)

    async def _secure(
        self, tls: Tls, stream: trio.SocketStream
    ) -> tuple[AnyStream, Identity | None]:
        if not await speaks_tls(stream):
            await self._turn_away(stream, NOT_BOTH)
        secured, caller = await tls.accept(stream)
        reason = tls.refuse_visitor(caller, secured) or self._refuse(caller)
        if reason:
            await self._turn_away(secured, reason)
        return secured, caller

    async def _turn_away(self, stream: AnyStream, reason: str) -> None:
        try:
            with (
                trio.move_on_after(LINGER),
                contextlib.suppress(OSError, trio.BrokenResourceError, trio.ClosedResourceError),
            ):
                await self._tell(stream, reason)
                if isinstance(stream, TlsStream):
                    await stream.linger()
                else:
                    await stream.send_eof()
                    while await stream.receive_some(_RECEIVE_BYTES):
                        pass
        finally:
            await trio.aclose_forcefully(stream)
        raise TlsError(reason)


# --- words ----------------------------------------------------------------------------------------

_PLAIN_TEXT: Final = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNKNOWN_PROTOCOL")
_SAME_CA: Final = (
    "tls.ca must be the same everywhere, and tls.trusted of each of two clusters have the authority of the "
    "other"
)


def _revoked(other: Identity) -> str:
    return (
        f"the certificate of {other} is revoked (tls.crl): issue another one if it should come in"
    )


_ALERTS: Final = {
    "CERTIFICATE_EXPIRED": "it has expired, or not begun: issue a new one, or set the clock",
    "UNKNOWN_CA": f"no authority there has signed it: {_SAME_CA}",
    "CERTIFICATE_REQUIRED": "it got none: set tls.cert and tls.key",
    "BAD_CERTIFICATE": "see the log there",
    "CERTIFICATE_UNKNOWN": "see the log there",
    "CERTIFICATE_REVOKED": "see the log there",
    "UNSUPPORTED_CERTIFICATE": "it may not be used so: issue one with swarmpull certs issue",
    "DECRYPT_ERROR": f"its signature is wrong: {_SAME_CA}",
}


def explain(error: ssl.SSLError) -> str:
    """What is wrong, and what to do."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the certificate of the other side is refused: {_verification(error)}"
    reason = error.reason or ""
    if reason in _PLAIN_TEXT:
        return NOT_BOTH
    if reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
        return "the other side shows no certificate: set tls.cert and tls.key there"
    _, alert, kind = reason.partition("_ALERT_")
    if alert and kind in _ALERTS:
        return f"the other side refuses our certificate: {_ALERTS[kind]}"
    return f"TLS failed: {reason.lower().replace('_', ' ') or error}"


def _verification(error: ssl.SSLCertVerificationError) -> str:
    message = error.verify_message
    if "expired" in message or "not yet valid" in message:
        return f"{message}: issue a new one, or set the clocks"
    return f"{message}: {_SAME_CA}"


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and not isinstance(error, ssl.SSLError) and error.errno:
        return os.strerror(error.errno)
    return str(error)
