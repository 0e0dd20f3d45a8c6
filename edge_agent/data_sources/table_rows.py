"""Reading a table row by row: what each column means, and what becomes of a row that is no use."""

import csv
import math
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Final, TextIO

import numpy as np
import numpy.typing as npt

from edge_agent.dataset import Array, SkipTally
from edge_agent.values import LARGEST, MISSING, NOT_WHOLE, UNKNOWN_CLASS, BadValue, Scale, number_of

UNREADABLE_ROW: Final = "not readable as a row"
TOO_LONG: Final = "more values than columns"
_ROWS_PER_CHUNK: Final = 4096


@dataclass(frozen=True)
class Feature:
    """One column of the input.

    Attributes:
        name: of the column.
        position: of the column, from 0.
        decimal: in its numbers.
        scale: of its numbers.
        categories: the texts it may have; empty: it is numbers.
    """

    name: str
    position: int
    decimal: str
    scale: Scale
    categories: tuple[str, ...]

    @property
    def width(self) -> int:
        """How many inputs it becomes."""
        return len(self.categories) or 1

    @property
    def is_text(self) -> bool:
        """Whether it is no column of numbers."""
        return bool(self.categories)

    def values(self, text: str) -> Iterable[float]:
        """The inputs that a cell becomes, not scaled.

        Raises:
            BadValue: it is no number, or another text.
        """
        if not self.categories:
            return (number_of(text.replace(self.decimal, ".")),)
        if text not in self.categories:
            raise BadValue.of(text, UNKNOWN_CLASS)
        return (float(text == category) for category in self.categories)


@dataclass(frozen=True)
class Label:
    """The column of targets.

    Attributes:
        name: of the column.
        position: of the column, from 0.
        decimal: in its numbers.
        scale: of its numbers.
        classes: its texts, where it is one.
        whole: whether its numbers must be whole.
    """

    name: str
    position: int
    decimal: str
    scale: Scale
    classes: tuple[str, ...]
    whole: bool

    @property
    def is_text(self) -> bool:
        """Whether it is no column of numbers."""
        return bool(self.classes)

    def value(self, text: str) -> float:
        """The target that a cell becomes, not scaled.

        Raises:
            BadValue: it is no number, not whole, or another text.
        """
        if self.classes:
            if text not in self.classes:
                raise BadValue.of(text, UNKNOWN_CLASS)
            return float(self.classes.index(text))
        number = number_of(text.replace(self.decimal, "."))
        if self.whole and not number.is_integer():
            raise BadValue.of(text, NOT_WHOLE)
        return number


@dataclass(frozen=True)
class Columns:
    """What is read of a row.

    Attributes:
        count: of all columns of the table.
        features: the input.
        label: the targets, if they are read.
        group: name and position of the column at whose changes windows break.
    """

    count: int
    features: tuple[Feature, ...]
    label: Label | None
    group: tuple[str, int] | None

    @property
    def width(self) -> int:
        """How many inputs a row becomes."""
        return sum(feature.width for feature in self.features)

    @property
    def scales(self) -> tuple[Array, Array]:
        """Mean and deviation of each value of a row, the label the last."""
        each = [feature.scale for feature in self.features for _ in range(feature.width)]
        each.append(self.label.scale if self.label else Scale())
        return np.array([scale.mean for scale in each]), np.array([scale.deviation for scale in each])

    @cached_property
    def plain(self) -> tuple[int, ...] | None:
        """Where the numbers stand, if there is nothing else to read."""
        columns = (*self.features, *((self.label,) if self.label else ()))
        if any(column.is_text or column.decimal != "." for column in columns) or not columns:
            return None
        return tuple(column.position for column in columns)

    def values(self, row: list[str]) -> list[float]:
        """The features' values, then the label's, NaN without one.

        Raises:
            BadValue: naming the column.
        """
        if len(row) > self.count:
            raise BadValue(TOO_LONG)
        return self._numbers(row) or self._one_by_one(row)

    def _numbers(self, row: list[str]) -> list[float] | None:
        """The same several times faster, for a row of nothing but good numbers; None for any other."""
        if self.plain is None:
            return None
        try:
            cells = [row[position] for position in self.plain]
            values = [float(cell) for cell in cells]
        except (ValueError, IndexError):
            return None
        total = sum(values)
        good = total == total and min(values) >= -LARGEST and max(values) <= LARGEST  # noqa: PLR0124 - no NaN
        if not good or "_" in "".join(cells):
            return None
        if self.label is None:
            values.append(math.nan)
        elif self.label.whole and not values[-1].is_integer():
            return None
        return values

    def _one_by_one(self, row: list[str]) -> list[float]:
        values: list[float] = []
        column: Feature | Label | None = None
        try:
            for column in self.features:
                values.extend(column.values(_cell(row, column.position)))
            column = self.label
            values.append(column.value(_cell(row, column.position)) if column else math.nan)
        except BadValue as bad:
            name = column.name if column else ""
            raise bad.at(f"column {name!r}") from None
        return values


def _cell(row: list[str], position: int) -> str:
    if position >= len(row):
        raise BadValue(MISSING)
    return row[position].strip()


@dataclass(frozen=True)
class Chunk:
    """Good rows one after the other.

    Attributes:
        features: scaled, shape ``(rows, columns)``.
        labels: float64, shape ``(rows,)``; NaN without any.
        runs: int64, shape ``(rows,)``: another number wherever a window may not go on.
    """

    features: Array
    labels: Array
    runs: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.runs)


class Rows:
    """The newest good rows, as many as memory may hold.

    Args:
        columns: what is read of a row.
        dtype: of the features.
        max_bytes: of features and labels, at four bytes each.
    """

    def __init__(self, columns: Columns, dtype: str, max_bytes: int) -> None:
        self._columns = columns
        self._dtype = dtype
        self._width = columns.width + 1
        self._most = max(1, max_bytes // (4 * self._width))
        self._values = array("d")
        self._runs = array("q")
        self._chunks: deque[Chunk] = deque()
        self.total = 0

    def take(self, lines: "Lines", tally: SkipTally) -> None:
        """Take every row, and count those that are bad."""
        run = 0
        group: str | None = None
        for row in lines:
            if row is None:
                run += 1
                continue
            try:
                values, here = self._columns.values(row), self._group(row)
            except BadValue as bad:
                tally.add(bad.reason, f"line {lines.number}, {bad}")
                run += 1
                continue
            run += here != group
            group = here
            self._values.extend(values)
            self._runs.append(run)
            if len(self._runs) >= _ROWS_PER_CHUNK:
                self._close_chunk()

    def newest(self) -> Chunk:
        """All that are held."""
        self._close_chunk()
        last = slice(-self._most, None)
        return Chunk(
            np.concatenate([chunk.features for chunk in self._chunks])[last],
            np.concatenate([chunk.labels for chunk in self._chunks])[last],
            np.concatenate([chunk.runs for chunk in self._chunks])[last],
        )

    def _close_chunk(self) -> None:
        table = np.array(self._values, np.float64).reshape(-1, self._width)
        means, deviations = self._columns.scales
        with np.errstate(over="ignore"):  # found out when the examples are fitted
            table = (table - means) / deviations
            features = table[:, :-1].astype(self._dtype)
        self._chunks.append(Chunk(features, table[:, -1].copy(), np.array(self._runs, np.int64)))
        self.total += len(self._runs)
        del self._values[:], self._runs[:]
        while sum(map(len, self._chunks)) - len(self._chunks[0]) >= self._most:
            self._chunks.popleft()

    def _group(self, row: list[str]) -> str | None:
        if self._columns.group is None:
            return None
        name, position = self._columns.group
        if position >= len(row) or not row[position].strip():
            raise BadValue(MISSING).at(f"column {name!r}")
        return row[position].strip()


class Lines:
    """The rows of a file, None for one that cannot be read as a row."""

    def __init__(self, file: TextIO, delimiter: str, tally: SkipTally) -> None:
        self._rows = csv.reader(file, delimiter=delimiter)
        self._tally = tally
        self.header = tuple(name.strip() for name in next(self._rows, []))

    @property
    def number(self) -> int:
        """Of the line read last, from 1."""
        return self._rows.line_num

    def __iter__(self) -> Iterator[list[str] | None]:
        while True:
            try:
                row = next(self._rows)
            except StopIteration:
                return
            except csv.Error as error:  # the reader goes on with the next line
                self._tally.add(UNREADABLE_ROW, f"line {self.number}: {error}")
                yield None
            else:
                if row:
                    yield row
