import dataclasses

import pytest
import torch
from plan_tasks import mlp_task
from torch import nn

from coordinator.plan.build import build
from coordinator.plan.rejection import PlanRejected
from coordinator.plan.task import Task, load_task

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


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 3)

    def forward(self, x):
        return self.linear(x) if x.sum() > 0 else -self.linear(x)


def test_lbfgs_is_refused():
    task = mlp_task()
    task = dataclasses.replace(task, optimizer=torch.optim.LBFGS(task.model.parameters()))
    assert refusal(task).startswith("LBFGS evaluates the loss several times in one step")


def test_a_fixed_batch_size_is_refused():
    text = refusal(with_model(FixedBatch()))
    assert text.startswith("The model fixes the batch size at 32")
    assert "x.view(len(x), ...)" in text


def test_a_branch_on_values_is_refused():
    assert "use torch.where in place of `if`" in refusal(with_model(Branching()))


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
    assert refusal(task).startswith("The loss has shape (32,)")


def test_a_model_that_does_not_fit_its_example_is_refused():
    assert "fail on the example batch" in refusal(with_model(nn.Linear(9, 3)))


def test_a_frozen_model_is_refused():
    model = nn.Linear(8, 3).requires_grad_(requires_grad=False)
    assert "nothing to train" in refusal(with_model(model))


def test_a_learning_rate_of_zero_is_refused():
    assert "must be above zero" in refusal(with_model(nn.Linear(8, 3), learning_rate=0.0))


def test_shared_parameters_are_refused():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3))
    model[1].weight = model[0].weight
    assert refusal(with_model(model)).startswith("0.weight and 1.weight are one parameter")


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
        ("task = (", "failed with SyntaxError"),
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
