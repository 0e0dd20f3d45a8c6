"""Parameters one by one: those of tensors without factors, and what factors leave where it is large."""

from dataclasses import dataclass
from math import log2
from typing import Final

import numpy as np
import numpy.typing as npt

from fedtide.wire.codecs.lowrank.contexts import CLASSES
from fedtide.wire.codecs.lowrank.costs import MORE_BITS, ONE_BITS, PRICE, ZERO_BITS
from fedtide.wire.codecs.lowrank.factors import Floats
from fedtide.wire.codecs.lowrank.layout import largest_scalar
from fedtide.wire.codecs.lowrank.products import Product, Scalars

_SCALARS_BITS: Final = 16
"""What a tensor's scalars add to the headers."""
_LEAST: Final = 0.6
"""Magnitudes below never become 1."""
_RARE_BITS: Final = 2.5
"""What a nonzero parameter costs besides its place: its sign and magnitude."""
_BLOCK: Final = 1 << 16
"""Elements worked on at once: 256 KiB of float32, which stays in a core's cache."""
_SAMPLE: Final = 1 << 13
"""Elements of which the cost of a large tensor is estimated."""


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
    if magnitudes @ magnitudes <= PRICE * _SCALARS_BITS:  # all the error that could be saved
        return None
    paying = magnitudes >= _threshold(magnitudes, remainder.size)
    places, magnitudes = remainder.places[paying], magnitudes[paying]
    quantised = np.minimum(np.maximum(np.floor(magnitudes + np.float32(0.4)), 1), largest_scalar(step))
    number, bits = _best_class(remainder.size, quantised)
    saved = float((quantised * (2 * magnitudes.astype(np.float64) - quantised)).sum())
    profit = saved - PRICE * (bits + _SCALARS_BITS)
    if profit <= 0:
        return None
    signed = np.copysign(quantised, remainder.values[paying]).astype(np.int32)
    return QuantisedScalars(Scalars(places, signed), number, profit)


def scalars_save_more(values: Floats, step: float, profit: float) -> bool:
    """Whether :func:`quantise_scalars` would have a higher profit without factors, judged by a sample."""
    stride = max(1, values.size // _SAMPLE)
    remainder = remainder_of(np.ascontiguousarray(values[::stride]), step, 1, None)
    if float(remainder.values @ remainder.values) * stride <= profit:  # all the error that could be saved
        return False
    sample = quantise_scalars(remainder, np.float32(1))
    return sample is not None and sample.profit * stride > profit


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
        threshold = max(_LEAST, 0.5 + PRICE / 2 * (rarity + _RARE_BITS))
    return threshold


def _best_class(size: int, magnitudes: Floats) -> tuple[int, float]:
    """The class in which such nonzeros among so many parameters cost least, and what they cost."""
    count = magnitudes.size
    further = float(magnitudes.sum(dtype=np.float64)) - count
    costs = (size - count) * ZERO_BITS + count * ONE_BITS + further * MORE_BITS
    number = int(np.argmin(costs[:CLASSES]))
    return number, float(costs[number])
