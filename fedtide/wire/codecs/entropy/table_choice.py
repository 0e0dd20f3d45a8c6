"""Which table suits a class, and how a header names it; see :mod:`coefficients` for the format."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt

from fedtide.wire.codecs.entropy.bits import BitReader, BitWriter
from fedtide.wire.codecs.entropy.tokens import (
    EXCESSES,
    GAPS,
    INDICES,
    LARGEST_SHIFT,
    LENGTHS,
    SPREADS,
    Buckets,
    Family,
    Marginal,
    Measured,
    NumberKind,
    TableChoice,
    is_dense,
)
from fedtide.wire.errors import MalformedPayload

Numbers = npt.NDArray[np.integer]
Counts = npt.NDArray[np.float64]

_NEVER: Final = LENGTHS - 1
"""The length of a bucket that does not occur."""
_DEFAULT, _FAMILY, _MEASURED = range(3)
_KIND_BITS: Final = 2
_INDEX_BITS: Final = (INDICES - 1).bit_length()
_SPREAD_BITS: Final = (SPREADS - 1).bit_length()
_SHIFT_BITS: Final = LARGEST_SHIFT.bit_length()
_LENGTH_BITS: Final = (LENGTHS - 1).bit_length()
_WORTH_MEASURING: Final = 100
"""Tokens below which a measured marginal, of 5 to 13 bytes, hardly ever pays."""


_CAP: Final = 4096
"""Numbers below are counted one by one; hardly any are above."""


@dataclass(frozen=True)
class _Candidate:
    marginal: Marginal
    bits: float


class _Histogram:
    """How often each number occurs: all that choosing a table needs to know of a class."""

    def __init__(self, blocks: Sequence[Numbers]) -> None:
        counts, above = np.zeros(_CAP + 1, np.int64), [np.empty(0, np.int32)]
        self.total, sum_of_all = 0, 0
        for numbers in blocks:
            self.total += numbers.size
            sum_of_all += int(numbers.sum(dtype=np.int64))
            if numbers.dtype != np.uint8 and int(numbers.max()) >= _CAP:
                above.append(numbers[numbers >= _CAP].astype(np.int32))
            of_block = np.bincount(numbers if numbers.dtype == np.uint8 else np.minimum(numbers, _CAP))
            counts[: of_block.size] += of_block
        self._above = np.concatenate(above)
        largest = int(counts[:_CAP].nonzero()[0][-1]) if self._above.size < self.total else 0
        self._counts = counts[: largest + 1].astype(np.float64)
        self.mean = sum_of_all / self.total

    def bits(self, kind: NumberKind, marginal: Marginal, *, dense: bool) -> float:
        """What all numbers take with a marginal."""
        lengths = _lengths(kind, marginal, dense=dense)
        bits = float(self._counts @ lengths.by_number[: self._counts.size])
        if self._above.size:
            bits += float(lengths.by_bucket[lengths.buckets.of(self._above)].sum())
        return bits

    def in_buckets(self, buckets: Buckets) -> Counts:
        """How many numbers each bucket has."""
        numbers = np.arange(self._counts.size, dtype=np.int32)
        counts = np.bincount(buckets.of(numbers), self._counts, buckets.widths.size).astype(np.float64)
        counts += np.bincount(buckets.of(self._above), minlength=buckets.widths.size)
        return counts


@dataclass(frozen=True)
class _Lengths:
    """Bits that numbers take with a marginal, raw ones included.

    Inexact: only the encoder's choice hangs on it.
    """

    buckets: Buckets
    by_bucket: Counts
    by_number: Counts


@lru_cache(maxsize=128)
def _lengths(kind: NumberKind, marginal: Marginal, *, dense: bool) -> _Lengths:
    buckets, weights = kind.buckets(marginal, dense=dense), kind.weights(marginal, dense=dense)
    by_bucket = np.log2(weights.sum() / np.maximum(weights, 1)) + buckets.widths
    return _Lengths(buckets, by_bucket, by_bucket[buckets.of(np.arange(_CAP, dtype=np.int32))])


def chosen_table(gaps: Sequence[Numbers], excesses: Sequence[Numbers], default: TableChoice) -> TableChoice:
    """The choice that takes the fewest bits for these tokens, its own in the header included.

    Args:
        gaps: zeros before each token, in blocks of at least one.
        excesses: its magnitude − 1, likewise.
        default: of the family; needs no bits.
    """
    gap_counts, excess_counts = _Histogram(gaps), _Histogram(excesses)
    dense = is_dense(gap_counts.mean)
    gap = _cheapest(GAPS, gap_counts, default.gap, dense=dense)
    excess = _cheapest(EXCESSES, excess_counts, default.excess, dense=dense)
    own_bits = gap.bits + excess.bits + 1 + 2 * _KIND_BITS
    default_bits = gap_counts.bits(GAPS, default.gap, dense=default.dense)
    default_bits += excess_counts.bits(EXCESSES, default.excess, dense=default.dense)
    return default if default_bits <= own_bits else TableChoice(gap.marginal, excess.marginal, dense)


def _cheapest(kind: NumberKind, numbers: _Histogram, default: Marginal, *, dense: bool) -> _Candidate:
    """The best marginal in this layout."""
    index = kind.index_of(numbers.mean)
    best = _Candidate(default, numbers.bits(kind, default, dense=dense))
    for marginal in (Family(index, spread) for spread in range(SPREADS)):
        bits = numbers.bits(kind, marginal, dense=dense) + _INDEX_BITS + _SPREAD_BITS
        if bits < best.bits:
            best = _Candidate(marginal, bits)
    if numbers.total >= _WORTH_MEASURING:
        measured = _measured(kind.buckets(Family(index, 0), dense=dense), numbers)
        if measured.bits < best.bits:
            best = measured
    return best


def _measured(buckets: Buckets, numbers: _Histogram) -> _Candidate:
    counts = numbers.in_buckets(buckets)
    ideal = np.log2(numbers.total / np.maximum(counts, 1))
    bits = float(counts @ (ideal + buckets.widths)) + _SHIFT_BITS + _LENGTH_BITS * counts.size
    lengths = np.minimum(np.rint(4 * ideal), _NEVER - 1)
    lengths[counts == 0] = _NEVER
    return _Candidate(Measured(buckets.shift, tuple(lengths.astype(int).tolist())), bits)


def write_choice(header: BitWriter, choice: TableChoice, default: TableChoice) -> None:
    """Write a class's choice."""
    header.put(choice != default, 1)
    if choice != default:
        header.put(choice.dense, 1)
        _write_marginal(header, choice.gap, default.gap)
        _write_marginal(header, choice.excess, default.excess)


def read_choice(header: BitReader, default: TableChoice) -> TableChoice:
    """Read what :func:`write_choice` wrote.

    Raises:
        MalformedPayload: the header ends, or a number is out of range.
    """
    if not header.get(1):
        return default
    dense = bool(header.get(1))
    gap = _read_marginal(header, default.gap, GAPS, dense=dense)
    return TableChoice(gap, _read_marginal(header, default.excess, EXCESSES, dense=dense), dense)


def _write_marginal(header: BitWriter, marginal: Marginal, default: Marginal) -> None:
    if marginal == default:
        header.put(_DEFAULT, _KIND_BITS)
    elif isinstance(marginal, Family):
        header.put(_FAMILY, _KIND_BITS)
        header.put(marginal.index, _INDEX_BITS)
        header.put(marginal.spread, _SPREAD_BITS)
    else:
        header.put(_MEASURED, _KIND_BITS)
        header.put(marginal.shift, _SHIFT_BITS)
        for length in marginal.lengths:
            header.put(length, _LENGTH_BITS)


def _read_marginal(header: BitReader, default: Marginal, kind: NumberKind, *, dense: bool) -> Marginal:
    match header.get(_KIND_BITS):
        case 0:
            return default
        case 1:
            index, spread = header.get(_INDEX_BITS), header.get(_SPREAD_BITS)
            if spread >= SPREADS:
                raise MalformedPayload(f"a table of spread {spread}; it must be below {SPREADS}")
            return Family(index, spread)
        case 2:
            shift = header.get(_SHIFT_BITS)
            if shift > LARGEST_SHIFT:
                raise MalformedPayload(f"a table with a shift of {shift}; it must be up to {LARGEST_SHIFT}")
            packed = header.get(_LENGTH_BITS * len(kind.scale(dense=dense).starts))
            places = range(0, _LENGTH_BITS * len(kind.scale(dense=dense).starts), _LENGTH_BITS)
            lengths = tuple(packed >> place & LENGTHS - 1 for place in places)
            if min(lengths) == _NEVER:
                raise MalformedPayload("a table without symbols; one must occur")
            return Measured(shift, lengths)
        case unknown:
            raise MalformedPayload(f"a table of kind {unknown}; it must be 0, 1 or 2")
