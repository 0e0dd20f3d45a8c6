"""Models that become training plans, one small and ordinary one of each kind, for you to start from.

Each function gives what a task needs: a module, one example batch, and the loss. Nothing in them is written
for plans; they are modules as you would train them with torch:

    from coordinator.plan.task import Task
    from models import lenet

    module, inputs, targets, loss = lenet()
    task = Task(
        name="lenet",
        model=module,
        loss=loss,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.02, momentum=0.9),
        example=(inputs, targets),
    )

The batches are random: only shapes and dtypes matter to a plan, and the first axis is the batch. Targets of
None stand for a model that learns to give its own input back.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

BATCH: Final = 32

Example = tuple[nn.Module, tuple[Tensor, ...], Tensor | None, Callable[[Tensor, Tensor], Tensor]]
"""``(module, inputs, targets, loss)``: what the functions below return."""


def labels(classes: int) -> Tensor:
    """One class for each example of the batch: int64, shape ``(BATCH,)``."""
    return torch.randint(0, classes, (BATCH,))


def mlp() -> Example:
    """64 features, two hidden layers, 10 classes: 17,226 parameters."""
    module = nn.Sequential(
        nn.Linear(64, 128),
        nn.ReLU(),
        nn.Linear(128, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )
    return module, (torch.randn(BATCH, 64),), labels(10), nn.CrossEntropyLoss()


def dense_autoencoder() -> Example:
    """64 features through a bottleneck of 8 and back: 4,744 parameters."""
    module = nn.Sequential(
        nn.Linear(64, 32),
        nn.ReLU(),
        nn.Linear(32, 8),
        nn.ReLU(),
        nn.Linear(8, 32),
        nn.ReLU(),
        nn.Linear(32, 64),
    )
    return module, (torch.randn(BATCH, 64),), None, nn.MSELoss()


def convolutional_autoencoder() -> Example:
    """Grey images of 28×28, halved twice, and doubled twice by transposed convolutions: 3,433 parameters."""
    module = nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(16, 8, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 1, 4, stride=2, padding=1),
        nn.Sigmoid(),
    )
    return module, (torch.rand(BATCH, 1, 28, 28),), None, nn.MSELoss()


def _lenet(pool: type[nn.MaxPool2d | nn.AvgPool2d], norm: nn.Module | None = None) -> Example:
    """LeNet-5 (LeCun et al. 1998, figure 2) with ReLU, ``norm`` before the second one: 61,706 parameters."""
    module = nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2),
        nn.ReLU(),
        pool(2),
        nn.Conv2d(6, 16, 5),
        *([] if norm is None else [norm]),
        nn.ReLU(),
        pool(2),
        nn.Flatten(),
        nn.Linear(400, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, 10),
    )
    return module, (torch.randn(BATCH, 1, 28, 28),), labels(10), nn.CrossEntropyLoss()


def lenet() -> Example:
    """LeNet for grey images of 28×28, with max pooling."""
    return _lenet(nn.MaxPool2d)


def lenet_average_pool() -> Example:
    """LeNet with average pooling."""
    return _lenet(nn.AvgPool2d)


def lenet_group_norm() -> Example:
    """LeNet with group normalisation, which does not mind small batches or unlike devices."""
    return _lenet(nn.MaxPool2d, nn.GroupNorm(4, 16))


def lenet_batch_norm() -> Example:
    """LeNet with batch normalisation; its running statistics are averaged like parameters."""
    return _lenet(nn.MaxPool2d, nn.BatchNorm2d(16))


def sensor_cnn() -> Example:
    """Windows of 128 readings of 9 sensors (acceleration, rotation), 6 activities: 8,198 parameters."""
    module = nn.Sequential(
        nn.Conv1d(9, 32, 5, stride=2),
        nn.ReLU(),
        nn.MaxPool1d(2),
        nn.Conv1d(32, 64, 3),
        nn.BatchNorm1d(64),
        nn.ReLU(),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(64, 6),
    )
    return module, (torch.randn(BATCH, 9, 128),), labels(6), nn.CrossEntropyLoss()


def _separable(channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """A depthwise and a pointwise convolution (Howard et al. 2017, MobileNets, figure 3)."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU6(),
        nn.Conv2d(channels, out_channels, 1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU6(),
    )


def depthwise_cnn() -> Example:
    """A small MobileNet for colour images of 32×32, 10 classes: 9,322 parameters."""
    module = nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU6(),
        _separable(16, 32, stride=1),
        _separable(32, 64, stride=2),
        _separable(64, 64, stride=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )
    return module, (torch.randn(BATCH, 3, 32, 32),), labels(10), nn.CrossEntropyLoss()


class ResidualBlock(nn.Module):
    """Two convolutions beside a path that skips them (He et al. 2016, figure 2)."""

    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, out_channels, 3, stride, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(out_channels)
        self.second = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(out_channels)
        self.skip = nn.Conv2d(channels, out_channels, 1, stride, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """``(batch, channels, height, width)`` to the same with ``out_channels``, divided by ``stride``."""
        inner = torch.relu(self.first_norm(self.first(images)))
        return torch.relu(self.second_norm(self.second(inner)) + self.skip(images))


def residual_cnn() -> Example:
    """A small residual network for colour images of 16×16, 10 classes: 5,290 parameters."""
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        ResidualBlock(8, 8, stride=1),
        ResidualBlock(8, 16, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )
    return module, (torch.randn(BATCH, 3, 16, 16),), labels(10), nn.CrossEntropyLoss()


class LastStepClassifier(nn.Module):
    """A recurrent layer over a sequence, and a linear one on what it gives at the last time step."""

    def __init__(self, recurrent: nn.GRU | nn.LSTM, classes: int) -> None:
        super().__init__()
        self.recurrent = recurrent
        self.head = nn.Linear(recurrent.hidden_size, classes)

    def forward(self, readings: Tensor) -> Tensor:
        """``(batch, time, features)`` to logits ``(batch, classes)``."""
        states, _ = self.recurrent(readings)
        logits: Tensor = self.head(states[:, -1])
        return logits


def gru() -> Example:
    """A GRU of 32 over 24 readings of 6 sensors, 4 classes: 3,972 parameters."""
    module = LastStepClassifier(nn.GRU(6, 32, batch_first=True), 4)
    return module, (torch.randn(BATCH, 24, 6),), labels(4), nn.CrossEntropyLoss()


def lstm() -> Example:
    """An LSTM of 32 over 24 readings of 6 sensors, 4 classes: 5,252 parameters."""
    module = LastStepClassifier(nn.LSTM(6, 32, batch_first=True), 4)
    return module, (torch.randn(BATCH, 24, 6),), labels(4), nn.CrossEntropyLoss()


class TokenClassifier(nn.Module):
    """An embedding, learned positions, one transformer encoder layer, and the mean of its outputs."""

    def __init__(self, tokens: int, length: int, width: int, classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        self.encoder = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)
        self.head = nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """``(batch, length)`` token numbers, int64, to logits ``(batch, classes)``."""
        encoded = self.encoder(self.embedding(tokens) + self.positions)
        logits: Tensor = self.head(encoded.mean(1))
        return logits


def transformer() -> Example:
    """A transformer encoder over 16 of 100 tokens, 4 heads of 8, 4 classes: 12,388 parameters."""
    module = TokenClassifier(tokens=100, length=16, width=32, classes=4)
    return module, (torch.randint(0, 100, (BATCH, 16)),), labels(4), nn.CrossEntropyLoss()


class ReadingAndPlace(nn.Module):
    """Two inputs: readings of sensors, and the number of the place they come from."""

    def __init__(self, readings: int, places: int, classes: int) -> None:
        super().__init__()
        self.reading = nn.Linear(readings, 32)
        self.place = nn.Embedding(places, 32)
        self.head = nn.Linear(32, classes)

    def forward(self, readings: Tensor, places: Tensor) -> Tensor:
        """``(batch, readings)`` float32 and ``(batch,)`` int64 to logits ``(batch, classes)``."""
        logits: Tensor = self.head(torch.relu(self.reading(readings) + self.place(places)))
        return logits


def two_inputs() -> Example:
    """12 readings from one of 10 places, 4 classes: 868 parameters."""
    module = ReadingAndPlace(readings=12, places=10, classes=4)
    inputs = (torch.randn(BATCH, 12), torch.randint(0, 10, (BATCH,)))
    return module, inputs, labels(4), nn.CrossEntropyLoss()


@dataclass(frozen=True)
class Family:
    """A kind of model: its name, and the function that makes one with its example batch."""

    name: str
    make: Callable[[], Example]


FAMILIES: Final = (
    Family("MLP", mlp),
    Family("dense autoencoder", dense_autoencoder),
    Family("convolutional autoencoder", convolutional_autoencoder),
    Family("LeNet", lenet),
    Family("LeNet, average pooling", lenet_average_pool),
    Family("LeNet, group normalisation", lenet_group_norm),
    Family("LeNet, batch normalisation", lenet_batch_norm),
    Family("1-D CNN", sensor_cnn),
    Family("depthwise CNN", depthwise_cnn),
    Family("residual CNN", residual_cnn),
    Family("GRU", gru),
    Family("LSTM", lstm),
    Family("transformer", transformer),
    Family("two inputs", two_inputs),
)
