"""Examples in a table: comma-separated values, one example a row, or a window of consecutive rows."""

from collections.abc import Iterable
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from msgspec import Meta

from edge_agent.data_sources.base import Bytes, Count, FileSource
from edge_agent.data_sources.fitting import Arrays, fitted
from edge_agent.data_sources.table_rows import Columns, Feature, Label, Lines, Rows
from edge_agent.dataset import Array, Dataset, SkipTally
from edge_agent.values import Scale
from edge_agent.windows import cut, majority, oriented, window_starts
from fedtide.wire.parameters import TensorSpec
from fedtide.wire.plan import PlanManifest


class Csv(FileSource, frozen=True, tag="csv"):
    """A table with a header line. A row with a bad value is skipped, and a window never spans it.

    Attributes:
        label: the column of targets.
        features: the columns that are the input, in order; empty: all others.
        delimiter: between columns.
        decimal: in numbers.
        classes: the label column is text, and these texts are the classes 0, 1, 2 …; empty: it is numbers.
        categories: columns of text, each with the texts it may have; it becomes one input per text, 1 or 0.
        scale: of columns of numbers, the label's too, by name; others are taken as they are.
        window: rows per window; None: every row is an example.
        stride: rows from the start of one window to the start of the next; None: as many as a window has.
        group: a column at whose changes windows break, such as a session or a person.
        window_label: a window's label is its last row's, or the most frequent one, the smallest of equals.
        channels_first: the order of a window's axes, where the plan's shape does not tell.
        max_bytes: of examples held in memory, at four bytes a value; the newest are taken.
    """

    label: str = "label"
    features: tuple[str, ...] = ()
    delimiter: Annotated[str, Meta(min_length=1, max_length=1)] = ","
    decimal: Literal[".", ","] = "."
    classes: tuple[str, ...] = ()
    categories: dict[str, Annotated[tuple[str, ...], Meta(min_length=1)]] = {}
    scale: dict[str, Scale] = {}
    window: Count | None = None
    stride: Count | None = None
    group: str | None = None
    window_label: Literal["last", "majority"] = "last"
    channels_first: bool | None = None
    max_bytes: Bytes = 32 << 20

    def __post_init__(self) -> None:
        if self.delimiter == self.decimal:
            raise ValueError(f"delimiter and decimal are both {self.decimal!r}")
        if self.stride is not None and self.window is None:
            raise ValueError("stride needs window, the number of rows per window")
        twice = set(self.scale) & set(self.categories)
        if twice:
            raise ValueError(f"column {min(twice)!r} is in both scale and categories")
        if self.features:
            self._check_typed(self.features)

    def _read(self, manifest: PlanManifest) -> Dataset:
        tally = SkipTally()
        with self.path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
            lines = Lines(file, self.delimiter, tally)
            columns = self._columns(lines.header, manifest)
            dtype = "float32" if manifest.inputs[0].dtype == "float32" else "float64"
            rows = Rows(columns, dtype, self.max_bytes)
            rows.take(lines, tally)
        newest = rows.newest()
        if not rows.total and tally.first():
            raise ValueError(f"no good row: {tally.first()}")
        shape = tuple(axis or 1 for axis in manifest.inputs[0].shape[1:])
        arrived = np.arange(rows.total - len(newest), rows.total, dtype=np.int64) + 1
        labels, span = newest.labels, 0
        if self.window is None:
            if columns.width != manifest.inputs[0].size:
                raise ValueError(
                    f"{columns.width} columns of features; the plan takes {manifest.inputs[0].size}"
                )
            inputs = newest.features.reshape(len(newest), *shape)
        else:
            starts = self._starts(newest.runs, rows.total - len(newest), columns.width)
            windows = cut(newest.features, starts, self.window)
            inputs = oriented(windows, shape, channels_first=self.channels_first)
            labels = self._window_labels(labels, starts) if manifest.targets else labels[starts]
            arrived = arrived[starts + self.window - 1]
            span = self.window if self.stride and self.stride < self.window else 0
        targets = _as_targets(labels, manifest.targets) if manifest.targets else None
        return fitted(Arrays([inputs], targets, arrived, tally.skipped, span), manifest)

    def _starts(self, runs: npt.NDArray[np.int64], before: int, width: int) -> npt.NDArray[np.int64]:
        """Where windows start in rows of which as many came ``before`` and are not held any more."""
        length = self.window or 1
        stride = self.stride or length
        # The first run may have lost its begin. Its windows start at multiples of the stride all the same: at
        # other rows with every row lost, they would share readings with windows that were held out before.
        passed_over = min(-before % stride, int(np.count_nonzero(runs == runs[:1])))
        starts = window_starts(runs[passed_over:], length, stride) + passed_over
        if not len(starts):
            longest = int(np.unique(runs, return_counts=True)[1].max(initial=0))
            raise ValueError(f"a window has {length} rows; at most {longest} good rows follow one another")
        return starts[-max(1, self.max_bytes // (4 * length * width)) :]

    def _window_labels(self, labels: Array, starts: npt.NDArray[np.int64]) -> Array:
        of_windows = cut(labels, starts, self.window or 1)
        last: Array = of_windows[:, -1]
        return last if self.window_label == "last" else majority(of_windows)

    def _check_typed(self, features: tuple[str, ...]) -> None:
        _check_known(self.categories, features, "features are")
        _check_known(self.scale, (*features, self.label), "features and the label are")

    def _columns(self, header: tuple[str, ...], manifest: PlanManifest) -> Columns:
        """Where everything stands.

        Raises:
            ValueError: a column that is not there, or twice.
        """
        apart = {self.label, self.group}
        features = self.features or tuple(name for name in header if name not in apart)
        label = (self.label,) if manifest.targets else ()
        group = (self.group,) if self.group is not None else ()
        _check_known((*features, *label, *group), header, "table has")
        self._check_typed(features)
        inputs = tuple(self._feature(name, header) for name in features)
        whole = manifest.targets is not None and np.dtype(manifest.targets.dtype).kind in "iu"
        target = None
        if label:
            scale = self.scale.get(self.label, Scale())
            target = Label(self.label, header.index(self.label), self.decimal, scale, self.classes, whole)
        place = None if self.group is None else (self.group, header.index(self.group))
        return Columns(len(header), inputs, target, place)

    def _feature(self, name: str, header: tuple[str, ...]) -> Feature:
        scale, categories = self.scale.get(name, Scale()), self.categories.get(name, ())
        return Feature(name, header.index(name), self.decimal, scale, categories)


def _check_known(names: Iterable[str], columns: tuple[str, ...], what: str) -> None:
    for name in names:
        if name not in columns:
            raise ValueError(f"no column {name!r}; the {what} {', '.join(columns)}")
        if columns.count(name) > 1:
            raise ValueError(f"column {name!r} is there {columns.count(name)} times")


def _as_targets(labels: Array, wanted: TensorSpec) -> Array:
    rest = wanted.shape[1:]
    return labels.reshape(len(labels), *(1 for _ in rest)) if all(axis == 1 for axis in rest) else labels
