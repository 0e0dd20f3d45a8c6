import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_st

from fedtide.wire.parameters import Schema, TensorSpec, fingerprint, from_bytes, to_bytes

# 2·3 + 1 + 4 = 11 parameters.
SCHEMA = Schema(
    tensors=(
        TensorSpec(name="p.w", dtype="float32", shape=(2, 3)),
        TensorSpec(name="p.scale", dtype="float32", shape=()),
        TensorSpec(name="b.mean", dtype="float32", shape=(4,)),
    )
)


def test_a_schema_counts_and_places_its_tensors() -> None:
    assert SCHEMA.size == 11
    assert [(tensor.name, place.start, place.stop) for tensor, place in SCHEMA.slices()] == [
        ("p.w", 0, 6),
        ("p.scale", 6, 7),
        ("b.mean", 7, 11),
    ]


def test_the_batch_axis_counts_as_one() -> None:
    assert TensorSpec(name="x0", dtype="float32", shape=(None, 3, 5)).size == 15
    assert TensorSpec(name="x0", dtype="float32", shape=(None, 0)).size == 0


def test_split_gives_views_in_the_schemas_order_and_shapes() -> None:
    vector = np.arange(11, dtype=np.float32)
    tensors = SCHEMA.split(vector)
    assert list(tensors) == ["p.w", "p.scale", "b.mean"]
    assert tensors["p.w"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert tensors["p.scale"].shape == ()
    assert tensors["b.mean"].tolist() == [7, 8, 9, 10]
    tensors["p.w"][1, 0] = 99
    assert vector[3] == 99


@given(numpy_st.arrays(np.float32, 11, elements=st.floats(width=32)))
def test_flatten_is_the_inverse_of_split(vector: np.ndarray[tuple[int], np.dtype[np.float32]]) -> None:
    flat = SCHEMA.flatten(SCHEMA.split(vector))
    assert flat.tobytes() == vector.tobytes()
    assert not np.shares_memory(flat, vector)


def test_flatten_needs_every_tensor_in_its_size() -> None:
    tensors = SCHEMA.split(np.zeros(11, np.float32))
    with pytest.raises(ValueError, match=r"'p\.scale' is missing"):
        SCHEMA.flatten({name: values for name, values in tensors.items() if name != "p.scale"})
    with pytest.raises(ValueError, match=r"'b\.mean' has 5 elements, the plan says 4"):
        SCHEMA.flatten(tensors | {"b.mean": np.zeros(5, np.float32)})


def test_parameters_travel_as_little_endian_float32() -> None:
    vector = np.array([1.0, -2.5], np.float32)
    content = bytes.fromhex("0000803f000020c0")
    assert to_bytes(vector) == content
    assert to_bytes(vector.astype(">f4")) == content
    assert from_bytes(content).tolist() == [1.0, -2.5]
    assert not from_bytes(content).flags.writeable


@given(numpy_st.arrays(np.float32, st.integers(0, 20), elements=st.floats(width=32)))
def test_every_bit_survives_the_way(vector: np.ndarray[tuple[int], np.dtype[np.float32]]) -> None:
    assert from_bytes(to_bytes(vector)).tobytes() == vector.tobytes()
    assert fingerprint(vector) == hashlib.sha256(to_bytes(vector)).digest()


def test_models_that_differ_in_the_sign_of_a_zero_are_two_models() -> None:
    assert fingerprint(np.array([0.0], np.float32)) != fingerprint(np.array([-0.0], np.float32))


def test_the_fingerprint_does_not_depend_on_the_layout_in_memory() -> None:
    wide = np.arange(20, dtype=np.float32)
    assert fingerprint(wide[::2]) == fingerprint(wide[::2].copy()) == fingerprint(wide[::2].astype(">f4"))
