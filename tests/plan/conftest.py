"""Plans shared by all tests of this folder: building one takes seconds."""

import numpy as np
import pytest
import torch
from torch import nn

from coordinator.plan.build import assemble, build
from coordinator.plan.file import BuiltPlan
from coordinator.plan.graphs import Graphs, export_graphs
from coordinator.plan.task import Task
from edge_agent.dataset import Dataset


@pytest.fixture(autouse=True, scope="session")
def one_torch_thread():
    torch.set_num_threads(1)


def mlp_task() -> Task:
    """8 features, 3 classes, plain SGD."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    example = (torch.randn(32, 8), torch.randint(0, 3, (32,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Task(model, nn.CrossEntropyLoss(), optimizer, example, "mlp", "accuracy")


def cnn_task() -> Task:
    """8×8 images, convolution, batch normalisation, pooling, dropout, AdamW."""
    torch.manual_seed(2)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.25),
        nn.Linear(64, 3),
    )
    example = (torch.randn(16, 1, 8, 8), torch.randint(0, 3, (16,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return Task(model, nn.CrossEntropyLoss(), optimizer, example, "cnn", "accuracy")


def autoencoder_task() -> Task:
    """Gives back its own 8 features; momentum; no targets and no metric."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-4)
    return Task(model, nn.MSELoss(), optimizer, (torch.randn(16, 8), None), "autoencoder")


@pytest.fixture(scope="session")
def mlp_graphs() -> Graphs:
    return export_graphs(mlp_task())


@pytest.fixture(scope="session")
def mlp(mlp_graphs) -> BuiltPlan:
    return assemble(mlp_task(), mlp_graphs)


@pytest.fixture(scope="session")
def cnn() -> BuiltPlan:
    return build(cnn_task())


@pytest.fixture(scope="session")
def autoencoder() -> BuiltPlan:
    return build(autoencoder_task())


@pytest.fixture(scope="session")
def points() -> Dataset:
    """70 points of 3 classes that a linear model separates."""
    rng = np.random.default_rng(4)
    inputs = rng.standard_normal((70, 8)).astype(np.float32)
    return Dataset((inputs,), (inputs @ rng.standard_normal((8, 3))).argmax(1))


@pytest.fixture(scope="session")
def images() -> Dataset:
    """65 images; the class is where the bright row is."""
    rng = np.random.default_rng(5)
    inputs = rng.standard_normal((65, 1, 8, 8)).astype(np.float32)
    targets = rng.integers(0, 3, 65)
    inputs[np.arange(65), 0, 2 * targets] += 2
    return Dataset((inputs,), targets)
