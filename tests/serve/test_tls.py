from __future__ import annotations

import socket
import ssl
import subprocess
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from twofour.core.errors import InputError
from twofour.serve.tls import TlsFiles, load_tls, renewed


def openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


def make(folder: Path, name: str, *more: str) -> TlsFiles:
    cert, key = folder / f"{name}.crt", folder / f"{name}.key"
    openssl(
        *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"),
        *("-keyout", key, "-out", cert, "-subj", "/CN=localhost"),
        *("-addext", "subjectAltName=DNS:localhost", *(more or ("-days", "30"))),
    )
    return TlsFiles(cert, key)


def expired(folder: Path) -> TlsFiles:
    """A certificate whose last day was in 2021."""
    files = make(folder, "old")
    request, index = folder / "old.csr", folder / "index.txt"
    openssl("req", "-new", "-key", files.key, "-subj", "/CN=localhost", "-out", request)
    index.write_text("")
    config = folder / "ca.cnf"
    config.write_text(
        f"[ca]\ndefault_ca=x\n[x]\ndatabase={index}\nnew_certs_dir={folder}\nrand_serial=yes\n"
        "default_md=sha256\npolicy=p\n[p]\ncommonName=supplied\n"
    )
    openssl(
        *("ca", "-batch", "-selfsign", "-config", config, "-keyfile", files.key, "-in", request),
        *("-startdate", "20200101000000Z", "-enddate", "20210101000000Z", "-out", files.cert),
        "-notext",
    )
    return files


def exchange(server: ssl.SSLContext, client: ssl.SSLContext) -> bytes:
    """What a client reads over a real connection."""
    listener = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        connection, _ = listener.accept()
        try:
            with server.wrap_socket(connection, server_side=True) as secure:
                secure.sendall(b"hello")
        except ssl.SSLError:
            connection.close()

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        with (
            socket.create_connection(listener.getsockname(), timeout=10) as plain,
            client.wrap_socket(plain, server_hostname="localhost") as secure,
        ):
            return secure.recv(100)
    finally:
        thread.join()
        listener.close()


def test_good_files_serve_without_a_warning(tmp_path: Path) -> None:
    files = make(tmp_path, "a")
    tls = load_tls(files)
    assert tls.warnings == ()
    assert tls.cert == files.cert.read_bytes()
    assert tls.key == files.key.read_bytes()
    assert exchange(tls.context, ssl.create_default_context(cafile=files.cert)) == b"hello"


def test_a_client_ca_shuts_out_clients_without_certificate(tmp_path: Path) -> None:
    files, client = make(tmp_path, "a"), make(tmp_path, "client")
    tls = load_tls(replace(files, client_ca=client.cert))
    assert tls.client_ca == client.cert.read_bytes()
    context = ssl.create_default_context(cafile=files.cert)
    with pytest.raises((ssl.SSLError, ConnectionError)):
        assert exchange(tls.context, context) != b""
    context.load_cert_chain(client.cert, client.key)
    assert exchange(tls.context, context) == b"hello"


def test_new_files_are_for_handshakes_to_come(tmp_path: Path) -> None:
    """In the contexts that servers have already; and what cannot be used changes nothing."""
    files, other = make(tmp_path, "a"), make(tmp_path, "b")
    tls = load_tls(files)
    assert renewed(tls, files) is tls
    old = files.cert.read_bytes()
    files.cert.write_bytes(other.cert.read_bytes())  # and not yet its key
    with pytest.raises(InputError, match=r"a\.key is not the key of .*a\.crt"):
        renewed(tls, files)
    (tmp_path / "old.crt").write_bytes(old)
    trusts_old = ssl.create_default_context(cafile=tmp_path / "old.crt")
    assert exchange(tls.context, trusts_old) == b"hello"
    files.key.write_bytes(other.key.read_bytes())
    found = renewed(tls, files)
    assert (found.cert, found.key) == (other.cert.read_bytes(), other.key.read_bytes())
    for before, after in ((tls.context, found.context), (tls.grpc_context, found.grpc_context)):
        assert after is before
        assert exchange(after, ssl.create_default_context(cafile=other.cert)) == b"hello"
    with pytest.raises((ssl.SSLError, ConnectionError)):
        exchange(tls.context, trusts_old)


def test_another_certificates_key_is_refused(tmp_path: Path) -> None:
    a, b = make(tmp_path, "a"), make(tmp_path, "b")
    with pytest.raises(InputError, match=r"b\.key is not the key of .*a\.crt"):
        load_tls(TlsFiles(a.cert, b.key))


def test_missing_and_unreadable_files_are_named(tmp_path: Path) -> None:
    files = make(tmp_path, "a")
    with pytest.raises(InputError, match=r"certificate .*none\.crt"):
        load_tls(replace(files, cert=tmp_path / "none.crt"))
    with pytest.raises(InputError, match=r"TLS key .*"):
        load_tls(replace(files, key=tmp_path))
    with pytest.raises(InputError, match=r"client CA .*none\.crt"):
        load_tls(replace(files, client_ca=tmp_path / "none.crt"))


@pytest.mark.parametrize(
    "content", [b"", b"\x00" * 100, b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----"]
)
def test_what_is_no_pem_is_refused(tmp_path: Path, content: bytes) -> None:
    files = make(tmp_path, "a")
    (tmp_path / "bad").write_bytes(content)
    for wrong in ({"cert": tmp_path / "bad"}, {"client_ca": tmp_path / "bad"}):
        with pytest.raises(InputError, match="bad"):
            load_tls(replace(files, **wrong))


def test_a_key_with_a_password_is_refused_and_nobody_is_asked(tmp_path: Path) -> None:
    files = make(tmp_path, "a")
    locked = tmp_path / "locked.key"
    openssl("pkey", "-in", files.key, "-aes256", "-passout", "pass:secret", "-out", locked)
    with pytest.raises(InputError, match="has a password"):
        load_tls(replace(files, key=locked))


def test_expired_certificates_serve_with_a_warning(tmp_path: Path) -> None:
    tls = load_tls(expired(tmp_path))
    assert "has expired" in tls.warnings[0]


def test_certificates_that_expire_soon_are_warned_of(tmp_path: Path) -> None:
    assert "expires in" in load_tls(make(tmp_path, "a", "-days", "3")).warnings[0]


def test_certificates_for_clients_alone_are_warned_of(tmp_path: Path) -> None:
    use = ("-days", "30", "-addext", "extendedKeyUsage=clientAuth")
    assert "not for servers" in load_tls(make(tmp_path, "a", *use)).warnings[0]
