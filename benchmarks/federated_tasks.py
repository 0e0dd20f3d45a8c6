"""The tasks of the codec benchmarks: devices with unlike data, a held-out set, a model and how it trains.

==============  ==========  =====================================================================
name            parameters  what
==============  ==========  =====================================================================
digits-mlp      9,610       MLP 64-128-10; scikit-learn's digits over 40 devices, Dirichlet(0.5)
digits-cnn      106,122     2 convolutions and 2 linear layers; digits drawn as 28×28 pixels, moved,
                            turned, scaled and roughened, over 60 devices, Dirichlet(0.5)
activity-cnn    128,350     2 convolutions over time and 2 linear layers; raw windows of 21 persons,
                            one a device, tested on 9 others
mnist-mlp       993,610     MLP 784-896-320-10; MNIST by writer: 80 writers, one a device, tested on others
mnist-crowd     993,610     the same with all 539 writers, of whom each sends one update or two
==============  ==========  =====================================================================

The first two need no file. The others need ``har.npz`` (x, y, subject, test_subjects) or ``mnist.npz``
(x_train, y_train, writer_train, x_test, y_test) in the directory of ``--data``.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

from coordinator.plan.build import build
from coordinator.plan.file import BuiltPlan, load, save
from coordinator.plan.task import Task
from edge_agent.dataset import Dataset
from fedtide.wire.training import Training

CONCENTRATION: Final = 0.5
"""Of the Dirichlet distribution that labels are divided by."""
PIXELS: Final = 28
_FEWEST_EXAMPLES: Final = 8
_DIGITS_FOR_TRAINING: Final = 1400
_DRAWN_FOR_TRAINING: Final = 10_000
_DRAWN_HELD_OUT: Final = 2_000
_DATA_SEED: Final = 0


@dataclass(frozen=True)
class Fleet:
    """Examples by device, and the held-out ones."""

    devices: tuple[Dataset, ...]
    held_out: Dataset


@dataclass(frozen=True)
class FederatedTask:
    """A task before its data is read or its plan built.

    Attributes:
        name: as in the module's table.
        read: gives the fleet's data; takes the directory of ``--data``.
        model: a fresh model, after ``torch.manual_seed``.
        example: one batch of inputs, of the shape the model takes.
        classes: how many.
        training: how devices train.
        updates: applied in a run: enough for the float32 run to level off.
        needs: the archive's file name, or None.
        optimizer: the devices'.
    """

    name: str
    read: Callable[[Path], Fleet]
    model: Callable[[], nn.Module]
    example: Callable[[], torch.Tensor]
    classes: int
    training: Training
    updates: int
    needs: str | None = None
    optimizer: Literal["sgd", "adam"] = "sgd"

    def plan(self, directory: Path) -> BuiltPlan:
        """The training plan, model from seed 0: from the directory if it is there, else built and kept."""
        path = directory / f"{self.name}.plan"
        if not path.exists():
            directory.mkdir(parents=True, exist_ok=True)
            save(build(self._task()), path)
        return load(path)

    def _task(self) -> Task:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        model, rate = self.model(), self.training.learning_rate
        return Task(
            name=self.name,
            model=model,
            loss=nn.CrossEntropyLoss(),
            optimizer=torch.optim.SGD(model.parameters(), lr=rate)
            if self.optimizer == "sgd"
            else torch.optim.Adam(model.parameters(), lr=rate),
            example=(self.example(), torch.arange(8) % self.classes),
            metric="accuracy",
            training=self.training,
        )


def _digits() -> tuple[Dataset, Dataset]:
    """Scikit-learn's digits: 1400 for training, 397 held out; float32 ``(examples, 64)`` in 0 to 1."""
    bunch = load_digits()
    order = np.random.default_rng(_DATA_SEED).permutation(len(bunch.target))
    images = (bunch.data[order] / 16.0).astype(np.float32)
    labels = bunch.target[order].astype(np.int64)
    cut = _DIGITS_FOR_TRAINING
    return Dataset((images[:cut],), labels[:cut]), Dataset((images[cut:],), labels[cut:])


def _small_digits(_data: Path) -> Fleet:
    training, held_out = _digits()
    return Fleet(_divided(training, 40), held_out)


def _drawn_digits(_data: Path) -> Fleet:
    training, held_out = _digits()
    generator = torch.Generator().manual_seed(_DATA_SEED)
    return Fleet(
        _divided(_drawn(training, _DRAWN_FOR_TRAINING, generator), 60),
        _drawn(held_out, _DRAWN_HELD_OUT, generator),
    )


def _drawn(digits: Dataset, count: int, generator: torch.Generator) -> Dataset:
    """So many drawings of randomly chosen digits: float32 ``(count, 1, 28, 28)``, mostly zero as in MNIST.

    Turned by up to 20°, scaled by 0.75 to 1.25, moved by up to 2.5 pixels, with noise where there is ink.
    """
    targets = digits.targets
    assert targets is not None
    chosen = torch.randint(len(digits), (count,), generator=generator)
    images = torch.from_numpy(digits.inputs[0]).reshape(-1, 1, 8, 8)[chosen]
    images = functional.interpolate(images, size=(24, 24), mode="bicubic", align_corners=False).clamp(0, 1)
    images = functional.pad(images, (2, 2, 2, 2))

    def uniform(*shape: int, within: float) -> torch.Tensor:
        return (torch.rand(shape, generator=generator) * 2 - 1) * within

    angle, scale = uniform(count, within=0.35), 1 + uniform(count, within=0.25)
    cosine, sine = scale * torch.cos(angle), scale * torch.sin(angle)
    linear = torch.stack([torch.stack([cosine, -sine], 1), torch.stack([sine, cosine], 1)], 1)
    affine = torch.cat([linear, uniform(count, 2, 1, within=0.175)], 2)
    grid = functional.affine_grid(affine, [count, 1, PIXELS, PIXELS], align_corners=False)
    images = functional.grid_sample(images, grid, align_corners=False)
    noise = 0.15 * torch.randn(images.shape, generator=generator) * (images > 0.02)
    return Dataset(((images + noise).clamp(0, 1).numpy(),), targets[chosen.numpy()])


def _divided(examples: Dataset, devices: int) -> tuple[Dataset, ...]:
    """Divide every label among the devices by Dirichlet(0.5), as in Hsu et al. 2019.

    A device left with fewer than ``_FEWEST_EXAMPLES`` takes examples from the one that has the most.
    """
    labels = examples.targets
    assert labels is not None
    rng = np.random.default_rng(_DATA_SEED)
    rows: list[list[int]] = [[] for _ in range(devices)]
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        shares = rng.dirichlet([CONCENTRATION] * devices)
        cuts = (np.cumsum(shares)[:-1] * len(members)).astype(int)
        for mine, part in zip(rows, np.split(members, cuts), strict=True):
            mine.extend(part.tolist())
    for mine in rows:
        while len(mine) < _FEWEST_EXAMPLES:
            mine.append(max(rows, key=len).pop())
    return tuple(examples.rows(np.array(mine)) for mine in rows)


def _persons(data: Path) -> Fleet:
    """Windows ``(windows, 9, 128)``: a device for each training person; half of the others' held out."""
    with np.load(data / "har.npz", allow_pickle=False) as archive:
        x, y = archive["x"].astype(np.float32), archive["y"].astype(np.int64)
        persons, unseen = archive["subject"], archive["test_subjects"]
    rows = [np.flatnonzero(persons == person) for person in np.setdiff1d(persons, unseen)]
    held_out = np.flatnonzero(np.isin(persons, unseen))[::2]
    return Fleet(tuple(Dataset((x[mine],), y[mine]) for mine in rows), Dataset((x[held_out],), y[held_out]))


def _writers(data: Path, count: int | None = None) -> Fleet:
    """Images ``(examples, 784)``: a device for each of so many writers; held out: 2000 images of others."""
    with np.load(data / "mnist.npz", allow_pickle=False) as archive:
        x, y, writers = archive["x_train"], archive["y_train"].astype(np.int64), archive["writer_train"]
        x_test, y_test = archive["x_test"], archive["y_test"].astype(np.int64)
    rng = np.random.default_rng(_DATA_SEED)
    some = rng.permutation(len(y_test))[:_DRAWN_HELD_OUT]
    rows = [np.flatnonzero(writers == writer) for writer in rng.permutation(np.unique(writers))[:count]]
    return Fleet(
        tuple(Dataset((_flat(x[mine]),), y[mine]) for mine in rows),
        Dataset((_flat(x_test[some]),), y_test[some]),
    )


def _flat(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    return (images.reshape(len(images), -1) / np.float32(255)).astype(np.float32)


class _Scaled(nn.Module):
    """Brings the nine channels of motion, in g and rad/s, to like sizes; constants, nobody's statistics."""

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        return windows * 2.0


def _digits_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def _digits_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * (PIXELS // 4) ** 2, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def _activity_cnn() -> nn.Module:
    return nn.Sequential(
        _Scaled(),
        nn.Conv1d(9, 32, 9, stride=2, padding=4),
        nn.ReLU(),
        nn.Conv1d(32, 64, 9, stride=2, padding=4),
        nn.ReLU(),
        nn.AvgPool1d(2),
        nn.Flatten(),
        nn.Linear(64 * 16, 104),
        nn.ReLU(),
        nn.Linear(104, 6),
    )


def _mnist_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 896), nn.ReLU(), nn.Linear(896, 320), nn.ReLU(), nn.Linear(320, 10))


_ALL: Final = (
    FederatedTask(
        "digits-mlp",
        _small_digits,
        _digits_mlp,
        lambda: torch.rand(8, 64),
        10,
        Training(local_epochs=4, batch_size=16, learning_rate=0.1),
        updates=640,
    ),
    FederatedTask(
        "digits-cnn",
        _drawn_digits,
        _digits_cnn,
        lambda: torch.rand(8, 1, PIXELS, PIXELS),
        10,
        Training(local_epochs=1, batch_size=16, learning_rate=0.08),
        updates=960,
    ),
    FederatedTask(
        "activity-cnn",
        _persons,
        _activity_cnn,
        lambda: torch.randn(8, 9, 128),
        6,
        Training(local_epochs=1, batch_size=32, learning_rate=0.05),
        updates=480,
        needs="har.npz",
    ),
    FederatedTask(
        "mnist-mlp",
        partial(_writers, count=80),
        _mnist_mlp,
        lambda: torch.rand(8, math.prod((PIXELS, PIXELS))),
        10,
        Training(local_epochs=1, batch_size=16, learning_rate=0.05),
        updates=640,
        needs="mnist.npz",
    ),
    FederatedTask(
        "mnist-crowd",
        _writers,
        _mnist_mlp,
        lambda: torch.rand(8, math.prod((PIXELS, PIXELS))),
        10,
        Training(local_epochs=1, batch_size=16, learning_rate=0.05),
        updates=640,
        needs="mnist.npz",
    ),
)

TASKS: Final[Mapping[str, FederatedTask]] = MappingProxyType({task.name: task for task in _ALL})
"""Every task by its name."""


def available(data: Path | None) -> tuple[str, ...]:
    """The names of the tasks whose data is there; ``mnist-crowd`` has to be asked for."""
    return tuple(
        name
        for name, task in TASKS.items()
        if name != "mnist-crowd"
        and (task.needs is None or (data is not None and (data / task.needs).is_file()))
    )
