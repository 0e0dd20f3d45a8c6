"""Run training plans with plain onnxruntime: local training, evaluation and prediction. No torch.

One training step is one run of the train graph. Two sets of state tensors take turns as its input and output,
so nothing is allocated or copied between steps, and a step costs little more than its arithmetic.

A plan is bounded: each step has a deadline and each graph so much working memory, see
:mod:`edge_agent.plan_watchdog` and :mod:`edge_agent.plan_session`.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import onnxruntime

from edge_agent.class_weights import class_weights
from edge_agent.dataset import Dataset
from edge_agent.kept_state import NOTHING_KEPT, Kept, own_tensors, with_own_statistics
from edge_agent.plan_evaluation import Evaluation, Evaluator
from edge_agent.plan_guard import PlanRefused, check
from edge_agent.plan_session import (
    MemoryLimitExceeded,
    StepDeadlineExceeded,
    StepFailed,
    check_dataset,
    check_parameters,
    check_shared_memory,
    check_train_interface,
    open_session,
    session_options,
    step_failed,
)
from edge_agent.plan_step import Given, State, Stepper
from edge_agent.plan_watchdog import GiveUp, Watchdog, bounds
from fedtide.wire.ids import ModelVersion
from fedtide.wire.parameters import Vector
from fedtide.wire.plan import Plan, PlanManifest
from fedtide.wire.training import Training

__all__ = [
    "Dataset",
    "Evaluation",
    "Evaluator",
    "LocalResult",
    "MemoryLimitExceeded",
    "PlanRefused",
    "StepDeadlineExceeded",
    "StepFailed",
    "Trainer",
]


_FIRST_VERSION: Final = ModelVersion(0)
_KEPT_STEPPERS: Final = 8  # each holds one batch


@dataclass(frozen=True)
class LocalResult:
    """What local training gave.

    Attributes:
        parameters: the trained vector, shape ``(schema.size,)``; a copy of its own. Buffers that each device
            has for itself are in it as they were given.
        num_examples: distinct examples trained on.
        steps: optimizer steps taken; 0 when stopped before the first.
        loss: mean over the examples of the last epoch begun, NaN without a step. May be infinite or NaN
            when training diverged.
        metric: the same mean of the plan's metric, or None if it has none.
        kept: what the device is to keep for its next update on this plan; copies.
    """

    parameters: Vector
    num_examples: int
    steps: int
    loss: float
    metric: float | None
    kept: Kept = NOTHING_KEPT


class Trainer:
    """Trains from given parameters on a dataset, for one plan. Not for several threads at once.

    It remembers nothing of an update: devices may share one.

    Args:
        plan: checked here again before onnxruntime sees it.
        threads: threads of one step; 1 is fastest on a busy or small machine.
        seed: makes dropout masks reproducible; None draws others each time. Process-wide in onnxruntime.
        memory_bytes: lowers the plan's own limit of working memory.
        give_up: see :data:`edge_agent.plan_watchdog.GiveUp`.

    Raises:
        PlanRefused: the guard or onnxruntime refuses the plan, it does not match its manifest, or opening it
            takes too long.
    """

    def __init__(
        self,
        plan: Plan,
        threads: int = 1,
        seed: int | None = None,
        *,
        memory_bytes: int | None = None,
        give_up: GiveUp | None = None,
    ) -> None:
        nodes = check(plan)
        if seed is not None:
            onnxruntime.set_seed(seed)
        self.plan = plan
        self._bounds = bounds(plan.manifest.limits, memory_bytes, give_up)
        self._session = open_session(plan.train, session_options(threads), self._bounds, nodes.train)
        check_train_interface(self._session, plan.manifest)
        check_shared_memory()
        self._sides = (State(plan.manifest), State(plan.manifest))
        self._given = Given.memory(plan.manifest)
        self._steppers: dict[int, Stepper] = {}

    def run_epochs(
        self,
        parameters: Vector,
        dataset: Dataset,
        training: Training,
        rng: np.random.Generator,
        should_stop: Callable[[], bool] = lambda: False,
        *,
        version: ModelVersion = _FIRST_VERSION,
        kept: Kept = NOTHING_KEPT,
        clock: Callable[[], float] = time.monotonic,
    ) -> LocalResult:
        """Train for ``training.local_epochs`` epochs, or until one of its limits ends it.

        Examples are shuffled anew each epoch. The last batch of an epoch may be smaller; it is left out if it
        has fewer examples than the plan's ``min_batch``.

        Args:
            parameters: float32, shape ``(schema.size,)``; never written to.
            dataset: at least ``min_batch`` examples, with the plan's dtypes and shapes.
            training: how to.
            rng: draws the order of the examples.
            should_stop: asked before every step; when true, the result covers the steps so far.
            version: of the parameters; the learning rate follows it.
            kept: what this device kept after its last update on this plan. Its optimizer state counts only
                if ``training`` keeps that.
            clock: monotonic seconds, for ``training.max_seconds``, of which at least one step is taken.

        Raises:
            ValueError: the dataset or the parameters do not fit the plan, or ``training`` asks for what the
                plan was built without.
            StepFailed: onnxruntime stopped a step; :class:`StepDeadlineExceeded` if it took too long,
                :class:`MemoryLimitExceeded` if it needed too much memory.
        """
        check_dataset(self.plan.manifest, dataset)
        check_parameters(self.plan.manifest, parameters)
        _check_training(self.plan.manifest, training, len(dataset))
        self._start(parameters, dataset, training, version, kept)
        seen, tally = np.zeros(len(dataset), np.bool_), _Tally()
        steps, began = 0, clock()

        def is_enough() -> bool:
            late = training.max_seconds is not None and clock() - began >= training.max_seconds
            return steps == training.max_steps or (late and steps > 0) or should_stop()

        with Watchdog(self._bounds) as watchdog:
            for epoch, rows in _batches(len(dataset), training, self.plan.manifest.min_batch, rng):
                if is_enough():
                    break
                stepper = self._stepper(len(rows))
                try:
                    stepper.step(steps & 1, dataset.arrays, rows, watchdog)
                except Exception as error:  # onnxruntime's exceptions have no common base but this one
                    raise step_failed(error, self._bounds, expired=watchdog.expired) from error
                steps += 1
                seen[rows] = True
                if epoch != tally.epoch:
                    tally = _Tally(epoch)
                tally.add(len(rows), stepper)
        trained, newly_kept = self._ended(self._sides[steps & 1], parameters, training)
        return LocalResult(
            parameters=trained,
            num_examples=int(np.count_nonzero(seen)),
            steps=steps,
            loss=tally.loss,
            metric=tally.metric if self.plan.manifest.metric is not None else None,
            kept=newly_kept,
        )

    def _start(
        self, parameters: Vector, dataset: Dataset, training: Training, version: ModelVersion, kept: Kept
    ) -> None:
        """Fill the memory that the first step reads; it writes all of the other side's."""
        manifest, given = self.plan.manifest, self._given
        optimizer = kept.optimizer if training.optimizer_state == "keep" else ()
        self._sides[0].start(with_own_statistics(manifest, parameters, kept), optimizer, kept.counters)
        given.learning_rate[...] = training.learning_rate_at(version)
        given.proximal[...] = training.proximal
        if len(given.anchors):
            given.anchors[:] = parameters
        if manifest.class_weights is not None and dataset.targets is not None:
            given.class_weights[:] = class_weights(
                training.class_weights, len(given.class_weights), dataset.targets
            )

    def _ended(self, side: State, base: Vector, training: Training) -> tuple[Vector, Kept]:
        """The trained parameters, and what is the device's own."""
        manifest = self.plan.manifest
        trained = side.parameters.copy()
        own = tuple(own_tensors(manifest))
        kept = Kept(
            optimizer=_copies(side.optimizer) if training.optimizer_state == "keep" else (),
            statistics=tuple(trained[place].copy() for _, place in own),
            counters=_copies(side.counters) if manifest.buffers == "local" else (),
        )
        for _, place in own:
            trained[place] = base[place]
        return trained, kept

    def _stepper(self, size: int) -> Stepper:
        """The stepper for batches of this size: one for full batches, a few for the last of an epoch."""
        stepper = self._steppers.get(size)
        if stepper is None:
            if len(self._steppers) >= _KEPT_STEPPERS:
                self._steppers.clear()
            stepper = Stepper(self._session, self.plan.manifest, self._sides, self._given, size)
            self._steppers[size] = stepper
        return stepper


class _Tally:
    """Sums of loss and metric over one epoch, by examples."""

    def __init__(self, epoch: int = -1) -> None:
        self.epoch = epoch
        self._examples = 0
        self._loss = self._metric = 0.0

    def add(self, size: int, stepper: Stepper) -> None:
        """Count the stepper's last step."""
        self._examples += size
        self._loss += size * float(stepper.loss)
        self._metric += size * float(stepper.metric)

    @property
    def loss(self) -> float:
        """Mean by examples; NaN without any."""
        return self._loss / self._examples if self._examples else float("nan")

    @property
    def metric(self) -> float:
        """Mean by examples; NaN without any."""
        return self._metric / self._examples if self._examples else float("nan")


def _check_training(manifest: PlanManifest, training: Training, examples: int) -> None:
    if min(examples, training.batch_size) < manifest.min_batch:
        raise ValueError(
            f"{examples} examples in batches of {training.batch_size}; "
            f"this plan needs at least {manifest.min_batch} in a batch"
        )
    if training.proximal and manifest.proximal_input is None:
        raise ValueError(
            f"proximal is {training.proximal:g}, and plan {manifest.name!r} was built without a proximal "
            "term; build it with Task(proximal=True), or set proximal to 0"
        )
    if training.class_weights != "equal" and manifest.class_weights is None:
        raise ValueError(
            f"class_weights is {training.class_weights!r}, and plan {manifest.name!r} was built without "
            'class weights; build it with Task(class_weights=...), or set class_weights to "equal"'
        )


def _copies(arrays: tuple[npt.NDArray[np.generic], ...]) -> tuple[npt.NDArray[np.generic], ...]:
    return tuple(array.copy() for array in arrays)


def _batches(
    examples: int, training: Training, min_batch: int, rng: np.random.Generator
) -> Iterator[tuple[int, npt.NDArray[np.intp]]]:
    """``(epoch, rows)`` for every step: a new order each epoch, a last batch below ``min_batch`` left out."""
    for epoch in range(training.local_epochs):
        order = rng.permutation(examples)
        for start in range(0, examples, training.batch_size):
            rows = order[start : start + training.batch_size]
            if len(rows) >= min_batch:
                yield epoch, rows
