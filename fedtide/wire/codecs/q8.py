"""``q8``: symmetric 8-bit integers with one float32 scale for every 256 consecutive parameters.

    payload = scales (float32, one per block) | levels (int8, one per parameter)

Little-endian; the last block may be shorter. With peak = max abs(x) over the block: scale = peak / 127,
level = x / scale rounded to nearest, ties to even, and x' = level * scale. So abs(x - x') is at most half a
scale, but for float32's own rounding (2⁻¹⁶ of a scale).

Scales are float32, not float16: in float16 those of peaks below 7.7e-3 are subnormal, which doubles the
squared error of a delta of 1e-6, and the two bytes saved are 0.8 % of a payload. Blocks of 256 follow the
parameters' order, so that a scale mixes few tensors: 28 times less squared error than one scale for all, for
1.6 % more bytes.

Scales are zero or from 1.18e-38, the smallest normal float32, to 2.66e36. Below, a block becomes zeros, so
that the result is the same where subnormal numbers are flushed to zero. Above, values beyond 3.37e38 are
clipped, so that every level, -128 from a stranger included, decodes to a finite number.
"""

from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

from fedtide.wire.codecs.base import UNREQUESTED, NotFinite, check_delta, check_length, check_out
from fedtide.wire.codecs.rate import Request
from fedtide.wire.parameters import FLOAT32, Schema, Vector

_BLOCK: Final = 256
_TILE_BLOCKS: Final = 512
"""Blocks worked on at once: 512 KiB of float32, which stays in the cache of a core between the passes."""
_TOP_LEVEL: Final = np.float32(127)
_MIN_SCALE: Final = np.finfo(np.float32).smallest_normal
_MAX_SCALE: Final = np.finfo(np.float32).max / np.float32(128)
_MIN_SCALE_BITS: Final = int(_MIN_SCALE.view(np.uint32))
_MAX_SCALE_BITS: Final = int(_MAX_SCALE.view(np.uint32))
_MAGNITUDE_BITS: Final = np.uint32(0x7FFF_FFFF)


class Q8:
    """A quarter of the bytes for about 1e-4 of the delta's energy."""

    codec_id: Final = "q8"
    adjustable: Final = False

    def max_bytes(self, schema: Schema) -> int:
        """Exactly 1 byte per parameter and 4 per block."""
        return _payload_bytes(schema.size)

    def encode(self, delta: Vector, schema: Schema, request: Request = UNREQUESTED) -> bytes:  # noqa: ARG002
        """See :meth:`Codec.encode`."""
        delta = check_delta(delta, schema.size)
        scales = _scales(_peaks(delta))
        levels = _levels(delta, scales)
        return b"".join((scales.astype(FLOAT32, copy=False).data, levels.data))

    def decode(self, payload: bytes | memoryview, schema: Schema, out: Vector | None = None) -> Vector:
        """See :meth:`Codec.decode`."""
        size = schema.size
        check_length(self.codec_id, payload, _payload_bytes(size))
        scales = np.frombuffer(payload, FLOAT32, count=_block_count(size))
        _check_scales(scales)
        levels = np.frombuffer(payload, np.int8, offset=scales.nbytes)
        values = check_out(out, size)
        for blocks, places, width in _tiles(size):
            tile = values[places].reshape(-1, width)
            tile[...] = levels[places].reshape(-1, width)
            tile *= scales[blocks, np.newaxis]
        return values


def _block_count(size: int) -> int:
    return -(-size // _BLOCK)


def _payload_bytes(size: int) -> int:
    return FLOAT32.itemsize * _block_count(size) + size


def _tiles(size: int) -> Iterator[tuple[slice, slice, int]]:
    """Which blocks, which parameters, and how many of these a block has; a shorter last block comes alone."""
    whole_blocks = size // _BLOCK
    for first in range(0, whole_blocks, _TILE_BLOCKS):
        last = min(first + _TILE_BLOCKS, whole_blocks)
        yield slice(first, last), slice(first * _BLOCK, last * _BLOCK), _BLOCK
    if size % _BLOCK:
        yield slice(whole_blocks, whole_blocks + 1), slice(whole_blocks * _BLOCK, size), size % _BLOCK


def _peaks(delta: Vector) -> Vector:
    """The largest magnitude of each block, shape ``(blocks,)``.

    Without the sign bit, float32 numbers have the order of their bit patterns as integers, with NaN and the
    infinities on top: this maximum is exact, cannot miss a NaN, and is twice as fast as the one of floats.

    Raises:
        ValueError: NaN or an infinity.
    """
    peaks = np.empty(_block_count(delta.size), np.uint32)
    work = np.empty(min(delta.size, _TILE_BLOCKS * _BLOCK), np.uint32)
    for blocks, places, width in _tiles(delta.size):
        patterns = delta[places].view(np.uint32)
        magnitudes = np.bitwise_and(patterns, _MAGNITUDE_BITS, out=work[: patterns.size])
        magnitudes.reshape(-1, width).max(axis=1, out=peaks[blocks])
    if not np.isfinite(peaks.view(np.float32)).all():
        raise ValueError("the delta holds NaN or an infinity; only finite deltas are sent")
    return peaks.view(np.float32)


def _scales(peaks: Vector) -> Vector:
    scales: Vector = np.minimum(peaks / _TOP_LEVEL, _MAX_SCALE)
    scales[scales < _MIN_SCALE] = 0
    return scales


def _levels(delta: Vector, scales: Vector) -> npt.NDArray[np.int8]:
    """Whole numbers from -127 to 127, of the delta's shape."""
    levels = np.empty(delta.size, np.int8)
    work = np.empty(min(delta.size, _TILE_BLOCKS * _BLOCK), np.float32)
    divisors = np.where(scales > 0, scales, np.float32(np.inf))  # without a scale, every level is zero
    clipped = scales.max(initial=0) == _MAX_SCALE  # the only scale that can be less than peak / 127
    for blocks, places, width in _tiles(delta.size):
        values = delta[places].reshape(-1, width)
        quotients = work[: values.size].reshape(-1, width)
        np.divide(values, divisors[blocks, np.newaxis], out=quotients)
        np.rint(quotients, out=quotients)
        if clipped:
            np.clip(quotients, -_TOP_LEVEL, _TOP_LEVEL, out=quotients)
        levels[places].reshape(-1, width)[...] = quotients
    return levels


def _check_scales(scales: Vector) -> None:
    """Return if every scale is zero or from ``_MIN_SCALE`` to ``_MAX_SCALE``.

    As bit patterns, infinity and NaN stand above every finite scale, and negative ones higher still.

    Raises:
        NotFinite: one is not.
    """
    bits = scales.view("<u4")
    wrong = (bits > _MAX_SCALE_BITS) | ((bits < _MIN_SCALE_BITS) & (bits != 0))
    if wrong.any():
        raise NotFinite(
            f"q8 block scale {scales[wrong][0]}; scales are 0 or from {_MIN_SCALE:.2e} to {_MAX_SCALE:.2e}"
        )
