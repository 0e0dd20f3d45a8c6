"""``nn.LSTM`` and ``nn.GRU`` as one operator each, where torch would trace one time step after the other.

Torch unrolls a recurrent layer into some 55 nodes per time step, which take minutes to export and run slower
than its own kernels. Here each layer and direction stays one operator through tracing and differentiation;
:mod:`coordinator.plan.recurrent_graph` writes it, and its gradient, with the operators of ONNX. The operators
are only ever traced, so they have shapes and a gradient but no values.

Layers, directions and the dropout between layers are composed here as in torch's documentation of ``nn.LSTM``
and ``nn.GRU``, whose names are used.
"""
# ruff: noqa: FBT001, PLR0917  (a layer has its torch function's arguments in that function's order)

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.functional import dropout as drop
from torch.overrides import TorchFunctionMode

from coordinator.plan.rejection import PlanRejected

_LAYER: Final = "Tensor x, Tensor weight_ih, Tensor weight_hh, Tensor bias_ih, Tensor bias_hh"
"""``x`` has shape (time steps, batch, features), the rest torch's shapes of a layer without projection."""

torch.library.define("fedtide::lstm", f"({_LAYER}, Tensor h_0, Tensor c_0) -> (Tensor, Tensor, Tensor)")
torch.library.define(
    "fedtide::lstm_backward",
    f"(Tensor? d_y, Tensor? d_h_n, Tensor? d_c_n, Tensor y, {_LAYER}, Tensor h_0, Tensor c_0)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define("fedtide::gru", f"({_LAYER}, Tensor h_0) -> (Tensor, Tensor)")
torch.library.define(
    "fedtide::gru_backward",
    f"(Tensor? d_y, Tensor? d_h_n, Tensor y, {_LAYER}, Tensor h_0)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
operators: Final = torch.ops.fedtide
RECURRENT_GRADIENTS: Final = (operators.lstm_backward.default, operators.gru_backward.default)


def _outputs(x: Tensor, *layer: Tensor) -> tuple[Tensor, ...]:
    """Without values: ``y`` of all time steps, and the states after the last, ``h_n`` and perhaps ``c_n``."""
    states = layer[4:]
    return x.new_empty((*x.shape[:2], states[0].shape[1])), *(x.new_empty(state.shape) for state in states)


def _lstm_gradients(_d_y: Any, _d_h_n: Any, _d_c_n: Any, _y: Tensor, *layer: Tensor) -> tuple[Tensor, ...]:
    """Without values: one gradient for each of x, weights, one bias (the other's is equal), and states."""
    return tuple(tensor.new_empty(tensor.shape) for tensor in (*layer[:4], *layer[5:]))


def _gru_gradients(_d_y: Any, _d_h_n: Any, _y: Tensor, *layer: Tensor) -> tuple[Tensor, ...]:
    """Without values: one gradient for each of x, weights, biases and state."""
    return tuple(tensor.new_empty(tensor.shape) for tensor in layer)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # None, not zeros, where the loss does not depend on an output
    ctx.save_for_backward(output[0], *inputs)


def _differentiate_lstm(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor, ...]:
    d_y, d_h_n, d_c_n = gradients
    if d_y is None and d_h_n is None:  # the loss depends on the last cell state alone
        d_h_n = torch.zeros_like(ctx.saved_tensors[-2])
    d_x, d_weight_ih, d_weight_hh, d_bias, d_h_0, d_c_0 = operators.lstm_backward(
        d_y, d_h_n, d_c_n, *ctx.saved_tensors
    )
    # A copy: two outputs of the joint graph that are one tensor could not be told apart by name.
    return d_x, d_weight_ih, d_weight_hh, d_bias, d_bias.clone(), d_h_0, d_c_0


def _differentiate_gru(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor, ...]:
    results: tuple[Tensor, ...] = operators.gru_backward(*gradients, *ctx.saved_tensors)
    return results


for _name, _shapes, _gradient_shapes, _differentiate in (
    ("lstm", _outputs, _lstm_gradients, _differentiate_lstm),
    ("gru", _outputs, _gru_gradients, _differentiate_gru),
):
    torch.library.register_fake(f"fedtide::{_name}", _shapes)
    torch.library.register_fake(f"fedtide::{_name}_backward", _gradient_shapes)
    torch.library.register_autograd(f"fedtide::{_name}", _differentiate, setup_context=_keep)


def _lstm(
    x: Tensor,
    states: Sequence[Tensor],
    parameters: Sequence[Tensor],
    biased: bool,
    layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``torch.lstm``: ``(output, h_n, c_n)``."""
    if not isinstance(states, Tensor) and states[0].shape[-1] != states[1].shape[-1]:
        raise PlanRejected("An nn.LSTM has a proj_size, which plans lack; leave it out and add an nn.Linear.")
    _check_sequence(x, states, batch_first)
    output, (h_n, c_n) = _layers(
        operators.lstm, x, states, parameters, biased, layers, dropout, training, bidirectional, batch_first
    )
    return output, h_n, c_n


def _gru(
    x: Tensor,
    state: Tensor,
    parameters: Sequence[Tensor],
    biased: bool,
    layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor]:
    """``torch.gru``: ``(output, h_n)``."""
    _check_sequence(x, parameters, batch_first)
    output, (h_n,) = _layers(
        operators.gru, x, (state,), parameters, biased, layers, dropout, training, bidirectional, batch_first
    )
    return output, h_n


def _check_sequence(x: Tensor, third_of_packed: Any, batch_first: bool) -> None:
    if isinstance(third_of_packed, Tensor):  # the other form: (data, batch_sizes, states, ...)
        raise PlanRejected(
            "A recurrent layer gets a packed sequence, which plans lack; pad sequences to one length."
        )
    if not isinstance(x.shape[1 if batch_first else 0], int):
        raise PlanRejected(
            "A recurrent layer takes the batch for its time steps; inputs are (batch, time, features), so "
            "give it batch_first=True."
        )


def _layers(
    operator: Callable[..., tuple[Tensor, ...]],
    x: Tensor,
    states: Sequence[Tensor],
    parameters: Sequence[Tensor],
    biased: bool,
    layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """All layers and directions; the states as one tensor each."""
    groups = _by_direction(parameters, biased)
    ends: list[list[Tensor]] = []
    x = x.transpose(0, 1) if batch_first else x
    for layer in range(layers):
        if layer and dropout and training:
            x = drop(x, dropout)
        directions = []
        for backwards in (False, True) if bidirectional else (False,):
            start = [state[len(ends)] for state in states]
            y, *end = operator(x.flip(0) if backwards else x, *next(groups), *start)
            ends.append(end)
            directions.append(y.flip(0) if backwards else y)
        x = torch.cat(directions, 2) if bidirectional else directions[0]
    return x.transpose(0, 1) if batch_first else x, tuple(map(torch.stack, zip(*ends, strict=True)))


def _by_direction(parameters: Sequence[Tensor], biased: bool) -> Iterator[list[Tensor]]:
    """Weights and biases of each layer and direction in turn, zeros for biases that are left out."""
    size = 4 if biased else 2
    for first in range(0, len(parameters), size):
        group = list(parameters[first : first + size])
        yield group if biased else [*group, *(weight.new_zeros(len(weight)) for weight in group)]


_LAYERS: Final[dict[Any, Callable[..., Any]]] = {torch.lstm: _lstm, torch.gru: _gru}
"""What ``nn.LSTM`` and ``nn.GRU`` call, and what is traced in its place."""


class WholeRecurrentLayers(TorchFunctionMode):
    """While active, ``nn.LSTM`` and ``nn.GRU`` are traced as the operators of this module.

    Raises:
        PlanRejected: a layer that plans lack: with a projection, with packed sequences, or over the batch.
    """

    def __init__(self) -> None:
        super().__init__()
        self._outputs: list[_Output] = []

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace the two functions that the layers call, and reads of a last time step; run the rest."""
        if func in _LAYERS and not kwargs:
            result = _LAYERS[func](*args)
            bidirectional, batch_first = args[-2:]
            if not bidirectional:
                y, h_n = result[:2]
                self._outputs.append(_Output(y, y._version, int(batch_first), h_n[-1]))  # noqa: SLF001
            return result
        if func is Tensor.__getitem__:
            for output in self._outputs:
                if output.gives_last(*args):
                    return output.last
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class _Output:
    """What a layer gave; in-place changes count up the tensor's version."""

    y: Tensor
    version: int
    time_axis: int
    last: Tensor

    def gives_last(self, tensor: Tensor, index: Any) -> bool:
        """Whether ``tensor[index]``, such as ``y[:, -1]``, is the last time step as the layer gave it.

        That is the last state, whose gradient then comes without zeros for all other time steps.
        """
        if tensor is not self.y or tensor._version != self.version:  # noqa: SLF001  (no public name)
            return False
        *before, last = index if isinstance(index, tuple) else (index,)
        whole = [isinstance(part, slice) and part == slice(None) for part in before]
        is_last = type(last) is int and last in {-1, tensor.shape[self.time_axis] - 1}
        return is_last and whole == [True] * self.time_axis
