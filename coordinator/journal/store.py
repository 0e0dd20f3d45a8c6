"""The journal that is written: what is committed here happened; nothing else did.

A batch is one piece of bytes, appended to the last segment and synced, and only then folded into the ledger.
Where the disk fails, the journal is closed for ever: a sync that failed is not tried again, because the
system may have dropped what it could not write and call the next one a success (Rebello et al., "Can
Applications Recover from fsync Failures?", USENIX ATC 2020). For the same reason what no sync has confirmed
is written again, to a new file, before it counts at the next start.

One thread at a time uses a journal; the service gives it a thread of its own, so that a commit's fsync does
not stop the event loop.
"""

import contextlib
import hashlib
import itertools
import logging
from collections import deque
from pathlib import Path
from typing import Final

from coordinator.entries import Entry
from coordinator.journal import files
from coordinator.journal.errors import StorageFailed, storing
from coordinator.journal.facts import (
    Batch,
    EpochClaimed,
    EvaluationResult,
    Published,
    Record,
    VersionPublished,
    to_body,
)
from coordinator.journal.format import HEADER_BYTES, End, SegmentHeader, encode
from coordinator.journal.history import History
from coordinator.journal.ledger import Ledger
from coordinator.journal.snapshot import Snapshot
from coordinator.model_state import ModelState
from fedtide.wire.disk import OS_DISK, Disk, Log, write_durably
from fedtide.wire.ids import Epoch, ModelVersion, PlanId
from fedtide.wire.steps import Step, reached

log = logging.getLogger(__name__)

KEEP_BYTES: Final = 4 << 30
_COPY_BYTES: Final = 4 << 20
_ENDS: Final = 1000  # in one file ``end``, before it is begun again


class Journal(History):
    """An open journal.

    Args:
        directory: of its files; made if it is not there.
        disk: where that is.
        keep_bytes: the oldest segments go when all take more than this; those of the last two snapshots stay.

    Attributes:
        since_entries: entries since the last snapshot.
        since_bytes: bytes since then.
        since_versions: versions offered since then, in this run.
        snapshot_bytes: how long that was; 0 where there is none.

    Raises:
        JournalDamaged: it cannot be trusted.
        StorageFailed: the disk is full or failed.
    """

    def __init__(self, directory: Path, disk: Disk = OS_DISK, *, keep_bytes: int = KEEP_BYTES) -> None:
        self._keep_bytes = keep_bytes
        self._failed: StorageFailed | None = None
        self._log: Log | None = None
        self._end_log: Log | None = None
        self._ends = 0
        self._path = directory
        self._length = self._chain = self._salt = 0
        self.since_entries = self.since_bytes = self.since_versions = self.snapshot_bytes = 0
        self._oldest_bases: deque[ModelVersion] | None = None
        with storing(directory, "making the journal's directory"):
            disk.make_directory(directory)
        with storing(directory, "opening the journal"):
            super().__init__(directory, disk)
            self._open()

    def close(self) -> None:
        """Close the files; everything committed stays."""
        for opened in (self._log, self._end_log):
            if opened is not None:
                with contextlib.suppress(OSError):
                    opened.close()
        self._log = self._end_log = None

    def commit(self, batch: Batch) -> None:
        """Make a batch durable: one append, one sync.

        Raises:
            StorageFailed: the disk is full or failed. Then nothing of the batch may be acknowledged, and the
                journal takes nothing more.
            JudgedTwice, ValueError: the batch contradicts the ledger; nothing was written.
        """
        if self._failed is not None:
            raise self._failed
        if not batch.records:
            return
        self.ledger.check(batch.records)
        encoded = encode(
            [to_body(record) for record in batch.records],
            sequence=self.ledger.sequence + 1,
            chain=self._chain,
            salt=self._salt,
        )
        # Whatever interrupts this, half of it may be done, and nothing may follow.
        self._failed = StorageFailed(f"{self._path}: a commit was interrupted; start the coordinator again")
        try:
            self._append(encoded.content)
        except StorageFailed as error:
            self._failed = error
            self._cut_off()
            raise
        self._length += len(encoded.content)
        self._chain = encoded.chain
        self.since_bytes += len(encoded.content)
        for record in batch.records:
            self.ledger.fold(record)
            self.since_entries += isinstance(record, Entry)
            self.since_versions += isinstance(record, VersionPublished)
        self._note_end()
        self._failed = None

    def add(self, *records: Record) -> None:
        """Commit a batch of these. Raises as :meth:`commit`."""
        self.commit(Batch(records))

    def next_epoch(self, above: Epoch | None = None) -> Epoch:
        """Claim and return the next epoch, which is higher than ``above``, too."""
        epoch = Epoch(max(self.ledger.epoch, above or 0) + 1)
        self.add(EpochClaimed(epoch))
        return epoch

    def plan_id(self) -> PlanId | None:
        """The plan this journal belongs to; None if it is new."""
        return self.ledger.plan

    def add_published(self, published: Published, keep: int) -> None:
        """Record that a version is about to be offered, and forget all but the last ``keep``."""
        known = self.ledger.published.get(published.version)
        if known is None or known.fingerprint != published.fingerprint:
            self.add(VersionPublished(published, keep))
        reached(Step.VERSION_RECORDED)

    def add_evaluation(self, result: EvaluationResult) -> None:
        """Record a held-out result."""
        self.add(result)

    def evaluations(self) -> list[EvaluationResult]:
        """Held-out results, oldest version first."""
        return [self.ledger.evaluations[version] for version in sorted(self.ledger.evaluations)]

    @property
    def oldest_base(self) -> ModelVersion:
        """The oldest version that an entry after the last snapshot but one may start from.

        A replay begins with one of the last two snapshots, and older ones may be gone: with an aggregator
        that needs bases, the files of all versions from this one on have to stay.
        """
        if self._oldest_bases is None:
            newest = itertools.islice(self.snapshots(), 2)
            self._oldest_bases = deque((_oldest_base(each.ledger) for each in [*newest][::-1]), maxlen=2)
        return min(self._oldest_bases, default=ModelVersion(0))

    def snapshot(self, state: ModelState) -> None:
        """Make the state after the last record durable and begin a new segment with it.

        Raises:
            StorageFailed: the disk is full or failed; the journal takes nothing more.
        """
        if self._failed is not None:
            raise self._failed
        first = self.ledger.sequence + 1
        if first == self._segments[-1]:
            return
        content = Snapshot(state, self.ledger).to_bytes()
        path = files.snapshot_file(self._directory, first)
        try:
            with storing(path, f"writing a snapshot of {len(content)} bytes"):
                write_durably(self._disk, path, content)
                reached(Step.SNAPSHOT_WRITTEN)
                self._begin_segment(SegmentHeader(first, self._chain, hashlib.sha256(content).digest()))
                reached(Step.SNAPSHOT_RECORDED)
                self.snapshot_bytes = len(content)
                if self._oldest_bases is not None:
                    self._oldest_bases.append(_oldest_base(self.ledger))
                self._remove_old()
        except StorageFailed as error:
            self._failed = error
            raise

    def _last_bytes(self) -> int:
        return self._length

    def _append(self, content: bytes) -> None:
        assert self._log is not None, "the journal is closed"
        safe = f"Everything up to record {self.ledger.sequence} is safe"
        path = self._path
        with storing(path, f"appending {len(content)} bytes", safe):
            self._log.append(content)
        reached(Step.BATCH_APPENDED)
        with storing(path, f"syncing {len(content)} bytes", safe):
            self._log.sync()
        reached(Step.BATCH_SYNCED)

    def _cut_off(self) -> None:
        """Take back what nobody knows to be durable; where that fails too, the next start does it."""
        with contextlib.suppress(OSError):
            self._disk.truncate(self._path, self._length)

    def _note_end(self) -> None:
        """Say how much is durable. Not synced: it may be behind after a power cut, but never ahead."""
        path = files.end_file(self._directory)
        try:
            with storing(path, "noting the journal's end"):
                if self._end_log is None or self._ends >= _ENDS:
                    self._begin_ends(path)
                assert self._end_log is not None
                self._end_log.append(End(self._segments[-1], self._length, self._chain).to_bytes())
                self._ends += 1
        except StorageFailed as error:
            self._failed = error
            raise

    def _begin_ends(self, path: Path) -> None:
        if self._end_log is not None:
            self._end_log.close()
        self._disk.remove(path)
        self._end_log, self._ends = self._disk.open_log(path), 0

    def _open(self) -> None:
        for path in files.unfinished(self._disk, self._directory):
            self._disk.remove(path)
        for first in set(files.snapshots(self._disk, self._directory)) - set(self._segments):
            self._disk.remove(files.snapshot_file(self._directory, first))
        tail = self.tail
        if tail is None:
            self._begin_segment(SegmentHeader(1, 0, None))
            return
        self._path = files.segment_file(self._directory, tail.header.first)
        if tail.size > tail.whole:
            log.warning(
                "%s: %d bytes at the end were torn, cut off after record %d",
                self._path, tail.size - tail.whole, self.ledger.sequence, extra={"event": "journal.torn"},
            )  # fmt: skip
        if tail.whole > max(tail.synced, HEADER_BYTES):
            self._write_again(tail.whole)
        elif tail.size > tail.whole:
            self._disk.truncate(self._path, tail.whole)
        self._log = self._disk.open_log(self._path)
        self._length, self._chain, self._salt = tail.whole, tail.chain, tail.header.salt
        self.since_bytes, self.since_entries = tail.whole - HEADER_BYTES, tail.entries
        self._note_end()

    def _write_again(self, length: int) -> None:
        """Copy the last segment to a new file: what was written but never synced need not be on the disk."""
        copy = self._path.with_name(self._path.name + ".new")
        target = self._disk.open_log(copy)
        try:
            for start in range(0, length, _COPY_BYTES):
                target.append(self._disk.read(self._path, start, min(_COPY_BYTES, length - start)))
            target.sync()
        finally:
            target.close()
        self._disk.replace(copy, self._path)
        self._disk.sync_directory(self._directory)

    def _begin_segment(self, header: SegmentHeader) -> None:
        path = files.segment_file(self._directory, header.first)
        write_durably(self._disk, path, header.to_bytes())
        if self._log is not None:
            self._log.close()
        self._log = self._disk.open_log(path)
        self._path, self._length, self._chain, self._salt = path, HEADER_BYTES, header.chain, header.salt
        self.since_entries = self.since_bytes = self.since_versions = 0
        self._segments.append(header.first)
        self._note_end()

    def _remove_old(self) -> None:
        """Remove the oldest segments beyond the bound, but never one of the last two snapshots'."""
        sizes = [self._size_of(first) for first in self._segments]
        while sum(sizes) > self._keep_bytes and len(self._segments) > 2:
            oldest = self._segments[0]
            self._disk.remove(files.segment_file(self._directory, oldest))
            # Durable before its snapshot goes: no segment shall stand without the snapshot it begins with.
            self._disk.sync_directory(self._directory)
            self._disk.remove(files.snapshot_file(self._directory, oldest))
            del self._segments[0], sizes[0]
            reached(Step.SEGMENT_REMOVED)

    def _size_of(self, first: int) -> int:
        size = self._disk.size(files.segment_file(self._directory, first))
        with contextlib.suppress(FileNotFoundError):  # the first segment has no snapshot
            size += self._disk.size(files.snapshot_file(self._directory, first))
        return size


def _oldest_base(ledger: Ledger) -> ModelVersion:
    """The oldest version that updates may start from, or begin to."""
    return min(ledger.published, default=ledger.line_since)
