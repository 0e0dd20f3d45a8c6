"""Classes for the coefficients of a matrix, by what its rows and columns held so far.

A matrix is read in blocks: waves of 1, 1, 2, 4, ... rows, and in each wave the first eighth of the columns,
the second, the second quarter and the second half. What earlier waves held in a coefficient's column, times
how much louder its row was in earlier blocks of the wave than its columns let expect, tells its magnitude:
coefficients for which that is about the same make up a class. Both sides know as much, so that nothing is
written about it. Rows and columns of zeros, and loud ones, are what deltas of neural networks are made of:
against one class per tensor, this takes 5 to 25 % fewer bytes.

The first axis of a tensor counts its rows. The first row, and a tensor of one axis, are in the class
``UNKNOWN``. All tensors share the classes.

Where there are few nonzeros, this gains nothing and takes long: all tensors are one class then, and a bit
says so.

    tensors = 0 | classes by context
            | 1 | one class

All machines must find the same classes: sums are of whole numbers, and what follows are single float64
operations, which IEEE 754 rounds in one way.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from fedtide.wire.codecs.entropy.bits import BitReader, BitWriter
from fedtide.wire.codecs.entropy.coefficients import CoefficientReader, Coefficients, encode_classes
from fedtide.wire.codecs.entropy.tokens import Family, TableChoice, choice_for
from fedtide.wire.parameters import Schema, TensorSpec

_SOFTEST: Final = -7
_LOUDEST: Final = 8
"""The first class is of expected magnitudes below 2^-7, the last but ``UNKNOWN`` of those from 2^7 on."""
UNKNOWN: Final = _LOUDEST - _SOFTEST + 1
CLASSES: Final = UNKNOWN + 1
_DOUBT: Final = 1.5
"""Rows of the matrix' average that stand for what a column's history does not tell."""
_LEAST: Final = 2.0**-9
"""Expected where there were only zeros so far."""
_CLIP: Final = 127
"""Magnitude that a single coefficient counts in a history, at most."""
_PARTS: Final = 8
"""Part of the columns in the first block of a wave."""

_FEW: Final = 24
_FEW_IN_SMALL_SCHEMA: Final = 2048
"""Nonzeros up to which there is one class. Contexts would save 5 to 17 % of a small model's delta, which is
less than its headers take, for ten times the time; the coordinator encodes ten deltas a version."""
_SMALL_SCHEMA: Final = 1 << 15
_NOTHING: Final = np.empty(0, np.int8)
_SMALLEST_BLOCK: Final = 1 << 12
"""Coefficients up to which a block's size does not count."""

Logarithms = npt.NDArray[np.int16]
Counts = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.int32] | npt.NDArray[np.float32]
"""float32 holds all integers up to 2^24."""


def encode_tensors(tensors: Sequence[Coefficients], schema: Schema, header: BitWriter) -> bytes:
    """Encode the coefficients of all tensors, behind a header that is added to.

    Args:
        tensors: the coefficients of each tensor, flat; no integer of its type's least value.
        schema: their shapes.
        header: what comes before.
    """
    nonzeros = sum(int(np.count_nonzero(coefficients)) for coefficients in tensors)
    plain = nonzeros <= (_FEW if schema.size > _SMALL_SCHEMA else _FEW_IN_SMALL_SCHEMA)
    header.put(plain, 1)
    if plain:
        return encode_classes([np.concatenate([_NOTHING, *tensors])], PLAIN, header)
    return encode_classes(split(tensors, schema), DEFAULTS, header)


class TensorReader:
    """Reads what :func:`encode_tensors` wrote."""

    def __init__(self, header: BitReader, schema: Schema, max_large: int | None = None) -> None:
        """Decode and check all but which tensor the coefficients belong to.

        Args:
            header: what comes before, which is read.
            schema: the tensors' shapes.
            max_large: as for :class:`CoefficientReader`.

        Raises:
            MalformedPayload: anything is wrong with the payload.
        """
        self._plain = bool(header.get(1))
        self._schema = schema
        defaults = PLAIN if self._plain else DEFAULTS
        self._reader = CoefficientReader(header, defaults, schema.size, max_large)

    @property
    def peak(self) -> int:
        """The largest magnitude."""
        return self._reader.peak

    def read(self, out: Numbers) -> None:
        """Fill ``out``, shape ``(schema.size,)`` of a type that holds ``peak``, with all tensors, flat.

        Raises:
            MalformedPayload: coefficients are left over; ``out`` is filled by then.
        """
        if self._plain:
            self._reader.read(0, out)
        else:
            join(self._reader, self._schema, out)
        self._reader.finish()


def split(tensors: Iterable[Coefficients], schema: Schema) -> Iterator[Coefficients]:
    """The coefficients of every class, in the order in which :func:`join` takes them.

    Args:
        tensors: the coefficients of each tensor, flat; no integer of its type's least value.
        schema: their shapes.
    """
    pieces: list[list[Coefficients]] = [[] for _ in range(CLASSES)]
    for coefficients, spec in zip(tensors, schema.tensors, strict=True):
        matrix = coefficients.reshape(_shape(spec))
        for block in _blocks(matrix):
            ordered = matrix[block.rows, block.columns].reshape(-1)[block.order]
            start = 0
            for number, count in enumerate(block.counts.tolist()):
                if count:
                    pieces[number].append(ordered[start : start + count])
                    start += count
    for each in pieces:
        yield np.concatenate(each) if each else _NOTHING
        each.clear()  # so that everything is there twice for one class at a time only


def join(reader: CoefficientReader, schema: Schema, out: Numbers) -> None:
    """The coefficients of all tensors, flat; the inverse of :func:`split`.

    Args:
        reader: of the classes.
        schema: the tensors' shapes.
        out: to be filled, shape ``(schema.size,)``; a type that holds all coefficients.
    """
    for spec, place in schema.slices():
        matrix = out[place].reshape(_shape(spec))
        for block in _blocks(matrix):
            ordered = np.empty(block.order.size, np.int32)
            reader.read_each(block.counts, ordered)
            values = np.empty(block.order.size, out.dtype)
            values[block.order] = ordered
            target = matrix[block.rows, block.columns]
            target[...] = values.reshape(target.shape)


@dataclass(frozen=True)
class _Block:
    """A part of a matrix.

    Attributes:
        rows: which.
        columns: which.
        order: places of its coefficients, row by row, ordered by class.
        counts: of each class.
    """

    rows: slice
    columns: slice
    order: npt.NDArray[np.int64]
    counts: Counts


def _shape(spec: TensorSpec) -> tuple[int, int]:
    """Rows and columns of a tensor as a matrix."""
    rows = (spec.shape[0] or 0) if len(spec.shape) > 1 else 1
    return (rows, spec.size // rows) if rows and spec.size else (1, spec.size)


def _row_waves(rows: int, columns: int) -> Iterator[slice]:
    """Ever more rows, until a block, of up to half the columns, has a sixteenth of the matrix."""
    most = max(rows // 8, 2 * _SMALLEST_BLOCK // max(1, columns), 1)
    start, stop = 0, 1
    while start < rows:
        yield slice(start, stop)
        start, stop = stop, min(2 * stop, stop + most, rows)


def _column_waves(columns: int) -> Iterator[slice]:
    start, stop = 0, max(1, columns // _PARTS)
    while start < columns:
        yield slice(start, stop)
        start, stop = stop, min(2 * stop, columns)


def _blocks(matrix: Coefficients | Numbers) -> Iterator[_Block]:
    """All blocks. Each one but the first of a wave depends on what stands in the matrix before it."""
    rows, columns = matrix.shape
    column_sums = np.zeros(columns if rows > 1 else 0, np.int64)
    for wave in _row_waves(rows, columns):
        if wave.start:
            yield from _known_blocks(matrix, wave, column_sums)
        else:
            for start in range(0, columns, _SMALLEST_BLOCK):
                place = slice(start, min(start + _SMALLEST_BLOCK, columns))
                counts = np.zeros(CLASSES, np.int64)
                counts[UNKNOWN] = place.stop - start
                yield _Block(wave, place, np.arange(place.stop - start), counts)
                if rows > 1:
                    column_sums[place] += _loudness(matrix[wave, place])[0]


def _known_blocks(matrix: Coefficients | Numbers, wave: slice, column_sums: Counts) -> Iterator[_Block]:
    """The blocks of a wave of rows with rows before it, which are added to the columns' sums."""
    average = float(column_sums.sum()) / (wave.start * column_sums.size) + _LEAST
    weight = wave.start + _DOUBT
    by_column = _logarithms((column_sums + _DOUBT * average) / weight)
    row_sums = np.zeros(wave.stop - wave.start, np.int64)
    before = 0
    for columns in _column_waves(column_sums.size):
        expected = (float(before) + columns.start * _DOUBT * average) / weight
        before += int(column_sums[columns].sum())
        by_row = _logarithms((row_sums + 1) / (expected + 1))
        yield _block(wave, columns, by_row[:, np.newaxis] + by_column[columns])
        loudness = _loudness(matrix[wave, columns])
        row_sums += loudness.sum(axis=1, dtype=np.int32)
        column_sums[columns] += loudness.sum(axis=0, dtype=np.int32)


def _block(rows: slice, columns: slice, logarithms: Logarithms) -> _Block:
    logarithms >>= 3
    np.maximum(logarithms, np.int16(_SOFTEST), out=logarithms)
    np.minimum(logarithms, np.int16(_LOUDEST), out=logarithms)
    logarithms -= np.int16(_SOFTEST)
    numbers = logarithms.astype(np.uint8).reshape(-1)
    order = np.argsort(numbers, kind="stable")  # of bytes: a radix sort
    return _Block(rows, columns, order, np.bincount(numbers, minlength=CLASSES))


def _loudness(coefficients: Coefficients | Numbers) -> npt.NDArray[np.uint8]:
    """Magnitudes, large ones cut."""
    magnitudes = np.abs(coefficients)
    return np.minimum(magnitudes, _CLIP, out=magnitudes).astype(np.uint8)


def _logarithms(magnitudes: npt.NDArray[np.float64]) -> Logarithms:
    """About 8 log2 of each: exact at powers of two, linear in between."""
    mantissas, exponents = np.frexp(magnitudes)
    mantissas *= 16
    mantissas -= 8
    exponents -= 1
    exponents <<= 3
    logarithms: Logarithms = mantissas.astype(np.int16)
    logarithms += exponents.astype(np.int16)
    return logarithms


_GAPS: Final = (24, 20, 17, 14, 12, 9, 7, 5, 4, 3, 2, 1, 0, 0, 0, 0, 16)
_EXCESSES: Final = (0, 0, 0, 0, 1, 3, 6, 9, 11, 13, 14, 15, 15, 17, 18, 19, 3)
"""Indices of each class's usual means, ``UNKNOWN`` last: found in deltas of small networks."""

DEFAULTS: Final[tuple[TableChoice, ...]] = tuple(
    TableChoice(Family(gap, 2), Family(excess, 1), dense=gap < 6)
    for gap, excess in zip(_GAPS, _EXCESSES, strict=True)
)
"""Tables of the classes."""

PLAIN: Final = (choice_for(60, 0.4, gap_spread=2),)
"""Of the one class."""
