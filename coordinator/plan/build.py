"""Build a training plan: trace, differentiate, add the optimizer, export, and prove it against torch."""

import hashlib
import zlib
from collections.abc import Callable
from typing import Final

import onnx
import torch
from torch import Tensor

from coordinator.plan import place
from coordinator.plan.export import MIN_ONNXRUNTIME, OPSET, operators
from coordinator.plan.file import BuiltPlan
from coordinator.plan.graphs import Graphs, export_graphs
from coordinator.plan.rejection import PlanRejected
from coordinator.plan.task import Task
from coordinator.plan.train_graph import CLASS_WEIGHTS, LEARNING_RATE, PROXIMAL, proximal_inputs
from coordinator.plan.verify import verify
from fedtide.wire.parameters import Schema, TensorSpec
from fedtide.wire.plan import (
    MAX_GRAPH_BYTES,
    MAX_NODES,
    MAX_PLAN_BYTES,
    PLAN_OPERATORS,
    Plan,
    PlanManifest,
    Verified,
)

MANIFEST_FORMAT: Final = 1
MAX_MODEL_BYTES: Final = 64 << 20
"""What edge agents accept unless their settings say otherwise (``edge_agent.settings``)."""
_SHOWN: Final = 3


def build(
    task: Task, progress: Callable[[str], None] = lambda _stage: None, max_model_bytes: int = MAX_MODEL_BYTES
) -> BuiltPlan:
    """Turn a task into a plan that computes the same gradients as torch.

    Takes 3 to 30 CPU seconds. The task's model and optimizer stay as they are.

    Args:
        task: the model and how to train it.
        progress: told what begins, for example ``exporting the training step``.
        max_model_bytes: what the fleet's devices accept as one version of the model.

    Raises:
        PlanRejected: the task cannot become a plan, or the plan disagrees with torch; the text says where in
            the owner's code, why, and what to write instead.
    """
    _check_model_size(task, max_model_bytes)
    graphs = export_graphs(task, progress)
    progress("checking 20 steps against float64 torch")
    return assemble(task, graphs)


def assemble(task: Task, graphs: Graphs) -> BuiltPlan:
    """Verify exported graphs and make a plan of them.

    Raises:
        PlanRejected: devices would refuse the graphs, or they disagree with torch.
    """
    _check_operators(graphs)
    _check_nodes(graphs)
    _check_inputs(task, graphs)
    manifest = _manifest(task, graphs, verify(task, graphs))
    _check_evaluation_state(manifest)
    plan = Plan(
        manifest, graphs.train.shipped.SerializeToString(), graphs.evaluation.model.SerializeToString()
    )
    _check_size(plan, graphs)
    joint = graphs.joint
    initial = {
        **{f"p.{name}": value.numpy() for name, value in joint.parameters.items()},
        **{f"b.{name}": value.numpy() for name, value in joint.buffers.items()},
    }
    return BuiltPlan(plan, manifest.schema.flatten(initial))


def _is_averaged(buffer: Tensor) -> bool:
    """Whether a buffer is aggregated like a parameter; counters stay on the device."""
    return buffer.dtype == torch.float32


def _specification(name: str, tensor: Tensor) -> TensorSpec:
    return TensorSpec(name=name, dtype=str(tensor.dtype).removeprefix("torch."), shape=tuple(tensor.shape))


def _batched(name: str, tensor: Tensor) -> TensorSpec:
    return TensorSpec(
        name=name, dtype=str(tensor.dtype).removeprefix("torch."), shape=(None, *tensor.shape[1:])
    )


def _manifest(task: Task, graphs: Graphs, evidence: Verified) -> PlanManifest:
    joint, train, evaluation = graphs.joint, graphs.train.shipped, graphs.evaluation.model
    parameters = [_specification(f"p.{name}", value) for name, value in joint.parameters.items()]
    buffers = {f"b.{name}": value for name, value in joint.buffers.items()}
    averaged = [_specification(name, value) for name, value in buffers.items() if _is_averaged(value)]
    counters = [_specification(name, value) for name, value in buffers.items() if not _is_averaged(value)]
    targets, metric = task.example[1], task.metric
    class_weights = None
    if task.class_weights is not None:
        class_weights = TensorSpec(name=CLASS_WEIGHTS, dtype="float32", shape=(task.class_weights,))
    return PlanManifest(
        format=MANIFEST_FORMAT,
        name=task.name,
        opset=OPSET,
        producer=f"torch {torch.__version__}, onnx {onnx.__version__}",
        min_onnxruntime=MIN_ONNXRUNTIME,
        schema=Schema(tensors=(*parameters, *averaged)),
        local_state=tuple(_specification(f"o.{name}", value) for name, value in graphs.recipe.state.items()),
        local_buffers=tuple(counters),
        inputs=tuple(_batched(f"x{index}", x) for index, x in enumerate(task.inputs)),
        targets=None if targets is None else _batched("y", targets),
        learning_rate_input=LEARNING_RATE,
        min_batch=2 if joint.batch_normalised else 1,
        train_outputs=graphs.train.outputs,
        evaluation_state=graphs.evaluation.injected,
        metric=metric if metric is None or isinstance(metric, str) else getattr(metric, "__name__", "metric"),
        optimizer=graphs.recipe.kind.__name__,
        operators=operators(train, evaluation),
        training=task.device_training,
        limits=task.limits,
        buffers=task.buffers,
        proximal_input=PROXIMAL if task.proximal else None,
        class_weights=class_weights,
        clip_norm=task.clip_norm,
        verified=evidence,
        train_sha256=hashlib.sha256(train.SerializeToString()).digest(),
        evaluation_sha256=hashlib.sha256(evaluation.SerializeToString()).digest(),
    )


def _check_operators(graphs: Graphs) -> None:
    if unknown := set(operators(graphs.train.shipped, graphs.evaluation.model)) - PLAN_OPERATORS:
        raise PlanRejected(
            f"The graph needs ONNX operators that devices do not run: {', '.join(sorted(unknown))}."
        )


def _check_nodes(graphs: Graphs) -> None:
    nodes = max(len(model.graph.node) for model in (graphs.train.shipped, graphs.evaluation.model))
    if nodes > MAX_NODES:
        raise PlanRejected(
            f"A graph has {nodes:,} nodes, and devices accept {MAX_NODES:,}; make the model shallower, or "
            "shorten its sequences: each time step is nodes of its own."
        )


def _check_inputs(task: Task, graphs: Graphs) -> None:
    """A missing input means that the exporter found it unused; a device would then feed what nobody takes."""
    present = {value.name for value in graphs.train.shipped.graph.input}
    wanted = {
        *(f"p.{name}" for name in graphs.joint.parameters),
        *(f"b.{name}" for name in graphs.joint.buffers),
        *(f"o.{name}" for name in graphs.recipe.state),
        *graphs.tensor_names,
        LEARNING_RATE,
        *proximal_inputs(task, graphs.joint),
    }
    taken = {name for node in graphs.train.shipped.graph.node for name in node.input}
    if CLASS_WEIGHTS in wanted - taken:
        raise PlanRejected(
            "The loss ignores its third argument, the class weights; write for example "
            "torch.nn.functional.cross_entropy(output, targets, weight=class_weights).",
            place.of_function(task.loss),
        )
    if present != wanted:
        raise PlanRejected(f"The exported graph has other inputs than the step: {sorted(present ^ wanted)}.")


def _check_evaluation_state(manifest: PlanManifest) -> None:
    aggregated = {tensor.name for tensor in manifest.schema.tensors}
    if local := sorted(set(manifest.evaluation_state) - aggregated):
        raise PlanRejected(
            f"In evaluation the model reads {', '.join(local)}, which training changes but which is not "
            "float32, so it is not aggregated; make it float32."
        )


def _check_model_size(task: Task, most: int) -> None:
    """Before anything slow: one version of the model is its parameters, 4 bytes each, and statistics."""
    sizes = {name: parameter.nbytes for name, parameter in task.model.named_parameters()}
    if (total := sum(sizes.values())) > most:
        raise PlanRejected(
            f"The model has {total:,} bytes of parameters and devices accept {most:,}; the largest are "
            f"{_largest(sizes)}. Make those layers smaller, or raise max_model_bytes in the agents' settings "
            "and build with --max-model-bytes."
        )


def _check_size(plan: Plan, graphs: Graphs) -> None:
    """Manifest and signature get a quarter of what devices accept, the graphs the rest."""
    shipped = (plan.train, plan.evaluation)
    packed, most = sum(len(zlib.compress(graph, 9)) for graph in shipped), MAX_PLAN_BYTES * 3 // 4
    if packed <= most and max(map(len, shipped)) <= MAX_GRAPH_BYTES:
        return
    constants = {name: value.nbytes for name, value in graphs.joint.constants.items()}
    advice = (
        f"its largest constants are {_largest(constants)}: make them float32 buffers or frozen parameters of "
        "the model, which then travel with it, or smaller"
        if sum(constants.values()) > most // 2
        else "make the model shallower or shorten its sequences"
    )
    raise PlanRejected(f"The graphs have {packed:,} bytes compressed, and devices accept {most:,}; {advice}.")


def _largest(sizes: dict[str, int]) -> str:
    """The names and sizes of the largest tensors."""
    largest = sorted(sizes.items(), key=lambda item: -item[1])[:_SHOWN]
    return ", ".join(f"{name} ({size:,} bytes)" for name, size in largest)
