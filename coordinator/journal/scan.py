"""Reading a segment: whole batches in order, in windows, up to where something is not as written."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from zlib import crc32

from coordinator.journal.errors import Damage, JournalDamaged
from coordinator.journal.facts import Record, from_body
from coordinator.journal.format import HEAD_BYTES, HEADER_BYTES, MARK, Head, SegmentHeader, read_head
from fedtide.wire.disk import Disk

_WINDOW_BYTES: Final = 4 << 20


@dataclass(frozen=True, slots=True)
class Stored:
    """A record as it stands in a segment.

    Attributes:
        head: what is before its body.
        offset: of the head, in bytes.
        body: its content.
    """

    head: Head
    offset: int
    body: bytes

    @property
    def sequence(self) -> int:
        """Its number."""
        return self.head.sequence

    @property
    def end(self) -> int:
        """Offset of what comes after it."""
        return self.offset + HEAD_BYTES + self.head.length


class Window:
    """A part of a file in memory, which moves along.

    Args:
        disk: where the file is.
        path: which.
        limit: reads nothing from here on; None: the file's end.
    """

    def __init__(self, disk: Disk, path: Path, limit: int | None = None) -> None:
        self._disk = disk
        self._path = path
        size = disk.size(path)
        self.size = size if limit is None else min(size, limit)
        self._start = 0
        self._content = b""

    def at(self, offset: int, length: int) -> tuple[bytes, int]:
        """Bytes with at least ``length`` from ``offset`` in them, if there are so many, and where."""
        if offset < self._start or offset + length > self._start + len(self._content):
            wanted = min(max(length, _WINDOW_BYTES), max(0, self.size - offset))
            self._content = self._disk.read(self._path, offset, wanted)
            self._start = offset
        return self._content, offset - self._start

    def head(self, offset: int, salt: int) -> Head | None:
        """The head at ``offset``, if there is one."""
        content, place = self.at(offset, HEAD_BYTES)
        return read_head(content, place, salt)

    def body(self, offset: int, head: Head) -> bytes | None:
        """The body of the record at ``offset``; None where it is not as it was written."""
        if offset + HEAD_BYTES + head.length > self.size:
            return None
        content, place = self.at(offset, HEAD_BYTES + head.length)
        body = content[place + HEAD_BYTES : place + HEAD_BYTES + head.length]
        return body if len(body) == head.length and crc32(body, head.crc) == head.body_crc else None

    def next_head(self, offset: int, salt: int) -> int | None:
        """The first head at ``offset`` or later."""
        while offset + HEAD_BYTES <= self.size:
            content, place = self.at(offset, HEAD_BYTES)
            found = content.find(MARK, place)
            while found >= 0 and found + HEAD_BYTES <= len(content):
                if read_head(content, found, salt) is not None:
                    return offset + found - place
                found = content.find(MARK, found + 1)
            # A head may begin in the last bytes of this window.
            offset += max(1, len(content) - place - HEAD_BYTES + 1)
        return None


def read_header(disk: Disk, path: Path, first: int) -> SegmentHeader:
    """The header of the segment named after record ``first``.

    Raises:
        JournalDamaged: it is not as it was written, or of another build.
        FileNotFoundError: no such file.
    """
    try:
        header = SegmentHeader.from_bytes(disk.read(path, 0, HEADER_BYTES))
    except ValueError as error:
        raise JournalDamaged(Damage(path, 0, None, str(error))) from error
    if header.first != first:
        what = f"the header is that of record {header.first}; the file is named after record {first}"
        raise JournalDamaged(Damage(path, 0, None, what))
    return header


class SegmentScan:
    """Goes through a segment once.

    Args:
        disk: where it is.
        path: which.
        header: its own.
        limit: where it ends for this reader; None: at the file's end.

    Attributes:
        whole: offset after the last whole batch; it grows while batches are read.
        sequence: number of the last record of those batches.
        chain: checksum of that record.
        stop: where reading had to stop before the end, and why; None while there is no such place.
        reached: number and checksum of the last record before ``stop``, also of a batch that is not whole.
    """

    def __init__(self, disk: Disk, path: Path, header: SegmentHeader, limit: int | None = None) -> None:
        self._path = path
        self._salt = header.salt
        self._window = Window(disk, path, limit)
        self.whole = HEADER_BYTES
        self.sequence = header.first - 1
        self.chain = header.chain
        self.stop: Damage | None = None
        self.reached = (self.sequence, self.chain)

    def batches(self) -> Iterator[list[Stored]]:
        """Whole batches; ends at the file's end or at ``stop``."""
        offset, sequence, chain = self.whole, self.sequence, self.chain
        batch: list[Stored] = []
        while offset < self._window.size:
            head = self._window.head(offset, self._salt)
            wrong = _misplaced(head, sequence, chain, len(batch))
            if head is None or wrong:
                self.stop = Damage(self._path, offset, sequence + 1, wrong)
                return
            body = self._window.body(offset, head)
            if body is None:
                what = (
                    "the record is cut off"
                    if self._is_cut(offset, head)
                    else "the body does not have its checksum"
                )
                self.stop = Damage(self._path, offset, sequence + 1, what)
                return
            stored = Stored(head, offset, body)
            batch.append(stored)
            offset, sequence, chain = stored.end, head.sequence, head.body_crc
            self.reached = (sequence, chain)
            if head.last:
                self.whole, self.sequence, self.chain = offset, sequence, chain
                yield batch
                batch = []
        if batch:
            self.stop = Damage(self._path, self.whole, self.sequence + 1, "the batch has no end")

    def goes_on_after(self, stop: int) -> bool:
        """Whether a later batch begins somewhere after ``stop``: then what is there was whole once.

        A batch is appended only after the one before was synced, so what a power cut may tear is one batch.
        """
        torn = self.sequence + 1
        head = self._window.head(stop, self._salt)
        offset: int | None = stop + HEAD_BYTES + head.length if head else stop + 1
        while offset is not None:
            offset = self._window.next_head(offset, self._salt)
            if offset is None:
                return False
            head = self._window.head(offset, self._salt)
            if head is not None and head.batch > torn:
                return True
            offset += HEAD_BYTES + (head.length if head else 0)
        return False

    def _is_cut(self, offset: int, head: Head) -> bool:
        return offset + HEAD_BYTES + head.length > self._window.size


def survivors(disk: Disk, path: Path, salt: int, offset: int) -> Iterator[Stored]:
    """Whole records at ``offset`` or later, wherever they are between damaged ones."""
    window = Window(disk, path)
    place = window.next_head(offset, salt)
    while place is not None:
        head = window.head(place, salt)
        assert head is not None, "a head was found there"
        body = window.body(place, head)
        if body is not None:
            yield Stored(head, place, body)
        after = place + HEAD_BYTES + head.length
        place = window.next_head(after, salt)


def _misplaced(head: Head | None, sequence: int, chain: int, place: int) -> str:
    """What is wrong with a head after record ``sequence`` and so many of its batch; empty: nothing."""
    if head is None:
        return "the head of the record does not have its checksum"
    if head.sequence != sequence + 1:
        return f"record {head.sequence} comes after record {sequence}"
    if head.chain != chain:
        return "the record does not continue the one before"
    if head.place != place:
        return f"the record is number {head.place} of its batch; number {place} was to come"
    return ""


def decoded(path: Path, stored: Stored) -> Record:
    """What a stored record says.

    Raises:
        JournalDamaged: this build cannot read it.
    """
    try:
        return from_body(stored.head.kind, stored.body)
    except ValueError as error:
        raise JournalDamaged(Damage(path, stored.offset, stored.sequence, str(error))) from error
