"""onnxruntime sessions for plans, and the checks that arrays, graphs and manifest agree.

Memory: ``OrtValue.ortvalue_from_numpy`` shares the array's memory on the CPU. Training relies on that, so it
is checked, and nothing is ever shared that a caller owns.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Final

import numpy as np
import onnxruntime

from edge_agent.dataset import Array, Dataset
from edge_agent.plan_guard import PlanRefused
from fedtide.wire.parameters import TensorSpec, Vector
from fedtide.wire.plan import PlanManifest

_ORT_TYPES: Final[Mapping[str, str]] = {
    "float32": "tensor(float)",
    "float64": "tensor(double)",
    "int64": "tensor(int64)",
    "int32": "tensor(int32)",
    "uint8": "tensor(uint8)",
    "int8": "tensor(int8)",
    "bool": "tensor(bool)",
}


class StepFailed(Exception):
    """onnxruntime stopped a run: a label or token outside the model's range, or no memory."""


def session_options(threads: int) -> onnxruntime.SessionOptions:
    """Options for small graphs on small machines: no spinning threads, errors as exceptions only."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def open_session(graph: bytes, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    """Load a graph.

    Raises:
        PlanRefused: onnxruntime refuses it.
    """
    try:
        return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no common base but this one
        raise PlanRefused(f"onnxruntime refuses the graph: {error}") from error


def run(session: onnxruntime.InferenceSession, names: list[str], feed: dict[str, Array]) -> list[Any]:
    """Run a session and return the named outputs.

    Raises:
        StepFailed: onnxruntime stopped.
    """
    try:
        results: list[Any] = session.run(names, feed)
    except Exception as error:
        raise StepFailed(f"onnxruntime stopped a run: {error}") from error
    return results


def shared(array: Array) -> onnxruntime.OrtValue:
    """An onnxruntime tensor on the array's own memory; the array must live as long."""
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def zeros(tensor: TensorSpec, batch: int = 1) -> Array:
    """Zeros of a tensor's shape and dtype, ``batch`` on a batch axis."""
    return np.zeros([batch if axis is None else axis for axis in tensor.shape], tensor.dtype)


def check_shared_memory() -> None:
    """Make sure that this onnxruntime shares memory with numpy, or no step would see its batch.

    Raises:
        RuntimeError: it does not.
    """
    array = np.zeros((), np.float32)
    value = shared(array)
    array.fill(1.0)
    if float(value.numpy()) != 1.0:
        raise RuntimeError(
            f"onnxruntime {onnxruntime.__version__} copies arrays; plans need one that shares them"
        )


def check_train_interface(session: onnxruntime.InferenceSession, manifest: PlanManifest) -> None:
    """Check that the train graph takes and gives what its manifest says.

    Raises:
        PlanRefused: another name, dtype or shape.
    """
    scalar = TensorSpec(name=manifest.learning_rate_input, dtype="float32", shape=())
    expected = (*_state(manifest), *batch_tensors(manifest), scalar)
    _check_inputs("train", session, expected, complete=True)
    outputs = tuple(value.name for value in session.get_outputs())
    metric = () if manifest.metric is None else ("metric",)
    wanted = (*(f"{tensor.name}'" for tensor in _state(manifest)), "loss", *metric)
    if outputs != manifest.train_outputs or sorted(outputs) != sorted(wanted):
        raise PlanRefused(
            f"the train graph's outputs are {list(outputs)[:8]}, the manifest says {list(wanted)[:8]}"
        )


def check_evaluation_interface(session: onnxruntime.InferenceSession, manifest: PlanManifest) -> None:
    """Check that the evaluation graph takes and gives what its manifest says.

    Raises:
        PlanRefused: another name, dtype or shape.
    """
    _check_inputs("evaluation", session, batch_tensors(manifest), complete=False)
    wanted = {"out", "loss"} | (set() if manifest.metric is None else {"metric"})
    if (outputs := {value.name for value in session.get_outputs()}) != wanted:
        raise PlanRefused(f"the evaluation graph's outputs are {sorted(outputs)[:8]}, not {sorted(wanted)}")


def check_parameters(manifest: PlanManifest, parameters: Vector) -> None:
    """Check a vector's dtype and shape.

    Raises:
        ValueError: they are not the plan's.
    """
    if parameters.dtype != np.float32 or parameters.shape != (manifest.schema.size,):
        raise ValueError(
            f"parameters are {parameters.dtype} of shape {parameters.shape}; "
            f"the plan needs float32 of shape {(manifest.schema.size,)}"
        )


def check_dataset(manifest: PlanManifest, dataset: Dataset) -> None:
    """Check a dataset's arrays against the plan's inputs and targets.

    Raises:
        ValueError: the number of arrays, a dtype or a shape differs.
    """
    if (dataset.targets is None) != (manifest.targets is None):
        raise ValueError(
            "the dataset has no targets and the plan needs them"
            if dataset.targets is None
            else "the dataset has targets and the plan takes none"
        )
    check_arrays(batch_tensors(manifest), dataset.arrays)


def check_arrays(tensors: tuple[TensorSpec, ...], arrays: tuple[Array, ...]) -> None:
    """Check arrays with a batch axis against their specifications.

    Raises:
        ValueError: the number of arrays, a dtype or a shape differs.
    """
    if len(tensors) != len(arrays):
        raise ValueError(f"there are {len(arrays)} arrays, the plan takes {len(tensors)}")
    for tensor, array in zip(tensors, arrays, strict=True):
        if array.dtype != np.dtype(tensor.dtype) or array.shape[1:] != tensor.shape[1:] or not array.ndim:
            raise ValueError(
                f"{tensor.name} is {array.dtype} of shape {array.shape}; "
                f"the plan needs {tensor.dtype} of shape {tensor.shape}, None being the number of examples"
            )


def batch_tensors(manifest: PlanManifest) -> tuple[TensorSpec, ...]:
    """The inputs, then the targets if the plan has any."""
    return manifest.inputs if manifest.targets is None else (*manifest.inputs, manifest.targets)


def _state(manifest: PlanManifest) -> tuple[TensorSpec, ...]:
    """All tensors that one step replaces."""
    return (*manifest.schema.tensors, *manifest.local_buffers, *manifest.local_state)


def _check_inputs(
    name: str, session: onnxruntime.InferenceSession, tensors: Iterable[TensorSpec], *, complete: bool
) -> None:
    expected = {tensor.name: tensor for tensor in tensors}
    found = {value.name: value for value in session.get_inputs()}
    if found.keys() - expected.keys() or (complete and expected.keys() - found.keys()):
        names = sorted(found.keys() ^ expected.keys())
        raise PlanRefused(f"the {name} graph's inputs and its manifest differ by {names[:8]}")
    for value in found.values():
        tensor = expected[value.name]
        shape = tuple(axis if isinstance(axis, int) else None for axis in value.shape)
        if value.type != _ORT_TYPES.get(tensor.dtype) or shape != tensor.shape:
            raise PlanRefused(
                f"input {value.name} of the {name} graph is {value.type} of shape {shape}, "
                f"the manifest says {tensor.dtype} of shape {tensor.shape}"
            )
