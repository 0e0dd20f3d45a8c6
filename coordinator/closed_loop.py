"""From the model as aggregated to the versions that devices hold, one after the other.

In the grid format a version's parameters are not the aggregated ones but the closest that the devices can be
brought to cheaply (``model_grid``): the coordinator tracks what they hold, and everything that devices see or
that is judged about them, fingerprint, evaluation, release and files, is of those parameters. The aggregated
ones stay with the writer.
"""

from dataclasses import dataclass

import numpy as np

from coordinator.model_grid import (
    FIRST,
    Doubles,
    Place,
    first_on_grid,
    grid_of,
    next_on_grid,
    spread_after,
    step_exponents,
)
from coordinator.settings import Publish
from fedtide.wire.ids import ModelVersion
from fedtide.wire.model_blob import ModelFormat
from fedtide.wire.parameters import Schema, Vector, fingerprint


@dataclass(frozen=True)
class Version:
    """A model version as devices hold it.

    Attributes:
        number: how many aggregations made it.
        parameters: float32, shape ``(schema.size,)``.
        fingerprint: of the parameters.
        place: among the published versions.
    """

    number: ModelVersion
    parameters: Vector
    fingerprint: bytes
    place: Place = FIRST

    @classmethod
    def of(cls, number: ModelVersion, parameters: Vector, place: Place = FIRST) -> "Version":
        """With the fingerprint computed."""
        return cls(number, parameters, fingerprint(parameters), place)


class ClosedLoop:
    """Makes the versions to publish, in order. Not for several threads at once.

    Args:
        settings: format and step.
        schema: of the model.
        newest: the version published last, by an earlier run.
    """

    def __init__(self, settings: Publish, schema: Schema, newest: Version | None) -> None:
        self._settings = settings
        self._schema = schema
        self._newest = newest
        self._target: Vector | None = None

    def version(self, number: ModelVersion, target: Vector, *, anew: bool = False) -> Version:
        """What devices shall hold as version ``number``; the same again if it was made before.

        Args:
            number: of the model.
            target: its parameters, finite.
            anew: the model was reset: what devices hold may be so far from it that a step from there, which
                is as wide as the change, would miss it. Parameters that are on a grid are taken as they are.
        """
        newest = self._newest
        if newest is None or number != newest.number:
            newest = self._anew(newest, number, target) if anew else self._following(newest, number, target)
        self._newest, self._target = newest, target
        return newest

    def _anew(self, newest: Version | None, number: ModelVersion, target: Vector) -> Version:
        place = FIRST if newest is None else Place(sequence=newest.place.sequence + 1)
        as_it_is = self._settings.format == ModelFormat.FLOAT32 or grid_of(target, self._schema) is not None
        return Version.of(number, target if as_it_is else first_on_grid(target, self._schema), place)

    def _following(self, newest: Version | None, number: ModelVersion, target: Vector) -> Version:
        schema = self._schema
        if newest is None:
            on_grid = self._settings.format == ModelFormat.GRID
            return Version.of(number, first_on_grid(target, schema) if on_grid else target)
        sequence = newest.place.sequence + 1
        if self._settings.format == ModelFormat.FLOAT32:
            return Version.of(number, target, Place(sequence=sequence))
        spread = newest.place.spread
        if self._target is not None:
            spread = spread_after(spread, _change(self._target, target), schema)
        elif not spread:  # of the version published before, only what devices hold is known
            spread = spread_after(spread, _change(newest.parameters, target), schema)
        steps = step_exponents(spread, target, self._settings.step, schema)
        parameters = next_on_grid(newest.parameters, target, steps, schema)
        return Version.of(number, parameters, Place(sequence=sequence, spread=spread))


def _change(before: Vector, after: Vector) -> Doubles:
    return np.subtract(after, before, dtype=np.float64)  # of two float32 that are finite, always finite
