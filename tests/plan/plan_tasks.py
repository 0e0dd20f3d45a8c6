"""Small tasks that the tests of this folder build plans from."""

import torch
from torch import nn

from coordinator.plan.task import Task


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
