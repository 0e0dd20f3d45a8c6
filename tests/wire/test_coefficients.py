"""Classes of coefficients, there and back, and what strangers send instead."""

import tracemalloc
from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtide.wire.codecs.entropy.bits import BitWriter
from fedtide.wire.codecs.entropy.coefficients import LARGEST, CoefficientReader, Integers, encode_classes
from fedtide.wire.codecs.entropy.table_choice import write_choice
from fedtide.wire.codecs.entropy.tokens import Measured, TableChoice, choice_for
from fedtide.wire.errors import MalformedPayload

SPARSE = choice_for(20, 0.5)
DENSE = choice_for(0.1, 3)


def integers(*values: int) -> Integers:
    return np.array(values, np.int32)


def laplace(count: int, scale: float, seed: int = 0) -> Integers:
    return np.rint(np.random.default_rng(seed).laplace(0, scale, count)).astype(np.int32)


def assert_round_trip(classes: Sequence[Integers], defaults: Sequence[TableChoice]) -> bytes:
    payload = encode_classes(classes, defaults)
    reader = CoefficientReader(memoryview(payload), defaults, sum(each.size for each in classes))
    for number, coefficients in enumerate(classes):
        assert np.array_equal(reader.take(number, coefficients.size), coefficients)
    reader.finish()
    return payload


def read_all(payload: bytes, defaults: Sequence[TableChoice], sizes: Sequence[int]) -> list[Integers]:
    reader = CoefficientReader(memoryview(payload), defaults, sum(sizes))
    taken = [reader.take(number, size) for number, size in enumerate(sizes)]
    reader.finish()
    return taken


def entropy_bits(coefficients: Integers) -> float:
    _, counts = np.unique(coefficients, return_counts=True)
    return float(-(counts * np.log2(counts / coefficients.size)).sum())


# There and back

values = st.one_of(
    st.just(0), st.integers(-3, 3), st.integers(-300, 300), st.sampled_from([LARGEST, -LARGEST, LARGEST - 1])
)
choices = st.sampled_from([SPARSE, DENSE, choice_for(2000, 0.1), choice_for(0, 1e6)])
classes = st.lists(st.tuples(st.lists(values, max_size=120), choices), max_size=6)


@settings(deadline=None)
@given(drawn=classes)
def test_any_classes_come_back(drawn: list[tuple[list[int], TableChoice]]) -> None:
    assert_round_trip([integers(*each) for each, _ in drawn], [choice for _, choice in drawn])


@pytest.mark.parametrize("scale", [0.15, 0.5, 1, 3, 30, 1000, 1e6])
@pytest.mark.parametrize("count", [1, 10, 300, 5000, 80_000])
def test_coefficients_of_any_density_and_scale_come_back(count: int, scale: float) -> None:
    assert_round_trip([laplace(count, scale)], [SPARSE])


def test_the_longest_gaps_and_largest_magnitudes_come_back() -> None:
    coefficients = np.zeros(3_000_000, np.int32)
    coefficients[[0, 1, 2_999_999]] = LARGEST, -LARGEST, -1
    assert_round_trip([coefficients], [DENSE])


@pytest.mark.parametrize("scale", [0.1, 3.0, 20_000.0])
def test_many_classes_are_read_side_by_side(scale: float) -> None:
    # Few nonzeros, many, and many of which some are beyond int16.
    drawn = [laplace(count, scale, count) for count in (300, 0, 50, 1000)]
    defaults = [SPARSE] * 4
    reader = CoefficientReader(memoryview(encode_classes(drawn, defaults)), defaults, 1350)
    first, rest = np.full(160, 7, np.int32), np.full(1190, 7, np.int32)
    reader.read_each(np.array([100, 0, 50, 10]), first)
    reader.read_each(np.array([200, 0, 0, 990]), rest)
    assert np.array_equal(first, np.concatenate([drawn[0][:100], drawn[2], drawn[3][:10]]))
    assert np.array_equal(rest, np.concatenate([drawn[0][100:], drawn[3][10:]]))
    reader.finish()


def test_more_large_coefficients_than_allowed_are_rejected() -> None:
    coefficients = np.ones(100, np.int32)
    coefficients[[3, 50, 99]] = 32_767, 32_768, -32_768
    payload = memoryview(encode_classes([coefficients], [DENSE]))
    reader = CoefficientReader(payload, [DENSE], 100, max_large=2)
    assert np.array_equal(reader.take(0, 100), coefficients)
    assert reader.peak == 32_768
    with pytest.raises(MalformedPayload, match="more than 1 coefficients are beyond"):
        CoefficientReader(payload, [DENSE], 100, max_large=1)


def test_nonzeros_are_taken_with_their_places_from_few_and_from_many() -> None:
    for scale in (0.1, 3.0, 20_000.0):
        coefficients = laplace(1000, scale)
        coefficients[[0, -1]] = 1, -70_000  # beyond int16
        classes = [integers(0, 5), np.zeros(3, np.int32), coefficients, np.zeros(7, np.int32)]
        payload = memoryview(encode_classes(classes, [SPARSE] * 4))
        reader = CoefficientReader(payload, [SPARSE] * 4, 1012)
        places, found, ends = reader.take_nonzeros()
        assert ends.tolist() == [2, 2, 1002, 1002]  # without the zeros behind the last nonzero of a class
        assert np.array_equal(places, np.append(1, 2 + np.flatnonzero(coefficients)))
        assert np.array_equal(found, np.append(5, coefficients[coefficients != 0]))
        reader.finish()


def test_a_class_is_taken_piece_by_piece_and_between_other_classes() -> None:
    first, second = laplace(1000, 0.4), laplace(500, 2)
    defaults = [SPARSE, DENSE]
    reader = CoefficientReader(memoryview(encode_classes([first, second], defaults)), defaults, 1500)
    pieces = [reader.take(0, count) for count in (0, 1, 399)]
    assert np.array_equal(reader.take(1, 500), second)
    assert np.array_equal(np.concatenate([*pieces, reader.take(0, 600)]), first)
    reader.finish()


def test_zeros_after_a_classs_last_nonzero_cost_nothing() -> None:
    coefficients = laplace(300, 0.5)
    padded = np.concatenate([coefficients, np.zeros(10_000, np.int32)])
    assert encode_classes([padded], [SPARSE]) == encode_classes([coefficients], [SPARSE])


# Sizes


def test_classes_without_nonzeros_take_one_bit_each() -> None:
    # Gamma codes of zero: eight classes, eight ones; no class, no byte.
    assert encode_classes([np.zeros(100, np.int32)] * 8, [SPARSE] * 8) == b"\xff"
    assert encode_classes([], []) == b""


def test_a_payload_of_one_coefficient_is_as_computed_by_hand() -> None:
    # The header: one nonzero, gamma "010", and the default table. Gap 0 and excess 0 have buckets of
    # their own, so that no raw bits follow. In these measured marginals no other bucket occurs: the symbol
    # has all of the 8192 frequencies and takes no bits. The lane stays where it began, at 2^16 + 1 for a
    # negative sign: 17 bits, so a length of 0, and 16 bits of 1.
    sure = TableChoice(Measured(0, (0, *[63] * 6)), Measured(0, (0, *[63] * 15)), dense=True)
    assert assert_round_trip([integers(-1)], [sure]) == bytes.fromhex("02 00 0100")


@pytest.mark.parametrize(("count", "most"), [(4, 9), (20, 25), (100, 95)])
def test_small_payloads_have_small_headers(count: int, most: int) -> None:
    # Nonzeros at random places with a gap of 20 on average, all of magnitude 1: log2(21) + 20/21 log2(21/20)
    # * 21 = 5.8 bits of place and 1 of sign: 20 make 17 bytes, 100 make 85.
    rng = np.random.default_rng(count)
    coefficients = np.zeros(21 * count, np.int32)
    coefficients[rng.choice(coefficients.size, count, replace=False)] = rng.choice([-1, 1], count)
    assert len(assert_round_trip([coefficients], [choice_for(20, 0.1, gap_spread=0)])) <= most


@pytest.mark.parametrize(("step", "bits"), [(2.4, 1.0), (1.03, 2.0), (0.258, 4.0)])
def test_dense_gaussian_coefficients_take_hardly_more_than_their_entropy(step: float, bits: float) -> None:
    coefficients = np.rint(np.random.default_rng(3).standard_normal(200_000) / step).astype(np.int32)
    entropy = entropy_bits(coefficients) / coefficients.size
    assert entropy == pytest.approx(bits, abs=0.1)
    taken = 8 * len(assert_round_trip([coefficients], [SPARSE])) / coefficients.size
    assert taken <= entropy + 0.03


def test_a_table_of_its_own_is_written_only_where_it_saves_bytes() -> None:
    coefficients = laplace(3000, 0.3)
    nonzeros = np.abs(coefficients[coefficients != 0])
    fitting = choice_for(3000 / nonzeros.size - 1, nonzeros.mean() - 1, gap_spread=0, excess_spread=0)
    fit, unfit = encode_classes([coefficients], [fitting]), encode_classes([coefficients], [DENSE])
    assert len(fit) <= len(unfit) <= len(fit) + 3  # at most 19 bits name a table of the family


# What is refused


@pytest.mark.parametrize("value", [LARGEST + 1, -LARGEST - 1, 2**31 - 1, -(2**31)])
def test_too_large_a_coefficient_is_not_encoded(value: int) -> None:
    with pytest.raises(ValueError, match="magnitude above"):
        encode_classes([integers(0, value)], [SPARSE])


@cache
def sample() -> tuple[bytes, list[TableChoice], list[int]]:
    drawn = [laplace(400, 0.4), np.zeros(7, np.int32), laplace(60, 40.0), laplace(300, 1.5)]
    defaults = [SPARSE, SPARSE, DENSE, SPARSE]
    return encode_classes(drawn, defaults), defaults, [each.size for each in drawn]


def test_every_truncation_is_rejected() -> None:
    payload, defaults, sizes = sample()
    for length in range(len(payload)):
        with pytest.raises(MalformedPayload):
            read_all(payload[:length], defaults, sizes)


@pytest.mark.parametrize("rest", [b"\0", b"\xff", b"\0\0\0\0", bytes(100)])
def test_trailing_bytes_are_rejected(rest: bytes) -> None:
    payload, defaults, sizes = sample()
    for content in (payload, encode_classes([np.zeros(7, np.int32)] * 4, defaults)):
        with pytest.raises(MalformedPayload):
            read_all(content + rest, defaults, sizes)


def test_nonzeros_that_nobody_asks_for_are_rejected() -> None:
    payload = encode_classes([integers(0, 0, 5, 0, 1)], [SPARSE])
    reader = CoefficientReader(memoryview(payload), [SPARSE], 5)
    assert reader.take(0, 4).tolist() == [0, 0, 5, 0]
    with pytest.raises(MalformedPayload, match="class 0 has 5 coefficients; 4 of them have a place"):
        reader.finish()


def test_more_coefficients_than_there_can_be_are_rejected() -> None:
    first, second = integers(0, 0, 5), integers(0, 7)  # three and two up to the last nonzero
    payload = encode_classes([first, second], [SPARSE] * 2)
    read_all(payload, [SPARSE] * 2, [3, 2])
    with pytest.raises(MalformedPayload, match="more coefficients than the 4"):
        CoefficientReader(memoryview(payload), [SPARSE] * 2, 4)


def test_more_nonzeros_than_coefficients_are_rejected_before_anything_is_decoded() -> None:
    header = BitWriter()
    header.put_gamma(1 << 29)
    with pytest.raises(MalformedPayload, match="above 1,000"):
        CoefficientReader(memoryview(header.to_bytes() + bytes(50)), [SPARSE], 1000)


def test_tables_out_of_range_are_rejected() -> None:
    for bits in (
        [(1, 1), (0, 1), (3, 2)],  # a marginal of kind 3
        [(1, 1), (0, 1), (1, 2), (0, 5), (3, 2)],  # spread 3
        [(1, 1), (0, 1), (2, 2), (23, 5)],  # shift 23
        [(1, 1), (0, 1), (2, 2), (0, 5), (2**72 - 1, 72)],  # twelve buckets, none of which occurs
    ):
        header = BitWriter()
        header.put_gamma(8)
        for value, width in bits:
            header.put(value, width)
        with pytest.raises(MalformedPayload, match="a table"):
            CoefficientReader(memoryview(header.to_bytes() + bytes(50)), [SPARSE], 1000)


def test_a_few_bytes_of_a_probable_symbol_force_little_work_or_memory() -> None:
    # A table of one symbol, which takes no bits: but lanes take 20 bits each at least.
    steep = TableChoice(Measured(0, (0, *[63] * 6)), Measured(0, (0, *[63] * 15)), dense=True)
    header = BitWriter()
    header.put_gamma(1_000_000)
    write_choice(header, steep, SPARSE)
    tracemalloc.start()
    with pytest.raises(MalformedPayload):
        CoefficientReader(memoryview(header.to_bytes() + b"\x01" * 200), [SPARSE], 1_000_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000


@settings(deadline=None, max_examples=200)
@given(payload=st.binary(max_size=400))
def test_random_bytes_are_rejected_or_read(payload: bytes) -> None:
    try:
        taken = read_all(payload, [SPARSE, DENSE], [300, 200])
    except MalformedPayload:
        return
    assert [each.size for each in taken] == [300, 200]


@settings(deadline=None, max_examples=100)
@given(place=st.integers(0, 10_000), flipped=st.integers(1, 255))
def test_a_changed_byte_is_rejected_or_read(place: int, flipped: int) -> None:
    payload, defaults, sizes = sample()
    changed = bytearray(payload)
    changed[place % len(payload)] ^= flipped
    try:
        taken = read_all(bytes(changed), defaults, sizes)
    except MalformedPayload:
        return
    assert [each.size for each in taken] == sizes
