"""Models on disk, as safetensors: files anyone can open.

models/{version}.safetensors      a published version: the plan's tensors by name, as devices hold them
exact/{version}.safetensors       the same version as aggregated, where that is needed as a base and differs
released.safetensors              the newest version that passed the release gate, which the metadata name
"""

import contextlib
import hashlib
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from coordinator.journal.errors import storing
from coordinator.model_grid import Place
from fedtide.wire.disk import OS_DISK, Disk, write_durably
from fedtide.wire.ids import ModelVersion
from fedtide.wire.parameters import Schema, Vector, fingerprint
from fedtide.wire.steps import Step, reached

log = logging.getLogger(__name__)

_ENDING: Final = ".safetensors"
_PLACE: Final = "place"
_LENGTH_BYTES: Final = 8  # before the header of a safetensors file
_MAX_HEADER_BYTES: Final = 16 << 20
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
        disk: where that is.
    """

    def __init__(self, directory: Path, schema: Schema, keep: int, disk: Disk = OS_DISK) -> None:
        with storing(directory, "making the directory of the models"):
            disk.make_directory(directory)
        self._disk = disk
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

        Raises:
            StorageFailed: the disk is full or failed.
        """
        if exact is not None:
            content = save_tensors(self._schema.split(exact))
            with storing(self._exact_file(version), f"writing model version {version}"):
                self._disk.make_directory(self._exact)
                write_durably(self._disk, self._exact_file(version), content)
            _remember(self._recent_exact, version, exact)
        metadata = None if place is None else {_PLACE: msgspec.json.encode(place).decode()}
        content = save_tensors(self._schema.split(parameters), metadata)
        with storing(self._file(version), f"writing model version {version}"):
            write_durably(self._disk, self._file(version), content)
        _remember(self._recent, version, parameters)
        reached(Step.MODEL_SAVED)

    def remove_old(self, needed: ModelVersion | None = None) -> None:
        """Remove the files of all versions but the last ``keep``, and those from ``needed`` on."""
        with storing(self._directory, "removing old models"):
            for directory in (self._directory, self._exact):
                for version in self._versions(directory)[: -self._keep]:
                    if needed is None or version < needed:
                        self._disk.remove(_file_in(directory, version))

    def forget_before(self, first: ModelVersion) -> None:
        """Remove the files of versions before ``first``, which are another plan's, and unfinished ones."""
        for directory in (self._directory, self._exact):
            for name in self._disk.names(directory):
                if name.endswith(".new"):
                    self._disk.remove(directory / name)
            for version in self._versions(directory):
                if version < first:
                    self._disk.remove(_file_in(directory, version))
        if self._released_version() < first:
            self._disk.remove(self._release_file)

    def newest(self) -> ModelVersion:
        """The highest version that there is a file of; 0 where there is none."""
        return max(self._versions(self._directory), default=ModelVersion(0))

    def places(self) -> dict[ModelVersion, Place]:
        """Where the kept versions stand among the published ones, as far as their files say."""
        found = {}
        for version in self._versions(self._directory):
            with contextlib.suppress(msgspec.DecodeError, KeyError, ValueError):
                metadata = _metadata(self._disk, self._file(version))
                found[version] = msgspec.json.decode(metadata[_PLACE], type=Place)
        return found

    def base(self, version: ModelVersion) -> Vector:
        """The parameters of a kept version as aggregated, if they were kept; else as devices hold them.

        Raises:
            FileNotFoundError: it is not kept, or its file is damaged.
        """
        parameters = self._recent_exact.get(version)
        if parameters is not None:
            return parameters
        if not self.has_exact(version):
            return self.parameters(version)
        parameters = self._loaded(self._exact_file(version))
        _remember(self._recent_exact, version, parameters)
        return parameters

    def has_exact(self, version: ModelVersion) -> bool:
        """Whether a version is kept as aggregated."""
        try:
            return self._disk.size(self._exact_file(version)) > 0
        except FileNotFoundError:
            return False

    def parameters(self, version: ModelVersion) -> Vector:
        """The parameters of a kept version.

        Raises:
            FileNotFoundError: it is not kept, or its file is damaged.
        """
        parameters = self._recent.get(version)
        if parameters is None:
            parameters = self._loaded(self._file(version))
            _remember(self._recent, version, parameters)  # which may let go of it at once, as the oldest
        return parameters

    def save_release(self, release: StoredRelease) -> None:
        """Make a version the released one, durably and in one step.

        Raises:
            StorageFailed: the disk is full or failed.
        """
        metadata = {"version": str(release.version), "gate": release.gate, "sha256": _digest(release)}
        content = save_tensors(self._schema.split(release.parameters), metadata)
        with storing(self._release_file, f"writing the released version {release.version}"):
            write_durably(self._disk, self._release_file, content)

    def release(self) -> StoredRelease | None:
        """The released version; None while there is none, or if its file is damaged."""
        try:
            metadata = _metadata(self._disk, self._release_file)
            parameters = self._schema.flatten(load_tensors(self._disk.read(self._release_file)))
            stored = StoredRelease(ModelVersion(int(metadata["version"])), parameters, metadata["gate"])
            whole = _digest(stored) == metadata["sha256"]
        except FileNotFoundError:
            return None
        except (SafetensorError, msgspec.DecodeError, ValueError, KeyError) as error:
            log.warning(
                "%s cannot be read: %s", self._release_file, error, extra={"event": "release.damaged"}
            )
            return None
        if not whole:
            log.warning("%s is damaged: its content does not have its SHA-256", self._release_file,
                        extra={"event": "release.damaged"})  # fmt: skip
            return None
        return stored

    def _loaded(self, path: Path) -> Vector:
        try:
            return self._schema.flatten(load_tensors(self._disk.read(path)))
        except (SafetensorError, ValueError) as error:
            log.warning("%s cannot be read: %s", path, error, extra={"event": "model.damaged"})
            raise FileNotFoundError(f"{path} is damaged: {error}") from error

    @property
    def _release_file(self) -> Path:
        return self._directory.parent / "released.safetensors"

    @property
    def _exact(self) -> Path:
        return self._directory.parent / "exact"

    def _exact_file(self, version: ModelVersion) -> Path:
        return _file_in(self._exact, version)

    def _file(self, version: ModelVersion) -> Path:
        return _file_in(self._directory, version)

    def _versions(self, directory: Path) -> list[ModelVersion]:
        """Versions that there are files of, oldest first."""
        stems = [name.removesuffix(_ENDING) for name in self._disk.names(directory) if name.endswith(_ENDING)]
        return sorted(ModelVersion(int(stem)) for stem in stems if stem.isdigit())

    def _released_version(self) -> ModelVersion:
        """As its file says; the largest there is where it says nothing."""
        try:
            return ModelVersion(int(_metadata(self._disk, self._release_file)["version"]))
        except (FileNotFoundError, msgspec.DecodeError, ValueError, KeyError):
            return ModelVersion(sys.maxsize)


def _file_in(directory: Path, version: ModelVersion) -> Path:
    return directory / f"{version:012d}{_ENDING}"


def _metadata(disk: Disk, path: Path) -> dict[str, str]:
    """What a safetensors file says of itself, without its tensors. Format: 8 bytes of length, then JSON.

    Raises:
        ValueError, msgspec.DecodeError: it is damaged.
        FileNotFoundError: it is not there.
    """
    length = int.from_bytes(disk.read(path, 0, _LENGTH_BYTES), "little")
    if length > _MAX_HEADER_BYTES:
        raise ValueError(f"a header of {length} bytes")
    header = msgspec.json.decode(disk.read(path, _LENGTH_BYTES, length), type=dict[str, msgspec.Raw])
    return msgspec.json.decode(header.get("__metadata__", msgspec.Raw(b"{}")), type=dict[str, str])


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
