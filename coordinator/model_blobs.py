"""The blobs of a version: its keyframe, and the deltas to it that are worth having. No I/O of its own.

Encoding takes time: call it in a thread, one call at a time.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from coordinator.closed_loop import Version
from coordinator.model_deltas import sources, sources_anew
from coordinator.model_grid import difference, grid_of
from coordinator.settings import Publish
from fedtide.wire import frame
from fedtide.wire.codecs.grid import encode_grid
from fedtide.wire.ids import ModelVersion
from fedtide.wire.model_blob import SHORT_SHA256_BYTES, ModelBlob, ModelFormat
from fedtide.wire.parameters import Schema, Vector, to_bytes

Earlier = Callable[[int], tuple[ModelVersion, Vector] | None]
"""Finds a published version by its sequence number, with its parameters; None for one that is not kept."""


@dataclass(frozen=True)
class VersionBlobs:
    """All that is to be published of a version.

    Attributes:
        version: which.
        keyframe: all of it.
        deltas: number of the version each starts from, and its blob; newest first.
    """

    version: Version
    keyframe: bytes
    deltas: tuple[tuple[ModelVersion, bytes], ...]


class BlobMaker:
    """Encodes versions.

    Args:
        settings: format, and whether there are deltas.
        schema: of the model.
        earlier: finds the versions that deltas start from.
    """

    def __init__(self, settings: Publish, schema: Schema, earlier: Earlier) -> None:
        self._settings = settings
        self._schema = schema
        self._earlier = earlier

    def blobs(self, version: Version, *, anew: bool) -> VersionBlobs:
        """The blobs of a version.

        Args:
            version: to be published.
            anew: no delta of earlier versions is on the broker.
        """
        keyframe = self.keyframe(version)
        if not self._settings.with_deltas:
            return VersionBlobs(version, keyframe, ())
        sequence = version.place.sequence
        found = map(self._earlier, sources_anew(sequence) if anew else sources(sequence))
        deltas = self._deltas((older for older in found if older is not None), version)
        return VersionBlobs(
            version, keyframe, tuple((start, delta) for start, delta in deltas if len(delta) < len(keyframe))
        )

    def keyframe(self, version: Version) -> bytes:
        """A version whole: as integers; as floats where it is on no grid or integers are no smaller."""
        content = to_bytes(version.parameters)
        grid = None
        if self._settings.format == ModelFormat.GRID:
            grid = grid_of(version.parameters, self._schema)
        if grid is not None:
            encoded = encode_grid(grid.values, grid.exponents, self._schema)
            if len(encoded) < len(content):
                return _framed(ModelFormat.GRID, None, version, encoded)
        return _framed(ModelFormat.FLOAT32, None, version, content)

    def _deltas(
        self, older: Iterable[tuple[ModelVersion, Vector]], version: Version
    ) -> Iterator[tuple[ModelVersion, bytes]]:
        for start, parameters in older:
            grid = difference(parameters, version.parameters, self._schema)
            if grid is not None:
                payload = encode_grid(grid.values, grid.exponents, self._schema)
                yield start, _framed(ModelFormat.GRID, start, version, payload)


def _framed(form: ModelFormat, start: ModelVersion | None, version: Version, payload: bytes) -> bytes:
    result = version.fingerprint[:SHORT_SHA256_BYTES]
    return frame.to_frame(ModelBlob(form, start, version.number, result, payload))
