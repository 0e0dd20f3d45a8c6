"""The model together with its loss, as it is traced and as it is compared with."""

import copy

import torch
from torch import Tensor

from coordinator.plan.rejection import PlanRejected
from coordinator.plan.task import LossFunction, Task, accuracy


class LossModule(torch.nn.Module):
    """The model with its loss and metric: ``(tensors,) -> (loss,)`` or ``(loss, metric)``.

    ``tensors`` are :attr:`Task.loss_arguments`: inputs, then targets if there are any, then class weights if
    the loss takes any.
    """

    def __init__(self, model: torch.nn.Module, task: Task) -> None:
        super().__init__()
        self.model = model
        self.loss = task.loss
        self.metric = metric_function(task)
        self.input_count = len(task.inputs)
        self.batched_count = len(task.tensors)

    def outputs(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """``(output, loss)`` or ``(output, loss, metric)``."""
        batched, class_weights = tensors[: self.batched_count], tensors[self.batched_count :]
        output = self.model(*batched[: self.input_count])
        targets = batched[-1] if len(batched) > self.input_count else batched[0]
        loss = self.loss(output, targets, *class_weights)
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
