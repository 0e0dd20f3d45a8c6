"""The operators of :mod:`coordinator.plan.recurrent` and their gradients, written in ONNX.

Forwards, a layer is ONNX's own ``LSTM`` or ``GRU``. Backwards, all that does not depend on the gradient of a
later time step is computed for all time steps at once: the gates, again, from inputs and outputs, and the
factors by which gradients pass through them. What remains is a linear recurrence of six nodes per time step
for an LSTM (and two for its cell states) and four or five for a GRU. The gradients of the weights are one
matrix product over all time steps.

Formulas: the equations in torch's documentation of ``nn.LSTM`` and ``nn.GRU``, whose gates are called
i, f, g, o and r, z, n here too, differentiated by the chain rule. ``d_v`` is the loss's gradient for ``v``; a
gate's gradient is that for its argument, before the activation.

A matrix of all time steps has shape (time steps * batch, columns), time steps in order.
"""
# ruff: noqa: PLR0917  (a translation has its operator's arguments in its operator's order)

from collections.abc import Callable, Sequence
from typing import Any, Final

from onnxscript import opset20

from coordinator.plan.recurrent import operators

op: Final[Any] = opset20  # its annotations are for numpy arrays, not for graphs that are being written
Value = Any
"""A tensor of the graph being written, an ``onnx_ir.Value``; all axes but the batch are known."""

_LSTM_ORDER: Final = (0, 3, 1, 2)
"""ONNX's i, o, f, c by their places in torch's i, f, g, o."""
_GRU_ORDER: Final = (1, 0, 2)
"""ONNX's z, r, h by their places in torch's r, z, n."""


def _lstm(
    x: Value, weight_ih: Value, weight_hh: Value, bias_ih: Value, bias_hh: Value, h_0: Value, c_0: Value
) -> tuple[Value, ...]:
    y, h_n, c_n = op.LSTM(
        x,
        *_reordered((weight_ih, weight_hh, bias_ih, bias_hh), _LSTM_ORDER),
        None,
        op.Unsqueeze(h_0, [0]),
        op.Unsqueeze(c_0, [0]),
        hidden_size=int(h_0.shape[1]),
    )
    return op.Squeeze(y, [1]), op.Squeeze(h_n, [0]), op.Squeeze(c_n, [0])


def _gru(
    x: Value, weight_ih: Value, weight_hh: Value, bias_ih: Value, bias_hh: Value, h_0: Value
) -> tuple[Value, ...]:
    y, h_n = op.GRU(
        x,
        *_reordered((weight_ih, weight_hh, bias_ih, bias_hh), _GRU_ORDER),
        None,
        op.Unsqueeze(h_0, [0]),
        hidden_size=int(h_0.shape[1]),
        linear_before_reset=1,  # as in torch, r multiplies the product with h and its bias
    )
    return op.Squeeze(y, [1]), op.Squeeze(h_n, [0])


def _reordered(parameters: Sequence[Value], order: Sequence[int]) -> tuple[Value, Value, Value]:
    """Both weights and one vector of both biases, gates in ONNX's order, each with an axis for directions."""
    gates = [_split(parameter, len(order)) for parameter in parameters]
    weight_ih, weight_hh, bias_ih, bias_hh = ([gate[place] for place in order] for gate in gates)
    return tuple(
        op.Unsqueeze(op.Concat(*rows, axis=0), [0]) for rows in (weight_ih, weight_hh, [*bias_ih, *bias_hh])
    )


def _split(tensor: Value, parts: int) -> list[Value]:
    """Equal parts of the first axis, which may be one."""
    return [tensor] if parts == 1 else list(op.Split(tensor, axis=0, num_outputs=parts))


def _columns(matrix: Value, begin: int, end: int) -> Value:
    return op.Slice(matrix, [begin], [end], [1])


def _less_product(a: Value, b: Value, c: Value) -> Value:
    """``a - b * c``."""
    return op.Sub(a, op.Mul(b, c))


def _sum(first: Value, second: Value) -> Value:
    """The sum of two gradients, of which one or both may be None for zero."""
    if first is None or second is None:
        return second if first is None else first
    return op.Add(first, second)


class _Steps:
    """All time steps of one layer.

    Attributes:
        h: what each time step starts from, a matrix of all time steps.
        x: what each time step reads.
        y: what each time step gives.
        joined: ``[h | x | 1]``, so that one matrix product takes both weights and the bias.
    """

    def __init__(self, y: Value, x: Value, h_0: Value) -> None:
        self.count, self.features, self.hidden = int(x.shape[0]), int(x.shape[2]), int(h_0.shape[1])
        before = op.Concat(op.Unsqueeze(h_0, [0]), op.Slice(y, [0], [-1], [0]), axis=0)
        self.h = op.Reshape(before, [-1, self.hidden])
        self.x = op.Reshape(x, [-1, self.features])
        self.y = op.Reshape(y, [-1, self.hidden])
        column = op.Concat(op.Shape(self.x, start=0, end=1), op.Constant(value_ints=[1]), axis=0)
        ones = op.Expand(op.Constant(value_float=1.0), column)
        self.joined = op.Concat(self.h, self.x, ones, axis=1)

    def gate(self, weight_hh: Value, weight_ih: Value, bias_ih: Value, bias_hh: Value) -> Value:
        """One gate before its activation, from its rows of the parameters."""
        bias = op.Unsqueeze(op.Add(bias_ih, bias_hh), [1])
        return op.Gemm(self.joined, op.Concat(weight_hh, weight_ih, bias, axis=1), transB=1)

    def parameter_gradients(self, gates: Value) -> tuple[Value, Value, Value]:
        """Of weight_hh, weight_ih and the bias, from the gates' gradients."""
        # This product and a transposition take less time than the transposed product.
        rows = op.Transpose(op.Gemm(self.joined, gates, transA=1), perm=[1, 0])
        both = self.hidden + self.features
        bias = op.Squeeze(_columns(rows, both, both + 1), [1])
        return _columns(rows, 0, self.hidden), _columns(rows, self.hidden, both), bias

    def input_gradient(self, gates: Value, weight_ih: Value) -> Value:
        """Of ``x`` in its own shape, from the gates' gradients."""
        return op.Reshape(op.MatMul(gates, weight_ih), [self.count, -1, self.features])

    def each(self, matrix: Value) -> list[Value]:
        """A matrix of all time steps, step by step."""
        return _split(matrix, self.count)

    def each_output_gradient(self, d_y: Value, d_h_n: Value) -> list[Value]:
        """What the loss itself adds to the gradient of each time step's output; None for nothing."""
        if d_y is None:
            return [*[None] * (self.count - 1), d_h_n]
        *before, last = self.each(op.Reshape(d_y, [-1, self.hidden]))
        return [*before, _sum(last, d_h_n)]


def _lstm_backward(
    d_y: Value,
    d_h_n: Value,
    d_c_n: Value,
    y: Value,
    x: Value,
    weight_ih: Value,
    weight_hh: Value,
    bias_ih: Value,
    bias_hh: Value,
    h_0: Value,
    c_0: Value,
) -> tuple[Value, ...]:
    steps = _Steps(y, x, h_0)
    parameters = zip(*(_split(p, 4) for p in (weight_hh, weight_ih, bias_ih, bias_hh)), strict=True)
    before_i, before_f, before_g, before_o = (steps.gate(*rows) for rows in parameters)
    i, f, g, o = op.Sigmoid(before_i), op.Sigmoid(before_f), op.Tanh(before_g), op.Sigmoid(before_o)
    ig = op.Mul(i, g)
    each_f = steps.each(f)
    cells = [c_0]
    for f_t, ig_t in zip(each_f, steps.each(ig), strict=True):
        cells.append(op.Add(op.Mul(f_t, cells[-1]), ig_t))
    c = op.Concat(*cells[1:], axis=0)
    fc = op.Sub(c, ig)
    # c = f * c' + i * g, c' being the step before, and y = o * tanh(c). Gate f for example: dc/df = c', and
    # its sigmoid's derivative is f * (1 - f); together f * c' - f * c' * f.
    each_factor = steps.each(
        op.Concat(
            _less_product(ig, ig, i),
            _less_product(fc, fc, f),
            _less_product(i, ig, g),
            _less_product(steps.y, steps.y, o),
            axis=1,
        )
    )
    each_y_by_c = steps.each(_less_product(o, steps.y, op.Tanh(c)))
    each_output = steps.each_output_gradient(d_y, d_h_n)
    d_h, d_c = each_output[-1], d_c_n
    each_gates: list[Value] = []
    for t in reversed(range(steps.count)):
        d_c_t = _sum(op.Mul(d_h, each_y_by_c[t]), d_c)
        each_gates.insert(0, op.Mul(op.Concat(d_c_t, d_c_t, d_c_t, d_h, axis=1), each_factor[t]))
        d_c = op.Mul(d_c_t, each_f[t])
        d_h = op.Gemm(each_gates[0], weight_hh, each_output[t - 1] if t else None)
    gates = op.Concat(*each_gates, axis=0)
    d_weight_hh, d_weight_ih, d_bias = steps.parameter_gradients(gates)
    return steps.input_gradient(gates, weight_ih), d_weight_ih, d_weight_hh, d_bias, d_h, d_c


def _gru_backward(
    d_y: Value,
    d_h_n: Value,
    y: Value,
    x: Value,
    weight_ih: Value,
    weight_hh: Value,
    bias_ih: Value,
    bias_hh: Value,
    h_0: Value,
) -> tuple[Value, ...]:
    steps = _Steps(y, x, h_0)
    parameters = zip(*(_split(p, 3) for p in (weight_hh, weight_ih, bias_ih, bias_hh)), strict=True)
    rows_r, rows_z, (n_hh, n_ih, n_bias_ih, n_bias_hh) = parameters
    r, z = op.Sigmoid(steps.gate(*rows_r)), op.Sigmoid(steps.gate(*rows_z))
    product = op.Gemm(steps.h, n_hh, n_bias_hh, transB=1)
    n = op.Tanh(op.Add(op.Gemm(steps.x, n_ih, n_bias_ih, transB=1), op.Mul(r, product)))
    # y = (1 - z) * n + z * h and n = tanh(... + r * product). So z * (h - n) = y - n, and that times 1 - z is
    # the derivative of y by the argument of z.
    new = op.Sub(1.0, z)
    y_by_n = _less_product(new, new, op.Mul(n, n))
    y_by_product = op.Mul(y_by_n, r)
    y_by_r = op.Mul(op.Mul(y_by_product, product), op.Sub(1.0, r))
    y_by_z = op.Mul(op.Sub(steps.y, n), new)
    each_factor = steps.each(op.Concat(y_by_r, y_by_z, y_by_product, axis=1))
    each_z = steps.each(z)
    each_output = steps.each_output_gradient(d_y, d_h_n)
    each_d_y = each_output[-1:]
    each_gates: list[Value] = []
    for t in reversed(range(steps.count)):
        d_y_t = each_d_y[0]
        each_gates.insert(0, op.Mul(op.Concat(d_y_t, d_y_t, d_y_t, axis=1), each_factor[t]))
        d_h = op.Gemm(each_gates[0], weight_hh, op.Mul(d_y_t, each_z[t]))
        each_d_y.insert(0, _sum(d_h, each_output[t - 1] if t else None))
    d_h_0, *each_d_y = each_d_y
    gates = op.Concat(*each_gates, axis=0)
    d_n = op.Mul(op.Concat(*each_d_y, axis=0), y_by_n)
    # Gates r and z have one argument for both weights; n has two, its product with h and the rest.
    d_weight_hh, shared_weight, d_bias_hh = steps.parameter_gradients(gates)
    _, d_n_weight, d_n_bias = steps.parameter_gradients(d_n)
    d_weight_ih = op.Concat(*_split(shared_weight, 3)[:2], d_n_weight, axis=0)
    d_bias_ih = op.Concat(*_split(d_bias_hh, 3)[:2], d_n_bias, axis=0)
    gates_of_x = op.Concat(_columns(gates, 0, 2 * steps.hidden), d_n, axis=1)
    d_x = steps.input_gradient(gates_of_x, weight_ih)
    return d_x, d_weight_ih, d_weight_hh, d_bias_ih, d_bias_hh, d_h_0


RECURRENT_TRANSLATIONS: Final[dict[Any, Callable[..., Any]]] = {
    operators.lstm.default: _lstm,
    operators.lstm_backward.default: _lstm_backward,
    operators.gru.default: _gru,
    operators.gru_backward.default: _gru_backward,
}
"""How the exporter writes each operator."""
