"""``lowrank``: the leading singular components of each tensor, on one grid, and what of the rest pays.

Deltas of local training are nearly of low rank: a few components hold most of a matrix's energy, and their
factors, rounded to whole steps, are mostly zeros. See ``layout`` for the payload.
"""

from typing import Final

from fedtide.wire.codecs.base import UNREQUESTED, NotFinite, WrongLength, check_delta, check_out
from fedtide.wire.codecs.ecsq import Ecsq
from fedtide.wire.codecs.lowrank.encoder import Encoder
from fedtide.wire.codecs.lowrank.layout import (
    DENSE,
    STEP_BYTES,
    places_of,
    step_of,
)
from fedtide.wire.codecs.lowrank.stream import read_products
from fedtide.wire.codecs.rate import Request
from fedtide.wire.parameters import Schema, Vector


class LowRank:
    """See the module."""

    codec_id: Final = "lowrank"
    adjustable: Final = True

    def max_bytes(self, schema: Schema) -> int:
        """As many as float32, and some for the headers of tensors and classes."""
        return 4 * schema.size + 1024 + 16 * len(schema.tensors)

    def encode(self, delta: Vector, schema: Schema, request: Request = UNREQUESTED) -> bytes:
        """See :meth:`Codec.encode`.

        The step is never finer than ``FINEST_STEP`` of this delta's own rms. A budget that no step meets
        gets the two bytes of a delta of zeros.
        """
        return Encoder(check_delta(delta, schema.size), schema).encode(request)

    def decode(self, payload: bytes | memoryview, schema: Schema, out: Vector | None = None) -> Vector:
        """See :meth:`Codec.decode`."""
        view = memoryview(payload).cast("B")
        if not STEP_BYTES <= view.nbytes <= self.max_bytes(schema):
            raise WrongLength(self.codec_id, view.nbytes, self.max_bytes(schema))
        if bytes(view[:STEP_BYTES]) == DENSE:
            return Ecsq().decode(view[STEP_BYTES:], schema, out)
        bits = int.from_bytes(view[:STEP_BYTES], "little")
        if bits == 0 and view.nbytes != STEP_BYTES:
            raise WrongLength(self.codec_id, view.nbytes, STEP_BYTES)
        if bits == 0:
            decoded = check_out(out, schema.size)
            decoded.fill(0)
            return decoded
        step, places = step_of(bits), places_of(schema)
        products = read_products(view[STEP_BYTES:], places)
        if not all(product.is_finite_at(step) for product in products):
            raise NotFinite(f"a lowrank step of {step}, with which values are beyond float32")
        decoded = check_out(out, schema.size)
        for place, product in zip(places, products, strict=True):
            product.write(step, decoded[place.elements])
        return decoded
