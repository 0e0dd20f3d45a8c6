"""Layouts and coefficients to bytes and back: in which order the classes' coefficients stand.

First come the factors, wave by wave and in a wave component by component, of the matrices that have it, those
of higher rank first: a_k, then b_k. The scalars follow, tensor by tensor.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

import numpy as np

from fedtide.wire.codecs.entropy.bits import BitReader, BitWriter
from fedtide.wire.codecs.entropy.coefficients import CoefficientReader, encode_classes
from fedtide.wire.codecs.lowrank.contexts import CLASSES, TABLES, Classes, Integers, Predictor, waves
from fedtide.wire.codecs.lowrank.layout import (
    LARGEST_FACTOR,
    LARGEST_SCALAR,
    Place,
    TensorLayout,
    coefficients_of,
    most_nonzeros,
    read_layouts,
    write_layouts,
)
from fedtide.wire.codecs.lowrank.products import Product, Scalars, prior_of, product_of
from fedtide.wire.codecs.lowrank.quantiser import QuantisedMatrix
from fedtide.wire.codecs.lowrank.scalars import QuantisedScalars
from fedtide.wire.errors import MalformedPayload

_CLASS_STARTS: Final = np.arange(CLASSES, dtype=np.int64) << 32
"""Behind all places of a class."""
_START: Final = np.zeros(1, np.int64)


@dataclass(frozen=True)
class QuantisedTensor:
    """What of a tensor is encoded.

    Attributes:
        matrix: its factors, if any.
        scalars: its parameters, or what the factors leave of them, if any.
    """

    matrix: QuantisedMatrix | None
    scalars: QuantisedScalars | None

    @property
    def nonzeros(self) -> int:
        """How many coefficients are not zero."""
        of_factors = 0 if self.matrix is None else int(np.count_nonzero(self.matrix.entries))
        return of_factors + (0 if self.scalars is None else self.scalars.scalars.values.size)

    @property
    def layout(self) -> TensorLayout:
        """What the header says of it."""
        number = None if self.scalars is None else self.scalars.number
        if self.matrix is None:
            return TensorLayout(scalar_class=number)
        return TensorLayout(self.matrix.exponents, self.matrix.kind, number)


def write_tensors(tensors: Sequence[QuantisedTensor], places: Sequence[Place]) -> bytes:
    """All that follows the step."""
    header = BitWriter()
    layouts = [tensor.layout for tensor in tensors]
    write_layouts(header, layouts, places)
    ranked = sorted((each.matrix for each in tensors if each.matrix), key=lambda matrix: -len(matrix.entries))
    entries, classes = [np.empty(0, np.int32)], [np.empty(0, np.uint8)]
    for k in range(len(ranked[0].entries) if ranked else 0):
        entries += [matrix.entries[k] for matrix in ranked if k < len(matrix.entries)]
        classes += [matrix.classes[k] for matrix in ranked if k < len(matrix.entries)]
    parts = _by_class(np.concatenate(entries), np.concatenate(classes))
    for place, tensor in zip(places, tensors, strict=True):
        if tensor.scalars is not None:
            dense = np.zeros(place.size, np.int32)
            dense[tensor.scalars.scalars.places] = tensor.scalars.scalars.values
            parts[tensor.scalars.number].append(dense)
    return header.to_bytes() + encode_classes([np.concatenate(each) for each in parts], TABLES)


def _by_class(entries: Integers, classes: Classes) -> list[list[Integers]]:
    ordered = entries[np.argsort(classes, kind="stable")]
    ends = np.cumsum(np.bincount(classes, minlength=CLASSES))
    return [[part] for part in np.split(ordered, ends[:-1])]


def read_products(payload: memoryview, places: Sequence[Place]) -> list[Product]:
    """The inverse of :func:`write_tensors`, checked.

    Raises:
        MalformedPayload: anything is wrong with the payload.
    """
    header = BitReader(payload)
    layouts = read_layouts(header, places)
    most = most_nonzeros(sum(place.size for place in places))
    coefficients = coefficients_of(layouts, places)
    entries = _Entries(CoefficientReader(header.end(), TABLES, coefficients, max_nonzeros=most))
    factors = _read_factors(entries, _Matrices(layouts, places))
    products = []
    for number, (place, layout) in enumerate(zip(places, layouts, strict=True)):
        both = factors.get(number)
        if both is None:
            both = np.empty((0, place.rows + place.columns), np.int32)
        scalars = None
        if layout.scalar_class is not None:
            scalars = entries.next_run(layout.scalar_class, place.size)
        left, right = both[:, : place.rows], both[:, place.rows :]
        products.append(product_of(left, right, layout.exponents, layout.transform, scalars))
    entries.finish()
    return products


class _Matrices:
    """The tensors that have factors, those of higher rank first.

    Attributes:
        numbers: of these tensors.
        rank: the highest.
        having: for each component, how many have it.
        ends: of the entries of the first, the first two, ..., from 0 on.
        predictor: of their entries.
    """

    def __init__(self, layouts: Sequence[TensorLayout], places: Sequence[Place]) -> None:
        with_factors = [number for number, layout in enumerate(layouts) if layout.rank]
        self.numbers = sorted(with_factors, key=lambda number: -layouts[number].rank)
        self._layouts = [layouts[number] for number in self.numbers]
        shapes = [places[number] for number in self.numbers]
        self.rank = self._layouts[0].rank if self._layouts else 0
        self.having = [sum(k < layout.rank for layout in self._layouts) for k in range(self.rank)]
        self.ends = [0, *accumulate(place.rows + place.columns for place in shapes)]
        self.predictor = Predictor(
            [length for place in shapes for length in (place.rows, place.columns)],
            np.concatenate([
                np.empty(0, np.int32),
                *(prior_of(place, each.transform) for place, each in zip(shapes, self._layouts, strict=True)),
            ]),
        )  # fmt: skip

    def exponents(self, wave: slice) -> Integers:
        """For each of the wave's components, its exponent on each side that has the first one (or 0)."""
        padding = (0,) * (wave.stop - wave.start)
        exponents = [
            (layout.exponents[wave] + padding)[: len(padding)]
            for layout in self._layouts[: self.having[wave.start]]
        ]
        return np.array(exponents, np.int32).T.repeat(2, axis=1)


def _read_factors(entries: "_Entries", matrices: _Matrices) -> dict[int, Integers]:
    """By tensor, its factors as in :class:`QuantisedMatrix`.

    Raises:
        MalformedPayload: an entry is too large, or a component has none.
    """
    ends, predictor = matrices.ends, matrices.predictor
    parts: list[list[Integers]] = [[] for _ in matrices.numbers]
    for wave in waves(matrices.rank):
        having = matrices.having[wave]
        widths = [ends[count] for count in having]
        components = _rows_of(entries, predictor.classes(matrices.exponents(wave)), widths)
        filled = np.logical_or.reduceat(components, predictor.starts[: 2 * having[0]], axis=1)
        if np.count_nonzero(filled) < 2 * sum(having):
            raise MalformedPayload("a component of zeros; the rank must be lower")
        for number in range(having[0]):
            rank = sum(number < count for count in having)
            parts[number].append(components[:rank, ends[number] : ends[number + 1]])
        if wave.stop < matrices.rank:
            predictor.learn(components)
    return {number: np.concatenate(part) for number, part in zip(matrices.numbers, parts, strict=True)}


def _rows_of(entries: "_Entries", classes: Classes, widths: Sequence[int]) -> Integers:
    """The next entries of these classes, row by row; of each row, so many as are due, before zeros."""
    if widths[-1] == classes.shape[1]:
        return entries.next(classes.reshape(-1)).reshape(classes.shape)
    read = entries.next(np.concatenate([row[:width] for row, width in zip(classes, widths, strict=True)]))
    rows = np.zeros(classes.shape, np.int32)
    first = 0
    for row, width in zip(rows, widths, strict=True):
        row[:width] = read[first : first + width]
        first += width
    return rows


class _Entries:
    """Coefficients in the order in which they are asked for, of all classes at once."""

    def __init__(self, reader: CoefficientReader) -> None:
        """Take all coefficients.

        Raises:
            MalformedPayload: one is too large.
        """
        places, self._values, ends = reader.take_nonzeros()
        lasts = places.searchsorted(ends.astype(np.int32))
        counts = np.diff(lasts, prepend=0)
        # One ascending sequence: a nonzero's place in its class, behind all places of the classes before it.
        starts = np.concatenate([_START, ends[:-1]])
        self._places = places + (_CLASS_STARTS - starts).repeat(counts)
        self._next = _CLASS_STARTS.copy()
        self._nonzeros = lasts - counts
        self._left = self._places.size
        self._peak = max(int(self._values.max(initial=0)), -int(self._values.min(initial=0)))
        if self._peak > LARGEST_SCALAR:
            raise MalformedPayload(f"a coefficient beyond ±{LARGEST_SCALAR:,}")

    def next(self, classes: Classes) -> Integers:
        """The next coefficient of each of these classes.

        Raises:
            MalformedPayload: one is too large for a factor.
        """
        counts = np.bincount(classes, minlength=CLASSES)
        starts, lows = self._next, self._nonzeros
        self._next = starts + counts
        self._nonzeros = self._places.searchsorted(self._next)
        taken = self._nonzeros - lows
        ends = np.cumsum(taken)
        indices = (lows - ends + taken).repeat(taken)
        indices += np.arange(indices.size)
        places = (np.cumsum(counts) - self._next).repeat(taken)
        places += self._places[indices]
        values = self._values[indices]
        if self._peak > LARGEST_FACTOR and np.abs(values).max(initial=0) > LARGEST_FACTOR:
            raise MalformedPayload(f"a coefficient beyond ±{LARGEST_FACTOR:,} in a factor")
        entries = np.zeros(classes.size, np.int32)
        entries[classes.argsort(kind="stable")[places]] = values
        self._left -= values.size
        return entries

    def next_run(self, number: int, count: int) -> Scalars:
        """The nonzeros among the next ``count`` coefficients of a class."""
        start, low = int(self._next[number]), int(self._nonzeros[number])
        high = int(self._places.searchsorted(start + count))
        self._next[number], self._nonzeros[number] = start + count, high
        self._left -= high - low
        return Scalars(self._places[low:high] - start, self._values[low:high])

    def finish(self) -> None:
        """Return if all were asked for.

        Raises:
            MalformedPayload: some were not.
        """
        if self._left:
            raise MalformedPayload(f"{self._left:,} coefficients without a place")
