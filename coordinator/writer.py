"""The writer: the one owner of the global model, the buffer and the marks.

It judges a batch of arrivals in order and folds the admitted ones. Its caller then commits the batch to the
journal, and only then acknowledges, sends receipts and publishes: until the commit nothing has left this
process, and if the commit fails the process ends and the journal is the truth.
"""

from collections import Counter as Tally
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import msgspec
import numpy as np

from coordinator.accounting import DUPLICATE, REJECTED
from coordinator.admission import Admitted, Rejection, Terms, admit
from coordinator.entries import FlushEntry, ResetEntry, UpdateEntry
from coordinator.intake import Arrived, Refused
from coordinator.journal.facts import Batch, Counted, Record, Rejected
from coordinator.marks import Mark, Standing, after_applied, after_rejected, standing
from coordinator.model_state import ModelState, close_buffer, fold_update, reset_state
from coordinator.poison import UNWATCHED, Watch
from coordinator.replay import Bases
from coordinator.rollback import Contributors, Rollbacks
from coordinator.settings import CoordinatorSettings
from coordinator.status import RolledBack
from fedtide.wire import codecs
from fedtide.wire.codecs.base import NotFinite, WrongLength
from fedtide.wire.envelope import UpdateHeader
from fedtide.wire.errors import MalformedPayload
from fedtide.wire.ids import Counter, DeviceId, ModelVersion, PlanId
from fedtide.wire.messages import Reason, Receipt, Verdict
from fedtide.wire.parameters import Schema, Vector, to_bytes

_WAITS_S: Final[dict[Reason | None, float]] = {
    Reason.UNKNOWN_DEVICE: 10.0,  # a device that is not enrolled yet keeps its update and asks again
    Reason.TOO_MANY: 60.0,
}
"""How long the sender shall wait, where that depends on what was wrong."""


@dataclass(frozen=True)
class Judged:
    """A batch to commit, and the receipts to send once it is committed; None where none may be sent."""

    batch: Batch
    receipts: Sequence[Receipt | None]
    staleness: Sequence[int]
    """Of the applied updates, in versions."""


@dataclass
class _Draft:
    """A batch being made."""

    records: list[Record] = field(default_factory=list)
    counted: Tally[str] = field(default_factory=Tally)
    """Fates that move no mark."""
    staleness: list[int] = field(default_factory=list)


class Writer:
    """Judges and folds.

    Attributes:
        state: the global model, ahead of the journal by at most the batch that is being committed.
        marks: by device.
        published: fingerprints of the versions an update may start from.
        line_since: version of the last reset in this run, committed or not; 0 before there was one.
        stopped: whether the run is over.
        contributors: whose updates are in which version.
        rollbacks: of this run.
    """

    def __init__(
        self,
        settings: CoordinatorSettings,
        *,
        plan: PlanId,
        schema: Schema,
        state: ModelState,
        marks: dict[DeviceId, Mark],
        bases: Bases,
        watch: Watch = UNWATCHED,
    ) -> None:
        self.state = state
        self.marks = marks
        self.published: dict[ModelVersion, bytes] = {}
        self.line_since = ModelVersion(0)
        self.stopped = False
        self.contributors = Contributors()
        self.rollbacks = Rollbacks()
        self._settings = settings
        self._plan = plan
        self._schema = schema
        self._bases = bases
        self._watch = watch
        self._scratch = np.empty(schema.size, np.float32)

    def judge(self, arrivals: Sequence[Arrived | Refused]) -> Judged:
        """Decide on every arrival in order and fold those that count."""
        draft = _Draft()
        receipts = [
            self._refuse(arrival, draft) if isinstance(arrival, Refused) else self._judge(arrival, draft)
            for arrival in arrivals
        ]
        counted = [Counted(fate, number) for fate, number in draft.counted.items()]
        return Judged(Batch([*draft.records, *counted]), receipts, draft.staleness)

    def flush(self) -> Batch:
        """Close a partly full buffer: the time limit has passed."""
        self._go_on(close_buffer(self.state))
        return Batch([FlushEntry()])

    def reset(self, version: ModelVersion, parameters: Vector, why: str) -> Batch:
        """Go on from other parameters of this plan; updates that started from an older version are refused.

        Args:
            version: their number, above every version that devices were offered.
            parameters: float32, shape ``(schema.size,)``.
            why: for people.
        """
        self.state = reset_state(self.state, version, parameters)
        self.published.clear()
        self.line_since = version
        return Batch([ResetEntry(self._plan, self._schema, version, to_bytes(parameters), why)])

    def _refuse(self, refused: Refused, draft: _Draft) -> Receipt | None:
        """Count only: an unverified sender must not move a device's mark."""
        draft.counted[REJECTED + refused.rejection.reason] += 1
        if refused.digest is None:
            return None
        return self._receipt(
            refused.sender, refused.counter, refused.digest, Verdict.REJECTED, refused.rejection
        )

    def _judge(self, arrived: Arrived, draft: _Draft) -> Receipt:
        header = arrived.envelope.header
        mark = self.marks.get(header.device)
        match standing(mark, header.counter):
            case Standing.NEW:
                rejection = self._apply(arrived, mark, draft)
                verdict = Verdict.REJECTED if rejection else Verdict.APPLIED
            case Standing.OVERTAKEN:
                rejection = _overtaken(header, mark)
                draft.counted[REJECTED + rejection.reason] += 1
                verdict = Verdict.REJECTED
            case Standing.LATEST if mark and mark.reason:
                rejection = Rejection(mark.reason, mark.detail)
                draft.counted[DUPLICATE] += 1
                verdict = Verdict.REJECTED
            case _:
                rejection = None
                draft.counted[DUPLICATE] += 1
                verdict = Verdict.DUPLICATE
        receipt = self._receipt(header.device, header.counter, arrived.digest, verdict, rejection)
        return msgspec.structs.replace(receipt, highest=self.marks[header.device].counter)

    def _apply(self, arrived: Arrived, mark: Mark | None, draft: _Draft) -> Rejection | None:
        header = arrived.envelope.header
        admitted = admit(header, self._terms(), self._settings)
        if isinstance(admitted, Admitted):
            rejection = self._fold(arrived, admitted)
            if rejection is None:
                self._note_applied(arrived, admitted, mark, draft)
                return None
        else:
            rejection = admitted
        fact = Rejected(header.device, header.counter, rejection.reason, rejection.detail)
        draft.records.append(fact)
        self.marks[header.device] = after_rejected(mark, fact.device, fact.counter, fact.reason, fact.detail)
        return rejection

    def _fold(self, arrived: Arrived, admitted: Admitted) -> Rejection | None:
        header = arrived.envelope.header
        if self._watch.is_poison(arrived.digest):
            self._watch.set_aside(header.device, arrived.digest, arrived.raw, None)
            return _unreadable("it ended the coordinator each time it was read")
        self._watch.begins(arrived.digest)
        try:
            delta = codecs.get(header.codec).decode(arrived.envelope.payload, self._schema, out=self._scratch)
        except MalformedPayload as error:
            self._watch.ends()
            return Rejection(_payload_reason(error), str(error))
        except Exception as error:  # noqa: BLE001 - nothing is folded yet: this one is left, the others count
            self._watch.ends()
            self._watch.set_aside(header.device, arrived.digest, arrived.raw, error)
            return _unreadable(f"decoding it raised {type(error).__name__}")
        needs_base = self.state.rules.aggregator.needs_base
        try:
            base = self._bases(header.base_version) if needs_base else None
        except FileNotFoundError:
            self._watch.ends()
            detail = f"trained on version {header.base_version}, whose parameters are no longer kept"
            return Rejection(Reason.UNKNOWN_BASE, detail)
        # What fails from here on ends the coordinator, with the note that this was being read.
        self.contributors.note(ModelVersion(self.state.version + 1), header.device)
        self._go_on(fold_update(self.state, delta, admitted.staleness_weight, admitted.importance, base))
        self._watch.ends()
        return None

    def _go_on(self, state: ModelState) -> None:
        """Take the next state, and note when its version is the one before again."""
        before, self.state = self.state, state
        if state.version > before.version and state.parameters is before.parameters:
            devices = tuple(self.contributors.between(before.version, state.version))
            why = f"Version {state.version} would not have been finite"
            self.rollbacks.note(
                RolledBack(version=state.version, good=before.version, why=why, devices=devices)
            )

    def _note_applied(self, arrived: Arrived, admitted: Admitted, mark: Mark | None, draft: _Draft) -> None:
        header = arrived.envelope.header
        draft.records.append(
            UpdateEntry(
                header.device,
                header.counter,
                header.base_version,
                admitted.staleness_weight,
                admitted.importance,
                arrived.raw,
                admitted.staleness,
            )
        )
        draft.staleness.append(admitted.staleness)
        weight = admitted.staleness_weight * admitted.importance
        self.marks[header.device] = after_applied(
            mark, header.device, header.counter, admitted.staleness, weight
        )

    def _terms(self) -> Terms:
        return Terms(self._settings.fleet, self._plan, self.state.version, self.published, self.stopped)

    def _receipt(
        self,
        device: DeviceId,
        counter: Counter,
        digest: bytes,
        verdict: Verdict,
        rejection: Rejection | None,
    ) -> Receipt:
        reason = rejection.reason if rejection else None
        return Receipt(
            device=device,
            counter=counter,
            digest=digest,
            verdict=verdict,
            reason=reason,
            detail=rejection.detail if rejection else "",
            version=self.state.version,
            retry_after_s=_WAITS_S.get(reason, self._settings.update.retry_after_s),
        )


def _overtaken(header: UpdateHeader, mark: Mark | None) -> Rejection:
    newest = mark.counter if mark else 0
    return Rejection(
        Reason.REPLAYED_COUNTER,
        f"counter {header.counter} comes after counter {newest} of the same device; counters only grow",
    )


def _unreadable(why: str) -> Rejection:
    return Rejection(Reason.UNREADABLE, f"its bytes were kept for the operator: {why}")


def _payload_reason(error: MalformedPayload) -> Reason:
    match error:
        case WrongLength():
            return Reason.WRONG_SHAPE
        case NotFinite():
            return Reason.NOT_FINITE
        case _:
            return Reason.MALFORMED
