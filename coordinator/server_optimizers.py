"""Server optimizers: step from one version's parameters to the next along the aggregated delta.

The delta is local - global and is ADDED. (Reddi et al. 2021 call the same vector, with the same sign,
Delta_t; codebases that keep the opposite sign call it the pseudo-gradient.) ``apply`` takes a state and gives
a new one; parameters and state of the version before are left as they were, because devices may still be
training on them.

All arithmetic is elementwise IEEE float32 in a fixed order; square roots are rounded correctly by every IEEE
machine, so a replay is equal to the bit. Settings are rounded to float32 once, after any float64 arithmetic
on them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, TypeAlias

import msgspec
import numpy as np
from msgspec import Meta

from fedtide.wire.parameters import Vector

LearningRate: TypeAlias = Annotated[float, Meta(gt=0, le=1000)]
Decay: TypeAlias = Annotated[float, Meta(ge=0, lt=1)]


@dataclass(frozen=True, eq=False)
class OptimizerState:
    """What a server optimizer remembers between versions.

    Attributes:
        names: of the vectors, in the optimizer's order.
        vectors: float32, each of shape ``(size,)``. Never changed in place.
    """

    names: tuple[str, ...] = ()
    vectors: tuple[Vector, ...] = ()

    def arrays(self) -> dict[str, Vector]:
        """The vectors by name, as a snapshot stores them. Nothing is copied."""
        return dict(zip(self.names, self.vectors, strict=True))


class _ServerOptimizer(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind"
):
    """What the server optimizers share."""

    state_names: ClassVar[tuple[str, ...]] = ()
    """Names of the vectors in the optimizer's state."""

    def from_arrays(self, arrays: Mapping[str, Vector], size: int) -> OptimizerState:
        """Restore a state from what ``OptimizerState.arrays`` gave. Nothing is copied.

        Raises:
            ValueError: a vector is missing, unknown, or not float32 of shape ``(size,)``; the snapshot then
                belongs to another server optimizer or another model.
        """
        if set(arrays) != set(self.state_names):
            raise ValueError(
                f"optimizer state has {sorted(arrays)}; this optimizer keeps {sorted(self.state_names)}"
            )
        _check_vectors(size, arrays)
        return OptimizerState(self.state_names, tuple(arrays[name] for name in self.state_names))


class SGD(_ServerOptimizer, frozen=True, tag="sgd"):
    """``x <- x + eta D``: FedAvg's and FedBuff's own server step; the state is empty.

    Attributes:
        learning_rate: eta; 1 adds the aggregated delta as it is.
    """

    learning_rate: LearningRate = 1.0

    def init(self, size: int) -> OptimizerState:  # noqa: ARG002 - the optimizers share one interface
        """Give the empty state."""
        return OptimizerState()

    def apply(
        self, state: OptimizerState, parameters: Vector, delta: Vector
    ) -> tuple[OptimizerState, Vector]:
        """Give the next state and new parameters; all vectors are float32 of shape ``(size,)``.

        Raises:
            ValueError: delta, parameters or state do not match in shape, dtype or kind.
        """
        _check_step(self.state_names, state, parameters, delta)
        return state, _stepped(parameters, delta, self.learning_rate)


class Momentum(_ServerOptimizer, frozen=True, tag="momentum"):
    """``v <- beta v + D``, ``x <- x + eta v`` (Hsu et al. 2019, FedAvgM).

    v is 0 at first, and D is not dampened: in the long run a constant delta is applied ``1 / (1 - beta)``
    times, so choose the learning rate accordingly.

    Attributes:
        learning_rate: eta.
        momentum: beta.
    """

    state_names: ClassVar[tuple[str, ...]] = ("velocity",)

    learning_rate: LearningRate = 1.0
    momentum: Decay = 0.9

    def init(self, size: int) -> OptimizerState:
        """Give the state before the first step: a velocity of 0."""
        return OptimizerState(self.state_names, (np.zeros(size, np.float32),))

    def apply(
        self, state: OptimizerState, parameters: Vector, delta: Vector
    ) -> tuple[OptimizerState, Vector]:
        """Give the next state and new parameters; all vectors are float32 of shape ``(size,)``.

        Raises:
            ValueError: delta, parameters or state do not match in shape, dtype or kind.
        """
        _check_step(self.state_names, state, parameters, delta)
        velocity = np.multiply(state.vectors[0], np.float32(self.momentum))
        np.add(velocity, delta, out=velocity)
        return OptimizerState(self.state_names, (velocity,)), _stepped(
            parameters, velocity, self.learning_rate
        )


class _Adaptive(_ServerOptimizer, frozen=True):
    """Reddi et al. 2021, "Adaptive Federated Optimization", Algorithm 2.

    ``m <- beta_1 m + (1 - beta_1) D``; then v by the optimizer's own rule; ``x <- x + eta m / (sqrt(v) +
    tau)``. As in the paper there is no bias correction: m starts at 0, and v at tau^2, the least the paper
    allows. (This tau is the paper's degree of adaptivity, nothing to do with staleness, hence the name of its
    setting.)

    Attributes:
        learning_rate: eta: about the step of a parameter whose delta is steady and well above ``adaptivity``.
        beta_1: decay of the first moment m.
        beta_2: decay of the second moment v.
        adaptivity: tau; deltas well below it are scaled alike, as by SGD.
    """

    state_names: ClassVar[tuple[str, ...]] = ("first_moment", "second_moment")

    learning_rate: LearningRate = 0.01
    beta_1: Decay = 0.9
    beta_2: Decay = 0.99
    adaptivity: Annotated[float, Meta(ge=1e-15, le=1000)] = 1e-3

    def init(self, size: int) -> OptimizerState:
        """Give the state before the first step: m = 0 and v = tau^2."""
        second_moment = np.full(size, np.float32(self.adaptivity * self.adaptivity))
        return OptimizerState(self.state_names, (np.zeros(size, np.float32), second_moment))

    def apply(
        self, state: OptimizerState, parameters: Vector, delta: Vector
    ) -> tuple[OptimizerState, Vector]:
        """Give the next state and new parameters; all vectors are float32 of shape ``(size,)``.

        Raises:
            ValueError: delta, parameters or state do not match in shape, dtype or kind.
        """
        _check_step(self.state_names, state, parameters, delta)
        first_moment, second_moment = state.vectors
        # One scratch vector holds each intermediate in turn and ends as the new parameters.
        scratch = np.multiply(delta, np.float32(1.0 - self.beta_1))
        first_moment = np.multiply(first_moment, np.float32(self.beta_1))
        np.add(first_moment, scratch, out=first_moment)

        np.multiply(delta, delta, out=scratch)
        second_moment = self._next_second_moment(second_moment, scratch)

        np.sqrt(second_moment, out=scratch)
        np.add(scratch, np.float32(self.adaptivity), out=scratch)
        np.divide(first_moment, scratch, out=scratch)
        np.multiply(scratch, np.float32(self.learning_rate), out=scratch)
        np.add(parameters, scratch, out=scratch)
        return OptimizerState(self.state_names, (first_moment, second_moment)), scratch

    def _next_second_moment(self, second_moment: Vector, squared: Vector) -> Vector:
        """Give a new v from the old one and D^2, whose array may be overwritten."""
        raise NotImplementedError


class Adam(_Adaptive, frozen=True, tag="adam"):
    """FedAdam: ``v <- beta_2 v + (1 - beta_2) D^2`` (Reddi et al. 2021, Algorithm 2)."""

    def _next_second_moment(self, second_moment: Vector, squared: Vector) -> Vector:
        decayed = np.multiply(second_moment, np.float32(self.beta_2))
        np.multiply(squared, np.float32(1.0 - self.beta_2), out=squared)
        return np.add(decayed, squared, out=decayed)


class Yogi(_Adaptive, frozen=True, tag="yogi"):
    """FedYogi: ``v <- v - (1 - beta_2) D^2 sign(v - D^2)``; the rest is Algorithm 2 as for Adam.

    v moves by at most (1 - beta_2) D^2 towards D^2, so it stays positive.
    """

    def _next_second_moment(self, second_moment: Vector, squared: Vector) -> Vector:
        direction = np.subtract(second_moment, squared)
        np.sign(direction, out=direction)
        np.multiply(squared, np.float32(1.0 - self.beta_2), out=squared)
        np.multiply(squared, direction, out=squared)
        return np.subtract(second_moment, squared, out=direction)


ServerOptimizer: TypeAlias = SGD | Momentum | Adam | Yogi
"""Every server optimizer: the one table of choices. Decode settings into this type."""


def _stepped(parameters: Vector, direction: Vector, learning_rate: float) -> Vector:
    """Compute ``parameters + learning_rate * direction`` as a new vector."""
    step = np.multiply(direction, np.float32(learning_rate))
    return np.add(parameters, step, out=step)


def _check_step(names: tuple[str, ...], state: OptimizerState, parameters: Vector, delta: Vector) -> None:
    """Refuse a state of another optimizer, and vectors that numpy would broadcast or convert."""
    if state.names != names:
        raise ValueError(f"optimizer state has {list(state.names)}; this optimizer keeps {list(names)}")
    _check_vectors(parameters.size, {"parameters": parameters, "delta": delta, **state.arrays()})


def _check_vectors(size: int, vectors: Mapping[str, Vector]) -> None:
    for name, vector in vectors.items():
        if vector.shape != (size,) or vector.dtype != np.float32:
            raise ValueError(
                f"{name} is {vector.dtype} of shape {vector.shape}; expected float32 of shape ({size},)"
            )
