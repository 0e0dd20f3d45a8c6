import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key

from fedtide.wire.errors import BadSignature
from fedtide.wire.signatures import HEAD_DOMAIN, PublicKey, SigningKey

# RFC 8032, section 7.1, test 1: the empty message.
RFC_SEED = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
RFC_PUBLIC = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
RFC_SIGNATURE = bytes.fromhex(
    "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e06522490155"
    "5fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b"
)


def test_keys_and_signatures_are_those_of_rfc_8032() -> None:
    key = SigningKey.from_seed(RFC_SEED)
    assert str(key.public) == RFC_PUBLIC
    assert key.sign(b"", b"") == RFC_SIGNATURE


def test_a_signature_holds_for_its_own_domain_and_content_only() -> None:
    key = SigningKey.from_seed(RFC_SEED)
    signature = key.sign(HEAD_DOMAIN, b"content")
    key.public.verify(HEAD_DOMAIN, b"content", signature)
    for domain, content, candidate in [
        (b"another", b"content", signature),
        (HEAD_DOMAIN, b"other content", signature),
        (HEAD_DOMAIN, b"content", bytes(64)),
        (HEAD_DOMAIN, b"content", signature[:-1]),
        (HEAD_DOMAIN, b"content", b""),
    ]:
        with pytest.raises(BadSignature, match=RFC_PUBLIC):
            key.public.verify(domain, content, candidate)


def test_public_keys_are_read_from_64_hexadecimal_digits() -> None:
    key = PublicKey.parse(f"  {RFC_PUBLIC.upper()}\n")
    assert key == SigningKey.from_seed(RFC_SEED).public
    assert {key} == {SigningKey.from_seed(RFC_SEED).public}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("zz" * 32, "64 hexadecimal digits"), ("ab" * 31, "32 bytes, not 31"), ("", "32 bytes, not 0")],
)
def test_text_that_is_no_public_key_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        PublicKey.parse(text)


def test_a_saved_key_is_the_owners_alone_and_comes_back_with_its_public_key(tmp_path: Path) -> None:
    key, file = SigningKey.generate(), tmp_path / "device.key"
    key.save(file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert SigningKey.load(file).public == key.public
    assert PublicKey.load(tmp_path / "device.pub") == key.public


def test_a_key_is_never_overwritten(tmp_path: Path) -> None:
    first, file = SigningKey.from_seed(RFC_SEED), tmp_path / "device.key"
    first.save(file)
    with pytest.raises(FileExistsError):
        SigningKey.generate().save(file)
    assert SigningKey.load(file).public == first.public


def test_a_key_of_another_kind_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "device.key"
    file.write_bytes(
        generate_private_key(SECP256R1()).private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    with pytest.raises(ValueError, match="an Ed25519 key is needed"):
        SigningKey.load(file)
