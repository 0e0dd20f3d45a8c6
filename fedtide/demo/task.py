"""What the demo trains: a task as a model owner would write it."""

from typing import Any

import torch

from coordinator.plan.task import Task
from fedtide.wire.training import Training


def task(seed: int, local_epochs: int = 4) -> Task:
    """A multilayer perceptron 64-128-10 with SGD."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
    example: tuple[Any, Any] = (torch.zeros(8, 64), torch.zeros(8, dtype=torch.int64))
    return Task(
        name="digits",
        model=model,
        loss=torch.nn.CrossEntropyLoss(),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        example=example,
        metric="accuracy",
        training=Training(local_epochs=local_epochs, batch_size=32, learning_rate=0.1),
    )
