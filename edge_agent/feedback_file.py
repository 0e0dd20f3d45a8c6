"""Where a device keeps what error feedback carries from one update to the next.

    error-feedback          magic, CRC-32 of the rest, length of the header, header, vector, payload
    error-feedback.applied  magic, CRC-32 of the rest, counter of the update that a receipt called applied

The large file is written before the update is in the outbox: whatever happens to the update after that,
nothing of it is lost. The receipt writes only the small one, and before the update leaves the outbox: should
a power cut come between, the update is sent again, its receipt says "duplicate", and nothing drains twice.
"""

import logging
import struct
import zlib
from pathlib import Path
from typing import Final

import numpy as np

from edge_agent.checked_file import body_of, checked
from edge_agent.error_feedback import Feedback, residual_of, settled
from fedtide.wire import frame
from fedtide.wire.disk import OS_DISK, Disk, write_durably
from fedtide.wire.errors import MalformedFrame, WireError
from fedtide.wire.frame import Message
from fedtide.wire.ids import Counter, PlanId
from fedtide.wire.parameters import FLOAT32, Vector
from fedtide.wire.plan import Plan
from fedtide.wire.steps import Step, reached

log = logging.getLogger(__name__)

_MAGIC: Final = b"ftf2"
_HEAD: Final = struct.Struct("<4sII")
_LENGTH: Final = struct.Struct("<I")
_APPLIED_MAGIC: Final = b"fta1"
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

    A file that is damaged, or cannot be read at the start, is removed with a log line, and the next update
    carries its own delta only. Whatever raises ``OSError`` here was not done, and may be done again.

    Args:
        path: the large file; its directory must be there.
        disk: where it is.

    Attributes:
        counter: of the update that the feedback is about; None: there is none. What the outbox has of earlier
            updates is in this one too.

    Raises:
        OSError: the directory cannot be synced, or a damaged file not removed.
    """

    def __init__(self, path: Path, disk: Disk = OS_DISK) -> None:
        self._path = path
        self._applied_path = path.with_name(path.name + ".applied")
        self._disk = disk
        disk.sync_directory(path.parent)  # what a killed process renamed is relied on from here
        try:
            feedback = self._load()
        except OSError as error:  # at the next start it would be the same
            self._give_up(path, error)
            feedback = None
        self.counter = feedback.counter if feedback else None
        self._is_settled = feedback is not None and feedback.applied

    def residual(self, plan: Plan) -> Vector | None:
        """What the next update of this plan has to carry. Feedback on another plan is forgotten.

        Returns:
            float32, shape ``(schema.size,)``, the caller's own; None: nothing.

        Raises:
            OSError: it cannot be read now, or what is of no use not removed.
        """
        if self.counter is None:
            return None
        feedback, residual, schema = self._load(), None, plan.manifest.schema
        if feedback is not None and feedback.plan == plan.id and feedback.vector.size == schema.size:
            try:
                residual = residual_of(feedback, schema)
            except WireError as error:
                self._say_lost(self._path, error)
        if residual is None:
            self._forget()
        return residual

    def keep(self, feedback: Feedback) -> None:
        """Make the feedback on a new update durable, before that update can be sent.

        Raises:
            OSError: the disk is full or failed. The file is the old one or the new one.
        """
        vector = np.ascontiguousarray(feedback.vector, FLOAT32)
        header = frame.pack(
            _Header(
                plan=feedback.plan, counter=feedback.counter, codec=feedback.codec, parameters=vector.size
            )
        )
        crc = _crc(_LENGTH.pack(len(header)), header, vector.data, feedback.payload)
        head = _HEAD.pack(_MAGIC, crc, len(header))
        content = b"".join((head, header, vector.data, feedback.payload))
        write_durably(self._disk, self._path, content)
        self.counter, self._is_settled = feedback.counter, False
        reached(Step.FEEDBACK_KEPT)

    def settle(self, counter: Counter) -> None:
        """An update was applied: make that durable, if the feedback is about this one.

        Raises:
            OSError: the disk is full or failed.
        """
        if counter != self.counter or self._is_settled:
            return
        write_durably(self._disk, self._applied_path, checked(_APPLIED_MAGIC, _COUNTER.pack(counter)))
        self._is_settled = True
        reached(Step.FEEDBACK_SETTLED)

    def drop(self, counter: Counter) -> None:
        """Nobody knows whether an update was applied: carry nothing on, if the feedback is about this one.

        Raises:
            OSError: the disk failed.
        """
        if counter == self.counter and not self._is_settled:
            self._forget()

    def _load(self) -> Feedback | None:
        path = self._path
        try:
            feedback = self._read()
            path = self._applied_path
            return settled(feedback, self._read_applied())
        except FileNotFoundError:
            return None
        except MalformedFrame as error:
            self._give_up(path, error)
            return None

    def _read(self) -> Feedback:
        """The large file's content, but for whether it was applied. In parts: it may be many megabytes.

        Raises:
            MalformedFrame: it is not what was written.
        """
        path, size_bytes = self._path, self._disk.size(self._path)
        head = self._disk.read(path, 0, _HEAD.size + _MOST_HEADER_BYTES)
        if len(head) < _HEAD.size:
            raise MalformedFrame(f"it has only {size_bytes} bytes")
        magic, crc, header_bytes = _HEAD.unpack_from(head)
        if magic != _MAGIC or header_bytes > _MOST_HEADER_BYTES:
            raise MalformedFrame("it does not begin as such a file")
        start = _HEAD.size + header_bytes
        packed = head[_HEAD.size : start]
        header = frame.unpack(packed, _Header)
        end = start + header.parameters * FLOAT32.itemsize
        if not start <= end <= size_bytes:
            raise MalformedFrame(f"{header.parameters:,} parameters do not fit into {size_bytes:,} bytes")
        vector = np.frombuffer(self._disk.read(path, start, end - start), FLOAT32).copy()
        payload = self._disk.read(path, end)
        if crc != _crc(_LENGTH.pack(header_bytes), packed, vector.data, payload):
            raise MalformedFrame("it does not have its CRC-32")
        return Feedback(PlanId(header.plan), Counter(header.counter), vector, header.codec, payload)

    def _read_applied(self) -> Counter | None:
        """The small file's counter, or None: no update was called applied.

        Raises:
            MalformedFrame: it is not what was written.
        """
        try:
            content = self._disk.read(self._applied_path)
        except FileNotFoundError:
            return None
        return Counter(_COUNTER.unpack(body_of(_APPLIED_MAGIC, content, _COUNTER.size))[0])

    def _give_up(self, path: Path, error: Exception) -> None:
        """Without knowing whether it was applied, to carry all of it might apply it twice."""
        self._say_lost(path, error)
        self._forget()
        self._disk.remove(path)

    def _forget(self) -> None:
        # The small file stays: if a power cut brought the large one back without it, that would seem open.
        self._disk.remove(self._path)
        self._disk.sync_directory(self._path.parent)
        self.counter = None

    def _say_lost(self, path: Path, error: Exception) -> None:
        log.warning(
            "%s is not usable; what updates have left out so far is lost: %s", path, error,
            extra={"event": "feedback.damaged"},
        )  # fmt: skip


def _crc(*parts: bytes | memoryview) -> int:
    crc = 0
    for part in parts:
        crc = zlib.crc32(part, crc)
    return crc
