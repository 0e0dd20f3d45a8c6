"""What the codecs are measured against: methods from the literature, for comparison only.

Each gives what is received, and how many bytes it took. Where a peer has no byte stream of its own here, its
bytes are the ideal length of its code without any header, which flatters it:

- ``TopK``: the largest 1 % of the values as 8-bit integers, Rice-coded gaps between their places
  (Aji and Heafield 2017, "Sparse communication for distributed gradient descent"; Golomb coding of the gaps
  as in Sattler et al. 2019, "Robust and communication-efficient federated learning").
- ``Eden``: a random rotation, then the best scalar quantiser for a Gaussian (Vargaftik et al. 2022, "EDEN",
  section 3), with the scale that makes it unbiased.
- ``Scalar``: one uniform step with a dead zone for all parameters, and one of three coders for the integers:
  an adaptive binary arithmetic coder with contexts by tensor, zlib's run lengths, or Rice codes.
"""

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
from scipy.signal import lfilter

from fedtide.wire.parameters import Schema, Vector

Integers = npt.NDArray[np.int64]
Bits = npt.NDArray[np.bool_]
Coder = Literal["arithmetic", "zlib", "rice"]

_SCALE_BYTES: Final = 4
_ROUND_UP_FROM: Final = 0.65
"""A magnitude of 0.65 steps becomes 1, of 1.65 steps 2: the best dead zone at low rates is about this."""
_CONTEXT_BINS: Final = 14
_RATES: Final = (2.0**-5, 2.0**-7)
"""The adaptive coder's estimate is the mean of a quick and a slow one."""


@dataclass(frozen=True)
class Received:
    """What a delta became, and what it took."""

    payload_bytes: float
    values: Vector


@dataclass(frozen=True)
class TopK:
    """The largest values only, as 8-bit integers of one scale.

    Attributes:
        share: of the values that are sent.
    """

    share: float = 0.01

    def send(self, delta: Vector) -> Received:
        """Code one delta."""
        kept = max(1, round(self.share * delta.size))
        places = np.sort(np.argpartition(np.abs(delta), -kept)[-kept:])
        scale = np.float32(np.abs(delta).max() / 127) or np.float32(1)
        values = np.zeros_like(delta)
        values[places] = np.rint(delta[places] / scale) * scale
        gaps = np.diff(places, prepend=-1) - 1
        return Received(_SCALE_BYTES + kept + rice_bits(gaps) / 8, values)


@dataclass(frozen=True)
class Eden:
    """Rotation and the Lloyd-Max quantiser of the normal distribution.

    The vector is cut into pieces whose lengths are powers of two, largest first, so that none is padded; each
    has its own rotation and scale.

    Attributes:
        bits: of each coordinate.
        seed: of the signs, which both ends draw.
    """

    bits: int = 2
    seed: int = 0

    def send(self, delta: Vector) -> Received:
        """Code one delta."""
        rng = np.random.default_rng(self.seed)
        values = np.empty_like(delta)
        start = payload_bits = 0
        for length in _powers_of_two(delta.size):
            place = slice(start, start + length)
            values[place] = self._piece(delta[place].astype(np.float64), rng)
            payload_bits += self.bits * length + 8 * _SCALE_BYTES
            start += length
        return Received(payload_bits / 8, values)

    def _piece(self, piece: npt.NDArray[np.float64], rng: np.random.Generator) -> npt.NDArray[np.float64]:
        signs = rng.choice((-1.0, 1.0), piece.size)
        norm = float(np.linalg.norm(piece))
        if norm == 0:
            return piece
        rotated = _hadamard(piece * signs)
        levels = lloyd_max(self.bits)
        nearest = np.searchsorted((levels[1:] + levels[:-1]) / 2, rotated * math.sqrt(piece.size) / norm)
        quantised = levels[nearest]
        quantised *= norm**2 / float(rotated @ quantised)  # EDEN's scale: the estimate is unbiased
        restored: npt.NDArray[np.float64] = _hadamard(quantised) * signs
        return restored


@dataclass(frozen=True)
class Scalar:
    """One uniform step for all parameters, magnitudes below 0.65 steps become zero.

    Attributes:
        coder: ``arithmetic``, ``zlib`` or ``rice``.
        schema: where the tensors are, for the arithmetic coder's contexts.
        step: in units of the delta's rms.
    """

    coder: Coder
    schema: Schema = field(repr=False)
    step: float = 4.0

    def send(self, delta: Vector) -> Received:
        """Code one delta."""
        step = self.step * float(np.sqrt(np.mean(np.square(delta, dtype=np.float64))))
        if step == 0:
            return Received(_SCALE_BYTES, np.zeros_like(delta))
        magnitudes = np.floor(np.abs(delta) / step + (1 - _ROUND_UP_FROM)).astype(np.int64)
        levels = np.where(delta < 0, -magnitudes, magnitudes)
        match self.coder:
            case "arithmetic":
                coded = sum(adaptive_bits(levels[place]) for _, place in self.schema.slices()) / 8
            case "zlib":
                coded = run_length_bytes(levels)
            case "rice":
                coded = rice_bytes(levels)
        return Received(_SCALE_BYTES + coded, (levels * step).astype(np.float32))


def rice_bits(values: Integers) -> float:
    """Length of the best Rice code of non-negative integers: quotient in unary, remainder in k bits."""
    lengths = (float((values >> k).sum() + (1 + k) * values.size) for k in range(24))
    return min(lengths)


def rice_bytes(levels: Integers) -> float:
    """Rice codes of the gaps between nonzero levels and of their magnitudes, and a sign each."""
    places = np.flatnonzero(levels)
    gaps = np.diff(places, prepend=-1) - 1
    return (rice_bits(gaps) + rice_bits(np.abs(levels[places]) - 1) + places.size) / 8


def run_length_bytes(levels: Integers) -> float:
    """Levels as bytes, larger ones as 127 and two bytes more, through zlib's run-length strategy."""
    small = np.clip(levels, -127, 127).astype(np.int8)
    large = levels[np.abs(levels) >= 127].astype("<i2")
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_RLE)
    return float(len(compressor.compress(small.tobytes()) + compressor.flush()) + large.nbytes)


def adaptive_bits(levels: Integers) -> float:
    """Ideal length of an adaptive binary arithmetic code: −log₂ of the estimate of every decision.

    A level is: zero or not; sign, one bit; then "more?" for each further step up to 14, then Elias gamma.
    """
    magnitudes = np.abs(levels)
    bits = _decisions_bits(magnitudes > 0, 0.05) + float(np.count_nonzero(magnitudes))
    rest = magnitudes[magnitudes > 0]
    for reached in range(1, _CONTEXT_BINS):
        if not rest.size:
            return bits
        bits += _decisions_bits(rest > reached, 0.3)
        rest = rest[rest > reached]
    return bits + float((2 * np.floor(np.log2(rest - _CONTEXT_BINS + 1)) + 1).sum())


def _decisions_bits(decisions: Bits, first: float) -> float:
    """−log₂ of what a pair of exponentially forgetting estimates gave each decision, summed."""
    if not decisions.size:
        return 0.0
    estimate = np.full(decisions.size, first)
    followed = (
        lfilter([rate], [1, rate - 1], decisions[:-1].astype(np.float64), zi=[(1 - rate) * first])[0]
        for rate in _RATES
    )
    if decisions.size > 1:
        estimate[1:] = sum(followed) / len(_RATES)
    estimate = np.clip(estimate, 2.0**-11, 1 - 2.0**-11)
    return float(-np.log2(np.where(decisions, estimate, 1 - estimate)).sum())


@lru_cache
def lloyd_max(bits: int) -> npt.NDArray[np.float64]:
    """The ``2 ** bits`` levels of least squared error for N(0, 1), ascending (Lloyd 1957, Max 1960)."""
    levels = np.linspace(-2.0, 2.0, 2**bits) if bits > 1 else np.array([-0.8, 0.8])
    for _ in range(2000):
        edges = np.concatenate(([-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]))
        density = np.exp(-(edges**2) / 2) / math.sqrt(2 * math.pi)
        below = np.array([0.5 * (1 + math.erf(edge / math.sqrt(2))) for edge in edges])
        levels = -np.diff(density) / np.diff(below)
    return levels


def _powers_of_two(size: int) -> Iterator[int]:
    """The powers of two that sum to ``size``, largest first."""
    return (1 << bit for bit in range(size.bit_length() - 1, -1, -1) if size >> bit & 1)


def _hadamard(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The orthonormal Walsh-Hadamard transform of a vector whose length is a power of two."""
    values, half = values.copy(), 1
    while half < values.size:
        pairs = values.reshape(-1, 2, half)
        values = np.stack((pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]), axis=1).reshape(-1)
        half *= 2
    return values / math.sqrt(values.size)
