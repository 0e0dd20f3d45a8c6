"""``ecsq``: entropy-coded scalar quantisation, one uniform step for all parameters.

    payload = step (16 bits) | tensors

Little-endian. The step is a float32 without its sign and its last 15 bits; the coefficients are levels,
encoded by :mod:`matrix_contexts`, and x' = level · step. A level is sign(x) · floor(m − p + θ), with
m = abs(x) / step, p = min(m · s, 0.3) and θ up to 1/2. Decoders need to know neither θ nor s.

With θ below 1/2 more values become zero, which saves more bits than it adds error. The best θ was computed
for Gaussian, Laplace and heavier-tailed values at rates from 0.05 to 4 bits: it depends on the share of
nonzeros more than on the distribution, from 0.22 where few are left to 1/2. With it, reconstruction at the
centroids instead of at level · step would gain no more than 0.05 dB, but for values whose tails are as light
as Gaussian ones. Of these, large levels are so rare that a threshold between two levels belongs above their
middle, ever further the larger they are, which s does. That gains 0.11 dB at 2 bits, as much as centroids.

The step follows the rms of all the delta, θ each tensor.
"""

from collections.abc import Iterator
from math import log, sqrt
from typing import Final

import numpy as np

from fedtide.wire.codecs.base import UNREQUESTED, NotFinite, WrongLength, check_delta, check_out
from fedtide.wire.codecs.budget import finest_within
from fedtide.wire.codecs.entropy.bits import BitReader, BitWriter
from fedtide.wire.codecs.entropy.coefficients import Coefficients
from fedtide.wire.codecs.matrix_contexts import TensorReader, encode_tensors
from fedtide.wire.codecs.rate import FINEST_STEP, Request
from fedtide.wire.parameters import Schema, Vector

DEFAULT_STEP: Final = 4.0
"""In units of the delta's rms: about 0.2 bit per parameter, with error feedback at no loss of accuracy."""

_STEP_BYTES: Final = 2
_DROPPED_BITS: Final = 15
_SMALLEST_PATTERN: Final = 0x0100
"""Of a step: 2^-126, so that no product is subnormal; some machines flush such numbers to zero."""
_LARGEST_PATTERN: Final = 0xFEFF
"""The largest finite one, 3.40e38."""
_LARGEST_VALUE: Final = float(np.finfo(np.float32).max)
_LARGEST_LEVEL: Final = 2**24 - 1
"""float32 holds every level exactly."""
_LARGE_SHARE: Final = 512
"""Encoders make fewer than one level in so many that is beyond int16: with steps from 2^-10 of the rms on,
the mean square of levels is below 1028^2, which 32,768^2 for one in 1016 exceeds."""
_MAGNITUDE_BITS: Final = np.uint32(0x7FFF_FFFF)
_INFINITY_BITS: Final = 0x7F80_0000
_LARGEST_SHIFT: Final = np.float32(0.3)
"""Of a threshold, in steps: an outlier among values with light tails shall not lose more."""
_FEWEST_IN_TAIL: Final = 16
"""Values by which tails are judged."""
_LARGEST_SHARE: Final = 0.9
"""Of nonzeros, at which thresholds are shifted: at finer steps it gains nothing."""
_CHUNK: Final = 1 << 16
"""Parameters worked on at once: 256 KiB of float32, which stays in a core's cache."""


class Ecsq:
    """Fewest bytes for what no transform makes sparser; the fallback of ``lowrank``."""

    codec_id: Final = "ecsq"
    adjustable: Final = True

    def max_bytes(self, schema: Schema) -> int:
        """As many as float32, and some for the tables of short tensors."""
        return 4 * schema.size + 1024 + 8 * len(schema.tensors)

    def encode(self, delta: Vector, schema: Schema, request: Request = UNREQUESTED) -> bytes:
        """See :meth:`Codec.encode`.

        The step is never finer than ``FINEST_STEP`` of this delta's own rms. A budget that no step meets
        gets the payload of the coarsest step.
        """
        delta = check_delta(delta, schema.size)
        own_rms = _rms(delta)
        rms = request.rms or own_rms
        finest = FINEST_STEP * own_rms

        def encoded(step: float) -> bytes:
            return _encoded(delta, schema, _pattern(max(step * rms, finest)))

        budget_bytes = request.rate.budget_bytes(schema.size)
        if budget_bytes is None:
            return encoded(request.rate.step or DEFAULT_STEP)
        return finest_within(encoded, budget_bytes, DEFAULT_STEP)

    def decode(self, payload: bytes | memoryview, schema: Schema, out: Vector | None = None) -> Vector:
        """See :meth:`Codec.decode`."""
        payload = memoryview(payload).cast("B")
        if not _STEP_BYTES <= payload.nbytes <= self.max_bytes(schema):
            raise WrongLength(self.codec_id, payload.nbytes, self.max_bytes(schema))
        step = _step(payload)
        header = BitReader(payload[_STEP_BYTES:])
        reader = TensorReader(header, schema, max_large=schema.size // _LARGE_SHARE + 1)
        if reader.peak > _largest_level(step):
            raise NotFinite(f"an ecsq level of {reader.peak:,} at a step of {step}: not a float32")
        levels = np.empty(schema.size, np.float32)
        reader.read(levels)
        return np.multiply(levels, step, out=levels if out is None else check_out(out, schema.size))


def _pattern(step: float) -> int:
    """The 16 bits next to a step."""
    bits = int(np.float32(min(step, _LARGEST_VALUE)).view(np.uint32))
    pattern = bits + (1 << _DROPPED_BITS - 1) >> _DROPPED_BITS
    return min(max(pattern, _SMALLEST_PATTERN), _LARGEST_PATTERN)


def _step(payload: memoryview) -> np.float32:
    """The step that a payload begins with.

    Raises:
        NotFinite: it is out of range.
    """
    pattern = int.from_bytes(payload[:_STEP_BYTES], "little")
    step = np.uint32(pattern << _DROPPED_BITS).view(np.float32)
    if not _SMALLEST_PATTERN <= pattern <= _LARGEST_PATTERN:
        raise NotFinite(f"an ecsq step of {step}; it must be from 1.18e-38 to 3.40e+38")
    return step


def _largest_level(step: np.float32) -> int:
    """The largest level whose product with the step is finite, and that float32 holds exactly."""
    return min(_LARGEST_LEVEL, int(_LARGEST_VALUE / float(step)))


def _chunks(size: int) -> Iterator[slice]:
    for start in range(0, size, _CHUNK):
        yield slice(start, start + _CHUNK)


def _rms(delta: Vector) -> float:
    """Root of the mean square.

    Raises:
        ValueError: NaN or an infinity.
    """
    energy = 0.0
    for place in _chunks(delta.size):
        chunk = delta[place]
        # Without the sign bit, the patterns of the infinities and of NaN are above those of all numbers.
        if int((chunk.view(np.uint32) & _MAGNITUDE_BITS).max()) >= _INFINITY_BITS:
            raise ValueError("the delta holds NaN or an infinity; only finite deltas are sent")
        energy += float(np.square(chunk, dtype=np.float64).sum())
    return sqrt(energy / max(delta.size, 1))


def _encoded(delta: Vector, schema: Schema, pattern: int) -> bytes:
    head = pattern.to_bytes(_STEP_BYTES, "little")
    step = _step(memoryview(head))
    levels = [_levels(delta[place], step) for _, place in schema.slices()]
    return head + encode_tensors(levels, schema, BitWriter())


def _levels(values: Vector, step: np.float32) -> Coefficients:
    rounding, squeeze = (np.float32(each) for each in _rounding(values, step))
    largest = np.float32(_largest_level(step))
    peak = max(float(values.max(initial=0)), -float(values.min(initial=0)))
    levels: Coefficients = np.empty(values.size, _type_for(peak / float(step)))
    work = np.empty(min(values.size, _CHUNK), np.float32)
    for place in _chunks(values.size):
        chunk = values[place]
        magnitudes = np.abs(chunk, out=work[: chunk.size])
        with np.errstate(over="ignore"):  # an infinite quotient becomes the largest level
            magnitudes /= step
        if squeeze:
            magnitudes -= np.minimum(magnitudes * squeeze, _LARGEST_SHIFT)
        magnitudes += rounding
        np.floor(magnitudes, out=magnitudes)
        np.minimum(magnitudes, largest, out=magnitudes)
        np.copysign(magnitudes, chunk, out=magnitudes)
        levels[place] = magnitudes
    return levels


def _type_for(level: float) -> type[np.signedinteger]:
    """The smallest type for levels up to this, which is not rounded yet."""
    if level < 127:
        return np.int8
    return np.int16 if level < 2**15 - 1 else np.int32


def _rounding(values: Vector, step: np.float32) -> tuple[float, float]:
    """The best θ and s for the values, found in some of them.

    The share of values that will not become zero tells θ. How light the tails are shows in how many are above
    1.7 steps: the logarithms of both shares are as 1.7 to 0.7 for Laplace values, further apart for lighter
    tails. What follows from it was fitted to Gaussian values at 1 to 4 bits.
    """
    sample = np.abs(values[:: 1 + values.size // _CHUNK])
    limits = (0.7 * float(step), min(1.7 * float(step), _LARGEST_VALUE))
    some, more = (np.count_nonzero(sample > limit) for limit in limits)
    share = some / max(sample.size, 1)
    rounding = 0.22 + 0.4 * share - 0.12 * share**2
    if more < _FEWEST_IN_TAIL or share > _LARGEST_SHARE:
        return rounding, 0.0
    lightness = min(max(log(more / sample.size) / log(share) - 1.7 / 0.7, 0), 1.5)
    return min(rounding + 0.12 * min(lightness, 1), 0.5), 0.1 * lightness**2
