"""The examples a device holds out: it evaluates model versions on them and never trains on them. Pure.

Whether an example is held out follows from the example alone, so it stays on its side for ever, however the
data grow, and two copies of one example are on the same side. Windows that overlap share readings: they are
held out in blocks, and those that share readings with a block held out are left out of training.
"""

import hashlib
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from edge_agent.dataset import Dataset

_BLOCK_SPANS: Final = 8
"""Length of a block of overlapping windows, in spans. Longer ones lose fewer windows at their edges, and need
more data before there are enough blocks for some to be held out and some not."""


@dataclass(frozen=True)
class Split:
    """A device's examples on their two sides; ``held_out`` is None where nothing is held out."""

    training: Dataset
    held_out: Dataset | None


def split(dataset: Dataset, share: float) -> Split:
    """Hold out a share of the examples: about ``share`` of them, exactly none for 0.

    Args:
        dataset: with the plan's dtypes, so that the same example has the same bytes.
        share: 0 to 1, without 1.
    """
    if share <= 0.0 or not len(dataset):
        return Split(dataset, None)
    if dataset.span and dataset.arrived is not None:
        held_out, near = _by_blocks(dataset.arrived, dataset.span, share)
    else:
        held_out = near = _by_content(dataset) < share
    rows = np.flatnonzero(held_out)
    return Split(dataset.rows(np.flatnonzero(~near)), dataset.rows(rows) if len(rows) else None)


@dataclass
class HoldOut:
    """Splits a dataset anew only when it is another one."""

    _of: Dataset | None = None
    _share: float = 0.0
    _split: Split | None = None

    def split(self, dataset: Dataset, share: float) -> Split:
        """See :func:`split`."""
        if self._split is None or dataset is not self._of or share != self._share:
            self._of, self._share, self._split = dataset, share, split(dataset, share)
        return self._split


def _by_content(dataset: Dataset) -> npt.NDArray[np.float64]:
    """A number from 0 to 1 for each example, from the bytes of its arrays."""
    flat = (np.ascontiguousarray(array).reshape(len(dataset), -1) for array in dataset.arrays)
    rows = [array.view(np.uint8) for array in flat]
    digests = (b"".join(row[index].tobytes() for row in rows) for index in range(len(dataset)))
    return np.fromiter((_fraction(content) for content in digests), np.float64, len(dataset))


def _by_blocks(
    arrived: npt.NDArray[np.int64], span: int, share: float
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Which examples are held out, and which are held out or share readings with one that is."""
    block = _BLOCK_SPANS * span
    held_out = _blocks_held_out(arrived // block, share)
    before = _blocks_held_out((arrived - (span - 1)) // block, share)
    after = _blocks_held_out((arrived + (span - 1)) // block, share)
    return held_out, held_out | before | after


def _blocks_held_out(blocks: npt.NDArray[np.int64], share: float) -> npt.NDArray[np.bool_]:
    names, places = np.unique(blocks, return_inverse=True)
    fractions = np.array([_fraction(b"block %d" % name) for name in names])
    held_out: npt.NDArray[np.bool_] = (fractions < share)[places]
    return held_out


def _fraction(content: bytes) -> float:
    return int.from_bytes(hashlib.blake2b(content, digest_size=6).digest(), "big") / 2**48
