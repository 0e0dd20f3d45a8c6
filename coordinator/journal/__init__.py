"""The journal: an append-only log of what changed the model and what was counted, cut at every snapshot."""

from coordinator.journal.errors import Damage, JournalDamaged, StorageFailed, storing
from coordinator.journal.facts import Batch, Counted, EvaluationResult, Published, Record, Rejected
from coordinator.journal.history import History
from coordinator.journal.ledger import JudgedTwice, Ledger
from coordinator.journal.store import Journal

__all__ = [
    "Batch",
    "Counted",
    "Damage",
    "EvaluationResult",
    "History",
    "Journal",
    "JournalDamaged",
    "JudgedTwice",
    "Ledger",
    "Published",
    "Record",
    "Rejected",
    "StorageFailed",
    "storing",
]
