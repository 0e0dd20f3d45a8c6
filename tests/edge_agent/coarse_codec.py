"""A codec for these tests that leaves out so much that a person can follow it, and the table with it."""

import math
from typing import Final

import numpy as np

from fedtide.wire.codecs import CODECS
from fedtide.wire.codecs.base import UNREQUESTED, Codec, WrongLength, check_delta, check_out
from fedtide.wire.codecs.rate import Request
from fedtide.wire.parameters import Schema, Vector, to_bytes

STEP: Final = 4.0
"""What it rounds to where no step is asked for, whatever the rms is."""


class Coarse:
    """Multiples of the step, rounded towards zero."""

    codec_id: Final = "coarse"
    adjustable: Final = True

    def max_bytes(self, schema: Schema) -> int:
        return 4 * schema.size

    def encode(self, delta: Vector, schema: Schema, request: Request = UNREQUESTED) -> bytes:
        delta = check_delta(delta, schema.size)
        if not np.isfinite(delta).all():
            raise ValueError("not finite")
        rms = math.sqrt(float(np.mean(np.square(delta)))) if request.rms is None else request.rms
        step = np.float32(STEP if request.rate.step is None else request.rate.step * rms)
        return to_bytes(np.trunc(delta / step) * step)

    def decode(self, payload: bytes | memoryview, schema: Schema, out: Vector | None = None) -> Vector:
        if len(payload) != 4 * schema.size:
            raise WrongLength(self.codec_id, len(payload), 4 * schema.size)
        vector = check_out(out, schema.size)
        vector[:] = np.frombuffer(payload, "<f4")
        return vector


TABLE: Final[dict[str, Codec]] = {**CODECS, "coarse": Coarse()}
