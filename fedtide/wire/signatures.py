"""Ed25519 keys. Every signature covers a domain string, so one message never passes for another kind."""

import binascii
import os
import re
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedtide.wire.errors import BadSignature

UPDATE_DOMAIN: Final = b"fedtide/1/update\0"
PLAN_DOMAIN: Final = b"fedtide/1/plan\0"
HEAD_DOMAIN: Final = b"fedtide/1/head\0"
COORDINATOR_DOMAIN: Final = b"fedtide/1/coordinator\0"
DOWN_DOMAIN: Final = b"fedtide/1/down\0"

SIGNATURE_BYTES: Final = 64
_KEY_BYTES: Final = 32
_PEM: Final = re.compile(rb"-----BEGIN PRIVATE KEY-----\s+([A-Za-z0-9+/]{64})\s+-----END PRIVATE KEY-----\s*")
_PKCS8: Final = bytes.fromhex("302e020100300506032b657004220420")
"""What stands before an Ed25519 key in PKCS #8 (RFC 8410, section 7)."""


class PublicKey:
    """Checks signatures. Written as 64 hexadecimal digits."""

    def __init__(self, raw: bytes) -> None:
        if len(raw) != _KEY_BYTES:
            raise ValueError(f"a public key is {_KEY_BYTES} bytes, not {len(raw)}")
        self.raw = raw
        self._key = Ed25519PublicKey.from_public_bytes(raw)

    def verify(self, domain: bytes, content: bytes, signature: bytes) -> None:
        """Return if ``signature`` is this key's over domain and content.

        Raises:
            BadSignature: it is not.
        """
        try:
            self._key.verify(signature, domain + content)
        except InvalidSignature as error:
            raise BadSignature(f"the signature is not by key {self}") from error

    @classmethod
    def parse(cls, text: str) -> "PublicKey":
        """Read 64 hexadecimal digits.

        Raises:
            ValueError: anything else.
        """
        try:
            raw = bytes.fromhex(text.strip())
        except ValueError as error:
            raise ValueError(f"a public key is 64 hexadecimal digits, not {text.strip()[:80]!r}") from error
        return cls(raw)

    @classmethod
    def load(cls, path: Path) -> "PublicKey":
        """Read a public key file.

        Raises:
            ValueError: the file does not hold one.
        """
        return cls.parse(path.read_text())

    def __str__(self) -> str:
        return self.raw.hex()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PublicKey) and self.raw == other.raw

    def __hash__(self) -> int:
        return hash(self.raw)


class SigningKey:
    """Signs. Stored as a PEM file that only its owner can read."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public = PublicKey(key.public_key().public_bytes_raw())

    def sign(self, domain: bytes, content: bytes) -> bytes:
        """The 64-byte signature over domain and content."""
        return self._key.sign(domain + content)

    @classmethod
    def generate(cls) -> "SigningKey":
        """A new key from the system's randomness."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def from_seed(cls, seed: bytes) -> "SigningKey":
        """The key of a 32-byte seed; for tests and simulated devices only."""
        return cls(Ed25519PrivateKey.from_private_bytes(seed))

    @classmethod
    def load(cls, path: Path) -> "SigningKey":
        """Read a key file.

        Raises:
            ValueError: the file is not an Ed25519 key in PEM.
        """
        content = path.read_bytes()
        plain = _PEM.fullmatch(content)
        if plain and (encoded := binascii.a2b_base64(plain[1])).startswith(_PKCS8):
            return cls.from_seed(encoded[len(_PKCS8) :])
        # Only for other forms: importing this takes a tenth of an agent's start.
        from cryptography.hazmat.primitives import serialization  # noqa: PLC0415

        key = serialization.load_pem_private_key(content, password=None)
        if not isinstance(key, Ed25519PrivateKey):
            raise ValueError(f"{path} holds another kind of key; an Ed25519 key is needed")  # noqa: TRY004
        return cls(key)

    def save(self, path: Path) -> None:
        """Write the key with mode 0600, and beside it the public key as ``<name>.pub``.

        Raises:
            FileExistsError: a key is never overwritten.
        """
        encoded = binascii.b2a_base64(_PKCS8 + self._key.private_bytes_raw())
        pem = b"-----BEGIN PRIVATE KEY-----\n" + encoded + b"-----END PRIVATE KEY-----\n"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(pem)
        path.with_suffix(".pub").write_text(f"{self.public}\n")
