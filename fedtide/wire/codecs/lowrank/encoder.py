"""The low-rank codec's encoder: one delta at the step, or within the bytes, that are asked for."""

from math import isfinite, sqrt
from typing import Final

import numpy as np

from fedtide.wire.codecs.budget import finest_within
from fedtide.wire.codecs.ecsq import Ecsq
from fedtide.wire.codecs.lowrank.factors import Decomposition, Floats, decompose
from fedtide.wire.codecs.lowrank.layout import (
    DENSE,
    STEP_BYTES,
    ZEROS,
    Place,
    most_nonzeros,
    places_of,
    step_bits,
    step_of,
)
from fedtide.wire.codecs.lowrank.products import product_of
from fedtide.wire.codecs.lowrank.quantiser import QuantisedMatrix, quantise_factors
from fedtide.wire.codecs.lowrank.scalars import quantise_scalars, remainder_of, scalars_save_more
from fedtide.wire.codecs.lowrank.stream import QuantisedTensor, write_tensors
from fedtide.wire.codecs.rate import COARSEST_STEP, FINEST_STEP, Rate, Request
from fedtide.wire.errors import MalformedPayload
from fedtide.wire.parameters import Schema, Vector

DEFAULT_STEP: Final = 8.0
"""In units of the delta's rms."""
_COMPONENTS: Final = 8
_COMPONENTS_IF_FINE: Final = 16
"""Looked for at first: where all of them pay, twice as many follow."""
_FINE: Final = 6.0
"""Of a step, in units of the delta's rms: below, ranks above 8 are common."""
_NORMAL: Final = (2.0**-40, 2.0**40)
"""The rms of deltas that are encoded as they are; others are first multiplied by a power of two."""


class Encoder:
    """Encodes one delta at as many steps as it takes; what does not depend on the step is kept."""

    def __init__(self, delta: Vector, schema: Schema) -> None:
        """Take a finite delta of the schema's size.

        Raises:
            ValueError: it holds NaN or an infinity.
        """
        self._rms = _rms(delta)
        self._original = delta
        self._shift = 0
        if self._rms and not _NORMAL[0] < self._rms < _NORMAL[1]:
            self._shift = -round(np.log2(self._rms))
            delta = np.ldexp(delta, self._shift)
        self._delta = delta
        self._schema = schema
        self._places = places_of(schema)
        self._decompositions: dict[int, Decomposition] = {}

    def encode(self, request: Request) -> bytes:
        """The payload that is asked for."""
        if not self._rms:
            return ZEROS
        rms = request.rms or self._rms
        finest = FINEST_STEP * self._rms

        def encoded(step: float) -> bytes:
            return self._at(max(step * rms, finest))

        budget = request.rate.budget_bytes(self._delta.size)
        if budget is None:
            return encoded(request.rate.step or DEFAULT_STEP)
        if budget < STEP_BYTES + 1:
            return ZEROS
        payload = finest_within(encoded, budget, DEFAULT_STEP)
        return payload if len(payload) <= budget else ZEROS

    def _at(self, step: float) -> bytes:
        """The payload with this step."""
        bits = step_bits(step)
        matrices = self._matrices(self._shifted(step_of(bits)))
        tensors = [self._tensor(place, matrices.get(place.start), step_of(bits)) for place in self._places]
        if all(tensor.matrix is None and tensor.scalars is None for tensor in tensors):
            return ZEROS
        if sum(tensor.nonzeros for tensor in tensors) > most_nonzeros(self._delta.size):
            return DENSE + self._without_factors(step)
        return bits.to_bytes(STEP_BYTES, "little") + write_tensors(tensors, self._places)

    def _without_factors(self, step: float) -> bytes:
        """What ``ecsq`` makes of the delta with this step: so fine that factors save little."""
        ratio = min(max(step / self._rms, FINEST_STEP), COARSEST_STEP)
        return Ecsq().encode(self._original, self._schema, Request(Rate(step=ratio), self._rms))

    def _shifted(self, step: np.float32) -> float:
        """A step in units of the delta that is encoded."""
        return float(np.ldexp(np.float64(step), self._shift))

    def _tensor(self, place: Place, matrix: QuantisedMatrix | None, step: np.float32) -> QuantisedTensor:
        values, shifted = self._delta[place.elements], self._shifted(step)
        if matrix is not None and not scalars_save_more(values, shifted, matrix.profit):
            tensor = self._with_remainder(matrix, place, step)
            if tensor is not None:
                return tensor
        return QuantisedTensor(
            None, quantise_scalars(remainder_of(values, shifted, place.columns, None), step)
        )

    def _with_remainder(
        self, matrix: QuantisedMatrix, place: Place, step: np.float32
    ) -> QuantisedTensor | None:
        """A tensor's factors and what is worth encoding of the rest; None if decoders would refuse it."""
        left, right = matrix.entries[:, : place.rows], matrix.entries[:, place.rows :]
        values = self._delta[place.elements]
        shifted = self._shifted(step)
        try:
            product = product_of(left, right, matrix.exponents, matrix.kind, None)
            remainder = remainder_of(values, shifted, place.columns, product)
            scalars = quantise_scalars(remainder, step)
            if scalars is not None:
                product = product_of(left, right, matrix.exponents, matrix.kind, scalars.scalars)
        except MalformedPayload:
            return None
        return QuantisedTensor(matrix, scalars) if product.is_finite_at(step) else None

    def _matrices(self, step: float) -> dict[int, QuantisedMatrix]:
        """The tensors whose factors pay, by their start."""
        fine = step * 2.0**-self._shift < _FINE * self._rms
        first = _COMPONENTS_IF_FINE if fine else _COMPONENTS
        pending = [(place, min(first, place.widest_rank)) for place in self._places if place.widest_rank]
        quantised = {}
        while pending:
            found = [(place, self._decomposed(place, components)) for place, components in pending]
            more = []
            for (place, components), matrix in zip(pending, quantise_factors(found, step), strict=True):
                if matrix is None:
                    continue
                if components == len(matrix.exponents) < place.widest_rank:
                    more.append((place, min(2 * components, place.widest_rank)))
                quantised[place.start] = matrix
            pending = more
        return quantised

    def _decomposed(self, place: Place, components: int) -> Decomposition:
        found = self._decompositions.get(place.start)
        if found is None or (len(found.values) < components and not found.complete):
            matrix: Floats = self._delta[place.elements].reshape(place.rows, place.columns)
            found = decompose(matrix, components)
            self._decompositions[place.start] = found
        return found


def _rms(delta: Vector) -> float:
    """The root of the mean square.

    Raises:
        ValueError: NaN or an infinity.
    """
    if not delta.size:
        return 0.0
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        square = float(np.dot(delta, delta))
        if not 2.0**-100 < square < 2.0**120:
            square = float(np.square(delta, dtype=np.float64).sum())
    if not isfinite(square):
        raise ValueError("the delta holds NaN or an infinity")
    return sqrt(square / delta.size)
