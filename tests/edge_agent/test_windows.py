"""Cutting windows: one row at a time and from a whole table give the same."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.windows import Cutter, cut, majority, oriented, window_starts


def test_a_cutter_gives_a_window_with_its_last_row() -> None:
    cutter = Cutter(length=3, stride=2)
    given = [cutter.add((float(row), 10.0 * row)) for row in range(6)]
    assert [window is not None for window in given] == [False, False, True, False, True, False]
    assert given[4] is not None
    assert given[4].tolist() == [[2, 20], [3, 30], [4, 40]]
    assert given[4].dtype == np.float32


def test_a_stride_longer_than_a_window_passes_rows_over() -> None:
    cutter = Cutter(length=2, stride=5)
    given = [cutter.add((float(row),)) for row in range(12)]
    assert [index for index, window in enumerate(given) if window is not None] == [1, 6, 11]


def test_a_break_begins_a_new_window() -> None:
    cutter = Cutter(length=2, stride=5)
    cutter.add((0.0,))
    cutter.break_off()
    assert cutter.add((1.0,)) is None
    window = cutter.add((2.0,))
    assert window is not None
    assert window.tolist() == [[1], [2]]
    cutter.break_off()  # also ends the passing over of the rows between two windows
    cutter.add((7.0,))
    assert cutter.add((8.0,)) is not None


@given(
    runs=st.lists(st.integers(0, 12), max_size=6),
    length=st.integers(1, 5),
    stride=st.integers(1, 7),
)
def test_rows_one_at_a_time_and_a_whole_table_give_the_same_windows(
    runs: list[int], length: int, stride: int
) -> None:
    cutter = Cutter(length, stride)
    numbers = np.repeat(np.arange(len(runs)), runs)
    rows = np.arange(len(numbers), dtype=np.float32)[:, None]
    one_by_one = []
    for index, row in enumerate(rows):
        if index and numbers[index] != numbers[index - 1]:
            cutter.break_off()
        window = cutter.add(tuple(row))
        if window is not None:
            one_by_one.append(window.tolist())
    starts = window_starts(numbers, length, stride)
    assert cut(rows, starts, length).tolist() == one_by_one
    # Nothing is left out that would fit: a run of r rows has 1 + (r − length) // stride windows.
    assert len(starts) == sum(1 + (run - length) // stride for run in runs if run >= length)


def test_the_majority_of_equals_is_the_smallest() -> None:
    assert majority(np.array([[2.0, 1.0], [3.0, 3.0], [0.0, 5.0]])).tolist() == [1, 3, 0]


def test_one_row_or_one_channel_fits_both_orders_alike() -> None:
    assert oriented(np.zeros((4, 1, 1)), (1, 1)).shape == (4, 1, 1)
    assert oriented(np.zeros((4, 5, 1)), (1, 5)).shape == (4, 1, 5)
    assert oriented(np.zeros((4, 5, 1)), (5, 1)).shape == (4, 5, 1)
    assert oriented(np.zeros((0, 5, 2)), (10,)).shape == (0, 10)


@pytest.mark.parametrize("shape", [(), (9,), (3, 3), (1, 2, 5)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="windows of 5 rows with 2 channels have the shape"):
        oriented(np.zeros((4, 5, 2)), shape)
