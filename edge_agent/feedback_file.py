"""Where a device keeps what error feedback carries from one update to the next.

    error-feedback          magic, CRC-32 of the rest, length of the header, header, vector, payload
    error-feedback.applied  magic, CRC-32 of the rest, counter of the update that a receipt called applied

The large file is written before the update is in the outbox: whatever happens to the update after that,
nothing of it is lost. The receipt writes only the small one, and before the update leaves the outbox: should
a power cut come between, the update is sent again, its receipt says "duplicate", and nothing drains twice.
"""

import logging
import os
import struct
import zlib
from io import BufferedReader
from pathlib import Path
from typing import Final

import numpy as np

from edge_agent.error_feedback import Feedback, residual_of, settled
from fedtide.wire import frame
from fedtide.wire.durable import sync_directory, write_durably
from fedtide.wire.errors import MalformedFrame, WireError
from fedtide.wire.frame import Message
from fedtide.wire.ids import Counter, PlanId
from fedtide.wire.parameters import FLOAT32, Vector
from fedtide.wire.plan import Plan

log = logging.getLogger(__name__)

_MAGIC: Final = b"ftf1"
_START: Final = struct.Struct("<4sII")
_HEAD: Final = struct.Struct("<4sI")
_COUNTER: Final = struct.Struct("<Q")
_MOST_HEADER_BYTES: Final = 4096


class _Header(Message, frozen=True, kw_only=True):
    """What the large file says of its update; the vector and the payload follow."""

    plan: str
    counter: int
    codec: str
    parameters: int


class FeedbackFile:
    """The feedback of one plan, on disk; nothing of it stays in memory between two updates.

    A damaged file is left out with a log line, and the next update carries its own delta only.

    Args:
        path: the large file; its directory must be there.
        sync: False for simulated devices.

    Attributes:
        counter: of the update that the feedback is about; None: there is none. What the outbox has of earlier
            updates is in this one too.
    """

    def __init__(self, path: Path, *, sync: bool = True) -> None:
        self._path = path
        self._applied_path = path.with_name(path.name + ".applied")
        self._sync = sync
        feedback = self._load()
        self.counter = feedback.counter if feedback else None
        self._is_settled = feedback is not None and feedback.applied

    def residual(self, plan: Plan) -> Vector | None:
        """What the next update of this plan has to carry. Feedback on another plan is forgotten.

        Returns:
            float32, shape ``(schema.size,)``, the caller's own; None: nothing.
        """
        feedback = self._load() if self.counter is not None else None
        if feedback is None:
            return None
        schema = plan.manifest.schema
        same_plan = feedback.plan == plan.id and feedback.vector.size == schema.size
        try:
            residual = residual_of(feedback, schema) if same_plan else None
        except WireError as error:
            self._say_lost(self._path, error)
            residual = None
        if residual is None:
            self._forget()
        return residual

    def keep(self, feedback: Feedback) -> None:
        """Make the feedback on a new update durable, before that update can be sent."""
        vector = np.ascontiguousarray(feedback.vector, FLOAT32)
        header = frame.pack(
            _Header(
                plan=feedback.plan, counter=feedback.counter, codec=feedback.codec, parameters=vector.size
            )
        )
        crc = zlib.crc32(feedback.payload, zlib.crc32(vector.data, zlib.crc32(header)))
        start = _START.pack(_MAGIC, crc, len(header))
        content = b"".join((start, header, vector.data, feedback.payload))
        write_durably(self._path, content, sync=self._sync)
        self.counter, self._is_settled = feedback.counter, False

    def settle(self, counter: Counter) -> None:
        """An update was applied: make that durable, if the feedback is about this one."""
        if counter != self.counter or self._is_settled:
            return
        body = _COUNTER.pack(counter)
        write_durably(self._applied_path, _HEAD.pack(_MAGIC, zlib.crc32(body)) + body, sync=self._sync)
        self._is_settled = True

    def drop(self, counter: Counter) -> None:
        """Nobody knows whether an update was applied: carry nothing on, if the feedback is about this one."""
        if counter == self.counter and not self._is_settled:
            self._forget()

    def _load(self) -> Feedback | None:
        path = self._path
        try:
            with path.open("rb") as file:
                feedback = _read(file)
            path = self._applied_path
            return settled(feedback, _read_applied(path))
        except FileNotFoundError:
            return None
        except MalformedFrame as error:
            # Without knowing whether it was applied, to carry all of it might apply it twice.
            self._say_lost(path, error)
            self._forget()
            path.unlink(missing_ok=True)
            return None

    def _forget(self) -> None:
        # The small file stays: if a power cut brought the large one back without it, that would seem open.
        self._path.unlink(missing_ok=True)
        if self._sync:
            sync_directory(self._path.parent)
        self.counter = None

    def _say_lost(self, path: Path, error: Exception) -> None:
        log.warning(
            "%s is not usable; what updates have left out so far is lost: %s", path, error,
            extra={"event": "feedback.damaged"},
        )  # fmt: skip


def _read(file: BufferedReader) -> Feedback:
    """The large file's content, but for whether it was applied. Nothing is allocated beyond the file's size.

    Raises:
        MalformedFrame: it is not what was written.
    """
    size_bytes = os.fstat(file.fileno()).st_size
    start = file.read(_START.size)
    if len(start) < _START.size:
        raise MalformedFrame(f"it has only {size_bytes} bytes")
    magic, crc, header_bytes = _START.unpack(start)
    if magic != _MAGIC or header_bytes > _MOST_HEADER_BYTES:
        raise MalformedFrame("it does not begin as such a file")
    packed = file.read(header_bytes)
    header = frame.unpack(packed, _Header)
    if not 0 <= header.parameters * FLOAT32.itemsize <= size_bytes - _START.size - header_bytes:
        raise MalformedFrame(f"{header.parameters:,} parameters do not fit into {size_bytes:,} bytes")
    vector = np.empty(header.parameters, FLOAT32)
    file.readinto(vector.data)
    payload = file.read()
    if crc != zlib.crc32(payload, zlib.crc32(vector.data, zlib.crc32(packed))):
        raise MalformedFrame("it does not have its CRC-32")
    return Feedback(PlanId(header.plan), Counter(header.counter), vector, header.codec, payload)


def _read_applied(path: Path) -> Counter | None:
    """The small file's counter, or None: no update was called applied.

    Raises:
        MalformedFrame: it is not what was written.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    if len(content) != _HEAD.size + _COUNTER.size:
        raise MalformedFrame(f"it has {len(content)} bytes, not {_HEAD.size + _COUNTER.size}")
    magic, crc = _HEAD.unpack_from(content)
    body = content[_HEAD.size :]
    if magic != _MAGIC or crc != zlib.crc32(body):
        raise MalformedFrame("it does not have its CRC-32")
    return Counter(_COUNTER.unpack(body)[0])
