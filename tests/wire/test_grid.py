"""Integers on power-of-two grids, there and back."""

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtide.wire.codecs.grid import (
    COARSEST_EXPONENT,
    FINEST_EXPONENT,
    LARGEST,
    Integers,
    decode_grid,
    decode_grid_parameters,
    encode_grid,
    grid_parameters,
    max_grid_bytes,
)
from fedtide.wire.errors import MalformedPayload
from fedtide.wire.parameters import Schema, TensorSpec


def schema_of(*sizes: int) -> Schema:
    return Schema(
        tensors=tuple(
            TensorSpec(name=f"t{number}", dtype="float32", shape=(size,)) for number, size in enumerate(sizes)
        )
    )


def integers(*values: int) -> Integers:
    return np.array(values, np.int32)


def assert_round_trip(values: Integers, exponents: list[int], schema: Schema) -> bytes:
    payload = encode_grid(values, exponents, schema)
    assert len(payload) <= max_grid_bytes(schema)
    decoded, decoded_exponents = decode_grid(payload, schema)
    assert np.array_equal(decoded, values)
    assert decoded.dtype == np.int32
    assert decoded_exponents == tuple(exponents)
    return payload


tensors = st.lists(
    st.tuples(
        st.lists(
            st.integers(-LARGEST, LARGEST) | st.integers(-3, 3) | st.sampled_from([0, LARGEST, -LARGEST]),
            max_size=40,
        ),
        st.integers(FINEST_EXPONENT, COARSEST_EXPONENT),
    ),
    max_size=5,
)


@settings(deadline=None, max_examples=60)
@given(drawn=tensors, factor=st.integers(0, 6))
def test_any_tensors_come_back(drawn: list[tuple[list[int], int]], factor: int) -> None:
    schema = schema_of(*(len(values) for values, _ in drawn))
    values = integers(*(int(value / 2**factor) * 2**factor for each, _ in drawn for value in each))
    assert_round_trip(values, [exponent for _, exponent in drawn], schema)


def test_zeros_and_empty_tensors_take_two_bits_each() -> None:
    # Per tensor: exponent 0 and shift 0 as before, two ones: a byte for four. Then a one for a single
    # class, and a one for its lack of nonzeros.
    assert assert_round_trip(np.zeros(301, np.int32), [0] * 4, schema_of(100, 0, 1, 200)) == b"\xff\x03"
    assert assert_round_trip(integers(), [], schema_of()) == b"\x03"


def test_equal_exponents_are_written_once() -> None:
    values = integers(1, 1, 1, 1)
    same = encode_grid(values, [-13] * 4, schema_of(1, 1, 1, 1))
    others = encode_grid(values, [-13, -14, -13, -14], schema_of(1, 1, 1, 1))
    assert len(others) == len(same) + 3  # 3 times 7 bits: from 4 + 4 + 7 = 15 to 36 bits


def test_a_common_power_of_two_costs_five_bits() -> None:
    values = np.random.default_rng(0).integers(-40, 41, 1000).astype(np.int32)
    assert (
        len(encode_grid(values * 4096, [0], schema_of(1000)))
        <= len(encode_grid(values, [0], schema_of(1000))) + 1
    )


def test_the_largest_integers_of_both_signs_come_back() -> None:
    values = np.tile(integers(LARGEST, -LARGEST, 1 << 23, -(1 << 23)), 100)
    assert_round_trip(values, [0], schema_of(400))
    assert_round_trip(integers(-(1 << 23)), [-60], schema_of(1))


def test_a_change_of_few_parameters_takes_few_bytes() -> None:
    # 1 of 50 parameters changes, half of the changes by one step and the others by two: about
    # log2(50) + 1.4 = 7.1 bits of place, 1 of magnitude and 1 of sign: 200 changes make 228 bytes.
    rng = np.random.default_rng(1)
    values = np.zeros(10_000, np.int32)
    values[rng.choice(10_000, 200, replace=False)] = rng.choice([-2, -1, 1, 2], 200)
    assert len(assert_round_trip(values, [-9, -9], schema_of(9000, 1000))) < 250


def test_a_keyframe_takes_little_more_than_its_entropy() -> None:
    values = np.rint(np.random.default_rng(2).standard_normal(50_000) * 30).astype(np.int32)
    _, counts = np.unique(values, return_counts=True)
    entropy = -(counts * np.log2(counts / values.size)).sum()
    assert 8 * len(assert_round_trip(values, [-9], schema_of(50_000))) < 1.012 * entropy


def test_matrices_of_different_grids_come_back() -> None:
    schema = Schema(
        tensors=tuple(
            TensorSpec(name=f"t{number}", dtype="float32", shape=shape)
            for number, shape in enumerate([(20, 30), (20,), (7, 20, 3)])
        )
    )
    values = np.rint(np.random.default_rng(3).laplace(0, 3, schema.size)).astype(np.int32)
    values[620:] *= 8
    assert_round_trip(values, [-9, -12, -14], schema)


@pytest.mark.parametrize("nonzeros", [0, 20, 160, 161, 1000])
def test_few_and_many_changes_of_small_matrices_come_back(nonzeros: int) -> None:
    # Up to 160 nonzeros are one class, more have classes by context.
    schema = Schema(tensors=tuple(TensorSpec(name=name, dtype="float32", shape=(40, 50)) for name in "ab"))
    values = np.zeros(schema.size, np.int32)
    values[:: 4000 // max(nonzeros, 1)][:nonzeros] = -3
    assert np.count_nonzero(values) == nonzeros
    assert_round_trip(values, [-9, -12], schema)


# Parameters


@settings(deadline=None, max_examples=60)
@given(drawn=tensors)
def test_parameters_are_integers_times_powers_of_two_exactly(drawn: list[tuple[list[int], int]]) -> None:
    schema = schema_of(*(len(values) for values, _ in drawn))
    values = integers(*(value for each, _ in drawn for value in each))
    exponents = [exponent for _, exponent in drawn]
    exact = [value * 2.0**exponent for each, exponent in drawn for value in each]  # exact in float64
    parameters = decode_grid_parameters(encode_grid(values, exponents, schema), schema)
    assert parameters.dtype == np.float32
    assert parameters.astype(np.float64).tolist() == exact
    assert parameters.tobytes() == grid_parameters(values, exponents, schema).tobytes()


# What is refused


@pytest.mark.parametrize(
    ("values", "exponents", "problem"),
    [
        (integers(1, 2), [0], "needs int32"),
        (np.array([1, 2, 3], np.int64), [0], "needs int32"),
        (integers(1, 2, LARGEST + 1), [0], "magnitudes may be up to"),
        (integers(1, 2, -(2**31)), [0], "magnitudes may be up to"),
        (integers(1, 2, 3), [0, 0], "2 exponents; this plan has 1"),
        (integers(1, 2, 3), [], "0 exponents; this plan has 1"),
        (integers(1, 2, 3), [FINEST_EXPONENT - 1], "must be from -60 to 20"),
        (integers(1, 2, 3), [COARSEST_EXPONENT + 1], "must be from -60 to 20"),
    ],
)
def test_what_is_not_a_grid_of_the_plan_is_not_encoded(
    values: Integers, exponents: list[int], problem: str
) -> None:
    for function in (encode_grid, grid_parameters):
        with pytest.raises(ValueError, match=problem):
            function(values, exponents, schema_of(3))


SCHEMA = schema_of(200, 1, 50)


@cache
def sample() -> bytes:
    rng = np.random.default_rng(4)
    return encode_grid(np.rint(rng.laplace(0, 2, 251)).astype(np.int32) * 2, [-9, 3, -9], SCHEMA)


def test_every_truncation_is_rejected() -> None:
    payload = sample()
    for length in range(len(payload)):
        with pytest.raises(MalformedPayload):
            decode_grid(payload[:length], SCHEMA)


@pytest.mark.parametrize("rest", [b"\0", b"\xff", bytes(1000)])
def test_trailing_bytes_are_rejected(rest: bytes) -> None:
    with pytest.raises(MalformedPayload):
        decode_grid(sample() + rest, SCHEMA)
    with pytest.raises(MalformedPayload):
        decode_grid(rest, schema_of())


def test_the_length_is_checked_before_anything_is_allocated() -> None:
    with pytest.raises(MalformedPayload):  # not MemoryError: the decoded integers would have 2^60 bytes
        decode_grid(bytes(1000), schema_of(2**58))


def test_a_grid_of_another_schema_is_rejected() -> None:
    with pytest.raises(MalformedPayload):
        decode_grid(sample(), schema_of(100, 1, 50))


def test_integers_that_leave_the_range_with_their_shift_are_rejected() -> None:
    # 2^23 is encoded as 1 with a shift of 23. From the lowest bit: 1 (exponent as before), 0, 11101 (23),
    # and 1 (a single class).
    payload = bytearray(encode_grid(integers(1 << 23), [0], schema_of(1)))
    assert payload[0] == 0b11011101
    assert decode_grid(bytes(payload), schema_of(1))[0].tolist() == [1 << 23]
    payload[0] = 0b11100001  # a shift of 24
    with pytest.raises(MalformedPayload, match="up to 20 and 23"):
        decode_grid(bytes(payload), schema_of(1))
    three = bytearray(encode_grid(integers(3 << 21), [0], schema_of(1)))
    three[0] += 0b0001000  # a shift of 21 + 2 = 23, and 3 * 2^23 = 25,165,824
    with pytest.raises(MalformedPayload, match="magnitude 25,165,824"):
        decode_grid(bytes(three), schema_of(1))


@settings(deadline=None, max_examples=200)
@given(payload=st.binary(max_size=300))
def test_random_bytes_are_rejected_or_decode_to_a_grid(payload: bytes) -> None:
    try:
        values, exponents = decode_grid(payload, SCHEMA)
    except MalformedPayload:
        return
    grid_parameters(values, exponents, SCHEMA)


@settings(deadline=None, max_examples=100)
@given(place=st.integers(0, 10_000), flipped=st.integers(1, 255))
def test_a_changed_byte_is_rejected_or_decodes_to_a_grid(place: int, flipped: int) -> None:
    payload = bytearray(sample())
    payload[place % len(payload)] ^= flipped
    try:
        values, exponents = decode_grid(bytes(payload), SCHEMA)
    except MalformedPayload:
        return
    grid_parameters(values, exponents, SCHEMA)
