"""Models and snapshots on disk, as safetensors: files anyone can open.

models/{version}.safetensors      a published version: the plan's tensors by name, as devices hold them
exact/{version}.safetensors       the same version as aggregated, where that is needed as a base and differs
released.safetensors              the newest version that passed the release gate, which the metadata name
snapshots/{sequence}.safetensors  the whole state after a journal entry
"""

import contextlib
import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from coordinator.aggregation import Buffer
from coordinator.journal import Journal, SnapshotRow
from coordinator.model_grid import Place
from coordinator.model_state import ModelState
from coordinator.server_optimizers import OptimizerState
from coordinator.settings import Rules
from fedtide.wire.durable import write_durably
from fedtide.wire.ids import ModelVersion
from fedtide.wire.parameters import Schema, Vector, fingerprint

log = logging.getLogger(__name__)

_KEPT_SNAPSHOTS: Final = 2
_OPTIMIZER: Final = "optimizer."
_PLACE: Final = "place"
_RECENT_BYTES: Final = 64 << 20  # of published versions stay in memory, but at least two versions


@dataclass(frozen=True)
class StoredRelease:
    """A version that passed the release gate, and what the gate was then."""

    version: ModelVersion
    parameters: Vector
    gate: str


class ModelStore:
    """The published versions, and the released one.

    Args:
        directory: of the published versions; made if it is not there. Others are beside it.
        schema: of the model.
        keep: how many versions stay.
    """

    def __init__(self, directory: Path, schema: Schema, keep: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._schema = schema
        self._keep = keep
        self._recent: dict[ModelVersion, Vector] = {}
        self._recent_exact: dict[ModelVersion, Vector] = {}

    def save(
        self,
        version: ModelVersion,
        parameters: Vector,
        *,
        place: Place | None = None,
        exact: Vector | None = None,
    ) -> None:
        """Write a version durably.

        Args:
            version: its number.
            parameters: as devices hold them.
            place: among the published versions.
            exact: as aggregated, where updates may need these as their base and they differ.
        """
        if exact is not None:
            self._exact.mkdir(exist_ok=True)
            write_durably(self._exact_file(version), save_tensors(self._schema.split(exact)))
            _remember(self._recent_exact, version, exact)
        metadata = None if place is None else {_PLACE: msgspec.json.encode(place).decode()}
        write_durably(self._file(version), save_tensors(self._schema.split(parameters), metadata))
        _remember(self._recent, version, parameters)

    def remove_old(self) -> None:
        """Remove the files of all versions but the last ``keep``."""
        for directory in (self._directory, self._exact):
            for file in sorted(directory.glob("*.safetensors"))[: -self._keep]:
                file.unlink()

    def places(self) -> dict[ModelVersion, Place]:
        """Where the kept versions stand among the published ones, as far as their files say."""
        found = {}
        for path in sorted(self._directory.glob("*.safetensors")):
            with contextlib.suppress(SafetensorError, msgspec.DecodeError, KeyError, ValueError):
                with safe_open(path, framework="numpy") as file:
                    place = (file.metadata() or {})[_PLACE]
                found[ModelVersion(int(path.stem))] = msgspec.json.decode(place, type=Place)
        return found

    def base(self, version: ModelVersion) -> Vector:
        """The parameters of a kept version as aggregated, if they were kept; else as devices hold them.

        Raises:
            FileNotFoundError: it is not kept.
        """
        parameters = self._recent_exact.get(version)
        if parameters is not None:
            return parameters
        if not self.has_exact(version):
            return self.parameters(version)
        parameters = self._schema.flatten(load_tensors(self._exact_file(version).read_bytes()))
        _remember(self._recent_exact, version, parameters)
        return parameters

    def has_exact(self, version: ModelVersion) -> bool:
        """Whether a version is kept as aggregated."""
        return self._exact_file(version).exists()

    def parameters(self, version: ModelVersion) -> Vector:
        """The parameters of a kept version.

        Raises:
            FileNotFoundError: it is not kept.
        """
        parameters = self._recent.get(version)
        if parameters is None:
            parameters = self._schema.flatten(load_tensors(self._file(version).read_bytes()))
            _remember(self._recent, version, parameters)  # which may let go of it at once, as the oldest
        return parameters

    def save_release(self, release: StoredRelease) -> None:
        """Make a version the released one, durably and in one step."""
        metadata = {"version": str(release.version), "gate": release.gate, "sha256": _digest(release)}
        content = save_tensors(self._schema.split(release.parameters), metadata)
        write_durably(self._release_file, content)

    def release(self) -> StoredRelease | None:
        """The released version; None while there is none, or if its file is damaged."""
        try:
            with safe_open(self._release_file, framework="numpy") as file:
                metadata = file.metadata() or {}
                parameters = self._schema.flatten({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
            stored = StoredRelease(ModelVersion(int(metadata["version"])), parameters, metadata["gate"])
            whole = _digest(stored) == metadata["sha256"]
        except FileNotFoundError:
            return None
        except (SafetensorError, ValueError, KeyError) as error:
            log.warning(
                "%s cannot be read: %s", self._release_file, error, extra={"event": "release.damaged"}
            )
            return None
        if not whole:
            log.warning("%s is damaged: its content does not have its SHA-256", self._release_file,
                        extra={"event": "release.damaged"})  # fmt: skip
            return None
        return stored

    @property
    def _release_file(self) -> Path:
        return self._directory.parent / "released.safetensors"

    @property
    def _exact(self) -> Path:
        return self._directory.parent / "exact"

    def _exact_file(self, version: ModelVersion) -> Path:
        return self._exact / f"{version:012d}.safetensors"

    def _file(self, version: ModelVersion) -> Path:
        return self._directory / f"{version:012d}.safetensors"


def _remember(recent: dict[ModelVersion, Vector], version: ModelVersion, parameters: Vector) -> None:
    recent[version] = parameters
    while len(recent) > _recent_versions(parameters):
        # A version may be read in one thread while another is saved in the journal's.
        recent.pop(min(list(recent)), None)


def _digest(release: StoredRelease) -> str:
    """SHA-256 of all that is stored, in hexadecimal."""
    text = f"{release.version}\n{release.gate}\n".encode()
    return hashlib.sha256(text + fingerprint(release.parameters)).hexdigest()


def _recent_versions(parameters: Vector) -> int:
    """How many versions stay in memory."""
    return max(2, _RECENT_BYTES // max(1, parameters.nbytes))


class SnapshotStore:
    """Snapshots of the state, so that recovery need not replay from the beginning."""

    def __init__(self, directory: Path, journal: Journal) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._journal = journal

    def save(self, sequence: int, state: ModelState) -> None:
        """Write the state after entry ``sequence`` durably, and remove all but the newest snapshots."""
        content = _pack(state)
        write_durably(self._file(sequence), content)
        self._journal.add_snapshot(SnapshotRow(sequence, state.version, hashlib.sha256(content).digest()))
        for old in self._journal.snapshots()[_KEPT_SNAPSHOTS:]:
            self._journal.forget_snapshot(old.sequence)
            self._file(old.sequence).unlink(missing_ok=True)

    def whole(self) -> Iterator[tuple[int, ModelState]]:
        """The snapshots that are whole, newest first, each with the number of its entry."""
        for row in self._journal.snapshots():
            try:
                content = self._file(row.sequence).read_bytes()
            except FileNotFoundError:
                continue
            if hashlib.sha256(content).digest() == row.sha256:
                yield row.sequence, _unpack(content, row.version)

    def _file(self, sequence: int) -> Path:
        return self._directory / f"{sequence:012d}.safetensors"


def _pack(state: ModelState) -> bytes:
    tensors: dict[str, npt.NDArray[Any]] = {
        "parameters": state.parameters,
        "buffer.total": state.buffer.total,
        "buffer.divisor": np.array(state.buffer.divisor, np.float64),
        "buffer.count": np.array(state.buffer.count, np.int64),
        "rules": np.frombuffer(state.rules.to_bytes(), np.uint8),
    }
    tensors.update({_OPTIMIZER + name: vector for name, vector in state.optimizer.arrays().items()})
    return save_tensors(tensors)


def _unpack(content: bytes, version: ModelVersion) -> ModelState:
    tensors = load_tensors(content)
    rules = Rules.from_bytes(tensors["rules"].tobytes())
    parameters = tensors["parameters"]
    vectors = {
        name.removeprefix(_OPTIMIZER): tensor
        for name, tensor in tensors.items()
        if name.startswith(_OPTIMIZER)
    }
    optimizer: OptimizerState = rules.server_optimizer.from_arrays(vectors, parameters.size)
    buffer = Buffer(
        total=np.array(tensors["buffer.total"]),  # a copy of our own, because folding writes to it
        divisor=float(tensors["buffer.divisor"]),
        count=int(tensors["buffer.count"]),
    )
    return ModelState(version, parameters, buffer, optimizer, rules)
