"""One optimizer step as one graph: forward pass, backward pass, the optimizer, new buffers.

Between the passes and the optimizer, if the task wants them: FedProx's proximal term, then gradient clipping.
"""

from dataclasses import dataclass
from typing import Any, Final

import torch
from onnx import ModelProto
from torch import Tensor

from coordinator.plan.export import to_onnx, with_outputs
from coordinator.plan.joint_graph import JointGraph, Role, batch_axis
from coordinator.plan.lowering import Lowering
from coordinator.plan.optimizer_step import OptimizerRecipe
from coordinator.plan.task import Task

LEARNING_RATE: Final = "learning_rate"
PROXIMAL: Final = "proximal"
CLASS_WEIGHTS: Final = "class_weights"
_CLIP_EPSILON: Final = 1e-6
"""Added to the norm by ``torch.nn.utils.clip_grad_norm_``, so that a zero gradient divides by something."""


@dataclass(frozen=True)
class TrainGraph:
    """The graph devices get, and the same nodes with more outputs to check it by.

    Attributes:
        shipped: new state tensors ``name'``, ``loss`` and, if any, ``metric``.
        probed: in addition ``g.<parameter>`` gradients of the task's loss, before proximal term and clipping,
            and ``mask.<i>`` dropout masks.
        outputs: names of the shipped outputs in order.
    """

    shipped: ModelProto
    probed: ModelProto
    outputs: tuple[str, ...]


class _Step(torch.nn.Module):
    """Flat tensors in, flat tensors out; torch.export turns the optimizer's in-place work into new values."""

    def __init__(self, joint: JointGraph, recipe: OptimizerRecipe, clip_norm: float | None) -> None:
        super().__init__()
        self.joint = joint
        self.recipe = recipe
        self.clip_norm = clip_norm
        for index, constant in enumerate(joint.constants.values()):
            self.register_buffer(f"constant_{index}", constant)

    def forward(  # noqa: PLR0917  (torch.export hands arguments over by position)
        self,
        parameters: tuple[Tensor, ...],
        buffers: tuple[Tensor, ...],
        state: tuple[Tensor, ...],
        tensors: tuple[Tensor, ...],
        learning_rate: Tensor,
        proximal: tuple[Tensor, ...],
    ) -> tuple[tuple[Tensor, ...], ...]:
        """``(parameters', buffers', state', (loss, metric), gradients, masks)``.

        ``proximal``: μ, then an anchor for each parameter; empty without a proximal term.
        """
        sources = {
            Role.PARAMETER: parameters,
            Role.BUFFER: buffers,
            Role.CONSTANT: [self.get_buffer(f"constant_{i}") for i in range(len(self.joint.constants))],
            Role.TENSOR: tensors,
        }
        lowering = Lowering(self.joint.module)
        results = lowering.run(*[sources[slot.role][slot.index] for slot in self.joint.inputs])
        found: dict[tuple[Role, int], Tensor] = {
            (slot.role, slot.index): result for slot, result in zip(self.joint.outputs, results, strict=True)
        }
        gradients = [found[Role.GRADIENT, index] for index in range(len(parameters))]
        names = list(self.recipe.state)
        with torch.no_grad():
            followed = gradients
            if proximal:
                mu, *anchors = proximal
                followed = [
                    gradient + mu * (parameter - anchor)
                    for gradient, parameter, anchor in zip(gradients, parameters, anchors, strict=True)
                ]
            if self.clip_norm is not None:
                followed = _clipped(followed, self.clip_norm)
            stepped = [parameter.clone() for parameter in parameters]
            old_state = dict(zip(names, state, strict=True))
            new_state = self.recipe.step(stepped, followed, old_state, learning_rate)
        return (
            tuple(stepped),
            tuple(found.get((Role.BUFFER, index), old.clone()) for index, old in enumerate(buffers)),
            tuple(new_state[name] for name in names),
            tuple(found[role, 0] for role in (Role.LOSS, Role.METRIC) if (role, 0) in found),
            tuple(gradient.clone() for gradient in gradients),
            tuple(lowering.dropout_masks),
        )


def _clipped(gradients: list[Tensor], norm: float) -> list[Tensor]:
    """The gradients scaled down to a norm over all of them, by ``torch.nn.utils.clip_grad_norm_``'s formula.

    Pascanu, Mikolov, Bengio, On the difficulty of training recurrent neural networks, ICML 2013, algorithm 1.
    """
    squares = torch.stack([(gradient * gradient).sum() for gradient in gradients])
    scale = (norm / (squares.sum().sqrt() + _CLIP_EPSILON)).clamp(max=1.0)
    return [gradient * scale for gradient in gradients]


def export_train_graph(
    task: Task, joint: JointGraph, recipe: OptimizerRecipe, tensor_names: list[str]
) -> TrainGraph:
    """Export the step.

    Args:
        task: says what else is in a step.
        joint: forward and backward pass.
        recipe: the optimizer.
        tensor_names: what the graph calls the loss's arguments.

    Raises:
        PlanRejected: see :func:`coordinator.plan.export.to_onnx`.
    """
    state = [
        *(f"p.{name}" for name in joint.parameters),
        *(f"b.{name}" for name in joint.buffers),
        *(f"o.{name}" for name in recipe.state),
    ]
    has_metric = any(slot.role is Role.METRIC for slot in joint.outputs)
    outputs = [*(f"{name}'" for name in state), "loss", *(["metric"] if has_metric else [])]
    probes = [*(f"g.{name}" for name in joint.parameters), *(f"mask.{i}" for i in range(joint.dropouts))]
    groups = (tuple(joint.parameters.values()), tuple(joint.buffers.values()), tuple(recipe.state.values()))
    proximal = (torch.tensor(1.0), *map(torch.zeros_like, groups[0])) if task.proximal else ()
    still: tuple[Any, ...] = tuple(tuple({} for _ in group) for group in groups)
    probed = to_onnx(
        _Step(joint, recipe, task.clip_norm),
        (*groups, task.loss_arguments, torch.tensor(1.0), proximal),
        (*still, batch_axis(task), {}, tuple({} for _ in proximal)),
        [*state, *tensor_names, LEARNING_RATE, *proximal_inputs(task, joint)],
        [*outputs, *probes],
    )
    return TrainGraph(with_outputs(probed, outputs), probed, tuple(outputs))


def proximal_inputs(task: Task, joint: JointGraph) -> list[str]:
    """The inputs of the proximal term: μ, then where local training started, by parameter."""
    return [PROXIMAL, *(f"a.{name}" for name in joint.parameters)] if task.proximal else []
