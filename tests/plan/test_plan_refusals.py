import dataclasses

import pytest
import torch
from plan_tasks import cnn_task, mlp_task
from torch import nn

import coordinator.plan.build as building
from coordinator.plan.build import assemble, build
from coordinator.plan.rejection import PlanRejected
from coordinator.plan.task import Task, check_task, load_task
from fedtide.wire.training import Training

TASK_FILE = """
import torch
from coordinator.plan.task import Task

model = torch.nn.Linear(2, 2)

def task():
    example = (torch.zeros(4, 2), torch.zeros(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Task(model, torch.nn.MSELoss(), optimizer, example, "from a file")
"""


def with_model(model, learning_rate=0.1):
    """The MLP's task with another model."""
    return dataclasses.replace(
        mlp_task(), model=model, optimizer=torch.optim.SGD(model.parameters(), lr=learning_rate)
    )


def refusal(task):
    with pytest.raises(PlanRejected) as refused:
        build(task)
    return str(refused.value)


class FixedBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 3)

    def forward(self, x):
        return self.linear(x.view(32, 8))


class FixedByLen(FixedBatch):
    def forward(self, x):
        return self.linear(x.view(len(x), 8))


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 3)

    def forward(self, x):
        return self.linear(x) if x.sum() > 0 else -self.linear(x)


class Bessel(FixedBatch):
    def forward(self, x):
        return torch.special.i0(self.linear(x))


def here(text, line):
    """Whether a refusal names a line of this file."""
    return text.startswith("tests/plan/test_plan_refusals.py:") and f"`{line}`: " in text


def test_lbfgs_is_refused():
    task = mlp_task()
    task = dataclasses.replace(task, optimizer=torch.optim.LBFGS(task.model.parameters()))
    assert refusal(task).startswith("LBFGS evaluates the loss several times in one step")


def test_a_fixed_batch_size_is_refused():
    text = refusal(with_model(FixedBatch()))
    assert here(text, "return self.linear(x.view(32, 8))")
    assert ": in FixedBatch.forward: " in text
    assert "The model fixes the batch size at 32" in text
    assert "x.view(x.shape[0], ...)" in text


def test_a_batch_size_fixed_by_len_is_refused_with_what_leaves_it_open():
    text = refusal(with_model(FixedByLen()))
    assert here(text, "return self.linear(x.view(len(x), 8))")
    assert "not len(x)" in text


def test_a_branch_on_values_is_refused():
    text = refusal(with_model(Branching()))
    assert here(text, "return self.linear(x) if x.sum() > 0 else -self.linear(x)")
    assert "use torch.where in place of `if`" in text


def test_an_operator_without_onnx_form_is_refused_with_its_line():
    text = refusal(with_model(Bessel()))
    assert here(text, "return torch.special.i0(self.linear(x))")
    assert "prims.bessel_i0 has no ONNX form" in text


@pytest.mark.parametrize("kind", [torch.optim.NAdam, torch.optim.RAdam, torch.optim.ASGD, torch.optim.Rprop])
def test_an_optimizer_that_plans_cannot_hold_is_refused_by_name(kind):
    task = mlp_task()
    text = refusal(dataclasses.replace(task, optimizer=kind(task.model.parameters())))
    assert text.startswith(kind.__name__)
    assert "use SGD, Adam" in text


def test_dampening_is_refused():
    task = mlp_task()
    optimizer = torch.optim.SGD(task.model.parameters(), lr=0.1, momentum=0.9, dampening=0.1)
    assert "leave dampening at 0" in refusal(dataclasses.replace(task, optimizer=optimizer))


def test_a_task_file_is_named_with_the_line_of_its_optimizer(tmp_path):
    path = tmp_path / "task.py"
    path.write_text(TASK_FILE.replace("SGD", "LBFGS"))
    # The file begins with an empty line; the optimizer is on line 9.
    assert refusal(load_task(path)).startswith(f"{path}:9: in task: `optimizer = torch.optim.LBFGS(")


def test_a_model_too_large_for_the_fleet_is_refused_before_anything_slow():
    # 16*8 + 16 + 3*16 + 3 = 195 parameters of 4 bytes.
    with pytest.raises(PlanRejected, match=r"780 bytes of parameters and devices accept 779.*0.weight \(512"):
        build(mlp_task(), max_model_bytes=779)


def test_graphs_of_more_nodes_than_devices_accept_are_refused(mlp_graphs, monkeypatch):
    nodes = len(mlp_graphs.train.shipped.graph.node)
    monkeypatch.setattr(building, "MAX_NODES", nodes)
    assert assemble(mlp_task(), mlp_graphs).plan.manifest.name == "mlp"
    monkeypatch.setattr(building, "MAX_NODES", nodes - 1)
    with pytest.raises(PlanRejected, match=f"{nodes} nodes, and devices accept {nodes - 1}; make"):
        assemble(mlp_task(), mlp_graphs)


def test_an_example_of_rows_all_alike_is_named_where_normalisation_fails_on_it(cnn_graphs):
    # Each channel's variance is zero, so batch normalisation divides roundings by its epsilon's root.
    images, labels = cnn_task().tensors
    task = dataclasses.replace(cnn_task(), example=(torch.zeros_like(images), labels))
    with pytest.raises(PlanRejected, match=r"inputs are alike.* torch\.randn") as refused:
        assemble(task, cnn_graphs)
    assert "use another one" not in str(refused.value)


def test_a_loss_that_ignores_its_class_weights_is_refused():
    def loss(output, targets, _class_weights):
        return nn.functional.cross_entropy(output, targets)

    text = refusal(dataclasses.replace(mlp_task(), loss=loss, class_weights=3))
    assert "ignores its third argument" in text
    assert text.startswith("tests/plan/test_plan_refusals.py:")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"clip_norm": 0.0}, "clip_norm is 0.0"),
        ({"clip_norm": float("nan")}, "clip_norm is nan"),
        ({"class_weights": 1}, "2 or more"),
        ({"training": Training(proximal=0.1)}, "proximal=True"),
        ({"training": Training(class_weights="balanced")}, "number of classes"),
    ],
)
def test_options_that_contradict_the_task_are_refused(options, reason):
    with pytest.raises(PlanRejected, match=reason):
        check_task(dataclasses.replace(mlp_task(), **options))


def test_a_single_row_is_refused():
    task = mlp_task()
    x, y = task.tensors
    assert "at least 2 rows" in refusal(dataclasses.replace(task, example=(x[:1], y[:1])))


def test_inputs_and_targets_of_different_lengths_are_refused():
    task = mlp_task()
    x, y = task.tensors
    assert "has 31 rows and tensor 0 has 32" in refusal(dataclasses.replace(task, example=(x, y[:31])))


def test_another_models_optimizer_is_refused():
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    assert "build it on model.parameters()" in refusal(dataclasses.replace(mlp_task(), optimizer=optimizer))


def test_double_precision_is_refused():
    assert "plans need torch.float32" in refusal(with_model(nn.Linear(8, 3).double()))


def test_a_loss_per_example_is_refused():
    task = dataclasses.replace(mlp_task(), loss=nn.CrossEntropyLoss(reduction="none"))
    assert "The loss has shape (32,)" in refusal(task)


def test_a_model_that_does_not_fit_its_example_is_refused():
    text = refusal(with_model(nn.Linear(9, 3)))
    assert text.startswith("in layer Linear(in_features=9, out_features=3, bias=True): ")
    assert "fail on the example batch" in text


def test_a_frozen_model_is_refused():
    model = nn.Linear(8, 3).requires_grad_(requires_grad=False)
    assert "nothing to train" in refusal(with_model(model))


def test_a_learning_rate_of_zero_is_refused():
    assert "must be above zero" in refusal(with_model(nn.Linear(8, 3), learning_rate=0.0))


def test_a_module_under_two_names_is_refused():
    layer = nn.Linear(8, 8)
    text = refusal(with_model(nn.Sequential(layer, nn.ReLU(), layer, nn.Linear(8, 3))))
    assert text.startswith("0 and 2 are one module under two names")


def test_a_loss_with_parameters_is_refused():
    class Learned(nn.CrossEntropyLoss):
        def __init__(self):
            super().__init__()
            self.temperature = nn.Parameter(torch.ones(()))

    assert "make them part of the model" in refusal(dataclasses.replace(mlp_task(), loss=Learned()))


def test_a_task_file_gives_its_task(tmp_path):
    path = tmp_path / "task.py"
    path.write_text(TASK_FILE)
    task = load_task(path)
    assert isinstance(task, Task)
    assert task.name == "from a file"
    assert task.device_training.learning_rate == 0.1


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "must define `task`"),
        ("task = 3", "it is int"),
        ("def task():\n    return None", "it is NoneType"),
        ("task = missing", "failed with NameError"),
        ("task = (", r"task.py:1: `task = \(`: .*SyntaxError"),
        ("x = 1\ntask = missing", "task.py:2: `task = missing`: "),
    ],
)
def test_a_task_file_without_a_task_is_refused(tmp_path, content, reason):
    path = tmp_path / "task.py"
    path.write_text(content)
    with pytest.raises(PlanRejected, match=reason):
        load_task(path)


def test_a_missing_task_file_is_named(tmp_path):
    with pytest.raises(PlanRejected, match="There is no task file"):
        load_task(tmp_path / "absent.py")
