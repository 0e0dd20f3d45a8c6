"""A device's examples in memory."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Skipped:
    """Examples that were left out when a source was read, because they were bad.

    Attributes:
        reason: what was wrong with them, for example ``not a number``.
        count: how many.
        first: the first of them: where it stands and what it is.
    """

    reason: str
    count: int
    first: str

    def __str__(self) -> str:
        return f"{self.count} {self.reason} (first: {self.first})"


class SkipTally:
    """Counts what is left out while a source is read."""

    def __init__(self) -> None:
        self._found: dict[str, Skipped] = {}

    def add(self, reason: str, example: str, count: int = 1) -> None:
        """Count examples left out; ``example`` says where one of them stands and what it is."""
        known = self._found.get(reason)
        self._found[reason] = Skipped(
            reason, count + (known.count if known else 0), known.first if known else example
        )

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """Every reason so far."""
        return tuple(self._found.values())

    def first(self) -> str:
        """What was left out first; empty if nothing was."""
        return next((each.first for each in self._found.values()), "")


@dataclass(frozen=True)
class Dataset:
    """Labelled examples, one per row of every array.

    Attributes:
        inputs: the model's inputs ``x0`` …, each of shape ``(examples, ...)``.
        targets: shape ``(examples, ...)``; None for a model that learns to give its own input back.
        arrived: int64, shape ``(examples,)``: when each example came, in the source's own count, which only
            grows: its place among all that ever came, or a file's time in nanoseconds. None: 1, 2, 3 …
        skipped: what was left out.
        span: of windows that overlap: two whose ``arrived`` differ by less share readings; 0: none do.

    Raises:
        ValueError: no inputs, or arrays of different lengths.
    """

    inputs: tuple[Array, ...]
    targets: Array | None = None
    arrived: npt.NDArray[np.int64] | None = None
    skipped: tuple[Skipped, ...] = ()
    span: int = 0

    def __post_init__(self) -> None:
        marks = () if self.arrived is None else (self.arrived,)
        lengths = {len(array) for array in (*self.arrays, *marks)}
        if not self.inputs or len(lengths) != 1:
            raise ValueError(f"a dataset needs arrays of one length, not {sorted(lengths)}")

    @property
    def arrays(self) -> tuple[Array, ...]:
        """The inputs, then the targets if there are any."""
        return self.inputs if self.targets is None else (*self.inputs, self.targets)

    def __len__(self) -> int:
        return len(self.inputs[0])

    def rows(self, rows: npt.NDArray[np.intp] | slice) -> "Dataset":
        """The examples at these positions; views for a slice."""
        return Dataset(
            tuple(array[rows] for array in self.inputs), None if self.targets is None else self.targets[rows]
        )

    @property
    def newest(self) -> int:
        """When the newest example came, in the source's count; 0 without any."""
        if self.arrived is None or not len(self):
            return len(self)
        return int(self.arrived.max())

    def new_since(self, mark: int) -> int:
        """How many examples came after ``mark``, the ``newest`` of an earlier dataset of the same source.

        A source whose count begins anew, such as a file that was written again and is shorter, has only new
        examples.
        """
        if mark > self.newest:
            return len(self)
        if self.arrived is None:
            return len(self) - mark
        return int(np.count_nonzero(self.arrived > mark))
