"""Payloads that no encoder makes, coded as one would: what an entropy coder's checks hide from mutated bytes.

Headers hold any value that their fields can take, and coefficients any number, too many of them included.
"""

import random
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from fedtide.wire.codecs.entropy.bits import BitWriter
from fedtide.wire.codecs.entropy.coefficients import LARGEST, encode_classes
from fedtide.wire.codecs.entropy.tokens import TableChoice
from fedtide.wire.codecs.lowrank.contexts import TABLES
from fedtide.wire.codecs.lowrank.layout import LARGEST_EXPONENT, TensorLayout, places_of, write_layouts
from fedtide.wire.parameters import Schema

MAGNITUDES: Final = (
    1, 1, 1, 2, 3, 10, 100, 2**12, 2**15 - 1, 2**15, 2**16, 2**23, 2**24 - 1, 2**24, 2**27, LARGEST,
)  # fmt: skip
STEPS: Final = (
    0,
    1,
    0x007F,
    0x0080,
    0x0D7F,
    0x0D80,
    0x3580,
    0x3A80,
    0x7F00,
    0x7F7F,
    0x7F80,
    0x7FC0,
    0x8000,
    0xFFFF,
)
"""Upper halves of float32 numbers: zero, subnormal, tiny, usual, the largest, infinite, NaN, negative."""

Coefficients = npt.NDArray[np.int32]


def forged_ecsq(schema: Schema, defaults: tuple[TableChoice, ...], draw: random.Random) -> bytes:
    """Any step, any coefficients."""
    return _step(draw) + _coefficients([schema.size // len(defaults)] * len(defaults), defaults, draw)


def forged_lowrank(schema: Schema, draw: random.Random) -> bytes:
    """Any step, any ranks, exponents, transforms and classes, any coefficients; often only scalars."""
    places = places_of(schema)
    header = BitWriter()
    layouts, lengths = [], [0] * len(TABLES)
    factors = draw.random() < 0.5
    for place in places:
        rank = draw.choice((0, 1, 2, place.widest_rank)) if place.widest_rank and factors else 0
        exponents = sorted((draw.choice((0, 5, LARGEST_EXPONENT)) for _ in range(rank)), reverse=True)
        transform = draw.choice((0, 1, 2, 3, place.columns)) if rank else 0
        scalar_class = draw.randrange(len(TABLES)) if draw.random() < 0.4 else None
        layouts.append(TensorLayout(tuple(exponents), transform, scalar_class))
        if scalar_class is not None:
            lengths[scalar_class] += place.size
        for _ in range(rank):
            lengths[draw.randrange(len(TABLES))] += place.rows + place.columns
    write_layouts(header, layouts, places)
    return _step(draw) + header.to_bytes() + _coefficients(lengths, TABLES, draw)


def forged_grid(schema: Schema, default: TableChoice, draw: random.Random) -> bytes:
    """Any exponents and shifts, any integers."""
    header = BitWriter()
    highest = (80, 9) if draw.random() < 0.8 else (127, 31)  # 60 above the finest exponent is 2^0
    for _ in schema.tensors:
        for width, most in zip((7, 5), highest, strict=True):
            same = draw.random() < 0.5
            header.put(same, 1)
            if not same:
                header.put(draw.randint(0, most), width)
    lengths = [tensor.size for tensor in schema.tensors]
    return header.to_bytes() + _coefficients(lengths, (default,) * len(lengths), draw)


def _step(draw: random.Random) -> bytes:
    bits = draw.choice(STEPS) if draw.random() < 0.2 else draw.randrange(0x3000, 0x4000)
    return bits.to_bytes(2, "little")


def _coefficients(lengths: Sequence[int], defaults: tuple[TableChoice, ...], draw: random.Random) -> bytes:
    """Classes of about these lengths, or far from them."""
    rng = np.random.default_rng(draw.getrandbits(32))
    magnitudes = np.array(MAGNITUDES[: draw.choice((3, 6, 8, 12, len(MAGNITUDES)))])
    factor = draw.choice((1, 1, 1, 0.5, 2))
    classes = [_class(rng, magnitudes, int(factor * length)) for length in lengths]
    return encode_classes(classes, defaults)


def _class(rng: np.random.Generator, magnitudes: npt.NDArray[np.int64], length: int) -> Coefficients:
    values = rng.choice(magnitudes, length) * rng.choice((-1, 1), length)
    kept: Coefficients = (values * (rng.random(length) < rng.random())).astype(np.int32)
    return kept
