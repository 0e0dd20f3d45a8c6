"""A published model as it travels: whole (a keyframe), or as what changed since an earlier version (a delta).

Every blob says from which version to which it leads and what the parameters are after it. Parameters are
whole numbers of a power-of-two grid per tensor (``codecs.grid``), and so is every delta: adding one is exact
in float32, and all devices at one version hold the same bits, whichever way they came.
"""

from enum import StrEnum
from typing import Final

import numpy as np

from fedtide.wire import frame
from fedtide.wire.codecs.grid import decode_grid_parameters, max_grid_bytes
from fedtide.wire.errors import BlobMismatch, MalformedPayload
from fedtide.wire.frame import Message
from fedtide.wire.ids import ModelVersion
from fedtide.wire.messages import BlobRef, ModelDelta
from fedtide.wire.parameters import FLOAT32, Schema, Vector, fingerprint, from_bytes

OVERHEAD_BYTES: Final = 64
"""Of a blob beyond its payload, at most."""
SHORT_SHA256_BYTES: Final = 16
"""Enough where nobody gains by finding two contents of one hash; the signed head has the whole one."""


class ModelFormat(StrEnum):
    """How the payload holds the parameters."""

    FLOAT32 = "float32"
    """A keyframe: the parameters' little-endian bytes."""
    GRID = "grid"
    """Whole numbers of a grid, entropy coded (``codecs.grid``): all of them, or what is to be added."""


class ModelBlob(Message, frozen=True, array_like=True):
    """A keyframe or a delta. Travels as an array.

    Attributes:
        format: of the payload.
        from_version: to which it is added; None for a keyframe.
        to_version: what results.
        result: the first 16 bytes of the resulting parameters' fingerprint.
        payload: see ``format``.
    """

    format: ModelFormat
    from_version: ModelVersion | None
    to_version: ModelVersion
    result: bytes
    payload: bytes


class IndexRow(Message, frozen=True, array_like=True):
    """One blob in an index. Travels as an array.

    Attributes:
        version: of a delta, where it starts; of an earlier index, where its deltas lead.
        size_bytes: of the blob.
        sha256: the first 16 bytes of it.
    """

    version: ModelVersion
    size_bytes: int
    sha256: bytes


class DeltaIndex(Message, frozen=True, array_like=True):
    """The deltas that lead to one version, and where the indexes of earlier versions are. An array.

    A head that listed the ways from all of the last 128 versions would be larger than the deltas; so it names
    one index, which only devices that have missed something fetch.

    Attributes:
        to_version: where its deltas lead.
        chunk_bytes: of all the blobs named here.
        deltas: one row for each, by the version it starts from.
        earlier: indexes by version.
    """

    to_version: ModelVersion
    chunk_bytes: int
    deltas: tuple[IndexRow, ...]
    earlier: tuple[IndexRow, ...] = ()

    def model_deltas(self) -> tuple[ModelDelta, ...]:
        """The deltas as a head would list them."""
        return tuple(ModelDelta(row.version, self.to_version, self._blob(row)) for row in self.deltas)

    def indexes(self) -> dict[ModelVersion, BlobRef]:
        """The earlier indexes by version."""
        return {row.version: self._blob(row) for row in self.earlier}

    def _blob(self, row: IndexRow) -> BlobRef:
        return BlobRef(row.size_bytes, row.sha256, self.chunk_bytes)


def max_keyframe_bytes(schema: Schema) -> int:
    """The largest keyframe of a model, in bytes; larger ones are refused before they are fetched."""
    return max(FLOAT32.itemsize * schema.size, max_grid_bytes(schema)) + OVERHEAD_BYTES


def keyframe_parameters(content: bytes, version: ModelVersion, schema: Schema) -> Vector:
    """The parameters in a keyframe, float32 of shape ``(schema.size,)``; perhaps a view on ``content``.

    Args:
        content: the blob.
        version: which it must be.
        schema: the plan's.

    Raises:
        MalformedFrame, UnsupportedVersion, MalformedPayload: not a keyframe of this schema.
        BlobMismatch: a delta, another version, or not the parameters it says.
    """
    blob = _opened(content, None, version)
    if blob.format is ModelFormat.GRID:
        parameters = decode_grid_parameters(blob.payload, schema)
    elif len(blob.payload) == FLOAT32.itemsize * schema.size:
        parameters = from_bytes(blob.payload)
        if not np.isfinite(parameters).all():
            raise MalformedPayload("a float32 keyframe holds NaN or an infinity; every value must be finite")
    else:
        raise MalformedPayload(
            f"a float32 keyframe of {len(blob.payload):,} bytes; "
            f"{schema.size:,} parameters take {FLOAT32.itemsize * schema.size:,}"
        )
    _check_result(parameters, blob)
    return parameters


def changed_parameters(content: bytes, delta: ModelDelta, parameters: Vector, schema: Schema) -> Vector:
    """The parameters after a delta: a new float32 vector.

    Args:
        content: the blob.
        delta: which it must be.
        parameters: of ``delta.from_version``, float32 of shape ``(schema.size,)``; left as they are.
        schema: the plan's.

    Raises:
        MalformedFrame, UnsupportedVersion, MalformedPayload: not a delta of this schema.
        BlobMismatch: another delta, or it does not lead to the parameters it says.
    """
    blob = _opened(content, delta.from_version, delta.to_version)
    if blob.format is not ModelFormat.GRID:
        raise MalformedPayload(f"a delta in format {blob.format}; deltas have format {ModelFormat.GRID}")
    after = decode_grid_parameters(blob.payload, schema)
    np.add(parameters, after, out=after)  # exact: all three are whole numbers below 2^24 of one power of two
    _check_result(after, blob)
    return after


def _opened(content: bytes, start: ModelVersion | None, end: ModelVersion) -> ModelBlob:
    blob = frame.from_frame(content, ModelBlob, len(content))
    if (blob.from_version, blob.to_version) != (start, end):
        found, announced = _described(blob.from_version, blob.to_version), _described(start, end)
        raise BlobMismatch(f"{found}; announced was {announced}")
    return blob


def _described(start: ModelVersion | None, end: ModelVersion) -> str:
    return f"a keyframe of version {end}" if start is None else f"a delta from version {start} to {end}"


def _check_result(parameters: Vector, blob: ModelBlob) -> None:
    if fingerprint(parameters)[:SHORT_SHA256_BYTES] != blob.result:
        found = _described(blob.from_version, blob.to_version)
        raise BlobMismatch(f"{found} does not give the parameters that it says")
