"""The gradients of convolutions as plans compute them, against torch's own in float64."""

import itertools

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from coordinator.plan.convolution import CONVOLUTION_RULES
from coordinator.plan.export import to_onnx

aten = torch.ops.aten
BACKWARD = aten.convolution_backward.default


def assert_gradients_are_torchs(x, weight, window, groups, *, transposed=False):
    (stride, padding, dilation), axes = window, x.dim() - 2
    hyper = ([stride], [padding] * axes, [dilation] * axes, transposed, [0] * axes, groups)
    x, weight = x.double(), weight.double()
    out = aten.convolution(x, weight, None, *hyper)
    gradient = torch.randn_like(out)
    expected = BACKWARD(gradient, x, weight, [out.shape[1]], *hyper, [True] * 3)
    found = CONVOLUTION_RULES[BACKWARD](
        gradient.float(), x.float(), weight.float(), [out.shape[1]], *hyper, [True] * 3
    )
    for exact, value in zip(expected, found, strict=True):
        assert value.shape == exact.shape
        torch.testing.assert_close(
            value.double(), exact, rtol=0, atol=2e-5 * max(1.0, float(exact.abs().max()))
        )


WINDOWS = list(itertools.product((1, 2, 3), (1, 2), (0, 1), (1, 2)))  # kernel, stride, padding, dilation


@pytest.mark.parametrize("transposed", [False, True], ids=["ordinary", "transposed"])
@pytest.mark.parametrize("groups", [1, 2, 4], ids=["whole", "grouped", "depthwise"])
@pytest.mark.parametrize("sizes", [(9,), (7, 8), (5, 4, 6)], ids=["signal", "image", "volume"])
def test_gradients_of_a_convolution_are_torchs(sizes, groups, transposed):
    torch.manual_seed(0)
    for kernel, stride, padding, dilation in WINDOWS:
        if dilation * (kernel - 1) + 1 > min(sizes) + 2 * padding:
            continue
        out_channels = 4 if groups == 4 else 6
        if transposed and dilation * (kernel - 1) + 1 <= 2 * padding:
            continue  # a transposed convolution that crops more than it adds has no output
        channels = (4, out_channels // groups) if transposed else (out_channels, 4 // groups)
        weight = torch.randn(*channels, *[kernel] * len(sizes))
        x = torch.randn(3, 4, *sizes)
        assert_gradients_are_torchs(x, weight, (stride, padding, dilation), groups, transposed=transposed)


def test_a_kernel_may_have_unlike_sides():
    torch.manual_seed(1)
    assert_gradients_are_torchs(torch.randn(2, 3, 9, 6), torch.randn(4, 3, 5, 2), (1, 1, 1), 1)
    assert_gradients_are_torchs(torch.randn(2, 3, 9, 6), torch.randn(3, 1, 5, 2), (2, 1, 1), 3)


def test_a_depthwise_convolution_may_have_more_outputs_than_inputs():
    torch.manual_seed(2)
    assert_gradients_are_torchs(torch.randn(2, 3, 6, 6), torch.randn(6, 1, 3, 3), (1, 1, 1), 3)


@pytest.mark.parametrize("width", [128, 129, 300])
def test_a_depthwise_convolution_may_be_wide(width):
    # Up to 128 columns the gradients are products with band matrices, above it they are not.
    torch.manual_seed(3)
    assert_gradients_are_torchs(torch.randn(2, 3, width), torch.randn(3, 1, 5), (1, 2, 1), 3)


def test_the_gradient_of_a_depthwise_kernel_by_hand():
    # One example, one channel, one row: x = 1 2 3, w = a b, out = (a + 2b, 2a + 3b).
    # With gradients 10 and 100 of out: for a 1*10 + 2*100 = 210, for b 2*10 + 3*100 = 320;
    # for x: a*10, b*10 + a*100, b*100 with a = 2, b = 5: 20, 250, 500.
    x, weight = torch.tensor([[[1.0, 2.0, 3.0]]]), torch.tensor([[[2.0, 5.0]]])
    for_x, for_weight, for_bias = CONVOLUTION_RULES[BACKWARD](
        torch.tensor([[[10.0, 100.0]]]), x, weight, [1], [1], [0], [1], False, [0], 1, [True] * 3
    )
    assert for_x.tolist() == [[[20.0, 250.0, 500.0]]]
    assert for_weight.tolist() == [[[210.0, 320.0]]]
    assert for_bias.tolist() == [110.0]


class BiasGradient(nn.Module):
    def forward(self, gradient):
        window = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)
        rule, weight = CONVOLUTION_RULES[BACKWARD], torch.ones(gradient.shape[1], 1, 1, 1)
        return rule(gradient, gradient, weight, None, *window, [False, False, True])[2]


@pytest.mark.parametrize("channels", [1, 2])
def test_the_gradient_of_a_bias_does_not_gather_roundings(channels):
    # 32 * 28 * 28 = 25,088 values for each channel: added one after another, they are wrong by 1e-6 or more.
    gradient = torch.rand(32, channels, 28, 28, generator=torch.Generator().manual_seed(4))
    graph = to_onnx(BiasGradient(), (gradient,), ({},), ["gradient"], ["bias"])
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"gradient": gradient.numpy()})
    np.testing.assert_allclose(found, gradient.double().sum((0, 2, 3)).numpy(), rtol=6e-7)
