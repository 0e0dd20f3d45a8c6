"""The ring on disk: bounded, nothing lost but what a power cut tore, and a count that only grows."""

import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.window_ring import Layout, WindowRing, read_ring, ring_stamp
from edge_agent.windows import Floats
from fedtide.wire.disk import UNSYNCED_DISK

LAYOUT: Final = Layout(b"one-two-", 3)
RECORD_BYTES: Final = 4 + 3 * 4
HEADER_BYTES: Final = 4 + 8 + 4 + 8 + 4
EIGHT_SEGMENTS_OF_FIVE: Final = 8 * (HEADER_BYTES + 5 * RECORD_BYTES)


def numbered(first: int, count: int) -> Floats:
    """Windows whose first value is their position."""
    windows = np.zeros((count, 3), np.float32)
    windows[:, 0] = np.arange(first, first + count)
    windows[:, 1:] = 0.5
    return windows


def ring_in(directory: Path, max_bytes: int = EIGHT_SEGMENTS_OF_FIVE, layout: Layout = LAYOUT) -> WindowRing:
    return WindowRing(directory, layout, max_bytes, UNSYNCED_DISK)


def size_of(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.iterdir())


def positions(directory: Path, layout: Layout = LAYOUT) -> list[int]:
    """Of all windows that are there; each must hold what was appended at its position."""
    kept = read_ring(directory, layout)
    assert kept.windows.dtype == np.float32
    assert kept.windows.shape == (len(kept.positions), layout.values)
    assert kept.windows[:, 0].tolist() == kept.positions.tolist()
    found: list[int] = kept.positions.tolist()
    return found


def test_what_was_appended_is_read_in_order(tmp_path: Path) -> None:
    ring = ring_in(tmp_path)
    ring.append(numbered(1, 2))
    ring.append(numbered(3, 9))
    assert ring.total == 11
    assert positions(tmp_path) == list(range(1, 12))
    assert read_ring(tmp_path, LAYOUT).damaged == 0


def test_the_directory_is_made_and_without_one_there_is_nothing(tmp_path: Path) -> None:
    assert positions(tmp_path / "a" / "b") == []
    assert ring_stamp(tmp_path / "a" / "b") == ("", 0)
    ring_in(tmp_path / "a" / "b").append(numbered(1, 1))
    assert positions(tmp_path / "a" / "b") == [1]


def test_when_it_is_full_the_oldest_segment_goes(tmp_path: Path) -> None:
    ring = ring_in(tmp_path)
    ring.append(numbered(1, 40))
    assert positions(tmp_path) == list(range(1, 41))  # 8 segments of 5
    assert size_of(tmp_path) == EIGHT_SEGMENTS_OF_FIVE
    ring.append(numbered(41, 1))
    assert positions(tmp_path) == list(range(6, 42))
    ring.append(numbered(42, 4))
    ring.append(numbered(46, 1))
    assert positions(tmp_path) == list(range(11, 47))


def test_a_full_ring_keeps_at_least_its_capacity(tmp_path: Path) -> None:
    ring = ring_in(tmp_path)
    assert LAYOUT.capacity(EIGHT_SEGMENTS_OF_FIVE) == 35
    for first in range(1, 200):
        ring.append(numbered(first, 1))
        assert len(positions(tmp_path)) >= min(first, 35)


def test_it_goes_on_where_it_stopped(tmp_path: Path) -> None:
    ring_in(tmp_path).append(numbered(1, 7))
    ring = ring_in(tmp_path)
    assert ring.total == 7
    ring.append(numbered(8, 5))
    assert positions(tmp_path) == list(range(1, 13))


def test_too_few_bytes_are_refused_with_how_many_would_do(tmp_path: Path) -> None:
    least = 8 * (HEADER_BYTES + RECORD_BYTES)
    ring_in(tmp_path / "least", least).append(numbered(1, 20))
    assert len(positions(tmp_path / "least")) == 8
    with pytest.raises(ValueError, match=f"{least - 1} bytes is too small.*at least {least}"):
        ring_in(tmp_path / "less", least - 1)


@given(
    batches=st.lists(st.integers(0, 23), max_size=12),
    max_bytes=st.integers(8 * (HEADER_BYTES + RECORD_BYTES), 3000),
    restarts=st.sets(st.integers(0, 11)),
)
@settings(max_examples=50)
def test_its_size_is_bounded_and_its_count_grows_whatever_is_appended(
    batches: list[int],
    max_bytes: int,
    restarts: set[int],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    directory = tmp_path_factory.mktemp("ring")
    ring = ring_in(directory, max_bytes)
    total = 0
    for index, count in enumerate(batches):
        if index in restarts:
            ring = ring_in(directory, max_bytes)
        ring.append(numbered(total + 1, count))
        total += count
        assert ring.total == total
        assert size_of(directory) <= max_bytes
        kept = positions(directory)
        assert kept == list(range(total - len(kept) + 1, total + 1))
        assert len(kept) >= min(total, LAYOUT.capacity(max_bytes))


@given(sizes=st.lists(st.integers(8 * (HEADER_BYTES + RECORD_BYTES), 3000), min_size=2, max_size=5))
@settings(max_examples=12)
def test_another_bound_holds_from_the_next_segment_on(
    sizes: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("ring")
    total = 0
    for max_bytes in sizes:
        ring = ring_in(directory, max_bytes)
        assert ring.total == total
        for _ in range(30):
            ring.append(numbered(total + 1, 2))
            total += 2
        assert size_of(directory) <= max_bytes
        assert positions(directory)[-1] == total


# Power cuts.


def test_a_tail_torn_at_any_byte_costs_only_the_windows_that_it_tore(tmp_path: Path) -> None:
    ring = ring_in(tmp_path)
    ring.append(numbered(1, 9))  # a full segment, and 4 windows in the next
    [_, newest] = sorted(tmp_path.iterdir())
    content = newest.read_bytes()
    assert len(content) == HEADER_BYTES + 4 * RECORD_BYTES
    for length in range(HEADER_BYTES, len(content)):
        newest.write_bytes(content[:length])
        whole = 5 + (length - HEADER_BYTES) // RECORD_BYTES
        assert positions(tmp_path) == list(range(1, whole + 1))
        ring = ring_in(tmp_path)
        assert ring.total == whole
        assert newest.stat().st_size == HEADER_BYTES + (whole - 5) * RECORD_BYTES
        ring.append(numbered(whole + 1, 1))
        assert positions(tmp_path) == list(range(1, whole + 2))


def test_a_tail_of_zeros_costs_only_the_windows_that_they_replaced(tmp_path: Path) -> None:
    ring_in(tmp_path).append(numbered(1, 4))
    [file] = tmp_path.iterdir()
    content = file.read_bytes()
    for length in range(HEADER_BYTES, len(content)):
        file.write_bytes(content[:length] + bytes(len(content) - length))
        whole = (length - HEADER_BYTES) // RECORD_BYTES
        kept = positions(tmp_path)
        assert kept[:whole] == list(range(1, whole + 1))
        ring = ring_in(tmp_path)
        assert ring.total == len(kept)
        ring.append(numbered(ring.total + 1, 2))
        assert positions(tmp_path) == list(range(1, len(kept) + 3))


def test_a_header_torn_at_any_byte_is_an_unfinished_file_that_is_removed(tmp_path: Path) -> None:
    ring_in(tmp_path).append(numbered(1, 5))
    [file] = tmp_path.iterdir()
    header = file.read_bytes()[:HEADER_BYTES]
    for length in range(HEADER_BYTES):
        (tmp_path / f"{6:020d}.windows.new").write_bytes(header[:length])
        assert ring_in(tmp_path).total == 5
        assert [each.name for each in tmp_path.iterdir()] == [file.name]


# Damage.


@given(offset=st.integers(0, 2 * HEADER_BYTES + 9 * RECORD_BYTES - 1), bit=st.integers(0, 7))
@settings(max_examples=50)
def test_a_flipped_bit_costs_its_window_or_its_segment_and_nothing_else(
    offset: int, bit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("ring")
    ring_in(directory).append(numbered(1, 9))
    first, second = sorted(directory.iterdir())
    file, at = (first, offset) if offset < first.stat().st_size else (second, offset - first.stat().st_size)
    content = bytearray(file.read_bytes())
    content[at] ^= 1 << bit
    file.write_bytes(content)
    lost = {1, 2, 3, 4, 5} if file == first else {6, 7, 8, 9}
    if at >= HEADER_BYTES:
        lost = {min(lost) + (at - HEADER_BYTES) // RECORD_BYTES}
        assert read_ring(directory, LAYOUT).damaged == 1
    assert positions(directory) == sorted({*range(1, 10)} - lost)
    ring = ring_in(directory)
    ring.append(numbered(ring.total + 1, 1))
    assert positions(directory)[-1] == ring.total
    assert size_of(directory) <= EIGHT_SEGMENTS_OF_FIVE


def test_positions_do_not_come_again_when_the_newest_header_is_damaged(tmp_path: Path) -> None:
    ring_in(tmp_path).append(numbered(1, 9))
    newest = max(tmp_path.iterdir())
    newest.write_bytes(b"?" + newest.read_bytes()[1:])
    ring = ring_in(tmp_path)
    assert ring.total == 9
    ring.append(numbered(10, 1))
    assert positions(tmp_path) == [1, 2, 3, 4, 5, 10]
    assert ring_in(tmp_path).total == 10


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    ring_in(tmp_path).append(numbered(1, 100))
    assert (tmp_path / "notes.txt").read_text() == "mine"


# Other windows than before.


def test_windows_of_other_channels_give_way_and_the_count_goes_on(tmp_path: Path) -> None:
    ring_in(tmp_path).append(numbered(1, 12))
    other = Layout(b"1-2-3-4-", 2)
    ring = ring_in(tmp_path, layout=other)
    assert ring.total == 12
    assert positions(tmp_path, other) == []
    assert positions(tmp_path) == []
    assert ring_in(tmp_path, layout=other).total == 12
    ring.append(np.array([[13, 0], [14, 0]], np.float32))
    assert positions(tmp_path, other) == [13, 14]


def test_other_windows_after_a_segment_that_was_begun_and_never_filled(tmp_path: Path) -> None:
    ring_in(tmp_path).append(numbered(1, 6))
    os.truncate(tmp_path / f"{6:020d}.windows", HEADER_BYTES)  # the power went before its first window
    other = Layout(b"1-2-3-4-", 2)
    ring = ring_in(tmp_path, layout=other)
    ring.append(np.array([[6, 0], [7, 0]], np.float32))
    assert positions(tmp_path, other) == [6, 7]


def test_windows_of_another_layout_are_not_read(tmp_path: Path) -> None:
    ring_in(tmp_path).append(numbered(1, 12))
    assert positions(tmp_path, Layout(b"1-2-3-4-", 3)) == []


# Trouble with the disk.


def test_a_disk_that_is_full_costs_the_windows_it_did_not_take(tmp_path: Path) -> None:
    ring = ring_in(tmp_path)
    ring.append(numbered(1, 2))
    with a_file_size_limit(HEADER_BYTES + 3 * RECORD_BYTES + 7), pytest.raises(OSError, match="too large"):
        ring.append(numbered(3, 3))
    assert positions(tmp_path) == [1, 2]
    ring.append(numbered(3, 3))
    assert positions(tmp_path) == [1, 2, 3, 4, 5]


@contextmanager
def a_file_size_limit(limit_bytes: int) -> Iterator[None]:
    """The kernel lets no file grow beyond so many bytes, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ended_by_it = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ended_by_it)


def test_the_stamp_changes_with_every_window(tmp_path: Path) -> None:
    ring = ring_in(tmp_path)
    stamps = [ring_stamp(tmp_path)]
    for position in range(1, 50):
        ring.append(numbered(position, 1))
        stamps.append(ring_stamp(tmp_path))
    assert len(set(stamps)) == 50


def test_windows_are_synced_once_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ring = WindowRing(tmp_path, LAYOUT, 100_000)
    ring.append(numbered(1, 1))
    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    ring.append(numbered(2, 500))
    assert len(synced) == 1
