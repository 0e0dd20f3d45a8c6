"""Bytes that are not our frames; what is true of every message is in test_messages."""

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wire_samples import CHUNK, MESSAGES, RECEIPT

from fedtide.wire import frame
from fedtide.wire.errors import FrameTooLarge, MalformedFrame, UnsupportedVersion, WireError
from fedtide.wire.messages import Receipt, TrainingEvent, UpdateChunk


def receipt_fields() -> dict[str, object]:
    fields: dict[str, object] = msgpack.unpackb(frame.pack(RECEIPT))
    return fields


def packed(fields: object) -> bytes:
    return bytes(msgpack.packb(fields))


def test_an_empty_frame_is_malformed() -> None:
    with pytest.raises(MalformedFrame, match="empty"):
        frame.from_frame(b"", Receipt)


@pytest.mark.parametrize("version", [0, 2, 255])
def test_another_protocol_version_is_refused_with_the_version_this_build_speaks(version: int) -> None:
    with pytest.raises(
        UnsupportedVersion, match=f"protocol version {version}; the receiver speaks 1"
    ) as refused:
        frame.from_frame(bytes((version,)) + frame.pack(RECEIPT), Receipt)
    assert refused.value.version == version


def test_a_frame_that_is_too_large_is_refused_before_anything_else_is_looked_at() -> None:
    with pytest.raises(FrameTooLarge, match=r"frame of 65,537 bytes; at most 65,536") as refused:
        frame.from_frame(b"\xff" * 65_537, Receipt)
    assert (refused.value.size_bytes, refused.value.limit_bytes) == (65_537, 65_536)


def test_a_frame_of_exactly_the_largest_size_is_read() -> None:
    whole = frame.to_frame(CHUNK)
    assert frame.from_frame(whole, UpdateChunk, max_bytes=len(whole)) == CHUNK
    with pytest.raises(FrameTooLarge):
        frame.from_frame(whole, UpdateChunk, max_bytes=len(whole) - 1)


def test_a_missing_field_is_named() -> None:
    fields = receipt_fields()
    del fields["digest"]
    with pytest.raises(MalformedFrame, match=r"not a Receipt: .*`digest`"):
        frame.unpack(packed(fields), Receipt)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("counter", "7"),
        ("counter", 7.5),
        ("counter", True),
        ("digest", "text"),
        ("verdict", "perhaps"),
        ("version", None),
        ("retry_after_s", [1]),
        ("device", b"pump-7"),
    ],
)
def test_a_wrong_type_or_value_is_named_with_its_field(field: str, value: object) -> None:
    with pytest.raises(MalformedFrame, match=rf"\$\.{field}"):
        frame.unpack(packed(receipt_fields() | {field: value}), Receipt)


def test_fields_of_a_newer_sender_pass() -> None:
    fields = receipt_fields() | {"mood": {"of": ["the", b"day"]}, "level": 2**64 - 1}
    assert frame.unpack(packed(fields), Receipt) == RECEIPT


@pytest.mark.parametrize(
    "content",
    [
        b"\xc1",  # the byte msgpack never uses
        b"\xc0",  # nil
        b"\x07",
        packed([1, 2, 3]),
        packed({1: 2}),
        packed({b"kind": b"receipt"}),
        b"\xa2\xff\xfe",  # text that is not UTF-8
        b"\xdd\xff\xff\xff\xff",  # an array of 4,294,967,295 elements that are not there
        b"\xdf\xff\xff\xff\xff",  # a map of as many
        b"\xc6\xff\xff\xff\xff",  # as many bytes
        b"\xc9\xff\xff\xff\xff\x01",  # an extension of as many
        b"\xd6\xff\x00\x00\x00\x00",  # a timestamp, which is an extension type
    ],
)
def test_msgpack_that_is_no_map_of_our_fields_is_malformed(content: bytes) -> None:
    with pytest.raises(MalformedFrame):
        frame.unpack(content, Receipt)


@pytest.mark.parametrize("depth", [10, 600, 60_000])
@pytest.mark.parametrize("opening", [b"\x91", b"\x81\xa1a"])
def test_deep_nesting_is_malformed_and_not_a_crash(opening: bytes, depth: int) -> None:
    nested = (opening * depth)[:60_000] + b"\xc0"
    with pytest.raises(MalformedFrame):
        frame.unpack(nested, Receipt)
    with pytest.raises(MalformedFrame):  # a field that is there, at any depth
        frame.unpack(b"\x81\xa7counter" + nested, TrainingEvent)


@given(st.binary(max_size=200))
def test_whatever_bytes_come_only_wire_errors_are_raised(content: bytes) -> None:
    for kind in {type(message) for message in MESSAGES}:
        with pytest.raises(WireError):
            frame.from_frame(b"\x01" + content, kind)


@given(message=st.sampled_from(MESSAGES), data=st.data())
def test_a_damaged_frame_is_another_message_or_a_wire_error(
    message: frame.Message, data: st.DataObject
) -> None:
    damaged = bytearray(frame.to_frame(message))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        decoded = frame.from_frame(bytes(damaged), type(message))
    except WireError:
        return
    assert isinstance(decoded, type(message))


@settings(max_examples=50)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.binary(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ab"), inner),
        max_leaves=8,
    )
)
def test_any_plain_value_under_any_field_is_a_wire_error_or_a_message(value: object) -> None:
    for field in ("counter", "digest", "reason", "retry_after_s", "stranger"):
        try:
            frame.unpack(packed(receipt_fields() | {field: value}), Receipt)
        except WireError:
            assert field != "stranger"
