"""The codec ``lowrank``: exact products, the payload's limits, and what the encoder chooses."""

import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtide.wire.codecs import NotFinite, WrongLength, get
from fedtide.wire.codecs.ecsq import Ecsq
from fedtide.wire.codecs.entropy.bits import BitReader, BitWriter
from fedtide.wire.codecs.entropy.coefficients import encode_classes
from fedtide.wire.codecs.lowrank.contexts import (
    CLASSES,
    TABLES,
    Predictor,
    log2_sixteenths,
    waves,
)
from fedtide.wire.codecs.lowrank.factors import decompose
from fedtide.wire.codecs.lowrank.layout import (
    LARGEST_FACTOR,
    Place,
    TensorLayout,
    most_nonzeros,
    places_of,
    read_layouts,
    write_layouts,
)
from fedtide.wire.codecs.lowrank.products import (
    Product,
    Scalars,
    inverse,
    prior_of,
    product_of,
    transform,
)
from fedtide.wire.codecs.lowrank.quantiser import QuantisedMatrix
from fedtide.wire.codecs.lowrank.scalars import QuantisedScalars
from fedtide.wire.codecs.lowrank.stream import QuantisedTensor, write_tensors
from fedtide.wire.codecs.rate import Rate, Request
from fedtide.wire.errors import MalformedPayload
from fedtide.wire.parameters import Schema, TensorSpec, Vector

GOLDEN: Final = Path(__file__).parent.parent / "golden" / "codecs"
LOWRANK: Final = get("lowrank")
STEP_OF_A_HALF: Final = bytes.fromhex("003f")
"""0.5 is 0x3F000000 as float32; the payload has its upper half, little-endian."""
FINE: Final = Request(Rate(step=1.0))

Integers = npt.NDArray[np.int32]


def schema_of(*shapes: tuple[int, ...]) -> Schema:
    return Schema(
        tensors=tuple(
            TensorSpec(name=f"p.{number}", dtype="float32", shape=shape)
            for number, shape in enumerate(shapes)
        )
    )


SMALL: Final = schema_of((16, 24), (16,), (6, 4, 3, 3), (5, 6))
"""A matrix, a vector, a kernel of 6 x 36, and a matrix of 30 elements: too small for factors."""


def low_rank_delta(schema: Schema, rank: int = 2, noise: float = 0.02, seed: int = 1) -> Vector:
    """Matrices of this rank, with some noise, like the deltas of local training."""
    random = np.random.default_rng(seed)
    parts = []
    for tensor in schema.tensors:
        rows, columns = tensor.shape[0] or 0, tensor.size // (tensor.shape[0] or 1)
        left, right = random.standard_normal((rows, rank)), random.standard_normal((rank, columns))
        parts.append((left @ right + noise * random.standard_normal((rows, columns))).reshape(-1))
    return (1e-3 * np.concatenate(parts)).astype(np.float32)


def relative_error(delta: Vector, decoded: Vector) -> float:
    """Squared error over squares."""
    exact = delta.astype(np.float64)
    return float(np.square(exact - decoded).sum() / np.square(exact).sum())


def payload_of(
    layouts: Sequence[TensorLayout],
    classes: dict[int, list[int]],
    schema: Schema,
    step: bytes = STEP_OF_A_HALF,
) -> bytes:
    """A payload with these coefficients in these classes, all others empty."""
    header = BitWriter()
    write_layouts(header, layouts, places_of(schema))
    coefficients = [np.array(classes.get(number, []), np.int32) for number in range(CLASSES)]
    return step + header.to_bytes() + encode_classes(coefficients, TABLES)


# Products: equal to the bit whatever the order of additions


Parts = tuple[Integers, Integers, tuple[int, ...], int, Scalars | None]
"""What ``product_of`` takes."""


def reference(parts: Parts, step: float) -> Vector:
    """Exact sums of fractions, rounded to float32 once; then the product with the step, rounded once."""
    left, right, exponents, kind, scalars = parts
    rights = [inverse_of(row, kind) for row in right.tolist()]
    values = []
    extra = dict(zip(scalars.places.tolist(), scalars.values.tolist(), strict=True)) if scalars else {}
    for row in range(left.shape[1]):
        for column in range(right.shape[1]):
            exact = Fraction(extra.get(row * right.shape[1] + column, 0))
            for k, exponent in enumerate(exponents):
                exact += Fraction(int(left[k, row]), 2**exponent) * rights[k][column]
            total = float(exact)
            assert Fraction(total) == exact, "float64 holds it, so that it is rounded once"
            values.append(np.float32(float(np.float32(total)) * step))
    return np.array(values, np.float32)


def inverse_of(bands: list[int], kind: int) -> list[Fraction]:
    """The transform's inverse by its definition: four bands one after the other, what is left as it is."""
    if kind == 0:
        return [Fraction(value) for value in bands]
    if kind == 1:
        return along(bands)
    height = len(bands) // kind
    image = [along(bands[row * kind : (row + 1) * kind]) for row in range(height)]
    columns = [along([image[row][column] for row in range(height)]) for column in range(kind)]
    whole = [columns[column][row] for row in range(height) for column in range(kind)]
    return whole + [Fraction(value) for value in bands[height * kind :]]


def along(bands: Sequence[int | Fraction]) -> list[Fraction]:
    count = len(bands) // 4
    signs = ((1, 1, 1, 1), (1, 1, -1, -1), (1, -1, -1, 1), (1, -1, 1, -1))
    vector = [
        sum((signs[band][place] * Fraction(bands[band * count + block]) for band in range(4)), Fraction(0))
        / 2
        for block in range(count)
        for place in range(4)
    ]
    return vector + [Fraction(value) for value in bands[4 * count :]]


@st.composite
def factors(draw: st.DrawFn, largest: int) -> Parts:
    rank, rows, columns = draw(st.integers(1, 4)), draw(st.integers(2, 5)), draw(st.integers(2, 18))
    entry = st.integers(-largest, largest)
    left = draw(st.lists(entry, min_size=rank * rows, max_size=rank * rows))
    right = draw(st.lists(entry, min_size=rank * columns, max_size=rank * columns))
    exponents = sorted(draw(st.lists(st.integers(0, 6), min_size=rank, max_size=rank)), reverse=True)
    kind = draw(st.sampled_from([0, 1, 4, 5]).filter(lambda kind: kind <= columns))
    places = sorted(draw(st.sets(st.integers(0, rows * columns - 1), max_size=3)))
    values = draw(st.lists(st.integers(-1000, 1000), min_size=len(places), max_size=len(places)))
    scalars = Scalars(np.array(places, np.int64), np.array(values, np.int32)) if places else None
    return (
        np.array(left, np.int32).reshape(rank, rows),
        np.array(right, np.int32).reshape(rank, columns),
        tuple(exponents),
        kind,
        scalars,
    )


def written(product: Product, step: float) -> Vector:
    out = np.full(product.left.shape[1] * product.right.shape[1], 7, np.float32)
    product.write(np.float32(step), out)
    return out


@settings(deadline=None)  # a busy machine is no failure
@given(parts=factors(12) | factors(LARGEST_FACTOR), step=st.sampled_from([0.5, 0.0123291015625, 3.0]))
def test_a_product_is_the_exact_sum_rounded_once_times_the_step(parts: Parts, step: float) -> None:
    product = product_of(*parts)
    expected = reference(parts, step)
    assert np.array_equal(written(product, step), expected)
    assert np.array_equal(written(replace(product, exact_in_float32=False), step), expected)


def test_float32_and_float64_and_any_order_of_additions_give_the_same_bits() -> None:
    random = np.random.default_rng(5)
    rank, rows, columns = 12, 70, 90
    left = random.integers(-40, 41, (rank, rows)).astype(np.int32)
    right = random.integers(-40, 41, (rank, columns)).astype(np.int32)
    exponents = (6, 6, 5, 5, 5, 4, 4, 3, 3, 2, 1, 0)
    product = product_of(left, right, exponents, 1, None)
    # At most 40 * 80 * (2/64 + 3/32 + 2/16 + 2/8 + 1/4 + 1/2 + 1) = 7200 with 7 fraction bits: 20 bits.
    assert product.exact_in_float32
    expected = written(product, 0.1)
    assert np.array_equal(written(replace(product, exact_in_float32=False), 0.1), expected)
    order = random.permutation(rank)
    permuted = replace(product, left=product.left[order], right=product.right[order])
    assert np.array_equal(written(permuted, 0.1), expected)
    sums = product.left[:5].T @ product.right[:5] + product.left[5:].T @ product.right[5:]
    assert np.array_equal((sums * np.float32(0.1)).reshape(-1), expected)


@pytest.mark.parametrize("largest", [255, 256, 4095])
@pytest.mark.parametrize("step", [255 / 256, 257 / 256, 2.0**-90, 3 * 2.0**-64])
def test_the_step_may_be_multiplied_first_or_last(largest: int, step: float) -> None:
    # 255 * 257 = 2^16 - 1 times a step of 8 bits fits into 24 bits; 256 * 257, or a step of 9 bits, may not.
    left, right = np.array([[largest, 1, 0]], np.int32), np.array([[257, -255, 3]], np.int32)
    product = product_of(left, right, (0,), 0, Scalars(np.array([1, 8]), np.array([7, -1], np.int32)))
    assert product.exact_in_float32
    sums = left.T.astype(np.float64) @ right
    sums[0, 1] += 7
    sums[2, 2] -= 1
    expected = sums.astype(np.float32) * np.float32(step)
    assert np.array_equal(written(product, step), expected.reshape(-1))


def test_a_product_that_float32_may_not_hold_is_computed_in_float64() -> None:
    # 4095 * 4096 = 2^24 - 4096 fits; 4096 * 4096 = 2^24 is not below 2^24.
    right = np.array([[4096, 1]], np.int32)
    assert product_of(np.array([[4095, 1]], np.int32), right, (0,), 0, None).exact_in_float32
    assert not product_of(np.array([[4096, 1]], np.int32), right, (0,), 0, None).exact_in_float32
    # A fraction bit more halves what fits.
    assert not product_of(np.array([[4095, 1]], np.int32), right * 2, (1,), 0, None).exact_in_float32


def test_a_product_that_float64_may_not_hold_is_refused() -> None:
    large = np.full((64, 2), LARGEST_FACTOR, np.int32)
    # Per component 32767^2 = 2^30 (just below); 64 of them with exponent 0 make 2^36, with 20 fraction bits
    # of another component 2^56.
    with pytest.raises(MalformedPayload, match="too large"):
        product_of(large, large, (20,) + (0,) * 63, 0, None)
    product_of(large, large, (16,) + (0,) * 63, 0, None)


# The transform


def test_a_constant_becomes_one_coefficient_and_what_is_beyond_four_stays() -> None:
    # (1 + 1 + 1 + 1) / 2 = 2; all differences are 0.
    assert transform(np.array([[1, 1, 1, 1, 5]], np.float32), 1).tolist() == [[2, 0, 0, 0, 5]]
    # Two blocks: the bands of both stand together. (1, 2, 3, 4): 10/2; ((1-4) + (2-3))/2 = -2;
    # ((1+4) - (2+3))/2 = 0; ((1-4) - (2-3))/2 = -1.
    blocks = np.array([[1, 1, 1, 1, 1, 2, 3, 4]], np.float32)
    assert transform(blocks, 1).tolist() == [[2, 5, 0, -2, 0, 0, 0, -1]]


def test_a_constant_image_becomes_one_coefficient_per_four_by_four_pixels() -> None:
    # 16 ones: 16 / 4 = 4 in the first place of 4 x 8 bands.
    bands = transform(np.ones((1, 32), np.float32), 8).reshape(4, 8)
    assert bands[0, :2].tolist() == [4, 4]
    assert np.count_nonzero(bands) == 2


@pytest.mark.parametrize(("length", "kind"), [(1, 1), (3, 1), (16, 1), (19, 1), (30, 5), (33, 8), (49, 7)])
def test_a_transform_keeps_energy_and_its_inverse_is_exact(length: int, kind: int) -> None:
    vectors = np.random.default_rng(length).integers(-1000, 1001, (3, length)).astype(np.float32)
    bands = transform(vectors, kind)
    energies = [np.square(values, dtype=np.float64).sum() for values in (bands, vectors)]
    assert energies[0] == energies[1]
    assert np.array_equal(inverse(bands, kind), vectors)


# Classes


def test_logarithms_are_those_computed_by_hand() -> None:
    # 16 log2(1) = 0, of 2: 16, of 3: 25.36 -> 25, of 4095: 191.99 -> 191, of 4096: 192, of 2^30: 480.
    assert [log2_sixteenths(number) for number in (1, 2, 3, 4095, 4096, 2**30)] == [0, 16, 25, 191, 192, 480]


def test_the_waves_are_one_one_two_four_and_so_on() -> None:
    assert [(wave.start, wave.stop) for wave in waves(11)] == [(0, 1), (1, 2), (2, 4), (4, 8), (8, 11)]
    assert list(waves(0)) == []


def test_classes_follow_exponent_and_length() -> None:
    predictor = Predictor([16, 4], np.zeros(20, np.int32))
    classes = predictor.classes(np.array([[3, 2]], np.int32))
    # 2^3 / sqrt(16) = 2, an octave above a step: class 5 + 1. 2^2 / sqrt(4) = 2, too.
    assert classes.tolist() == [[6] * 20]


def test_classes_follow_the_entry_and_its_neighbours_in_earlier_components() -> None:
    predictor = Predictor([8, 4], np.zeros(12, np.int32))
    predictor.learn(np.array([[0, 0, 0, 0, 0, 0, 0, -16, 0, 0, 0, 0]], np.int32))
    classes = predictor.classes(np.array([[2, 1]], np.int32))
    # sigma = 2^2 / sqrt(8) = sqrt(2): log2 = 1/2, in sixteenths 8. Mean of the first side: 3 + 96 / 8 = 15.
    # Its last entry: 4 * 16 + 3 = 67 of 15, 16 log2 = 97 - 62 = 35 -> (5 * 16 + 8 + 8 + 35) / 16 = 8; its
    # neighbour: 16 + 3 = 19, 67 - 62 = 5 -> 6; others: 3, 25 - 62 = -37 -> 3. The second side has mean 3 and
    # no neighbour in the first one: 2^1 / sqrt(4) = 1, class 5.
    assert classes.tolist() == [[3] * 6 + [6, 8] + [5] * 4]


# The payload


BY_HAND: Final = [2, 0, 0, 0, 0, 0, 3, 0, -1, 0, 0, 0, 0, 0]
"""One component on 6 x 8: a = (2, 0, ...), b = (3, 0, -1, 0, ...)."""


def test_a_payload_made_by_hand_decodes_to_the_product() -> None:
    # e = 1. sigma of a = 2 / sqrt(6) = 0.8: log2 in sixteenths 16 - 41/2 = -4 -> (5 * 16 + 8 - 4) / 16 = 5;
    # of b 2 / sqrt(8): 16 - 24 = -8 -> (88 - 8) / 16 = 5.
    schema = schema_of((6, 8))
    payload = payload_of([TensorLayout(exponents=(1,))], {5: BY_HAND}, schema)
    # 2 * 3 / 2^1 * 0.5 = 1.5 and 2 * -1 / 2 * 0.5 = -0.5.
    expected = np.zeros((6, 8), np.float32)
    expected[0, 0], expected[0, 2] = 1.5, -0.5
    assert np.array_equal(LOWRANK.decode(payload, schema), expected.reshape(-1))


def test_scalars_are_added_to_the_product_before_the_step() -> None:
    schema = schema_of((6, 8), (3,))
    layouts = [TensorLayout(exponents=(1,), scalar_class=7), TensorLayout(scalar_class=7)]
    payload = payload_of(layouts, {5: BY_HAND, 7: [4] + [0] * 47 + [0, -9, 0]}, schema)
    expected = np.zeros(51, np.float32)
    # (2 * 3 / 2 + 4) * 0.5 = 3.5; scalars of the vector: -9 * 0.5 = -4.5.
    expected[0], expected[2], expected[49] = 3.5, -0.5, -4.5
    assert np.array_equal(LOWRANK.decode(payload, schema), expected)


def test_a_component_of_zeros_is_refused() -> None:
    schema = schema_of((6, 8))
    for entries in ([2, 0, 0, 0, 0, 0] + [0] * 8, [0] * 6 + [1] * 8, [0] * 14):
        with pytest.raises(MalformedPayload, match="component of zeros"):
            LOWRANK.decode(payload_of([TensorLayout(exponents=(1,))], {5: entries}, schema), schema)


def test_an_entry_too_large_for_a_factor_is_refused() -> None:
    schema = schema_of((6, 8))
    layouts = [TensorLayout(exponents=(1,))]
    for large, allowed in ((32767, True), (32768, False), (-32768, False)):
        payload = payload_of(layouts, {5: [large, 0, 0, 0, 0, 0, 1]}, schema)
        if allowed:
            assert LOWRANK.decode(payload, schema)[0] == 32767 / 4
        else:
            with pytest.raises(MalformedPayload, match="beyond"):
                LOWRANK.decode(payload, schema)


def test_a_scalar_that_float32_does_not_hold_is_refused() -> None:
    schema = schema_of((3,))
    layouts = [TensorLayout(scalar_class=9)]
    assert LOWRANK.decode(payload_of(layouts, {9: [2**24 - 1]}, schema), schema)[0] == (2**24 - 1) / 2
    with pytest.raises(MalformedPayload, match="beyond"):
        LOWRANK.decode(payload_of(layouts, {9: [2**24]}, schema), schema)


def test_coefficients_without_a_place_are_refused() -> None:
    schema = schema_of((3,))
    layouts = [TensorLayout(scalar_class=9)]
    with pytest.raises(MalformedPayload):
        LOWRANK.decode(payload_of(layouts, {9: [1, 0, 0, 1]}, schema), schema)
    with pytest.raises(MalformedPayload):
        LOWRANK.decode(payload_of(layouts, {8: [1]}, schema), schema)


def test_more_nonzeros_than_factors_are_good_for_are_refused() -> None:
    schema, layouts = schema_of((10_000,)), [TensorLayout(scalar_class=9)]
    assert most_nonzeros(10_000) == 10_000 // 8 + 4096 == 5346
    LOWRANK.decode(payload_of(layouts, {9: [1] * 5346}, schema), schema)
    with pytest.raises(MalformedPayload):
        LOWRANK.decode(payload_of(layouts, {9: [1] * 5347}, schema), schema)


def test_a_step_that_leaves_more_of_them_gets_a_payload_of_ecsq() -> None:
    schema = schema_of((100, 100))
    delta = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    fine = Request(Rate(step=0.25))
    assert LOWRANK.encode(delta, schema, fine) == b"\1\0" + Ecsq().encode(delta, schema, fine)
    decoded = LOWRANK.decode(LOWRANK.encode(delta, schema, fine), schema)
    assert np.abs(decoded - delta).max() < 0.25


def test_values_beyond_float32_are_refused_as_not_finite() -> None:
    schema = schema_of((3,))
    # 0x7F7F is the largest finite bfloat16, 3.39e38; twice that is beyond float32.
    payload = payload_of([TensorLayout(scalar_class=9)], {9: [2]}, schema, bytes.fromhex("7f7f"))
    out = np.full(3, 7, np.float32)
    with pytest.raises(NotFinite):
        LOWRANK.decode(payload, schema, out)
    assert (out == 7).all()


@pytest.mark.parametrize("bits", [0x0001, 0x007F, 0x0D7F, 0x7F80, 0x7FC0, 0x8000, 0xBF00, 0xFFFF], ids=hex)
def test_a_step_that_is_not_positive_finite_and_normal_is_refused(bits: int) -> None:
    schema = schema_of((3,))
    payload = payload_of([TensorLayout(scalar_class=9)], {9: [2]}, schema, bits.to_bytes(2, "little"))
    with pytest.raises(NotFinite, match="step"):
        LOWRANK.decode(payload, schema)


@st.composite
def layouts_of_small(draw: st.DrawFn) -> list[TensorLayout]:
    layouts = []
    for place in places_of(SMALL):
        scalars = draw(st.none() | st.integers(0, CLASSES - 1))
        exponents = draw(st.lists(st.integers(0, 20), max_size=place.widest_rank))
        transforms = st.integers(0, place.columns) if exponents else st.just(0)
        layouts.append(TensorLayout(tuple(sorted(exponents, reverse=True)), draw(transforms), scalars))
    return layouts


@given(layouts=layouts_of_small())
def test_layouts_are_read_as_they_were_written(layouts: list[TensorLayout]) -> None:
    header, places = BitWriter(), places_of(SMALL)
    write_layouts(header, layouts, places)
    assert list(read_layouts(BitReader(memoryview(header.to_bytes())), places)) == layouts


def test_ranks_are_limited_by_the_shape() -> None:
    # 16 x 24: 384 / (16 + 24) = 9.6, so that factors never have more entries than the matrix; 6 x 36:
    # 216 / 42 = 5.1; a vector and 30 elements have none.
    assert [place.widest_rank for place in places_of(SMALL)] == [9, 0, 5, 0]
    # 1000 x 1000 would allow 500; no tensor may have more than 64.
    assert [place.widest_rank for place in places_of(schema_of((1000, 1000)))] == [64]


def test_absurd_ranks_exponents_and_transforms_are_refused() -> None:
    places = places_of(schema_of((6, 8)))  # 48 / 14 = 3.4: rank 3 at most
    for fields in ([4], [1, 9], [1, 0, 21], [2, 0, 5, 6]):
        header = BitWriter()
        header.put_gamma(fields[0])
        if len(fields) > 1:
            header.put_gamma(fields[1])
        if len(fields) > 2:
            header.put(fields[2], 5)
        if len(fields) > 3:
            header.put_gamma(fields[3])  # below the first exponent by more than it is
        header.put(0, 30)
        with pytest.raises(MalformedPayload):
            read_layouts(BitReader(memoryview(header.to_bytes())), places)


# Hostile bytes


@cache
def small_payload() -> bytes:
    return LOWRANK.encode(low_rank_delta(SMALL), SMALL, FINE)


def assert_refused_or_finite(payload: bytes, schema: Schema) -> bool:
    out = np.full(schema.size, 7, np.float32)
    try:
        decoded = LOWRANK.decode(payload, schema, out)
    except MalformedPayload:
        assert (out == 7).all(), "a rejected payload leaves out as it was"
        return False
    assert np.isfinite(decoded).all()
    return True


def test_every_truncation_and_a_byte_too_many_are_refused() -> None:
    payload = small_payload()
    assert assert_refused_or_finite(payload, SMALL)
    for length in range(len(payload)):
        assert not assert_refused_or_finite(payload[:length], SMALL)
    assert not assert_refused_or_finite(payload + b"\0", SMALL)


@settings(deadline=None, max_examples=200)  # a busy machine is no failure
@given(places=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=4))
def test_payloads_with_some_bytes_changed_are_refused_or_decode_to_finite_values(
    places: list[tuple[int, int]],
) -> None:
    payload = bytearray(small_payload())
    for place, change in places:
        payload[place % len(payload)] ^= change
    assert_refused_or_finite(bytes(payload), SMALL)


@settings(deadline=None, max_examples=200)  # a busy machine is no failure
@given(payload=st.binary(max_size=60))
def test_random_bytes_behind_a_good_step_are_refused_or_decode_to_finite_values(payload: bytes) -> None:
    assert_refused_or_finite(STEP_OF_A_HALF + payload, SMALL)


def test_the_memory_of_a_hostile_payload_is_bounded_by_the_schema() -> None:
    schema = schema_of((300, 400), (400,))
    header = BitWriter()
    header.put_gamma(64)
    header.put_gamma(1)
    header.put(20, 5)
    for _ in range(63):
        header.put_gamma(0)
    header.put(0b11, 2)
    payload = STEP_OF_A_HALF + header.to_bytes() + bytes(100)
    tracemalloc.start()
    assert not assert_refused_or_finite(payload, schema)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * 4 * schema.size


# What the encoder chooses


def test_a_low_rank_delta_takes_a_small_part_of_what_ecsq_needs() -> None:
    schema = schema_of((200, 300), (200,))
    delta = low_rank_delta(schema, rank=3)
    sizes = {}
    for codec_id, step in (("lowrank", 3.0), ("ecsq", 1.0)):
        codec = get(codec_id)
        payload = codec.encode(delta, schema, Request(Rate(step=step)))
        assert relative_error(delta, codec.decode(payload, schema)) < 0.11
        sizes[codec_id] = len(payload)
    assert sizes["lowrank"] < 0.2 * sizes["ecsq"]


def test_a_delta_without_structure_takes_about_what_ecsq_needs() -> None:
    schema = schema_of((200, 300))
    delta = np.random.default_rng(3).standard_normal(60_000).astype(np.float32)
    payloads = [get(codec_id).encode(delta, schema, FINE) for codec_id in ("lowrank", "ecsq")]
    errors = [
        relative_error(delta, get(codec_id).decode(payload, schema))
        for codec_id, payload in zip(("lowrank", "ecsq"), payloads, strict=True)
    ]
    assert len(payloads[0]) < 1.05 * len(payloads[1])
    assert errors[0] < 1.1 * errors[1]


def test_smaller_steps_take_more_bytes_and_leave_less_error() -> None:
    schema = schema_of((64, 100), (64,))
    delta = low_rank_delta(schema, rank=8, noise=0.5)
    payloads = [
        LOWRANK.encode(delta, schema, Request(Rate(step=step))) for step in (0.01, 0.1, 0.5, 2.0, 8.0)
    ]
    errors = [relative_error(delta, LOWRANK.decode(payload, schema)) for payload in payloads]
    assert [len(payload) for payload in payloads] == sorted((len(p) for p in payloads), reverse=True)
    assert errors == sorted(errors)
    # A uniform quantiser's error is a twelfth of the step's square: 0.01^2 / 12 = 8.3e-6 of the rms' square.
    assert errors[0] < 2e-5


def test_an_outlier_beside_the_factors_is_encoded() -> None:
    schema = schema_of((64, 100))
    delta = low_rank_delta(schema, rank=2, noise=0.0)
    delta[1234] += 30e-3
    decoded = LOWRANK.decode(LOWRANK.encode(delta, schema, FINE), schema)
    assert abs(decoded[1234] - delta[1234]) < 3e-3


@pytest.mark.parametrize("budget", [1, 2, 40, 100, 400, 1500, 100_000])
def test_a_budget_is_kept(budget: int) -> None:
    schema = schema_of((64, 100), (64,))
    delta = low_rank_delta(schema, rank=8, noise=0.5)
    payload = LOWRANK.encode(delta, schema, Request(Rate(bytes_per_update=budget)))
    assert len(payload) <= max(budget, 2)
    if 400 <= budget <= 1500:
        assert len(payload) > 0.9 * budget


def test_the_step_follows_the_rms_that_is_asked_for() -> None:
    schema = schema_of((64, 100))
    delta = low_rank_delta(schema)
    rms = float(np.sqrt(np.square(delta, dtype=np.float64).mean()))
    half = LOWRANK.encode(delta, schema, Request(Rate(step=4.0), rms=rms / 2))
    assert half == LOWRANK.encode(delta, schema, Request(Rate(step=2.0)))
    assert half != LOWRANK.encode(delta, schema, Request(Rate(step=4.0)))


@pytest.mark.parametrize("scale", [1e-42, 1e-34, 1e-20, 1.0, 1e20, 1e33, 1e38])
def test_matrices_of_any_magnitude_are_encoded_alike(scale: float) -> None:
    schema = schema_of((64, 100))
    delta = low_rank_delta(schema)
    scaled = (delta / np.abs(delta).max() * scale).astype(np.float32)
    decoded = LOWRANK.decode(LOWRANK.encode(scaled, schema, FINE), schema)
    # Steps are at least 2^-100 = 7.9e-31: what is smaller becomes zero.
    assert relative_error(scaled, decoded) < 0.05 if scale > 1e-30 else not decoded.any()


def test_the_largest_values_in_a_matrix_stay_finite() -> None:
    schema = schema_of((8, 8))
    delta = np.full(64, np.finfo(np.float32).max)
    delta[::3] *= -1
    for step in (2**-10, 1.0, 64.0):
        decoded = LOWRANK.decode(LOWRANK.encode(delta, schema, Request(Rate(step=step))), schema)
        assert np.isfinite(decoded).all()


def test_tensors_with_axes_of_one_or_none_are_encoded() -> None:
    schema = schema_of((1, 40), (40, 1), (0, 5), (), (2, 16), (4, 0))
    delta = np.arange(schema.size, dtype=np.float32)
    decoded = LOWRANK.decode(LOWRANK.encode(delta, schema, Request(Rate(step=0.01))), schema)
    assert relative_error(delta, decoded) < 1e-4


def test_the_decomposition_finds_the_leading_components() -> None:
    random = np.random.default_rng(2)
    for rows, columns in ((150, 200), (200, 150), (40, 300), (300, 40)):
        left = np.linalg.qr(random.standard_normal((rows, 6)))[0]
        right = np.linalg.qr(random.standard_normal((columns, 6)))[0]
        values = np.array([100.0, 50.0, 20.0, 10.0, 5.0, 2.0])
        found = decompose(((left * values) @ right.T).astype(np.float32), 4)
        assert np.allclose(found.values, values[:4], rtol=1e-4)
        assert np.allclose(np.abs(np.sum(found.left * left.T[:4], axis=1)), 1, atol=1e-3)
        assert np.allclose(found.left @ found.left.T, np.eye(4), atol=1e-4)


def test_a_matrix_of_zeros_beside_others_has_no_components() -> None:
    schema = schema_of((64, 100), (150, 200), (64,))
    delta = np.zeros(schema.size, np.float32)
    delta[-64:] = 1e-3
    decoded = LOWRANK.decode(LOWRANK.encode(delta, schema, FINE), schema)
    assert not decoded[:-64].any()
    assert np.allclose(decoded[-64:], 1e-3, rtol=0.6)


def test_encoding_a_million_parameters_takes_at_most_twice_their_memory_and_decoding_less_than_once() -> None:
    schema = schema_of((896, 784), (896,), (320, 896), (320,), (10, 320), (10,))
    delta = low_rank_delta(schema, rank=5)
    out = np.empty(schema.size, np.float32)
    LOWRANK.decode(LOWRANK.encode(delta, schema), schema, out)  # so that tables are there already
    tracemalloc.start()
    payload = LOWRANK.encode(delta, schema)
    encoding = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    LOWRANK.decode(payload, schema, out)
    decoding = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert encoding < 2 * delta.nbytes
    assert decoding < delta.nbytes


# Bytes that are out there


GOLDEN_SCHEMA: Final = schema_of((16, 24), (16,), (6, 4, 3, 3), (40, 30))
GOLDEN_STEP: Final = 0.0123291015625
"""0x3C4A0000 as float32."""


def golden_entries(rank: int, width: int) -> Integers:
    """Mostly small, some large: (i^2 mod 23) - 11, without what is between -6 and 6, or 40 times it."""
    index = np.arange(1, rank * width + 1)
    values = index * index % 23 - 11
    values[np.abs(values) < 7] = 0
    values[::97] *= 40
    return values.astype(np.int32).reshape(rank, width)


def quantised(place: Place, exponents: tuple[int, ...], kind: int, entries: Integers) -> QuantisedMatrix:
    """With the classes that a decoder finds."""
    predictor = Predictor([place.rows, place.columns], prior_of(place, kind))
    classes = []
    for wave in waves(len(exponents)):
        classes.append(predictor.classes(np.array([exponents[wave]], np.int32).T.repeat(2, axis=1)))
        predictor.learn(entries[wave])
    return QuantisedMatrix(exponents, kind, entries, np.concatenate(classes), 0.0)


def golden_tensors() -> list[QuantisedTensor]:
    """No transform, one along rows with scalars, one of images; in float32, and (the last one) in float64."""
    few = QuantisedScalars(Scalars(np.array([0, 7, 11]), np.array([3, -1, 900], np.int32)), 7, 0.0)
    matrix, _, kernel, large = places_of(GOLDEN_SCHEMA)
    return [
        QuantisedTensor(quantised(matrix, (5, 4, 4), 1, golden_entries(3, 16 + 24)), few),
        QuantisedTensor(None, few),
        QuantisedTensor(quantised(kernel, (3,), 0, golden_entries(1, 6 + 36)), None),
        QuantisedTensor(quantised(large, (18, 9, 3, 3, 0), 6, golden_entries(5, 40 + 30)), few),
    ]


def test_golden_tensors_are_written_as_the_golden_bytes() -> None:
    payload = bytes.fromhex("4a3c") + write_tensors(golden_tensors(), places_of(GOLDEN_SCHEMA))
    assert payload == (GOLDEN / "lowrank.factors.bin").read_bytes()


def test_golden_bytes_with_factors_decode_to_the_golden_values_to_the_bit() -> None:
    decoded = LOWRANK.decode((GOLDEN / "lowrank.factors.bin").read_bytes(), GOLDEN_SCHEMA)
    assert decoded.astype("<f4").tobytes() == (GOLDEN / "lowrank.factors.decoded.bin").read_bytes()


def test_the_golden_values_are_the_exact_sums_times_the_step() -> None:
    values = []
    for place, tensor in zip(places_of(GOLDEN_SCHEMA), golden_tensors(), strict=True):
        entries, layout = np.empty((0, place.rows + place.columns), np.int32), tensor.layout
        if tensor.matrix is not None:
            entries = tensor.matrix.entries
        scalars = tensor.scalars.scalars if tensor.scalars is not None else None
        left, right = entries[:, : place.rows], entries[:, place.rows :]
        parts = (left, right, layout.exponents, layout.transform, scalars)
        values.append(reference(parts, GOLDEN_STEP))
    assert np.concatenate(values).tobytes() == (GOLDEN / "lowrank.factors.decoded.bin").read_bytes()


def test_the_codec_is_adjustable_and_a_schema_without_parameters_is_two_bytes() -> None:
    assert LOWRANK.adjustable
    schema = schema_of((0,))
    assert LOWRANK.encode(np.empty(0, np.float32), schema) == bytes(2)
    assert LOWRANK.decode(bytes(2), schema).shape == (0,)
    with pytest.raises(WrongLength):
        LOWRANK.decode(bytes(3), schema)
