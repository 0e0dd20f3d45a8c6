"""Journal entries: everything that changes the global model, in the order in which it did."""

from dataclasses import dataclass

from coordinator.settings import Rules
from fedtide.wire.ids import Counter, DeviceId, ModelVersion


@dataclass(frozen=True)
class UpdateEntry:
    """An admitted update: the raw envelope and the weights it was given, so that policies may change later.

    Attributes:
        device: whose.
        counter: which.
        base_version: what it started from.
        staleness_weight: s(τ), decided at admission.
        importance: n: 1 or the number of examples, decided at admission.
        envelope: the bytes as they arrived.
    """

    device: DeviceId
    counter: Counter
    base_version: ModelVersion
    staleness_weight: float
    importance: float
    envelope: bytes


@dataclass(frozen=True)
class FlushEntry:
    """The time limit closed a partly full buffer here."""


@dataclass(frozen=True)
class RulesEntry:
    """From here on these rules hold."""

    rules: Rules


Entry = UpdateEntry | FlushEntry | RulesEntry
