"""Verifying a journal: every byte of every file, beside a running coordinator too. Nothing is changed."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from coordinator.journal import files
from coordinator.journal.errors import Damage, JournalDamaged
from coordinator.journal.facts import is_entry
from coordinator.journal.format import HEAD_BYTES, End, SegmentHeader, damaged_ends
from coordinator.journal.history import missing_segment, read_snapshot
from coordinator.journal.ledger import Ledger
from coordinator.journal.scan import SegmentScan, Window, decoded, read_header
from fedtide.wire.disk import OS_DISK, Disk

Progress = Callable[[int, int], None]
"""Told how many bytes of how many have been looked at."""


@dataclass(frozen=True)
class CheckedSegment:
    """What was found in one segment.

    Attributes:
        first: number of its first record.
        last: number of the last record that is whole and in its place.
        size: bytes of the segment's file.
        snapshot_bytes: of the snapshot it begins with; None: it begins with none, or that is damaged.
        damages: in the order of the file; the snapshot's first.
    """

    first: int
    last: int
    size: int
    snapshot_bytes: int | None
    damages: tuple[Damage, ...]


@dataclass
class Verification:
    """What was found in a journal.

    Attributes:
        segments: oldest first.
        damages: all of them, in order.
        torn_bytes: at the end of the last segment: what a power cut, or a coordinator that is writing just
            now, left unfinished. The next start cuts it off.
        entries: how many there are.
        ledger: the sum of all records that could be added up without a gap; None: of none.
    """

    segments: list[CheckedSegment] = field(default_factory=list)
    damages: list[Damage] = field(default_factory=list)
    torn_bytes: int = 0
    entries: int = 0
    ledger: Ledger | None = None


def verify(
    directory: Path, disk: Disk = OS_DISK, progress: Progress = lambda _done, _all: None
) -> Verification:
    """Look at every segment, every snapshot and ``end``.

    Each snapshot's ledger is compared with what the records before it add up to.
    """
    return _Check(directory, disk, progress).run()


class _Check:
    """One verification."""

    def __init__(self, directory: Path, disk: Disk, progress: Progress) -> None:
        self._directory = directory
        self._disk = disk
        self._progress = progress
        self._found = Verification()
        self._ledger: Ledger | None = None
        self._chain: int | None = None
        """Checksum of the record before the next segment; None after a gap."""

    def run(self) -> Verification:
        ends = self._ends()
        firsts = files.segments(self._disk, self._directory)
        missing = missing_segment(self._directory, firsts, ends)
        if missing is not None:
            self._found.damages.append(missing)
        sizes = {first: self._bytes_of(files.segment_file(self._directory, first)) for first in firsts}
        done = 0
        for first in firsts:
            self._progress(done, sum(sizes.values()))
            try:
                self._segment(first, ends if first == firsts[-1] else None, is_last=first == firsts[-1])
            except FileNotFoundError:
                # A running coordinator removed the oldest; what comes after stands on its own.
                self._ledger = self._chain = None
            except OSError as error:
                self._unreadable(first, error)
            done += sizes[first]
        self._progress(done, done)
        self._found.ledger = self._ledger
        return self._found

    def _segment(self, first: int, end: End | None, *, is_last: bool) -> None:
        path = files.segment_file(self._directory, first)
        size, damages = self._disk.size(path), list[Damage]()
        try:
            header = read_header(self._disk, path, first)
        except JournalDamaged as error:
            self._note(CheckedSegment(first, first - 1, size, None, _one(error)))
            self._ledger = self._chain = None
            return
        damages += self._continuation(path, header)
        snapshot_bytes, wrong = self._snapshot(header)
        damages += wrong
        if self._ledger is None and header.snapshot is None and first == 1:
            self._ledger = Ledger()
        scan = SegmentScan(self._disk, path, header)
        try:
            for batch in scan.batches():
                for stored in batch:
                    self._found.entries += is_entry(stored.head.kind)
                    record = decoded(path, stored)
                    if self._ledger is not None:
                        self._ledger.fold(record)
        except JournalDamaged as error:
            damages += _one(error)
        self._chain = scan.chain
        if is_last and self._is_torn(scan, header, end):
            self._found.torn_bytes = max(0, size - scan.whole)
        elif scan.stop is not None or (is_last and _short(scan, header, end)):
            where = scan.stop or Damage(
                path, scan.whole, scan.sequence + 1, "the segment ends before its end"
            )
            damages += [where, *self._further(path, header, where.offset)]
            self._ledger = self._chain = None
        self._note(CheckedSegment(first, scan.sequence, size, snapshot_bytes, tuple(damages)))

    def _unreadable(self, first: int, error: OSError) -> None:
        path = files.segment_file(self._directory, first)
        what = f"it or its snapshot cannot be read: {error.strerror}"
        self._note(CheckedSegment(first, first - 1, 0, None, (Damage(path, 0, None, what),)))
        self._ledger = self._chain = None

    def _note(self, segment: CheckedSegment) -> None:
        self._found.segments.append(segment)
        self._found.damages += segment.damages

    def _continuation(self, path: Path, header: SegmentHeader) -> Iterator[Damage]:
        """Whether a segment goes on where the one before ends."""
        if not self._found.segments or self._chain is None:
            return
        expected = self._found.segments[-1].last + 1
        if header.first != expected:
            self._ledger = None
            yield Damage(path, 0, expected, f"records {expected} to {header.first - 1} are missing")
        elif header.chain != self._chain:
            yield Damage(path, 0, None, "the segment does not continue the one before")

    def _snapshot(self, header: SegmentHeader) -> tuple[int | None, list[Damage]]:
        if header.snapshot is None:
            return None, []
        path = files.snapshot_file(self._directory, header.first)
        try:
            snapshot = read_snapshot(self._disk, path, header)
        except JournalDamaged as error:
            return None, list(_one(error))
        size = self._disk.size(path)
        # Facts and entries are numbered together, so a ledger of the right place is of exactly these records.
        if self._ledger is not None and self._ledger.to_bytes() != snapshot.ledger.to_bytes():
            what = "its totals, marks or versions are not what the records before it add up to"
            return size, [Damage(path, 0, header.first - 1, what)]
        self._ledger = snapshot.ledger
        return size, []

    def _is_torn(self, scan: SegmentScan, header: SegmentHeader, end: End | None) -> bool:
        if _short(scan, header, end):
            return False
        return scan.stop is None or not scan.goes_on_after(scan.stop.offset)

    def _further(self, path: Path, header: SegmentHeader, offset: int) -> Iterator[Damage]:
        """More damage after the first, as far as heads still say where records are."""
        window = Window(self._disk, path)
        head = window.head(offset, header.salt)
        place = window.next_head(offset + HEAD_BYTES + head.length if head else offset + 1, header.salt)
        while place is not None:
            head = window.head(place, header.salt)
            assert head is not None, "a head was found there"
            if window.body(place, head) is None:
                yield Damage(path, place, head.sequence, "the body does not have its checksum")
            place = window.next_head(place + HEAD_BYTES + head.length, header.salt)

    def _ends(self) -> End | None:
        path = files.end_file(self._directory)
        with contextlib.suppress(FileNotFoundError):
            content = self._disk.read(path)
            self._found.damages += [
                Damage(path, place, None, "a note of the journal's end does not have its checksum")
                for place in damaged_ends(content)
            ]
            return End.last_in(content)
        return None

    def _bytes_of(self, path: Path) -> int:
        try:
            return self._disk.size(path)
        except FileNotFoundError:
            return 0


def _short(scan: SegmentScan, header: SegmentHeader, end: End | None) -> bool:
    """Whether less is whole than was synced."""
    return end is not None and end.first == header.first and scan.whole < end.length


def _one(error: JournalDamaged) -> tuple[Damage, ...]:
    return (error.damage,) if error.damage else ()
