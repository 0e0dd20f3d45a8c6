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
from coordinator.plan.rewriting import rewritten

_NO_REDUCTION, _MEAN = 0, 1  # aten's numbers for how a loss is reduced over the batch


# Normalisation


def _scaled_by_channel(x: Tensor, mean: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``(x - mean) * scale + shift`` by channel, in one pass over ``x``.

    ONNX's batch normalisation of inference with a variance of one. Written with broadcasting operators it
    takes onnxruntime a pass each, and those are slower where a channel has few places.
    """
    return _normalised(x, scale, shift, mean, torch.ones_like(mean), 0.0)


def _normalised(
    x: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, variance: Tensor, epsilon: float
) -> Tensor:
    output: Tensor = torch.onnx.ops.symbolic(
        "BatchNormalization",
        [x, scale, shift, mean, variance],
        attrs={"epsilon": float(epsilon)},
        dtype=x.dtype,
        shape=tuple(x.shape),
        version=15,
    )
    return output


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
    if not training:
        output = _normalised(x, scale, shift, running_mean, running_var, epsilon)
        inverse_deviation = torch.rsqrt(running_var + epsilon)
        return output, running_mean, inverse_deviation, running_mean.clone(), running_var.clone()
    channels = tuple(running_mean.shape)
    # With a momentum of zero, the operator's running statistics are the batch's own. Onnxruntime writes them
    # over those it is given, so these must be values that nothing else reads: neither constants nor inputs.
    output, mean, variance = torch.onnx.ops.symbolic_multi_out(
        "BatchNormalization",
        [x, scale, shift, running_mean * 0.0, running_var * 0.0],
        attrs={"epsilon": float(epsilon), "momentum": 0.0, "training_mode": 1},
        dtypes=[x.dtype] * 3,
        shapes=[tuple(x.shape), channels, channels],
        version=15,
    )
    count = x.numel() / x.shape[1]
    running_mean_next = running_mean * (1 - momentum) + mean * momentum
    running_var_next = running_var * (1 - momentum) + variance * (momentum * count / (count - 1))
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
    zeros, ones = torch.zeros_like(mean), torch.ones_like(mean)
    centred = _scaled_by_channel(x, mean, ones, zeros)
    for_bias = gradient.sum(but_channels(x))
    for_weight = (gradient * centred).sum(but_channels(x)) * inverse_deviation
    scale = inverse_deviation if weight is None else weight * inverse_deviation
    for_x = _scaled_by_channel(gradient, zeros, scale, zeros)
    if training:
        slope = scale * inverse_deviation * for_weight / count
        for_x = for_x - _scaled_by_channel(centred, zeros, slope, scale * for_bias / count)
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


def _threshold_backward(gradient: Tensor, x: Tensor, threshold: float) -> Tensor:
    """A product with zeros and ones takes onnxruntime two thirds of the time of a choice."""
    return gradient * (x > threshold).to(gradient.dtype)


def _hardtanh_backward(gradient: Tensor, x: Tensor, lowest: float, highest: float) -> Tensor:
    return gradient * ((x > lowest) & (x < highest)).to(gradient.dtype)


def _embedding_backward(
    gradient: Tensor, indices: Tensor, count: int, padding_index: int, scaled_by_frequency: bool
) -> Tensor:
    """Without torch's masks: the forward pass has refused indices out of range."""
    if scaled_by_frequency or padding_index >= 0:
        rule = decomposition_table[aten.embedding_dense_backward.default]
        result: Tensor = rule(gradient, indices, count, padding_index, scaled_by_frequency)
        return result
    nothing = torch.zeros(count, *gradient.shape[indices.dim() :])
    return nothing.index_put((indices,), gradient, accumulate=True)


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


def _select_backward(gradient: Tensor, size: Sequence[int], axis: int, index: int) -> Tensor:
    """Zeros around the one place that was selected; torch's own rule writes and compares whole tensors."""
    index %= size[axis]
    return _surrounded(gradient.unsqueeze(axis), axis, index, int(size[axis]) - index - 1)


def _slice_backward(
    gradient: Tensor, size: Sequence[int], axis: int, start: int, end: int, step: int
) -> Tensor:
    if step != 1 or not isinstance(size[axis], int):
        rule = decomposition_table[aten.slice_backward.default]
        result: Tensor = rule(gradient, size, axis, start, end, step)
        return result
    first, last, _ = slice(start, end).indices(size[axis])
    return _surrounded(gradient, axis, first, size[axis] - max(first, last))


def _surrounded(x: Tensor, axis: int, before: int, after: int) -> Tensor:
    """``x`` with zeros before and after it on one axis."""
    axes_behind = x.dim() - 1 - axis % x.dim()
    padded: Tensor = aten.constant_pad_nd(x, [*[0, 0] * axes_behind, before, after], 0.0)
    return padded


LOWERINGS: Final[dict[Any, Callable[..., Any]]] = {
    **CONVOLUTION_RULES,
    aten._native_batch_norm_legit_functional.default: _batch_norm,  # noqa: SLF001  (an operator's name)
    aten.native_batch_norm_backward.default: _batch_norm_backward,
    aten.native_dropout.default: _dropout,
    aten.bernoulli.p: _bernoulli,
    aten.nll_loss_backward.default: _nll_loss_backward,
    aten.select_backward.default: _select_backward,
    aten.slice_backward.default: _slice_backward,
    aten.silu_backward.default: _silu_backward,
    aten.empty_permuted.default: _empty_permuted,
    aten.threshold_backward.default: _threshold_backward,
    aten.hardtanh_backward.default: _hardtanh_backward,
    aten.embedding_dense_backward.default: _embedding_backward,
    aten._safe_softmax.default: decomposition_table[aten._safe_softmax.default],  # noqa: SLF001
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
        super().__init__(rewritten(module))
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
