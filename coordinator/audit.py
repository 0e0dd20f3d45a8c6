"""Replaying all of a journal that is kept: every published version and every snapshot must come out again."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from coordinator.entries import FlushEntry, ResetEntry, RulesEntry, UpdateEntry
from coordinator.journal import History, JournalDamaged
from coordinator.journal.facts import VersionPublished
from coordinator.journal.snapshot import Snapshot
from coordinator.model_state import ModelState
from coordinator.recovery import starts
from coordinator.replay import Bases, ReplayMismatch, replay
from fedtide.wire.ids import ModelVersion


@dataclass(frozen=True)
class Audit:
    """What a replay gave.

    Attributes:
        since: number of the record it began after.
        entries: how many were replayed.
        versions: how many published versions were made again and had their SHA-256.
        snapshots: how many snapshots were made again, equal to the bit.
        version: the newest model version.
        seconds: it took.
    """

    since: int
    entries: int
    versions: int
    snapshots: int
    version: ModelVersion
    seconds: float


def audit(
    journal: History, bases: Bases, progress: Callable[[int, int], None] = lambda _done, _all: None
) -> Audit:
    """Replay from the oldest record that is kept.

    Args:
        journal: which.
        bases: versions from before, for aggregators that need them.
        progress: told how many of how many records have been replayed.

    Raises:
        ReplayMismatch: a version or a snapshot comes out otherwise.
        JournalDamaged: the journal cannot be read, or a base is not kept.
    """
    begun = time.perf_counter()
    published = _published(journal)
    missing: FileNotFoundError | None = None
    for state, since, schema in starts(journal, oldest_first=True):
        comparison = _Comparison(journal, since, published, progress)
        try:
            _, last = replay(
                journal,
                state,
                since,
                schema=schema,
                bases=bases,
                on_version=comparison.note_version,
                on_entry=comparison.note_entry,
                published=published,
            )
        except FileNotFoundError as error:
            missing = error  # FedAsync: a base from before; a later snapshot may not need it
            continue
        comparison.finish(last)
        seconds = time.perf_counter() - begun
        return Audit(
            since, comparison.entries, comparison.versions, comparison.snapshots, last.version, seconds
        )
    raise JournalDamaged(f"nothing can be replayed from record {journal.oldest} on: {missing}")


class _Comparison:
    """Holds what a replay makes against what the journal says."""

    def __init__(
        self,
        journal: History,
        since: int,
        published: dict[ModelVersion, bytes],
        progress: Callable[[int, int], None],
    ) -> None:
        self._last = journal.last_sequence()
        self._since = since
        self._published = published
        self._progress = progress
        self._snapshots = (
            snapshot for snapshot in journal.snapshots(oldest_first=True) if snapshot.ledger.sequence > since
        )
        self._next = next(self._snapshots, None)
        self.entries = self.versions = self.snapshots = 0

    def note_version(self, state: ModelState) -> None:
        """A version was made; the replay itself has compared it."""
        self.versions += state.version in self._published

    def note_entry(self, number: int, before: ModelState) -> None:
        """Entry ``number`` comes next."""
        self._compare_before(number, before)
        self.entries += 1
        self._progress(number - self._since, self._last - self._since)

    def finish(self, state: ModelState) -> None:
        """There is no entry after this state."""
        self._compare_before(self._last + 1, state)

    def _compare_before(self, number: int, before: ModelState) -> None:
        while self._next is not None and self._next.ledger.sequence < number:
            _compare(before, self._next)
            self.snapshots += 1
            self._next = next(self._snapshots, None)


def _compare(made: ModelState, snapshot: Snapshot) -> None:
    kept = snapshot.state
    pairs = [
        ("version", made.version, kept.version),
        ("parameters", made.parameters.tobytes(), kept.parameters.tobytes()),
        ("buffer", made.buffer.total.tobytes(), kept.buffer.total.tobytes()),
        ("buffer's divisor", made.buffer.divisor, kept.buffer.divisor),
        ("buffer's count", made.buffer.count, kept.buffer.count),
        ("rules", made.rules, kept.rules),
        ("server optimizer", made.optimizer.names, kept.optimizer.names),
        (
            "server optimizer's state",
            [vector.tobytes() for vector in made.optimizer.vectors],
            [vector.tobytes() for vector in kept.optimizer.vectors],
        ),
    ]
    for what, replayed, stored in pairs:
        if replayed != stored:
            raise ReplayMismatch(
                f"replay gives another {what} after record {snapshot.ledger.sequence} than its snapshot has"
            )


def _published(journal: History) -> dict[ModelVersion, bytes]:
    """Fingerprints as aggregated of every version that the kept records say was offered."""
    found = {row.version: row.exact or row.fingerprint for row in journal.published()}
    for _, record in journal.records_after(journal.oldest - 1):
        if isinstance(record, VersionPublished):
            row = record.published
            found[row.version] = row.exact or row.fingerprint
    return found


@dataclass(frozen=True)
class Numbered:
    """An entry and the model version after it."""

    number: int
    entry: UpdateEntry | FlushEntry | RulesEntry | ResetEntry
    version: ModelVersion


def numbered(journal: History) -> Iterator[Numbered]:
    """All kept entries, each with the version after it, which needs no decoding.

    Raises:
        JournalDamaged: the journal cannot be read.
    """
    version, count, goal = ModelVersion(0), 0, 1
    oldest = next(journal.snapshots(oldest_first=True), None) if journal.oldest > 1 else None
    if oldest is not None:
        version, count = oldest.state.version, oldest.state.buffer.count
        goal = oldest.state.rules.aggregator.goal
    for number, entry in journal.entries_after(journal.oldest - 1):
        match entry:
            case UpdateEntry():
                count += 1
                closes = count >= goal
            case FlushEntry():
                closes = count > 0
            case RulesEntry():
                closes, goal = count > 0, entry.rules.aggregator.goal
            case ResetEntry():
                closes, version, count = False, entry.version, 0
        if closes:
            version, count = ModelVersion(version + 1), 0
        yield Numbered(number, entry, version)
