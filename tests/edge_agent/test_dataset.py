from typing import Any

import numpy as np
import pytest

from edge_agent.dataset import Dataset

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
