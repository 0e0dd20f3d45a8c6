"""One training step at a time: the state tensors, the batch's memory, and the deadline."""

import threading
from types import TracebackType
from typing import Final, Self

import numpy as np
import numpy.typing as npt
import onnxruntime

from edge_agent.dataset import Array
from edge_agent.plan_session import StepFailed, batch_tensors, shared, zeros
from fedtide.wire.parameters import Vector
from fedtide.wire.plan import PlanManifest

_CHECKS_PER_DEADLINE: Final = 4
_NO_GRAPH_CAPTURE: Final = ("gpu_graph_id", "-1")
"""Not for a GPU: without this entry onnxruntime 1.31 asks for it at every step and catches its own exception,
which takes longer than a step of a small model."""


class StepDeadlineExceeded(StepFailed):
    """One step took longer than the plan's manifest allows."""


class State:
    """One set of state tensors in memory that onnxruntime reads and writes directly."""

    def __init__(self, manifest: PlanManifest) -> None:
        self.parameters: Vector = np.zeros(manifest.schema.size, np.float32)
        self._local = {
            tensor.name: zeros(tensor) for tensor in (*manifest.local_buffers, *manifest.local_state)
        }
        tensors = {**manifest.schema.split(self.parameters), **self._local}
        self.values = {name: shared(array) for name, array in tensors.items()}

    def start(self, parameters: Vector) -> None:
        """Take a copy of the parameters and zero everything else."""
        self.parameters[:] = parameters
        for array in self._local.values():
            array.fill(0)


class Stepper:
    """Takes steps with batches of one size, from either side's state to the other's."""

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        manifest: PlanManifest,
        sides: tuple[State, State],
        size: int,
        learning_rate: onnxruntime.OrtValue,
    ) -> None:
        self._session = session
        specifications = batch_tensors(manifest)
        self._batch = tuple(zeros(tensor, batch=size) for tensor in specifications)
        self.loss = np.zeros((), np.float32)
        self.metric = np.zeros((), np.float32)
        batch = {
            tensor.name: shared(array) for tensor, array in zip(specifications, self._batch, strict=True)
        }
        scalars = {"loss": shared(self.loss), "metric": shared(self.metric)}
        inputs = {**batch, manifest.learning_rate_input: learning_rate}
        self._bindings = tuple(
            self._bind(inputs | before.values, {f"{name}'": v for name, v in after.values.items()} | scalars)
            for before, after in (sides, sides[::-1])
        )

    def _bind(
        self, inputs: dict[str, onnxruntime.OrtValue], outputs: dict[str, onnxruntime.OrtValue]
    ) -> onnxruntime.IOBinding:
        binding = self._session.io_binding()
        for value in self._session.get_inputs():
            binding.bind_ortvalue_input(value.name, inputs[value.name])
        for value in self._session.get_outputs():
            binding.bind_ortvalue_output(value.name, outputs[value.name])
        return binding

    def step(
        self, side: int, arrays: tuple[Array, ...], rows: npt.NDArray[np.intp], watchdog: "Watchdog"
    ) -> None:
        """One optimizer step on these rows, from the state of ``side``."""
        for array, batch in zip(arrays, self._batch, strict=True):
            # The rows are in range; mode "raise" would copy every batch once more.
            array.take(rows, axis=0, out=batch, mode="clip")
        watchdog.steps += 1
        try:
            self._session.run_with_iobinding(self._bindings[side], watchdog.options)
        except Exception as error:
            if watchdog.options.terminate:
                raise StepDeadlineExceeded(f"a step took longer than {watchdog.deadline_s} s") from error
            raise StepFailed(f"onnxruntime stopped a step: {error}") from error


class Watchdog:
    """Stops a step that takes longer than the deadline, at the latest after 1.5 deadlines.

    One thread for the whole run, which looks four times per deadline whether the count of steps has moved;
    a step itself pays one addition.
    """

    def __init__(self, deadline_s: float) -> None:
        self.deadline_s = deadline_s
        self.options = onnxruntime.RunOptions()
        self.options.add_run_config_entry(*_NO_GRAPH_CAPTURE)
        self.steps = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="edge_agent.step_deadline", daemon=True)

    def _watch(self) -> None:
        seen, looks = self.steps, 0
        while not self._done.wait(self.deadline_s / _CHECKS_PER_DEADLINE):
            seen, looks = self.steps, looks + 1 if self.steps == seen else 0
            if looks > _CHECKS_PER_DEADLINE:
                self.options.terminate = True
                return

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
