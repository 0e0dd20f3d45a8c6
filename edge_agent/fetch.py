"""Fetching a blob: subscribe to the retained chunks that are missing, a few at a time, and unsubscribe after.

The device sets the pace, a broken transfer resumes where it stopped, and the broker never holds more for a
device than a few chunks.
"""

import asyncio
import contextlib
from dataclasses import dataclass, field
from typing import Final

from fedtide.wire.chunks import MAX_CHUNK_BYTES, check_ref, join_blob
from fedtide.wire.ids import BlobId, FleetId
from fedtide.wire.link import Connection, LinkDown
from fedtide.wire.messages import BlobRef
from fedtide.wire.model_blob import OVERHEAD_BYTES
from fedtide.wire.topics import BLOB_CHUNK

_OUTSTANDING: Final = 4
_SILENCE_S: Final = 10.0
_SILENCE_AFTER_A_HEAD_S: Final = 3.0  # the blob may have been cleared, and the new head may name another
_UNSUBSCRIBING_S: Final = 5.0  # the broker has it all the same, only later


class FetchFailed(Exception):
    """The chunks did not come: the blob was cleared, or the broker lost it. A newer head names another."""


class Superseded(FetchFailed):
    """A head came meanwhile, and then no more chunks: what it names is to be fetched instead."""


@dataclass
class Fetcher:
    """Fetches one blob at a time and keeps its chunks across connections.

    Attributes:
        fleet: whose blobs.
        max_bytes: larger models are refused, and blobs that could not be one of this size.
    """

    fleet: FleetId
    max_bytes: int
    _blob: BlobId | None = None
    _count: int = 0
    _chunk_bytes: int = 0
    _chunks: dict[int, bytes] = field(default_factory=dict)
    _arrived: asyncio.Event = field(default_factory=asyncio.Event)
    _head_came: bool = False
    _patient_until: float = 0.0  # by the event loop's clock

    def take(self, blob: str, index: int, payload: bytes) -> None:
        """Take a delivered chunk; anything not asked for is ignored."""
        if blob == self._blob and 0 <= index < self._count and 0 < len(payload) <= MAX_CHUNK_BYTES:
            self._chunks[index] = payload
            self._patient_until = _now() + self._patience_s
            self._arrived.set()

    def note_head(self) -> None:
        """A head came: what is being fetched is given up soon after its chunks stop.

        Only the first counts: where versions follow each other quickly, no head would otherwise be the last.
        """
        if not self._head_came:
            self._head_came = True
            self._patient_until = min(self._patient_until, _now() + self._patience_s)
            self._arrived.set()

    async def fetch(self, connection: Connection, ref: BlobRef) -> bytes:
        """The blob's content, checked.

        Raises:
            WireError: the reference or the content is wrong.
            FetchFailed: nothing came for ten seconds; :class:`Superseded` after three, where a head came
                since the fetch began.
            LinkDown: the connection was lost; chunks that came are kept for the next attempt.
        """
        check_ref(ref, self.max_bytes + OVERHEAD_BYTES)
        self._head_came = False
        if (ref.id, ref.chunks, ref.chunk_bytes) != (self._blob, self._count, self._chunk_bytes):
            self._blob, self._count, self._chunk_bytes = ref.id, ref.chunks, ref.chunk_bytes
            self._chunks = {}  # the same blob may have been published anew in other chunks
        missing = [index for index in range(ref.chunks) if index not in self._chunks]
        for start in range(0, len(missing), _OUTSTANDING):
            await self._pull(connection, ref, missing[start : start + _OUTSTANDING])
        chunks, self._blob, self._chunks = self._chunks, None, {}
        return join_blob(ref, chunks)

    @property
    def _patience_s(self) -> float:
        return _SILENCE_AFTER_A_HEAD_S if self._head_came else _SILENCE_S

    async def _pull(self, connection: Connection, ref: BlobRef, indexes: list[int]) -> None:
        names = [BLOB_CHUNK.name(self.fleet, blob=ref.id, index=index) for index in indexes]
        # NATS keeps a consumer for every QoS 1 subscription and runs out of them (it speaks 3.1.1 only).
        await connection.subscribe(names, qos=1 if connection.mqtt_version == "5" else 0)
        try:
            self._patient_until = _now() + self._patience_s
            while any(index not in self._chunks for index in indexes):
                self._arrived.clear()
                async with asyncio.timeout_at(self._patient_until):
                    await self._arrived.wait()
        except TimeoutError:
            if self._head_came:
                raise Superseded(f"no chunk of blob {ref.id} came after a newer head") from None
            raise FetchFailed(f"no chunk of blob {ref.id} came for {_SILENCE_S:g} s") from None
        finally:
            # Which must not take the place of a cancellation, nor hold it up where the link is dead.
            with contextlib.suppress(LinkDown, TimeoutError):
                async with asyncio.timeout(_UNSUBSCRIBING_S):
                    await connection.unsubscribe(names)


def _now() -> float:
    return asyncio.get_running_loop().time()
