"""A task: handwritten digits, a small convolutional network with batch normalisation, SGD with momentum.

The images are scikit-learn's, 8×8 pixels. Run as a script it deals them out so that each device has mostly
two or three of the ten digits, ``device-1.npz`` … and ``held-out.npz``:

    python docs/examples/digits_cnn.py DIRECTORY [DEVICES]

Then, as in the README: ``fedtide plan build docs/examples/digits_cnn.py --out FLEET/model.plan`` and, for
each device, ``fedtide agent init … --data DIRECTORY/device-1.npz``.
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
model = nn.Sequential(
    nn.Conv2d(1, 8, 3, padding=1),
    nn.BatchNorm2d(8),
    nn.ReLU(),
    nn.MaxPool2d(2),
    nn.Conv2d(8, 16, 3, padding=1),
    nn.ReLU(),
    nn.MaxPool2d(2),
    nn.Flatten(),
    nn.Linear(64, 10),
)

task = Task(
    name="digits-cnn",
    model=model,
    loss=nn.CrossEntropyLoss(),
    optimizer=torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9),
    example=(torch.rand(8, 1, 8, 8), torch.arange(8)),
    metric="accuracy",
    training=Training(local_epochs=2, batch_size=32, learning_rate=0.02),
)


def deal(directory: Path, devices: int) -> None:
    """Write ``device-1.npz`` … and ``held-out.npz``: x float32 ``(images, 1, 8, 8)`` in 0 to 1, and y.

    A fifth is held out, of every digit alike. The rest is divided digit by digit, Dirichlet(0.3) (Hsu et al.
    2019, "Measuring the effects of non-identical data distribution").
    """
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    rng = np.random.default_rng(0)
    order = rng.permutation(len(labels))
    held_out, rest = np.split(order, [len(order) // 5])
    rows: list[list[int]] = [[] for _ in range(devices)]
    for digit in range(10):
        mine = rest[labels[rest] == digit]
        cuts = (np.cumsum(rng.dirichlet([0.3] * devices))[:-1] * len(mine)).astype(int)
        for device, share in zip(rows, np.split(mine, cuts), strict=True):
            device.extend(share)
    directory.mkdir(parents=True, exist_ok=True)
    np.savez(directory / "held-out.npz", x=images[held_out], y=labels[held_out])
    for number, part in enumerate(rows, 1):
        np.savez(directory / f"device-{number}.npz", x=images[part], y=labels[part])


if __name__ == "__main__":
    deal(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 5)
