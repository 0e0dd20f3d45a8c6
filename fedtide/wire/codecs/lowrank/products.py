"""From quantised factors to a matrix, equal to the bit on every machine.

Entries of factors are whole numbers, or halves and quarters after a transform, and exponents only shift them:
all products are multiples of one power of two. Where no sum of them needs more than 24 bits, float32 holds
every partial sum exactly, so that the order in which a matrix product adds them does not matter; else float64
does, up to 53 bits. What is left is one rounding to float32 and one multiplication by the step per element.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from fedtide.wire.codecs.lowrank.contexts import Integers
from fedtide.wire.codecs.lowrank.layout import LARGEST_VALUE, Place
from fedtide.wire.errors import MalformedPayload

Floats = npt.NDArray[np.float32]

NO_TRANSFORM: Final = 0
ALONG: Final = 1
"""The transform of a vector as it is; larger numbers give the width of the image that it is."""

_FLOAT32_BITS: Final = 24
_FLOAT64_BITS: Final = 53
_STEP_BITS: Final = 8
"""Of a bfloat16 number."""
_SMALLEST_FOLDED: Final = 2.0**-64
"""Of a step with which factors are multiplied before they are: no product comes near subnormal numbers."""
_BLOCK: Final = 1 << 16
"""Elements that are computed in float64 at once."""
_BANDS: Final = np.float32(0.5) * np.array(
    [[1, 1, 1, 1], [1, 1, -1, -1], [1, -1, -1, 1], [1, -1, 1, -1]], np.float32
)
"""Walsh and Hadamard's matrix of four, its own inverse."""
_CONSTANT_GAIN: Final = np.array([16, -8, -8, -8], np.int32)
"""Sixteenths of an octave by which the bands of a smooth vector are larger than the vector."""


def transform(vectors: Floats, kind: int) -> Floats:
    """Transform each row, shape ``(components, n)``; orthogonal, so that errors keep their size.

    Four neighbours become their sums and differences (Walsh-Hadamard, divided by 2), of which all but the
    first are small where a factor is smooth, as it is along the pixels of images and the samples of signals.
    Bands of like coefficients stand together; neighbours beyond a multiple of four stay as they are.

    Args:
        vectors: float32, shape ``(components, n)``.
        kind: ``NO_TRANSFORM``; ``ALONG``; or a width, to transform rows and columns of images so wide.
    """
    if kind == NO_TRANSFORM:
        return vectors
    if kind == ALONG:
        return _forward(vectors)
    images, rest = _images(vectors, kind)
    images = _forward(_forward(images).swapaxes(1, 2)).swapaxes(1, 2)
    return np.concatenate([images.reshape(len(vectors), -1), rest], axis=1)


def inverse(bands: Floats, kind: int) -> Floats:
    """The inverse of :func:`transform`: exact for whole numbers below 2^20."""
    if kind == NO_TRANSFORM:
        return bands
    if kind == ALONG:
        return _backward(bands)
    images, rest = _images(bands, kind)
    images = _backward(_backward(images.swapaxes(1, 2)).swapaxes(1, 2))
    return np.concatenate([images.reshape(len(bands), -1), rest], axis=1)


def band_prior(length: int, kind: int) -> Integers:
    """What to add to the logarithm of an entry's expected magnitude for its band, in 1/16 octaves."""
    if kind == NO_TRANSFORM:
        return np.zeros(length, np.int32)
    if kind == ALONG:
        return _axis_prior(length)
    rows, rest = length // kind, length % kind
    image = _axis_prior(rows)[:, None] + _axis_prior(kind)[None, :]
    return np.concatenate([image.reshape(-1), np.zeros(rest, np.int32)])


def prior_of(place: Place, kind: int) -> Integers:
    """The same for both factors of a matrix, of which the second one is transformed."""
    return np.concatenate([np.zeros(place.rows, np.int32), band_prior(place.columns, kind)])


def _axis_prior(length: int) -> Integers:
    return np.concatenate([np.repeat(_CONSTANT_GAIN, length // 4), np.zeros(length % 4, np.int32)])


def _images(vectors: Floats, width: int) -> tuple[Floats, Floats]:
    whole = vectors.shape[1] // width * width
    return vectors[:, :whole].reshape(len(vectors), -1, width), vectors[:, whole:]


def _forward(vectors: Floats) -> Floats:
    *others, length = vectors.shape
    count = length // 4
    blocks = vectors[..., : 4 * count].reshape(-1, 4) @ _BANDS
    bands = blocks.reshape(*others, count, 4).swapaxes(-1, -2).reshape(*others, 4 * count)
    return np.concatenate([bands, vectors[..., 4 * count :]], axis=-1) if length % 4 else bands


def _backward(bands: Floats) -> Floats:
    *others, length = bands.shape
    count = length // 4
    blocks = bands[..., : 4 * count].reshape(*others, 4, count).swapaxes(-1, -2).reshape(-1, 4)
    vectors = (blocks @ _BANDS).reshape(*others, 4 * count)
    return np.concatenate([vectors, bands[..., 4 * count :]], axis=-1) if length % 4 else vectors


@dataclass(frozen=True)
class Scalars:
    """Quantised parameters that are not zero.

    Attributes:
        places: ascending indices, shape ``(nonzeros,)``.
        values: int32, same shape.
    """

    places: npt.NDArray[np.int64]
    values: Integers


@dataclass(frozen=True)
class Product:
    """Σ_k a_k b_kᵀ + scalars, exactly.

    Attributes:
        left: float32, the a_k 2^(−e_k), shape ``(rank, rows)``.
        right: float32, the b_k, shape ``(rank, columns)``.
        scalars: those that are not zero, or None.
        bound: of every magnitude and every partial sum of magnitudes.
        fraction_bits: of all of them.
        exact_in_float32: whether float32 holds all partial sums.
    """

    left: Floats
    right: Floats
    scalars: Scalars | None
    bound: float
    fraction_bits: int
    exact_in_float32: bool

    def write(self, step: np.float32, out: Floats) -> None:
        """Write the product times the step to ``out``, float32 of shape ``(rows · columns,)``."""
        if self.exact_in_float32:
            self._write_float32(step, out)
        else:
            self._write_float64(step, out)

    def rows(self, rows: slice) -> Floats:
        """About these rows, one after the other, in units of the step."""
        return (self.left[:, rows].T @ self.right).reshape(-1)

    def is_finite_at(self, step: np.float32) -> bool:
        """Whether float32 can hold all of the product times the step."""
        return self.bound * float(step) <= LARGEST_VALUE

    def _write_float32(self, step: np.float32, out: Floats) -> None:
        left, scalars, after = self.left, self.scalars, step
        if self._is_exact_times(step):
            left, after = left * step, np.float32(1)
        if len(left):
            np.matmul(left.T, self.right, out=out.reshape(left.shape[1], -1))
        else:
            out.fill(0)
        if scalars is not None:
            out[scalars.places] += scalars.values.astype(np.float32) * (step / after)
        if after != 1 and len(left):
            out *= after
        elif after != 1 and scalars is not None:
            out[scalars.places] *= after

    def _is_exact_times(self, step: np.float32) -> bool:
        """Whether float32 holds all partial sums times the step, too: then no rounding is left to be done."""
        significant = float(np.frexp(step)[0]) * 2**_STEP_BITS
        largest = self.bound * 2.0 ** (self.fraction_bits + _STEP_BITS)
        return significant.is_integer() and float(step) >= _SMALLEST_FOLDED and largest < 2.0**_FLOAT32_BITS

    def _write_float64(self, step: np.float32, out: Floats) -> None:
        columns = self.right.shape[1]
        left, right = self.left.astype(np.float64), self.right.astype(np.float64)
        scalars = np.zeros(out.size, np.int32)
        if self.scalars is not None:
            scalars[self.scalars.places] = self.scalars.values
        rows_at_once = max(1, _BLOCK // columns)
        for row in range(0, left.shape[1], rows_at_once):
            sums = (left[:, row : row + rows_at_once].T @ right).reshape(-1)
            elements = slice(row * columns, row * columns + sums.size)
            sums += scalars[elements]
            np.multiply(sums.astype(np.float32), step, out=out[elements])


def product_of(
    left: Integers, right: Integers, exponents: tuple[int, ...], kind: int, scalars: Scalars | None
) -> Product:
    """The product of quantised factors.

    Args:
        left: int32, shape ``(rank, rows)``.
        right: int32, shape ``(rank, columns)``, transformed.
        exponents: e_k, none above the one before it.
        kind: of the transform.
        scalars: those that are not zero, or None.

    Raises:
        MalformedPayload: float64 cannot hold all partial sums.
    """
    lefts, rights, bound = left.astype(np.float32), right.astype(np.float32), 0.0
    if exponents:
        lefts *= np.ldexp(np.float32(1), -np.array(exponents))[:, None]  # exact, as exp2 need not be
        rights = inverse(rights, kind)
        largest = np.abs(lefts).max(axis=1) * np.abs(rights).max(axis=1).astype(np.float64)
        bound = float(largest.sum())
    if scalars is not None:
        bound += float(np.abs(scalars.values).max(initial=0))
    fraction_bits = max(exponents, default=0) + min(kind, 2)
    if bound >= 2.0 ** (_FLOAT64_BITS - fraction_bits):
        raise MalformedPayload(f"products up to {bound:g} with {fraction_bits} fraction bits are too large")
    return Product(
        lefts, rights, scalars, bound, fraction_bits, bound < 2.0 ** (_FLOAT32_BITS - fraction_bits)
    )
