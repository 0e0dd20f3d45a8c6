"""The closed loop on power-of-two grids: what devices hold, w^, follows the model w. Pure.

w^ of version v = w^ of u + Q(w of v − w^ of u), where u was published before v. What rounding leaves out
stays in the next difference, so the error never accumulates: it is below ``DEAD_ZONE`` of one step. This is
the shared hidden state of QAFeL (Ortega and Jafarkhani 2024, arXiv:2410.00242), here with steps that are
powers of two.

A vector is *on the grid* when every tensor's parameters are whole numbers below 2^24 times one power of two:
float32 holds these exactly, and sums and differences of them as well, as long as the result is again on the
grid. So devices need nothing but float32, and no order of additions gives other bits.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from fedtide.wire.codecs.grid import COARSEST_EXPONENT, FINEST_EXPONENT, LARGEST, Integers
from fedtide.wire.parameters import Schema, Vector

DEAD_ZONE: Final = 0.65
"""Changes below this part of a step wait until they have grown; rate–distortion is flat around it."""
FINE_START: Final = 32.0
"""The first version's steps, per rms of a tensor: as fine as 8-bit integers usually are."""
_LARGEST_RATIO: Final = 2.0
"""A tensor that changes less than the model as a whole has at most this many times its own share of step."""
_FINER_ONE_DIMENSIONAL: Final = 4.0
"""Biases and norms take next to no bytes and are sensitive, so their steps are finer."""
_HEADROOM_BITS: Final = 22
"""No step makes a tensor's integers larger than this many bits; two more are left for growth."""
_LARGEST_PARAMETER: Final = 2.0 ** (COARSEST_EXPONENT + _HEADROOM_BITS)
_MANTISSA_BITS: Final = 24

Doubles = npt.NDArray[np.float64]
Spread = tuple[float, ...]
"""The rms of what lately changed between published versions, by tensor."""


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where a version stands among the published ones; kept with its file, for after a restart.

    Attributes:
        sequence: how many were published before it.
        spread: what lately changed, by tensor; empty where nothing was published before.
    """

    sequence: int = 0
    spread: Spread = ()


FIRST: Final = Place()


@dataclass(frozen=True)
class Grid:
    """A vector as whole numbers.

    Attributes:
        values: int32, shape ``(schema.size,)``.
        exponents: one per tensor; a parameter is value × 2^exponent.
    """

    values: Integers
    exponents: tuple[int, ...]


def grid_of(vector: Vector | Doubles, schema: Schema) -> Grid | None:
    """The coarsest grid that a vector is on; None if it is on none, and where a zero is negative."""
    values = np.empty(schema.size, np.int32)
    exponents = []
    for _, place in schema.slices():
        part = vector[place].astype(np.float64)
        finest = _finest_exponent(part, _MANTISSA_BITS)
        part *= 2.0**-finest
        if np.abs(part).max(initial=0.0) > LARGEST or _has_negative_zero(part):
            return None
        whole = values[place]
        np.copyto(whole, part, casting="unsafe")
        if (whole != part).any():
            return None
        lowest = int(np.bitwise_or.reduce(whole))
        shift = (lowest & -lowest).bit_length() - 1 if lowest else COARSEST_EXPONENT - finest
        shift = min(shift, COARSEST_EXPONENT - finest)
        whole >>= min(shift, _MANTISSA_BITS)
        exponents.append(finest + shift)
    return Grid(values, tuple(exponents))


def difference(older: Vector, newer: Vector, schema: Schema) -> Grid | None:
    """What takes a device from one vector on the grid to another; None where float32 could not add it."""
    return grid_of(newer.astype(np.float64) - older, schema)  # exact: both have 24 bits of one power of two


def first_on_grid(target: Vector, schema: Schema) -> Vector:
    """The vector on the grid for a model that nothing was published of before.

    Args:
        target: finite float32, shape ``(schema.size,)``. Beyond ±2^42, where nothing trains any more, it is
            taken as ±2^42.
        schema: of the model.
    """
    start = np.empty(schema.size, np.float32)
    for _, place in schema.slices():
        part = _bounded(target[place])
        exponent = max(_exponent_below(_rms(part) / FINE_START), _finest_exponent(part, _HEADROOM_BITS))
        start[place] = np.ldexp(np.rint(np.ldexp(part, -exponent)), exponent)
    return start + np.float32(0)  # what was rounded to −0 becomes 0


def next_on_grid(previous: Vector, target: Vector, steps: Sequence[int], schema: Schema) -> Vector:
    """The vector on the grid that is published after ``previous``.

    Should a tensor have grown so much that its integers do not fit any more, all begins anew, on a coarser
    grid: then there is no delta, and devices take the keyframe.

    Args:
        previous: on the grid, as devices hold it.
        target: the model; finite, shape ``(schema.size,)``, and bounded as in :func:`first_on_grid`.
        steps: each tensor's step is 2 to the power of this.
        schema: of the model.
    """
    following = np.empty(schema.size, np.float32)
    for (_, place), exponent in zip(schema.slices(), steps, strict=True):
        before = previous[place].astype(np.float64)
        change = np.ldexp(_bounded(target[place]) - before, -exponent)
        whole = np.copysign(np.floor(np.abs(change) + (1.0 - DEAD_ZONE)), change)
        following[place] = before + np.ldexp(whole, exponent)
    following += np.float32(0)
    if grid_of(following, schema) is None or difference(previous, following, schema) is None:
        return first_on_grid(target, schema)
    return following


def spread_after(before: Spread, change: Vector | Doubles, schema: Schema) -> Spread:
    """The spread with what changed last; a geometric mean, so that it soon forgets.

    Args:
        before: the spread so far; empty before the first change.
        change: w of this published version − w of the one before, shape ``(schema.size,)``.
        schema: of the model.
    """
    now = [_rms(change[place].astype(np.float64)) for _, place in schema.slices()]
    then = before or now
    return tuple(
        (old * new) ** 0.5 if old and new else max(old, new) for old, new in zip(then, now, strict=True)
    )


def step_exponents(spread: Spread, target: Vector, step: float, schema: Schema) -> tuple[int, ...]:
    """Each tensor's step, as an exponent of 2.

    One step for the whole model has the smallest error for its bytes. But a tensor that changes far less
    than others would never be sent: so none has a step above twice what its own changes would give it.

    Args:
        spread: see :func:`spread_after`.
        target: the model; bounds how fine its grid may become.
        step: in units of the changes' rms.
        schema: of the model.
    """
    squares = sum(rms**2 * tensor.size for rms, tensor in zip(spread, schema.tensors, strict=True))
    overall = (squares / max(1, schema.size)) ** 0.5
    exponents = []
    for rms, (tensor, place) in zip(spread, schema.slices(), strict=True):
        width = step * min(overall, _LARGEST_RATIO * rms or overall)
        if len(tensor.shape) <= 1:
            width /= _FINER_ONE_DIMENSIONAL
        finest = _finest_exponent(_bounded(target[place]), _HEADROOM_BITS)
        exponents.append(max(_exponent_near(width), finest))
    return tuple(exponents)


def _bounded(part: Vector) -> Doubles:
    return np.clip(part.astype(np.float64), -_LARGEST_PARAMETER, _LARGEST_PARAMETER)


def _rms(part: Doubles) -> float:
    return float(np.sqrt(np.mean(np.square(part)))) if part.size else 0.0


def _exponent_near(width: float) -> int:
    return _within(round(float(np.log2(width)))) if width > 0 else COARSEST_EXPONENT


def _exponent_below(width: float) -> int:
    return _within(int(np.floor(np.log2(width)))) if width > 0 else COARSEST_EXPONENT


def _within(exponent: int) -> int:
    return min(max(exponent, FINEST_EXPONENT), COARSEST_EXPONENT)


def _finest_exponent(part: Doubles, bits: int) -> int:
    """The finest step on which these parameters are integers of at most so many bits."""
    largest = float(np.abs(part).max(initial=0.0))
    return _within(math.frexp(largest)[1] - bits) if largest else FINEST_EXPONENT


def _has_negative_zero(part: Doubles) -> bool:
    return bool((np.signbit(part) & (part == 0)).any())
