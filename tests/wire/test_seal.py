import msgpack
import pytest
from wire_samples import COORDINATOR_KEY, DEVICE_KEY, HEAD, RECEIPT, STATE

from fedtide.wire import frame
from fedtide.wire.errors import BadSignature, MalformedFrame, WireError
from fedtide.wire.messages import CoordinatorState, DownMessage, Head, Receipt
from fedtide.wire.seal import seal, unseal, unseal_any
from fedtide.wire.signatures import COORDINATOR_DOMAIN, DOWN_DOMAIN, HEAD_DOMAIN, UPDATE_DOMAIN

RECEIPT_SEALED = seal(RECEIPT, COORDINATOR_KEY, DOWN_DOMAIN)


def test_a_message_sealed_by_another_key_is_refused_and_the_error_names_the_expected_one() -> None:
    forged = seal(HEAD, DEVICE_KEY, HEAD_DOMAIN)
    with pytest.raises(BadSignature, match=str(COORDINATOR_KEY.public)):
        unseal(forged, Head, COORDINATOR_KEY.public, HEAD_DOMAIN)


@pytest.mark.parametrize("domain", [HEAD_DOMAIN, UPDATE_DOMAIN, DOWN_DOMAIN, b""])
def test_a_message_sealed_for_another_purpose_is_refused(domain: bytes) -> None:
    sealed = seal(STATE, COORDINATOR_KEY, domain)
    with pytest.raises(BadSignature):
        unseal(sealed, CoordinatorState, COORDINATOR_KEY.public, COORDINATOR_DOMAIN)


def test_flipping_any_bit_of_a_sealed_message_is_noticed() -> None:
    for place in range(len(RECEIPT_SEALED)):
        for bit in range(8):
            flipped = bytearray(RECEIPT_SEALED)
            flipped[place] ^= 1 << bit
            with pytest.raises(WireError):
                unseal_any(bytes(flipped), DownMessage, COORDINATOR_KEY.public, DOWN_DOMAIN)


@pytest.mark.parametrize(
    "parts",
    [
        [],
        [b"message"],
        [b"message", bytes(64), b""],
        ["message", bytes(64)],
        [b"message", "s" * 64],
        [None, bytes(64)],
        [[b"message"], bytes(64)],
        {"message": bytes(64)},
        b"message",
        7,
    ],
)
def test_anything_but_two_byte_strings_is_malformed(parts: object) -> None:
    sealed = b"\x01" + bytes(msgpack.packb(parts))
    with pytest.raises(MalformedFrame, match="two byte strings"):
        unseal(sealed, Receipt, COORDINATOR_KEY.public, DOWN_DOMAIN)


@pytest.mark.parametrize("length", [0, 63, 65])
def test_a_signature_of_another_length_is_refused(length: int) -> None:
    sealed = b"\x01" + bytes(msgpack.packb([frame.pack(RECEIPT), bytes(length)]))
    with pytest.raises(BadSignature):
        unseal(sealed, Receipt, COORDINATOR_KEY.public, DOWN_DOMAIN)


def test_the_signature_is_checked_before_the_message_is_parsed() -> None:
    sealed = b"\x01" + bytes(msgpack.packb([b"\xc1 no msgpack", bytes(64)]))
    with pytest.raises(BadSignature):
        unseal(sealed, Receipt, COORDINATOR_KEY.public, DOWN_DOMAIN)


def test_a_signed_message_of_another_kind_is_malformed() -> None:
    with pytest.raises(MalformedFrame, match="not a Head"):
        unseal(RECEIPT_SEALED, Head, COORDINATOR_KEY.public, DOWN_DOMAIN)


def test_a_tag_from_the_future_is_malformed_and_the_error_names_the_known_kinds() -> None:
    packed = frame.pack(RECEIPT).replace(b"\xa7receipt", b"\xa7riposte")
    sealed = b"\x01" + bytes(msgpack.packb([packed, COORDINATOR_KEY.sign(DOWN_DOMAIN, packed)]))
    with pytest.raises(MalformedFrame, match=r"none of Receipt, MissingChunks, Resync: .*riposte"):
        unseal_any(sealed, DownMessage, COORDINATOR_KEY.public, DOWN_DOMAIN)


def test_a_signed_message_that_is_no_map_is_malformed() -> None:
    packed = bytes(msgpack.packb([1, 2]))
    sealed = b"\x01" + bytes(msgpack.packb([packed, COORDINATOR_KEY.sign(DOWN_DOMAIN, packed)]))
    with pytest.raises(MalformedFrame):
        unseal_any(sealed, DownMessage, COORDINATOR_KEY.public, DOWN_DOMAIN)
