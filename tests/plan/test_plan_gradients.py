import dataclasses

import numpy as np
import pytest
import torch
from onnx import ModelProto, helper, numpy_helper
from plan_tasks import autoencoder_task, mlp_task
from torch import nn

from coordinator.plan.build import build
from coordinator.plan.rejection import PlanRejected
from coordinator.plan.verify import verify
from edge_agent.dataset import Dataset
from edge_agent.plan_runtime import Trainer
from fedtide.wire.training import Training


@pytest.mark.parametrize("name", ["mlp", "cnn", "autoencoder"])
def test_gradients_agree_with_float64_torch(name, request):
    verified = request.getfixturevalue(name).plan.manifest.verified
    assert verified.steps == 20
    assert 0 < verified.median_gradient_error <= 2e-6
    assert verified.max_gradient_error <= max(1e-5, 3 * verified.torch_float32_max_error)


def test_one_step_of_the_mlp_is_the_hand_written_one(mlp):
    # One example, so with logits z and targets y: dL/dz = softmax(z) - onehot(y), and w <- w - 0.5 * dL/dw.
    w1, b1, w2, b2 = mlp.plan.manifest.schema.split(mlp.initial.astype(np.float64)).values()
    x, y = np.linspace(-1, 1, 8), 2
    hidden = np.maximum(w1 @ x + b1, 0)
    z = w2 @ hidden + b2
    dz = np.exp(z) / np.exp(z).sum() - np.eye(3)[y]
    dh = (w2.T @ dz) * (hidden > 0)
    gradient = np.concatenate([np.outer(dh, x).ravel(), dh, np.outer(dz, hidden).ravel(), dz])
    dataset = Dataset((x[None].astype(np.float32),), np.array([y]))
    result = Trainer(mlp.plan).run_epochs(
        mlp.initial, dataset, Training(learning_rate=0.5), np.random.default_rng(0)
    )
    np.testing.assert_allclose(result.parameters, mlp.initial - 0.5 * gradient, atol=1e-6)
    assert result.loss == pytest.approx(-np.log(np.exp(z[y]) / np.exp(z).sum()), abs=1e-6)


@pytest.mark.parametrize(("name", "make_task"), [("mlp", mlp_task), ("autoencoder", autoencoder_task)])
def test_two_epochs_on_a_device_are_two_epochs_of_torch(name, make_task, request, points):
    built, task = request.getfixturevalue(name), make_task()
    training = Training(local_epochs=2, batch_size=32, learning_rate=0.1)
    dataset = points if task.example[1] is not None else Dataset(points.inputs)
    result = Trainer(built.plan).run_epochs(built.initial, dataset, training, np.random.default_rng(6))
    optimizer, rng = task.optimizer, np.random.default_rng(6)
    optimizer.param_groups[0]["lr"] = 0.1
    for _ in range(2):
        order = rng.permutation(70)
        for rows in (order[:32], order[32:64], order[64:]):
            x = torch.from_numpy(points.inputs[0][rows])
            y = x if task.example[1] is None else torch.from_numpy(points.targets[rows])
            optimizer.zero_grad()
            task.loss(task.model(x), y).backward()
            optimizer.step()
    expected = torch.cat([parameter.detach().reshape(-1) for parameter in task.model.parameters()])
    assert result.steps == 6
    np.testing.assert_allclose(result.parameters, expected.numpy(), atol=2e-6)


def scaled(model, name, factor):
    """The graph with one value multiplied by a factor wherever it is used."""
    wrong = ModelProto()
    wrong.CopyFrom(model)
    for node in wrong.graph.node:
        for names in (node.input, node.output):
            names[:] = ["right" if value == name else value for value in names]
    wrong.graph.initializer.append(numpy_helper.from_array(np.float32(factor), "factor"))
    position = next(i for i, node in enumerate(wrong.graph.node) if "right" in node.output)
    wrong.graph.node.insert(position + 1, helper.make_node("Mul", ["right", "factor"], [name]))
    for node in wrong.graph.node[position + 2 :]:
        node.input[:] = [name if value == "right" else value for value in node.input]
    return wrong


def scaled_alone(model, name, factor):
    """The graph with one value multiplied by a factor, but only where the batch has a single example."""
    wrong = scaled(model, name, factor)
    count = numpy_helper.from_array(np.array(1), "single")
    wrong.graph.initializer.extend([count, numpy_helper.from_array(np.float32(1), "unchanged")])
    product = next(node for node in wrong.graph.node if "factor" in node.input)
    product.input[:] = ["chosen" if value == "factor" else value for value in product.input]
    choice = [
        helper.make_node("Shape", ["x0"], ["rows"], start=0, end=1),
        helper.make_node("Equal", ["rows", "single"], ["alone"]),
        helper.make_node("Where", ["alone", "factor", "unchanged"], ["chosen"]),
    ]
    for node in reversed(choice):
        wrong.graph.node.insert(0, node)
    return wrong


def planted(graphs, train_value, factor, change=scaled):
    """The exported graphs with a defect in the train graph, shipped and probed alike."""
    train = dataclasses.replace(
        graphs.train,
        shipped=change(graphs.train.shipped, train_value, factor),
        probed=change(graphs.train.probed, train_value, factor),
    )
    return dataclasses.replace(graphs, train=train)


def at_a_corner(graphs):
    """The graphs with a bias that puts every ReLU at its corner, but for roundings, for one example."""
    x = mlp_task().tensors[0]
    parameters = dict(graphs.joint.parameters)
    parameters["0.bias"] = -(parameters["0.weight"] @ x[0])
    return dataclasses.replace(graphs, joint=dataclasses.replace(graphs.joint, parameters=parameters))


def with_weight_decay(graphs, decay):
    """The graphs, to be compared with an optimizer that also has weight decay."""
    (group,) = graphs.recipe.groups
    group = dataclasses.replace(group, settings={**group.settings, "weight_decay": decay})
    return dataclasses.replace(graphs, recipe=dataclasses.replace(graphs.recipe, groups=(group,)))


def slow_task(learning_rate):
    """The MLP's task at another learning rate."""
    return dataclasses.replace(mlp_task(), training=Training(learning_rate=learning_rate))


def test_scaling_by_one_changes_nothing(mlp_graphs):
    assert verify(mlp_task(), planted(mlp_graphs, "g.0.weight", 1.0)).steps == 20


@pytest.mark.parametrize("gradient", ["g.0.weight", "g.0.bias", "g.2.weight", "g.2.bias"])
def test_a_gradient_wrong_by_a_ten_thousandth_is_rejected(mlp_graphs, gradient):
    with pytest.raises(PlanRejected, match=r"gradients differ from float64 torch by .*e-0[45] \(median\)"):
        verify(mlp_task(), planted(mlp_graphs, gradient, 1.0001))


@pytest.mark.parametrize("parameter", ["0.weight", "2.bias"])
def test_a_step_wrong_by_a_hundred_thousandth_is_rejected(mlp_graphs, parameter):
    with pytest.raises(PlanRejected, match=rf"Step \d+ of the plan's SGD takes {parameter} "):
        verify(mlp_task(), planted(mlp_graphs, f"p.{parameter}'", 1.00001))


def test_a_relu_at_its_corner_is_no_error_of_the_plan(mlp_graphs):
    # Which side the roundings put it on is by chance, so a gradient is there or not: percents, at one step.
    verified = verify(mlp_task(), at_a_corner(mlp_graphs))
    assert verified.max_gradient_error > 1e-3
    assert verified.max_gradient_error <= 3 * verified.torch_float32_max_error
    assert verified.median_gradient_error < 1e-6


@pytest.mark.parametrize("start", [lambda graphs: graphs, at_a_corner], ids=["plain", "corner"])
@pytest.mark.parametrize("factor", [1.0001, 1.01])
def test_a_wrong_gradient_of_single_examples_is_rejected_whatever_other_steps_are_like(
    mlp_graphs, start, factor
):
    wrong = planted(start(mlp_graphs), "g.2.weight", factor, scaled_alone)
    with pytest.raises(PlanRejected, match=r"gradients differ from .*at step (3|7|11|15|19)\)"):
        verify(mlp_task(), wrong)


def test_a_gradient_wrong_at_every_step_is_rejected_beside_a_corner(mlp_graphs):
    with pytest.raises(PlanRejected, match="gradients differ from float64 torch"):
        verify(mlp_task(), planted(at_a_corner(mlp_graphs), "g.0.weight", 1.0001))


@pytest.mark.parametrize("learning_rate", [1e-6, 1e-4, 0.1])
def test_a_missing_weight_decay_is_rejected_at_any_learning_rate(mlp_graphs, learning_rate):
    # At a learning rate of 1e-6 the whole step is smaller than the roundings of the parameters.
    assert verify(slow_task(learning_rate), with_weight_decay(mlp_graphs, 0.0)).steps == 20
    with pytest.raises(PlanRejected, match=r"Step 0 of the plan's SGD takes 0.weight "):
        verify(slow_task(learning_rate), with_weight_decay(mlp_graphs, 5e-4))


def test_adam_with_a_beta_close_to_one_passes():
    # At step 1, 1 - β2 is 1e-5: in float32 0.1 percent away from that, and so is the move, in torch too.
    task = mlp_task()
    model = nn.Linear(8, 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.9, 0.99999))
    built = build(dataclasses.replace(task, model=model, optimizer=optimizer))
    assert built.plan.manifest.optimizer == "Adam"


def test_a_wrong_loss_is_rejected(mlp_graphs):
    with pytest.raises(PlanRejected, match="the plan's loss differs"):
        verify(mlp_task(), planted(mlp_graphs, "loss", 1.0001))


def test_a_wrong_evaluation_graph_is_rejected(mlp_graphs):
    evaluation = dataclasses.replace(
        mlp_graphs.evaluation, model=scaled(mlp_graphs.evaluation.model, "out", 1.0001)
    )
    with pytest.raises(PlanRejected, match="The evaluation graph's out differs"):
        verify(mlp_task(), dataclasses.replace(mlp_graphs, evaluation=evaluation))


def test_building_leaves_the_task_as_it_was(mlp):
    task = mlp_task()
    model = task.model
    assert isinstance(model, nn.Sequential)
    before = torch.cat([parameter.detach().reshape(-1).clone() for parameter in model.parameters()])
    np.testing.assert_array_equal(before.numpy(), mlp.initial)  # the same seed gives the same start
    assert not task.optimizer.state
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_manifest_says_what_the_plan_takes(cnn):
    manifest = cnn.plan.manifest
    assert [tensor.name for tensor in manifest.schema.tensors] == [
        *("p.0.weight", "p.0.bias", "p.1.weight", "p.1.bias", "p.6.weight", "p.6.bias"),
        *("b.1.running_mean", "b.1.running_var"),
    ]
    assert [(tensor.name, tensor.dtype) for tensor in manifest.local_buffers] == [
        ("b.1.num_batches_tracked", "int64")
    ]
    assert manifest.inputs[0].shape == (None, 1, 8, 8)
    assert manifest.targets.dtype == "int64"
    assert manifest.min_batch == 2
    assert manifest.optimizer == "AdamW"
    assert manifest.training == Training(learning_rate=0.01)
    # AdamW keeps two moments for each of 6 parameters and one shared step count.
    assert len(manifest.local_state) == 2 * 6 + 1
