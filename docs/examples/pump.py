"""A task: anomalies of a water pump, found by an autoencoder that has only seen a healthy pump. Adam.

A window is 16 readings, one a second, of eight channels: two vibrations, current, pressure, two temperatures,
voltage, flow. The network squeezes a window through four numbers and back; what it cannot give back is
unusual. A window's anomaly score is its mean squared error. Nobody labels anything.

One run of one pump is one device. It measures its own mean and deviation while healthy and divides by them,
so devices need not be alike. Run as a script it deals the runs out, ``pump-01.npz`` …, each with windows
``x`` of its first, healthy readings:

    python docs/examples/pump.py deal DIRECTORY --data skab.npz

Without ``--data`` the readings are made up. Then, as in the README: ``fedtide plan build
docs/examples/pump.py --out FLEET/model.plan`` and, for each device, ``fedtide agent init … --data
DIRECTORY/pump-01.npz``. How well the trained model tells healthy from unusual readings:

    python docs/examples/pump.py score DEVICE/agent.toml --data skab.npz

``skab.npz`` has arrays x (readings, 8), anomaly and experiment. Experiment 0 there is not used.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import nn

from coordinator.plan.task import Task
from edge_agent.inference import LocalModel
from fedtide.wire.training import Training

CHANNELS: Final = 8
READINGS: Final = 16
HEALTHY: Final = 400
"""The first readings of a run, on which it is trained; fewer where an anomaly begins earlier."""
LARGEST: Final = 10.0
"""In deviations: what lies beyond counts as this, lest one reading decide everything."""

torch.manual_seed(0)
model = nn.Sequential(
    nn.Flatten(),
    nn.Linear(CHANNELS * READINGS, 64),
    nn.ReLU(),
    nn.Linear(64, 4),
    nn.ReLU(),
    nn.Linear(4, 64),
    nn.ReLU(),
    nn.Linear(64, CHANNELS * READINGS),
    nn.Unflatten(1, (CHANNELS, READINGS)),
)

task = Task(
    name="pump",
    model=model,
    loss=nn.MSELoss(),
    optimizer=torch.optim.Adam(model.parameters(), lr=0.002),
    example=(torch.randn(8, CHANNELS, READINGS), None),
    training=Training(local_epochs=4, batch_size=32, learning_rate=0.002),
)


@dataclass(frozen=True)
class PumpRun:
    """One run of one pump.

    Attributes:
        readings: in its own deviations from its own healthy mean; float32, shape ``(readings, 8)``.
        anomaly: 1 where a reading is known to be unusual; shape ``(readings,)``. For scoring only.
        healthy: how many readings from the start are for training.
    """

    readings: np.ndarray
    anomaly: np.ndarray
    healthy: int

    @property
    def windows(self) -> np.ndarray:
        """The windows of the healthy readings: float32, shape ``(windows, 8, 16)``."""
        return windows(self.readings[: self.healthy])


def windows(readings: np.ndarray) -> np.ndarray:
    """A window ending at each reading from the sixteenth on: shape ``(readings - 15, 8, 16)``."""
    return np.lib.stride_tricks.sliding_window_view(readings, READINGS, axis=0).copy()


def standardised(readings: np.ndarray, anomaly: np.ndarray) -> PumpRun:
    """A run in deviations of its first healthy readings; a channel that stands still is left near zero."""
    healthy = min(HEALTHY, int(np.argmax(anomaly)) if anomaly.any() else len(anomaly))
    start = readings[:healthy].astype(np.float64)
    mean = start.mean(0)
    deviation = np.maximum(start.std(0), 1e-3 * np.abs(mean) + 1e-6)
    scaled = np.clip((readings - mean) / deviation, -LARGEST, LARGEST).astype(np.float32)
    return PumpRun(scaled, anomaly, healthy)


def made_up_runs(count: int, rng: np.random.Generator) -> list[PumpRun]:
    """Runs of 800 readings in which two slow waves move all channels, until at 500 two channels part."""
    shares = np.random.default_rng(7).standard_normal((2, CHANNELS))
    runs = []
    for _ in range(count):
        seconds = np.arange(800)
        phases = rng.uniform(0, 2 * np.pi, 2)
        waves = np.sin(seconds[:, None] / np.array([9.0, 23.0]) + phases)
        readings = waves @ shares + 0.2 * rng.standard_normal((800, CHANNELS))
        readings[500:, :2] *= -1.0
        runs.append(standardised(readings, (seconds >= 500).astype(np.int64)))
    return runs


def read_runs(data: Path | None) -> list[PumpRun]:
    """The runs of the archive, in order; made up without one."""
    if data is None:
        return made_up_runs(4, np.random.default_rng(0))
    with np.load(data, allow_pickle=False) as archive:
        readings, anomaly, experiments = archive["x"], archive["anomaly"], archive["experiment"]
    mine = [experiments == number for number in np.unique(experiments) if number != 0]
    return [standardised(readings[rows], anomaly[rows]) for rows in mine]


def roc_auc(runs: list[PumpRun], rebuild: Callable[[np.ndarray], np.ndarray]) -> float:
    """How well the score tells unusual readings from others, of all runs together, training ones left out.

    Args:
        runs: with known anomalies.
        rebuild: the model: from windows to windows of the same shape.

    Returns:
        The area under the curve of true over false alarms: 0.5 by chance, 1 at best.
    """
    scores, truths = [], []
    for run in runs:
        given = windows(run.readings)
        errors = ((rebuild(given) - given) ** 2).mean((1, 2))
        first = run.healthy - READINGS + 1  # the window that ends at the first reading not trained on
        scores.append(errors[first:])
        truths.append(run.anomaly[run.healthy :])
    return float(roc_auc_score(np.concatenate(truths), np.concatenate(scores)))


def deal(directory: Path, runs: list[PumpRun]) -> None:
    """Write ``pump-01.npz`` …, each with an array ``x``."""
    directory.mkdir(parents=True, exist_ok=True)
    for number, run in enumerate(runs, 1):
        np.savez(directory / f"pump-{number:02d}.npz", x=run.windows)


def main() -> None:
    """Deal runs out, or score the newest model that a device holds."""
    parser = argparse.ArgumentParser(description="Anomalies of a water pump.")
    parser.add_argument("what", choices=("deal", "score"))
    parser.add_argument("place", type=Path, help="deal: a directory; score: a device's agent.toml")
    parser.add_argument("--data", type=Path, help="an archive with x, anomaly and experiment")
    arguments = parser.parse_args()
    runs = read_runs(arguments.data)
    if arguments.what == "deal":
        deal(arguments.place, runs)
        return
    local = LocalModel.open(arguments.place, newest=True)
    print(f"ROC-AUC {roc_auc(runs, local.predict):.3f}, {local.description}")  # noqa: T201  (its result)


if __name__ == "__main__":
    main()
