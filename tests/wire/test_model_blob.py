"""A model's blob gives exactly the parameters it says, or an error of ours."""

import msgspec
import numpy as np
import pytest

from fedtide.wire import frame
from fedtide.wire.chunks import blob_ref
from fedtide.wire.codecs.grid import encode_grid
from fedtide.wire.errors import BlobMismatch, MalformedFrame, MalformedPayload, UnsupportedVersion, WireError
from fedtide.wire.ids import ModelVersion
from fedtide.wire.messages import BlobRef, ModelDelta
from fedtide.wire.model_blob import (
    OVERHEAD_BYTES,
    DeltaIndex,
    IndexRow,
    ModelBlob,
    ModelFormat,
    changed_parameters,
    keyframe_parameters,
    max_keyframe_bytes,
)
from fedtide.wire.parameters import Schema, TensorSpec, Vector, fingerprint, to_bytes

SCHEMA = Schema(
    tensors=(
        TensorSpec(name="p.w", dtype="float32", shape=(2, 2)),
        TensorSpec(name="p.b", dtype="float32", shape=(1,)),
    )
)
OLD, NEW = ModelVersion(7), ModelVersion(9)
HELD = np.array([1.5, -2.0, 0.0, 0.25, 3.0], np.float32)
AFTER = np.array([1.0, -2.0, 0.5, 0.25, 3.125], np.float32)
FLOATS = ModelBlob(ModelFormat.FLOAT32, None, NEW, fingerprint(AFTER)[:16], to_bytes(AFTER))
# AFTER in quarters and eighths; AFTER − HELD = −1/2, 0, 1/2, 0 in halves and 1/8.
INTEGERS = msgspec.structs.replace(
    FLOATS,
    format=ModelFormat.GRID,
    payload=encode_grid(np.array([4, -8, 2, 1, 25], np.int32), (-2, -3), SCHEMA),
)
DELTA = msgspec.structs.replace(
    INTEGERS, from_version=OLD, payload=encode_grid(np.array([-1, 0, 1, 0, 1], np.int32), (-1, -3), SCHEMA)
)


def announced(content: bytes, start: int = OLD, end: int = NEW) -> ModelDelta:
    return ModelDelta(ModelVersion(start), ModelVersion(end), blob_ref(content, 100))


def changed(blob: ModelBlob, held: Vector = HELD) -> Vector:
    content = frame.to_frame(blob)
    return changed_parameters(content, announced(content), held, SCHEMA)


@pytest.mark.parametrize("blob", [FLOATS, INTEGERS], ids=["floats", "integers"])
def test_a_keyframe_gives_its_parameters_to_the_bit(blob: ModelBlob) -> None:
    assert to_bytes(keyframe_parameters(frame.to_frame(blob), NEW, SCHEMA)) == to_bytes(AFTER)


def test_a_delta_leads_to_the_same_bits_as_the_keyframe() -> None:
    before = HELD.copy()
    assert to_bytes(changed(DELTA)) == to_bytes(AFTER)
    assert HELD.tobytes() == before.tobytes()


def test_a_blob_is_the_version_byte_and_an_array() -> None:
    assert len(frame.to_frame(FLOATS)) == 20 + 1 + 1 + 8 + 1 + 1 + (2 + 16) + 2
    assert len(frame.to_frame(FLOATS)) - 20 <= OVERHEAD_BYTES


def test_a_delta_to_other_parameters_than_it_says_is_refused() -> None:
    elsewhere = HELD.copy()
    elsewhere[1] = -2.5
    with pytest.raises(BlobMismatch, match="a delta from version 7 to 9 does not give"):
        changed(DELTA, elsewhere)


def test_a_keyframe_of_other_parameters_than_it_says_is_refused() -> None:
    other = msgspec.structs.replace(FLOATS, payload=to_bytes(HELD))
    with pytest.raises(BlobMismatch, match="a keyframe of version 9 does not give"):
        keyframe_parameters(frame.to_frame(other), NEW, SCHEMA)


def test_a_blob_is_used_only_for_what_it_was_announced_as() -> None:
    keyframe, delta = frame.to_frame(INTEGERS), frame.to_frame(DELTA)
    with pytest.raises(BlobMismatch, match="a keyframe of version 9; announced was a keyframe of version 8"):
        keyframe_parameters(keyframe, ModelVersion(8), SCHEMA)
    with pytest.raises(BlobMismatch, match="a delta from version 7 to 9; announced was a keyframe"):
        keyframe_parameters(delta, NEW, SCHEMA)
    for content, start, end in ((keyframe, 7, 9), (delta, 6, 9), (delta, 7, 10)):
        with pytest.raises(BlobMismatch, match="announced was a delta"):
            changed_parameters(content, announced(content, start, end), HELD, SCHEMA)


def test_floats_are_never_a_delta() -> None:
    with pytest.raises(MalformedPayload, match="deltas have format grid"):
        changed(msgspec.structs.replace(FLOATS, from_version=OLD))


@pytest.mark.parametrize("length", [0, 16, 19, 21, 24])
def test_a_float32_keyframe_has_four_bytes_per_parameter(length: int) -> None:
    blob = msgspec.structs.replace(FLOATS, payload=bytes(length))
    with pytest.raises(MalformedPayload, match="5 parameters take 20"):
        keyframe_parameters(frame.to_frame(blob), NEW, SCHEMA)


@pytest.mark.parametrize("blob", [FLOATS, INTEGERS], ids=["floats", "integers"])
def test_a_truncated_or_lengthened_blob_is_refused(blob: ModelBlob) -> None:
    whole = frame.to_frame(blob)
    for length in range(len(whole)):
        with pytest.raises(MalformedFrame):
            keyframe_parameters(whole[:length], NEW, SCHEMA)
    with pytest.raises(MalformedFrame):
        keyframe_parameters(whole + b"\0", NEW, SCHEMA)
    with pytest.raises(UnsupportedVersion):
        keyframe_parameters(b"\2" + whole[1:], NEW, SCHEMA)


@pytest.mark.parametrize("blob", [FLOATS, INTEGERS, DELTA], ids=["floats", "integers", "delta"])
def test_no_flipped_bit_gives_other_parameters(blob: ModelBlob) -> None:
    whole, refused = frame.to_frame(blob), 0
    for place in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        try:
            if blob is DELTA:
                found = changed_parameters(bytes(damaged), announced(whole), HELD, SCHEMA)
            else:
                found = keyframe_parameters(bytes(damaged), NEW, SCHEMA)
        except WireError:
            refused += 1
        else:  # a coded payload has bits that do not matter
            assert to_bytes(found) == to_bytes(AFTER)
    assert refused > 0.9 * 8 * len(whole)


def test_every_keyframe_is_within_the_bound() -> None:
    largest = np.full(SCHEMA.size, 2**24 - 1, np.int32)
    payload = encode_grid(largest, (20, 20), SCHEMA)
    blob = msgspec.structs.replace(INTEGERS, to_version=ModelVersion(2**63 - 1), payload=payload)
    assert len(frame.to_frame(blob)) <= max_keyframe_bytes(SCHEMA)
    floats = msgspec.structs.replace(FLOATS, to_version=ModelVersion(2**63 - 1))
    assert len(frame.to_frame(floats)) <= max_keyframe_bytes(SCHEMA)


def test_an_index_names_blobs_as_a_head_would() -> None:
    index = DeltaIndex(
        NEW, 4096, (IndexRow(OLD, 300, b"d" * 16),), (IndexRow(ModelVersion(3), 500, b"i" * 16),)
    )
    again = frame.from_frame(frame.to_frame(index), DeltaIndex)
    assert again == index
    assert again.model_deltas() == (ModelDelta(OLD, NEW, BlobRef(300, b"d" * 16, 4096)),)
    assert again.indexes() == {3: BlobRef(500, b"i" * 16, 4096)}
