"""Examples in one numpy archive."""

from typing import Annotated

import numpy as np
from msgspec import Meta

from edge_agent.data_sources.base import FileSource
from edge_agent.data_sources.fitting import Arrays, fitted
from edge_agent.dataset import Dataset
from fedtide.wire.plan import PlanManifest


class Npz(FileSource, frozen=True, tag="npz"):
    """A numpy archive.

    Attributes:
        inputs: names of the arrays that are the model's inputs, in order.
        targets: name of the array of targets.
    """

    inputs: Annotated[tuple[str, ...], Meta(min_length=1)] = ("x",)
    targets: str = "y"

    def _read(self, manifest: PlanManifest) -> Dataset:
        with self.path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            names = (*self.inputs, *((self.targets,) if manifest.targets else ()))
            missing = [name for name in names if name not in archive]
            if missing:
                raise ValueError(f"no array {missing[0]!r}; the archive has {', '.join(archive.files)}")
            targets = archive[self.targets] if manifest.targets else None
            arrays = Arrays([archive[name] for name in self.inputs], targets)
        return fitted(arrays, manifest)
