"""Classes of coefficients to bytes and back, without loss: the one entropy coder of all codecs.

A class holds coefficients (whole numbers, mostly zeros) that are alike, so that one table of :mod:`tokens`
suits them. Both sides know the number of classes and a default table for each.

    payload  = header | symbols of all classes (rANS) | signs | raw bits
    header   = for each class: number of nonzeros (gamma) [ 0 | 1 dense (1) gaps' and excesses' marginal ]
    marginal = 0 (the default's) | 1 index (5) spread (2) | 2 shift (5) length (6) of each bucket

The numbers 0, 1 and 2 take two bits, those in parentheses so many. Brackets hold what a class of less than
eight nonzeros does not have: it is coded with the default table. A class ends with its last nonzero: the
zeros after it are not written, the reader asks for as many as it needs. The first signs (a one for a negative
coefficient) are the rANS lanes' seeds, the others follow the symbols. Raw bits come class by class, the gaps'
before the excesses'.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from fedtide.wire.codecs.entropy import rans
from fedtide.wire.codecs.entropy.bits import BitReader, BitWriter, field_bytes, pack_fields, unpack_fields
from fedtide.wire.codecs.entropy.table_choice import chosen_table, read_choice, write_choice
from fedtide.wire.codecs.entropy.tokens import NUMBER_BITS, Buckets, TableChoice, TokenTable, token_table
from fedtide.wire.errors import MalformedPayload

LARGEST: Final = 1 << NUMBER_BITS
"""Magnitude of a coefficient, at most; classes are shorter."""
FEWEST_FOR_A_TABLE: Final = 8
"""Nonzeros of a class from which on it can have a table of its own."""

Integers = npt.NDArray[np.int32]
Coefficients = npt.NDArray[np.signedinteger]
"""int32, or int8 where all magnitudes are below 128: that takes a quarter of the memory."""
Fields = npt.NDArray[np.int64]


def encode_classes(classes: Sequence[Coefficients], defaults: Sequence[TableChoice]) -> bytes:
    """Encode the coefficients of all classes.

    Args:
        classes: int8 or int32 of shape ``(n,)`` each, zeros included, in the order in which they are read.
        defaults: a table for each; another one is written down where that takes fewer bytes.

    Raises:
        ValueError: a magnitude above ``LARGEST``, or a class that is not shorter.
    """
    header = BitWriter()
    encoded = []
    for coefficients, default in zip(classes, defaults, strict=True):
        tokens = _tokens_of(coefficients)
        header.put_gamma(tokens.gaps.size)
        if tokens.gaps.size:
            choice = default
            if tokens.gaps.size >= FEWEST_FOR_A_TABLE:
                choice = chosen_table(tokens.gaps, tokens.excesses, default)
                write_choice(header, choice, default)
            encoded.append(_encoded(tokens, token_table(choice)))
    return header.to_bytes() + _body(encoded)


class CoefficientReader:
    """Reads classes from a payload. Everything is decoded and checked at once; ``take`` only places it."""

    def __init__(self, payload: memoryview, defaults: Sequence[TableChoice], max_coefficients: int) -> None:
        """Decode all of the payload.

        Args:
            payload: contiguous bytes, all of which must be used.
            defaults: as for encoding.
            max_coefficients: how many all classes together can have, zeros included.

        Raises:
            MalformedPayload: anything is wrong with the payload.
        """
        self._nonzeros = _decoded(payload, defaults, max_coefficients)
        self._taken = [0] * len(defaults)
        self._positions = [0] * len(defaults)

    def take(self, class_index: int, count: int) -> Integers:
        """The next ``count`` coefficients of a class, new and writeable."""
        positions, values = self.take_nonzeros(class_index, count)
        coefficients = np.zeros(count, np.int32)
        coefficients[positions] = values
        return coefficients

    def take_nonzeros(self, class_index: int, count: int | None = None) -> tuple[Integers, Integers]:
        """Which of the next ``count`` coefficients of a class are not zero, ascending from 0, and these.

        Without a count: all that are left.
        """
        nonzeros = self._nonzeros[class_index]
        first, start = self._taken[class_index], self._positions[class_index]
        if count is None:
            count = LARGEST - start
        last = first + int(nonzeros.positions[first:].searchsorted(np.int32(start + count)))
        self._taken[class_index], self._positions[class_index] = last, start + count
        return nonzeros.positions[first:last] - np.int32(start), nonzeros.values[first:last]

    @property
    def peak(self) -> int:
        """The largest magnitude of any class."""
        extremes = ((each.values.max(initial=0), each.values.min(initial=0)) for each in self._nonzeros)
        return max((max(int(high), -int(low)) for high, low in extremes), default=0)

    def finish(self) -> None:
        """Return if all nonzero coefficients were taken.

        Raises:
            MalformedPayload: a class is longer than what was asked of it.
        """
        for number, (nonzeros, taken) in enumerate(zip(self._nonzeros, self._taken, strict=True)):
            if taken < nonzeros.values.size:
                raise MalformedPayload(
                    f"class {number} has {nonzeros.values.size:,} nonzeros; {taken:,} of them have a place"
                )


@dataclass(frozen=True)
class _Tokens:
    """A class's nonzero coefficients, shape ``(nonzeros,)`` each."""

    gaps: Integers
    excesses: Integers
    negative: rans.Bits


@dataclass(frozen=True)
class _Encoded:
    """A class in the parts of the payload."""

    run: rans.Run
    symbols: rans.Symbols
    negative: rans.Bits
    raw: Fields
    widths: Fields


@dataclass(frozen=True)
class _Nonzeros:
    """Where a class's nonzero coefficients stand, ascending, and what they are."""

    positions: Integers
    values: Integers


def _tokens_of(coefficients: Coefficients) -> _Tokens:
    if coefficients.size >= LARGEST:
        raise ValueError(
            f"a class of {coefficients.size:,} coefficients; it must have fewer than {LARGEST:,}"
        )
    (positions,) = (coefficients != 0).nonzero()  # twice as fast as of the coefficients themselves
    values = coefficients[positions].astype(np.int32)
    excesses = np.abs(values)  # of -2^31, it is negative
    if values.size and (int(excesses.max()) > LARGEST or int(excesses.min()) < 0):
        raise ValueError(f"a coefficient of magnitude above {LARGEST:,}")
    excesses -= 1
    gaps = np.empty(positions.size, np.int32)
    gaps[:1] = positions[:1]
    np.subtract(positions[1:], positions[:-1], out=gaps[1:], casting="same_kind")
    gaps[1:] -= 1
    return _Tokens(gaps, excesses, values < 0)


def _encoded(tokens: _Tokens, table: TokenTable) -> _Encoded:
    gap_buckets, excess_buckets = table.gaps.of(tokens.gaps), table.excesses.of(tokens.excesses)
    gap_raw, gap_widths = _raw_bits(tokens.gaps, gap_buckets, table.gaps)
    excess_raw, excess_widths = _raw_bits(tokens.excesses, excess_buckets, table.excesses)
    return _Encoded(
        rans.Run(table.frequencies, gap_buckets.size),
        gap_buckets * np.uint8(table.excesses.widths.size) + excess_buckets,
        tokens.negative,
        np.concatenate([gap_raw, excess_raw]),
        np.concatenate([gap_widths, excess_widths]),
    )


def _raw_bits(numbers: Integers, buckets: rans.Symbols, among: Buckets) -> tuple[Fields, Fields]:
    """What tells the numbers of each bucket apart, and its widths, where there is any."""
    widths = among.widths
    (places,) = (widths > 0)[buckets].nonzero()
    used = buckets[places]
    return numbers[places] - among.first_numbers[used], widths[used]


def _body(encoded: Sequence[_Encoded]) -> bytes:
    if not encoded:
        return b""
    symbols = np.concatenate([each.symbols for each in encoded])
    negative = np.concatenate([each.negative for each in encoded])
    seeds = rans.SEED_BITS * rans.lanes_for(symbols.size)
    return b"".join((
        rans.encode(symbols, [each.run for each in encoded], negative[:seeds]),
        np.packbits(negative[seeds:], bitorder="little").tobytes(),
        pack_fields(
            np.concatenate([each.raw for each in encoded]), np.concatenate([each.widths for each in encoded])
        ),
    ))  # fmt: skip


def _decoded(payload: memoryview, defaults: Sequence[TableChoice], max_coefficients: int) -> list[_Nonzeros]:
    header = BitReader(payload)
    tables, counts, left = [], [], max_coefficients
    for default in defaults:
        counts.append(header.get_gamma(left))
        left -= counts[-1]
        choice = read_choice(header, default) if counts[-1] >= FEWEST_FOR_A_TABLE else default
        tables.append(token_table(choice) if counts[-1] else None)
    body = header.end()
    runs = [rans.Run(table.frequencies, count) for table, count in zip(tables, counts, strict=True) if table]
    symbols, seeds, used = rans.decode(body, runs)
    negative, rest = _signs(body[used:], seeds, symbols.size)
    ends = np.cumsum(counts).tolist()
    coded = [
        _Coded(symbols[end - count : end], table) if table else None
        for end, count, table in zip(ends, counts, tables, strict=True)
    ]
    raw = unpack_fields(rest, np.concatenate([_NO_WIDTHS, *(each.widths for each in coded if each)]))
    decoded, left = [], max_coefficients
    for end, count, each in zip(ends, counts, coded, strict=True):
        if each is None:
            decoded.append(_NO_NONZEROS)
            continue
        gaps, magnitudes = each.numbers(raw[: each.widths.size])
        raw = raw[each.widths.size :]
        left -= int(gaps.sum(dtype=np.int64)) + count
        if left < 0:
            raise MalformedPayload(f"more coefficients than the {max_coefficients:,} that there are")
        magnitudes += 1
        magnitudes *= 1 - 2 * negative[end - count : end].view(np.int8)
        gaps += 1
        positions = np.cumsum(gaps, dtype=np.int32, out=gaps)
        positions -= 1
        decoded.append(_Nonzeros(positions, magnitudes))
    return decoded


def _signs(payload: memoryview, seeds: rans.Bits, count: int) -> tuple[rans.Bits, memoryview]:
    """Whether each coefficient is negative, and what follows the signs."""
    byte_count = field_bytes(max(0, count - seeds.size))
    if payload.nbytes < byte_count:
        raise MalformedPayload(f"{payload.nbytes:,} bytes follow the symbols; the signs take {byte_count:,}")
    signs = np.unpackbits(np.frombuffer(payload, np.uint8, byte_count), bitorder="little").view(np.bool_)
    negative = np.concatenate([seeds, signs])
    if negative[count:].any():
        raise MalformedPayload("the bits that fill the signs' last byte or seed are not zeros")
    return negative[:count], payload[byte_count:]


_NO_WIDTHS: Final = np.empty(0, np.uint8)
_NO_NONZEROS: Final = _Nonzeros(np.empty(0, np.int32), np.empty(0, np.int32))


class _Coded:
    """A class's symbols, and where their raw bits belong."""

    def __init__(self, symbols: rans.Symbols, table: TokenTable) -> None:
        columns = np.uint8(table.excesses.widths.size)
        self._kinds = []
        for buckets, among in ((symbols // columns, table.gaps), (symbols % columns, table.excesses)):
            (places,) = (among.widths > 0)[buckets].nonzero()
            self._kinds.append((buckets, among, places))
        self.widths = np.concatenate(
            [among.widths.astype(np.uint8)[buckets[places]] for buckets, among, places in self._kinds]
        )

    def numbers(self, raw: Fields) -> tuple[Integers, Integers]:
        """Gaps and excesses, new."""
        found = []
        for buckets, among, places in self._kinds:
            numbers = among.first_numbers[buckets]
            numbers[places] += raw[: places.size].astype(np.int32)
            raw = raw[places.size :]
            found.append(numbers)
        gaps, excesses = found
        return gaps, excesses
