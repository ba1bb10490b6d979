"""Ed25519 signatures over manifests: which public keys a server trusts.

TRUSTED    one or several public keys as PEM, one after the other, as `twofour registry keygen`
           and `openssl pkey -pubout` write them
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

from twofour.core.errors import InputError
from twofour.serve.repository.manifest import SIGNATURE_BYTES

_MOST_BYTES = 1 << 20
_PEM = re.compile(rb"-----BEGIN PUBLIC KEY-----.*?-----END PUBLIC KEY-----", re.DOTALL)
_KEYGEN = "make one: twofour registry keygen publish.pem, which writes publish.pub too"


@dataclass(frozen=True)
class TrustedKeys:
    """Public keys that versions may be signed by; a `Trust`, and plain data: it can be pickled.

    Attributes:
        keys: of 32 bytes each.
    """

    keys: tuple[bytes, ...]

    def __call__(self, content: bytes, signature: bytes) -> bool:
        """Whether a signature over a content is by one of the keys."""
        return self.signer(content, signature) is not None

    def signer(self, content: bytes, signature: bytes) -> str | None:
        """The name of the key that signed a content; None where it is none of these."""
        if len(signature) != SIGNATURE_BYTES:
            return None
        for key in self.keys:
            try:
                Ed25519PublicKey.from_public_bytes(key).verify(signature, content)
            except InvalidSignature:
                continue
            return key_name(key)
        return None


def key_name(key: bytes) -> str:
    """A public key as messages name it: 16 hexadecimal digits of its SHA-256."""
    return hashlib.sha256(key).hexdigest()[:16]


def read_trusted_keys(path: Path) -> TrustedKeys:
    """Reads a file of public keys.

    Raises:
        InputError: it cannot be read, has no key, or one that is not Ed25519.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except OSError as e:
        raise InputError(f"{path} cannot be read", [e.strerror or str(e)], _KEYGEN) from e
    blocks = _PEM.findall(content)
    if not blocks or len(content) > _MOST_BYTES or b"PRIVATE KEY" in content:
        found = "a private key" if b"PRIVATE KEY" in content else f"{len(blocks)} public keys"
        reason = f"expected PEM public keys, up to {_MOST_BYTES} bytes, got {found}"
        raise InputError(f"{path} is no file of trusted keys", [reason], _KEYGEN)
    return TrustedKeys(tuple(_public(path, block) for block in blocks))


def _public(path: Path, block: bytes) -> bytes:
    """The 32 bytes of a key.

    Raises:
        InputError: damaged, or of another kind.
    """
    try:
        key = load_pem_public_key(block)
    except (ValueError, UnsupportedAlgorithm) as e:
        raise InputError(f"{path} has a key that cannot be read", [str(e)], _KEYGEN) from e
    if not isinstance(key, Ed25519PublicKey):
        reason = f"expected Ed25519, got {type(key).__name__.strip('_')}"
        raise InputError(f"{path} has a key of another kind", [reason], _KEYGEN)
    return key.public_bytes(Encoding.Raw, PublicFormat.Raw)
