"""Classes by what rows and columns held so far."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtide.wire.codecs.entropy.coefficients import CoefficientReader, Integers, encode_classes
from fedtide.wire.codecs.matrix_contexts import CLASSES, DEFAULTS, UNKNOWN, join, split
from fedtide.wire.parameters import Schema, TensorSpec


def schema_of(*shapes: tuple[int | None, ...]) -> Schema:
    return Schema(
        tensors=tuple(
            TensorSpec(name=f"t{number}", dtype="float32", shape=shape) for number, shape in enumerate(shapes)
        )
    )


def assert_round_trip(tensors: Sequence[Integers], schema: Schema) -> bytes:
    classes = list(split(tensors, schema))
    assert sum(each.size for each in classes) == schema.size
    payload = encode_classes(classes, DEFAULTS)
    reader = CoefficientReader(memoryview(payload), DEFAULTS, schema.size)
    joined = np.empty(schema.size, np.int32)
    join(reader, schema, joined)
    reader.finish()
    assert np.array_equal(joined, np.concatenate([np.zeros(0, np.int32), *tensors]))
    return payload


def laplace(schema: Schema, scale: float, seed: int) -> list[Integers]:
    rng = np.random.default_rng(seed)
    return [np.rint(rng.laplace(0, scale, spec.size)).astype(np.int32) for spec in schema.tensors]


axes = st.integers(0, 9) | st.sampled_from([16, 33])
shapes = st.lists(st.lists(axes, max_size=3).map(tuple), max_size=4)


@settings(deadline=None, max_examples=60)
@given(shapes=shapes, scale=st.sampled_from([0.1, 1.0, 50.0, 1e6]), seed=st.integers(0, 99))
def test_tensors_of_any_shape_come_back(shapes: list[tuple[int, ...]], scale: float, seed: int) -> None:
    schema = schema_of(*shapes)
    assert_round_trip(laplace(schema, scale, seed), schema)


def test_a_batch_axis_counts_as_one() -> None:
    schema = schema_of((None, 40), (20, None))
    assert_round_trip(laplace(schema, 1.0, 0), schema)


def test_first_rows_and_vectors_are_in_the_class_without_history() -> None:
    schema = schema_of((3, 8), (5,), ())
    ones = [np.ones(spec.size, np.int32) for spec in schema.tensors]
    assert list(split(ones, schema))[UNKNOWN].size == 8 + 5 + 1


def test_classes_are_by_expected_magnitudes_as_computed_by_hand() -> None:
    # Eight columns. The first row holds 4 in column 0 and 0 elsewhere: an average of 4/8 + 2^-9 = 0.502.
    # The second row is read in blocks of 1, 1, 2 and 4 columns. Columns are expected at
    # (4 + 1.5 * 0.502) / 2.5 = 1.90 and (0 + 1.5 * 0.502) / 2.5 = 0.301; 8 log2 of these, linear between
    # powers of two: 8 * (0 + 0.90) = 7 and 8 * (-2 + 0.204) = -14.4 -> -15 (floor of 1.63 above -16).
    # The first block has the row factor 1: its class is 7 >> 3 = 0, the first class being -7: number 7.
    # The row holds 4 there: it is (4 + 1) / (1.90 + 1) = 1.72 times louder, 8 * 0.72 = 5: the second column
    # is of class (-15 + 5) >> 3 = -2, number 5. It holds 0: 5 / (1.90 + 0.30 + 1) = 1.56, 4: columns 2 and
    # 3 are of class (-15 + 4) >> 3 = -2, number 5, and with 0 in both, 5 / (2.50 + 0.30 + 1) = 1.31, 2, the
    # last four, too: (-15 + 2) >> 3 = -2.
    schema = schema_of((2, 8))
    matrix = np.array([[4, 0, 0, 0, 0, 0, 0, 0], [4, 0, 0, 0, 0, 0, 0, 9]], np.int32)
    classes = split([matrix.reshape(-1)], schema)
    assert {number: each.tolist() for number, each in enumerate(classes) if each.size} == {
        UNKNOWN: [4, 0, 0, 0, 0, 0, 0, 0],
        7: [4],
        5: [0, 0, 0, 0, 0, 0, 9],
    }


def test_loud_rows_and_columns_take_fewer_bytes_than_scattered_coefficients() -> None:
    rng = np.random.default_rng(0)
    scales = np.outer(rng.random(64) < 0.3, rng.random(64) < 0.3) * 4.0
    matrix = np.rint(rng.laplace(0, 1, (64, 64)) * scales).astype(np.int32)
    schema = schema_of((64, 64))
    shuffled = rng.permutation(matrix.reshape(-1))
    assert len(assert_round_trip([matrix.reshape(-1)], schema)) < 0.8 * len(
        assert_round_trip([shuffled], schema)
    )


@pytest.mark.parametrize("value", [1 << 30, -(1 << 30)])
def test_the_largest_coefficients_have_a_class(value: int) -> None:
    schema = schema_of((20, 20))
    assert_round_trip([np.full(400, value, np.int32)], schema)


def test_there_is_a_table_for_every_class() -> None:
    assert len(DEFAULTS) == CLASSES == 17
