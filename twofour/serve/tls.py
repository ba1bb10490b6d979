"""Certificates for HTTPS and for gRPC from files, checked before the server starts.

The check is a handshake in memory with the files themselves: a key that does not belong to its
certificate, or a certificate that no client would take, is found here and not by the first client.
"""

from __future__ import annotations

import os
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from twofour.core.errors import InputError

MOST_FILE_BYTES = 1 << 20
SOON_DAYS = 14
_EXPIRED, _NOT_YET, _WRONG_USE = 10, 9, 26
"""Results of a verification, as OpenSSL's x509_vfy.h numbers them."""


@dataclass(frozen=True)
class TlsFiles:
    """PEM files.

    Attributes:
        cert: the server's certificate, then those between it and its root.
        key: of the certificate, without a password.
        client_ca: roots of clients' certificates; None: clients need none.
    """

    cert: Path
    key: Path
    client_ca: Path | None = None


@dataclass(frozen=True)
class Tls:
    """What a server speaks TLS with.

    Attributes:
        context: for HTTPS; TLS 1.2 and later.
        grpc_context: for gRPC, likewise.
        cert, key, client_ca: contents of the files; `client_ca` None: clients need no certificate.
        warnings: a line each: expired, about to, not yet valid, not for servers.
    """

    context: ssl.SSLContext
    grpc_context: ssl.SSLContext
    cert: bytes
    key: bytes
    client_ca: bytes | None
    warnings: tuple[str, ...]


def load_tls(files: TlsFiles) -> Tls:
    """Reads and checks the files.

    Raises:
        InputError: a file is missing, cannot be read or is no PEM, or the key is another's.
    """
    cert, key = _read(files.cert, "certificate"), _read(files.key, "key")
    client_ca = None if files.client_ca is None else _read(files.client_ca, "client CA")
    contexts = _context(files, "http/1.1"), _context(files, "h2")
    for context in contexts:
        if files.client_ca is not None:
            try:
                context.load_verify_locations(files.client_ca)
            except ssl.SSLError as e:
                raise _unusable(f"no certificates in {files.client_ca}", e) from e
            context.verify_mode = ssl.CERT_REQUIRED
    return Tls(*contexts, cert, key, client_ca, _warnings(files))


def renewed(tls: Tls, files: TlsFiles) -> Tls:
    """The same, with what the files hold now: for handshakes to come, of servers that listen.

    Connections go on with what they began with. Roots of clients' certificates stay what they are.

    Raises:
        InputError: the files cannot be used; nothing has changed.
    """
    found = load_tls(files)
    if (found.cert, found.key) == (tls.cert, tls.key):
        return tls
    with _in_memory(found.cert) as cert, _in_memory(found.key) as key:
        _context(TlsFiles(cert, key), "h2")  # these bytes, whatever the files have become
        for context in (tls.context, tls.grpc_context):
            context.load_cert_chain(cert, key, password=_no_password)
    return replace(tls, cert=found.cert, key=found.key, warnings=found.warnings)


@contextmanager
def _in_memory(content: bytes) -> Iterator[Path]:
    """A file that no disk has: OpenSSL reads files only."""
    handle = os.memfd_create("tls")
    try:
        os.write(handle, content)
        yield Path(f"/proc/self/fd/{handle}")
    finally:
        os.close(handle)


def _context(files: TlsFiles, protocol: str) -> ssl.SSLContext:
    """A server's, for one protocol by its name in ALPN."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols([protocol])
    try:
        context.load_cert_chain(files.cert, files.key, password=_no_password)
    except ssl.SSLError as e:
        if e.reason == "KEY_VALUES_MISMATCH":
            raise _unusable(f"{files.key} is not the key of {files.cert}", e) from e
        what = f"cannot use the certificate {files.cert} with the key {files.key}"
        raise _unusable(what, e) from e
    except InputError:
        raise
    return context


def _no_password() -> str:
    fix = "write the key without a password: openssl pkey -in KEY -out PLAIN"
    raise InputError("the TLS key has a password", ["the server cannot ask for it"], fix)


def _read(path: Path, what: str) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(MOST_FILE_BYTES + 1)
    except OSError as e:
        raise InputError(f"cannot read the TLS {what} {path}", [str(e)], "name a PEM file") from e
    if len(content) > MOST_FILE_BYTES or b"-----BEGIN " not in content:
        reason = f"expected PEM text of at most {MOST_FILE_BYTES} bytes"
        raise InputError(f"the TLS {what} {path} is no PEM file", [reason], "name a PEM file")
    return content


def _unusable(what: str, e: ssl.SSLError) -> InputError:
    reason = f"OpenSSL says {e.reason or e}"
    return InputError(what, [reason], "name PEM files: a certificate chain, and its own key")


def _warnings(files: TlsFiles) -> tuple[str, ...]:
    """What a client that trusts the certificate itself says to it."""
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_flags |= ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN
    client.load_verify_locations(files.cert)
    try:
        until = _shake_hands(_context(files, "h2"), client)
    except ssl.SSLCertVerificationError as e:
        said = {
            _EXPIRED: "has expired: clients will refuse it",
            _NOT_YET: "is not valid yet: clients will refuse it",
            _WRONG_USE: "is not for servers: clients will refuse it",
        }
        text = said.get(e.verify_code, f"may be refused: {e.verify_message}")
        return (f"the TLS certificate {files.cert} {text}",)
    days = (until - time.time()) / 86_400
    if days < SOON_DAYS:
        return (f"the TLS certificate {files.cert} expires in {days:.1f} days",)
    return ()


def _shake_hands(server: ssl.SSLContext, client: ssl.SSLContext) -> float:
    """A handshake in memory; when the certificate expires, in seconds since 1970.

    Raises:
        ssl.SSLCertVerificationError: the client does not take the certificate.
    """
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = server.wrap_bio(to_server, to_client, server_side=True)
    theirs = client.wrap_bio(to_client, to_server)
    done = [False, False]
    while not all(done):
        for at, side in enumerate((theirs, ours)):
            if not done[at]:
                try:
                    side.do_handshake()
                    done[at] = True
                except ssl.SSLWantReadError:
                    continue
    certificate = theirs.getpeercert() or {}
    return ssl.cert_time_to_seconds(str(certificate["notAfter"]))
