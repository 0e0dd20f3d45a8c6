"""What a model owner writes: a torch module, its loss, an optimizer and one example batch."""

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from coordinator.plan import place
from coordinator.plan.rejection import PlanRejected
from fedtide.wire.plan import Limits
from fedtide.wire.training import Training

LossFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""``(model output, targets) -> scalar``: the mean over the batch's examples."""
WeightedLossFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""``(model output, targets, class weights) -> scalar``; the weights are float32, one for each class."""


@dataclass(frozen=True)
class Task:
    """A model and how to train it.

    Attributes:
        model: any module that ``torch.export`` can trace; it is copied, never changed.
        loss: ``(output, targets) -> scalar``, the mean over the batch; without targets it gets the first
            input in their place. With ``class_weights`` it is called with them as a third argument.
        optimizer: built on ``model.parameters()``; parameters it does not hold stay as they are.
        example: ``(inputs, targets)`` of one batch, two rows or more; inputs is a tensor or a tuple of
            tensors, targets None for a model that learns to give its own input back.
        name: for people.
        metric: ``"accuracy"``, or a function as ``loss`` is, or None.
        training: how devices train; None: one epoch in batches of 32 at the optimizer's own learning rate.
        proximal: build FedProx's proximal term into the step (Li et al., MLSys 2020, equation 2): a pull
            towards the base version, as strong as ``Training.proximal`` says at run time.
        clip_norm: clip the gradients of a step to this norm over all parameters, as
            ``torch.nn.utils.clip_grad_norm_`` does, after the proximal term; None: no clipping.
        class_weights: the number of classes, for a loss that weighs them; None: no weights. Devices give
            the weights, see ``Training.class_weights``; in evaluation each is one.
        buffers: ``averaged``: float buffers, batch normalisation's statistics, are aggregated like
            parameters; ``local``: each device keeps its own (FedBN).
        limits: what the plan may take on a device.
        source: the file the task was loaded from, for the text of a rejection.
    """

    model: torch.nn.Module
    loss: LossFunction | WeightedLossFunction
    optimizer: torch.optim.Optimizer
    example: tuple[torch.Tensor | tuple[torch.Tensor, ...], torch.Tensor | None]
    name: str
    metric: Literal["accuracy"] | LossFunction | None = None
    training: Training | None = None
    proximal: bool = False
    clip_norm: float | None = None
    class_weights: int | None = None
    buffers: Literal["averaged", "local"] = "averaged"
    limits: Limits = Limits()  # noqa: RUF009  (frozen)
    source: Path | None = None

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
    def loss_arguments(self) -> tuple[torch.Tensor, ...]:
        """The example's tensors, then equal class weights if the loss takes any."""
        return self.tensors if self.class_weights is None else (*self.tensors, torch.ones(self.class_weights))

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
        PlanRejected: the example, the model, the loss or an option cannot make a plan.
    """
    _check_example(task)
    _check_parameters(task.model)
    if isinstance(task.loss, torch.nn.Module) and any(p.requires_grad for p in task.loss.parameters()):
        raise PlanRejected("The loss has parameters of its own to train; make them part of the model.")
    if task.learning_rate <= 0:
        raise PlanRejected(f"The optimizer's learning rate is {task.learning_rate}; it must be above zero.")
    _check_options(task)


def _check_example(task: Task) -> None:
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


def _check_parameters(model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32 or parameter.device.type != "cpu":
            raise PlanRejected(
                f"Parameter {name} is {parameter.dtype} on {parameter.device}; "
                "plans need torch.float32 on the cpu."
            )
    names: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        first = names.setdefault(id(module), name)
        if first != name and any(True for _ in (*module.parameters(), *module.buffers())):
            raise PlanRejected(
                f"{first} and {name} are one module under two names; give it one name and call it twice."
            )


def _check_options(task: Task) -> None:
    if task.clip_norm is not None and not 0 < task.clip_norm < float("inf"):
        raise PlanRejected(f"clip_norm is {task.clip_norm}; it must be a norm above zero, or None.")
    if task.class_weights is not None and task.class_weights < 2:
        raise PlanRejected(f"class_weights is {task.class_weights}; it is the number of classes, 2 or more.")
    training = task.device_training
    if training.proximal and not task.proximal:
        raise PlanRejected(
            f"Training.proximal is {training.proximal}, but the plan has no proximal term; "
            "write Task(..., proximal=True)."
        )
    if training.class_weights == "balanced" and task.class_weights is None:
        raise PlanRejected(
            "Training.class_weights is 'balanced', but the loss takes no weights; write Task(..., "
            "class_weights=<number of classes>) and a loss that takes them as its third argument."
        )


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
    except PlanRejected:
        raise
    except SyntaxError as error:
        raise PlanRejected(
            f"{error.msg} (SyntaxError); correct the file.", place.of_line(str(path), error.lineno or 0)
        ) from error
    except Exception as error:
        raise PlanRejected(
            f"{path} failed with {type(error).__name__}: {error}", place.of_error(error)
        ) from error
    if not isinstance(task, Task):
        raise PlanRejected(
            f"{path} must define `task`, a coordinator.plan.task.Task or a function that returns one; "
            f"it is {type(task).__name__}."
        )
    return replace(task, source=path)
