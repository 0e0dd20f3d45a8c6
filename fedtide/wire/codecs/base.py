"""What every codec promises, the two ways a payload can be wrong, and the checks all codecs share."""

from typing import Final, Protocol

import numpy as np

from fedtide.wire.codecs.rate import Request
from fedtide.wire.errors import MalformedPayload
from fedtide.wire.parameters import Schema, Vector

UNREQUESTED: Final = Request()
"""The request of a caller that leaves everything to the codec."""


class WrongLength(MalformedPayload):
    """The payload does not have the length that the codec needs for this schema."""

    def __init__(self, codec_id: str, actual_bytes: int, expected_bytes: int) -> None:
        self.actual_bytes = actual_bytes
        self.expected_bytes = expected_bytes
        super().__init__(
            f"{codec_id} payload of {actual_bytes:,} bytes; this plan's parameters take {expected_bytes:,}"
        )


class NotFinite(MalformedPayload):
    """The payload holds NaN or an infinity, or a scale outside its codec's range."""


class Codec(Protocol):
    """A delta to bytes and back. Codecs have no state: encoding the same delta twice gives the same bytes."""

    @property
    def codec_id(self) -> str:
        """The name in envelopes and in the head; never reused for another format."""
        ...

    @property
    def adjustable(self) -> bool:
        """Whether it has a rate. Such a codec leaves out so much that it needs error feedback."""
        ...

    def max_bytes(self, schema: Schema) -> int:
        """The longest payload this codec makes or accepts for ``schema``, in bytes."""
        ...

    def encode(self, delta: Vector, schema: Schema, request: Request = UNREQUESTED) -> bytes:
        """Encode a float32 vector of shape ``(schema.size,)``, which is left as it was.

        Args:
            delta: local − base; with error feedback, plus the residual.
            schema: the plan's.
            request: how finely; codecs that are not adjustable ignore it.

        Raises:
            ValueError: another shape or dtype, NaN, or an infinity.
        """
        ...

    def decode(self, payload: bytes | memoryview, schema: Schema, out: Vector | None = None) -> Vector:
        """Decode to finite float32 of shape ``(schema.size,)``, equal to the bit on every machine.

        The length is checked before anything is allocated, and everything else before anything is written:
        a rejected payload leaves ``out`` as it was.

        Args:
            payload: what a sender claims to have encoded; a memoryview must be contiguous.
            schema: the plan's, never the sender's.
            out: C-contiguous float32 of shape ``(schema.size,)`` to write into and return. Without it the
                result is new, or a read-only view on ``payload``.

        Raises:
            WrongLength: the length does not fit the schema.
            NotFinite: it does not decode to finite values.
            MalformedPayload: anything else that is wrong with the payload.
            ValueError: ``out`` has another shape, dtype or layout (our own mistake, not the sender's).
        """
        ...


def check_delta(delta: Vector, size: int) -> Vector:
    """The delta as a C-contiguous vector, copied only if it was not one.

    Raises:
        ValueError: another shape or dtype.
    """
    if delta.shape != (size,) or delta.dtype != np.float32:
        raise ValueError(f"a delta of {delta.dtype} {delta.shape}; this plan needs float32 {(size,)}")
    return np.ascontiguousarray(delta)


def check_length(codec_id: str, payload: bytes | memoryview, expected_bytes: int) -> None:
    """Return if the payload has the expected length.

    Raises:
        WrongLength: it has another.
    """
    actual_bytes = memoryview(payload).nbytes
    if actual_bytes != expected_bytes:
        raise WrongLength(codec_id, actual_bytes, expected_bytes)


def check_out(out: Vector | None, size: int) -> Vector:
    """The vector to decode into: ``out``, or a new one without it.

    Raises:
        ValueError: ``out`` has another shape or dtype, is not C-contiguous or is read-only.
    """
    if out is None:
        return np.empty(size, np.float32)
    if out.shape != (size,) or out.dtype != np.float32:
        raise ValueError(f"out is {out.dtype} {out.shape}; this plan needs float32 {(size,)}")
    if not (out.flags.c_contiguous and out.flags.writeable):
        raise ValueError("out must be C-contiguous and writeable")
    return out
