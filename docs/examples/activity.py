"""A task: what a person is doing, from a phone's motion sensors. A small 1-D CNN on raw windows, SGD.

A window is 128 readings at 50 Hz of nine channels: acceleration of the body (x, y, z), angular velocity
(x, y, z), and acceleration with gravity (x, y, z). One person is one device. ``fedtide plan build`` takes the
variable ``task``; the plan turns no reading into features beforehand, the network sees the windows.

Run as a script it deals the persons of an archive out as files, ``person-01.npz`` … and ``held-out.npz`` with
the persons of its array ``test_subjects``:

    python docs/examples/activity.py DIRECTORY --data har.npz

Without ``--data`` the windows are made up: two devices, swings of another rhythm for each class. The archive
has arrays x (windows, 9, 128), y, subject and test_subjects.

Then, as in the README: ``fedtide plan build docs/examples/activity.py --out FLEET/model.plan`` and, for each
device, ``fedtide agent init … --data DIRECTORY/person-01.npz``.
"""

import argparse
import math
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn

from coordinator.plan.task import Task
from fedtide.wire.training import Training

CHANNELS: Final = 9
READINGS: Final = 128
RATE_HZ: Final = 50.0
FREQUENCIES_HZ: Final = (0.8, 1.6, 2.4, 3.2, 4.5, 6.0, 8.0, 11.0, 15.0, 20.0)
"""Where the filters begin: steps are at 1 to 3 Hz, a foot's impact reaches further up."""
TAPS: Final = 32
CLASSES: Final = 6
TRAINING: Final = Training(local_epochs=3, batch_size=32, learning_rate=0.03)


class ActivityNet(nn.Module):
    """Filters over time, their log power, and a linear layer: after ShallowConvNet.

    Each channel goes through the same bank of pairs of filters, which begin as windowed cosines and sines and
    are trained. The power of a pair does not depend on where in its stride a window was cut (Schirrmeister et
    al. 2017, "Deep learning with convolutional neural networks for EEG decoding", section 2.4.3). Posture is
    in what has no power, so the means of the last three channels, gravity, go to the linear layer too, with
    how large, how fast and how alike the channels move. All scales are constants: no statistics of anybody's
    data are in the model.
    """

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        pairs = len(FREQUENCIES_HZ)
        self.filters = nn.Conv1d(1, 2 * pairs, TAPS, stride=4, bias=False)
        with torch.no_grad():
            self.filters.weight.copy_(_cosines_and_sines().unsqueeze(1))
        one, other = zip(*((i, j) for i in range(6) for j in range(i)), strict=True)
        self.one, self.other = list(one), list(other)
        self.classify = nn.Linear(CHANNELS * (pairs + 3) + 3 + len(one), classes)
        nn.init.zeros_(self.classify.weight)

    def forward(self, windows: Tensor) -> Tensor:
        """Give logits of shape ``(batch, classes)`` for windows ``(batch, 9, 128)``, in g and rad/s."""
        moved = windows - windows.mean(2, keepdim=True)
        variance = (moved * moved).mean(2)
        change = windows[:, :, 1:] - windows[:, :, :-1]
        features = (
            windows[:, 6:].mean(2) / 0.4,
            (self._log_power(windows) + 4) / 3,
            (torch.log(variance + 1e-5) + 5.5) / 3,
            (torch.log((change * change).mean(2) + 1e-6) + 8) / 3,
            (torch.log(moved.abs().amax(2) + 1e-2) + 2) / 1.5,
            2 * self._correlations(moved, variance),
        )
        logits: Tensor = self.classify(torch.cat(features, 1))
        return logits

    def _log_power(self, windows: Tensor) -> Tensor:
        """Log power by channel and pair of filters: shape ``(batch, 9 * pairs)``."""
        responses = self.filters(windows.reshape(-1, 1, READINGS))
        power = (responses * responses).mean(2)
        power = power[:, 0::2] + power[:, 1::2]
        return torch.log(power + 1e-4).reshape(-1, CHANNELS * len(FREQUENCIES_HZ))

    def _correlations(self, moved: Tensor, variance: Tensor) -> Tensor:
        """How alike each two of the first six channels move, in −1 to 1: shape ``(batch, 15)``."""
        shared = (moved[:, self.one] * moved[:, self.other]).mean(2)
        return shared / torch.sqrt((variance[:, self.one] + 1e-5) * (variance[:, self.other] + 1e-5))


def _cosines_and_sines() -> Tensor:
    """Filters of norm 1 under a Hann window, blind to a constant; float32, shape ``(2 * pairs, TAPS)``."""
    window = torch.hann_window(TAPS + 2, periodic=False)[1:-1]
    turns = torch.outer(torch.tensor(FREQUENCIES_HZ), torch.arange(TAPS) / RATE_HZ)
    waves = torch.stack([torch.cos(2 * math.pi * turns), torch.sin(2 * math.pi * turns)], 1).flatten(0, 1)
    waves = waves * window
    waves = waves - window * (waves.sum(1, keepdim=True) / window.sum())
    filters: Tensor = waves / waves.norm(dim=1, keepdim=True)
    return filters


def activity_task(training: Training = TRAINING, seed: int = 0) -> Task:
    """The task, with the model from ``seed``."""
    torch.manual_seed(seed)
    model = ActivityNet()
    return Task(
        name="activity",
        model=model,
        loss=nn.CrossEntropyLoss(),
        optimizer=torch.optim.SGD(
            model.parameters(), lr=training.learning_rate, momentum=0.9, weight_decay=1e-4
        ),
        example=(torch.randn(8, CHANNELS, READINGS), torch.arange(8) % CLASSES),
        metric="accuracy",
        training=training,
    )


task = activity_task()


def made_up_windows(count: int, phase: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Windows and classes: three rhythms, then three postures at rest, each person's phone a little tilted.

    Args:
        count: windows; classes take turns.
        phase: radians that this person's phone is tilted.
        rng: draws noise and where a swing begins.

    Returns:
        float32 of shape ``(count, 9, 128)`` and int64 of shape ``(count,)``.
    """
    classes = np.arange(count) % CLASSES
    moving = classes < 3
    rhythm_hz = np.where(moving, 1.2 + 0.8 * classes, 0.0)
    begin = rng.uniform(0, 2 * np.pi, (count, 1, 1))
    seconds = np.arange(READINGS) / RATE_HZ
    swing = np.sin(2 * np.pi * rhythm_hz[:, None, None] * seconds + begin) * moving[:, None, None]
    sizes = np.array([0.3, 0.2, 0.15, 0.6, 0.5, 0.3, 0.3, 0.2, 0.15])[:, None]
    angle = phase + np.where(moving, 0.0, 0.7 * (classes - 3))[:, None]
    gravity = np.concatenate([np.cos(angle), np.sin(angle), 0 * angle], 1)
    noise = np.where(moving, 0.1, 0.01)[:, None, None] * rng.standard_normal((count, CHANNELS, READINGS))
    windows = sizes * swing + noise
    windows[:, 6:] += gravity[:, :, None]
    return windows.astype(np.float32), classes.astype(np.int64)


def deal(directory: Path, data: Path | None) -> None:
    """Write one archive for each device and ``held-out.npz``, with arrays ``x`` and ``y``."""
    directory.mkdir(parents=True, exist_ok=True)
    if data is None:
        rng = np.random.default_rng(0)
        for name, tilt in {"person-01": -0.1, "person-02": 0.1, "held-out": 0.0}.items():
            x, y = made_up_windows(120, tilt, rng)
            np.savez(directory / f"{name}.npz", x=x, y=y)
        return
    with np.load(data, allow_pickle=False) as archive:
        x, y, persons = archive["x"].astype(np.float32), archive["y"].astype(np.int64), archive["subject"]
        unseen = np.isin(persons, archive["test_subjects"])
    np.savez(directory / "held-out.npz", x=x[unseen], y=y[unseen])
    for person in np.unique(persons[~unseen]):
        mine = persons == person
        np.savez(directory / f"person-{person:02d}.npz", x=x[mine], y=y[mine])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Deal windows out to devices.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--data", type=Path, help="an archive with x, y, subject and test_subjects")
    arguments = parser.parse_args()
    deal(arguments.directory, arguments.data)
