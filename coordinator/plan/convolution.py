"""Lowering rules for convolution and pooling; see :mod:`coordinator.plan.lowering`.

The kernel's gradient is a matrix product over patches, the input's a transposed convolution: the fastest of
the forms tried in onnxruntime (kernel gradient as a convolution, flipped kernels, patches transposed).
"""
# ruff: noqa: FBT001, FBT002, PLR0917  (a rule has its operator's arguments in its operator's order)

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

aten: Final = torch.ops.aten


def _per_axis(values: Sequence[int], axes: int) -> list[int]:
    """Torch writes one number for all axes or one for each."""
    return list(values) * axes if len(values) == 1 else list(values)


def but_channels(x: Tensor) -> list[int]:
    """The axes over which a channel's values are reduced: all but axis 1."""
    return [0, *range(2, x.dim())]


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
        reduced = [(patch * gradient).sum(dim=but_channels(x)) for patch in patches]
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
        for_bias = gradient.sum(dim=but_channels(gradient))
    return for_x, for_weight, for_bias


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


CONVOLUTION_RULES: Final[dict[Any, Callable[..., Any]]] = {
    aten.convolution_backward.default: _convolution_backward,
    aten.max_pool2d_with_indices.default: _max_pool,
    aten.max_pool2d_with_indices_backward.default: _max_pool_backward,
    aten.avg_pool2d_backward.default: _avg_pool_backward,
}
