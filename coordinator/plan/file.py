"""A built plan on disk, with the parameters that training starts from. Needs neither torch nor onnx.

One frame: the version byte, then a msgpack list of manifest, both graphs (zlib), the initial parameters
(float32, little-endian) and a SHA-256 over manifest and parameters; the manifest holds the hashes of the
graphs. The file is not signed: it stays with its owner, and the coordinator signs what it publishes.
"""

import hashlib
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgpack

from fedtide.wire import frame
from fedtide.wire.errors import WireError
from fedtide.wire.parameters import Vector, from_bytes, to_bytes
from fedtide.wire.plan import Plan, PlanManifest, inflate_graph

MAX_FILE_BYTES: Final = 1 << 30
"""A plan is a few KB and its parameters 4 bytes each: room for 268 million of them."""
_PARTS: Final = 5


@dataclass(frozen=True)
class BuiltPlan:
    """A plan and where it starts.

    ``initial``: float32 vector of shape ``(plan.manifest.schema.size,)``.
    """

    plan: Plan
    initial: Vector


class DamagedPlanFile(Exception):
    """The file is not a whole plan file."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} is not a whole plan file: {reason}; build it again")


def save(built: BuiltPlan, path: Path) -> None:
    """Write a plan file; an existing one is replaced in one step, so a reader never sees half a file."""
    manifest, initial = frame.pack(built.plan.manifest), to_bytes(built.initial)
    parts = [
        manifest,
        zlib.compress(built.plan.train, 9),
        zlib.compress(built.plan.evaluation, 9),
        initial,
        hashlib.sha256(manifest + initial).digest(),
    ]
    content = bytes((frame.PROTOCOL_VERSION,)) + bytes(msgpack.packb(parts, use_bin_type=True))
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def load(path: Path) -> BuiltPlan:
    """Read a plan file and check every hash.

    Raises:
        DamagedPlanFile: truncated, changed, or not a plan file.
        OSError: it cannot be read.
    """
    if (size := path.stat().st_size) > MAX_FILE_BYTES:
        raise DamagedPlanFile(path, f"it has {size:,} bytes, and at most {MAX_FILE_BYTES:,} are allowed")
    try:
        parts = frame.unpack_builtins(frame.strip_version(path.read_bytes(), MAX_FILE_BYTES))
        if (
            not isinstance(parts, list)
            or len(parts) != _PARTS
            or not all(isinstance(part, bytes) for part in parts)
        ):
            raise DamagedPlanFile(path, "it does not hold five byte strings")
        packed, train, evaluation, initial, digest = parts
        if hashlib.sha256(packed + initial).digest() != digest:
            raise DamagedPlanFile(path, "manifest and parameters do not have their SHA-256")
        manifest = frame.unpack(packed, PlanManifest)
        plan = Plan(
            manifest,
            inflate_graph(train, manifest.train_sha256, "train"),
            inflate_graph(evaluation, manifest.evaluation_sha256, "evaluation"),
        )
    except WireError as error:
        raise DamagedPlanFile(path, str(error)) from error
    if len(initial) != 4 * manifest.schema.size:
        raise DamagedPlanFile(
            path,
            f"it has {len(initial):,} bytes of parameters, and the plan needs {4 * manifest.schema.size:,}",
        )
    return BuiltPlan(plan, from_bytes(initial))
