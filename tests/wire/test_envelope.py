import hashlib
import tracemalloc

import msgpack
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from wire_samples import COORDINATOR_KEY, DEVICE_KEY, HEADER, PAYLOAD

from fedtide.wire import frame
from fedtide.wire.chunks import update_chunks
from fedtide.wire.envelope import (
    MAX_HEADER_BYTES,
    UpdateHeader,
    max_envelope_bytes,
    open_update,
    seal_update,
    update_digest,
)
from fedtide.wire.errors import (
    BadSignature,
    FrameTooLarge,
    MalformedFrame,
    PayloadDamaged,
    UnsupportedVersion,
    WireError,
)
from fedtide.wire.ids import Counter, DeviceId, FleetId, ModelVersion, PlanId
from fedtide.wire.signatures import PLAN_DOMAIN, UPDATE_DOMAIN

MAX_BYTES = 1 << 20
ENVELOPE = seal_update(HEADER, PAYLOAD, DEVICE_KEY)


def header_for(payload: bytes) -> UpdateHeader:
    return msgspec.structs.replace(
        HEADER, payload_bytes=len(payload), payload_sha256=hashlib.sha256(payload).digest()
    )


def assembled(signed: bytes, signature: bytes, payload: bytes) -> bytes:
    return b"\x01" + bytes(msgpack.packb([signed, signature, payload]))


def parts() -> tuple[bytes, bytes, bytes]:
    signed, signature, payload = msgpack.unpackb(ENVELOPE[1:])
    return signed, signature, payload


def test_an_envelope_carries_all_fields_and_the_payload() -> None:
    opened = open_update(ENVELOPE, MAX_BYTES)
    opened.verify(DEVICE_KEY.public)
    assert opened.header == HEADER
    assert opened.payload == PAYLOAD


@given(st.binary(max_size=500))
def test_any_payload_comes_back(payload: bytes) -> None:
    opened = open_update(seal_update(header_for(payload), payload, DEVICE_KEY), MAX_BYTES)
    opened.verify(DEVICE_KEY.public)
    assert opened.payload == payload


def test_the_signature_covers_the_domain_and_the_headers_bytes() -> None:
    signed, signature, _ = parts()
    DEVICE_KEY.public.verify(b"fedtide/1/update\0", signed, signature)
    assert signed == frame.pack(HEADER)


def test_an_envelope_signed_by_another_key_is_refused() -> None:
    forged = open_update(seal_update(HEADER, PAYLOAD, COORDINATOR_KEY), MAX_BYTES)
    with pytest.raises(BadSignature):
        forged.verify(DEVICE_KEY.public)


def test_a_signature_for_another_purpose_is_refused() -> None:
    signed, _, payload = parts()
    opened = open_update(assembled(signed, DEVICE_KEY.sign(PLAN_DOMAIN, signed), payload), MAX_BYTES)
    with pytest.raises(BadSignature):
        opened.verify(DEVICE_KEY.public)


def test_a_changed_header_no_longer_has_its_signature() -> None:
    _, signature, payload = parts()
    more = frame.pack(msgspec.structs.replace(HEADER, num_examples=601))
    opened = open_update(assembled(more, signature, payload), MAX_BYTES)
    with pytest.raises(BadSignature):
        opened.verify(DEVICE_KEY.public)


def test_a_changed_signature_is_refused() -> None:
    signed, signature, payload = parts()
    opened = open_update(assembled(signed, signature[::-1], payload), MAX_BYTES)
    with pytest.raises(BadSignature):
        opened.verify(DEVICE_KEY.public)


@pytest.mark.parametrize("length", [60, 63, 65, 0])
def test_a_signature_of_another_length_is_malformed(length: int) -> None:
    signed, _, payload = parts()
    with pytest.raises(MalformedFrame, match=f"a signature of {length} bytes; it has 64"):
        open_update(assembled(signed, bytes(length), payload), MAX_BYTES)


def test_a_payload_of_another_length_is_damage() -> None:
    signed, signature, payload = parts()
    with pytest.raises(PayloadDamaged, match="a payload of 15 bytes; its header says 16"):
        open_update(assembled(signed, signature, payload[:-1]), MAX_BYTES)


def test_a_payload_with_another_hash_is_damage() -> None:
    signed, signature, payload = parts()
    with pytest.raises(PayloadDamaged, match="SHA-256"):
        open_update(assembled(signed, signature, payload[:-1] + b"!"), MAX_BYTES)


@given(place=st.integers(0, len(ENVELOPE) - 1), bit=st.integers(0, 7))
def test_flipping_any_bit_of_an_envelope_is_noticed(place: int, bit: int) -> None:
    flipped = bytearray(ENVELOPE)
    flipped[place] ^= 1 << bit
    with pytest.raises(WireError):
        open_update(bytes(flipped), MAX_BYTES).verify(DEVICE_KEY.public)


def test_every_truncation_of_an_envelope_is_malformed() -> None:
    for length in range(len(ENVELOPE)):
        with pytest.raises(MalformedFrame):
            open_update(ENVELOPE[:length], MAX_BYTES)


@given(st.binary(max_size=200))
def test_bytes_that_are_no_envelope_are_wire_errors(content: bytes) -> None:
    with pytest.raises(WireError):
        open_update(b"\x01" + content, MAX_BYTES)


def test_another_version_is_refused_and_too_large_an_envelope_before_it_is_parsed() -> None:
    with pytest.raises(UnsupportedVersion):
        open_update(b"\x02" + ENVELOPE[1:], MAX_BYTES)
    with pytest.raises(FrameTooLarge):
        open_update(b"\xff" * (MAX_BYTES + 1), MAX_BYTES)


def test_a_header_larger_than_8_kib_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(MalformedFrame, match="a header of 8,193 bytes; at most 8,192"):
        open_update(assembled(b"\xc1" * (MAX_HEADER_BYTES + 1), bytes(64), b""), MAX_BYTES)


def test_the_largest_envelope_fits_its_bound_to_the_byte() -> None:
    # The bound takes every msgpack length for five bytes; these of 8,192, 64 and 100,000 take 3, 2 and 5.
    payload = bytes(100_000)
    header = header_for(payload)
    free = MAX_HEADER_BYTES - len(frame.pack(msgspec.structs.replace(header, codec="c" * 300)))
    full = msgspec.structs.replace(header, codec="c" * (300 + free))
    assert len(frame.pack(full)) == MAX_HEADER_BYTES
    envelope = seal_update(full, payload, DEVICE_KEY)
    assert 0 <= max_envelope_bytes(len(payload)) - len(envelope) < 16
    assert open_update(envelope, max_envelope_bytes(len(payload))).header == full


@pytest.mark.parametrize("field", ["counter", "base_version", "num_examples", "local_steps", "payload_bytes"])
@pytest.mark.parametrize("value", [-1, 2**63, 2**64 - 1])
def test_numbers_that_a_database_cannot_hold_are_malformed(field: str, value: int) -> None:
    on_the_wire = dict(
        zip(UpdateHeader.__struct_fields__, UpdateHeader.__struct_encode_fields__, strict=True)
    )
    fields = msgpack.unpackb(frame.pack(HEADER)) | {on_the_wire[field]: value}
    signed = bytes(msgpack.packb(fields))
    with pytest.raises(MalformedFrame, match=rf"\$\.{field}`"):
        open_update(assembled(signed, DEVICE_KEY.sign(UPDATE_DOMAIN, signed), PAYLOAD), MAX_BYTES)


def test_a_missing_field_is_named_in_full_though_it_is_short_on_the_wire() -> None:
    fields = msgpack.unpackb(frame.pack(HEADER))
    del fields["bv"]
    signed = bytes(msgpack.packb(fields))
    with pytest.raises(MalformedFrame, match="missing required field `base_version`"):
        open_update(assembled(signed, DEVICE_KEY.sign(UPDATE_DOMAIN, signed), PAYLOAD), MAX_BYTES)


def test_all_that_surrounds_the_payload_of_an_ordinary_update_takes_345_bytes() -> None:
    # The header takes 214, its signature and the lengths 72, the chunk around them 59.
    header = UpdateHeader(
        fleet=FleetId("demo"),
        plan=PlanId("0123456789abcdef0123456789abcdef"),
        device=DeviceId("device-07"),
        counter=Counter(6_400_000_123),
        base_version=ModelVersion(77),
        base_sha256=bytes(32),
        codec="lowrank",
        num_examples=120,
        local_steps=8,
        metrics={"loss": 0.25, "metric": 0.875},
        payload_bytes=600,
        payload_sha256=bytes(32),
        created=1.7e9,
    )
    envelope = seal_update(header, bytes(600), DEVICE_KEY)
    (chunk,) = update_chunks(envelope, header.counter, 100_000)
    assert len(chunk) - 600 == 345


def test_an_envelope_of_many_small_values_takes_no_more_memory_than_its_bytes() -> None:
    # A million empty maps: one byte each on the wire, 64 as Python objects.
    hostile = b"\x01\xdd" + (1_000_000).to_bytes(4, "big") + b"\x80" * 1_000_000
    tracemalloc.start()
    try:
        with pytest.raises(MalformedFrame):
            open_update(hostile, 2_000_000)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 2_000_000


def test_two_envelopes_have_one_digest_only_if_header_signature_and_length_are_equal() -> None:
    other_header = seal_update(msgspec.structs.replace(HEADER, created=0.5), PAYLOAD, DEVICE_KEY)
    other_key = seal_update(HEADER, PAYLOAD, COORDINATOR_KEY)
    digests = {update_digest(envelope) for envelope in (ENVELOPE, other_header, other_key, ENVELOPE + b"\0")}
    assert len(digests) == 4
    assert update_digest(bytes(bytearray(ENVELOPE))) == update_digest(ENVELOPE)


def test_the_digest_is_the_sha256_of_the_length_and_the_first_16_kib() -> None:
    content = bytes(range(256)) * 100  # 25,600 bytes = 0x6400
    expected = hashlib.sha256(b"\x00\x64\x00\x00\x00\x00\x00\x00" + content[:16_384]).digest()
    assert update_digest(content) == expected


def test_damage_beyond_the_digested_bytes_keeps_the_digest_and_is_found_by_the_payloads_hash() -> None:
    payload = bytes(40_000)
    envelope = seal_update(header_for(payload), payload, DEVICE_KEY)
    damaged = envelope[:-1] + b"\x01"
    assert update_digest(damaged) == update_digest(envelope)
    with pytest.raises(PayloadDamaged):
        open_update(damaged, MAX_BYTES)
