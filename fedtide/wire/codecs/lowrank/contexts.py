"""Which table each entry of a factor is coded with, predicted from what encoder and decoder both know.

A class holds entries of the same expected magnitude σ, in octaves of the step. The prediction for entry i
of component k starts from σ = 2^e_k / √n (the factor's norm, spread over n entries) and is corrected by how
large the same entry and its neighbours were in earlier components: rows and columns of a delta differ a lot
in magnitude, and keep that over components.

Components are coded in waves of 1, 1, 2, 4, 8, ...: those of a wave are predicted from all waves before it,
so that they are coded at once. Everything here is made of whole numbers, so that every machine has the same
classes. Logarithms are in sixteenths of an octave.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Final

import numpy as np
import numpy.typing as npt

from fedtide.wire.codecs.entropy.tokens import EXCESSES, GAPS, Family, TableChoice

Classes = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]

CLASSES: Final = 16
UNIT_CLASS: Final = 5
"""The class of σ = 1 step."""

_WAVES: Final = (0, 1, 2, 4, 8, 16, 32, 64)
_OCTAVE: Final = 16
_OWN_WEIGHT: Final = 4
"""Of an entry's own history; each of its two neighbours counts 1."""
_WEIGHTS: Final = _OWN_WEIGHT + 2
_DOUBT: Final = 3
"""Added to sum and mean of the history, half an entry of magnitude 1: a short history proves little."""
_TABLE_BITS: Final = 12


def _log2_table() -> list[int]:
    """floor(16 log2(n)) of the numbers below 2^12, by whole numbers: 2^k ≤ n^16."""
    return [0, *((number**_OCTAVE).bit_length() - 1 for number in range(1, 1 << _TABLE_BITS))]


_LOG2_LIST: Final = _log2_table()
_LOG2: Final = np.array(_LOG2_LIST, np.int32)
_CLASS_OF: Final = np.arange(CLASSES, dtype=np.uint8).repeat(_OCTAVE)
"""The class of each log2 σ; below and above, the first and the last one."""


def log2_sixteenths(number: int) -> int:
    """About 16 log2 of a whole number from 1; of large ones, the highest 12 bits count."""
    shift = max(0, number.bit_length() - _TABLE_BITS)
    return _LOG2_LIST[number >> shift] + _OCTAVE * shift


def waves(rank: int) -> Iterator[slice]:
    """The components of each wave."""
    for first, last in pairwise(_WAVES):
        if first < rank:
            yield slice(first, min(last, rank))


class Predictor:
    """Predicts the classes of the vectors of several sides: the a_k, or the b_k, of some matrices.

    Sides stand one after the other, those of matrices of higher rank first, so that the sides that still have
    a component k come before those that do not.

    Attributes:
        starts: of the sides' entries.
    """

    def __init__(self, lengths: Sequence[int], prior: Integers) -> None:
        """Begin with no history.

        Args:
            lengths: for each side, entries of its vectors.
            prior: what to add to log2 σ of each entry without a history, in sixteenths, for all sides.
        """
        self._lengths = np.array(lengths)
        self._length_list = list(lengths)
        self._lasts = np.cumsum(self._lengths) - 1
        self.starts = self._lasts - self._lengths + 1
        self._log_lengths = [log2_sixteenths(length) for length in lengths]
        self._logs = np.array(
            [UNIT_CLASS * _OCTAVE + _OCTAVE // 2 - each // 2 for each in self._log_lengths], np.int32
        )
        self._correction = prior
        self._history = np.zeros(prior.size, np.int32)

    def classes(self, exponents: Integers) -> Classes:
        """The class of each entry of a wave's components, shape ``(components, entries)``.

        Args:
            exponents: shape ``(components, sides)``; of the first sides, as many as have the first component.
        """
        sides = exponents.shape[1]
        logs = (self._logs[:sides] + _OCTAVE * exponents).repeat(self._lengths[:sides], axis=1)
        logs += self._correction[: logs.shape[1]]
        classes: Classes = _CLASS_OF.take(logs, mode="clip")
        return classes

    def learn(self, components: Integers) -> None:
        """Take a wave's entries into the history: shaped as ``classes``, zeros where no component is."""
        history = self._history
        history[: components.shape[1]] += np.add.reduce(np.abs(components), axis=0, dtype=np.int32)
        smoothed = history * np.int32(_OWN_WEIGHT)
        smoothed[1:] += history[:-1]
        smoothed[:-1] += history[1:]
        # The last entry of a side and the first one of the next are no neighbours.
        lasts = self._lasts[:-1]
        smoothed[lasts] -= history[lasts + 1]
        smoothed[lasts + 1] -= history[lasts]
        smoothed += np.int32(_DOUBT)
        totals = np.add.reduceat(history, self.starts, dtype=np.int64).tolist()
        means = [
            log2_sixteenths(_DOUBT * length + _WEIGHTS * total) - log_length
            for length, log_length, total in zip(self._length_list, self._log_lengths, totals, strict=True)
        ]
        self._correction = _LOG2.take(smoothed, mode="clip")
        self._correction -= np.array(means, np.int32).repeat(self._lengths)


_FIRST_SPARSE: Final = 6
"""From this index of the mean gap on (0.5), tables are of the sparse layout."""
_GAP_INDICES: Final = (31, 28, 24, 19, 13, 10, 7, 5, 4, 3, 2, 1, 0, 0, 0, 0)
_EXCESS_INDICES: Final = (0, 0, 2, 3, 3, 5, 7, 10, 12, 13, 14, 15, 16, 17, 18, 19)
"""Of each class's table: fitted to deltas of other models than the benchmarks' (multilayer perceptrons of 10
and 100 thousand parameters and a convolutional network of 93 thousand, on scikit-learn's digits)."""

TABLES: Final[tuple[TableChoice, ...]] = tuple(
    TableChoice(Family(gap, 1), Family(excess, 1), dense=gap < _FIRST_SPARSE)
    for gap, excess in zip(_GAP_INDICES, _EXCESS_INDICES, strict=True)
)

MEAN_GAPS: Final = tuple(GAPS.mean_of(gap) / 2**16 for gap in _GAP_INDICES)
"""Zeros before a nonzero entry, by class."""
MEAN_EXCESSES: Final = tuple(EXCESSES.mean_of(excess) / 2**16 for excess in _EXCESS_INDICES)
"""Of a nonzero entry's magnitude, less 1, by class."""
