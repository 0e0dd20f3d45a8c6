"""Recurrent layers: operators against float64 torch, then whole plans, whose builds verify themselves."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import ModelProto
from torch import nn
from torch._subclasses import FakeTensorMode

from coordinator.plan import joint_graph
from coordinator.plan.build import assemble, build
from coordinator.plan.export import to_onnx
from coordinator.plan.graphs import export_graphs
from coordinator.plan.joint_graph import trace
from coordinator.plan.recurrent import WholeRecurrentLayers, operators
from coordinator.plan.rejection import PlanRejected, PlanWarning
from coordinator.plan.task import Task
from edge_agent.plan_guard import check

KINDS = ("LSTM", "GRU")
GATES = {"LSTM": 4, "GRU": 3}
FEATURES, HIDDEN = 2, 3


class Both(nn.Module):
    """One layer and its gradients: ``(output gradients, layer) -> (outputs, gradients)``."""

    def __init__(self, kind):
        super().__init__()
        self.forwards = getattr(operators, kind.lower())
        self.backwards = getattr(operators, f"{kind.lower()}_backward")

    def forward(self, d_outputs: tuple[torch.Tensor, ...], layer: tuple[torch.Tensor, ...]):
        outputs = self.forwards(*layer)
        return (*outputs, *self.backwards(*d_outputs, outputs[0], *layer))


def layer_tensors(kind, steps, batch, features=FEATURES, hidden=HIDDEN):
    """Gradients of the outputs, and the layer's arguments in its operator's order."""
    generator = torch.Generator().manual_seed(steps + batch)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    states = [draw(batch, hidden) for _ in range(2 if kind == "LSTM" else 1)]
    rows = GATES[kind] * hidden
    layer = (
        *(draw(steps, batch, features), draw(rows, features), draw(rows, hidden), draw(rows), draw(rows)),
        *states,
    )
    return (draw(steps, batch, hidden), *(draw(batch, hidden) for _ in states)), layer


def export_layer(kind, steps, features=FEATURES, hidden=HIDDEN) -> ModelProto:
    d_outputs, layer = layer_tensors(kind, steps, 5, features, hidden)
    batch = torch.export.Dim("batch", min=1, max=1000)
    by_row, state = {1: batch}, {0: batch}
    shapes = (
        (by_row, *(state for _ in d_outputs[1:])),
        (by_row, {}, {}, {}, {}, *(state for _ in layer[5:])),
    )
    names = [f"in{index}" for index in range(len(d_outputs) + len(layer))]
    outputs = len(d_outputs) + 6
    return to_onnx(Both(kind), (d_outputs, layer), shapes, names, [f"out{index}" for index in range(outputs)])


def run(model, d_outputs, layer):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {f"in{i}": np.asarray(t) for i, t in enumerate((*d_outputs, *layer))})


def float64_torch(kind, d_outputs, layer):
    """The same from torch's own layer and its autograd."""
    d_outputs = [tensor.double() for tensor in d_outputs]
    x, weight_ih, weight_hh, bias_ih, bias_hh, *states = leaves = [
        tensor.double().requires_grad_() for tensor in layer
    ]
    module = getattr(nn, kind)(x.shape[2], states[0].shape[1]).double()
    start = tuple(state.unsqueeze(0) for state in states)
    parameters = dict(
        zip(
            ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"),
            (weight_ih, weight_hh, bias_ih, bias_hh),
            strict=True,
        )
    )
    start = start if kind == "LSTM" else start[0]
    y, end = torch.func.functional_call(module, parameters, (x, start))
    outputs = [y, *(state[0] for state in (end if kind == "LSTM" else (end,)))]
    gradients = list(torch.autograd.grad(outputs, leaves, d_outputs))
    if kind == "LSTM":
        del gradients[4]  # both biases have one gradient
    return [tensor.detach().numpy() for tensor in (*outputs, *gradients)]


@pytest.fixture(scope="module")
def layers() -> dict[tuple[str, int], ModelProto]:
    """Each kind of layer over 3 and over 5 time steps."""
    return {(kind, steps): export_layer(kind, steps) for kind in KINDS for steps in (3, 5)}


@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_of_a_layer_agree_with_float64_torch(layers, kind, batch):
    tensors = layer_tensors(kind, 3, batch)
    found, exact = run(layers[kind, 3], *tensors), float64_torch(kind, *tensors)
    assert len(found) == len(exact)
    for value, expected in zip(found, exact, strict=True):
        np.testing.assert_allclose(value, expected, atol=2e-6 * max(1, np.abs(expected).max()))


def test_the_last_cell_state_of_one_unit_is_the_hand_computed_one(layers):
    # Zero weights and states, all biases zero but g's, which is 0.5: i = f = o = 1/2 and g = tanh(1/2) at
    # each step. c_1 = i g = g/2; c_2 = f c_1 + i g = 3g/4; c_3 = 7g/8; y_t = o tanh(c_t) = tanh(c_t) / 2.
    d_outputs, (x, *parameters, h_0, c_0) = layer_tensors("LSTM", 3, 1)
    weight_ih, weight_hh, bias_ih, bias_hh = map(torch.zeros_like, parameters)
    bias_ih[2 * HIDDEN : 3 * HIDDEN] = 0.5
    layer = (x, weight_ih, weight_hh, bias_ih, bias_hh, torch.zeros_like(h_0), torch.zeros_like(c_0))
    y, _, c_n, *_ = run(layers["LSTM", 3], d_outputs, layer)
    g = np.tanh(0.5)
    np.testing.assert_allclose(c_n, np.full((1, HIDDEN), 7 * g / 8), atol=1e-6)
    for step, cell in enumerate((g / 2, 3 * g / 4, 7 * g / 8)):
        np.testing.assert_allclose(y[step], np.full((1, HIDDEN), np.tanh(cell) / 2), atol=1e-6)


def test_the_gradient_of_a_cell_bias_is_the_hand_computed_one(layers):
    # As above with the loss c_3: dc_3/dg_t = i f^(3-t) = 1/2 (1/2)^(3-t), and dg/da = 1 - g^2 at a = 0.5.
    # The bias is in all three steps: (1/8 + 1/4 + 1/2) (1 - g^2) = 7/8 (1 - g^2).
    # Weights of h are zero, so nothing else is passed on. Forget gates: dc_3/df_1 = f^2 c_0 = 0,
    # dc_3/df_2 = f c_1 = g/4 and dc_3/df_3 = c_2 = 3g/4, each times f (1 - f) = 1/4: g/4 in all.
    (d_y, d_h_n, d_c_n), (x, *parameters, h_0, c_0) = layer_tensors("LSTM", 3, 1)
    weight_ih, weight_hh, bias_ih, bias_hh = map(torch.zeros_like, parameters)
    bias_ih[2 * HIDDEN : 3 * HIDDEN] = 0.5
    layer = (x, weight_ih, weight_hh, bias_ih, bias_hh, torch.zeros_like(h_0), torch.zeros_like(c_0))
    results = run(
        layers["LSTM", 3], (torch.zeros_like(d_y), torch.zeros_like(d_h_n), torch.ones_like(d_c_n)), layer
    )
    d_bias = results[3 + 3]
    g = np.tanh(0.5)
    np.testing.assert_allclose(d_bias[2 * HIDDEN : 3 * HIDDEN], 7 / 8 * (1 - g * g), atol=1e-6)
    np.testing.assert_allclose(d_bias[HIDDEN : 2 * HIDDEN], g / 4, atol=1e-6)


@pytest.mark.parametrize(("kind", "most"), [("LSTM", 8), ("GRU", 5)])
def test_a_time_step_adds_few_nodes(layers, kind, most):
    short, long = (len(layers[kind, steps].graph.node) for steps in (3, 5))
    assert 0 < long - short <= 2 * most


def traced(module, *tensors):
    """What the module gives while its recurrent layers are kept whole; shapes without values."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, WholeRecurrentLayers():
        return module(*[mode.from_tensor(tensor) for tensor in tensors])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layers_", [1, 3])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_shapes_are_those_of_torch(kind, layers_, bidirectional, batch_first, bias):
    module = getattr(nn, kind)(
        FEATURES, HIDDEN, layers_, bias=bias, batch_first=batch_first, bidirectional=bidirectional
    )
    x = torch.zeros(4, 6, FEATURES)
    expected, found = (
        torch.utils._pytree.tree_leaves(run(module, x)) for run in (nn.Module.__call__, traced)
    )
    assert [tensor.shape for tensor in found] == [tensor.shape for tensor in expected]


def test_a_projection_is_refused():
    with pytest.raises(PlanRejected, match=r"has a proj_size, which plans lack; leave it out"):
        traced(nn.LSTM(FEATURES, HIDDEN, proj_size=2), torch.zeros(4, 6, FEATURES))


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_sequence_is_refused(kind):
    packed = nn.utils.rnn.pack_sequence([torch.zeros(4, FEATURES), torch.zeros(3, FEATURES)])
    module = getattr(nn, kind)(FEATURES, HIDDEN)
    with pytest.raises(PlanRejected, match="pad sequences to one length"), WholeRecurrentLayers():
        module(packed)


class LastTwice(nn.Module):
    """Reads the last time step twice, perhaps with a change in between."""

    def __init__(self, change: Callable[[torch.Tensor], object], **options):
        super().__init__()
        self.gru = nn.GRU(FEATURES, HIDDEN, batch_first=True, **options)
        self.change = change

    def forward(self, x):
        y = self.gru(x)[0]
        first = y[:, -1]
        self.change(y)
        return first, y[:, -1]


def test_reading_the_last_time_step_gives_the_last_state():
    first, second = traced(LastTwice(lambda y: y.mul(2)), torch.zeros(4, 6, FEATURES))
    assert first is second
    assert first.shape == (4, HIDDEN)


@pytest.mark.parametrize(
    ("change", "options"),
    [
        (lambda y: y.mul_(2), {}),
        (lambda y: y[:, 1].zero_(), {}),
        (lambda y: None, {"bidirectional": True}),
    ],
)
def test_what_is_no_longer_the_last_state_is_read_from_the_output(change, options):
    first, second = traced(LastTwice(change, **options), torch.zeros(4, 6, FEATURES))
    assert first is not second


@pytest.mark.parametrize(
    "index",
    [(slice(None), 0), (slice(None), 4), (slice(1, None), -1), -1, (0, -1), (slice(None), slice(-1, None))],
)
def test_other_places_are_read_from_the_output(index):
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru = nn.GRU(FEATURES, HIDDEN, batch_first=True)

        def forward(self, x):
            y = self.gru(x)[0]
            return y[index], y[index]

    first, second = traced(Reader(), torch.zeros(4, 6, FEATURES))
    assert first is not second
    assert first.shape == torch.zeros(4, 6, HIDDEN)[index].shape


@dataclass(frozen=True)
class Shape:
    """One recurrent model: which layer over how many time steps, and how its output is read."""

    kind: str
    steps: int
    hidden: int = 5
    read: str = "last"
    learned_start: bool = False
    options: dict[str, object] | None = None


class Recurrent(nn.Module):
    """Sequences of 3 readings to 4 classes."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        self.layer = getattr(nn, shape.kind)(3, shape.hidden, batch_first=True, **(shape.options or {}))
        directions = 2 if self.layer.bidirectional else 1
        self.head = nn.Linear(shape.hidden * directions, 4)
        if shape.learned_start:
            self.start = nn.Parameter(torch.randn(self.layer.num_layers * directions, 1, shape.hidden))

    def forward(self, x):
        start = None
        if self.shape.learned_start:
            start = self.start.expand(-1, x.shape[0], -1).contiguous()
            start = (start, start) if self.shape.kind == "LSTM" else start
        y, end = self.layer(x, start)
        match self.shape.read:
            case "last":
                y = y[:, -1]
            case "mean":
                y = y.mean(1)
            case "cell":
                y = end[1][-1]
            case _:
                y = y[:, 1:].amax(1)
        return self.head(y)


def recurrent_task(shape: Shape, model: nn.Module | None = None) -> Task:
    torch.manual_seed(0)
    model = model or Recurrent(shape)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    example = (torch.randn(16, shape.steps, 3), torch.randint(0, 4, (16,)))
    return Task(model, nn.CrossEntropyLoss(), optimizer, example, shape.kind, "accuracy")


def operator_counts(model: ModelProto, kind: str) -> int:
    return sum(node.op_type == kind for node in model.graph.node)


def test_two_layers_of_lstm_with_dropout_between_them():
    task = recurrent_task(Shape("LSTM", 4, options={"num_layers": 2, "dropout": 0.5}))
    graphs = export_graphs(task)
    built = assemble(task, graphs)  # against torch with the same mask; with another one it would be refused
    check(built.plan)
    assert graphs.joint.dropouts == 1
    assert operator_counts(graphs.train.shipped, "LSTM") == 2
    assert operator_counts(graphs.evaluation.model, "LSTM") == 2
    assert operator_counts(graphs.evaluation.model, "RandomUniformLike") == 0


@pytest.mark.long
def test_a_gru_in_both_directions_from_a_learned_start():
    shape = Shape("GRU", 4, read="mean", learned_start=True, options={"bidirectional": True, "bias": False})
    built = build(recurrent_task(shape))
    check(built.plan)
    assert "p.start" in {tensor.name for tensor in built.plan.manifest.schema.tensors}


def test_a_layer_over_the_batch_is_refused():
    class TimeFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.GRU(3, 5)
            self.head = nn.Linear(5, 4)

        def forward(self, x):
            return self.head(self.layer(x)[0][:, -1])

    with pytest.raises(PlanRejected, match=r"takes the batch for its time steps.*batch_first=True"):
        trace(recurrent_task(Shape("GRU", 4), TimeFirst()))


SHAPES = {
    "last": {},
    "all": {"read": "max"},
    "start": {"learned_start": True},
    "two_layers": {"options": {"num_layers": 2}, "read": "mean"},
    "no_bias": {"options": {"bias": False}},
    "both_directions": {"options": {"bidirectional": True, "num_layers": 2, "dropout": 0.25}, "read": "max"},
    "one_step": {"steps": 1},
    "long": {"steps": 64, "hidden": 32},
}


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SHAPES)
def test_plans_of_recurrent_models_are_right_and_small(kind, name):
    shape = Shape(kind, **({"steps": 24} | SHAPES[name]))
    built = build(recurrent_task(shape))
    check(built.plan)
    size = sum(len(zlib.compress(graph, 9)) for graph in (built.plan.train, built.plan.evaluation))
    print(f"{kind} {name}: {size:,} bytes, {built.plan.manifest.verified.max_gradient_error:.1e}")
    assert size <= 64 << 10


@pytest.mark.long
def test_a_loss_of_the_last_cell_state_alone():
    check(build(recurrent_task(Shape("LSTM", 6, read="cell"))).plan)


class Unrolled(nn.Module):
    """A loop over the time steps that the model's owner wrote."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell
        self.head = nn.Linear(5, 4)

    def forward(self, x):
        h = c = x.new_zeros((x.shape[0], 5))
        for t in range(x.shape[1]):
            if isinstance(self.cell, nn.LSTMCell):
                h, c = self.cell(x[:, t], (h, c))
            else:
                h = self.cell(x[:, t], h)
        return self.head(h)


@pytest.mark.long
@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_loops_over_cells_are_unrolled(cell):
    check(build(recurrent_task(Shape("loop", 3), Unrolled(cell(3, 5)))).plan)


@pytest.mark.long
def test_a_plain_recurrent_layer_is_unrolled():
    check(build(recurrent_task(Shape("RNN", 6))).plan)


@pytest.mark.parametrize(
    ("kind", "most", "count"),
    [("RNN", 20, r"1\d\d"), ("LSTM", 20 * joint_graph.OPERATORS_PER_STEP, r"1[2-9]\d")],
)
def test_many_operators_or_time_steps_are_warned_about(monkeypatch, kind, most, count):
    monkeypatch.setattr(joint_graph, "MANY_OPERATORS", most)
    with pytest.warns(PlanWarning, match=rf"The model has {count} operators to export, .*: 6 operators in"):
        trace(recurrent_task(Shape(kind, 2 if kind == "RNN" else 20)))
