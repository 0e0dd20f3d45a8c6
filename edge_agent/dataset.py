"""A device's examples in memory."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Dataset:
    """Labelled examples, one per row of every array.

    Attributes:
        inputs: the model's inputs ``x0`` …, each of shape ``(examples, ...)``.
        targets: shape ``(examples, ...)``; None for a model that learns to give its own input back.

    Raises:
        ValueError: no inputs, or arrays of different lengths.
    """

    inputs: tuple[Array, ...]
    targets: Array | None = None

    def __post_init__(self) -> None:
        lengths = {len(array) for array in self.arrays}
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
