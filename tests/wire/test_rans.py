"""The coder of symbols, and the bits around it."""

import tracemalloc

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtide.wire.codecs.entropy import rans
from fedtide.wire.codecs.entropy.bits import BitReader, BitWriter, pack_fields, unpack_fields
from fedtide.wire.errors import MalformedPayload


def table(*frequencies: int) -> rans.Table:
    return rans.table_of(np.array(frequencies))


EVEN = table(4096, 4096)
STEEP = table(8189, 1, 1, 1)
MIXED = table(4000, 2000, 1000, 1000, 100, 60, 31, 1)


def symbols_of(table: rans.Table, count: int, seed: int = 0) -> rans.Symbols:
    rng = np.random.default_rng(seed)
    return rng.choice(table.frequencies.size, count, p=table.frequencies / 8192).astype(np.uint8)


def seeds_of(count: int) -> rans.Bits:
    return np.random.default_rng(count).random(16 * rans.lanes_for(count)) < 0.5


def round_trip(symbols: rans.Symbols, runs: list[rans.Run], seeds: rans.Bits) -> bytes:
    coded = rans.encode(symbols, runs, seeds)
    decoded, bits, used = rans.decode(memoryview(coded + b"rest"), runs)
    assert np.array_equal(decoded, symbols)
    assert np.array_equal(bits[: seeds.size], seeds)
    assert not bits[seeds.size :].any()
    assert used == len(coded)
    return coded


# Symbols


@pytest.mark.parametrize(
    "count", [0, 1, 2, 63, 64, 65, 128, 129, 5000, 9999, 10_000, 10_001, 70_000, 270_000]
)
@pytest.mark.parametrize("table", [EVEN, STEEP, MIXED], ids=["even", "steep", "mixed"])
def test_symbols_and_seeds_come_back(table: rans.Table, count: int) -> None:
    round_trip(symbols_of(table, count), [rans.Run(table, count)], seeds_of(count))


@settings(deadline=None, max_examples=60)
@given(
    parts=st.lists(st.tuples(st.sampled_from([EVEN, STEEP, MIXED]), st.integers(0, 300)), max_size=8),
    seed_share=st.floats(0, 1),
)
def test_runs_of_any_lengths_and_tables_come_back(
    parts: list[tuple[rans.Table, int]], seed_share: float
) -> None:
    runs = [rans.Run(table, count) for table, count in parts]
    symbols = np.concatenate([np.zeros(0, np.uint8), *(symbols_of(*part) for part in parts)])
    seeds = seeds_of(symbols.size)
    round_trip(symbols, runs, seeds[: round(seeds.size * seed_share)])


def test_a_run_over_several_blocks_with_a_change_of_tables_inside_one_comes_back() -> None:
    # 90,000 symbols in blocks of about 32,768: the tables change at 40,000 and at 40,001.
    runs = [rans.Run(MIXED, 40_000), rans.Run(STEEP, 1), rans.Run(EVEN, 49_999)]
    symbols = np.concatenate([symbols_of(run.table, run.count) for run in runs])
    round_trip(symbols, runs, seeds_of(90_000))


def test_decoding_symbols_of_many_tables_takes_64_kib_for_each_and_little_more() -> None:
    # 16 tables of 8192 slots of 8 bytes: 1 MiB. 3200 symbols are coded in 50 lanes, next to nothing.
    frequencies = [np.array([8192 - 255 - number, *[1] * (255 + number - 1), 1]) for number in range(-16, 0)]
    symbols = np.tile(np.arange(200, dtype=np.uint8), 16)
    coded = rans.encode(symbols, [rans.Run(rans.table_of(each), 200) for each in frequencies], seeds_of(3200))
    tracemalloc.start()
    runs = [rans.Run(rans.table_of(each), 200) for each in frequencies]
    decoded, _, _ = rans.decode(memoryview(coded), runs)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(decoded, symbols)
    assert peak < 1.3 * 2**20


def test_two_even_symbols_are_coded_as_computed_by_hand() -> None:
    # One lane, which begins at 2^16 + seed 0b11 = 65539. Symbols [1, 0] are encoded from the last: 0 has
    # f = 4096, c = 0: (65539 div 4096) * 8192 + 0 + 65539 mod 4096 = 16 * 8192 + 3 = 131075. 1 has c = 4096:
    # 131075 div 4096 = 32, rest 3: 32 * 8192 + 4096 + 3 = 266243 = 2^18 + 4099. That has 19 bits:
    # 19 - 17 = 2 as the length, then its lower 18 bits, 4099 = 0x1003, in three bytes; no words.
    coded = rans.encode(np.array([1, 0], np.uint8), [rans.Run(EVEN, 2)], np.array([True, True]))
    assert coded == bytes.fromhex("02 031000")


def test_a_symbol_that_does_not_fit_moves_sixteen_bits_to_the_words() -> None:
    # f = 1 and c = 8191: the state 2^16 stays below 2^19, so it becomes 2^16 * 2^13 + 8191 = 2^29 + 8191.
    # Before the next one (encoded later, decoded first) 2^29 + 8191 >= 2^19: its lower 16 bits, 0x1fff, are
    # the word; 2^13 remain and become 2^13 * 2^13 + 8191 = 2^26 + 8191: 27 bits, length 10, 26 bits 0x1fff.
    coded = rans.encode(np.array([3, 3], np.uint8), [rans.Run(STEEP, 2)], np.zeros(0, np.bool_))
    assert coded == bytes.fromhex("0a ff1f0000 ff1f")


@pytest.mark.parametrize("count", [800, 6000, 100_000])
def test_little_is_lost_against_the_entropy(count: int) -> None:
    # A lane takes 4 bits more than its symbols: of 64 symbols with 1.85 bits each, 3.4 %; beyond 10,000
    # symbols, lanes are longer.
    symbols, seeds = symbols_of(MIXED, count), seeds_of(count)
    ideal_bits = -np.log2(MIXED.frequencies[symbols] / 8192).sum()
    bits = 8 * len(rans.encode(symbols, [rans.Run(MIXED, count)], seeds)) - seeds.size
    assert bits - ideal_bits <= 4.5 * rans.lanes_for(count) + 16


@pytest.mark.parametrize(
    ("symbols", "lanes"), [(0, 0), (1, 1), (64, 1), (65, 2), (6400, 100), (25_600, 200), (10**7, 640)]
)
def test_lanes_are_few_for_few_symbols_and_grow_with_the_root(symbols: int, lanes: int) -> None:
    # 6400 / 64 = 100, and four times the symbols make twice the lanes.
    assert rans.lanes_for(symbols) == lanes


@pytest.mark.parametrize("frequencies", [[8191], [8193, -1], [4096, 4095], [32] * 256 + [0], []])
def test_frequencies_that_are_not_a_table_are_refused(frequencies: list[int]) -> None:
    with pytest.raises(ValueError, match="add up to 8192"):
        rans.table_of(np.array(frequencies, np.int64))


# Hostile bytes


def coded_sample(count: int) -> tuple[bytes, list[rans.Run]]:
    runs = [rans.Run(MIXED, count)]
    return rans.encode(symbols_of(MIXED, count), runs, seeds_of(count)), runs


@pytest.mark.parametrize("count", [1, 64, 65, 700])
def test_every_truncation_of_coded_symbols_is_rejected(count: int) -> None:
    coded, runs = coded_sample(count)
    for length in range(len(coded)):
        with pytest.raises(MalformedPayload):
            rans.decode(memoryview(coded[:length]), runs)


def test_states_that_do_not_end_where_encoders_begin_are_rejected() -> None:
    # Each even symbol halves the state. From 2^18 + 2^17 + 4099 it ends at 2^16 + 2^15 + 3, a seed that no
    # encoder of two symbols needs but that is one; from 2^22 + 4099 at 2^20 + 3: above 2^17.
    runs = [rans.Run(EVEN, 2)]
    rans.decode(memoryview(bytes.fromhex("02 031002")), runs)
    with pytest.raises(MalformedPayload, match="do not end where an encoder begins"):
        rans.decode(memoryview(bytes.fromhex("06 03100000")), runs)


@settings(deadline=None)
@given(payload=st.binary(max_size=300), count=st.integers(0, 500))
def test_random_bytes_are_rejected_or_decode(payload: bytes, count: int) -> None:
    try:
        symbols, seeds, used = rans.decode(memoryview(payload), [rans.Run(MIXED, count)])
    except MalformedPayload:
        return
    assert symbols.size == count
    assert int(symbols.max(initial=0)) < 8
    assert seeds.size == 16 * rans.lanes_for(count)
    assert used <= len(payload)


# Bits


def test_numbers_take_as_many_bits_as_they_are_given() -> None:
    # 5 = 101, then 0 in two bits, then 9 = 1001: from the lowest bit 101 00 1|001, filled with zeros.
    writer = BitWriter()
    for value, width in ((5, 3), (0, 2), (9, 4)):
        writer.put(value, width)
    assert writer.to_bytes() == bytes([0b00100101, 0b1])
    reader = BitReader(memoryview(writer.to_bytes() + b"rest"))
    assert [reader.get(3), reader.get(2), reader.get(4)] == [5, 0, 9]
    assert bytes(reader.end()) == b"rest"


def test_gamma_codes_are_as_computed_by_hand() -> None:
    # 0 -> 1 = "1". 4 -> 5 = 101: two zeros, a one, then 01 from the lowest bit "10": 1|00|1|10.
    writer = BitWriter()
    writer.put_gamma(0)
    writer.put_gamma(4)
    assert writer.to_bytes() == bytes([0b011001])


@given(numbers=st.lists(st.integers(0, 2**31)))
def test_gamma_codes_come_back(numbers: list[int]) -> None:
    writer = BitWriter()
    for number in numbers:
        writer.put_gamma(number)
    reader = BitReader(memoryview(writer.to_bytes()))
    assert [reader.get_gamma(2**31) for _ in numbers] == numbers
    assert not reader.end()


def test_a_number_that_does_not_fit_is_not_written() -> None:
    for value in (-1, 8):
        with pytest.raises(ValueError, match="does not fit into 3 bits"):
            BitWriter().put(value, 3)


@pytest.mark.parametrize("payload", [b"", b"\0", b"\0" * 1000, b"\x20"], ids=["empty", "0", "zeros", "32"])
def test_a_gamma_code_that_ends_early_or_is_too_large_is_rejected(payload: bytes) -> None:
    # 0x20: five zeros and a one: at least 2^5 - 1 = 31.
    with pytest.raises(MalformedPayload):
        BitReader(memoryview(payload)).get_gamma(30)


def test_a_header_whose_last_byte_is_not_filled_with_zeros_is_rejected() -> None:
    reader = BitReader(memoryview(b"\x81"))
    reader.get(3)
    with pytest.raises(MalformedPayload, match="not zeros"):
        reader.end()


fields = st.lists(
    st.integers(0, 32).flatmap(lambda width: st.tuples(st.integers(0, 2**width - 1), st.just(width)))
)


def arrays(pairs: list[tuple[int, int]]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    both = np.array(pairs, np.int64).reshape(-1, 2)
    return both[:, 0].copy(), both[:, 1].copy()


@settings(deadline=None, max_examples=60)
@given(pairs=fields)
def test_fields_of_any_widths_equal_numbers_written_one_by_one_and_come_back(
    pairs: list[tuple[int, int]],
) -> None:
    values, widths = arrays(pairs)
    writer = BitWriter()
    for value, width in pairs:
        writer.put(value, width)
    packed = pack_fields(values, widths)
    assert packed == writer.to_bytes()
    assert np.array_equal(unpack_fields(memoryview(packed), widths), values)


def test_fields_of_another_length_or_with_bits_left_over_are_rejected() -> None:
    widths = np.array([3, 7])  # ten bits: two bytes, six bits of which are unused
    for payload in (b"", b"\0", b"\0\0\0", b"\0\x04", b"\0\x80"):
        with pytest.raises(MalformedPayload):
            unpack_fields(memoryview(payload), widths)
    assert list(unpack_fields(memoryview(b"\xff\x03"), widths)) == [7, 127]
