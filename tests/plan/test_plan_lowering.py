"""Rules of single operators, and rewritings of graphs, against what they replace. No plan is built."""

import numpy as np
import onnxruntime
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from coordinator.plan.lowering import LOWERINGS
from coordinator.plan.rewriting import rewritten

aten = torch.ops.aten


def test_the_gradient_stops_where_a_rectifier_is_flat_and_at_its_corner():
    gradient, x = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([-1.0, 0.0, 1.0])
    assert LOWERINGS[aten.threshold_backward.default](gradient, x, 0).tolist() == [0.0, 0.0, 4.0]


def test_the_gradient_stops_at_both_corners_of_relu6():
    gradient = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    x = torch.tensor([-1.0, 0.0, 3.0, 6.0, 7.0])
    expected = aten.hardtanh_backward(gradient, x, 0.0, 6.0)
    found = LOWERINGS[aten.hardtanh_backward.default](gradient, x, 0.0, 6.0)
    assert found.tolist() == expected.tolist() == [0.0, 0.0, 4.0, 0.0, 0.0]


def test_the_gradient_of_an_embedding_adds_up_where_a_token_repeats():
    gradient, tokens = torch.tensor([[[1.0, 2.0], [10.0, 20.0], [100.0, 200.0]]]), torch.tensor([[2, 0, 2]])
    rule = LOWERINGS[aten.embedding_dense_backward.default]
    assert rule(gradient, tokens, 4, -1, False).tolist() == [
        [10.0, 20.0],
        [0.0, 0.0],
        [101.0, 202.0],
        [0.0, 0.0],
    ]
    # Token 2 is padding: no gradient.
    assert rule(gradient, tokens, 4, 2, False).tolist() == [[10.0, 20.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]


def targets(module):
    return [node.target for node in module.graph.nodes if node.op == "call_function"]


def assert_the_same(function, *arguments):
    """Rewrite the function's graph, check that it still computes the same, and return its operators."""
    traced = make_fx(function)(*arguments)
    changed = rewritten(traced)
    torch.testing.assert_close(changed(*arguments), traced(*arguments), rtol=0, atol=0)
    return targets(changed)


def test_attention_without_a_mask_takes_the_plain_softmax():
    queries, keys = torch.randn(2, 3, 4), torch.randn(2, 3, 4)

    def scores(queries, keys):
        return aten._safe_softmax(aten.bmm(queries, keys.transpose(1, 2)).view(1, 2, 3, 3), -1)

    operators = assert_the_same(scores, queries, keys)
    assert aten._softmax.default in operators
    assert aten._safe_softmax.default not in operators


def test_attention_with_a_mask_keeps_its_empty_rows_zero():
    queries, keys = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    mask = torch.tensor([[0.0, 0.0, 0.0], [0.0, -torch.inf, 0.0], [-torch.inf] * 3])

    def scores(queries, keys):
        return aten._safe_softmax(aten.bmm(queries, keys.transpose(1, 2)) + mask, -1)

    assert aten._safe_softmax.default in assert_the_same(scores, queries, keys)
    assert scores(queries, keys)[:, 2].tolist() == [[0.0] * 3] * 2


def test_the_gradients_of_all_parts_become_one_stack():
    a, b, c = torch.randn(3, 2, 4).unbind(0)

    def gradient(a, b, c):
        whole = [2, 3, 4]
        parts = [aten.select_backward(part, whole, 1, index) for part, index in ((a, 2), (b, 0), (c, 1))]
        return parts[0] + parts[1] + parts[2]

    operators = assert_the_same(gradient, a, b, c)
    assert operators.count(aten.stack.default) == 1
    assert aten.add.Tensor not in operators


def test_the_gradients_of_some_parts_are_still_added():
    a, b = torch.randn(2, 2, 4).unbind(0)

    def some(a, b):
        return aten.select_backward(a, [2, 3, 4], 1, 0) + aten.select_backward(b, [2, 3, 4], 1, 1)

    def twice(a, b):
        return aten.select_backward(a, [2, 2, 4], 1, 0) + aten.select_backward(b, [2, 2, 4], 1, 0)

    def scaled(a, b):
        return torch.add(
            aten.select_backward(a, [2, 2, 4], 1, 0), aten.select_backward(b, [2, 2, 4], 1, 1), alpha=2
        )

    for function in (some, twice, scaled):
        assert aten.add.Tensor in assert_the_same(function, a, b)


def test_the_gradient_of_a_mean_is_not_spread_before_a_product():
    gradient, x = torch.randn(2, 3, 1), torch.randn(2, 3, 5)

    def product(gradient, x):
        return aten.div.Scalar(gradient.expand(2, 3, 5), 5) * x

    assert aten.expand.default not in assert_the_same(product, gradient, x)


def test_of_two_spread_gradients_one_stays_spread():
    gradient, other = torch.randn(2, 3, 1), torch.randn(2, 3, 1)

    def product(gradient, other):
        return aten.div.Scalar(gradient.expand(2, 3, 5), 5) * aten.neg(other.expand(2, 3, 5))

    assert assert_the_same(product, gradient, other).count(aten.expand.default) == 1


def test_a_gradient_is_spread_for_a_sum_and_for_a_result():
    gradient = torch.randn(2, 3, 1)

    def summed(gradient):
        return aten.div.Scalar(gradient.expand(2, 3, 5), 5).sum(2)

    def given(gradient):
        return aten.div.Scalar(gradient.expand(2, 3, 5), 5)

    def squared(gradient):
        spread = gradient.expand(2, 3, 5)
        return spread * spread

    for function in (summed, given, squared):
        assert aten.expand.default in assert_the_same(function, gradient)


def test_a_step_on_nan_leaves_nothing_behind_in_the_session(cnn):
    # Onnxruntime writes batch normalisation's new statistics over those it is given; were they a constant of
    # the graph, one bad batch would stay in it for as long as the session lives.
    session = onnxruntime.InferenceSession(cnn.plan.train, providers=["CPUExecutionProvider"])
    state = cnn.plan.manifest.schema.split(cnn.initial)
    rng = np.random.default_rng(0)
    feed = {}
    for value in session.get_inputs():
        shape = [8 if not isinstance(size, int) else size for size in value.shape]
        dtype = np.int64 if "int64" in value.type else np.float32
        feed[value.name] = state.get(value.name, np.zeros(shape, dtype))
    good = feed | {"x0": rng.standard_normal((8, 1, 8, 8)).astype(np.float32)}
    bad = feed | {"x0": np.full((8, 1, 8, 8), np.nan, np.float32)}
    names = ["b.1.running_mean'", "b.1.running_var'"]
    before = session.run(names, good)
    assert all(np.isnan(value).all() for value in session.run(names, bad))
    for first, second in zip(before, session.run(names, good), strict=True):
        np.testing.assert_array_equal(first, second)
