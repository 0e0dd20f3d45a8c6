"""What a device keeps between its updates on one plan, and never sends.

Two things, each only where the plan or its training asks for it: the optimizer's state (``optimizer_state =
"keep"``), and the device's own running statistics (``buffers = "local"``: Li et al., FedBN, ICLR 2021).
"""

import hashlib
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from edge_agent.dataset import Array
from fedtide.wire import frame
from fedtide.wire.disk import OS_DISK, Disk, write_durably
from fedtide.wire.errors import MalformedFrame
from fedtide.wire.frame import Message
from fedtide.wire.ids import PlanId
from fedtide.wire.parameters import TensorSpec, Vector
from fedtide.wire.plan import Plan, PlanManifest

log = logging.getLogger(__name__)

_DIGEST_BYTES: Final = 32


@dataclass(frozen=True)
class Kept:
    """What one device keeps. Each part is empty where nothing is kept of it.

    Attributes:
        optimizer: the optimizer's state tensors, in the order of the manifest's ``local_state``.
        statistics: the device's own float buffers, in the order of :func:`own_tensors`.
        counters: the device's own other buffers, in the order of the manifest's ``local_buffers``.
    """

    optimizer: tuple[Array, ...] = ()
    statistics: tuple[Array, ...] = ()
    counters: tuple[Array, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.optimizer or self.statistics or self.counters)

    @property
    def is_finite(self) -> bool:
        """Whether all of it is; what is not would spoil every later update."""
        return all(np.isfinite(array).all() for array in self._arrays)

    @property
    def _arrays(self) -> tuple[Array, ...]:
        return (*self.optimizer, *self.statistics, *self.counters)


NOTHING_KEPT: Final = Kept()


def own_tensors(manifest: PlanManifest) -> Iterator[tuple[TensorSpec, slice]]:
    """The aggregated tensors that a device has its own values of, with their places in the flat vector."""
    if manifest.buffers == "local":
        yield from (
            (tensor, place) for tensor, place in manifest.schema.slices() if tensor.name.startswith("b.")
        )


def with_own_statistics(manifest: PlanManifest, parameters: Vector, kept: Kept) -> Vector:
    """The parameters that a device trains and evaluates: its own statistics in the place of the global ones.

    Args:
        manifest: the plan's.
        parameters: float32, shape ``(schema.size,)``; never written to.
        kept: what the device kept of this plan.

    Returns:
        ``parameters`` itself where there is nothing to put into it, else a copy.
    """
    if not kept.statistics:
        return parameters
    own = parameters.copy()
    for (_, place), values in zip(own_tensors(manifest), kept.statistics, strict=True):
        own[place] = values.reshape(-1)
    return own


class _Record(Message, frozen=True, kw_only=True):
    """What the file holds: the plan, and each tensor's little-endian bytes in the manifest's order."""

    plan: str
    optimizer: tuple[bytes, ...]
    statistics: tuple[bytes, ...]
    counters: tuple[bytes, ...]


class KeptFile:
    """What a device keeps, in one file: the SHA-256 of the rest, then the plan's id and the tensors.

    A file of another plan is of no use and is written over; one that is damaged or cannot be read is left out
    with a log line, and the next update starts as the first one did.

    Args:
        path: the file; its directory must be there.
        disk: where it is.
    """

    def __init__(self, path: Path, disk: Disk = OS_DISK) -> None:
        self._path = path
        self._disk = disk
        self._plan: PlanId | None = None
        self._kept = NOTHING_KEPT

    def of(self, plan: Plan) -> Kept:
        """What was kept after the last update on this plan."""
        if self._plan != plan.id:
            self._kept = self._load(plan)
            self._plan = plan.id
        return self._kept

    def keep(self, plan: Plan, kept: Kept) -> None:
        """Keep this instead. What is not finite is not kept: the next update starts as the first one did.

        Raises:
            OSError: the disk is full or failed; the next update starts from what was kept before.
        """
        if not kept.is_finite:
            log.warning("What was kept is not finite and is dropped", extra={"event": "kept.dropped"})
            kept = NOTHING_KEPT
        if kept:
            write_durably(self._disk, self._path, _packed(plan.id, kept))
        else:
            self._disk.remove(self._path)
        self._plan, self._kept = plan.id, kept

    def _load(self, plan: Plan) -> Kept:
        try:
            record = _unpacked(self._disk.read(self._path))
            if record.plan != plan.id:
                return NOTHING_KEPT
            manifest = plan.manifest
            return Kept(
                _arrays(manifest.local_state, record.optimizer),
                _arrays(tuple(tensor for tensor, _ in own_tensors(manifest)), record.statistics),
                _arrays(manifest.local_buffers, record.counters),
            )
        except FileNotFoundError:
            return NOTHING_KEPT
        except (MalformedFrame, OSError) as error:
            log.warning("%s is not usable: %s", self._path, error, extra={"event": "kept.damaged"})
            return NOTHING_KEPT


def _packed(plan: PlanId, kept: Kept) -> bytes:
    record = _Record(
        plan=plan,
        optimizer=tuple(map(_to_bytes, kept.optimizer)),
        statistics=tuple(map(_to_bytes, kept.statistics)),
        counters=tuple(map(_to_bytes, kept.counters)),
    )
    content = frame.pack(record)
    return hashlib.sha256(content).digest() + content


def _unpacked(content: bytes) -> _Record:
    if hashlib.sha256(memoryview(content)[_DIGEST_BYTES:]).digest() != content[:_DIGEST_BYTES]:
        raise MalformedFrame("it does not have its SHA-256")
    return frame.unpack(memoryview(content)[_DIGEST_BYTES:], _Record)


def _to_bytes(array: Array) -> bytes:
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def _arrays(tensors: tuple[TensorSpec, ...], contents: tuple[bytes, ...]) -> tuple[Array, ...]:
    """The arrays of these tensors; none if nothing was kept of them."""
    if not contents:
        return ()
    if len(contents) != len(tensors):
        raise MalformedFrame(f"it holds {len(contents)} tensors, and the plan has {len(tensors)}")
    return tuple(_array(tensor, content) for tensor, content in zip(tensors, contents, strict=True))


def _array(tensor: TensorSpec, content: bytes) -> Array:
    dtype = np.dtype(tensor.dtype).newbyteorder("<")
    shape = [axis or 0 for axis in tensor.shape]
    if len(content) != math.prod(shape) * dtype.itemsize:
        raise MalformedFrame(f"{tensor.name} has {len(content)} bytes, and its shape is {shape}")
    return np.frombuffer(content, dtype).reshape(shape)
