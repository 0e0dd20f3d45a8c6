from typing import Any

import numpy as np
import pytest

from edge_agent.dataset import Dataset, Skipped, SkipTally

X = np.arange(6).reshape(3, 2)
Y = np.array([7, 8, 9])


def test_a_dataset_is_as_long_as_its_arrays() -> None:
    assert len(Dataset((X, X), Y)) == 3
    assert [array is X for array in Dataset((X, X), Y).arrays] == [True, True, False]
    assert Dataset((X,)).arrays == (X,)


def test_rows_are_taken_from_every_array() -> None:
    rows = Dataset((X,), Y).rows(np.array([2, 0]))
    assert rows.inputs[0].tolist() == [[4, 5], [0, 1]]
    assert rows.targets is not None
    assert rows.targets.tolist() == [9, 7]
    assert Dataset((X,)).rows(slice(1, 3)).targets is None


def test_a_slice_of_rows_is_a_view() -> None:
    assert np.shares_memory(Dataset((X,), Y).rows(slice(0, 2)).inputs[0], X)


@pytest.mark.parametrize("arrays", [((), None), ((), Y), ((X,), Y[:2]), ((X, X[:1]), None)])
def test_arrays_of_different_lengths_or_none_at_all_are_refused(arrays: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match="arrays of one length"):
        Dataset(*arrays)


def arrived(*marks: int) -> Dataset:
    return Dataset((np.zeros((len(marks), 2)),), arrived=np.array(marks, np.int64))


def test_examples_without_marks_are_counted_from_one() -> None:
    assert Dataset((X,)).newest == 3
    assert [Dataset((X,)).new_since(mark) for mark in (0, 1, 3)] == [3, 2, 0]


def test_examples_are_new_by_when_they_arrived() -> None:
    dataset = arrived(70, 80, 80, 90)
    assert dataset.newest == 90
    assert [dataset.new_since(mark) for mark in (0, 70, 80, 85, 90)] == [4, 3, 1, 1, 0]


def test_a_source_whose_count_begins_anew_has_only_new_examples() -> None:
    assert arrived(70, 80).new_since(100) == 2
    assert Dataset((X,)).new_since(4) == 3


def test_without_examples_nothing_is_new() -> None:
    assert (arrived().newest, arrived().new_since(0), arrived().new_since(5)) == (0, 0, 0)


def test_marks_are_as_many_as_examples() -> None:
    with pytest.raises(ValueError, match="arrays of one length"):
        Dataset((X,), arrived=np.arange(2))


def test_what_is_left_out_is_counted_by_reason_with_the_first_of_each() -> None:
    tally = SkipTally()
    assert (tally.skipped, tally.first()) == ((), "")
    tally.add("torn", "line 3", 2)
    tally.add("empty", "line 7")
    tally.add("torn", "line 9")
    assert tally.skipped == (Skipped("torn", 3, "line 3"), Skipped("empty", 1, "line 7"))
    assert tally.first() == "line 3"
    assert str(tally.skipped[0]) == "3 torn (first: line 3)"
