"""Repairing a damaged journal: as little as can be is lost, nothing is deleted, and everything is told.

In this order:

1. A record or a header with a single wrong bit is put right. Nothing is lost.
2. Where the state can still be made, from a snapshot after the damage or around it, what is damaged and older
   is set aside. Only history is lost.
3. Else the state is that after the last whole batch before the damage, under a version above every one that
   devices were ever offered. What came later is set aside, and its updates are listed.
"""

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec

from coordinator.entries import FlushEntry, ResetEntry
from coordinator.journal import Damage, History, Journal, JournalDamaged, Record, files, storing
from coordinator.journal.check import verify
from coordinator.journal.correction import corrected_header, corrected_record
from coordinator.journal.facts import EpochClaimed
from coordinator.journal.format import HEADER_BYTES
from coordinator.journal.scan import SegmentScan, read_header
from coordinator.lost_records import LostRecords, LostUpdate
from coordinator.model_state import close_buffer, reset_state
from coordinator.model_store import ModelStore
from coordinator.recovery import UNFINISHED, current_state, lock_directory, unfinished_repair
from fedtide.wire.disk import OS_DISK, Disk, Log, write_durably
from fedtide.wire.ids import Epoch, ModelVersion
from fedtide.wire.parameters import Schema, to_bytes

_COPY_BYTES: Final = 4 << 20
_LOST: Final = "lost-updates.jsonl"


@dataclass
class Repair:
    """What was done.

    Attributes:
        damages: that were found.
        corrected: places of which a single bit was put right.
        set_aside: files that were moved, as they are now; a damaged one whose good part stays is a copy.
        directory: where they are; None: nothing was moved.
        history_from: the oldest record that is still there.
        lost: updates whose records were lost or set aside, as far as they can still be read.
        unreadable: how many records of the last part could not be read; they may have been updates too.
        version: the new model version, where entries were lost; None: the model is as it was.
    """

    damages: list[Damage]
    corrected: list[Damage] = field(default_factory=list)
    set_aside: list[Path] = field(default_factory=list)
    directory: Path | None = None
    history_from: int = 1
    lost: list[LostUpdate] = field(default_factory=list)
    unreadable: int = 0
    version: ModelVersion | None = None


def repair(directory: Path, disk: Disk = OS_DISK, say: Callable[[str], None] = lambda _text: None) -> Repair:
    """Repair the journal of a fleet's state directory. Afterwards it verifies.

    Args:
        directory: with ``journal/`` and ``models/`` in it.
        disk: where that is.
        say: told each step.

    Raises:
        AlreadyRunning: a coordinator is running there.
        JournalDamaged: nothing is left to begin from.
        StorageFailed: the disk is full or failed.
    """
    with contextlib.ExitStack() as leaving:
        leaving.callback(os.close, lock_directory(directory))
        leaving.enter_context(storing(directory, "repairing the journal"))
        return _Repairing(directory, disk, say).run()


class _Repairing:
    """One repair."""

    def __init__(self, directory: Path, disk: Disk, say: Callable[[str], None]) -> None:
        self._state = directory
        self._journal = directory / "journal"
        self._disk = disk
        self._say = say
        self._done = Repair([])

    def run(self) -> Repair:
        found = verify(self._journal, self._disk)
        self._done.damages = list(found.damages)
        damages = found.damages
        if unfinished_repair(self._state, self._disk) is not None:
            self._begin_again()
            damages = []
        while damages and self._corrected(damages):
            damages = verify(self._journal, self._disk).damages
        if damages:
            self._set_aside(damages)
        left = files.segments(self._disk, self._journal)
        self._done.history_from = left[0] if left else 1
        return self._done

    def _corrected(self, damages: list[Damage]) -> bool:
        """Put one bit right, if one can be; whether one was."""
        for damage in damages:
            content = self._correction(damage)
            if content is None:
                continue
            self._say(f"{damage.file}, byte {damage.offset}: one bit was wrong and is put right")
            self._move(damage.file, keep=True)
            self._overwrite(damage.file, damage.offset, content)
            self._done.corrected.append(damage)
            return True
        return False

    def _correction(self, damage: Damage) -> bytes | None:
        if damage.file.suffix != ".segment":
            return None
        if damage.offset == 0 and damage.sequence is None:
            return corrected_header(self._disk.read(damage.file, 0, HEADER_BYTES))
        if damage.offset == 0:
            return None  # the segment is missing
        first = int(damage.file.stem)
        header = read_header(self._disk, damage.file, first)
        scan = SegmentScan(self._disk, damage.file, header)
        sequence, chain = self._before(scan, damage.offset)
        if sequence is None:
            return None
        content = self._disk.read(damage.file, damage.offset, 2 * _COPY_BYTES)
        return corrected_record(content, salt=header.salt, sequence=sequence + 1, chain=chain)

    @staticmethod
    def _before(scan: SegmentScan, offset: int) -> tuple[int | None, int]:
        """Number and checksum of the record before ``offset``, where nothing before it is damaged."""
        for _ in scan.batches():
            pass
        if scan.stop is None or scan.stop.offset != offset:
            return None, 0
        return scan.reached

    def _set_aside(self, damages: list[Damage]) -> None:
        end = files.end_file(self._journal)
        newest = max((int(damage.file.stem) for damage in damages if damage.file != end), default=0)
        try:
            # Before ``end`` goes: without it, a segment that lost its last batches would pass for whole.
            history = History(self._journal, self._disk)
        except JournalDamaged:
            self._begin_again()
            return
        self._move(end)  # the next start writes it anew
        if newest == 0:
            return
        if all(snapshot.ledger.sequence < newest for snapshot in history.snapshots()):
            self._say("no snapshot after the damage is whole: a new one is made")
            self._new_snapshot()
        for first in [each for each in files.segments(self._disk, self._journal) if each <= newest]:
            self._say(f"records {first} and later, up to the next segment, are set aside: history only")
            self._move(files.segment_file(self._journal, first))
            self._move(files.snapshot_file(self._journal, first))

    def _new_snapshot(self) -> None:
        with contextlib.closing(Journal(self._journal, self._disk)) as journal:
            _, state = current_state(journal, self._models(journal))
            if journal.ledger.sequence + 1 == files.segments(self._disk, self._journal)[-1]:
                journal.next_epoch()  # the last segment is empty: a new one needs a record before it
            journal.snapshot(state)

    def _begin_again(self) -> None:
        """Go on from the last whole batch before the damage."""
        lost = LostRecords(self._journal, self._disk)
        self._done.lost, self._done.unreadable = lost.updates, lost.unreadable
        offered = max(lost.highest, unfinished_repair(self._state, self._disk) or ModelVersion(0))
        lines = b"".join(msgspec.json.encode(update) + b"\n" for update in lost.updates)
        self._disk.write(self._directory() / _LOST, lines)
        # From here on the journal may look whole and not be: no coordinator starts before this is done.
        write_durably(self._disk, self._state / UNFINISHED, b"%d" % offered)
        self._take_out(lost)
        self._reset(offered, lost)
        self._disk.remove(self._state / UNFINISHED)
        self._disk.sync_directory(self._state)

    def _take_out(self, lost: LostRecords) -> None:
        stray = set(files.snapshots(self._disk, self._journal))
        stray -= set(files.segments(self._disk, self._journal))
        for first in [*sorted(stray), *reversed(lost.later)]:
            self._move(files.segment_file(self._journal, first))
            self._move(files.snapshot_file(self._journal, first))
        if lost.cut is not None and lost.cut[1] < self._disk.size(lost.cut[0]):
            file, whole = lost.cut
            self._say(f"{file} is cut off after byte {whole}")
            self._move(file, keep=True)
            self._copy(file, file, whole)
        self._move(files.end_file(self._journal))

    def _reset(self, offered: ModelVersion, lost: LostRecords) -> None:
        with contextlib.closing(Journal(self._journal, self._disk)) as journal:
            _, state = current_state(journal, self._models(journal))
            ledger = journal.ledger
            if ledger.plan is None or ledger.schema is None:
                raise JournalDamaged(
                    "no record says which plan this journal is of; begin a new fleet directory"
                )
            records: list[Record] = [FlushEntry()] if state.buffer.count else []
            state = close_buffer(state)
            highest = max(ledger.highest, self._models(journal).newest(), offered, state.version)
            version = ModelVersion(highest + 1)
            why = f"records after {ledger.sequence} were damaged"
            parameters = to_bytes(state.parameters)
            # Runs whose claims were lost had epochs that the broker and the devices remember.
            records.append(EpochClaimed(Epoch(max(ledger.epoch, lost.epoch) + lost.unreadable)))
            journal.add(*records, ResetEntry(ledger.plan, ledger.schema, version, parameters, why))
            journal.snapshot(reset_state(state, version, state.parameters))
        self._done.version = version
        self._say(f"the model goes on as version {version}")

    def _models(self, journal: History) -> ModelStore:
        schema = journal.ledger.schema or Schema(tensors=())
        return ModelStore(self._state / "models", schema, 1, self._disk)

    def _directory(self) -> Path:
        """Where this repair's files go."""
        if self._done.directory is None:
            above = self._state / "set-aside"
            taken = [int(name) for name in self._disk.names(above) if name.isdigit()]
            self._done.directory = above / f"{max(taken, default=0) + 1:04d}"
            self._disk.make_directory(self._done.directory)
        return self._done.directory

    def _move(self, file: Path, *, keep: bool = False) -> None:
        """Set a file aside; with ``keep`` it also stays. One that is not there is fine."""
        target = self._directory() / file.name
        if target in self._done.set_aside and not keep:
            target = target.with_name(target.name + ".later")  # as it was after a bit of it was put right
        try:
            self._disk.size(file)
        except FileNotFoundError:
            return
        if target not in self._done.set_aside:
            self._copy(file, target, self._disk.size(file))
            self._done.set_aside.append(target)
        if not keep:
            self._disk.remove(file)
            self._disk.sync_directory(file.parent)

    def _overwrite(self, file: Path, offset: int, content: bytes) -> None:
        """Put ``content`` at ``offset`` of a file, in one step."""
        new = file.with_name(file.name + ".new")
        self._disk.remove(new)
        size, after = self._disk.size(file), offset + len(content)
        with contextlib.closing(self._disk.open_log(new)) as log:
            self._append(log, file, 0, offset)
            log.append(content)
            self._append(log, file, after, size - after)
            log.sync()
        self._disk.replace(new, file)
        self._disk.sync_directory(file.parent)

    def _copy(self, source: Path, target: Path, length: int) -> None:
        new = target.with_name(target.name + ".new")
        self._disk.remove(new)
        with contextlib.closing(self._disk.open_log(new)) as log:
            self._append(log, source, 0, length)
            log.sync()
        self._disk.replace(new, target)
        self._disk.sync_directory(target.parent)

    def _append(self, log: Log, source: Path, start: int, length: int) -> None:
        for place in range(start, start + length, _COPY_BYTES):
            log.append(self._disk.read(source, place, min(_COPY_BYTES, start + length - place)))
