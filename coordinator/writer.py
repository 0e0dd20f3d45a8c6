"""The writer: the one owner of the global model, the buffer and the marks.

It judges a batch of arrivals in order and folds the admitted ones. Its caller then commits the batch to the
journal, and only then acknowledges, sends receipts and publishes: until the commit nothing has left this
process, and if the commit fails the process ends and the journal is the truth.
"""

from collections import Counter as Tally
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from coordinator.accounting import APPLIED, DUPLICATE, REJECTED
from coordinator.admission import Admitted, Rejection, Terms, admit
from coordinator.entries import Entry, FlushEntry, UpdateEntry
from coordinator.intake import Arrived, Refused
from coordinator.journal import Batch
from coordinator.marks import Mark, Standing, after_applied, after_rejected, standing
from coordinator.model_state import ModelState, close_buffer, fold_update
from coordinator.replay import Bases
from coordinator.settings import CoordinatorSettings
from fedtide.wire import codecs
from fedtide.wire.codecs.base import NotFinite, WrongLength
from fedtide.wire.envelope import UpdateHeader
from fedtide.wire.errors import MalformedPayload
from fedtide.wire.ids import Counter, DeviceId, ModelVersion, PlanId
from fedtide.wire.messages import Reason, Receipt, Verdict
from fedtide.wire.parameters import Schema

_ENROL_FIRST_S = 10.0  # a device that is not enrolled yet keeps its update and asks again after this long


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

    entries: list[Entry] = field(default_factory=list)
    marks: dict[DeviceId, Mark] = field(default_factory=dict)
    totals: Tally[str] = field(default_factory=Tally)
    staleness: list[int] = field(default_factory=list)


class Writer:
    """Judges and folds.

    Attributes:
        state: the global model, ahead of the journal by at most the batch that is being committed.
        marks: by device.
        published: fingerprints of the versions an update may start from.
        stopped: whether the run is over.
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
    ) -> None:
        self.state = state
        self.marks = marks
        self.published: dict[ModelVersion, bytes] = {}
        self.stopped = False
        self._settings = settings
        self._plan = plan
        self._schema = schema
        self._bases = bases
        self._scratch = np.empty(schema.size, np.float32)

    def judge(self, arrivals: Sequence[Arrived | Refused]) -> Judged:
        """Decide on every arrival in order and fold those that count."""
        draft = _Draft()
        receipts = [
            self._refuse(arrival, draft) if isinstance(arrival, Refused) else self._judge(arrival, draft)
            for arrival in arrivals
        ]
        batch = Batch(draft.entries, tuple(draft.marks.values()), dict(draft.totals))
        return Judged(batch, receipts, draft.staleness)

    def flush(self) -> Batch:
        """Close a partly full buffer: the time limit has passed."""
        self.state = close_buffer(self.state)
        return Batch([FlushEntry()])

    def _refuse(self, refused: Refused, draft: _Draft) -> Receipt | None:
        """Count only: an unverified sender must not move a device's mark."""
        draft.totals[REJECTED + refused.rejection.reason] += 1
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
                draft.totals[REJECTED + rejection.reason] += 1
                verdict = Verdict.REJECTED
            case Standing.LATEST if mark and mark.reason:
                rejection = Rejection(mark.reason, mark.detail)
                draft.totals[DUPLICATE] += 1
                verdict = Verdict.REJECTED
            case _:
                rejection = None
                draft.totals[DUPLICATE] += 1
                verdict = Verdict.DUPLICATE
        return self._receipt(header.device, header.counter, arrived.digest, verdict, rejection)

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
        draft.totals[REJECTED + rejection.reason] += 1
        moved = after_rejected(mark, header.device, header.counter, rejection.reason, rejection.detail)
        self.marks[header.device] = draft.marks[header.device] = moved
        return rejection

    def _fold(self, arrived: Arrived, admitted: Admitted) -> Rejection | None:
        header = arrived.envelope.header
        try:
            delta = codecs.get(header.codec).decode(arrived.envelope.payload, self._schema, out=self._scratch)
        except MalformedPayload as error:
            return Rejection(_payload_reason(error), str(error))
        needs_base = self.state.rules.aggregator.needs_base
        base = self._bases(header.base_version) if needs_base else None
        self.state = fold_update(self.state, delta, admitted.staleness_weight, admitted.importance, base)
        return None

    def _note_applied(self, arrived: Arrived, admitted: Admitted, mark: Mark | None, draft: _Draft) -> None:
        header = arrived.envelope.header
        draft.entries.append(
            UpdateEntry(
                header.device,
                header.counter,
                header.base_version,
                admitted.staleness_weight,
                admitted.importance,
                arrived.raw,
            )
        )
        draft.totals[APPLIED] += 1
        draft.staleness.append(admitted.staleness)
        weight = admitted.staleness_weight * admitted.importance
        moved = after_applied(mark, header.device, header.counter, admitted.staleness, weight)
        self.marks[header.device] = draft.marks[header.device] = moved

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
        wait_s = _ENROL_FIRST_S if reason is Reason.UNKNOWN_DEVICE else self._settings.update.retry_after_s
        return Receipt(
            device=device,
            counter=counter,
            digest=digest,
            verdict=verdict,
            reason=reason,
            detail=rejection.detail if rejection else "",
            version=self.state.version,
            retry_after_s=wait_s,
        )


def _overtaken(header: UpdateHeader, mark: Mark | None) -> Rejection:
    newest = mark.counter if mark else 0
    return Rejection(
        Reason.REPLAYED_COUNTER,
        f"counter {header.counter} comes after counter {newest} of the same device; counters only grow",
    )


def _payload_reason(error: MalformedPayload) -> Reason:
    match error:
        case WrongLength():
            return Reason.WRONG_SHAPE
        case NotFinite():
            return Reason.NOT_FINITE
        case _:
            return Reason.MALFORMED
