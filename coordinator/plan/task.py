"""What a model owner writes: a torch module, its loss, an optimizer and one example batch."""

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from coordinator.plan.rejection import PlanRejected
from fedtide.wire.training import Training

LossFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""``(model output, targets) -> scalar``: the mean over the batch's examples."""


@dataclass(frozen=True)
class Task:
    """A model and how to train it.

    Attributes:
        model: any module that ``torch.export`` can trace; it is copied, never changed.
        loss: ``(output, targets) -> scalar``, the mean over the batch; without targets it gets the first
            input in their place.
        optimizer: built on ``model.parameters()``; parameters it does not hold stay as they are.
        example: ``(inputs, targets)`` of one batch, two rows or more; inputs is a tensor or a tuple of
            tensors, targets None for a model that learns to give its own input back.
        name: for people.
        metric: ``"accuracy"``, or a function as ``loss`` is, or None.
        training: how devices train; None: one epoch in batches of 32 at the optimizer's own learning rate.
    """

    model: torch.nn.Module
    loss: LossFunction
    optimizer: torch.optim.Optimizer
    example: tuple[torch.Tensor | tuple[torch.Tensor, ...], torch.Tensor | None]
    name: str
    metric: Literal["accuracy"] | LossFunction | None = None
    training: Training | None = None

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        """The example's inputs, always as a tuple."""
        inputs = self.example[0]
        return inputs if isinstance(inputs, tuple) else (inputs,)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The example's inputs, then its targets if it has any."""
        targets = self.example[1]
        return self.inputs if targets is None else (*self.inputs, targets)

    @property
    def learning_rate(self) -> float:
        """The learning rate of the optimizer's first parameter group."""
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def device_training(self) -> Training:
        """How devices train, with the default filled in."""
        return self.training or Training(learning_rate=self.learning_rate)


def accuracy(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The share of predictions whose largest logit, over axis 1, is the target class."""
    return (output.argmax(1) == targets).to(torch.float32).mean()


def check_task(task: Task) -> None:
    """Refuse what can be seen without tracing.

    Raises:
        PlanRejected: the example, the model or the optimizer cannot make a plan.
    """
    for position, tensor in enumerate(task.tensors):
        if tensor.dim() == 0 or len(tensor) < 2:
            raise PlanRejected(
                f"Tensor {position} of the example has shape {tuple(tensor.shape)}; "
                "its first axis must be the batch, with at least 2 rows."
            )
        if len(tensor) != len(task.tensors[0]):
            raise PlanRejected(
                f"Tensor {position} of the example has {len(tensor)} rows and tensor 0 has "
                f"{len(task.tensors[0])}; one batch has as many of each."
            )
    for name, parameter in task.model.named_parameters():
        if parameter.dtype != torch.float32 or parameter.device.type != "cpu":
            raise PlanRejected(
                f"Parameter {name} is {parameter.dtype} on {parameter.device}; "
                "plans need torch.float32 on the cpu."
            )
    if isinstance(task.loss, torch.nn.Module) and any(p.requires_grad for p in task.loss.parameters()):
        raise PlanRejected("The loss has parameters of its own to train; make them part of the model.")
    names: dict[int, str] = {}
    for name, parameter in task.model.named_parameters(remove_duplicate=False):
        if (first := names.setdefault(id(parameter), name)) != name:
            raise PlanRejected(f"{first} and {name} are one parameter; plans cannot train shared parameters.")
    if task.learning_rate <= 0:
        raise PlanRejected(f"The optimizer's learning rate is {task.learning_rate}; it must be above zero.")


def load_task(path: Path) -> Task:
    """Run a task file and take its module-level ``task``: a :class:`Task`, or a function that returns one.

    The file runs with all rights of this process; load only your own.

    Raises:
        PlanRejected: no such file, the file fails, or it has no ``task``.
    """
    if not path.is_file():
        raise PlanRejected(f"There is no task file {path}.")
    specification = importlib.util.spec_from_file_location(f"fedtide_task_{path.stem}", path)
    if specification is None or specification.loader is None:
        raise PlanRejected(f"{path} is not a Python file; its name must end in .py.")
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # torch looks a model's class up by its module's name
    try:
        specification.loader.exec_module(module)
        found = getattr(module, "task", None)
        task = found() if callable(found) else found
    except Exception as error:
        raise PlanRejected(f"{path} failed with {type(error).__name__}: {error}") from error
    if not isinstance(task, Task):
        raise PlanRejected(
            f"{path} must define `task`, a coordinator.plan.task.Task or a function that returns one; "
            f"it is {type(task).__name__}."
        )
    return task
