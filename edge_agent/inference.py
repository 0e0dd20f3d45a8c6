"""Local inference: the released model on this device, while or while not the agent runs.

>>> model = LocalModel.open("pump-7/agent.toml")        # doctest: +SKIP
>>> model.version, model.predict(x).argmax(axis=1)      # doctest: +SKIP

It only reads the agent's files, which the agent replaces in one step, and checks them again: the
coordinator's signature, the plan, the parameters' fingerprint.
"""

from pathlib import Path
from typing import Any, Final, Self

import numpy as np

from edge_agent.dataset import Array
from edge_agent.kept_state import KeptFile, with_own_statistics
from edge_agent.model_slots import InstalledModel, ModelSlots, ReleasedModel
from edge_agent.plan_runtime import Evaluator
from edge_agent.settings import KEPT_FILE, MODELS_DIRECTORY, AgentSettings
from fedtide.wire.ids import ModelVersion
from fedtide.wire.parameters import TensorSpec, Vector
from fedtide.wire.plan import PlanManifest
from fedtide.wire.settings import load
from fedtide.wire.signatures import PublicKey

_BATCH: Final = 256
_LOADS: Final = 3
"""The agent may replace the model and remove its plan between the two being read."""


class NoModel(Exception):
    """There is no model for inference on this device; the text says why and what would help."""


class LocalModel:
    """The released model of a device, ready to run. Not for several threads at once.

    Made by :meth:`open`.

    Attributes:
        version: the model version in use.
        gate: what it had to pass to be released, for people; empty where the coordinator sets no gate, None
            for a version that is not released.
        manifest: of the training plan: inputs, targets, metric.
        parameters: float32, shape ``(manifest.schema.size,)``; with the device's own statistics, where the
            plan leaves them to the devices.
    """

    version: ModelVersion
    gate: str | None
    manifest: PlanManifest
    parameters: Vector

    def __init__(self, state: Path, key: PublicKey, *, newest: bool = False, threads: int = 1) -> None:
        self._directory = state / MODELS_DIRECTORY
        self._kept_file = state / KEPT_FILE
        self._key = key
        self._newest = newest
        self._threads = threads
        model, stamp = self._load()
        self._evaluator = Evaluator(model.plan, threads)
        self._take(model, stamp)

    @classmethod
    def open(
        cls,
        place: Path | str,
        key: PublicKey | str | None = None,
        *,
        newest: bool = False,
        threads: int = 1,
    ) -> Self:
        """The model that a device holds.

        Args:
            place: the agent's ``agent.toml``, or its state directory.
            key: the coordinator's public key, 64 hexadecimal digits; only with a state directory.
            newest: the newest version installed, whether it is released or not.
            threads: of one run.

        Raises:
            NoModel: there is none, or none is released.
            SettingsError: ``agent.toml`` cannot be used.
            PlanRefused: the device will not run the plan.
            ValueError: a state directory without a key, or a key that is none.
        """
        path = Path(place)
        if path.is_dir():
            if key is None:
                raise ValueError(f"{path} is a directory: give the coordinator's key too, or its agent.toml")
            trusted = PublicKey.parse(key) if isinstance(key, str) else key
            return cls(path, trusted, newest=newest, threads=threads)
        settings = load(path, AgentSettings)
        trusted = PublicKey.parse(settings.coordinator_key)
        return cls(settings.state, trusted, newest=newest, threads=threads)

    @property
    def description(self) -> str:
        """Which model this is, for people."""
        name = f"version {self.version} of {self.manifest.name!r}"
        if self.gate is None:
            return f"{name}, the newest installed; it is not the released one"
        return f"{name}, released: {self.gate}" if self.gate else f"{name}; no release gate is set"

    def refresh(self) -> bool:
        """Take the model that is released now; True if it is another. Cheap where nothing has changed.

        Should the files have become unusable, the model in use stays.

        Raises:
            PlanRefused: the device will not run the new plan.
        """
        if self._stamp == self._stamp_now():
            return False
        before = self.version, self.parameters
        try:
            self._take(*self._load())
        except NoModel:
            return False
        return before[0] != self.version or not np.array_equal(before[1], self.parameters)

    def predict(self, *inputs: Any) -> Array:
        """The model's outputs.

        Args:
            inputs: ``x0`` … of the plan, each an array of shape ``(examples, ...)`` of real numbers.

        Returns:
            Shape ``(examples, ...)``, as the model's ``forward`` gives it; for most classifiers logits.

        Raises:
            ValueError: number, shape or values of the inputs are not the plan's; the text says which.
            StepFailed: onnxruntime stopped the run.
        """
        wanted = self.manifest.inputs
        if len(inputs) != len(wanted):
            raise ValueError(f"there are {len(inputs)} inputs, the plan takes {len(wanted)}")
        arrays = tuple(_fitted(values, tensor) for values, tensor in zip(inputs, wanted, strict=True))
        examples = {len(array) for array in arrays}
        if len(examples) != 1:
            raise ValueError(f"the inputs have different numbers of examples: {sorted(examples)}")
        outputs = [
            self._evaluator.predict(self.parameters, tuple(array[start : start + _BATCH] for array in arrays))
            for start in range(0, examples.pop(), _BATCH)
        ]
        return outputs[0] if len(outputs) == 1 else np.concatenate(outputs)

    def _load(self) -> tuple[ReleasedModel | InstalledModel, tuple[object, ...]]:
        for _ in range(_LOADS):
            stamp = self._stamp_now()
            slots = ModelSlots(self._directory, self._key)
            model = slots.newest() if self._newest else slots.released()
            if model is not None:
                return model, stamp
        raise NoModel(self._why_none(slots.newest()))

    def _why_none(self, newest: InstalledModel | None) -> str:
        if newest is None:
            return (
                f"there is no usable model in {self._directory} yet: an agent gets one as soon as it reaches "
                "its coordinator (fedtide agent run)"
            )
        here = f"version {newest.head.version} is installed"
        release = newest.head.release
        if release is None:
            return (
                f"{here}, but the coordinator had released no version yet when it came: none had passed its "
                "gate; fedtide agent predict --newest, or newest=True, uses it all the same"
            )
        return (
            f"{here}, but version {release.version}, which is released, is not here: the agent has not "
            "fetched it yet, or shall not ([inference] keep = false)"
        )

    def _take(self, model: ReleasedModel | InstalledModel, stamp: tuple[object, ...]) -> None:
        plan, manifest = model.plan, model.plan.manifest
        if self._evaluator.plan.id != plan.id:
            self._evaluator = Evaluator(plan, self._threads)
        kept = KeptFile(self._kept_file).of(plan)
        self.manifest = manifest
        self.parameters = with_own_statistics(manifest, model.parameters, kept)
        self._stamp = stamp
        if isinstance(model, ReleasedModel):
            self.version, self.gate = model.release.version, model.release.gate
        else:
            release = model.head.release
            itself = release is not None and release.version == model.head.version
            self.version, self.gate = model.head.version, release.gate if release and itself else None

    def _stamp_now(self) -> tuple[object, ...]:
        names = ("a.model", "b.model") if self._newest else ("released.model",)
        return tuple(map(_stamp, (*(self._directory / name for name in names), self._kept_file)))


def _stamp(file: Path) -> tuple[int, int, int] | None:
    try:
        status = file.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def _fitted(values: Any, wanted: TensorSpec) -> Array:
    """The values with the plan's dtype, if their shape fits and nothing is lost."""
    array = np.asarray(values)
    if array.dtype.kind not in "biuf" or array.shape[1:] != wanted.shape[1:] or not len(np.atleast_1d(array)):
        shape = "×".join(["examples", *map(str, wanted.shape[1:])])
        raise ValueError(
            f"{wanted.name} is {array.dtype} of shape {array.shape}; the plan takes numbers of shape {shape}"
        )
    with np.errstate(over="ignore", invalid="ignore"):  # both are found out at once
        fitted = array.astype(wanted.dtype)
    good = np.isfinite(fitted) if fitted.dtype.kind == "f" else fitted == array
    if not good.all():
        first = int(np.argmin(good.reshape(len(array), -1).all(axis=1)))
        kind = "NaN or infinite" if fitted.dtype.kind == "f" else "not whole numbers"
        raise ValueError(f"{wanted.name} has values that are {kind}, the first in example {first + 1}")
    return np.ascontiguousarray(fitted)
