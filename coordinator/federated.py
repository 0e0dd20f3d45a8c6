"""The federated metric: what the devices find on the examples they hold out, put together. Pure.

Devices report it themselves and do not sign it: the broker's access rules are what ties a report to its
device. It is for people; a release rests on it only where the operator says so.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from coordinator.status import FederatedMetric
from fedtide.wire.ids import DeviceId, ModelVersion
from fedtide.wire.messages import EvaluationEvent

_LARGEST: Final = 1e12
"""Losses and metrics beyond this are refused: sums of a million of them are still finite."""
_KEPT_VERSIONS: Final = 1000


@dataclass
class _Sum:
    """Sums over devices, weighted by examples."""

    devices: int = 0
    examples: int = 0
    loss: float = 0.0
    metric_examples: int = 0
    metric: float = 0.0
    oldest: ModelVersion | None = None
    newest: ModelVersion | None = None

    def add(self, event: EvaluationEvent, max_examples: int) -> None:
        """Count what one device found."""
        examples = min(event.num_examples, max_examples)
        self.devices += 1
        self.examples += examples
        self.loss += examples * event.loss
        if event.metric is not None:
            self.metric_examples += examples
            self.metric += examples * event.metric
        self.oldest = event.version if self.oldest is None else min(self.oldest, event.version)
        self.newest = event.version if self.newest is None else max(self.newest, event.version)

    def mean(self) -> FederatedMetric | None:
        """The means; None without any device."""
        if self.oldest is None or self.newest is None:
            return None
        return FederatedMetric(
            oldest_version=self.oldest,
            version=self.newest,
            devices=self.devices,
            examples=self.examples,
            loss=self.loss / self.examples,
            metric=self.metric / self.metric_examples if self.metric_examples else None,
        )


@dataclass
class FederatedEvaluations:
    """What enrolled devices found on model versions.

    Attributes:
        max_examples: num_examples beyond this counts as this, so that no device is the whole mean.
        latest: by device.
    """

    max_examples: int
    latest: dict[DeviceId, EvaluationEvent] = field(default_factory=dict)
    _by_version: dict[ModelVersion, _Sum] = field(default_factory=dict)

    def add(self, device: DeviceId, event: EvaluationEvent, newest: ModelVersion) -> bool:
        """Take a device's report; False if it cannot be true.

        A device counts once for a version. One that goes back to an older version is not believed: agents
        never do, and by going back and forth one device would count for many.

        Args:
            device: enrolled.
            event: what it sent.
            newest: the newest version devices were offered.
        """
        if not _plausible(event) or event.version > newest:
            return False
        before = self.latest.get(device)
        if before is not None and event.version < before.version:
            return False
        if before is None or event.version > before.version:
            self._by_version.setdefault(event.version, _Sum()).add(event, self.max_examples)
            while len(self._by_version) > _KEPT_VERSIONS:
                del self._by_version[min(self._by_version)]
        self.latest[device] = event
        return True

    def current(
        self, devices: Iterable[DeviceId], newest: ModelVersion, max_age: int
    ) -> FederatedMetric | None:
        """The mean over these devices' latest reports; None without any.

        Args:
            devices: the enrolled ones.
            newest: the newest version devices were offered.
            max_age: reports on versions more than this behind ``newest`` are left out.
        """
        total = _Sum()
        for device in devices:
            event = self.latest.get(device)
            if event is not None and newest - event.version <= max_age:
                total.add(event, self.max_examples)
        return total.mean()

    def by_version(self) -> tuple[FederatedMetric, ...]:
        """The mean for each of the last thousand versions that some device evaluated, oldest first."""
        means = (self._by_version[version].mean() for version in sorted(self._by_version))
        return tuple(mean for mean in means if mean is not None)


def _plausible(event: EvaluationEvent) -> bool:
    values = (event.loss,) if event.metric is None else (event.loss, event.metric)
    return (
        event.version >= 0
        and event.num_examples > 0
        and all(math.isfinite(value) and abs(value) <= _LARGEST for value in values)
    )
