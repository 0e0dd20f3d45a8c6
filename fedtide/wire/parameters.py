"""Model parameters: a schema fixes names, shapes and order; the values are one flat float32 vector."""

import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import Final

import numpy as np
import numpy.typing as npt

from fedtide.wire.frame import Message

Vector = npt.NDArray[np.float32]
"""A flat float32 vector of shape ``(schema.size,)``: parameters or a delta."""

FLOAT32: Final = np.dtype("<f4")


class TensorSpec(Message, frozen=True, kw_only=True):
    """One tensor's name, dtype and shape.

    Attributes:
        name: unique within its list.
        dtype: numpy's name, for example ``float32`` or ``int64``.
        shape: sizes of the axes; ``None`` for the batch axis of an input.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...]

    @property
    def size(self) -> int:
        """Number of elements, the batch axis counted as one."""
        return math.prod(axis for axis in self.shape if axis is not None)


class Schema(Message, frozen=True, kw_only=True):
    """The aggregated tensors in their fixed order. Shapes come from the plan, never from a sender."""

    tensors: tuple[TensorSpec, ...]

    @property
    def size(self) -> int:
        """Number of parameters."""
        return sum(tensor.size for tensor in self.tensors)

    def slices(self) -> Iterator[tuple[TensorSpec, slice]]:
        """Each tensor with its place in the flat vector."""
        start = 0
        for tensor in self.tensors:
            yield tensor, slice(start, start + tensor.size)
            start += tensor.size

    def split(self, vector: Vector) -> dict[str, npt.NDArray[np.float32]]:
        """View the flat vector as named tensors, in the schema's order. Nothing is copied."""
        return {
            tensor.name: vector[place].reshape([axis or 0 for axis in tensor.shape])
            for tensor, place in self.slices()
        }

    def flatten(self, tensors: Mapping[str, npt.NDArray[np.float32]]) -> Vector:
        """Copy named tensors into one new flat vector.

        Raises:
            ValueError: a tensor is missing or has another size.
        """
        vector = np.empty(self.size, np.float32)
        for tensor, place in self.slices():
            if tensor.name not in tensors:
                raise ValueError(f"tensor {tensor.name!r} is missing")
            values = tensors[tensor.name]
            if values.size != tensor.size:
                raise ValueError(
                    f"tensor {tensor.name!r} has {values.size} elements, the plan says {tensor.size}"
                )
            vector[place] = values.reshape(-1)
        return vector


def to_bytes(vector: Vector) -> bytes:
    """The little-endian float32 bytes of a vector, the form that is hashed and published."""
    return vector.astype(FLOAT32, copy=False).tobytes()


def from_bytes(content: bytes | memoryview) -> Vector:
    """The inverse of :func:`to_bytes`: a read-only view on the bytes."""
    return np.frombuffer(content, FLOAT32)


def fingerprint(vector: Vector) -> bytes:
    """SHA-256 of the parameters; two models are the same model exactly when this is equal."""
    return hashlib.sha256(np.ascontiguousarray(vector, FLOAT32).data).digest()
