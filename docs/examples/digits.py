"""A task: handwritten digits, a small network, SGD. ``fedtide plan build`` takes the variable ``task``.

Run as a script it deals scikit-learn's digits out as files, one for each device and one held out:

    python docs/examples/digits.py DIRECTORY [DEVICES]
"""

import sys
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from coordinator.plan.task import Task
from fedtide.wire.training import Training

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

task = Task(
    name="digits",
    model=model,
    loss=nn.CrossEntropyLoss(),
    optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
    example=(torch.zeros(8, 64), torch.zeros(8, dtype=torch.int64)),
    metric="accuracy",
    training=Training(local_epochs=2, batch_size=32, learning_rate=0.1),
)


def deal(directory: Path, devices: int) -> None:
    """Write ``device-1.npz`` … and ``held-out.npz``, each with arrays ``x`` and ``y``."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    parts = np.array_split(order, devices + 1)
    names = [*(f"device-{number}" for number in range(1, devices + 1)), "held-out"]
    directory.mkdir(parents=True, exist_ok=True)
    for name, part in zip(names, parts, strict=True):
        np.savez(directory / f"{name}.npz", x=(images[part] / 16).astype(np.float32), y=labels[part])


if __name__ == "__main__":
    deal(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 2)
