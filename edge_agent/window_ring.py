"""The window ring: the newest windows of readings on disk, in bounded space. It survives power cuts.

    {position of its first window}.windows

A segment is a header (magic, layout, values per window, position of the first window, CRC-32) and windows of
one size, each behind its CRC-32. When a segment is full the next begins, and the oldest is removed first.
Windows are appended in batches, one sync a batch, because a memory card wears with every write.

Positions count all windows ever appended, from 1, so that "new since" has a meaning.
"""

import contextlib
import logging
import struct
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from edge_agent.windows import Floats
from fedtide.wire.disk import OS_DISK, Disk, write_durably

log = logging.getLogger(__name__)

LAYOUT_BYTES: Final = 8
_MAGIC: Final = b"ftw1"
_FIELDS: Final = struct.Struct(f"<4s{LAYOUT_BYTES}sIQ")
_CRC: Final = struct.Struct("<I")
_HEADER_BYTES: Final = _FIELDS.size + _CRC.size
_SUFFIX: Final = ".windows"
_NAME_DIGITS: Final = 20
_MOST_POSITIONS: Final = 1 << 63
_SEGMENTS: Final = 8  # so many are kept; an eighth of the windows goes at a time


@dataclass(frozen=True)
class Layout:
    """What the windows of a ring are.

    Attributes:
        id: 8 bytes; windows of another id are of no use and are removed.
        values: float32 values per window.
    """

    id: bytes
    values: int

    @property
    def record_bytes(self) -> int:
        """On disk, per window."""
        return _CRC.size + 4 * self.values

    @property
    def least_bytes(self) -> int:
        """Of a ring: one window a segment."""
        return _SEGMENTS * (_HEADER_BYTES + self.record_bytes)

    def capacity(self, max_bytes: int) -> int:
        """How many windows a ring of so many bytes holds at least, once it is full."""
        per_segment = (max_bytes // _SEGMENTS - _HEADER_BYTES) // self.record_bytes
        return (_SEGMENTS - 1) * max(0, per_segment)


@dataclass(frozen=True)
class Kept:
    """What a ring holds.

    Attributes:
        windows: float32, shape ``(windows, values)``, oldest first.
        positions: int64, shape ``(windows,)``, each window's place among all ever appended, from 1.
        damaged: windows that were there and could not be read.
    """

    windows: Floats
    positions: npt.NDArray[np.int64]
    damaged: int


@dataclass(frozen=True)
class _Segment:
    """One file of windows."""

    path: Path
    layout: Layout
    first: int
    count: int

    @property
    def last(self) -> int:
        """Position of its last window; of the one before its first while it is empty."""
        return self.first + self.count - 1

    @property
    def bytes(self) -> int:
        return _HEADER_BYTES + self.count * self.layout.record_bytes


class WindowRing:
    """Appends windows. One writer a directory.

    Args:
        directory: made if it is not there.
        layout: of the windows. Segments of another layout are removed, and their count is gone on with.
        max_bytes: of all files together.
        disk: where the directory is; what reads the windows reads the operating system's.

    Raises:
        ValueError: ``max_bytes`` is too few for a window in each of eight segments.
        OSError: the directory cannot be written to.
    """

    def __init__(self, directory: Path, layout: Layout, max_bytes: int, disk: Disk = OS_DISK) -> None:
        self._segment_windows = layout.capacity(max_bytes) // (_SEGMENTS - 1)
        if self._segment_windows < 1:
            raise ValueError(
                f"a ring of {max_bytes:,} bytes is too small for its windows; "
                f"it needs at least {layout.least_bytes:,}"
            )
        disk.make_directory(directory)
        self._directory = directory
        self._layout = layout
        self._max_bytes = max_bytes
        self._disk = disk
        self._segments: list[_Segment] = []
        self._recover()

    @property
    def total(self) -> int:
        """How many windows were ever appended."""
        return self._segments[-1].last if self._segments else 0

    def append(self, windows: Floats) -> None:
        """Make windows durable, float32 of shape ``(windows, values)``.

        Raises:
            OSError: the disk would not take them; the segments before are as they were.
        """
        done = 0
        while done < len(windows):
            if not self._segments or self._segments[-1].count >= self._segment_windows:
                self._begin_segment()
            room = self._segment_windows - self._segments[-1].count
            self._write(windows[done : done + room])
            done += room

    def _write(self, windows: Floats) -> None:
        segment = self._segments[-1]
        records = b"".join(_record(window) for window in windows)
        if self._disk.size(segment.path) != segment.bytes:  # an earlier attempt left something behind
            self._disk.truncate(segment.path, segment.bytes)
        appending = self._disk.open_log(segment.path)
        try:
            appending.append(records)
            appending.sync()
        except OSError:
            with contextlib.suppress(OSError):
                self._disk.truncate(segment.path, segment.bytes)
            raise
        finally:
            appending.close()
        self._segments[-1] = replace(segment, count=segment.count + len(windows))

    def _begin_segment(self, after: int = 0) -> None:
        full_bytes = _HEADER_BYTES + self._segment_windows * self._layout.record_bytes
        self._remove_oldest(full_bytes, keep=1)  # never the newest before the next is there: it has the count
        first = max(self.total, after) + 1
        path = self._directory / f"{first:0{_NAME_DIGITS}d}{_SUFFIX}"
        write_durably(self._disk, path, _header(self._layout, first))
        self._segments.append(_Segment(path, self._layout, first, 0))
        self._remove_oldest(full_bytes - _HEADER_BYTES, keep=1)

    def _remove_oldest(self, room_bytes: int, keep: int) -> None:
        while len(self._segments) > keep:
            if sum(segment.bytes for segment in self._segments) + room_bytes <= self._max_bytes:
                return
            self._disk.remove(self._segments.pop(0).path)

    def _recover(self) -> None:
        """Find what is there, drop the tail that a power cut left, remove what is of no use."""
        names = self._disk.names(self._directory)
        for unfinished in (name for name in names if name.endswith(f"{_SUFFIX}.new")):
            self._disk.remove(self._directory / unfinished)
        lost = 0
        for path in (self._directory / name for name in names if name.endswith(_SUFFIX)):
            content = self._disk.read(path)
            segment = _opened(path, content)
            if segment is None:
                lost = max(lost, _last_by_name(path, content, self._layout))
                log.error("%s is damaged and was removed", path, extra={"event": "ring.damaged"})
                self._disk.remove(path)
            else:
                self._segments.append(segment)
        if lost > self.total:  # no position comes again: what was trained on is known by its position
            self._begin_segment(lost)
        if not self._segments:
            return
        newest = self._segments[-1]
        if self._disk.size(newest.path) != newest.bytes:
            self._disk.truncate(newest.path, newest.bytes)
        if any(segment.layout != self._layout for segment in self._segments):
            log.warning(
                "%s holds windows of other channels or sizes; they are removed", self._directory,
                extra={"event": "ring.emptied"},
            )  # fmt: skip
            self._begin_segment()
            for segment in self._segments[:-1]:
                if segment.path != self._segments[-1].path:  # as that of one without windows is
                    self._disk.remove(segment.path)
            del self._segments[:-1]
        self._remove_oldest(0, keep=1)


def read_ring(directory: Path, layout: Layout) -> Kept:
    """Read all windows of this layout, also while they are being appended; none if there is no directory.

    Raises:
        OSError: a file cannot be read.
    """
    paths = _segments_of(directory)
    most = sum(_size(path) for path in paths) // layout.record_bytes
    windows = np.empty((most, layout.values), np.float32)  # filled in place: there may be many megabytes
    positions = np.empty(most, np.int64)
    count = damaged = 0
    for path in paths:
        content = _content(path)
        segment = _parsed(path, content)
        if segment is None or segment.layout != layout:
            continue
        records = _records(segment, content)
        good = np.flatnonzero(records.good)[: most - count]
        windows[count : count + len(good)] = records.windows[good]
        positions[count : count + len(good)] = segment.first + good
        count += len(good)
        damaged += int(np.count_nonzero(~records.good))
    return Kept(windows[:count], positions[:count], damaged)


def ring_stamp(directory: Path) -> tuple[str, int]:
    """What changes whenever a window is appended: the newest segment's name and size."""
    for path in reversed(_segments_of(directory)):
        with contextlib.suppress(FileNotFoundError):
            return path.name, path.stat().st_size
    return "", 0


def _segments_of(directory: Path) -> list[Path]:
    return sorted(directory.glob(f"*{_SUFFIX}"))


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:  # the writer has just removed it
        return b""


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _header(layout: Layout, first: int) -> bytes:
    fields = _FIELDS.pack(_MAGIC, layout.id, layout.values, first)
    return fields + _CRC.pack(zlib.crc32(fields))


def _record(window: Floats) -> bytes:
    values = window.astype("<f4").tobytes()
    return _CRC.pack(zlib.crc32(values)) + values


def _opened(path: Path, content: bytes) -> _Segment | None:
    """A segment with as many windows as are whole at its end; None if its header is damaged."""
    segment = _parsed(path, content)
    if segment is None:
        return None
    good = _records(segment, content).good
    return replace(segment, count=int(np.flatnonzero(good)[-1]) + 1 if good.any() else 0)


def _last_by_name(path: Path, content: bytes, layout: Layout) -> int:
    """The last position in a segment whose header is damaged, by the file's name and size; 0: not known."""
    if len(path.stem) != _NAME_DIGITS or not path.stem.isdecimal() or int(path.stem) >= _MOST_POSITIONS:
        return 0
    return int(path.stem) - 1 + max(0, len(content) - _HEADER_BYTES) // layout.record_bytes


def _parsed(path: Path, content: bytes) -> _Segment | None:
    """The segment that a file's content begins; its count by the file's size."""
    if len(content) < _HEADER_BYTES:
        return None
    magic, layout_id, values, first = _FIELDS.unpack_from(content)
    if magic != _MAGIC or _CRC.unpack_from(content, _FIELDS.size)[0] != zlib.crc32(content[: _FIELDS.size]):
        return None
    layout = Layout(layout_id, values)
    return _Segment(path, layout, first, (len(content) - _HEADER_BYTES) // layout.record_bytes)


@dataclass(frozen=True)
class _Records:
    """The windows of one segment, and which of them have their CRC."""

    windows: Floats
    good: npt.NDArray[np.bool_]


def _records(segment: _Segment, content: bytes) -> _Records:
    layout = segment.layout
    kind = np.dtype([("crc", "<u4"), ("values", "<f4", (layout.values,))])
    records = np.frombuffer(content, kind, segment.count, _HEADER_BYTES)
    view, step = memoryview(content), layout.record_bytes
    starts = range(_HEADER_BYTES + _CRC.size, len(content), step)
    sums = [zlib.crc32(view[start : start + step - _CRC.size]) for start in starts[: segment.count]]
    good = records["crc"] == np.array(sums, np.uint32)
    return _Records(records["values"], good)
