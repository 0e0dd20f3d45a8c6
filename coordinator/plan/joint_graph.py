"""From a model and its loss to one aten graph that computes loss, gradients and new buffers."""

import contextlib
import copy
import enum
import io
import logging
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch._dynamo
from torch import Tensor
from torch.export.exported_program import (
    ExportedProgram,
    _decompose_exported_program,  # no public name yet; tests/plan pins its signature
)
from torch.export.graph_signature import InputKind, OutputKind
from torch.nn.attention import SDPBackend, sdpa_kernel

from coordinator.plan import place
from coordinator.plan.loss_module import LossModule, trained_copy
from coordinator.plan.lowering import MASK_OPERATORS, torch_decompositions
from coordinator.plan.recurrent import RECURRENT_GRADIENTS, WholeRecurrentLayers
from coordinator.plan.rejection import PlanRejected, PlanWarning, explain
from coordinator.plan.shared_parameters import untied
from coordinator.plan.task import Task

MAX_BATCH: Final = 65_536
MAX_CONSTANT_BYTES: Final = 256 << 10
"""What frozen parameters and fixed tables may take together as part of the graphs. Beyond that they travel
with the model: the train and the evaluation graph hold them each, and a plan has a megabyte for both."""
_SMALL_BYTES: Final = 4096
"""Constants up to this size stay in the graphs: many small ones are what layers make for themselves."""
MANY_OPERATORS: Final = 1500
"""A loop over 24 time steps with an LSTM's cell has more, an nn.LSTM from 240 time steps on."""
OPERATORS_PER_STEP: Final = 6
SECONDS_PER_OPERATOR: Final = 0.025
"""CPU seconds of building, measured on x86 with loops over 8 time steps and an nn.LSTM over 256."""
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
        buffers: tensors the forward pass changes, such as batch normalisation's statistics, and frozen ones
            too large for the graphs, which have no output.
        constants: everything else the graph reads, by name: frozen parameters, fixed tables.
        batch_normalised: whether a batch of one is impossible.
        dropouts: how many dropout masks one step draws.
    """

    module: torch.fx.GraphModule
    inputs: tuple[Slot, ...]
    outputs: tuple[Slot, ...]
    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    constants: dict[str, Tensor]
    batch_normalised: bool
    dropouts: int


@contextmanager
def quiet_export() -> Iterator[None]:
    """Trace attention as plain operators and recurrent layers whole, without the exporter's own remarks."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.fx.experimental.symbolic_shapes")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            sdpa_kernel(SDPBackend.MATH),
            WholeRecurrentLayers(),
            # With a symbolic batch, keeping what an operator gave costs more than running it again.
            torch._dynamo.config.patch(fake_tensor_cache_enabled=False),  # noqa: SLF001  (no public name)
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def batch_axis(task: Task) -> tuple[dict[int, Any], ...]:
    """``torch.export``'s description of the loss's arguments: all but class weights have a batch axis."""
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    batched = len(task.tensors)
    return tuple({0: batch} if index < batched else {} for index, _ in enumerate(task.loss_arguments))


def trace(task: Task) -> JointGraph:
    """Trace model, loss and metric in training mode, and differentiate.

    Raises:
        PlanRejected: torch cannot trace or differentiate it, or the loss is not a scalar.
    """
    model = untied(trained_copy(task)).train()
    module = LossModule(model, task)
    _check_loss(module, task)
    try:
        # torch shows its own view of what it cannot trace; the rejection says it in the owner's terms.
        with quiet_export(), contextlib.redirect_stderr(io.StringIO()):
            program = torch.export.export(
                module, (task.loss_arguments,), dynamic_shapes=(batch_axis(task),), strict=False
            )
            joint = _decompose_exported_program(
                program,
                cia_to_decomp={},
                python_decomp_table=torch_decompositions(),
                joint_loss_index=0,
                decompose_custom_triton_ops=False,
            )
    except Exception as error:
        rejected = explain(error, "trace the model")
        raise rejected.at(rejected.place or _batch_place(error, module, task)) from error
    _warn_of_a_long_export(joint)
    return _read_signature(joint, model)


def _check_loss(module: LossModule, task: Task) -> None:
    """Try the example batch, and freeze what the loss does not depend on: torch cannot trace that."""
    probe = copy.deepcopy(module)
    try:
        loss = probe(task.loss_arguments)[0]
    except Exception as error:
        raise PlanRejected(
            f"The model and loss fail on the example batch: {type(error).__name__}: {error}",
            place.of_error(error),
        ) from error
    if not isinstance(loss, Tensor) or loss.dim() != 0 or not loss.requires_grad:
        found = (
            f"shape {tuple(loss.shape)} and requires_grad={loss.requires_grad}"
            if isinstance(loss, Tensor)
            else f"type {type(loss).__name__}"
        )
        raise PlanRejected(
            f"The loss has {found}; it must be a scalar tensor that depends on the model's parameters.",
            place.of_function(task.loss),
        )
    if not torch.isfinite(loss):
        raise PlanRejected(f"The loss of the example batch is {loss.item()}; it must be finite.")
    trained = {name: parameter for name, parameter in probe.named_parameters() if parameter.requires_grad}
    gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    for name, gradient in zip(trained, gradients, strict=True):
        if gradient is None:
            module.get_parameter(name).requires_grad_(requires_grad=False)
        elif gradient.is_sparse:
            raise PlanRejected(
                f"Parameter {name.removeprefix(_MODEL_PREFIX)} has sparse gradients, which a graph cannot "
                "hold; write nn.Embedding(..., sparse=False)."
            )


def _batch_place(error: BaseException, module: LossModule, task: Task) -> str:
    """Where the batch size is fixed: where torch noted it, or where a larger batch fails."""
    for cause in place.causes(error):
        for frame, _ in traceback.walk_tb(cause.__traceback__):
            # Not public, and not needed: where torch has no such attribute, the larger batch has to do.
            notes = getattr(frame.f_locals.get("self"), "replacements_slocs", {})
            for note in notes.values():
                path, line = note.framework_loc.filename, note.framework_loc.lineno
                if place.is_own(path):
                    return place.of_line(path, line)
    rows = len(task.tensors[0])
    one_more = torch.arange(rows + 1) % rows
    larger = (*(tensor[one_more] for tensor in task.tensors), *task.loss_arguments[len(task.tensors) :])
    try:
        copy.deepcopy(module)(larger)
    except Exception as failure:  # noqa: BLE001  (whatever fails at another size is what fixes it)
        return place.of_error(failure)
    return ""


def _warn_of_a_long_export(joint: ExportedProgram) -> None:
    count = sum(map(_operators_of, joint.graph.nodes))
    if count > MANY_OPERATORS:
        warnings.warn(
            f"The model has {count:,} operators to export, so building its plan takes about "
            f"{count * SECONDS_PER_OPERATOR:.0f} CPU seconds. Each time step counts: {OPERATORS_PER_STEP} "
            "operators in an nn.LSTM or nn.GRU, 25 to 75 in an nn.RNN or a loop over cells, none in an "
            "nn.Conv1d.",
            PlanWarning,
            stacklevel=3,
        )


def _operators_of(node: torch.fx.Node) -> int:
    """How many ordinary operators take as long to export; a recurrent layer counts by its time steps."""
    if node.target in RECURRENT_GRADIENTS:
        return OPERATORS_PER_STEP * int(node.meta["val"][0].shape[0])
    return int(node.op == "call_function")


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
) -> tuple[tuple[Slot, ...], dict[str, Tensor], dict[str, Tensor]]:
    """What each input is, the buffers, and the constants."""
    changed = {*joint.graph_signature.buffers_to_mutate.values(), *_too_large_for_graphs(joint, trained)}
    buffers: dict[str, Tensor] = {}
    constants: dict[str, Tensor] = {}
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
        elif specification.kind in {InputKind.PARAMETER, InputKind.BUFFER} and target in changed:
            buffers[name] = _value(joint, target)
            slots.append(Slot(Role.BUFFER, len(buffers) - 1))
        elif specification.kind in {InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR}:
            constants[name] = _value(joint, target)
            slots.append(Slot(Role.CONSTANT, len(constants) - 1))
        else:
            raise PlanRejected(
                f"The model takes an input of kind {specification.kind.name}, which plans lack."
            )
    return tuple(slots), buffers, constants


def _too_large_for_graphs(joint: ExportedProgram, trained: dict[str, int]) -> set[str]:
    """Frozen parameters and fixed buffers that must travel with the model, as buffers that never change."""
    used = {node.name for node in joint.graph.nodes if node.op == "placeholder" and node.users}
    changed = set(joint.graph_signature.buffers_to_mutate.values())
    fixed = {
        target: _value(joint, target)
        for specification in joint.graph_signature.input_specs
        if specification.kind in {InputKind.PARAMETER, InputKind.BUFFER}
        and (target := specification.target or "") not in changed
        and target.removeprefix(_MODEL_PREFIX) not in trained
        and target.startswith(_MODEL_PREFIX)
        and specification.arg.name in used
    }
    if sum(value.nbytes for value in fixed.values()) <= MAX_CONSTANT_BYTES:
        return set()
    return {name for name, v in fixed.items() if v.dtype == torch.float32 and v.nbytes > _SMALL_BYTES}


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
