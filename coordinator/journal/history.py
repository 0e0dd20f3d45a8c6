"""The journal as its files tell it. Reading changes nothing, so it may go on beside a running coordinator."""

import contextlib
import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from coordinator.entries import Entry, RulesEntry, UpdateEntry
from coordinator.journal import files
from coordinator.journal.errors import Damage, JournalDamaged
from coordinator.journal.facts import Published, Record, is_entry
from coordinator.journal.format import End, SegmentHeader
from coordinator.journal.ledger import Ledger
from coordinator.journal.scan import SegmentScan, Stored, decoded, read_header
from coordinator.journal.snapshot import Snapshot
from coordinator.marks import Mark
from fedtide.wire.disk import OS_DISK, Disk
from fedtide.wire.ids import DeviceId, ModelVersion

log = logging.getLogger(__name__)

_TRIES: Final = 5


@dataclass(frozen=True)
class Tail:
    """Where the last segment ends.

    Attributes:
        header: the segment's.
        whole: bytes up to the last whole batch.
        size: bytes of the file: what is beyond ``whole`` was torn.
        synced: bytes of which it is certain that they were synced.
        chain: checksum of the last record.
        entries: how many entries the segment has.
    """

    header: SegmentHeader
    whole: int
    size: int
    synced: int
    chain: int
    entries: int


class History:
    """What a journal's files say.

    Args:
        directory: the journal's.
        disk: where it is.

    Attributes:
        ledger: the sum of all records.
        tail: of the last segment; None where there is no segment.

    Raises:
        JournalDamaged: what is needed for the state cannot be trusted; the text says where.
    """

    def __init__(self, directory: Path, disk: Disk = OS_DISK) -> None:
        self._directory = directory
        self._disk = disk
        self._segments: list[int] = []
        self.ledger = Ledger()
        self.tail: Tail | None = None
        for tries_left in reversed(range(_TRIES)):
            try:
                self._read()
            except FileNotFoundError:
                # A running coordinator removed an old segment meanwhile.
                if tries_left == 0:
                    raise
            else:
                return

    def entries_after(self, sequence: int) -> Iterator[tuple[int, Entry]]:
        """Entries in order, each with its number.

        Raises:
            JournalDamaged: a record cannot be read.
            FileNotFoundError: some of them are no longer kept.
        """
        for number, record in self.records_after(sequence):
            if isinstance(record, Entry):
                yield number, record

    def records_after(self, sequence: int) -> Iterator[tuple[int, Record]]:
        """Entries and facts in order, each with its number. Raises as :meth:`entries_after`."""
        for path, stored in self.stored_after(sequence):
            yield stored.sequence, decoded(path, stored)

    def stored_after(self, sequence: int) -> Iterator[tuple[Path, Stored]]:
        """The records in order as they stand in their segments. Raises as :meth:`entries_after`."""
        if self._segments and self._segments[0] > sequence + 1:
            raise FileNotFoundError(
                f"records before {self._segments[0]} are no longer kept; record {sequence + 1} was asked for"
            )
        for index, first in enumerate(self._segments):
            last_segment = index == len(self._segments) - 1
            if not last_segment and self._segments[index + 1] <= sequence + 1:
                continue
            path = files.segment_file(self._directory, first)
            limit = self._last_bytes() if last_segment else None
            scan = SegmentScan(self._disk, path, read_header(self._disk, path, first), limit)
            for batch in scan.batches():
                yield from ((path, stored) for stored in batch if stored.sequence > sequence)
            if scan.stop is not None:
                raise JournalDamaged(scan.stop)

    def last_uses(self, sequence: int, *, needed: bool) -> dict[ModelVersion, int]:
        """Base versions that a replay of the entries after ``sequence`` needs, with the last entry of each.

        ``needed``: whether the rules that hold at ``sequence`` need bases.
        """
        if not needed and self.ledger.rules_sequence <= sequence:
            return {}
        uses: dict[ModelVersion, int] = {}
        for number, entry in self.entries_after(sequence):
            if isinstance(entry, RulesEntry):
                needed = entry.rules.aggregator.needs_base
            elif needed and isinstance(entry, UpdateEntry):
                uses[entry.base_version] = number
        return uses

    def snapshots(self, *, oldest_first: bool = False) -> Iterator[Snapshot]:
        """The snapshots that are whole, newest first unless asked for otherwise."""
        for first in list(self._segments if oldest_first else reversed(self._segments)):
            with contextlib.suppress(JournalDamaged):
                path = files.segment_file(self._directory, first)
                snapshot = self._snapshot(read_header(self._disk, path, first))
                if snapshot is not None:
                    yield snapshot

    @property
    def oldest(self) -> int:
        """Number of the first record that is kept."""
        return self._segments[0] if self._segments else 1

    def last_sequence(self) -> int:
        """Number of the last record; 0 when there is none."""
        return self.ledger.sequence

    def marks(self) -> dict[DeviceId, Mark]:
        """All marks by device; a dictionary of the caller's own."""
        return dict(self.ledger.marks)

    def totals(self) -> dict[str, int]:
        """How many updates had which fate, by name."""
        return dict(self.ledger.totals)

    def published(self) -> list[Published]:
        """Versions that were offered since the last reset and are kept, oldest first."""
        return [self.ledger.published[version] for version in sorted(self.ledger.published)]

    def _last_bytes(self) -> int:
        """Bytes of the last segment that hold whole batches."""
        return self.tail.whole if self.tail else 0

    def _read(self) -> None:
        # In this order: what ``end`` says is durable is in the segments that are listed after it.
        end = self._end()
        self._segments = files.segments(self._disk, self._directory)
        missing = missing_segment(self._directory, self._segments, end)
        if missing is not None:
            raise JournalDamaged(missing)
        if not self._segments:
            return
        start = self._start()
        position = self.ledger.sequence + 1
        chain: int | None = None
        for first in self._segments[start:]:
            path = files.segment_file(self._directory, first)
            header = read_header(self._disk, path, first)
            if first != position:
                what = f"the records from {position} on are missing: no segment begins with record {position}"
                raise JournalDamaged(Damage(path, 0, position, what))
            if chain is not None and header.chain != chain:
                raise JournalDamaged(Damage(path, 0, None, "the segment does not continue the one before"))
            scan, entries = self._fold(path, header)
            position, chain = scan.sequence + 1, scan.chain
            if first == self._segments[-1]:
                self._end_at(path, header, scan, end, entries)
            elif scan.stop is not None:
                raise JournalDamaged(scan.stop)

    def _fold(self, path: Path, header: SegmentHeader) -> tuple[SegmentScan, int]:
        scan, entries = SegmentScan(self._disk, path, header), 0
        for batch in scan.batches():
            for stored in batch:
                self.ledger.fold(decoded(path, stored))
                entries += is_entry(stored.head.kind)
        return scan, entries

    def _end_at(
        self, path: Path, header: SegmentHeader, scan: SegmentScan, end: End | None, entries: int
    ) -> None:
        """Tell what a power cut tore from what was durable and is damaged."""
        synced = end.length if end is not None and end.first == header.first else 0
        if scan.whole < synced:
            missing = Damage(path, scan.whole, scan.sequence + 1, f"the segment ends here, of {synced} bytes")
            raise JournalDamaged(scan.stop or missing)
        if scan.stop is not None and scan.goes_on_after(scan.stop.offset):
            raise JournalDamaged(scan.stop)
        self.tail = Tail(header, scan.whole, self._disk.size(path), synced, scan.chain, entries)

    def _start(self) -> int:
        """Take the ledger of the newest whole snapshot; the place of its segment in the list."""
        damaged: JournalDamaged | None = None
        for index in reversed(range(len(self._segments))):
            first = self._segments[index]
            header = read_header(self._disk, files.segment_file(self._directory, first), first)
            try:
                snapshot = self._snapshot(header)
            except JournalDamaged as error:
                log.warning("%s", error, extra={"event": "journal.snapshot_damaged"})
                damaged = error
                continue
            if snapshot is not None:
                self.ledger = snapshot.ledger
                return index
            if first == 1:
                self.ledger = Ledger()
                return index
        gone = Damage(
            files.segment_file(self._directory, 1), 0, 1, "the segment is gone, without a snapshot instead"
        )
        raise damaged or JournalDamaged(gone)

    def _snapshot(self, header: SegmentHeader) -> Snapshot | None:
        """The snapshot a segment begins with; None where it begins with none."""
        if header.snapshot is None:
            return None
        return read_snapshot(self._disk, files.snapshot_file(self._directory, header.first), header)

    def _end(self) -> End | None:
        try:
            return End.last_in(self._disk.read(files.end_file(self._directory)))
        except FileNotFoundError:
            return None


def missing_segment(directory: Path, segments: Sequence[int], end: End | None) -> Damage | None:
    """The damage where the segment that ``end`` speaks of is not listed; ``end`` was read before."""
    if end is None or (segments and end.first <= segments[-1]):
        return None
    what = f"the segment is missing; {end.length} bytes of it were synced"
    return Damage(files.segment_file(directory, end.first), 0, end.first, what)


def read_snapshot(disk: Disk, path: Path, header: SegmentHeader) -> Snapshot:
    """The snapshot that a segment begins with.

    Raises:
        JournalDamaged: it is missing or not as it was written.
    """
    try:
        content = disk.read(path)
    except FileNotFoundError:
        raise JournalDamaged(Damage(path, 0, header.first - 1, "the snapshot is missing")) from None
    if hashlib.sha256(content).digest() != header.snapshot:
        what = "the snapshot does not have the SHA-256 that its segment names"
        raise JournalDamaged(Damage(path, 0, header.first - 1, what))
    try:
        return Snapshot.from_bytes(content)
    except ValueError as error:
        raise JournalDamaged(Damage(path, 0, header.first - 1, str(error))) from error
