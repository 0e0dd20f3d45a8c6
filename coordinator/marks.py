"""Marks: how far each device's updates have come. This is what makes an update count once. Pure."""

from enum import Enum, auto
from typing import Final

import msgspec

from fedtide.wire.ids import Counter, DeviceId
from fedtide.wire.messages import Reason, Verdict

_WINDOW: Final = 63
"""Counters below the highest that are told apart; a device has one update in flight, so even 2 would do."""


class Standing(Enum):
    """What a counter means to a device's mark."""

    NEW = auto()
    LATEST = auto()
    """The highest counter seen: its verdict is known."""
    APPLIED_BEFORE = auto()
    OVERTAKEN = auto()
    """Below the highest and never applied: superseded by its own device, or replayed by somebody else."""


class Mark(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """How far a device's updates have come, and what it contributed.

    Attributes:
        device: whose.
        counter: the highest whose verdict is durable.
        recent: bit i is set if counter − i was applied; 63 bits.
        verdict: of the highest; ``APPLIED`` or ``REJECTED``.
        reason: why it was rejected.
        detail: for people.
        applied: updates applied so far.
        rejected: updates rejected so far.
        staleness: sum over the applied ones, in versions.
        weight: sum of their aggregation weights s·n.
    """

    device: DeviceId
    counter: Counter
    recent: int
    verdict: Verdict
    reason: Reason | None = None
    detail: str = ""
    applied: int = 0
    rejected: int = 0
    staleness: int = 0
    weight: float = 0.0


def standing(mark: Mark | None, counter: Counter) -> Standing:
    """What this counter is to the device's mark."""
    if mark is None or counter > mark.counter:
        return Standing.NEW
    if counter == mark.counter:
        return Standing.LATEST
    distance = mark.counter - counter
    applied = distance < _WINDOW and mark.recent >> distance & 1
    return Standing.APPLIED_BEFORE if applied else Standing.OVERTAKEN


def after_applied(
    mark: Mark | None, device: DeviceId, counter: Counter, staleness: int, weight: float
) -> Mark:
    """The mark once a new update was applied."""
    moved = _moved(mark, device, counter, applied=True)
    return msgspec.structs.replace(
        moved,
        verdict=Verdict.APPLIED,
        reason=None,
        detail="",
        applied=moved.applied + 1,
        staleness=moved.staleness + staleness,
        weight=moved.weight + weight,
    )


def after_rejected(
    mark: Mark | None, device: DeviceId, counter: Counter, reason: Reason, detail: str
) -> Mark:
    """The mark once a new update was rejected."""
    moved = _moved(mark, device, counter, applied=False)
    return msgspec.structs.replace(
        moved, verdict=Verdict.REJECTED, reason=reason, detail=detail, rejected=moved.rejected + 1
    )


def _moved(mark: Mark | None, device: DeviceId, counter: Counter, *, applied: bool) -> Mark:
    if mark is None:
        return Mark(device, counter, int(applied), Verdict.REJECTED)
    distance = counter - mark.counter
    kept = mark.recent << distance if distance < _WINDOW else 0
    recent = (kept | int(applied)) & ((1 << _WINDOW) - 1)
    return msgspec.structs.replace(mark, counter=counter, recent=recent)
