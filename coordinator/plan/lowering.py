"""Gradients that ONNX has no operator for, written with operators it has.

Every rule here stands for one aten operator of a joint graph and has that operator's arguments. Torch's own
decompositions cover the rest; these exist because torch stops at an operator such as
``convolution_backward``, or because ours run faster in onnxruntime.
"""
# ruff: noqa: FBT001, FBT002, PLR0917  (a rule has its operator's arguments in its operator's order)

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch._decomp import core_aten_decompositions, decomposition_table

aten: Final = torch.ops.aten
_NO_REDUCTION, _MEAN = 0, 1  # aten's numbers for how a loss is reduced over the batch


def _per_axis(values: Sequence[int], axes: int) -> list[int]:
    """Torch writes one number for all axes or one for each."""
    return list(values) * axes if len(values) == 1 else list(values)


def _spatial(x: Tensor) -> list[int]:
    """The axes over which a channel's values are reduced: all but axis 1."""
    return [0, *range(2, x.dim())]


def _by_channel(values: Tensor, x: Tensor) -> Tensor:
    """Shape one value per channel to broadcast over ``x``."""
    return values.reshape(1, -1, *[1] * (x.dim() - 2))


# Convolution


@dataclass(frozen=True)
class _Window:
    """How a convolution moves over its input, one number per spatial axis each."""

    kernel: list[int]
    stride: list[int]
    padding: list[int]
    dilation: list[int]


def _patches(x: Tensor, window: _Window, out: list[int]) -> list[Tensor]:
    """For each kernel position, the input values it meets: tensors of shape ``(batch, channels, *out)``."""
    if any(window.padding):
        sides = [side for axis in reversed(window.padding) for side in (axis, axis)]
        x = aten.constant_pad_nd(x, sides, 0.0)
    patches = []
    for position in itertools.product(*map(range, window.kernel)):
        patch = x
        for axis, offset in enumerate(position):
            begin, stride = offset * window.dilation[axis], window.stride[axis]
            patch = aten.slice.Tensor(patch, 2 + axis, begin, begin + (out[axis] - 1) * stride + 1, stride)
        patches.append(patch)
    return patches


def _kernel_gradient(x: Tensor, gradient: Tensor, window: _Window, groups: int) -> Tensor:
    """The gradient of ``convolution(x, w)`` for ``w``: patches times gradient, example by example."""
    batch, channels, out_channels = x.shape[0], x.shape[1], gradient.shape[1]
    out = [int(size) for size in gradient.shape[2:]]
    positions, places = math.prod(window.kernel), math.prod(out)
    patches = _patches(x, window, out)
    if groups == channels == out_channels:
        reduced = [(patch * gradient).sum(dim=_spatial(x)) for patch in patches]
        return torch.stack(reduced, dim=1).reshape(out_channels, 1, *window.kernel)
    left = gradient.reshape(batch * groups, out_channels // groups, places)
    right = torch.stack(patches, dim=2).reshape(batch * groups, channels // groups * positions, places)
    products = torch.bmm(left, right.transpose(1, 2))
    return products.reshape(batch, out_channels, channels // groups, *window.kernel).sum(0)


def _input_gradient(
    gradient: Tensor, weight: Tensor, input_size: Sequence[int], window: _Window, groups: int
) -> Tensor:
    """The gradient of ``convolution(x, weight)`` for ``x``: a transposed convolution."""
    stride, padding, dilation = window.stride, window.padding, window.dilation
    output_padding = [
        int(input_size[axis])
        - ((int(gradient.shape[2 + axis]) - 1) * stride[axis] - 2 * padding[axis])
        - (dilation[axis] * (window.kernel[axis] - 1) + 1)
        for axis in range(len(stride))
    ]
    out: Tensor = aten.convolution(
        gradient, weight, None, stride, padding, dilation, True, output_padding, groups
    )
    return out


def _convolution_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    _bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    _output_padding: Sequence[int],
    groups: int,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    axes = weight.dim() - 2
    window = _Window(
        [int(size) for size in weight.shape[2:]],
        _per_axis(stride, axes),
        _per_axis(padding, axes),
        _per_axis(dilation, axes),
    )
    for_x = for_weight = for_bias = None
    if wanted[0] and transposed:
        for_x = aten.convolution(
            gradient, weight, None, window.stride, window.padding, window.dilation, False, [0] * axes, groups
        )
    elif wanted[0]:
        for_x = _input_gradient(gradient, weight, x.shape[2:], window, groups)
    if wanted[1]:
        # A transposed convolution is the ordinary one's gradient, so input and output change places.
        fine, coarse = (gradient, x) if transposed else (x, gradient)
        for_weight = _kernel_gradient(fine, coarse, window, groups)
    if wanted[2]:
        for_bias = gradient.sum(dim=_spatial(gradient))
    return for_x, for_weight, for_bias


# Pooling


def _max_pool(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    ceil_mode: bool = False,
) -> tuple[Tensor, Tensor]:
    """ONNX MaxPool with both results; the exporter's own form runs the pooling twice.

    The indices count through the whole tensor, batch and channels included, as ONNX says.
    """
    kernel, padding, dilation = (_per_axis(values, 2) for values in (kernel, padding, dilation))
    stride = _per_axis(stride, 2) if stride else kernel
    shape = tuple(aten.max_pool2d_with_indices(x, kernel, stride, padding, dilation, ceil_mode)[0].shape)
    pooled, indices = torch.onnx.ops.symbolic_multi_out(
        "MaxPool",
        [x],
        attrs={
            "kernel_shape": kernel,
            "strides": stride,
            "pads": [*padding, *padding],
            "dilations": dilation,
            "ceil_mode": int(ceil_mode),
        },
        dtypes=[x.dtype, torch.int64],
        shapes=[shape, shape],
        version=20,
    )
    return pooled, indices


def _max_pool_backward(gradient: Tensor, x: Tensor, *rest: Any) -> Tensor:
    indices: Tensor = rest[-1]
    flat = torch.zeros_like(x).reshape(-1)
    return flat.scatter_add(0, indices.reshape(-1), gradient.reshape(-1)).reshape(x.shape)


def _avg_pool_backward(
    gradient: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0, 0),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor: int | None = None,
) -> Tensor:
    """Spread each output's gradient evenly: a transposed depthwise convolution with equal weights."""
    if ceil_mode or (any(padding) and not count_include_pad):
        raise NotImplementedError(
            "has no gradient lowering: AvgPool with ceil_mode=True, or with padding and "
            "count_include_pad=False, cannot be trained in a plan; use the defaults."
        )
    sizes = _per_axis(kernel, 2)
    window = _Window(sizes, _per_axis(stride, 2) if stride else sizes, _per_axis(padding, 2), [1, 1])
    channels = x.shape[1]
    weight = torch.ones(channels, 1, *sizes) / (divisor or math.prod(sizes))
    return _input_gradient(gradient, weight, x.shape[2:], window, channels)


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
        mean = x.mean(_spatial(x))
        centred = x - _by_channel(mean, x)
        variance = (centred * centred).mean(_spatial(x))
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
    for_bias = gradient.sum(_spatial(x))
    for_weight = (gradient * centred).sum(_spatial(x)) * inverse_deviation
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


def _empty_permuted(size: Sequence[int], _order: Sequence[int], **options: Any) -> Tensor:
    """Zeros: what is left uninitialised is written before it is read, and ONNX has no operator for that."""
    return torch.zeros(size, dtype=options.get("dtype"))


LOWERINGS: Final[dict[Any, Callable[..., Any]]] = {
    aten.convolution_backward.default: _convolution_backward,
    aten.max_pool2d_with_indices.default: _max_pool,
    aten.max_pool2d_with_indices_backward.default: _max_pool_backward,
    aten.avg_pool2d_backward.default: _avg_pool_backward,
    aten._native_batch_norm_legit_functional.default: _batch_norm,  # noqa: SLF001  (an operator's name)
    aten.native_batch_norm_backward.default: _batch_norm_backward,
    aten.native_dropout.default: _dropout,
    aten.nll_loss_backward.default: _nll_loss_backward,
    aten.silu_backward.default: _silu_backward,
    aten.empty_permuted.default: _empty_permuted,
    aten.native_group_norm.default: decomposition_table[aten.native_group_norm.default],
}


def torch_decompositions() -> dict[Any, Callable[..., Any]]:
    """Torch's own table without what is lowered here, so that those operators reach us whole."""
    table: dict[Any, Callable[..., Any]] = core_aten_decompositions()  # type: ignore[no-untyped-call]
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
        if target is aten.native_dropout.default:
            self.dropout_masks.append(result[1])
        return result
