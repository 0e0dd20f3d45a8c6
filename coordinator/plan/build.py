"""Build a training plan: trace, differentiate, add the optimizer, export, and prove it against torch."""

import hashlib
import zlib
from typing import Final

import onnx
import torch
from onnx import ModelProto
from torch import Tensor

from coordinator.plan.evaluation_graph import EvaluationGraph, export_evaluation_graph
from coordinator.plan.export import MIN_ONNXRUNTIME, OPSET, operators
from coordinator.plan.file import BuiltPlan
from coordinator.plan.joint_graph import JointGraph, trace
from coordinator.plan.optimizer_step import OptimizerRecipe, read_optimizer
from coordinator.plan.rejection import PlanRejected
from coordinator.plan.task import Task, check_task
from coordinator.plan.train_graph import LEARNING_RATE, TrainGraph, export_train_graph
from coordinator.plan.verify import verify
from fedtide.wire.parameters import Schema, TensorSpec
from fedtide.wire.plan import (
    MAX_GRAPH_BYTES,
    MAX_PLAN_BYTES,
    PLAN_OPERATORS,
    Limits,
    Plan,
    PlanManifest,
    Verified,
)

MANIFEST_FORMAT: Final = 1


def build(task: Task) -> BuiltPlan:
    """Turn a task into a plan that computes the same gradients as torch.

    Takes 3 to 30 CPU seconds, minutes for recurrent models. The task's model and optimizer stay as they are.

    Raises:
        PlanRejected: the task cannot become a plan, or the plan disagrees with torch; the text says why.
    """
    check_task(task)
    joint = trace(task)
    recipe = read_optimizer(task.optimizer, _trained_ids(task, joint), joint.has_gradient)
    tensor_names = [f"x{index}" for index in range(len(task.inputs))]
    if len(task.tensors) > len(task.inputs):
        tensor_names.append("y")
    train = export_train_graph(joint, recipe, task.tensors, tensor_names)
    evaluation = export_evaluation_graph(task, joint, tensor_names)
    _check_operators(train.shipped, evaluation.model)
    _check_inputs(train, joint, recipe, tensor_names)
    evidence = verify(task, joint, recipe, train, evaluation)
    initial = {
        **{f"p.{name}": value.numpy() for name, value in joint.parameters.items()},
        **{f"b.{name}": value.numpy() for name, value in joint.buffers.items() if _is_averaged(value)},
    }
    manifest = _manifest(task, joint, recipe, train=train, evaluation=evaluation, evidence=evidence)
    plan = Plan(manifest, train.shipped.SerializeToString(), evaluation.model.SerializeToString())
    _check_size(plan)
    return BuiltPlan(plan, manifest.schema.flatten(initial))


def _trained_ids(task: Task, joint: JointGraph) -> dict[int, str]:
    """The trained parameters' names by the identity of the task's own tensors."""
    own = dict(task.model.named_parameters())
    return {id(own[name]): name for name in joint.parameters}


def _is_averaged(buffer: Tensor) -> bool:
    """Whether a buffer is aggregated like a parameter; counters stay on the device."""
    return buffer.dtype == torch.float32


def _specification(name: str, tensor: Tensor, *, batched: bool = False) -> TensorSpec:
    shape: tuple[int | None, ...] = tuple(tensor.shape)
    return TensorSpec(
        name=name,
        dtype=str(tensor.dtype).removeprefix("torch."),
        shape=(None, *shape[1:]) if batched else shape,
    )


def _manifest(
    task: Task,
    joint: JointGraph,
    recipe: OptimizerRecipe,
    *,
    train: TrainGraph,
    evaluation: EvaluationGraph,
    evidence: Verified,
) -> PlanManifest:
    parameters = [_specification(f"p.{name}", value) for name, value in joint.parameters.items()]
    averaged = [
        _specification(f"b.{name}", value) for name, value in joint.buffers.items() if _is_averaged(value)
    ]
    counters = [
        _specification(f"b.{name}", value) for name, value in joint.buffers.items() if not _is_averaged(value)
    ]
    targets = task.example[1]
    metric = task.metric
    return PlanManifest(
        format=MANIFEST_FORMAT,
        name=task.name,
        opset=OPSET,
        producer=f"torch {torch.__version__}, onnx {onnx.__version__}",
        min_onnxruntime=MIN_ONNXRUNTIME,
        schema=Schema(tensors=(*parameters, *averaged)),
        local_state=tuple(_specification(f"o.{name}", value) for name, value in recipe.state.items()),
        local_buffers=tuple(counters),
        inputs=tuple(_specification(f"x{index}", x, batched=True) for index, x in enumerate(task.inputs)),
        targets=None if targets is None else _specification("y", targets, batched=True),
        learning_rate_input=LEARNING_RATE,
        min_batch=2 if joint.batch_normalised else 1,
        train_outputs=train.outputs,
        evaluation_state=evaluation.injected,
        metric=metric if metric is None or isinstance(metric, str) else getattr(metric, "__name__", "metric"),
        optimizer=recipe.kind.__name__,
        operators=operators(train.shipped, evaluation.model),
        training=task.device_training,
        limits=Limits(),
        verified=evidence,
        train_sha256=hashlib.sha256(train.shipped.SerializeToString()).digest(),
        evaluation_sha256=hashlib.sha256(evaluation.model.SerializeToString()).digest(),
    )


def _check_operators(*models: ModelProto) -> None:
    if unknown := set(operators(*models)) - PLAN_OPERATORS:
        raise PlanRejected(
            f"The graph needs ONNX operators that devices do not run: {', '.join(sorted(unknown))}."
        )


def _check_inputs(
    train: TrainGraph, joint: JointGraph, recipe: OptimizerRecipe, tensor_names: list[str]
) -> None:
    """A missing input means that the exporter found it unused; a device would then feed what nobody takes."""
    present = {value.name for value in train.shipped.graph.input}
    wanted = {
        *(f"p.{name}" for name in joint.parameters),
        *(f"b.{name}" for name in joint.buffers),
        *(f"o.{name}" for name in recipe.state),
        *tensor_names,
        LEARNING_RATE,
    }
    if present != wanted:
        raise PlanRejected(f"The exported graph has other inputs than the step: {sorted(present ^ wanted)}.")


def _check_size(plan: Plan) -> None:
    graphs = (plan.train, plan.evaluation)
    packed = sum(len(zlib.compress(graph, 9)) for graph in graphs)
    # The manifest and the signature take the rest.
    if packed > MAX_PLAN_BYTES * 3 // 4 or max(map(len, graphs)) > MAX_GRAPH_BYTES:
        raise PlanRejected(
            f"The graphs have {packed:,} bytes compressed, and devices accept {MAX_PLAN_BYTES * 3 // 4:,}; "
            "make the model smaller, shorten its sequences, or train what it now holds as constants."
        )
