"""Error feedback: what a codec leaves out of one update goes into the next. Pure.

    u = delta + residual            this is encoded
    residual = u - decode(payload)  once a receipt says that the update was applied, and u until then

Seide et al., "1-bit stochastic gradient descent" (Interspeech 2014); Karimireddy et al., "Error feedback
fixes SignSGD" (ICML 2019), algorithm 1. There, nothing is lost on the way. Here an update may be rejected,
lost, or superseded in the outbox: then nothing of it has arrived, and all of it is carried on.

The residual belongs to one device and one plan. It is added to the next delta whatever version that starts
from.
"""

import math
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from fedtide.wire import codecs
from fedtide.wire.codecs.rate import Rate, Request
from fedtide.wire.ids import Counter, PlanId
from fedtide.wire.parameters import Schema, Vector

MOST_CARRIED: Final = 4.0
"""Of a residual that is longer than so many deltas, the rest is left behind.

Steps of up to 8 rms of the delta leave 2 to 4 deltas behind, so the bound hardly touches them. With coarser
ones the residual grows old. Measured on digits with 9,610 parameters and 40 devices: at a step of 16,
lowrank has the same accuracy with 6 % fewer bytes; at 32 it has 0.87 instead of 0.80 with half the bytes
(two seeds). With a plain quantiser it is 15 % fewer bits at 16, and 0.92 instead of 0.81 at 32 (three
seeds), and a bound of 2 costs accuracy. To make the step finer while the residual is long did worse and
took more bits. The bound also limits what one device can add at once after many updates in a row were lost.
"""


@dataclass(frozen=True)
class Feedback:
    """The last update of a plan: what went into the codec, and what came out.

    Attributes:
        plan: whose parameters these are.
        counter: the update's.
        vector: float32, shape ``(schema.size,)``: the delta and the residual before it.
        codec: id of the payload's codec.
        payload: what the coordinator was sent.
        applied: whether a receipt says that the coordinator has it in its model.
    """

    plan: PlanId
    counter: Counter
    vector: Vector
    codec: str
    payload: bytes
    applied: bool = False


def settled(feedback: Feedback, applied: Counter | None) -> Feedback:
    """The same, once it is known which update was applied last: this one, or another."""
    return replace(feedback, applied=feedback.counter == applied)


def residual_of(feedback: Feedback, schema: Schema) -> Vector | None:
    """What the next update of the plan has to carry besides its own delta.

    Returns:
        float32, shape ``(schema.size,)``. None where a codec that is not adjustable has carried everything:
        what little it left out is no longer followed.

    Raises:
        UnknownCodec: an earlier build had a codec that this one lacks.
        MalformedPayload: the payload is not what the codec makes.
    """
    if not feedback.applied:
        return feedback.vector
    codec = codecs.get(feedback.codec)
    if not codec.adjustable:
        return None
    decoded = codec.decode(feedback.payload, schema, out=np.empty(schema.size, np.float32))
    return np.subtract(feedback.vector, decoded, out=decoded)


@dataclass(frozen=True)
class Corrected:
    """A delta together with the residual, for the codec.

    Attributes:
        vector: float32: their sum.
        rms: the delta's, for the step to be measured in; None: the rms of ``vector`` is to be taken.
        share: how much of the residual is in it: 1, or less where it was longer than ``MOST_CARRIED`` allows.
    """

    vector: Vector
    rms: float | None = None
    share: float = 1.0

    def request(self, rate: Rate) -> Request:
        """What to ask of the codec."""
        return Request(rate, self.rms)


def corrected(delta: Vector, residual: Vector | None) -> Corrected:
    """Add the residual to a delta.

    The step follows the delta alone: measured by delta + residual, it grows with what it leaves out, and the
    residual starves (measured: runs that ended at an accuracy of 0.89 to 0.92 and reach 0.97 this way).

    Args:
        delta: finite float32, shape ``(size,)``.
        residual: of the same shape, or None. It is used up: the sum is in its memory.
    """
    if residual is None:
        return Corrected(delta)
    length, carried = _norm(delta), _norm(residual)
    if not math.isfinite(carried):
        return Corrected(delta, share=0.0)
    # A delta of zeros says nothing of how large a residual should be: it goes out by its own measure.
    share = MOST_CARRIED * length / carried if carried > MOST_CARRIED * length > 0 else 1.0
    with np.errstate(over="ignore"):  # found out at once
        if share < 1:
            np.multiply(residual, np.float32(share), out=residual)
        vector = np.add(delta, residual, out=residual)
    if not np.isfinite(vector).all():
        return Corrected(delta, share=0.0)
    return Corrected(vector, length / math.sqrt(delta.size) if length else None, share)


def _norm(vector: Vector) -> float:
    """The Euclidean norm, summed in float64 without a float64 copy of the vector."""
    return math.sqrt(float(np.einsum("i,i->", vector, vector, dtype=np.float64, casting="safe")))
