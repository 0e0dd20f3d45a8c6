"""Plans shared by all tests of this folder: building one takes seconds."""

import numpy as np
import pytest
import torch
from plan_tasks import autoencoder_task, cnn_task, mlp_task

from coordinator.plan.build import assemble, build
from coordinator.plan.file import BuiltPlan
from coordinator.plan.graphs import Graphs, export_graphs
from edge_agent.dataset import Dataset


@pytest.fixture(autouse=True, scope="session")
def one_torch_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def mlp_graphs() -> Graphs:
    return export_graphs(mlp_task())


@pytest.fixture(scope="session")
def mlp(mlp_graphs) -> BuiltPlan:
    return assemble(mlp_task(), mlp_graphs)


@pytest.fixture(scope="session")
def cnn_graphs() -> Graphs:
    return export_graphs(cnn_task())


@pytest.fixture(scope="session")
def cnn(cnn_graphs) -> BuiltPlan:
    return assemble(cnn_task(), cnn_graphs)


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
