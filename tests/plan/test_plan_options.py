"""Proximal term, clipping, class weights, shared and frozen parameters, dropout seeds."""

import dataclasses

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import ModelProto, helper, numpy_helper
from plan_coverage import OPTIONS, weighted_cross_entropy
from plan_tasks import mlp_task
from torch import nn

from coordinator.plan.build import MAX_MODEL_BYTES, assemble, build
from coordinator.plan.file import BuiltPlan
from coordinator.plan.graphs import Graphs, export_graphs
from coordinator.plan.rejection import PlanRejected
from coordinator.plan.task import Task
from coordinator.plan.verify import verify
from edge_agent.dataset import Dataset
from edge_agent.plan_runtime import Trainer
from edge_agent.settings import AgentSettings
from fedtide.cli.plan import build as build_command
from fedtide.wire.plan import Limits
from fedtide.wire.training import Training


def full_task(clip_norm=0.2) -> Task:
    """The MLP with every option."""
    return dataclasses.replace(
        mlp_task(),
        loss=weighted_cross_entropy,
        class_weights=3,
        proximal=True,
        clip_norm=clip_norm,
        buffers="local",
        limits=Limits(step_deadline_s=5.0),
    )


@pytest.fixture(scope="module")
def graphs() -> Graphs:
    return export_graphs(full_task())


@pytest.fixture(scope="module")
def full(graphs) -> BuiltPlan:
    return assemble(full_task(), graphs)


def test_the_manifest_says_which_options_a_plan_has(full):
    manifest = full.plan.manifest
    assert manifest.proximal_input == "proximal"
    assert manifest.clip_norm == 0.2
    assert manifest.buffers == "local"
    assert manifest.limits.step_deadline_s == 5.0
    assert (manifest.class_weights.name, manifest.class_weights.shape) == ("class_weights", (3,))


@pytest.mark.parametrize("mu", [0.0, 0.03, 2.0])
@pytest.mark.parametrize("distance", [0.0, 0.5])
def test_a_step_is_torchs_with_proximal_term_clipping_and_class_weights(full, mu, distance):
    task, weights = full_task(), torch.tensor([0.5, 3.0, 1.0])
    x, y = task.tensors
    parameters = dict(task.model.named_parameters())
    generator = torch.Generator().manual_seed(3)
    anchors = {
        name: value.detach() + distance * torch.randn(value.shape, generator=generator)
        for name, value in parameters.items()
    }
    feed = {
        "x0": x.numpy(),
        "y": y.numpy(),
        "learning_rate": np.array(0.1, np.float32),
        "proximal": np.array(mu, np.float32),
        "class_weights": weights.numpy(),
        **{f"p.{name}": value.detach().numpy().copy() for name, value in parameters.items()},
        **{f"a.{name}": value.numpy() for name, value in anchors.items()},
    }
    session = onnxruntime.InferenceSession(full.plan.train, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    found = dict(zip(names, session.run(names, feed), strict=True))

    loss = nn.functional.cross_entropy(task.model(x), y, weight=weights)
    pull = sum(((value - anchors[name]) ** 2).sum() for name, value in parameters.items())
    (loss + mu / 2 * pull).backward()
    norm = float(nn.utils.clip_grad_norm_(parameters.values(), 0.2))
    task.optimizer.step()

    assert norm > 0.2  # or nothing was clipped
    assert float(found["loss"]) == pytest.approx(float(loss.detach()), rel=1e-6)
    for name, value in parameters.items():
        np.testing.assert_allclose(found[f"p.{name}'"], value.detach().numpy(), atol=1e-7)


def with_scaled_input(model, name, factor):
    """The graph with one input multiplied by a factor."""
    wrong = ModelProto()
    wrong.CopyFrom(model)
    for node in wrong.graph.node:
        node.input[:] = ["scaled" if value == name else value for value in node.input]
    wrong.graph.initializer.append(numpy_helper.from_array(np.float32(factor), "factor"))
    wrong.graph.node.insert(0, helper.make_node("Mul", [name, "factor"], ["scaled"]))
    return wrong


def planted(graphs, name, factor):
    train = dataclasses.replace(
        graphs.train,
        shipped=with_scaled_input(graphs.train.shipped, name, factor),
        probed=with_scaled_input(graphs.train.probed, name, factor),
    )
    return dataclasses.replace(graphs, train=train)


@pytest.mark.parametrize("name", ["proximal", "a.0.weight", "class_weights"])
def test_scaling_an_input_by_one_changes_nothing(graphs, name):
    assert verify(full_task(), planted(graphs, name, 1.0)).steps == 20


@pytest.mark.parametrize("name", ["proximal", "a.0.weight", "a.2.bias"])
def test_a_wrong_proximal_term_is_rejected(graphs, name):
    with pytest.raises(PlanRejected, match=r"Step \d+ of the plan's SGD"):
        verify(full_task(), planted(graphs, name, 1.01))


def test_another_clip_norm_is_rejected(graphs):
    with pytest.raises(PlanRejected, match=r"Step \d+ of the plan's SGD"):
        verify(full_task(clip_norm=0.201), graphs)


def test_shared_parameters_are_one_tensor():
    built = build(OPTIONS["shared parameter"][2]())
    assert [tensor.name for tensor in built.plan.manifest.schema.tensors] == [
        *("p.embedding.weight", "p.hidden.weight", "p.hidden.bias"),
    ]


def test_a_large_frozen_layer_travels_with_the_model_and_never_changes():
    built = build(OPTIONS["frozen layer of 320 KiB"][2]())
    schema = built.plan.manifest.schema
    # The bias has 1280 numbers, more than 4 KiB, so it travels too.
    assert [tensor.name for tensor in schema.tensors] == ["p.2.weight", "p.2.bias", "b.0.weight", "b.0.bias"]
    assert len(built.plan.train) < 20_000
    rng = np.random.default_rng(0)
    dataset = Dataset((rng.standard_normal((32, 64)).astype(np.float32),), rng.integers(0, 10, 32))
    trained = Trainer(built.plan).run_epochs(built.initial, dataset, Training(local_epochs=3), rng)
    before, after = schema.split(built.initial), schema.split(trained.parameters)
    np.testing.assert_array_equal(before["b.0.weight"], after["b.0.weight"])
    assert np.abs(before["p.2.weight"] - after["p.2.weight"]).max() > 0


def test_the_same_seed_draws_the_same_dropout_masks(cnn, images):
    def losses(seed):
        trainer, rng = Trainer(cnn.plan, seed=seed), np.random.default_rng(0)
        return trainer.run_epochs(cnn.initial, images, Training(), rng).parameters

    np.testing.assert_array_equal(losses(1), losses(1))
    assert np.abs(losses(1) - losses(2)).max() > 0


def test_plans_are_built_for_what_agents_accept_unless_told_otherwise():
    default = next(option.default for option in build_command.params if option.name == "max_model_bytes")
    fields = dict(
        zip(AgentSettings.__struct_fields__[::-1], AgentSettings.__struct_defaults__[::-1], strict=False)
    )
    assert default == MAX_MODEL_BYTES == fields["max_model_bytes"]
