"""The journal: SQLite in WAL mode with synchronous FULL. What is committed here happened; nothing else did.

Tables
    entries     what changed the model, in order (``entries.Entry``)
    marks       per device: its highest counter with the verdict it got, and its contribution so far
    totals      how many updates were applied, duplicate, or rejected by reason
    published   the versions devices were offered, with their fingerprints
    evaluations held-out results
    snapshots   files that hold the state after an entry
    meta        epoch and identity

One thread at a time uses a journal; the service gives it a thread of its own, so that a commit's fsync does
not stop the event loop.
"""

import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec

from coordinator.entries import Entry, FlushEntry, RulesEntry, UpdateEntry
from coordinator.marks import Mark
from coordinator.settings import Rules
from fedtide.wire.ids import DeviceId, Epoch, ModelVersion
from fedtide.wire.messages import Reason, Verdict

_FORMAT: Final = 2
# Pages of 32 KiB: an envelope is a blob over few pages, and its checksums and copies cost less.
_PAGE_BYTES: Final = 32_768
_WAL_PAGES: Final = 2_000

_TABLES: Final = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value ANY NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS entries (
    sequence INTEGER PRIMARY KEY, kind TEXT NOT NULL, device TEXT, counter INTEGER, base_version INTEGER,
    staleness_weight REAL, importance REAL, body BLOB) STRICT;
CREATE UNIQUE INDEX IF NOT EXISTS one_entry_per_update ON entries (device, counter) WHERE kind = 'update';
CREATE TABLE IF NOT EXISTS marks (
    device TEXT PRIMARY KEY, counter INTEGER NOT NULL, recent INTEGER NOT NULL,
    verdict TEXT NOT NULL, reason TEXT, detail TEXT NOT NULL,
    applied INTEGER NOT NULL, rejected INTEGER NOT NULL, staleness INTEGER NOT NULL,
    weight REAL NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS totals (name TEXT PRIMARY KEY, count INTEGER NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS published (
    version INTEGER PRIMARY KEY, fingerprint BLOB NOT NULL, moment REAL NOT NULL, exact BLOB) STRICT;
CREATE TABLE IF NOT EXISTS evaluations (
    version INTEGER PRIMARY KEY, loss REAL, metric REAL, moment REAL NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS snapshots (
    sequence INTEGER PRIMARY KEY, version INTEGER NOT NULL, sha256 BLOB NOT NULL) STRICT;
"""


class JournalDamaged(Exception):
    """The journal cannot be used; the text says what is wrong and what would help."""


@dataclass(frozen=True)
class Published:
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


@dataclass(frozen=True)
class EvaluationResult:
    """A held-out result; None where it was not finite; ``moment`` in seconds since 1970."""

    version: ModelVersion
    loss: float | None
    metric: float | None
    moment: float


@dataclass(frozen=True)
class SnapshotRow:
    """A snapshot file: the state after entry ``sequence``."""

    sequence: int
    version: ModelVersion
    sha256: bytes


@dataclass(frozen=True)
class Batch:
    """What one group commit makes durable together.

    Attributes:
        entries: changes of the model, in order.
        marks: the new marks of the devices concerned.
        totals: increments by name.
    """

    entries: Sequence[Entry] = ()
    marks: Sequence[Mark] = ()
    totals: dict[str, int] = field(default_factory=dict)


class Journal:
    """An open journal.

    Args:
        path: the SQLite file; made if it is not there.

    Raises:
        JournalDamaged: not a journal, or one of another format.
    """

    def __init__(self, path: Path) -> None:
        # Autocommit: transactions are written out below, where they begin and end.
        self._database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        try:
            self._database.execute(f"PRAGMA page_size = {_PAGE_BYTES}")
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = FULL")
            self._database.execute(f"PRAGMA wal_autocheckpoint = {_WAL_PAGES}")
            self._database.executescript(_TABLES)
            found = self._meta("format", _FORMAT)
        except sqlite3.DatabaseError as error:
            self._database.close()
            raise JournalDamaged(f"{path} cannot be opened: {error}") from error
        if found != _FORMAT:
            self._database.close()
            raise JournalDamaged(f"{path} has format {found}; this build reads format {_FORMAT}")

    def close(self) -> None:
        """Close the file; everything committed stays."""
        self._database.close()

    def commit(self, batch: Batch) -> None:
        """Make a batch durable: one transaction, one fsync.

        Raises:
            sqlite3.Error: the disk is full or failed. Then nothing of the batch may be acknowledged.
        """
        execute = self._database.execute
        execute("BEGIN IMMEDIATE")
        try:
            for entry in batch.entries:
                execute(
                    "INSERT INTO entries"
                    " (kind, device, counter, base_version, staleness_weight, importance, body)"
                    " VALUES (?, ?, ?, ?, ?, ?, ?)",
                    _entry_row(entry),
                )
            self._database.executemany(
                "INSERT OR REPLACE INTO marks VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                map(_mark_row, batch.marks),
            )
            self._database.executemany(
                "INSERT INTO totals VALUES (?, ?)"
                " ON CONFLICT (name) DO UPDATE SET count = count + excluded.count",
                batch.totals.items(),
            )
            execute("COMMIT")
        except BaseException:
            if self._database.in_transaction:
                execute("ROLLBACK")
            raise

    def next_epoch(self) -> Epoch:
        """Claim and return the next epoch."""
        epoch = self._meta("epoch", 0) + 1
        self._database.execute("UPDATE meta SET value = ? WHERE name = 'epoch'", (epoch,))
        return Epoch(epoch)

    def plan_id(self, plan: str) -> str:
        """The plan this journal belongs to; ``plan`` if it is new."""
        return str(self._meta("plan", plan))

    def last_sequence(self) -> int:
        """Number of the last entry; 0 when there is none."""
        return int(self._database.execute("SELECT coalesce(max(sequence), 0) FROM entries").fetchone()[0])

    def entries_after(self, sequence: int) -> Iterator[tuple[int, Entry]]:
        """Entries in order, each with its number."""
        rows = self._database.execute(
            "SELECT sequence, kind, device, counter, base_version, staleness_weight, importance, body"
            " FROM entries WHERE sequence > ? ORDER BY sequence",
            (sequence,),
        )
        for number, *row in rows:
            yield number, _entry(number, row)

    def last_uses(self, sequence: int, *, needed: bool) -> dict[ModelVersion, int]:
        """Base versions that a replay of the entries after ``sequence`` needs, with the last entry of each.

        ``needed``: whether the rules that hold at ``sequence`` need bases.
        """
        rows = self._database.execute(
            "SELECT sequence, base_version, CASE kind WHEN 'rules' THEN body END FROM entries"
            " WHERE sequence > ? ORDER BY sequence",
            (sequence,),
        )
        uses: dict[ModelVersion, int] = {}
        for number, base_version, rules in rows:
            if rules is not None:
                needed = _rules(number, rules).aggregator.needs_base
            elif needed and base_version is not None:
                uses[base_version] = number
        return uses

    def marks(self) -> dict[DeviceId, Mark]:
        """All marks by device."""
        return {row[0]: _mark(row) for row in self._database.execute("SELECT * FROM marks")}

    def totals(self) -> dict[str, int]:
        """How many updates had which fate, by name."""
        return dict(self._database.execute("SELECT name, count FROM totals"))

    def add_published(self, published: Published, keep: int) -> None:
        """Record that a version is about to be offered, and forget all but the last ``keep``."""
        # Where its file was lost, devices are offered the same version in other parameters.
        self._database.execute(
            "INSERT INTO published VALUES (?, ?, ?, ?) ON CONFLICT (version) DO UPDATE SET"
            " fingerprint = excluded.fingerprint, moment = excluded.moment, exact = excluded.exact"
            " WHERE fingerprint != excluded.fingerprint",
            (published.version, published.fingerprint, published.moment, published.exact),
        )
        self._database.execute(
            "DELETE FROM published WHERE version NOT IN"
            " (SELECT version FROM published ORDER BY version DESC LIMIT ?)",
            (keep,),
        )

    def published(self) -> list[Published]:
        """Versions that were offered and are kept, oldest first."""
        rows = self._database.execute("SELECT * FROM published ORDER BY version")
        return [Published(ModelVersion(row[0]), *row[1:]) for row in rows]

    def add_evaluation(self, result: EvaluationResult) -> None:
        """Record a held-out result."""
        self._database.execute(
            "INSERT OR REPLACE INTO evaluations VALUES (?, ?, ?, ?)",
            (result.version, result.loss, result.metric, result.moment),
        )

    def evaluations(self) -> list[EvaluationResult]:
        """Held-out results, oldest version first."""
        rows = self._database.execute("SELECT * FROM evaluations ORDER BY version")
        return [EvaluationResult(ModelVersion(row[0]), *row[1:]) for row in rows]

    def add_snapshot(self, row: SnapshotRow) -> None:
        """Record a snapshot whose file is durable."""
        self._database.execute(
            "INSERT OR REPLACE INTO snapshots VALUES (?, ?, ?)", (row.sequence, row.version, row.sha256)
        )

    def forget_snapshot(self, sequence: int) -> None:
        """Forget a snapshot whose file is gone."""
        self._database.execute("DELETE FROM snapshots WHERE sequence = ?", (sequence,))

    def snapshots(self) -> list[SnapshotRow]:
        """Snapshots, newest first."""
        rows = self._database.execute("SELECT * FROM snapshots ORDER BY sequence DESC")
        return [SnapshotRow(row[0], ModelVersion(row[1]), row[2]) for row in rows]

    def _meta(self, name: str, default: Any) -> Any:
        self._database.execute("INSERT OR IGNORE INTO meta VALUES (?, ?)", (name, default))
        return self._database.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()[0]


def _entry_row(entry: Entry) -> tuple[object, ...]:
    match entry:
        case UpdateEntry():
            return (
                "update",
                entry.device,
                entry.counter,
                entry.base_version,
                entry.staleness_weight,
                entry.importance,
                entry.envelope,
            )
        case FlushEntry():
            return ("flush", *(None,) * 6)
        case RulesEntry():
            return ("rules", *(None,) * 5, entry.rules.to_bytes())


def _entry(number: int, row: list[Any]) -> Entry:
    kind, device, counter, base_version, staleness_weight, importance, body = row
    match kind:
        case "update":
            return UpdateEntry(device, counter, base_version, staleness_weight, importance, body)
        case "flush":
            return FlushEntry()
        case "rules":
            return RulesEntry(_rules(number, body))
        case _:
            raise JournalDamaged(f"entry {number} has the unknown kind {kind!r}")


def _rules(number: int, body: bytes) -> Rules:
    try:
        return Rules.from_bytes(body)
    except (msgspec.DecodeError, TypeError) as error:
        raise JournalDamaged(f"entry {number} holds no rules: {error}") from error


def _mark_row(mark: Mark) -> tuple[object, ...]:
    return (
        mark.device,
        mark.counter,
        mark.recent,
        mark.verdict.value,
        mark.reason.value if mark.reason else None,
        mark.detail,
        mark.applied,
        mark.rejected,
        mark.staleness,
        mark.weight,
    )


def _mark(row: tuple[Any, ...]) -> Mark:
    device, counter, recent, verdict, reason, *rest = row
    return Mark(device, counter, recent, Verdict(verdict), Reason(reason) if reason else None, *rest)
