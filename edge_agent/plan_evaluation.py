"""Run a plan's evaluation graph: loss and metric over a dataset, and predictions."""

from dataclasses import dataclass

import numpy as np
import onnxruntime

from edge_agent.dataset import Array, Dataset
from edge_agent.plan_guard import check
from edge_agent.plan_session import (
    check_arrays,
    check_dataset,
    check_evaluation_interface,
    check_parameters,
    open_session,
    session_options,
    shared,
    step_failed,
)
from edge_agent.plan_watchdog import GiveUp, Watchdog, bounds, run_options
from fedtide.wire.parameters import Vector
from fedtide.wire.plan import Plan


@dataclass(frozen=True)
class Evaluation:
    """Means over ``num_examples`` examples; ``metric`` is None if the plan has none."""

    loss: float
    metric: float | None
    num_examples: int


class Evaluator:
    """Runs a plan's evaluation graph. Parameters are built into a session, which is kept until they change.

    Args:
        plan: checked here again before onnxruntime sees it.
        threads: threads of one run.
        memory_bytes: lowers the plan's own limit of working memory.
        give_up: see :data:`edge_agent.plan_watchdog.GiveUp`.

    Raises:
        PlanRefused: the guard refuses the plan.
    """

    def __init__(
        self,
        plan: Plan,
        threads: int = 1,
        *,
        memory_bytes: int | None = None,
        give_up: GiveUp | None = None,
    ) -> None:
        self._nodes = check(plan).evaluation
        self.plan = plan
        self._bounds = bounds(plan.manifest.limits, memory_bytes, give_up)
        self._threads = threads
        self._options = run_options()
        self._held: Vector | None = None
        self._loaded: onnxruntime.InferenceSession | None = None

    def evaluate(self, parameters: Vector, dataset: Dataset, batch_size: int = 256) -> Evaluation:
        """Mean loss and metric over a dataset.

        Raises:
            ValueError: the dataset is empty, or it or the parameters do not fit the plan.
            StepFailed: onnxruntime stopped a run; :class:`StepDeadlineExceeded` if it took too long,
                :class:`MemoryLimitExceeded` if it needed too much memory.
            PlanRefused: onnxruntime refuses the graph.
        """
        check_dataset(self.plan.manifest, dataset)
        if not len(dataset):
            raise ValueError("there are no examples to evaluate on")
        session = self._session(parameters)
        names = ["loss"] if self.plan.manifest.metric is None else ["loss", "metric"]
        sums = np.zeros(len(names))
        with Watchdog(self._bounds) as watchdog:
            for start in range(0, len(dataset), batch_size):
                batch = dataset.rows(slice(start, start + batch_size))
                feed = self._feed(session, batch.inputs, batch.targets)
                watchdog.runs += 1
                try:
                    results = session.run(names, feed, watchdog.options)
                except Exception as error:  # onnxruntime's exceptions have no common base but this one
                    raise step_failed(error, self._bounds, expired=watchdog.expired) from error
                sums += len(batch) * np.array([float(value) for value in results])
        means = sums / len(dataset)
        return Evaluation(float(means[0]), float(means[1]) if len(names) > 1 else None, len(dataset))

    def predict(self, parameters: Vector, inputs: tuple[Array, ...]) -> Array:
        """The model's output for inputs ``x0`` …, each of shape ``(examples, ...)``, in one batch.

        No deadline: whoever asks waits for it, and a watch would cost more than a small model's run.

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
        try:
            output: Array = session.run(["out"], self._feed(session, inputs, targets), self._options)[0]
        except Exception as error:  # onnxruntime's exceptions have no common base but this one
            raise step_failed(error, self._bounds) from error
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
            loaded = open_session(self.plan.evaluation, options, self._bounds, self._nodes)
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
