"""The real torch optimizer, run once on traced tensors, so that its own code becomes part of the graph."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final
from unittest import mock

import torch
from torch import Tensor

from coordinator.plan import place
from coordinator.plan.rejection import PlanRejected
from coordinator.plan.task import Task

_SHARED: Final = "step"
"""Every parameter of an optimizer counts the same steps, so the graph carries one counter."""
_NOT_HYPERPARAMETERS: Final = frozenset({"params", "lr", "initial_lr", "param_names"})
SUPPORTED_OPTIMIZERS: Final = "SGD, Adam, AdamW, Adamax, RMSprop, Adagrad or Adadelta"
"""What is tested, for the text of a rejection; others of their kind are tried and verified."""
_NOT_ZERO: Final = "has a state that does not start at zero, as it must on devices"
_UNSUPPORTED: Final[dict[type[torch.optim.Optimizer], str]] = {
    torch.optim.ASGD: _NOT_ZERO,
    torch.optim.NAdam: _NOT_ZERO,
    torch.optim.Rprop: _NOT_ZERO,
    torch.optim.RAdam: "loses too many digits in float32 where its warm-up ends",
    torch.optim.SparseAdam: "takes sparse gradients, which a graph cannot hold",
}


@dataclass(frozen=True)
class Group:
    """One parameter group: which parameters, at which multiple of the learning rate, with which settings."""

    parameters: tuple[int, ...]
    learning_rate_scale: float
    settings: dict[str, Any]


@dataclass(frozen=True)
class OptimizerRecipe:
    """What it takes to build the optimizer again around other tensors.

    Attributes:
        kind: its class.
        groups: its parameter groups, parameters by index.
        state: its tensors by name, ``<parameter>.<key>`` or ``step``, all zero at the start.
        places: for each parameter, which of those tensors is its state under which key.
    """

    kind: type[torch.optim.Optimizer]
    groups: tuple[Group, ...]
    state: dict[str, Tensor]
    places: tuple[dict[str, str], ...]

    def make(
        self, parameters: list[Tensor], learning_rate: Tensor | float, *, traceable: bool
    ) -> torch.optim.Optimizer:
        """Build the optimizer around ``parameters``.

        ``traceable`` keeps its step counter a tensor, so that its value is not baked into the graph.
        """
        groups = [
            {
                **group.settings,
                **({"capturable": traceable} if "capturable" in group.settings else {}),
                "params": [parameters[index] for index in group.parameters],
                "lr": learning_rate * group.learning_rate_scale,
            }
            for group in self.groups
        ]
        build: Any = self.kind
        made: torch.optim.Optimizer = build(groups)
        return made

    def step(
        self,
        parameters: list[Tensor],
        gradients: list[Tensor],
        state: dict[str, Tensor],
        learning_rate: Tensor,
    ) -> dict[str, Tensor]:
        """Change ``parameters`` in place by one step and return the new state. Traceable."""
        optimizer = self.make(parameters, learning_rate, traceable=True)
        for parameter, gradient, places in zip(parameters, gradients, self.places, strict=True):
            parameter.grad = gradient
            if places:
                optimizer.state[parameter] = {key: state[name].clone() for key, name in places.items()}
        with _tensor_addcdiv():
            optimizer.step()
        return {
            name: optimizer.state[parameter][key]
            for parameter, places in zip(parameters, self.places, strict=True)
            for key, name in places.items()
        }


@contextmanager
def _tensor_addcdiv() -> Iterator[None]:
    """Let ``addcdiv_`` take a tensor as its factor: RMSprop and Adagrad pass the learning rate there."""

    def addcdiv(self: Tensor, numerator: Tensor, denominator: Tensor, *, value: Tensor | float = 1) -> Tensor:
        return self.add_(value * (numerator / denominator))

    with mock.patch.object(Tensor, "addcdiv_", addcdiv):
        yield


def check_optimizer(task: Task) -> None:
    """Refuse an optimizer that no plan can contain.

    Raises:
        PlanRejected: one step of it evaluates the loss itself, or its state does not start at zero.
    """
    optimizer = task.optimizer
    name = type(optimizer).__name__
    reason = _UNSUPPORTED.get(type(optimizer))
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        reason = "evaluates the loss several times in one step, which a plan cannot"
    for setting in ("dampening", "initial_accumulator_value"):
        if any(group.get(setting) for group in optimizer.param_groups):
            reason = f"with {setting} has a state that does not start at zero; leave {setting} at 0"
    if reason is not None:
        called = "" if task.source is None else place.of_call(task.source, name)
        raise PlanRejected(f"{name} {reason}; use {SUPPORTED_OPTIMIZERS}.", called)


def read_optimizer(optimizer: torch.optim.Optimizer, names: dict[int, str]) -> OptimizerRecipe:
    """Take an optimizer apart.

    Args:
        optimizer: the task's.
        names: the trained parameters' names by ``id``, in order.

    Raises:
        PlanRejected: it cannot be built again from its parameter groups.
    """
    kind = type(optimizer)
    index = {identity: position for position, identity in enumerate(names)}
    base = float(optimizer.param_groups[0]["lr"])
    groups = tuple(
        Group(
            tuple(index[id(parameter)] for parameter in group["params"] if id(parameter) in index),
            float(group["lr"]) / base,
            _settings(group),
        )
        for group in optimizer.param_groups
    )
    bare = OptimizerRecipe(kind, tuple(group for group in groups if group.parameters), {}, ())
    parameters = [p for group in optimizer.param_groups for p in group["params"] if id(p) in index]
    parameters.sort(key=lambda parameter: index[id(parameter)])
    return _with_state(bare, parameters, list(names.values()))


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    settings = {key: value for key, value in group.items() if key not in _NOT_HYPERPARAMETERS}
    for implementation in ("foreach", "fused"):  # one plain tensor operation after another can be traced
        if implementation in settings:
            settings[implementation] = False
    return settings


def _with_state(bare: OptimizerRecipe, parameters: list[Tensor], names: list[str]) -> OptimizerRecipe:
    """Learn which state tensors the optimizer keeps from one step with zero gradients on copies."""
    copies = [parameter.detach().clone() for parameter in parameters]
    try:
        optimizer = bare.make(copies, 1.0, traceable=False)
        for parameter in copies:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    except Exception as error:
        raise PlanRejected(
            f"{bare.kind.__name__} cannot be built again from its parameter groups: "
            f"{type(error).__name__}: {error}"
        ) from error
    state: dict[str, Tensor] = {}
    places: list[dict[str, str]] = []
    for parameter, name in zip(copies, names, strict=True):
        tensors = {
            key: value for key, value in optimizer.state.get(parameter, {}).items() if torch.is_tensor(value)
        }
        places.append({key: _SHARED if key == _SHARED else f"{name}.{key}" for key in tensors})
        state.update({places[-1][key]: torch.zeros_like(value) for key, value in tensors.items()})
    return OptimizerRecipe(bare.kind, bare.groups, state, tuple(places))
