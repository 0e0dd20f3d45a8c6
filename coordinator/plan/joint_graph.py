"""From a model and its loss to one aten graph that computes loss, gradients and new buffers."""

import copy
import enum
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.export.exported_program import (
    ExportedProgram,
    _decompose_exported_program,  # no public name yet; tests/plan pins its signature
)
from torch.export.graph_signature import InputKind, OutputKind
from torch.nn.attention import SDPBackend, sdpa_kernel

from coordinator.plan.lowering import MASK_OPERATORS, torch_decompositions
from coordinator.plan.rejection import PlanRejected, explain
from coordinator.plan.task import LossFunction, Task, accuracy

MAX_BATCH: Final = 65_536
_MODEL_PREFIX: Final = "model."


class Role(enum.Enum):
    """What an input or output of the joint graph is."""

    PARAMETER = enum.auto()
    BUFFER = enum.auto()
    CONSTANT = enum.auto()
    TENSOR = enum.auto()
    LOSS = enum.auto()
    METRIC = enum.auto()
    GRADIENT = enum.auto()


@dataclass(frozen=True)
class Slot:
    """One input or output of the joint graph: ``index`` counts within its role."""

    role: Role
    index: int


@dataclass(frozen=True)
class JointGraph:
    """Forward and backward pass as one functional graph.

    Attributes:
        module: the graph; takes ``inputs`` and returns ``outputs``.
        parameters: trained tensors by name, in the model's order; the loss depends on each.
        buffers: tensors the forward pass changes, such as batch normalisation's statistics.
        constants: everything else the graph reads: frozen parameters, fixed tables.
        batch_normalised: whether a batch of one is impossible.
        dropouts: how many dropout masks one step draws.
    """

    module: torch.fx.GraphModule
    inputs: tuple[Slot, ...]
    outputs: tuple[Slot, ...]
    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    constants: tuple[Tensor, ...]
    batch_normalised: bool
    dropouts: int


class LossModule(torch.nn.Module):
    """The model with its loss and metric: ``(tensors,) -> (loss,)`` or ``(loss, metric)``."""

    def __init__(self, model: torch.nn.Module, task: Task) -> None:
        super().__init__()
        self.model = model
        self.loss = task.loss
        self.metric = metric_function(task)
        self.input_count = len(task.inputs)

    def outputs(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """``(output, loss)`` or ``(output, loss, metric)`` for inputs and then, if any, targets."""
        output = self.model(*tensors[: self.input_count])
        targets = tensors[-1] if len(tensors) > self.input_count else tensors[0]
        loss = self.loss(output, targets)
        if self.metric is None:
            return output, loss
        return output, loss, self.metric(output, targets).detach().to(torch.float32)

    def forward(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Loss and metric, without the output."""
        return self.outputs(tensors)[1:]


def metric_function(task: Task) -> LossFunction | None:
    """The metric as a function, its name resolved."""
    return accuracy if task.metric == "accuracy" else task.metric


def trained_copy(task: Task) -> torch.nn.Module:
    """A copy of the model in which exactly the parameters the optimizer holds require gradients."""
    held = {id(parameter) for group in task.optimizer.param_groups for parameter in group["params"]}
    names = {name for name, parameter in task.model.named_parameters() if id(parameter) in held}
    if len(names) != len(held):
        raise PlanRejected(
            "The optimizer holds tensors that are not the model's; build it on model.parameters()."
        )
    model = copy.deepcopy(task.model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name in names)
        parameter.grad = None
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise PlanRejected(
            "The optimizer holds no parameter that requires a gradient; there is nothing to train."
        )
    return model


@contextmanager
def quiet_export() -> Iterator[None]:
    """Trace attention as plain operators, without the exporter's remarks on its own internals."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def batch_axis(tensors: tuple[Tensor, ...]) -> tuple[dict[int, Any], ...]:
    """``torch.export``'s description of tensors whose first axis is the batch."""
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    return tuple({0: batch} for _ in tensors)


def trace(task: Task) -> JointGraph:
    """Trace model, loss and metric in training mode, and differentiate.

    Raises:
        PlanRejected: torch cannot trace or differentiate it, or the loss is not a scalar.
    """
    model = trained_copy(task).train()
    module = LossModule(model, task)
    _check_loss(module, task)
    try:
        with quiet_export():
            program = torch.export.export(
                module, (task.tensors,), dynamic_shapes=(batch_axis(task.tensors),), strict=False
            )
            joint = _decompose_exported_program(
                program,
                cia_to_decomp={},
                python_decomp_table=torch_decompositions(),
                joint_loss_index=0,
                decompose_custom_triton_ops=False,
            )
    except Exception as error:
        raise explain(error, "trace the model") from error
    return _read_signature(joint, model)


def _check_loss(module: LossModule, task: Task) -> None:
    """Try the example batch, and freeze what the loss does not depend on: torch cannot trace that."""
    probe = copy.deepcopy(module)
    try:
        loss = probe(task.tensors)[0]
    except Exception as error:
        raise PlanRejected(
            f"The model and loss fail on the example batch: {type(error).__name__}: {error}"
        ) from error
    if loss.dim() != 0 or not loss.requires_grad:
        raise PlanRejected(
            f"The loss has shape {tuple(loss.shape)} and requires_grad={loss.requires_grad}; "
            "it must be a scalar that depends on the model's parameters."
        )
    if not torch.isfinite(loss):
        raise PlanRejected(f"The loss of the example batch is {loss.item()}; it must be finite.")
    trained = {name: parameter for name, parameter in probe.named_parameters() if parameter.requires_grad}
    gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    for name, gradient in zip(trained, gradients, strict=True):
        if gradient is None:
            module.get_parameter(name).requires_grad_(requires_grad=False)


def _read_signature(joint: ExportedProgram, model: torch.nn.Module) -> JointGraph:
    """Sort the graph's flat inputs and outputs by what they are."""
    parameters = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trained = {name: index for index, name in enumerate(parameters)}
    inputs, buffers, constants = _read_inputs(joint, trained)
    outputs = _read_outputs(joint, trained, list(buffers))
    operators = [node.target for node in joint.graph_module.graph.nodes]
    return JointGraph(
        module=joint.graph_module,
        inputs=inputs,
        outputs=outputs,
        parameters=parameters,
        buffers=buffers,
        constants=constants,
        batch_normalised=torch.ops.aten.native_batch_norm_backward.default in operators,
        dropouts=sum(map(operators.count, MASK_OPERATORS)),
    )


def _read_inputs(
    joint: ExportedProgram, trained: dict[str, int]
) -> tuple[tuple[Slot, ...], dict[str, Tensor], tuple[Tensor, ...]]:
    """What each input is, the buffers that change, and everything else."""
    changed = set(joint.graph_signature.buffers_to_mutate.values())
    buffers: dict[str, Tensor] = {}
    constants: list[Tensor] = []
    slots: list[Slot] = []
    tensors = 0
    for specification in joint.graph_signature.input_specs:
        target = specification.target or ""
        name = target.removeprefix(_MODEL_PREFIX)
        if specification.kind is InputKind.USER_INPUT:
            slots.append(Slot(Role.TENSOR, tensors))
            tensors += 1
        elif specification.kind is InputKind.PARAMETER and name in trained:
            slots.append(Slot(Role.PARAMETER, trained[name]))
        elif specification.kind is InputKind.BUFFER and target in changed:
            buffers[name] = _value(joint, target)
            slots.append(Slot(Role.BUFFER, len(buffers) - 1))
        elif specification.kind in {InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR}:
            constants.append(_value(joint, target))
            slots.append(Slot(Role.CONSTANT, len(constants) - 1))
        else:
            raise PlanRejected(
                f"The model takes an input of kind {specification.kind.name}, which plans lack."
            )
    return tuple(slots), buffers, tuple(constants)


def _read_outputs(joint: ExportedProgram, trained: dict[str, int], buffers: list[str]) -> tuple[Slot, ...]:
    """What each output is."""
    slots: list[Slot] = []
    for specification in joint.graph_signature.output_specs:
        name = (specification.target or "").removeprefix(_MODEL_PREFIX)
        if specification.kind is OutputKind.LOSS_OUTPUT:
            slots.append(Slot(Role.LOSS, 0))
        elif specification.kind is OutputKind.USER_OUTPUT:  # after the loss there is only the metric
            slots.append(Slot(Role.METRIC, 0))
        elif specification.kind is OutputKind.GRADIENT_TO_PARAMETER:
            slots.append(Slot(Role.GRADIENT, trained[name]))
        elif specification.kind is OutputKind.BUFFER_MUTATION:
            slots.append(Slot(Role.BUFFER, buffers.index(name)))
        else:
            raise PlanRejected(
                f"The model has an output of kind {specification.kind.name}, which plans lack."
            )
    return tuple(slots)


def _value(joint: ExportedProgram, target: str) -> Tensor:
    """The current value of a parameter, buffer or constant of the traced module."""
    held = joint.state_dict.get(target)
    value = joint.constants[target] if held is None else held
    assert isinstance(value, Tensor)
    return value.detach().clone()
