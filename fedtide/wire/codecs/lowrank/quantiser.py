"""The encoder's choices: rank, dead zone and fallback, by the error they save against the bits they cost.

A choice is good if it lowers error² + _PRICE · bits, with the error in units of the step.
"""

from dataclasses import dataclass
from math import log2
from typing import Final

import numpy as np
import numpy.typing as npt

from fedtide.wire.codecs.lowrank.contexts import (
    CLASSES,
    MEAN_EXCESSES,
    MEAN_GAPS,
    Classes,
    Integers,
    Predictor,
    waves,
)
from fedtide.wire.codecs.lowrank.factors import Decomposition, Floats
from fedtide.wire.codecs.lowrank.layout import (
    LARGEST_EXPONENT,
    LARGEST_FACTOR,
    Place,
    largest_scalar,
)
from fedtide.wire.codecs.lowrank.products import ALONG, NO_TRANSFORM, Product, Scalars, prior_of, transform

_PRICE: Final = 0.12
"""Of a bit, in squares of the step: the slope of error² over bits of a quantiser with a dead zone."""
_COMPONENT_BITS: Final = 4
_SCALARS_BITS: Final = 16
"""What a component, or a tensor's scalars, add to the headers."""
_SMALLEST_VALUE: Final = 1.5
"""Of a singular value that is worth a look, in steps: its square, the error it saves, pays for 19 bits."""
_SMOOTH: Final = 0.2
"""Correlation of neighbours from which on a transform is worth a look."""
_LEAST: Final = 0.6
"""Magnitudes below never become 1."""
_RARE_BITS: Final = 2.5
"""What a nonzero parameter costs besides its place: its sign and magnitude."""
_BLOCK: Final = 1 << 16
"""Elements worked on at once: 256 KiB of float32, which stays in a core's cache."""
_SAMPLE: Final = 1 << 13
"""Elements of which the cost of a large tensor is estimated."""

_gaps = np.array(MEAN_GAPS)
_means = np.array(MEAN_EXCESSES)
_ZERO_BITS: Final = np.log2(1 + 1 / _gaps)
_ONE_BITS: Final = 1 + np.log2(1 + _gaps) + np.log2(1 + _means)
_MORE_BITS: Final = np.log2(1 + 1 / _means)
"""What a zero, a magnitude of 1 (with its sign) and each further unit of magnitude cost, by class."""
_FIRST_BITS: Final = _ONE_BITS - _MORE_BITS - _ZERO_BITS
"""What a nonzero costs beyond a zero, less its magnitude times what each unit costs."""
_OFFSETS: Final = (0.5 - _PRICE / 2 * np.minimum(_MORE_BITS, 3)).astype(np.float32)
"""Added to magnitudes before they are cut to whole numbers."""
_THRESHOLDS: Final = np.maximum(0.5 + _PRICE / 2 * (_ONE_BITS - _ZERO_BITS), 0.5).astype(np.float32)
"""Magnitudes below become 0: x² - (x - 1)² = 2x - 1 is what a 1 saves."""


@dataclass(frozen=True)
class QuantisedMatrix:
    """Quantised factors.

    Attributes:
        exponents: of the components.
        kind: of the transform.
        entries: the a_k and, behind each, the transformed b_k: int32, shape ``(rank, rows + columns)``.
        classes: of the entries, same shape.
        profit: error² saved, less the price of the bits.
    """

    exponents: tuple[int, ...]
    kind: int
    entries: Integers
    classes: Classes
    profit: float


@dataclass(frozen=True)
class QuantisedScalars:
    """Parameters one by one.

    Attributes:
        scalars: those that are not zero.
        number: of their class.
        profit: error² saved, less the price of the bits.
    """

    scalars: Scalars
    number: int
    profit: float


@dataclass(frozen=True)
class Remainder:
    """What factors leave of a tensor, in units of the step, where it is large.

    Attributes:
        places: ascending indices, shape ``(large,)``.
        values: float32, same shape.
        size: of the tensor.
    """

    places: npt.NDArray[np.int64]
    values: Floats
    size: int


def quantise_factors(decomposition: Decomposition, step: float, place: Place) -> QuantisedMatrix:
    """Quantise as many components as pay.

    Args:
        decomposition: of the matrix.
        step: in the matrix's units.
        place: the matrix's.
    """
    values = decomposition.values / step
    rank = min(int((values > _SMALLEST_VALUE).sum()), place.widest_rank)
    values = values[:rank]
    exponents = np.clip(np.rint(np.log2(values)), 0, LARGEST_EXPONENT).astype(np.int32)
    norms = np.sqrt(values * np.exp2(exponents)).astype(np.float32)[:, None]
    right = decomposition.right[:rank] * norms
    kind = _best_transform(right, place)
    vectors = np.concatenate([decomposition.left[:rank] * norms, transform(right, kind)], axis=1)
    predictor = Predictor([place.rows, place.columns], prior_of(place, kind))
    kept, kept_classes = [np.empty((0, vectors.shape[1]), np.int32)], [np.empty((0, vectors.shape[1]), np.uint8)]
    kept_exponents: list[int] = []
    profit = 0.0
    for wave in waves(rank):
        classes = predictor.classes(exponents[wave, None].repeat(2, axis=1))
        entries, profits = _quantised(vectors[wave], classes, exponents[wave], place.rows)
        pays = profits > 0
        kept_exponents += exponents[wave][pays].tolist()
        kept.append(entries[pays])
        kept_classes.append(classes[pays])
        profit += float(profits[pays].sum())
        if not pays.all():
            break
        if wave.stop < rank:
            predictor.learn(entries)
    return QuantisedMatrix(
        tuple(kept_exponents), kind, np.concatenate(kept), np.concatenate(kept_classes), profit
    )


def _best_transform(vectors: Floats, place: Place) -> int:
    """The transform after which the leading vectors are cheapest, by a rough measure."""
    leading = vectors[:4]
    best, best_bits = NO_TRANSFORM, float(np.log2(1 + np.abs(leading)).sum())
    joined = leading.reshape(-1)
    smooth = _SMOOTH * float(joined @ joined)
    for kind in (ALONG, *place.widths):
        if joined[:-kind] @ joined[kind:] <= smooth:
            continue
        bits = float(np.log2(1 + np.abs(transform(leading, kind))).sum()) * 1.02 + 8
        if bits < best_bits:
            best, best_bits = kind, bits
    return best


def _quantised(
    vectors: Floats, classes: Classes, exponents: Integers, rows: int
) -> tuple[Integers, npt.NDArray[np.float64]]:
    """Entries of some components, and each one's profit.

    A component is left · rightᵀ 2^(−e) and orthogonal to all others, so that a · bᵀ 2^(−e) in its place saves
    (2 ⟨left, a⟩⟨right, b⟩ − |a|²|b|²) 4^(−e).
    """
    magnitudes = np.abs(vectors)
    (places,) = (magnitudes >= _THRESHOLDS.take(classes)).reshape(-1).nonzero()
    magnitudes, numbers = magnitudes.take(places), classes.take(places)
    quantised = np.floor(magnitudes + _OFFSETS.take(numbers))
    np.minimum(np.maximum(quantised, 1, out=quantised), LARGEST_FACTOR, out=quantised)
    entries = np.zeros(vectors.shape, np.int32)
    entries.reshape(-1)[places] = np.copysign(quantised, vectors.take(places))

    # Sums of each component's a and b: differences of running sums.
    sums = np.zeros((3, places.size + 1))
    np.multiply(quantised, magnitudes, out=sums[0, 1:])
    np.multiply(quantised, quantised, out=sums[1, 1:])
    np.multiply(_MORE_BITS.take(numbers), quantised, out=sums[2, 1:])
    sums[2, 1:] += _FIRST_BITS.take(numbers)
    np.cumsum(sums, axis=1, out=sums)
    starts = np.arange(len(vectors))[:, None] * vectors.shape[1] + np.array([0, rows])
    ends = places.searchsorted([*starts.reshape(-1).tolist(), vectors.size])
    overlaps, squares, bits = np.diff(sums.take(ends, axis=1)).reshape(3, -1, 2)
    saved = (2 * overlaps.prod(axis=1) - squares.prod(axis=1)) * np.exp2(-2.0 * exponents)
    bits = bits.sum(axis=1) + _ZERO_BITS.take(classes).sum(axis=1)
    return entries, saved - _PRICE * (bits + _COMPONENT_BITS)


def remainder_of(values: Floats, step: float, columns: int, product: Product | None) -> Remainder:
    """What of a tensor is worth a look beside its factors.

    Args:
        values: float32, shape ``(n,)``.
        step: in the values' units.
        columns: of the tensor as a matrix.
        product: of its factors, in units of the step.
    """
    least = _LEAST * step
    places, remainders = [np.empty(0, np.int64)], [np.empty(0, np.float32)]
    rows_at_once = max(1, _BLOCK // max(1, columns))
    left = None if product is None else product.left * np.float32(step)
    buffer = np.empty((rows_at_once if left is not None else 0, columns), np.float32)
    for row in range(0, values.size // max(1, columns), rows_at_once):
        start = row * columns
        block = values[start : start + rows_at_once * columns]
        if product is not None and left is not None:
            some = left[:, row : row + rows_at_once].T
            products = np.matmul(some, product.right, out=buffer[: len(some)]).reshape(-1)
            block = np.subtract(block, products, out=products)
        if block.max() < least and block.min() > -least:
            continue
        (large,) = (np.abs(block) >= least).nonzero()
        places.append(large + start)
        remainders.append(block[large] * np.float32(1 / step))
    return Remainder(np.concatenate(places), np.concatenate(remainders), values.size)


def quantise_scalars(remainder: Remainder, step: np.float32) -> QuantisedScalars | None:
    """Quantise parameters one by one; None if that does not pay.

    Args:
        remainder: of the tensor.
        step: no product with it may be beyond float32.
    """
    magnitudes = np.abs(remainder.values)
    paying = magnitudes >= _threshold(magnitudes, remainder.size)
    places, magnitudes = remainder.places[paying], magnitudes[paying]
    quantised = np.minimum(np.maximum(np.floor(magnitudes + np.float32(0.4)), 1), largest_scalar(step))
    number, bits = _best_class(remainder.size, quantised)
    saved = float((quantised * (2 * magnitudes.astype(np.float64) - quantised)).sum())
    profit = saved - _PRICE * (bits + _SCALARS_BITS)
    if profit <= 0:
        return None
    signed = np.copysign(quantised, remainder.values[paying]).astype(np.int32)
    return QuantisedScalars(Scalars(places, signed), number, profit)


def scalars_profit(values: Floats, step: float) -> float:
    """About what :func:`quantise_scalars` would save without factors, from a sample."""
    stride = max(1, values.size // _SAMPLE)
    sample = quantise_scalars(remainder_of(values[::stride], step, 1, None), np.float32(1))
    return 0.0 if sample is None else sample.profit * stride


def _threshold(magnitudes: Floats, size: int) -> float:
    """From which magnitude on a parameter pays: the rarer they are, the more their places cost.

    Args:
        magnitudes: of those that are large.
        size: how many parameters there are.
    """
    threshold = _LEAST
    for _ in range(3):
        nonzeros = max(int(np.count_nonzero(magnitudes >= threshold)), 1)
        rarity = log2(max((size - nonzeros) / nonzeros, 2.0**-10))
        threshold = max(_LEAST, 0.5 + _PRICE / 2 * (rarity + _RARE_BITS))
    return threshold


def _best_class(size: int, magnitudes: Floats) -> tuple[int, float]:
    """The class in which such nonzeros among so many parameters cost least, and what they cost."""
    count = magnitudes.size
    further = float(magnitudes.sum(dtype=np.float64)) - count
    costs = (size - count) * _ZERO_BITS + count * _ONE_BITS + further * _MORE_BITS
    number = int(np.argmin(costs[:CLASSES]))
    return number, float(costs[number])
