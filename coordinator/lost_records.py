"""What a damaged journal still says of records after the damage. Reading changes nothing."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import msgspec

from coordinator.entries import ResetEntry, UpdateEntry
from coordinator.journal import JournalDamaged, files
from coordinator.journal.facts import EpochClaimed, VersionPublished, from_body
from coordinator.journal.format import HEADER_BYTES, SegmentHeader
from coordinator.journal.history import read_snapshot
from coordinator.journal.scan import SegmentScan, Stored, read_header, survivors
from fedtide.wire.disk import Disk
from fedtide.wire.ids import Counter, DeviceId, Epoch, ModelVersion


class LostUpdate(msgspec.Struct, frozen=True):
    """An update that had a receipt and counts no more."""

    device: DeviceId
    counter: Counter
    sequence: int


class LostRecords:
    """What comes after the last batch that the state can be made from.

    Attributes:
        cut: the segment in which that batch ends, and the offset after it; None: a segment ends with it.
        later: the segments after that one.
        updates: that were recorded later, as far as they can be read.
        unreadable: how many other records there were later, at least.
        highest: the highest version that what is later says was offered.
        epoch: the highest that what is later says a run of the coordinator claimed; 0 where it says none.
    """

    def __init__(self, directory: Path, disk: Disk) -> None:
        self._directory = directory
        self._disk = disk
        self.cut: tuple[Path, int] | None = None
        self.later: list[int] = []
        self.updates: list[LostUpdate] = []
        self.highest = ModelVersion(0)
        self.epoch = Epoch(0)
        last = self._find()
        seen = last
        readable = 0
        places = [(self.cut[0], self.cut[1])] if self.cut else []
        places += [(files.segment_file(directory, first), HEADER_BYTES) for first in self.later]
        for path, offset in places:
            for stored in self._survivors(path, offset):
                seen = max(seen, stored.sequence)
                readable += 1
                self._note(stored)
        self.unreadable = seen - last - readable

    def _find(self) -> int:
        """Find where the damage begins; the number of the last record before it."""
        firsts = files.segments(self._disk, self._directory)
        begin = self._newest_start(firsts)
        position, chain = firsts[begin], None
        for index in range(begin, len(firsts)):
            first = firsts[index]
            path = files.segment_file(self._directory, first)
            self.later = firsts[index:]
            try:
                header = read_header(self._disk, path, first)
            except JournalDamaged:
                return position - 1
            if first != position or chain not in (None, header.chain):
                return position - 1
            scan = SegmentScan(self._disk, path, header)
            for _ in scan.batches():
                pass
            position, chain = scan.sequence + 1, scan.chain
            if scan.stop is not None or index == len(firsts) - 1:
                self.cut, self.later = (path, scan.whole), firsts[index + 1 :]
                return scan.sequence
        return position - 1

    def _newest_start(self, firsts: list[int]) -> int:
        for index in reversed(range(len(firsts))):
            with contextlib.suppress(JournalDamaged):
                header = read_header(
                    self._disk, files.segment_file(self._directory, firsts[index]), firsts[index]
                )
                if header.snapshot is None and firsts[index] == 1:
                    return index
                if header.snapshot is not None:
                    read_snapshot(self._disk, files.snapshot_file(self._directory, firsts[index]), header)
                    return index
        raise JournalDamaged(
            f"{self._directory}: no snapshot is whole and the first records are gone or damaged, so there is "
            "no state to begin from; restore the directory from a copy, or begin a new fleet directory"
        )

    def _survivors(self, path: Path, offset: int) -> Iterator[Stored]:
        with contextlib.suppress(JournalDamaged):
            header = read_header(self._disk, path, int(path.stem))
            self.highest = max(self.highest, self._offered_before(header))
            yield from survivors(self._disk, path, header.salt, offset)

    def _offered_before(self, header: SegmentHeader) -> ModelVersion:
        path = files.snapshot_file(self._directory, header.first)
        with contextlib.suppress(JournalDamaged):
            if header.snapshot is not None:
                ledger = read_snapshot(self._disk, path, header).ledger
                self.epoch = max(self.epoch, ledger.epoch)
                return ledger.highest
        return ModelVersion(0)

    def _note(self, stored: Stored) -> None:
        with contextlib.suppress(ValueError):
            match from_body(stored.head.kind, stored.body):
                case UpdateEntry(device=device, counter=counter):
                    self.updates.append(LostUpdate(device, counter, stored.sequence))
                case EpochClaimed(epoch=epoch):
                    self.epoch = max(self.epoch, epoch)
                case VersionPublished(published=published):
                    self.highest = max(self.highest, published.version)
                case ResetEntry(version=version):
                    self.highest = max(self.highest, version)
