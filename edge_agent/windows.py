"""Windows: a fixed number of consecutive rows of readings, as one example. Pure."""

from collections import deque
from itertools import pairwise
from typing import Final

import numpy as np
import numpy.typing as npt

from edge_agent.dataset import Array

Floats = npt.NDArray[np.float32]

_MOST_LABELS: Final = 1000  # a majority among more distinct labels is no class label


class Cutter:
    """Cuts windows from rows that come one at a time.

    Windows start at rows 0, ``stride``, 2·``stride`` … after the start and after each break: the same that
    :func:`window_starts` finds in a whole table.

    Args:
        length: rows per window.
        stride: rows from the start of one window to the start of the next.
    """

    def __init__(self, length: int, stride: int) -> None:
        self._length = length
        self._stride = stride
        self._rows: deque[tuple[float, ...]] = deque()
        self._pass_over = 0  # rows until the next window begins, where the stride is longer than a window

    def add(self, row: tuple[float, ...]) -> Floats | None:
        """Take the next row; the window it completes, if any: float32, shape ``(length, channels)``."""
        if self._pass_over:
            self._pass_over -= 1
            return None
        self._rows.append(row)
        if len(self._rows) < self._length:
            return None
        window = np.array(self._rows, np.float32)
        for _ in range(min(self._stride, self._length)):
            self._rows.popleft()
        self._pass_over = max(0, self._stride - self._length)
        return window

    def break_off(self) -> None:
        """Drop the window begun: what comes next does not follow on what came before."""
        self._rows.clear()
        self._pass_over = 0


def window_starts(runs: npt.NDArray[np.int64], length: int, stride: int) -> npt.NDArray[np.int64]:
    """Where windows start in a table whose rows are of one run while ``runs`` keeps its value.

    Args:
        runs: shape ``(rows,)``; a window never spans a change of it.
        length: rows per window.
        stride: rows from the start of one window to the start of the next.
    """
    edges = np.flatnonzero(np.diff(runs)) + 1
    bounds = [0, *edges.tolist(), len(runs)]
    starts = [
        np.arange(first, end - length + 1, stride) for first, end in pairwise(bounds) if end - first >= length
    ]
    return np.concatenate(starts) if starts else np.zeros(0, np.int64)


def cut(rows: Array, starts: npt.NDArray[np.int64], length: int) -> Array:
    """The windows that start at these rows: shape ``(windows, length, *rows.shape[1:])``."""
    windows: Array = rows[starts[:, None] + np.arange(length)]
    return windows


def majority(labels: Array) -> Array:
    """The most frequent label of each window, the smallest of equals.

    Args:
        labels: float64, shape ``(windows, length)``.

    Raises:
        ValueError: more than 1000 distinct labels, which are measurements and no classes.
    """
    distinct = np.unique(labels)
    if len(distinct) > _MOST_LABELS:
        raise ValueError(f"{len(distinct)} distinct labels are no classes; take the label of the last row")
    best = np.zeros(len(labels))
    most = np.zeros(len(labels), np.int64)
    for label in distinct:
        count = np.count_nonzero(labels == label, axis=1)
        best = np.where(count > most, label, best)
        most = np.maximum(count, most)
    return best


def oriented(windows: Array, shape: tuple[int, ...], *, channels_first: bool | None = None) -> Array:
    """Windows turned as a plan's input takes them.

    ``(channels, length)`` is what 1-D convolutions take, ``(length, channels)`` recurrent nets and
    transformers, ``(length · channels,)`` dense nets: then row after row, or channel after channel with
    ``channels_first``.

    Args:
        windows: shape ``(windows, length, channels)``.
        shape: of one example, as the plan takes it.
        channels_first: decides where both orders fit.

    Raises:
        ValueError: no order fits, or both do and nothing was decided.
    """
    count, length, channels = windows.shape
    if len(shape) == 1 and shape[0] == length * channels:
        turned = windows.transpose(0, 2, 1) if channels_first else windows
        return turned.reshape(count, length * channels)
    orders = {False: (length, channels), True: (channels, length)}
    fitting = [first for first, order in orders.items() if order == shape and channels_first in {None, first}]
    if not fitting:
        raise ValueError(
            f"windows of {length} rows with {channels} channels have the shape {orders[True]} or "
            f"{orders[False]} or {(length * channels,)}; the plan takes {shape}"
        )
    if len(fitting) == 2 and length > 1:
        raise ValueError(
            f"windows of {length} rows with {channels} channels fit the plan's shape {shape} in both orders: "
            "set channels_first to true or false"
        )
    return windows.transpose(0, 2, 1) if fitting[0] else windows
