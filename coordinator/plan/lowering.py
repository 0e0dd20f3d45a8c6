"""Gradients that ONNX has no operator for, written with operators it has.

Every rule here stands for one aten operator of a joint graph and has that operator's arguments. Torch's own
decompositions cover the rest; these exist because torch stops at an operator such as
``convolution_backward``, or because ours run faster in onnxruntime.
"""
# ruff: noqa: FBT001, PLR0917  (a rule has its operator's arguments in its operator's order)

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch._decomp import core_aten_decompositions, decomposition_table

from coordinator.plan.convolution import CONVOLUTION_RULES, aten, but_channels

_NO_REDUCTION, _MEAN = 0, 1  # aten's numbers for how a loss is reduced over the batch


def _by_channel(values: Tensor, x: Tensor) -> Tensor:
    """Shape one value per channel to broadcast over ``x``."""
    return values.reshape(1, -1, *[1] * (x.dim() - 2))


# Normalisation


def _batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    training: bool,
    momentum: float,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output, batch mean, inverse deviation, and both running statistics moved towards the batch's."""
    scale = torch.ones_like(running_mean) if weight is None else weight
    shift = torch.zeros_like(running_mean) if bias is None else bias
    if training:
        count = x.numel() / x.shape[1]
        mean = x.mean(but_channels(x))
        centred = x - _by_channel(mean, x)
        variance = (centred * centred).mean(but_channels(x))
        unbiased = variance * (count / (count - 1))
        running_mean_next = running_mean * (1 - momentum) + mean * momentum
        running_var_next = running_var * (1 - momentum) + unbiased * momentum
    else:
        mean, variance = running_mean, running_var
        running_mean_next, running_var_next = running_mean.clone(), running_var.clone()
    output = torch.onnx.ops.symbolic(
        "BatchNormalization",
        [x, scale, shift, mean, variance],
        attrs={"epsilon": float(epsilon)},
        dtype=x.dtype,
        shape=tuple(x.shape),
        version=15,
    )
    return output, mean, torch.rsqrt(variance + epsilon), running_mean_next, running_var_next


def _batch_norm_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor,
    inverse_deviation: Tensor,
    training: bool,
    epsilon: float,
    _wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    if not training:
        assert running_mean is not None
        assert running_var is not None
        mean, inverse_deviation = running_mean, torch.rsqrt(running_var + epsilon)
    count = x.numel() / x.shape[1]
    centred = x - _by_channel(mean, x)
    for_bias = gradient.sum(but_channels(x))
    for_weight = (gradient * centred).sum(but_channels(x)) * inverse_deviation
    scale = inverse_deviation if weight is None else weight * inverse_deviation
    for_x = gradient * _by_channel(scale, x)
    if training:
        slope = scale * inverse_deviation * for_weight / count
        for_x = for_x - (centred * _by_channel(slope, x) + _by_channel(scale * for_bias / count, x))
    return for_x, for_weight, for_bias


# Loss


def _nll_loss_backward(
    gradient: Tensor,
    log_probabilities: Tensor,
    targets: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignored: int,
    total_weight: Tensor,
) -> Tensor:
    """One-hot targets times the loss's gradient: half the nodes of torch's scatter, felt by small models."""
    if log_probabilities.dim() != 2:
        rule = decomposition_table[aten.nll_loss_backward.default]
        result: Tensor = rule(gradient, log_probabilities, targets, weight, reduction, ignored, total_weight)
        return result
    classes = torch.arange(log_probabilities.shape[1])
    if 0 <= ignored < len(classes):
        classes = torch.where(classes == ignored, -1, classes)
    hot = (targets.unsqueeze(1) == classes).to(log_probabilities.dtype)
    if weight is not None:
        hot = hot * weight
    if reduction == _MEAN:
        gradient = gradient / total_weight
    elif reduction == _NO_REDUCTION:
        gradient = gradient.unsqueeze(1)
    return hot * -gradient


# The rest


def _silu_backward(gradient: Tensor, x: Tensor) -> Tensor:
    gate = torch.sigmoid(x)
    return gradient * (gate * (1 + x * (1 - gate)))


def _dropout(x: Tensor, probability: float, _training: bool | None) -> tuple[Tensor, Tensor]:
    kept = torch.rand_like(x) >= probability
    return x * kept * (1.0 / (1.0 - probability)), kept


def _bernoulli(x: Tensor, probability: float) -> Tensor:
    """The mask of channel-wise dropout, one where kept."""
    return (torch.rand_like(x) < probability).to(x.dtype)


def _empty_permuted(size: Sequence[int], _order: Sequence[int], **options: Any) -> Tensor:
    """Zeros: what is left uninitialised is written before it is read, and ONNX has no operator for that."""
    return torch.zeros(size, dtype=options.get("dtype"))


LOWERINGS: Final[dict[Any, Callable[..., Any]]] = {
    **CONVOLUTION_RULES,
    aten._native_batch_norm_legit_functional.default: _batch_norm,  # noqa: SLF001  (an operator's name)
    aten.native_batch_norm_backward.default: _batch_norm_backward,
    aten.native_dropout.default: _dropout,
    aten.bernoulli.p: _bernoulli,
    aten.nll_loss_backward.default: _nll_loss_backward,
    aten.silu_backward.default: _silu_backward,
    aten.empty_permuted.default: _empty_permuted,
    aten.native_group_norm.default: decomposition_table[aten.native_group_norm.default],
}

MASK_OPERATORS: Final = (aten.native_dropout.default, aten.bernoulli.p)
"""What draws a dropout mask."""


def torch_decompositions() -> dict[Any, Callable[..., Any]]:
    """Torch's own table without what is lowered here, so that those operators reach us whole."""
    table: dict[Any, Callable[..., Any]] = core_aten_decompositions()
    return {operator: rule for operator, rule in table.items() if operator not in LOWERINGS}


class Lowering(torch.fx.Interpreter):
    """Runs an aten graph with the operators of :data:`LOWERINGS` replaced.

    ``dropout_masks`` lists the masks drawn, in the order of the forward pass, for a reference to use too.
    """

    def __init__(self, module: torch.fx.GraphModule) -> None:
        super().__init__(module)
        self.dropout_masks: list[Tensor] = []

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one operator, ours if there is one."""
        rule = LOWERINGS.get(target)
        if rule is None:
            return super().call_function(target, args, kwargs)
        result = rule(*args, **kwargs)
        if target in MASK_OPERATORS:
            self.dropout_masks.append(result[1] if isinstance(result, tuple) else result)
        return result
