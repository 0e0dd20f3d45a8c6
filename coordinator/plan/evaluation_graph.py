"""The model in evaluation mode as a graph without parameters: the device injects the current ones.

The parameters are placeholders for external data, which onnxruntime replaces before it optimizes the graph,
so it can fold and pack them as if they had been there. Exporting a module with its parameters would not do:
the exporter folds batch normalisation into the layer before, and injecting the unfolded parameters then gives
wrong outputs without any error.
"""

from dataclasses import dataclass
from typing import Final

import torch
from onnx import ModelProto, TensorProto
from torch import Tensor
from torch.func import functional_call

from coordinator.plan.export import to_onnx
from coordinator.plan.joint_graph import JointGraph, batch_axis
from coordinator.plan.loss_module import LossModule, trained_copy
from coordinator.plan.shared_parameters import untied
from coordinator.plan.task import Task

OUTPUT: Final = "out"


@dataclass(frozen=True)
class EvaluationGraph:
    """The graph, and which parameters and buffers to inject: those it uses; onnxruntime refuses others."""

    model: ModelProto
    injected: tuple[str, ...]


class _Evaluation(torch.nn.Module):
    """``(parameters, buffers, tensors) -> (output, loss, metric)`` with everything else constant.

    Class weights are constant too: in evaluation each example counts the same.
    """

    def __init__(self, module: LossModule, joint: JointGraph, class_weights: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.module = module
        self.names = [*joint.parameters, *joint.buffers]
        self.weighted = bool(class_weights)
        if class_weights:
            self.register_buffer("class_weights", class_weights[0])

    def forward(
        self, parameters: tuple[Tensor, ...], buffers: tuple[Tensor, ...], tensors: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """Run the model with these parameters and buffers in place of its own."""
        values = {
            f"inner.model.{name}": value
            for name, value in zip(self.names, (*parameters, *buffers), strict=True)
        }
        arguments = (*tensors, self.get_buffer("class_weights")) if self.weighted else tensors
        results: tuple[Tensor, ...] = functional_call(_Outputs(self.module), values, (arguments,))
        return results


class _Outputs(torch.nn.Module):
    """Calls :meth:`LossModule.outputs`; ``functional_call`` reaches only ``forward``."""

    def __init__(self, inner: LossModule) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """``(output, loss)`` or ``(output, loss, metric)``."""
        return self.inner.outputs(tensors)


def export_evaluation_graph(task: Task, joint: JointGraph, tensor_names: list[str]) -> EvaluationGraph:
    """Export the model in evaluation mode.

    Raises:
        PlanRejected: see :func:`coordinator.plan.export.to_onnx`.
    """
    model = untied(trained_copy(task)).eval()
    state = {
        **{f"p.{name}": value for name, value in joint.parameters.items()},
        **{f"b.{name}": value for name, value in joint.buffers.items()},
    }
    parameters, buffers = tuple(joint.parameters.values()), tuple(joint.buffers.values())
    metric = ["metric"] if task.metric else []
    graph = to_onnx(
        _Evaluation(LossModule(model, task), joint, task.loss_arguments[len(task.tensors) :]),
        (parameters, buffers, task.tensors),
        (tuple({} for _ in parameters), tuple({} for _ in buffers), batch_axis(task)[: len(task.tensors)]),
        [*state, *tensor_names],
        [OUTPUT, "loss", *metric],
        decompose=True,
    )
    return _with_placeholders(graph, state)


def _with_placeholders(model: ModelProto, state: dict[str, Tensor]) -> EvaluationGraph:
    """Turn the parameter inputs into external initializers whose content is never in a file."""
    graph = model.graph
    used = {name for node in graph.node for name in node.input}
    injected: list[str] = []
    for value in [value for value in graph.input if value.name in state]:
        graph.input.remove(value)
        if value.name not in used:
            continue
        tensor = state[value.name]
        injected.append(value.name)
        graph.initializer.append(
            TensorProto(
                name=value.name,
                data_type=value.type.tensor_type.elem_type,
                data_location=TensorProto.EXTERNAL,
                dims=tensor.shape,
            )
        )
        for key, text in (
            ("location", "parameters"),
            ("offset", "0"),
            ("length", str(tensor.numel() * tensor.element_size())),
        ):
            graph.initializer[-1].external_data.add(key=key, value=text)
    return EvaluationGraph(model, tuple(injected))
