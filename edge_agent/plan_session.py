"""onnxruntime sessions for plans, and the checks that arrays, graphs and manifest agree.

Memory: ``OrtValue.ortvalue_from_numpy`` shares the array's memory on the CPU. Training relies on that, so it
is checked, and nothing is ever shared that a caller owns.

Each session has an arena of its own, from which the tensors between operators come, and which ends where the
plan's limit is. onnxruntime takes the size of an arena only with an allocator that is registered for the
whole process; a session keeps the one that was registered when it was opened, so registering and opening are
one critical section.
"""

import threading
from collections.abc import Iterable, Mapping
from typing import Final

import msgspec
import numpy as np
import onnxruntime
from onnxruntime.capi.onnxruntime_pybind11_state import (
    OrtAllocatorType,
    OrtArenaCfg,
    OrtMemoryInfo,
    OrtMemType,
    create_and_register_allocator,
)

from edge_agent.dataset import Array, Dataset
from edge_agent.plan_guard import PlanRefused
from edge_agent.plan_watchdog import Bounds, Watchdog
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


SHORTEST_OPENING_DEADLINE_S: Final = 30.0
_CPU_ARENA: Final = OrtMemoryInfo("Cpu", OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, OrtMemType.DEFAULT)
_NO_ARENA_LEFT: Final = OrtArenaCfg({"max_mem": 1})
_OUT_OF_ARENA: Final = "is smaller than requested bytes"
_registering = threading.Lock()


class StepFailed(Exception):
    """onnxruntime stopped a run: a label or token outside the model's range, or no memory."""


class StepDeadlineExceeded(StepFailed):
    """One run took longer than the plan's manifest allows."""


class MemoryLimitExceeded(StepFailed):
    """One run needs more working memory than the plan may take on this device."""


def session_options(threads: int) -> onnxruntime.SessionOptions:
    """Options for small graphs on small machines: no spinning threads, errors as exceptions only."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def open_session(
    graph: bytes, options: onnxruntime.SessionOptions, bounds: Bounds, nodes: int
) -> onnxruntime.InferenceSession:
    """Load a graph.

    Args:
        graph: checked by the guard.
        options: of :func:`session_options`; extended here.
        bounds: the memory is the most that one run may work with, and that the constants may take which are
            computed when opening; the deadline is that of the opening too, unless it is very short.
        nodes: of the graph, as the guard counted them.

    Raises:
        PlanRefused: onnxruntime refuses it, or takes too long.
    """
    memory_bytes = bounds.limits.memory_bytes
    options.add_session_config_entry("session.use_env_allocators", "1")
    # Constants are computed outside the arena, so each may take its part of what all may take.
    options.add_session_config_entry(
        "optimization.constant_folding_max_output_size_in_bytes", str(max(memory_bytes // max(nodes, 1), 1))
    )
    patient = Bounds(
        msgspec.structs.replace(
            bounds.limits, step_deadline_s=max(bounds.limits.step_deadline_s, SHORTEST_OPENING_DEADLINE_S)
        ),
        bounds.give_up,
    )
    with Watchdog(patient, lambda: options.set_load_cancellation_flag(True)) as watchdog:
        try:
            return _open_with_arena(graph, options, memory_bytes)
        except Exception as error:  # onnxruntime's exceptions have no common base but this one
            if watchdog.expired:
                raise PlanRefused(
                    f"opening the plan takes longer than {patient.limits.step_deadline_s:g} s; "
                    "a smaller model, or a longer step_deadline_s in the plan's limits, would help"
                ) from error
            raise PlanRefused(f"onnxruntime refuses the graph: {error}") from error


def _open_with_arena(
    graph: bytes, options: onnxruntime.SessionOptions, memory_bytes: int
) -> onnxruntime.InferenceSession:
    with _registering:
        create_and_register_allocator(_CPU_ARENA, OrtArenaCfg({"max_mem": memory_bytes}))
        try:
            return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        finally:
            # Else the process would keep the arena when its session is gone.
            create_and_register_allocator(_CPU_ARENA, _NO_ARENA_LEFT)


def step_failed(error: Exception, bounds: Bounds, *, expired: bool = False) -> StepFailed:
    """What stopped a run, in words that say what would help; ``expired``: it was the deadline."""
    if expired:
        return StepDeadlineExceeded(
            f"a step takes longer than {bounds.limits.step_deadline_s:g} s; smaller batches, "
            "or a longer step_deadline_s in the plan's limits, would help"
        )
    if _OUT_OF_ARENA in str(error):
        return MemoryLimitExceeded(
            f"a step needs more than the {bounds.limits.memory_bytes / 2**20:g} MiB of working memory that "
            "it may take here; smaller batches would help, or a higher memory_bytes in the plan's limits "
            "and, if it is set, a higher training.max_memory_mb in this device's agent.toml"
        )
    return StepFailed(f"onnxruntime stopped a step: {error}")


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
    expected = (*_state(manifest), *batch_tensors(manifest), *_given(manifest))
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


def _given(manifest: PlanManifest) -> Iterable[TensorSpec]:
    """What the train graph takes besides the state and the batch."""
    yield TensorSpec(name=manifest.learning_rate_input, dtype="float32", shape=())
    if manifest.proximal_input is not None:
        yield TensorSpec(name=manifest.proximal_input, dtype="float32", shape=())
        for tensor in manifest.schema.tensors:
            if tensor.name.startswith("p."):
                yield TensorSpec(name=anchor_name(tensor.name), dtype="float32", shape=tensor.shape)
    if manifest.class_weights is not None:
        yield manifest.class_weights


def anchor_name(parameter: str) -> str:
    """The train graph's input for where a parameter ``p.<name>`` started: ``a.<name>``."""
    return f"a.{parameter.removeprefix('p.')}"


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
