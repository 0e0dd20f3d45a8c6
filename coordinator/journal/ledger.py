"""The ledger: what all records so far add up to, but for the model. Pure; it has one owner.

It is never stored on its own: it is folded from the records, and a snapshot holds it as it was then.
"""

from collections.abc import Sequence
from typing import Final

import msgspec

from coordinator.entries import FlushEntry, ResetEntry, RulesEntry, UpdateEntry
from coordinator.journal.facts import (
    Counted,
    EpochClaimed,
    EvaluationResult,
    Published,
    Record,
    Rejected,
    VersionPublished,
    fate_of,
)
from coordinator.marks import Mark, after_applied, after_rejected
from coordinator.settings import Rules
from fedtide.wire.ids import Counter, DeviceId, Epoch, ModelVersion, PlanId
from fedtide.wire.parameters import Schema

_KEPT_EVALUATIONS: Final = 1000


class JudgedTwice(Exception):
    """An update is to be recorded whose device's mark says that it was judged before. A defect of ours."""


class Ledger(msgspec.Struct):
    """The sum of the records.

    Attributes:
        sequence: number of the last record; 0 before the first.
        plan: in force; None before the first reset.
        schema: of its model.
        plan_since: the first version of this plan.
        line_since: version of the last reset: no update may start from an older one.
        reset_sequence: number of the last reset.
        rules: in force; None before there are any.
        rules_sequence: number of the record that set them.
        epoch: of the last run.
        highest: the highest version ever offered.
        marks: by device.
        totals: how many updates met which fate, by name.
        published: versions offered since the last reset that are kept, oldest first.
        evaluations: the last thousand held-out results of this plan.
    """

    sequence: int = 0
    plan: PlanId | None = None
    schema: Schema | None = None
    plan_since: ModelVersion = ModelVersion(0)
    line_since: ModelVersion = ModelVersion(0)
    reset_sequence: int = 0
    rules: Rules | None = None
    rules_sequence: int = 0
    epoch: Epoch = Epoch(0)
    highest: ModelVersion = ModelVersion(0)
    marks: dict[DeviceId, Mark] = {}
    totals: dict[str, int] = {}
    published: dict[ModelVersion, Published] = {}
    evaluations: dict[ModelVersion, EvaluationResult] = {}

    def to_bytes(self) -> bytes:
        """As a snapshot holds it; equal ledgers of equal history give equal bytes."""
        return msgspec.msgpack.encode(self)

    @classmethod
    def from_bytes(cls, content: bytes) -> "Ledger":
        """The inverse of :meth:`to_bytes`.

        Raises:
            ValueError: it is no ledger.
        """
        try:
            return msgspec.msgpack.decode(content, type=cls)
        except msgspec.DecodeError as error:
            raise ValueError(f"not a ledger: {error}") from error

    def check(self, records: Sequence[Record]) -> None:
        """Hold records that are to come next against this.

        Raises:
            JudgedTwice: an update among them was judged before.
            ValueError: a reset to a version that devices may have seen.
        """
        highest: dict[DeviceId, Counter] = {}
        for record in records:
            match record:
                case UpdateEntry() | Rejected():
                    mark = self.marks.get(record.device)
                    before = highest.get(record.device, mark.counter if mark else None)
                    if before is not None and record.counter <= before:
                        raise JudgedTwice(
                            f"update {record.counter} of {record.device} was judged before: "
                            f"its highest counter is {before}"
                        )
                    highest[record.device] = record.counter
                case ResetEntry() if self.plan is not None and record.version <= self.highest:
                    raise ValueError(
                        f"a reset to version {record.version}; devices were offered version {self.highest}"
                    )

    def fold(self, record: Record) -> None:
        """Add the next record."""
        self.sequence += 1
        fate = fate_of(record)
        if fate is not None:
            self.totals[fate[0]] = self.totals.get(fate[0], 0) + fate[1]
        match record:
            case UpdateEntry():
                self._move_applied(record)
            case Rejected():
                mark = self.marks.get(record.device)
                self.marks[record.device] = after_rejected(
                    mark, record.device, record.counter, record.reason, record.detail
                )
            case RulesEntry():
                self.rules, self.rules_sequence = record.rules, self.sequence
            case ResetEntry():
                self._reset(record)
            case EpochClaimed() | VersionPublished() | EvaluationResult():
                self._note(record)
            case FlushEntry() | Counted():
                pass

    def _note(self, fact: EpochClaimed | VersionPublished | EvaluationResult) -> None:
        match fact:
            case EpochClaimed():
                self.epoch = max(self.epoch, fact.epoch)
            case VersionPublished():
                self._publish(fact)
            case EvaluationResult():
                self.evaluations[fact.version] = fact
                while len(self.evaluations) > _KEPT_EVALUATIONS:
                    del self.evaluations[min(self.evaluations)]

    def _move_applied(self, update: UpdateEntry) -> None:
        weight = update.staleness_weight * update.importance
        self.marks[update.device] = after_applied(
            self.marks.get(update.device), update.device, update.counter, update.staleness, weight
        )

    def _reset(self, reset: ResetEntry) -> None:
        if reset.plan != self.plan:
            self.plan, self.schema, self.plan_since = reset.plan, reset.schema, reset.version
            self.evaluations.clear()
        self.line_since, self.reset_sequence = reset.version, self.sequence
        self.published.clear()

    def _publish(self, record: VersionPublished) -> None:
        new = record.published
        known = self.published.get(new.version)
        # Where its file was lost, devices are offered the same version in other parameters.
        if known is None or known.fingerprint != new.fingerprint:
            self.published[new.version] = new
        self.highest = max(self.highest, new.version)
        while len(self.published) > record.keep:
            del self.published[min(self.published)]
