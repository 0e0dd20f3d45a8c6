"""One training step at a time: the state tensors, what each step is given, and the batch's memory."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnxruntime

from edge_agent.dataset import Array
from edge_agent.plan_session import anchor_name, batch_tensors, shared, zeros
from edge_agent.plan_watchdog import Watchdog
from fedtide.wire.parameters import Vector
from fedtide.wire.plan import PlanManifest


class State:
    """One set of state tensors in memory that onnxruntime reads and writes directly.

    Attributes:
        parameters: the aggregated tensors, flat.
        optimizer: the manifest's ``local_state``.
        counters: the manifest's ``local_buffers``.
        values: all of them as onnxruntime's, by name.
    """

    def __init__(self, manifest: PlanManifest) -> None:
        self.parameters: Vector = np.zeros(manifest.schema.size, np.float32)
        self.optimizer = tuple(zeros(tensor) for tensor in manifest.local_state)
        self.counters = tuple(zeros(tensor) for tensor in manifest.local_buffers)
        self.values = {
            name: shared(array) for name, array in manifest.schema.split(self.parameters).items()
        } | {
            tensor.name: shared(array)
            for tensor, array in (
                *zip(manifest.local_state, self.optimizer, strict=True),
                *zip(manifest.local_buffers, self.counters, strict=True),
            )
        }

    def start(self, parameters: Vector, optimizer: tuple[Array, ...], counters: tuple[Array, ...]) -> None:
        """Take copies of these; what is empty starts at zero."""
        self.parameters[:] = parameters
        _fill(self.optimizer, optimizer)
        _fill(self.counters, counters)


def _fill(arrays: tuple[Array, ...], values: tuple[Array, ...]) -> None:
    if not values:
        for array in arrays:
            array.fill(0)
        return
    for array, value in zip(arrays, values, strict=True):
        array[...] = value


@dataclass(frozen=True)
class Given:
    """What is the same at every step of one update, in memory that onnxruntime reads directly.

    Attributes:
        learning_rate: scalar.
        proximal: scalar, FedProx's μ.
        anchors: where local training started, flat; empty for a plan without a proximal term.
        class_weights: shape ``(classes,)``; empty for a plan without class weights.
        values: those of them that the train graph takes, by its names.
    """

    learning_rate: npt.NDArray[np.float32]
    proximal: npt.NDArray[np.float32]
    anchors: Vector
    class_weights: Vector
    values: dict[str, onnxruntime.OrtValue]

    @classmethod
    def memory(cls, manifest: PlanManifest) -> "Given":
        """Memory for a plan's."""
        learning_rate, proximal = np.zeros((), np.float32), np.zeros((), np.float32)
        values = {manifest.learning_rate_input: shared(learning_rate)}
        anchors = class_weights = np.zeros(0, np.float32)
        if manifest.proximal_input is not None:
            anchors = np.zeros(manifest.schema.size, np.float32)
            values[manifest.proximal_input] = shared(proximal)
            for name, array in manifest.schema.split(anchors).items():
                if name.startswith("p."):
                    values[anchor_name(name)] = shared(array)
        if manifest.class_weights is not None:
            class_weights = zeros(manifest.class_weights)
            values[manifest.class_weights.name] = shared(class_weights)
        return cls(learning_rate, proximal, anchors, class_weights, values)


class Stepper:
    """Takes steps with batches of one size, from either side's state to the other's."""

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        manifest: PlanManifest,
        sides: tuple[State, State],
        given: Given,
        size: int,
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
        inputs = batch | given.values
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
        self, side: int, arrays: tuple[Array, ...], rows: npt.NDArray[np.intp], watchdog: Watchdog
    ) -> None:
        """One optimizer step on these rows, from the state of ``side``.

        Raises:
            Exception: onnxruntime stopped it; see :func:`edge_agent.plan_session.step_failed`.
        """
        for array, batch in zip(arrays, self._batch, strict=True):
            # The rows are in range; mode "raise" would copy every batch once more.
            array.take(rows, axis=0, out=batch, mode="clip")
        watchdog.runs += 1
        self._session.run_with_iobinding(self._bindings[side], watchdog.options)
