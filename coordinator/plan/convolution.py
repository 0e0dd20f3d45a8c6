"""Lowering rules for convolution and pooling; see :mod:`coordinator.plan.lowering`.

The kernel's gradient is a matrix product for each of its rows, the input's a transposed convolution; both are
products with band matrices for depthwise convolution. These are the fastest of the forms tried in onnxruntime
(kernel gradient as a convolution, flipped kernels, all rows in one product, element by element).
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

_WIDEST_BAND: Final = 128
"""Up to this many columns a product with a band matrix costs no more than one multiplication per element."""


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

    def on_image(self) -> "_Window":
        """The window of a signal of one axis as that of an image of one row; that of an image as it is."""
        if len(self.kernel) > 1:
            return self
        return _Window([1, *self.kernel], [1, *self.stride], [0, *self.padding], [1, *self.dilation])

    def is_point(self) -> bool:
        """Whether each output meets the one input at its own place."""
        return max(*self.kernel, *self.stride) == 1 and not any(self.padding)


def _pad(x: Tensor, padding: Sequence[int]) -> Tensor:
    """``x`` with zeros on both sides of its last axes, as many as ``padding`` has numbers."""
    if not any(padding):
        return x
    padded: Tensor = aten.constant_pad_nd(
        x, [side for axis in reversed(padding) for side in (axis, axis)], 0.0
    )
    return padded


def _meets(x: Tensor, axis: int, offset: int, stride: int, out: int) -> Tensor:
    """What one kernel element meets along an axis: ``out`` values from ``offset`` in steps of ``stride``."""
    end = offset + (out - 1) * stride + 1
    if offset == 0 and end == x.shape[axis] and stride == 1:
        return x
    met: Tensor = aten.slice.Tensor(x, axis, offset, end, stride)
    return met


def _as_image(signal: Tensor) -> Tensor:
    """A signal of one axis as an image of one row; an image as it is."""
    return signal.unsqueeze(2) if signal.dim() == 3 else signal


def _kernel_gradient(x: Tensor, gradient: Tensor, window: _Window, groups: int) -> Tensor:
    """The gradient of ``convolution(x, w)`` for ``w``, shape ``(out_channels, channels / groups, *kernel)``.

    For each row of the kernel, a matrix product of the gradient with all input values that row meets, example
    by example. The values that all columns meet are laid side by side once; those of a row are then whole
    rows of them, so they can be copied in long runs, and there is no need to lay all rows side by side too.
    """
    kernel, channels, out_channels = window.kernel, x.shape[1], gradient.shape[1]
    x, gradient, window = _as_image(x), _as_image(gradient), window.on_image()
    if groups == channels == out_channels and _suits_bands(x):
        return _depthwise_kernel_gradient(x, gradient, window).reshape(channels, 1, *kernel)
    out = [int(size) for size in gradient.shape[2:]]
    batch, positions, places = x.shape[0], math.prod(window.kernel[1:]), math.prod(out)
    left = gradient.reshape(batch * groups, out_channels // groups, places)
    columns = _columns(_pad(x, window.padding), window, out)
    products = []
    for row in range(window.kernel[0]):
        met = _meets(columns, 3, row * window.dilation[0], window.stride[0], out[0])
        right = met.reshape(batch * groups, channels // groups * positions, places)
        product = torch.bmm(left, right.transpose(1, 2))
        products.append(product.reshape(batch, out_channels, channels // groups, positions).sum(0))
    return torch.stack(products, dim=2).reshape(out_channels, channels // groups, *kernel)


def _columns(x: Tensor, window: _Window, out: list[int]) -> Tensor:
    """What the kernel meets along all axes but the rows: ``(batch, channels, positions, rows, *out[1:])``."""
    columns = []
    for position in itertools.product(*map(range, window.kernel[1:])):
        met = x
        for axis, element in enumerate(position, start=1):
            met = _meets(met, 2 + axis, element * window.dilation[axis], window.stride[axis], out[axis])
        columns.append(met)
    return torch.stack(columns, dim=2) if len(columns) > 1 else columns[0].unsqueeze(2)


# Depthwise convolution has one small kernel per channel: nothing for a matrix product to work on. But along
# one axis, with a kernel of k, a stride of s and a padding of p, it is a product with a band matrix,
# out = band @ in, where band[place, column] = w[column - place * s + p]. Most of the band is zero, and still
# the matrix products are faster than onnxruntime's convolutions, and than one multiplication per element.


def _suits_bands(x: Tensor) -> bool:
    """Whether the work a band wastes, in proportion to the width of ``x``, is still small."""
    return x.dim() == 4 and int(x.shape[3]) <= _WIDEST_BAND


def _band(window: _Window, width: int, out: int) -> Tensor:
    """Which kernel element takes which input column to which place: 0 or 1, ``(width * out, kernel)``."""
    stride, padding, dilation = window.stride[1], window.padding[1], window.dilation[1]
    columns = torch.arange(width).reshape(-1, 1, 1) + padding
    places = torch.arange(out).reshape(1, -1, 1) * stride
    elements = torch.arange(window.kernel[1]) * dilation
    return (columns == places + elements).to(torch.float32).reshape(width * out, window.kernel[1])


def _channels_first(x: Tensor, rows_padded: int) -> Tensor:
    """An image batch as ``(channels, batch, rows, columns)``, with rows of zeros added at both ends."""
    return _pad(x.transpose(0, 1), [rows_padded, 0])


def _depthwise_kernel_gradient(x: Tensor, gradient: Tensor, window: _Window) -> Tensor:
    """As :func:`_kernel_gradient`, shape ``(channels, kernel rows, kernel columns)``.

    For each row of the kernel, the products of all columns of the input with all places of the gradient,
    summed over examples and rows; then the sum of those that the band says belong to a kernel element.
    """
    channels, batch, width = x.shape[1], x.shape[0], int(x.shape[3])
    rows, places = int(gradient.shape[2]), int(gradient.shape[3])
    x = _channels_first(x, window.padding[0])
    right = gradient.transpose(0, 1).reshape(channels, batch * rows, places)
    products = []
    for row in range(window.kernel[0]):
        met = _meets(x, 2, row * window.dilation[0], window.stride[0], rows)
        left = met.reshape(channels, batch * rows, width)
        products.append(torch.bmm(left.transpose(1, 2), right).reshape(channels, width * places))
    return torch.stack(products, dim=1) @ _band(window, width, places)


def _depthwise_input_gradient(gradient: Tensor, weight: Tensor, window: _Window, width: int) -> Tensor:
    """The gradient of a depthwise ``convolution(x, weight)`` for ``x``, where the rows' stride is 1."""
    batch, channels, _, places = gradient.shape
    kernel, padding = window.kernel[0], window.padding[0]
    reach = (kernel - 1) * window.dilation[0]
    rows = int(gradient.shape[2]) + reach - 2 * padding
    bands = weight.reshape(channels, kernel, window.kernel[1]) @ _band(window, width, int(places)).t()
    gradient = _channels_first(gradient, reach - padding)
    found = None
    for row in range(kernel):
        met = _meets(gradient, 2, reach - row * window.dilation[0], 1, rows)
        band = bands.select(1, row).reshape(channels, width, places)
        part = torch.bmm(met.reshape(channels, batch * rows, places), band.transpose(1, 2))
        found = part if found is None else found + part
    assert found is not None
    return found.reshape(channels, batch, rows, width).transpose(0, 1)


def _input_gradient(
    gradient: Tensor, weight: Tensor, input_size: Sequence[int], window: _Window, groups: int
) -> Tensor:
    """The gradient of ``convolution(x, weight)`` for ``x``: in general a transposed convolution."""
    stride, padding, dilation = window.stride, window.padding, window.dilation
    if groups == 1 and window.is_point():
        batch, out_channels, *out = gradient.shape
        points = weight.reshape(out_channels, -1).t() @ gradient.reshape(batch, out_channels, -1)
        return points.reshape(batch, -1, *out)
    if groups == weight.shape[0] and weight.shape[1] == 1 and len(stride) < 3:
        image, width = window.on_image(), int(input_size[-1])
        if width <= _WIDEST_BAND and image.stride[0] == 1 and image.padding[0] < image.kernel[0]:
            found = _depthwise_input_gradient(_as_image(gradient), weight, image, width)
            return found.reshape(gradient.shape[0], -1, *input_size)
    output_padding = [
        int(input_size[axis])
        - ((int(gradient.shape[2 + axis]) - 1) * stride[axis] - 2 * padding[axis])
        - (dilation[axis] * (window.kernel[axis] - 1) + 1)
        for axis in range(len(stride))
    ]
    transposed: Tensor = aten.convolution(
        gradient, weight, None, stride, padding, dilation, True, output_padding, groups
    )
    return transposed


def _bias_gradient(gradient: Tensor) -> Tensor:
    """The sum by channel; in two steps for one channel, whose values onnxruntime adds one by one."""
    if gradient.shape[1] > 1:
        return gradient.sum(dim=but_channels(gradient))
    return gradient.sum(dim=but_channels(gradient)[1:]).sum(dim=0)


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
        for_bias = _bias_gradient(gradient)
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
