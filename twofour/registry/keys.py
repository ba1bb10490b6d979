"""Keys that versions are signed with: Ed25519, as PEM files."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from twofour.core.errors import InputError
from twofour.core.writing import write_whole
from twofour.serve.repository.signatures import TrustedKeys, key_name

PUBLIC = ".pub"
_MOST_BYTES = 1 << 16
_FIX = "make a key: twofour registry keygen publish.pem"


@dataclass(frozen=True)
class NewKey:
    """A pair of keys.

    Attributes:
        private: file of the private key.
        public: file of the public one, for `twofour serve --trusted-keys`.
        name: of the key, as messages show it.
    """

    private: Path
    public: Path
    name: str


class Signer:
    """A private key.

    Args:
        path: of its PEM file, without a password.

    Raises:
        InputError: it cannot be read, or is of another kind.
    """

    def __init__(self, path: Path) -> None:
        """Reads the file."""
        try:
            with path.open("rb") as file:
                content = file.read(_MOST_BYTES)
        except OSError as e:
            raise InputError(f"{path} cannot be read", [e.strerror or str(e)], _FIX) from e
        try:
            key = load_pem_private_key(content, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as e:
            expected = "expected a private key as PEM, without a password"
            raise InputError(f"{path} is no key to sign with", [expected], _FIX) from e
        if not isinstance(key, Ed25519PrivateKey):
            found = f"expected Ed25519, got {type(key).__name__.strip('_')}"
            raise InputError(f"{path} is a key of another kind", [found], _FIX)
        self._key = key

    @property
    def public(self) -> TrustedKeys:
        """Its public key."""
        return TrustedKeys((_raw(self._key),))

    @property
    def name(self) -> str:
        """Of the key, as messages show it."""
        return key_name(_raw(self._key))

    def sign(self, content: bytes) -> bytes:
        """64 bytes."""
        return self._key.sign(content)


def new_key(path: Path) -> NewKey:
    """Writes a new pair: the private key for this user alone, the public one beside it as .pub.

    Args:
        path: of the private key; it must not be there.

    Raises:
        InputError: a file is there already, or cannot be written.
    """
    public = path.with_suffix(PUBLIC)
    taken = [str(each) for each in (path, public) if os.path.lexists(each)]
    if taken or public == path:
        reason = f"there already: {', '.join(taken)}" if taken else f"{PUBLIC} is the public key's"
        raise InputError(f"no key was written to {path}", [reason], "choose another name")
    key = Ed25519PrivateKey.generate()
    text = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    shown = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(text)
        write_whole(public, shown)
    except OSError as e:
        fix = "name a file in an existing folder that this user may write to"
        raise InputError(f"no key was written to {path}", [e.strerror or str(e)], fix) from e
    return NewKey(path, public, key_name(_raw(key)))


def _raw(key: Ed25519PrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
