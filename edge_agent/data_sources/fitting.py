"""Making the arrays of any source fit a plan: dtypes, shapes, no value that would poison a model. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_agent.dataset import Array, Dataset, Skipped, SkipTally
from edge_agent.values import NOT_FINITE, NOT_WHOLE
from fedtide.wire.parameters import TensorSpec
from fedtide.wire.plan import PlanManifest


@dataclass(frozen=True)
class Arrays:
    """Examples as a source read them.

    Attributes:
        inputs: the model's inputs, each of shape ``(examples, ...)``, of any real dtype.
        targets: shape ``(examples, ...)``; None without labels.
        arrived: see :class:`~edge_agent.dataset.Dataset`.
        skipped: what was left out already.
        span: of windows that overlap; see :class:`~edge_agent.dataset.Dataset`.
    """

    inputs: Sequence[Any]
    targets: Any = None
    arrived: npt.NDArray[np.int64] | None = None
    skipped: tuple[Skipped, ...] = ()
    span: int = 0


def fitted(arrays: Arrays, manifest: PlanManifest, *, may_be_empty: bool = False) -> Dataset:
    """The examples with the plan's dtypes, without those that do not survive them.

    An example is skipped when a value is NaN, infinite, too large for its dtype, or not whole where the plan
    takes whole numbers. Targets are left out where the plan takes none.

    Args:
        arrays: as read.
        manifest: the plan's.
        may_be_empty: of a source that is yet to grow.

    Raises:
        ValueError: the number, shape or kind of the arrays is another than the plan's, or no example is good.
    """
    if len(arrays.inputs) != len(manifest.inputs):
        raise ValueError(f"the plan takes {len(manifest.inputs)} inputs, not {len(arrays.inputs)}")
    if manifest.targets is not None and arrays.targets is None:
        raise ValueError(f"there are no labels for {manifest.targets.name!r}; the plan needs them")
    pairs = list(zip(arrays.inputs, manifest.inputs, strict=True))
    if manifest.targets is not None:
        pairs.append((arrays.targets, manifest.targets))
    columns = [_shaped(values, wanted) for values, wanted in pairs]
    lengths = {len(column) for column in columns}
    if len(lengths) != 1:
        raise ValueError(f"a dataset needs arrays of one length, not {sorted(lengths)}")
    tally = SkipTally()
    good = np.ones(len(columns[0]), np.bool_)
    cast = []
    for column, (_, wanted) in zip(columns, pairs, strict=True):
        values, whole, reason = _cast(column, wanted)
        _count(tally, reason, good & ~whole)
        good &= whole
        cast.append(values)
    if not good.any() and not (may_be_empty and not len(good)):
        raise ValueError(
            f"no good example: {tally.first()}"
            if len(good)
            else f"no examples for {manifest.inputs[0].name!r}; at least 1 is needed"
        )
    kept = cast if good.all() else [values[good] for values in cast]
    inputs = tuple(np.ascontiguousarray(values) for values in kept[: len(manifest.inputs)])
    return Dataset(
        inputs,
        np.ascontiguousarray(kept[-1]) if manifest.targets is not None else None,
        None if arrays.arrived is None else arrays.arrived[good],
        (*arrays.skipped, *tally.skipped),
        arrays.span,
    )


def _shaped(values: Any, wanted: TensorSpec) -> Array:
    array = np.asarray(values)
    if array.dtype.kind not in "biuf" or array.ndim == 0:
        raise ValueError(f"{wanted.name!r} is {array.dtype} {array.shape}; it must be an array of numbers")
    if list(array.shape[1:]) != list(wanted.shape[1:]):
        raise ValueError(
            f"examples for {wanted.name!r} have shape {array.shape[1:]}; "
            f"the plan takes {tuple(wanted.shape[1:])}"
        )
    return array


def _cast(array: Array, wanted: TensorSpec) -> tuple[Array, npt.NDArray[np.bool_], str]:
    """The values in the plan's dtype, which rows survived, and what is wrong with the others."""
    with np.errstate(over="ignore", invalid="ignore"):  # both are found out below
        values = array.astype(wanted.dtype, copy=False)
    if values.dtype.kind == "f":
        return values, _rows(np.isfinite(values)), f"{NOT_FINITE} in {wanted.name!r}"
    with np.errstate(invalid="ignore"):
        same = values == array
    return values, _rows(same), f"{NOT_WHOLE} in {wanted.name!r}"


def _rows(good: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    return np.asarray(good.all(axis=tuple(range(1, good.ndim))))


def _count(tally: SkipTally, reason: str, bad: npt.NDArray[np.bool_]) -> None:
    if bad.any():
        tally.add(reason, f"example {int(np.argmax(bad)) + 1}: {reason}", int(np.count_nonzero(bad)))
