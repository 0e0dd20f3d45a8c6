"""The nonzero coefficients of all classes, in little memory."""

from typing import Final

import numpy as np
import numpy.typing as npt

from fedtide.wire.errors import MalformedPayload

_MANY: Final = 4
"""From one nonzero of so many coefficients on, 8 bytes for each are more than 2 for all coefficients."""
_INT16: Final = 2**15 - 1

Integers = npt.NDArray[np.int32]
Fields = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.int32] | npt.NDArray[np.float32]


class Nonzeros:
    """The nonzero coefficients of all classes, one class behind the other, by their places there.

    Few are kept as places and values. Many are kept with the zeros as int16, those beyond by themselves.

    Attributes:
        peak: the largest magnitude.
    """

    def __init__(self, count: int, max_coefficients: int) -> None:
        self.peak = 0
        self._filled = 0
        self._dense = np.zeros(max_coefficients if _MANY * count > max_coefficients else 0, np.int16)
        count = 0 if self._dense.size else count
        self._positions = np.empty(count, np.int32)
        self._values = np.empty(count, np.int32)
        self._large = 0

    def add(self, positions: Fields, values: Integers, max_large: int) -> None:
        """Take further nonzeros, with places beyond those before them.

        Raises:
            MalformedPayload: more than ``max_large`` of all values are beyond int16.
        """
        self.peak = max(self.peak, int(values.max()), -int(values.min()))
        if not self._dense.size:
            place = slice(self._filled, self._filled + values.size)
            self._positions[place], self._values[place] = positions, values
            self._filled += values.size
            return
        self._dense[positions] = values  # what does not fit is never used
        if self.peak > _INT16:
            (large,) = (np.abs(values) > _INT16).nonzero()
            self._large += large.size
            if self._large > max_large:
                raise MalformedPayload(f"more than {max_large:,} coefficients are beyond ±{_INT16:,}")
            self._positions = np.concatenate([self._positions, positions[large]], dtype=np.int32)
            self._values = np.concatenate([self._values, values[large]])

    def place(self, start: int, end: int, out: Numbers) -> None:
        """Write the coefficients from ``start`` to ``end``, and zeros behind them."""
        if self._dense.size:
            out[: end - start] = self._dense[start:end]
            out[end - start :] = 0
        else:
            out.fill(0)
        if self._positions.size:
            positions, values = self._listed(start, end)
            out[positions] = values

    def place_each(self, starts: Fields, ends: Fields, targets: Fields, out: Integers) -> None:
        """Write the coefficients of several ranges to several places, and zeros everywhere else."""
        out.fill(0)
        if self._dense.size:
            for start, end, target in zip(starts.tolist(), ends.tolist(), targets.tolist(), strict=True):
                out[target : target + end - start] = self._dense[start:end]
        if self._positions.size:
            firsts, lasts = self._positions.searchsorted(np.array([starts, ends], np.int32))
            counts = lasts - firsts
            listed = np.repeat(lasts - np.cumsum(counts), counts)
            listed += np.arange(listed.size)
            places = self._positions[listed] + np.repeat(targets - starts, counts)
            out[places] = self._values[listed]

    def all(self) -> tuple[Integers, Integers]:
        """Places and values of all nonzero coefficients."""
        if not self._dense.size:
            return self._positions, self._values
        coefficients = self._dense.astype(np.int32)
        coefficients[self._positions] = self._values
        positions = (coefficients != 0).nonzero()[0].astype(np.int32)
        return positions, coefficients[positions]

    def _listed(self, start: int, end: int) -> tuple[Integers, Integers]:
        first, last = self._positions.searchsorted(np.array([start, end], np.int32))
        return self._positions[first:last] - np.int32(start), self._values[first:last]
