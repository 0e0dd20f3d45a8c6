"""``float32``: the delta itself, 4 bytes per parameter, little-endian. Lossless."""

from typing import Final

import numpy as np

from fedtide.wire.codecs.base import UNREQUESTED, NotFinite, check_delta, check_length, check_out
from fedtide.wire.codecs.rate import Request
from fedtide.wire.parameters import FLOAT32, Schema, Vector, to_bytes


class Float32:
    """Every bit of the delta, negative zero and subnormals included."""

    codec_id: Final = "float32"
    adjustable: Final = False

    def max_bytes(self, schema: Schema) -> int:
        """Exactly 4 bytes per parameter."""
        return FLOAT32.itemsize * schema.size

    def encode(self, delta: Vector, schema: Schema, request: Request = UNREQUESTED) -> bytes:  # noqa: ARG002
        """See :meth:`Codec.encode`."""
        delta = check_delta(delta, schema.size)
        if not np.isfinite(delta).all():
            raise ValueError("the delta holds NaN or an infinity; only finite deltas are sent")
        return to_bytes(delta)

    def decode(self, payload: bytes | memoryview, schema: Schema, out: Vector | None = None) -> Vector:
        """See :meth:`Codec.decode`. Without ``out``, a view on the payload: nothing is copied."""
        check_length(self.codec_id, payload, self.max_bytes(schema))
        values = np.frombuffer(payload, FLOAT32)
        if not np.isfinite(values).all():
            raise NotFinite("float32 payload holds NaN or an infinity; every value must be finite")
        if out is None:
            # Copies only a view that begins at an odd address, and on big-endian machines.
            return np.require(values, np.float32, "A")
        check_out(out, values.size)[:] = values
        return out
