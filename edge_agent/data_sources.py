"""Data sources: where a device's examples come from. One class a kind, chosen by ``kind`` in agent.toml.

Adding one means a class here and its place in ``DataSource``; the shared tests pick it up.
"""

import csv
import zipfile
import zlib
from pathlib import Path
from typing import Annotated, Any, Final, TypeAlias

import msgspec
import numpy as np
from msgspec import Meta

from edge_agent.dataset import Array, Dataset
from fedtide.wire.parameters import TensorSpec
from fedtide.wire.plan import PlanManifest

# What numpy, zipfile and csv raise for files that are cut, damaged or something else altogether.
_UNREADABLE: Final = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    EOFError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
    csv.Error,
)


class DataError(Exception):
    """Examples that cannot be read or do not fit the plan; the text says which and what is needed."""


class _Source(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind"):
    """What every data source has.

    Attributes:
        path: the file.
    """

    path: Path

    def load(self, manifest: PlanManifest) -> Dataset:
        """Read all examples, with the plan's dtypes and shapes.

        Raises:
            DataError: no such file, or examples that do not fit.
        """
        try:
            arrays, targets = self._read(manifest)
            if len(arrays) != len(manifest.inputs):
                raise ValueError(f"the plan takes {len(manifest.inputs)} inputs, not {len(arrays)}")
            inputs = tuple(
                _fitted(array, wanted) for array, wanted in zip(arrays, manifest.inputs, strict=True)
            )
            wanted = manifest.targets
            return Dataset(inputs, _fitted(targets, wanted) if wanted and targets is not None else None)
        except _UNREADABLE as error:
            raise DataError(f"{self.path}: {error}") from error

    def changed_since(self, stamp: tuple[int, int] | None) -> tuple[int, int] | None:
        """A stamp of the file if it is another than ``stamp``; None if nothing changed.

        Raises:
            DataError: no such file.
        """
        try:
            status = self.path.stat()
        except OSError as error:
            raise DataError(f"{self.path}: {error}") from error
        now = (status.st_mtime_ns, status.st_size)
        return None if now == stamp else now

    def _read(self, manifest: PlanManifest) -> tuple[list[Array], Array | None]:
        raise NotImplementedError


class Npz(_Source, frozen=True, tag="npz"):
    """A numpy archive.

    Attributes:
        inputs: names of the arrays that are the model's inputs, in order.
        targets: name of the array of targets.
    """

    inputs: Annotated[tuple[str, ...], Meta(min_length=1)] = ("x",)
    targets: str = "y"

    def _read(self, manifest: PlanManifest) -> tuple[list[Array], Array | None]:
        with self.path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            names = (*self.inputs, *((self.targets,) if manifest.targets else ()))
            missing = [name for name in names if name not in archive]
            if missing:
                raise ValueError(f"no array {missing[0]!r}; the archive has {', '.join(archive.files)}")
            targets = archive[self.targets] if manifest.targets else None
            return [archive[name] for name in self.inputs], targets


class Csv(_Source, frozen=True, tag="csv"):
    """A table with a header line, one example a row.

    Attributes:
        label: the column of targets.
        features: the columns that are the input, in order; empty: all others.
        delimiter: between columns.
    """

    label: str = "label"
    features: tuple[str, ...] = ()
    delimiter: Annotated[str, Meta(min_length=1, max_length=1)] = ","

    def _read(self, manifest: PlanManifest) -> tuple[list[Array], Array | None]:
        with self.path.open(newline="") as file:
            rows = csv.DictReader(file, delimiter=self.delimiter)
            columns = list(rows.fieldnames or ())
            features = self.features or tuple(name for name in columns if name != self.label)
            wanted = (*features, *((self.label,) if manifest.targets else ()))
            missing = [name for name in wanted if name not in columns]
            if missing:
                raise ValueError(f"no column {missing[0]!r}; the table has {', '.join(columns)}")
            values = [[_number(row[name], name, rows.line_num) for name in wanted] for row in rows]
        table = np.array(values, np.float64).reshape(len(values), len(wanted))
        shape = [axis or 1 for axis in manifest.inputs[0].shape[1:]]
        if len(features) != manifest.inputs[0].size:
            raise ValueError(f"{len(features)} columns of features; the plan takes {manifest.inputs[0].size}")
        inputs = table[:, : len(features)].reshape(len(table), *shape)
        return [inputs], table[:, -1] if manifest.targets else None


DataSource: TypeAlias = Npz | Csv
"""Every data source: the one table of choices. Decode settings into this type."""


def _number(text: str | None, column: str, line: int) -> float:
    try:
        return float(text or "")
    except ValueError:
        raise ValueError(f"line {line}, column {column!r}: {text!r} is not a number") from None


def _fitted(values: Any, wanted: TensorSpec) -> Array:
    """The values with the plan's dtype, if their shape fits and nothing is lost or infinite.

    Raises:
        ValueError: they do not fit; the text says why.
    """
    array = np.asarray(values)
    if array.dtype.kind not in "biuf" or array.ndim == 0:
        raise ValueError(f"{wanted.name!r} is {array.dtype} {array.shape}; it must be an array of numbers")
    if list(array.shape[1:]) != list(wanted.shape[1:]):
        raise ValueError(
            f"examples for {wanted.name!r} have shape {array.shape[1:]}; "
            f"the plan takes {tuple(wanted.shape[1:])}"
        )
    if len(array) == 0:
        raise ValueError(f"no examples for {wanted.name!r}; at least 1 is needed")
    with np.errstate(over="ignore", invalid="ignore"):  # both are found out below
        fitted = array.astype(wanted.dtype)
    if fitted.dtype.kind == "f" and not np.isfinite(fitted).all():
        raise ValueError(f"NaN or infinite values for {wanted.name!r}")
    if fitted.dtype.kind in "iu" and not np.array_equal(fitted, array):
        raise ValueError(f"{wanted.name!r} must be whole numbers")
    return np.ascontiguousarray(fitted)
