"""Splitting large content into MQTT messages, and putting it together again within bounds."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Final

from fedtide.wire import frame
from fedtide.wire.envelope import update_digest
from fedtide.wire.errors import BlobMismatch, FrameTooLarge, MalformedFrame
from fedtide.wire.ids import Counter
from fedtide.wire.messages import BlobRef, UpdateChunk

MAX_CHUNK_BYTES: Final = 122_880
"""120 KiB: one 10 MB retained message to 200 devices took mosquitto to 1534 MB, chunks of this size to 20 MB;
it also fits the smallest hosted brokers' 128 KB."""
_SHA256_BYTES: Final = (16, 32)  # an index of many blobs gives their first half, which names them too
_RESERVED_BYTES: Final = 1024  # for the MQTT packet's topic and properties
_MOST_MISSING: Final = 256  # named at once; the rest once these have come


def chunk_bytes(broker_maximum: int | None, configured: int = MAX_CHUNK_BYTES) -> int:
    """The chunk size for a broker that announced ``broker_maximum`` bytes per packet, if it announced any."""
    announced = MAX_CHUNK_BYTES if broker_maximum is None else broker_maximum - _RESERVED_BYTES
    return max(1, min(MAX_CHUNK_BYTES, announced, configured))


def split(content: bytes, size_bytes: int) -> Iterator[bytes]:
    """Cut content into pieces of ``size_bytes``; empty content is one empty piece."""
    for start in range(0, max(len(content), 1), size_bytes):
        yield content[start : start + size_bytes]


def blob_ref(content: bytes, size_bytes: int) -> BlobRef:
    """Describe content that is to be published in chunks of ``size_bytes``."""
    return BlobRef(size_bytes=len(content), sha256=hashlib.sha256(content).digest(), chunk_bytes=size_bytes)


def check_ref(ref: BlobRef, max_bytes: int) -> None:
    """Check that a reference is within bounds and consistent, before anything is fetched or allocated.

    Raises:
        FrameTooLarge: the blob is larger than this device accepts.
        MalformedFrame: a size or a hash that no blob has.
    """
    if ref.size_bytes > max_bytes:
        raise FrameTooLarge(ref.size_bytes, max_bytes)
    if ref.chunk_bytes <= 0 or ref.size_bytes < 0 or len(ref.sha256) not in _SHA256_BYTES:
        raise MalformedFrame(
            f"a blob of {ref.size_bytes} bytes in chunks of {ref.chunk_bytes} with a SHA-256 of "
            f"{len(ref.sha256)} bytes"
        )


def join_blob(ref: BlobRef, chunks: dict[int, bytes]) -> bytes:
    """Put a blob together.

    Raises:
        BlobMismatch: the bytes are not the announced ones.
    """
    content = b"".join(chunks[index] for index in range(ref.chunks))
    digest = hashlib.sha256(content).digest()[: len(ref.sha256)]
    if len(content) != ref.size_bytes or digest != ref.sha256:
        raise BlobMismatch(f"blob {ref.id}: the chunks do not have the announced size and SHA-256")
    return content


def update_chunks(envelope: bytes, counter: Counter, size_bytes: int) -> list[bytes]:
    """The frames that carry one envelope, each holding at most ``size_bytes`` of it."""
    digest = update_digest(envelope)
    pieces = list(split(envelope, size_bytes))
    return [
        frame.to_frame(
            UpdateChunk(
                counter=counter,
                digest=digest,
                size_bytes=len(envelope),
                index=index,
                count=len(pieces),
                content=piece,
            )
        )
        for index, piece in enumerate(pieces)
    ]


@dataclass
class PartialUpdate:
    """The chunks of one envelope that have arrived.

    Attributes:
        first: the first chunk seen; the others must agree with it.
        chunks: contents by index.
        size_bytes: what they add up to.
        touched: when the last one arrived, in seconds of the caller's clock.
        asked: how often the missing ones were asked for since then.
    """

    first: UpdateChunk
    chunks: dict[int, bytes]
    size_bytes: int
    touched: float
    asked: int = 0

    def missing(self) -> tuple[int, ...]:
        """Indexes that have not arrived, the first 256: how many there are is only the sender's claim."""
        return self._absent(self.first.count)

    def gaps(self) -> tuple[int, ...]:
        """Those of them that a later chunk has overtaken, so that they are no longer on their way."""
        return self._absent(max(self.chunks))

    def _absent(self, end: int) -> tuple[int, ...]:
        return tuple(islice((index for index in range(end) if index not in self.chunks), _MOST_MISSING))


class Assembler:
    """Puts envelopes together from chunks, at most one at a time per sender, within a total of bytes.

    Args:
        max_envelope_bytes: larger envelopes are refused at their first chunk.
        max_total_bytes: of all partial envelopes; beyond it the least recently touched is dropped.
    """

    def __init__(self, max_envelope_bytes: int, max_total_bytes: int) -> None:
        self._max_envelope_bytes = max_envelope_bytes
        self._max_total_bytes = max_total_bytes
        self._partial: dict[str, PartialUpdate] = {}
        self._held_bytes = 0

    @property
    def held_bytes(self) -> int:
        """Bytes of all partial envelopes."""
        return self._held_bytes

    def add(self, sender: str, chunk: UpdateChunk, now: float) -> bytes | None:
        """Take a chunk; the whole envelope when it was the last one missing.

        A chunk of another envelope replaces the sender's partial one: a device has one update in flight.

        Raises:
            FrameTooLarge: the envelope would be larger than accepted.
            MalformedFrame: a size or a hash that no blob has.
            BlobMismatch: the chunks here are not the announced bytes; nobody knows which one is wrong.
        """
        if chunk.size_bytes > self._max_envelope_bytes:
            raise FrameTooLarge(chunk.size_bytes, self._max_envelope_bytes)
        if not 0 <= chunk.index < chunk.count <= max(1, chunk.size_bytes):
            raise MalformedFrame(f"chunk {chunk.index} of {chunk.count} of {chunk.size_bytes:,} bytes")
        if chunk.count > 1 and not chunk.content:
            raise MalformedFrame(f"chunk {chunk.index} of {chunk.count} is empty")
        if chunk.count == 1:
            self.drop(sender)
            return _checked(chunk.content, chunk)
        partial = self._matching(sender, chunk, now)
        if chunk.index not in partial.chunks:
            partial.chunks[chunk.index] = chunk.content
            partial.size_bytes += len(chunk.content)
            self._held_bytes += len(chunk.content)
        partial.touched, partial.asked = now, 0
        if partial.size_bytes > chunk.size_bytes:
            self.drop(sender)
            raise BlobMismatch(f"chunks add up to more than the announced {chunk.size_bytes:,} bytes")
        if len(partial.chunks) < chunk.count:
            self._make_room(keep=sender)
            return None
        self.drop(sender)
        return _checked(b"".join(partial.chunks[index] for index in range(chunk.count)), chunk)

    def drop(self, sender: str) -> None:
        """Forget a sender's partial envelope, if any."""
        partial = self._partial.pop(sender, None)
        if partial:
            self._held_bytes -= partial.size_bytes

    def silent_since(self, moment: float) -> dict[str, PartialUpdate]:
        """Partial envelopes of which nothing arrived since ``moment``, by sender."""
        return {sender: partial for sender, partial in self._partial.items() if partial.touched < moment}

    def _matching(self, sender: str, chunk: UpdateChunk, now: float) -> PartialUpdate:
        partial = self._partial.get(sender)
        if partial is None or not _same_envelope(partial.first, chunk):
            self.drop(sender)
            partial = self._partial[sender] = PartialUpdate(chunk, {}, 0, now)
        return partial

    def _make_room(self, keep: str) -> None:
        while self._held_bytes > self._max_total_bytes and len(self._partial) > 1:
            others = (sender for sender in self._partial if sender != keep)
            self.drop(min(others, key=lambda sender: self._partial[sender].touched))


def _same_envelope(one: UpdateChunk, other: UpdateChunk) -> bool:
    return (one.counter, one.digest, one.size_bytes, one.count) == (
        other.counter,
        other.digest,
        other.size_bytes,
        other.count,
    )


def _checked(envelope: bytes, chunk: UpdateChunk) -> bytes:
    if len(envelope) != chunk.size_bytes or update_digest(envelope) != chunk.digest:
        raise BlobMismatch("the chunks are not the announced envelope")
    return envelope
