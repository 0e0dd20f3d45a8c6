"""Aggregators: fold admitted updates into a buffer, and turn a full buffer into the aggregated delta.

The buffer holds one sum and one divisor, so memory does not grow with the number of updates::

    total            = sum over i of  s_i n_i c_i
    divisor          = sum over i of  n_i            (FedBuff may be told: sum over i of s_i n_i)
    aggregated delta = total / divisor

``s_i`` is the staleness weight, ``n_i`` the importance of the update (1, or its num_examples where the fleet
weighs by examples) and ``c_i`` its contribution: the delta (local - base) for FedBuff and FedAvg, the way
from the current global model to the device's local model for FedAsync. The server optimizer then ADDS the
aggregated delta.

A live coordinator and a replay run this same code. Every operation that reaches the parameters is one
elementwise IEEE float32 addition, subtraction, multiplication or division, in the order of the journal: no
BLAS, no reduction, no fused multiply-add. Weights are computed in float64 and rounded to float32 once. So
results are equal to the bit on every machine with IEEE arithmetic, and do not depend on the size of the
tiles.

Deltas and parameters must be finite and the importance bounded: admission sees to that before anything is
folded.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Final, TypeAlias

import msgspec
import numpy as np
from msgspec import Meta

from coordinator.staleness import SMALLEST_WEIGHT
from fedtide.wire.parameters import Vector

TILE: Final = 65_536
"""Elements per step of a fold: 256 KiB of scratch space, which stays in a core's second-level cache."""

LARGEST_IMPORTANCE: Final = 2.0**64
"""A num_examples travels as an unsigned 64-bit integer; even that is far from overflowing a float32 sum."""

Count: TypeAlias = Annotated[int, Meta(ge=1, le=1_000_000)]
"""A number of updates."""


@dataclass(frozen=True, eq=False)
class Buffer:
    """Updates folded since the last model version.

    A buffer has one owner. ``fold`` consumes the buffer it is given: the array of ``total`` is changed and
    belongs to the buffer returned, and the old buffer must not be used again. An array restored from a
    snapshot must be writable.

    Attributes:
        total: sum of s_i n_i c_i, float32 of shape ``(size,)``.
        divisor: what ``total`` will be divided by; summed in float64.
        count: number of updates folded.
    """

    total: Vector
    divisor: float
    count: int


def empty_buffer(size: int) -> Buffer:
    """Make a buffer without updates, for a model of ``size`` parameters."""
    return Buffer(total=np.zeros(size, np.float32), divisor=0.0, count=0)


class _Aggregator(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind"):
    """What the aggregators share."""

    needs_base: ClassVar[bool] = False
    """Whether ``fold`` needs the parameters of the base version."""
    max_staleness: ClassVar[int | None] = None
    """A staler update is not admitted; ``None`` leaves the choice to the staleness policy."""

    def aggregated_delta(self, buffer: Buffer) -> Vector:
        """Divide the total by the divisor: a new float32 vector of shape ``(size,)``.

        The buffer may be full or, flushed by the time limit, partly full. It stays as it was.

        Raises:
            ValueError: no update was folded.
        """
        if buffer.count == 0:
            raise ValueError("an empty buffer has no aggregated delta; fold at least one update first")
        return np.divide(buffer.total, np.float32(buffer.divisor))


class FedAsync(_Aggregator, frozen=True, tag="fedasync"):
    """Every update makes a version: the global model moves a part of the way to the device's local model.

    Xie et al. 2019, Algorithm 1: ``x_t = (1 - alpha_t) x_(t-1) + alpha_t x_new``, alpha_t = alpha s(tau).
    ``x_new`` is the local model: the parameters of the version the device started from, plus its delta.
    Hence the contribution ``x_new - x_(t-1) = (base - current) + delta``, weighed by ``alpha s``, and a
    divisor of 1 per update. Importance is checked but not used: the paper has none, and with one update per
    version it would cancel.

    Attributes:
        mixing: alpha in (0, 1]: how far a fresh update pulls the global model; 1 would replace it.
    """

    goal: ClassVar[int] = 1
    needs_base: ClassVar[bool] = True

    mixing: Annotated[float, Meta(gt=0, le=1)] = 0.6

    def fold(
        self,
        buffer: Buffer,
        delta: Vector,
        *,
        staleness_weight: float,
        importance: float,
        current: Vector,
        base: Vector | None,
    ) -> Buffer:
        """Add ``alpha s (base + delta - current)``. Consumes ``buffer``; leaves the other vectors alone.

        Args:
            buffer: the updates so far, normally none.
            delta: local - base, float32 of shape ``(size,)``.
            staleness_weight: s(tau), ``SMALLEST_WEIGHT`` to 1, as journaled.
            importance: not used, see the class.
            current: parameters of the current version, the one the aggregated delta will be added to.
            base: parameters of the version the device started from.

        Raises:
            ValueError: no base, another shape or dtype, or a weight out of range. The buffer is then
                unchanged.
        """
        if base is None:
            raise ValueError("FedAsync needs the parameters of the base version, got none")
        _check_weights(staleness_weight, importance)
        _check_vectors(buffer.total, delta=delta, current=current, base=base)
        weight = np.float32(self.mixing * staleness_weight)
        scratch = np.empty(min(TILE, buffer.total.size), np.float32)
        for tile in _tiles(buffer.total.size):
            total = buffer.total[tile]
            part = scratch[: total.size]
            # base - current first: for a fresh update it is exactly 0, so the delta keeps all its digits.
            np.subtract(base[tile], current[tile], out=part)
            np.add(part, delta[tile], out=part)
            np.multiply(part, weight, out=part)
            np.add(total, part, out=total)
        return Buffer(total=buffer.total, divisor=buffer.divisor + 1.0, count=buffer.count + 1)


class FedBuff(_Aggregator, frozen=True, tag="fedbuff"):
    """A version for every K updates, each weighed by its staleness.

    Nguyen et al. 2022, Algorithm 1: ``w <- w + eta_g (sum of s_i delta_i) / K``. The divisor is the sum of
    the n_i: with n_i = 1 and a full buffer it is K, exactly as in the paper, so stale updates also make the
    step shorter. A buffer flushed by the time limit is divided by what is in it, not by K. With
    ``normalise_staleness`` the divisor is the sum of s_i n_i instead: a weighted mean, in which staleness
    decides the shares but not the length of the step.

    Attributes:
        goal: the aggregation goal K; 10 in the paper's main experiments.
        normalise_staleness: divide by the sum of s_i n_i.
    """

    goal: Count = 10
    normalise_staleness: bool = False

    def fold(
        self,
        buffer: Buffer,
        delta: Vector,
        *,
        staleness_weight: float,
        importance: float,
        current: Vector | None = None,  # noqa: ARG002 - the aggregators share one interface
        base: Vector | None = None,  # noqa: ARG002 - the aggregators share one interface
    ) -> Buffer:
        """Add ``s n delta``. Consumes ``buffer``; leaves ``delta`` alone.

        Args:
            buffer: the updates so far.
            delta: local - base, float32 of shape ``(size,)``.
            staleness_weight: s(tau), ``SMALLEST_WEIGHT`` to 1, as journaled.
            importance: n: 1, or num_examples.
            current: not used: a delta is already relative to the base version.
            base: not used.

        Raises:
            ValueError: another shape or dtype, or a weight out of range. The buffer is then unchanged.
        """
        share = staleness_weight if self.normalise_staleness else 1.0
        return _fold_delta(buffer, delta, staleness_weight, importance, counted=share * importance)


class FedAvg(_Aggregator, frozen=True, tag="fedavg"):
    """Synchronous federated averaging: a version when the whole cohort has reported on the current one.

    McMahan et al. 2017, Algorithm 1: the average of the local models weighed by ``n_k / n``, which is the
    current model plus ``(sum of n_i delta_i) / (sum of n_i)``, the divisor used here. Only fresh updates are
    admitted.

    Attributes:
        cohort: number of updates per version.
    """

    max_staleness: ClassVar[int | None] = 0

    cohort: Count

    @property
    def goal(self) -> int:
        """The aggregation goal: the whole cohort."""
        return self.cohort

    def fold(
        self,
        buffer: Buffer,
        delta: Vector,
        *,
        staleness_weight: float,
        importance: float,
        current: Vector | None = None,  # noqa: ARG002 - the aggregators share one interface
        base: Vector | None = None,  # noqa: ARG002 - the aggregators share one interface
    ) -> Buffer:
        """Add ``n delta``. Consumes ``buffer``; leaves ``delta`` alone.

        Args:
            buffer: the updates so far.
            delta: local - base, float32 of shape ``(size,)``.
            staleness_weight: must be 1, which is s(0) of every policy.
            importance: n: num_examples in the paper, or 1 for a plain mean.
            current: not used: for a fresh update it is the base version.
            base: not used.

        Raises:
            ValueError: a stale update, another shape or dtype, or an importance out of range. The buffer is
                then unchanged.
        """
        if staleness_weight != 1.0:
            raise ValueError(
                f"staleness weight {staleness_weight}: FedAvg admits only fresh updates, of weight 1"
            )
        return _fold_delta(buffer, delta, staleness_weight, importance, counted=importance)


Aggregator: TypeAlias = FedAsync | FedBuff | FedAvg
"""Every aggregator: the one table of choices. Decode settings into this type."""


def _fold_delta(
    buffer: Buffer, delta: Vector, staleness_weight: float, importance: float, *, counted: float
) -> Buffer:
    """Add ``s n delta`` to the total, in place, and ``counted`` to the divisor."""
    _check_weights(staleness_weight, importance)
    _check_vectors(buffer.total, delta=delta)
    _add_scaled(buffer.total, np.float32(staleness_weight * importance), delta)
    return Buffer(total=buffer.total, divisor=buffer.divisor + counted, count=buffer.count + 1)


def _add_scaled(total: Vector, weight: np.float32, delta: Vector) -> None:
    """Compute ``total += weight * delta``, rounding after the product and after the sum."""
    if weight == 1:
        # Multiplying by one changes no bit of a finite number, and a fresh update is the common case.
        np.add(total, delta, out=total)
        return
    scratch = np.empty(min(TILE, total.size), np.float32)
    for tile in _tiles(total.size):
        target = total[tile]
        scaled = np.multiply(delta[tile], weight, out=scratch[: target.size])
        np.add(target, scaled, out=target)


def _tiles(size: int) -> Iterator[slice]:
    """Cut ``size`` elements into slices small enough for the cache."""
    for start in range(0, size, TILE):
        yield slice(start, min(start + TILE, size))


def _check_weights(staleness_weight: float, importance: float) -> None:
    """Refuse what admission never gives: it would poison the sum."""
    if not SMALLEST_WEIGHT <= staleness_weight <= 1:
        raise ValueError(f"staleness weight {staleness_weight}; a policy gives {SMALLEST_WEIGHT} to 1")
    if not 1 <= importance <= LARGEST_IMPORTANCE:
        raise ValueError(f"importance {importance}; it must be 1, or a number of examples")


def _check_vectors(total: Vector, **vectors: Vector) -> None:
    """Refuse what numpy would broadcast or convert without a word."""
    for name, vector in vectors.items():
        if vector.shape != total.shape or vector.dtype != np.float32:
            raise ValueError(
                f"{name} is {vector.dtype} of shape {vector.shape}; expected float32 of shape {total.shape}"
            )
