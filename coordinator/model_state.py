"""The global model and how a journal entry changes it. Live and replay run this same code; it is pure.

``fold_update`` adds one update to the buffer and closes the buffer at the aggregation goal. Arithmetic is
elementwise IEEE float32 in journal order, so a replay is equal to the bit.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from coordinator.aggregation import Buffer, empty_buffer
from coordinator.server_optimizers import OptimizerState
from coordinator.settings import Rules
from fedtide.wire.ids import ModelVersion
from fedtide.wire.parameters import Vector


@dataclass(frozen=True)
class ModelState:
    """Everything a replay rebuilds.

    Attributes:
        version: how many aggregations and resets made these parameters.
        parameters: the global model, never changed in place.
        buffer: what has been folded since.
        optimizer: the server optimizer's state.
        rules: the rules in force.
    """

    version: ModelVersion
    parameters: Vector
    buffer: Buffer
    optimizer: OptimizerState
    rules: Rules


def initial_state(parameters: Vector, rules: Rules) -> ModelState:
    """Version 0."""
    return ModelState(
        version=ModelVersion(0),
        parameters=parameters,
        buffer=empty_buffer(parameters.size),
        optimizer=rules.server_optimizer.init(parameters.size),
        rules=rules,
    )


def reset_state(state: ModelState, version: ModelVersion, parameters: Vector) -> ModelState:
    """Other parameters under a version of their own: empty buffer, a new state of the server optimizer."""
    return replace(initial_state(parameters, state.rules), version=version)


def fold_update(
    state: ModelState, delta: Vector, staleness_weight: float, importance: float, base: Vector | None
) -> ModelState:
    """Add one update. At the aggregation goal the buffer becomes the next version.

    The state passed in is spent: its buffer's array is reused.

    Args:
        state: the model before.
        delta: local − base, shape ``(size,)``.
        staleness_weight: s(τ).
        importance: n.
        base: parameters of the update's base version, where the aggregator needs them.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        buffer = state.rules.aggregator.fold(
            state.buffer,
            delta,
            staleness_weight=staleness_weight,
            importance=importance,
            current=state.parameters,
            base=base,
        )
    folded = replace(state, buffer=buffer)
    return close_buffer(folded) if buffer.count >= state.rules.aggregator.goal else folded


def close_buffer(state: ModelState) -> ModelState:
    """Make the next version from what the buffer holds; an empty buffer changes nothing.

    Deltas are finite and their sum may not be. No version is made of that: the next one has the same
    parameters, the very same array, and the server optimizer begins anew.
    """
    if state.buffer.count == 0:
        return state
    version = ModelVersion(state.version + 1)
    with np.errstate(over="ignore", invalid="ignore"):
        delta = state.rules.aggregator.aggregated_delta(state.buffer)
        optimizer, parameters = state.rules.server_optimizer.apply(state.optimizer, state.parameters, delta)
    if not all(np.isfinite(vector).all() for vector in (parameters, *optimizer.vectors)):
        return reset_state(state, version, state.parameters)
    return replace(
        state,
        version=version,
        parameters=parameters,
        optimizer=optimizer,
        buffer=empty_buffer(parameters.size),
    )


def change_rules(state: ModelState, rules: Rules) -> ModelState:
    """Close the buffer under the old rules, then let the new ones hold.

    The server optimizer's state is kept where the new one has the same, and starts anew elsewhere. Version 0
    has no state worth keeping: rules that made no version leave no trace, whatever a replay starts with.
    """
    closed = close_buffer(state)
    kept: Mapping[str, Vector] = closed.optimizer.arrays()
    if closed.version > 0 and kept and set(kept) == set(rules.server_optimizer.state_names):
        optimizer = rules.server_optimizer.from_arrays(kept, closed.parameters.size)
    else:
        optimizer = rules.server_optimizer.init(closed.parameters.size)
    return replace(closed, rules=rules, optimizer=optimizer)
