"""A folder of windows that other programs add to."""

import contextlib
import zipfile
from collections.abc import Hashable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Final

import numpy as np
from msgspec import Meta

from edge_agent.data_sources.base import Bytes, Count, FileSource
from edge_agent.data_sources.fitting import Arrays, fitted
from edge_agent.dataset import Array, Dataset, SkipTally
from fedtide.wire.parameters import TensorSpec
from fedtide.wire.plan import PlanManifest

UNREADABLE_FILE: Final = "file that cannot be read or does not fit"
_SUFFIXES: Final = (".npy", ".npz")


class Windows(FileSource, frozen=True, tag="windows"):
    """A folder of ``.npy`` and ``.npz`` files, each a window or a batch of windows; the newest are taken.

    Whoever adds a file writes it under another name and renames it, so that none is seen half written. A file
    that is damaged or does not fit is skipped. While the folder is empty, the device waits.

    Attributes:
        inputs: names of an archive's arrays that are the model's inputs, in order.
        targets: name of its array of targets; not needed by a model that gives back its input.
        max_bytes: of files read, unpacked.
        max_examples: read at most; None: no limit but ``max_bytes``.
        remove_older: remove the files beyond these limits, so that the folder stays bounded.
    """

    inputs: Annotated[tuple[str, ...], Meta(min_length=1)] = ("x",)
    targets: str = "y"
    max_bytes: Bytes = 32 << 20
    max_examples: Count | None = None
    remove_older: bool = False

    def __post_init__(self) -> None:
        needed = max(self.min_examples, self.min_new_examples)
        if self.max_examples is not None and self.max_examples < needed:
            raise ValueError(f"max_examples is {self.max_examples}, and {needed} are needed to train")

    def _stamp(self) -> Hashable:
        files = _newest_first(self.path)
        return len(files), sum(file.bytes for file in files), files[0].written_ns if files else 0

    def _read(self, manifest: PlanManifest) -> Dataset:
        tally = SkipTally()
        parts: list[Dataset] = []
        examples = taken_bytes = 0
        files = _newest_first(self.path)
        for index, file in enumerate(files):
            try:
                size = _unpacked_bytes(file.path)
                if size > self.max_bytes:
                    raise ValueError(f"{size:,} bytes; max_bytes is {self.max_bytes:,}")  # noqa: TRY301
                if examples >= (self.max_examples or np.inf) or taken_bytes + size > self.max_bytes:
                    self._remove(files[index:])
                    break
                part = self._part(file, manifest)
            except Exception as error:  # noqa: BLE001 - whatever numpy and zipfile make of damaged bytes
                tally.add(UNREADABLE_FILE, f"{file.path.name}: {error}")
                continue
            for skip in part.skipped:
                tally.add(skip.reason, f"{file.path.name}: {skip.first}", skip.count)
            parts.append(part)
            examples += len(part)
            taken_bytes += size
        if not parts and tally.first():
            raise ValueError(f"no good file: {tally.first()}")
        return _joined(parts[::-1], manifest, self.max_examples, tally)

    def _part(self, file: "_File", manifest: PlanManifest) -> Dataset:
        loaded = np.load(file.path, allow_pickle=False)
        targets = None
        if isinstance(loaded, np.ndarray):
            inputs = [loaded]
        else:
            with loaded as archive:
                inputs = [archive[name] for name in self.inputs]
                targets = archive[self.targets] if manifest.targets is not None else None
        if len(inputs) != len(manifest.inputs):
            raise ValueError(f"the plan takes {len(manifest.inputs)} inputs, not {len(inputs)}")
        batches = [_batch(array, wanted) for array, wanted in zip(inputs, manifest.inputs, strict=True)]
        if targets is not None and manifest.targets is not None:
            targets = _batch(targets, manifest.targets)
        dataset = fitted(Arrays(batches, targets), manifest)
        return replace(dataset, arrived=np.full(len(dataset), file.written_ns, np.int64))

    def _remove(self, files: list["_File"]) -> None:
        if self.remove_older:
            for file in files:
                with contextlib.suppress(OSError):
                    file.path.unlink()


@dataclass(frozen=True)
class _File:
    """One file of the folder."""

    path: Path
    bytes: int
    written_ns: int


def _newest_first(folder: Path) -> list[_File]:
    found = []
    for path in folder.iterdir():
        if path.suffix in _SUFFIXES and not path.name.startswith("."):
            with contextlib.suppress(FileNotFoundError):  # removed in between
                status = path.stat()
                found.append(_File(path, status.st_size, status.st_mtime_ns))
    return sorted(found, key=lambda file: (file.written_ns, file.path.name), reverse=True)


def _unpacked_bytes(path: Path) -> int:
    if path.suffix == ".npy":
        return path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        return sum(each.file_size for each in archive.infolist())


def _batch(array: Array, wanted: TensorSpec) -> Array:
    """A single example as a batch of one."""
    return array[np.newaxis] if array.ndim == len(wanted.shape) - 1 else array


def _joined(parts: list[Dataset], manifest: PlanManifest, most: int | None, tally: SkipTally) -> Dataset:
    """All parts, oldest first, the newest ``most`` of their examples."""
    if not parts:
        parts = [_nothing(manifest)]
    newest = slice(-most if most else None, None)
    targets = [part.targets for part in parts if part.targets is not None]
    return Dataset(
        tuple(
            np.concatenate([part.inputs[index] for part in parts])[newest]
            for index in range(len(manifest.inputs))
        ),
        np.concatenate(targets)[newest] if targets else None,
        np.concatenate([part.arrived for part in parts if part.arrived is not None])[newest],
        tally.skipped,
    )


def _nothing(manifest: PlanManifest) -> Dataset:
    wanted = (*manifest.inputs, *((manifest.targets,) if manifest.targets else ()))
    arrays = [np.zeros((0, *(axis or 0 for axis in tensor.shape[1:])), tensor.dtype) for tensor in wanted]
    count = len(manifest.inputs)
    targets = arrays[count] if manifest.targets else None
    return Dataset(tuple(arrays[:count]), targets, np.zeros(0, np.int64))
