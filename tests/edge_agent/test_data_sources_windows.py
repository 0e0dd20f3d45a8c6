"""A folder that other programs add windows to: the newest count, damaged ones do not."""

import os
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import pytest
from agent_world import tiny_plan
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_agent.data_sources import DataError, Windows
from edge_agent.data_sources.window_folder import UNREADABLE_FILE
from edge_agent.dataset import Dataset
from edge_agent.values import NOT_FINITE
from fedtide.wire.parameters import TensorSpec

LABELS: Final = TensorSpec(name="y", dtype="int64", shape=(None,))
CLASSES: Final = msgspec.structs.replace(tiny_plan().manifest, targets=LABELS)
AUTOENCODER: Final = msgspec.structs.replace(CLASSES, targets=None)
"""Both take examples of two values."""


def put(folder: Path, name: str, at: int, x: Any, y: Any = None) -> Path:
    """Add a file as of second ``at``."""
    path = folder / name
    if path.suffix == ".npy":
        np.save(path, np.asarray(x, np.float32))
    else:
        np.savez(path, x=np.asarray(x, np.float32), **({} if y is None else {"y": np.asarray(y)}))
    os.utime(path, (at, at))
    return path


def firsts(dataset: Dataset) -> list[float]:
    values: list[float] = dataset.inputs[0][:, 0].tolist()
    return values


def test_windows_and_batches_are_joined_from_the_oldest_to_the_newest(tmp_path: Path) -> None:
    put(tmp_path, "b.npz", 1, [[1, 0], [2, 0]])
    put(tmp_path, "a.npy", 3, [5, 0])
    put(tmp_path, "c.npy", 2, [[3, 0], [4, 0]])
    dataset = Windows(path=tmp_path).load(AUTOENCODER)
    assert firsts(dataset) == [1, 2, 3, 4, 5]
    assert dataset.arrived is not None
    assert dataset.arrived.tolist() == [10**9, 10**9, 2 * 10**9, 2 * 10**9, 3 * 10**9]


def test_labels_come_from_archives(tmp_path: Path) -> None:
    put(tmp_path, "a.npz", 1, [[1, 0], [2, 0]], [0, 1])
    put(tmp_path, "b.npz", 2, [3, 0], 1)
    dataset = Windows(path=tmp_path).load(CLASSES)
    assert firsts(dataset) == [1, 2, 3]
    assert dataset.targets is not None
    assert dataset.targets.tolist() == [0, 1, 1]


def test_an_empty_folder_has_no_examples_yet(tmp_path: Path) -> None:
    dataset = Windows(path=tmp_path).load(CLASSES)
    assert len(dataset) == 0
    assert dataset.newest == 0
    assert dataset.inputs[0].shape == (0, 2)
    put(tmp_path, "a.npz", 1, [[1, 0]], [0])
    assert Windows(path=tmp_path).load(CLASSES).new_since(dataset.newest) == 1


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("no window")
    (tmp_path / ".hidden.npy").write_text("no window")
    (tmp_path / "half.npy.part").write_text("no window")
    (tmp_path / "folder").mkdir()
    assert Windows(path=tmp_path).load(AUTOENCODER).skipped == ()


def test_windows_that_were_added_are_new(tmp_path: Path) -> None:
    source = Windows(path=tmp_path)
    put(tmp_path, "a.npy", 1, [[1, 0], [2, 0]])
    mark = source.load(AUTOENCODER).newest
    put(tmp_path, "b.npy", 2, [[3, 0], [4, 0], [5, 0]])
    assert source.load(AUTOENCODER).new_since(mark) == 3


def test_removing_old_files_makes_nothing_new(tmp_path: Path) -> None:
    source = Windows(path=tmp_path)
    old = put(tmp_path, "a.npy", 1, [[1, 0], [2, 0]])
    put(tmp_path, "b.npy", 2, [[3, 0]])
    mark = source.load(AUTOENCODER).newest
    old.unlink()
    assert source.load(AUTOENCODER).new_since(mark) == 0


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "No data left in file"),
        (b"\x93NUMPY\x01\x00v\x00{'descr", "EOF"),
        (b"not an array", "pickled|magic"),
    ],
)
def test_a_damaged_file_is_counted_and_skipped(tmp_path: Path, content: bytes, why: str) -> None:
    put(tmp_path, "good.npy", 1, [1, 0])
    (tmp_path / "bad.npy").write_bytes(content)
    dataset = Windows(path=tmp_path).load(AUTOENCODER)
    assert firsts(dataset) == [1]
    [skip] = dataset.skipped
    assert (skip.reason, skip.count) == (UNREADABLE_FILE, 1)
    assert skip.first.startswith("bad.npy: ")


@pytest.mark.parametrize(
    ("x", "y", "why"),
    [
        ([[1, 2, 3]], [0], r"have shape \(3,\); the plan takes \(2,\)"),
        ([[1, 2]], None, "y is not a file in the archive"),
        ([[1, 2]], [0, 1], "arrays of one length"),
        ([[1, np.nan]], [0], "no good example"),
        (7.0, [0], "must be an array of numbers"),
    ],
)
def test_a_file_that_does_not_fit_is_counted_and_skipped(tmp_path: Path, x: Any, y: Any, why: str) -> None:
    put(tmp_path, "good.npz", 1, [[1, 0]], [1])
    bad = put(tmp_path, "bad.npz", 2, x, y)
    [skip] = Windows(path=tmp_path).load(CLASSES).skipped
    assert skip.first.startswith("bad.npz: ")
    (tmp_path / "good.npz").unlink()
    with pytest.raises(DataError, match=f"no good file: {bad.name}: .*{why}"):
        Windows(path=tmp_path).load(CLASSES)


def test_a_bad_window_of_a_batch_is_counted_with_its_file(tmp_path: Path) -> None:
    put(tmp_path, "a.npy", 1, [[1, 0], [2, np.nan], [3, 0]])
    put(tmp_path, "b.npy", 2, [[np.inf, 0], [4, 0]])
    dataset = Windows(path=tmp_path).load(AUTOENCODER)
    assert firsts(dataset) == [1, 3, 4]
    [skip] = dataset.skipped
    assert (skip.count, skip.first) == (2, f"b.npy: example 1: {NOT_FINITE} in 'x0'")


def test_only_the_newest_examples_are_taken(tmp_path: Path) -> None:
    for at in range(1, 6):
        put(tmp_path, f"{at}.npy", at, [[10 * at, 0], [10 * at + 1, 0]])
    assert firsts(Windows(path=tmp_path, max_examples=3).load(AUTOENCODER)) == [41, 50, 51]
    assert len(list(tmp_path.iterdir())) == 5


def test_only_as_many_bytes_as_allowed_are_read(tmp_path: Path) -> None:
    for at in range(1, 6):
        put(tmp_path, f"{at}.npy", at, np.full((50, 2), at))
    # A file has 128 bytes of header and 50 · 2 · 4 of values: 528. Two fit into 1200.
    dataset = Windows(path=tmp_path, max_bytes=1200).load(AUTOENCODER)
    assert sorted(set(firsts(dataset))) == [4, 5]


def test_an_archive_counts_by_its_unpacked_size(tmp_path: Path) -> None:
    put(tmp_path, "small.npy", 1, [1, 0])
    np.savez_compressed(tmp_path / "bomb.npz", x=np.zeros((1_000_000, 2), np.float32))
    assert (tmp_path / "bomb.npz").stat().st_size < 100_000
    dataset = Windows(path=tmp_path, max_bytes=1_000_000).load(AUTOENCODER)
    assert firsts(dataset) == [1]
    [skip] = dataset.skipped
    assert "8,000,128 bytes; max_bytes is 1,000,000" in skip.first


def test_older_files_are_removed_where_the_settings_say_so(tmp_path: Path) -> None:
    for at in range(1, 6):
        put(tmp_path, f"{at}.npy", at, [[at, 0], [at, 0]])
    (tmp_path / "readme.txt").write_text("stays")
    source = Windows(path=tmp_path, max_examples=3, remove_older=True)
    assert firsts(source.load(AUTOENCODER)) == [4, 5, 5]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["4.npy", "5.npy", "readme.txt"]


def test_the_stamp_changes_when_a_file_comes_or_goes(tmp_path: Path) -> None:
    source = Windows(path=tmp_path)
    stamps = [source.changed_since(None)]
    put(tmp_path, "a.npy", 1, [1, 0])
    stamps.append(source.changed_since(stamps[-1]))
    put(tmp_path, "b.npy", 1, [1, 0])
    stamps.append(source.changed_since(stamps[-1]))
    (tmp_path / "a.npy").unlink()
    stamps.append(source.changed_since(stamps[-1]))
    assert None not in stamps
    assert source.changed_since(stamps[-1]) is None


def test_more_examples_than_are_kept_cannot_be_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_examples is 10, and 20 are needed to train"):
        Windows(path=tmp_path, max_examples=10, min_new_examples=20)


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
def test_whatever_happens_to_a_file_the_others_are_read(data: st.DataObject, tmp_path: Path) -> None:
    put(tmp_path, "good.npz", 1, [[1, 0]], [1])
    suffix = data.draw(st.sampled_from([".npy", ".npz"]))
    bad = put(tmp_path, f"bad{suffix}", 2, np.zeros((3, 2)), [0, 1, 0])
    content = bytearray(bad.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(0, len(content))) :]
    bad.write_bytes(content)
    dataset = Windows(path=tmp_path).load(CLASSES)
    assert 1 in firsts(dataset)
    assert dataset.inputs[0].dtype == np.float32
    bad.unlink()
