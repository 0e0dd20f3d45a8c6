"""The task's model and loss in torch, for plans to be compared with."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from coordinator.plan import place
from coordinator.plan.loss_module import LossModule, trained_copy
from coordinator.plan.rejection import PlanRejected
from coordinator.plan.task import Task

Named = dict[str, Tensor]


@dataclass(frozen=True)
class Outcome:
    """What torch computes at one step: the loss, gradients by parameter, buffers after the forward pass."""

    loss: float
    gradients: Named
    buffers: Named


class Reference:
    """The task's model and loss in one precision, float32 or float64."""

    def __init__(self, task: Task, precision: torch.dtype) -> None:
        module = LossModule(trained_copy(task).train(), task)
        self._module = copy.deepcopy(module).to(precision)  # deep, for a loss that is a module with constants
        self._precision = precision

    def step(
        self, parameters: Named, buffers: Named, tensors: tuple[Tensor, ...], masks: list[Tensor]
    ) -> Outcome:
        """Loss, gradients and new buffers at these parameters, with these dropout masks.

        Raises:
            PlanRejected: model or loss do not run in this precision.
        """
        held = {name: self._cast(value).requires_grad_() for name, value in parameters.items()}
        moved = {name: self._cast(value) for name, value in buffers.items()}
        state = {f"model.{name}": value for name, value in (held | moved).items()}
        try:
            with _ReplayedMasks(masks):
                loss = functional_call(self._module, state, (tuple(map(self._cast, tensors)),))[0]
            found = torch.autograd.grad(loss, list(held.values()))
        except Exception as error:
            raise PlanRejected(
                f"Model and loss do not run in torch as {self._precision}, which the check of the gradients "
                f"needs ({type(error).__name__}: {error}); keep constants in buffers, or cast them to the "
                "output's dtype.",
                place.of_error(error),
            ) from error
        return Outcome(float(loss.detach()), dict(zip(held, found, strict=True)), moved)

    def evaluate(self, parameters: Named, buffers: Named, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Output, loss and, if any, metric in evaluation mode."""
        module = copy.deepcopy(self._module).eval()
        named = {**dict(module.model.named_parameters()), **dict(module.model.named_buffers())}
        with torch.no_grad():
            for name, value in {**parameters, **buffers}.items():
                named[name].copy_(value)
            return module.outputs(tuple(map(self._cast, tensors)))

    def _cast(self, tensor: Tensor) -> Tensor:
        """A copy, in this precision if it is a float."""
        return tensor.detach().to(self._precision if tensor.is_floating_point() else tensor.dtype, copy=True)


class _ReplayedMasks(TorchDispatchMode):
    """Gives torch's dropout layers the masks that the plan drew, in the order it drew them."""

    def __init__(self, masks: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._masks = iter(masks)

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace the draw of a mask; run everything else."""
        if func is torch.ops.aten.bernoulli_.float:
            return args[0].copy_(next(self._masks))
        return func(*args, **(kwargs or {}))
