"""Journal entries: everything that changes the global model, in the order in which it did."""

import msgspec

from coordinator.settings import Rules
from fedtide.wire.ids import Counter, DeviceId, ModelVersion, PlanId
from fedtide.wire.parameters import Schema


class UpdateEntry(msgspec.Struct, frozen=True, array_like=True):
    """An admitted update: the raw envelope and the weights it was given, so that policies may change later.

    Attributes:
        device: whose.
        counter: which.
        base_version: what it started from.
        staleness_weight: s(τ), decided at admission.
        importance: n: 1 or the number of examples, decided at admission.
        envelope: the bytes as they arrived.
        staleness: τ; base_version + τ is the version it was folded into.
    """

    device: DeviceId
    counter: Counter
    base_version: ModelVersion
    staleness_weight: float
    importance: float
    envelope: bytes
    staleness: int


class FlushEntry(msgspec.Struct, frozen=True, array_like=True):
    """The time limit closed a partly full buffer here."""


class RulesEntry(msgspec.Struct, frozen=True, array_like=True):
    """From here on these rules hold."""

    rules: Rules


class ResetEntry(msgspec.Struct, frozen=True, array_like=True):
    """From here on these parameters, with an empty buffer and a new state of the server optimizer.

    A journal's first: the plan's initial parameters. Later: a model that was rolled back, another plan, or a
    journal that lost entries. Nothing of before counts afterwards: no update may start from an older version.

    Attributes:
        plan: the plan in force from here on.
        schema: of its model.
        version: the number of these parameters, above every version that was ever offered.
        parameters: float32, little endian.
        why: for people.
    """

    plan: PlanId
    schema: Schema
    version: ModelVersion
    parameters: bytes
    why: str


Entry = UpdateEntry | FlushEntry | RulesEntry | ResetEntry
