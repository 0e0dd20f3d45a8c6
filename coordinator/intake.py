"""Intake: from one MQTT payload to a verified update, everything bounded before it is parsed. No I/O.

In order: the chunk's size, the sender's place in the roster, the envelope's size, assembly, the envelope's
structure, the payload's hash, the sender's name, the signature. What fails is refused with its reason.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from coordinator.admission import Rejection
from coordinator.poison import UNWATCHED, Watch, name_of
from fedtide.wire import frame
from fedtide.wire.chunks import MAX_CHUNK_BYTES, Assembler
from fedtide.wire.codecs import CODECS
from fedtide.wire.envelope import Envelope, max_envelope_bytes, open_update, update_digest
from fedtide.wire.errors import (
    BadSignature,
    BlobMismatch,
    FrameTooLarge,
    MalformedFrame,
    MalformedId,
    PayloadDamaged,
    UnsupportedVersion,
    WireError,
)
from fedtide.wire.ids import Counter, DeviceId, device_id
from fedtide.wire.messages import Reason, UpdateChunk
from fedtide.wire.parameters import Schema
from fedtide.wire.signatures import PublicKey

MAX_CHUNK_FRAME_BYTES: Final = MAX_CHUNK_BYTES + 1024
_SHA256_BYTES: Final = 32
_LEAST_CHUNK_BYTES: Final = 512  # on average; keeping track of smaller ones costs more memory than they hold


@dataclass(frozen=True)
class Arrived:
    """A whole update whose signature is its device's."""

    envelope: Envelope
    raw: bytes
    digest: bytes


@dataclass(frozen=True)
class Refused:
    """Something that is not an update we can judge.

    Attributes:
        sender: the topic's device.
        counter: what it claimed, 0 if unreadable.
        digest: identity of the bytes refused: of the envelope once all of it is here, before that of the one
            message, because what a chunk says of its envelope anybody can say. None where they were damaged
            on the way, so that the device sends them again instead of dropping them.
        rejection: why.
    """

    sender: DeviceId
    counter: Counter
    digest: bytes | None
    rejection: Rejection


class Intake:
    """Assembles and verifies updates.

    Args:
        schema: bounds an envelope's size: the largest payload any codec makes of it.
        key_of: the roster's look-up.
        max_partial_bytes: of all updates of which some chunks have arrived.
        watch: is told what is being read.
    """

    def __init__(
        self,
        schema: Schema,
        key_of: Callable[[DeviceId], PublicKey | None],
        max_partial_bytes: int,
        watch: Watch = UNWATCHED,
    ) -> None:
        largest = max(codec.max_bytes(schema) for codec in CODECS.values())
        self._max_bytes = max_envelope_bytes(largest)
        self._key_of = key_of
        self._watch = watch
        self.assembler = Assembler(self._max_bytes, max(max_partial_bytes, self._max_bytes))

    def receive(self, sender: str, payload: bytes, now: float) -> Arrived | Refused | None:
        """Take one message of the ``up`` topic; None while chunks are missing.

        Args:
            sender: the topic's device level.
            payload: the message.
            now: seconds of a clock that only grows.
        """
        name = name_of(payload)
        if self._watch.is_poison(name):
            self._watch.set_aside(sender, name, payload, None)
            return _unreadable(sender, payload, "it ended the coordinator each time it was read")
        self._watch.begins(name)
        try:
            return self._read(sender, payload, now)
        except Exception as error:  # noqa: BLE001 - one arrival must not end the coordinator, again and again
            self._watch.set_aside(sender, name, payload, error)
            self.assembler.drop(sender)
            return _unreadable(sender, payload, f"reading it raised {type(error).__name__}")
        finally:
            self._watch.ends()

    def _read(self, sender: str, payload: bytes, now: float) -> Arrived | Refused | None:
        counter: Counter = Counter(0)
        whole: UpdateChunk | None = None
        try:
            device = device_id(sender)
            chunk = frame.from_frame(payload, UpdateChunk, MAX_CHUNK_FRAME_BYTES)
            _check_bounds(chunk)
            counter = chunk.counter
            key = self._key_of(device)
            if key is None:
                return Refused(device, counter, chunk.digest, _not_enrolled(device))
            raw = self.assembler.add(sender, chunk, now)
            if raw is None:
                return None
            whole = chunk
            return self._open(device, key, raw, chunk)
        except WireError as error:
            if isinstance(error, PayloadDamaged | BlobMismatch):
                digest = None
            else:
                digest = whole.digest if whole else update_digest(payload)
            return Refused(DeviceId(sender), counter, digest, Rejection(_reason(error), str(error)))

    def _open(self, device: DeviceId, key: PublicKey, raw: bytes, chunk: UpdateChunk) -> Arrived | Refused:
        envelope = open_update(raw, self._max_bytes)
        header = envelope.header
        if header.device != device or header.counter != chunk.counter:
            claim = f"the header says device {header.device[:64]!r}, counter {header.counter}"
            detail = f"{claim}; topic and chunk say {device!r}, {chunk.counter}"
            return Refused(device, chunk.counter, chunk.digest, Rejection(Reason.WRONG_DEVICE, detail))
        envelope.verify(key)
        return Arrived(envelope, raw, chunk.digest)


def _check_bounds(chunk: UpdateChunk) -> None:
    """Refuse chunks that would take memory which the assembler does not count as held bytes."""
    if len(chunk.digest) != _SHA256_BYTES:
        raise MalformedFrame(f"a digest of {len(chunk.digest):,} bytes; a SHA-256 has {_SHA256_BYTES}")
    if chunk.count == 1:
        return
    if not chunk.content:
        raise MalformedFrame(f"chunk {chunk.index} of {chunk.count} is empty")
    if chunk.count > 1 + chunk.size_bytes // _LEAST_CHUNK_BYTES:
        raise MalformedFrame(
            f"{chunk.count:,} chunks for {chunk.size_bytes:,} bytes; "
            f"chunks hold at least {_LEAST_CHUNK_BYTES} bytes"
        )


def _unreadable(sender: str, payload: bytes, why: str) -> Refused:
    detail = f"its bytes were kept for the operator: {why}"
    return Refused(DeviceId(sender), Counter(0), update_digest(payload), Rejection(Reason.UNREADABLE, detail))


def _not_enrolled(device: DeviceId) -> Rejection:
    return Rejection(
        Reason.UNKNOWN_DEVICE, f"device {device} is not enrolled; the operator runs: fedtide enrol {device}"
    )


def _reason(error: WireError) -> Reason:
    match error:
        case FrameTooLarge():
            return Reason.TOO_LARGE
        case UnsupportedVersion():
            return Reason.UNSUPPORTED_VERSION
        case BadSignature():
            return Reason.BAD_SIGNATURE
        case MalformedId():
            return Reason.UNKNOWN_DEVICE
        case _:
            return Reason.MALFORMED
