"""The task of the fleet benchmarks: scikit-learn's digits, an MLP 64-128-10, 8 devices with unlike labels.

1797 images of 8×8 pixels, scaled to [0, 1]; shuffled; the last 20 % are held out on the coordinator's side.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits

from coordinator.plan.build import build
from coordinator.plan.file import BuiltPlan, load, save
from coordinator.plan.task import Task
from edge_agent.dataset import Dataset
from fedtide.wire.training import Training

CLASSES = 10
FEWEST_EXAMPLES = 10
TRAINING = Training(local_epochs=1, batch_size=32, learning_rate=0.1)


@dataclass(frozen=True)
class Digits:
    """Examples by device, and the held-out ones."""

    devices: tuple[Dataset, ...]
    held_out: Dataset


def split_digits(devices: int, concentration: float, seed: int) -> Digits:
    """Divide every label among the devices by Dirichlet(``concentration``), as in Hsu et al. 2019.

    Drawn again until every device has at least ``FEWEST_EXAMPLES``.
    """
    bunch = load_digits()
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(bunch.target))
    images = (bunch.data[order] / 16.0).astype(np.float32)
    labels = bunch.target[order].astype(np.int64)
    kept = int(0.8 * len(labels))
    rows = _dirichlet_rows(labels[:kept], devices, concentration, rng)
    return Digits(
        tuple(Dataset((images[mine],), labels[mine]) for mine in rows),
        Dataset((images[kept:],), labels[kept:]),
    )


def save_examples(dataset: Dataset, path: Path) -> None:
    """Write examples as the archive that agents and coordinators read."""
    np.savez(path, x=dataset.inputs[0], y=dataset.arrays[-1])


def model() -> torch.nn.Module:
    """The MLP, from seed 0."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, CLASSES))


def plan(path: Path) -> BuiltPlan:
    """The training plan: from ``path`` if it is there, else built (about 15 s) and saved there."""
    if not path.exists():
        torch.set_num_threads(1)
        mlp = model()
        task = Task(
            model=mlp,
            loss=torch.nn.CrossEntropyLoss(),
            optimizer=torch.optim.SGD(mlp.parameters(), lr=TRAINING.learning_rate),
            example=(torch.rand(8, 64), torch.arange(8)),
            name="digits",
            metric="accuracy",
            training=TRAINING,
        )
        save(build(task), path)
    return load(path)


def _dirichlet_rows(
    labels: np.ndarray, devices: int, concentration: float, rng: np.random.Generator
) -> list[np.ndarray]:
    while True:
        rows: list[list[int]] = [[] for _ in range(devices)]
        for label in range(CLASSES):
            members = rng.permutation(np.flatnonzero(labels == label))
            shares = rng.dirichlet([concentration] * devices)
            cuts = (np.cumsum(shares)[:-1] * len(members)).astype(int)
            for mine, part in zip(rows, np.split(members, cuts), strict=True):
                mine.extend(part)
        if min(len(mine) for mine in rows) >= FEWEST_EXAMPLES:
            return [np.array(mine) for mine in rows]
