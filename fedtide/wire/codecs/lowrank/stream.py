"""Layouts and coefficients to bytes and back: in which order the classes' coefficients stand.

First come the factors, wave by wave and in a wave component by component, of the matrices that have it, those
of higher rank first: a_k, then b_k. The scalars follow, tensor by tensor.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedtide.wire.codecs.entropy.bits import BitReader, BitWriter
from fedtide.wire.codecs.entropy.coefficients import CoefficientReader, encode_classes
from fedtide.wire.codecs.lowrank.contexts import CLASSES, TABLES, Classes, Integers, Predictor, waves
from fedtide.wire.codecs.lowrank.layout import (
    LARGEST_FACTOR,
    LARGEST_SCALAR,
    Place,
    TensorLayout,
    coefficients_of,
    read_layouts,
    write_layouts,
)
from fedtide.wire.codecs.lowrank.products import Product, Scalars, prior_of, product_of
from fedtide.wire.codecs.lowrank.quantiser import QuantisedMatrix, QuantisedScalars
from fedtide.wire.errors import MalformedPayload


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
    matrices = _Matrices(layouts, places)
    ranked = [tensors[number].matrix for number in matrices.numbers]
    entries, classes = [np.empty(0, np.int32)], [np.empty(0, np.uint8)]
    for wave in waves(matrices.rank):
        components = [
            np.concatenate([matrix.entries[k] for matrix in ranked if matrix and k < len(matrix.entries)])
            for k in range(wave.start, wave.stop)
        ]
        entries += components
        classes.append(matrices.predictor.classes(matrices.exponents(wave)))
        matrices.predictor.learn(components)
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
    entries = _Entries(CoefficientReader(header.end(), TABLES, coefficients_of(layouts, places)))
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
        widths: for each, rows + columns.
        predictor: of their entries.
    """

    def __init__(self, layouts: Sequence[TensorLayout], places: Sequence[Place]) -> None:
        with_factors = [number for number, layout in enumerate(layouts) if layout.rank]
        self.numbers = sorted(with_factors, key=lambda number: -layouts[number].rank)
        self._layouts = [layouts[number] for number in self.numbers]
        shapes = [places[number] for number in self.numbers]
        self.rank = self._layouts[0].rank if self._layouts else 0
        self.widths = [place.rows + place.columns for place in shapes]
        self.predictor = Predictor(
            [length for place in shapes for length in (place.rows, place.columns)],
            np.concatenate([
                np.empty(0, np.int32),
                *(prior_of(place, each.transform) for place, each in zip(shapes, self._layouts, strict=True)),
            ]),
        )  # fmt: skip

    def exponents(self, wave: slice) -> list[Integers]:
        """For each of the wave's components, its exponent on each side that has it."""
        return [
            np.repeat(np.array([each.exponents[k] for each in self._layouts if k < each.rank], np.int32), 2)
            for k in range(wave.start, wave.stop)
        ]

    def having(self, component: int) -> int:
        """How many have the component."""
        return sum(component < layout.rank for layout in self._layouts)


def _read_factors(entries: "_Entries", matrices: _Matrices) -> dict[int, Integers]:
    """By tensor, its factors as in :class:`QuantisedMatrix`.

    Raises:
        MalformedPayload: an entry is too large, or a component has none.
    """
    starts = np.cumsum([0, *matrices.widths])
    side_starts = matrices.predictor.starts
    rows: list[list[Integers]] = [[] for _ in matrices.numbers]
    for wave in waves(matrices.rank):
        read = entries.next(matrices.predictor.classes(matrices.exponents(wave)))
        components, first = [], 0
        for k in range(wave.start, wave.stop):
            count = matrices.having(k)
            components.append(read[first : first + int(starts[count])])
            first += components[-1].size
            if not np.logical_or.reduceat(components[-1] != 0, side_starts[: 2 * count]).all():
                raise MalformedPayload("a component of zeros; the rank must be lower")
            for row, start, width in zip(rows[:count], starts, matrices.widths, strict=False):
                row.append(components[-1][start : start + width])
        matrices.predictor.learn(components)
    return {number: np.stack(row) for number, row in zip(matrices.numbers, rows, strict=True)}


class _Entries:
    """Coefficients in the order in which they are asked for, of all classes at once."""

    def __init__(self, reader: CoefficientReader) -> None:
        """Take all coefficients.

        Raises:
            MalformedPayload: one is too large.
        """
        found = [reader.take_nonzeros(number) for number in range(CLASSES)]
        # One ascending sequence: a nonzero's place in its class, behind all places of the classes before it.
        self._firsts = np.arange(CLASSES, dtype=np.int64) << 32
        self._places = np.concatenate(
            [positions + first for (positions, _), first in zip(found, self._firsts, strict=True)]
        )
        self._values = np.concatenate([values for _, values in found])
        self._next = self._firsts.copy()
        self._left = self._places.size
        _check_magnitudes(self._values, LARGEST_SCALAR)

    def next(self, classes: Classes) -> Integers:
        """The next coefficient of each of these classes.

        Raises:
            MalformedPayload: one is too large for a factor.
        """
        counts = np.bincount(classes, minlength=CLASSES)
        lasts = self._next + counts
        lows = np.searchsorted(self._places, self._next)
        taken = np.searchsorted(self._places, lasts) - lows
        sorted_firsts = np.cumsum(counts) - counts
        total = int(taken.sum())
        indices = np.arange(total) + np.repeat(lows - (np.cumsum(taken) - taken), taken)
        places = self._places[indices] + np.repeat(sorted_firsts - self._next, taken)
        values = self._values[indices]
        _check_magnitudes(values, LARGEST_FACTOR)
        entries = np.zeros(classes.size, np.int32)
        entries[np.argsort(classes, kind="stable")[places]] = values
        self._next = lasts
        self._left -= total
        return entries

    def next_run(self, number: int, count: int) -> Scalars:
        """The nonzeros among the next ``count`` coefficients of a class."""
        start = int(self._next[number])
        low, high = np.searchsorted(self._places, [start, start + count])
        self._next[number] += count
        self._left -= int(high - low)
        return Scalars(self._places[low:high] - start, self._values[low:high])

    def finish(self) -> None:
        """Return if all were asked for.

        Raises:
            MalformedPayload: some were not.
        """
        if self._left:
            raise MalformedPayload(f"{self._left:,} coefficients without a place")


def _check_magnitudes(values: npt.NDArray[np.int32], largest: int) -> None:
    if values.size and max(int(values.max()), -int(values.min())) > largest:
        raise MalformedPayload(f"a coefficient beyond ±{largest:,}")
