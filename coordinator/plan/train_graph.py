"""One optimizer step as one graph: forward pass, backward pass, the optimizer, new buffers."""

from dataclasses import dataclass
from typing import Any, Final

import torch
from onnx import ModelProto
from torch import Tensor

from coordinator.plan.export import to_onnx, with_outputs
from coordinator.plan.joint_graph import JointGraph, Role, batch_axis
from coordinator.plan.lowering import Lowering
from coordinator.plan.optimizer_step import OptimizerRecipe

LEARNING_RATE: Final = "learning_rate"


@dataclass(frozen=True)
class TrainGraph:
    """The graph devices get, and the same nodes with more outputs to check it by.

    Attributes:
        shipped: new state tensors ``name'``, ``loss`` and, if any, ``metric``.
        probed: in addition ``g.<parameter>`` gradients and ``mask.<i>`` dropout masks.
        outputs: names of the shipped outputs in order.
    """

    shipped: ModelProto
    probed: ModelProto
    outputs: tuple[str, ...]


class _Step(torch.nn.Module):
    """Flat tensors in, flat tensors out; torch.export turns the optimizer's in-place work into new values."""

    def __init__(self, joint: JointGraph, recipe: OptimizerRecipe) -> None:
        super().__init__()
        self.joint = joint
        self.recipe = recipe
        for index, constant in enumerate(joint.constants):
            self.register_buffer(f"constant_{index}", constant)

    def forward(
        self,
        parameters: tuple[Tensor, ...],
        buffers: tuple[Tensor, ...],
        state: tuple[Tensor, ...],
        tensors: tuple[Tensor, ...],
        learning_rate: Tensor,
    ) -> tuple[tuple[Tensor, ...], ...]:
        """``(parameters', buffers', state', (loss, metric), gradients, masks)``."""
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
            stepped = [parameter.clone() for parameter in parameters]
            old_state = dict(zip(names, state, strict=True))
            new_state = self.recipe.step(stepped, gradients, old_state, learning_rate)
        return (
            tuple(stepped),
            tuple(found[Role.BUFFER, index] for index in range(len(buffers))),
            tuple(new_state[name] for name in names),
            tuple(found[role, 0] for role in (Role.LOSS, Role.METRIC) if (role, 0) in found),
            tuple(gradient.clone() for gradient in gradients),
            tuple(lowering.dropout_masks),
        )


def export_train_graph(
    joint: JointGraph, recipe: OptimizerRecipe, tensors: tuple[Tensor, ...], tensor_names: list[str]
) -> TrainGraph:
    """Export the step.

    Args:
        joint: forward and backward pass.
        recipe: the optimizer.
        tensors: example inputs and targets.
        tensor_names: what the graph calls them.

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
    still: tuple[Any, ...] = tuple(tuple({} for _ in group) for group in groups)
    probed = to_onnx(
        _Step(joint, recipe),
        (*groups, tensors, torch.tensor(1.0)),
        (*still, batch_axis(tensors), {}),
        [*state, *tensor_names, LEARNING_RATE],
        [*outputs, *probes],
    )
    return TrainGraph(with_outputs(probed, outputs), probed, tuple(outputs))
