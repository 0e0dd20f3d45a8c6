"""The low-rank codec's payload: what stands before the coefficients, and every limit on it.

    payload = step (bfloat16, little-endian) | tensors | coefficients (coefficients.py)
    tensors = for each: [ of two or more axes: rank (gamma) [ transform (gamma) | exponents ] ] | scalars
    exponents = first (5) | how much lower each following one is (gamma)
    scalars = 0 | 1 class (4)

The numbers in parentheses are bits; brackets hold what depends on the schema or on a rank above 0. A payload
of two zero bytes is the delta of zeros; after the bytes 1 and 0 follows a payload of ``ecsq``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import isqrt, prod
from typing import Final

import numpy as np

from fedtide.wire.codecs.base import NotFinite
from fedtide.wire.codecs.entropy.bits import BitReader, BitWriter
from fedtide.wire.codecs.lowrank.contexts import CLASSES
from fedtide.wire.errors import MalformedPayload
from fedtide.wire.parameters import Schema, TensorSpec

LARGEST_RANK: Final = 64
LARGEST_EXPONENT: Final = 20
LARGEST_FACTOR: Final = 2**15 - 1
"""Magnitude of a quantised factor's entry."""
LARGEST_SCALAR: Final = 2**24 - 1
"""Magnitude of a quantised parameter."""
LARGEST_VALUE: Final = float(np.finfo(np.float32).max) * (1 - 2**-22)
"""Of a decoded magnitude, with room for two roundings."""
STEP_BYTES: Final = 2
ZEROS: Final = bytes(STEP_BYTES)
DENSE: Final = b"\1\0"
"""In place of a step, which is never so small: what follows is a payload of ``ecsq``."""
"""The payload of a delta of zeros."""

_CLASS_BITS: Final = (CLASSES - 1).bit_length()
_EXPONENT_BITS: Final = LARGEST_EXPONENT.bit_length()
_SMALLEST_MATRIX: Final = 32
"""Elements, below which a tensor has no factors."""
_STEPS: Final = range(0x0D80, 0x7F80)
"""The bfloat16 numbers from 2^-100, so that no product with a step is subnormal, to the largest finite."""


@dataclass(frozen=True)
class Place:
    """A tensor's place in the delta, as a matrix: its first axis by all others.

    Attributes:
        start: of its elements.
        rows: of the matrix.
        columns: of the matrix.
        widest_rank: 0 for a tensor without factors.
        widths: of images that its rows may be, for the encoder to try.
    """

    start: int
    rows: int
    columns: int
    widest_rank: int
    widths: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """Elements."""
        return self.rows * self.columns

    @property
    def elements(self) -> slice:
        """Of the delta."""
        return slice(self.start, self.start + self.size)


@dataclass(frozen=True)
class TensorLayout:
    """How one tensor is encoded: Σ_k a_k b_kᵀ 2^(−e_k) + scalars, in units of the step.

    Attributes:
        exponents: e_k, none above the one before it; their number is the rank.
        transform: which one the b_k are transformed by, see ``products``.
        scalar_class: the class of the scalars; None: there are none.
    """

    exponents: tuple[int, ...] = ()
    transform: int = 0
    scalar_class: int | None = None

    @property
    def rank(self) -> int:
        """Number of components."""
        return len(self.exponents)


NOTHING: Final = TensorLayout()
"""Of a tensor of zeros."""


@lru_cache(maxsize=16)
def places_of(schema: Schema) -> tuple[Place, ...]:
    """Every tensor's place, in the schema's order."""
    places: list[Place] = []
    start = 0
    for tensor in schema.tensors:
        place = _place_of(tensor, start, [earlier.rows for earlier in places if earlier.widest_rank])
        places.append(place)
        start += place.size
    return tuple(places)


def _place_of(tensor: TensorSpec, start: int, channels: Sequence[int]) -> Place:
    axes = [axis if axis is not None else 1 for axis in tensor.shape]
    rows, columns = (axes[0], prod(axes[1:])) if len(axes) > 1 else (1, prod(axes))
    size = rows * columns
    if min(rows, columns) < 2 or size < _SMALLEST_MATRIX:
        return Place(start, 1, size, 0)
    rank = min(rows, columns, LARGEST_RANK, size // (rows + columns))
    return Place(start, rows, columns, rank, _widths(axes, columns, channels))


def _widths(axes: Sequence[int], columns: int, channels: Sequence[int]) -> tuple[int, ...]:
    """Of images that a row may be: a kernel's, a square, a flattened layer's channels."""
    guesses = {axes[-1], isqrt(columns), *(columns // count for count in channels)}
    return tuple(sorted(width for width in guesses if 3 < width <= columns // 2 and columns % width == 0))


def most_nonzeros(size: int) -> int:
    """How many coefficients other than zero a payload may have: decoding takes about 20 bytes for each.

    A step that leaves more is so fine that most of what is sent is noise, which no factors describe.

    Args:
        size: number of parameters.
    """
    return size // 8 + 4096


def step_bits(step: float) -> int:
    """The bfloat16 number next to a step, or the smallest or largest one allowed, as 16 bits."""
    with np.errstate(over="ignore"):
        bits = int(np.float32(step).view(np.uint32))
    return min(max((bits + 0x8000) >> 16, _STEPS[0]), _STEPS[-1])


def step_of(bits: int) -> np.float32:
    """The step of these 16 bits.

    Raises:
        NotFinite: it is not finite, or below 2^-100.
    """
    if bits not in _STEPS:
        raise NotFinite(f"a lowrank step of bits {bits:#06x}; it must be finite and at least 2^-100")
    return np.float32(np.array([bits << 16], np.uint32).view(np.float32)[0])


def largest_scalar(step: np.float32) -> int:
    """The largest magnitude of a quantised parameter whose product with the step is a float32."""
    return min(LARGEST_SCALAR, int(LARGEST_VALUE / float(step)))


def write_layouts(header: BitWriter, layouts: Sequence[TensorLayout], places: Sequence[Place]) -> None:
    """Write how the tensors are encoded."""
    for place, layout in zip(places, layouts, strict=True):
        if place.widest_rank:
            header.put_gamma(layout.rank)
        if layout.rank:
            header.put_gamma(layout.transform)
            header.put(layout.exponents[0], _EXPONENT_BITS)
            for higher, lower in zip(layout.exponents, layout.exponents[1:], strict=False):
                header.put_gamma(higher - lower)
        header.put(layout.scalar_class is not None, 1)
        if layout.scalar_class is not None:
            header.put(layout.scalar_class, _CLASS_BITS)


def read_layouts(header: BitReader, places: Sequence[Place]) -> tuple[TensorLayout, ...]:
    """The inverse of :func:`write_layouts`.

    Raises:
        MalformedPayload: a rank, a transform, an exponent or a class that cannot be.
    """
    return tuple(_read_layout(header, place) for place in places)


def _read_layout(header: BitReader, place: Place) -> TensorLayout:
    rank = header.get_gamma(place.widest_rank) if place.widest_rank else 0
    transform, exponents = 0, []
    if rank:
        transform = header.get_gamma(place.columns)
        exponents.append(header.get(_EXPONENT_BITS))
        if exponents[0] > LARGEST_EXPONENT:
            raise MalformedPayload(f"an exponent of {exponents[0]}; at most {LARGEST_EXPONENT} is possible")
        for _ in range(rank - 1):
            exponents.append(exponents[-1] - header.get_gamma(exponents[-1]))
    scalar_class = header.get(_CLASS_BITS) if header.get(1) else None
    return TensorLayout(tuple(exponents), transform, scalar_class)


def coefficients_of(layouts: Sequence[TensorLayout], places: Sequence[Place]) -> int:
    """How many coefficients tensors so encoded have; at most two per parameter."""
    return sum(
        layout.rank * (place.rows + place.columns) + (layout.scalar_class is not None) * place.size
        for layout, place in zip(layouts, places, strict=True)
    )
