"""What a journal records: entries, which change the model, and facts, which do not. Pure."""

from collections import Counter as Tally
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from coordinator.accounting import APPLIED, REJECTED
from coordinator.entries import Entry, FlushEntry, ResetEntry, RulesEntry, UpdateEntry
from fedtide.wire.ids import Counter, DeviceId, Epoch, ModelVersion
from fedtide.wire.messages import Reason


class Rejected(msgspec.Struct, frozen=True, array_like=True):
    """A verified update that does not count; its device's mark moves."""

    device: DeviceId
    counter: Counter
    reason: Reason
    detail: str


class Counted(msgspec.Struct, frozen=True, array_like=True):
    """So many more updates met this fate without moving a mark."""

    fate: str
    number: int


class EpochClaimed(msgspec.Struct, frozen=True, array_like=True):
    """A run of the coordinator began."""

    epoch: Epoch


class Published(msgspec.Struct, frozen=True, array_like=True):
    """A version that devices were offered.

    Attributes:
        version: its number.
        fingerprint: of the parameters that devices hold.
        moment: seconds since 1970.
        exact: fingerprint of the parameters as aggregated, where those are others.
    """

    version: ModelVersion
    fingerprint: bytes
    moment: float
    exact: bytes | None = None


class VersionPublished(msgspec.Struct, frozen=True, array_like=True):
    """A version is about to be offered; from here on only the last ``keep`` count."""

    published: Published
    keep: int


class EvaluationResult(msgspec.Struct, frozen=True, array_like=True):
    """A held-out result; None where it was not finite; ``moment`` in seconds since 1970."""

    version: ModelVersion
    loss: float | None
    metric: float | None
    moment: float


Fact = Rejected | Counted | EpochClaimed | VersionPublished | EvaluationResult
Record = Entry | Fact

_KINDS: Final[dict[type[Record], int]] = {
    UpdateEntry: 1,
    FlushEntry: 2,
    RulesEntry: 3,
    ResetEntry: 4,
    Rejected: 16,
    Counted: 17,
    EpochClaimed: 18,
    VersionPublished: 19,
    EvaluationResult: 20,
}
UPDATE_KIND: Final = _KINDS[UpdateEntry]
_FIRST_FACT: Final = 16
_DECODERS: Final = {kind: msgspec.msgpack.Decoder(record) for record, kind in _KINDS.items()}
_ENCODER: Final = msgspec.msgpack.Encoder()


def is_entry(kind: int) -> bool:
    """Whether records of this kind change the model."""
    return kind < _FIRST_FACT


def to_body(record: Record) -> tuple[int, bytes]:
    """Kind and body."""
    return _KINDS[type(record)], _ENCODER.encode(record)


def from_body(kind: int, body: bytes | memoryview) -> Record:
    """The inverse of :func:`to_body`.

    Raises:
        ValueError: no such kind, or a body that is none of its.
    """
    decoder = _DECODERS.get(kind)
    if decoder is None:
        raise ValueError(f"the unknown kind {kind}")
    try:
        record: Record = decoder.decode(body)
    except msgspec.DecodeError as error:
        raise ValueError(f"not of its kind {kind}: {error}") from error
    return record


@dataclass(frozen=True)
class Batch:
    """What one group commit makes durable together, in order."""

    records: Sequence[Record] = ()

    @property
    def entries(self) -> list[Entry]:
        """Those that change the model."""
        return [record for record in self.records if isinstance(record, Entry)]

    @property
    def totals(self) -> dict[str, int]:
        """How many updates met which fate in it, by name."""
        totals: Tally[str] = Tally()
        for record in self.records:
            fate = fate_of(record)
            if fate is not None:
                totals[fate[0]] += fate[1]
        return dict(totals)


def fate_of(record: Record) -> tuple[str, int] | None:
    """What a record says about updates: which fate, and how many met it."""
    match record:
        case UpdateEntry():
            return APPLIED, 1
        case Rejected():
            return REJECTED + record.reason, 1
        case Counted():
            return record.fate, record.number
        case _:
            return None
