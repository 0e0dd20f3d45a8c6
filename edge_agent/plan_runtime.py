"""Run training plans with plain onnxruntime: local training, evaluation and prediction. No torch.

One training step is one run of the train graph. Two sets of state tensors take turns as its input and output,
so nothing is allocated or copied between steps, and a step costs little more than its arithmetic.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import onnxruntime

from edge_agent.dataset import Array, Dataset
from edge_agent.plan_guard import PlanRefused, check
from edge_agent.plan_session import (
    StepFailed,
    check_arrays,
    check_dataset,
    check_evaluation_interface,
    check_parameters,
    check_shared_memory,
    check_train_interface,
    open_session,
    run,
    session_options,
    shared,
)
from edge_agent.plan_step import State, StepDeadlineExceeded, Stepper, Watchdog
from fedtide.wire.parameters import Vector
from fedtide.wire.plan import Plan
from fedtide.wire.training import Training

__all__ = [
    "Dataset",
    "Evaluation",
    "Evaluator",
    "LocalResult",
    "PlanRefused",
    "StepDeadlineExceeded",
    "StepFailed",
    "Trainer",
]


_KEPT_STEPPERS: Final = 8  # each holds one batch


@dataclass(frozen=True)
class LocalResult:
    """What local training gave.

    Attributes:
        parameters: the trained vector, shape ``(schema.size,)``; a copy of its own.
        num_examples: distinct examples trained on.
        steps: optimizer steps taken; 0 when stopped before the first.
        loss: mean over the examples of the last epoch begun, NaN without a step. May be infinite or NaN
            when training diverged.
        metric: the same mean of the plan's metric, or None if it has none.
    """

    parameters: Vector
    num_examples: int
    steps: int
    loss: float
    metric: float | None


@dataclass(frozen=True)
class Evaluation:
    """Means over ``num_examples`` examples; ``metric`` is None if the plan has none."""

    loss: float
    metric: float | None
    num_examples: int


class Trainer:
    """Trains from given parameters on a dataset, for one plan. Not for several threads at once.

    Args:
        plan: checked here again before onnxruntime sees it.
        threads: threads of one step; 1 is fastest on a busy or small machine.
        seed: makes dropout masks reproducible; None draws others each time. Process-wide in onnxruntime.

    Raises:
        PlanRefused: the guard or onnxruntime refuses the plan, or it does not match its manifest.
    """

    def __init__(self, plan: Plan, threads: int = 1, seed: int | None = None) -> None:
        check(plan)
        if seed is not None:
            onnxruntime.set_seed(seed)
        self.plan = plan
        self._session = open_session(plan.train, session_options(threads))
        check_train_interface(self._session, plan.manifest)
        check_shared_memory()
        self._sides = (State(plan.manifest), State(plan.manifest))
        self._learning_rate = np.zeros((), np.float32)
        self._learning_rate_input = shared(self._learning_rate)
        self._steppers: dict[int, Stepper] = {}

    def run_epochs(
        self,
        parameters: Vector,
        dataset: Dataset,
        training: Training,
        rng: np.random.Generator,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> LocalResult:
        """Train for ``training.local_epochs`` epochs, optimizer state starting at zero.

        Examples are shuffled anew each epoch. The last batch of an epoch may be smaller; it is left out if it
        has fewer examples than the plan's ``min_batch``.

        Args:
            parameters: float32, shape ``(schema.size,)``; never written to.
            dataset: at least ``min_batch`` examples, with the plan's dtypes and shapes.
            training: epochs, batch size, learning rate, most steps.
            rng: draws the order of the examples.
            should_stop: asked before every step; when true, the result covers the steps so far.

        Raises:
            ValueError: the dataset or the parameters do not fit the plan.
            StepFailed: onnxruntime stopped a step; :class:`StepDeadlineExceeded` if it took too long.
        """
        manifest = self.plan.manifest
        check_dataset(manifest, dataset)
        check_parameters(manifest, parameters)
        if min(len(dataset), training.batch_size) < manifest.min_batch:
            raise ValueError(
                f"{len(dataset)} examples in batches of {training.batch_size}; "
                f"this plan needs at least {manifest.min_batch} in a batch"
            )
        front, back = self._sides
        front.start(parameters)
        back.start(parameters)
        self._learning_rate[...] = training.learning_rate
        tally = _Tally()
        steps = examples = 0
        with Watchdog(manifest.limits.step_deadline_s) as watchdog:
            for epoch, rows in _batches(len(dataset), training, manifest.min_batch, rng):
                if steps == training.max_steps or should_stop():
                    break
                size = len(rows)
                stepper = self._stepper(size)
                stepper.step(steps & 1, dataset.arrays, rows, watchdog)
                steps += 1
                if epoch != tally.epoch:
                    tally = _Tally(epoch)
                tally.add(size, stepper)
                examples += size
        trained = self._sides[steps & 1].parameters.copy()
        return LocalResult(
            parameters=trained,
            num_examples=min(examples, len(dataset)),
            steps=steps,
            loss=tally.loss,
            metric=tally.metric if manifest.metric is not None else None,
        )

    def _stepper(self, size: int) -> Stepper:
        """The stepper for batches of this size: one for full batches, a few for the last of an epoch."""
        stepper = self._steppers.get(size)
        if stepper is None:
            if len(self._steppers) >= _KEPT_STEPPERS:
                self._steppers.clear()
            stepper = Stepper(self._session, self.plan.manifest, self._sides, size, self._learning_rate_input)
            self._steppers[size] = stepper
        return stepper


class Evaluator:
    """Runs a plan's evaluation graph. Parameters are built into a session, which is kept until they change.

    Args:
        plan: checked here again before onnxruntime sees it.
        threads: threads of one run.

    Raises:
        PlanRefused: the guard refuses the plan.
    """

    def __init__(self, plan: Plan, threads: int = 1) -> None:
        check(plan)
        self.plan = plan
        self._threads = threads
        self._held: Vector | None = None
        self._loaded: onnxruntime.InferenceSession | None = None

    def evaluate(self, parameters: Vector, dataset: Dataset, batch_size: int = 256) -> Evaluation:
        """Mean loss and metric over a dataset.

        Raises:
            ValueError: the dataset is empty, or it or the parameters do not fit the plan.
            StepFailed: onnxruntime stopped a run.
            PlanRefused: onnxruntime refuses the graph.
        """
        check_dataset(self.plan.manifest, dataset)
        if not len(dataset):
            raise ValueError("there are no examples to evaluate on")
        session = self._session(parameters)
        names = ["loss"] if self.plan.manifest.metric is None else ["loss", "metric"]
        sums = np.zeros(len(names))
        for start in range(0, len(dataset), batch_size):
            batch = dataset.rows(slice(start, start + batch_size))
            results = run(session, names, self._feed(session, batch.inputs, batch.targets))
            sums += len(batch) * np.array([float(value) for value in results])
        means = sums / len(dataset)
        return Evaluation(float(means[0]), float(means[1]) if len(names) > 1 else None, len(dataset))

    def predict(self, parameters: Vector, inputs: tuple[Array, ...]) -> Array:
        """The model's output for inputs ``x0`` …, each of shape ``(examples, ...)``, in one batch.

        Raises:
            ValueError: inputs or parameters do not fit the plan.
            StepFailed: onnxruntime stopped the run.
            PlanRefused: onnxruntime refuses the graph.
        """
        manifest = self.plan.manifest
        check_arrays(manifest.inputs, inputs)
        targets = None
        if manifest.targets is not None:  # the output does not depend on them
            rest = tuple(axis or 0 for axis in manifest.targets.shape[1:])
            targets = np.zeros((len(inputs[0]), *rest), manifest.targets.dtype)
        session = self._session(parameters)
        output: Array = run(session, ["out"], self._feed(session, inputs, targets))[0]
        return output

    def _session(self, parameters: Vector) -> onnxruntime.InferenceSession:
        """The session with these parameters built in; 2 to 12 ms when they are not those of the last call."""
        check_parameters(self.plan.manifest, parameters)
        bits = np.ascontiguousarray(parameters, np.float32).view(np.uint32)  # NaN equals itself as bits
        if self._loaded is None or self._held is None or not np.array_equal(bits, self._held.view(np.uint32)):
            self._held, self._loaded = None, None
            held = parameters.copy()  # onnxruntime reads these bytes for as long as the session lives
            injected = set(self.plan.manifest.evaluation_state)
            state = {
                name: shared(v)
                for name, v in self.plan.manifest.schema.split(held).items()
                if name in injected
            }
            options = session_options(self._threads)
            options.add_external_initializers(list(state), list(state.values()))
            loaded = open_session(self.plan.evaluation, options)
            check_evaluation_interface(loaded, self.plan.manifest)
            self._held, self._loaded = held, loaded
        return self._loaded

    @staticmethod
    def _feed(
        session: onnxruntime.InferenceSession, inputs: tuple[Array, ...], targets: Array | None
    ) -> dict[str, Array]:
        tensors = {f"x{index}": array for index, array in enumerate(inputs)}
        if targets is not None:
            tensors["y"] = targets
        return {value.name: tensors[value.name] for value in session.get_inputs()}


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
