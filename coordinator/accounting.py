"""Accounting: received = applied + duplicate + rejected(by reason) + waiting, always."""

from dataclasses import dataclass, field
from typing import Final

from fedtide.wire.messages import Reason

APPLIED: Final = "applied"
DUPLICATE: Final = "duplicate"
REJECTED: Final = "rejected:"


@dataclass
class Accounting:
    """How many updates met which fate since the journal began.

    Attributes:
        received: counted on arrival, apart from the fates below, so that the identity can fail.
        applied: folded and journaled.
        duplicate: had been judged before.
        rejected: by reason.
        waiting: arrived and not yet judged durably.
    """

    received: int = 0
    applied: int = 0
    duplicate: int = 0
    rejected: dict[Reason, int] = field(default_factory=dict)
    waiting: int = 0

    @classmethod
    def from_totals(cls, totals: dict[str, int]) -> "Accounting":
        """What the journal remembers; nothing waits at a start."""
        rejected = {
            Reason(name.removeprefix(REJECTED)): count
            for name, count in totals.items()
            if name.startswith(REJECTED)
        }
        applied, duplicate = totals.get(APPLIED, 0), totals.get(DUPLICATE, 0)
        return cls(applied + duplicate + sum(rejected.values()), applied, duplicate, rejected)

    def arrived(self) -> None:
        """One more arrived."""
        self.received += 1
        self.waiting += 1

    def judged(self, totals: dict[str, int]) -> None:
        """These fates are durable now."""
        for name, count in totals.items():
            self.waiting -= count
            if name == APPLIED:
                self.applied += count
            elif name == DUPLICATE:
                self.duplicate += count
            else:
                reason = Reason(name.removeprefix(REJECTED))
                self.rejected[reason] = self.rejected.get(reason, 0) + count

    def balanced(self) -> bool:
        """Whether the identity holds."""
        fates = self.applied + self.duplicate + sum(self.rejected.values()) + self.waiting
        return self.received == fates
