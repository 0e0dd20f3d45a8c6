"""Nonzero coefficients as tokens, and the tables that they are coded with.

A token is a nonzero coefficient with the zeros before it: its gap (how many) and its excess (magnitude − 1).
Both fall into buckets that are wider the larger the numbers. A token's symbol is

    gap bucket · excess buckets + excess bucket

and raw bits say where in its bucket each number lies. Scarce or large numbers are first divided by 2^shift
(the last ``shift`` bits are raw, too), which leaves the few buckets where most of them fall.

Gaps and excesses have a marginal each: one of a fixed family, by a mean and a spread, or one that the encoder
measured and wrote down. A table is the product of both. Everything is made of whole numbers, so that every
machine has the same tables.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import log2
from typing import Final

import numpy as np
import numpy.typing as npt

from fedtide.wire.codecs.entropy.rans import PRECISION, Table, table_of

NUMBER_BITS: Final = 30
"""Gaps and excesses are below 2^30."""
LARGEST_SHIFT: Final = 22
"""So that the last bucket of gaps ends below 2^31."""
INDICES: Final = 32
"""Means in the family."""
SPREADS: Final = 3
"""Shapes in the family: geometric, wider, much wider."""
LENGTHS: Final = 64
"""A measured marginal gives a bucket 0 to 62 quarters of a bit; 63: it does not occur."""

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Family:
    """A marginal of the fixed family: a mixture of geometric distributions.

    Attributes:
        index: of the mean, 0 to ``INDICES`` − 1.
        spread: 0 to ``SPREADS`` − 1.
    """

    index: int
    spread: int


@dataclass(frozen=True)
class Measured:
    """A marginal as the encoder found it.

    Attributes:
        shift: how many of a number's last bits are raw, 0 to ``LARGEST_SHIFT``.
        lengths: for each bucket, −4 log2 of its share, 0 to ``LENGTHS`` − 2, or ``LENGTHS`` − 1: the bucket
            does not occur. One must occur.
    """

    shift: int
    lengths: tuple[int, ...]


Marginal = Family | Measured


@dataclass(frozen=True)
class TableChoice:
    """Which table a class's tokens are coded with.

    Attributes:
        gap: marginal of the zeros before a coefficient.
        excess: marginal of its magnitude − 1.
        dense: whether the buckets suit coefficients of which many are not zero.
    """

    gap: Marginal
    excess: Marginal
    dense: bool


@dataclass(frozen=True)
class Buckets:
    """Buckets of one kind of number in one table: number = first number + raw bits.

    Attributes:
        shift: how many bits are raw in the narrowest bucket.
        first_numbers: int32, of each bucket; all of its numbers are below 2^31 − 1.
        widths: of each bucket's raw bits, int64.
        by_unit: the bucket of each number >> shift, uint8; its last bucket has no end.
    """

    shift: int
    first_numbers: npt.NDArray[np.int32]
    widths: Integers
    by_unit: npt.NDArray[np.uint8]

    def of(self, numbers: npt.NDArray[np.integer]) -> npt.NDArray[np.uint8]:
        """Each number's bucket, new."""
        units = numbers >> self.shift if self.shift else numbers
        buckets: npt.NDArray[np.uint8] = self.by_unit.take(units, mode="clip")
        return buckets


@dataclass(frozen=True)
class Scale:
    """The buckets that one kind of number has in one layout.

    Attributes:
        starts: where each begins, in units of 2^shift.
        fineness: shifts leave means of at least 2^fineness units.
    """

    starts: tuple[int, ...]
    fineness: int

    def shift_for(self, mean: float) -> int:
        """How many of the last bits of numbers with this mean shall be raw."""
        return min(max(0, int(mean).bit_length() - 1 - self.fineness), LARGEST_SHIFT)


@lru_cache(maxsize=256)
def _buckets(scale: Scale, shift: int) -> Buckets:
    starts = scale.starts
    widths = [(end - start).bit_length() - 1 + shift for start, end in pairwise(starts)]
    by_unit = np.searchsorted(starts, np.arange(starts[-1] + 1), side="right") - 1
    return Buckets(
        shift,
        (np.array(starts) << shift).astype(np.int32),
        np.array([*widths, NUMBER_BITS]),
        by_unit.astype(np.uint8),
    )


@dataclass(frozen=True, eq=False)
class NumberKind:
    """Gaps, or excesses: what the family's marginals of them are.

    Attributes:
        sparse: the buckets of tables that are not dense.
        dense: the buckets of those that are.
        mean_of: the family's mean of an index, out of 2^16.
        index_of: the index of the family's mean next to a mean.
    """

    sparse: Scale
    dense: Scale
    mean_of: Callable[[int], int]
    index_of: Callable[[float], int]

    def scale(self, *, dense: bool) -> Scale:
        """The buckets of a layout."""
        return self.dense if dense else self.sparse

    def buckets(self, marginal: Marginal, *, dense: bool) -> Buckets:
        """The buckets in a table with this marginal."""
        scale = self.scale(dense=dense)
        if isinstance(marginal, Measured):
            return _buckets(scale, marginal.shift)
        return _buckets(scale, scale.shift_for(self.mean_of(marginal.index) >> _MEAN_BITS))

    def weights(self, marginal: Marginal, *, dense: bool) -> Integers:
        """The buckets' shares, out of about 2^16; none is 0 but those that do not occur."""
        if isinstance(marginal, Measured):
            return np.array([
                max(1, _QUARTERS[length % 4] >> length // 4) if length < LENGTHS - 1 else 0
                for length in marginal.lengths
            ])  # fmt: skip
        starts, shift = self.scale(dense=dense).starts, self.buckets(marginal, dense=dense).shift
        shares = [0] * len(starts)
        for quarters, numerator, denominator in _MIXTURES[marginal.spread]:
            mean = self.mean_of(marginal.index) * numerator // denominator
            for bucket, share in enumerate(_geometric(mean, starts, shift)):
                shares[bucket] += quarters * share
        return np.array([max(1, share >> _SHARE_BITS + 2 - 16) for share in shares])


@dataclass(frozen=True)
class TokenTable:
    """A class's symbols: the numbers they stand for, and their frequencies.

    Attributes:
        gaps: buckets of the zeros before a coefficient.
        excesses: buckets of its magnitude − 1.
        frequencies: of the symbols.
        first_numbers: of each symbol's two buckets, int32, shape ``(symbols, 2)``.
        widths: of their raw bits, uint8, same shape.
    """

    gaps: Buckets
    excesses: Buckets
    frequencies: Table
    first_numbers: npt.NDArray[np.int32]
    widths: npt.NDArray[np.uint8]


_FIRST_SPARSE: Final = 6
"""From this index of the mean gap on (0.5), the family's tables are not dense."""
_MEAN_BITS: Final = 16
"""Fraction bits of means."""
_ROOT_2: Final = 46341
"""2^15 · √2."""
_QUARTERS: Final = (65536, 55109, 46341, 38968)
"""2^16 · 2^(−i/4)."""
_SHARE_BITS: Final = 48
"""Fraction bits of shares while they are multiplied."""
_MIXTURES: Final = (
    ((4, 1, 1),),
    ((2, 1, 4), (2, 7, 4)),
    ((3, 1, 6), (1, 7, 2)),
)
"""For each spread, its components: quarters of the whole, and their mean as a fraction of the family's."""
_KEPT_TABLES: Final = 64
"""A fleet's updates use a handful; a stranger's could ask for all 18 thousand."""


def choice_for(
    mean_gap: float, mean_excess: float, *, gap_spread: int = 1, excess_spread: int = 1
) -> TableChoice:
    """The table of the fixed family next to these means.

    Args:
        mean_gap: zeros before a nonzero coefficient: (1 − d) / d where a share d is not zero.
        mean_excess: of nonzero magnitudes, less 1.
        gap_spread: 0 for coefficients scattered at random; 1 and 2 for ever more clustered ones.
        excess_spread: 0 for exponential magnitudes; 1 and 2 for ever heavier tails.
    """
    gap = Family(GAPS.index_of(mean_gap), gap_spread)
    return TableChoice(gap, Family(EXCESSES.index_of(mean_excess), excess_spread), is_dense(mean_gap))


def is_dense(mean_gap: float) -> bool:
    """Whether the dense layout suits this mean gap."""
    return GAPS.index_of(mean_gap) < _FIRST_SPARSE


def token_table(choice: TableChoice) -> TokenTable:
    """The table of a choice."""
    if isinstance(choice.gap, Family) and isinstance(choice.excess, Family):
        return _kept_table(choice)
    return _built_table(choice)


@lru_cache(maxsize=_KEPT_TABLES)
def _kept_table(choice: TableChoice) -> TokenTable:
    return _built_table(choice)


def _built_table(choice: TableChoice) -> TokenTable:
    gaps = GAPS.weights(choice.gap, dense=choice.dense)
    excesses = EXCESSES.weights(choice.excess, dense=choice.dense)
    gap_buckets = GAPS.buckets(choice.gap, dense=choice.dense)
    excess_buckets = EXCESSES.buckets(choice.excess, dense=choice.dense)
    shape = (gaps.size, excesses.size, 2)
    first_numbers, widths = np.empty(shape, np.int32), np.empty(shape, np.uint8)
    first_numbers[..., 0], first_numbers[..., 1] = (
        gap_buckets.first_numbers[:, None],
        excess_buckets.first_numbers,
    )
    widths[..., 0], widths[..., 1] = gap_buckets.widths[:, None], excess_buckets.widths
    return TokenTable(
        gap_buckets,
        excess_buckets,
        table_of(_frequencies(np.outer(gaps, excesses).reshape(-1))),
        first_numbers.reshape(-1, 2),
        widths.reshape(-1, 2),
    )


def _frequencies(weights: Integers) -> Integers:
    """Whole numbers in proportion to the weights, from 1 where these are not 0.

    What rounding leaves over goes to the largest.
    """
    occurring = weights > 0
    left = (1 << PRECISION) - int(np.count_nonzero(occurring))
    frequencies = occurring + weights * left // int(weights.sum())
    frequencies[np.argmax(frequencies)] += (1 << PRECISION) - int(frequencies.sum())
    return frequencies


def _geometric(mean: int, starts: tuple[int, ...], shift: int) -> list[int]:
    """Shares of the buckets, out of 2^_SHARE_BITS, of geometric numbers with this mean.

    Such a number is at least n with probability (mean / (1 + mean))^n.
    """
    unit = (mean << _SHARE_BITS) // (mean + (1 << _MEAN_BITS))
    for _ in range(shift):
        unit = unit * unit >> _SHARE_BITS
    reached = [_power(unit, start) for start in starts]
    return [low - high for low, high in pairwise([*reached, 0])]


def _power(fraction: int, exponent: int) -> int:
    return fraction**exponent >> _SHARE_BITS * (exponent - 1) if exponent else 1 << _SHARE_BITS


def _half_octaves(octave: int, halves: int) -> int:
    mean = 1 << octave + halves // 2
    return mean * _ROOT_2 >> 15 if halves % 2 else mean


def _gap_mean(index: int) -> int:
    """1/64 to 1/4 by octaves, then up to 2900 by half octaves."""
    return 1 << _MEAN_BITS - 6 + index if index < 4 else _half_octaves(_MEAN_BITS - 2, index - 4)


def _gap_index(mean: float) -> int:
    octaves = log2(max(mean, 2**-6)) + 6
    return min(round(octaves if octaves < 4 else 2 * octaves - 4), INDICES - 1)


def _excess_mean(index: int) -> int:
    """1/16 to 4 by half octaves, then up to 2^21 by octaves."""
    return _half_octaves(_MEAN_BITS - 4, index) if index < 12 else 1 << _MEAN_BITS - 10 + index


def _excess_index(mean: float) -> int:
    octaves = log2(max(mean, 2**-4)) + 4
    return min(round(2 * octaves if octaves < 6 else octaves + 6), INDICES - 1)


GAPS: Final = NumberKind(
    Scale((0, 1, 2, 3, 4, 6, 8, 12, 16, 32, 64, 128), fineness=1),
    Scale((0, 1, 2, 3, 4, 8, 16), fineness=1),
    _gap_mean,
    _gap_index,
)
"""Zeros before a nonzero coefficient."""

EXCESSES: Final = NumberKind(
    Scale((0, 1, 2, 3, 4, 6, 8, 16, 32, 64), fineness=1),
    Scale((0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 24, 32, 64), fineness=2),
    _excess_mean,
    _excess_index,
)
"""Magnitudes less 1."""
